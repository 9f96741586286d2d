"""The order of examples: example p of a run (p = 0, 1, ...) is record `order(seed, p // n, n)[p % n]` of a split of n records."""

import functools
from collections.abc import Callable

import numpy as np

from dit_jax.data.counter import ORDER, hash_counters

_KEPT = 4  # epochs of a split, whose order is kept: threads read ahead


def order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Permute 0..size-1 for an epoch, by sorting hashes."""
    return np.argsort(hash_counters(seed, ORDER, epoch, np.arange(size)), kind="stable")


def make_order(size: int, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """Make a function: consecutive positions (b,), which may span epochs -> records (b,) of a split of `size` records."""
    permuted = functools.lru_cache(maxsize=_KEPT)(lambda epoch: order(seed, epoch, size))

    def records_at(positions: np.ndarray) -> np.ndarray:
        epochs = range(int(positions[0]) // size, int(positions[-1]) // size + 1)
        within = positions - epochs[0] * size
        if len(epochs) == 1:
            return permuted(epochs[0])[within]
        return np.concatenate([permuted(epoch) for epoch in epochs])[within]

    return records_at
