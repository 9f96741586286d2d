"""`latents.json`, the notes that describe the latents of one split, beside the shards.

A model sees z = (x - shift) scale, x being a sample of the posterior, or its mean (Peebles & Xie 2023, scale 0.18215). Shift
and scale are one number each, or one per channel.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import stat
import typing
from dataclasses import dataclass
from types import UnionType

import ml_dtypes
import numpy as np

from dit_jax.error import StorageError, UsageError, shown
from dit_jax.files import parse_json, read, remote

NOTES = "latents.json"
VERSION = 1
ADVICE = "delete the folder and encode again, or restore the file"
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
_HEADER = [("crc", "<u4"), ("index", "<u8"), ("label", "<i4")]
_MAX_RECORD, _MAX_NOTES, MAX_SHARDS = 1 << 26, 1 << 22, 10_000  # bytes, bytes, files
MAX_LEFT = 10_000  # malformed records
_NOTES_KEYS = {"version": int, "records": int, "content": str, "shards": list, "checksum": str}
_LISTS = {
    "class_names": list,
    "left_out": list,
    "shape": list,
    "scale": float | list,
    "shift": float | list,
}  # JSON has no tuples
_SHARD_KEYS = {"file": str, "records": int, "bytes": int, "sha256": str}


@dataclass(frozen=True)
class LatentInfo:
    """Description of the latents of one split. Raises UsageError naming an invalid field."""

    shape: tuple  # (h, w, c) of one latent
    dtype: str  # of the stored values: float16 | bfloat16 | float32
    moments: bool  # mean and log-variance are stored, else the mean only
    mirrored: bool  # the latent of the mirror image is stored too
    autoencoder: str  # its name
    autoencoder_sha256: str  # of its weights
    scale: float | tuple  # one number, or one per channel
    shift: float | tuple
    classes: int  # 0: the images have no labels
    dataset: str  # of the images: data set, split and checksum as in `describe`, and the side in pixels
    split: str
    source_sha256: str
    image_size: int
    class_names: tuple = ()  # as they were then; () if the classes have numbers only
    left_out: tuple = ()  # numbers of the split's malformed records, which have no latent; the others keep their numbers

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
        for name, low, high in (("classes", 0, 2**31 - 1), ("image_size", 1, 65536)):
            if not low <= getattr(self, name) <= high:
                raise UsageError(f"{name}: found {getattr(self, name)}, expected {low} to {high}")
        if len(self.class_names) not in (0, self.classes) or not all(type(name) is str for name in self.class_names):
            raise UsageError(
                f"class_names: found {shown(self.class_names)[:99]}, expected {self.classes} names, or none"
            )
        lowest = [-1, *self.left_out]
        if len(lowest) > MAX_LEFT or not all(type(n) is int and low < n for low, n in itertools.pairwise(lowest)):
            raise UsageError(f"left_out: found {shown(self.left_out)[:99]}, expected up to {MAX_LEFT} rising numbers")
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
        """Scale and shift as JSON values: a number, or a list of one per channel."""
        return {name: _listed(getattr(self, name)) for name in ("scale", "shift")}

    @property
    def record_shape(self) -> tuple:
        """(copies, parts, h, w, c), the shape of one record's values."""
        return (1 + self.mirrored, 1 + self.moments, *self.shape)

    @property
    def layout(self) -> np.dtype:
        """Structured dtype of one record on disk."""
        stored = np.dtype(DTYPES[self.dtype])  # little-endian hosts only, because NumPy's bfloat16 has no byte order
        return np.dtype([*_HEADER, ("values", stored, self.record_shape)])


def read_info(folder: str) -> LatentInfo:
    """Read the description of the latents in `folder` without opening a shard. Raises UsageError."""
    return read_notes(os.path.join(folder, NOTES))[0]


def read_notes(path: str) -> tuple[LatentInfo, dict]:
    """Read and check notes: (description, notes). Raises UsageError."""
    notes = _load_notes(path)
    try:
        info = LatentInfo(**{f.name: _tupled(notes[f.name]) for f in dataclasses.fields(LatentInfo)})
        _check_shards(notes)
        _sha256("content", notes["content"])
        if info.left_out and info.left_out[-1] >= notes["records"] + len(info.left_out):
            raise UsageError(f"left_out: found {info.left_out[-1]}, expected numbers of the split's records")
    except UsageError as error:
        raise UsageError(f"latents {path}: {error}; {ADVICE}") from error
    return info, notes


def _load_notes(path: str) -> dict:
    """Read notes and check their keys and checksum. Raises UsageError, StorageError if a bucket refuses."""
    try:
        found = None if remote(path) else os.stat(path)
        if found and not (stat.S_ISREG(found.st_mode) and found.st_size <= _MAX_NOTES):
            raise UsageError(f"latents {path}: found no regular file of up to {_MAX_NOTES} bytes; {ADVICE}")
        notes = parse_json(read(path, _MAX_NOTES), _MAX_NOTES)
    except FileNotFoundError:
        why = "found no such file, so the latents are not complete; run encode (again)"
        raise UsageError(f"latents {path}: {why}") from None
    except StorageError:
        raise
    except OSError as error:
        raise UsageError(f"latents {path}: cannot read it: {error.strerror}") from error
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"latents {path}: found what is no JSON ({error}); {ADVICE}") from error
    try:
        if isinstance(notes, dict) and notes.get("version", VERSION) != VERSION:
            raise UsageError(f"version: found {notes['version']!r}, expected {VERSION}")
        whole = {"class_names": [], "left_out": []} | notes if isinstance(notes, dict) else notes
        _keys("notes", whole, {**LatentInfo.__annotations__, **_NOTES_KEYS, **_LISTS})
        found, stated = checksum(notes), notes["checksum"]
        if found != stated:
            raise UsageError(f"checksum: found {found}, expected {stated[:64]} (damaged or edited)")
    except UsageError as error:
        raise UsageError(f"latents {path}: {error}; {ADVICE}") from error
    return whole


def _check_shards(notes: dict) -> None:
    """Raises UsageError unless the notes list the shards of a whole split."""
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


def checksum(notes: dict) -> str:
    """Hash the notes without their checksum, SHA-256."""
    rest = {key: value for key, value in notes.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def shard_name(number: int, count: int) -> str:
    return f"latents-{number:05d}-of-{count:05d}.array_record"


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
