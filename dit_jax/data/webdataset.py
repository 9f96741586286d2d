"""WebDataset tars: files NAME.jpg and NAME.cls of one key NAME, read at random by an index that is made once of each tar's headers.

An index is kept in $XDG_CACHE_HOME/dit_jax (~/.cache/dit_jax) under the tar's path, size and time, or CRC-32C in a bucket.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import tarfile

import numpy as np

from dit_jax.data import pictures
from dit_jax.data.pictures import Listing
from dit_jax.error import UsageError
from dit_jax.files import absolute, make_folder, opened, read, write_file
from dit_jax.files.text import LARGEST

_TAIL = 1 << 20  # bytes that may follow a tar's last member, all zero


def open_shard(path: str, about: dict) -> Listing:
    """List one tar by its index. `about`: of `files.sizes`. Raises UsageError naming what does not fit, tarfile's errors."""
    stamp = [1, absolute(path), about["bytes"], about.get("crc32c") or about["time"]]
    key = hashlib.sha256(json.dumps(stamp).encode()).hexdigest()
    folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "dit_jax")
    try:
        rows = json.loads(read(os.path.join(folder, f"{key}.json"), LARGEST))
    except (OSError, ValueError):
        rows = _scan(path)
        with contextlib.suppress(OSError):
            make_folder(folder)
            write_file(os.path.join(folder, f"{key}.json"), json.dumps(rows))
    names, offsets, sizes, labels = zip(*rows, strict=True)
    if None in labels and set(labels) != {None}:
        bare = names[labels.index(None)]
        raise UsageError(f"{path}: found no .cls beside {bare}, expected one for each picture, as others have it")

    def fetch(numbers: list[int]) -> list[bytes]:
        with pictures.unchanged(path, about) as file:
            return [file.read(sizes[i]) for i in numbers if file.seek(offsets[i]) >= 0]

    stamps = list(zip(offsets, sizes, strict=True))
    return Listing(names, stamps, None, None if None in labels else np.array(labels), (), fetch)


def _scan(path: str) -> list[list]:
    """Index a tar: [name, offset, bytes, label or None] of each picture. Raises UsageError or tarfile's errors."""
    samples = {}
    with opened(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        while member := tar.next():
            _add(samples, path, member, file)
        file.seek(tar.offset)  # where tarfile met the end, or anything that is no header
        tail = file.read(_TAIL + 1)
    if not tarfile.BLOCKSIZE <= len(tail) <= _TAIL or tail.strip(b"\0"):
        what = f"found no end of the tar at byte {tar.offset:,}"
        raise UsageError(f"{path}: {what}: it was cut short, joined or damaged; copy it again")
    lone = next((key for key, sample in samples.items() if "picture" not in sample), None)
    if lone or not samples:
        what = f"a .cls but no picture of the key {lone!r}" if lone else "no pictures"
        raise UsageError(f"{path}: found {what}, expected a picture for each key")
    return [[*sample["picture"], sample.get("cls")] for sample in samples.values()]


def _add(samples: dict, path: str, member: tarfile.TarInfo, file: io.BufferedIOBase) -> None:
    """Note a picture or a label under its key: the name before the first dot. Other members are left out."""
    name = member.name.removeprefix("./")
    folder, base = os.path.split(name)
    end = pictures.suffix(base)
    kind = "picture" if end in pictures.IMAGES else "cls" if end == ".cls" else ""
    if not kind or member.isdir() or pictures.hidden(name):
        return
    key = os.path.join(folder, base.partition(".")[0])
    sample = samples.setdefault(key, {})
    if kind in sample:
        what = f"two files of the key {key!r}, the second {name}"
        raise UsageError(f"{path}: found {what}, expected one picture and one .cls")
    if not member.isreg() or member.sparse:
        raise UsageError(f"{path}: found {name}, a link or a sparse file, expected plain files")
    sample[kind] = [name, member.offset_data, member.size]
    if kind == "cls":
        file.seek(member.offset_data)
        if not re.fullmatch(rb"\s*\d{1,9}\s*", text := file.read(min(member.size, 20))):
            raise UsageError(f"{path}: {name}: found {text!r}, expected the number of a class")
        sample[kind] = int(text)


_list_all = functools.partial(pictures.list_shards, ".tar", open_shard)
open_split = functools.partial(pictures.open_split, _list_all)
