"""Opens and reads ArrayRecord files such that damage is told at once from a bucket that refuses or does not answer.

Records of this package begin with the CRC-32 of the rest, little-endian. Strings in them each follow their length (uint32).
"""

import contextlib
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from dit_jax.error import StorageError, UsageError
from dit_jax.files import absolute, file_sha256, remote, sizes, slow

ADVICE = "delete the folder and encode again, or restore the file"
_CRC_BYTES = 4

_REFUSED = "a last message of "  # in errors of the library's own client of buckets
_OF_THE_FILE = ("No such object", "range ")  # after it: the file is missing, or shorter than its own index says


def open_shard(path: str) -> ArrayRecordReader:
    """Open a random-access reader, which threads may share. Raises RuntimeError if the file is missing or damaged; see `reading`."""
    if not remote(path) and os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait forever
        raise RuntimeError("found no regular file")
    with reading(path):
        reader = ArrayRecordReader(path, options="readahead_buffer_size:0", file_reader_buffer_size=32768)
        if not reader.ok():
            reader.read([0])  # raises the reason
            raise RuntimeError("the reader gives no reason")
    return reader


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Raise StorageError for what a bucket refused, which is no damage of a record; say it if the bucket does not answer for long."""
    if not remote(path):
        yield
        return
    try:
        with slow(path, "reading"):
            yield
    except RuntimeError as error:
        said = str(error).partition(_REFUSED)[2]
        if not said or any(why in said for why in _OF_THE_FILE):
            raise
        raise StorageError(f"{path}: cannot be read now ({said.partition('; reading ')[0]})") from error


def sealed(content: bytes) -> bytes:
    """Return a record of that content, its CRC-32 first."""
    return zlib.crc32(content).to_bytes(_CRC_BYTES, "little") + content


def sound(record: bytes) -> bool:
    """Return whether a record has the CRC-32 that it begins with."""
    return zlib.crc32(memoryview(record)[_CRC_BYTES:]).to_bytes(_CRC_BYTES, "little") == record[:_CRC_BYTES]


def strings(found: Iterable[bytes]) -> bytes:
    return b"".join(len(one).to_bytes(4, "little") + one for one in found)


def split_strings(packed: bytes) -> list[bytes]:
    """Undo `strings`."""
    found, at = [], 0
    while at < len(packed):
        end = at + 4 + int.from_bytes(packed[at : at + 4], "little")
        found.append(packed[at + 4 : end])
        at = end
    return found


@dataclass(frozen=True)
class Shards:
    """The records of all shards in a folder, read at random by their places. Threads may share it. Raises UsageError naming a record."""

    form: str  # latents | images
    folder: str
    files: tuple  # the shards' entries in the notes
    readers: tuple

    def __len__(self) -> int:
        return sum(file["records"] for file in self.files)

    def where(self, index: int) -> str:
        """Name a record for messages."""
        ends = np.cumsum([file["records"] for file in self.files])
        file = self.files[int(np.searchsorted(ends, index, "right"))]["file"]
        return f"{self.form} {os.path.join(self.folder, file)}, record {index}"

    def read(self, indices: np.ndarray) -> list[bytes]:
        """Read the records at `indices` (b,). Raises UsageError if one cannot be read."""
        starts = np.cumsum([0] + [file["records"] for file in self.files])
        shards = np.searchsorted(starts, indices, "right") - 1
        stored = [b""] * len(indices)
        for shard in np.unique(shards).tolist():
            rows = np.flatnonzero(shards == shard)
            within = (indices[rows] - starts[shard]).tolist()
            try:
                found = self._some(shard, within)
            except StorageError:
                raise
            except RuntimeError:
                found = [self._one(shard, i, int(indices[row])) for i, row in zip(within, rows, strict=True)]
            for row, record in zip(rows.tolist(), found, strict=True):
                stored[row] = record
        return stored

    def check(self, indices: np.ndarray, stored: list[bytes]) -> None:
        """Raises UsageError naming one of the records that has another CRC-32."""
        for i, record in zip(indices.tolist(), stored, strict=True):
            if not sound(record):
                found = zlib.crc32(memoryview(record)[_CRC_BYTES:])
                expected = int.from_bytes(record[:_CRC_BYTES], "little")
                raise UsageError(f"{self.where(i)}: found CRC-32 {found:08x}, expected {expected:08x}; {ADVICE}")

    def _one(self, shard: int, within: int, index: int) -> bytes:
        try:
            return self._some(shard, [within])[0]
        except StorageError:
            raise
        except RuntimeError as error:
            raise UsageError(f"{self.where(index)}: cannot read it: {str(error).splitlines()[0]}; {ADVICE}") from error

    def _some(self, shard: int, within: list[int]) -> list[bytes]:
        with reading(self.folder):
            return self.readers[shard].read(within)


def open_shards(form: str, folder: str, entries: list[dict], verify: bool = False) -> Shards:
    """Open the shards of a folder by their entries in its notes, comparing sizes and numbers of records.

    `verify` also reads every shard and compares its SHA-256. Raises UsageError naming the file.
    """
    there = sizes(folder) if remote(folder) else {}
    readers = tuple(_open_entry(form, folder, entry, verify, there) for entry in entries)
    return Shards(form, folder, tuple(entries), readers)


def real(path: str) -> str:
    return absolute(path) if remote(path) else os.path.realpath(path)


def _open_entry(form: str, folder: str, shard: dict, verify: bool, there: dict) -> ArrayRecordReader:
    """Open one shard. `there`: a bucket's listing. Raises UsageError if the file is not the one in the notes."""
    path = os.path.join(folder, shard["file"])
    if os.path.dirname(real(path)) != real(folder):
        raise UsageError(f"{form} {path}: found a link to {real(path)}, expected a file of this folder")
    try:
        if remote(path) and shard["file"] not in there:
            raise FileNotFoundError(2, "no such object", path)
        if (size := there[shard["file"]]["bytes"] if there else os.path.getsize(path)) != shard["bytes"]:
            raise UsageError(f"{form} {path}: found {size} bytes, expected {shard['bytes']}; {ADVICE}")
        if verify and (digest := file_sha256(path)) != shard["sha256"]:
            raise UsageError(f"{form} {path}: found SHA-256 {digest}, expected {shard['sha256']}; {ADVICE}")
        reader = open_shard(path)
    except StorageError:
        raise
    except (OSError, RuntimeError) as error:
        raise UsageError(f"{form} {path}: cannot read it: {str(error).splitlines()[0]}; {ADVICE}") from error
    records = reader.num_records()
    if records != shard["records"]:
        raise UsageError(f"{form} {path}: found {records} records, expected {shard['records']}; {ADVICE}")
    return reader
