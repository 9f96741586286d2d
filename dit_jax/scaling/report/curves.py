"""The figure of a metric over the checkpoints of a run and the guidances of their samples."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from dit_jax.scaling.report.axes import SIZE, panels, plain, scale, shaded, thin

SHOWN = 8  # lines in a panel, the first and the last among them
LEGEND = dict(frameon=False, fontsize=8.5, handlelength=3.2, title_fontsize=8.5)
RATIO = 10.0  # largest over smallest score, from which the scores have a logarithmic axis


@dataclass(frozen=True)
class Score:
    """A metric of one checkpoint at one guidance (nan: not sampled), with the ends of its 95 % interval (nan: none)."""

    step: int
    guidance: float
    score: float
    low: float = math.nan
    high: float = math.nan


def curves(rows: Mapping[str, Sequence[Score]], metric: str) -> Figure | None:
    """One row of panels for each of `rows` (title -> scores): the metric against guidance, a line a step, and against step, a line a
    guidance; a panel that would have one point a line is left out. All panels share the axis of the scores. None if no panel is left.
    """
    every = [score for scores in rows.values() for score in scores]
    views = {"guidance": "step", "step": "guidance"}  # what a panel is over -> what tells its lines apart
    views = {x: line for x, line in views.items() if len(_values(every, x)) > 1}
    if not views:
        return None
    figure, axes = panels([SIZE[1] if len(rows) == 1 else 2.9] * len(rows), len(views))
    for (title, scores), some in zip(rows.items(), axes, strict=True):
        for axis, (x, line) in zip(some, views.items(), strict=True):
            _panel(axis, scores, every, x, line)
            scale(axis, "x", x, [_values(every, x)], log=False)
            y = np.array([s.score for s in every])
            log = bool(y.min() > 0 and y.max() > RATIO * y.min())
            scale(axis, "y", plain(metric), [y], [[s.low for s in every], [s.high for s in every]], log=log)
        some[0].set_title(plain(title), fontsize=9.5, loc="left")
    places = ("lower center",) if len(views) == 1 else ("lower left", "lower right")
    for place, axis, line in zip(places, axes[0], views.values(), strict=True):
        lines, total = axis.get_legend_handles_labels(), len(_values(every, line))
        if total:
            name = f"{SHOWN} of {total} {line}s" if total > SHOWN else ""
            figure.legend(*lines, loc=f"outside {place}", ncols=2, title=name, **LEGEND)
    return figure


def _panel(axis, scores: Sequence[Score], every: Sequence[Score], x: str, line: str) -> None:
    """Draw a line for each value of the field `line`, or one without a name if it has none, with intervals as bars."""
    kept = thin(_values(every, line), SHOWN) or [math.nan]
    for i, value in enumerate(kept):
        own = [s for s in scores if getattr(s, line) == value or (math.isnan(value) and math.isnan(getattr(s, line)))]
        own = sorted((s for s in own if not math.isnan(getattr(s, x))), key=lambda s: getattr(s, x))
        y, low, high = (np.array([getattr(s, name) for s in own]) for name in ("score", "low", "high"))
        bars = np.nan_to_num(np.clip([y - low, high - y], 0, None)) if own else None
        label = f"{line} {value:g}" if line == "guidance" else f"{line} {value}"
        look = shaded(i, len(kept)) | dict(markersize=4.5, linewidth=1.3, elinewidth=0.8, capsize=2)
        axis.errorbar([getattr(s, x) for s in own], y, yerr=bars, label=None if math.isnan(value) else label, **look)


def _values(scores: Sequence[Score], name: str) -> list:
    return sorted({value for s in scores if not math.isnan(value := getattr(s, name))})
