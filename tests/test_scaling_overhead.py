"""Facts about what a size other than the best costs: every method that tells the loss of other sizes finds a planted surface's cost."""

import csv
import json
import math

import numpy as np
import pytest
from planted import LAW, ladder, study

from dit_jax.scaling.__main__ import main
from dit_jax.scaling.fits import fit_akima, fit_gadre, fit_isoflop, fit_varpro
from dit_jax.scaling.plans.overhead import off_by


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
    assert math.isnan(off.rise_interval[0]) and math.isnan(off.compute_interval[0])  # no resamples


def test_isoflop_curves_tell_the_same_cost():
    """Parabolas through a narrow grid of a surface: the share of the reducible loss that a wrong size costs, at any compute."""
    runs = [r for r in ladder(budgets=8, sizes=17) if abs(math.log(r.params / LAW.optimum(6.0)["N_opt"](r.flops))) < 1]
    fit, truth = fit_isoflop(runs, resamples=0), fit_varpro(runs, resamples=0)
    for c in (1e20, 1e24):
        ours = [off_by(fit, c, f) for f in (0.5, 2.0)]
        theirs = [off_by(truth, c, f) for f in (0.5, 2.0)]
        assert ours[0].rise == pytest.approx(sum(o.rise for o in theirs) / 2, rel=0.1)
        assert ours[0].compute == pytest.approx(theirs[0].compute, rel=0.05)


@pytest.mark.parametrize("method", [fit_varpro, fit_isoflop, fit_gadre])
@pytest.mark.parametrize(
    ("studies", "resamples", "least"), [(6, 60, 0.8), pytest.param(200, 400, 0.9, marks=pytest.mark.slow)]
)
def test_intervals_of_the_cost_hold_the_truth(method, studies, resamples, least):
    hits: dict = {0.5: [], 2.0: []}
    surface = (fit_gadre if method is fit_gadre else fit_varpro)(ladder(), resamples=0)
    exact = {factor: off_by(surface, 1e22, factor).compute for factor in hits}
    for seed in range(studies):
        found = method(ladder(noise=0.005, seed=seed), resamples=resamples, seed=10**6 + seed)
        for factor, held in hits.items():
            low, high = off_by(found, 1e22, factor).compute_interval
            held.append(1 <= low <= exact[factor] <= high < 2)
    shares = {factor: float(np.mean(held)) for factor, held in hits.items()}
    print(method.__name__, shares)
    assert min(shares.values()) >= least, shares


def test_intervals_of_the_cost_on_isoflop_curves_hold_its_value():
    fit = fit_isoflop(study(noise=0.003, seed=1), resamples=200)
    off = off_by(fit, 1e12, 2.0)
    assert off.rise_interval[0] < off.rise < off.rise_interval[1] and off.compute_interval[0] >= 1
    assert off.source == "the curves of the 5 budgets"


def test_a_fit_of_the_best_sizes_alone_says_that_it_does_not_know():
    off = off_by(fit_akima(ladder(noise=0.001), resamples=50), 1e22, 2.0)
    assert math.isnan(off.rise) and math.isnan(off.compute) and math.isnan(off.compute_interval[0])
    assert off.source == "method akima tells the loss of the best size alone" and off.params > 0


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("isoflop", "0.5 and 2 x N_opt is read from: the curves of the 6 budgets."),
        ("varpro", "0.5 and 2 x N_opt is read from: the fitted law of loss in N and D."),
        ("akima", "0.5 and 2 x N_opt is not known: method akima tells the loss of the best size alone."),
    ],
)
def test_a_plan_says_where_the_cost_is_read(tmp_path, capsys, method, said):
    path, out = tmp_path / "runs.csv", tmp_path / "plan.json"
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["run", "params", "tokens", "loss"])
        rows.writerows([r.name, r.params, r.tokens, r.loss] for r in ladder(noise=0.002))
    arguments = ["--flops=1e22", f"--method={method}", "--resamples=40", f"--json={out}"]
    assert main(["plan", str(path), *arguments]) == 0
    assert f"The cost at {said}" in capsys.readouterr().out
    half, twice = json.loads(out.read_text())["plans"][0]["off"]
    known = "not known" not in said
    assert [o["compute"] is not None for o in (half, twice)] == [known] * 2
    if known:
        assert half["compute_interval"][0] <= half["compute"] <= half["compute_interval"][1] < 1.5
