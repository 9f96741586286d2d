"""Writes a folder of latents or images: shards under provisional names, then their final names, the notes last.

Leftovers of a killed writer are never read, because the notes are missing. The next writer goes on from the whole shards:

    latents-00000.part     the shard being written; of images, `images-00000.part`
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
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from dit_jax.data.notes import MAX_SHARDS, Info, checksum, defaults, listed, shard_name
from dit_jax.data.shard import Shards, open_shard, sound
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

_CHUNK = 256  # records read at a time
_NAMED, _WHOLE = r"{}-\d{{5}}-of-\d{{5}}\.array_record", r"{}-(\d{{5}})\.whole"  # to be formatted with the form
_OURS = r"{0}-\d{{5}}(\.part|\.whole|-of-\d{{5}}\.array_record)|{0}\.(lock|job|(json|job)\.(part|lock|tmp[\w.]+))"
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
class _Made:
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


def write_shards(
    folder: str,
    info: Info,
    size: int,
    per: int,
    examples_of: Callable[[np.ndarray], Iterable],
    settle: Callable[[Info, str, Shards], Info] = lambda info, *_: info,
    hosts: Hosts = Hosts(),
) -> None:
    """Write the shards that are not whole yet, and publish all. All `hosts` call it, and each writes some of them.

    `size`: records of the split, `per`: of a shard. `examples_of(numbers)` yields those of the rising numbers (n,), as tuples that
    `info.pack` takes; None is a malformed record, which is left out and noted, while the others keep their numbers. Once the last
    shard is written it is asked for one more. Memory holds one record at a time.

    A writer that fails or is killed leaves whole shards, which are verified first and keep their size. Before publication, on
    process 0, `settle` gets the notes, the records' SHA-256 and the records, and may change notes that no record depends on. Raises
    UsageError naming the record that cannot be stored, or if the folder holds other files, complete ones, shards of another job or
    another writer; JobError if writing fails.
    """
    with contextlib.ExitStack() as stack:
        led: list = []

        def begin() -> tuple[int, list[int]]:
            check = stack.enter_context(_claimed(folder, info.form))
            shards, missing = _take_up(folder, info, _Made(size, per))
            stack.enter_context(_tidied(folder, info.form, check))
            led.extend((check, shards))
            return shards.per, missing

        per, missing = hosts.by_leader(begin)
        check, shards = led or (lambda: None, _Made(size, per))
        mine = missing[hosts.index :: hosts.count]
        examples = iter(examples_of(np.concatenate([np.arange(0), *map(np.asarray, map(shards.span, mine))])))
        with hosts.agreed():
            for number in mine:
                _write_shard(folder, check, info, shards, number, examples)
            next(examples, None)
        for number in range(hosts.by_leader(lambda: len(shards.entries)), shards.count):  # the others' shards
            if not hosts.by_leader(functools.partial(_take, folder, info, shards, number)):
                raise JobError(f"{info.form} {folder}: shard {number} is damaged; the same command makes it again")

        def publish() -> None:
            left = dataclasses.replace(info, left_out=tuple(shards.left_out))
            _publish(folder, check, settle(left, shards.content.hexdigest(), _opened(folder, left, shards)), shards)

        hosts.by_leader(publish)


@contextlib.contextmanager
def _claimed(folder: str, form: str) -> Iterator[Callable[[], None]]:
    """Make the folder and lock it against other writers; yields `check()`, which raises if the lock is lost."""
    busy = UsageError(f"{form} {folder}: found another process writing there, expected none")
    with contextlib.ExitStack() as stack:
        try:
            check = stack.enter_context(lock(os.path.join(folder, f"{form}.lock"), busy, keep=False))
        except StorageError:
            raise
        except OSError as error:
            raise UsageError(f"{form} {folder}: cannot make the folder: {error.strerror}") from error
        if exists(os.path.join(folder, f"{form}.json")):
            why = f"found complete {form}, expected none; delete them or name another folder"
            raise UsageError(f"{form} {folder}: {why}")
        for name in names(folder):
            if not re.fullmatch(_OURS.format(form), name):
                raise UsageError(f"{form} {folder}: found {name!r}, expected an empty folder; name another one")
        yield check


@contextlib.contextmanager
def _tidied(folder: str, form: str, check: Callable[[], None]) -> Iterator[None]:
    """Remove the leftovers of a writer that fails but whole shards, unless the folder is another one's by now."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(StorageError):
            check()
            _remove(
                folder, form, [name for name in names(folder) if name.endswith((".whole", ".array_record", ".part"))]
            )
        raise


def _remove(folder: str, form: str, kept: list[str]) -> None:
    """Remove a writer's leftovers but those `kept`, and the job if there are any."""
    for name in set(names(folder)) - {f"{form}.lock", *kept, *([f"{form}.job"] if kept else [])}:
        if re.fullmatch(_OURS.format(form), name):
            delete(os.path.join(folder, name))


def _kept(folder: str, form: str) -> list[int]:
    return sorted(int(found[1]) for name in names(folder) if (found := re.fullmatch(_WHOLE.format(form), name)))


def _take_up(folder: str, info: Info, shards: _Made) -> tuple[_Made, list[int]]:
    """Verify the whole shards of an earlier writer: they, or `shards` if there are none, and the numbers of those that are missing.

    Damaged ones are deleted. Raises UsageError if they are of another job.
    """
    job, form = job_of(info), info.form
    with _disk(folder, form):
        named = [os.path.join(folder, name) for name in names(folder) if re.fullmatch(_NAMED.format(form), name)]
        noted = _noted(folder, form, job) if named or _kept(folder, form) else {}
        found = _Made(shards.size, noted.get(PER, shards.per))
        for path in named:  # by a writer killed while it named the shards
            if (number := _first_record(path)) is not None:
                rename(path, _whole(folder, form, number // found.per))
        right = [
            n for n in _kept(folder, form) if n < found.count and _take(folder, info, found, n, exact=PER not in noted)
        ]
        _remove(folder, form, [_whole("", form, number) for number in right])
        shards = found if right else shards
        if shards.count > MAX_SHARDS:
            raise UsageError(
                f"{form} {folder}: found {shards.count} shards, expected at most {MAX_SHARDS}; use larger ones"
            )
        if noted != (job := {**job, PER: shards.per}):
            write_file(os.path.join(folder, f"{form}.job"), json.dumps(job, indent=1))
    return shards, [number for number in range(shards.count) if number not in right]


def job_of(info: Info) -> dict:
    """Return what the shards depend on, as JSON values."""
    fields = {key: value for key, value in _fields(info).items() if key not in _NOT_OF_THE_JOB}
    return json.loads(json.dumps(fields))


def _fields(info: Info) -> dict:
    """Return a description as JSON values, without fields of default values."""
    given = defaults(type(info))
    return listed({key: value for key, value in dataclasses.asdict(info).items() if given.get(key) != value})


def _noted(folder: str, form: str, job: dict) -> dict:
    """Read the job of the shards, by older versions without their size. Raises UsageError if it is another one."""
    try:
        found = read_json(os.path.join(folder, f"{form}.job"))
    except (OSError, UsageError):
        found = {}
    for key in [*job, *found]:
        if key != PER and found.get(key) != job.get(key):
            raise UsageError(
                f"{form} {folder}: holds unfinished {form} of another job: {key}: found {found.get(key)!r}, this command has "
                f"{job.get(key)!r}; finish that one, delete the folder, or name another one"
            )
    if type(found.get(PER, 1)) is not int or found.get(PER, 1) < 1:
        del found[PER]
    return found


def _first_record(path: str) -> int | None:
    with local(path) as copy, contextlib.suppress(RuntimeError, IndexError):
        return int.from_bytes(open_shard(copy).read([0])[0][4:12], "little")


def _take(folder: str, info: Info, shards: _Made, number: int, exact: bool = False) -> bool:
    """Verify a whole shard, and add it if it is the next; returns False if it is damaged, or if `exact` and a record is left out."""
    span, content, left = shards.span(number), shards.content.copy(), []
    due = span.start
    with local(_whole(folder, info.form, number)) as path:
        try:
            reader = open_shard(path)
            count = reader.num_records()
            for start in range(0, count, _CHUNK):
                for record in reader.read(list(range(start, min(start + _CHUNK, count)))):
                    found = int.from_bytes(record[4:12], "little")
                    if not (info.fits(len(record)) and sound(record) and due <= found < span.stop):
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


def _opened(folder: str, info: Info, shards: _Made) -> Shards:
    """Open the records of shards before they have their final names."""
    files = tuple(
        {**entry, "file": _whole(folder, info.form, i)} for i, entry in enumerate(shards.entries) if entry["records"]
    )
    readers = tuple(open_shard(file["file"]) for file in files)
    return Shards(info.form, folder, files, readers)


def _write_shard(folder: str, check: Callable, info: Info, shards: _Made, number: int, examples: Iterator) -> None:
    """Write the shard of the next `examples`; add it to `shards` if it is the next."""
    count, left, content = 0, [], shards.content.copy()
    with contextlib.ExitStack() as unfinished:
        with _disk(folder, info.form):
            part = os.path.join(folder, f"{info.form}-{number:05d}.part")
            path = unfinished.enter_context(whole(_whole(folder, info.form, number), part))
            writer = ArrayRecordWriter(
                path, "group_size:1,uncompressed"
            )  # noise does not compress, nor do encoded pictures
        try:
            for i in shards.span(number):
                if (example := next(examples)) is None:
                    left.append(i)
                    continue
                record = info.pack(f"{info.form} {folder}, record {i}", i, *example)
                with _disk(folder, info.form):
                    writer.write(record)
                content.update(record)
                count += 1
        except BaseException:
            with contextlib.suppress(OSError, RuntimeError):
                writer.close()
            raise
        with _disk(folder, info.form):
            writer.close()
            entry = _entry(path, count)
            check()
            unfinished.close()  # it is whole
    shards.add(number, entry, content, left)


def _entry(path: str, records: int) -> dict:
    return {"file": "", "records": records, "bytes": os.path.getsize(path), "sha256": file_sha256(path)}


def _publish(folder: str, check: Callable, info: Info, shards: _Made) -> None:
    """Give the shards their final names and write the notes. A shard without a record has none."""
    named = {number: entry for number, entry in enumerate(shards.entries) if entry["records"]}
    if not named:
        raise UsageError(f"{info.form} {folder}: found no records to write, expected at least one")
    notes = _notes(info, list(named.values()), shards.content.hexdigest())
    with _disk(folder, info.form):
        for number, entry in named.items():
            check()
            rename(_whole(folder, info.form, number), os.path.join(folder, entry["file"]))
        if not create(path := os.path.join(folder, f"{info.form}.json"), json.dumps(notes, indent=1)):
            raise FileExistsError(17, "another process has written the notes", path)
        for path in [
            os.path.join(folder, f"{info.form}.job"),
            *(_whole(folder, info.form, n) for n in range(shards.count) if n not in named),
        ]:
            delete(path)


@contextlib.contextmanager
def _disk(folder: str, form: str) -> Iterator[None]:
    """Turn failures of writing into JobErrors; errors of computing the records are raised outside it."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise JobError(f"{form} {folder}: cannot write them: {why}; they are not complete, encode again") from error


def _notes(info: Info, shards: list[dict], content: str) -> dict:
    for i, shard in enumerate(shards):
        shard["file"] = shard_name(info.form, i, len(shards))
    records = sum(shard["records"] for shard in shards)
    notes = {"version": info.version, "records": records, **_fields(info), "content": content, "shards": shards}
    return {**notes, "checksum": checksum(notes)}


def _whole(folder: str, form: str, number: int) -> str:
    return os.path.join(folder, f"{form}-{number:05d}.whole")
