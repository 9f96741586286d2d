"""The records of a run, `W/eval/records.jsonl`, and what sample metrics that are under way have gathered, `W/eval/partial/`.

Records are written whole or not at all, under a lock, so that evaluations of one run may run side by side. Below `partial` is
a folder ID-STEP of each protocol and checkpoint under way, with the features of the images drawn so far (`samples.Store`).
"""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator

from dit_jax import samples
from dit_jax.command import write_file
from dit_jax.config import JobError
from dit_jax.log import RECORD, read_lines

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


def partial_folder(workdir: str, step: int, identity: str) -> str:
    """Where the features of an unfinished sample metric lie."""
    return os.path.join(workdir, PARTIAL, f"{identity}-{step}")


def drop_partials(workdir: str, done: set[tuple[int, str]], there: list[int]) -> None:
    """Remove the partials of the (step, protocol id) that are recorded, and of steps that are not among `there`."""
    root = os.path.join(workdir, PARTIAL)
    for name in os.listdir(root) if os.path.isdir(root) else []:
        match = re.fullmatch(r"([0-9a-f]{16})-(\d+)", name)
        if match and ((int(match[2]), match[1]) in done or int(match[2]) not in there):
            with (
                contextlib.suppress(JobError),
                samples.locked(os.path.join(root, name)),
            ):  # in use: its owner removes it
                samples.remove(os.path.join(root, name))
    with contextlib.suppress(OSError):  # not there, or others are under way
        os.rmdir(root)
