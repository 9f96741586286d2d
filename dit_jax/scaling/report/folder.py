"""A report in a folder: `report.html`, its figures as PNG, the main fit as fit.json and everything as report.json."""

import os
from collections.abc import Iterable

from dit_jax.error import UsageError
from dit_jax.files import LARGEST, check_json, json_text, read, write_file
from dit_jax.scaling.fits.fit import predict
from dit_jax.scaling.report import Report, figures
from dit_jax.scaling.report.axes import GENERATOR, MOST, png
from dit_jax.scaling.report.page import computes, page
from dit_jax.scaling.report.text import expected, finite, to_json
from dit_jax.scaling.runs import budgets, scattered

CAPTIONS = {
    "isoflop": "{0}: the runs of each budget, and the loss that the fit expects of a model of N parameters and C / (k N) tokens.",
    "N_opt": "The best model size at each compute, with {1:.0%} intervals as bands; open marks are optima of budgets.",
    "D_opt": "The data of the best model at each compute, with {1:.0%} intervals as bands.",
    "L_opt": "The best loss at each compute, with {1:.0%} intervals as bands; right of the dashed line no run was fitted.",
    "reducible": "The best loss less the irreducible term E of each method: a straight line is a power law.",
    "plane": "{0}: the runs by compute and size, coloured by their loss, and the best size.",
    "tested": "A model trained beyond the data: the loss that {0} predicted for it, and the loss measured.",
    "residuals": "{0}: measured loss over the expected one; a trend or a bend in the heavy line is structure that the law lacks.",
}


def save(path: str, report: Report) -> str:
    """Write the page, its figures and its JSON (see `report.save`)."""
    check_json(path, "--out", makes_folders=True)
    folder = os.path.dirname(os.path.abspath(path))
    _refuse_others(
        [path, *(os.path.join(folder, name) for name in ("fit.json", "report.json"))]
    )  # soon, before the figures
    pictures = draw(report)
    main = report.fits[report.main]
    predictions = [predict(main, c) for c in computes(report)]
    if report.test is not None:
        predictions.insert(0, predict(main, report.test.flops, report.test.params))
    content = {os.path.join(folder, f"{name}.png"): picture for name, (_, _, picture) in pictures.items()}
    for name, value in (("fit", to_json(main, predictions)), ("report", report_json(report))):
        content[os.path.join(folder, f"{name}.json")] = json_text({"generator": GENERATOR} | value, indent=1).encode()
    content[os.path.abspath(path)] = page(report, pictures).encode()
    _refuse_others(content)
    os.makedirs(folder, exist_ok=True)
    for file, data in content.items():
        write_file(file, data)
    return path


def _refuse_others(paths: Iterable[str]) -> None:
    for file in paths:
        if os.path.lexists(file) and not _ours(file):
            raise UsageError(
                f"--out: {file} was not written by a report, expected another folder, or that file moved away"
            )


def _ours(path: str) -> bool:
    """Whether a report wrote this file: its head says so."""
    if not os.path.isfile(path):
        return False
    head, mark = read(path, LARGEST)[:8192], GENERATOR.encode()
    marks = {".png": b"Software\0" + mark, ".json": b'{\n "generator": "' + mark + b'"'}
    return marks.get(os.path.splitext(path)[1], b'<meta name="generator" content="' + mark + b'"') in head


def draw(report: Report) -> dict:
    """Name -> (method that a figure belongs to or "", caption, PNG) of every figure that these fits have."""
    runs, fits, main, flops = report.runs, report.fits, report.fits[report.main], computes(report)
    first = {report.main: main} | fits
    found = {"isoflop": ("", figures.isoflop(main, runs))} if not scattered(budgets(runs)) else {}
    found["plane"] = "", figures.plane(main, runs, flops)
    for name in ("N_opt", "D_opt", "L_opt"):
        if any(name in fit.laws for fit in fits.values()):
            found[name] = "", figures.law(first, name, flops)
    found["reducible"] = "", figures.reducible(first, runs, flops)
    if report.test is not None:
        found["tested"] = "", figures.tested(main, report.test)
    for method, fit in first.items():
        found["residuals" if fit is main else f"residuals-{method}"] = method, figures.residuals(fit, runs)
    more = f" {MOST} of {len(runs):,} runs are drawn." if len(runs) > MOST else ""
    pictures = {}
    for name, (method, figure) in found.items():
        if figure is not None:
            kind = name.partition("-")[0]
            caption = CAPTIONS[kind].format(method or report.main, main.level)
            pictures[name] = (
                method,
                caption + more * (kind in ("isoflop", "plane", "reducible", "residuals")),
                png(figure),
            )
    return pictures


def report_json(report: Report) -> dict:
    """Everything that the page shows, as data."""
    fits, at = report.fits, computes(report)
    laws = {method: expected(fit, report.runs) for method, fit in fits.items()}
    fields = ("params", "tokens", "flops", "loss", "loss_se")
    runs = [
        {"run": r.name}
        | {name: getattr(r, name) for name in fields}
        | {"law": {method: float(law[i]) for method, law in laws.items()}}
        for i, r in enumerate(report.runs)
    ]
    return finite(
        {
            "title": report.title,
            "main": report.main,
            "convention": report.runs[0].convention.to_json() if report.runs else None,
            "methods": {method: to_json(fit, [predict(fit, c) for c in at]) for method, fit in fits.items()},
            **{
                name: getattr(report, name)
                for name in ("refused", "disagreements", "findings", "notes", "dropped", "tables")
            },
            "flops": at,
            "test": vars(report.test) | {"inside": report.test.inside} if report.test is not None else None,
            "runs": runs,
        }
    )
