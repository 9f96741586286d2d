"""Cells of tables and fields of records: numbers and names that a fit can use, or a message that says where they are."""

import contextlib
import csv
import io
import math
from collections.abc import Collection, Iterable, Iterator
from typing import IO

from dit_jax import files
from dit_jax.error import StorageError, UsageError, alike
from dit_jax.files import LARGEST, read, remote

SMALLEST = 1e-100  # number of a run, and 1 over the largest: squares and products of such numbers are finite
COLUMNS = 1000  # of a CSV, at most; and names that are searched for a near one


@contextlib.contextmanager
def readable(file: str) -> Iterator[None]:
    """What the system or the csv module says against a file is a UsageError; what a bucket refuses stays a StorageError."""
    try:
        yield
    except StorageError:
        raise
    except (OSError, csv.Error) as error:
        raise UsageError(f"{file}: cannot be read: {error}") from None


@contextlib.contextmanager
def opened(file: str, **text) -> Iterator[IO]:
    """An open file, of bytes, or with the options `text` (see io.TextIOWrapper) of text. Raises UsageError as `readable`."""
    with readable(file), io.BytesIO(read(file, LARGEST)) if remote(file) else files.opened(file) as data:
        yield io.TextIOWrapper(data, **text) if text else data


def positive(value, name: str, where: str, zero: bool = False) -> float:
    """A finite number above 0, or at least 0 with `zero`; raises UsageError with the place."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        hint = " such as 24255731 or 2.4e7" if isinstance(value, str) and any(c.isdigit() for c in value) else ""
        raise UsageError(f"{where}: {name} is {value!r}, expected a number{hint}") from None
    if not (math.isfinite(number) and (number > 0 or (zero and number == 0))):
        raise UsageError(f"{where}: {name} is {value}, expected a finite number {'at least' if zero else 'above'} 0")
    if number and not SMALLEST <= number <= 1 / SMALLEST:
        raise UsageError(f"{where}: {name} is {value}, expected a number from {SMALLEST:g} to {1 / SMALLEST:g}")
    return number


def finite(value, name: str, where: str) -> float:
    """A finite number of any sign; raises UsageError with the place."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{where}: {name} is {value!r}, expected a finite number")
    return number


def check_name(name: str, what: str, where: str) -> None:
    """Names go to terminals and reports: raises UsageError on those that cannot be printed."""
    if not name.isprintable() or len(name) > 200:
        raise UsageError(f"{where}: {what} is {name!r}, expected at most 200 characters, all of them printable")


def nearest(name: str, found: Iterable) -> str:
    """What was found instead of `name`, for messages: the nearest, else everything."""
    found = list(found)[:COLUMNS]
    near = alike(name, [f[:100] for f in found], cutoff=0.5)
    return f"nearest found {near[0]!r}" if near else f"found {', '.join(map(str, found)) or 'nothing'}"


def condition(text: str) -> tuple[str, str]:
    """FIELD=VALUE of `--where`."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise UsageError(f"--where: found {text!r}, expected FIELD=VALUE, for example samples.sampler=ddim")
    return name, value


def agrees(fields: dict, wanted: list, where: str, known: Collection = ()) -> bool:
    """Whether flat `fields` have the wanted values; numbers are compared as numbers, and * is any value. A field that only others have
    (`known`) agrees with the empty value."""
    for name, value in wanted:
        if name not in fields and name in known:
            if value:
                return False
            continue
        if name not in fields:
            raise UsageError(f"{where}: --where: no field {name!r}; {nearest(name, fields)}")
        same = str(fields[name]) == value or (
            is_number(fields[name]) and is_number(value) and float(fields[name]) == float(value)
        )
        if not same and value != "*":
            return False
    return True


def is_number(value) -> bool:
    """Whether a cell or an option is a finite number."""
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def places(sources: Iterable[str]) -> str:
    """FILE:LINE of several runs, each file once: runs.csv:3, 7; more.csv:2."""
    files: dict = {}
    for source in sources:
        file, _, line = source.rpartition(":")
        files.setdefault(file, []).append(line)
    return "; ".join(f"{file}:{', '.join(lines)}" for file, lines in files.items())
