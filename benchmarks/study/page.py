"""The study's page, docs/study.md, and its figures, from the committed records alone: `make study-page`. Twice gives the same bytes."""

import os
from collections.abc import Sequence

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.study import claim
from benchmarks.study.answers import ANSWERS, compared
from benchmarks.study.cells import Cell, config_of, make_cells
from benchmarks.study.decide import rows
from benchmarks.study.figures import FIGURES
from benchmarks.study.records import read, same_protocols
from benchmarks.study.select import RESAMPLES, Data
from benchmarks.study.table import STUDIES
from benchmarks.study.work import missing
from dit_jax import flops
from dit_jax.error import UsageError
from dit_jax.files import make_folder, write_file
from dit_jax.scaling.report import axes

TITLES = {"digits": "Digits, by class", "scenes": "Scenes, by caption"}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows as a table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |" for line in lines)


def claim_rows(claims: Sequence[claim.Claim]) -> list[tuple]:
    """A row for each claim that has a number: with the ends of its interval when a tenth of the records was left out."""
    found = []
    for one in claims:
        if one.value != one.value:
            continue
        again = [r for r in one.remade if r[1] == r[1]]
        ends = f"{min(r[1] for r in again):.2f} to {max(r[2] for r in again):.2f}" if again else ""
        low, high = one.interval
        found.append(
            (one.answer, one.text.replace("_", " "), f"{one.value:.2f}", f"{low:.2f} to {high:.2f}", ends, one.verdict)
        )
    return found


def part(name: str, records: list[dict], folder: str, resamples: int, times: int) -> dict:
    """What the page says of one kind of data; writes its figures."""
    data = Data(name, records, resamples)
    claims = claim.remade(data, times)
    answers = [answer(data, claims) for answer in ANSWERS]
    for answer in answers:
        figure = FIGURES[answer.number](data, answer)
        write_file(os.path.join(folder, f"{name}_{answer.number}.png"), axes.png(figure))
    return {
        "name": name,
        "title": TITLES[name],
        "metric": data.metric,
        "unit": claim.short(data.unit),
        "records": len(data.records),
        "answers": answers,
        "decided": rows(data, data.study),
        "compared": compared(data, claims),
        "claims": claim_rows(claims),
        "gone": [c for c in claims if c.verdict.startswith("does not survive")],
    }


def open_cells(cells: Sequence[Cell], records: list[dict]) -> list[tuple]:
    """Rows (kind of data, budget, what, sizes recorded, which are missing) of every group of cells; those not begun share a row."""
    groups: dict = {}
    for cell in cells:
        groups.setdefault((cell.study.name, cell.budget, cell.student, cell.share, cell.seed, cell.rest), []).append(
            cell
        )
    found, not_begun = [], {}
    for (name, budget, student, share, seed, rest), some in groups.items():
        gone = [f"w{cell.size[0]}" for cell in some if missing(cell, records)]
        what = f"{student.replace('_', ' ')} {share:.0%}" if student else "teachers"
        what += ", other samplings" * rest + f", seed {seed}" * (seed > 0)
        if len(gone) == len(some):
            not_begun.setdefault((name, budget), []).append(what)
        else:
            found.append((name, claim.short(budget), what, f"{len(some) - len(gone)} of {len(some)}", ", ".join(gone)))
    return found + [
        (name, claim.short(budget), "; ".join(whats), "none", "all") for (name, budget), whats in not_begun.items()
    ]


def sizes_of(name: str) -> list[tuple]:
    """Rows (size, active and all parameters, FLOPs of a call, training steps at each budget) of a kind of data."""
    study, found = STUDIES[name], []
    for size in study.sizes:
        cfg = config_of(Cell(study, size, study.budgets[-1]))
        numbers = (flops.active_parameters(cfg.model), flops.parameters(cfg.model), flops.forward_flops(cfg.model))
        steps = ", ".join(f"{step:,}" for step in cfg.train.keep_at)
        found.append((f"w{size[0]}", size[1], *(f"{n:,}" for n in numbers), steps))
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
    kinds = [name for name in STUDIES if any(r["study"]["data"] == name for r in records)]
    values = {
        "parts": [part(name, records, folder, resamples, times) for name in kinds],
        "studies": STUDIES,
        "sizes": {name: sizes_of(name) for name in STUDIES},
        "failed": failed,
        "cells": open_cells(cells, records),
        "folder": os.path.basename(folder),
        "table": table,
        "count": len(records),
        "done": sum(not missing(cell, records) for cell in cells),
        "of": len(cells),
        "out": f"{claim.OUT:.0%}",
        "times": times,
        "resamples": resamples,
        "held": claim.HELD,
    }
    loader = FileSystemLoader(os.path.dirname(os.path.abspath(__file__)))
    made = Environment(
        loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    write_file(page, made.get_template("page.md.j2").render(values))
    return page
