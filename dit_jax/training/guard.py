"""Safeguards of a training step: skip it if loss or gradients are not finite or spike; compute it twice and compare the bits."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.config import TrainConfig
from dit_jax.error import JobError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Guard:
    """Rolling statistics of the loss and the gradient norm, and counts of skipped steps."""

    count: Any  # int32, steps in the statistics
    mean: Any  # float32 (2,): loss, gradient norm
    variance: Any  # float32 (2,)
    skipped: Any  # int32, in total
    streak: Any  # int32, skipped in a row so far


def init_guard() -> Guard:
    """The guard before the first step. Its arrays share no buffer because the state that holds it is donated."""
    return Guard(_zero(), jnp.zeros(2), jnp.zeros(2), _zero(), _zero())


def _zero() -> jax.Array:
    return jnp.zeros((), jnp.int32)


def judge(cfg: TrainConfig, guard: Guard, loss, grad_norm, param_norm) -> tuple[jax.Array, Guard]:
    """Decides on a step: (bool scalar, whether it is accepted; the guard after it).

    A step is refused if the loss, the gradient norm or the norm of the new parameters is not finite. After `train.spike_window`
    steps it is also refused if loss or gradient norm exceeds its rolling mean by more than `train.spike` standard deviations.
    Both are exponential averages over `train.spike_window` steps, in which a refused spike counts as a value at the limit. With
    20 deviations and 100 steps the limit more than doubles at every refusal: a loss that has moved for good is accepted after a
    few steps, and one that diverges reaches `train.skips_in_a_row`.
    """
    x = jnp.stack([loss, grad_norm]).astype(jnp.float32)
    finite = jnp.isfinite((x - guard.mean) ** 2).all() & jnp.isfinite(param_norm)  # squared, as the variance needs it
    limit = jnp.full_like(x, jnp.inf)
    if cfg.spike:
        limit = jnp.where(guard.count < cfg.spike_window, limit, guard.mean + cfg.spike * jnp.sqrt(guard.variance))
    accepted = finite & (x <= limit).all()
    delta = jnp.minimum(x, limit) - guard.mean
    rate = 1 / jnp.minimum(guard.count + 1, cfg.spike_window).astype(jnp.float32)
    mean, variance = guard.mean + rate * delta, (1 - rate) * (guard.variance + rate * delta**2)
    seen = Guard(guard.count + 1, mean, variance, guard.skipped, _zero())
    unseen = Guard(guard.count, guard.mean, guard.variance, guard.skipped, guard.streak)
    after = choose(finite, seen, unseen)
    return accepted, choose(accepted, after, replace(after, skipped=guard.skipped + 1, streak=guard.streak + 1))


def choose(condition: jax.Array, new, old):
    """The tree `new` if the scalar condition holds, else `old`, bit for bit."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


@jax.jit
def all_finite(tree) -> jax.Array:
    """Whether every float in a tree is finite."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in floats]).all()


def fingerprint(tree) -> jax.Array:
    """Sum (uint32, modulo 2^32) of the bits of all floats in a tree. A single flipped bit changes it; the order of summing does not."""
    return sum((_bits(leaf).astype(jnp.uint32).sum(dtype=jnp.uint32) for leaf in jax.tree.leaves(tree)), jnp.uint32(0))


def _bits(x: jax.Array) -> jax.Array:
    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}
    return jax.lax.bitcast_convert_type(x, words[x.dtype.itemsize])


@jax.jit
def _copy(tree):
    return jax.tree.map(jnp.copy, tree)


@jax.jit
def _same(a, b):
    return jax.tree.map(lambda x, y: (_bits(x) == _bits(y)).all(), a, b)


def _everywhere(value: jax.Array) -> bool:
    """Whether a replicated bool is true on every device of this process. Each device compared its own results."""
    return all(np.asarray(shard.data).all() for shard in value.addressable_shards)


def run_twice(step: Callable, state, batch: dict, number: int):
    """Computes `step(state, batch)` twice with the same program and compares the results bit for bit; returns the first.

    Needs memory for a second state; `state` is donated. Raises JobError, which names a leaf that differs.
    """
    spare = _copy(state)
    first, second = step(state, batch), step(spare, batch)
    same, _ = jax.tree_util.tree_flatten_with_path(_same(first, second))
    wrong = [jax.tree_util.keystr(path) for path, equal in same if not _everywhere(equal)]
    if wrong:
        raise JobError(
            f"step {number}, computed twice from the same state and batch, gave other bits in {len(wrong)} of {len(same)} "
            f"arrays (first: {wrong[0]}): a device or its memory is at fault. Nothing of this step was kept; run the same "
            "command on other devices, and it goes on from the last checkpoint"
        )
    return first
