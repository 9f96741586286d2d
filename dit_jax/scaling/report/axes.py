"""Axes, marks and files of figures. Markers and dashes carry the meaning, so that figures read in black and white."""

import io
import math
import os
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from dit_jax.error import UsageError
from dit_jax.files import write_file

MARKERS = "osD^vPX<>hp"
DASHES = (
    "-",
    (0, (6, 2)),
    (0, (1.5, 1.5)),
    (0, (7, 2, 1.5, 2)),
    (0, (11, 3)),
    (0, (7, 2, 1.5, 2, 1.5, 2)),
    (0, (3, 1.5)),
)
COLORS = ("#000000", "#b87700", "#0072b2", "#d55e00", "#009e73", "#a4507d", "#4a93c7")  # after Okabe & Ito 2008
SIZE = (5.2, 3.9)  # inches of one panel: its words are readable at 370 pixels
MOST = 300  # marks of one kind in a panel
FORMATS = {"png", "svg", "pdf"}
GENERATOR = "dit_jax scaling report"  # how files say who wrote them
STEPS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7))  # within a decade of a log axis
OVERHANG = 0.35  # of the range of points and lines, at most given to their bands


def panels(rows: int = 1, columns: int = 1, height: float = SIZE[1]) -> tuple[Figure, np.ndarray]:
    """A figure and its axes (rows, columns), outside of pyplot."""
    figure = Figure(figsize=(SIZE[0] * columns, height * rows), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.grid(True, color="0.9", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def style(index: int) -> dict:
    """Color, marker and dash of one of a few methods."""
    return {name: of[index % len(of)] for name, of in (("color", COLORS), ("marker", MARKERS), ("linestyle", DASHES))}


def shaded(index: int, count: int) -> dict:
    """The style of one of `count` ordered series, dark to light in colours that keep their order in grey."""
    return style(index) | {"color": colormaps["viridis"](0.85 * index / max(count - 1, 1))}


def thin(items: Sequence, most: int = MOST) -> list:
    """At most `most` of the items, evenly over their order, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def plain(text: str) -> str:
    """Text from outside, of which nothing is typeset as mathematics, and of a length that fits a legend."""
    text = text if len(text) <= 40 else text[:37] + "..."
    return "".join(c if c.isprintable() else "?" for c in text).replace("$", r"\$")


def power(value: float, digits: int = 3) -> str:
    """A number as an axis writes it: 1.5, 300, 2 x 10^6."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"
    lead, exponent = f"{value:.{digits - 1}e}".split("e")
    lead = lead.rstrip("0").rstrip(".") if "." in lead else lead
    return rf"$10^{{{int(exponent)}}}$" if lead == "1" else rf"${lead}\times10^{{{int(exponent)}}}$"


def formula(name: str, law) -> str:
    """A law of compute for a legend."""
    term = rf"{power(law.coefficient)} $C^{{\,{law.exponent:.3f}}}$"
    return f"{name} = {law.irreducible:.3g} + {term}" if law.irreducible else f"{name} = {term}"


def scale(axis, which: str, label: str, firm, soft=(), log: bool = True) -> None:
    """Limits, ticks and label of one axis: all of `firm` and, of what is `soft` (bands), as much as does not dwarf it."""
    firm, soft = (
        np.concatenate([np.ravel(np.asarray(v, float)) for v in part] or [np.zeros(0)]) for part in (firm, soft)
    )
    firm, soft = (v[np.isfinite(v) & ((v > 0) | (not log))] for v in (firm, soft))
    firm, soft = (np.log10(v) if log else v for v in (firm, soft))
    low, high = (firm.min(), firm.max()) if len(firm) else (0.0, 1.0)
    if len(soft):
        over = OVERHANG * (high - low)
        low, high = max(min(low, soft.min()), low - over), min(max(high, soft.max()), high + over)
    room = 0.05 * (high - low) or max(0.02 * abs(high), 1e-3)
    low, high = low - room, high + room
    getattr(axis, f"set_{which}scale")("log" if log else "linear")
    ends = (10**low, 10**high) if log else (low, high)
    getattr(axis, f"set_{which}lim")(*ends)
    getattr(axis, f"set_{which}label")(label, labelpad=6)
    values, texts = ticks(*ends, log)
    side = getattr(axis, f"{which}axis")
    side.set_major_locator(FixedLocator(values))
    side.set_major_formatter(FixedFormatter(texts))
    side.set_minor_locator(NullLocator())


def ticks(low: float, high: float, log: bool = True) -> tuple[list, list]:
    """(values, texts) of 4 to 8 ticks between `low` and `high`, no two texts alike."""
    values: list = []
    if log and high > 1.5 * low:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in STEPS:
            values = [s * 10.0**e for e in decades for s in steps if low <= s * 10.0**e <= high]
            if len(values) >= 4:
                break
        values = values[:: math.ceil(len(values) / 8)]
    if len(values) < 4:
        for count in range(4, 12):
            found = MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
            values = [float(v) for v in found if low <= v <= high]
            if len(values) >= 4:
                break
    for digits in range(3, 16):
        texts = [power(v, digits) for v in values]
        if len(set(texts)) == len(texts):
            break
    decimals = [len(t.partition(".")[2]) for t in texts]
    if max(decimals) and not any("$" in t for t in texts):
        texts = [f"{v:.{max(decimals)}f}" for v in values]
    texts = [t if "$" in t else t.replace("-", "\N{MINUS SIGN}") for t in texts]
    return values, texts


def legend(axis) -> None:
    """A legend below the figure, if anything in this panel has a label."""
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        columns = 2 if len(handles) > 2 and max(map(len, labels)) < 34 else 1
        look = dict(ncols=columns, frameon=False, fontsize=8.5, handlelength=3.2)
        axis.figure.legend(handles, labels, loc="outside lower center", **look)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file that says who wrote it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": GENERATOR})
    return buffer.getvalue()


def save(figure: Figure, path: str) -> None:
    """Write a figure whole, as PNG, SVG or PDF by the ending of `path`. Raises UsageError on any other ending."""
    ending = os.path.splitext(path)[1].lower().removeprefix(".")
    if ending not in FORMATS:
        raise UsageError(f"--out: found {path!r}, expected a file that ends in .png, .svg or .pdf")
    buffer = io.BytesIO()
    dates = {"png": {"Software": GENERATOR}, "svg": {"Date": None, "Creator": GENERATOR}}
    figure.savefig(buffer, format=ending, metadata=dates.get(ending, {"CreationDate": None, "Creator": GENERATOR}))
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    write_file(path, buffer.getvalue())
