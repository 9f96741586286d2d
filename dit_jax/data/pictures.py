"""Encoded pictures that lie in `data.folder`: the `Source` that all doors to such a folder share, its splits and its checks.

A door (`folder`, `webdataset`, `parquet`) lists all records of a folder. If the listing names no splits, a record is held out if the first
8 bytes of the SHA-256 of its name, as a number, are below a tenth of their range, or the lowest of all if none is.
"""

import functools
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dit_jax.config import DataConfig
from dit_jax.data import pixels
from dit_jax.data.skip import Skips
from dit_jax.error import UsageError, check_scheme
from dit_jax.files import is_folder, names, sizes

IMAGES = frozenset((".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"))
SHARDS = (".tar", ".parquet")
_SHARE = 2**64 // 10  # of the hashes: held out
_CHUNK = 256  # records read at a time from a whole split
_MOST_GROUPS = 1000  # kept in an identity


@dataclass(frozen=True)
class Listing:
    """All records that a door found in a folder. `names` are paths relative to it, of a shard's record SHARD/KEY or SHARD/ROW."""

    names: Sequence
    stamps: Sequence  # of each record: what changes if it is replaced, such as its size
    held_out: np.ndarray | None  # bool (n,); None: drawn from the names
    labels: np.ndarray | None  # (n,); None: no labels
    class_names: tuple  # () if the classes have numbers only
    fetch: Callable  # (numbers of records) -> their encoded pictures; raises UsageError naming one that cannot be read


@dataclass(frozen=True)
class Pictures:
    """The `Source` for the pictures of one split, in RGB. UsageErrors on reading name the picture."""

    where: str
    listing: Listing
    chosen: np.ndarray  # numbers of this split's records in the listing
    identity: dict
    classes: int
    size: int  # pixels; pictures are cropped and resized to it
    flip: bool
    skips: Skips = field(default_factory=Skips, compare=False)
    key = "data.folder"

    @property
    def image_shape(self) -> tuple:
        return (self.size, self.size, 3)

    def __len__(self) -> int:
        return len(self.chosen)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, dict]:
        """Read uint8 (b, size, size, 3), and {"label": int32 (b,)} or {}. Raises UsageError if a record is malformed."""
        records = self.chosen[indices]
        encoded = self.listing.fetch(records.tolist())
        images = np.stack([self._decoded(i, content) for i, content in zip(records.tolist(), encoded, strict=True)])
        return images, {"label": self.listing.labels[records].astype(np.int32)} if self.classes else {}

    def training(self, arrays: np.ndarray, positions: np.ndarray, seed: int) -> np.ndarray:
        return pixels.to_float(pixels.flip(arrays, positions, seed) if self.flip else arrays)

    def evaluation(self, arrays: np.ndarray) -> np.ndarray:
        return pixels.to_float(arrays)

    def overlaps(self, other: "Pictures") -> bool:
        """Return whether two splits of one folder share a record."""
        first, second = ({one.listing.names[i] for i in one.chosen.tolist()} for one in (self, other))
        return not first.isdisjoint(second)

    def describe(self) -> dict:
        """Describe the split for a protocol; the first call reads all of it for the checksum."""
        about = {"dataset": self.identity["name"], "split": self.identity["split"], "records": len(self)}
        return {**about, "classes": self.classes, "image_shape": [None, None, 3], "sha256": self._checksum}

    @functools.cached_property
    def _checksum(self) -> str:
        """SHA-256 over the records in order, as for the encoded images of a TFDS dataset: a line "<bytes> () <label>" and the bytes."""
        digest = hashlib.sha256()
        for start in range(0, len(self), _CHUNK):
            records = self.chosen[start : start + _CHUNK].tolist()
            for i, content in zip(records, self.listing.fetch(records), strict=True):
                label = self.listing.labels[i] if self.classes else ""
                digest.update(f"{len(content)} () {label}\n".encode() + content)
        return digest.hexdigest()

    def _decoded(self, record: int, content: bytes) -> np.ndarray:
        try:
            return pixels.resize(pixels.decode(content, 3), self.size)
        except Exception as error:  # decoders raise any error on bytes that are no picture
            where = os.path.join(self.where, self.listing.names[record])
            raise UsageError(f"{where}: cannot decode the picture: {pixels.reason(error)}") from error


def place(data: DataConfig) -> str:
    """Return the folder of a config, with the home folder of `~` filled in. Raises UsageError for a URL of another store."""
    check_scheme("data.folder", data.folder)
    return os.path.expanduser(data.folder)


def holds(data: DataConfig, suffix: str) -> bool:
    """Return whether a config's folder holds shards of that suffix, itself or in the folders of splits."""
    if not data.folder:
        return False
    root = place(data)
    folders = [root, *(os.path.join(root, name) for name in (data.split, data.held_out_split, "data"))]
    return any(name.lower().endswith(suffix) for folder in folders for name in names(folder))


def visible(root: str) -> dict[str, dict]:
    """Map the files below a folder that are not hidden, nor in a hidden folder, to what `files.sizes` says of them."""
    if not is_folder(root):
        raise UsageError(f"data.folder: found no folder {root!r}, expected one of pictures, .tar or .parquet files")
    found = sizes(root)
    return {name: found[name] for name in sorted(found) if not any(part.startswith(".") for part in name.split("/"))}


def suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def shards(root: str, kind: str, data: DataConfig) -> tuple[dict[str, dict], list[bool] | None]:
    """Find the shards of one kind, and which of them are held out (None: their names tell no splits).

    A shard is in a split if its path has the split's name between separators, as in `train/0.tar` or `data/train-00000.parquet`.
    Raises UsageError if the folder holds pictures in other forms too, or shards of one of the two splits only.
    """
    files = visible(root)
    for name in files:
        if suffix(name) in {*SHARDS, *IMAGES} - {kind}:
            first = next(name for name in files if suffix(name) == kind)
            raise UsageError(f"data.folder: found both {first} and {name} in {root!r}, expected one form of pictures")
    found = {name: about for name, about in files.items() if suffix(name) == kind}
    patterns = [rf"(?<![^-_./]){re.escape(name)}(?![^-_./])" for name in (data.split, data.held_out_split)]
    train, test = ([bool(re.search(pattern, name)) for name in found] for pattern in patterns)
    if both_or_neither(data, any(train), any(test), root):
        unclear = [name for name, a, b in zip(found, train, test, strict=True) if a and b]
        if unclear:
            raise UsageError(
                f"{os.path.join(root, unclear[0])}: found the names of both splits in its path, expected one"
            )
        kept = [name for name, a, b in zip(found, train, test, strict=True) if a or b]
        return {name: found[name] for name in kept}, [b for a, b in zip(train, test, strict=True) if a or b]
    return found, None


def both_or_neither(data: DataConfig, train: bool, test: bool, root: str) -> bool:
    """Return whether a folder has both splits by name. Raises UsageError if it has one of them."""
    if train != test:
        there, lacking = (data.split, data.held_out_split)[:: 1 if train else -1]
        key = "data.held_out_split" if train else "data.split"
        raise UsageError(
            f"{key}: found {there!r} but no {lacking!r} in {root!r}, expected both, or neither (a tenth is then held out); "
            f"set {key} to the name of the other part"
        )
    return train and test


def open_split(list_all: Callable[[str, DataConfig], Listing], data: DataConfig, split: str) -> Pictures:
    """Open one split of the pictures in `data.folder`. `list_all`: a door. Raises UsageError, StorageError if a bucket refuses."""
    for key, name in (("data.split", data.split), ("data.held_out_split", data.held_out_split)):
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UsageError(f"{key}: found {name!r}, expected for a folder a plain name, such as 'train' or 'test'")
    if data.split == data.held_out_split:
        raise UsageError(f"data.held_out_split: found {data.held_out_split!r}, expected another than data.split")
    if split not in (data.split, data.held_out_split):
        raise UsageError(f"split: found {split!r}, expected {data.split!r} or {data.held_out_split!r} of data.folder")
    root = place(data)
    found = list_all(root, data)
    if not len(found.names):
        raise UsageError(f"data.folder: found no pictures in {root!r}, expected {', '.join(sorted(IMAGES))} files")
    test = _drawn(found.names) if found.held_out is None else found.held_out
    if len(test) < 2:
        raise UsageError(f"data.folder: found 1 picture in {root!r}, expected at least 2, as a part is held out")
    classes = _classes(root, data, found, test)
    chosen = np.flatnonzero(test if split == data.held_out_split else ~test)
    return Pictures(
        root, found, chosen, _identity(found, chosen, split), classes, data.image_size, data.flip, Skips(data.skip_bad)
    )


def class_names(list_all: Callable[[str, DataConfig], Listing], data: DataConfig) -> tuple[str, ...]:
    """Return the names of the classes; () without, or if the folder is not on this machine."""
    try:
        return list_all(place(data), data).class_names
    except (UsageError, OSError):
        return ()


def _drawn(found: Sequence[str]) -> np.ndarray:
    digests = (hashlib.sha256(name.encode(errors="surrogateescape")).digest() for name in found)
    numbers = np.array([int.from_bytes(digest[:8]) for digest in digests], np.uint64)
    share = numbers < np.uint64(_SHARE)
    return share if share.any() else numbers == numbers.min()


def _classes(root: str, data: DataConfig, found: Listing, test: np.ndarray) -> int:
    """Count the classes. Raises UsageError for a class without a picture to train on, or a label out of range."""
    if found.labels is None:
        return 0
    count = len(found.class_names) or int(found.labels.max()) + 1
    for i in np.flatnonzero((found.labels < 0) | (found.labels >= count))[:1].tolist():
        where = os.path.join(root, found.names[i])
        raise UsageError(f"{where}: found label {found.labels[i]}, expected 0 to {count - 1}")
    held = np.bincount(found.labels[~test], minlength=count)
    for number in np.flatnonzero(held == 0)[:1].tolist():
        name = f"{number} ({found.class_names[number]})" if found.class_names else str(number)
        raise UsageError(
            f"data.folder: class {name}: found no pictures in {root!r} to train on (split {data.split!r}), expected at least one"
        )
    return count


def _identity(found: Listing, chosen: np.ndarray, split: str) -> dict:
    """Name the split and checksum its listing, each folder or shard by itself, so that one that changed can be named."""
    groups, counts = {}, {}
    for i in chosen.tolist():
        label = "" if found.labels is None else found.labels[i]
        group = os.path.dirname(found.names[i])
        line = f"{found.names[i]}\t{found.stamps[i]}\t{label}\n".encode(errors="surrogateescape")
        groups.setdefault(group, hashlib.sha256()).update(line)
        counts[group] = counts.get(group, 0) + 1
    parts = {f"{name}/": f"{counts[name]:,} pictures, {groups[name].hexdigest()[:16]}" for name in groups if name}
    whole = hashlib.sha256("".join(one.hexdigest() for one in groups.values()).encode()).hexdigest()
    shown = parts if len(parts) <= _MOST_GROUPS else {}
    return {"name": "folder", "split": split, **shown, "records": len(chosen), "sha256": whole}
