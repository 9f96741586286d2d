"""Scattered runs in the plane of compute and size, with a surface's lines of equal loss and its optimum (Hoffmann et al. 2022, fig. 4)."""

from collections.abc import Sequence

import numpy as np

from dit_jax.scaling.chart import Axis, Mark, Panel, Style, numbers, series
from dit_jax.scaling.runs import Run
from dit_jax.scaling.study import SurfaceFit

BANDS = 6  # of loss, each with as many runs
GRID = 120  # points of a line
BEST = Style("#000000", width=2.2)


def panel(fit: SurfaceFit, runs: Sequence[Run], tips: dict, labels: dict) -> Panel:
    """The runs by bands of loss, the surface's lines of equal loss between the bands, and N_opt."""
    edges = np.quantile([r.loss for r in runs], np.linspace(0, 1, BANDS + 1))
    box = _box(runs)
    marks: list = []
    for i in range(BANDS):
        style = series(i, BANDS)
        if i:
            marks += _contour(fit, float(edges[i]), box, style)
        last = i == BANDS - 1
        members = [r for r in runs if edges[i] <= r.loss and (last or r.loss < edges[i + 1])]
        marks.append(_points(members, style, f"loss {edges[i]:.3g} to {edges[i + 1]:.3g}", tips))
    c = np.geomspace(*box[0], GRID)
    n = fit.laws["N_opt"](c)
    inside = (n >= box[1][0]) & (n <= box[1][1])
    marks.append(Mark("line", numbers(c[inside]), numbers(n[inside]), BEST, "N_opt", fit.method))
    axes = Axis(labels["C"], kind="flops"), Axis(labels["N"], kind="count")
    return Panel(*axes, tuple(marks), fit.method, fit.method, box)


def _box(runs: Sequence[Run]) -> tuple:
    ends = []
    for name in ("flops", "params"):
        found = [getattr(r, name) for r in runs]
        room = 1.1 * (max(found) / min(found)) ** 0.02
        ends.append((min(found) / room, max(found) * room))
    return tuple(ends)


def _contour(fit: SurfaceFit, loss: float, box: tuple, style: Style) -> list[Mark]:
    """Where the surface has this loss: C = k N D with D = (B / (L - E - A / N^alpha))^(1 / beta)."""
    s, n = fit.surface, np.geomspace(*box[1], 4 * GRID)
    with np.errstate(all="ignore"):
        left = loss - s.E - s.A * n**-s.alpha
        c = fit.k * n * (s.B / left) ** (1 / s.beta)
    inside = (left > 0) & (c >= box[0][0]) & (c <= box[0][1])
    if not inside.any():
        return []
    runs = np.split(np.flatnonzero(inside), np.flatnonzero(np.diff(np.flatnonzero(inside)) > 1) + 1)
    return [Mark("line", numbers(c[part]), numbers(n[part]), style, "", fit.method) for part in runs if len(part) > 1]


def _points(members: Sequence[Run], style: Style, label: str, tips: dict) -> Mark:
    x, y = ([getattr(r, name) for r in members] for name in ("flops", "params"))
    said = tuple(tips.get(r.name, r.name) for r in members)
    return Mark("points", numbers(x), numbers(y), style, label, tips=said, runs=tuple(r.name for r in members))


def fits_plane(runs: Sequence[Run]) -> bool:
    """Whether most sizes were trained on fewer than 3 amounts of data, so that curves of one size would show little."""
    count: dict = {}
    for run in runs:
        count[run.params] = count.get(run.params, 0) + 1
    return sum(n for n in count.values() if n > 2) * 2 < len(runs)
