"""Facts about fits by budgets and by best runs: planted laws and published numbers come back, intervals hold them."""

import csv
import math
import os
from dataclasses import replace

import numpy as np
import pytest
from planted import BUDGETS, DESIGNS, L_LAW, LAW, N_LAW, coverage, ladder, passing, repeated, study

from dit_jax.error import UsageError
from dit_jax.scaling.fits import (
    METHODS,
    bootstrap,
    fit_akima,
    fit_best,
    fit_gadre,
    fit_isoflop,
    fit_varpro,
)
from dit_jax.scaling.fits.fit import predict
from dit_jax.scaling.fits.law import PowerLaw, fit_irreducible, fit_power
from dit_jax.scaling.runs import Run
from dit_jax.scaling.verdicts import verdict

DATA = os.path.join(os.path.dirname(__file__), "data")


# --- isoflop


def test_isoflop_recovers_a_planted_law():
    fit = fit_isoflop(study())
    assert fit.laws["N_opt"].exponent == pytest.approx(0.52, rel=1e-6)
    assert fit.laws["N_opt"].coefficient == pytest.approx(0.09, rel=1e-6)
    assert fit.laws["D_opt"].exponent == pytest.approx(0.48, rel=1e-6)
    assert fit.laws["D_opt"].coefficient == pytest.approx(1 / 0.54, rel=1e-6)
    for name in ("coefficient", "exponent", "irreducible"):
        assert getattr(fit.laws["L_opt"], name) == pytest.approx(getattr(L_LAW, name), rel=1e-6)
    assert fit.identified and len(fit.used) == 5 and fit.details["approach_2"]["a"] == pytest.approx(0.52)
    at = 3e10
    assert fit.loss(N_LAW(at) * 2, at / (12 * N_LAW(at))) == pytest.approx(L_LAW(at) + 0.02 * math.log(2) ** 2)


def test_three_budgets_say_nothing_of_losses_beyond_them():
    """A pure power law through three budgets is 5 % low ten times beyond them, and the truth was in none of 600 intervals."""
    fit = fit_isoflop(study(noise=0.001, budgets=BUDGETS[:3]), resamples=100)
    inside, beyond = (predict(fit, c) for c in (BUDGETS[2], 10 * BUDGETS[2]))
    assert inside["L_opt"] == pytest.approx(L_LAW(BUDGETS[2]), rel=0.01) and "L_opt_reason" not in inside
    for name in ("L_opt", "L_run"):
        assert math.isnan(beyond[name]) and all(map(math.isnan, beyond[f"{name}_interval"]))
    assert "train a fourth budget" in beyond["L_opt_reason"] and beyond["N_opt"] > 0
    four = predict(fit_isoflop(study(noise=0.001, budgets=BUDGETS[:4]), resamples=100), 10 * BUDGETS[2])
    assert four["L_opt"] > 0 and "L_opt_reason" not in four


def test_a_law_without_irreducible_term_is_a_bound_of_the_irreducible_law():
    C = np.geomspace(1e9, 1e12, 6)
    law = fit_irreducible(C, PowerLaw(5.0, -0.1)(C)[None], np.ones((1, 6)))
    assert float(law.irreducible[0]) == pytest.approx(0.0, abs=1e-6)
    assert float(law.exponent[0]) == pytest.approx(-0.1, rel=1e-5)
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


def test_a_noisy_planted_law_is_inside_its_intervals():
    fit = fit_isoflop(study(noise=0.003, seed=3))
    low, high = fit.interval(fit.draws["N_opt"].exponent)
    assert low < 0.52 < high and high - low < 0.3
    said = predict(fit, 4 * BUDGETS[-1])
    assert said["beyond"] == pytest.approx(4)
    assert said["N_opt_interval"][0] < N_LAW(said["flops"]) < said["N_opt_interval"][1]
    assert said["L_opt_interval"][0] < L_LAW(said["flops"]) < said["L_opt_interval"][1]
    assert said["L_run_interval"][0] < said["L_opt_interval"][0]
    assert fit.noise == pytest.approx(0.003, rel=0.5)


@pytest.mark.parametrize("fit", [fit_isoflop, fit_varpro, fit_akima])
def test_the_same_seed_gives_the_same_interval(fit):
    one, two, other = (fit(study(noise=0.003), seed=s, resamples=50).draws["N_opt"].exponent for s in (1, 1, 2))
    assert np.array_equal(one, two) and not np.array_equal(one, other)


def test_scatter_between_budgets_is_in_the_interval_and_only_where_it_is():
    """Budgets whose minima lie 20 % off by chance: the interval holds it. Without any, tau is 0 more often than not."""
    scattered = fit_isoflop(study(noise=0.0005, sizes=7, scatter=0.2, seed=1), resamples=300)
    assert 0.05 < scattered.details["tau"] < 0.6 and any("beyond the noise of their runs" in n for n in scattered.notes)
    clean = [fit_isoflop(study(noise=0.0005, sizes=7, seed=seed), resamples=300) for seed in range(9)]
    taus, widths = zip(*[(f.details["tau"], np.ptp(f.exponent("N_opt")[1])) for f in clean], strict=True)
    assert np.median(taus) < 0.005 and np.ptp(scattered.exponent("N_opt")[1]) > 10 * np.median(widths)


def test_tau_is_that_of_dersimonian_and_laird():
    """Against the textbook formula, for a common mean."""
    rng = np.random.default_rng(0)
    y, v = rng.normal(0, 1, 9), rng.uniform(0.05, 0.4, 9)
    w = 1 / v
    q = float((w * (y - (w @ y) / w.sum()) ** 2).sum())
    expected = max((q - 8) / (w.sum() - (w**2).sum() / w.sum()), 0)
    assert expected > 0 and bootstrap.between(y, np.ones((9, 1)), v) == pytest.approx(expected)
    assert bootstrap.between(0.01 * y, np.ones((9, 1)), v) == 0


def test_a_material_bias_of_the_parabolas_is_subtracted_and_said():
    """Wide grids off their optima on a surface of unequal exponents."""
    law, runs = type(LAW)(1.7, 400.0, 1500.0, 0.42, 0.21), []
    rng = np.random.default_rng(0)
    for j, c in enumerate(np.geomspace(1e17, 1e21, 5)):
        for u in np.linspace(-1, 1, 9) * math.log(6) + 0.4 * (j - 2):
            n = float(law.optimum(6.0)["N_opt"](c)) * math.exp(u)
            loss = float(law(n, c / 6 / n)) * math.exp(0.0005 * rng.standard_normal())
            runs.append(Run("", n, float(c / 6 / n), float(c), loss))
    fit, raw = fit_isoflop(runs, resamples=300), fit_isoflop(runs, resamples=300, unbias=False)
    low, high = fit.exponent("N_opt")[1]
    assert low < law.a < high and fit.details["bias"]["corrected"] and not raw.details["bias"]["corrected"]
    assert abs(raw.laws["N_opt"].exponent - law.a) > 0.01 > abs(fit.laws["N_opt"].exponent - law.a)
    assert any("the parabolas' bias is subtracted" in n for n in fit.notes)
    assert raw.laws["N_opt"].exponent - fit.laws["N_opt"].exponent == pytest.approx(fit.details["bias"]["a"], abs=0.005)


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
    assert len(fit.used) == 4 and len(fit.points) == 5
    assert any("budget 4e+09" in w and message in w and "not used" in w for w in fit.warnings)
    assert fit.laws["N_opt"].exponent == pytest.approx(0.52, rel=1e-6)


def test_one_usable_budget_is_refused_and_two_do_not_identify():
    with pytest.raises(UsageError, match=r"1 usable budget\(s\), expected at least 2"):
        fit_isoflop(study(budgets=BUDGETS[:1]))
    fit = fit_isoflop(study(noise=0.001, budgets=BUDGETS[::4]))
    assert not fit.identified and any("two budgets" in w for w in fit.warnings)


def test_noise_that_hides_the_minima_does_not_identify():
    fit = fit_isoflop(study(noise=0.02, curvature=0.004, sizes=7, seed=11))
    assert not fit.identified or any("flat for the noise" in w for w in fit.warnings)
    said = []
    for seed in range(6):
        try:
            fit = fit_isoflop(study(noise=0.02, curvature=1e-3, seed=seed), resamples=200)
        except UsageError:
            continue
        if fit.degenerate > 100:
            said.append(fit)
    assert said and not any(fit.identified for fit in said)


def test_a_curvature_below_rounding_is_no_minimum():
    rng = np.random.default_rng(0)
    runs = [Run(r.name, r.params, r.tokens, r.flops, 0.551 + 1e-16 * rng.integers(-2, 3)) for r in study()]
    with pytest.raises(UsageError, match="0 usable"):
        fit_isoflop(runs)
    small = [Run(r.name, r.params, r.tokens, r.flops, r.loss * 1e-12) for r in study()]
    assert fit_isoflop(small).laws["N_opt"].exponent == pytest.approx(0.52, rel=1e-6)


def test_an_optimum_of_size_0_is_predicted_without_a_crash():
    fit = fit_isoflop(study(noise=0.001), resamples=50)
    said = predict(replace(fit, laws={**fit.laws, "N_opt": PowerLaw(0.0, 0.5)}), 1e12)
    assert said["N_opt"] == 0 and not math.isfinite(said["D_over_N"]) and math.isnan(said["L_run"])


def test_three_sizes_take_their_noise_from_the_evaluation_or_have_no_interval():
    fit = fit_isoflop(study(sizes=3, se=0.002))
    assert fit.draws and any("evaluation's standard error only" in w for w in fit.warnings)
    assert fit.noise == pytest.approx(0.002)
    fit = fit_isoflop(study(sizes=3))
    assert not fit.draws and not fit.identified and any("no interval" in w for w in fit.warnings)
    assert all(math.isnan(v) for v in predict(fit, 1e12)["L_opt_interval"])


def test_budgets_are_clusters_of_flops_or_labels():
    runs = [Run(r.name, r.params, r.tokens, r.flops * (1 + 0.005 * (i % 5)), r.loss) for i, r in enumerate(study())]
    assert len(fit_isoflop(runs).points) == 5
    labelled = [Run(r.name, r.params, r.tokens, r.flops, r.loss, group=f"g{i // 5}") for i, r in enumerate(runs)]
    assert [b.label for b in fit_isoflop(labelled).points] == ["g0", "g1", "g2", "g3", "g4"]


# --- points


def best_runs(law, noise=0.0, seed=0, count=8):
    rng = np.random.default_rng(seed)
    C = np.geomspace(1e18, 1e22, count)
    loss = law(C) * np.exp(noise * rng.standard_normal(count))
    return [Run("", float(c) ** 0.5, float(c) ** 0.5 / 6, float(c), float(y)) for c, y in zip(C, loss, strict=True)]


@pytest.mark.parametrize("law", [PowerLaw(2.3943e3, -0.1273, 1.7), PowerLaw(7.0, -0.0273)])
def test_a_planted_power_of_compute_is_recovered(law):
    found = fit_best(best_runs(law), resamples=50).laws["L_opt"]
    assert found.exponent == pytest.approx(law.exponent, rel=1e-4)
    assert found.irreducible == pytest.approx(law.irreducible, rel=1e-4, abs=1e-3)
    noisy = fit_best(best_runs(law, noise=0.001, count=16))
    low, high = noisy.exponent("L_opt")[1]
    assert low < (law.exponent if law.irreducible else noisy.laws["L_opt"].exponent) < high < 0
    assert "N_opt" not in noisy.laws and noisy.identified


def test_interpolated_minima_follow_a_symmetric_curve_exactly():
    runs = []
    for c in np.geomspace(1e18, 1e21, 5):
        for u in np.linspace(-1, 1, 9):
            n = 0.1 * c**0.52 * math.exp(u)
            runs.append(Run("", n, float(c / 6 / n), float(c), math.exp(c**-0.01 + 0.02 * math.cosh(2 * u))))
    fit = fit_akima(runs, resamples=50)
    assert fit.laws["N_opt"].exponent == pytest.approx(0.52, rel=1e-6)
    assert fit.laws["D_opt"].coefficient == pytest.approx(1 / 0.6, rel=1e-6)
    assert all(p.loss == pytest.approx(math.exp(p.flops**-0.01 + 0.02), rel=1e-9) for p in fit.points)


def test_seeds_of_a_size_count_as_one_by_their_mean():
    rng, exact = np.random.default_rng(0), study(sizes=7)
    runs = [replace(r, loss=r.loss + 0.005 * float(rng.standard_normal())) for _ in range(3) for r in exact]
    losses = [math.exp(np.mean([math.log(r.loss) for r in runs[i :: len(exact)]])) for i in range(len(exact))]
    mean = [replace(r, loss=loss) for r, loss in zip(exact, losses, strict=True)]
    one, two = (fit_best(r, resamples=0) for r in (runs, mean))
    assert [p.loss for p in one.points] == pytest.approx([p.loss for p in two.points])


# --- published numbers


def _rows(name):
    with open(os.path.join(DATA, name), newline="") as file:
        return list(csv.DictReader(file))


CONFIGURATION = ("file", "dataset", "hparams", "warmup", "decay", "param_count", "val")


@pytest.mark.parametrize("row", _rows("porian_published_fits.csv"), ids=lambda r: "-".join(r[k] for k in CONFIGURATION))
def test_the_15_porian_exponents_are_rederived(row):
    points = [p for p in _rows("porian_isoflop_points.csv") if all(p[k] == row[k] for k in CONFIGURATION)]
    runs = [Run("", *(float(p[k]) for k in ("n", "t", "flops", "loss"))) for p in points]
    fit = METHODS["akima"](runs, resamples=200)
    a, (low, high) = fit.exponent("N_opt")
    assert float(row["a_lo95"]) < a < float(row["a_hi95"]) and low < float(row["a_basic"]) < high
    assert a == pytest.approx(float(row["a_basic"]), abs=0.01)


def test_parabolas_rederive_published_exponents_from_their_points():
    points = _rows("porian_isoflop_excerpt.csv")
    for row in _rows("porian_published_excerpt.csv"):
        found = [p for p in points if p["dataset"] == row["dataset"]]
        runs = [Run("", float(p["n"]), float(p["t"]), float(p["flops"]), float(p["loss"])) for p in found]
        a = fit_isoflop(runs, resamples=100).details["approach_2"]["a"]
        assert float(row["a_lo95"]) < a < float(row["a_hi95"])


def test_gadre_predicts_its_7b_run_from_five_small_ones():
    """Their runs for the law (table 1 of the paper): sizes below 1 B at 20 tokens per parameter, and the smallest at 320."""
    rows = [r for r in _rows("gadre_models_104.csv") if r["dataset"] == "rpj"]
    small = [
        r
        for r in rows
        if (float(r["params"]) < 1e9 and r["chinchilla_multiplier"] == "1.0")
        or (float(r["params"]) < 2e7 and r["chinchilla_multiplier"] == "16.0")
    ]
    assert len(small) == 5
    numbers = [[float(r[k]) for k in ("params", "tokens", "loss_c4_val")] for r in small]
    fit = fit_gadre([Run("", n, d, 6 * n * d, y) for n, d, y in numbers], resamples=0)
    (large,) = [r for r in rows if float(r["params"]) > 5e9]
    assert fit.loss(float(large["params"]), float(large["tokens"])) == pytest.approx(
        float(large["loss_c4_val"]), rel=0.01
    )


# --- coverage

CONTROL = ("parabolas 5 x 7", "ladder 6 x 8", "ladder, noise 0.5 %")  # of which at most 5 % may be declined
WIDEST = {"varpro": 1.25, "isoflop": 1.5}  # times the least half-width
SILENT = {"unscaled rates": (*verdict.ANSWER, "verdict"), "N-D interaction": ("varpro", "surface")}


@pytest.mark.slow
@pytest.mark.parametrize("name", DESIGNS)
def test_intervals_cover_in_500_studies_or_the_fit_declines(name):
    design = DESIGNS[name]
    found = coverage(design, 500)
    print(name, found)  # for docs/coverage.md
    assert all(found[who]["speaks"] <= 0.1 for who in SILENT.get(name, ()) if who in found)
    assert name not in CONTROL or found["verdict"]["speaks"] >= 0.95
    assert all(found[who].get("of least", 0.0) <= most for who, most in WIDEST.items())
    for who in (*design.methods, "verdict"):
        for quantity in design.truth:
            held = found.get(who, {}).get(quantity, math.nan)
            assert math.isnan(held) or 0.9 <= held <= 0.98, (who, quantity, found)


def test_a_shift_that_all_rows_of_a_run_share_widens_the_intervals():
    """5 runs leave their means some two degrees of freedom: too few to hide what they scatter by."""
    alone, shifted = (fit_varpro(passing(own=own, seed=3), resamples=150) for own in (0.0, 0.02))
    wide = [np.diff(predict(fit, 6e21)["L_opt_interval"])[0] for fit in (alone, shifted)]
    assert wide[1] > 1.5 * wide[0]
    groups = bootstrap.clusters(passing())
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((30, 3)))[0]
    assert bootstrap.absorbed_means(basis, np.arange(30)) == pytest.approx(3)
    between = np.linalg.qr(np.eye(5)[groups][:, :2])[0]
    assert bootstrap.absorbed_means(between, groups) == pytest.approx(2)
    within = np.linalg.qr(np.tile([[1.0], [-1.0]], (15, 1)))[0]
    assert bootstrap.absorbed_means(within, groups) == pytest.approx(0, abs=1e-12)


def test_repeated_data_are_worth_what_was_planted():
    """R* = 15.4; without the column the same runs fit no surface."""
    runs = ladder(repeated(1e9), noise=0.002, seed=1, budgets=5, high=1e20)
    fit = fit_varpro([replace(r, unique=1e9) for r in runs], resamples=60)
    low, high = fit.interval(fit.parameter_draws["R_star"])
    assert low <= 15.39 * 1.2 and high >= 15.39 / 1.2 and high / low < 4 and fit.form > 0.01
    said, truth = predict(fit, 1e21), LAW.optimum(6.0)["L_opt"](1e21)
    assert said["L_opt_interval"][0] < truth < said["L_opt_interval"][1]
    assert any("data that are always new" in n for n in fit.notes)
    assert "R_star" not in fit_varpro(runs, resamples=0).parameters and fit_varpro(runs, resamples=0).form < 0.01
    plenty = [replace(r, unique=1e15) for r in ladder(noise=0.003)]
    assert "R_star" not in fit_varpro(plenty, resamples=0).parameters


def test_scatter_in_units_of_a_noise_that_few_runs_tell_is_expected_to_be_larger():
    """The mean of (y - mean)^2 summed over 3 points of variance 1, in units of a variance that 6 degrees of freedom tell, is 2 * 6 / 4."""
    rng, one = np.random.default_rng(0), np.ones((3, 1))
    raw = []
    for _ in range(4000):
        y, variance = rng.standard_normal(3), np.full(3, rng.chisquare(6) / 6)
        raw.append(float(((y - y.mean()) ** 2).sum() / variance[0]))
        plain, corrected = (bootstrap.between(y, one, variance, freedom) for freedom in (math.inf, 6.0))
        assert corrected <= plain
    assert np.mean(raw) == pytest.approx(3.0, abs=0.15)
    assert bootstrap.between(np.array([-1.0, 0.0, 1.0]), one, np.full(3, 1 / 1.5 - 1e-6), 6.0) < 1e-5
    assert bootstrap.between(np.array([-1.0, 0.0, 1.0]), one, np.full(3, 1 / 1.5), math.inf) == pytest.approx(1 / 3)
