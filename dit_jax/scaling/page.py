"""The report's page: HTML that is complete without its script, allows no other one, and names no address.

Every part is one function from a Report to a piece of HTML.
"""

import base64
import hashlib
import html
import math
from importlib.resources import files

from dit_jax.scaling import chart, residuals, svg
from dit_jax.scaling.methods import Methods, predictions
from dit_jax.scaling.reasons import values
from dit_jax.scaling.runs import flatten
from dit_jax.scaling.study import SurfaceFit
from dit_jax.scaling.summary import METHOD_HEAD, SURFACE_HEAD, method_rows, search_text, surface_rows
from dit_jax.scaling.table import (
    BUDGET_HEAD,
    CHECK_HEAD,
    DASH,
    LAW_HEAD,
    PREDICT_HEAD,
    answer,
    budget_rows,
    check_rows,
    far,
    law_rows,
    law_text,
    span,
)

LONG = 40  # letters of a cell, from which its column is wrapped
MULTIPLES = (1.0, 10.0, 100.0)  # of the largest run, predicted where no compute is asked for
DISAGREEMENT_HEAD = ("of", "one finds", "the other", "why")
PREDICTION_HEAD = ("method", *PREDICT_HEAD)
MANY = 30  # budgets, from which their table is folded


def page(report, charts: list) -> str:
    """The whole HTML page."""
    figures = {c.name: f"<h2>{_text(c.title)}</h2>" + svg.figure(c) for c in charts}
    protocol = report.protocol if report.protocol is not None else report.runs[0].protocol if report.runs else {}
    parts = [
        f"<h1>{_text(report.title)}</h1>",
        _tools(report.methods),
        f'<p class="answer">{_text(opening(report))}</p>',
        *(f"<p>{_text(note)}</p>" for note in report.notes),
        _list("Warnings", _warnings(report.methods)),
        _list("The data", report.findings),
        figures.get("isoflop", ""),
        _budget_table(report.methods.fits.get("isoflop")),
        figures.get("training", ""),
        figures.get("laws", ""),
        _law_tables(report.methods.fits),
        _check_table(report),
        _prediction_table(report),
        figures.get("methods", ""),
        _comparison(report.methods),
        figures.get("residuals", ""),
        figures.get("clouds", ""),
        ""
        if report.grid is None
        else "<h2>Samples</h2>" + _image(report.grid, "Guided samples, sorted by class.", "grid"),
        "<h2>Runs</h2>",
        _run_table(report),
        f"<h2>What the numbers count</h2><p>{_text(report.runs[0].convention)}</p>",
        "<h2>Protocol</h2>",
        _protocol_table(protocol),
    ]
    style, script = (files("dit_jax.scaling").joinpath(f"report.{kind}").read_text("utf-8") for kind in ("css", "js"))
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta HTTP-EQUIV="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width"><title>{_text(report.title)}</title><style>{style}</style></head><body>\n'
        + "\n".join(p for p in parts if p)
        + f"\n<script>{script}</script></body></html>\n"
    )


def opening(report) -> str:
    """The result in one paragraph."""
    main = report.methods.main
    if main.method == "isoflop":
        text = answer(main, report.extrapolation)
    else:
        text = f"By {main.method}, the best loss of a compute follows {law_text(main.laws['L_opt'])}"
        if "N_opt" in main.laws:
            between = span(values(main, 1.0)["a"][1], ".3f")
            text += f", and the best size grows as compute to the power {main.laws['N_opt'].exponent:.3f} (interval {between})"
        text += "." if main.identifiable else ". These data do not identify the law: " + "; ".join(main.warnings) + "."
    if len(report.methods.fits) > 1:
        count = len(report.methods.disagreements)
        text += f" {len(report.methods.fits)} methods were fitted; " + (
            f"they disagree beyond their intervals in {count} place(s), see below."
            if count
            else "no two disagree beyond their intervals."
        )
    return text


def computes(report) -> tuple:
    """Where predictions are made."""
    return report.flops or tuple(k * max(r.flops for r in report.runs) for k in MULTIPLES)


def _text(value) -> str:
    return html.escape(str(value))


def _table(head, rows, text=(), tags=()) -> str:
    """A table; columns of `text` are left-aligned, and wrapped where they are long; `tags` are attributes of the rows."""
    long = [max((len(str(row[i])) for row in rows), default=0) > LONG for i in range(len(head))]
    mark = [(" class='text wide'" if long[i] else " class=text") if i in text else "" for i in range(len(head))]
    cells = "".join(f"<th{mark[i]}>{_text(h)}</th>" for i, h in enumerate(head))
    body = "".join(
        f"<tr{tag}>" + "".join(f"<td{mark[i]}>{_text(c)}</td>" for i, c in enumerate(row)) + "</tr>\n"
        for row, tag in zip(rows, tags or [""] * len(rows), strict=True)
    )
    return f'<div class="scroll"><table><tr>{cells}</tr>\n{body}</table></div>'


def _of(method: str) -> str:
    return f' data-method="{_text(method)}"'


def _image(png: bytes, caption: str, kind: str = "") -> str:
    data = base64.b64encode(png).decode()
    mark = f' class="{kind}"' if kind else ""
    return (
        f'<figure><img{mark} alt="{_text(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _list(title: str, items) -> str:
    found = "".join(f"<li>{_text(item)}</li>" for item in items)
    return f"<h2>{title}</h2><ul>{found}</ul>" if found else ""


def _warnings(methods: Methods) -> list[str]:
    said: dict = {}  # warning -> methods that say it
    for m, fit in methods.fits.items():
        for warning in fit.warnings:
            said.setdefault(warning, []).append(m)
    found = [w if len(methods.fits) == 1 else f"{', '.join(names)}: {w}" for w, names in said.items()]
    return found + [f"{m}: not fitted: {why}" for m, why in methods.refused.items()]


def _tools(methods: Methods) -> str:
    """Which methods are shown; there for the script alone."""
    if len(methods.fits) < 2:
        return ""
    boxes = "".join(
        f'<label><input type="checkbox" checked value="{_text(m)}">{_swatch(m)} {_text(m)}</label>'
        for m in methods.fits
    )
    return f'<div id="tools">Show: {boxes}</div>'


def _swatch(method: str) -> str:
    style = chart.style_of(method)
    return svg.swatch([chart.Mark("line", (), (), style), chart.Mark("points", (), (), style)])


def _budget_table(fit) -> str:
    if fit is None:
        return ""
    table = _table(BUDGET_HEAD, budget_rows(fit), text=(7,))
    if len(fit.budgets) <= MANY:
        return table
    return f"<details><summary>{len(fit.used)} of {len(fit.budgets)} budgets used by isoflop</summary>{table}</details>"


def _law_tables(fits: dict) -> str:
    head = LAW_HEAD if len(fits) == 1 else ("method", *LAW_HEAD)
    rows = [(m, row) for m, fit in fits.items() for row in law_rows(fit)]
    parts = [
        _table(
            head,
            [row if len(fits) == 1 else (m, *row) for m, row in rows],
            (0, len(head) - len(LAW_HEAD)),
            [_of(m) for m, _ in rows],
        ),
        "<p>y = irreducible + coefficient x C^exponent.</p>",
    ]
    if "isoflop" in fits:
        fit = fits["isoflop"]
        noise = "unknown" if math.isnan(fit.noise) else f"{fit.noise:.2g} ({fit.freedom} degrees of freedom)"
        kept = f"{fit.resamples - fit.degenerate} of {fit.resamples} resamples used" if fit.draws else "no resamples"
        parts.append(f"<p{_of('isoflop')}>Standard deviation of a run about its parabola: {noise}; {kept}.</p>")
    surfaces = {m: fit for m, fit in fits.items() if isinstance(fit, SurfaceFit)}
    if surfaces:
        parts.append("<h3>L = E + A / N^alpha + B / D^beta</h3>")
        found = (
            f"<div{_of(m)}><h4>{_text(m)}</h4>{_table(SURFACE_HEAD, surface_rows(fit))}<p>{_text(search_text(fit))}</p></div>"
            for m, fit in surfaces.items()
        )
        parts.append(f'<div class="side">{"".join(found)}</div>')
    return "\n".join(parts)


def _check_table(report) -> str:
    fit = report.methods.fits.get("isoflop")
    rows = check_rows(fit, report.holdout, report.extrapolation) if fit else []
    return "<h2>Predicted against measured</h2>" + _table(CHECK_HEAD, rows) if rows else ""


def _prediction_table(report) -> str:
    rows, methods = [], []
    for method, fit in report.methods.fits.items():
        for said in predictions(fit, computes(report)):
            beyond = far(said["beyond"])
            cells = [method, f"{said['flops']:.3g}", beyond]
            for name, digits in (("N_opt", ".4g"), ("D_opt", ".4g"), ("L_opt", ".4f")):
                cells += [f"{said[name]:{digits}}", span(said[f"{name}_interval"], digits)]
            rows.append((*cells, span(said["L_run_interval"], ".4f")))
            methods.append(_of(method))
    return "<h2>Predictions</h2>" + _table(PREDICTION_HEAD, rows, (0,), methods) if rows else ""


def _comparison(methods: Methods) -> str:
    """The methods' estimates, where they disagree and why, and every test of a premise."""
    if len(methods.fits) < 2:
        return ""
    head = (*METHOD_HEAD[:8], f"L_opt at {methods.flops:.3g}", *METHOD_HEAD[9:])
    parts = [_table(head, method_rows(methods.fits, methods.flops), (0,), [_of(m) for m in methods.fits])]
    if methods.disagreements:
        parts.append("<h3>Where they disagree beyond their intervals, and why</h3>")
        parts.append(
            _table(
                DISAGREEMENT_HEAD,
                [
                    (d.quantity, *(f"{m}: {text}" for m, text in zip(d.methods, d.sides, strict=True)), d.why)
                    for d in methods.disagreements
                ],
                (0, 1, 2, 3),
            )
        )
    else:
        parts.append("<p>No two methods disagree beyond their intervals.</p>")
    if methods.tests:
        rows = [(t.method, t.premise, t.found, "fails" if t.fails else "holds") for t in methods.tests]
        parts.append("<h3>What each method takes for granted, tested on these runs</h3>")
        parts.append(
            _table(("method", "premise", "found", ""), rows, (0, 1, 2), [_of(t.method) for t in methods.tests])
        )
    return "\n".join(parts)


def _run_table(report) -> str:
    fits = report.methods.fits
    said = {m: residuals.expected(f, report.runs) for m, f in fits.items()}
    said = {m: law for m, law in said.items() if any(map(math.isfinite, law))}
    head = (
        "run",
        "params active",
        "params total",
        "tokens",
        "images",
        "training FLOPs",
        "loss",
        "standard error",
        *(f"over {m}'s" for m in said),
    )
    order = sorted(
        range(len(report.runs)), key=lambda i: (round(math.log(report.runs[i].flops), 1), report.runs[i].params)
    )
    rows, marks = [], []
    for i in order:
        r = report.runs[i]
        counts = (_count(v) for v in (r.params, r.params_total, r.tokens, r.images))
        over = (f"{r.loss / law[i] - 1:+.2%}" if math.isfinite(law[i]) else DASH for law in said.values())
        rows.append(
            (r.name, *counts, f"{r.flops:.4g}", f"{r.loss:.4f}", f"{r.loss_se:.4f}" if r.loss_se else DASH, *over)
        )
        marks.append(f' data-run="{_text(r.name)}"')
    return _table(head, rows, (0,), marks)


def _count(value: float | int) -> str:
    return DASH if math.isnan(value) else f"{value:,.0f}"


def _protocol_table(protocol: dict) -> str:
    rows = [(name, value) for name, value in flatten(protocol).items()]
    return _table(("field", "value"), rows, text=(1,)) if rows else "<p>The runs record no protocol.</p>"
