"""A report as files: the page, its figures as PNG and all of it as report.json; or figures alone."""

import os

from dit_jax.files import absolute, json_text
from dit_jax.scaling import place
from dit_jax.scaling.fits.fit import predict
from dit_jax.scaling.report import Report, figures
from dit_jax.scaling.report.axes import MOST, png
from dit_jax.scaling.report.page import computes, page
from dit_jax.scaling.report.text import expected, finite, to_json
from dit_jax.scaling.runs import budgets, scattered
from dit_jax.scaling.verdicts.verdict import lines

CAPTIONS = {
    "isoflop": "{0}: the runs of each budget, and the loss that the fit expects of a model of N parameters and C / (k N) tokens.",
    "N_opt": "The best model size at each compute, with {1:.0%} intervals as bands; open marks are optima of budgets.",
    "D_opt": "The data of the best model at each compute, with {1:.0%} intervals as bands.",
    "L_opt": "The best loss at each compute, with {1:.0%} intervals as bands; right of the dashed line no run was fitted. Less the "
    "irreducible term E of each method, the loss that more compute can still remove, a power law is a straight line.",
    "tested": "A model trained beyond the data: the loss that {0} predicted for it, and the loss measured.",
    "residuals": "{0}: measured loss over the expected one; a trend or a bend in the heavy line is structure that the law lacks.",
}


def save(path: str, report: Report) -> str:
    """Write the files of a report (see `report.save`)."""
    if not path.lower().endswith(".html"):
        one = path.lower().endswith((".png", ".svg"))
        main = (report.fits[report.main], report.runs, computes(report), report.test)
        figures.save(figures.main(*main) if one else [figure for _, _, figure in draw(report).values()], path)
        return path
    folder, mark = os.path.dirname(absolute(path)), place.mark(path)
    place.check(path)  # soon, before the figures
    drawn = {name: (*told, png(figure, mark)) for name, (*told, figure) in draw(report).items()}
    content = {os.path.join(folder, f"{name}.png"): picture for name, (_, _, picture) in drawn.items()}
    content[place.data(path)] = json_text({"generator": mark} | report_json(report)).encode()
    place.write(path, content | {absolute(path): page(report, drawn, mark).encode()})
    return path


def draw(report: Report) -> dict:
    """Name -> (method that a figure belongs to or "", caption, figure) of every figure that these fits have."""
    runs, main, flops = report.runs, report.fits[report.main], computes(report)
    fits = {report.main: main} | report.fits
    found = {"isoflop": ("", figures.isoflop(main, runs))} if not scattered(budgets(runs)) else {}
    for name in ("N_opt", "D_opt", "L_opt"):
        if any(name in fit.laws for fit in fits.values()):
            found[name] = "", figures.law(fits, name, flops, runs)
    if report.test is not None and "L_opt" in main.laws:
        found["tested"] = "", figures.law({report.main: main}, "L_opt", (2 * report.test.flops,), test=report.test)
    for method, fit in fits.items():
        if (figure := figures.residuals(fit, runs)) is not None:
            found["residuals" if fit is main else f"residuals-{method}"] = method, figure
    more = f" {MOST} of {len(runs):,} runs are drawn." if len(runs) > MOST else ""
    told = {}
    for name, (method, figure) in found.items():
        caption = CAPTIONS[name.partition("-")[0]].format(method or report.main, main.level)
        told[name] = method, caption + more * (name != "tested"), figure
    return told


def report_json(report: Report) -> dict:
    """Everything that the page shows, as data; `runs` holds a list for each column."""
    fits, runs, at = report.fits, report.runs, computes(report)
    texts = ("title", "main", "refused", "disagreements", "findings", "notes", "dropped", "tables")
    names = ("name", "params", "tokens", "flops", "loss", "loss_se")
    columns = {name: [getattr(r, name) for r in runs] for name in names}
    laws = {method: [float(f"{law:.7g}") for law in expected(fit, runs)] for method, fit in fits.items()}
    said = {
        "convention": runs[0].convention.to_json() if runs else None,
        "verdict": report.verdict and report.verdict.to_json() | {"text": lines(report.verdict)},
        "methods": {method: to_json(fit, [predict(fit, c) for c in at]) for method, fit in fits.items()},
        "flops": at,
        "test": vars(report.test) | {"inside": report.test.inside} if report.test is not None else None,
        "runs": columns | {"law": laws},
    }
    return finite({name: getattr(report, name) for name in texts} | said)
