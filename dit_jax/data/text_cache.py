"""States of captions that a frozen encoder computed beforehand, on the disk, found by what they were computed of.

    cache.json      what the states are (`About`), at first how captions are put into shards (`plan`), in the end the SHA-256 of each index
    00000.index     of each caption: SHA-256 of (caption, encoder, tokenizer, length, dtype), first row, rows, CRC-32 of the states
    00000.states    rows (w,) of the tokens that are there, one caption after another; padding is not stored

A caption is found by its checksum and never by its number, so an edited caption is missing and not mistaken for another.
"""

import dataclasses
import functools
import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dit_jax.error import UsageError, build
from dit_jax.files import is_file, json_text, make_folder, opened, read_json, write_file

NOTES = "cache.json"
ENTRY = np.dtype([("key", "S64"), ("start", "<u8"), ("rows", "<u4"), ("crc", "<u4")])


@dataclass(frozen=True)
class About:
    """What states are of: the encoder's kind, checksums, tokens of a caption at most, features of a state and their dtype."""

    encoder: str
    encoder_sha256: str
    tokenizer_sha256: str
    length: int
    width: int
    dtype: str

    def key(self, caption: str) -> bytes:
        """The checksum by which the states of a caption are found."""
        of = [caption, self.encoder_sha256, self.tokenizer_sha256, self.length, self.dtype]
        return hashlib.sha256(json.dumps(of).encode()).hexdigest().encode()


def plan(captions: Sequence[str], per: int) -> dict:
    """What decides which captions a shard holds: captions a shard, and the SHA-256 of all captions in their order."""
    digest = hashlib.sha256()
    for caption in captions:
        digest.update(json.dumps(caption).encode() + b"\n")
    return {"captions_a_shard": per, "captions_sha256": digest.hexdigest()}


def begin(folder: str, about: About, shards: dict) -> dict | None:
    """Begin a cache, or return the notes of one that is complete, None for one to be made. `shards`: its `plan`.

    Raises UsageError for another's, or if it was begun with other shards, whose numbers would be taken for those of this command.
    """
    path = os.path.join(folder, NOTES)
    if is_file(path):
        notes = read_json(path)
        check_about(folder, notes, about)
        if notes.get("shards") is not None:
            return notes
        for name, found in shards.items():
            if (expected := (notes.get("plan") or {}).get(name)) != found:
                advice = "give the same --shard_bytes and the same captions, or use another --out"
                raise UsageError(
                    f"--out: {folder!r}: {name}: found {found!r}, expected {expected!r}, as it was begun with; {advice}"
                )
        return None
    make_folder(folder)
    write_file(path, json_text({"about": dataclasses.asdict(about), "plan": shards}, indent=1) + "\n")
    return None


def check_about(folder: str, notes: dict, about: About) -> None:
    """Raises UsageError unless the states of a folder are those that are wanted."""
    found, wanted = notes.get("about") or {}, dataclasses.asdict(about)
    for name, expected in wanted.items():
        if found.get(name) != expected:
            what = f"{name}: found {found.get(name)!r}, expected {expected!r}, as the model's encoder has"
            raise UsageError(f"{folder}: holds states of captions by another encoder or of another length: {what}")


def has_shard(folder: str, number: int) -> bool:
    """Whether a shard is whole."""
    return is_file(os.path.join(folder, f"{number:05d}.index"))


def write_shard(folder: str, number: int, about: About, captions: Sequence[str], states: Sequence[np.ndarray]) -> None:
    """Write the states (rows, w) of captions, whole or not at all."""
    index, start = np.zeros(len(captions), ENTRY), 0
    parts = [np.ascontiguousarray(one).tobytes() for one in states]
    for row, caption, one, part in zip(index, captions, states, parts, strict=True):
        row["key"], row["start"], row["rows"], row["crc"] = about.key(caption), start, len(one), zlib.crc32(part)
        start += len(one)
    write_file(os.path.join(folder, f"{number:05d}.states"), b"".join(parts))
    write_file(os.path.join(folder, f"{number:05d}.index"), index.tobytes())


def finish(folder: str, about: About, shards: int, said: dict) -> None:
    """Complete a cache of so many shards. `said`: further values for people."""
    sums = [hashlib.sha256(_index(folder, i)).hexdigest() for i in range(shards)]
    notes = {"about": dataclasses.asdict(about), **said, "shards": sums}
    write_file(os.path.join(folder, NOTES), json_text(notes, indent=1) + "\n")


def _index(folder: str, number: int) -> bytes:
    with opened(os.path.join(folder, f"{number:05d}.index")) as file:
        return file.read()


@dataclass(frozen=True)
class Cache:
    """A complete cache. Threads may share it."""

    folder: str
    about: About
    index: np.ndarray  # of all shards, rising by key
    shard: np.ndarray  # of each entry

    def __contains__(self, caption: str) -> bool:
        return self._find(caption) is not None

    def _find(self, caption: str) -> int | None:
        key = self.about.key(caption)
        at = int(np.searchsorted(self.index["key"], key))
        return at if at < len(self.index) and self.index["key"][at] == key else None

    @functools.cached_property
    def dtype(self) -> np.dtype:
        return np.dtype(self.about.dtype)

    def states(self, caption: str) -> np.ndarray:
        """States (rows, w) of a caption. Raises UsageError if it is missing, or its states are damaged."""
        at = self._find(caption)
        if at is None:
            redo = "encode the captions again into another folder (python -m dit_jax.encode --captions)"
            raise UsageError(
                f"data.captions: found no states of the caption {caption[:200]!r} in {self.folder!r}; {redo}"
            )
        entry, width = self.index[at], self.about.width * self.dtype.itemsize
        path = os.path.join(self.folder, f"{self.shard[at]:05d}.states")
        with opened(path) as file:
            file.seek(int(entry["start"]) * width)
            content = file.read(int(entry["rows"]) * width)
        if len(content) != entry["rows"] * width or zlib.crc32(content) != entry["crc"]:
            raise UsageError(
                f"{path}: the states of the caption {caption[:200]!r} are damaged; encode the captions again"
            )
        return np.frombuffer(content, self.dtype).reshape(int(entry["rows"]), self.about.width)

    def tokens(self, captions: Sequence[str]) -> dict:
        """{"states" (n, m, w), "mask" (n, m)} of captions, zeros where there is no token."""
        shape = (len(captions), self.about.length)
        states, mask = np.zeros((*shape, self.about.width), self.dtype), np.zeros(shape, bool)
        for row, there, caption in zip(states, mask, captions, strict=True):
            some = self.states(caption)
            row[: len(some)], there[: len(some)] = some, True
        return {"states": states, "mask": mask}


def open_cache(folder: str, about: About) -> Cache:
    """Open a cache. Raises UsageError if it is none, not complete, damaged or another encoder's."""
    path = os.path.join(folder, NOTES)
    if not is_file(path):
        written = "a folder that `python -m dit_jax.encode --captions` wrote"
        raise UsageError(f"data.captions: found no {NOTES} in {folder!r}, expected {written}")
    notes = read_json(path)
    check_about(folder, notes, about)
    if (sums := notes.get("shards")) is None:
        raise UsageError(f"data.captions: {folder!r} is not complete; the command that began it goes on")
    parts = [_index(folder, i) for i in range(len(sums))]
    for i, (part, expected) in enumerate(zip(parts, sums, strict=True)):
        if hashlib.sha256(part).hexdigest() != expected:
            raise UsageError(
                f"{folder}/{i:05d}.index: found another sha256 than in {NOTES}; damaged: encode the captions again"
            )
    index = np.frombuffer(b"".join(parts), ENTRY)
    shard = np.repeat(np.arange(len(parts)), [len(part) // ENTRY.itemsize for part in parts])
    order = np.argsort(index["key"])
    return Cache(folder, build(About, notes["about"], "about."), index[order], shard[order])
