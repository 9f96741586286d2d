"""The records of a run, `W/eval/records.jsonl`, and the statistics of sample metrics that are under way, `W/eval/partial/`.

Both are written whole or not at all, under one lock, so that evaluations of one run may run side by side. A partial is
ID-STEP.npz with a SHA-256 of what its images depend on and of its content.
"""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dit_jax.command import write_file
from dit_jax.log import RECORD, read_lines, say
from dit_jax.metrics import frechet

RECORDS, PARTIAL = os.path.join("eval", "records.jsonl"), os.path.join("eval", "partial")


@contextlib.contextmanager
def locked(workdir: str) -> Iterator[None]:
    """Alone in writing below `W/eval`, also beside other evaluations of the same run. Held for moments only."""
    path = os.path.join(workdir, RECORDS)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def append_record(workdir: str, record: dict) -> None:
    """Add a line, whole or not at all, also beside another evaluation of the same run; what a kill cut short goes."""
    path = os.path.join(workdir, RECORDS)
    with locked(workdir):
        for unfinished in glob.glob(glob.escape(path) + ".tmp*"):
            os.unlink(unfinished)
        lines = read_lines(path, RECORD)
        if (record["step"], record["protocol_id"]) not in {(line["step"], line["protocol_id"]) for line in lines}:
            write_file(path, "".join(json.dumps(line) + "\n" for line in [*lines, record]))


@dataclass(frozen=True)
class Partial:
    """Where the statistics of an unfinished sample metric lie, and of which images they are (`describe_job`)."""

    workdir: str
    step: int
    protocol_id: str
    job: dict

    @property
    def path(self) -> str:
        return os.path.join(self.workdir, PARTIAL, f"{self.protocol_id}-{self.step}.npz")


def _checksum(partial: Partial, count, mean: np.ndarray, scatter: np.ndarray) -> str:
    digest = hashlib.sha256(json.dumps([partial.protocol_id, partial.step, partial.job, int(count)]).encode())
    for array in (mean, scatter):
        digest.update(np.ascontiguousarray(array, np.float64))
    return digest.hexdigest()


def save_partial(partial: Partial, stats: frechet.Statistics) -> None:
    """Keep the statistics of the images 0 to count - 1, whole or not at all."""
    values = {"count": np.int64(stats.count), "mean": stats.mean, "scatter": stats.scatter}
    with locked(partial.workdir):
        os.makedirs(os.path.dirname(partial.path), exist_ok=True)
        with open(partial.path + ".tmp", "wb") as f:
            np.savez(f, **values, checksum=_checksum(partial, **values))
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial.path + ".tmp", partial.path)


def load_partial(partial: Partial) -> frechet.Statistics | None:
    """What `save_partial` kept, or None. What is damaged or of other weights is dropped, with a notice."""
    if not os.path.exists(partial.path):
        return None
    try:
        with open(partial.path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            values = {name: archive[name] for name in ("count", "mean", "scatter")}
            if str(archive["checksum"]) == _checksum(partial, **values):
                return frechet.Statistics(int(values["count"]), values["mean"], values["scatter"])
    except Exception:  # the readers raise what they like on a damaged file
        pass
    say(f"warning: {partial.path}: damaged, or of other weights; its images are drawn again")
    return None


def drop_partials(workdir: str, done: set[tuple[int, str]], there: list[int]) -> None:
    """Remove the partials of the (step, protocol id) that are recorded, and of steps that are not among `there`."""
    folder = os.path.join(workdir, PARTIAL)
    if not os.path.isdir(folder):
        return
    with locked(workdir):
        for name in os.listdir(folder):
            match = re.fullmatch(r"([0-9a-f]{16})-(\d+)\.npz(\.tmp)?", name)
            if match and ((int(match[2]), match[1]) in done or int(match[2]) not in there):
                os.unlink(os.path.join(folder, name))
        with contextlib.suppress(OSError):  # others are under way
            os.rmdir(folder)
