"""The study's page, docs/study.md, and its figures, from the committed records alone: `make study-page`. Twice gives the same bytes."""

import os
from collections.abc import Sequence

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.study import claim, decide, figures, summary
from benchmarks.study.answers import ANSWERS
from benchmarks.study.cells import Cell, config_of, make_cells
from benchmarks.study.records import read, same_protocols
from benchmarks.study.select import RESAMPLES, Data, short, undistilled
from benchmarks.study.table import STUDIES
from benchmarks.study.work import missing
from dit_jax.error import UsageError
from dit_jax.files import delete, make_folder, write_file
from dit_jax.scaling.report import axes

TITLES = {"digits": "Digits, by class", "scenes": "Scenes, by caption"}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows as a table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |" for line in lines)


def claim_rows(claims: Sequence[claim.Claim]) -> list[tuple]:
    """A row for each claim: with the ends of its intervals when a tenth of the records was left out."""
    found, many = [], len({one.budget for one in claims}) > 1
    for one in claims:
        ends = (min(r[1] for r in one.computed), max(r[2] for r in one.computed)) if one.computed else ()
        low, high = one.interval
        found.append((one.answer, f"{short(one.budget)}, " * many + one.text, f"{one.value:z.2f}", f"{low:z.2f} to {high:z.2f}",
                      " to ".join(f"{end:z.2f}" for end in ends), one.remakes, one.verdict))  # fmt: skip
    return found


def part(name: str, records: list[dict], folder: str, resamples: int, times: int) -> dict:
    """What the page says of one kind of data; writes its figures."""
    data = Data(name, records, resamples)
    parts = claim.remakes(data, times)
    claims = claim.remade(data, parts)
    answers = [answer(data, claims, parts) for answer in ANSWERS]
    pairs = decide.rows(data, data.study)
    teachers = [p for budget in data.budgets for p in data.points(undistilled(budget))]
    drawn = {f"{name}_0.png": figures.scores(data) if (picks := summary.picks(data)) else None}
    for answer in answers:
        drawn[f"{name}_{answer.number}.png"] = figures.FIGURES[answer.number](data, answer) if answer.drawn else None
    for file, figure in drawn.items():  # a figure of more records than there are now goes
        path = os.path.join(folder, file)
        if figure is not None:
            write_file(path, axes.png(figure))
        else:
            delete(path)
    return {
        "name": name,
        "title": TITLES[name],
        "metric": data.metric,
        "unit": short(data.unit),
        "steps": sorted({int(p.steps) for p in teachers}),
        "guidances": [f"{g:g}" for g in sorted({p.guidance for p in teachers})],
        "limit": summary.limit(data),
        "status": summary.status(data),
        "sizes": summary.sizes(data.study),
        "picks": picks,
        "budget": short(data.budgets[-1]),
        "answers": answers,
        "pairs": len(pairs),
        "decided": [row for row in pairs if row[-1] != decide.WAITING],
        "compared": summary.compared(data, claims),
        "claims": claim_rows(claims),
    }


def open_cells(cells: Sequence[Cell], left: set) -> list[tuple]:
    """A row (kind of data, kind of cell, how many are recorded of those planned at each budget) for each kind of cell; `left` holds
    the ids of those of which not all is recorded."""
    groups: dict = {}
    for cell in cells:
        what = f"{cell.student.replace('_', ' ')} {cell.share:.0%}" if cell.student else "teachers"
        what += ", other samplings" * cell.rest + f", seed {cell.seed}" * (cell.seed > 0)
        groups.setdefault((cell.study.name, what), {}).setdefault(cell.budget, []).append(cell)
    found = []
    for (name, what), budgets in groups.items():
        said = []
        for budget, some in sorted(budgets.items()):
            gone = [f"w{cell.size[0]}" for cell in some if id(cell) in left]
            some_gone = f" (without {', '.join(gone)})" * (0 < len(gone) < len(some))
            said.append(f"{short(budget)}: {len(some) - len(gone)} of {len(some)}{some_gone}")
        found.append((name, what, "; ".join(said)))
    return found


def write(path: str, resamples: int = RESAMPLES, times: int = claim.TIMES) -> str:
    """Write the page beside the folder of the records; returns its path. Raises UsageError on records that do not fit together."""
    records, failed = read(path)
    if not records:
        raise UsageError(f"{path}: found no records, expected those of `make study`")
    same_protocols(path, records)
    folder = os.path.dirname(path)
    page = os.path.join(os.path.dirname(folder), "study.md")
    make_folder(folder)
    cells = make_cells(STUDIES.values())
    left = {id(cell) for cell in cells if missing(cell, records)}
    kinds = [name for name in STUDIES if any(r["study"]["data"] == name for r in records)]
    values = {
        "parts": [part(name, records, folder, resamples, times) for name in kinds],
        "studies": STUDIES,
        "batch": {name: config_of(make_cells([study])[0]).train.batch_size for name, study in STUDIES.items()},
        "failed": failed,
        "cells": open_cells(cells, left),
        "folder": os.path.basename(folder),
        "table": table,
        "count": len(records),
        "done": len(cells) - len(left),
        "of": len(cells),
        "out": f"{claim.OUT:.0%}",
        "times": times,
        "resamples": resamples,
        "held": f"{claim.HELD:.0%}",
    }
    loader = FileSystemLoader(os.path.dirname(os.path.abspath(__file__)))
    made = Environment(
        loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    write_file(page, made.get_template("page.md.j2").render(values))
    return page
