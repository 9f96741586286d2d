"""Malformed records that may be skipped: how many at most, and which were found.

In training, malformed record i is replaced by the next good one of i + 1, i + 2, ... (modulo the size). The choice depends on the records
only, not on batches, processes or resuming. Each process counts the ones it found since it started.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dit_jax.error import UsageError

_SHOWN = 3  # errors quoted when there are too many


@dataclass(frozen=True)
class Skips:
    """Malformed records found so far in one source. `cap` 0: the first is an error. Threads may share it."""

    cap: int = 0
    found: dict = field(default_factory=dict)  # index -> what is wrong with it
    lock: object = field(default_factory=threading.Lock)

    def note(self, index: int, error: UsageError) -> None:
        """Count record `index` once. Raises UsageError if that makes more than `cap`."""
        with self.lock:
            known = {**self.found, index: str(error)}
            if len(known) <= self.cap:
                self.found[index] = str(error)
                return
        first = " | ".join(known[i] for i in sorted(known)[:_SHOWN])
        where = f"data.skip_bad: found {len(known)} malformed records, expected at most {self.cap}"
        raise UsageError(f"{where}; the first: {first}") from error

    def instead(self, index: int, size: int) -> int:
        """Return the record in place of `index`: itself, or the next not known as malformed."""
        for i in range(index, index + size):
            if i % size not in self.found:
                return i % size
        raise UsageError(f"data.skip_bad: found all {size} records malformed; the first: {self.found[index]}")


def read_good(read: Callable, indices: np.ndarray, size: int, skips: Skips):
    """Call `read(indices)` of a source of `size` records, with the next good record in place of each malformed one.

    `read` raises UsageError for a malformed record, and so does this beyond `skips.cap` of them.
    """
    while True:
        wanted = np.array([skips.instead(int(i), size) for i in indices]) if skips.found else indices
        try:
            return read(wanted)
        except UsageError:
            if not skips.cap or not _note_bad(read, wanted, skips):
                raise


def read_kept(read: Callable, indices: np.ndarray, skips: Skips) -> tuple[np.ndarray, object]:
    """Return (which of `indices` are good, bool (b,), what `read` returns for those, None without any). Raises as `read_good`."""
    while True:
        good = np.array([int(i) not in skips.found for i in indices], bool)
        try:
            return good, read(indices[good]) if good.any() else None
        except UsageError:
            if not skips.cap or not _note_bad(read, indices[good], skips):
                raise


def _note_bad(read: Callable, indices: np.ndarray, skips: Skips) -> bool:
    """Count the records of `indices` that cannot be read; returns False if there are none."""
    bad = False
    for index in np.unique(indices):
        try:
            read(index[None])
        except UsageError as error:
            skips.note(int(index), error)
            bad = True
    return bad
