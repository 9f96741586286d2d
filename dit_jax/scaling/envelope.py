"""Training-curve envelope, approach 1 of Hoffmann et al. 2022 (arXiv 2203.15556), section 3.1: the best of all runs at each compute.

Each run is a curve of log loss against log compute through its checkpoints, interpolated monotonically (Fritsch & Carlson 1980). The paper
takes the winning size at 1,500 computes, a staircase. We take the ends of its stairs, the computes at which two sizes are equally good:
on a ladder of sizes of one ratio they follow N_opt's power law exactly, whatever the surface's exponents, while the coefficient of
N_opt carries the asymmetry of the curves. Between checkpoints of one run the learning rate has not decayed, which biases the method; it
needs runs whose every checkpoint could have been a last one.

Where two sizes cross, both are worse than the best size between them, the more so the farther apart they are. The crossings give E and the
exponent of the loss law; its coefficient is that with which it touches a curve from below, the median of the curves: on a surface
E + A / N^alpha + B / D^beta this is L_opt itself, whatever the ratio of the sizes.

Intervals are a bootstrap whose unit is the curve. Its noise is a shift of the whole curve (seed, learning rate): how large, the
crossings' scatter about N_opt's law tells, since a shift moves a crossing by the shift over the difference of the curves' slopes. Each
resample shifts all curves, cleared of the shifts that the scatter reveals, and fits everything again. Its shifts are scaled to what the
same scatter would show of them, which studentises the errors (bootstrap-t: Davison & Hinkley 1997, section 2.4); for N_opt and
D_opt the errors are taken off the estimate (the basic bootstrap, section 5.2.1). Noise from checkpoint to checkpoint is not redrawn; two
sizes that it makes cross several times cross once, at the mean of these places.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.optimize import brentq

from dit_jax.error import UsageError
from dit_jax.scaling.law import PowerLaw
from dit_jax.scaling.optima import IRREDUCIBLE_FROM, Point, PointFit, drawn, laws_of, laws_through
from dit_jax.scaling.runs import Run

LOSSES = ("L_opt_pure", "L_opt_irreducible", "L_opt")
COMPUTES = 1500
CHUNK = 100  # resamples at a time
AROUND = 1.0  # of log C about a crossing, by which the curves' slopes are read
APART = (
    "fewer than 2 curves touch the loss law inside their computes: L_opt is the loss at the crossings, which is above the best, the more "
    "so the farther apart the sizes are; its interval does not hold that"
)


@dataclass(frozen=True)
class Table:
    """Training curves at the same computes."""

    log_c: np.ndarray  # (g,)
    params: np.ndarray  # (curves,)
    loss: np.ndarray  # (curves, g) log loss, inf where a curve has no rows
    tokens: np.ndarray  # (curves, g) logarithms


@dataclass(frozen=True)
class Others:
    """The losses of sizes other than the best. Where a curve touches the loss law its size is the best; where N_opt(C) is 1 / f of that,
    its size is f times the best, so the curve itself shows what f costs. A shift of a curve moves both alike."""

    table: Table
    cleared: Table  # of the shifts that the crossings show: what is resampled
    shifts: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))  # (resamples, curves) of those in `draws`

    def __call__(self, fit: PointFit, away: float) -> tuple:
        """(share of its reducible loss that each curve loses where its log N is `away` from the best (curves,), its resamples or None,
        where that is from)."""
        shares = _away(
            self.table, *(fit.laws[k] for k in ("L_opt", "N_opt")), np.zeros((1, len(self.table.params))), away
        )[0]
        told = (
            f"{np.isfinite(shares).sum()} of {len(shares)} training curves, where they touch the loss law and where their size is so far "
            "from the best; noise between the checkpoints of a run is not in the interval"
        )
        if not fit.draws:
            return shares, None, told
        laws, parts = (
            (fit.draws["L_opt"], fit.draws["N_opt"]),
            [slice(i, i + CHUNK) for i in range(0, len(self.shifts), CHUNK)],
        )
        drawn = [_away(self.cleared, *(law[p] for law in laws), self.shifts[p], away) for p in parts]
        return shares, np.concatenate(drawn), told


def fit_envelope(runs: Sequence[Run], *, resamples: int = 1000, seed: int = 0, level: float = 0.95) -> PointFit:
    """N_opt, D_opt and L_opt as laws of compute through the crossings of the runs' training curves. Rows of one run carry one name;
    runs of a single row are left out. The points' losses are those of the best size there, as L_opt says."""
    curves, single = _curves(runs)
    if len(curves) < 3:
        raise UsageError(
            f"RUNS: {len(curves)} run(s) with at least 3 rows of growing tokens, expected at least 3 runs: the envelope is that of "
            "training curves, whose rows share a name in the column 'run'"
        )
    warnings = (f"{single} run(s) of fewer than 3 rows are left out",) if single else ()
    table = _table(curves)
    points, pairs = _crossings(curves, table)
    fit = laws_of("envelope", len(curves), points, warnings, {"resamples": 0, "seed": seed, "level": level})
    fit = replace(fit, resamples=resamples)
    lowered = _lowered(table, fit.laws, np.zeros((1, len(curves))))
    touching = bool(np.isfinite(lowered["L_opt"].coefficient).all())
    if touching:
        C = np.array([p.flops for p in points])
        down = lowered["L_opt"](C) / fit.laws["L_opt"](C)
        points = tuple(replace(p, loss=float(p.loss * s)) for p, s in zip(points, down, strict=True))
        fit = replace(fit, points=points, laws={k: law[0] if k in LOSSES else law for k, law in lowered.items()})
        fit = replace(fit, others=Others(table, table))
    else:
        fit = replace(fit, warnings=(*fit.warnings, APART))
    if len(points) < 3 or not resamples:
        return fit
    return _resampled(fit, table, _shifts(fit, curves, pairs), np.random.default_rng(seed), touching)


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


def _table(curves) -> Table:
    grid = np.linspace(min(c[3][0] for c in curves), max(c[3][1] for c in curves), COMPUTES)
    reach = np.stack([(grid >= e[0]) & (grid <= e[1]) for *_, e in curves])
    loss, tokens = (np.where(reach, [c[i](grid) for c in curves], math.inf) for i in (1, 2))
    return Table(grid, np.array([c[0] for c in curves]), loss, tokens)


def _crossings(curves, table: Table) -> tuple[list, list]:
    """(points, pairs of curves by index) where the winner of the envelope changes between two curves that both reach there. Curves that
    cross several times, by the noise of their checkpoints, do so once, in the middle."""
    grid, loss = table.log_c, table.loss
    winner, found = loss.argmin(0), {}
    for i in np.flatnonzero(winner[1:] != winner[:-1]):
        one, two = int(winner[i]), int(winner[i + 1])
        if not np.isfinite(loss[[one, two]][:, i : i + 2]).all() or curves[one][0] >= curves[two][0]:
            continue

        def gap(c, first=curves[one][1], second=curves[two][1]):
            return float(first(c) - second(c))

        c = brentq(gap, grid[i], grid[i + 1], xtol=1e-12)
        d = float(curves[one][2](c) + curves[two][2](c)) / 2
        found.setdefault((one, two), []).append((c, d, float(curves[one][1](c))))
    points = {}
    for (one, two), several in found.items():
        c, d, low = (math.exp(sum(v) / len(v)) for v in zip(*several, strict=True))
        points[one, two] = Point(f"{c:.3g}", c, math.sqrt(curves[one][0] * curves[two][0]), d, low)
    pairs = sorted(points, key=lambda pair: points[pair].flops)
    return [points[pair] for pair in pairs], pairs


def _lowered(table: Table, laws: dict, shifts: np.ndarray) -> dict:
    """`laws` with loss laws of the same E and exponent that touch the curves, moved by `shifts` (m, curves), from below. Their
    coefficients are nan where fewer than 2 curves are touched inside their computes."""
    reach, out = np.isfinite(table.loss), {}
    first, last = _ends(reach)
    for name, law in laws.items():
        if name not in LOSSES or name == "L_opt":
            out[name] = law
            continue
        E, x = (np.atleast_1d(v)[:, None, None] for v in (law.irreducible, law.exponent))
        above = np.exp(table.loss + shifts[:, :, None]) - E
        with np.errstate(divide="ignore", invalid="ignore"):
            level = np.where(above > 0, np.log(above) - x * table.log_c, -math.inf)
        best, low = level.argmin(2), level.min(2)
        touched = (best > first) & (best < last) & np.isfinite(low)
        middle = np.full(len(low), math.nan)
        enough = touched.sum(1) >= 2
        middle[enough] = np.nanmedian(np.where(touched, low, math.nan)[enough], axis=1)
        out[name] = PowerLaw(np.exp(middle), x[:, 0, 0], E[:, 0, 0])
    return {**out, "L_opt": out.get("L_opt_irreducible", out["L_opt_pure"])}


def _away(table: Table, law: PowerLaw, size: PowerLaw, shifts: np.ndarray, away: float) -> np.ndarray:
    """Share of the reducible loss (m, curves) that a curve, moved by `shifts` (m, curves), loses where its log N is `away` from the
    best, by its own least loss over the law's reducible part; nan of curves that do not reach there, or touch no law inside."""
    grid, m = table.log_c, len(shifts)
    E, x, a = (np.broadcast_to(v, (m,))[:, None] for v in (law.irreducible, law.exponent, size.exponent))
    with np.errstate(all="ignore"):
        level = np.log(np.exp(table.loss + shifts[:, :, None]) - E[:, :, None]) - x[:, :, None] * grid
        level = np.where(np.isnan(level), math.inf, level)
        touch, (first, last) = level.argmin(2), _ends(np.isfinite(table.loss))
        three = np.stack(
            [np.take_along_axis(level, np.clip(touch + i, 0, len(grid) - 1)[..., None], 2)[..., 0] for i in (-1, 0, 1)]
        )
        bend = three[0] - 2 * three[1] + three[2]
        part = (three[0] - three[2]) / (2 * bend)  # of a step: the vertex of the parabola through the lowest three
        at = touch + part - away / a / (grid[1] - grid[0])
        inside = (touch > first) & (touch < last) & (at >= first) & (at <= last)
        left = np.clip(np.where(inside, at, 0.0).astype(int), 0, len(grid) - 2)
        ends = [np.take_along_axis(level, (left + i)[..., None], 2)[..., 0] for i in (0, 1)]
        there = ends[0] + (at - left) * (ends[1] - ends[0])
        return np.where(inside, np.expm1(there - three[1] + bend * part**2 / 2), math.nan)


def _ends(reach: np.ndarray) -> tuple:
    """(first, last) compute of the table (curves,) that a curve reaches."""
    return reach.argmax(1), reach.shape[1] - 1 - reach[:, ::-1].argmax(1)


def _shifts(fit: PointFit, curves, pairs) -> tuple:
    """(standard deviation of a curve's shift; the orthonormal directions (v, curves) of shifts that the scatter about N_opt's law shows;
    the shifts (curves,) along them)."""
    log_c, x = np.log([p.flops for p in fit.points]), fit.laws["N_opt"].exponent
    move = np.zeros((len(pairs), len(curves)))  # of log C of the crossings, for shifts of 1
    for j, (one, two) in enumerate(pairs):
        steeper = max(_steeper(curves[one], curves[two], log_c[j]), 1e-6)
        move[j, [one, two]] = -1 / steeper, 1 / steeper
    basis, _ = np.linalg.qr(np.stack([np.ones_like(log_c), log_c - log_c.mean()], axis=1))
    off = np.log([p.n_opt for p in fit.points]) - np.log(fit.laws["N_opt"](np.exp(log_c)))
    left, sizes, right = np.linalg.svd(-x * (move - basis @ (basis.T @ move)), full_matrices=False)
    shown = (sizes > 1e-8 * sizes[0]) & (np.arange(len(sizes)) < len(pairs) - 2)
    along = (left.T @ off)[shown] / sizes[shown]
    return math.sqrt(np.mean(along**2)), right[shown], along @ right[shown]


def _steeper(one, two, log_c: float) -> float:
    """The difference of two curves' slopes where they cross, by a cubic through their difference at computes up to e times off: one of
    two checkpoints would be their noise."""
    ends = [f(c[3][i] for c in (one, two)) for i, f in enumerate((max, min))]
    u = np.linspace(max(-AROUND, ends[0] - log_c), min(AROUND, ends[1] - log_c), 50)
    return float(np.polyfit(u, one[1](log_c + u) - two[1](log_c + u), 3)[2])


def _resampled(fit: PointFit, table: Table, found: tuple, rng, touching: bool) -> PointFit:
    """The fit with its resampled laws."""
    noise, shown, own = found
    table = replace(table, loss=table.loss - own[:, None])
    shifts = rng.standard_normal((fit.resamples, len(own)))
    scale = noise / np.sqrt(np.mean((shifts @ shown.T) ** 2, axis=1))
    shifts = np.concatenate([np.zeros((1, len(own))), scale[:, None] * shifts])
    parts = [_redrawn(table, shifts[i : i + CHUNK], len(fit.points), touching) for i in range(0, len(shifts), CHUNK)]
    names = ("coefficient", "exponent", "irreducible")
    laws = {k: PowerLaw(*(np.concatenate([getattr(p[k], n) for p, _ in parts]) for n in names)) for k in fit.laws}
    kept = np.concatenate([k for _, k in parts])
    kept[1:] &= kept[0]  # without errors there must be a law to tell errors from
    for name in ("N_opt", "D_opt"):
        law, mine = laws[name], fit.laws[name]
        coefficient = mine.coefficient * law.coefficient[0] / law.coefficient
        laws[name] = PowerLaw(coefficient, mine.exponent + law.exponent[0] - law.exponent, law.irreducible)
    draws = {name: law[1:][kept[1:]] for name, law in laws.items()}
    if fit.others:
        fit = replace(fit, others=replace(fit.others, cleared=table, shifts=shifts[1:][kept[1:]]))
    return drawn(fit, draws, noise * fit.points[-1].loss, scale[kept[1:]] * fit.points[-1].loss)


def _redrawn(table: Table, shifts: np.ndarray, count: int, touching: bool) -> tuple:
    """(laws of the envelopes of the curves moved by `shifts` (m, curves), which of them (m,) are such)."""
    loss = table.loss + shifts[:, :, None]
    winner = loss.argmin(1)
    r, g = np.nonzero(winner[:, 1:] != winner[:, :-1])
    one, two = winner[r, g], winner[r, g + 1]
    with np.errstate(invalid="ignore"):
        gaps = [loss[r, one, i] - loss[r, two, i] for i in (g, g + 1)]
    both = np.isfinite(gaps).all(0) & (table.params[one] < table.params[two])
    r, g, one, two, before, after = (v[both] for v in (r, g, one, two, *gaps))
    part = before / (before - after)

    def at(left, right):
        return left + part * (right - left)

    tokens = [at(table.tokens[i, g], table.tokens[i, g + 1]) for i in (one, two)]
    values = (
        at(table.log_c[g], table.log_c[g + 1]),
        np.log(table.params[one] * table.params[two]) / 2,
        sum(tokens) / 2,
        at(loss[r, one, g], loss[r, one, g + 1]),
    )
    pair, which, times = np.unique(
        (r * len(table.params) + one) * len(table.params) + two, return_inverse=True, return_counts=True
    )
    r, values = (
        pair // len(table.params) ** 2,
        [np.bincount(which, v) / times for v in values],
    )  # one crossing of a pair, as `_crossings`
    per = np.bincount(r, minlength=len(shifts))
    column = np.arange(len(r)) - np.repeat(np.cumsum(per) - per, per)
    weight = (np.arange(max(per.max(), count)) < per[:, None]).astype(float)
    padded = [np.full(weight.shape, table.log_c.mean()), *np.zeros((3, *weight.shape))]
    for array, value in zip(padded, values, strict=True):
        array[r, column] = value
    kept = per >= min(count, IRREDUCIBLE_FROM)
    weight[~kept] = 1.0  # of any value: not used
    padded[0][~kept] = np.linspace(*table.log_c[[0, -1]], weight.shape[1])
    laws = laws_through(*(np.exp(v) for v in padded), weight, count)
    if touching:
        laws = _lowered(table, laws, shifts)
        kept &= np.isfinite(laws["L_opt"].coefficient)
    return laws, kept
