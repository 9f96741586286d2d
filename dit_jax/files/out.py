"""Files and folders that a command is told to write: checked before anything is computed, and never another program's overwritten."""

import contextlib
import os
import tempfile
from collections.abc import Iterator

from dit_jax.error import UsageError
from dit_jax.files import (
    absolute,
    base,
    bucket,
    delete,
    exists,
    is_file,
    is_folder,
    json_text,
    names,
    read,
    remote,
    upload,
    whole,
    write_file,
)

HEAD = 2**13  # bytes in which a file says what wrote it
GENERATOR = {"generator": "dit_jax"}  # in a report in JSON
UNFINISHED = ".unfinished"


def holds(path: str) -> bool:
    """Whether something is at a path, other than an empty folder or what a killed `new_folder` left there."""
    if remote(path):
        return is_file(path) or (bool(names(path)) and not is_file(absolute(path) + UNFINISHED))
    return bool(names(path)) or (exists(path) and not is_folder(path))


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[str]:
    """Make a folder to write into: renamed to `path` on success, removed on failure.

    `path` must not exist, or be an empty folder. The next job removes what a killed one left behind. For a path in a bucket the folder
    is on the disk and is uploaded on success, while an object beside it says that it is not complete.
    """
    if remote(path):
        bucket.place(path)
    mark = absolute(path) + UNFINISHED
    if not remote(path):
        delete(mark)
        os.makedirs(mark)
        with whole(absolute(path), mark):
            yield mark
        return
    with tempfile.TemporaryDirectory(prefix="dit_jax-") as folder:
        os.makedirs(made := os.path.join(folder, base(path)))
        yield made
        if holds(path):
            raise FileExistsError(17, "found something there, expected nothing", path)
        write_file(mark, b"")
        delete(path)
        try:
            upload(made, path)
        except BaseException:
            with contextlib.suppress(OSError):
                delete(path)
                delete(mark)
            raise
        delete(mark)


def check_ending(name: str, path: str, ending: str) -> None:
    """Raises UsageError unless `path` is "" or ends as the one format that is written."""
    if path and not path.endswith(ending):
        raise UsageError(f"{name}: found {path!r}, expected a name that ends in {ending}")


def check_out(name: str, path: str, mark: bytes = b"") -> None:
    """Raises UsageError unless `path` is "" or in a folder that exists, and `check_free`."""
    if path and not remote(path) and not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise UsageError(f"{name}: found {path!r}, whose folder does not exist")
    check_free(name, path, mark)


def check_free(name: str, path: str, mark: bytes) -> None:
    """Raises UsageError if there is a file without `mark` in its head: what another program wrote is never overwritten."""
    if path and exists(path) and not (is_file(path) and mark in read(path, HEAD)):
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
    if path and (is_folder(path) or path.endswith(os.sep)):
        raise UsageError(
            f"{name}: found the folder {path!r}, expected a file, such as {os.path.join(path, 'report.json')!r}"
        )
    while makes_folders and not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if path and not remote(path) and not os.path.isdir(folder):
        what = f"where {folder!r} is no folder" if os.path.exists(folder) else "whose folder does not exist"
        raise UsageError(f"{name}: found {path!r}, {what}")
    if name == "--json":
        check_ending(name, path, ".json")
        check_free(name, path, json_text(GENERATOR)[1:-1].encode())
