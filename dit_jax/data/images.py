"""Encoded images in ArrayRecord, as `encode` writes them: one folder a split, shards and `images.json` (`notes`).

A record, little-endian: CRC-32 of the rest (uint32), its number in the split (uint64), its label (int32; 0 without labels), then
strings (`shard.strings`): the file of the image, and its captions.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dit_jax.config import DataConfig
from dit_jax.data import pixels
from dit_jax.data.latent_notes import check_label
from dit_jax.data.notes import Info, check_info, read_notes
from dit_jax.data.pictures import place
from dit_jax.data.shard import ADVICE, Shards, open_shards, real, sealed, split_strings, strings
from dit_jax.data.skip import Skips
from dit_jax.data.tfds import Records
from dit_jax.error import UsageError, shown
from dit_jax.files import is_file

_HEADER = np.dtype([("crc", "<u4"), ("index", "<u8"), ("label", "<i4")])


@dataclass(frozen=True)
class ImageInfo(Info):
    """Description of the images of one split. Raises UsageError naming an invalid field."""

    form = "images"
    version = 1
    shape: tuple  # (h, w, c) as the source has it, with None where it varies
    arrays: bool  # the source has pixels, which are stored as PNG; else its files are
    identity: dict  # of the source, which a run that began with it goes on with
    classes: int  # 0: the images have no labels
    dataset: str  # of the source: data set, split and checksum as in `describe`
    split: str
    source_sha256: str
    class_names: tuple = ()
    left_out: tuple = ()
    captions_sha256: str = ""

    def __post_init__(self):
        check_info(self)
        sides = [n for n in self.shape if n is not None]
        if len(self.shape) != 3 or not all(type(n) is int and n > 0 for n in sides) or self.shape[-1] not in (1, 3, 4):
            found = shown(self.shape)[:99]
            raise UsageError(f"shape: found {found}, expected (h, w, c) of whole numbers or None, 1, 3 or 4 channels")

    def fits(self, size: int) -> bool:
        return size > _HEADER.itemsize

    def pack(self, where: str, index: int, label, image: bytes, captions: tuple = ()) -> bytes:
        header = np.zeros(1, _HEADER)
        header["index"], header["label"] = index, check_label(where, label, self.classes)
        return sealed(header.tobytes()[4:] + strings([image, *(caption.encode() for caption in captions)]))


@dataclass(frozen=True)
class Stored:
    """The images of a split, as a data source of TFDS."""

    info: ImageInfo
    shards: Shards
    numbers: np.ndarray  # (n,) of the records in the split

    def __len__(self) -> int:
        return len(self.shards)

    def __getitems__(self, indices: list[int]) -> list[dict]:
        found = self.parts(np.asarray(indices))
        decode = (lambda image: pixels.decode(image, self.info.shape[-1])) if self.info.arrays else lambda image: image
        return [{"image": decode(image), "label": label} for label, image, *_ in found]

    def parts(self, indices: np.ndarray) -> list[tuple]:
        """Return (label, file of the image, captions in UTF-8 ...) at `indices` (b,). Raises UsageError naming file and record."""
        self.shards.check(indices, stored := self.shards.read(indices))
        found = []
        for index, record in zip(indices.tolist(), stored, strict=True):
            header = np.frombuffer(record[: _HEADER.itemsize], _HEADER)[0] if self.info.fits(len(record)) else None
            if header is None or header["index"] != self.numbers[index]:
                what = f"record number {header['index']}" if header else f"{len(record)} bytes"
                expected = f"expected number {self.numbers[index]} (a duplicate, or another order)"
                raise UsageError(f"{self.shards.where(index)}: found {what}, {expected}; {ADVICE}")
            found.append((int(header["label"]), *split_strings(record[_HEADER.itemsize :])))
        return found


class Images(Records):
    """The `Source` for the stored images of one split: its batches, identity and checksum are those of the data it was made of."""

    key = "data.folder"
    class_names = property(lambda self: self.source.info.class_names)
    where = property(lambda self: self.source.shards.folder)

    def name_of(self, index: int) -> str:
        return self.source.shards.where(index)

    @property
    def captions(self) -> Callable | None:
        return self._captions if self.source.info.captions_sha256 else None

    def _captions(self, indices: np.ndarray) -> list[tuple[str, ...]]:
        return [tuple(text.decode() for text in texts) for _, _, *texts in self.source.parts(indices)]

    def overlaps(self, other: "Images") -> bool:
        """Return whether two splits are of one folder, or share a shard."""
        ours, theirs = self.source.shards, other.source.shards
        hashes = [{entry["sha256"] for entry in shards.files} for shards in (ours, theirs)]
        return real(ours.folder) == real(theirs.folder) or bool(hashes[0] & hashes[1])


def chosen(data: DataConfig) -> bool:
    """Return whether the config's folder has stored images of one of its splits, complete or not."""
    folders = [os.path.join(place(data), split) for split in (data.split, data.held_out_split)] if data.folder else []
    return any(is_file(os.path.join(folder, f"images.{end}")) for folder in folders for end in ("json", "job"))


def open_split(data: DataConfig, split: str) -> Images:
    """Open the images in `data.folder`/`split`. Raises UsageError if they cannot be opened, or are of another split."""
    if split in ("", ".", "..") or "/" in split:
        raise UsageError(f"data.split: found {split!r}, expected the name of a folder in data.folder = {data.folder!r}")
    found = open_images(os.path.join(place(data), split), data)
    if found.split != split:
        where = f"which the images in {found.where} are of"
        raise UsageError(f"data.split or data.held_out_split: found {split!r}, expected {found.split!r}, {where}")
    return found


def open_images(folder: str, data: DataConfig, verify: bool = False) -> Images:
    """Open the images in `folder`; `verify` compares the SHA-256 of its files. Raises UsageError naming the file."""
    info, notes = read_notes(folder, ImageInfo)
    shards = open_shards("images", folder, notes["shards"], verify)
    numbers = np.delete(np.arange(len(shards) + len(info.left_out)), list(info.left_out))
    without = {"records": len(shards), "left_out": len(info.left_out)} if info.left_out else {}
    return Images(
        info.dataset, info.split, Stored(info, shards, numbers), info.shape, info.classes, (), info.identity | without,
        data.image_size, data.flip, Skips(data.skip_bad),
    )  # fmt: skip
