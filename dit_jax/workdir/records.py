"""Evaluation records of a run, `W/eval/records.jsonl`: one JSON object per (checkpoint x protocol), written whole or not at all.

In a bucket each is an object of its own, `W/eval/records/STEP-PROTOCOL.json`.
"""

import hashlib
import json
import os

from dit_jax.files import create, json_text, remote, update
from dit_jax.workdir.scalars import RECORD, parse_lines, read_lines, segments

RECORDS, PARTIAL = os.path.join("eval", "records.jsonl"), os.path.join("eval", "partial")


def protocol_id(protocol: dict) -> str:
    """Hash a protocol to 16 hex digits."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]


def place(workdir: str) -> str:
    """Return the file of a run's records, in a bucket their folder."""
    path = os.path.join(workdir, RECORDS)
    return segments(path) if remote(path) else path


def read_records(workdir: str) -> dict[tuple[int, str], dict]:
    """Read {(step, protocol id): record}."""
    lines = read_lines(os.path.join(workdir, RECORDS), RECORD)
    return {(line["step"], line["protocol_id"]): line for line in lines}


def append_record(workdir: str, record: dict) -> None:
    """Add a record atomically, also beside other evaluations of the run; a line cut short by a kill is removed."""
    path = os.path.join(workdir, RECORDS)
    if remote(path):
        name = f"{record['step']:010d}-{record['protocol_id']}.json"
        create(os.path.join(segments(path), name), json_text(record) + "\n")
        return

    def longer(old: bytes | None) -> str | None:
        lines = parse_lines(old, path, RECORD)
        if (record["step"], record["protocol_id"]) in {(line["step"], line["protocol_id"]) for line in lines}:
            return None
        return "".join(json_text(line) + "\n" for line in [*lines, record])

    update(path, longer)
