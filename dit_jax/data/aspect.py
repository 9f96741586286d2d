"""Aspect buckets: which shape (h, w) each picture is trained in, and the order of the batches, each of one bucket.

A picture goes to the bucket whose h / w is nearest to its own in log ratio, the first of several. In epoch e the n_j pictures of
bucket j are permuted by the hash that orders any epoch, and its batches of B are cut from these permutations one after another:
batch m has examples mB to (m+1)B - 1, of which example q is picture q % n_j of epoch q // n_j. What is left of an epoch so begins
the bucket's first batch of the next one, and each picture is drawn once an epoch of its bucket. Before epoch e the run has made
floor(e n_j / B) batches of bucket j; the batches of an epoch are permuted by a hash. All follows from (seed, index of the batch).
"""

import bisect
import functools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from dit_jax.config import TrainConfig
from dit_jax.data.counter import BATCHES, ORDER, hash_counters
from dit_jax.data.skip import read_good
from dit_jax.error import UsageError
from dit_jax.log import say, waiting, warn

_CHUNK = 64  # records whose sizes a thread reads at a time
_READERS = 16  # threads that read them
Shape = tuple[int, int]


@dataclass(frozen=True)
class Schedule:
    """The order of a run's batches: `counts` pictures in each bucket, `batch` in a batch."""

    counts: tuple[int, ...]
    batch: int
    seed: int

    def before(self, epoch: int) -> list[int]:
        """Batches of each bucket before an epoch."""
        return [epoch * count // self.batch for count in self.counts]

    def at(self, k: int) -> tuple[int, int]:
        """Return (bucket j, m) of batch k: it is batch m of bucket j."""
        epoch = self._epoch_of(k)
        bucket, m = _batches(self, epoch)[k - sum(self.before(epoch))]
        return int(bucket), int(m)

    def seen(self, steps: int) -> list[int]:
        """Images of each bucket in the first `steps` batches."""
        epoch = self._epoch_of(steps)
        part = _batches(self, epoch)[: steps - sum(self.before(epoch)), 0]
        more = np.bincount(part, minlength=len(self.counts)).tolist()
        return [self.batch * (m + n) for m, n in zip(self.before(epoch), more, strict=True)]

    def _epoch_of(self, k: int) -> int:
        """Return the epoch of batch k: the last before which there are at most k."""
        most = (k + len(self.counts) + 1) * self.batch // sum(self.counts) + 1
        return bisect.bisect_right(range(most + 1), k, key=lambda epoch: sum(self.before(epoch))) - 1


@functools.lru_cache(maxsize=4)
def _batches(schedule: Schedule, epoch: int) -> np.ndarray:
    """Return the batches of an epoch in order, (bucket j, m) each."""
    ends = zip(schedule.before(epoch), schedule.before(epoch + 1), strict=True)
    found = np.array([(j, m) for j, (first, end) in enumerate(ends) for m in range(first, end)], int).reshape(-1, 2)
    return found[np.argsort(hash_counters(schedule.seed, BATCHES, epoch, np.arange(len(found))), kind="stable")]


@dataclass(frozen=True, eq=False)
class Buckets:
    """The buckets of a split: their `shapes`, and the bucket of each record, `of` (n,)."""

    shapes: tuple[Shape, ...]
    of: np.ndarray

    @functools.cached_property
    def members(self) -> list[np.ndarray]:
        """Records of each bucket."""
        return [np.flatnonzero(self.of == j) for j in range(len(self.shapes))]

    @functools.cached_property
    def counts(self) -> tuple[int, ...]:
        """Records in each bucket."""
        return tuple(map(len, self.members))

    def shapes_of(self, indices: np.ndarray) -> list[Shape]:
        """Return the shape of each record."""
        return [self.shapes[j] for j in self.of[indices].tolist()]

    def batch(self, k: int, rows: int, seed: int) -> tuple[np.ndarray, Shape]:
        """Return the records (rows,) of global batch k, and its shape."""
        bucket, m = Schedule(self.counts, rows, seed).at(k)
        examples, count = np.arange(m * rows, (m + 1) * rows), self.counts[bucket]
        epochs = range(int(examples[0]) // count, int(examples[-1]) // count + 1)
        ordered = np.concatenate([_order(self, bucket, epoch, seed) for epoch in epochs])
        return ordered[examples - epochs[0] * count], self.shapes[bucket]

    def describe(self) -> list[list[int]]:
        """Return JSON: [h, w, records] of each bucket, in order, which `seen` reads."""
        return [[*shape, count] for shape, count in zip(self.shapes, self.counts, strict=True)]

    def introduce(self, batch: int) -> None:
        """Log the buckets at the start of a job, and warn of those with fewer records than a batch."""
        say(f"data.buckets: {', '.join(f'{h} x {w}: {count:,}' for h, w, count in self.describe())}")
        for shape, count in zip(self.shapes, self.counts, strict=True):
            if count < batch:
                what = (
                    f"each batch of it has a picture {batch / count:.3g} times" if count else "it is never trained on"
                )
                warn(f"data.buckets: {shape}: found {count} pictures for batches of {batch}; {what}")


@functools.lru_cache(maxsize=256)
def _order(buckets: Buckets, bucket: int, epoch: int, seed: int) -> np.ndarray:
    members = buckets.members[bucket]
    return members[np.argsort(hash_counters(seed, ORDER, epoch, members), kind="stable")]


def nearest(sizes: np.ndarray, shapes: tuple[Shape, ...]) -> np.ndarray:
    """Return the bucket (n,) for each of the sizes (n, 2)."""
    ratios = np.array([math.log(h / w) for h, w in shapes])
    return np.argmin(np.abs(np.log(sizes[:, 0] / sizes[:, 1])[:, None] - ratios[None]), axis=1)


def open_buckets(source, shapes: tuple[Shape, ...]) -> Buckets:
    """Sort all records of a `Source` into buckets by what the heads of its pictures say of their sizes, read by several threads.

    A malformed record has the size of the next good one, which is read in its place, if `data.skip_bad` allows it. Raises UsageError
    for data without pictures of several sizes.
    """
    if not hasattr(source, "sizes") or None not in (fixed := source.stored_shape[:2]):
        what = f"images of one size, {fixed[0]} x {fixed[1]}" if hasattr(source, "sizes") else "images of unknown sizes"
        raise UsageError(f"data.buckets: found {shapes} for {source.key} with {what}, expected ()")

    def read(start: int) -> np.ndarray:
        chunk = np.arange(start, min(start + _CHUNK, len(source)))
        return read_good(source.sizes, chunk, len(source), source.skips)

    with ThreadPoolExecutor(_READERS) as pool, waiting(f"reading the sizes of {len(source):,} pictures"):
        sizes = np.concatenate(list(pool.map(read, range(0, len(source), _CHUNK))))
    return Buckets(shapes, nearest(sizes, shapes))


def seen(identity: dict, train: TrainConfig, steps: int) -> dict[Shape | None, int]:
    """Images of each shape in the first steps of a training, by the `identity` of its data; without buckets all are of None."""
    counts = {(h, w): count for h, w, count in identity.get("buckets", ())}
    if not counts:
        return {None: steps * train.batch_size}
    found = Schedule(tuple(counts.values()), train.batch_size, train.seed).seen(steps)
    return dict(zip(counts, found, strict=True))
