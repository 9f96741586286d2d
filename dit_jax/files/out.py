"""Files that a command is told to write: checked before anything is computed, and never another program's overwritten."""

import os

from dit_jax.error import UsageError
from dit_jax.files import exists, is_file, is_folder, json_text, read, remote, write_file

HEAD = 2**13  # bytes in which a file says what wrote it
GENERATOR = {"generator": "dit_jax"}  # in a report in JSON


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
