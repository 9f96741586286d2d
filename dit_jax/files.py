"""Files read and written so that nothing half-written stays behind: the one door to paths."""

import collections
import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from typing import IO

from dit_jax.error import UsageError

LONGEST = 2**20  # bytes of one JSON value or line: a config, a record, a row


LARGEST = 2**27  # bytes of a file of lines


DEEPEST = 32  # JSON lists and objects within each other


def parse_json(data: bytes, most: int = LONGEST) -> object:
    """One JSON value. Raises ValueError saying what is wrong, also for one too long, nested too deeply, or with a key twice."""
    if len(data) > most:
        raise ValueError(f"more than {most:,} bytes")
    try:
        value = json.loads(data.decode(), object_pairs_hook=_keys_once)
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} deep") from None
    inside = [value]
    for _ in range(DEEPEST + 1):
        inside = [v for x in inside for v in (x.values() if isinstance(x, dict) else x if isinstance(x, list) else ())]
    if inside:
        raise ValueError(f"nested more than {DEEPEST} deep")
    return value


def _keys_once(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {name!r} is there twice")
    return found


def numbered(lines: IO, path: str, most: float = LARGEST) -> Iterator[tuple]:
    """(number, line) of an open file. Raises UsageError at a line beyond LONGEST, or when all lines are beyond `most`."""
    number = total = 0
    while line := lines.readline(LONGEST + 1):
        number, total = number + 1, total + len(line)
        if len(line) > LONGEST:
            raise UsageError(f"{path}:{number}: found more than {LONGEST:,} bytes in a line, expected fewer")
        if total > most:
            raise UsageError(f"{path}: found more than {most:,} bytes, expected fewer; split the file")
        yield number, line


def write_file(path: str, text: str) -> None:
    """Write a text file whole or not at all."""
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        with open(temporary, "w") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[str]:
    """A folder to write into, which gets the name `path` when all went well and is removed when not.

    `path` must not exist, or be an empty folder. What a killed job left behind is removed by the next one.
    """
    path = os.path.abspath(path)
    unfinished = path + ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    os.makedirs(unfinished)
    try:
        yield unfinished
        sync(unfinished)
        os.rename(unfinished, path)
        sync(os.path.dirname(path))
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def file_sha256(path: str) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sync(path: str) -> None:
    """Make a file, or the names in a folder, last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_json(path: str, name: str = "--json", makes_folders: bool = False) -> None:
    """Raises UsageError when a report could not be written there, before it is measured. `makes_folders`: its writer does."""
    folder = os.path.dirname(os.path.abspath(path))
    if path and (os.path.isdir(path) or path.endswith(os.sep)):
        raise UsageError(
            f"{name}: found the folder {path!r}, expected a file, such as {os.path.join(path, 'report.json')!r}"
        )
    while makes_folders and not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if path and not os.path.isdir(folder):
        what = f"where {folder!r} is no folder" if os.path.exists(folder) else "whose folder does not exist"
        raise UsageError(f"{name}: found {path!r}, {what}")
