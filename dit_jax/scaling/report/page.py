"""The report as one page of HTML, by jinja2 with every text escaped: complete without its script, and nothing is loaded from elsewhere."""

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from dit_jax.scaling.fits.fit import Fit, predict
from dit_jax.scaling.names import EXPLAINED
from dit_jax.scaling.report import text
from dit_jax.scaling.report.axes import thin
from dit_jax.scaling.verdicts.verdict import lines

MULTIPLES = (1.0, 10.0, 100.0)  # of the largest run, predicted if no compute is asked for
MANY = 30  # rows, from which a table is folded
RUN_HEAD = ("run", "N", "D (tokens)", "C (FLOPs)", "loss", "standard error", "over the law")


def page(report, figures: Mapping[str, tuple], mark: str) -> str:
    """The page of a `Report`; `figures`: name -> (method or "", caption, PNG); `mark` says who wrote it."""
    template = files(__package__).joinpath("page.html.jinja").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"sha256": _sha256, "data": _data, "typeset": typeset}
    main = report.fits[report.main]
    return environment.from_string(template).render(
        report=report,
        generator=mark,
        answer=text.opening(report),
        verdict=lines(report.verdict) if report.verdict else (),
        many=MANY,
        explained=EXPLAINED,
        figures=figures,
        tables=_tables(report, main),
        budgets={name: fit.tables for name, fit in report.fits.items() if fit.tables},
        run_table=(RUN_HEAD, _run_rows(report.runs, main)),
        convention=str(report.runs[0].convention) if report.runs else "",
    )


def computes(report) -> tuple:
    """Where predictions are made: at the computes asked for, or at multiples of the largest run."""
    return tuple(report.flops) or tuple(k * max(r.flops for r in report.runs) for k in MULTIPLES)


def typeset(value) -> Markup:
    """Text, escaped, with its powers raised (see `text.typeset`)."""
    return Markup(text.typeset(str(escape(value)), "<sup>{}</sup>"))


def _sha256(value) -> str:
    """How a Content-Security-Policy names an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(value).encode()).digest()).decode()


def _data(value: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(value).decode()


def _tables(report, main: Fit) -> list:
    """(title, head, rows, method of each row or "") of every table that holds all fits."""
    fits, at = report.fits, computes(report)
    rows = [(m, row) for m, fit in fits.items() for row in text.law_rows(fit)]
    said = [(m, row) for m, fit in fits.items() for row in text.prediction_rows(predict(fit, c) for c in at)]
    head = (*text.METHOD_HEAD[:8], f"L_opt at {at[-1]:.3g} FLOPs", *text.METHOD_HEAD[9:])
    found = [
        (f"Methods, {main.level:.0%} intervals", head, text.method_rows(fits, at[-1]), list(fits)),
        ("Laws of compute", ("method", *text.LAW_HEAD), [(m, *row) for m, row in rows], [m for m, _ in rows]),
        ("Predictions", ("method", *text.PREDICT_HEAD), [(m, *row) for m, row in said], [m for m, _ in said]),
    ]
    if report.test is not None:
        found.insert(1, ("Predicted against measured", text.TESTED_HEAD, text.tested_rows(report.test), [""]))
    return found + [(title, head, rows, [""] * len(rows)) for title, head, rows in report.tables]


def _run_rows(runs, main: Fit) -> list[tuple]:
    """A row of RUN_HEAD for each run, or for a few hundred of very many."""
    rows, shown = [], thin(sorted(runs, key=lambda r: (r.flops, r.params)))
    for r, law in zip(shown, text.expected(main, shown).tolist(), strict=True):
        cells = [f"{v:.4g}" for v in (r.params, r.tokens, r.flops, r.loss)]
        error = f"{r.loss_se:.2g}" if r.loss_se else text.DASH
        rows.append((r.name, *cells, error, text.written(r.loss / law - 1, "+.2%")))
    return rows
