"""Bootstrap clouds: pairs of fitted numbers over the resamples, and the region of highest density that holds 95 % of them."""

import math

import numpy as np

from dit_jax.scaling.chart import Axis, Chart, Mark, Panel, Style, frame, numbers, style_of
from dit_jax.scaling.study import SurfaceFit

FEW = 20  # draws that make no cloud
SHOWN = 250  # resamples drawn as dots; the region counts all
CELLS, REACH = 144, 9.0  # of the grid of a density, and its half-width in standard deviations
FINE = 0.75  # of Scott's width, which is for normal draws: clouds are often bent
NEAR = 3.5  # standard deviations of the draws that set the smoothing


def region(x: np.ndarray, y: np.ndarray, level: float) -> tuple[list, bool]:
    """([outlines, each (x, y)], closed) of the smallest region that holds `level` of the draws; a line where they lie on one.

    A Gaussian kernel density of three quarters of Scott's width (Scott 1992, eq. 6.42) on a grid, in coordinates in which the draws
    are uncorrelated; its contour is at the density that `level` of the draws exceed (Hyndman 1996, section 3.2).
    """
    from contourpy import contour_generator
    from scipy.ndimage import gaussian_filter, map_coordinates

    points = np.stack([x, y])
    centre = np.median(points, axis=1, keepdims=True)
    scale = np.array([[_scale(v)] for v in points])
    if not (scale > 1e-12 * np.maximum(np.abs(centre), 1e-12)).any():
        return [], False
    unit = (points - centre) / np.where(scale > 0, scale, 1.0)
    near = (np.abs(unit) < NEAR).all(0)  # far draws would widen the coordinates in which the near ones are smoothed
    values, axes = np.linalg.eigh(np.cov(unit[:, near]))
    if values[0] < 1e-6 * values[1]:  # on a line
        ends = np.quantile(axes[:, 1] @ unit, [(1 - level) / 2, (1 + level) / 2])
        line = centre + scale * (axes[:, 1:] * ends)
        return [(line[0], line[1])], False
    white = (axes.T @ unit) / np.sqrt(values)[:, None]
    edges = np.linspace(-REACH, REACH, CELLS + 1)
    counts = np.histogram2d(*white, bins=[edges, edges])[0]
    width = FINE * len(x) ** (-1 / 6) * CELLS / (2 * REACH)
    density = gaussian_filter(counts, width, mode="constant")
    at = (white + REACH) * CELLS / (2 * REACH) - 0.5
    threshold = np.quantile(map_coordinates(density, at, order=1, mode="constant"), 1 - level)
    middle = (edges[1:] + edges[:-1]) / 2
    if threshold <= 1e-9 * density.max():
        return [], False
    found = []
    for line in contour_generator(middle, middle, density.T).lines(threshold):
        if len(line) > 6:
            back = centre + scale * (axes @ (np.sqrt(values)[:, None] * line.T))
            found.append((back[0], back[1]))
    return found, True


def _scale(v: np.ndarray) -> float:
    """The standard deviation of normal draws of the same quartiles; that of the central 95 % where most draws are alike."""
    ends = np.quantile(v, [0.025, 0.25, 0.75, 0.975])
    central = float(np.clip(v, ends[0], ends[3]).std())
    quartiles = float(ends[2] - ends[1]) / 1.349
    return quartiles if quartiles > 0.2 * central else central


def chart(fits: dict, flops: float | int, labels: dict) -> Chart | None:
    """a against N_opt at `flops` and against b, and the irreducible loss against alpha and against the exponent of L_opt; None of none."""
    panels = []
    for title, x_axis, y_axis, pairs in (
        (
            "Exponent and size",
            Axis(f"N_opt at {flops:.3g} FLOPs ({labels['N']})", kind="count"),
            Axis("a, of N_opt = k C^a", log=False),
            {m: (_at(f, "N_opt", flops), _exponent(f, "N_opt")) for m, f in fits.items()},
        ),
        (
            "The two exponents",
            Axis("a, of N_opt", log=False),
            Axis("b, of D_opt", log=False),
            {m: (_exponent(f, "N_opt"), _exponent(f, "D_opt")) for m, f in fits.items()} if _apart(fits) else {},
        ),
        (
            "The surface",
            Axis("alpha, of A / N^alpha", log=False),
            Axis("irreducible loss E", log=False),
            {m: _surface(f) for m, f in fits.items()},
        ),
        (
            "The loss law",
            Axis("decay x, of L_opt = E + k C^-x"),
            Axis("irreducible loss E", log=False),
            {m: (_decay(f), _irreducible(f)) for m, f in fits.items()},
        ),
    ):
        marks = [mark for m, pair in pairs.items() for mark in _cloud(m, pair, fits[m].level, x_axis.log)]
        if any(mark.kind == "dots" for mark in marks):
            box = tuple(
                frame([getattr(m, which) for m in marks if m.kind == "dots"], log)
                for which, log in (("x", x_axis.log), ("y", False))
            )
            panels.append(Panel(x_axis, y_axis, tuple(marks), title, limits=box))
    if not panels:
        return None
    wide = 3 if len(panels) == 3 else 2
    rows = tuple(tuple(panels[i : i + wide]) for i in range(0, len(panels), wide))
    level = next(iter(fits.values())).level
    return Chart(
        "clouds",
        "Bootstrap clouds",
        f"Each dot is one resample (at most {SHOWN} are drawn), each outline the region of highest density that holds {level:.0%} of "
        "all of them, the large mark the fit itself. A long thin cloud says that the two numbers are known less well apart than together; "
        "one that touches E = 0, that the irreducible loss is not known.",
        rows,
    )


def _apart(fits: dict) -> bool:
    """Whether a + b is not 1 by construction, as it is where C is a multiple of N D."""
    both = [f.laws for f in fits.values() if "N_opt" in f.laws]
    return any(abs(laws["N_opt"].exponent + laws["D_opt"].exponent - 1) > 1e-3 for laws in both)


def _cloud(method: str, pair, level: float, log: bool) -> list[Mark]:
    if pair is None or pair[0] is None or pair[1] is None:
        return []
    (best_x, x), (best_y, y) = pair
    style = style_of(method)
    marks = []
    if len(x) > FEW and len(x) == len(y):
        kept = np.isfinite(x) & np.isfinite(y) & ((x > 0) | (not log))
        x, y = x[kept], y[kept]
        if len(x) <= FEW:
            return []
        every = max(1, math.ceil(len(x) / SHOWN))
        marks.append(Mark("dots", numbers(x[::every]), numbers(y[::every]), style, "", method))
        lines, closed = region(np.log(x) if log else x, y, level)
        for u, v in lines:
            outline = np.exp(u) if log else u
            marks.append(Mark("region" if closed else "line", numbers(outline), numbers(v), style, method, method))
    big = Style(style.color, style.marker, style.dash, size=9)
    tip = f"{method}: {best_x:.4g}, {best_y:.4g}"
    return [*marks, Mark("points", (best_x,), (best_y,), big, method, method, tips=(tip,))]


def _law(fit, name: str) -> tuple:
    return fit.laws.get(name), fit.draws.get(name)


def _at(fit, name: str, flops: float | int):
    law, draws = _law(fit, name)
    return law and (float(law(flops)), np.asarray(draws(flops)) if draws else np.zeros(0))


def _exponent(fit, name: str):
    law, draws = _law(fit, name)
    return law and (float(law.exponent), np.asarray(draws.exponent) if draws else np.zeros(0))


def _decay(fit):
    found = _exponent(fit, "L_opt")
    return found and (-found[0], -found[1])


def _irreducible(fit):
    law, draws = _law(fit, "L_opt")
    if "L_opt_pure" in fit.laws and "L_opt_irreducible" not in fit.laws:
        return None  # a law without the term
    return law and (float(law.irreducible), np.asarray(draws.irreducible) if draws else np.zeros(0))


def _surface(fit):
    if not isinstance(fit, SurfaceFit):
        return None
    drawn = fit.surfaces
    x, y = (np.asarray(getattr(drawn, name)) if drawn is not None else np.zeros(0) for name in ("alpha", "E"))
    return (float(fit.surface.alpha), x), (float(fit.surface.E), y)
