"""Writes a folder of latents (`shard_writer`)."""

from collections.abc import Callable, Iterable

import numpy as np

from dit_jax.data.latent_notes import LatentInfo
from dit_jax.data.latents import LatentRecords, open_latents
from dit_jax.data.shard_writer import Hosts, write_shards

SHARD_BYTES = 1 << 30


def write_latents(
    folder: str,
    info: LatentInfo,
    size: int,
    examples_of: Callable[[np.ndarray], Iterable],
    *,
    settle: Callable[[LatentRecords], LatentInfo] | None = None,
    shard_bytes: int = SHARD_BYTES,
    hosts: Hosts = Hosts(),
) -> LatentRecords:
    """Write latents as `write_shards` does, and open them. Each shard has `shard_bytes` at most, or one record.

    An example is (label, array of `info.record_shape`, captions if the notes have their checksum), label 0 without labels.
    `settle` gets all records before publication, and may change scale and shift.
    """
    settled = (lambda *found: settle(LatentRecords(*found))) if settle else lambda found, *_: found
    write_shards(folder, info, size, max(1, shard_bytes // info.layout.itemsize), examples_of, settled, hosts)
    return open_latents(folder)
