"""The small run that many tests train, and what it means for two runs to be the same."""

import itertools
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
from job import TINY

from dit_jax import checkpoint
from dit_jax.config import MeshConfig
from dit_jax.devices.mesh import make_mesh
from dit_jax.training.state import make_state
from dit_jax.training.step import make_train_step
from dit_jax.workdir.scalars import read_lines

STEPS, EVERY = 60, 10
TIMINGS = ("images_per_second", "mfu", "time")


def train(workdir, *more, steps=STEPS):
    return ["--config=configs/digits.py", f"--workdir={workdir}", *TINY, f"--config.train.steps={steps}", *more]


def saved(workdir, step=STEPS, items=("params", "ema", "opt"), kind="checkpoints"):
    """Every item of a checkpoint, or of a snapshot, on the host, read by plain Orbax."""
    folder, found = Path(checkpoint.path_of(str(workdir), step, kind)), {}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        for name in items:
            tree = reader.metadata(folder / name).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            found[name] = reader.restore(folder / name, ocp.args.PyTreeRestore(restore_args=as_numpy))
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        there = [name for name in ("data", "meta") if (folder / name).exists()]
        return found | {name: reader.restore(folder / name, ocp.args.JsonRestore()) for name in there}


def scalars(workdir):
    lines = read_lines(str(Path(workdir) / "metrics.jsonl"))
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def assert_same_run(one, other, steps=STEPS):
    """Parameters, EMA, moments, guard, data position and all scalars, bit for bit."""
    a, b = saved(one, steps), saved(other, steps)
    assert a["data"] == b["data"] and a["data"]["next_index"] == steps
    for name in ("params", "ema", "opt"):
        assert len(jax.tree.leaves(a[name])) >= 18
        jax.tree.map(np.testing.assert_array_equal, a[name], b[name])
    assert [line["step"] for line in scalars(other)] == list(range(1, steps + 1))
    assert scalars(one) == scalars(other)


def assert_same_tracks(one, other, steps=STEPS):
    """The power EMAs of the last checkpoint and of every snapshot, and the updates that each snapshot is of, bit for bit."""
    found = [checkpoint.steps(str(workdir), "snapshots") for workdir in (one, other)]
    assert found[0] == found[1] and found[0][-1] == steps
    for step, kind in ((steps, "checkpoints"), *((step, "snapshots") for step in found[0])):
        a, b = (saved(workdir, step, ("tracks",), kind) for workdir in (one, other))
        assert len(jax.tree.leaves(a["tracks"])) >= 36
        jax.tree.map(np.testing.assert_array_equal, a["tracks"], b["tracks"])
        assert a["meta"]["updates"] == b["meta"]["updates"] if kind == "snapshots" else a["data"] == b["data"]


def other_digits(folder):
    """Builds a dataset in `folder` that is called digits 1.0.0 too, of every other image: 721 for training, and others held out."""
    from dit_jax.data.digits import Digits

    def half(self, held_out, every=Digits._generate_examples):
        return itertools.islice(every(self, held_out), int(held_out), None, 2)

    with mock.patch.object(Digits, "_generate_examples", half):
        Digits(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def write_latents(folder, info, examples, **how):
    """Write the examples, pairs (label, values), one after another."""
    from dit_jax.data import latent_writer

    examples = list(examples)
    return latent_writer.write_latents(
        folder, info, len(examples), lambda numbers: [examples[i] for i in numbers], **how
    )


def trained_on_meshes(cfg, batch):
    """The state after three steps on 2 x 2 x 2 devices, where the loss is that of one device."""
    found = []
    for axes, devices in ((MeshConfig(1, 1, 1), jax.devices()[:1]), (MeshConfig(2, 2, 2), jax.devices())):
        mesh = make_mesh(axes, devices)
        state, step = make_state(cfg, mesh), make_train_step(cfg, mesh)
        for _ in range(3):
            state, scalars = step(state, batch)
        found.append(float(scalars["loss"]))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    return state
