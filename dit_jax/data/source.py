"""The interface of a split of data (`Source`), and the table of its kinds."""

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from dit_jax.config import DataConfig
from dit_jax.data import emoji, folder, images, latents, mixture, parquet, pictures, scenes, tfds, webdataset
from dit_jax.data.skip import Skips
from dit_jax.data.words import in_words
from dit_jax.error import UsageError
from dit_jax.log import say


@runtime_checkable  # for the checks of types under pytest
class Source(Protocol):
    """Records of one split, read at random by several threads. Raises UsageError naming a record that cannot be read.

    `cond` is a tree of arrays with leading axis b, the conditioning of each image: {"label": int32 (b,)} for class labels, {}
    without. It is opaque to other rooms. A source with an order or positions of its own has `make_order` or `drawn`, as `mixture`;
    pictures of several sizes have `sizes` and `scaled`, as `tfds.Records`, for `data.buckets` and `data.crop`.
    """

    key: str  # of the config that names the data, for messages
    where: str  # the folder or other place that the data come from, for messages
    classes: int  # 0: no labels
    image_shape: tuple  # (h, w, c) of what a model sees
    identity: dict  # JSON, cheap: name, split, records, checksum of their index; a resumed run needs the same
    captions: Callable | None  # (indices (b,)) -> the captions of each record, tuples of str; None: the data have none
    skips: Skips

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, dict]:
        """Read stored arrays (b, ...) and `cond` at `indices` (b,)."""

    def training(self, arrays: np.ndarray, positions: np.ndarray, seed: int) -> np.ndarray:
        """Return the model's inputs float32 (b, h, w, c), or arrays (b, ...) that the step makes them of (`networks.in_step`).

        Flips and noise depend on (seed, global position (b,)) only.
        """

    def evaluation(self, arrays: np.ndarray) -> np.ndarray:
        """Return the inputs for scoring, float32 (b, h, w, c), without random draws."""

    def describe(self) -> dict:
        """Describe the split for an evaluation protocol, with a checksum of its contents."""

    def overlaps(self, other) -> bool:
        """Return whether two splits of this kind share a record. Raises UsageError if one model cannot use both."""


@dataclass(frozen=True)
class Kind:
    """A kind of data: whether a config chooses it, how to open a split (raises UsageError), and the names of its classes."""

    chosen: Callable[[DataConfig], bool]
    open: Callable[[DataConfig, str], Source]
    names: Callable[[DataConfig], tuple[str, ...]] = lambda data: open_source(data, data.split).class_names


KINDS = {  # the last row that a config chooses opens its data
    "tfds": Kind(lambda data: True, tfds.open_split, tfds.class_names),
    "scenes": Kind(lambda data: data.dataset == scenes.NAME, scenes.open_split, lambda data: ()),
    "emoji": Kind(lambda data: data.dataset == emoji.NAME, emoji.open_split, lambda data: ()),
    "folder": Kind(lambda data: bool(data.folder), folder.open_split),
    "webdataset": Kind(lambda data: pictures.holds(data, ".tar"), webdataset.open_split, lambda data: ()),
    "parquet": Kind(lambda data: pictures.holds(data, ".parquet"), parquet.open_split),
    "images": Kind(images.chosen, images.open_split),
    "latents": Kind(lambda data: bool(data.latents), latents.open_split),
    "mixture": Kind(
        lambda data: bool(data.mixture),
        lambda data, split: mixture.open_split(data, split, open_source, class_names),
        lambda data: next(filter(None, map(class_names, data.parts)), ()),
    ),
}


def _kind(data: DataConfig) -> Kind:
    return next(kind for kind in reversed(KINDS.values()) if kind.chosen(data))


def open_source(data: DataConfig, split: str) -> Source:
    """Open a split of the config's data. Raises UsageError if it cannot be opened."""
    return in_words(_kind(data).open(data, split), data.template, lambda: class_names(data))


def class_names(data: DataConfig) -> tuple[str, ...]:
    """Return the name of each class; () without classes, or if the data are not on this machine, or do not answer."""
    for some in (data, data.images):  # latents may lack what their images have
        with contextlib.suppress(UsageError, OSError):
            if names := _kind(some := dataclasses.replace(some, template="")).names(some):
                return names
    return ()


def introduce(*opened: Source) -> None:
    """Log what each split is and where it comes from, at the start of a job."""
    for found in opened:
        about, shape = found.identity, " x ".join(map(str, found.image_shape))
        labels = f"{found.classes} classes" if found.classes else "no labels"
        if names := getattr(found, "class_names", ()):
            labels += f" ({', '.join(names[:8])}{', ...' * (len(names) > 8)})"
        labels += ", with captions" if found.captions else ""
        count = f"{len(found):,} images" if "records" in about else "images without end,"
        say(f"data: {about['name']}, {about['split']}: {count} {shape}, {labels}, from {found.where}")


def bad_records(source: Source) -> dict[int, str]:
    """Return the malformed records skipped so far: number in the split -> problem."""
    with source.skips.lock:
        return dict(sorted(source.skips.found.items()))


def all_of(data: DataConfig) -> DataConfig:
    """Forbid skipping records, because a score must cover all records of its protocol."""
    return dataclasses.replace(data, skip_bad=0)
