"""What a reader sees of fits: texts and JSON (`text`), figures (`figures`), a page (`page`), and files of them (`save`)."""

from dataclasses import dataclass, field

from dit_jax.scaling.fits.fit import Fit
from dit_jax.scaling.report.text import opening
from dit_jax.scaling.verdicts.verdict import Verdict

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
    verdict: Verdict | None = None  # which comes before all else


def save(path: str, report: Report) -> str:
    """Write the report whole or not at all, by the ending of `path`: .html is the page, with its figures and report.json beside it; .png
    and .svg are the main figure, .pdf all figures, one a page. Returns `path`.

    Raises UsageError on any other ending, and if a file is there that the report at `path` did not write.
    """
    from dit_jax.scaling.report import folder  # here because texts need no matplotlib

    return folder.save(path, report)
