"""Facts about what a size other than the best costs: every method that sees other sizes finds a planted surface's cost."""

import json
import math

import numpy as np
import pytest
from planted import EQUAL, LAW, ladder
from test_scaling_fit import study
from test_scaling_methods import curves, sheet

from dit_jax.scaling.__main__ import main
from dit_jax.scaling.akima import fit_akima
from dit_jax.scaling.envelope import fit_envelope
from dit_jax.scaling.fit import fit_isoflop
from dit_jax.scaling.overhead import off_by
from dit_jax.scaling.surface import fit_varpro


@pytest.mark.parametrize("factor", [0.5, 2.0, 4.0])
def test_the_cost_of_a_wrong_size_is_that_of_the_planted_surface(factor):
    fit, c = fit_varpro(ladder(), resamples=0), 1e22
    off, best = off_by(fit, c, factor), LAW.optimum(6.0)
    n = factor * best["N_opt"](c)
    assert off.loss == pytest.approx(LAW(n, c / 6 / n), rel=1e-6)
    assert off.rise == pytest.approx(off.loss - best["L_opt"](c), rel=1e-4)
    far = off.compute * c
    n = factor * best["N_opt"](far)
    assert pytest.approx(best["L_opt"](c), rel=1e-8) == LAW(n, far / 6 / n)


@pytest.mark.parametrize("law", [LAW, EQUAL], ids=["LAW", "EQUAL"])
@pytest.mark.parametrize(
    ("fit", "make", "error"),
    [
        (fit_akima, ladder, 0.005),  # quartics for a surface's exponentials, and the laws through interpolated minima
        (fit_akima, lambda law: ladder(law, sizes=17, budgets=8), 0.005),
        (fit_envelope, curves, 0.002),  # E of the law through the crossings of interpolated curves is good to 1e-3
        (fit_envelope, lambda law: curves(law, ratio=4.0), 0.002),
    ],
    ids=["akima", "akima, 17 sizes", "envelope", "envelope, 4x apart"],
)
def test_curves_of_loss_tell_the_cost_of_the_planted_surface(law, fit, make, error):
    found, best, c = fit(make(law), resamples=0), law.optimum(6.0), 1e22
    for factor in (0.5, 2.0):
        off, n = off_by(found, c, factor), factor * best["N_opt"](c)
        share = (law(n, c / 6 / n) - best["L_opt"](c)) / (best["L_opt"](c) - law.E)
        assert off.rise == pytest.approx(share * (best["L_opt"](c) - law.E), rel=error)
        assert off.compute - 1 == pytest.approx((1 + share) ** (1 / -best["L_opt"].exponent) - 1, rel=error)
        assert off.rise_interval[0] != off.rise_interval[0]  # no resamples


def test_isoflop_curves_tell_the_same_cost():
    """Parabolas through a narrow grid of a surface: the share of the reducible loss that a wrong size costs, at any compute."""
    runs = [r for r in ladder(budgets=8, sizes=17) if abs(math.log(r.params / LAW.optimum(6.0)["N_opt"](r.flops))) < 1]
    fit, truth = fit_isoflop(runs, resamples=0), fit_varpro(runs, resamples=0)
    for c in (1e20, 1e24):
        ours = [off_by(fit, c, f) for f in (0.5, 2.0)]
        theirs = [off_by(truth, c, f) for f in (0.5, 2.0)]
        assert ours[0].rise == pytest.approx(sum(o.rise for o in theirs) / 2, rel=0.1)
        assert ours[0].compute == pytest.approx(theirs[0].compute, rel=0.05)


NOISY = {
    "varpro": (fit_varpro, lambda seed: ladder(noise=0.005, seed=seed)),
    "akima": (fit_akima, lambda seed: ladder(noise=0.005, seed=seed)),
    "envelope": (fit_envelope, lambda seed: curves(noise=0.001, sizes=14, seed=seed)),
}


@pytest.mark.parametrize("method", NOISY)
@pytest.mark.parametrize(
    ("studies", "resamples", "least"), [(6, 60, 0.8), pytest.param(200, 400, 0.9, marks=pytest.mark.slow)]
)
def test_intervals_of_the_cost_hold_the_truth(method, studies, resamples, least):
    (fit, make), hits = NOISY[method], {0.5: [], 2.0: []}
    surface = fit_varpro(ladder(), resamples=0)
    exact = {factor: off_by(surface, 1e22, factor).compute for factor in hits}
    for seed in range(studies):
        found = fit(make(seed), resamples=resamples, seed=10**6 + seed)
        for factor, held in hits.items():
            low, high = off_by(found, 1e22, factor).compute_interval
            held.append(1 <= low <= exact[factor] <= high < 2)
    shares = {factor: float(np.mean(held)) for factor, held in hits.items()}
    print(method, shares)
    assert min(shares.values()) >= least, shares


def test_intervals_of_the_cost_on_isoflop_curves_hold_its_value():
    fit = fit_isoflop(study(noise=0.003, seed=1), resamples=200)
    off = off_by(fit, 1e12, 2.0)
    assert off.rise_interval[0] < off.rise < off.rise_interval[1] and off.compute_interval[0] >= 1


def test_where_no_run_is_so_far_off_that_is_said():
    """Sizes within a factor 4 of the best tell what a size 2x off costs, and nothing of one 8x off."""
    fit = fit_akima(ladder(noise=0.001), resamples=50)
    near, far = (off_by(fit, 1e22, factor) for factor in (2.0, 8.0))
    assert (
        near.rise > 0
        and near.source == "smooth curves through the runs of the 6 of 6 budgets that have sizes so far off"
    )
    assert math.isnan(far.rise) and math.isnan(far.compute) and math.isnan(far.compute_interval[0])
    assert far.source == "akima found no smooth curve of loss that reaches so far from the best size"


@pytest.mark.parametrize(
    ("method", "runs", "said"),
    [
        ("akima", ladder(noise=0.002), "0.5 and 2 x N_opt is read from: smooth curves through the runs of the 6 of 6"),
        ("envelope", curves(points=12), "0.5 and 2 x N_opt is read from: 8 of 8 training curves, where they touch the loss law"),
        ("akima", [r for r in ladder(sizes=15) if 4 < int(r.name.split("_")[1]) < 10], "0.5 and 2 x N_opt is not known: akima"),
    ],
)  # fmt: skip
def test_a_plan_says_where_the_cost_is_read(tmp_path, capsys, method, runs, said):
    path, out = sheet(tmp_path / "runs.csv", runs), tmp_path / "plan.json"
    arguments = ["--flops=1e22", f"--method={method}", "--resamples=40", f"--json={out}"]
    assert main(["plan", path, *arguments]) == 0
    assert f"The cost at {said}" in capsys.readouterr().out
    half, twice = json.loads(out.read_text())["plans"][0]["off"]
    known = "not known" not in said
    assert [o["compute"] is not None for o in (half, twice)] == [known] * 2
    if known:
        assert half["compute_interval"][0] <= half["compute"] <= half["compute_interval"][1] < 1.3
