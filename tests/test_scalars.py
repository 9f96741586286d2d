"""Scalars of a resumed run: every step once, in metrics.jsonl and in TensorBoard's files."""

import json
import struct

import pytest

from dit_jax.workdir import scalars

NAME = "events.out.tfevents.1700000000.host.1.0"


def event(step, size=3):
    """A record as TensorBoard frames it, with false checksums: time, step (7 bits a byte), and `size` more bytes."""
    number, rest = b"", step
    while rest:
        number, rest = number + bytes([rest & 127 | (128 if rest > 127 else 0)]), rest >> 7
    data = (
        b"\x09"
        + struct.pack("<d", 1.7e9)
        + (b"\x10" + number if step else b"")
        + b"\x2a"
        + bytes([size - 2]) * (size - 1)
    )
    return struct.pack("<Q", len(data)) + b"head" + data + b"data"


def resume(folder, step):
    _, close = scalars.open_scalars(str(folder), step, tensorboard=False)
    close()


def test_a_resumed_run_drops_the_events_beyond_its_checkpoint(tmp_path):
    steps = [0, 1, 127, 128, 300, 2**31 - 1]
    for k in range(len(steps)):
        (tmp_path / NAME).write_bytes(b"".join(map(event, steps)) + event(5)[:20])  # the last one cut short by a kill
        resume(tmp_path, steps[k])
        assert (tmp_path / NAME).read_bytes() == b"".join(map(event, steps[: k + 1]))
    (tmp_path / NAME).write_bytes(event(1) + struct.pack("<Q", 2**40) + b"headless")
    resume(tmp_path, 9)
    assert (tmp_path / NAME).read_bytes() == event(1)
    assert {p.name for p in tmp_path.iterdir()} == {NAME, "metrics.jsonl"}


def test_tensorboard_reads_every_step_of_a_killed_run_once(tmp_path):
    """By its own reader, from files that its own writer made; a second writer is another file, as a second start makes one."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    def start(first, last):
        scalars.drop_events_after(str(tmp_path), first)
        writer = EventFileWriter(str(tmp_path), filename_suffix=f".{first}")
        for step in range(first + 1, last + 1):
            value = summary_pb2.Summary.Value(tag="loss", simple_value=step)
            writer.add_event(
                event_pb2.Event(wall_time=1.7e9 + step, step=step, summary=summary_pb2.Summary(value=[value]))
            )
        writer.close()

    start(0, 173)
    start(149, 161)
    found = EventAccumulator(str(tmp_path), purge_orphaned_data=False, size_guidance={"scalars": 0}).Reload()
    assert [scalar.step for scalar in found.Scalars("loss")] == list(range(1, 162))


def test_scalars_of_a_resumed_run_are_written_once(tmp_path):
    for first, last in ((0, 5), (3, 6)):
        write, close = scalars.open_scalars(str(tmp_path), first, tensorboard=False)
        for step in range(first + 1, last + 1):
            write(step, {"loss": 1.0})
        close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
