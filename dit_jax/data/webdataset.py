"""WebDataset tars: files NAME.jpg, NAME.cls and NAME.txt or .json of one key NAME, read at random by an index that is made once.

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
import zlib

import numpy as np

from dit_jax.data import captions, pictures
from dit_jax.data.captions import Captions
from dit_jax.data.pictures import Listing
from dit_jax.error import UsageError
from dit_jax.files import absolute, make_folder, opened, read, write_file
from dit_jax.files.text import LARGEST, LONGEST

_TAIL = 1 << 20  # bytes that may follow a tar's last member, all zero


def open_shard(path: str, about: dict) -> Listing:
    """List one tar by its index. `about`: of `files.sizes`. Raises UsageError naming what does not fit, tarfile's errors."""
    stamp = [2, absolute(path), about["bytes"], about.get("crc32c") or about["time"]]
    key = hashlib.sha256(json.dumps(stamp).encode()).hexdigest()
    folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "dit_jax")
    try:
        rows = json.loads(read(os.path.join(folder, f"{key}.json"), LARGEST))
    except (OSError, ValueError):
        rows = _scan(path)
        with contextlib.suppress(OSError):
            make_folder(folder)
            write_file(os.path.join(folder, f"{key}.json"), json.dumps(rows))
    names, offsets, sizes, labels, words = zip(*rows, strict=True)
    if None in words and set(map(bool, words)) != {False}:
        what = f"found no caption beside {names[words.index(None)]}"
        raise UsageError(f"{path}: {what}, expected .txt or .json for each picture, as others have it")
    if None in labels and set(labels) != {None}:
        bare = names[labels.index(None)]
        raise UsageError(f"{path}: found no .cls beside {bare}, expected one for each picture, as others have it")

    def fetch(numbers: list[int]) -> list[bytes]:
        with pictures.unchanged(path, about) as file:
            return [file.read(sizes[i]) for i in numbers if file.seek(offsets[i]) >= 0]

    def fetch_captions(numbers: list[int]) -> list[tuple[str, ...]]:
        with pictures.unchanged(path, about) as file:
            return [_captions(path, file, *words[i][:3]) for i in numbers]

    stamps = list(zip(offsets, sizes, strict=True))
    written = None if None in words else Captions(words, fetch_captions)
    return Listing(names, stamps, None, None if None in labels else np.array(labels), (), fetch, written)


def _captions(path: str, file: io.BufferedIOBase, name: str, offset: int, size: int) -> tuple[str, ...]:
    """Read the captions in a .txt or .json; () if a .json has none. Raises UsageError."""
    file.seek(offset)
    is_json = name.lower().endswith(".json")  # which may be long for other reasons
    if size > (most := LARGEST if is_json else LONGEST):
        raise UsageError(f"{path}: {name}: found {size:,} bytes, expected text of up to {most:,}")
    parse = captions.of_json if is_json else captions.of_lines
    return parse(f"{path}: {name}", file.read(size))


def _scan(path: str) -> list[list]:
    """Index a tar: [name, offset, bytes, label or None, caption or None] of each picture. Raises UsageError or tarfile's errors.

    A caption is [name, offset, bytes, CRC-32 of the text].
    """
    samples = {}
    with opened(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        while member := tar.next():
            _add(samples, path, member, file)
        file.seek(tar.offset)  # where tarfile met the end, or anything that is no header
        tail = file.read(_TAIL + 1)
        if not tarfile.BLOCKSIZE <= len(tail) <= _TAIL or tail.strip(b"\0"):
            what = f"found no end of the tar at byte {tar.offset:,}"
            raise UsageError(f"{path}: {what}: it was cut short, joined or damaged; copy it again")
        found = {key: sample for key, sample in samples.items() if "picture" in sample}
        words = {key: _noted(path, file, sample.get("txt") or sample.get("json")) for key, sample in found.items()}
    kinds = ("cls", "txt", "json") if any(words.values()) else ("cls",)  # without captions, a .txt is none
    lone = [(key, kind) for key, sample in samples.items() if key not in found for kind in kinds if kind in sample]
    if lone or not found:
        what = f"a .{lone[0][1]} but no picture of the key {lone[0][0]!r}" if lone else "no pictures"
        raise UsageError(f"{path}: found {what}, expected a picture for each key")
    return [[*sample["picture"], sample.get("cls"), words[key]] for key, sample in found.items()]


def _noted(path: str, file: io.BufferedIOBase, place: list | None) -> list | None:
    """Return (name, offset, bytes) of a sample's captions with the CRC-32 of their text, None if there are none."""
    found = _captions(path, file, *place) if place else ()
    return [*place, zlib.crc32(json.dumps(found).encode())] if found else None


def _add(samples: dict, path: str, member: tarfile.TarInfo, file: io.BufferedIOBase) -> None:
    """Note a picture, a label or captions under its key: the name before the first dot. Other members are left out."""
    name = member.name.removeprefix("./")
    folder, base = os.path.split(name)
    base, _, ends = base.partition(".")
    end = pictures.suffix(name)
    kind = "picture" if end in pictures.IMAGES else "cls" if end == ".cls" else ends.lower()
    if kind not in ("picture", "cls", "txt", "json") or member.isdir() or pictures.hidden(name):
        return
    sample = samples.setdefault(key := os.path.join(folder, base), {})
    if kind in sample:
        what = f"two files of the key {key!r}, the second {name}"
        raise UsageError(f"{path}: found {what}, expected one picture, one .cls and one caption")
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
