"""The records of the study, docs/study/records.jsonl: what `evaluate` records of each cell, with the key `study`, and cells that failed.

A line is one JSON object, added whole or not at all, also by several processes. Nothing in it names a machine or a folder.
"""

import json
from collections.abc import Iterable, Sequence

from benchmarks.study.cells import VERSION
from dit_jax.error import UsageError, shown
from dit_jax.files import is_file, json_text, update
from dit_jax.workdir.scalars import parse_lines, read_lines

RECORDS = "docs/study/records.jsonl"
LINE = {"study": dict}  # required in a line
NOTE = {
    "version": int,
    "cell": str,
    "data": str,
    "width": int,
    "depth": int,
    "budget": (int, float),
    "seed": int,
    "objective": str,
    "share": (int, float),
}


def key_of(line: dict) -> tuple:
    """What is recorded once: a cell and a protocol, or the failure of a cell."""
    return line["study"]["cell"], line.get("protocol_id", "failed")


def append(path: str, lines: Iterable[dict]) -> None:
    """Add the lines that are not there. A record takes the place of its cell's failure."""
    lines = list(lines)

    def longer(old: bytes | None) -> str | None:
        there = parse_lines(old, path, LINE)
        scored = {line["study"]["cell"] for line in lines if "protocol_id" in line}
        kept = [line for line in there if "protocol_id" in line or line["study"]["cell"] not in scored]
        known, new = {key_of(line) for line in kept}, {}
        for line in lines:
            if key_of(line) not in known:
                new.setdefault(key_of(line), line)
        return "".join(json_text(line) + "\n" for line in [*kept, *new.values()]) if new else None

    update(path, longer)


def read(path: str) -> tuple[list[dict], dict[str, str]]:
    """The records, and why cells failed. Raises UsageError naming the line of another version of the study, or one that is no record."""
    if not is_file(path):
        return [], {}
    records, failed = [], {}
    for number, line in enumerate(read_lines(path, LINE), 1):
        note, where = line["study"], f"{path}:{number}"
        for name, kind in NOTE.items():
            if not isinstance(note.get(name), kind):
                raise UsageError(f"{where}: study.{name}: found {shown(note.get(name))}, expected {kind}")
        if note["version"] != VERSION:
            why = "remove the line, or take the code that wrote it"
            raise UsageError(f"{where}: study.version: found {note['version']}, expected {VERSION}: {why}")
        if "failed" in line:
            failed[note["cell"]] = str(line["failed"])
        else:
            records.append(line)
    return records, failed


def same_protocols(path: str, records: Sequence[dict]) -> None:
    """Raises UsageError naming the line and the field if records of one kind of data differ in what a study keeps the same."""
    first: dict = {}
    for record in records:
        protocol = record["protocol"]
        kept = {
            name: value for name, value in protocol.items() if name not in ("samples", "weights", "reuse", "held_out")
        }
        kept |= {"seed": protocol.get("samples", {}).get("seed")}
        kind = record["study"]["data"], "samples" in protocol
        where = f"{path}: {record['study']['cell']}, step {record['step']}"
        other, there = first.setdefault(kind, (kept, where))
        for name in {**other, **kept}:
            a, b = (json.dumps(one.get(name), sort_keys=True) for one in (other, kept))
            if a != b:
                raise UsageError(
                    f"{where}: protocol.{name}: found {b}, expected {a}, as in {there}; remove one of them"
                )
