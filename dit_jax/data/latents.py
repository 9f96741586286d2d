"""Latents of an autoencoder on disk, one folder a split: shards of ArrayRecord and `latents.json`, which says what they are.

A record has a fixed size, little-endian: CRC-32 of all that follows (uint32), its own number in the split (uint64), its
label (int32), then the values (copies, parts, h, w, c) in float16, bfloat16 or float32. Copies: the image, and its mirror
image where `mirrored`. Parts: the mean of the posterior, and its log-variance where `moments`. The latent that a model
sees is z = (x - shift) scale of a sample x of the posterior (Peebles & Xie 2023, scale 0.18215), or of its mean;
shift and scale are one number each, or one per channel.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import stat
import typing
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import UnionType

import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from dit_jax.data.shard import open_shard
from dit_jax.data.skip import Skips
from dit_jax.error import UsageError, shown
from dit_jax.files import file_sha256, parse_json, read

NOTES = "latents.json"
VERSION = 1
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
_EXPONENT = {
    "float16": ("u2", 0x7C00),
    "bfloat16": ("u2", 0x7F80),
    "float32": ("u4", 0x7F800000),
}  # all set: inf or NaN
_HEADER = [("crc", "<u4"), ("index", "<u8"), ("label", "<i4")]
_CRC_BYTES = 4
_MAX_RECORD, _MAX_NOTES, MAX_SHARDS = 1 << 26, 1 << 22, 10_000  # bytes, bytes, files
_NOTES_KEYS = {"version": int, "records": int, "content": str, "shards": list, "checksum": str}
_LISTS = {"shape": list, "scale": float | list, "shift": float | list}  # JSON has no tuples
_SHARD_KEYS = {"file": str, "records": int, "bytes": int, "sha256": str}


@dataclass(frozen=True)
class LatentInfo:
    """What the latents of one split are. Raises UsageError naming a field that cannot be."""

    shape: tuple  # (h, w, c) of one latent
    dtype: str  # of the stored values: float16 | bfloat16 | float32
    moments: bool  # mean and log-variance are stored, else the mean alone
    mirrored: bool  # the latent of the mirror image is stored too
    autoencoder: str  # its name
    autoencoder_sha256: str  # of its weights
    scale: float | tuple  # one number, or one per channel
    shift: float | tuple
    classes: int
    dataset: str  # the images: data set, split and checksum as `describe` gives them, and the side in pixels
    split: str
    source_sha256: str
    image_size: int

    def __post_init__(self):
        for name, kind in LatentInfo.__annotations__.items():
            _kind(name, getattr(self, name), kind)
        if len(self.shape) != 3 or not all(type(n) is int and 1 <= n <= 4096 for n in self.shape):
            raise UsageError(f"shape: found {self.shape!r}, expected (h, w, c) of 1 to 4096 each")
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype: found {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        for name in ("autoencoder", "dataset", "split"):
            if not 0 < len(getattr(self, name)) <= 200 or not getattr(self, name).isprintable():
                raise UsageError(f"{name}: found {getattr(self, name)[:50]!r}, expected a name of 1 to 200 characters")
        for name in ("autoencoder_sha256", "source_sha256"):
            _sha256(name, getattr(self, name))
        for name, value, high in (("classes", self.classes, 2**31 - 1), ("image_size", self.image_size, 65536)):
            if not 1 <= value <= high:
                raise UsageError(f"{name}: found {value}, expected 1 to {high}")
        self._check_normalisation()
        size = math.prod(self.record_shape) * np.dtype(DTYPES[self.dtype]).itemsize
        if size > _MAX_RECORD:
            raise UsageError(f"shape: found {size} bytes a record, expected at most {_MAX_RECORD}")

    def _check_normalisation(self) -> None:
        for name, found, low in (("scale", self.scale, 0.0), ("shift", self.shift, -math.inf)):
            numbers = found if isinstance(found, tuple) else (found,)
            if isinstance(found, tuple) and len(found) != self.shape[-1]:
                expected = f"expected one, or one for each of the {self.shape[-1]} channels"
                raise UsageError(f"{name}: found {len(found)} numbers, {expected}")
            if not all(type(number) is float and low < number < math.inf for number in numbers):
                both = f"{shown(self.scale)}, {shown(self.shift)}"
                raise UsageError(f"scale, shift: found {both}, expected finite numbers, scale above 0")

    @property
    def normalisation(self) -> dict:
        """Scale and shift as JSON gives them back: a number, or a list of one per channel."""
        return {name: _listed(getattr(self, name)) for name in ("scale", "shift")}

    @property
    def record_shape(self) -> tuple:
        """(copies, parts, h, w, c) of the values of one record."""
        return (1 + self.mirrored, 1 + self.moments, *self.shape)

    @property
    def layout(self) -> np.dtype:
        """One record as it lies on disk."""
        stored = np.dtype(DTYPES[self.dtype])  # bfloat16 has no byte order of its own: little-endian hosts only
        return np.dtype([*_HEADER, ("values", stored, self.record_shape)])


@dataclass(frozen=True)
class LatentRecords(Sequence):
    """Random access to the latents of one split (grain's protocol RandomAccessDataSource). Threads may share it."""

    folder: str
    info: LatentInfo
    content: str  # SHA-256 of all records in order
    files: tuple  # of the shards: their entries in the notes
    readers: tuple
    skips: Skips = field(default_factory=Skips, compare=False)

    @property
    def classes(self) -> int:
        return self.info.classes

    @property
    def image_shape(self) -> tuple:
        """(h, w, c) of the array a model sees: of the latent, not of the image."""
        return self.info.shape

    def __len__(self) -> int:
        return sum(file["records"] for file in self.files)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """For each index `{"latent": float32 (copies, parts, h, w, c), "label": int}`. Raises UsageError as `read`."""
        values, labels = self.read(np.asarray(indices, np.int64))
        return [{"latent": v, "label": int(n)} for v, n in zip(values.astype(np.float32), labels, strict=True)]

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values as stored (b, copies, parts, h, w, c) and labels int32 (b,) of the records at `indices` (b,).

        Raises UsageError naming file and record where one cannot be read, or is not what its place and the notes say.
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
        return table["values"], table["label"].astype(np.int32)

    def _check(self, indices: np.ndarray, table: np.ndarray) -> None:
        """Raises UsageError unless numbers, labels and values of the records are what they should be."""
        place, labels = table["index"], table["label"]
        wrong_label = (labels < 0) | (labels >= self.classes)
        finite = _finite(table["values"], self.info.dtype)
        for i in np.flatnonzero((place != indices) | wrong_label | ~finite)[:1].tolist():
            if place[i] != indices[i]:
                found = f"found record number {place[i]}, expected number {indices[i]} (a duplicate, or another order)"
            elif wrong_label[i]:
                found = f"found label {labels[i]}, expected 0 to {self.classes - 1}"
            else:
                found = "found NaN or infinity, expected finite values"
            raise UsageError(f"{self._where(int(indices[i]))}: {found}; {ADVICE}")

    def _stored(self, indices: np.ndarray) -> list[bytes]:
        """The records at `indices` as bytes. Raises UsageError naming file and record that cannot be read."""
        starts = np.cumsum([0] + [file["records"] for file in self.files])
        shards = np.searchsorted(starts, indices, "right") - 1
        stored = [b""] * len(indices)
        for shard in np.unique(shards).tolist():
            rows = np.flatnonzero(shards == shard)
            within = (indices[rows] - starts[shard]).tolist()
            try:
                found = self.readers[shard].read(within)
            except RuntimeError:
                found = [self._one(shard, i, int(indices[row])) for i, row in zip(within, rows, strict=True)]
            for row, record in zip(rows.tolist(), found, strict=True):
                stored[row] = record
        return stored

    def _one(self, shard: int, within: int, index: int) -> bytes:
        try:
            return self.readers[shard].read([within])[0]
        except RuntimeError as error:
            raise UsageError(f"{self._where(index)}: cannot read it: {str(error).splitlines()[0]}; {ADVICE}") from error

    def _where(self, index: int) -> str:
        ends = np.cumsum([file["records"] for file in self.files])
        file = self.files[int(np.searchsorted(ends, index, "right"))]["file"]
        return f"latents {os.path.join(self.folder, file)}, record {index}"


ADVICE = "delete the folder and encode again, or restore the file"


def open_latents(
    folder: str,
    *,
    dtype: str = "",
    autoencoder_sha256: str = "",
    shape: tuple = (),
    classes: int = 0,
    verify: bool = False,
    skips: Skips | None = None,
) -> LatentRecords:
    """The latents in `folder`. `dtype` to `classes` state what the caller expects; an empty value expects nothing.

    `verify` reads every shard and compares its SHA-256; without it, shards are compared in size and number of records
    here, and each record when it is read. Raises UsageError naming the file, what was found and what was expected.
    """
    path = os.path.join(folder, NOTES)
    info, notes = _read_notes(path)
    wanted = {"dtype": dtype, "autoencoder_sha256": autoencoder_sha256, "shape": tuple(shape), "classes": classes}
    for name, value in wanted.items():
        found = getattr(info, name)
        if value and found != value:
            of = f" (autoencoder {info.autoencoder!r})" if name == "autoencoder_sha256" else ""
            raise UsageError(
                f"latents {path}: {name}: found {found}{of}, expected {value}; encode again, or change that"
            )
    readers = tuple(_open_shard(folder, file, verify) for file in notes["shards"])
    return LatentRecords(folder, info, notes["content"], tuple(notes["shards"]), readers, skips or Skips())


def read_info(folder: str) -> LatentInfo:
    """What the latents in `folder` are, from the notes alone: no shard is opened. Raises UsageError as `open_latents`."""
    return _read_notes(os.path.join(folder, NOTES))[0]


def checksum(notes: dict) -> str:
    """SHA-256 over the notes but their own checksum."""
    rest = {key: value for key, value in notes.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def shard_name(number: int, count: int) -> str:
    return f"latents-{number:05d}-of-{count:05d}.array_record"


def _finite(values: np.ndarray, dtype: str) -> np.ndarray:
    """Whether all values (b, ...) of a record are finite, (b,)."""
    kind, mask = _EXPONENT[dtype]
    bits = values.view(kind)
    if not np.any(bits & mask == mask):
        return np.ones(len(values), bool)
    return np.array([not np.any(row & mask == mask) for row in bits])


def _read_notes(path: str) -> tuple[LatentInfo, dict]:
    """What the latents are, and their notes with all in them looked at. Raises UsageError."""
    notes = _load_notes(path)
    try:
        info = LatentInfo(**{f.name: _tupled(notes[f.name]) for f in dataclasses.fields(LatentInfo)})
        _check_shards(notes)
        _sha256("content", notes["content"])
    except UsageError as error:
        raise UsageError(f"latents {path}: {error}; {ADVICE}") from error
    return info, notes


def _load_notes(path: str) -> dict:
    """The notes of a folder, their keys and checksum looked at. Raises UsageError."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_NOTES:
            raise UsageError(f"latents {path}: found no regular file of up to {_MAX_NOTES} bytes; {ADVICE}")
        notes = parse_json(read(path, _MAX_NOTES), _MAX_NOTES)
    except FileNotFoundError:
        raise UsageError(
            f"latents {path}: found no such file, so the latents are not complete; run encode (again)"
        ) from None
    except OSError as error:
        raise UsageError(f"latents {path}: cannot read it: {error.strerror}") from error
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"latents {path}: found what is no JSON ({error}); {ADVICE}") from error
    try:
        if isinstance(notes, dict) and notes.get("version", VERSION) != VERSION:
            raise UsageError(f"version: found {notes['version']!r}, expected {VERSION}")
        _keys("notes", notes, {**LatentInfo.__annotations__, **_NOTES_KEYS, **_LISTS})
        found, stated = checksum(notes), notes["checksum"]
        if found != stated:
            raise UsageError(f"checksum: found {found}, expected {stated[:64]} (damaged or edited)")
    except UsageError as error:
        raise UsageError(f"latents {path}: {error}; {ADVICE}") from error
    return notes


def _check_shards(notes: dict) -> None:
    """Raises UsageError unless the shards of the notes have the names and numbers of a whole split."""
    shards, total = notes["shards"], 0
    if not 1 <= len(shards) <= MAX_SHARDS:
        raise UsageError(f"shards: found {len(shards)}, expected 1 to {MAX_SHARDS}")
    for i, shard in enumerate(shards):
        _keys(f"shards[{i}]", shard, _SHARD_KEYS)
        if shard["file"] != shard_name(i, len(shards)):
            raise UsageError(f"shards[{i}].file: found {shard['file'][:99]!r}, expected {shard_name(i, len(shards))!r}")
        for key in ("records", "bytes"):
            if not 1 <= shard[key] < 2**48:
                raise UsageError(f"shards[{i}].{key}: found {shard[key]}, expected at least 1")
        _sha256(f"shards[{i}].sha256", shard["sha256"])
        total += shard["records"]
    if notes["records"] != total:
        raise UsageError(f"records: found {notes['records']}, expected {total}, the sum over the shards")


def _open_shard(folder: str, shard: dict, verify: bool) -> ArrayRecordReader:
    """A reader of one shard. Raises UsageError where the file is not the one of the notes."""
    path = os.path.join(folder, shard["file"])
    if os.path.dirname(os.path.realpath(path)) != os.path.realpath(folder):
        raise UsageError(f"latents {path}: found a link to {os.path.realpath(path)}, expected a file of this folder")
    try:
        if (size := os.path.getsize(path)) != shard["bytes"]:
            raise UsageError(f"latents {path}: found {size} bytes, expected {shard['bytes']}; {ADVICE}")
        if verify and (digest := file_sha256(path)) != shard["sha256"]:
            raise UsageError(f"latents {path}: found SHA-256 {digest}, expected {shard['sha256']}; {ADVICE}")
        reader = open_shard(path)
    except (OSError, RuntimeError) as error:
        raise UsageError(f"latents {path}: cannot read it: {str(error).splitlines()[0]}; {ADVICE}") from error
    records = reader.num_records()
    if records != shard["records"]:
        raise UsageError(f"latents {path}: found {records} records, expected {shard['records']}; {ADVICE}")
    return reader


def _keys(name: str, found, kinds: dict) -> None:
    if not isinstance(found, dict) or set(found) != set(kinds):
        keys = sorted(found)[:20] if isinstance(found, dict) else type(found).__name__
        raise UsageError(f"{name}: found {keys}, expected the keys {sorted(kinds)}")
    for key, kind in kinds.items():
        _kind(f"{name}.{key}", found[key], kind)


def _kind(name: str, value, kind: type | UnionType) -> None:
    kinds = typing.get_args(kind) or (kind,)
    if type(value) not in kinds:
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise UsageError(f"{name}: found {shown(value)[:99]} ({type(value).__name__}), expected {expected}")


def _tupled(value):
    return tuple(value) if isinstance(value, list) else value


def _listed(value):
    return list(value) if isinstance(value, tuple) else value


def _sha256(name: str, value: str) -> None:
    if not re.fullmatch("[0-9a-f]{64}", value):
        raise UsageError(f"{name}: found {value[:70]!r}, expected the 64 hexadecimal digits of a SHA-256")
