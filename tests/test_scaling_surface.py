"""Facts about fits of a surface: planted laws come back on any grid, and data that cannot answer are named."""

import itertools
import math

import numpy as np
import pytest
from planted import EQUAL, LAW, change, ladder, scatter
from scipy.optimize import approx_fprime, minimize
from scipy.special import huber, logsumexp

from dit_jax.error import UsageError
from dit_jax.scaling.fits import (
    fit_gadre,
    fit_surface,
    fit_varpro,
    newton,
)
from dit_jax.scaling.fits.fit import predict
from dit_jax.scaling.fits.surface import make_design
from dit_jax.scaling.runs import Run

KINDS = list(itertools.product(("log", "linear"), ("huber", "mse")))


def close(fit, law, rel):
    for name in ("E", "A", "B", "alpha", "beta"):
        assert fit.parameters[name] == pytest.approx(getattr(law, name), rel=rel), name


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
    found = fit(make(law=law), residual=residual, loss=loss, resamples=20)
    close(found, law, 1e-6)
    assert found.parameters["a"] == pytest.approx(law.beta / (law.alpha + law.beta), rel=1e-6)
    assert found.identified and not found.details["bounds"]


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
    problem = make_design(scatter(noise=0.002), residual, loss).problem
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

    p = fit.parameters
    best = np.array([*(math.log(p[k]) for k in "EAB"), p["alpha"], p["beta"]])
    assert objective(best) == pytest.approx(fit.objective, rel=1e-9)
    tight = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 5000, "maxfun": 50_000}
    for start in (best, best + 0.01, [0.5, 5, 5, 0.5, 0.5]):
        assert minimize(objective, start, method="L-BFGS-B", options=tight).fun >= fit.objective * (1 - 1e-9)


def test_surface_and_varpro_agree_on_the_same_loss():
    runs = ladder(noise=0.004, seed=2)
    for residual, loss in KINDS:
        one, two = (f(runs, residual=residual, loss=loss, resamples=0) for f in (fit_surface, fit_varpro))
        assert two.objective == pytest.approx(one.objective, rel=1e-8)
        for name in "E", "alpha", "beta":
            assert two.parameters[name] == pytest.approx(one.parameters[name], rel=1e-3)


def test_a_surface_does_not_depend_on_units():
    runs = ladder(noise=0.004)
    moved = [Run(r.name, r.params * 1e-6, r.tokens * 1e-9, r.flops * 1e-15, r.loss * 50) for r in runs]
    one, two = (fit_varpro(r, residual="linear", resamples=50) for r in (runs, moved))
    assert two.parameters["alpha"] == pytest.approx(one.parameters["alpha"], rel=1e-6)
    assert pytest.approx(50 * one.parameters["E"], rel=1e-6) == two.parameters["E"]
    assert two.exponent("N_opt")[1] == pytest.approx(one.exponent("N_opt")[1], rel=1e-4)


def test_outliers_move_squares_more_than_huber():
    runs = ladder(noise=0.002, seed=1)
    bad = [r if i != 20 else Run(r.name, r.params, r.tokens, r.flops, r.loss * 1.2) for i, r in enumerate(runs)]
    squares, robust = (fit_surface(bad, loss=loss, resamples=0).parameters["a"] for loss in ("mse", "huber"))
    assert abs(robust - LAW.a) < 0.02 and abs(robust - LAW.a) < abs(squares - LAW.a) / 3


def test_rows_of_one_run_are_not_independent():
    """Three checkpoints of each run that share its error: intervals wider than those of as many runs."""
    runs = scatter(noise=0.0, seed=3, count=30)
    shaken = np.random.default_rng(0).normal(0, 0.005, 30)
    rows = [
        Run(r.name, r.params, r.tokens * f, r.flops * f, float(LAW(r.params, r.tokens * f)) * math.exp(e))
        for r, e in zip(runs, shaken, strict=True)
        for f in (0.25, 0.5, 1.0)
    ]
    alone = [Run(f"{r.name}/{i}", r.params, r.tokens, r.flops, r.loss) for i, r in enumerate(rows)]
    fit, naive = (fit_varpro(r, resamples=300) for r in (rows, alone))
    assert fit.parameters == naive.parameters
    assert np.ptp(fit.interval(fit.parameter_draws["E"])) > 1.2 * np.ptp(naive.interval(naive.parameter_draws["E"]))


def test_predictions_of_a_surface_hold_the_truth_and_say_how_far_they_go():
    fit = fit_surface(ladder(noise=0.004, seed=5))
    said = predict(fit, 1e22)
    assert said["beyond"] == pytest.approx(10)
    for name, law in LAW.optimum(6.0).items():
        assert said[f"{name}_interval"][0] < law(1e22) < said[f"{name}_interval"][1]
    assert said["D_over_N"] == pytest.approx(said["D_opt"] / said["N_opt"])
    off = predict(fit, 1e22, said["N_opt"] * 3)
    tokens = 1e22 / (fit.k * said["N_opt"] * 3)
    assert off["L_run"] == pytest.approx(fit.loss(said["N_opt"] * 3, tokens)) and off["L_run"] > said["L_run"]


def test_data_that_cannot_answer_are_named():
    ratio = change(scatter(noise=0.002), tokens=lambda r: 20 * r.params, flops=lambda r: 120 * r.params**2)
    ratio = change(ratio, loss=lambda r: float(LAW(r.params, r.tokens)))
    fit = fit_surface(ratio, resamples=0)
    assert not fit.identified and "nothing tells the two terms of the law apart" in fit.warnings[0]
    size = change(scatter(noise=0.002), params=lambda r: 1e9, flops=lambda r: 6e9 * r.tokens)
    fit = fit_surface(change(size, loss=lambda r: float(LAW(r.params, r.tokens))), resamples=0)
    assert not fit.identified and "all runs have the same params" in fit.warnings[0]
    noise = change(ladder(), loss=lambda r: 3 + 0.3 * math.sin(1e3 * math.log(r.params) + 77 * math.log(r.tokens)))
    assert not fit_surface(noise, resamples=0).identified
    fit = fit_surface(scatter(count=5), resamples=50)
    assert not fit.identified and "nothing is left to test the law" in fit.warnings[0] and not fit.draws


def test_an_irreducible_loss_that_is_not_there_is_said_and_no_draw_runs_away():
    law = type(LAW)(0.0, LAW.A, LAW.B, 0.1, 0.11)
    assert any("E is not pinned down" in w for w in fit_surface(scatter(law=law, noise=0.003), resamples=50).warnings)
    law = type(LAW)(0.0, 5.0, 10.0, 0.08, 0.08)
    for fit, seed in itertools.product((fit_gadre, fit_varpro), range(3)):
        runs = scatter(law=law, noise=0.003, seed=seed, count=20)
        found = fit(runs, resamples=200, seed=seed)
        lowest, highest = min(r.loss for r in runs), max(r.loss for r in runs)
        assert found.parameter_draws["E"].max() < lowest and found.draws["L_opt"](found.largest).max() < highest


def test_flops_that_are_not_a_multiple_of_n_and_d_are_said():
    runs = change(ladder(noise=0.003), flops=lambda r: r.flops * (r.params / 1e9) ** 0.1)
    assert any("varies" in w and "flops / (params x tokens)" in w for w in fit_surface(runs, resamples=0).warnings)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (scatter(count=4), "4 runs of different .params, tokens., but a surface has 5 parameters"),
        (ladder(budgets=1), "all 8 runs are of one budget, 1e.18 FLOPs"),
        (change(scatter(), loss=lambda r: math.nan), "must be finite and above 0"),
    ],
)
def test_what_no_search_can_mend_is_refused(runs, message):
    with pytest.raises(UsageError, match=message):
        fit_surface(runs)
