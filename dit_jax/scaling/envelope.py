"""Training-curve envelope, approach 1 of Hoffmann et al. 2022 (arXiv 2203.15556), section 3.1: the best of all runs at each compute.

Each run is a curve of log loss against log compute through its checkpoints, interpolated monotonically (Fritsch & Carlson 1980). The paper
takes the winning size at 1,500 computes, a staircase. We take the ends of its stairs, the computes at which two sizes are equally good:
on a ladder of sizes of one ratio they follow N_opt's power law exactly, whatever the surface's exponents, while the coefficient of
N_opt carries the asymmetry of the curves. Between checkpoints of one run the learning rate has not decayed, which biases the method; it
needs runs whose every checkpoint could have been a last one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.optimize import brentq

from dit_jax.error import UsageError
from dit_jax.scaling.law import PowerLaw
from dit_jax.scaling.optima import Point, PointFit, drawn, laws_of, laws_through
from dit_jax.scaling.runs import Run

COMPUTES = 1500
CHUNK = 100  # resamples at a time


def fit_envelope(runs: Sequence[Run], *, resamples: int = 1000, seed: int = 0, level: float = 0.95) -> PointFit:
    """N_opt, D_opt and L_opt as laws of compute through the crossings of the runs' training curves. Rows of one run carry one name;
    runs of a single row are left out."""
    curves, single = _curves(runs)
    if len(curves) < 3:
        raise UsageError(
            f"RUNS: {len(curves)} run(s) with at least 3 rows of growing tokens, expected at least 3 runs: the envelope is that of "
            "training curves, whose rows share a name in the column 'run'"
        )
    warnings = (f"{single} run(s) of fewer than 3 rows are left out",) if single else ()
    options = {"resamples": 0, "seed": seed, "level": level}
    points, pairs = _crossings(curves)
    fit = replace(laws_of("envelope", len(curves), points, warnings, options), resamples=resamples)
    table = _table(curves)
    levels = {
        name: _touching(table, fit.laws[name], np.zeros((1, len(curves)))) for name in fit.laws if name in LEVELLED
    }
    if any(law is None for law in levels.values()):
        fit = replace(fit, warnings=(*fit.warnings, APART))
    else:
        fit = replace(fit, laws={**fit.laws, **{name: law[0] for name, law in levels.items()}})
    if len(points) < 3 or not resamples:
        return fit
    return _resampled(fit, table, pairs, np.random.default_rng(seed), all(levels.values()))


LEVELLED = ("L_opt_pure", "L_opt_irreducible", "L_opt")
APART = "no curve touches"


@dataclass(frozen=True)
class Table:
    """Training curves at the same computes."""

    log_c: np.ndarray  # (g,)
    params: np.ndarray  # (curves,)
    loss: np.ndarray  # (curves, g) log loss, inf where a curve has no rows
    tokens: np.ndarray  # (curves, g) logarithms


def _table(curves) -> Table:
    grid = np.linspace(min(c[3][0] for c in curves), max(c[3][1] for c in curves), COMPUTES)
    reach = np.stack([(grid >= e[0]) & (grid <= e[1]) for *_, e in curves])
    loss, tokens = (np.stack([np.where(at, c[i](grid), math.inf) for c, at in zip(curves, reach)]) for i in (1, 2))
    return Table(grid, np.array([c[0] for c in curves]), loss, tokens)


def _touching(table: Table, law: PowerLaw, shifts: np.ndarray) -> PowerLaw | None:
    """The law of the same E and exponent that touches the curves, moved by `shifts` (m, curves), from below: the median of their levels."""
    E, x = (np.atleast_1d(v)[:, None, None] for v in (law.irreducible, law.exponent))
    above = np.log(np.maximum(np.exp(table.loss + shifts[:, :, None]) - E, 1e-300)) - x * table.log_c
    best = above.argmin(2)
    reach = np.isfinite(table.loss)
    first, last = reach.argmax(1), reach.shape[1] - 1 - reach[:, ::-1].argmax(1)
    inside = (best > first) & (best < last)
    if not (inside.sum(1) >= 2).all():
        return None
    level = np.nanmedian(np.where(inside, above.min(2), np.nan), axis=1)
    return PowerLaw(np.exp(level), x[:, 0, 0], E[:, 0, 0])


def _resampled(fit: PointFit, table: Table, pairs, rng, touching: bool) -> PointFit:
    noise, seen, own = _noise(fit, table, pairs)
    world = replace(table, loss=table.loss - own[:, None])
    shifts = rng.standard_normal((fit.resamples, len(own)))
    scale = noise / np.sqrt(np.mean((shifts @ seen.T) ** 2, axis=1))
    shifts = scale[:, None] * shifts
    (middle, _) = _laws(world, np.zeros((1, len(own))), len(fit.points), touching)
    parts = []
    for i in range(0, fit.resamples, CHUNK):
        parts.append(_laws(world, shifts[i : i + CHUNK], len(fit.points), touching))
    kept = np.concatenate([k for _, k in parts])
    draws = {}
    for name in fit.laws:
        draws[name] = PowerLaw(
            *(
                np.concatenate([getattr(d[name], f) for d, _ in parts])
                for f in ("coefficient", "exponent", "irreducible")
            )
        )
    for name in ("N_opt", "D_opt"):
        own_law, centre, moved = fit.laws[name], middle[name], draws[name]
        draws[name] = PowerLaw(own_law.coefficient * centre.coefficient / moved.coefficient, own_law.exponent + centre.exponent - moved.exponent, 0 * moved.exponent)
    return drawn(fit, draws, noise * fit.points[-1].loss, scale[kept] * fit.points[-1].loss)


def _noise(fit: PointFit, table: Table, pairs) -> tuple:
    """(standard deviation of a curve's shift, its degrees of freedom, estimated shifts (curves,))."""
    x = np.log([p.flops for p in fit.points])
    slopes = np.gradient(np.where(np.isfinite(table.loss), table.loss, np.nan), table.log_c, axis=1)
    move = np.zeros((len(pairs), len(table.params)))
    for j, (one, two) in enumerate(pairs):
        g = np.abs(table.log_c - x[j]).argmin()
        near = slice(max(g - 3, 0), g + 4)
        a, b = (np.nanmean(slopes[i, near]) for i in (one, two))
        move[j, two], move[j, one] = 1 / (a - b), -1 / (a - b)
    basis, _ = np.linalg.qr(np.stack([np.ones_like(x), x - x.mean()], axis=1))
    off = np.log([p.n_opt for p in fit.points]) - np.log(fit.laws["N_opt"](np.exp(x)))
    move = -fit.laws["N_opt"].exponent * (move - basis @ (basis.T @ move))
    freedom = len(x) - 2
    left, values, right = np.linalg.svd(move, full_matrices=False)
    z = (left.T @ off)[:freedom] / values[:freedom]
    return math.sqrt((z**2).sum() / freedom), right[:freedom], right[:freedom].T @ z


def _laws(world: Table, shifts, count: int, touching: bool) -> tuple:
    """(laws of the envelopes of shifted curves, which of them (m,) have points enough)."""
    loss = world.loss + shifts[:, :, None]
    winner = loss.argmin(1)
    r, g = np.nonzero(winner[:, 1:] != winner[:, :-1])
    one, two = winner[r, g], winner[r, g + 1]
    with np.errstate(invalid="ignore"):
        gap = loss[r, one, g] - loss[r, two, g], loss[r, one, g + 1] - loss[r, two, g + 1]
        ok = np.isfinite(gap[0]) & np.isfinite(gap[1]) & (world.params[one] < world.params[two])
    r, g, one, two, gap = r[ok], g[ok], one[ok], two[ok], [v[ok] for v in gap]
    part = gap[0] / (gap[0] - gap[1])

    def at(values, *index):
        return values[(*index, g)] * (1 - part) + values[(*index, g + 1)] * part

    c = world.log_c[g] * (1 - part) + world.log_c[g + 1] * part
    n = (np.log(world.params[one]) + np.log(world.params[two])) / 2
    d = (at(world.tokens, one) + at(world.tokens, two)) / 2
    low = at(loss, r, one)
    per = np.bincount(r, minlength=len(shifts))
    place = np.arange(len(r)) - np.repeat(np.cumsum(per) - per, per)
    shape = (len(shifts), max(per.max(), 1))
    full = [np.zeros(shape) for _ in range(5)]
    full[0][:] = world.log_c.mean()
    for array, v in zip(full, (c, n, d, low, 1.0)):
        array[r, place] = v
    kept = per >= min(count, 4)
    C, n, d, low, weight = (v[kept] for v in full)
    laws = laws_through(np.exp(C), np.exp(n), np.exp(d), np.exp(low), weight, count)
    if touching:
        for name in LEVELLED:
            if name in laws:
                laws[name] = _touching(world, laws[name], shifts[kept]) or laws[name]
    return laws, kept


def _curves(runs) -> tuple[list, int]:
    """(params, log C -> log loss, log C -> log tokens, ends of log C) of each run, by size; and how many runs are no curve."""
    rows: dict = {}
    for r in runs:
        rows.setdefault((r.name, r.params), {})[r.flops] = r
    curves = []
    for (_, params), found in rows.items():
        if len(found) < 3:
            continue
        c = np.log(sorted(found))
        loss, tokens = (np.log([getattr(found[k], name) for k in sorted(found)]) for name in ("loss", "tokens"))
        curves.append((params, PchipInterpolator(c, loss), PchipInterpolator(c, tokens), (c[0], c[-1])))
    return sorted(curves, key=lambda curve: curve[0]), len(rows) - len(curves)


def _crossings(curves) -> tuple:
    """Where the winner of the envelope changes between two curves that both reach there."""
    grid = np.linspace(min(c[3][0] for c in curves), max(c[3][1] for c in curves), COMPUTES)
    table = np.stack([np.where((grid >= e[0]) & (grid <= e[1]), f(grid), math.inf) for _, f, _, e in curves])
    winner, points, pairs = table.argmin(0), [], []
    for i in np.flatnonzero(winner[1:] != winner[:-1]):
        one, two = winner[i], winner[i + 1]
        if not np.isfinite(table[[one, two]][:, i : i + 2]).all() or curves[one][0] >= curves[two][0]:
            continue

        def gap(c, first=curves[one][1], second=curves[two][1]):
            return float(first(c) - second(c))

        c = brentq(gap, grid[i], grid[i + 1], xtol=1e-12)
        pairs.append((one, two))
        n = math.sqrt(curves[one][0] * curves[two][0])
        d = math.exp((curves[one][2](c) + curves[two][2](c)) / 2)
        points.append(Point(f"{math.exp(c):.3g}", math.exp(c), n, d, math.exp(curves[one][1](c))))
    return points, pairs
