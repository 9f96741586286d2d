"""Facts about the intervals of akima, power and envelope: they hold the truth as often as they say, and never end in the absurd."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from planted import LAW, held, ladder
from test_scaling_fit import BUDGETS, L_LAW, N_LAW, study
from test_scaling_methods import best_runs, curves

from dit_jax.scaling import newton
from dit_jax.scaling.akima import _curves, fit_akima
from dit_jax.scaling.compute import fit_compute
from dit_jax.scaling.envelope import _curves as _curves_of_training
from dit_jax.scaling.envelope import _table, fit_envelope
from dit_jax.scaling.law import PowerLaw
from dit_jax.scaling.runs import Run
from dit_jax.scaling.smooth import at_minima, smooth

POWER = PowerLaw(2394.3, -0.1273, 1.7)


def _truth(exponent, n_opt, l_opt, far: float) -> dict:
    return {"a": exponent, "N_opt": float(n_opt(far)), "L_opt": float(l_opt(far))}


def _of_surface(far: float) -> dict:
    return _truth(LAW.a, LAW.optimum(6.0)["N_opt"], LAW.optimum(6.0)["L_opt"], far)


FAR = 4 * float(BUDGETS[-1])
STUDY, LADDER = (_truth(0.52, N_LAW, L_LAW, FAR), FAR), (_of_surface(1e22), 1e22)
LOSS = (({"L_opt": truth["L_opt"]}, far) for truth, far in (STUDY, LADDER, (_truth(0, POWER, POWER, 4e22), 4e22)))
STUDY_LOSS, LADDER_LOSS, POWER_LOSS = LOSS


def _training(sizes: int, ratio: float) -> tuple:
    """(training curves of a seed, (truth, where)): curves shifted by 0.1 %, 4x beyond the compute of all of them."""
    far = 4 * max(r.flops for r in curves(ratio=ratio, sizes=sizes))
    return lambda seed: curves(noise=0.001, ratio=ratio, sizes=sizes, seed=seed), (_of_surface(far), far)


DESIGNS = {
    "akima, study": (fit_akima, lambda seed: study(noise=0.003, seed=seed, sizes=9), STUDY),
    "akima, ladder": (fit_akima, lambda seed: ladder(noise=0.005, seed=seed), LADDER),
    "power, 5 runs": (fit_compute, lambda seed: best_runs(POWER, noise=0.003, seed=seed, count=5), POWER_LOSS),
    "power, 8 runs": (fit_compute, lambda seed: best_runs(POWER, noise=0.003, seed=seed), POWER_LOSS),
    "power, study": (fit_compute, lambda seed: study(noise=0.003, seed=seed, sizes=9), STUDY_LOSS),
    "power, ladder": (fit_compute, lambda seed: ladder(noise=0.005, seed=seed), LADDER_LOSS),
    "envelope, 8 sizes 4x apart": (fit_envelope, *_training(8, 4.0)),
    "envelope, 14 sizes 2x apart": (fit_envelope, *_training(14, 2.0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("design", DESIGNS)
def test_intervals_cover_in_500_studies(design):
    fit, make, (truth, far) = DESIGNS[design]
    for name, share in held(fit, make, truth, far, 500, 400).items():
        assert 0.93 <= share <= 0.97, (name, share)


@pytest.mark.parametrize("fit", [fit_akima, fit_compute])
def test_the_interval_of_a_lowest_of_noisy_runs_lies_above_it(fit):
    """The winner's curse: the estimates are too low on average, the draws are not."""
    off = []
    for seed in range(40):
        found = fit(study(noise=0.003, seed=seed, sizes=9), resamples=30)
        law, draws = (found.laws["L_opt"](BUDGETS[2]), np.median(found.draws["L_opt"](BUDGETS[2])))
        off.append((law - L_LAW(BUDGETS[2]), draws - L_LAW(BUDGETS[2])))
    estimate, drawn = np.mean(off, axis=0)
    assert estimate < -0.001 and abs(drawn) < 0.4 * abs(estimate)


def test_seeds_of_a_size_count_as_one_and_their_mean_is_inside():
    """The lowest of all seeds would be lower than the lowest mean, and than what intervals about curves hold."""
    rng, exact = np.random.default_rng(0), study(sizes=7)
    runs = [replace(r, loss=r.loss + 0.005 * float(rng.standard_normal())) for _ in range(3) for r in exact]
    fit = fit_compute(runs, resamples=200)
    losses = [math.exp(np.mean([math.log(r.loss) for r in runs[i :: len(exact)]])) for i in range(len(exact))]
    mean = [replace(r, loss=loss) for r, loss in zip(exact, losses, strict=True)]
    assert fit.points == fit_compute(mean, resamples=0).points
    for at in (BUDGETS[0], BUDGETS[-1]):
        low, high = np.quantile(fit.draws["L_opt"](at), [0.025, 0.975])
        assert low < fit.laws["L_opt"](at) < high
    assert fit_compute(runs[::-1], resamples=50).laws["L_opt"].exponent == pytest.approx(fit.laws["L_opt"].exponent)


def test_the_best_of_few_sizes_is_too_high_and_its_interval_is_not():
    fit, truth = fit_compute(study(noise=1e-5, sizes=4, seed=1), resamples=200), L_LAW(BUDGETS[2])
    high, drawn = fit.laws["L_opt"](BUDGETS[2]) / truth - 1, np.median(fit.draws["L_opt"](BUDGETS[2])) / truth - 1
    assert high > 0.002 and abs(drawn) < 0.5 * high


@pytest.mark.parametrize("residual", ["log", "linear"])
def test_no_end_of_an_interval_of_power_is_absurd(residual):
    """Every draw is a law that falls to an irreducible loss of at least 0 through points near the data."""
    for seed in range(10):
        fit = fit_compute(best_runs(POWER, noise=0.01, seed=seed, count=5), residual=residual, resamples=200)
        low, high = np.quantile(fit.draws["L_opt"](4e22), [0.025, 0.975])
        assert 0 < low < high < 1.5 * max(p.loss for p in fit.points)


def test_a_touching_law_is_the_surface_whatever_the_ratio_of_the_sizes():
    far = 1e23
    for ratio in (2.0, 4.0):
        fit = fit_envelope(curves(ratio=ratio), resamples=0)
        assert fit.laws["L_opt"](far) == pytest.approx(LAW.optimum(6.0)["L_opt"](far), rel=1e-5)
        assert fit.points[3].loss == pytest.approx(LAW.optimum(6.0)["L_opt"](fit.points[3].flops), rel=1e-4)


def test_curves_that_touch_no_law_are_said():
    """The smallest size begins, and the largest ends, where another is better: the middle one alone is ever the best there could be."""
    runs, ends = [], ((95, 1000), (1, 1000), (1, 6.5))
    for i, (low, high) in enumerate(ends):
        n = 5e7 * 4.0**i
        runs += [Run(f"n{i}", n, float(d), float(6 * n * d), float(LAW(n, d))) for d in np.geomspace(low, high, 30) * n]
    fit = fit_envelope(runs, resamples=50)
    assert len(fit.points) == 2 and any("fewer than 2 curves touch" in w for w in fit.warnings)


def test_sizes_that_cross_twice_by_noise_cross_once():
    """Noise of the checkpoints lets neighbours take the lead several times where they are equally good: still one point, and intervals."""
    exact = curves(points=200)
    rng = np.random.default_rng(0)
    runs = [replace(r, loss=r.loss * math.exp(0.001 * rng.standard_normal())) for r in exact]
    table = _table(_curves_of_training(runs)[0])
    winner = table.loss.argmin(0)
    ups = [(a, b) for a, b in itertools.pairwise(winner.tolist()) if b > a]
    assert len(ups) > len(set(ups))  # the premise
    fit, truth = fit_envelope(runs, resamples=200), fit_envelope(exact, resamples=0)
    assert [p.n_opt for p in fit.points] == pytest.approx([p.n_opt for p in truth.points])
    assert fit.laws["N_opt"].exponent == pytest.approx(truth.laws["N_opt"].exponent, abs=0.02)
    low, high = np.quantile(fit.draws["N_opt"].exponent, [0.025, 0.975])
    assert fit.degenerate == 0 and low < truth.laws["N_opt"].exponent < high and high - low < 0.1


def test_smoothing_finds_the_planted_noise_and_minima():
    rng, log_c = np.random.default_rng(0), np.linspace(40, 48, 6)
    u = [0.5 * c + np.linspace(-2, 2, 40) + rng.uniform(-0.5, 0.5) for c in log_c]
    y = [0.02 * (v - 0.5 * c) ** 2 - 0.1 * c + 0.004 * rng.standard_normal(40) for v, c in zip(u, log_c, strict=True)]
    found = smooth(log_c, u, y, 0.5 * log_c + 0.3)
    assert found.noise == pytest.approx(0.004, rel=0.15) and found.freedom == 240 - 12 - 10
    off = [v[0] - (s[0] - 0.5 * c) for v, s, c in zip(found.places, u, log_c, strict=True)]
    assert np.abs(off).max() < 0.15
    losses, scale = found.draw(rng, 50)
    assert losses[0].shape == (50, 40) and scale.shape == (50,)
    assert smooth(log_c, u, [-v for v in y], 0.5 * log_c) is None


def bent(noise=0.001, seed=0) -> list[Run]:
    """Wide grids whose curves no polynomial follows: sizes far above the best hardly train. N_opt grows as C^0.55."""
    rng, runs = np.random.default_rng(seed), []
    for i, c in enumerate(np.geomspace(1e16, 2.6e19, 11)):
        for u in np.arange(-1.3 + rng.uniform(-0.3, 0.3), 3.2 - 0.18 * i, 0.4):
            n, late = 0.05 * float(c) ** 0.55 * math.exp(u), 1 / (1 + math.exp(-(u - 1.5) / 0.15))
            log_loss = 1.3 - 0.05 * math.log(c / 5e17) + 0.035 * u * u + 0.4 * late + noise * rng.standard_normal()
            runs.append(Run(f"{i}", n, float(c / 6 / n), float(c), math.exp(log_loss)))
    return runs


def test_misfit_far_from_the_minima_is_no_noise():
    """A cubic through the neighbours of the lowest runs tells the noise that is there; far off, the residuals are many times as large."""
    found, misfit = [], []
    for seed in range(8):
        fit = fit_akima(bent(seed=seed), resamples=50)
        curves = _curves(fit.points, fit.others.grids)
        variance, freedom = at_minima(*zip(*[grid[:2] for grid in fit.others.grids], strict=True))
        found.append(variance)
        if curves.noise > 0.002:  # twice what was planted
            misfit.append(fit.noise / fit.points[-1].loss)
        assert freedom >= 8 and curves.least(1.0, freedom) is curves and curves.least(math.nan, 0) is curves
        assert curves.least(1e-9, freedom).noise == pytest.approx(math.sqrt(1e-9))
    assert math.sqrt(np.mean(found)) == pytest.approx(0.001, rel=0.25)
    assert len(misfit) > 1 and np.mean(misfit) == pytest.approx(0.001, rel=0.3)


@pytest.mark.slow
def test_intervals_of_bent_curves_cover():
    held_in, widths = [], []
    for seed in range(300):
        draws = fit_akima(bent(seed=seed), resamples=300, seed=10**6 + seed).draws["N_opt"].exponent
        low, high = np.quantile(draws, [0.025, 0.975])
        held_in.append(low <= 0.55 <= high)
        widths.append(high - low)
    print(f"bent curves: coverage {np.mean(held_in):.3f}, half-width {np.median(widths) / 2:.4f}")
    assert np.mean(held_in) >= 0.93


def test_problems_with_losses_of_their_own_are_solved_as_if_alone():
    rng, x = np.random.default_rng(0), np.linspace(-2, 2, 7)
    terms = np.zeros((2, 7, 3))
    terms[0, :, 0], terms[1, :, 1], terms[1, :, 2] = 1.0, 1.0, -x
    y = np.log(1 + np.exp(-0.7 * x) * np.exp(0.1 * rng.standard_normal((5, 7))))
    bounds = np.array([-25.0, -25.0, 0.0]), np.array([60.0, 60.0, 5.0])
    start = np.tile([0.0, 0.0, 0.5], (5, 1))
    for linear in (False, True):
        together = newton.minimize(newton.Problem(terms, y[0], math.inf, linear, *bounds), start, log_loss=y)
        for i in range(5):
            alone = newton.minimize(newton.Problem(terms, y[i], math.inf, linear, *bounds), start[:1])
            assert together.loss[i] == pytest.approx(alone.loss[0], rel=1e-9)
            np.testing.assert_allclose(together.theta[i], alone.theta[0], rtol=1e-4, atol=1e-6)


def test_what_no_curve_can_tell_is_said():
    few = [r for r in study(noise=0.003, sizes=5) if r.name[-1] in "12"]
    assert any("too few sizes for smooth curves" in w for w in fit_compute(few, resamples=50).warnings)
    assert not any("too few sizes" in w for w in fit_compute(best_runs(POWER, noise=0.003), resamples=50).warnings)
    bumps = []
    for c in BUDGETS:
        for n, y in zip((0.3, 0.7, 1.5, 3.0), (1.0, 0.99, 1.05, 1.0), strict=True):
            size = float(N_LAW(c)) * n
            bumps.append(Run("", size, float(c / 6 / size), float(c), float(L_LAW(c)) * y))
    assert any("no smooth curves" in w for w in fit_akima(bumps, resamples=50).warnings)
