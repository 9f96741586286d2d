"""`latents.json`, the notes that describe the latents of one split, beside the shards.

A model sees z = (x - shift) scale, x being a sample of the posterior, or its mean (Peebles & Xie 2023, scale 0.18215). Shift
and scale are one number each, or one per channel.
"""

import math
import operator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from dit_jax.data.notes import Info, check_info, listed, read_notes, sha256, word
from dit_jax.data.shard import sealed, strings
from dit_jax.error import UsageError, shown

NOTES = "latents.json"
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
_HEADER = [("crc", "<u4"), ("index", "<u8"), ("label", "<i4")]
_MAX_RECORD = 1 << 26  # bytes of values


@dataclass(frozen=True)
class LatentInfo(Info):
    """Description of the latents of one split. Raises UsageError naming an invalid field."""

    form = "latents"
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
    captions_sha256: str = ""  # of the captions of all records, as JSON lines; "": the records have none

    def __post_init__(self):
        check_info(self)
        if len(self.shape) != 3 or not all(type(n) is int and 1 <= n <= 4096 for n in self.shape):
            raise UsageError(f"shape: found {self.shape!r}, expected (h, w, c) of 1 to 4096 each")
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype: found {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        word("autoencoder", self.autoencoder)
        sha256("autoencoder_sha256", self.autoencoder_sha256)
        if not 1 <= self.image_size <= 65536:
            raise UsageError(f"image_size: found {self.image_size}, expected 1 to 65536")
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
        return listed({name: getattr(self, name) for name in ("scale", "shift")})

    @property
    def record_shape(self) -> tuple:
        """(copies, parts, h, w, c), the shape of one record's values."""
        return (1 + self.mirrored, 1 + self.moments, *self.shape)

    @property
    def layout(self) -> np.dtype:
        """Structured dtype of one record on disk."""
        stored = np.dtype(DTYPES[self.dtype])  # little-endian hosts only, because NumPy's bfloat16 has no byte order
        return np.dtype([*_HEADER, ("values", stored, self.record_shape)])

    @property
    def version(self) -> int:
        return 2 if self.captions_sha256 else 1

    def fits(self, size: int) -> bool:
        return size > self.layout.itemsize if self.captions_sha256 else size == self.layout.itemsize

    def pack(self, where: str, index: int, label, values, captions: tuple = ()) -> bytes:
        number, array = check_label(where, label, self.classes), np.asarray(values)
        if array.shape != self.record_shape or not (array.dtype.kind == "f" or array.dtype == DTYPES["bfloat16"]):
            expected = f"floating point {self.record_shape} (copies, parts, h, w, c)"
            raise UsageError(f"{where}: found an array {array.dtype} {array.shape}, expected {expected}")
        with np.errstate(over="ignore"):
            stored = array.astype(DTYPES[self.dtype])
        if not np.isfinite(stored.astype(np.float32)).all():
            largest = np.abs(array.astype(np.float32)).max()
            raise UsageError(f"{where}: found values up to {largest}, expected finite ones that {self.dtype} can hold")
        record = np.zeros(1, self.layout)
        record["index"], record["label"], record["values"] = index, number, stored
        return sealed(record.tobytes()[4:] + strings(caption.encode() for caption in captions))


def check_label(where: str, label, classes: int) -> int:
    """Return a label as int. Raises UsageError naming `where` if it is out of range."""
    try:
        number = operator.index(label)
    except TypeError:
        number = -1
    last = max(classes - 1, 0)
    if not 0 <= number <= last:
        raise UsageError(f"{where}: found label {label!r}, expected a whole number from 0 to {last}")
    return number


def read_info(folder: str) -> LatentInfo:
    """Read the description of the latents in `folder` without opening a shard. Raises UsageError."""
    return read_notes(folder, LatentInfo)[0]
