"""How Orbax writes and reads the arrays of a checkpoint: in blocks that a part can be read from, within a bound of the host's memory."""

import contextlib
import functools
import logging
import math
import os
from collections.abc import Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dit_jax.error import JobError, StorageError, UsageError
from dit_jax.files import is_folder

# Replicas write their parts of large arrays alone: each slice of a small one would cost a compiled program and a copy.
WHOLE = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=1 << 20)
logging.disable(logging.WARNING)  # it warns that it overrides, which is what is asked for
ocp.type_handlers.register_type_handler(jax.Array, WHOLE, override=True)
logging.disable(logging.NOTSET)
CHUNK = 8 << 20  # largest block of an array in a file, bytes: what a reader of a small part of the array has to read
IN_FLIGHT = 1 / 20  # part of a process's share of the state that a restore may have on the way; each byte takes up to 3


def check_tree(at: str, item: str, like) -> dict:
    """Maps paths to the stored arrays' metadata. Raises UsageError naming leaves that are missing, unknown, or unlike `like`."""
    if not is_folder(os.path.join(at, item)):
        raise UsageError(f"{os.path.join(at, item)}: missing, expected the item {item!r} of a checkpoint")
    stored = ocp.StandardCheckpointHandler().metadata(epath.Path(at) / item).tree
    found, wanted = leaves(stored), leaves(like)
    names = [n for n in {**wanted, **found} if found.get(n) != wanted.get(n)]
    if names:
        shown = [f"{n}: found {found.get(n, 'nothing')}, expected {wanted.get(n, 'nothing')}" for n in names]
        raise UsageError(f"{os.path.join(at, item)}: other leaves than the config's model has: {few(shown)}")
    return _named(stored)


def in_chunks(tree) -> ocp.args.StandardSave:
    return ocp.args.StandardSave(tree, jax.tree.map(lambda leaf: ocp.SaveArgs(chunk_byte_size=CHUNK), tree))


def _named(tree) -> dict:
    """Map paths to leaves."""
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def leaves(tree) -> dict[str, str]:
    """Map paths to "dtype (shape)" for a tree of arrays or their metadata."""
    return {path: f"{np.dtype(leaf.dtype).name} {tuple(leaf.shape)}" for path, leaf in _named(tree).items()}


def frugal(stored: dict, like: dict) -> ocp.StandardCheckpointHandler:
    """Return a reader with at most IN_FLIGHT of this process's share on the way, and always room for the largest read.

    `stored`, `like`: by item, what `check_tree` found and the abstract arrays.
    """
    share, largest = 0, 0
    for item, tree in like.items():
        for path, leaf in _named(tree).items():
            part, size = leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize
            share += size * math.prod(part) * len(leaf.sharding.addressable_devices)
            # whole chunks are read; parts that neither divide nor are divided by them may touch one more
            sides = zip(part, stored[item][path].storage.chunk_shape, strict=True)
            touched = [-(-p // c) * c + (c if p % c and c % p else 0) for p, c in sides]
            largest = max(largest, size * math.prod(touched))
    return ocp.StandardCheckpointHandler(restore_concurrent_gb=max(IN_FLIGHT * share, largest + 1) / 1e9)


@contextlib.contextmanager
def told_to_others(at: str) -> Iterator[None]:
    """Among several processes, turns what the disk refuses, such as a checkpoint pruned meanwhile, into a JobError, which all hear of."""
    try:
        yield
    except OSError as error:
        if jax.process_count() == 1 or isinstance(error, StorageError):
            raise
        raise JobError(f"{at}: cannot be read ({str(error).splitlines()[0]})") from None


def few(lines: list[str]) -> str:
    return "; ".join(lines[:3]) + (f" and {len(lines) - 3} more" if len(lines) > 3 else "")
