"""Latents of an autoencoder, one folder a split: shards of ArrayRecord and `latents.json` (`latent_notes`).

A record has a fixed size, little-endian: CRC-32 of the rest (uint32), its number in the split (uint64), its label (int32; 0
without labels), then the values (copies, parts, h, w, c) in float16, bfloat16 or float32. Copies: the image and, if
`mirrored`, its mirror image. Parts: the posterior's mean and, if `moments`, its log-variance.
"""

import dataclasses
import functools
import os
import zlib
from dataclasses import dataclass, field

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from dit_jax.config import DataConfig
from dit_jax.data.counter import mirrored
from dit_jax.data.latent_notes import ADVICE, NOTES, LatentInfo, read_notes
from dit_jax.data.posterior import posterior_mean, sample_posterior
from dit_jax.data.shard import open_shard, reading
from dit_jax.data.skip import Skips
from dit_jax.error import StorageError, UsageError
from dit_jax.files import absolute, file_sha256, remote, sizes

# Bits of the exponent: all set in inf and NaN.
_EXPONENT = {"float16": ("u2", 0x7C00), "bfloat16": ("u2", 0x7F80), "float32": ("u4", 0x7F800000)}
_CRC_BYTES = 4


@dataclass(frozen=True)
class LatentRecords:
    """The `Source` for latents of one split. Threads may share it."""

    folder: str
    info: LatentInfo
    content: str  # SHA-256 of all records in order
    files: tuple  # the shards' entries in the notes
    readers: tuple
    flip: bool = False
    skips: Skips = field(default_factory=Skips, compare=False)
    key = "data.latents"
    class_names = property(lambda self: self.info.class_names)
    captions = None

    @property
    def where(self) -> str:
        return self.folder

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
        return sum(file["records"] for file in self.files)

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
        same_folder = _real(self.folder) == _real(other.folder)
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
        stored, layout = self._stored(indices), self.info.layout
        for i, record in zip(indices.tolist(), stored, strict=True):
            if len(record) != layout.itemsize:
                raise UsageError(f"{self._where(i)}: found {len(record)} bytes, expected {layout.itemsize}; {ADVICE}")
        table = np.frombuffer(b"".join(stored), layout)
        for i, record, crc in zip(indices.tolist(), stored, table["crc"].tolist(), strict=True):
            found = zlib.crc32(memoryview(record)[_CRC_BYTES:])
            if found != crc:
                raise UsageError(f"{self._where(i)}: found CRC-32 {found:08x}, expected {crc:08x}; {ADVICE}")
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
            raise UsageError(f"{self._where(int(indices[i]))}: {found}; {ADVICE}")

    def _stored(self, indices: np.ndarray) -> list[bytes]:
        """Read the records at `indices` as bytes. Raises UsageError naming file and record."""
        starts = np.cumsum([0] + [file["records"] for file in self.files])
        shards = np.searchsorted(starts, indices, "right") - 1
        stored = [b""] * len(indices)
        for shard in np.unique(shards).tolist():
            rows = np.flatnonzero(shards == shard)
            within = (indices[rows] - starts[shard]).tolist()
            try:
                found = self._some(shard, within)
            except StorageError:
                raise
            except RuntimeError:
                found = [self._one(shard, i, int(indices[row])) for i, row in zip(within, rows, strict=True)]
            for row, record in zip(rows.tolist(), found, strict=True):
                stored[row] = record
        return stored

    def _one(self, shard: int, within: int, index: int) -> bytes:
        try:
            return self._some(shard, [within])[0]
        except StorageError:
            raise
        except RuntimeError as error:
            raise UsageError(f"{self._where(index)}: cannot read it: {str(error).splitlines()[0]}; {ADVICE}") from error

    def _some(self, shard: int, within: list[int]) -> list[bytes]:
        with reading(self.folder):
            return self.readers[shard].read(within)

    def _where(self, index: int) -> str:
        ends = np.cumsum([file["records"] for file in self.files])
        file = self.files[int(np.searchsorted(ends, index, "right"))]["file"]
        return f"latents {os.path.join(self.folder, file)}, record {index}"


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
    info, notes = read_notes(os.path.join(folder, NOTES))
    there = sizes(folder) if remote(folder) else {}
    readers = tuple(_open_shard(folder, file, verify, there) for file in notes["shards"])
    return LatentRecords(folder, info, notes["content"], tuple(notes["shards"]), readers)


def _finite(values: np.ndarray, dtype: str) -> np.ndarray:
    """Test whether all values (b, ...) of each record are finite, bool (b,)."""
    kind, mask = _EXPONENT[dtype]
    bits = values.view(kind)
    if not np.any(bits & mask == mask):
        return np.ones(len(values), bool)
    return np.array([not np.any(row & mask == mask) for row in bits])


def _real(path: str) -> str:
    return absolute(path) if remote(path) else os.path.realpath(path)


def _open_shard(folder: str, shard: dict, verify: bool, there: dict) -> ArrayRecordReader:
    """Open one shard. `there`: a bucket's listing. Raises UsageError if the file is not the one in the notes."""
    path = os.path.join(folder, shard["file"])
    if os.path.dirname(_real(path)) != _real(folder):
        raise UsageError(f"latents {path}: found a link to {_real(path)}, expected a file of this folder")
    try:
        if remote(path) and shard["file"] not in there:
            raise FileNotFoundError(2, "no such object", path)
        if (size := there[shard["file"]]["bytes"] if there else os.path.getsize(path)) != shard["bytes"]:
            raise UsageError(f"latents {path}: found {size} bytes, expected {shard['bytes']}; {ADVICE}")
        if verify and (digest := file_sha256(path)) != shard["sha256"]:
            raise UsageError(f"latents {path}: found SHA-256 {digest}, expected {shard['sha256']}; {ADVICE}")
        reader = open_shard(path)
    except StorageError:
        raise
    except (OSError, RuntimeError) as error:
        raise UsageError(f"latents {path}: cannot read it: {str(error).splitlines()[0]}; {ADVICE}") from error
    records = reader.num_records()
    if records != shard["records"]:
        raise UsageError(f"latents {path}: found {records} records, expected {shard['records']}; {ADVICE}")
    return reader
