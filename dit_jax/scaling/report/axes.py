"""Axes, marks and files of figures. Markers and dashes carry the meaning, so that figures read in black and white."""

import io
import os
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, ScalarFormatter
from PIL import Image, PngImagePlugin

from dit_jax.error import UsageError
from dit_jax.scaling import place
from dit_jax.scaling.names import FIGURES
from dit_jax.scaling.report.text import typeset

MARKERS = "osD^vPX<>hp"
DASHES = ("-", (0, (6, 2)), (0, (2, 2)), (0, (7, 2, 2, 2)), (0, (11, 3)), (0, (7, 2, 2, 2, 2, 2)), (0, (3, 2)))
COLORS = ("#000000", "#b87700", "#0072b2", "#d55e00", "#009e73", "#a4507d", "#4a93c7")  # after Okabe & Ito 2008
SIZE = (5.2, 3.9)  # inches of one panel: its words are readable at 370 pixels
MOST = 300  # marks of one kind in a panel
STEPS = ((4, (1,)), (2, (1, 3)), (1.01, (1, 2, 5)), (0.66, (1, 1.5, 2, 3, 5, 7)))  # least decades -> ticks in each
OVERHANG = 0.35  # of the range of points and lines, at most given to their bands


def panels(heights: Sequence[float] = SIZE[1:], columns: int = 1, on: FigureBase | None = None) -> tuple:
    """(a figure outside of pyplot, or the part `on` of one, its axes (rows, columns)), with rows of `heights` inches."""
    figure = on or Figure(figsize=(SIZE[0] * columns, sum(heights)), layout="constrained", dpi=130)
    axes = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights)
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


def raised(text: str) -> str:
    """A text of numbers with its powers raised (see `text.typeset`)."""
    return typeset(text, "$^{{{}}}$")


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
    decades = high - low if log else 0.0
    side = getattr(axis, f"{which}axis")
    getattr(axis, f"set_{which}scale")("log" if log else "linear")
    getattr(axis, f"set_{which}lim")(*((10**low, 10**high) if log else (low, high)))
    getattr(axis, f"set_{which}label")(label, labelpad=6)
    steps = next((places for least, places in STEPS if decades > least), None)
    few = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], min_n_ticks=4)
    side.set_major_locator(LogLocator(subs=steps, numticks=8) if steps else few)
    number = FuncFormatter(lambda value, _: raised(f"{value:.4g}"))
    side.set_major_formatter(number if steps else ScalarFormatter(useOffset=False, useMathText=True))
    side.set_minor_locator(NullLocator())


def legend(figure: FigureBase) -> None:
    """A legend below the figure of all that has a label in one of its panels."""
    named: dict = {}
    for axis in reversed(figure.axes):
        named = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True)) | named
    if named:
        columns = 2 if len(named) > 2 and max(map(len, named)) < 40 else 1
        look = dict(ncols=columns, frameon=False, fontsize=8.5, handlelength=3.2)
        figure.legend(named.values(), named, loc="outside lower center", **look)


def png(figure: Figure, mark: str = place.GENERATOR, dpi: float = 130.0) -> bytes:
    """The figure as a PNG file of at most 256 colours, a third of the size of one of more, that says who wrote it."""
    figure.set_dpi(dpi)
    canvas, found, said = FigureCanvasAgg(figure), io.BytesIO(), PngImagePlugin.PngInfo()
    canvas.draw()
    said.add_text("Software", mark)
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).quantize(256, dither=Image.Dither.NONE)
    image.save(found, "png", pnginfo=said, dpi=(dpi, dpi))
    return found.getvalue()


def save(figures: Figure | Sequence[Figure], path: str) -> None:
    """Write a figure as PNG, SVG or PDF by the ending of `path`; of several a PDF has a page each.

    Raises UsageError on any other ending, and if a file is there that was not written here.
    """
    figures = [figures] if isinstance(figures, Figure) else list(figures)
    ending = os.path.splitext(path)[1].lower()
    if ending not in FIGURES:
        raise UsageError(f"--out: found {path!r}, expected a file that ends in {', '.join(FIGURES)}")
    place.check(path)
    buffer, mark = io.BytesIO(), place.mark(path)
    with rc_context({"pdf.fonttype": 42, "svg.hashsalt": "dit_jax"}):  # TrueType; the same bytes each time
        if ending == ".pdf":
            with PdfPages(buffer, metadata={"Creator": mark, "CreationDate": None}) as pages:
                for figure in figures:
                    pages.savefig(figure)
        elif ending == ".svg":
            figures[0].savefig(buffer, format="svg", metadata={"Creator": mark, "Date": None})
        else:
            buffer.write(png(figures[0], mark, dpi=300.0))
    place.write(path, {path: buffer.getvalue()})
