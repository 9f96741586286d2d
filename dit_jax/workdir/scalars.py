"""Scalars of a run: `W/metrics.jsonl`, one JSON object a line, TensorBoard's events, and Weights & Biases if it is asked for."""

import contextlib
import glob
import io
import math
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, NamedTuple

from dit_jax.error import JobError, UsageError
from dit_jax.files import (
    LARGEST,
    base,
    create,
    delete,
    is_file,
    json_text,
    local,
    make_folder,
    names,
    numbered,
    opened,
    parse_json,
    read,
    read_all,
    read_json,
    remote,
    replace,
    upload,
    whole,
    write_file,
)  # fmt: skip

METRICS = "metrics.jsonl"
WAIT = 30.0  # seconds that scalars wait for a bucket at most, if no checkpoint is saved
SEGMENT = 2**18  # bytes after which an object of lines is complete
STEP = {"step": int}  # required in a line of scalars
RECORD = {**STEP, "protocol_id": str, "metrics": dict, "protocol": dict}  # required in a record


def read_lines(path: str, fields: Mapping[str, type] = STEP) -> list[dict]:
    """Read the objects of a JSONL file ([] if missing), without a last line that a kill cut short.

    Raises UsageError naming the line that is no object, or lacks one of `fields`.
    """
    return list(stream_lines(path, fields, LARGEST))


def stream_lines(path: str, fields: Mapping[str, type] = STEP, most: float = math.inf) -> Iterator[dict]:
    """Yield the objects as `read_lines` does, from a file of any size."""
    try:
        lines = open_lines(path)
    except FileNotFoundError:
        return
    with lines as f:
        yield from _objects(f, path, fields, most)


def segments(path: str) -> str:
    """Return the folder whose files stand for a JSONL file in a bucket, where nothing can be appended: `x/` for `x.jsonl`."""
    return path.removesuffix(".jsonl")


def open_lines(path: str) -> IO[bytes]:
    """Open a JSONL file for reading: the file, and after it its segments in order of their names, if there are any.

    Raises FileNotFoundError if there is neither.
    """
    found = [content for _, content in read_all(segments(path), LARGEST)]
    if not found:
        return opened(path)
    with contextlib.suppress(FileNotFoundError):
        found.insert(0, read(path, LARGEST))
    return io.BytesIO(b"".join(found))


def parse_lines(data: bytes | None, path: str, fields: Mapping[str, type]) -> list[dict]:
    """Parse the content of `path` (None: no file) as `read_lines` does."""
    return list(_objects(io.BytesIO(data or b""), path, fields, LARGEST))


def _objects(lines: IO[bytes], path: str, fields: Mapping[str, type], most: float) -> Iterator[dict]:
    for number, line in numbered(lines, path, most):
        if line.endswith(b"\n"):
            yield _object(line[:-1], f"{path}:{number}", fields)


def _object(line: bytes, where: str, fields: Mapping[str, type]) -> dict:
    try:
        found = parse_json(line)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        text = line[:40].decode(errors="replace")
        raise UsageError(f"{where}: found {text!r}, expected a JSON object; repair or remove the line")
    for name, kind in fields.items():
        if type(found.get(name)) is not kind:
            what = f"{name!r} is {found[name]!r}" if name in found else f"no {name!r}"
            raise UsageError(f"{where}: {what}, expected {kind.__name__}; repair or remove the line")
    return found


def drop_after(path: str, step: int) -> None:
    """Delete the lines of a JSONL file beyond `step`, which a resumed run writes again."""
    for name in [path, *(os.path.join(segments(path), name) for name in names(segments(path)))]:
        if is_file(name):
            with opened(name) as f:
                kept = [json_text(line) + "\n" for line in _objects(f, name, STEP, math.inf) if line["step"] <= step]
            if kept or name == path:
                write_file(name, "".join(kept))
            else:
                delete(name)


def drop_events_after(workdir: str, step: int) -> None:
    """Delete the events beyond `step` from TensorBoard's files, which would show a resumed run's points twice.

    A record of these files is its length (uint64), the length's checksum (4 bytes), an `Event`, and the event's checksum; a last
    record that a kill cut short goes too. An `Event` is a protocol buffer: time (tag 9, 8 bytes), then the step (tag 16) unless 0.
    """
    for path in [os.path.join(workdir, name) for name in names(workdir) if name.startswith("events.out.tfevents.")]:
        with opened(path) as f, whole(path) as unfinished, open(unfinished, "wb") as kept:
            while len(head := f.read(12)) == 12:
                size = int.from_bytes(head[:8], "little") + 4
                if len(event := f.read(min(size, LARGEST))) == size and _step(event) <= step:
                    kept.write(head + event)


def _step(event: bytes) -> int:
    """Return the step of a TensorBoard event: a number of 7 bits a byte, the lowest first, whose last byte is below 128."""
    value, digits = 0, event[10:] if event[9:10] == b"\x10" else bytes(1)
    for place, byte in enumerate(digits):
        value |= (byte & 127) << 7 * place
        if byte < 128:
            break
    return value


class Scalars(NamedTuple):
    """Where a run's scalars go.

    write(step, scalars, picture="")  picture: path of a PNG
    flush()                           all that was written is in the run's folder when it returns
    """

    write: Callable
    flush: Callable
    close: Callable


def open_scalars(workdir: str, step: int, tensorboard: bool = True, wandb: str = "") -> Scalars:
    """Open the scalars of a run at `step`. `wandb`: a project, "" = none.

    Each call of `write` is on the disk when it returns; in a bucket after `flush`, which `write` starts in a thread every WAIT
    seconds. Raises UsageError as `import_wandb`.
    """
    path = os.path.join(workdir, METRICS)
    writers = [_wandb(wandb, workdir)] if wandb else []
    drop_after(path, step)
    drop_events_after(workdir, step)
    writers.append(_segments(path, step) if remote(path) else _file(path))
    writers += [_tensorboard(workdir, step)] if tensorboard else []
    last, thread, lock = time.monotonic(), ThreadPoolExecutor(1, "scalars"), threading.Lock()
    under_way: Future | None = None

    def write(step: int, scalars: dict, picture: str = "") -> None:
        nonlocal last, under_way
        for writer in writers:
            writer.write(step, scalars, picture)
        if remote(workdir) and time.monotonic() - last > WAIT and (under_way is None or under_way.done()):
            last, under_way = time.monotonic(), thread.submit(flush)

    def flush() -> None:
        with lock:
            for writer in writers:
                writer.flush()

    def close() -> None:
        thread.shutdown()
        with contextlib.ExitStack() as stack:
            for writer in writers:
                stack.callback(writer.close)

    return Scalars(write, flush, close)


def _file(path: str) -> Scalars:
    file = open(path, "a")  # noqa: SIM115

    def write(step: int, scalars: dict, picture: str) -> None:
        if scalars:
            file.write(json_text({"step": step, **scalars}) + "\n")
            file.flush()

    return Scalars(write, file.flush, file.close)


def _segments(path: str, step: int) -> Scalars:
    """Return the writer of objects of lines: a new one with each start, and after SEGMENT bytes; the newest is written anew as it grows."""
    kept: list[list] = []  # of each object [name, what it holds, lines]

    def write(step: int, scalars: dict, picture: str) -> None:
        if not scalars:
            return
        if not kept or len(kept[-1][2]) > SEGMENT:
            kept.append([os.path.join(segments(path), f"{step:010d}.jsonl"), None, b""])
        kept[-1][2] += (json_text({"step": step, **scalars}) + "\n").encode()

    def flush() -> None:
        found = list(kept)
        for one in found:
            name, old, lines = one
            if lines != old and not (
                replace(name, lines, old) or ((ours := _ours(name, old, lines)) and replace(name, lines, ours))
            ):
                raise JobError(f"{name}: another process has written it meanwhile; one job at a time trains a run")
            one[1] = lines
        for one in found[:-1]:
            kept.remove(one)

    return Scalars(write, flush, flush)


def _ours(name: str, old: bytes | None, lines: bytes) -> bytes | None:
    """Return what an object holds if this process wrote it, though it had no answer: more of `lines` than `old`."""
    with contextlib.suppress(FileNotFoundError):
        there = read(name, LARGEST)
        return there if lines.startswith(there) and there.startswith(old or b"") else None
    return None


def _tensorboard(workdir: str, start: int) -> Scalars:
    """Return the writer of an event file of its own for each start, without the queue of tensorboardX, which a kill would lose.

    For a bucket it lies on this machine and is copied whole.
    """
    import numpy as np
    from PIL import Image
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event

    folder = tempfile.TemporaryDirectory(prefix="dit_jax-") if remote(workdir) else None
    writer, copied = EventsWriter(os.path.join(folder.name if folder else workdir, "events"), f".{start}"), 0

    def write(step: int, scalars: dict, picture: str) -> None:
        found = [summary.scalar(name, value) for name, value in scalars.items()]
        if picture:
            found.append(
                summary.image("samples", np.asarray(Image.open(io.BytesIO(read(picture, LARGEST)))), dataformats="HWC")
            )
        for one in found:
            writer.write_event(Event(wall_time=time.time(), step=step, summary=one))
        writer.flush()

    def flush() -> None:
        nonlocal copied
        for path in glob.glob(os.path.join(folder.name, "*")) if folder else []:
            if (size := os.path.getsize(path)) > copied:
                upload(path, os.path.join(workdir, os.path.basename(path)))
                copied = size

    def close() -> None:
        writer.close()
        flush()
        if folder:
            folder.cleanup()

    return Scalars(write, flush, close)


def import_wandb():
    """Import Weights & Biases. Raises UsageError if it is missing."""
    try:
        import wandb

        wandb.init  # noqa: B018 - a folder called wandb, as it leaves them, would be imported as an empty package
    except (ImportError, AttributeError):
        raise UsageError(
            "train.wandb: the package wandb is not installed; install the extra, pip install -e '.[wandb]', or leave the key empty"
        ) from None
    return wandb


def _wandb(project: str, workdir: str) -> Scalars:
    """Return the writer of the run of this folder in a project; its id lies in `W/wandb/id`, so that a resumed run goes on there.

    Points that a resumed run computes again are left out there, as W&B's steps only rise; they are the same, bit for bit.
    """
    module, path = import_wandb(), os.path.join(workdir, "wandb", "id")
    make_folder(os.path.dirname(path))
    create(path, secrets.token_hex(4))
    try:
        run = module.init(
            project=project,
            id=read(path).decode().strip(),
            name=base(workdir),
            dir=tempfile.gettempdir() if remote(workdir) else workdir,
            resume="allow",
            config=read_json(os.path.join(workdir, "config.json")).get("config", {}),
            settings=module.Settings(console="off"),
        )
    except module.Error as error:
        advice = "log in with `wandb login`, or set WANDB_MODE=offline and send the run later with `wandb sync`"
        raise JobError(f"train.wandb: {error}; {advice}") from None

    def write(step: int, scalars: dict, picture: str) -> None:
        with local(picture) as path:
            run.log({**scalars, **({"samples": module.Image(path)} if picture else {})}, step=step)

    return Scalars(write, lambda: None, run.finish)
