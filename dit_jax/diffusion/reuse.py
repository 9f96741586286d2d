"""Which outputs of a denoiser's blocks are reused from the call before: a fixed plan from measured changes.

The outputs of attention and MLP change little between neighbouring steps, and differently from layer to layer (Selvaraju et al. 2024,
FORA, arXiv 2407.01425; Ma et al. 2024, Learning-to-Cache, arXiv 2406.01733). Here an output is reused until its changes since it was
last computed sum to a threshold, the same for all, which is the least one that keeps the cost within a share of the full one.
"""

from collections.abc import Callable, Mapping

import jax
import numpy as np


class Recurrent:
    """Denoiser (x, t) that keeps arrays from call to call, by `call(kept, x, t) -> (output, kept)`; they go through a sampler's scan."""

    def __init__(self, call: Callable, kept):
        self.call, self.kept = call, kept

    def __call__(self, x, *times):
        out, self.kept = self.call(self.kept, x, *times)
        return out


def scan(body: Callable, carry, grid: Mapping, denoise: Callable):
    """Last carry of `lax.scan` of body(carry, coefficients) -> carry; with what `denoise` keeps, if it is Recurrent."""
    if not isinstance(denoise, Recurrent):
        return jax.lax.scan(lambda carry, c: (body(carry, c), None), carry, grid)[0]

    def both(carry, c):
        carry, denoise.kept = carry
        return (body(carry, c), denoise.kept), None

    (carry, denoise.kept), _ = jax.lax.scan(both, (carry, denoise.kept), grid)
    return carry


def computed(changes: np.ndarray, forced: np.ndarray, threshold: float) -> np.ndarray:
    """Whether each output is computed, bool (calls, ...), if it is reused until its changes (calls, ...) sum to more than `threshold`.

    Calls `forced`, bool (calls,), compute everything.
    """
    found, since = np.ones(changes.shape, bool), np.zeros(changes.shape[1:])
    for call, change in enumerate(changes):
        since = since + change
        found[call] = forced[call] | (since > threshold)
        since = np.where(found[call], 0.0, since)
    return found


def plan(changes: np.ndarray, forced: np.ndarray, cost: np.ndarray, share: float) -> np.ndarray:
    """Which outputs are computed, bool (calls, layers, parts): their cost is at most `share` of the full one, or the least there is.

    `changes` (calls, layers, parts): relative change of an output since the call before. `cost` (calls, parts): of one output.
    """
    if share >= 1:
        return np.ones(changes.shape, bool)
    weight = np.broadcast_to(cost[:, None], changes.shape)
    low, high = 0.0, float(changes.sum(axis=0).max())
    if (weight * computed(changes, forced, high)).sum() > share * weight.sum():
        return computed(changes, forced, high)
    for _ in range(60):
        middle = (low + high) / 2
        fits = (weight * computed(changes, forced, middle)).sum() <= share * weight.sum()
        low, high = (low, middle) if fits else (middle, high)
    return computed(changes, forced, high)
