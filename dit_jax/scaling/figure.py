"""Charts as PNG bytes. Markers and line styles carry the meaning, so that they read in black and white."""

import io

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedFormatter,
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from dit_jax.scaling import chart as charts

MARKERS = "osD^vPX<>hp"
LINES = ("-", "--", "-.", ":")
PANEL = (4.6, 3.7)  # inches
LEGEND = 2.1  # inches, right of the panels
LOW = 2.3  # inches, of a panel where a chart has many rows


def png(chart: charts.Chart) -> bytes:
    """The chart as a picture of its panels, with a legend at the right that names each label once."""
    columns = max(len(row) for row in chart.rows)
    height = PANEL[1] if len(chart.rows) < 4 else LOW
    figure = Figure(
        figsize=(PANEL[0] * max(columns, 1.4) + LEGEND * chart.legend, height * len(chart.rows)),
        layout="constrained",
        dpi=130,
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(chart.rows), columns, squeeze=False)
    named: dict = {}
    for line, row in zip(axes, chart.rows, strict=True):
        for axis in line[len(row) :]:
            axis.set_axis_off()
        for axis, panel in zip(line, row, strict=False):
            _panel(axis, panel, named)
    if chart.legend and named:
        handles = [tuple(kinds.values()) for kinds in named.values()]  # line and marker over each other
        figure.legend(handles, list(named), handlelength=3, loc="outside right center", frameon=False, fontsize=8)
    return _png(figure)


def _panel(axis, panel: charts.Panel, named: dict) -> None:
    (x0, x1), (y0, y1) = charts.limits(panel)
    for one, which, low, high in ((panel.x, "x", x0, x1), (panel.y, "y", y0, y1)):
        getattr(axis, f"set_{which}scale")("log" if one.log else "linear")
        getattr(axis, f"set_{which}lim")(low, high)
        getattr(axis, f"set_{which}label")(one.label, fontsize=9)
        values, texts = zip(*charts.ticks(one, low, high), strict=True)
        side = getattr(axis, f"{which}axis")
        side.set_major_locator(FixedLocator(values))
        side.set_major_formatter(FixedFormatter(texts))
        side.set_minor_locator(NullLocator())
    axis.tick_params(labelsize=8)
    axis.grid(True, color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(panel.title, fontsize=10)
    for mark in panel.marks:
        drawn = _mark(axis, mark)
        if mark.label:
            named.setdefault(mark.label, {}).setdefault(mark.kind, drawn)


def _mark(axis, mark: charts.Mark):
    """Draws a mark; returns what stands for it in a legend."""
    style, alpha = mark.style, 0.4 if mark.faint else 1.0
    line = dict(color=style.color, linewidth=style.width, linestyle=(0, style.dash) if style.dash else "-", alpha=alpha)
    if mark.kind == "rule":
        return axis.axvline(mark.x[0], **line)
    if mark.kind in ("line", "region"):
        return axis.plot(mark.x, mark.y, **line)[0]
    if mark.kind == "band":
        axis.plot(mark.x, mark.y, **{**line, "linewidth": 0.5, "alpha": 0.6})
        axis.plot(mark.x, mark.high, **{**line, "linewidth": 0.5, "alpha": 0.6})
        return axis.fill_between(mark.x, mark.y, mark.high, color=style.color, alpha=0.1, linewidth=0)
    if mark.kind == "dots":
        return axis.plot(mark.x, mark.y, ".", color=style.color, markersize=3.2, alpha=0.4, markeredgewidth=0)[0]
    bars = {}
    if mark.low:
        at = np.array(mark.x if mark.across else mark.y)
        ends = np.clip([at - np.array(mark.low), np.array(mark.high) - at], 0, None)
        bars = {"xerr" if mark.across else "yerr": ends}
    return axis.errorbar(
        mark.x,
        mark.y,
        fmt=style.marker,
        color=style.color,
        markersize=style.size,
        markerfacecolor=style.color if style.filled else "white",
        markeredgecolor="white" if style.marker == "*" else style.color,
        markeredgewidth=0.6 if style.marker == "*" else 1.0,
        elinewidth=1.1,
        capsize=3 if mark.across else 0,
        zorder=5 if style.marker == "*" else 3,
        **bars,
    )


def _figure(columns: int, width: float, height: float):
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.set_xscale("log")
        axis.grid(True, color="0.9", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _shade(index: int, count: int):
    """Dark to light, in colours that keep their order in grey."""
    return colormaps["viridis"](0.85 * index / max(count - 1, 1))


def _loss_axis(axis) -> None:
    """A log axis whose ticks stay readable over a range of less than a decade."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.4g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_minor_locator(LogLocator(subs=()))
