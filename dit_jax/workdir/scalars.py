"""Scalars of a run: `W/metrics.jsonl`, one JSON object a line, and TensorBoard events (clu) if TensorFlow is installed."""

import glob
import io
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import IO

from dit_jax.error import UsageError
from dit_jax.files import LARGEST, json_text, numbered, parse_json, whole
from dit_jax.log import notice

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
    workdir: str, step: int, tensorboard: bool = True
) -> tuple[Callable[[int, dict], None], Callable[[], None]]:
    """Return (write(step, scalars), close()) for a run at `step`."""
    path = os.path.join(workdir, METRICS)
    drop_after(path, step)
    drop_events_after(workdir, step)
    file = open(path, "a")  # noqa: SIM115
    writer = _tensorboard(workdir) if tensorboard else None

    def write(step: int, scalars: dict) -> None:
        file.write(json_text({"step": step, **scalars}) + "\n")
        file.flush()
        if writer:
            writer.write_scalars(step, scalars)

    def close() -> None:
        file.close()
        if writer:
            writer.close()

    return write, close


def _tensorboard(workdir: str):
    """Return clu's summary writer, or None with a notice if TensorFlow, which it needs, is missing."""
    try:
        from clu import metric_writers
    except ImportError:
        notice("TensorFlow is not installed, so there are no TensorBoard events; scalars go to metrics.jsonl")
        return None
    return metric_writers.SummaryWriter(workdir)
