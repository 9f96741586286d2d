"""What each method expects of each run, and how far off the runs are: loss / law - 1, against N, D and C.

A surface and a parabola speak of every run. Interpolated minima, envelopes and powers of compute speak of one point for each budget, so
their residuals are those of their points.
"""

from dataclasses import replace

import numpy as np

from dit_jax.scaling.chart import Axis, Chart, Mark, Panel, Style, numbers, style_of
from dit_jax.scaling.optima import PointFit
from dit_jax.scaling.study import SurfaceFit

FIFTHS = 5  # groups of runs, in order of N, D or C, whose medians are drawn


def expected(fit, runs) -> np.ndarray:
    """The loss (n,) that a fit expects of each run; nan where the method says nothing of that run."""
    if isinstance(fit, SurfaceFit):
        return np.asarray(fit(*(np.array([getattr(r, k) for r in runs]) for k in ("params", "tokens"))))
    if isinstance(fit, PointFit):
        return np.full(len(runs), np.nan)
    found: dict = {}
    for b in fit.budgets:
        if b.coefficients:
            said = b(np.array([r.params for r in b.runs])).tolist()
            found |= {id(r): law for r, law in zip(b.runs, said, strict=True)}
    return np.array([found.get(id(r), np.nan) for r in runs])


def residuals(fit, runs) -> list[tuple]:
    """(name, N, D, C, loss / law - 1) of each run, or of each point, that the method speaks of."""
    if isinstance(fit, PointFit):
        law = fit.laws["L_opt"]
        return [
            (f"best of {p.label}", p.n_opt, p.d_opt, p.flops, p.loss / float(law(p.flops)) - 1.0) for p in fit.points
        ]
    said = zip(runs, expected(fit, runs).tolist(), strict=True)
    return [(r.name, r.params, r.tokens, r.flops, r.loss / law - 1.0) for r, law in said if np.isfinite(law)]


def chart(fits: dict, runs, tips: dict, labels: dict) -> Chart:
    """A row of three panels for each method; the heavy line joins medians of fifths of the runs, level where the law's form holds."""
    rows = []
    for method, fit in fits.items():
        table = residuals(fit, runs)
        if not table:
            continue
        names = tuple(row[0] for row in table)
        off = 100 * np.array([row[4] for row in table])
        said = tuple(
            f"{tips.get(name, name)}\n{method}: {100 * row[4]:+.2f} %" for name, row in zip(names, table, strict=True)
        )
        panels = []
        for i, (letter, kind) in enumerate((("N", "count"), ("D", "count"), ("C", "flops")), start=1):
            x = np.array([row[i] for row in table])
            style = replace(style_of(method), size=4.5)
            style = replace(style, marker="o") if style.marker == "*" else style  # many small stars are dots
            marks = [
                Mark("line", (x.min(), x.max()), (0.0, 0.0), Style("#888888", width=0.8)),
                Mark("points", numbers(x), numbers(off), style, "a run", method, tips=said, runs=names),
            ]
            if len(table) > 2 * FIFTHS:
                marks.append(
                    Mark(
                        "line",
                        *_medians(x, off),
                        Style(style.color, "", (), width=2.2),
                        "median of a fifth of the runs",
                        method,
                    )
                )
            panels.append(
                Panel(
                    Axis(labels[letter], kind=kind),
                    Axis(f"loss / law {chr(0x2212)} 1 (%)", log=False),
                    tuple(marks),
                    f"{method}, by {letter}",
                    method,
                )
            )
        rows.append(tuple(panels))
    return Chart(
        "residuals",
        "Residuals",
        "Measured loss over the law's, minus 1, in percent, against N, D and C. The heavy line joins the medians of the runs' fifths: a "
        "trend or a bend in it is structure that the law does not have. Of akima, envelope and power the residuals are those of "
        "their points, one for each budget or crossing.",
        tuple(rows),
        legend=False,
    )


def _medians(x: np.ndarray, y: np.ndarray) -> tuple:
    """Medians of x and y in fifths of the order of x; equal x stay together."""
    order = np.argsort(x, kind="stable")
    parts = [part for part in np.array_split(order, FIFTHS) if len(part)]
    points = sorted({(float(np.median(x[part])), float(np.median(y[part]))) for part in parts})
    merged: dict = {}
    for u, v in points:
        merged.setdefault(u, []).append(v)
    return tuple(merged), tuple(float(np.median(v)) for v in merged.values())
