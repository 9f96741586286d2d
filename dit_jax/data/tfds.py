"""Images of TFDS datasets in ArrayRecord, read at random without TensorFlow; `digits` is built on first use.

`digits` is scikit-learn's copy of the test half of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak
1998): 1,797 images of 8 x 8 pixels.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import tensorflow_datasets as tfds

from dit_jax.config import DataConfig
from dit_jax.data import pixels
from dit_jax.data.captions import NAMES, checked, inside
from dit_jax.data.digits import Digits
from dit_jax.data.shard import open_shard, reading
from dit_jax.data.skip import Skips
from dit_jax.error import StorageError, UsageError, check_scheme
from dit_jax.files import bucket, create, is_file, names, read, remote
from dit_jax.files.text import LARGEST

_CHUNK = 256  # records read at a time from a whole split
_OPENERS = 16  # threads that open files
_INFO = "dataset_info.json"  # of TFDS, written last: with it a dataset is prepared
_UNREADABLE = (RuntimeError, ValueError, TypeError, KeyError, OSError)  # raised by the libraries on damaged files


@dataclass(frozen=True)
class Records:
    """The `Source` for images of one split. UsageErrors on reading name the record and its file."""

    name: str
    split: str
    source: Sized  # TFDS's, or any with `__getitems__`; images of the feature `Image` still encoded
    stored_shape: tuple  # (h, w, c) with None where it varies
    classes: int  # 0: the dataset has no labels
    files: tuple  # TFDS's file instructions: filename, skip, take
    identity: dict
    size: int  # pixels; images are cropped and resized to it
    flip: bool
    skips: Skips = field(default_factory=Skips, compare=False)
    text: str = ""  # the feature of captions; "": none
    arrays: bool = False  # the source has pixels, else encoded images
    key = "data.dataset"

    @property
    def where(self) -> str:
        return os.path.dirname(self.files[0].filename)

    @property
    def image_shape(self) -> tuple:
        return (self.size, self.size, self.stored_shape[-1])

    def name_of(self, index: int) -> str:
        """Name a record for messages."""
        return f"dataset {self.name!r}, split {self.split!r}, record {index} of {_holder(self.files, index)}"

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, dict]:
        """Read uint8 (b, size, size, c), and {"label": int32 (b,)} or {}. Raises UsageError if a record is malformed."""
        shape = (self.size, self.size)
        images, cond = self.scaled(indices, [shape] * len(indices))
        return pixels.crops(images, shape), cond

    def scaled(self, indices: np.ndarray, shapes: Sequence[tuple[int, int]]) -> tuple[np.ndarray, dict]:
        """Read each image scaled to cover its shape (h, w), as an array (b,) of arrays uint8 (H, W, c), and `cond` as `read`."""
        records = zip(indices.tolist(), self._stored(indices), shapes, strict=True)
        found, images = [self._checked(*record) for record in records], np.empty(len(indices), object)
        for i, (image, _) in enumerate(found):
            images[i] = image
        return images, {"label": np.array([label for _, label in found], np.int32)} if self.classes else {}

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        """Read heights and widths (b, 2) as the images stand, encoded ones from their heads. Raises UsageError as `read`."""
        images = zip(indices.tolist(), (record["image"] for record in self._stored(indices)), strict=True)
        return np.array(
            [image.shape[:2] if isinstance(image, np.ndarray) else self._size(i, image) for i, image in images]
        )

    def _size(self, index: int, encoded: bytes | str) -> tuple[int, int]:
        try:
            return pixels.size_of(encoded)
        except Exception as error:  # decoders raise any error on bytes that are no image
            raise UsageError(f"{self.name_of(index)}: cannot read the image's size: {pixels.reason(error)}") from error

    def encoded(self, indices: np.ndarray) -> list[tuple[int, bytes]]:
        """Read (label, the image's file or a PNG of its pixels) at `indices`. Raises UsageError as `read` does."""
        records = self._stored(indices)
        square = (self.size, self.size)
        labels = [self._checked(i, record, square)[1] for i, record in zip(indices.tolist(), records, strict=True)]
        files = (pixels.png(record["image"]) if self.arrays else record["image"] for record in records)
        return list(zip(labels, files, strict=True))

    @property
    def captions(self) -> Callable | None:
        return self._captions if self.text else None

    def _captions(self, indices: np.ndarray) -> list[tuple[str, ...]]:
        return [
            checked(f"{self.name_of(i)}: {self.text}", inside(record[self.text]))
            for i, record in zip(indices.tolist(), self._stored(indices), strict=True)
        ]

    def training(self, arrays: np.ndarray, positions: np.ndarray, seed: int) -> np.ndarray:
        return pixels.to_float(pixels.flip(arrays, positions, seed) if self.flip else arrays)

    def evaluation(self, arrays: np.ndarray) -> np.ndarray:
        return pixels.to_float(arrays)

    def overlaps(self, other: "Records") -> bool:
        """Return whether two splits of one dataset share a record."""

        def spans(records):
            return [(f.filename, f.skip, f.skip + f.take if f.take >= 0 else math.inf) for f in records.files]

        return any(x[0] == y[0] and x[1] < y[2] and y[1] < x[2] for x in spans(self) for y in spans(other))

    def describe(self) -> dict:
        """Describe the split for a protocol; the first call reads all of it for the checksum."""
        return {
            "dataset": self.name,
            "split": self.split,
            "records": len(self),
            "classes": self.classes,
            "image_shape": list(self.stored_shape),
            "sha256": self._checksum,
        }

    @functools.cached_property
    def _checksum(self) -> str:
        """SHA-256 over the records in order: a line "<bytes> <shape> <label>" and the image's bytes (encoded, or else pixels).

        The files' own bytes differ between builds, because TFDS writes a record's fields in the order of a hash table.
        """
        digest = hashlib.sha256()
        for start in range(0, len(self), _CHUNK):
            for record in self._stored(np.arange(start, min(start + _CHUNK, len(self)))):
                image = record["image"]
                content = image if isinstance(image, bytes) else image.tobytes()
                label = record["label"] if self.classes else ""
                digest.update(f"{len(content)} {np.shape(image)} {label}\n".encode() + content)
        return digest.hexdigest()

    def _stored(self, indices: np.ndarray) -> list[dict]:
        """Read records as TFDS stores them, images of the feature `Image` as encoded bytes."""
        try:
            return self._some(indices.tolist())
        except (StorageError, UsageError):
            raise
        except _UNREADABLE as error:
            if not self.files:  # a folder's: what is wrong with a picture is a UsageError
                raise
            index, why = int(indices[0]), error
        for i in indices.tolist():
            try:
                self._some([i])
            except StorageError:
                raise
            except _UNREADABLE as error:
                index, why = i, error
                break
        where = f"dataset {self.name!r}, split {self.split!r}, record {index}"
        what = f"cannot read {_holder(self.files, index)}: {pixels.reason(why)}"
        raise UsageError(f"{where}: {what}; {_advice(self.files)}") from why

    def _some(self, indices: list[int]) -> list[dict]:
        with reading(self.where):
            return self.source.__getitems__(indices)

    def _checked(self, index: int, record: dict, shape: tuple[int, int]) -> tuple[np.ndarray, int]:
        """Decode, check and scale a record: (image that covers `shape`, label), label 0 without labels."""
        where, image, channels = self.name_of(index), record["image"], self.stored_shape[-1]
        if not isinstance(image, np.ndarray):
            try:
                image = pixels.open_picture(image, channels)
            except Exception as error:  # decoders raise any error on bytes that are no image
                raise UsageError(
                    f"{where}: cannot decode the image ({channels} channels): {pixels.reason(error)}"
                ) from error
        stored, eight = isinstance(image, np.ndarray), np.dtype(np.uint8)
        dtype, whole = (image.dtype, image.shape) if stored else (eight, (*image.size[::-1], channels))
        fits = len(whole) == 3 and all(n in (None, m) for n, m in zip(self.stored_shape, whole, strict=True))
        if dtype != eight or not fits:
            found = f"{dtype} {whole}"
            raise UsageError(f"{where}: found an image {found}, expected uint8 {self.stored_shape}")
        label = int(record["label"]) if self.classes else 0
        if not 0 <= label < max(self.classes, 1):
            raise UsageError(f"{where}: found label {label}, expected 0 to {self.classes - 1}")
        try:
            return pixels.cover(image, shape), label
        except ValueError as error:
            raise UsageError(f"{where}: cannot resize the image: {error}") from error


def open_split(data: DataConfig, split: str) -> Records:
    """Open one split of a TFDS dataset prepared in ArrayRecord; `digits` is built on first use.

    `data.dataset` and `split` are TFDS's (`imagenet2012`, `train[:90%]`). Raises UsageError if dataset, format, split or
    features are unsuitable, StorageError if a bucket refuses.
    """
    name = data.dataset
    builder = _builder(name, _directory(data.data_dir))
    features = builder.info.features
    classes = getattr(features["label"], "num_classes", 0) if "label" in features else 0
    if "image" not in features or ("label" in features and not classes):
        expected = "expected an image, and a class label or no `label`"
        raise UsageError(f"dataset {name!r}: found features {sorted(features)}, {expected}")
    try:
        files = builder.info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
        known = ", ".join(builder.info.splits)
        raise UsageError(f"dataset {name!r}: found split {split!r}, expected one of {known}") from error
    if not files:
        raise UsageError(f"dataset {name!r}, split {split!r}: found no records, expected at least one")
    with ThreadPoolExecutor(_OPENERS) as pool:
        where = f"dataset {name!r}, split {split!r}"
        list(pool.map(lambda file: _check_file(where, file, _advice(files)), files))
    encoded = isinstance(features["image"], tfds.features.Image)
    text = next((key for key in NAMES if key in features and _is_text(features[key])), "")
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()} if encoded else None)
    records = {"records": len(source), "sha256": _index(builder, files)}
    identity = {"name": builder.info.full_name, "split": split, **records}
    return Records(
        name, split, source, tuple(features["image"].shape), classes, tuple(files), identity,
        data.image_size, data.flip, Skips(data.skip_bad), text, not encoded,
    )  # fmt: skip


def _is_text(feature: tfds.features.FeatureConnector) -> bool:
    """Return whether a feature holds text, or is a sequence of texts or, as in COCO, of features with one called as captions are."""
    if isinstance(feature, tfds.features.Sequence):
        inner = feature.feature
        return _is_text(inside(inner) if isinstance(inner, tfds.features.FeaturesDict) else inner)
    return isinstance(feature, tfds.features.Text) and not feature.encoder


def class_names(data: DataConfig) -> tuple[str, ...]:
    """Return the names of the classes, which TFDS keeps beside the data; () if it has none. Builds nothing."""
    features = _open(data.dataset, _directory(data.data_dir)).info.features
    return tuple(getattr(features["label"], "names", None) or ()) if "label" in features else ()


def _index(builder: tfds.core.DatasetBuilder, files: Sequence) -> str:
    """SHA-256 of TFDS's notes on the files of a split: names, numbers of records, bytes of records.

    It is equal for two builds of the same data, whose files may differ.
    """
    spans = [(os.path.basename(f.filename), f.skip, f.take, f.examples_in_shard) for f in files]
    used = {os.fspath(f.filename) for f in files}
    splits = builder.info.splits.items()
    whole = [(name, info.num_bytes) for name, info in splits if used & set(map(os.fspath, info.filepaths))]
    return hashlib.sha256(json.dumps([spans, sorted(whole)]).encode()).hexdigest()


def _directory(data_dir: str) -> str:
    found = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    check_scheme("data.data_dir" if data_dir else "TFDS_DATA_DIR", found)
    return os.path.expanduser(found)


def _builder(name: str, directory: str) -> tfds.core.DatasetBuilder:
    """Return the TFDS builder of `name`, prepared in ArrayRecord. Raises UsageError."""
    builder = _open(name, directory)
    if name == "digits" and not _ready(builder):
        _check_place(directory)
        builder = _build(builder, directory)
    how = "where TensorFlow is installed (pip install tensorflow-cpu; reading needs none)"
    call = (
        f"{how}, by tfds.builder({name!r}, data_dir={directory!r}, file_format='array_record').download_and_prepare()"
    )
    if not _ready(builder):
        raise UsageError(f"dataset {name!r}: found nothing in {builder.data_dir}; prepare it {call}")
    found = builder.info.file_format
    if found is not tfds.core.FileFormat.ARRAY_RECORD:
        where = f"dataset {name!r} in {builder.data_dir}"
        raise UsageError(f"{where}: found format {found.value}, expected array_record; prepare it {call}")
    return builder


def _open(name: str, directory: str) -> tfds.core.DatasetBuilder:
    """Return the TFDS builder of `name`, prepared or not. Raises UsageError on unknown names and damaged metadata."""
    if remote(directory):
        names(directory)  # TFDS's own client of buckets would report a refusal as damage
    try:
        if name == "digits":
            return Digits(data_dir=directory, file_format="array_record")
        return tfds.builder(name, data_dir=directory)
    except tfds.core.registered.DatasetNotFoundError as error:
        where = f"data.dataset: found {name!r}"
        raise UsageError(f"{where}, which is neither known to TFDS nor prepared in {directory}") from error
    except Exception as error:  # TFDS raises any error on damaged metadata
        if remote(directory) and bucket.refused_others(error):
            raise StorageError(
                f"dataset {name!r}: cannot read it now in {directory}: {pixels.reason(error)}"
            ) from error
        raise UsageError(f"dataset {name!r}: cannot open it in {directory}: {pixels.reason(error)}") from error


def _check_place(directory: str) -> None:
    """Raises UsageError if `digits` would be written among a user's files."""
    held = set(names(directory))
    if held and not held & {"digits", "downloads"} and not any(_prepared(os.path.join(directory, x)) for x in held):
        raise UsageError(
            f"data.data_dir: found {directory!r}, which holds other files and no data of TFDS, expected a new folder or one of TFDS "
            "for data.dataset = 'digits', which is built there; for other images set data.dataset (docs/data.md)"
        )


def _prepared(folder: str) -> bool:
    """Return whether a folder holds versions of a TFDS dataset."""
    versions = [os.path.join(folder, name) for name in names(folder) if re.fullmatch(r"\d+\.\d+\.\d+", name)]
    return any(is_file(os.path.join(version, _INFO)) for version in versions)


def _build(builder: Digits, directory: str) -> Digits:
    """Write the files of `digits`; for a bucket on the disk first.

    Processes may do so at once: each writes into its own directory, which TFDS renames to the final one. All renames but the
    first fail, and their processes find the dataset ready. In a bucket the first object of each name stays: they hold the same records.
    """
    if remote(directory):
        with tempfile.TemporaryDirectory(prefix="dit_jax-") as made:
            built = os.fspath(_build(_open("digits", made), made).data_dir)
            for name in sorted(names(built), key=lambda name: (name == _INFO, name)):
                create(
                    os.path.join(directory, os.path.relpath(built, made), name),
                    read(os.path.join(built, name), LARGEST),
                )
        return _open("digits", directory)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # progress bars
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    except (OSError, ValueError) as error:
        builder = _open("digits", directory)
        if not _ready(builder):
            raise UsageError(f"dataset 'digits': cannot build it in {directory}: {pixels.reason(error)}") from error
    return builder


def _ready(builder: tfds.core.DatasetBuilder) -> bool:
    return is_file(os.path.join(os.fspath(builder.data_dir), _INFO))


def _check_file(where: str, file, advice: str) -> None:
    """Raises UsageError unless a file of a split can be opened and has the number of records in TFDS's metadata."""
    path = os.fspath(file.filename)
    try:
        found = open_shard(path).num_records()
    except StorageError:
        raise
    except _UNREADABLE as error:
        raise UsageError(f"{where}: cannot read {path}: {pixels.reason(error)}; {advice}") from error
    if found != file.examples_in_shard:
        raise UsageError(f"{where}: {path}: found {found} records, expected {file.examples_in_shard}; {advice}")


def _holder(files: Sequence, index: int) -> str:
    """Return the file that holds record `index` of a split."""
    ends = itertools.accumulate(f.take if f.take >= 0 else f.examples_in_shard - f.skip for f in files)
    return next(f.filename for f, end in zip(files, ends, strict=True) if index < end)


def _advice(files: Sequence) -> str:
    return f"delete {os.path.dirname(files[0].filename)} and prepare the dataset again (digits do so themselves)"
