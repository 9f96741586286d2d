"""Wall time of a run by kind: `W/goodput.jsonl`, one line for every start of a job.

set-up  imports, data, restoring    compile  tracing and compiling     data  waiting for a batch    step  the training steps
save    checkpoints, records        evaluation  scoring, sampling      lost  steps of the previous start undone by a kill
wait    for the next checkpoint (`evaluate --watch`)
"""

import contextlib
import os
import time
from collections.abc import Iterator

from dit_jax.error import UsageError
from dit_jax.files import json_text, update
from dit_jax.log import say, warn
from dit_jax.workdir.scalars import METRICS, parse_lines, read_lines, stream_lines

GOODPUT = "goodput.jsonl"
LINE = {"job": str, "since": float, "wall": float, "seconds": dict}  # required in a line
KINDS = ("set-up", "compile", "data", "step", "save", "evaluation", "wait", "lost")


def process_start() -> float:
    """Return when this process began (seconds since the epoch) according to the kernel, or else now."""
    try:
        with open("/proc/self/stat") as f:
            ticks = int(f.read().rsplit(")", 1)[1].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        age = 0.0
    return time.time() - age


class Ledger:
    """A stopwatch that is always in one of KINDS, beginning with "set-up" at `since` (seconds since the epoch).

    It asks the wall clock once, when it is made, because that clock may be set while a job runs.
    """

    def __init__(self, job: str, since: float):
        self.job, self.since = job, since
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self.first = self.last = self.lost_steps = 0
        self._kind, self._then = "set-up", time.monotonic() - (time.time() - since)
        self._began = self._then

    def now(self) -> float:
        """Return the time, in seconds since the epoch by this stopwatch."""
        return self.since + time.monotonic() - self._began

    @contextlib.contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """Book the time inside as `kind` instead of the kind it interrupts."""
        before = self._switch(kind)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, kind: str) -> str:
        now = time.monotonic()
        self.seconds[self._kind] += now - self._then
        self._then, before, self._kind = now, self._kind, kind
        return before

    def entry(self) -> dict:
        """Return this start's line. `wall` is measured since `since`, not summed; `lost` is time of the previous start."""
        self._switch(self._kind)
        return {
            "job": self.job,
            "since": self.since,
            "wall": self.now() - self.since,
            "first": self.first,
            "last": self.last,
            "lost_steps": self.lost_steps,
            "seconds": dict(self.seconds),
        }


def lose(ledger: Ledger, workdir: str, restored: int) -> None:
    """Book the steps in the scalars beyond the restored checkpoint as lost; call it before `scalars.drop_after`.

    Time of steps undone by an error, not a kill, stays booked with its start; `lost_steps` counts them all the same.
    """
    ledger.first = ledger.last = restored
    with _warned(workdir):
        beyond = [line for line in stream_lines(os.path.join(workdir, METRICS)) if line["step"] > restored]
        trainings = [line for line in read_lines(os.path.join(workdir, GOODPUT), LINE) if line["job"] == "train"]
        if beyond and trainings:
            booked = trainings[-1]["since"] + trainings[-1]["wall"]  # that start's time up to its last line
            ledger.lost_steps = beyond[-1]["step"] - restored
            ledger.seconds["lost"] += max(beyond[-1]["time"] - booked, 0.0)


@contextlib.contextmanager
def _warned(workdir: str) -> Iterator[None]:
    """Log errors of the ledger as warnings, so that none ends a run."""
    try:
        yield
    except (UsageError, OSError) as error:
        warn(f"the goodput of {workdir} is not written: {error}")


def write_entry(entry: dict, workdir: str) -> None:
    """Write or renew a start's line atomically, also beside other jobs on the run; an older line never replaces a newer."""
    path, this = os.path.join(workdir, GOODPUT), (entry["job"], entry["since"])

    def renewed(old: bytes | None) -> str:
        lines = parse_lines(old, path, LINE)
        others = [line for line in lines if (line["job"], line["since"]) != this]
        newest = max([entry, *(line for line in lines if line not in others)], key=lambda line: line["wall"])
        return "".join(json_text(line) + "\n" for line in [*others, newest])

    update(path, renewed)


def note(ledger: Ledger, workdir: str) -> dict:
    """Write the current line, in case of a kill; returns it."""
    entry = ledger.entry()
    with _warned(workdir):
        write_entry(entry, workdir)
    return entry


def totals(workdir: str, running: dict) -> dict[str, float]:
    """Sum the seconds of all starts of a run's training by kind, for its records; {} without a ledger.

    `running`: the line of the job that asks, which takes the place of what it has written so far.
    """
    found: dict[str, float] = {}
    with _warned(workdir):
        this, lines = (running["job"], running["since"]), read_lines(os.path.join(workdir, GOODPUT), LINE)
        for line in [*(line for line in lines if (line["job"], line["since"]) != this), running]:
            if line["job"] == "train":
                found = {kind: found.get(kind, 0.0) + line["seconds"].get(kind, 0.0) for kind in KINDS}
    return found


def summary(entry: dict) -> str:
    """Format an entry: the share of steps and scoring in the time (lost work included), and the seconds of every kind."""
    total = entry["wall"] + entry["seconds"]["lost"]
    useful = entry["seconds"]["step"] + entry["seconds"]["evaluation"]
    parts = ", ".join(f"{kind} {seconds:.1f}" for kind, seconds in entry["seconds"].items() if seconds >= 0.05)
    return f"goodput {useful / max(total, 1e-9):.0%} of {total:.1f} s: {parts}"


def close(ledger: Ledger, workdir: str, quiet: bool = False) -> None:
    """Write the last entry, and log it unless `quiet`."""
    entry = note(ledger, workdir)
    if not quiet:
        say(summary(entry))
