"""Writes a folder of latents, whole or not at all: shards under provisional names, then their names, `latents.json` last.

Without `latents.json` a folder is no latents: what a killed writer leaves is never read, and the next writer removes it.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import operator
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from dit_jax.command import sync
from dit_jax.config import JobError, UsageError
from dit_jax.data.latents import (
    DTYPES,
    MAX_SHARDS,
    NOTES,
    VERSION,
    LatentInfo,
    LatentRecords,
    checksum,
    file_sha256,
    open_latents,
    shard_name,
)

SHARD_BYTES = 1 << 30
_OURS = re.compile(r"latents-\d{5}(\.part|-of-\d{5}\.array_record)|latents\.json\.part")


def write_latents(
    folder: str, info: LatentInfo, examples: Iterable, *, shard_bytes: int = SHARD_BYTES
) -> LatentRecords:
    """Writes `examples`, pairs (label, array of `info.record_shape`), in their order, and opens the result.

    Memory holds one record at a time. Leftovers of a writer that was killed are removed first; where this one fails, it
    removes its own. Raises UsageError naming the record that cannot be stored, or where the folder holds other files,
    complete latents or another writer; JobError where the disk fails.
    """
    with _claimed(folder):
        try:
            shards, content = _write_shards(folder, info, enumerate(examples), shard_bytes)
            notes = _notes(info, shards, content)
            with _disk(folder):
                for i, shard in enumerate(shards):
                    os.rename(_part(folder, i), os.path.join(folder, shard["file"]))
                _write_notes(folder, notes)
        except BaseException:
            _remove_leftovers(folder)
            raise
    return open_latents(folder)


@contextlib.contextmanager
def _claimed(folder: str) -> Iterator[None]:
    """The folder made, cleared of leftovers, and locked against other writers (the lock dies with the process)."""
    try:
        os.makedirs(folder, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UsageError(f"latents {folder}: cannot make the folder: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"latents {folder}: found another process writing there, expected none") from None
        if os.path.lexists(os.path.join(folder, NOTES)):
            raise UsageError(
                f"latents {folder}: found complete latents, expected none; delete them or name another folder"
            )
        for name in sorted(os.listdir(folder)):
            if not _OURS.fullmatch(name):
                raise UsageError(f"latents {folder}: found {name!r}, expected an empty folder; name another one")
        _remove_leftovers(folder)
        yield
    finally:
        os.close(handle)


def _remove_leftovers(folder: str) -> None:
    for name in os.listdir(folder):
        if _OURS.fullmatch(name):
            os.unlink(os.path.join(folder, name))


def _write_shards(folder: str, info: LatentInfo, examples: Iterator, shard_bytes: int) -> tuple[list[dict], str]:
    """Writes the provisional shards. Returns their entries in the notes, file names missing, and the digest of all records."""
    per_shard = max(1, shard_bytes // info.layout.itemsize)
    shards, content = [], hashlib.sha256()
    for number in range(MAX_SHARDS):
        records = (_encode(folder, info, i, *example) for i, example in itertools.islice(examples, per_shard))
        first = next(records, None)
        if first is None:
            break
        count, path = 0, _part(folder, number)
        with _writer(folder, path) as write:
            for record in itertools.chain([first], records):
                write(record)
                content.update(record)
                count += 1
        with _disk(folder):
            sync(path)
            digest = file_sha256(path)
        shards.append({"file": "", "records": count, "bytes": os.path.getsize(path), "sha256": digest})
    else:
        raise UsageError(f"latents {folder}: found records for more than {MAX_SHARDS} shards; use a larger shard_bytes")
    if not shards:
        raise UsageError(f"latents {folder}: found no records to write, expected at least one")
    return shards, content.hexdigest()


@contextlib.contextmanager
def _writer(folder: str, path: str) -> Iterator[Callable]:
    """A function that appends one record to the file `path`, which is complete in the end. Raises JobError."""
    with _disk(folder):
        writer = ArrayRecordWriter(path, "group_size:1,uncompressed")  # half-precision noise does not compress

    def write(record: bytes) -> None:
        with _disk(folder):
            writer.write(record)

    try:
        yield write
    finally:
        with _disk(folder):
            writer.close()


@contextlib.contextmanager
def _disk(folder: str) -> Iterator[None]:
    """Failures of writing as a JobError; those of whoever computes the latents stay what they are."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise JobError(f"latents {folder}: cannot write them: {why}; nothing is kept, encode again") from error


def _encode(folder: str, info: LatentInfo, index: int, label, values) -> bytes:
    """One record as it lies on disk. Raises UsageError naming the record that does not fit `info`."""
    where = f"latents {folder}, record {index}"
    try:
        number = operator.index(label)
    except TypeError:
        number = -1
    if not 0 <= number < info.classes:
        raise UsageError(f"{where}: found label {label!r}, expected a whole number from 0 to {info.classes - 1}")
    array = np.asarray(values)
    if array.shape != info.record_shape or not (array.dtype.kind == "f" or array.dtype == DTYPES["bfloat16"]):
        expected = f"floating point {info.record_shape} (copies, parts, h, w, c)"
        raise UsageError(f"{where}: found an array {array.dtype} {array.shape}, expected {expected}")
    with np.errstate(over="ignore"):
        stored = array.astype(DTYPES[info.dtype])
    if not np.isfinite(stored.astype(np.float32)).all():
        largest = np.abs(array.astype(np.float32)).max()
        raise UsageError(f"{where}: found values up to {largest}, expected finite ones that {info.dtype} can hold")
    record = np.zeros(1, info.layout)
    record["index"], record["label"], record["values"] = index, number, stored
    content = record.tobytes()[4:]
    return np.uint32(zlib.crc32(content)).tobytes() + content


def _notes(info: LatentInfo, shards: list[dict], content: str) -> dict:
    for i, shard in enumerate(shards):
        shard["file"] = shard_name(i, len(shards))
    records = sum(shard["records"] for shard in shards)
    notes = {"version": VERSION, "records": records, **dataclasses.asdict(info), "content": content, "shards": shards}
    notes["shape"] = list(info.shape)
    return {**notes, "checksum": checksum(notes)}


def _write_notes(folder: str, notes: dict) -> None:
    part = os.path.join(folder, f"{NOTES}.part")
    with open(part, "w") as file:
        json.dump(notes, file, indent=1)
    sync(part)
    os.rename(part, os.path.join(folder, NOTES))
    sync(folder)


def _part(folder: str, number: int) -> str:
    return os.path.join(folder, f"latents-{number:05d}.part")
