"""Writes a folder of latents: shards under provisional names, then their final names, `latents.json` last.

Leftovers of a killed writer are never read, because `latents.json` is missing. The next writer removes them
(`write_latents`), or resumes after the whole shards (`continue_latents`):

    latents-00000.part     the shard being written
    latents-00000.whole    a shard that is finished and synced
    latents.job            origin of the shards, which are all of one job
    latents.lock           held by the process that writes

In a bucket the lock is a lease, and a shard is written on the disk and uploaded once it is finished.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import operator
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from dit_jax.data.latent_notes import DTYPES, MAX_LEFT, MAX_SHARDS, NOTES, VERSION, LatentInfo, checksum, shard_name
from dit_jax.data.latents import LatentRecords, open_latents
from dit_jax.data.shard import open_shard
from dit_jax.error import JobError, StorageError, UsageError
from dit_jax.files import (
    create,
    delete,
    exists,
    file_sha256,
    local,
    lock,
    names,
    read_json,
    remote,
    rename,
    sync,
    upload,
    write_file,
)

SHARD_BYTES = 1 << 30
JOB, LOCK = "latents.job", "latents.lock"
_CHUNK = 256  # records read at a time
_OURS = re.compile(
    r"latents-\d{5}(\.part|\.whole|-of-\d{5}\.array_record)|latents\.(lock|job|(json|job)\.(part|lock|tmp[\w.]+))"
)
_NAMED = re.compile(r"latents-(\d{5})-of-\d{5}\.array_record")
_NOT_OF_THE_JOB = ("scale", "shift", "autoencoder", "left_out")  # these change no record that is there


@dataclass
class _Shards:
    """Whole shards: their entries in the notes, without file names, the digest of all their records, numbers left out of them."""

    entries: list = field(default_factory=list)
    content: object = field(default_factory=hashlib.sha256)
    left_out: list = field(default_factory=list)

    @property
    def next(self) -> int:
        """The number of the split's next record."""
        return sum(entry["records"] for entry in self.entries) + len(self.left_out)


@dataclass(frozen=True)
class _Place:
    """A folder that this process writes to: `disk`, where its shards are written, and `check()`, which raises if the lock is lost."""

    folder: str
    disk: str
    check: Callable[[], None]

    def part(self, number: int) -> str:
        return os.path.join(self.disk, f"latents-{number:05d}.part")

    def finish(self, number: int) -> None:
        """Make a part a whole shard."""
        self.check()
        if remote(self.folder):
            upload(self.part(number), _whole(self.folder, number))
            delete(self.part(number))
            self.check()
        else:
            sync(self.part(number))
            rename(self.part(number), _whole(self.folder, number))


def write_latents(
    folder: str, info: LatentInfo, examples: Iterable, *, shard_bytes: int = SHARD_BYTES
) -> LatentRecords:
    """Write `examples`, pairs (label, array of `info.record_shape`), and open the result. Without labels, label is 0.

    Memory holds one record at a time. Removes leftovers of a killed writer first, and its own if it fails. Raises UsageError
    naming the record that cannot be stored, or if the folder holds other files, complete latents or another writer; JobError
    if writing fails.
    """
    with _claimed(folder) as place:
        _remove_leftovers(folder)
        with _tidied(place, shards := _Shards(), keep=False):
            _write_shards(place, info, enumerate(examples), shard_bytes, shards)
            _publish(place, info, shards)
    return open_latents(folder)


def continue_latents(
    folder: str,
    info: LatentInfo,
    examples_from: Callable[[int], Iterable],
    *,
    settle: Callable[[LatentRecords], LatentInfo] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> LatentRecords:
    """Write as `write_latents` does, but resume after the whole shards: `examples_from(first)` yields records from `first` on.

    An example None is a malformed record: it is left out, and noted; the others keep their numbers.

    A writer that fails or is killed leaves whole shards, which are verified first, so at most one is computed again. Before
    publication `settle` gets all records and may change scale and shift. Raises as `write_latents`, and UsageError if the
    folder holds shards of another job.
    """
    with _claimed(folder) as place:
        shards = _take_up(folder, info)
        with _tidied(place, shards, keep=True):
            _write_shards(place, info, enumerate(examples_from(shards.next), shards.next), shard_bytes, shards)
            info = dataclasses.replace(info, left_out=tuple(shards.left_out))
            _publish(place, settle(_opened(folder, info, shards)) if settle else info, shards)
    return open_latents(folder)


@contextlib.contextmanager
def _claimed(folder: str) -> Iterator[_Place]:
    """Make the folder and lock it against other writers."""
    busy = UsageError(f"latents {folder}: found another process writing there, expected none")
    with contextlib.ExitStack() as stack:
        try:
            check = stack.enter_context(lock(os.path.join(folder, LOCK), busy, keep=False))
        except StorageError:
            raise
        except OSError as error:
            raise UsageError(f"latents {folder}: cannot make the folder: {error.strerror}") from error
        if exists(os.path.join(folder, NOTES)):
            why = "found complete latents, expected none; delete them or name another folder"
            raise UsageError(f"latents {folder}: {why}")
        for name in names(folder):
            if not _OURS.fullmatch(name):
                raise UsageError(f"latents {folder}: found {name!r}, expected an empty folder; name another one")
        disk = stack.enter_context(tempfile.TemporaryDirectory(prefix="dit_jax-")) if remote(folder) else folder
        yield _Place(folder, disk, check)


@contextlib.contextmanager
def _tidied(place: _Place, shards: _Shards, keep: bool) -> Iterator[None]:
    """Remove the leftovers of a writer that fails, unless the folder is another one's by now; `keep`: whole shards stay."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(StorageError):
            place.check()
            _remove_leftovers(place.folder, keep=keep and bool(shards.entries))
        raise


def _remove_leftovers(folder: str, keep: bool = False) -> None:
    """Remove a writer's leftovers; with `keep`, or if `latents.json` exists, all but whole shards and the job."""
    keep = keep or exists(os.path.join(folder, NOTES))
    for name in set(names(folder)) - {LOCK}:
        if _OURS.fullmatch(name) and not (keep and (name == JOB or name.endswith((".whole", ".array_record")))):
            delete(os.path.join(folder, name))


def _take_up(folder: str, info: LatentInfo) -> _Shards:
    """Verify the whole shards of an earlier writer; the first damaged one and all after it are deleted.

    Raises UsageError if they are of another job.
    """
    shards, job = _Shards(), _job(info)
    with _disk(folder):
        for name in names(folder):  # left by a writer killed while it named the shards
            if named := _NAMED.fullmatch(name):
                rename(os.path.join(folder, name), _whole(folder, int(named[1])))
        if not exists(_whole(folder, 0)):
            _remove_leftovers(folder)
            write_file(os.path.join(folder, JOB), json.dumps(job, indent=1))
            return shards
        _refuse_other(folder, job)
        while exists(shard := _whole(folder, len(shards.entries))):
            with local(shard) as path:
                if not _take_shard(path, info, shards):
                    break
        for name in set(names(folder)) - {JOB, LOCK}:
            number = re.fullmatch(r"latents-(\d{5})\.whole", name)
            if not (number and int(number[1]) < len(shards.entries)):
                delete(os.path.join(folder, name))
    return shards


def _job(info: LatentInfo) -> dict:
    """Return what the shards depend on, as JSON values."""
    fields = {key: value for key, value in dataclasses.asdict(info).items() if key not in _NOT_OF_THE_JOB}
    return json.loads(json.dumps(fields))


def _refuse_other(folder: str, job: dict) -> None:
    try:
        found = read_json(os.path.join(folder, JOB))
    except (OSError, UsageError):
        found = {}
    for key in [*job, *found]:
        if found.get(key) != job.get(key):
            raise UsageError(
                f"latents {folder}: holds unfinished latents of another job: {key}: found {found.get(key)!r}, this command has "
                f"{job.get(key)!r}; finish that one, delete the folder, or name another one"
            )


def _take_shard(path: str, info: LatentInfo, shards: _Shards) -> bool:
    """Verify the next whole shard and add it to `shards`; returns False if it is damaged."""
    content, due, gaps = shards.content.copy(), shards.next, []
    try:
        reader = open_shard(path)
        count = reader.num_records()
        for start in range(0, count, _CHUNK):
            for record in reader.read(list(range(start, min(start + _CHUNK, count)))):
                number = int.from_bytes(record[4:12], "little")
                if len(record) != info.layout.itemsize or not due <= number < due + MAX_LEFT:
                    return False
                gaps += range(due, number)
                due = number + 1
                if record[:4] != zlib.crc32(memoryview(record)[4:]).to_bytes(4, "little"):
                    return False
                content.update(record)
    except RuntimeError:
        return False
    shards.entries.append(_entry(path, count))
    shards.content, shards.left_out = content, shards.left_out + gaps
    return count > 0


def _opened(folder: str, info: LatentInfo, shards: _Shards) -> LatentRecords:
    """Open the records of shards before they have their final names."""
    paths = [_whole(folder, i) for i in range(len(shards.entries))]
    files = tuple({**entry, "file": path} for entry, path in zip(shards.entries, paths, strict=True))
    return LatentRecords(folder, info, shards.content.hexdigest(), files, tuple(open_shard(path) for path in paths))


def _write_shards(place: _Place, info: LatentInfo, examples: Iterator, shard_bytes: int, shards: _Shards) -> None:
    """Write `examples`, pairs (number, example), as shards and append them to `shards`."""
    folder = place.folder
    examples = ((i, example) for i, example in examples if example is not None or shards.left_out.append(i))
    per_shard = max(1, shard_bytes // info.layout.itemsize)
    for number in range(len(shards.entries), MAX_SHARDS):
        records = (_encode(folder, info, i, *example) for i, example in itertools.islice(examples, per_shard))
        first = next(records, None)
        if first is None:
            break
        count, path, content = 0, place.part(number), shards.content.copy()
        with _writer(folder, path) as write:
            for record in itertools.chain([first], records):
                write(record)
                content.update(record)
                count += 1
        with _disk(folder):
            entry = _entry(path, count)
            place.finish(number)
        shards.entries.append(entry)
        shards.content = content
    else:
        raise UsageError(f"latents {folder}: found records for more than {MAX_SHARDS} shards; use a larger shard_bytes")
    if not shards.entries:
        raise UsageError(f"latents {folder}: found no records to write, expected at least one")


def _entry(path: str, records: int) -> dict:
    return {"file": "", "records": records, "bytes": os.path.getsize(path), "sha256": file_sha256(path)}


def _publish(place: _Place, info: LatentInfo, shards: _Shards) -> None:
    """Give the shards their final names and write the notes."""
    folder, notes = place.folder, _notes(info, shards.entries, shards.content.hexdigest())
    with _disk(folder):
        for i, entry in enumerate(shards.entries):
            place.check()
            rename(_whole(folder, i), os.path.join(folder, entry["file"]))
        if not create(os.path.join(folder, NOTES), json.dumps(notes, indent=1)):
            raise FileExistsError(17, "another process has written the notes", os.path.join(folder, NOTES))
        delete(os.path.join(folder, JOB))


@contextlib.contextmanager
def _writer(folder: str, path: str) -> Iterator[Callable]:
    """Yield a function that appends a record to the file `path`. Raises JobError."""
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
    """Turn failures of writing into JobErrors; errors of computing the latents are raised outside it."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise JobError(f"latents {folder}: cannot write them: {why}; they are not complete, encode again") from error


def _encode(folder: str, info: LatentInfo, index: int, label, values) -> bytes:
    """Pack one record for the disk. Raises UsageError naming the record if it does not fit `info`."""
    where = f"latents {folder}, record {index}"
    try:
        number = operator.index(label)
    except TypeError:
        number = -1
    last = max(info.classes - 1, 0)
    if not 0 <= number <= last:
        raise UsageError(f"{where}: found label {label!r}, expected a whole number from 0 to {last}")
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
    notes["shape"], notes["left_out"] = list(info.shape), list(info.left_out)
    if not info.left_out:
        del notes["left_out"]
    return {**notes, "checksum": checksum(notes)}


def _whole(folder: str, number: int) -> str:
    return os.path.join(folder, f"latents-{number:05d}.whole")
