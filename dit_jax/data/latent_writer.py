"""Writes a folder of latents: shards under provisional names, then their final names, `latents.json` last.

Leftovers of a killed writer are never read, because `latents.json` is missing. The next writer goes on from the whole shards:

    latents-00000.part     the shard being written
    latents-00000.whole    a shard that is finished and synced
    latents.job            origin of the shards, which are all of one job, and their size
    latents.lock           held by the process that writes; by process 0 for those of several hosts

In a bucket the lock is a lease, and a shard is written on the disk and uploaded once it is finished.
Shard k has records k n to (k + 1) n - 1 of the split, less the malformed ones, whichever process writes it.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import operator
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from dit_jax.data.latent_notes import DTYPES, MAX_SHARDS, NOTES, VERSION, LatentInfo, checksum, shard_name
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
    rename,
    whole,
    write_file,
)

SHARD_BYTES = 1 << 30
JOB, LOCK = "latents.job", "latents.lock"
_CHUNK = 256  # records read at a time
_OURS = re.compile(
    r"latents-\d{5}(\.part|\.whole|-of-\d{5}\.array_record)|latents\.(lock|job|(json|job)\.(part|lock|tmp[\w.]+))"
)
_NAMED = re.compile(r"latents-\d{5}-of-\d{5}\.array_record")
_WHOLE = re.compile(r"latents-(\d{5})\.whole")
PER = "shard_records"  # key of the job: numbers of the split that a shard has
_NOT_OF_THE_JOB = ("scale", "shift", "autoencoder", "class_names", "left_out")  # these change no record that is there


@dataclass(frozen=True)
class Hosts:
    """The processes that write a folder together, by default this one alone; `by_leader` and `agreed` as in `devices.processes`."""

    index: int = 0
    count: int = 1
    by_leader: Callable = lambda work: work()
    agreed: Callable = contextlib.nullcontext


@dataclass
class _Shards:
    """Shards of `per` of the split's `size` records. Of the first whole ones: entries in the notes, digest of the records, left out."""

    size: int
    per: int
    entries: list = field(default_factory=list)
    content: object = field(default_factory=hashlib.sha256)
    left_out: list = field(default_factory=list)

    @property
    def count(self) -> int:
        return -(-self.size // self.per)

    def span(self, number: int) -> range:
        return range(number * self.per, min((number + 1) * self.per, self.size))

    def add(self, number: int, entry: dict, content, left_out: list) -> None:
        """Add a whole shard if it is the next one."""
        if number == len(self.entries):
            self.entries.append(entry)
            self.content, self.left_out = content, self.left_out + left_out


def write_latents(
    folder: str,
    info: LatentInfo,
    size: int,
    examples_of: Callable[[np.ndarray], Iterable],
    *,
    settle: Callable[[LatentRecords], LatentInfo] | None = None,
    shard_bytes: int = SHARD_BYTES,
    hosts: Hosts = Hosts(),
) -> LatentRecords:
    """Write the shards that are not whole yet, publish all and open the result. All `hosts` call it, and each writes some of them.

    `size`: records of the split. `examples_of(numbers)` yields those of the rising numbers (n,), as pairs (label, array of
    `info.record_shape`), label 0 without labels; None is a malformed record, which is left out and noted, while the others keep
    their numbers. Once the last shard is written it is asked for one more. Memory holds one record at a time.

    A writer that fails or is killed leaves whole shards, which are verified first and keep their size. Before publication `settle`
    gets all records, on process 0, and may change scale and shift. Raises UsageError naming the record that cannot be stored, or
    if the folder holds other files, complete latents, shards of another job or another writer; JobError if writing fails.
    """
    with contextlib.ExitStack() as stack:
        led: list = []

        def begin() -> tuple[int, list[int]]:
            check = stack.enter_context(_claimed(folder))
            shards, missing = _take_up(folder, info, _Shards(size, max(1, shard_bytes // info.layout.itemsize)))
            stack.enter_context(_tidied(folder, check))
            led.extend((check, shards))
            return shards.per, missing

        per, missing = hosts.by_leader(begin)
        check, shards = led or (lambda: None, _Shards(size, per))
        mine = missing[hosts.index :: hosts.count]
        examples = iter(examples_of(np.concatenate([np.arange(0), *map(np.asarray, map(shards.span, mine))])))
        with hosts.agreed():
            for number in mine:
                _write_shard(folder, check, info, shards, number, examples)
            next(examples, None)
        for number in range(hosts.by_leader(lambda: len(shards.entries)), shards.count):  # the others' shards
            if not hosts.by_leader(functools.partial(_take, folder, info, shards, number)):
                raise JobError(f"latents {folder}: shard {number} is damaged; the same command makes it again")

        def publish() -> None:
            left = dataclasses.replace(info, left_out=tuple(shards.left_out))
            _publish(folder, check, settle(_opened(folder, left, shards)) if settle else left, shards)

        hosts.by_leader(publish)
    return open_latents(folder)


@contextlib.contextmanager
def _claimed(folder: str) -> Iterator[Callable[[], None]]:
    """Make the folder and lock it against other writers; yields `check()`, which raises if the lock is lost."""
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
        yield check


@contextlib.contextmanager
def _tidied(folder: str, check: Callable[[], None]) -> Iterator[None]:
    """Remove the leftovers of a writer that fails but whole shards, unless the folder is another one's by now."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(StorageError):
            check()
            _remove(folder, [name for name in names(folder) if name.endswith((".whole", ".array_record", ".part"))])
        raise


def _remove(folder: str, kept: list[str]) -> None:
    """Remove a writer's leftovers but those `kept`, and the job if there are any."""
    for name in set(names(folder)) - {LOCK, *kept, *([JOB] if kept else [])}:
        if _OURS.fullmatch(name):
            delete(os.path.join(folder, name))


def _kept(folder: str) -> list[int]:
    return sorted(int(found[1]) for name in names(folder) if (found := _WHOLE.fullmatch(name)))


def _take_up(folder: str, info: LatentInfo, shards: _Shards) -> tuple[_Shards, list[int]]:
    """Verify the whole shards of an earlier writer: they, or `shards` if there are none, and the numbers of those that are missing.

    Damaged ones are deleted. Raises UsageError if they are of another job.
    """
    job = _job(info)
    with _disk(folder):
        named = [os.path.join(folder, name) for name in names(folder) if _NAMED.fullmatch(name)]
        noted = _noted(folder, job) if named or _kept(folder) else {}
        found = _Shards(shards.size, noted.get(PER, shards.per))
        for path in named:  # by a writer killed while it named the shards
            if (number := _first_record(path)) is not None:
                rename(path, _whole(folder, number // found.per))
        sound = [n for n in _kept(folder) if n < found.count and _take(folder, info, found, n, exact=PER not in noted)]
        _remove(folder, [_whole("", number) for number in sound])
        shards = found if sound else shards
        if shards.count > MAX_SHARDS:
            raise UsageError(
                f"latents {folder}: found {shards.count} shards, expected at most {MAX_SHARDS}; use larger ones"
            )
        if noted != (job := {**job, PER: shards.per}):
            write_file(os.path.join(folder, JOB), json.dumps(job, indent=1))
    return shards, [number for number in range(shards.count) if number not in sound]


def _job(info: LatentInfo) -> dict:
    """Return what the shards depend on, as JSON values."""
    fields = {key: value for key, value in dataclasses.asdict(info).items() if key not in _NOT_OF_THE_JOB}
    return json.loads(json.dumps(fields))


def _noted(folder: str, job: dict) -> dict:
    """Read the job of the shards, by older versions without their size. Raises UsageError if it is another one."""
    try:
        found = read_json(os.path.join(folder, JOB))
    except (OSError, UsageError):
        found = {}
    for key in [*job, *found]:
        if key != PER and found.get(key) != job.get(key):
            raise UsageError(
                f"latents {folder}: holds unfinished latents of another job: {key}: found {found.get(key)!r}, this command has "
                f"{job.get(key)!r}; finish that one, delete the folder, or name another one"
            )
    if type(found.get(PER, 1)) is not int or found.get(PER, 1) < 1:
        del found[PER]
    return found


def _first_record(path: str) -> int | None:
    with local(path) as copy, contextlib.suppress(RuntimeError, IndexError):
        return int.from_bytes(open_shard(copy).read([0])[0][4:12], "little")


def _take(folder: str, info: LatentInfo, shards: _Shards, number: int, exact: bool = False) -> bool:
    """Verify a whole shard, and add it if it is the next; returns False if it is damaged, or if `exact` and a record is left out."""
    span, content, left = shards.span(number), shards.content.copy(), []
    due = span.start
    with local(_whole(folder, number)) as path:
        try:
            reader = open_shard(path)
            count = reader.num_records()
            for start in range(0, count, _CHUNK):
                for record in reader.read(list(range(start, min(start + _CHUNK, count)))):
                    found, crc = int.from_bytes(record[4:12], "little"), zlib.crc32(memoryview(record)[4:])
                    sound = len(record) == info.layout.itemsize and record[:4] == crc.to_bytes(4, "little")
                    if not (sound and due <= found < span.stop):
                        return False
                    left += range(due, found)
                    due = found + 1
                    content.update(record)
        except RuntimeError:
            return False
        left += range(due, span.stop)
        if exact and left:
            return False
        shards.add(number, _entry(path, count), content, left)
    return True


def _opened(folder: str, info: LatentInfo, shards: _Shards) -> LatentRecords:
    """Open the records of shards before they have their final names."""
    files = tuple({**entry, "file": _whole(folder, i)} for i, entry in enumerate(shards.entries) if entry["records"])
    readers = tuple(open_shard(file["file"]) for file in files)
    return LatentRecords(folder, info, shards.content.hexdigest(), files, readers)


def _write_shard(
    folder: str, check: Callable, info: LatentInfo, shards: _Shards, number: int, examples: Iterator
) -> None:
    """Write the shard of the next `examples`; add it to `shards` if it is the next."""
    count, left, content = 0, [], shards.content.copy()
    with contextlib.ExitStack() as unfinished:
        with _disk(folder):
            part = os.path.join(folder, f"latents-{number:05d}.part")
            path = unfinished.enter_context(whole(_whole(folder, number), part))
            writer = ArrayRecordWriter(path, "group_size:1,uncompressed")  # half-precision noise does not compress
        try:
            for i in shards.span(number):
                if (example := next(examples)) is None:
                    left.append(i)
                    continue
                record = _encode(folder, info, i, *example)
                with _disk(folder):
                    writer.write(record)
                content.update(record)
                count += 1
        except BaseException:
            with contextlib.suppress(OSError, RuntimeError):
                writer.close()
            raise
        with _disk(folder):
            writer.close()
            entry = _entry(path, count)
            check()
            unfinished.close()  # it is whole
    shards.add(number, entry, content, left)


def _entry(path: str, records: int) -> dict:
    return {"file": "", "records": records, "bytes": os.path.getsize(path), "sha256": file_sha256(path)}


def _publish(folder: str, check: Callable, info: LatentInfo, shards: _Shards) -> None:
    """Give the shards their final names and write the notes. A shard without a record has none."""
    named = {number: entry for number, entry in enumerate(shards.entries) if entry["records"]}
    if not named:
        raise UsageError(f"latents {folder}: found no records to write, expected at least one")
    notes = _notes(info, list(named.values()), shards.content.hexdigest())
    with _disk(folder):
        for number, entry in named.items():
            check()
            rename(_whole(folder, number), os.path.join(folder, entry["file"]))
        if not create(os.path.join(folder, NOTES), json.dumps(notes, indent=1)):
            raise FileExistsError(17, "another process has written the notes", os.path.join(folder, NOTES))
        for path in [os.path.join(folder, JOB), *(_whole(folder, n) for n in range(shards.count) if n not in named)]:
            delete(path)


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
    notes |= {name: list(getattr(info, name)) for name in ("shape", "class_names", "left_out")}
    notes = {name: value for name, value in notes.items() if value != []}
    return {**notes, "checksum": checksum(notes)}


def _whole(folder: str, number: int) -> str:
    return os.path.join(folder, f"latents-{number:05d}.whole")
