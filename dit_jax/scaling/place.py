"""The files of a report: all of them are written or none, and only over files that a report at the same place wrote."""

import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from urllib.parse import quote

from dit_jax.error import UsageError
from dit_jax.files import absolute, base, delete, is_file, make_folder, names, opened, sync, whole
from dit_jax.files.out import check_json

GENERATOR = "dit_jax scaling report"
END = 2**16  # bytes at both ends of a file in which the mark is looked for: a PDF has it at its end
BEFORE = {  # ending -> what stands in a file before the mark
    ".html": rb'<meta name="generator" content="',
    ".json": rb'^\{\s*"generator": "',
    ".png": rb"Software\0",
    ".svg": rb"<cc:Agent>\s*<dc:title>",
    ".pdf": rb"/Creator \(",
}


def data(path: str) -> str:
    """The file of data beside the page at `path`."""
    return os.path.join(os.path.dirname(absolute(path)), "report.json")


def mark(path: str) -> str:
    """What a file of the report at `path` says of who wrote it, in ASCII."""
    return f"{GENERATOR} [{quote(base(path))}]"


def owner(path: str) -> str | None:
    """The mark of the report that wrote a file; it may lack the place. None if no report did."""
    before = BEFORE.get(os.path.splitext(path)[1].lower())
    if before is None or not is_file(path):
        return None
    with opened(path) as f:
        ends = f.read(END)
        f.seek(max(f.seek(0, os.SEEK_END) - END, 0))
        ends += f.read(END)
    found = re.search(before + rb"(" + GENERATOR.encode() + rb"(?: \[[^]\s]*\])?)", ends)
    return found[1].decode() if found else None


def check(path: str, files: Iterable[str] = ()) -> None:
    """Raises UsageError if `path`, or one of the `files` that belong to it, is there and was not written by the report at `path`."""
    check_json(path, "--out", makes_folders=True)
    there = names(os.path.dirname(absolute(path)))
    for file in (path, *files, *([data(path)] if path.lower().endswith(".html") else [])):
        if base(file) in there and (found := owner(file)) not in (GENERATOR, mark(path)):
            whose = (
                f"belongs to another report, {found.removeprefix(GENERATOR)[1:]}"
                if found
                else "was not written by a report"
            )
            raise UsageError(f"--out: {file} {whose}, expected another folder, or that file moved away")


def write(path: str, files: Mapping[str, bytes]) -> None:
    """Write `files`, which are in one folder, in this order, all or none.

    Delete what the report at `path` wrote beside itself before and does not any more.

    Raises UsageError as `check`.
    """
    check(path, files)
    folder = os.path.dirname(absolute(path))
    make_folder(folder)
    with contextlib.ExitStack() as stack:
        for file, content in reversed(files.items()):  # the first to be opened gets its name last
            with open(stack.enter_context(whole(file)), "wb") as f:
                f.write(content)
            sync(f.name)  # a full disk is found out before the first file gets its name
    kept = {base(file) for file in files}
    for name in names(folder):
        if name.endswith(".png") and name not in kept and owner(os.path.join(folder, name)) == mark(path):
            delete(os.path.join(folder, name))
