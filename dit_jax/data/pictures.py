"""Encoded pictures that lie in `data.folder`: the `Source` that all doors to such a folder share, its splits and its checks.

A door (`folder`, `webdataset`, `parquet`) lists all records of a folder. If the listing names no splits, a record is held out if the first
8 bytes of the SHA-256 of its name, as a number, are below a tenth of their range, or the lowest of all if none or all are.
"""

import bisect
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO

import numpy as np

from dit_jax.config import DataConfig
from dit_jax.data import pixels
from dit_jax.data.captions import Captions
from dit_jax.data.skip import Skips
from dit_jax.data.tfds import Records
from dit_jax.error import StorageError, UsageError, check_scheme
from dit_jax.files import is_file, is_folder, names, opened, remote, sizes

IMAGES = frozenset((".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"))
_SHARE = 2**64 // 10  # of the hashes: held out
SHARDS = (".tar", ".parquet")
_READ = {*SHARDS, *IMAGES}
_OPENERS = 16  # threads that open shards
_MOST_GROUPS = 1000  # kept in an identity


@dataclass(frozen=True)
class Listing:
    """All records that a door found in a folder, or in a shard. `names` are paths relative to it: FILE, TAR/FILE, PARQUET/ROW."""

    names: Sequence
    stamps: Sequence  # of each record: what changes if it is replaced, such as its size
    held_out: np.ndarray | None  # bool (n,); None: drawn from the names
    labels: np.ndarray | None  # (n,); None: no labels
    class_names: tuple  # () if the classes have numbers only
    fetch: Callable  # (numbers of records) -> their encoded pictures; raises UsageError naming one that cannot be read
    captions: Captions | None = None  # of all records, or None


@dataclass(frozen=True)
class Chosen:
    """Some records of a listing, as a data source of TFDS."""

    root: str
    listing: Listing
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitems__(self, indices: list[int]) -> list[dict]:
        records, labels = self.numbers[indices].tolist(), self.listing.labels
        encoded = zip(records, self.listing.fetch(records), strict=True)
        return [{"image": content, "label": 0 if labels is None else labels[i]} for i, content in encoded]


class Pictures(Records):
    """The `Source` for the pictures of one split, in RGB. UsageErrors on reading name the picture."""

    key = "data.folder"
    class_names = property(lambda self: self.source.listing.class_names)

    @property
    def where(self) -> str:
        return self.source.root

    def name_of(self, index: int) -> str:
        return os.path.join(self.source.root, self.source.listing.names[self.source.numbers[index]])

    @property
    def captions(self) -> Callable | None:
        words, numbers = self.source.listing.captions, self.source.numbers
        return (lambda indices: words.fetch(numbers[indices].tolist())) if words else None

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        """As `Records.sizes`; of picture files on a disk nothing but the heads is read."""
        paths = [self.name_of(i) for i in indices.tolist()]
        if remote(self.where) or not all(map(os.path.isfile, paths)):
            return super().sizes(indices)
        return np.array([self._size(i, path) for i, path in zip(indices.tolist(), paths, strict=True)])

    def overlaps(self, other: "Pictures") -> bool:
        """Return whether two splits share a picture, of one folder or of one that lies in the other."""
        names, others = self.source.listing.names, other.source.listing.names
        if self.source.root == other.source.root and names == others:
            return bool(np.isin(self.source.numbers, other.source.numbers).any())
        return not self._paths().isdisjoint(other._paths())

    def _paths(self) -> set[str]:
        root = self.source.root if remote(self.source.root) else os.path.realpath(self.source.root)
        return {os.path.join(root, self.source.listing.names[i]) for i in self.source.numbers.tolist()}


@contextlib.contextmanager
def reading(path: str, size: int = 1) -> Iterator[None]:
    """Turn what libraries raise on damaged files into a UsageError naming the file, as an empty one, which may be a pipe, is now."""
    if not size:
        raise UsageError(f"{path}: found an empty file, expected one with pictures")
    try:
        yield
    except (StorageError, UsageError, MemoryError):
        raise
    except Exception as error:
        if getattr(error, "errno", None) not in (None, errno.ENOENT, errno.EACCES):  # of the machine, not of the file
            raise
        raise UsageError(f"{path}: cannot read it, it may be cut short or damaged: {pixels.reason(error)}") from error


def place(data: DataConfig) -> str:
    """Return the folder of a config, with the home folder of `~` filled in. Raises UsageError for a URL of another store."""
    check_scheme("data.folder", data.folder)
    return os.path.expanduser(data.folder)


def holds(data: DataConfig, kind: str) -> bool:
    """Return whether a config's folder, or the first below it that holds pictures or shards, holds shards of that suffix."""
    return bool(data.folder) and kind in _first(place(data))


def _first(folder: str) -> set[str]:
    """Return the suffixes of the pictures and shards in a folder, or else in the first one below it that holds any."""
    found, here = [name for name in names(folder) if name and not hidden(name)], {}
    for name in found:
        here.setdefault(suffix(name), []).append(os.path.join(folder, name))
    if kinds := {kind for kind in _READ & {*here} if any(map(is_file, here[kind]))}:
        return kinds
    inside = (path for paths in here.values() for path in paths if is_folder(path) and not os.path.islink(path))
    return next(filter(None, map(_first, inside)), set())


def visible(root: str) -> dict[str, dict]:
    """Map the files below a folder that are not hidden, nor in a hidden folder, to what `files.sizes` says of those that are read."""
    if not is_folder(root):
        raise UsageError(f"data.folder: found no folder {root!r}, expected one of pictures, .tar or .parquet files")
    try:
        found = sizes(root, lambda name: suffix(name) in _READ and not hidden(name))
    except FileNotFoundError as error:
        raise UsageError(f"{error.filename}: found a link that leads nowhere, expected a file; delete it") from None
    found = {name: found[name] for name in sorted(found) if not hidden(name)}
    if odd := next((name for name in found if suffix(name) in _READ and "" in name.split("/")), ""):
        raise UsageError(f"{root}: found the object {odd!r}, expected names without empty parts; rename it")
    return found


def hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


@contextlib.contextmanager
def unchanged(path: str, about: dict) -> Iterator[IO[bytes]]:
    """Open a shard for reading. Raises UsageError if its size, or on a disk its time, is another than in `about`."""
    with opened(path) as file:
        found = file.seek(0, os.SEEK_END), None if remote(path) else os.fstat(file.fileno()).st_mtime_ns
        if found != (about["bytes"], about["time"]):
            raise UsageError(f"{path}: found another size or time than at the start; it was replaced")
        yield file


def both_or_neither(data: DataConfig, train: bool, test: bool, root: str) -> bool:
    """Return whether a folder has both splits by name. Raises UsageError if it has one of them."""
    if train != test:
        there, lacking = (data.split, data.held_out_split)[:: 1 if train else -1]
        found = f"found {there!r} but no {lacking!r} in {root!r}"
        raise UsageError(
            f"data.{'held_out_' * train}split: {found}, expected both, or neither: a tenth is then held out"
        )
    return train and test


def list_shards(kind: str, open_shard: Callable[[str, dict], Listing], root: str, data: DataConfig) -> Listing:
    """List the records of all shards of a kind, a suffix, in order of their paths. Raises UsageError naming what does not fit.

    A shard is in a split if its path has the split's name between separators, as in `train/0.tar` or `data/train-00000.parquet`.
    `open_shard`: (path, what `files.sizes` says of it and its "time") -> its records, without the shard's path in their names.
    """
    files = visible(root)
    paths = [name for name in files if suffix(name) == kind]
    if odd := next((name for name in files if suffix(name) in _READ - {kind}), ""):
        raise UsageError(f"data.folder: found both {paths[0]} and {odd} in {root!r}, expected one form of pictures")
    words = [rf"(?<![^-_./]){re.escape(name)}(?![^-_./])" for name in (data.split, data.held_out_split)]
    inside = {name: [bool(re.search(word, name)) for word in words] for name in paths}
    named = both_or_neither(data, *map(any, zip(*inside.values(), strict=True)), root)
    paths = [name for name in paths if not named or any(inside[name])]
    if both := next((name for name in paths if all(inside[name])), ""):
        raise UsageError(f"{os.path.join(root, both)}: found the names of both splits in the path, expected one")

    def open_one(name: str) -> Listing:
        path = os.path.join(root, name)
        with reading(path, files[name]["bytes"]):
            return open_shard(path, files[name] | {"time": None if remote(path) else os.stat(path).st_mtime_ns})

    with ThreadPoolExecutor(_OPENERS) as pool:
        shards = list(pool.map(open_one, paths))
    labelled, classes, worded = shards[0].labels is not None, shards[0].class_names, shards[0].captions is not None
    for name, shard in zip(paths, shards, strict=True):
        if (shard.labels is not None, shard.class_names) != (labelled, classes):
            where = f"data.folder: found other labels or names of classes in {name} than in {paths[0]}"
            raise UsageError(f"{where}, expected the same in all of {root!r}")
        if (shard.captions is not None) != worded:
            some, bare = (paths[0], name) if worded else (name, paths[0])
            where = f"data.folder: found captions in {some}, none in {bare}"
            raise UsageError(f"{where}, expected them in all of {root!r}, or in none")
    counts = [len(shard.names) for shard in shards]
    starts = [0, *itertools.accumulate(counts)]
    names = [f"{path}/{name}" for path, shard in zip(paths, shards, strict=True) for name in shard.names]

    def fetch(part: Callable, records: list[int]) -> list:
        """Fetch a part of each record, its picture or its captions, shard by shard."""
        found, of = {}, {i: bisect.bisect_right(starts, i) - 1 for i in records}
        for number in set(of.values()):
            wanted = sorted(i for i in of if of[i] == number)
            try:
                found |= zip(wanted, some(part, number, wanted), strict=True)
            except UsageError:  # which of them?
                found |= {i: some(part, number, [i])[0] for i in wanted}
        return [found[i] for i in records]

    def some(part: Callable, number: int, wanted: list[int]) -> list:
        with reading(os.path.join(root, names[wanted[0]])):
            return part(shards[number]).fetch([i - starts[number] for i in wanted])

    held_out = np.repeat([inside[name][1] for name in paths], counts) if named else None
    labels = np.concatenate([shard.labels for shard in shards]) if labelled else None
    words = [stamp for shard in shards if worded for stamp in shard.captions.stamps]
    return Listing(
        names, [stamp for shard in shards for stamp in shard.stamps], held_out, labels, classes,
        functools.partial(fetch, lambda shard: shard),
        Captions(words, functools.partial(fetch, lambda shard: shard.captions)) if worded else None,
    )  # fmt: skip


def open_split(list_all: Callable[[str, DataConfig], Listing], data: DataConfig, split: str) -> Pictures:
    """Open one split of the pictures in `data.folder`. `list_all`: a door. Raises UsageError, StorageError if a bucket refuses."""
    for key, name, other in (("data.split", data.split, ""), ("data.held_out_split", data.held_out_split, data.split)):
        if not re.fullmatch(r"\w[\w.-]*", name) or name == other:
            expected = "a plain name, such as 'train' or 'test', one for each split"
            raise UsageError(f"{key}: found {name!r}, expected for data.folder {expected}")
    if split not in (data.split, data.held_out_split):
        raise UsageError(f"split: found {split!r}, expected {data.split!r} or {data.held_out_split!r} of data.folder")
    root = place(data)
    found = list_all(root, data)
    if len(found.names) < 2:
        kinds = f"{', '.join(sorted(IMAGES))} files, .tar or .parquet"
        raise UsageError(f"data.folder: found {len(found.names)} pictures in {root!r}, expected at least 2 ({kinds})")
    test = _drawn(found.names) if found.held_out is None else found.held_out
    classes = _classes(root, data, found, test)
    chosen = np.flatnonzero(test if split == data.held_out_split else ~test)
    if not len(chosen):
        raise UsageError(f"data.folder: found no pictures of split {split!r} in {root!r}, expected some; add one")
    missing = found.captions.missing if found.captions else {}
    if not data.skip_bad and (lacking := next((missing[i] for i in chosen.tolist() if i in missing), "")):
        raise UsageError(lacking)
    return Pictures(
        data.name, split, Chosen(root, found, chosen), (None, None, 3), classes, (), _identity(found, chosen, data.name, split),
        data.image_size, data.flip, Skips(data.skip_bad),
    )  # fmt: skip


def _drawn(found: Sequence[str]) -> np.ndarray:
    digests = (hashlib.sha256(name.encode(errors="surrogateescape")).digest() for name in found)
    numbers = np.array([int.from_bytes(digest[:8]) for digest in digests], np.uint64)
    share = numbers < np.uint64(_SHARE)
    return share if share.any() and not share.all() else numbers == numbers.min()


def _classes(root: str, data: DataConfig, found: Listing, test: np.ndarray) -> int:
    """Count the classes. Raises UsageError for one without a picture to train on."""
    if found.labels is None:
        return 0
    count = len(found.class_names) or int(found.labels.max()) + 1
    trained = set(found.labels[~test].tolist())
    if (lacking := next((number for number in range(count) if number not in trained), None)) is not None:
        name = f"{lacking} ({found.class_names[lacking]})" if found.class_names else str(lacking)
        where = f"found no pictures in {root!r} to train on (split {data.split!r})"
        raise UsageError(f"data.folder: class {name}: {where}, expected at least one")
    return count


def _identity(found: Listing, chosen: np.ndarray, name: str, split: str) -> dict:
    """Name the split and checksum its listing, each folder or shard by itself, so that one that changed can be named."""
    lines = {}
    for i in chosen.tolist():
        line = f"{found.names[i]}\t{found.stamps[i]}\t{'' if found.labels is None else found.labels[i]}\n"
        lines.setdefault(os.path.dirname(found.names[i]), []).append(line.encode(errors="surrogateescape"))
    sums = {part: hashlib.sha256(b"".join(some)).hexdigest() for part, some in lines.items()}
    parts = {f"{part}/": f"{len(lines[part]):,} pictures, {sums[part][:16]}" for part in lines if part}
    shown = parts if len(parts) <= _MOST_GROUPS else {}
    whole = hashlib.sha256("".join(sums.values()).encode()).hexdigest()
    words = {"captions": _stamped([found.captions.stamps[i] for i in chosen])} if found.captions else {}
    return {"name": name, "split": split, **shown, "records": len(chosen), "sha256": whole, **words}


def _stamped(stamps: list) -> str:
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
