"""What a reader sees of fits: texts and JSON (`text`), figures (`figures`), a page (`page`), and a folder of all of them (`save`)."""

from dataclasses import dataclass, field

from dit_jax.scaling.fits.fit import Fit
from dit_jax.scaling.report.text import opening

__all__ = ["Report", "opening", "save"]


@dataclass(frozen=True)
class Report:
    """All that a report shows. `test` is a model trained beyond the data (fields flops, params, predicted, interval, measured,
    measured_se, multiple, inside) or None, `grid` a PNG of samples or None, `flops` the computes to predict at (() = multiples of the
    largest run), `tables` further (title, head, rows) of text."""

    title: str
    fits: dict[str, Fit]
    main: str  # the fit that answers
    runs: tuple
    findings: tuple = ()  # what is wrong with the runs
    refused: dict = field(default_factory=dict)  # method -> why it was not fitted
    disagreements: tuple = ()
    test: object = None
    grid: bytes | None = None
    flops: tuple = ()
    dropped: tuple = ()
    tables: tuple = ()
    notes: tuple = ()  # sentences on the model that was trained beyond the data


def save(path: str, report: Report) -> str:
    """Write the page to `path`, and its figures, fit.json and report.json beside it, each whole or not at all. Returns `path`.

    Raises UsageError, before anything is written, if a file of one of these names was not written by a report.
    """
    from dit_jax.scaling.report import folder  # here because texts need no matplotlib

    return folder.save(path, report)
