"""Facts about the parametric fits: planted surfaces come back, intervals hold them, and data that cannot answer are named."""

import csv
import itertools
import math
import os

import numpy as np
import pytest
from planted import EQUAL, LAW, coverage, ladder, scatter
from scipy import stats
from scipy.optimize import approx_fprime, minimize
from scipy.special import huber, logsumexp

from dit_jax.error import UsageError
from dit_jax.scaling import inference, newton
from dit_jax.scaling.fit import METHODS
from dit_jax.scaling.predict import predict
from dit_jax.scaling.runs import Run
from dit_jax.scaling.study import delta_at
from dit_jax.scaling.surface import fit_gadre, fit_surface, fit_varpro

DATA = os.path.join(os.path.dirname(__file__), "data")
KINDS = list(itertools.product(("log", "linear"), ("huber", "mse")))


def close(surface, law, rel):
    for name in ("E", "A", "B", "alpha", "beta"):
        assert getattr(surface, name) == pytest.approx(getattr(law, name), rel=rel), name


@pytest.mark.parametrize(("residual", "loss"), KINDS)
@pytest.mark.parametrize(
    ("fit", "law", "make"),
    [
        (fit_surface, LAW, scatter),
        (fit_surface, LAW, ladder),
        (fit_varpro, LAW, scatter),
        (fit_varpro, LAW, ladder),
        (fit_gadre, EQUAL, ladder),
    ],
)
def test_a_planted_surface_is_recovered(fit, law, make, residual, loss):
    found = fit(make(law=law), residual=residual, loss=loss, resamples=50)
    close(found.surface, law, 1e-6)
    assert found.surface.a == pytest.approx(law.beta / (law.alpha + law.beta), rel=1e-6)
    assert found.identifiable and not found.bounds and found.starts.reached > 0
    assert found.profile.interval == pytest.approx((law.E, law.E), rel=1e-6)


def test_the_optimum_is_the_lowest_loss_of_its_compute():
    C, k = 3e20, 5.3
    laws = LAW.optimum(k)
    n = np.exp(np.linspace(-3, 3, 200_001)) * laws["N_opt"](C)
    curve = LAW(n, C / (k * n))
    assert n[curve.argmin()] == pytest.approx(laws["N_opt"](C), rel=1e-3)
    assert laws["L_opt"](C) == pytest.approx(curve.min(), rel=1e-12)
    assert laws["D_opt"](C) == pytest.approx(C / (k * laws["N_opt"](C)), rel=1e-12)


@pytest.mark.parametrize(("residual", "loss"), KINDS)
def test_gradient_and_hessian_are_those_of_the_loss(residual, loss):
    problem = fit_surface(scatter(noise=0.002), residual=residual, loss=loss, resamples=0).design.problem
    theta = np.array([-0.5, -1.7, -1.9, 0.3, 0.4])
    here = newton.local(problem, theta[None])
    slope = approx_fprime(theta, lambda t: newton.local(problem, t[None]).loss[0], 1e-7)
    assert here.gradient[0] == pytest.approx(slope, rel=1e-4, abs=1e-6)
    bend = approx_fprime(theta, lambda t: newton.local(problem, t[None]).gradient[0], 1e-7)
    assert here.hessian[0] == pytest.approx(bend, rel=1e-3, abs=1e-5)
    above = np.linalg.eigvalsh(here.majoriser[0] - here.hessian[0])
    assert above.min() > -1e-9 * above.max()


def test_the_objective_is_the_sum_of_huber_losses_and_none_is_lower():
    runs = scatter(noise=0.01, seed=4, count=60)
    fit = fit_surface(runs, resamples=0)
    n, d, y = (np.log([getattr(r, k) for r in runs]) for k in ("params", "tokens", "loss"))

    def objective(t):
        terms = np.stack([np.full_like(n, t[0]), t[1] - t[3] * n, t[2] - t[4] * d])
        return huber(1e-3, logsumexp(terms, axis=0) - y).sum()

    s = fit.surface
    best = np.array([math.log(s.E), math.log(s.A), math.log(s.B), s.alpha, s.beta])
    assert objective(best) == pytest.approx(fit.objective, rel=1e-9)
    tight = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 5000, "maxfun": 50_000}
    for start in (best, best + 0.01, [0.5, 5, 5, 0.5, 0.5]):
        assert minimize(objective, start, method="L-BFGS-B", options=tight).fun >= fit.objective * (1 - 1e-9)
    assert fit.starts.count == 4500 and fit.starts.reached > 0.5


def test_surface_and_varpro_agree_on_the_same_loss():
    runs = ladder(noise=0.004, seed=2)
    for residual, loss in KINDS:
        one, two = (f(runs, residual=residual, loss=loss, resamples=0) for f in (fit_surface, fit_varpro))
        assert two.objective == pytest.approx(one.objective, rel=1e-8)
        close(two.surface, one.surface, 1e-3)


def test_the_fit_does_not_depend_on_units():
    runs = ladder(noise=0.004)
    moved = [Run(r.name, r.params * 1e-6, r.tokens * 1e-9, r.flops * 1e-15, r.loss * 50) for r in runs]
    one, two = (fit_varpro(r, residual="linear", resamples=50) for r in (runs, moved))
    assert two.surface.alpha == pytest.approx(one.surface.alpha, rel=1e-6)
    assert pytest.approx(50 * one.surface.E, rel=1e-6) == two.surface.E
    assert two.intervals["a"] == pytest.approx(one.intervals["a"], rel=1e-5)


def test_the_same_seed_gives_the_same_intervals():
    runs = ladder(noise=0.004)
    one, two, other = (fit_varpro(runs, resamples=50, seed=s).intervals["a"] for s in (1, 1, 2))
    assert one == two != other


def test_outliers_move_squares_more_than_huber():
    runs = ladder(noise=0.002, seed=1)
    bad = [r if i != 20 else Run(r.name, r.params, r.tokens, r.flops, r.loss * 1.2) for i, r in enumerate(runs)]
    squares, robust = (fit_surface(bad, loss=loss, resamples=0).surface for loss in ("mse", "huber"))
    assert abs(robust.a - LAW.a) < 0.02 and abs(robust.a - LAW.a) < abs(squares.a - LAW.a) / 3


def test_rows_of_one_run_are_one_cluster():
    runs = scatter(noise=0.005, seed=3, count=30)
    shaken = np.random.default_rng(0).normal(0, 0.005, 30)
    rows = [
        Run(r.name, r.params, r.tokens * f, r.flops * f, float(LAW(r.params, r.tokens * f)) * math.exp(e))
        for r, e in zip(runs, shaken, strict=True)
        for f in (0.25, 0.5, 1.0)
    ]
    alone = [Run(f"{r.name}/{i}", r.params, r.tokens, r.flops, r.loss) for i, r in enumerate(rows)]
    fit, naive = (fit_varpro(r, resamples=300) for r in (rows, alone))
    assert fit.clusters == 30 and naive.clusters == 90 and fit.surface == naive.surface
    for ours, theirs in ((fit.intervals, naive.intervals), (fit.delta_intervals, naive.delta_intervals)):
        assert ours["E"][1] - ours["E"][0] > 1.2 * (theirs["E"][1] - theirs["E"][0])


def test_predictions_hold_the_truth_and_say_how_far_they_go():
    fit = fit_surface(ladder(noise=0.004, seed=5))
    said, delta = predict(fit, 1e22), delta_at(fit, 1e22)
    assert said["beyond"] == pytest.approx(10)
    for name, law in LAW.optimum(6.0).items():
        assert said[f"{name}_interval"][0] < law(1e22) < said[f"{name}_interval"][1]
        assert delta[name][0] < said[name] < delta[name][1]
    assert said["D_over_N"] == pytest.approx(said["D_opt"] / said["N_opt"])
    off = predict(fit, 1e22, said["N_opt"] * 3)
    tokens = 1e22 / (fit.k * said["N_opt"] * 3)
    assert off["L_run"] == pytest.approx(fit(said["N_opt"] * 3, tokens)) and off["L_run"] > said["L_run"]


def change(runs, **how):
    return [Run(**{**vars(r), **{k: f(r) for k, f in how.items()}}) for r in runs]


def test_data_that_cannot_answer_are_named():
    ratio = change(scatter(noise=0.002), tokens=lambda r: 20 * r.params, flops=lambda r: 120 * r.params**2)
    ratio = change(ratio, loss=lambda r: float(LAW(r.params, r.tokens)))
    fit = fit_surface(ratio, resamples=0)
    assert not fit.identifiable and "nothing tells the two terms of the law apart" in fit.warnings[0]
    size = change(scatter(noise=0.002), params=lambda r: 1e9, flops=lambda r: 6e9 * r.tokens)
    fit = fit_surface(change(size, loss=lambda r: float(LAW(r.params, r.tokens))), resamples=0)
    assert not fit.identifiable and "all runs have the same params" in fit.warnings[0]
    noise = change(ladder(), loss=lambda r: 3 + 0.3 * math.sin(1e3 * math.log(r.params) + 77 * math.log(r.tokens)))
    assert not fit_surface(noise, resamples=0).identifiable
    few = scatter(count=5)
    fit = fit_surface(few, resamples=0)
    assert not fit.identifiable and "nothing is left to test the law" in fit.warnings[0] and not fit.intervals


def test_an_irreducible_loss_that_is_not_there_is_said():
    law = type(LAW)(0.0, LAW.A, LAW.B, 0.1, 0.11)
    fit = fit_surface(scatter(law=law, noise=0.003), resamples=50)
    assert any("E is not pinned down" in w for w in fit.warnings) and fit.profile.interval[0] == pytest.approx(
        0, abs=1e-3
    )


@pytest.mark.parametrize("fit", [fit_gadre, fit_varpro])
def test_no_draw_runs_away_where_the_irreducible_loss_is_at_or_near_its_bound(fit):
    law = type(LAW)(0.0, 5.0, 10.0, 0.08, 0.08)
    for seed in range(3):
        runs = scatter(law=law, noise=0.003, seed=seed, count=20)
        found = fit(runs, resamples=200, seed=seed)
        lowest, highest = min(r.loss for r in runs), max(r.loss for r in runs)
        assert found.surfaces.E.max() < lowest and found.draws["L_opt"](found.largest).max() < highest
        assert found.intervals["E"][1] == pytest.approx(found.profile.interval[1], rel=0.5)


def test_so_few_runs_that_the_stretch_is_large_make_no_law_far_from_all_runs(recwarn):
    for seed in range(3):
        runs = scatter(noise=0.003, seed=seed, count=6)
        found = fit_gadre(runs, resamples=200, seed=seed)
        lowest = min(r.loss for r in runs)
        assert found.surfaces.E.max() <= 1.001 * max(lowest, found.surface.E)
        assert found.draws["L_opt"](found.largest).max() < 2 * max(r.loss for r in runs)
    assert not recwarn.list


def test_a_huber_fit_of_few_training_curves_is_stretched_and_says_so():
    runs, rng = [], np.random.default_rng(4)
    for i, n in enumerate(np.geomspace(1e7, 2e9, 9).tolist()):
        shift = rng.normal(0, 0.001)
        for d in np.geomspace(5e8, 4e10 * (n / 1e8) ** 0.3, 12).tolist():
            runs.append(Run(f"m{i}", n, d, 6 * n * d, float(LAW(n, d)) * math.exp(shift + rng.normal(0, 0.0007))))
    fit = fit_surface(runs, resamples=200)
    width, delta = (i["E"][1] - i["E"][0] for i in (fit.intervals, fit.delta_intervals))
    assert 0.6 < width / delta < 1.7 and any("9 independent runs are few" in w for w in fit.warnings)
    assert inference.stretch_robust(9, 108, 4, 0.95) == pytest.approx(1.918, abs=2e-3)
    assert inference.stretch_robust(40, 80, 35, 0.95) == inference.stretch_robust(48, 96, 43, 0.95) == 1
    assert inference.stretch_robust(9, 9, 4, 0.95) == 1  # runs of a single row
    assert not any("are few" in w for w in fit_surface(ladder(noise=0.004), resamples=50).warnings)


def test_draws_are_stretched_by_the_factor_where_the_law_is_linear():
    fit = fit_varpro(ladder(noise=1e-5), resamples=0)
    theta, problem = fit.theta, fit.design.problem
    draws = theta + 1e-4 * np.random.default_rng(0).standard_normal((20, 5))
    moved = inference.stretched(problem, theta, draws, 2.0)
    np.testing.assert_allclose(moved - theta, 2 * (draws - theta), rtol=0.02, atol=3e-7)
    assert inference.stretched(problem, theta, draws, 1.0) is draws


def test_flops_that_are_not_a_multiple_of_n_and_d_are_said():
    runs = change(ladder(noise=0.003), flops=lambda r: r.flops * (r.params / 1e9) ** 0.1)
    assert any("varies" in w and "flops / (params x tokens)" in w for w in fit_surface(runs, resamples=0).warnings)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (scatter(count=4), "4 runs of different .params, tokens., but method surface has 5 parameters"),
        (ladder(budgets=1), "all 8 runs are of one budget, 1e.18 FLOPs"),
        (change(scatter(), loss=lambda r: math.nan), "must be finite and above 0"),
    ],
)
def test_what_no_search_can_mend_is_refused(runs, message):
    with pytest.raises(UsageError, match=message):
        fit_surface(runs)


def gadre_of_logarithms(runs, **options):
    """The planted noise is a share of the loss, so its residuals are of logarithms."""
    return fit_gadre(runs, residual="log", **options)


@pytest.mark.slow
@pytest.mark.parametrize(("fit", "law"), [(fit_varpro, LAW), (gadre_of_logarithms, EQUAL)])
def test_intervals_cover_in_a_small_simulation(fit, law):
    for name, shares in coverage(fit, ladder, law, 25, 100).items():
        assert min(shares) >= 0.8, (name, shares)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fit", "law"), [(fit_surface, LAW), (fit_varpro, LAW), (gadre_of_logarithms, EQUAL), (fit_gadre, EQUAL)]
)
def test_intervals_cover_in_500_studies(fit, law):
    found = coverage(fit, ladder, law, 500, 400)
    print(fit.__name__, found)  # for docs/scaling.md
    for name, shares in found.items():
        if law is not EQUAL or name != "a":  # which is 1/2 by assumption
            assert min(shares) >= 0.93 and max(shares) <= 0.97, (name, shares)


def _rows(name):
    with open(os.path.join(DATA, name), newline="") as file:
        return list(csv.DictReader(file))


CONFIGURATION = ("file", "dataset", "hparams", "warmup", "decay", "param_count", "val")


@pytest.mark.parametrize("row", _rows("porian_published_fits.csv"), ids=lambda r: "-".join(r[k] for k in CONFIGURATION))
def test_the_15_porian_exponents_are_rederived(row):
    points = [p for p in _rows("porian_isoflop_points.csv") if all(p[k] == row[k] for k in CONFIGURATION)]
    runs = [Run("", *(float(p[k]) for k in ("n", "t", "flops", "loss"))) for p in points]
    fit = METHODS["akima"](runs, resamples=200)
    a = fit.laws["N_opt"].exponent
    assert float(row["a_lo95"]) < a < float(row["a_hi95"])
    assert a == pytest.approx(float(row["a_basic"]), abs=0.01)
    low, high = np.quantile(fit.draws["N_opt"].exponent, [0.025, 0.975])
    assert low < float(row["a_basic"]) < high and (high - low) / 2 == pytest.approx(by_scatter(fit), rel=1.0)


def by_scatter(fit) -> float:
    """Half-width of the 95 % interval of the exponent of N_opt that the scatter of the points gives (Student's t)."""
    x, y = (np.log([getattr(p, name) for p in fit.points]) for name in ("flops", "n_opt"))
    line = stats.linregress(x, y)
    return float(line.stderr * stats.t.ppf(0.975, len(x) - 2))


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
    fit = METHODS["gadre"]([Run("", n, d, 6 * n * d, y) for n, d, y in numbers], resamples=0)
    (large,) = [r for r in rows if float(r["params"]) > 5e9]
    assert fit(float(large["params"]), float(large["tokens"])) == pytest.approx(float(large["loss_c4_val"]), rel=0.01)
