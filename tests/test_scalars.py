"""Scalars of a resumed run: every step once, in metrics.jsonl and in TensorBoard's files."""

import json
import math
import struct
import sys
import types

import numpy as np
import pytest
from PIL import Image

from dit_jax.error import JobError, UsageError
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
    _, _, close = scalars.open_scalars(str(folder), step, tensorboard=False)
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


def write_twice(folder, tensorboard=True, wandb=""):
    """Steps 1 to 9, a kill, and steps 6 to 12 after a checkpoint at step 5; pictures at steps 4 and 8."""
    picture = folder / "a.png"
    Image.fromarray(np.full((6, 4, 3), 200, np.uint8)).save(picture)
    for first, last in ((0, 9), (5, 12)):
        write, _, close = scalars.open_scalars(str(folder), first, tensorboard, wandb)
        for step in range(first + 1, last + 1):
            write(step, {"loss": 1.5 * step, "mfu": math.nan})
            if step % 4 == 0:
                write(step, {}, str(picture))
        close()


def test_events_are_written_without_tensorflow_and_at_once(tmp_path):
    """As records of a length, a checksum and an `Event`, by the definitions of TensorBoard's protocol buffers."""
    from tensorboardX.proto.event_pb2 import Event

    write_twice(tmp_path)
    found = []
    for path in sorted(tmp_path.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            found += [(event.step, value) for value in event.summary.value]
    assert sorted(step for step, value in found if value.tag == "loss") == list(range(1, 13))
    assert all(value.simple_value == 1.5 * step for step, value in found if value.tag == "loss")
    shown = [(step, value.image) for step, value in found if value.tag == "samples"]
    assert sorted(step for step, _ in shown) == [4, 8, 12] and {(i.height, i.width) for _, i in shown} == {(6, 4)}
    write, _, close = scalars.open_scalars(str(tmp_path), 12)
    write(13, {"loss": 7.0})
    assert any(
        b"loss" in path.read_bytes() for path in tmp_path.glob("events.*.12")
    )  # before close, as a kill would find it
    close()


def test_tensorboard_reads_every_step_of_a_killed_run_once(tmp_path):
    """By its own reader."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_twice(tmp_path)
    found = EventAccumulator(str(tmp_path), purge_orphaned_data=False, size_guidance={"scalars": 0}).Reload()
    assert [scalar.step for scalar in found.Scalars("loss")] == list(range(1, 13))
    assert [image.step for image in found.Images("samples")] == [4, 8, 12]


class Fake(types.ModuleType):
    """The calls of wandb that are made, without wandb."""

    Error, Settings, Image = type("Error", (Exception,), {}), dict, str

    def init(self, **settings):
        self.runs = [*getattr(self, "runs", []), settings]
        self.points = getattr(self, "points", [])
        add, end = lambda values, step: self.points.append((step, values)), lambda: self.points.append("end")
        return types.SimpleNamespace(log=add, finish=end)


def test_a_resumed_run_goes_on_as_one_run_of_weights_and_biases(tmp_path, monkeypatch):
    fake = Fake("wandb")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tmp_path / "config.json").write_text('{"config": {"train": {"steps": 12}}}')
    write_twice(tmp_path, tensorboard=False, wandb="mine")
    assert len(fake.runs) == 2 and len({run["id"] for run in fake.runs}) == 1
    for run in fake.runs:
        assert (run["project"], run["dir"], run["resume"]) == ("mine", str(tmp_path), "allow")
        assert run["config"] == {"train": {"steps": 12}} and run["name"] == tmp_path.name
    assert fake.points[0][0] == 1 and fake.points[0][1]["loss"] == 1.5
    assert (4, {"samples": str(tmp_path / "a.png")}) in fake.points and fake.points.count("end") == 2
    monkeypatch.setattr(fake, "init", lambda **_: (_ for _ in ()).throw(Fake.Error("no key")))
    with pytest.raises(JobError, match=r"train.wandb: no key; log in with `wandb login`, or set WANDB_MODE=offline"):
        write_twice(tmp_path, tensorboard=False, wandb="mine")


@pytest.mark.parametrize("found", [None, types.ModuleType("wandb")], ids=["none", "a folder called wandb"])
def test_weights_and_biases_that_is_missing_is_refused_before_anything_is_written(found, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", found)
    with pytest.raises(UsageError, match=r"train.wandb: the package wandb is not installed; .*wandb\]"):
        scalars.open_scalars(str(tmp_path), 0, wandb="mine")
    assert [*tmp_path.iterdir()] == []


def test_weights_and_biases_itself_writes_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb.sdk")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "config.json").write_text("{}")
    write_twice(tmp_path, tensorboard=False, wandb="mine")
    runs = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(runs) == 2 and len({path.name for path in runs}) == 1
    assert all(path.stat().st_size > 1000 for path in runs)
    pictures = tmp_path.glob("wandb/offline-run-*/files/media/images/samples_*.png")
    assert {int(path.name.split("_")[1]) for path in pictures} == {4, 8, 12}  # 8 in both: the service keeps one


def test_scalars_of_a_resumed_run_are_written_once(tmp_path):
    for first, last in ((0, 5), (3, 6)):
        write, _, close = scalars.open_scalars(str(tmp_path), first, tensorboard=False)
        for step in range(first + 1, last + 1):
            write(step, {"loss": 1.0})
        close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
