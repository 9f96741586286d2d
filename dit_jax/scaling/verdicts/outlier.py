"""Runs that do not belong with the others: those that lie off what the others say of them, and those that diverged.

An **outlier** is found by leaving one out: its studentised deleted residual, t_i = e_i / (s_(i) sqrt(1 - h_i)) with the leverage h_i
and the noise s_(i) of all runs but it (Cook & Weisberg 1982, "Residuals and Influence in Regression", section 2.2), lies beyond
Student's quantile at 0.05 / n in two tails (Bonferroni), so that at most one clean study in twenty has one. The worst is set aside and the
rest judged anew, so that it hides no other.

Residuals are of log loss, about the budget's parabola with the noise of all budgets pooled, *and* about a surface through all runs: the
ends of a wide grid lie off any parabola, and runs of another law off any surface, but a bad run lies off both. Runs that form no budgets
have the surface alone; budgets to which no surface can be fitted have the parabolas alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from dit_jax.error import UsageError
from dit_jax.scaling.fits import newton, parabola
from dit_jax.scaling.fits.surface import located
from dit_jax.scaling.runs import Run

CHANCE = 0.05  # that a clean study has an outlier
SHARE = 0.1  # of the runs that can be outliers; more are another law, or noise with long tails
LEAST = 1e-4  # of the loss: no training is repeated more closely
CHEAPER, ABOVE = 4.0, 1.02  # a diverged run has a higher loss, by this factor, than runs of that much less compute
STEEP, STEEPER = 1.5, 2.0  # ... or loses by this factor to both neighbours in size, or to the one neighbour of the last


@dataclass(frozen=True)
class Outlier:
    """A run's row, its studentised deleted residual, the threshold, and the loss that the others expect of it."""

    row: int
    t: float
    threshold: float
    expected: float


@dataclass(frozen=True)
class Diverged:
    """A run's row and the row of the run that shows it best."""

    row: int
    than: int
    cheaper: float  # compute of the one over that of the other; 1 = a neighbour in the same budget
    good: bool = False  # the run is not too high, but too low for many others


def outliers(runs: Sequence[Run], groups: Sequence[Sequence[int]]) -> tuple[tuple, bool]:
    """(outliers, worst first; whether as many were found as are looked for). `groups` are the rows of each budget; empty = no budgets."""
    left, found = list(range(len(runs))), []
    most = max(1, int(SHARE * len(runs)))
    while len(found) <= most:
        worst = _worst(runs, left, groups)
        if worst is None:
            return tuple(found), False
        found.append(worst)
        left.remove(worst.row)
    return tuple(found[:most]), True


def _worst(runs, left: list, groups) -> Outlier | None:
    """The outlier of the rows `left` that lies farthest off, or None."""
    judged = _about_parabolas(runs, left, groups) if groups else None
    if judged is not None and not _beyond(judged):
        return None  # saves the surface
    second = _about_surface(runs, left)
    both = [j for j in (judged, second) if j is not None]
    if not both:
        return None
    sizes = [_beyond(j) for j in both]
    common = [row for row in sizes[0] if all(row in s and s[row] * sizes[0][row] > 0 for s in sizes)]
    if not common:
        return None
    row = max(common, key=lambda r: abs(sizes[0][r]))
    t, expected, threshold = both[0]
    return Outlier(row, t[row], threshold, expected[row])


def _beyond(judged: tuple) -> dict:
    """Row -> t of the rows beyond the threshold."""
    t, _, threshold = judged
    return {row: value for row, value in t.items() if abs(value) > threshold}


def _about_parabolas(runs, left, groups) -> tuple | None:
    """(row -> t, row -> expected loss, threshold) about the budgets' parabolas; None with too few runs."""
    rows, residuals, leverages, freedom = [], [], [], 0
    kept = set(left)
    for group in groups:
        members = [i for i in group if i in kept]
        if len({runs[i].params for i in members}) < 3:
            continue
        n, d, loss = (np.array([getattr(runs[i], k) for i in members]) for k in ("params", "tokens", "loss"))
        curve = parabola.curve(n, d)
        rows += members
        residuals.append(np.log(loss) - curve.basis @ (curve.solve @ np.log(loss)))
        leverages.append(curve.leverage)
        freedom += len(members) - 3
    if freedom < 3:
        return None
    return _judged(runs, rows, np.concatenate(residuals), np.concatenate(leverages), freedom)


def _about_surface(runs, left) -> tuple | None:
    """The same about a surface through all runs; None where there is none."""
    try:
        design, theta = located([runs[i] for i in left])
    except UsageError:
        return None
    gone = design.vanished(theta)
    free = int((~gone).sum())
    determined = not gone[1:].any() and (theta < design.problem.upper - 1e-9).all()
    if len(left) - len(theta) < 3 or not determined:
        return None
    residual = -newton.residuals(design.problem, theta[None])[0]
    return _judged(runs, left, residual, design.leverage(theta), len(left) - free)


def _judged(runs, rows, residual, leverage, freedom: int) -> tuple:
    """(row -> t, row -> expected loss, threshold): each run about a fit to the others."""
    alone = np.maximum(1 - leverage, 1e-6)
    total = float((residual**2).sum())
    noise = np.sqrt(np.maximum(total - residual**2 / alone, 0.0) / (freedom - 1) + LEAST**2)
    t = np.where(1 - leverage > 1e-3, residual / (noise * np.sqrt(alone)), 0.0)
    threshold = -float(special.stdtrit(freedom - 1, CHANCE / (2 * len(rows))))
    expected = {
        row: runs[row].loss * math.exp(-min(max(e / a, -50.0), 50.0))
        for row, e, a in zip(rows, residual.tolist(), alone.tolist(), strict=True)
    }
    return dict(zip(rows, t.tolist(), strict=True)), expected, threshold


def diverged(runs: Sequence[Run], groups: Sequence[Sequence[int]]) -> tuple:
    """Runs whose loss is above that of a run with a quarter of their compute at most, and no more parameters or tokens; and those far
    above their neighbours in a budget. Of two that contradict each other, the one that contradicts most others is meant."""
    n, d, c, loss = (np.array([getattr(r, k) for r in runs]) for k in ("params", "tokens", "flops", "loss"))
    worse = (n[:, None] >= n) & (d[:, None] >= d) & (c[:, None] >= CHEAPER * c) & (loss[:, None] > ABOVE * loss)
    found = []
    while worse.any():
        high, low = worse.sum(1), worse.sum(0)
        if high.max() >= low.max():
            row = int(np.argmax(high * (1 + 1e-9 * loss / loss.max())))
            than = int(np.argmin(np.where(worse[row], c, math.inf)))
            found.append(Diverged(row, than, float(c[row] / c[than])))
        else:
            row = int(low.argmax())
            than = int(np.argmax(np.where(worse[:, row], c, 0)))
            found.append(Diverged(row, than, float(c[than] / c[row]), good=True))
        worse[row], worse[:, row] = False, False
    known = {f.row for f in found}
    return tuple(found) + tuple(f for f in _peaks(runs, groups) if f.row not in known)


def _peaks(runs, groups) -> list:
    """Runs far above their neighbours in size."""
    found = []
    for group in groups:
        order = sorted(group, key=lambda i: runs[i].params)
        for place, row in enumerate(order):
            beside = [j for j in order[max(place - 1, 0) : place + 2] if j != row]
            than = max(beside, key=lambda j: runs[j].loss, default=None)
            factor = STEEP if len(beside) == 2 else STEEPER
            if than is not None and len(order) > 2 and runs[row].loss > factor * runs[than].loss:
                found.append(Diverged(row, than, 1.0))
    return found
