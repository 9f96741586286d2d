"""Where images come from: TFDS datasets in ArrayRecord, read at random without TensorFlow; the digits build themselves.

Every source is a sequence of records `{"image": uint8 (h, w, c), "label": int}`. `digits` is scikit-learn's copy of the
test half of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998): 1,797 images of 8 x 8 pixels.
"""

import contextlib
import hashlib
import io
import itertools
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from dit_jax.data.shard import open_shard
from dit_jax.data.skip import Skips
from dit_jax.error import UsageError

CHUNK = 256  # records read at a time when a whole split is walked
_OPENERS = 16  # threads that open files
_UNREADABLE = (RuntimeError, ValueError, TypeError, KeyError, OSError)  # what the libraries raise on damaged files


class Digits(tfds.core.GeneratorBasedBuilder):
    """The 1,797 digits of `sklearn.datasets.load_digits`, in their order there.

    A grey level v in 0..16 is stored as u = `(255 v + 8) // 16`, that is 255 v / 16 rounded to nearest (0 -> 0,
    8 -> 128, 16 -> 255); `(16 u + 127) // 255` gives v back. Of each class, images number 4, 9, 14, ... are `test`, the
    others `train`.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Every 5th image of a class is held out."}  # noqa: RUF012, TFDS reads a class attribute

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8, encoding=tfds.features.Encoding.BYTES)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits, 8 x 8 pixels, from scikit-learn.",
            homepage="https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html",
            features=tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(num_classes=10)}),
            supervised_keys=("image", "label"),
            disable_shuffling=True,  # record i is the i-th image of the split
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(False), "test": self._generate_examples(True)}

    def _generate_examples(self, held_out: bool):
        from sklearn.datasets import load_digits  # seconds to import, and needed once

        levels, labels = load_digits(return_X_y=True)
        images = ((255 * levels.astype(np.int64) + 8) // 16).astype(np.uint8).reshape(-1, 8, 8, 1)
        seen = np.zeros(10, np.int64)
        for i, label in enumerate(labels):
            if (seen[label] % 5 == 4) == held_out:
                yield i, {"image": images[i], "label": int(label)}
            seen[label] += 1


@dataclass(frozen=True)
class Records(Sequence):
    """Random access to one split (grain's protocol RandomAccessDataSource). Errors of reading are UsageErrors."""

    name: str
    split: str
    source: Sequence  # of TFDS; images of the feature `Image` still encoded
    image_shape: tuple  # (h, w, c) with None where it varies
    classes: int
    files: tuple  # file instructions of TFDS: filename, skip, take
    skips: Skips = field(default_factory=Skips, compare=False)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """The records at `indices`. Raises UsageError naming the record that cannot be read, and its file."""
        return [self._checked(i, record) for i, record in zip(indices, self.stored(indices), strict=True)]

    def stored(self, indices: Sequence[int]) -> list[dict]:
        """The same records as TFDS stores them: images of the feature `Image` as encoded bytes, nothing checked."""
        try:
            return self.source.__getitems__(list(indices))
        except _UNREADABLE as error:
            index, why = next(((i, e) for i in indices if (e := self._fault(i))), (indices[0], error))
        where = f"dataset {self.name!r}, split {self.split!r}, record {index}"
        raise UsageError(
            f"{where}: cannot read {_holder(self.files, index)}: {_line(why)}; {_advice(self.files)}"
        ) from why

    def _fault(self, index: int) -> Exception | None:
        """What is wrong with record `index` by itself, if anything."""
        try:
            self.source.__getitems__([index])
        except _UNREADABLE as error:
            return error
        return None

    def _checked(self, index: int, record: dict) -> dict:
        where = f"dataset {self.name!r}, split {self.split!r}, record {index} of {_holder(self.files, index)}"
        image, label = record["image"], int(record["label"])
        if not isinstance(image, np.ndarray):
            image = _decode(image, self.image_shape[-1], where)
        fits = image.ndim == 3 and all(n in (None, m) for n, m in zip(self.image_shape, image.shape, strict=True))
        if image.dtype != np.uint8 or not fits:
            found = f"{image.dtype} {image.shape}"
            raise UsageError(f"{where}: found an image {found}, expected uint8 {self.image_shape}")
        if not 0 <= label < self.classes:
            raise UsageError(f"{where}: found label {label}, expected 0 to {self.classes - 1}")
        return {"image": image, "label": label}


def load_source(name: str, split: str, data_dir: str = "", skips: Skips | None = None) -> Records:
    """The records of one split of a TFDS dataset prepared in ArrayRecord; `digits` is built on first use.

    `name` and `split` are TFDS's (`imagenet2012`, `train[:90%]`); `data_dir` "" means $TFDS_DATA_DIR, else
    ~/tensorflow_datasets. Raises UsageError where dataset, format, split or features are not what is needed.
    """
    builder = _builder(name, _directory(data_dir))
    features = builder.info.features
    if not {"image", "label"} <= set(features) or not getattr(features["label"], "num_classes", 0):
        raise UsageError(f"dataset {name!r}: found features {sorted(features)}, expected an image and a class label")
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
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()} if encoded else None)
    shape, classes = tuple(features["image"].shape), features["label"].num_classes
    return Records(name, split, source, shape, classes, tuple(files), skips or Skips())


def overlap(a: Records, b: Records) -> bool:
    """Whether two splits of one dataset share a record."""

    def spans(records):
        return [(f.filename, f.skip, f.skip + f.take if f.take >= 0 else math.inf) for f in records.files]

    return any(x[0] == y[0] and x[1] < y[2] and y[1] < x[2] for x in spans(a) for y in spans(b))


def describe(name: str, split: str, data_dir: str = "") -> dict:
    """What an evaluation protocol states of a split: `dataset, split, records, classes, image_shape, sha256`.

    The checksum is over the records in order: for each a line "<bytes> <shape> <label>", then the image's bytes, encoded as
    stored or else pixels. Files would not do: their bytes differ from build to build, as TFDS writes the fields of a
    record in the order of a hash table. Reads the whole split. Raises UsageError as `load_source`, and on damaged files.
    """
    records, digest = load_source(name, split, data_dir), hashlib.sha256()
    for start in range(0, len(records), CHUNK):
        for record in records.stored(range(start, min(start + CHUNK, len(records)))):
            image = record["image"]
            content = image if isinstance(image, bytes) else image.tobytes()
            digest.update(f"{len(content)} {np.shape(image)} {record['label']}\n".encode() + content)
    return {
        "dataset": name,
        "split": split,
        "records": len(records),
        "classes": records.classes,
        "image_shape": list(records.image_shape),
        "sha256": digest.hexdigest(),
    }


def _directory(data_dir: str) -> str:
    return os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


def _builder(name: str, directory: str) -> tfds.core.DatasetBuilder:
    """The prepared TFDS builder of `name`, in ArrayRecord. Raises UsageError."""
    builder = _open(name, directory)
    if name == "digits" and not _ready(builder):
        builder = _build(builder, directory)
    call = f"tfds.builder({name!r}, data_dir={directory!r}, file_format='array_record').download_and_prepare()"
    if not _ready(builder):
        raise UsageError(f"dataset {name!r}: found nothing in {builder.data_dir}; prepare it with {call}")
    found = builder.info.file_format
    if found is not tfds.core.FileFormat.ARRAY_RECORD:
        where = f"dataset {name!r} in {builder.data_dir}"
        raise UsageError(f"{where}: found format {found.value}, expected array_record; prepare it with {call}")
    return builder


def _open(name: str, directory: str) -> tfds.core.DatasetBuilder:
    """The TFDS builder of `name`, prepared or not. Raises UsageError on unknown names and damaged notes of TFDS."""
    try:
        if name == "digits":
            return Digits(data_dir=directory, file_format="array_record")
        return tfds.builder(name, data_dir=directory)
    except tfds.core.registered.DatasetNotFoundError as error:
        where = f"data.dataset: found {name!r}"
        raise UsageError(f"{where}, which is neither known to TFDS nor prepared in {directory}") from error
    except Exception as error:  # whatever TFDS trips over in files that are not what it wrote
        raise UsageError(f"dataset {name!r}: cannot open it in {directory}: {_line(error)}") from error


def _build(builder: Digits, directory: str) -> Digits:
    """Writes the digits' files.

    Many processes may do so at once: each writes into a directory of its own, which TFDS renames to the final one; all
    renames but the first fail, and find the dataset ready.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # progress bars
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    except (OSError, ValueError) as error:
        builder = _open("digits", directory)
        if not _ready(builder):
            raise UsageError(f"dataset 'digits': cannot build it in {directory}: {_line(error)}") from error
    return builder


def _ready(builder: tfds.core.DatasetBuilder) -> bool:
    return (epath.Path(builder.data_dir) / "dataset_info.json").exists()


def _decode(encoded: bytes, channels: int, where: str) -> np.ndarray:
    """An encoded image -> uint8 (h, w, channels), grey and CMYK converted as ADM does."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            pixels = np.asarray(image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels]))
    except Exception as error:  # decoders raise what they like on bytes that are no image
        raise UsageError(f"{where}: cannot decode the image ({channels} channels): {_line(error)}") from error
    return pixels.reshape(*pixels.shape[:2], channels)


def _check_file(where: str, file, advice: str) -> None:
    """Raises UsageError unless a file of a split can be opened and has as many records as TFDS noted."""
    path = os.fspath(file.filename)
    try:
        found = open_shard(path).num_records()
    except _UNREADABLE as error:
        raise UsageError(f"{where}: cannot read {path}: {_line(error)}; {advice}") from error
    if found != file.examples_in_shard:
        raise UsageError(f"{where}: {path}: found {found} records, expected {file.examples_in_shard}; {advice}")


def _holder(files: Sequence, index: int) -> str:
    """The file that holds record `index` of a split."""
    ends = itertools.accumulate(f.take if f.take >= 0 else f.examples_in_shard - f.skip for f in files)
    return next(f.filename for f, end in zip(files, ends, strict=True) if index < end)


def _advice(files: Sequence) -> str:
    return f"delete {os.path.dirname(files[0].filename)} and prepare the dataset again (digits do so themselves)"


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
