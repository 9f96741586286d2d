"""Drawn images, or what a network says of them, on the disk: parts in a folder as they come; of images one npz at the end.

    job.json             what the images depend on; a folder holds the images of one job only
    START-END.part       images START to END - 1: a SHA-256 of job, range and content, then the content: images, labels
    lock                 held by the process that draws

A part is whole and verified, or its images are drawn again. An image may be any row of bytes of one shape.
The npz is the ADM layout with the job as its comment.
"""

import contextlib
import hashlib
import json
import os
import re
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from dit_jax import checkpoint
from dit_jax.error import Interrupted, JobError, UsageError
from dit_jax.files import delete, lock, names, parse_json, read, read_json, whole, write_file
from dit_jax.log import drawing_progress, notice, say, warn

Batch = tuple[np.ndarray, np.ndarray]  # images uint8 (b, h, w, c), labels int32 (b,)
PART_BYTES = 1 << 26  # of images that wait in memory at most
PART_SECONDS = 0.25  # of drawing that a part holds at least, but for the last one
NAME = re.compile(r"(\d{10})-(\d{10})\.part")
JOB, LOCK = "job.json", "lock"


@dataclass(frozen=True)
class Store:
    """A folder of parts: of which job, and the shape (h, w, c) of its images."""

    folder: str
    job: dict
    shape: tuple[int, ...]


def complete(out: str, job: dict, shape: tuple[int, ...], num: int, draw: Callable, stop: list) -> None:
    """Make `out` the npz of images 0..num-1 of `job`, from what its file or its parts hold already and from `draw`.

    `draw(first, end)` gives batches of those images in order. When `stop` fills, the running batch is kept and Interrupted
    raised. Raises UsageError if `out` or the parts are another job's, JobError if another process draws into `out`.
    """
    store = Store(f"{out}.parts", job, shape)
    with locked(store.folder):
        held = images_held(out, job, num)
        _prepare(store)
        if held == num:
            say(f"{out}: all {num} images are there; nothing to do")
        else:
            kept = kept_parts(store)
            if held:
                kept = _take_over(store, out, kept, held)
            kept = _draw_missing(store, num, kept, draw, stop)
            write_npz(out, os.path.join(store.folder, "whole.tmp"), num, shape, _in_order(store, kept, num), job)
        remove(store.folder)


def gather(store: Store, num: int, draw: Callable, stop: list, quiet: bool = False) -> Iterator[Batch]:
    """Rows 0..num-1 of the job in order, from the parts that are there and from `draw`; the folder must be `locked`.

    The parts stay until `remove`. Raises as `complete` does.
    """
    _prepare(store)
    return _in_order(store, _draw_missing(store, num, kept_parts(store), draw, stop, quiet), num)


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
    """Make `folder` and keep other processes out of it; it goes at the end if it is empty. Raises JobError if it is in use."""
    busy = JobError(f"{folder}: another process draws into it; wait for its end, or use another --out")
    try:
        with lock(os.path.join(folder, LOCK), busy, keep=False):
            yield
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(folder)


def refuse_other(where: str, found: object, job: dict, advice: str) -> None:
    """Raises UsageError unless `found` is `job`, naming what differs."""
    if found == job:
        return
    found = found if isinstance(found, dict) else {}
    keys = [key for key in {**job, **found} if found.get(key) != job.get(key)]
    shown = "; ".join(f"{key}: found {found.get(key)!r}, this command has {job.get(key)!r}" for key in keys[:3])
    more = f" (and {len(keys) - 3} more)" if len(keys) > 3 else ""
    raise UsageError(f"{where}: holds images of another job: {shown}{more}; {advice}")


def images_held(out: str, job: dict, num: int) -> int:
    """How many images the npz `out` of this job holds, 0 if there is none or it is damaged.

    Raises UsageError if it is anything else, or holds more than `num`: nothing that was drawn is ever overwritten.
    """
    if not os.path.exists(out):
        return 0
    advice = "remove it or use another --out"
    try:
        with zipfile.ZipFile(out) as archive:
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
    """The job whose parts lie beside `out`; {} without any, or where they do not say."""
    try:
        return read_json(os.path.join(f"{out}.parts", JOB))
    except (OSError, UsageError):
        return {}


def find_step(workdir: str, step: int | None, out: str, weights: str) -> int:
    """The checkpoint asked for; else the one of the images that `out` has begun with, which training may have left behind."""
    asked = begun(out).get("step") if out and step is None else None
    return checkpoint.find_step(workdir, asked if asked in checkpoint.steps(workdir) else step, weights)


def _prepare(store: Store) -> None:
    """Write job.json, or check that the folder is this job's."""
    path = os.path.join(store.folder, JOB)
    advice = "go on with that job's command, remove the folder, or let this one write elsewhere"
    if os.path.exists(path):
        try:
            found = parse_json(read(path))
        except ValueError as error:
            raise JobError(
                f"{path}: damaged ({error}); remove {store.folder}, its images are then drawn again"
            ) from None
        refuse_other(store.folder, found, store.job, advice)
    else:
        write_file(path, json.dumps(store.job, indent=1) + "\n")


def _path(store: Store, start: int, end: int) -> str:
    return os.path.join(store.folder, f"{start:010d}-{end:010d}.part")


def _digest(store: Store, start: int, end: int, *content) -> bytes:
    digest = hashlib.sha256(json.dumps([store.job, start, end]).encode())
    for data in content:
        digest.update(data)
    return digest.digest()


def save_part(store: Store, start: int, images: np.ndarray, labels: np.ndarray) -> tuple[int, int]:
    """Write images (b, h, w, c) and labels (b,) from number `start` on, whole or not at all. Returns their range."""
    end = start + len(labels)
    path, content = _path(store, start, end), (images.tobytes(), labels.astype("<i4").tobytes())
    with whole(path) as unfinished, open(unfinished, "wb") as f:
        f.writelines((_digest(store, start, end, *content), *content))
    return start, end


def load_part(store: Store, start: int, end: int) -> Batch:
    """Images (b, h, w, c) and labels (b,) of a part. Raises ValueError if it is damaged."""
    with open(_path(store, start, end), "rb") as f:
        digest, content = f.read(32), f.read()
    if digest != _digest(store, start, end, content):
        raise ValueError("its checksum does not match")
    split = (end - start) * int(np.prod(store.shape))
    images = np.frombuffer(content[:split], np.uint8).reshape(-1, *store.shape)
    return images, np.frombuffer(content[split:], "<i4")


def kept_parts(store: Store) -> list[tuple[int, int]]:
    """Ranges of the parts that verify, ascending and apart; what does not is removed, with a notice."""
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
    """What the ascending ranges `kept` leave of 0..num-1."""
    starts, ends = [start for start, _ in kept], [end for _, end in kept]
    gaps = zip([0, *ends], [*starts, num], strict=True)
    return [(start, min(end, num)) for start, end in gaps if start < min(end, num)]


def _take_over(store: Store, out: str, kept: list, held: int) -> list[tuple[int, int]]:
    """Make parts of the images of a finished, smaller npz that are in no part yet."""
    say(f"{out}: its {held} images are kept")
    at = 0
    for images, labels in read_npz(out):
        for start, end in missing(kept, held):
            first, last = max(start, at), min(end, at + len(labels))
            if first < last:
                save_part(store, first, images[first - at : last - at], labels[first - at : last - at])
        at += len(labels)
    return kept_parts(store)


def _draw_missing(
    store: Store, num: int, kept: list, draw: Callable, stop: list, quiet: bool = False
) -> list[tuple[int, int]]:
    """Draw what is missing; returns the ranges of all parts, ascending.

    A part is written when PART_SECONDS and 1% of the time so far have passed since the last one: the work that a kill loses
    stays small, and so does the number of files, however small the batches are.
    """
    gaps = missing(kept, num)
    done = num - sum(end - start for start, end in gaps)
    report = (lambda count: None) if quiet else drawing_progress(done, num)
    began = last = time.monotonic()
    for start, end in gaps:
        batches, waiting = draw(start, end), []
        while start < end:
            if stop and not waiting:
                raise Interrupted(
                    f"{done} of {num} images are kept in {store.folder}; the same command goes on from there"
                )
            waiting.append(next(batches))
            images, labels = waiting[-1]
            done += len(labels)
            report(done)
            count, now = sum(len(part) for _, part in waiting), time.monotonic()
            due = now - last > pause(now - began) or images.nbytes * len(waiting) >= PART_BYTES
            if due or stop or start + count == end:
                kept = [*kept, save_part(store, start, *map(np.concatenate, zip(*waiting, strict=True)))]
                start, waiting, last = start + count, [], time.monotonic()
    return sorted(kept)


def pause(seconds: float) -> float:
    """Seconds of work after which it is kept, in a job that has run for `seconds`."""
    return max(PART_SECONDS, 0.01 * seconds)


def _in_order(store: Store, kept: list[tuple[int, int]], num: int) -> Iterator[Batch]:
    """The parts, one after another, up to image num - 1. Raises JobError if one was damaged since it was written."""
    for start, end in kept:
        if start >= num:
            return
        try:
            images, labels = load_part(store, start, end)
        except (OSError, ValueError) as error:
            path = _path(store, start, end)
            raise JobError(f"{path}: damaged meanwhile ({error}); the same command draws its images again") from None
        yield images[: num - start], labels[: num - start]


def write_npz(path: str, temporary: str, num: int, shape: tuple[int, ...], parts: Iterable[Batch], job: dict) -> None:
    """The ADM layout: arr_0 uint8 (num, *shape), arr_1 labels (num,), and `job` as the archive's comment. Whole or not at all.

    `parts` gives images 0 to num - 1 in order, and only one part is in memory. The bytes depend on the arrays and the job.
    """
    labels = [np.zeros(0, np.int32)]
    with whole(path, temporary):
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            archive.comment = json.dumps(job).encode()
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as f:
                header = {"descr": "|u1", "fortran_order": False, "shape": (num, *shape)}
                np.lib.format.write_array_header_1_0(f, header)
                for images, part_labels in parts:
                    f.write(images.tobytes())
                    labels.append(part_labels)
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as f:
                np.lib.format.write_array(f, np.concatenate(labels), allow_pickle=False)
        if sum(map(len, labels)) != num:
            raise JobError(
                f"{path}: found {sum(map(len, labels))} images in the parts, expected {num}; nothing is written"
            )


def read_npz(path: str, most: int = PART_BYTES) -> Iterator[Batch]:
    """Images and labels of an npz that `write_npz` wrote, in order, about `most` bytes of images at a time."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as f:
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
    """Remove what this module wrote; `locked` removes the folder when nothing else is in it."""
    for name in names(folder):
        if name == JOB or ".tmp" in name or NAME.fullmatch(name):
            delete(os.path.join(folder, name))
