"""The mesh: its shape, the one placement rule, and that no layout changes the result."""

import dataclasses
import importlib.util
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from dit_jax import hardware
from dit_jax.config import Config, DiffusionConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig, model_config
from dit_jax.devices import mesh as meshes
from dit_jax.devices import processes
from dit_jax.error import UsageError
from dit_jax.training.state import abstract_batch, abstract_state, make_state
from dit_jax.training.step import make_train_step

SMALL = Config(
    model=ModelConfig(depth=2, width=32, heads=4, patch=2, input_size=8, channels=1, classes=10, learn_sigma=False),
    diffusion=DiffusionConfig(process="flow"),
    optim=OptimConfig(learning_rate=1e-2, clip=1.0),
    train=TrainConfig(steps=10, batch_size=16),
)


def batch(cfg, seed=0):
    rng = np.random.default_rng(seed)
    size, b = cfg.model.input_size, cfg.train.batch_size
    return {
        "image": rng.normal(size=(b, size, size, cfg.model.channels)).astype(np.float32),
        "cond": {"label": rng.integers(0, cfg.model.classes, b).astype(np.int32)},
    }


def losses(cfg, mesh, steps=5):
    """Losses of the first steps, and the last state's weights on the host."""
    state, step = make_state(cfg, mesh), make_train_step(cfg, mesh)
    found = []
    for i in range(steps):
        state, scalars = step(state, batch(cfg, i))
        found.append(float(scalars["loss"]))
    return np.array(found), jax.device_get(state.params), state


@pytest.fixture(scope="module")
def single():
    return losses(SMALL, meshes.make_mesh(MeshConfig(data=1), jax.devices()[:1]))


@pytest.mark.parametrize(
    "axes",
    [*(pytest.param(axes, marks=pytest.mark.slow) for axes in ((8, 1, 1), (1, 8, 1))), (2, 2, 2)],
    ids=["data8", "fsdp8", "data2fsdp2tensor2"],
)
def test_loss_equals_a_single_devices(axes, single):
    mesh = meshes.make_mesh(MeshConfig(*axes))
    found, params, state = losses(SMALL, mesh)
    np.testing.assert_allclose(found, single[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), params, single[1])
    kernel = state.ema["blocks"]["mlp"]["fc1"]["kernel"]
    share = kernel.addressable_shards[0].data.size / kernel.size
    assert share == 1 / (axes[1] * axes[2])


def test_accumulation_equals_one_large_batch(single):
    cfg = dataclasses.replace(SMALL, optim=dataclasses.replace(SMALL.optim, accumulate=4))
    found, _, _ = losses(cfg, meshes.make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    np.testing.assert_allclose(found, single[0], rtol=1e-5)


def test_training_is_deterministic(single):
    found, params, _ = losses(SMALL, meshes.make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    np.testing.assert_array_equal(found, single[0])
    jax.tree.map(np.testing.assert_array_equal, params, single[1])


def test_the_rule():
    sizes = {"data": 2, "fsdp": 4, "tensor": 2}
    shapes = {
        ("blocks", "attention", "qkv", "kernel"): ((4, 64, 3, 8, 8), P(None, "fsdp", None, "tensor", None)),
        ("blocks", "attention", "qkv", "bias"): ((4, 3, 8, 8), P(None, None, "tensor", "fsdp")),
        ("blocks", "attention", "proj", "kernel"): ((4, 8, 8, 64), P(None, "tensor", None, "fsdp")),
        ("blocks", "mlp", "fc1", "kernel"): ((4, 64, 256), P(None, "fsdp", "tensor")),
        ("blocks", "mlp", "fc2", "kernel"): ((4, 256, 64), P(None, "tensor", "fsdp")),
        ("blocks", "modulation", "linear", "bias"): ((4, 384), P(None, None)),
        ("label_embedding", "table", "embedding"): ((12, 64), P()),
        ("step",): ((), P()),
    }
    for path, (shape, expected) in shapes.items():
        assert meshes.spec(path, shape, sizes) == expected, path


def test_fsdp_takes_what_needs_no_copy_once_gathered():
    """Heads, columns of modulations, whole tiles of 8 rows; the largest axis where there are none."""
    shapes = {
        ("blocks", "attention", "qkv", "kernel"): ((28, 1152, 3, 16, 72), P(None, None, None, "fsdp", None)),
        ("mu", "blocks", "attention", "proj", "kernel"): ((28, 16, 72, 1152), P(None, "fsdp", None, None)),
        ("blocks", "mlp", "fc1", "kernel"): ((28, 1152, 4608), P(None, "fsdp", None)),
        ("blocks", "mlp", "fc2", "kernel"): ((28, 4608, 1152), P(None, "fsdp", None)),
        ("blocks", "modulation", "linear", "kernel"): ((28, 1152, 6912), P(None, None, "fsdp")),
        ("time_embedding", "fc1", "kernel"): ((256, 1152), P("fsdp", None)),
    }
    for path, (shape, expected) in shapes.items():
        assert meshes.spec(path, shape, {"data": 1, "fsdp": 16, "tensor": 1}) == expected, path
    wide = {"data": 1, "fsdp": 128, "tensor": 1}
    assert meshes.spec(("blocks", "mlp", "fc1", "kernel"), (28, 1152, 4608), wide) == P(
        None, None, "fsdp"
    )  # 9 rows each
    assert meshes.spec(("blocks", "attention", "qkv", "kernel"), (28, 1152, 3, 16, 72), wide)[1] == "fsdp"


def test_a_mesh_axis_is_one_row(single, monkeypatch):
    """A second axis that replicates the state and splits the batch: nothing but its row in AXES, and its size in a config."""

    @dataclasses.dataclass(frozen=True)
    class Wider(MeshConfig):
        slices: int = 2

    monkeypatch.setattr(meshes, "AXES", {"slices": meshes.Axis(batch=True), **meshes.AXES})
    mesh = meshes.make_mesh(Wider(data=2, fsdp=2))
    assert dict(mesh.shape) == {"slices": 2, "data": 2, "fsdp": 2, "tensor": 1} and meshes.batch_split(mesh) == 8
    found, _, state = losses(SMALL, mesh, steps=2)
    np.testing.assert_allclose(found, single[0][:2], rtol=1e-5)
    kernel = state.params["blocks"]["mlp"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 2 == kernel.size


@pytest.mark.parametrize("name", ["DiT-S/8", "DiT-XL/2"])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (4, 128, 1), (4, 16, 8)])
def test_never_the_layer_axis_and_moments_follow_weights(name, sizes):
    mesh = AbstractMesh(sizes, tuple(meshes.AXES), axis_types=(AxisType.Auto,) * 3)
    state = abstract_state(Config(model=model_config(name)), mesh)
    flat = jax.tree_util.tree_leaves_with_path(state)
    assert len(flat) > 80
    for path, leaf in flat:
        if "blocks" in jax.tree_util.keystr(path):
            assert len(leaf.sharding.spec) == 0 or leaf.sharding.spec[0] is None
    specs = [jax.tree.map(lambda leaf: leaf.sharding.spec, tree) for tree in (state.params, state.ema)]
    moments = [part for part in jax.tree.leaves(state.opt, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu")]
    specs += [jax.tree.map(lambda leaf: leaf.sharding.spec, tree) for tree in (moments[0].mu, moments[0].nu)]
    assert all(tree == specs[0] for tree in specs)


def test_contract_the_real_xl_step_traces_on_512_devices_that_are_not_there():
    """DiT-XL/2, batch 4096, on a 4 x 128 mesh: shapes and placement agree, and every byte of the state is reused."""
    mesh = AbstractMesh((4, 128, 1), tuple(meshes.AXES), axis_types=(AxisType.Auto,) * 3)
    model = model_config("DiT-XL/2", dtype="bfloat16", remat="dots")
    cfg = Config(model=model, train=TrainConfig(batch_size=4096))
    state, rows = abstract_state(cfg, mesh), meshes.batch_sharding(mesh)
    images = jax.ShapeDtypeStruct((4096, 32, 32, 4), jnp.float32, sharding=rows)
    labels = jax.ShapeDtypeStruct((4096,), jnp.int32, sharding=rows)
    traced = make_train_step(cfg, mesh).trace(state, {"image": images, "cond": {"label": labels}})
    new_state, scalars = traced.out_info
    shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (new_state, state)]
    assert shapes[0] == shapes[1]
    assert set(scalars) == {"loss", "mse", "vb", "grad_norm", "param_norm", "learning_rate", "skipped", "streak"}
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "num_partitions = 512" in text
    assert text.count("tf.aliasing_output") == len(jax.tree.leaves(state))


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU v4 that is not there, as far as the mesh asks."""

    id: int
    slice_index: int
    process_index: int
    coords: tuple
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    client: None = None


def chips(slices):
    """Devices of slices v4-64, hosts of 2 x 2 x 1, in any order."""
    found = []
    for i, z, y, x in itertools.product(range(slices), range(4), range(4), range(2)):
        found.append(Chip(len(found), i, 8 * i + 2 * z + y // 2, (x, y, z)))
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))]


@pytest.mark.parametrize("axes", [(-1, 16, 1), (2, 32, 1), (2, 8, 4), (64, 1, 1)])
def test_only_data_goes_from_slice_to_slice(axes):
    """2 x v4-64: the outer half of `data` is one slice, and each slice is laid out as it is alone."""
    both, alone = meshes.make_mesh(MeshConfig(*axes), chips(2)), meshes.make_mesh(MeshConfig(-1, *axes[1:]), chips(1))
    both, alone = both.devices, alone.devices
    assert both.shape == (2 * alone.shape[0], *alone.shape[1:])
    for i, half in enumerate(np.split(both, 2)):
        assert {chip.slice_index for chip in half.flat} == {i}
        assert [chip.coords for chip in half.flat] == [chip.coords for chip in alone.flat]


@pytest.mark.parametrize("axes,data", [((1, 64, 1), 1), ((-1, 64, 1), 1), ((1, 16, 4), 1)])
def test_a_mesh_whose_other_axes_cross_slices_is_refused(axes, data):
    expected = (
        f"mesh.data: found {data}, expected a multiple of the 2 slices, which only this axis may cross; set mesh.data"
    )
    with pytest.raises(UsageError, match=expected):
        meshes.make_mesh(MeshConfig(*axes), chips(2))


def test_contract_the_real_step_traces_for_two_slices_with_the_bytes_of_one():
    """DiT-B/2 on 2 x v4-64: the state of a device is as on one slice, and its part of the batch half as large."""
    cfg = Config(model=model_config("DiT-B/2", dtype="bfloat16"), train=TrainConfig(batch_size=256))
    cfg = dataclasses.replace(cfg, mesh=MeshConfig(-1, 16, 1))
    one, two = (meshes.abstract_mesh(cfg.mesh, 32 * slices, slices) for slices in (1, 2))
    assert (dict(one.shape), dict(two.shape)) == (dict(data=2, fsdp=16, tensor=1), dict(data=4, fsdp=16, tensor=1))
    state, batch = abstract_state(cfg, two), abstract_batch(cfg, two)
    assert meshes.bytes_per_device(state) == meshes.bytes_per_device(abstract_state(cfg, one))
    assert 2 * meshes.bytes_per_device(batch) == meshes.bytes_per_device(abstract_batch(cfg, one))
    text = make_train_step(cfg, two).trace(state, batch).lower(lowering_platforms=("tpu",)).as_text()
    assert "num_partitions = 64" in text and text.count("tf.aliasing_output") == len(jax.tree.leaves(state))


@pytest.mark.parametrize(
    "axes,message",
    [
        ((3, 1, 1), "found data=3, fsdp=1, tensor=1, expected axes that multiply to 8 devices"),
        ((-1, 3, 1), "found data=-1, fsdp=3, tensor=1, expected axes that multiply to 8 devices"),
    ],
)
def test_a_mesh_that_does_not_multiply_to_the_devices(axes, message):
    with pytest.raises(UsageError, match=message):
        meshes.make_mesh(MeshConfig(*axes))


def test_the_rest_is_filled_in():
    assert meshes.mesh_shape(MeshConfig(-1, 2, 2), 8) == (2, 2, 2)
    assert meshes.mesh_shape(MeshConfig(2, -1, 1), 8) == (2, 4, 1)


def test_a_batch_that_does_not_divide():
    mesh = meshes.make_mesh(MeshConfig())
    with pytest.raises(UsageError, match=r"train.batch_size: found 12, expected a multiple of 8"):
        meshes.check_batch(mesh, 12)
    with pytest.raises(UsageError, match=r"train.batch_size: found 24, expected a multiple of 16"):
        meshes.check_batch(mesh, 24, accumulate=2)


ADDRESS = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
GIVEN = {"coordinator": "b:2", "num_processes": 2, "process_id": 0}
NOBODY = dict.fromkeys(GIVEN)


def test_where_the_other_processes_are_found():
    assert processes.cluster({}, False, NOBODY) is None
    assert processes.cluster({}, True, NOBODY) == ({} if importlib.util.find_spec("libtpu") else None)
    assert processes.cluster({"JAX_PLATFORMS": "cpu"}, True, NOBODY) is None
    assert processes.cluster({"SLURM_STEP_NUM_TASKS": "2"}, False, NOBODY) == {}
    assert processes.cluster({"SLURM_STEP_NUM_TASKS": "1"}, False, NOBODY) is None
    found = processes.cluster(ADDRESS, True, NOBODY)
    assert found == {"coordinator_address": "a:1", "num_processes": 4, "process_id": 3}
    found = processes.cluster(ADDRESS | {"SLURM_STEP_NUM_TASKS": "2"}, True, GIVEN)
    assert found == {"coordinator_address": "b:2", "num_processes": 2, "process_id": 0}


def test_one_task_a_node_drives_all_its_gpus_under_slurm():
    node = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    assert processes.cluster(node, False, NOBODY) == {"local_device_ids": [0, 1, 2, 3]}
    assert processes.cluster(node | {"SLURM_STEP_NUM_TASKS": "8"}, False, NOBODY) == {}  # JAX: one GPU each


@pytest.mark.parametrize(
    "env,given,message",
    [
        (
            ADDRESS | {"JAX_PROCESS_ID": "x"},
            {},
            r"--process_id \(or JAX_PROCESS_ID\): found 'x', expected a whole number",
        ),
        (ADDRESS | {"JAX_PROCESS_ID": "4"}, {}, r"--process_id: found 4, expected 0 to 3 for --num_processes=4"),
        ({}, {"process_id": 0}, r"--coordinator \(or JAX_COORDINATOR_ADDRESS\): not given, expected HOST:PORT"),
        ({}, GIVEN | {"coordinator": "b"}, "found 'b', expected HOST:PORT of process 0"),
        (
            {},
            GIVEN | {"num_processes": None},
            r"--num_processes \(or JAX_NUM_PROCESSES\): not given, expected a whole number",
        ),
        ({}, GIVEN | {"num_processes": -2}, "found '-2', expected a whole number"),
        ({}, GIVEN | {"num_processes": 0}, "--num_processes .*: found '0', expected a whole number from 1"),
        (
            {},
            GIVEN | {"coordinator": "b:99999"},
            "found 'b:99999', expected HOST:PORT of process 0 with a port from 1 to 65535",
        ),
        (
            {},
            GIVEN | {"coordinator": "b:0"},
            "found 'b:0', expected HOST:PORT of process 0 with a port from 1 to 65535",
        ),
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            {},
            r"--coordinator \(or JAX_COORDINATOR_ADDRESS\): not given",
        ),
    ],
)
def test_half_an_address_is_refused(env, given, message):
    with pytest.raises(UsageError, match=message):
        processes.cluster(env, False, NOBODY | given)


def test_hosts_that_share_rows_are_refused():
    class TwoHosts:  # a mesh of 8 devices, of which this process has 4
        shape, local_devices = {"data": 1, "fsdp": 1, "tensor": 8}, [None] * 4

    with pytest.raises(UsageError, match=r"mesh.tensor: found 8, expected a divisor of the 4 devices of one host"):
        meshes.check_batch(TwoHosts, 16)


def test_on_a_cpu_no_layer_computes_the_layers_before_it_again(monkeypatch):
    """The finding barriers_fence_nothing_on_cpu: the widest fusion of an unrolled model must not grow with its depth."""

    def widest(depth):
        cfg = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, width=16, depth=depth, unroll=depth))
        mesh = meshes.make_mesh(MeshConfig(data=1), jax.devices()[:1])
        text = make_train_step(cfg, mesh).lower(abstract_state(cfg, mesh), batch(cfg)).compile().as_text()
        assert ("opt-barrier(" in text) == bool(hardware.OPTIONS.get("cpu"))
        return max(call.count("%") for call in re.findall(r" fusion\(([^)]*)\), kind=kLoop", text))

    fenced = widest(4)
    assert fenced == widest(2)
    monkeypatch.delitem(hardware.OPTIONS, "cpu")
    assert widest(4) > fenced
