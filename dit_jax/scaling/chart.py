"""Figures as plain data: a chart has panels, a panel has axes and marks. `figure` draws one as PNG, `svg` for the page.

Meaning is carried by markers, dashes and words; colours (for methods, after Okabe & Ito 2008) only help, so charts read in black and
white.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

MARKERS = "osD^vPX<>hp"
DASHES = ((), (6, 2.5), (1.5, 1.8), (7, 2, 1.5, 2), (11, 3), (7, 2, 1.5, 2, 1.5, 2), (3, 1.5))
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
ROOM = 0.05  # of an axis, left free at each end
WIDER = 4.0  # times the median method's range, from which a method is cut off
OVERHANG = 0.35  # of the range of points and lines, at most given to their bands


@dataclass(frozen=True)
class Style:
    """How a mark looks; `dash` is lengths of strokes and gaps, () = solid."""

    color: str = "#000000"
    marker: str = "o"
    dash: tuple = ()
    filled: bool = True
    width: float | int = 1.4
    size: float | int = 5.0  # of a marker, in points


STYLES = {
    "isoflop": Style("#000000", "*", DASHES[0]),
    "akima": Style("#b87700", "s", DASHES[1]),
    "surface": Style("#0072b2", "^", DASHES[2]),
    "varpro": Style("#d55e00", "v", DASHES[3]),
    "gadre": Style("#009e73", "D", DASHES[4]),
    "envelope": Style("#a4507d", "P", DASHES[5]),
    "power": Style("#4a93c7", "X", DASHES[6]),
}


@dataclass(frozen=True)
class Axis:
    """`kind` says what is counted, and so how ticks are written: count (k, M, B, T), flops (powers of ten) or plain."""

    label: str
    log: bool = True
    kind: str = "plain"
    names: tuple = ()  # words at 0, 1, ... instead of ticks


@dataclass(frozen=True)
class Mark:
    """One thing drawn. `kind`: points, line, band (between y and high), dots (a cloud), region (a closed outline), rule (a vertical line).

    Entries of `low` and `high` end error bars of points, in y, or in x where the mark lies `across`. `tips` are texts to be
    read on hovering over a point, `runs` the names that tie points of several panels together; `value` marks lines that are laws.
    """

    kind: str
    x: tuple
    y: tuple
    style: Style = Style()
    label: str = ""
    method: str = ""
    low: tuple = ()
    high: tuple = ()
    across: bool = False
    tips: tuple = ()
    runs: tuple = ()
    faint: bool = False


@dataclass(frozen=True)
class Panel:
    """Axes and what is drawn on them. `limits` ((x0, x1), (y0, y1)) or None = what the marks ask for."""

    x: Axis
    y: Axis
    marks: tuple
    title: str = ""
    method: str = ""  # of a panel that belongs to one method
    limits: tuple | None = None


@dataclass(frozen=True)
class Chart:
    """Panels in rows, with a name (of its file), a title and a caption."""

    name: str
    title: str
    caption: str
    rows: tuple
    legend: bool = True

    @property
    def panels(self) -> tuple:
        """All panels, row by row."""
        return tuple(panel for row in self.rows for panel in row)


def style_of(method: str) -> Style:
    """The style of a method; of one not listed, a plain one."""
    return STYLES.get(method, Style("#555555", "o", DASHES[1]))


def shade(index: int, count: int) -> str:
    """Dark to light, in colours that keep their order in grey (viridis, thinned)."""
    table = ((68, 1, 84), (64, 67, 135), (41, 120, 142), (34, 167, 132), (121, 209, 81))
    at = index / max(count - 1, 1) * (len(table) - 1)
    i = min(int(at), len(table) - 2)
    mixed = (round(a + (at - i) * (b - a)) for a, b in zip(table[i], table[i + 1], strict=True))
    return "#" + "".join(f"{v:02x}" for v in mixed)


def series(index: int, count: int, **changes) -> Style:
    """The style of one of `count` ordered series, such as budgets."""
    style = Style(shade(index, count), MARKERS[index % len(MARKERS)], DASHES[index % len(DASHES)], width=1.2)
    return dataclasses.replace(style, **changes)


def numbers(values) -> tuple:
    """Values as a tuple of floats."""
    return tuple(np.asarray(values, float).ravel().tolist())


def limits(panel: Panel) -> tuple:
    """((x0, x1), (y0, y1)) of a panel: all points and lines, and of bands a part."""
    return panel.limits or (_ends(panel, "x"), _ends(panel, "y"))


def frame(parts, log: bool, wider: float | int = WIDER) -> tuple:
    """The ends of an axis for series (values) of several methods: the central part of each, but of those that reach far wider than others
    only a part."""
    arrays = (np.asarray(v, float) for v in parts)
    kept = [v[np.isfinite(v) & ((v > 0) | (not log))] for v in arrays]
    found = [np.quantile(np.log10(v) if log else v, [0.005, 0.995]) for v in kept if len(v)]
    ends = np.array(found or [[0.0, 1.0]])
    wide = ends[:, 1] - ends[:, 0]
    usual = wide <= wider * np.median(wide[wide > 0]) if (wide > 0).any() else wide <= 0
    low, high = float(ends[usual, 0].min()), float(ends[usual, 1].max())
    room = max(0.25 * (high - low), 1e-4 * abs(high), 1e-6)
    low, high = max(float(ends[:, 0].min()), low - room), min(float(ends[:, 1].max()), high + room)
    low, high = low - 0.1 * room, high + 0.1 * room
    return (10**low, 10**high) if log else (low, high)


def _ends(panel: Panel, which: str) -> tuple:
    axis = getattr(panel, which)
    if axis.names:
        return -0.6, len(axis.names) - 0.4
    firm, soft = [], []
    for mark in panel.marks:
        if mark.kind == "rule" and which == "y":
            continue
        (soft if mark.kind in ("dots", "region") else firm).extend(getattr(mark, which))
        if (which == "x") == mark.across and mark.kind in ("points", "band"):
            (soft if mark.kind == "band" else firm).extend((*mark.low, *mark.high))
            if mark.kind == "band":
                soft.extend(mark.y)
    firm, soft = (
        np.array([v for v in part if math.isfinite(v) and (v > 0 or not axis.log)], float) for part in (firm, soft)
    )
    if axis.log:
        firm, soft = np.log10(firm), np.log10(soft)
    low, high = _span(firm, soft)
    room = ROOM * (high - low)
    ends = low - room, high + room
    return tuple(10**v for v in ends) if axis.log else ends


def _span(firm: np.ndarray, soft: np.ndarray) -> tuple:
    """The range of all that is firm, and of what is soft as much as does not dwarf it."""
    if not len(firm) and not len(soft):
        return 0.0, 1.0
    if not len(firm):
        low, high = np.quantile(soft, [0.005, 0.995])
    else:
        low, high = firm.min(), firm.max()
        if len(soft):
            over = OVERHANG * (high - low)
            low, high = max(min(low, soft.min()), low - over), min(max(high, soft.max()), high + over)
    if high - low < 1e-9 * max(abs(high), 1e-300):
        low, high = low - max(0.02 * abs(low), 1e-6), high + max(0.02 * abs(high), 1e-6)
    return float(low), float(high)


def ticks(axis: Axis, low: float | int, high: float | int) -> list[tuple]:
    """(value, text) of an axis from `low` to `high`."""
    if axis.names:
        return [(float(i), name) for i, name in enumerate(axis.names)]
    if not axis.log:
        return _linear(axis, low, high, 5)
    decades = math.log10(high / low)
    if decades < 0.75:
        return _linear(axis, low, high, 5)
    steps = (1,) if decades > 2.6 else (1, 3) if decades > 1.6 else (1, 2, 5)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / 7))
    values = [s * 10.0**e for e in range(first, last + 1) if e % every == 0 or len(steps) > 1 for s in steps]
    return [(v, written(v, axis.kind)) for v in values if low <= v <= high]


def _linear(axis: Axis, low: float | int, high: float | int, count: int) -> list[tuple]:
    raw = (high - low) / count
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(s * scale for s in (1, 2, 2.5, 5, 10) if s * scale >= raw * 0.999)
    values = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    if axis.kind == "plain" and step > 1e-6 and high < 1e6:
        digits = max(0, -math.floor(math.log10(step)) + (abs(step / scale - 2.5) < 1e-9))
        return [(v, f"{v:.{digits}f}") for v in values]
    texts: list = []
    for digits in range(3, 16):  # as few as tell ticks apart
        texts = [written(v, axis.kind, digits) for v in values]
        if len(set(texts)) == len(texts):
            break
    return list(zip(values, texts, strict=True))


def written(value: float | int, kind: str, digits: int = 3) -> str:
    """A number as a tick writes it, with this many significant digits at most."""
    if kind == "flops":
        power = math.floor(math.log10(value) + 1e-9)
        lead = f"{value / 10.0**power:.{digits}g}"
        return ("" if lead == "1" else f"{lead}\N{MULTIPLICATION SIGN}") + "10" + str(power).translate(SUPERSCRIPTS)
    if kind == "count":
        for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
            if value >= size * 0.9995:
                return f"{value / size:.{digits}g}{letter}"
    return f"{value:.{digits}g}"


def to_json(chart: Chart) -> dict:
    """The chart's data: panels with their marks; looks are left out."""
    panels = []
    for panel in chart.panels:
        marks = []
        for m in panel.marks:
            part = {"kind": m.kind, "label": m.label, "method": m.method, "x": list(m.x), "y": list(m.y)}
            part |= {name: list(getattr(m, name)) for name in ("low", "high", "runs") if getattr(m, name)}
            marks.append(part)
        panels.append({"title": panel.title, "x": panel.x.label, "y": panel.y.label, "marks": marks})
    return {"title": chart.title, "caption": chart.caption, "panels": panels}
