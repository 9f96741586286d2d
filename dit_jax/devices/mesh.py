"""Device mesh, and the rule that places parameters, moments and EMA on it.

AXES has a row for each mesh axis: `data` replicates the state, `fsdp` shards it (Rajbhandari et al. 2020, ZeRO-3), `tensor` splits
heads and MLP (Shoeybi et al. 2019). The batch is split over `data` and `fsdp`. Where several TPU slices train together, the outer part of
`data` goes over the slices, so that only its sum of gradients crosses the data-center network.
"""

import collections
import functools
import importlib.util
import math
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dit_jax import hardware
from dit_jax.config import MeshConfig
from dit_jax.devices.numerics import check_numerics, xla_flags
from dit_jax.error import UsageError

# libtpu as a compiler only: no metadata server, no lock, severe log lines only.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v4-8",  # any name works: the call gives the topology
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}

# XLA's tile sizes of products come from trials on a device: without one, products are cuBLAS's and nothing is tried.
GPU_FLAGS = ("--xla_gpu_enable_triton_gemm=false", "--xla_gpu_autotune_level=0")

# Axis that `tensor` splits in the weights of a block, counted from the end.
TENSOR_AXES = {
    "qkv": {"kernel": -2, "bias": -2},  # (l, d, 3, k, h) and (l, 3, k, h): by heads
    "q": {"kernel": -2, "bias": -2},  # of cross-attention: (l, d, k, h) and (l, k, h)
    "kv": {"kernel": -2, "bias": -2},  # (l, d, 2, k, h) and (l, 2, k, h)
    "proj": {"kernel": -3},  # (l, k, h, d): by heads
    "fc1": {"kernel": -1, "bias": -1},
    "fc2": {"kernel": -2},
}
HEADED = tuple((name, "kernel") for name in ("qkv", "q", "kv", "proj"))  # kernels split by heads in TENSOR_AXES


class Axis(NamedTuple):
    """A mesh axis, a row of AXES.

    batch    whether it splits the images of a batch
    weights  (path, shape, free, devices) -> the axis among `free` of a weight to split, or None; see `spec`
    """

    batch: bool
    weights: Callable | None = None


def _split_heads(path: tuple, shape: tuple[int, ...], free: list[int], devices: int) -> int | None:
    """Axis of a block's weight in TENSOR_AXES, if it is free."""
    axis = TENSOR_AXES.get(path[-2], {}).get(path[-1]) if "blocks" in path else None
    return None if axis is None or axis + len(shape) not in free else axis + len(shape)


def _split_columns(path: tuple, shape: tuple[int, ...], free: list[int], devices: int) -> int | None:
    """Columns of a modulation, heads of an attention kernel, else the first axis that leaves whole tiles, else the largest.

    An all-gather then needs no relayout copy. A tile is 8 rows of the last axis but one by 128 columns of the last. Vectors are
    replicated.
    """
    if not free or len(shape) - ("blocks" in path) < 2:
        return None
    if "modulation" in path:
        return max(free)
    heads = len(shape) + TENSOR_AXES[path[-2]]["kernel"] if path[-2:] in HEADED else -1
    if heads in free:
        return heads
    rows = len(shape) - 2
    whole = [i for i in free if i < rows or (i == rows and shape[i] // devices % 8 == 0)]
    return whole[0] if whole else max(free, key=lambda i: shape[i])


# In mesh order; `spec` asks the rows from last to first.
AXES = {
    "data": Axis(batch=True),
    "fsdp": Axis(batch=True, weights=_split_columns),
    "tensor": Axis(batch=False, weights=_split_heads),
}


def batch_axes() -> tuple[str, ...]:
    """Names of the mesh axes that split a batch."""
    return tuple(name for name, axis in AXES.items() if axis.batch)


def batch_split(mesh) -> int:
    """Number of devices that a batch is split over."""
    return math.prod(mesh.shape[name] for name in batch_axes())


def mesh_shape(cfg: MeshConfig, devices: int, slices: int = 1) -> tuple[int, ...]:
    """Devices along each of AXES, with -1 filled in.

    Raises UsageError if the axes do not multiply to the devices, or the slices of these do not divide `mesh.data`.
    """
    sizes = [getattr(cfg, name) for name in AXES]
    asked = ", ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    if math.prod(sizes) != devices:
        raise UsageError(
            f"mesh: found {asked}, expected axes that multiply to {devices} device{'s' if devices > 1 else ''}"
        )
    data = sizes[list(AXES).index("data")]
    if data % slices:
        raise UsageError(
            f"mesh.data: found {data}, expected a multiple of the {slices} slices, which only this axis may cross; set "
            f"mesh.data to -1 or {slices}, and the other axes to at most the {devices // slices} devices of a slice"
        )
    return tuple(sizes)


def make_mesh(cfg: MeshConfig, devices=None) -> jax.sharding.Mesh:
    """Mesh over `devices` (default: all), with axes of type Auto. Raises UsageError as `mesh_shape` and `check_numerics`.

    An interconnect axis is split if necessary: fsdp 16 on a torus of 4 x 8 x 8 is 4 x 4. Of several TPU slices each is one block of `data`.
    """
    check_numerics()
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    shape = mesh_shape(cfg, len(devices), slices)
    outer = [slices if name == "data" else 1 for name in AXES]
    inner = [size // count for size, count in zip(shape, outer, strict=True)]
    make = mesh_utils.create_device_mesh
    if slices > 1:
        make = functools.partial(mesh_utils.create_hybrid_device_mesh, dcn_mesh_shape=outer)
    grid = make(inner, devices=devices, allow_split_physical_axes=True)
    return Mesh(grid, tuple(AXES), axis_types=(AxisType.Auto,) * len(AXES))


def local_mesh() -> jax.sharding.Mesh:
    """Mesh over the devices of this process, which split batches only."""
    return make_mesh(MeshConfig(), jax.local_devices())


def splits_weights(mesh) -> bool:
    """Whether any weight may be split over the mesh; else all are whole on every device."""
    return any(axis.weights and mesh.shape[name] > 1 for name, axis in AXES.items())


def hosts_of(mesh) -> int:
    """Number of processes that a mesh goes over."""
    return len({device.process_index for device in mesh.devices.flat})


def devices_of_processes() -> list[int]:
    """Device counts of the processes of this job, from process 0."""
    counts = collections.Counter(device.process_index for device in jax.devices())
    return [counts[index] for index in range(jax.process_count())]


def missing_compiler(topology: hardware.Topology) -> str:
    """How to get the compiler of programs for a topology; "" if it is installed, or no compiler knows the topology."""
    module, what, target, extra = hardware.COMPILERS.get(topology.platform, ("jax", "", "", ""))
    told = topology.platform != "gpu" or topology.generation in hardware.TARGETS
    ways = f"make {target} in a checkout, then PYTHONPATH=.venv/{target}; or pip install -e '.[{extra}]'"
    return "" if not told or importlib.util.find_spec(module) else f"no {what}: {ways}"


def why_not_compiled(topology: hardware.Topology) -> str:
    """Reason why programs for a topology cannot be compiled on this machine, or ""."""
    if topology.platform == "gpu" and topology.generation not in hardware.TARGETS:
        return f"the compiler of GPU programs is told of {', '.join(hardware.TARGETS)} only (dit_jax/hardware.py)"
    return missing_compiler(topology)


def devices_ahead(topology: hardware.Topology) -> list:
    """Devices of absent slices or GPUs, as targets of compilation. Call it before anything initialises JAX's backend."""
    jax.config.update("jax_platforms", "cpu")
    if topology.platform == "cpu":
        jax.config.update("jax_num_cpu_devices", topology.devices)
        return jax.devices()[: topology.devices]
    if topology.platform == "gpu":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"  # severe log lines only
        os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *GPU_FLAGS]).strip()
    else:
        os.environ.update(TPU_ENVIRONMENT)
    return list(topologies.get_topology_desc(**topology.description()).devices)


def compiler_options(mesh) -> dict | None:
    """Options of the compiler of a training step for a mesh, by the kind of its devices; None for absent devices and other kinds."""
    kind = mesh.devices.flat[0].device_kind if isinstance(mesh, Mesh) else ""
    return next((options for name, options in hardware.OPTIONS.items() if kind.startswith(name)), None)


def abstract_mesh(cfg: MeshConfig, devices: int, slices: int = 1):
    """Mesh of `devices` absent devices, whose shardings still give shard shapes. Raises UsageError as `mesh_shape`."""
    shape = mesh_shape(cfg, devices, slices)
    return jax.sharding.AbstractMesh(shape, tuple(AXES), axis_types=(AxisType.Auto,) * len(AXES))


def bytes_per_device(tree) -> int:
    """Bytes per device of a tree of abstract arrays with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def check_batch(mesh, batch_size: int, accumulate: int = 1, here: int = 0) -> None:
    """Raises UsageError unless the devices divide a (micro)batch and each host has whole rows.

    `here`: devices per host; 0 = as on this host.
    """
    here = here or len(mesh.local_devices)
    for name in [name for name in AXES if name not in batch_axes() and here % mesh.shape[name]]:
        raise UsageError(
            f"mesh.{name}: found {mesh.shape[name]}, expected a divisor of the {here} devices of one host: hosts read different "
            "rows of a batch"
        )
    split, names = batch_split(mesh), " x ".join(f"mesh.{name}" for name in batch_axes())
    if batch_size % (split * accumulate):
        raise UsageError(
            f"train.batch_size: found {batch_size}, expected a multiple of {split * accumulate} "
            f"({names} = {split}, optim.accumulate = {accumulate})"
        )


def spec(path: tuple, shape: tuple[int, ...], sizes: dict[str, int]) -> P:
    """Placement of a weight. `path`: names from the root to the leaf; `sizes`: devices along each mesh axis.

    Inside `blocks` the first axis counts layers and is never split. Each row of AXES may split one axis that its devices divide and no
    other row has taken. Embedding tables, whose gradient is a scatter-add, are replicated.
    """
    layers = 1 if "blocks" in path else 0
    if len(shape) - layers < 1 or "table" in path:
        return P()
    axes: list = [None] * len(shape)
    for name, axis in reversed(AXES.items()):
        if axis.weights and sizes[name] > 1:
            free = [i for i in range(layers, len(shape)) if axes[i] is None and shape[i] % sizes[name] == 0]
            chosen = axis.weights(path, shape, free, sizes[name])
            if chosen is not None:
                axes[chosen] = name
    return P(*axes)


def _names(path: tuple) -> tuple[str, ...]:
    return tuple(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path)


def state_sharding(mesh, tree):
    """Maps a tree of shapes (parameters, EMA, optimizer state) to NamedShardings by `spec`."""
    sizes = dict(mesh.shape)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec(_names(path), leaf.shape, sizes)), tree
    )


def batch_sharding(mesh) -> NamedSharding:
    """Sharding of a batch by rows."""
    return NamedSharding(mesh, P(batch_axes()))


def placer(mesh, dtype: str) -> Callable:
    """The `place` function of `models.dit.apply` for a mesh.

    "weights", a tree of one layer's weights: gathered along the axes that also split the batch, in the compute dtype except for
    vectors, so that activations stay with their images. (By default the compiler splits activations by features, as the weights are, and
    sums them over the mesh, which takes twice the time for XL/2 on v3-8.) Gradients are reduce-scattered to the weights' shards.
    Modulation weights stay split.
    "condition", vectors (b, d): gathered over the devices that a layer's weights are split over.
    "fence": kept in memory on a CPU, where each operation that reads them would compute them again, see `hardware.FENCED`.
    """
    both = [name for name, axis in AXES.items() if axis.batch and axis.weights]
    rows = NamedSharding(mesh, P(tuple(name for name in batch_axes() if name not in both)))

    def place(path, leaf, sizes):
        return NamedSharding(mesh, P(*spec(("blocks", *_names(path)), (1, *leaf.shape), sizes)[1:]))

    def whole(path, leaf):
        if "modulation" in _names(path):
            return leaf
        if leaf.ndim < 2:
            return jax.lax.with_sharding_constraint(leaf, replicated(mesh))
        kept = dict(mesh.shape)
        return _gather(leaf, dtype, place(path, leaf, kept | dict.fromkeys(both, 1)), place(path, leaf, kept))

    rules = {
        "weights": lambda tree: jax.tree_util.tree_map_with_path(whole, tree),
        "condition": lambda c: jax.lax.with_sharding_constraint(c, rows),
        "fence": jax.lax.optimization_barrier if compiler_options(mesh) is hardware.FENCED else lambda arrays: arrays,
    }
    return lambda name, arrays: rules[name](arrays)


def gatherer(mesh, dtype: str) -> Callable:
    """The `place` function for drawing and scoring: a layer's weights, in any dtype, are gathered whole before it runs.

    Each device then computes what it would with all weights on it, to the same bits.
    """
    rows = batch_sharding(mesh)
    rules = {
        "weights": lambda tree: jax.lax.optimization_barrier(jax.lax.with_sharding_constraint(tree, replicated(mesh))),
        "condition": lambda c: jax.lax.with_sharding_constraint(c, rows),
        "fence": lambda arrays: arrays,
    }
    return lambda name, arrays: rules[name](arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(leaf, dtype: str, whole: NamedSharding, kept: NamedSharding):
    return jax.lax.with_sharding_constraint(leaf.astype(dtype), whole)


def _gather_forward(leaf, dtype, whole, kept):
    return _gather(leaf, dtype, whole, kept), None


def _gather_backward(dtype, whole, kept, _, gradient):
    return (jax.lax.with_sharding_constraint(gradient, kept).astype(jnp.float32),)


_gather.defvjp(_gather_forward, _gather_backward)


def replicated(mesh) -> NamedSharding:
    """Sharding with the whole array on every device."""
    return NamedSharding(mesh, P())


def on_one_device(shapes):
    """Adds to a tree of shapes the sharding "whole, on this process's first device"."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def put_batch(mesh, batch):
    """Global arrays from this process's rows of a batch. On a single process they stay as they are: `jit` places them faster."""
    count = hosts_of(mesh)
    if count == 1:
        return batch
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(sharding, rows, (len(rows) * count, *rows.shape[1:])), batch
    )


def attention_implementation(requested: str, dtype: str) -> str:
    """Resolves `auto` to cudnn on an NVIDIA GPU in bfloat16, else to xla, which is faster on TPU at 256 tokens.

    Raises UsageError for cudnn without an NVIDIA GPU.
    """
    if requested == "cudnn" and jax.default_backend() != "gpu":
        raise UsageError(
            f"model.attention: found 'cudnn' on {jax.default_backend()}, expected 'auto' or 'xla' without an NVIDIA GPU"
        )
    if requested != "auto":
        return requested
    return "cudnn" if jax.default_backend() == "gpu" and dtype == "bfloat16" else "xla"


def peak_flops() -> tuple[float, str]:
    """Peak FLOP/s of all devices and its source: the datasheet, or else a matrix product measured here."""
    devices = jax.devices()
    if known := hardware.find(devices[0].device_kind):
        return known.peak_flops * len(devices), f"{known.kind} datasheet, 16-bit"
    return measured_matmul_flops(), "measured here on a 1024^3 float32 product"


def describe_device() -> dict:
    """Kind of device, its precision of float32 matrix products (GPU and TPU backends default to a coarser one), and XLA's flags."""
    precision = jax.config.jax_default_matmul_precision or "default"
    flags = {"xla_flags": xla_flags()} if xla_flags() else {}
    return {"kind": jax.devices()[0].device_kind, "matmul_precision": precision, **flags}


def measured_matmul_flops(size: int = 1024, repeats: int = 3) -> float:
    """FLOP/s of this machine on a square float32 matrix product, the best of `repeats`."""
    a = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / float(np.min(seconds))
