"""Scalars of a run: `W/metrics.jsonl`, one JSON object a line, TensorBoard's events, and Weights & Biases if it is asked for."""

import glob
import io
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO

from dit_jax.error import JobError, UsageError
from dit_jax.files import LARGEST, json_text, numbered, parse_json, read_json, whole, write_file

METRICS = "metrics.jsonl"
STEP = {"step": int}  # required in a line of scalars
RECORD = {**STEP, "protocol_id": str, "metrics": dict, "protocol": dict}  # required in a record


def read_lines(path: str, fields: Mapping[str, type] = STEP) -> list[dict]:
    """Read the objects of a JSONL file ([] if missing), without a last line that a kill cut short.

    Raises UsageError naming the line that is no object, or lacks one of `fields`.
    """
    return list(stream_lines(path, fields, LARGEST))


def stream_lines(path: str, fields: Mapping[str, type] = STEP, most: float = math.inf) -> Iterator[dict]:
    """Yield the objects as `read_lines` does, from a file of any size."""
    if os.path.exists(path):
        with open(path, "rb") as f:
            yield from _objects(f, path, fields, most)


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
    if os.path.exists(path):
        with whole(path) as unfinished, open(unfinished, "w") as f:
            f.writelines(json_text(line) + "\n" for line in stream_lines(path) if line["step"] <= step)


def drop_events_after(workdir: str, step: int) -> None:
    """Delete the events beyond `step` from TensorBoard's files, which would show a resumed run's points twice.

    A record of these files is its length (uint64), the length's checksum (4 bytes), an `Event`, and the event's checksum; a last
    record that a kill cut short goes too. An `Event` is a protocol buffer: time (tag 9, 8 bytes), then the step (tag 16) unless 0.
    """
    for path in glob.glob(os.path.join(glob.escape(workdir), "events.out.tfevents.*")):
        with open(path, "rb") as f, whole(path) as unfinished, open(unfinished, "wb") as kept:
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


def open_scalars(
    workdir: str, step: int, tensorboard: bool = True, wandb: str = ""
) -> tuple[Callable[..., None], Callable[[], None]]:
    """Return (write(step, scalars, picture=""), close()) for a run at `step`. `picture`: path of a PNG; `wandb`: a project, "" = none.

    Each call of `write` is on the disk when it returns. Raises UsageError as `import_wandb`.
    """
    path = os.path.join(workdir, METRICS)
    writers = [_wandb(wandb, workdir)] if wandb else []
    drop_after(path, step)
    drop_events_after(workdir, step)
    file = open(path, "a")  # noqa: SIM115
    writers += [_tensorboard(workdir, step)] if tensorboard else []

    def write(step: int, scalars: dict, picture: str = "") -> None:
        if scalars:
            file.write(json_text({"step": step, **scalars}) + "\n")
            file.flush()
        for add, _ in writers:
            add(step, scalars, picture)

    def close() -> None:
        for end in (file.close, *(end for _, end in writers)):
            end()

    return write, close


def _tensorboard(workdir: str, start: int) -> tuple[Callable, Callable]:
    """Return (write, close) of an event file of its own for each start, without the queue of tensorboardX, which a kill would lose."""
    import numpy as np
    from PIL import Image
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event

    writer = EventsWriter(os.path.join(workdir, "events"), f".{start}")

    def write(step: int, scalars: dict, picture: str) -> None:
        found = [summary.scalar(name, value) for name, value in scalars.items()]
        if picture:
            found.append(summary.image("samples", np.asarray(Image.open(picture)), dataformats="HWC"))
        for one in found:
            writer.write_event(Event(wall_time=time.time(), step=step, summary=one))
        writer.flush()

    return write, writer.close


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


def _wandb(project: str, workdir: str) -> tuple[Callable, Callable]:
    """Return (write, close) of the run of this folder in a project; its id lies in `W/wandb/id`, so that a resumed run goes on there.

    Points that a resumed run computes again are left out there, as W&B's steps only rise; they are the same, bit for bit.
    """
    module, path = import_wandb(), os.path.join(workdir, "wandb", "id")
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_file(path, secrets.token_hex(4))
    with open(path) as f:
        name = f.read().strip()
    try:
        run = module.init(
            project=project,
            id=name,
            name=os.path.basename(os.path.abspath(workdir)),
            dir=workdir,
            resume="allow",
            config=read_json(os.path.join(workdir, "config.json")).get("config", {}),
            settings=module.Settings(console="off"),
        )
    except module.Error as error:
        advice = "log in with `wandb login`, or set WANDB_MODE=offline and send the run later with `wandb sync`"
        raise JobError(f"train.wandb: {error}; {advice}") from None

    def write(step: int, scalars: dict, picture: str) -> None:
        run.log({**scalars, **({"samples": module.Image(picture)} if picture else {})}, step=step)

    return write, run.finish
