"""The records of one split, written by all processes of a job: progress, what was left out, and stopping together."""

import itertools
from collections.abc import Callable, Iterator

import jax
import numpy as np

from dit_jax.data.shard_writer import Hosts
from dit_jax.data.source import Source, bad_records
from dit_jax.devices.processes import agree, agreed, by_leader, leader, of_all
from dit_jax.error import Interrupted, UsageError
from dit_jax.log import drawing_progress, say, warn

AT_ONCE = 256  # captions read at a time


def write_split(
    folder: str,
    source: Source,
    rows: int,
    batches_of: Callable[[np.ndarray], Iterator],
    examples: Callable[[Iterator], Iterator],
    write: Callable[[Callable, Hosts], None],
    stop: list,
) -> None:
    """Write a split by `write(examples_of, hosts)`, as `shard_writer` needs both. All processes of the job call it.

    `batches_of(indices)` yields batches of `rows` records, (which are good, bool (b,), those that are, more); `examples` turns them
    into one example for each record, None for a malformed one. Captions are added if there are any. Raises Interrupted when `stop`
    fills.
    """
    size = len(source)

    def go_on() -> None:
        """Raise Interrupted on all processes if one is to stop."""
        if agree(bool(stop)):
            raise Interrupted(f"{folder}: not complete; the same command goes on from the shards that are")

    def examples_of(indices: np.ndarray) -> Iterator[tuple | None]:
        counts = of_all(len(indices))
        before = size - sum(counts)
        say(f"{folder}: {sum(counts):,} images to encode" + (f", {before:,} were before" if before else ""))
        progress, own = drawing_progress(0, size), max(len(indices), 1)  # all hosts are about as far as this one
        report = lambda done: progress(before + sum(counts) * done // own)  # noqa: E731
        return _told(source, indices, examples(_watched(batches_of(indices), -(-max(counts) // rows), go_on, report)))

    def step(work: Callable) -> object:
        go_on()
        return by_leader(work)

    write(examples_of, Hosts(jax.process_index(), jax.process_count(), step, agreed))
    malformed = sorted(itertools.chain(*of_all(list(bad_records(source).items()))))
    for index, problem in malformed if leader() else ():
        warn(f"record {index} is left out: {problem}")


def captions_of(source: Source, indices: np.ndarray) -> Iterator[tuple[str, ...]]:
    """Yield the captions of each record, read some at a time."""
    for start in range(0, len(indices), AT_ONCE) if source.captions else ():
        yield from source.captions(indices[start : start + AT_ONCE])


def _told(source: Source, indices: np.ndarray, examples: Iterator) -> Iterator[tuple | None]:
    """Add captions to examples that are not None, if there are any."""
    words = captions_of(source, indices)
    for example in examples:
        said = (next(words),) if source.captions else ()
        yield example and (*example, *said)


def _watched(batches: Iterator, rounds: int, go_on: Callable[[], None], report: Callable[[int], None]) -> Iterator:
    """Yield the batches, empty ones after them up to `rounds`, and report the images so far. Calls `go_on()` before each."""
    done = 0
    for _ in range(rounds):
        go_on()
        yield (batch := next(batches, (np.zeros(0, bool), np.zeros((0, 1, 1, 1)), {})))
        done += len(batch[0])
        report(done)


def check_left_out(folder: str, left_out: tuple, allowed: int) -> None:
    """Raises UsageError if more malformed records were left out of a split than this command allows."""
    if len(left_out) > allowed:
        raise UsageError(
            f"data.skip_bad: found {allowed}, expected at least {len(left_out)}: {folder!r} is made{without(left_out)}; "
            "mend the images and delete the folder, or use another --out"
        )


def without(left_out: tuple) -> str:
    """Say what was left out; "" for nothing."""
    few = ", ".join(map(str, left_out[:5])) + ", ..." * (len(left_out) > 5)
    return f" without {len(left_out)} malformed records: {few}" if left_out else ""
