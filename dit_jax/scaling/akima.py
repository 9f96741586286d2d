"""IsoFLOP minima by interpolation: at each budget, log loss against log N through every run (Akima 1970), and where that is lowest.

This is how Porian et al. 2024 (arXiv 2406.19146), section 2.2, find N_opt. It assumes no shape, so a wide or lopsided grid of sizes does
not bias it as it does a parabola; in return it takes each run at its word, so noise moves its minima more, and always downwards in loss.

Intervals are a bootstrap whose unit is the run: all runs' losses are drawn anew about smooth curves and interpolated again (`smooth`). Of
the errors of log L the mean is taken off the law too, since it is the bias of a minimum of noise; of log N and log D it is not: inside
the sizes it is small against their scatter, and its estimate would add more than it removes. Where wide grids do not follow the smooth
curves, the noise is read at the minima alone: from the lowest runs and their neighbours (`at_minima`), pooled with the scatter of
the minima about the law of N_opt.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.interpolate import Akima1DInterpolator

from dit_jax.scaling.optima import Errors, Point, PointFit, laws_of, left_out, shared
from dit_jax.scaling.runs import Run, budgets
from dit_jax.scaling.smooth import Curves, at_minima, smooth

BEYOND = 1.2  # times the distance from the best at which a size is asked for, within which no run is left out
FEWEST = 20  # resamples that tell how much the minima scatter
SIZES = 4  # an Akima curve through fewer points is a parabola or less
ROUGH = (
    "the runs show no smooth curves about which their noise could be drawn: the intervals hold the scatter of the minima about their laws, "
    "and not that the lowest of noisy runs is too low"
)


def fit_akima(
    runs: Sequence[Run], *, resamples: int = 1000, seed: int = 0, level: float = 0.95, tolerance: float = 0.05
) -> PointFit:
    """N_opt, D_opt and L_opt as laws of compute through the interpolated minima, each budget counted alike. A budget is used when it has
    at least 4 sizes and its lowest point is not at their edge."""
    groups = budgets(runs, tolerance)
    minima = [(label, _minimum(label, members)) for label, members in groups]
    warnings = left_out([(label, minimum) for label, minimum in minima if isinstance(minimum, str)])
    found = sorted((m for _, m in minima if not isinstance(m, str)), key=lambda pair: pair[0].flops)
    points, grids = [p for p, _ in found], [g for _, g in found]
    several = len(points) > 2
    errors = _errors(points, grids, resamples, seed) if resamples and several else None
    if errors is None and resamples and several:
        warnings.append(ROUGH)
    options = {"resamples": resamples, "seed": seed, "level": level}
    fit = shared(laws_of("akima", len(runs), points, tuple(warnings), options, errors), groups, tolerance)
    return replace(fit, others=Others(tuple(grids), seed)) if several else fit


@dataclass(frozen=True)
class Others:
    """The losses of sizes other than the best, by smooth curves through the runs of the budgets' `grids`."""

    grids: tuple
    seed: int

    def __call__(self, fit: PointFit, away: float) -> tuple:
        """(share of its reducible loss that each budget loses at log N = `away` from the best (budgets,), its resamples or None, where
        that is read)."""
        C, curves = np.array([p.flops for p in fit.points]), _curves(fit.points, self.grids, BEYOND * abs(away))
        if curves is None:
            return np.full(len(C), math.nan), None, ""
        share = _share(fit.laws["L_opt"], C, curves.rise(away, curves.shape[None])[0])
        told = f"smooth curves through the runs of the {np.isfinite(share).sum()} of {len(C)} budgets that have sizes so far off"
        if not fit.draws:
            return share, None, told
        shapes = curves.shapes(np.random.default_rng(self.seed), fit.resamples)[0][: len(fit.noise_draws)]
        return share, _share(fit.draws["L_opt"], C, curves.rise(away, shapes)), told


def _share(law, C: np.ndarray, rise: np.ndarray) -> np.ndarray:
    """A rise (..., c) of log loss over the law's at C (c,), as a share of the law's reducible loss."""
    loss, reducible = law.at(C)
    with np.errstate(all="ignore"):  # of resamples without a reducible loss
        return loss * np.expm1(rise) / reducible


def _minimum(label: str, runs: Sequence[Run]) -> tuple | str:
    """(the lowest point of a budget's curve, its grid), or why there is none. Runs of one size count by their mean."""
    sizes = sorted({r.params for r in runs})
    if len(sizes) < SIZES:
        return f"{len(sizes)} distinct size(s), interpolation needs {SIZES}"
    same = [[r for r in runs if r.params == size] for size in sizes]
    loss, tokens = (np.array([np.mean([math.log(getattr(r, k)) for r in s]) for s in same]) for k in ("loss", "tokens"))
    u = np.log(sizes)
    best, low = (float(v[0]) for v in lowest(u, loss[None]))
    if best in (u[0], u[-1]):
        return f"minimum at {math.exp(best):.3g} parameters, the edge of the sizes tried ({sizes[0]:.3g} to {sizes[-1]:.3g})"
    flops = math.exp(np.mean([math.log(r.flops) for r in runs]))
    point = Point(label, flops, math.exp(best), math.exp(np.interp(best, u, tokens)), math.exp(low))
    return point, (u, loss, tokens)


def lowest(u: np.ndarray, losses: np.ndarray) -> tuple:
    """(where (m,), how low (m,)) the interpolants through `losses` (m, n) at u (n,) are."""
    a, b, c, d = Akima1DInterpolator(
        u, losses.T
    ).c  # of cubics in the distance from a piece's left end, (n - 1, m) each
    with np.errstate(invalid="ignore", divide="ignore"):  # pieces without a minimum
        t = -c / (b + np.sqrt(b * b - 3 * a * c))
    inside = (t > 0) & (t < np.diff(u)[:, None])
    t = np.where(inside, t, 0.0)
    value = np.concatenate([np.where(inside, ((a * t + b) * t + c) * t + d, math.inf), losses.T])
    place = np.concatenate([u[:-1, None] + t, np.broadcast_to(u[:, None], losses.T.shape)])
    best = value.argmin(0)[None]
    return tuple(np.take_along_axis(v, best, 0)[0] for v in (place, value))


def _curves(points: Sequence[Point], grids: Sequence[tuple], reach: float = 0.0) -> Curves | None:
    """The smooth curves of all budgets, or None where there are none."""
    log_c, start = (np.log([getattr(p, name) for p in points]) for name in ("flops", "n_opt"))
    line = np.polyval(np.polyfit(log_c - log_c.mean(), start, 1), log_c - log_c.mean())
    return smooth(log_c, [u for u, _, _ in grids], [loss for _, loss, _ in grids], line, reach)


def _errors(points: Sequence[Point], grids: Sequence[tuple], resamples: int, seed: int) -> Errors | None:
    """The errors of the minima by simulation, or None where the curves cannot be smoothed."""
    curves = _curves(points, grids)
    if curves is None:
        return None
    variance, freedom = at_minima([u for u, _, _ in grids], [loss for _, loss, _ in grids])
    if 0 < variance < curves.noise**2:
        less = _simulated(curves.with_noise(variance, freedom), grids, resamples, seed)
        curves = curves.least(*_pooled(points, less, variance, freedom))
    return _simulated(curves, grids, resamples, seed)


def _pooled(points: Sequence[Point], errors: Errors, variance: float, freedom: int) -> tuple:
    """`variance` of the noise pooled with that by which the points' N_opt scatter about their law, and its degrees of freedom. `errors` are
    what the points do under `variance`."""
    drawn, log_c = errors.log[0][errors.found.all(1)], np.log([p.flops for p in points])
    if len(drawn) < FEWEST:
        return variance, freedom
    basis, _ = np.linalg.qr(np.stack([np.ones_like(log_c), log_c - log_c.mean()], axis=1))

    def scatter(v: np.ndarray):
        return ((v - (v @ basis) @ basis.T) ** 2).sum(-1)

    ratio = float(scatter(np.log([p.n_opt for p in points])) / max(scatter(drawn).mean(), 1e-300))
    more = len(points) - 2
    return variance * (freedom + more * ratio) / (freedom + more), freedom + more


def _simulated(curves: Curves, grids: Sequence[tuple], resamples: int, seed: int) -> Errors:
    """The errors of the minima of runs drawn about the curves."""
    losses, scale = curves.draw(np.random.default_rng(seed), resamples)
    off, found = [], []
    for v, drawn, inside, (_, _, tokens) in zip(curves.places, losses, curves.inside, grids, strict=True):
        tokens = tokens[inside]
        place, low = lowest(v, drawn)
        off.append(np.stack([place, np.interp(place, v, tokens) - np.interp(0.0, v, tokens), low]))
        found.append((place > v[0]) & (place < v[-1]))
    off, found = np.stack(off, axis=-1), np.stack(found, axis=-1)
    mean = (off * found).sum(1, keepdims=True) / np.maximum(found.sum(0), 1)
    mean[2] = 0.0
    return Errors(off - mean, found, curves.noise, scale)
