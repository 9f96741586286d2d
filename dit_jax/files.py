"""All access to paths: read, write whole, replace if unchanged, list, delete, lock.

Nothing half-written stays behind. Nothing is appended to, because a bucket cannot append.
"""

import collections
import contextlib
import errno
import glob
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from typing import IO

from dit_jax.error import UsageError

LONGEST = 2**20  # bytes of one JSON value or line: a config, a record, a row
LARGEST = 2**27  # bytes of a file of lines
HEAD = 2**13  # bytes in which a file says what wrote it
GENERATOR = {"generator": "dit_jax"}  # in a report in JSON
DEEPEST = 32  # nesting depth of JSON lists and objects
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # raised by file systems without locks


def parse_json(data: bytes, most: int = LONGEST) -> object:
    """Parse one JSON value. Raises ValueError if it is malformed, too long, nested too deeply, or repeats a key."""
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


def json_text(value, **how) -> str:
    """Format a value as JSON, with null for NaN and infinity, which JSON lacks. `how`: as `json.dumps` takes it."""
    try:
        return json.dumps(value, allow_nan=False, **how)
    except ValueError:
        return json.dumps(_without_nan(value), allow_nan=False, **how)


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: str, most: int = LONGEST) -> bytes:
    """Read a file, but at most `most` + 1 bytes: the parser then refuses it as too long."""
    with open(path, "rb") as f:
        return f.read(most + 1)


def read_json(path: str) -> dict:
    """Read the object in a JSON file. Raises UsageError if it holds anything else, OSError if it cannot be read."""
    try:
        value = parse_json(read(path))
    except ValueError as error:
        raise UsageError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: found a {type(value).__name__}, expected an object")
    return value


def numbered(lines: IO, path: str, most: float = LARGEST) -> Iterator[tuple]:
    """Yield (number, line) of an open file. Raises UsageError if a line exceeds LONGEST, or the file `most` bytes."""
    number = total = 0
    while line := lines.readline(LONGEST + 1):
        number, total = number + 1, total + len(line)
        if len(line) > LONGEST:
            raise UsageError(f"{path}:{number}: found more than {LONGEST:,} bytes in a line, expected fewer")
        if total > most:
            raise UsageError(f"{path}: found more than {most:,} bytes, expected fewer; split the file")
        yield number, line


@contextlib.contextmanager
def whole(path: str, unfinished: str = "") -> Iterator[str]:
    """Yield a name for a file or folder to write: renamed to `path` on success, deleted on failure.

    `unfinished`: that name; by default a unique one beside `path`.
    """
    unfinished = unfinished or f"{path}.tmp{os.urandom(4).hex()}"
    try:
        yield unfinished
        sync(unfinished)
        rename(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            delete(unfinished)
        raise


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[str]:
    """Make a folder to write into: renamed to `path` on success, removed on failure.

    `path` must not exist, or be an empty folder. The next job removes what a killed one left behind.
    """
    unfinished = os.path.abspath(path) + ".unfinished"
    delete(unfinished)
    os.makedirs(unfinished)
    with whole(os.path.abspath(path), unfinished):
        yield unfinished


def write_file(path: str, content: str | bytes) -> None:
    """Write a file whole or not at all."""
    with whole(path) as unfinished, open(unfinished, "wb") as f:
        f.write(content.encode() if isinstance(content, str) else content)


def replace(path: str, content: str | bytes, old: bytes | None) -> bool:
    """Write a file whole if it still holds `old` (None: no file); returns whether it did.

    Of several processes that replace the same content, one succeeds. Leftovers of a killed one are deleted.
    """
    with lock(path + ".lock"):
        for unfinished in glob.glob(glob.escape(path) + ".tmp*"):
            delete(unfinished)
        if _content(path) != old:
            return False
        write_file(path, content)
        return True


def update(path: str, change: Callable[[bytes | None], str | bytes | None]) -> None:
    """Replace a file's content (None: no file) by `change(content)`, retrying if another process was faster.

    If `change` returns None the file stays as it is.
    """
    while True:
        old = _content(path)
        new = change(old)
        if new is None or replace(path, new, old):
            return


def _content(path: str) -> bytes | None:
    return read(path, LARGEST) if os.path.exists(path) else None


def names(folder: str) -> list[str]:
    """List a folder, sorted; [] if it does not exist."""
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def delete(path: str) -> None:
    """Delete a file, or a folder with its contents; it need not exist."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def rename(unfinished: str, path: str) -> None:
    """Rename a finished file or folder, durably: the new name survives a power cut."""
    os.replace(unfinished, path)
    sync(os.path.dirname(os.path.abspath(path)))


def file_sha256(path: str) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sync(path: str) -> None:
    """Flush a file, or the names in a folder, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def lock(path: str, busy: Exception | None = None, keep: bool = True) -> Iterator[None]:
    """Hold the lock file `path`, made with its folder, until the block ends or this process dies.

    If another process holds it, waits, or raises `busy` if given. Without `keep` the file is deleted at the end. On a file
    system without locks a notice is logged and nothing is locked.
    """
    import filelock  # here because few commands lock anything

    held = filelock.FileLock(path, fallback_to_soft=False, thread_local=False, poll_interval=0.01)
    while not held.is_locked:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        try:
            held.acquire(blocking=busy is None)
        except FileNotFoundError:  # another process has just deleted the folder
            continue
        except filelock.Timeout:
            raise busy from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            why = "no locks on this file system; run one job at a time on its folder"
            logging.getLogger("dit_jax").warning(f"notice: {path}: {why}")
            break
    try:
        yield
    finally:
        if not keep:
            delete(path)  # while it is held
        held.release()


def check_ending(name: str, path: str, ending: str) -> None:
    """Raises UsageError unless `path` is "" or ends as the one format that is written."""
    if path and not path.endswith(ending):
        raise UsageError(f"{name}: found {path!r}, expected a name that ends in {ending}")


def check_out(name: str, path: str, mark: bytes = b"") -> None:
    """Raises UsageError unless `path` is "" or in a folder that exists, and `check_free`."""
    if path and not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise UsageError(f"{name}: found {path!r}, whose folder does not exist")
    check_free(name, path, mark)


def check_free(name: str, path: str, mark: bytes) -> None:
    """Raises UsageError if there is a file without `mark` in its head: what another program wrote is never overwritten."""
    if os.path.lexists(path) and not (os.path.isfile(path) and mark in read(path, HEAD)):
        raise UsageError(
            f"{name}: {path} exists and was not written by this command, expected another name or no file there"
        )


def write_report(path: str, found: dict | list) -> None:
    """Write figures as JSON, each object marked, so that the same command may replace the file; see `check_json`."""
    marked = [GENERATOR | one for one in found] if isinstance(found, list) else GENERATOR | found
    write_file(path, json_text(marked, indent=1) + "\n")


def check_json(path: str, name: str = "--json", makes_folders: bool = False) -> None:
    """Raises UsageError if a report could not be written to `path`. `makes_folders`: its writer makes missing folders.

    With `--json` the name has to end in .json, and a file that is there has to be by `write_report`.
    """
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
    if name == "--json":
        check_ending(name, path, ".json")
        check_free(name, path, json_text(GENERATOR)[1:-1].encode())
