"""Runs out of published tables, whose columns have other names than those of a CSV for `fit`."""

import csv
import os
from collections.abc import Mapping

from dit_jax.command import numbered
from dit_jax.error import UsageError
from dit_jax.scaling.runs import Run, _check_name, _nearest, _opened, _positive

FIELDS = ("params", "tokens", "loss", "flops", "images", "loss_se")  # numbers of a Run that a column may give


def load_columns(file: str | os.PathLike, columns: Mapping, where: Mapping | None = None) -> list[Run]:
    """Runs of a CSV: `columns` maps fields of Run (params, tokens, loss; optional flops, images, loss_se, name, group) to its columns, and
    `where` column names to the text that a row must have there.

    FLOPs are 6 x params x tokens where no column gives them. Raises UsageError, naming the file, on columns that are not there, rows that
    hold no number above 0, and a selection without rows.
    """
    file, where, runs = os.fspath(file), dict(where or {}), []
    missing = [name for name in ("params", "tokens", "loss") if name not in columns]
    unknown = [name for name in columns if name not in (*FIELDS, "name", "group")]
    if missing or unknown:
        raise UsageError(
            f"{file}: columns: {missing[0]!r} is missing" if missing else f"{file}: columns: {unknown[0]!r} is no field"
        )
    with _opened(file, "r", newline="", encoding="utf-8-sig") as lines:
        table = csv.DictReader((line for _, line in numbered(lines, file)), strict=True)
        for name in (*columns.values(), *where):
            if name not in (table.fieldnames or ()):
                raise UsageError(f"{file}: no column {name!r}; {_nearest(name, table.fieldnames or ())}")
        for row in table:
            if all(row[name] == text for name, text in where.items()):
                runs.append(_run(row, columns, f"{file}:{table.line_num}"))
    if not runs:
        chosen = ", ".join(f"{name}={text}" for name, text in where.items())
        raise UsageError(f"{file}: found no row{' with ' + chosen if chosen else ''}")
    return runs


def _run(row: dict, columns: Mapping, source: str) -> Run:
    numbers = {
        name: _positive(row[columns[name]], columns[name], source, name == "loss_se")
        for name in FIELDS
        if name in columns
    }
    words = {name: row[columns[name]] or "" for name in ("name", "group") if name in columns}
    for name, text in words.items():
        _check_name(text, name, source)
    numbers.setdefault("flops", 6.0 * numbers["params"] * numbers["tokens"])
    words.setdefault("name", f"N {numbers['params']:.4g}, C {numbers['flops']:.4g}")
    return Run(**words, **numbers, source=source)
