"""Drawn images, or their features, on the disk: parts in a folder while they are drawn; for images one npz at the end.

    job.json             what the images depend on; a folder holds the images of one job only
    START-END.part       SHA-256 of job, range and content, then the content: images START to END - 1, labels
    lock                 held by the process that draws; process 0 holds it for those of several hosts, which share the folder

The images of an incomplete or damaged part are drawn again. An image may be any uint8 array of fixed shape.
The npz has the ADM layout, with the job as its comment.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import jax
import numpy as np

from dit_jax import checkpoint
from dit_jax.devices.processes import agree, by_leader, compare, everyone_is_here, leader, of_all
from dit_jax.devices.rows import shares
from dit_jax.error import Interrupted, JobError, StorageError, UsageError
from dit_jax.files import (
    delete,
    delete_empty,
    is_file,
    json_text,
    lock,
    names,
    opened,
    parse_json,
    read,
    read_json,
    whole,
    write_file,
)
from dit_jax.log import drawing_progress, notice, say, warn

Batch = tuple[np.ndarray, np.ndarray]  # images uint8 (b, h, w, c), labels int32 (b,)
PART_BYTES = 1 << 26  # most bytes of images that wait in memory
PART_SECONDS = 0.25  # least seconds of drawing in a part, except in the last one
NAME = re.compile(r"(\d{10})-(\d{10})\.part")
JOB, LOCK = "job.json", "lock"


@dataclass(frozen=True)
class Store:
    """A folder of parts, its job, and the shape (h, w, c) of its images."""

    folder: str
    job: dict
    shape: tuple[int, ...]
    check: Callable[[], None] = lambda: None  # raises if the folder's lock is lost


def complete(out: str, job: dict, shape: tuple[int, ...], num: int, draw: Callable, stop: list) -> None:
    """Makes `out` the npz of images 0..num-1 of `job`: reuses those in `out` and its parts, and draws the rest.

    `draw(indices, most)` yields batches of those images in order, as `Sampling.draw` does. Once `stop` is not empty, the current batch
    is kept and Interrupted is raised. All processes of the job call it. Raises UsageError if `out` or the parts are another job's,
    JobError if another process draws into `out`.
    """
    with locked_together(f"{out}.parts") as check:
        store = Store(f"{out}.parts", job, shape, check)
        held = by_leader(lambda: _begin(store, out, num))
        if held == num:
            say(f"{out}: all {num} images are there; nothing to do")
        else:
            kept = _draw_missing(store, num, draw, stop)
            if leader():
                write_npz(out, os.path.join(store.folder, "whole.tmp"), num, shape, _in_order(store, kept, num), job)
        if leader():
            check()
            remove(store.folder)
        everyone_is_here(out)


def _begin(store: Store, out: str, num: int) -> int:
    """Prepares the folder; returns the number of images that `out` holds, which are in parts then, if it is not `num`."""
    held = images_held(out, store.job, num)
    _prepare(store)
    if 0 < held < num:
        _take_over(store, out, held)
    return held


def gather(store: Store, num: int, draw: Callable, stop: list, quiet: bool = False) -> Iterator[Batch]:
    """Yields rows 0..num-1 of the job in order, from existing parts and from `draw`; the folder must be locked.

    The parts stay until `remove`. All processes of the job call it, and one may read what it yields. Raises as `complete` does.
    """
    by_leader(lambda: _prepare(store))
    return _in_order(store, _draw_missing(store, num, draw, stop, quiet), num)


@contextlib.contextmanager
def locked(folder: str) -> Iterator[Callable[[], None]]:
    """Makes and locks `folder`, and removes it at the end if it is empty; yields `check()`, see `files.lock`.

    Raises JobError if another process holds the lock.
    """
    busy = JobError(f"{folder}: another process draws into it; wait for its end, or use another --out")
    try:
        with lock(os.path.join(folder, LOCK), busy, keep=False) as check:
            yield check
    finally:
        delete_empty(folder)


@contextlib.contextmanager
def locked_together(folder: str) -> Iterator[Callable[[], None]]:
    """As `locked`, by process 0 for all processes of the job, which all call it."""
    with contextlib.ExitStack() as stack:
        checks: list[Callable] = []
        by_leader(lambda: checks.append(stack.enter_context(locked(folder))))
        yield checks[0] if checks else lambda: None


def refuse_other(where: str, found: object, job: dict, advice: str) -> None:
    """Raises UsageError, which names what differs, unless `found` equals `job`."""
    if found == job:
        return
    found = found if isinstance(found, dict) else {}
    keys = [key for key in {**job, **found} if found.get(key) != job.get(key)]
    shown = "; ".join(f"{key}: found {found.get(key)!r}, this command has {job.get(key)!r}" for key in keys[:3])
    more = f" (and {len(keys) - 3} more)" if len(keys) > 3 else ""
    raise UsageError(f"{where}: holds images of another job: {shown}{more}; {advice}")


def images_held(out: str, job: dict, num: int) -> int:
    """Number of images of this job in the npz `out`; 0 if it is absent or damaged.

    Raises UsageError for any other file and for more than `num` images, so that nothing drawn is ever overwritten.
    """
    if not is_file(out):
        return 0
    advice = "remove it or use another --out"
    try:
        with opened(out) as file, zipfile.ZipFile(file) as archive:
            found = parse_json(archive.comment)
            damaged = archive.testzip()
            with archive.open("arr_0.npy") as f:
                held = 0 if damaged else _npy_shape(f)[0]
    except (zipfile.BadZipFile, ValueError, KeyError):
        raise UsageError(f"{out}: exists and does not say which job drew it; {advice}") from None
    refuse_other(out, found, job, advice)
    if damaged:
        warn(f"{out}: {damaged} is damaged; its images are drawn again")
    if held > num:
        raise UsageError(f"{out}: holds {held} images of this job, more than --num={num}; {advice}")
    return held


def begun(out: str) -> dict:
    """The job whose parts lie beside `out`; {} if there is none or its job.json cannot be read."""
    try:
        return read_json(os.path.join(f"{out}.parts", JOB))
    except (OSError, UsageError):
        return {}


def find_step(workdir: str, step: int | None, out: str, weights: str) -> int:
    """Step of the checkpoint: `step`, else the one that the parts of `out` were drawn from, if it is kept, else the newest."""
    asked = begun(out).get("step") if out and step is None else None
    return checkpoint.find_step(workdir, asked if asked in checkpoint.steps(workdir) else step, weights)


def _prepare(store: Store) -> None:
    """Writes job.json, or checks that it is this job's."""
    path = os.path.join(store.folder, JOB)
    advice = "go on with that job's command, remove the folder, or let this one write elsewhere"
    if is_file(path):
        try:
            found = parse_json(read(path))
        except ValueError as error:
            redo = f"remove {store.folder}, its images are then drawn again"
            raise JobError(f"{path}: damaged ({error}); {redo}") from None
        refuse_other(store.folder, found, store.job, advice)
    elif others := [name for name in names(store.folder) if not name.startswith((JOB, LOCK))]:
        raise UsageError(
            f"{store.folder}: holds {others[0]!r} and no {JOB}, expected no folder there; let this job write elsewhere"
        )
    else:
        write_file(path, json_text(store.job, indent=1) + "\n")


def _path(store: Store, start: int, end: int) -> str:
    return os.path.join(store.folder, f"{start:010d}-{end:010d}.part")


def _digest(store: Store, start: int, end: int, *content) -> bytes:
    digest = hashlib.sha256(json.dumps([store.job, start, end]).encode())
    for data in content:
        digest.update(data)
    return digest.digest()


def save_part(store: Store, start: int, images: np.ndarray, labels: np.ndarray) -> tuple[int, int]:
    """Writes images (b, h, w, c) and labels (b,), numbered from `start`, whole or not at all. Returns their range."""
    end = start + len(labels)
    store.check()
    path, content = _path(store, start, end), (images.tobytes(), labels.astype("<i4").tobytes())
    write_file(path, b"".join((_digest(store, start, end, *content), *content)))
    return start, end


def load_part(store: Store, start: int, end: int) -> Batch:
    """Reads images (b, h, w, c) and labels (b,) of a part. Raises ValueError if it is damaged."""
    with opened(_path(store, start, end)) as f:
        digest, content = f.read(32), f.read()
    if digest != _digest(store, start, end, content):
        raise ValueError("its checksum does not match")
    split = (end - start) * int(np.prod(store.shape))
    images = np.frombuffer(content[:split], np.uint8).reshape(-1, *store.shape)
    return images, np.frombuffer(content[split:], "<i4")


def kept_parts(store: Store) -> list[tuple[int, int]]:
    """Ranges of the parts that verify, ascending and disjoint. Other parts are removed with a warning."""
    found: list[tuple[int, int]] = []
    for name in names(store.folder):
        path, match = os.path.join(store.folder, name), NAME.fullmatch(name)
        if ".tmp" in name:
            notice(f"{path}: unfinished, removed")
            delete(path)
        if not match:
            continue
        start, end = int(match[1]), int(match[2])
        try:
            if not (found[-1][1] if found else 0) <= start < end:
                raise ValueError("its range overlaps with another part's")
            load_part(store, start, end)
        except ValueError as error:
            warn(f"{path}: damaged ({error}); images {start} to {end - 1} are drawn again")
            delete(path)
        else:
            found.append((start, end))
    return found


def missing(kept: list[tuple[int, int]], num: int) -> list[tuple[int, int]]:
    """Ranges of 0..num-1 that the ascending ranges `kept` do not cover."""
    starts, ends = [start for start, _ in kept], [end for _, end in kept]
    gaps = zip([0, *ends], [*starts, num], strict=True)
    return [(start, min(end, num)) for start, end in gaps if start < min(end, num)]


def _take_over(store: Store, out: str, held: int) -> None:
    """Writes parts for the images of a finished, smaller npz that are in no part yet."""
    say(f"{out}: its {held} images are kept")
    kept, at = kept_parts(store), 0
    for images, labels in read_npz(out):
        for start, end in missing(kept, held):
            first, last = max(start, at), min(end, at + len(labels))
            if first < last:
                save_part(store, first, images[first - at : last - at], labels[first - at : last - at])
        at += len(labels)


def _draw_missing(store: Store, num: int, draw: Callable, stop: list, quiet: bool = False) -> list[tuple[int, int]]:
    """Draws what is missing, each process its share; returns the ranges of all parts, ascending.

    A part is written once PART_SECONDS and 1% of the time so far have passed since the last one. A kill then loses little work,
    and the number of files stays small even for small batches.
    """
    compare(of_all(store.job), "give every host the same run and networks")
    kept = [(start, end) for start, end in by_leader(lambda: kept_parts(store))]
    wanted = shares(missing(kept, num), jax.process_count())
    mine, total = wanted[jax.process_index()], sum(map(len, wanted))
    report = (lambda count: None) if quiet or not len(mine) else drawing_progress(num - total, num)
    began = last = time.monotonic()
    new, done, waiting = [], 0, []
    for images, labels in draw(mine, max(map(len, wanted))) if not agree(bool(stop)) else ():
        waiting.append((images, labels))
        done += len(labels)
        report(num - total + total * done // len(mine))
        now = time.monotonic()
        due = now - last > pause(now - began) or sum(part.nbytes for part, _ in waiting) >= PART_BYTES
        if due or done == len(mine):
            new += _save(store, mine[:done], waiting)
            waiting, last = [], time.monotonic()
    if waiting:
        new += _save(store, mine[:done], waiting)
    if agree(done < len(mine)):
        done = num - total + sum(of_all(done))
        raise Interrupted(f"{done} of {num} images are kept in {store.folder}; the same command goes on from there")
    return sorted(kept + [(start, end) for ranges in of_all(new) for start, end in ranges])


def _save(store: Store, indices: np.ndarray, batches: list[Batch]) -> list[tuple[int, int]]:
    """Writes the batches, images of the last ones of the rising `indices`, a part for each range of them. Returns the ranges."""
    images, labels = map(np.concatenate, zip(*batches, strict=True))
    indices = indices[-len(labels) :]
    cuts = [0, *(np.flatnonzero(np.diff(indices) != 1) + 1), len(indices)]
    return [
        save_part(store, int(indices[first]), images[first:end], labels[first:end])
        for first, end in itertools.pairwise(cuts)
    ]


def pause(seconds: float) -> float:
    """Seconds of work between two parts, in a job that has run for `seconds`."""
    return max(PART_SECONDS, 0.01 * seconds)


def _in_order(store: Store, kept: list[tuple[int, int]], num: int) -> Iterator[Batch]:
    """Yields the parts in order, up to image num - 1. Raises JobError if one was damaged after it was written."""
    for start, end in kept:
        if start >= num:
            return
        try:
            images, labels = load_part(store, start, end)
        except StorageError:
            raise
        except (OSError, ValueError) as error:
            path = _path(store, start, end)
            raise JobError(f"{path}: damaged meanwhile ({error}); the same command draws its images again") from None
        yield images[: num - start], labels[: num - start]


def write_npz(path: str, temporary: str, num: int, shape: tuple[int, ...], parts: Iterable[Batch], job: dict) -> None:
    """Writes the ADM layout, whole or not at all: arr_0 uint8 (num, *shape), arr_1 labels (num,), `job` as the archive's comment.

    `parts` yields images 0 to num - 1 in order; one part at a time is in memory. The bytes depend on the arrays and the job only.
    Raises JobError for another number of images.
    """
    labels = [np.zeros(0, np.int32)]
    with whole(path, temporary) as unfinished:
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
            archive.comment = json_text(job).encode()
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as f:
                header = {"descr": "|u1", "fortran_order": False, "shape": (num, *shape)}
                np.lib.format.write_array_header_1_0(f, header)
                for images, part_labels in parts:
                    f.write(images.tobytes())
                    labels.append(part_labels)
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as f:
                np.lib.format.write_array(f, np.concatenate(labels), allow_pickle=False)
        if (found := sum(map(len, labels))) != num:
            raise JobError(f"{path}: found {found} images in the parts, expected {num}; nothing is written")


def read_npz(path: str, most: int = PART_BYTES) -> Iterator[Batch]:
    """Yields images and labels of an npz from `write_npz` in order, about `most` bytes of images at a time."""
    with opened(path) as file, zipfile.ZipFile(file) as archive, archive.open("arr_0.npy") as f:
        with archive.open("arr_1.npy") as g:
            labels = np.lib.format.read_array(g, allow_pickle=False)
        shape = _npy_shape(f)
        size = int(np.prod(shape[1:]))
        count = max(1, most // size)
        for start in range(0, shape[0], count):
            data = f.read(min(count, shape[0] - start) * size)
            yield np.frombuffer(data, np.uint8).reshape(-1, *shape[1:]), labels[start : start + count]


def _npy_shape(f) -> tuple[int, ...]:
    np.lib.format.read_magic(f)
    return np.lib.format.read_array_header_1_0(f)[0]


def remove(folder: str) -> None:
    """Removes what this module wrote; `locked` then removes the folder if nothing else is in it."""
    for name in names(folder):
        if name == JOB or ".tmp" in name or NAME.fullmatch(name):
            delete(os.path.join(folder, name))
