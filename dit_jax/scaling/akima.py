"""IsoFLOP minima by interpolation: at each budget, log loss against log N through every run (Akima 1970), and where that is lowest.

This is how Porian et al. 2024 (arXiv 2406.19146), section 2.2, find N_opt. It assumes no shape, so a wide or lopsided grid of sizes does
not bias it as it does a parabola; in return it takes each run at its word, so noise moves its minima more.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.interpolate import Akima1DInterpolator

from dit_jax.scaling.optima import Point, PointFit, laws_of
from dit_jax.scaling.runs import Run, budgets

SIZES = 4  # an Akima curve through fewer points is a parabola or less


def fit_akima(
    runs: Sequence[Run], *, resamples: int = 1000, seed: int = 0, level: float = 0.95, tolerance: float = 0.05
) -> PointFit:
    """N_opt, D_opt and L_opt as laws of compute through the interpolated minima, each budget counted alike. A budget is used when it has
    at least 4 sizes and its lowest point is not at their edge."""
    points, warnings = [], []
    for label, members in budgets(runs, tolerance):
        found = _minimum(label, members)
        if isinstance(found, str):
            warnings.append(f"budget {label}: {found}; not used")
        else:
            points.append(found)
    points.sort(key=lambda p: p.flops)
    options = {"resamples": resamples, "seed": seed, "level": level}
    return laws_of("akima", len(runs), points, tuple(warnings), options)


def _minimum(label: str, runs: Sequence[Run]) -> Point | str:
    """The lowest point of a budget's curve, or why there is none. Runs of one size count by their mean."""
    sizes = sorted({r.params for r in runs})
    if len(sizes) < SIZES:
        return f"{len(sizes)} distinct size(s), interpolation needs {SIZES}"
    same = [[r for r in runs if r.params == size] for size in sizes]
    loss, tokens = (np.array([np.mean([math.log(getattr(r, k)) for r in s]) for s in same]) for k in ("loss", "tokens"))
    u = np.log(sizes)
    curve = Akima1DInterpolator(u, loss)
    flat = curve.derivative().roots(extrapolate=False)
    places = np.concatenate([u, flat[np.isfinite(flat)]])
    best = places[np.argmin(curve(places))]
    if best in (u[0], u[-1]):
        return f"minimum at {math.exp(best):.3g} parameters, the edge of the sizes tried ({sizes[0]:.3g} to {sizes[-1]:.3g})"
    flops = math.exp(np.mean([math.log(r.flops) for r in runs]))
    return Point(label, flops, math.exp(best), math.exp(np.interp(best, u, tokens)), math.exp(curve(best)))
