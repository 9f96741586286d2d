"""What a split of data is (`Source`), and the table of its kinds: one row says for which config a kind opens it."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from dit_jax.config import DataConfig
from dit_jax.data import latents, tfds
from dit_jax.data.skip import Skips


@runtime_checkable  # for the checks of types under pytest
class Source(Protocol):
    """The records of one split, read at random by several threads. Raises UsageError naming a record that cannot be read.

    `cond` is a tree of arrays with leading axis b: what a model is told of each image. Class labels are {"label": int32 (b,)};
    data without labels have {}. No other room looks into it.
    """

    key: str  # of the config that names the data, for messages
    classes: int  # 0: no labels
    image_shape: tuple  # (h, w, c) of what a model sees
    identity: (
        dict  # name, split, records, and a checksum of their index: cheap to make, JSON; what a run must go on with
    )
    skips: Skips

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, dict]:
        """Arrays as stored (b, ...) and `cond` of the records at `indices` (b,)."""

    def training(self, arrays: np.ndarray, positions: np.ndarray, seed: int) -> np.ndarray:
        """What a model is trained on, float32 (b, h, w, c), at the global positions (b,): flips and noise are functions of
        (seed, position) only."""

    def evaluation(self, arrays: np.ndarray) -> np.ndarray:
        """What a model is scored on, float32 (b, h, w, c): nothing is drawn."""

    def describe(self) -> dict:
        """What an evaluation protocol states of the split, its contents' checksum included."""

    def overlaps(self, other) -> bool:
        """Whether two splits of this kind share a record. Raises UsageError if one model cannot see both."""


@dataclass(frozen=True)
class Kind:
    """A kind of data: whether a config asks for it, and how to open one of its splits. `open` raises UsageError."""

    chosen: Callable[[DataConfig], bool]
    open: Callable[[DataConfig, str], Source]


KINDS = {  # of the rows that a config chooses, the last one opens it
    "tfds": Kind(lambda data: True, tfds.open_split),
    "latents": Kind(lambda data: bool(data.latents), latents.open_split),
}


def open_source(data: DataConfig, split: str) -> Source:
    """One split of the data that the config names. Raises UsageError if it cannot be opened."""
    return next(kind for kind in reversed(KINDS.values()) if kind.chosen(data)).open(data, split)


def bad_records(source: Source) -> dict[int, str]:
    """The malformed records met so far that were left out: number in the split -> what is wrong with it."""
    with source.skips.lock:
        return dict(sorted(source.skips.found.items()))


def all_of(data: DataConfig) -> DataConfig:
    """The same data, none of which may be left out: a score is of the records that its protocol names."""
    return dataclasses.replace(data, skip_bad=0)
