"""Evaluation records of a run, `W/eval/records.jsonl`: one JSON object per (checkpoint x protocol), written whole or not at all."""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
from collections.abc import Iterator

from dit_jax.files import write_file
from dit_jax.workdir.scalars import RECORD, read_lines

RECORDS, PARTIAL = os.path.join("eval", "records.jsonl"), os.path.join("eval", "partial")


def protocol_id(protocol: dict) -> str:
    """16 hex digits that stand for a protocol."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]


def read_records(workdir: str) -> dict[tuple[int, str], dict]:
    """(step, protocol id) -> record."""
    lines = read_lines(os.path.join(workdir, RECORDS), RECORD)
    return {(line["step"], line["protocol_id"]): line for line in lines}


@contextlib.contextmanager
def _locked(workdir: str) -> Iterator[None]:
    """Alone in writing records, also beside other evaluations of the same run. Held for moments only."""
    path = os.path.join(workdir, RECORDS)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def append_record(workdir: str, record: dict) -> None:
    """Add a line, whole or not at all, also beside another evaluation of the same run; what a kill cut short goes."""
    path = os.path.join(workdir, RECORDS)
    with _locked(workdir):
        for unfinished in glob.glob(glob.escape(path) + ".tmp*"):
            os.unlink(unfinished)
        lines = read_lines(path, RECORD)
        if (record["step"], record["protocol_id"]) not in {(line["step"], line["protocol_id"]) for line in lines}:
            write_file(path, "".join(json.dumps(line) + "\n" for line in [*lines, record]))
