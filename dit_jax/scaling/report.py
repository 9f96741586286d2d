"""The report: `report.html`, one self-contained file, and beside it its figures as PNG, the main fit and everything else as JSON."""

import json
import math
import os
from dataclasses import dataclass

from dit_jax.files import write_file
from dit_jax.scaling import chart, clouds, plots, residuals
from dit_jax.scaling.methods import Methods, predictions
from dit_jax.scaling.page import computes, page
from dit_jax.scaling.predict import predict
from dit_jax.scaling.reasons import values
from dit_jax.scaling.summary import to_json
from dit_jax.scaling.table import finite


@dataclass(frozen=True)
class Report:
    """All that a report shows. `curves` are rows of training curves or None, `findings` sentences about the quality of the data,
    `flops` the computes to predict at (none = multiples of the largest run)."""

    title: str
    methods: Methods
    runs: tuple
    curves: tuple | None = None
    holdout: object = None  # Prediction
    extrapolation: object = None  # Extrapolation
    grid: bytes | None = None  # PNG of samples
    protocol: dict | None = None  # None = that of the runs
    notes: tuple = ()
    findings: tuple = ()
    flops: tuple = ()


def write_report(
    path: str, fit, runs, holdout, *, title: str, extrapolation=None, grid_png=None, protocol=None, notes=()
) -> str:
    """The report of one fit, with isoflop.png, laws.png, other figures and fit.json beside it, each whole or not at all. Returns `path`.

    `holdout` is a Prediction or None, `extrapolation` an Extrapolation or None, `grid_png` the file of an image grid or None,
    `protocol` nested names and values (None = that of the runs), `notes` sentences of plain text.
    """
    grid = None
    if grid_png is not None:
        with open(grid_png, "rb") as file:
            grid = file.read()
    methods = Methods({fit.method: fit}, {}, float(fit.largest), (), ())
    rest = dict(extrapolation=extrapolation, grid=grid, protocol=protocol, notes=tuple(notes))
    return save(path, Report(title, methods, tuple(runs), holdout=holdout, **rest))


def save(path: str, report: Report) -> str:
    """Writes the page to `path`, and beside it each figure as NAME.png, the main method's fit.json, and report.json with everything."""
    from dit_jax.scaling import figure

    charts = make_charts(report)
    pictures = {c.name: figure.png(c) for c in charts}
    text = page(report, charts)
    far = report.extrapolation
    main = report.methods.main
    said = [predict(main, far.flops, far.params)] if far else predictions(main, report.flops)
    folder = os.path.dirname(os.path.abspath(path))
    for name, data in pictures.items():
        write(os.path.join(folder, f"{name}.png"), data)
    for name, value in (("fit", to_json(main, said)), ("report", report_json(report, charts))):
        write(os.path.join(folder, f"{name}.json"), json.dumps(value, indent=1).encode())
    write(path, text.encode())
    return path


def write(path: str, data: bytes) -> None:
    """Write a file whole, in a folder that is made for it."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    write_file(path, data)


def make_charts(report: Report) -> list:
    """The figures that this report has, in its order."""
    fits, labels = report.methods.fits, plots.labels_of(report.runs)
    tips = tips_of(fits, report.runs)
    found = [plots.curves(fits, report.runs, tips, labels)]
    if report.curves:
        found.append(plots.training(report.curves, fits.get("envelope"), labels))
    found.append(plots.laws(fits, labels, report.extrapolation))
    if len(fits) > 1:
        found.append(plots.forest({m: values(f, report.methods.flops) for m, f in fits.items()}, report.methods.flops))
    found += [residuals.chart(fits, report.runs, tips, labels), clouds.chart(fits, report.methods.flops, labels)]
    return [c for c in found if c is not None and c.rows]


def tips_of(fits: dict, runs) -> dict:
    """Name of a run -> its N, D, C and loss, and what every method expects of it."""
    said = {m: residuals.expected(f, runs) for m, f in fits.items()}
    tips = {}
    for i, r in enumerate(runs):
        lines = [r.name, f"N {r.params:.4g}, D {r.tokens:.4g}, C {r.flops:.4g} FLOPs", f"loss {r.loss:.4f}"]
        lines += [
            f"{m}: law {law[i]:.4f}, the run {100 * (r.loss / law[i] - 1):+.2f} %"
            for m, law in said.items()
            if math.isfinite(law[i])
        ]
        tips[r.name] = "\n".join(lines)
    return tips


def report_json(report: Report, charts: list) -> dict:
    """Everything that the page shows, as data."""
    m = report.methods
    said = {method: residuals.expected(fit, report.runs) for method, fit in m.fits.items()}
    runs = [
        {"run": r.name, "params": r.params, "tokens": r.tokens, "flops": r.flops, "loss": r.loss, "loss_se": r.loss_se}
        | {"law": {method: float(law[i]) for method, law in said.items() if math.isfinite(law[i])}}
        for i, r in enumerate(report.runs)
    ]
    return finite(
        {
            "title": report.title,
            "convention": report.runs[0].convention.to_json(),
            "methods": {method: to_json(fit, predictions(fit, computes(report))) for method, fit in m.fits.items()},
            "refused": m.refused,
            "flops": m.flops,
            "tests": [vars(t) for t in m.tests],
            "disagreements": [
                vars(d) | {"reasons": [vars(t) for t in d.reasons], "text": str(d)} for d in m.disagreements
            ],
            "findings": list(report.findings),
            "extrapolation": vars(report.extrapolation) if report.extrapolation else None,
            "runs": runs,
            "charts": {c.name: chart.to_json(c) for c in charts},
        }
    )
