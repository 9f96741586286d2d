"""Rows of a table, under our names for its columns: text separated by commas, semicolons or tabs, or one JSON object a line."""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest

from dit_jax.error import UsageError, alike
from dit_jax.files import numbered, parse_json, read
from dit_jax.scaling.runs.cells import COLUMNS, agrees, condition, is_number, nearest, opened, readable

COUNTED = (
    "params",
    "tokens",
    "flops",
    "images",
    "unique_tokens",
    "unique_images",
    "flops_train",
    "flops_sample",
    "flops_step",
)
FACTOR = re.compile(r"\s*(\d[\d.]*(?:e[+-]?\d+)?)\s*\*\s*(.+)", re.IGNORECASE)  # of THEIRS in `--column OURS=THEIRS`
UNIT = re.compile(  # at the end of a column's name: "(B)", "[millions]", "_M", " in billions", "(1E21)", "(10^21 FLOPs)", "GFLOPs"
    r"(?:[(\[][x\s]*(?P<letter>[kmbgt])|[_ ](?P<suffix>(?-i:[KMBT]))|(?:^|[(\[_ ])(?P<word>thousand|million|billion|trillion)s?"
    r"|(?:^|[(\[_ ])(?P<prefix>[kmgtpezy])FLOPs?|(?:^|[(\[_ ])[x\s]*(?:1e\+?|10\^|10\*\*)(?P<power>\d+)|(?P<days>PF(?:LOP/?s)?[- ]?days?))"
    r"(?: *(?:flops?|tokens?|param\w*))?\s*[)\]]?$",
    re.IGNORECASE,
)
BOM = b"\xef\xbb\xbf"
LETTERS = {"k": 3, "m": 6, "b": 9, "g": 9, "t": 12, "p": 15, "e": 18, "z": 21, "y": 24}
WORDS = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
UNREADABLE = {  # how a file begins -> what it is
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"PK\3\4": "an archive, such as an Excel workbook",
    b"PAR1": "a Parquet file",
    b"\x1f\x8b": "a compressed file",
    b"[{": "a JSON list",
    b"[\n": "a JSON list",
}


@dataclass(frozen=True)
class Columns:
    """`names`: our name of a column -> the table's, or FACTOR*NAME; `where`: COLUMN=VALUE texts, in the table's names, that a row must
    agree with."""

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
            raise UsageError(f"--column: found {text!r}, expected OURS=THEIRS, for example params='1e6*Model Size (M)'")
        if ours in names:
            raise UsageError(f"--column: found {ours!r} twice, expected it once")
        names[ours] = theirs
    return names


def scaled(theirs: str) -> tuple[float, str]:
    """FACTOR*NAME as (factor, name); 1.0 and the text where it has no factor."""
    found = FACTOR.fullmatch(theirs)
    return (float(found[1]), found[2]) if found and is_number(found[1]) else (1.0, theirs)


def unit(column: str) -> str:
    """The unit that a column's name ends with, as a factor; "" where it has none."""
    found = UNIT.search(column.strip())
    if not found:
        return ""
    letter = found["letter"] or found["suffix"] or found["prefix"]
    power = LETTERS[letter.lower()] if letter else WORDS[found["word"].lower()] if found["word"] else found["power"]
    return "8.64e19" if found["days"] else f"1e{power}"


def is_records(file: str) -> bool:
    """Whether a file holds evaluation records, and no table: by its first line, whatever its ending."""
    if file.endswith("records.jsonl"):
        return True
    line = _beginning(file).partition(b"\n")[0]
    if not (line.startswith(b"{") or (not line and file.endswith(".jsonl"))):
        return False
    try:
        return bool({"metrics", "protocol"} & set(parse_json(line)))
    except (ValueError, TypeError):
        return True  # whose reader says what is wrong with the line


def _beginning(file: str) -> bytes:
    """The first bytes of a file, from the first one that is no blank."""
    with readable(file):
        return read(file).lstrip(BOM + b" \t\r\n")


def read_rows(file: str, expected: Expected, columns: Columns) -> Iterator[tuple[dict, str]]:
    """(column -> cell, file and line) of each row that `columns.where` takes.

    Every row has all columns, None where it is shorter than the header. Raises UsageError, naming the file, on columns that are
    missing, doubled or seem misspelt, and on rows longer than the header.
    """
    wanted = [condition(text) for text in columns.where]
    head = _beginning(file)
    if found := next((what for start, what in UNREADABLE.items() if head.startswith(start)), ""):
        raise UsageError(f"{file}: found {found}, expected UTF-8: save the table as CSV in UTF-8, or as JSON lines")
    rows = (_objects if head.startswith(b"{") else _delimited)(file)
    theirs = [c.strip() for c in next(rows, (0, []))[1]]
    ours, factors = _ours(file, theirs, expected, columns.names)
    for number, cells in rows:
        if not any(cell.strip() for cell in cells):
            continue
        at = f"{file}:{number}"
        if any(cell.strip() for cell in cells[len(theirs) :]):  # they would shift a number into another column's place
            raise UsageError(f"{at}: found {len(cells)} fields, expected {len(theirs)} as in the header")
        if agrees(dict(zip_longest(theirs, cells[: len(theirs)])), wanted, at):
            row = {name: cell for name, cell in zip_longest(ours, cells[: len(ours)]) if name}
            yield row | {name: repr(f * float(row[name])) for name, f in factors.items() if is_number(row[name])}, at


def _delimited(file: str) -> Iterator[tuple[int, list]]:
    """(line, cells) of the header and of each row below it."""
    with opened(file, newline="", encoding="utf-8-sig", errors="replace") as lines:
        text = (line for _, line in numbered(lines, file))
        head = next(text, "")
        mark = "\t" if "\t" in head else ";" if head.count(";") > head.count(",") else ","
        reader = csv.reader(chain([head], text), delimiter=mark, skipinitialspace=True, strict=True)
        for cells in reader:
            yield reader.line_num, cells


def _objects(file: str) -> Iterator[tuple[int, list]]:
    """The same of one JSON object a line; the header is all of their keys."""
    rows = []
    with opened(file) as lines:
        for number, line in numbered(lines, file):
            try:
                row = parse_json(line.removeprefix(BOM)) if line.strip() else {}
            except ValueError as error:
                raise UsageError(f"{file}:{number}: not a JSON line ({error})") from None
            if not isinstance(row, dict):
                raise UsageError(f"{file}:{number}: found {type(row).__name__}, expected a JSON object")
            rows.append((number, row))
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    yield 0, names
    for number, row in rows:
        yield number, ["" if row.get(name) is None else str(row[name]) for name in names]


def _ours(file: str, theirs: list, expected: Expected, names: Mapping) -> tuple[list, dict]:
    """(our name of each column, checked; "" of one whose name another column has been given; our name -> factor)."""
    if len(theirs) > COLUMNS:
        raise UsageError(f"{file}: found {len(theirs):,} columns, expected at most {COLUMNS:,}")
    given, factors = {}, {}
    for name, text in names.items():
        factor, column = (1.0, text) if text in theirs else scaled(text)
        if name not in expected.known:
            raise UsageError(f"--column: no column {name!r} is known, expected one of {', '.join(expected.known)}")
        if column not in theirs:
            raise UsageError(f"{file}: no column {column!r}, which --column names; {nearest(column, theirs)}")
        if column in given:
            raise UsageError("--column: found one column under two names, expected each once")
        given[column] = name
        factors |= {name: factor} if factor != 1 else {}
    units = {n: c for c, n in given.items() if n in COUNTED and unit(c) and not FACTOR.fullmatch(names[n])}
    if units:
        say = " ".join(f"--column '{name}={unit(column)}*{column}'" for name, column in units.items())
        raise UsageError(f"{file}: columns with units in their names; say {say}, or 1* where the numbers are in full")
    lower = [column.lower() for column in theirs]
    ours = []
    for column in theirs:  # one that is ours but for capitals is ours, where no other column is
        same = column.lower() if column.lower() in expected.known and lower.count(column.lower()) == 1 else column
        ours.append(given.get(column, "" if column in names or same in names else same))
    _check_columns(file, ours, expected, misspelt=not names)
    return ours, factors


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
