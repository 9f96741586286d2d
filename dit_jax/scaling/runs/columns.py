"""Rows of a CSV, under our names for its columns: those of a published table have others."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest

from dit_jax.error import UsageError, alike
from dit_jax.files import numbered
from dit_jax.scaling.runs.cells import COLUMNS, agrees, condition, nearest, opened


@dataclass(frozen=True)
class Columns:
    """`names`: our name of a column -> the CSV's; `where`: COLUMN=VALUE texts, in the CSV's names, that a row must agree with."""

    names: Mapping = field(default_factory=dict)
    where: Sequence[str] = ()


@dataclass(frozen=True)
class Expected:
    """The columns a reader knows. `required` must be there; of each pair of `either` one must."""

    required: tuple
    optional: tuple
    either: tuple = ()

    @property
    def known(self) -> tuple:
        return (*self.required, *(name for pair in self.either for name in pair), *self.optional)


def parse_names(texts: Sequence[str]) -> dict:
    """OURS=THEIRS texts, as `--column` takes them."""
    names = {}
    for text in texts:
        ours, equals, theirs = (part.strip() for part in text.partition("="))
        if not (ours and equals and theirs):
            raise UsageError(f"--column: found {text!r}, expected OURS=THEIRS, for example params='Model Size'")
        if ours in names:
            raise UsageError(f"--column: found {ours!r} twice, expected it once")
        names[ours] = theirs
    return names


def read_rows(file: str, expected: Expected, columns: Columns) -> Iterator[tuple[dict, str]]:
    """(column -> cell, file and line) of each row that `columns.where` takes.

    Every row has all columns, None where it is shorter than the header. Raises UsageError, naming the file, on columns that are
    missing, doubled or seem misspelt, and on rows longer than the header.
    """
    wanted = [condition(text) for text in columns.where]
    _check_encoding(file)
    with opened(file, "r", newline="", encoding="utf-8-sig", errors="replace") as lines:
        text = (line for _, line in numbered(lines, file))
        head = next(text, "")
        reader = csv.reader(chain([head], text), delimiter=_separator(head), skipinitialspace=True, strict=True)
        theirs = [c.strip() for c in next(reader, [])]
        ours = _ours(file, theirs, expected, columns.names)
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            at = f"{file}:{reader.line_num}"
            _check_length(cells, theirs, at)
            if agrees(dict(zip_longest(theirs, cells[: len(theirs)])), wanted, at):
                yield {name: cell for name, cell in zip_longest(ours, cells[: len(ours)]) if name}, at


def _check_encoding(file: str) -> None:
    with opened(file, "rb") as data:
        if data.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise UsageError(f"{file}: found UTF-16, expected UTF-8: save the table as CSV in UTF-8")


def _separator(head: str) -> str:
    """Commas, but where the header has none: spreadsheets also separate by semicolons or tabs."""
    return next((s for s in (";", "\t") if s in head), ",") if "," not in head else ","


def _check_length(cells: list, columns: list, where: str) -> None:
    """Cells beyond the header would shift a number into another column's place."""
    if any(cell.strip() for cell in cells[len(columns) :]):
        raise UsageError(f"{where}: found {len(cells)} fields, expected {len(columns)} as in the header")


def _ours(file: str, theirs: list, expected: Expected, names: Mapping) -> list:
    """Our name of each column, checked; "" of one whose name another column has been given."""
    if len(theirs) > COLUMNS:
        raise UsageError(f"{file}: found {len(theirs):,} columns, expected at most {COLUMNS:,}")
    for name, column in names.items():
        if name not in expected.known:
            raise UsageError(f"--column: no column {name!r} is known, expected one of {', '.join(expected.known)}")
        if column not in theirs:
            raise UsageError(f"{file}: no column {column!r}, which --column names; {nearest(column, theirs)}")
    given = {column: name for name, column in names.items()}
    if len(given) < len(names):
        raise UsageError("--column: found one column under two names, expected each once")
    alike = _other_case(theirs, expected)
    ours = [given.get(column, "" if column in names else alike.get(column, column)) for column in theirs]
    _check_columns(file, ours, expected, misspelt=not names)
    return ours


def _other_case(theirs: list, expected: Expected) -> dict:
    """Columns that are ours but for capitals, where no other column is."""
    lower = [column.lower() for column in theirs]
    return {c: c.lower() for c in theirs if c.lower() in expected.known and lower.count(c.lower()) == 1}


def _check_columns(file: str, ours: list, expected: Expected, misspelt: bool) -> None:
    for name in expected.known:
        if ours.count(name) > 1:
            raise UsageError(f"{file}: found the column {name!r} twice, expected it once")
    for names in (*((name,) for name in expected.required), *expected.either):
        if not set(names) & set(ours):
            missing, found = " or ".join(map(repr, names)), nearest(names[0], filter(None, ours))
            raise UsageError(
                f"{file}: no column {missing}; {found}; --column {names[0]}=NAME says that another one is it"
            )
    absent = [name for name in expected.known if name not in ours]
    for column in ours if misspelt else ():  # a misspelt optional column would silently fall back to its default
        near = alike(column.lower(), absent, cutoff=0.85)
        if column not in expected.known and near:
            raise UsageError(f"{file}: unknown column {column!r}; did you mean {near[0]!r}?")
