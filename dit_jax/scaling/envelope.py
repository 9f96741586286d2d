"""Training-curve envelope, approach 1 of Hoffmann et al. 2022 (arXiv 2203.15556), section 3.1: the best of all runs at each compute.

Each run is a curve of log loss against log compute through its checkpoints, interpolated monotonically (Fritsch & Carlson 1980). The paper
takes the winning size at 1,500 computes, a staircase. We take the ends of its stairs, the computes at which two sizes are equally good:
on a ladder of sizes of one ratio they follow N_opt's power law exactly, whatever the surface's exponents, while the coefficient of
N_opt carries the asymmetry of the curves. Between checkpoints of one run the learning rate has not decayed, which biases the method; it
needs runs whose every checkpoint could have been a last one.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.optimize import brentq

from dit_jax.error import UsageError
from dit_jax.scaling.optima import Point, PointFit, laws_of
from dit_jax.scaling.runs import Run

COMPUTES = 1500


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
    options = {"resamples": resamples, "seed": seed, "level": level}
    return laws_of("envelope", len(curves), _crossings(curves), warnings, options)


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


def _crossings(curves) -> list[Point]:
    """Where the winner of the envelope changes between two curves that both reach there."""
    grid = np.linspace(min(c[3][0] for c in curves), max(c[3][1] for c in curves), COMPUTES)
    table = np.stack([np.where((grid >= e[0]) & (grid <= e[1]), f(grid), math.inf) for _, f, _, e in curves])
    winner, points = table.argmin(0), []
    for i in np.flatnonzero(winner[1:] != winner[:-1]):
        one, two = winner[i], winner[i + 1]
        if not np.isfinite(table[[one, two]][:, i : i + 2]).all() or curves[one][0] >= curves[two][0]:
            continue

        def gap(c, first=curves[one][1], second=curves[two][1]):
            return float(first(c) - second(c))

        c = brentq(gap, grid[i], grid[i + 1], xtol=1e-12)
        n = math.sqrt(curves[one][0] * curves[two][0])
        d = math.exp((curves[one][2](c) + curves[two][2](c)) / 2)
        points.append(Point(f"{math.exp(c):.3g}", math.exp(c), n, d, math.exp(curves[one][1](c))))
    return points
