"""Latents of an autoencoder, one folder a split: shards of ArrayRecord and `latents.json` (`latent_notes`).

A record has a fixed size, little-endian: CRC-32 of the rest (uint32), its number in the split (uint64), its label (int32; 0
without labels), then the values (copies, parts, h, w, c) in float16, bfloat16 or float32. Copies: the image and, if
`mirrored`, its mirror image. Parts: the posterior's mean and, if `moments`, its log-variance. In version 2 captions follow (`strings`).
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dit_jax.config import DataConfig
from dit_jax.data.counter import mirrored
from dit_jax.data.latent_notes import LatentInfo
from dit_jax.data.notes import read_notes
from dit_jax.data.posterior import posterior_mean, sample_posterior
from dit_jax.data.shard import ADVICE, Shards, open_shards, real, split_strings
from dit_jax.data.skip import Skips
from dit_jax.error import UsageError

# Bits of the exponent: all set in inf and NaN.
_EXPONENT = {"float16": ("u2", 0x7C00), "bfloat16": ("u2", 0x7F80), "float32": ("u4", 0x7F800000)}


@dataclass(frozen=True)
class LatentRecords:
    """The `Source` for latents of one split. Threads may share it."""

    info: LatentInfo
    content: str  # SHA-256 of all records in order
    shards: Shards
    flip: bool = False
    skips: Skips = field(default_factory=Skips, compare=False)
    key = "data.latents"
    class_names = property(lambda self: self.info.class_names)
    where = folder = property(lambda self: self.shards.folder)
    files = property(lambda self: self.shards.files)

    @property
    def classes(self) -> int:
        return self.info.classes

    @property
    def image_shape(self) -> tuple:
        """(h, w, c) of the latent, which is what a model sees."""
        return self.info.shape

    @property
    def identity(self) -> dict:
        """The records, and their normalisation for a model."""
        info = self.info
        names = {"name": info.dataset, "split": info.split, "records": len(self), "sha256": self.content}
        return {**names, "autoencoder_sha256": info.autoencoder_sha256, **info.normalisation}

    @functools.cached_property
    def numbers(self) -> np.ndarray:
        """The records' numbers in the split (n,), which has others too if malformed images were left out."""
        left = list(self.info.left_out)
        return np.delete(np.arange(len(self) + len(left)), left)

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def captions(self) -> Callable | None:
        return self._captions if self.info.captions_sha256 else None

    def _captions(self, indices: np.ndarray) -> list[tuple[str, ...]]:
        self.shards.check(indices, stored := self.shards.read(indices))
        size = self.info.layout.itemsize
        return [tuple(text.decode() for text in split_strings(record[size:])) for record in stored]

    def training(self, arrays: np.ndarray, positions: np.ndarray, seed: int) -> np.ndarray:
        mirror = mirrored(seed, positions) if self.flip else None
        return sample_posterior(self.info, arrays, positions, seed, mirror)

    def evaluation(self, arrays: np.ndarray) -> np.ndarray:
        return posterior_mean(self.info, arrays)

    def overlaps(self, other: "LatentRecords") -> bool:
        """Return whether two splits share a record. Raises UsageError if autoencoder, shape, scale, shift or classes differ."""
        for name in ("autoencoder_sha256", "shape", "scale", "shift", "classes"):
            first, second = getattr(self.info, name), getattr(other.info, name)
            if first != second:
                raise UsageError(
                    f"latents {other.folder}: {name}: found {second}, expected {first}, as in {self.folder}; encode again"
                )
        shards = [{shard["sha256"] for shard in source.files} for source in (self, other)]
        same_folder = real(self.folder) == real(other.folder)
        return same_folder or self.content == other.content or bool(shards[0] & shards[1])

    def describe(self) -> dict:
        """Return the keys of every kind of data, then the origin of images and latents."""
        info = self.info
        return {
            "dataset": info.dataset,
            "split": info.split,
            "records": len(self),
            "classes": info.classes,
            "image_shape": list(info.shape),
            "sha256": self.content,
            "source_sha256": info.source_sha256,
            "autoencoder": info.autoencoder,
            "autoencoder_sha256": info.autoencoder_sha256,
            **info.normalisation,
            "latent_dtype": info.dtype,
        }

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, dict]:
        """Read stored values (b, copies, parts, h, w, c) and {"label": int32 (b,)} ({} without labels) at `indices` (b,).

        Raises UsageError naming file and record if one cannot be read, or does not fit its position and the notes.
        """
        stored, layout = self.shards.read(indices), self.info.layout
        for i, record in zip(indices.tolist(), stored, strict=True):
            if not self.info.fits(len(record)):
                where = self.shards.where(i)
                raise UsageError(f"{where}: found {len(record)} bytes, expected {layout.itemsize}; {ADVICE}")
        self.shards.check(indices, stored)
        whole = stored if not self.info.captions_sha256 else [record[: layout.itemsize] for record in stored]
        table = np.frombuffer(b"".join(whole), layout)
        self._check(indices, table)
        return table["values"], {"label": table["label"].astype(np.int32)} if self.classes else {}

    def _check(self, indices: np.ndarray, table: np.ndarray) -> None:
        """Raises UsageError unless the records' numbers, labels and values are valid."""
        place, labels, last = table["index"], table["label"], max(self.classes - 1, 0)
        numbers = self.numbers[indices]
        wrong_label = (labels < 0) | (labels > last)
        finite = _finite(table["values"], self.info.dtype)
        for i in np.flatnonzero((place != numbers) | wrong_label | ~finite)[:1].tolist():
            if place[i] != numbers[i]:
                found = f"found record number {place[i]}, expected number {numbers[i]} (a duplicate, or another order)"
            elif wrong_label[i]:
                found = f"found label {labels[i]}, expected 0 to {last}"
            else:
                found = "found NaN or infinity, expected finite values"
            raise UsageError(f"{self.shards.where(int(indices[i]))}: {found}; {ADVICE}")


def open_split(data: DataConfig, split: str) -> LatentRecords:
    """Open the latents in `data.latents`/`split`.

    Raises UsageError if they cannot be opened, are of another data set, split or image size than the config's, or lack the
    mirrored copies that `data.flip` needs in training.
    """
    if split in ("", ".", "..") or "/" in split or os.sep in split:
        expected = f"expected the name of a folder in data.latents = {data.latents!r}"
        raise UsageError(f"data.split: found {split!r}, {expected}")
    found = open_latents(os.path.join(data.latents, split))
    for key, value, expected in (
        ("data.folder" if data.folder else "data.dataset", data.name, found.info.dataset),
        ("data.split or data.held_out_split", split, found.info.split),
        ("data.image_size", data.image_size, found.info.image_size),
    ):
        if value != expected:
            where = f"which the latents in {found.folder} were encoded from"
            raise UsageError(f"{key}: found {value!r}, expected {expected!r}, {where}")
    if data.flip and split == data.split and not found.info.mirrored:
        raise UsageError(
            f"data.flip: found True, expected False, as the latents in {found.folder} hold no mirrored copies; "
            "or encode again with them"
        )
    return dataclasses.replace(found, flip=data.flip, skips=Skips(data.skip_bad))


def open_latents(folder: str, verify: bool = False) -> LatentRecords:
    """Open the latents in `folder`, comparing sizes and numbers of records; each record is checked when it is read.

    `verify` also reads every shard and compares its SHA-256. Raises UsageError naming the file.
    """
    info, notes = read_notes(folder, LatentInfo)
    return LatentRecords(info, notes["content"], open_shards("latents", folder, notes["shards"], verify))


def _finite(values: np.ndarray, dtype: str) -> np.ndarray:
    """Test whether all values (b, ...) of each record are finite, bool (b,)."""
    kind, mask = _EXPONENT[dtype]
    bits = values.view(kind)
    if not np.any(bits & mask == mask):
        return np.ones(len(values), bool)
    return np.array([not np.any(row & mask == mask) for row in bits])
