"""`report.html`: one self-contained file with the answer, the curves, the laws, the tables, the samples and the protocol.

Every part is one function from a fit to a piece of HTML.
"""

import base64
import html
import json
import math
import os
import tempfile

from dit_jax.scaling.predict import predict
from dit_jax.scaling.runs import flatten
from dit_jax.scaling.table import (
    BUDGET_HEAD,
    CHECK_HEAD,
    DASH,
    LAW_HEAD,
    answer,
    budget_rows,
    check_rows,
    fit_json,
    law_rows,
)

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#111;background:#fff}
h1{font-size:1.6em}h2{font-size:1.2em;margin-top:2em;border-bottom:1px solid #bbb}
table{border-collapse:collapse;font-size:.85em;margin:.5em 0}th,td{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd}
th{border-bottom:1px solid #111}td:first-child,th:first-child,td.text{text-align:left}td.text{overflow-wrap:anywhere}
img{max-width:100%}figure{margin:1em 0}figcaption{font-size:.85em;color:#333}
.answer{border-left:4px solid #111;padding:.3em 1em;background:#f4f4f4;font-size:1.08em}.scroll{overflow-x:auto}
.grid{image-rendering:pixelated;min-width:min(100%,480px)}"""


def write_report(
    path: str, fit, runs, holdout, *, title: str, extrapolation=None, grid_png=None, protocol=None, notes=()
) -> str:
    """Writes the report to `path`, its figures as PNG and `fit.json` beside it, each whole or not at all. Returns `path`.

    `holdout` is a Prediction or None, `extrapolation` an Extrapolation or None, `grid_png` the file of an image grid or None,
    `protocol` nested names and values (None = that of the runs), `notes` sentences of plain text.
    """
    from dit_jax.scaling import figure  # matplotlib is slow to import, and only a report needs it

    images = {"isoflop": figure.isoflop(fit), "laws": figure.laws(fit, extrapolation)}
    grid = None
    if grid_png is not None:
        with open(grid_png, "rb") as file:
            grid = file.read()
    protocol = protocol if protocol is not None else (runs[0].protocol if runs else {})
    parts = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="answer">{_text(answer(fit, extrapolation))}</p>',
        *(f"<p>{_text(note)}</p>" for note in notes),
        _warnings(fit),
        "<h2>IsoFLOP curves</h2>",
        _image(
            images["isoflop"],
            "Each curve is one compute budget spent on models of different sizes; stars mark the minima.",
        ),
        _budget_table(fit),
        "<h2>Laws of compute</h2>",
        _image(
            images["laws"], f"Bands: {fit.level:.0%} bootstrap intervals over runs. C is training FLOPs (2 x MACs)."
        ),
        _law_table(fit),
        _check_table(fit, holdout, extrapolation),
        _grid(grid),
        "<h2>Runs</h2>",
        _run_table(fit, runs),
        "<h2>Protocol</h2>",
        _protocol_table(protocol),
    ]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(p for p in parts if p) + "\n</body></html>\n"
    )
    folder = os.path.dirname(os.path.abspath(path))
    for name, data in images.items():
        write(os.path.join(folder, f"{name}.png"), data)
    predictions = [predict(fit, extrapolation.flops, extrapolation.params)] if extrapolation else []
    write(os.path.join(folder, "fit.json"), json.dumps(fit_json(fit, predictions), indent=1).encode())
    write(path, page.encode())
    return path


def write(path: str, data: bytes) -> None:
    """The whole file or none of it: a temporary file in the same folder, then a rename."""
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{os.path.basename(path)}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _text(value) -> str:
    return html.escape(str(value))


def _table(head, rows, text=()) -> str:
    cells = "".join(f"<th>{_text(h)}</th>" for h in head)
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=text' if i in text else ''}>{_text(c)}</td>" for i, c in enumerate(row))
        + "</tr>\n"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{cells}</tr>\n{body}</table></div>'


def _image(png: bytes, caption: str, kind: str = "") -> str:
    data = base64.b64encode(png).decode()
    mark = f' class="{kind}"' if kind else ""
    return (
        f'<figure><img{mark} alt="{_text(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _warnings(fit) -> str:
    items = "".join(f"<li>{_text(w)}</li>" for w in fit.warnings)
    return f"<h2>Warnings</h2><ul>{items}</ul>" if items else ""


def _budget_table(fit) -> str:
    return _table(BUDGET_HEAD, budget_rows(fit), text=(7,))


def _law_table(fit) -> str:
    noise = "unknown" if math.isnan(fit.noise) else f"{fit.noise:.2g} ({fit.freedom} degrees of freedom)"
    kept = f"{fit.resamples - fit.degenerate} of {fit.resamples} resamples used" if fit.draws else "no resamples"
    return (
        _table(LAW_HEAD, law_rows(fit))
        + f"<p>y = irreducible + coefficient x C^exponent. Standard deviation of a run about its parabola: {noise}; {kept}.</p>"
    )


def _check_table(fit, holdout, extrapolation) -> str:
    rows = check_rows(fit, holdout, extrapolation)
    return "<h2>Predicted against measured</h2>" + _table(CHECK_HEAD, rows) if rows else ""


def _grid(grid: bytes | None) -> str:
    if grid is None:
        return ""
    return "<h2>Samples</h2>" + _image(grid, "Guided samples, sorted by class.", "grid")


def _run_table(fit, runs) -> str:
    head = ("run", "params active", "params total", "tokens", "images", "training FLOPs", "loss", "standard error")
    rows = [
        (
            r.name,
            *(_count(v) for v in (r.params, r.params_total, r.tokens, r.images)),
            f"{r.flops:.4g}",
            f"{r.loss:.4f}",
            f"{r.loss_se:.4f}" if r.loss_se else DASH,
        )
        for r in sorted(
            runs, key=lambda r: (min(fit.budgets, key=lambda b: abs(math.log(r.flops / b.flops))).flops, r.params)
        )
    ]
    return _table(head, rows)


def _count(value: float) -> str:
    return DASH if math.isnan(value) else f"{value:,.0f}"


def _protocol_table(protocol: dict) -> str:
    rows = [(name, value) for name, value in flatten(protocol).items()]
    return _table(("field", "value"), rows, text=(1,)) if rows else "<p>The runs record no protocol.</p>"
