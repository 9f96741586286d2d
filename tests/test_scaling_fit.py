"""Facts about the fits: planted laws come back, intervals hold them, and poor data are named."""

import csv
import math
import os
from dataclasses import replace

import numpy as np
import pytest
from planted import LAW, scatter

from dit_jax.error import UsageError
from dit_jax.scaling.__main__ import main
from dit_jax.scaling.fit import METHODS, fit_isoflop
from dit_jax.scaling.law import PowerLaw, fit_irreducible, fit_power
from dit_jax.scaling.plan import plan
from dit_jax.scaling.predict import extrapolate, holdout_largest, interval, predict
from dit_jax.scaling.runs import Run

DATA = os.path.join(os.path.dirname(__file__), "data")
N_LAW, L_LAW = PowerLaw(0.09, 0.52), PowerLaw(22.0, -0.22, 0.38)
BUDGETS = np.geomspace(4e9, 1.3e11, 5)


def study(noise=0.0, seed=0, budgets=BUDGETS, sizes=5, width=6.0, curvature=0.02, loss=L_LAW, se=0.0) -> list[Run]:
    """Runs whose isoFLOP curves are exactly quadratic in log N, off-centre by a random shift, plus noise."""
    rng = np.random.default_rng(seed)
    runs = []
    for c in budgets:
        shift = rng.uniform(-0.4, 0.4)
        for i, u in enumerate(np.linspace(-1, 1, sizes) * math.log(width) + shift):
            value = loss(c) + curvature * u**2 + noise * rng.standard_normal()
            n = N_LAW(c) * math.exp(u)
            d = c / (6 * n)
            runs.append(Run(f"{c:.2g}_{i}", float(n), float(d), float(c), float(value), se, images=float(d / 16)))
    return runs


def test_no_chance_group_decides_the_laws_of_scattered_runs():
    """Three runs of one compute by chance, one of them a failure, make the sharpest parabola of all. It once had nearly all the weight."""
    runs = scatter(noise=0.003, count=240)
    n = LAW.optimum(6.0)["N_opt"](4e20) * np.array([0.3, 3.0, 9.0])
    rows = zip(n.tolist(), (4e20, 4.04e20, 4.08e20), (0.0, -0.3, 1.0), strict=True)
    chance = [Run(f"odd{i}", v, c / 6 / v, c, float(LAW(v, c / 6 / v)) + off) for i, (v, c, off) in enumerate(rows)]
    runs = [r for r in runs if not 3.5e20 < r.flops < 4.5e20] + chance
    fit = fit_isoflop(runs, resamples=100)
    odd = next(b for b in fit.used if b.runs[0].name == "odd0")
    assert odd.curvature > 5 * fit.curvature and not fit.identifiable
    laws = [f.laws for f in (fit, fit_isoflop([r for r in runs if not r.name.startswith("odd")], resamples=0))]
    assert laws[0]["N_opt"].exponent == pytest.approx(laws[1]["N_opt"].exponent, abs=0.05)
    assert laws[0]["N_opt"].exponent + laws[0]["D_opt"].exponent == pytest.approx(1.0, abs=1e-9)
    assert holdout_largest(runs, resamples=0) is None


def test_fit_recovers_a_planted_law():
    fit = fit_isoflop(study())
    assert fit.laws["N_opt"].exponent == pytest.approx(0.52, rel=1e-6)
    assert fit.laws["N_opt"].coefficient == pytest.approx(0.09, rel=1e-6)
    assert fit.laws["D_opt"].exponent == pytest.approx(0.48, rel=1e-6)
    assert fit.laws["D_opt"].coefficient == pytest.approx(1 / 0.54, rel=1e-6)
    for name in ("coefficient", "exponent", "irreducible"):
        assert getattr(fit.laws["L_opt"], name) == pytest.approx(getattr(L_LAW, name), rel=1e-6)
    assert fit.identifiable and not fit.warnings and len(fit.used) == 5
    assert fit.curvature == pytest.approx(0.02, rel=1e-6)


def test_pure_loss_law_is_recovered_and_chosen_below_four_budgets():
    pure = PowerLaw(2.3943, -0.0273)
    fit = fit_isoflop(study(budgets=BUDGETS[:3], loss=pure))
    assert "L_opt_irreducible" not in fit.laws
    assert fit.laws["L_opt"].exponent == pytest.approx(pure.exponent, rel=1e-6)
    assert fit.laws["L_opt"].coefficient == pytest.approx(pure.coefficient, rel=1e-6)


def test_a_law_without_irreducible_term_is_a_bound_of_the_irreducible_law():
    C = np.geomspace(1e9, 1e12, 6)
    law = fit_irreducible(C, PowerLaw(5.0, -0.1)(C)[None], np.ones((1, 6)))
    assert float(law.irreducible[0]) == pytest.approx(0.0, abs=1e-6)
    assert float(law.exponent[0]) == pytest.approx(-0.1, rel=1e-5)


def test_a_growing_loss_has_no_reducible_part():
    C = np.geomspace(1e9, 1e12, 6)
    law = fit_irreducible(C, np.linspace(1, 2, 6)[None], np.ones((1, 6)))
    assert float(law.coefficient[0]) == 0 and float(law.irreducible[0]) == pytest.approx(1.5)


def test_zero_weight_leaves_a_point_out():
    C = np.geomspace(1e9, 1e12, 5)
    y = PowerLaw(3.0, 0.5)(C)
    y[2] *= 10
    law = fit_power(C, y[None], np.array([[1.0, 1, 0, 1, 1]]))
    assert float(law.exponent[0]) == pytest.approx(0.5, rel=1e-9)


def test_data_law_comes_from_the_tokens_of_the_runs_not_from_6nd():
    runs = [Run(r.name, r.params, r.tokens * 0.7 * r.params**0.05, r.flops, r.loss) for r in study()]
    law = fit_isoflop(runs).laws["D_opt"]
    at = N_LAW(1e10)
    assert float(law(1e10)) == pytest.approx(1e10 / (6 * at) * 0.7 * at**0.05, rel=1e-6)


def test_noisy_planted_law_is_inside_its_intervals():
    fit = fit_isoflop(study(noise=0.003, seed=3))
    low, high = interval(fit.draws["N_opt"].exponent, 0.95)
    assert low < 0.52 < high and high - low < 0.3
    said = predict(fit, 4 * BUDGETS[-1])
    assert said["beyond"] == pytest.approx(4)
    assert said["N_opt_interval"][0] < N_LAW(said["flops"]) < said["N_opt_interval"][1]
    assert said["L_opt_interval"][0] < L_LAW(said["flops"]) < said["L_opt_interval"][1]
    assert said["L_run_interval"][0] < said["L_opt_interval"][0]
    assert fit.noise == pytest.approx(0.003, rel=0.5) and fit.freedom == 10


def test_the_same_seed_gives_the_same_interval():
    one, two, other = (fit_isoflop(study(noise=0.003), seed=s).draws["N_opt"].exponent for s in (1, 1, 2))
    assert np.array_equal(one, two) and not np.array_equal(one, other)


def _coverage(studies: int, resamples: int) -> dict:
    """How often the 95 % interval holds the truth, per quantity."""
    far, rng = 4 * BUDGETS[-1], np.random.default_rng(5)
    truth = {"a": 0.52, "b": 0.48, "N": N_LAW(far), "L": L_LAW(far)}
    hits = {name: [] for name in [*truth, "run"]}
    for seed in range(studies):
        fit = fit_isoflop(study(noise=0.003, seed=seed), resamples=resamples, seed=10**6 + seed)
        draws = fit.draws
        values = {"a": draws["N_opt"].exponent, "b": draws["D_opt"].exponent}
        values |= {"N": draws["N_opt"](far), "L": draws["L_opt"](far)}
        for name, draw in values.items():
            low, high = interval(draw, 0.95)
            hits[name].append(low <= truth[name] <= high)
        low, high = predict(fit, far)["L_run_interval"]
        hits["run"].append(low <= truth["L"] + 0.003 * rng.standard_normal() <= high)
    return {name: np.mean(h) for name, h in hits.items()}


@pytest.mark.slow
def test_intervals_cover_in_a_small_simulation():
    for name, share in _coverage(150, 300).items():
        assert 0.89 <= share <= 0.99, (name, share)


@pytest.mark.slow
def test_intervals_cover_in_1500_studies():
    found = _coverage(1500, 1000)
    print(found)  # for docs/scaling.md
    for name, share in found.items():
        assert 0.93 <= share <= 0.97, (name, share)


def test_the_largest_budget_is_predicted_from_the_others():
    exact = holdout_largest(study())
    assert exact.flops == pytest.approx(BUDGETS[-1])
    assert exact.multiple == pytest.approx(BUDGETS[-1] / BUDGETS[-2])
    assert abs(exact.n_error) < 1e-6 and abs(exact.loss_error) < 1e-6
    noisy = holdout_largest(study(noise=0.003, seed=2))
    assert noisy.n_interval[0] < noisy.n_measured < noisy.n_interval[1]
    assert noisy.loss_interval[0] < noisy.loss_measured < noisy.loss_interval[1]
    assert holdout_largest(study(budgets=BUDGETS[:2])) is None


def test_an_extrapolated_run_is_judged_at_its_own_size():
    fit = fit_isoflop(study())
    far = 4 * BUDGETS[-1]
    size = float(N_LAW(far) * 2)
    run = Run("far", size, 1.0, far, float(L_LAW(far) + 0.02 * math.log(2) ** 2), 0.001)
    test = extrapolate(fit, run)
    assert test.predicted == pytest.approx(run.loss, rel=1e-6)
    assert test.multiple == pytest.approx(4) and test.measured_se == 0.001


def _edge(runs, budget, change):
    return [change(r) if r.flops == budget else r for r in runs]


def _with_loss(run, loss):
    return Run(run.name, run.params, run.tokens, run.flops, loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: _with_loss(r, r.params**-0.01 + 1e-4 * math.log(r.params) ** 2), "at or beyond the edge"),
        (lambda r: _with_loss(r, 2 - 0.01 * math.log(r.params / 8e3) ** 2), "no minimum"),
        (lambda r: Run(r.name, min(max(r.params, 8e3), 9e3), r.tokens, r.flops, r.loss), "a parabola needs 3"),
    ],
)
def test_a_poor_budget_is_named_and_not_used(change, message):
    runs = study()
    if "needs 3" in message:
        kept = [r for r in runs if r.flops != BUDGETS[0]] + [r for r in runs if r.flops == BUDGETS[0]][:2]
    else:
        kept = _edge(runs, BUDGETS[0], change)
    fit = fit_isoflop(kept)
    assert len(fit.used) == 4 and len(fit.budgets) == 5
    assert any("budget 4e+09" in w and message in w and "not used" in w for w in fit.warnings)
    assert fit.laws["N_opt"].exponent == pytest.approx(0.52, rel=1e-6)


def test_one_usable_budget_is_refused():
    with pytest.raises(UsageError, match=r"1 usable budget\(s\), expected at least 2"):
        fit_isoflop(study(budgets=BUDGETS[:1]))


def test_two_budgets_are_fitted_but_not_identified():
    fit = fit_isoflop(study(noise=0.001, budgets=BUDGETS[::4]))
    assert not fit.identifiable and any("two budgets" in w for w in fit.warnings)


def test_pure_noise_is_not_identified():
    fit = fit_isoflop(study(noise=0.02, curvature=0.004, sizes=7, seed=11))
    assert not fit.identifiable or any("flat for the noise" in w for w in fit.warnings)


@pytest.mark.parametrize(
    "command", ["fit", "fit --method=all", "report", "predict --flops=1e12", "fit --method=envelope"]
)
def test_losses_that_do_not_vary_are_refused_naming_the_file(tmp_path, capsys, command):
    path, out = tmp_path / "runs.csv", tmp_path / "report.html"
    rows = [f"{r.params!r},{r.tokens!r},{r.flops!r},0.551" for r in study()]
    path.write_text("\n".join(["params,tokens,flops,loss", *rows]))
    name, *options = command.split()
    options += [f"--out={out}"] if name == "report" else []
    assert main([name, str(path), *options, "--resamples=20"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}:2 to {path}:26: loss is 0.551 in all 25 runs") and not out.exists()


def test_a_curvature_below_rounding_is_no_minimum():
    rng = np.random.default_rng(0)
    runs = [Run(r.name, r.params, r.tokens, r.flops, 0.551 + 1e-16 * rng.integers(-2, 3)) for r in study()]
    with pytest.raises(UsageError, match="0 usable"):
        fit_isoflop(runs)
    small = [Run(r.name, r.params, r.tokens, r.flops, r.loss * 1e-12) for r in study()]
    assert fit_isoflop(small).laws["N_opt"].exponent == pytest.approx(0.52, rel=1e-6)


def test_laws_that_most_resamples_do_not_have_are_not_identified():
    said = []
    for seed in range(6):
        try:
            fit = fit_isoflop(study(noise=0.02, curvature=1e-3, seed=seed), resamples=200)
        except UsageError:
            continue
        if fit.degenerate > 100:
            said.append(fit)
    assert said and not any(fit.identifiable for fit in said)


def test_an_optimum_of_size_0_is_predicted_without_a_crash():
    fit = fit_isoflop(study(noise=0.001), resamples=50)
    said = predict(replace(fit, laws={**fit.laws, "N_opt": PowerLaw(0.0, 0.5)}), 1e12)
    assert said["N_opt"] == 0 and math.isnan(said["D_over_N"]) and math.isnan(said["L_run"])


def test_scatter_beyond_the_noise_is_said():
    runs = [
        Run(r.name, r.params * (1.6 if i // 5 % 2 else 0.6), r.tokens, r.flops, r.loss)
        for i, r in enumerate(study(noise=0.0003))
    ]
    assert any("times more than the noise" in w for w in fit_isoflop(runs).warnings)


def test_three_sizes_take_their_noise_from_the_evaluation_or_have_no_interval():
    fit = fit_isoflop(study(sizes=3, se=0.002))
    assert fit.freedom == 0 and fit.draws and any("evaluation's standard error only" in w for w in fit.warnings)
    fit = fit_isoflop(study(sizes=3))
    assert not fit.draws and not fit.identifiable and any("no interval" in w for w in fit.warnings)
    assert all(math.isnan(v) for v in predict(fit, 1e12)["L_opt_interval"])


def test_budgets_are_clusters_of_flops_or_labels():
    runs = [Run(r.name, r.params, r.tokens, r.flops * (1 + 0.005 * (i % 5)), r.loss) for i, r in enumerate(study())]
    assert len(fit_isoflop(runs).budgets) == 5
    labelled = [Run(r.name, r.params, r.tokens, r.flops, r.loss, group=f"g{i // 5}") for i, r in enumerate(runs)]
    assert [b.label for b in fit_isoflop(labelled).budgets] == ["g0", "g1", "g2", "g3", "g4"]


def test_plan_takes_the_nearest_size_and_spends_the_budget():
    fit = fit_isoflop(study())
    best = float(N_LAW(1e12))
    ladder = [("small", best / 3, 1e5), ("near", best * 1.2, 4e5), ("large", best * 4, 9e5)]
    chosen = plan(fit, 1e12, ladder)
    assert chosen.name == "near" and chosen.off == pytest.approx(1.2)
    assert chosen.images == pytest.approx(1e12 / (3 * 4e5))
    assert chosen.loss == pytest.approx(L_LAW(1e12) + 0.02 * math.log(1.2) ** 2, rel=1e-6)
    with pytest.raises(UsageError, match="ladder: found no size"):
        plan(fit, 1e12, [])


def _rows(name):
    with open(os.path.join(DATA, name), newline="") as file:
        return list(csv.DictReader(file))


def test_published_exponents_are_rederived_from_their_points():
    points = _rows("porian_isoflop_excerpt.csv")
    for row in _rows("porian_published_excerpt.csv"):
        runs = [
            Run("", float(p["n"]), float(p["t"]), float(p["flops"]), float(p["loss"]))
            for p in points
            if p["dataset"] == row["dataset"]
        ]
        a = METHODS["isoflop"](runs, resamples=100).laws["N_opt"].exponent
        assert float(row["a_lo95"]) < a < float(row["a_hi95"])
        assert a == pytest.approx(float(row["a_basic"]), abs=0.01)
