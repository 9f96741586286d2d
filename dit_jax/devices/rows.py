"""Rows on a mesh that may go over several hosts, each with rows of its own; and the mesh for drawing and scoring."""

import itertools

import jax
import numpy as np

from dit_jax import hardware
from dit_jax.config import MeshConfig
from dit_jax.devices.mesh import (
    batch_sharding,
    batch_split,
    hosts_of,
    local_mesh,
    make_mesh,
    splits_weights,
    state_sharding,
)

BLOCK = 128  # indices that go to one host together
SHARE = 0.5  # of a device's memory that whole weights may take


def own_mesh(mesh) -> jax.sharding.Mesh:
    """Mesh of this process's devices, for what each process does alone; the mesh itself if it has no others and splits no weights."""
    return mesh if hosts_of(mesh) == 1 and not splits_weights(mesh) else local_mesh()


def own_split(mesh) -> int:
    """Number of this process's devices that a batch is split over."""
    return batch_split(mesh) // hosts_of(mesh)


def put_whole(mesh, batch):
    """Global arrays, sharded by rows, of a batch that every process has whole. On a single process they stay as they are."""
    if hosts_of(mesh) == 1:
        return batch
    rows = batch_sharding(mesh)
    return jax.tree.map(lambda leaf: jax.make_array_from_callback(leaf.shape, rows, leaf.__getitem__), batch)


def own_rows(array: jax.Array) -> np.ndarray:
    """Rows of an array that this process put in by `put_batch`, in that order."""
    if array.is_fully_addressable:
        return jax.device_get(array)
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def shares(ranges: list[tuple[int, int]], hosts: int) -> list[np.ndarray]:
    """Indices of each host, in order: blocks of BLOCK, cut at its multiples, so that all have as many but for a block. `ranges`: rising."""
    total, before, found = sum(end - first for first, end in ranges), 0, [[np.zeros(0, np.int64)] for _ in range(hosts)]
    for first, end in ranges:
        for ends in itertools.pairwise([first, *range((first // BLOCK + 1) * BLOCK, end, BLOCK), end]):
            found[before * hosts // total].append(np.arange(*ends))
            before += ends[1] - ends[0]
    return [np.concatenate(blocks) for blocks in found]


def drawing_mesh(weights: int, devices=None) -> jax.sharding.Mesh:
    """Mesh over `devices` (default: all) for a model with so many bytes of weights.

    They are whole on each device, or, if they take more than SHARE of its memory, split over the fewest devices of a host, else of all,
    on which they do not.
    """
    devices = jax.devices() if devices is None else devices
    known = hardware.find(devices[0].device_kind)
    return make_mesh(
        MeshConfig(fsdp=_split(weights, SHARE * known.memory_bytes if known else weights, devices)), devices
    )


def _split(weights: int, room: float, devices) -> int:
    own = sum(device.process_index == devices[0].process_index for device in devices)
    total = len(devices)
    counts = [n for n in range(1, own + 1) if own % n == 0] + [n for n in range(own + 1, total) if total % n == 0]
    return next((n for n in counts if weights <= n * room), total)


def on_mesh(mesh, shapes):
    """Adds to a tree of shapes of weights their places on the mesh."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        state_sharding(mesh, shapes),
    )
