"""Charts as inline SVG and HTML: complete without any script, which only adds toggles, larger tips and values under the pointer."""

import html
import math

from dit_jax.scaling import chart as charts

WIDTH, HEIGHT = 400, 300  # of a panel, in its own units
LEFT, RIGHT, TOP, BOTTOM = 56, 10, 24, 44
LOW = 210  # height where a chart has many rows
POINT = 1.15  # units of a panel to a point of a marker's size


def figure(chart: charts.Chart) -> str:
    """A <figure> with every panel, the legend and the caption."""
    low, columns = len(chart.rows) > 3, max(len(row) for row in chart.rows)
    rows = []
    for row in chart.rows:
        method = f' data-method="{_text(row[0].method)}"' if row[0].method and low else ""
        rows.append(
            f'<div class="row r{columns}"{method}>' + "".join(_panel(p, LOW if low else HEIGHT) for p in row) + "</div>"
        )
    legend = _legend(chart) if chart.legend else ""
    name = _text(chart.name)
    return f'<figure id="{name}">{"".join(rows)}{legend}<figcaption>{_text(chart.caption)}</figcaption></figure>\n'


def _text(value) -> str:
    return html.escape(str(value))


class _Scale:
    """From values to units of the panel."""

    def __init__(self, axis: charts.Axis, ends: tuple, start: float | int, stop: float | int):
        self.axis, self.ends = axis, tuple(math.log10(v) for v in ends) if axis.log else ends
        self.start, self.stop = start, stop

    def __call__(self, value: float | int) -> float:
        if self.axis.log:
            value = math.log10(value) if value > 0 else -400.0
        at = (value - self.ends[0]) / (self.ends[1] - self.ends[0])
        return self.start + (self.stop - self.start) * min(max(at, -5.0), 6.0)

    def data(self, letter: str) -> str:
        """The attributes from which a script finds values again."""
        numbers = f"{self.ends[0]:.8g} {self.ends[1]:.8g} {self.start:g} {self.stop:g}"
        return f' data-{letter}="{numbers}" data-{letter}log="{int(self.axis.log)}"'


def _panel(panel: charts.Panel, height: int) -> str:
    ends = charts.limits(panel)
    left = LEFT + 12 * bool(panel.y.names)
    x = _Scale(panel.x, ends[0], left, WIDTH - RIGHT)
    y = _Scale(panel.y, ends[1], height - BOTTOM, TOP)
    wide, high = WIDTH - RIGHT - left, height - BOTTOM - TOP
    box = f'x="{left}" y="{TOP}" width="{wide}" height="{high}" viewBox="{left} {TOP} {wide} {high}"'  # it clips
    inside = "".join(_mark(m, x, y) for m in panel.marks)
    parts = [_grid(panel, x, y, ends, height), f"<svg {box}>{inside}</svg>"]
    title = (
        f'<text class="t" x="{(left + WIDTH - RIGHT) / 2}" y="15">{_text(panel.title)}</text>' if panel.title else ""
    )
    method = f' data-method="{_text(panel.method)}"' if panel.method else ""
    said = _text(f"{panel.title}: {panel.y.label or 'methods'} against {panel.x.label}")
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{said}"{method}{x.data("x")}{y.data("y")} '
        f'data-names="{_text(panel.x.label)}|{_text(panel.y.label)}">{title}{"".join(parts)}</svg>'
    )


def _grid(panel: charts.Panel, x: _Scale, y: _Scale, ends: tuple, height: int) -> str:
    """Grid lines, ticks and the names of the axes."""
    parts = []
    for value, text in charts.ticks(panel.x, *ends[0]):
        at = f"{x(value):.1f}"
        parts.append(f'<path class="g" d="M{at} {TOP}V{height - BOTTOM}"/>')
        parts.append(f'<text class="m" x="{at}" y="{height - BOTTOM + 14}">{_text(text)}</text>')
    for value, text in charts.ticks(panel.y, *ends[1]):
        at = y(value)
        parts.append(f'<path class="g" d="M{x.start} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="e" x="{x.start - 5}" y="{at + 3.5:.1f}">{_text(text)}</text>')
    parts.append(f'<path class="a" d="M{x.start} {TOP}V{height - BOTTOM}H{WIDTH - RIGHT}"/>')
    middle = (TOP + height - BOTTOM) / 2
    parts.append(f'<text class="m" x="{(x.start + WIDTH - RIGHT) / 2}" y="{height - 8}">{_text(panel.x.label)}</text>')
    if panel.y.label:
        parts.append(f'<text class="m" transform="translate(12 {middle}) rotate(-90)">{_text(panel.y.label)}</text>')
    return "".join(parts)


def _mark(mark: charts.Mark, x: _Scale, y: _Scale) -> str:
    method = f' data-method="{_text(mark.method)}"' if mark.method else ""
    opacity = ' opacity=".4"' if mark.faint else ""
    if mark.kind == "rule":
        at = x(mark.x[0])
        return f'<path d="M{at:.1f} {y.start}V{y.stop}"{_stroke(mark.style)}/>'
    if mark.kind == "dots":
        path = "".join(f"M{x(u):.1f} {y(v):.1f}h0" for u, v in zip(mark.x, mark.y, strict=True))
        return f'<path class="d" d="{path}" stroke="{mark.style.color}"{method}/>'
    if mark.kind == "band":
        ends = [*zip(mark.x, mark.y, strict=True), *reversed([*zip(mark.x, mark.high, strict=True)])]
        return (
            f'<path class="b" d="{_path(ends, x, y)}Z" fill="{mark.style.color}" stroke="{mark.style.color}"{method}/>'
        )
    if mark.kind in ("line", "region"):
        path = _path(zip(mark.x, mark.y, strict=True), x, y) + ("Z" if mark.kind == "region" else "")
        law = (
            f' data-law="{_text(mark.label or mark.method)}"'
            if mark.kind == "line" and (mark.label or mark.method)
            else ""
        )
        return f'<path d="{path}" fill="none"{_stroke(mark.style)}{law}{method}{opacity}/>'
    return f"<g{method}{opacity}>" + "".join(_point(mark, i, x, y) for i in range(len(mark.x))) + "</g>"


def _path(points, x: _Scale, y: _Scale) -> str:
    return "M" + "L".join(f"{x(u):.1f} {y(v):.1f}" for u, v in points if math.isfinite(u) and math.isfinite(v))


def _stroke(style: charts.Style) -> str:
    dash = f' stroke-dasharray="{" ".join(f"{1.3 * d:g}" for d in style.dash)}"' if style.dash else ""
    return f' stroke="{style.color}" stroke-width="{style.width:g}"{dash}'


def _point(mark: charts.Mark, i: int, x: _Scale, y: _Scale) -> str:
    u, v = x(mark.x[i]), y(mark.y[i])
    tip = f"<title>{_text(mark.tips[i])}</title>" if i < len(mark.tips) else ""
    run = f' data-run="{_text(mark.runs[i])}"' if i < len(mark.runs) else ""
    bar = ""
    if mark.low:
        if mark.across:
            ends = x(mark.low[i]), x(mark.high[i])
            line = f"M{ends[0]:.1f} {v:.1f}H{ends[1]:.1f}" + "".join(f"M{e:.1f} {v - 4:.1f}v8" for e in ends)
        else:
            line = f"M{u:.1f} {y(mark.low[i]):.1f}V{y(mark.high[i]):.1f}"
        bar = f'<path d="{line}" fill="none" stroke="{mark.style.color}"/>'
    return f'<g class="p"{run}>{tip}{bar}{shape(mark.style, u, v)}</g>'


def shape(style: charts.Style, u: float | int, v: float | int) -> str:
    """A marker of matplotlib's name at (u, v)."""
    r = style.size * POINT / 2
    fill = style.color if style.filled else "#fff"
    look = f'fill="{fill}" stroke="{style.color}"'
    if style.marker == "o":
        return f'<circle cx="{u:.1f}" cy="{v:.1f}" r="{r:.1f}" {look}/>'
    if style.marker == "s":
        r *= 0.89
        return f'<path d="M{u - r:.1f} {v - r:.1f}h{2 * r:.1f}v{2 * r:.1f}h{-2 * r:.1f}z" {look}/>'
    if style.marker in "PX":
        turn = 0.0 if style.marker == "P" else 0.125
        corners = [
            (r * (0.47 if i % 3 == 2 else 1.05), (i // 3) / 4 + (-0.05, 0.05, 0.125)[i % 3] + turn) for i in range(12)
        ]
    else:
        count, turn = {
            "^": (3, 0),
            "v": (3, 0.5),
            "<": (3, 0.75),
            ">": (3, 0.25),
            "D": (4, 0),
            "p": (5, 0),
            "h": (6, 0),
        }.get(style.marker, (5, 0))
        corners = [(1.15 * r, i / count + turn) for i in range(count)]
        if style.marker == "*":
            look = f'fill="{fill}" stroke="#fff" stroke-width=".6"'
            corners = [(1.1 * r * (0.42 if i % 2 else 1), i / 10) for i in range(10)]
    points = [(u + s * math.sin(2 * math.pi * t), v - s * math.cos(2 * math.pi * t)) for s, t in corners]
    return f'<path d="M{"L".join(f"{p:.1f} {q:.1f}" for p, q in points)}z" {look}/>'


def _legend(chart: charts.Chart) -> str:
    """Every label once, with its line and its marker."""
    drawn: dict = {}
    for mark in (m for panel in chart.panels for m in panel.marks if m.label):
        drawn.setdefault((mark.label, mark.method if mark.label == mark.method else ""), []).append(mark)
    items = []
    for (label, method), marks in drawn.items():
        shown = f' data-method="{_text(method)}"' if method else ""
        items.append(f"<li{shown}>{swatch(marks)}{_text(label)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>' if items else ""


def swatch(marks) -> str:
    """A small picture of how a series is drawn."""
    parts = []
    for mark in {m.kind: m for m in marks}.values():
        if mark.kind == "band":
            parts.append(
                f'<rect class="b" y="2" width="30" height="10" fill="{mark.style.color}" stroke="{mark.style.color}"/>'
            )
        elif mark.kind in ("line", "region", "rule"):
            parts.append(f'<path d="M0 7H30" fill="none"{_stroke(mark.style)}/>')
        elif mark.kind == "points":
            parts.append(shape(mark.style, 15, 7))
    return f'<svg class="swatch" viewBox="0 0 30 14">{"".join(parts)}</svg>'
