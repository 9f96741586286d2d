"""Captions of pictures: what a caption may be, and where a folder of picture files has them.

A picture's captions are the lines of NAME.txt beside it, or its row in `metadata.jsonl` or `metadata.csv` (in any folder above it,
`file_name` relative to that folder), as Hugging Face's `imagefolder` has them.
"""

import csv
import functools
import io
import json
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from dit_jax.error import UsageError, shown
from dit_jax.files import read
from dit_jax.files.text import LARGEST, LONGEST, numbered, parse_json
from dit_jax.log import notice

NAMES = ("caption", "captions", "text")  # of columns, keys of JSON and features of TFDS; the first counts
_METADATA = ("metadata.csv", "metadata.jsonl")
_LARGEST = 1 << 30  # bytes of a metadata file, which is read whole
_once = functools.cache(notice)  # the splits of a job list the same folder


@dataclass(frozen=True)
class Captions:
    """Captions of all records of a listing, which are read when they are asked for."""

    stamps: Sequence  # of each record: what changes if its captions do, such as the size of their file
    fetch: Callable  # (numbers of records) -> their captions, tuples of str; raises UsageError naming what is none
    missing: dict = field(default_factory=dict)  # record without a caption -> what to say of it


def inside(found):
    """Return the value of the first key of a mapping that captions have, and any other value as it is."""
    keys = [name for name in NAMES if name in found] if hasattr(found, "keys") else []
    return found[keys[0]] if keys else found


def checked(where: str, found: object) -> tuple[str, ...]:
    """Return one caption or a list of them, in UTF-8 if in bytes, without white space around. Raises UsageError naming `where`."""
    values = found if isinstance(found, (list, tuple)) else [found]
    captions = []
    for value in values:
        if not isinstance(value, (str, bytes)):
            raise UsageError(f"{where}: found {shown(value)[:50]} ({type(value).__name__}), expected text as a caption")
        try:
            text = value.decode("utf-8-sig") if isinstance(value, bytes) else value
            text.encode()  # JSON can spell halves of characters
        except UnicodeError:
            raise UsageError(f"{where}: found {shown(value)[:50]}, expected text in UTF-8; convert it") from None
        captions.append(text.strip())
    if not all(captions) or not captions:
        raise UsageError(f"{where}: found an empty caption, expected text; write one, or delete the picture")
    return tuple(captions)


def of_lines(where: str, content: bytes) -> tuple[str, ...]:
    """Return the captions of a text file, one a line. Raises UsageError naming `where`."""
    return checked(where, [line for line in content.split(b"\n") if line.strip(b"\xef\xbb\xbf \t\r")])


def of_json(where: str, content: bytes) -> tuple[str, ...]:
    """Return the captions of a JSON object; () if it has none. Raises UsageError naming `where`."""
    try:
        found = parse_json(content, LARGEST)
    except ValueError as error:
        raise UsageError(f"{where}: not readable as JSON in UTF-8 ({error})") from None
    name = next((name for name in NAMES if isinstance(found, dict) and name in found), "")
    return checked(where, found[name]) if name else ()


def in_folder(
    root: str, files: dict, pictures: dict, paths: list[str], inside: Callable
) -> tuple[Captions | None, set]:
    """Find the captions of the pictures `paths` of a folder: (captions or None, names of their files, which may be of no caption).

    `files`: all that are visible, and what `files.sizes` says of them; `pictures`: those of them that are pictures; `inside(name)`:
    whether a file is where `paths` are. Raises UsageError naming a picture with two sources of captions, or what has no picture; those
    without a caption are `missing`.
    """
    rows, used = _metadata(root, files, pictures)
    texts = _texts(root, files, pictures, inside)
    if not rows and not texts:
        return None, used
    for name in paths:
        if name in texts and name in rows:
            both = f"found captions in {texts[name]} and in {rows[name][0]}"
            raise UsageError(f"{os.path.join(root, name)}: {both}, expected one of them")
    missing = {
        i: f"{os.path.join(root, name)}: found no caption, which other pictures have; expected {os.path.splitext(name)[0]}.txt, or a row "
        f"of {' or '.join(_METADATA)}"
        for i, name in enumerate(paths)
        if name not in texts and name not in rows
    }
    sizes = {name: _size(os.path.join(root, texts[name]), files[texts[name]]) for name in paths if name in texts}
    stamps = [sizes[name] if name in sizes else json.dumps(rows[name][1] if name in rows else "") for name in paths]

    def fetch(records: list[int]) -> list[tuple[str, ...]]:
        if lacking := next((missing[i] for i in records if i in missing), ""):
            raise UsageError(lacking)
        names = [paths[i] for i in records]
        return [_read(os.path.join(root, texts[n]), sizes[n]) if n in sizes else rows[n][1] for n in names]

    return Captions(stamps, fetch, missing), used | {*texts.values()}


def _texts(root: str, files: dict, pictures: dict, inside: Callable) -> dict[str, str]:
    """Map pictures to the .txt files beside them; {} if no picture has one, so that notes beside pictures are no captions."""
    found = {name[: -len(".txt")]: name for name in files if name.lower().endswith(".txt")}
    texts, of = {}, {}
    for name in pictures:
        stem = os.path.splitext(name)[0]
        if text := found.get(stem):
            if (other := of.setdefault(text, name)) != name:
                what = f"found two pictures of this caption, {other} and {name}"
                raise UsageError(f"{os.path.join(root, text)}: {what}, expected one; rename one of them")
            texts[name] = text
    if texts and (lone := next((name for name in found.values() if name not in of and inside(name)), "")):
        what = "found a caption file without a picture beside it"
        raise UsageError(f"{os.path.join(root, lone)}: {what}, as others have one; delete it, or add its picture")
    return texts


def _size(path: str, about: dict) -> int:
    try:
        size = about["bytes"] if "bytes" in about else os.path.getsize(path)
    except FileNotFoundError:
        raise UsageError(f"{path}: found a link that leads nowhere, expected a file; delete it") from None
    if not 0 < size <= LONGEST:
        what = f"{size:,} bytes" if size else "an empty caption"
        raise UsageError(f"{path}: found {what}, expected text of up to {LONGEST:,} bytes")
    return size


def _read(path: str, size: int) -> tuple[str, ...]:
    try:
        content = read(path, size)
    except FileNotFoundError:
        content = b""
    if len(content) != size:
        raise UsageError(f"{path}: found another size than the {size:,} bytes at the start: it changed since")
    return of_lines(path, content)


def _metadata(root: str, files: dict, pictures: dict) -> tuple[dict[str, tuple[str, tuple]], set[str]]:
    """Map pictures to (row, captions) of all metadata files, and name those that have captions. Raises UsageError naming a row."""
    found, used = {}, set()
    for name in (name for name in files if posixpath.basename(name) in _METADATA):
        path = os.path.join(root, name)
        for where, file, captions in _rows(path):
            picture = posixpath.normpath(posixpath.join(posixpath.dirname(name), file))
            if picture not in pictures:
                raise UsageError(f"{where}: found file_name {file!r}, no picture here; add it, or delete the row")
            if picture in found:
                raise UsageError(f"{where}: found {picture} again, the first time in {found[picture][0]}; delete one")
            found[picture] = where, captions
            used.add(name)
    return found, used


def _rows(path: str) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield (place, file_name, captions) of each row of a metadata file; none if it has no captions, which is told."""
    try:
        content = read(path, _LARGEST).removeprefix(b"\xef\xbb\xbf")
    except FileNotFoundError:
        raise UsageError(f"{path}: found a link that leads nowhere, expected a file; delete it") from None
    if len(content) > _LARGEST:
        raise UsageError(f"{path}: found more than {_LARGEST:,} bytes, expected fewer; put one file into each folder")
    columns, rows = (_csv if path.endswith(".csv") else _jsonl)(path, content)
    named = [name for name in columns if name in NAMES]
    listed = ", ".join(map(str, columns))[:300]
    if not named:
        if columns:
            _once(f"{path}: has no captions: found the columns {listed}, none of them is called {' or '.join(NAMES)}")
        return
    if len(named) > 1 or columns.count("file_name") != 1:
        expected = f"expected file_name and one of {', '.join(NAMES)}; rename or delete the others"
        raise UsageError(f"{path}: found the columns {listed}; {expected}")
    for where, row in rows:
        for name in ("file_name", named[0]):
            if row.get(name) is None:
                raise UsageError(f"{where}: found no {name!r}, expected it in each row")
        if not isinstance(row["file_name"], str):
            raise UsageError(f"{where}: found file_name {shown(row['file_name'])[:50]}, expected text")
        yield where, row["file_name"], checked(where, row[named[0]])


def _jsonl(path: str, content: bytes) -> tuple[list[str], Iterable]:
    """Return the keys of the first line, and (place, object) of each."""

    def rows() -> Iterator[tuple[str, dict]]:
        for number, line in numbered(io.BytesIO(content), path, _LARGEST):
            try:
                row = parse_json(line) if line.strip() else None
            except ValueError as error:
                raise UsageError(f"{path}:{number}: not readable as JSON in UTF-8 ({error})") from None
            if not isinstance(row, dict | None):
                raise UsageError(f"{path}:{number}: found a {type(row).__name__}, expected an object")
            if row is not None:
                yield f"{path}:{number}", row

    return list(next(rows(), ("", {}))[1]), rows()


def _csv(path: str, content: bytes) -> tuple[list[str], Iterable]:
    """Return the columns, and (place, row) of each."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}:{line}: found what is not in UTF-8; convert it") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)

    def rows() -> Iterator[tuple[str, list[str]]]:
        try:
            yield from ((f"{path}:{reader.line_num}", row) for row in reader if row)
        except csv.Error as error:
            raise UsageError(f"{path}:{reader.line_num}: not readable as CSV ({error})") from None

    def named(every: Iterator) -> Iterator[tuple[str, dict]]:
        for where, row in every:
            if len(row) != len(columns):
                raise UsageError(f"{where}: found {len(row)} fields, expected {len(columns)}, one for each column")
            yield where, dict(zip(columns, row, strict=True))

    _, columns = next(every := rows(), ("", []))
    return columns, named(every)
