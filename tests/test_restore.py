"""Host memory of a restore: the parts that this host keeps, and little on the way to them."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from job import ROOT
from test_hosts import free_address, keep

from dit_jax import checkpoint, flops
from dit_jax.checkpoint import arrays
from dit_jax.config import Config, MeshConfig, ModelConfig, to_dict
from dit_jax.devices.mesh import make_mesh
from dit_jax.training.state import abstract_state

MODEL = ModelConfig(depth=6, width=384, heads=6, input_size=8, channels=4, classes=10)

# Restores on `devices` devices of process `index` of `count`, all of them sharing the state, and prints bytes. The baseline is
# after the metadata was read: imports and threads count for nothing.
CODE = """
import json, math, sys
import jax
from jax.experimental import multihost_utils
workdir, devices, count, index, address = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", devices)
if count > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, count, index)
    multihost_utils.sync_global_devices("before")
from dit_jax import checkpoint
from dit_jax.checkpoint import arrays
from dit_jax.config import Config, MeshConfig, ModelConfig
from dit_jax.devices.mesh import make_mesh
from dit_jax.training.state import abstract_state

def memory(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

cfg = Config(model=ModelConfig(**json.loads(sys.argv[6])))
like = abstract_state(cfg, make_mesh(MeshConfig(data=1, fsdp=-1))).items()
for name, tree in like.items():
    checkpoint.check_tree(checkpoint.path_of(workdir, 3), name, tree)
parts = [math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(like)]
before = memory("VmRSS")
items = jax.block_until_ready(checkpoint.restore(workdir, 3, like, cfg.model))
after = memory("VmRSS")
print(json.dumps({"share": devices * sum(parts), "peak": memory("VmHWM") - before, "kept": after - before}))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run folder with a state of 0.25 GB that no compression makes small, saved from one device."""
    workdir, draw = tmp_path_factory.mktemp("restore"), np.random.default_rng(0)
    like = abstract_state(Config(model=MODEL), make_mesh(MeshConfig(), jax.devices()[:1]))

    def fill(leaf):
        floats = leaf.dtype == np.float32
        values = draw.standard_normal(leaf.shape, np.float32) if floats else np.zeros(leaf.shape, leaf.dtype)
        return jax.device_put(values, leaf.sharding)

    keep(jax.tree.map(fill, like).items(), workdir, MODEL)
    return workdir


def restored(workdir, devices, count=1):
    """What each of `count` processes with `devices` devices says."""
    given, address, jobs = json.dumps(to_dict(MODEL)), free_address(), []
    for index in range(count):
        command = [sys.executable, "-c", CODE, str(workdir), *map(str, (devices, count, index)), address, given]
        jobs.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
    said = [job.communicate(120)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0] * count
    return [json.loads(out.splitlines()[-1]) for out in said]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "count"),
    [(8, 1), pytest.param(1, 1, marks=pytest.mark.slow), pytest.param(4, 2, marks=pytest.mark.slow)],
)
def test_a_restore_takes_at_most_a_fifth_more_than_what_the_host_keeps(devices, count, saved):
    """On CPU devices, whose memory is the host's. Two processes keep half of the state each."""
    for found in restored(saved, devices, count):
        assert count * found["share"] > 16 * flops.parameters(MODEL)  # float32 weights, EMA and two moments
        beside = 16 << 20 if count > 1 else 0  # compiled barriers
        assert 0.9 * found["share"] < found["kept"] <= found["peak"] <= 1.2 * found["share"] + beside, found


def test_no_chunk_is_large(saved):
    """Whoever reads a part of an array reads whole chunks, and may have saved it whole."""
    at, like = checkpoint.path_of(str(saved), 3), abstract_state(Config(model=MODEL), make_mesh(MeshConfig())).items()
    stored = [one for item in ("params", "opt") for one in checkpoint.check_tree(at, item, like[item]).values()]
    assert max(np.prod(one.shape) * one.dtype.itemsize for one in stored) > 2 * arrays.CHUNK
    assert max(np.prod(one.storage.chunk_shape) * one.dtype.itemsize for one in stored) <= arrays.CHUNK
