"""Held-out loss of EMA or raw weights on a fixed set of (image, noise, t)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.bind import bind_to_draw
from dit_jax.config import Config, EvalConfig
from dit_jax.devices.mesh import batch_sharding, batch_split, replicated
from dit_jax.devices.numerics import random_key
from dit_jax.devices.rows import put_whole
from dit_jax.diffusion.objective import make_objective
from dit_jax.error import NotFiniteError

PAIRS = 64  # (image, time) that a device computes at a time; fixed, because another batch shape rounds differently


def stratified(seed: int, indices: jax.Array, times_per_image: int) -> jax.Array:
    """Stratified u (b, k) in [0, 1): draw j of image i is uniform in [j/k, (j+1)/k), from (seed, i, j) only."""

    def one(i):
        key = jax.random.fold_in(jax.random.fold_in(random_key(seed), i), 0)
        u = (jnp.arange(times_per_image) + jax.random.uniform(key, (times_per_image,))) / times_per_image
        return jnp.minimum(u, 1 - 2**-24)  # because float32 may round the last stratum up to 1

    return jax.vmap(one)(indices)


def fixed_noise(seed: int, indices: jax.Array, times_per_image: int, shape: tuple) -> jax.Array:
    """Standard normal noise (b, k, *shape), from (seed, i) only."""

    def one(i):
        key = jax.random.fold_in(jax.random.fold_in(random_key(seed), i), 1)
        return jax.random.normal(key, (times_per_image, *shape))

    return jax.vmap(one)(indices)


@functools.lru_cache(maxsize=8)
def make_losses(cfg: Config, mesh):
    """Compiles (params, images (b, h, w, c), cond, indices (b,)) -> losses (b, times_per_image). `cfg`: stripped by `_alone`."""
    model, weights = bind_to_draw(cfg.model, mesh)
    objective, k = make_objective(cfg), cfg.eval.times_per_image

    def losses(params, images, cond, indices):
        t = objective.process.time(stratified(cfg.eval.seed, indices, k).reshape(-1))
        eps = fixed_noise(cfg.eval.seed, indices, k, images.shape[1:]).reshape(-1, *images.shape[1:])
        x, cond = jax.tree.map(lambda rows: jnp.repeat(rows, k, axis=0), (images, cond))
        total, _ = objective.losses(model, params, {}, {"x": x, "cond": cond, "t": t, "eps": eps})
        return total.reshape(-1, k)

    rows = batch_sharding(mesh)
    return jax.jit(losses, in_shardings=(weights, rows, rows, rows), out_shardings=replicated(mesh))


def _alone(cfg: Config) -> Config:
    """The parts of a config that the losses depend on, so that configs equal in them share a program."""
    points = EvalConfig(times_per_image=cfg.eval.times_per_image, buckets=1, seed=cfg.eval.seed)
    return Config(model=cfg.model, diffusion=cfg.diffusion, eval=points)


def held_out_loss(
    cfg: Config, params, images: np.ndarray, cond, mesh, look: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Mean loss over the fixed set, its standard error over images (absent for one image), and the mean per bucket of t (0 = least noise).

    The set is the same for every model, so a difference between models has a smaller error than `loss_se` suggests. A device
    always computes about PAIRS pairs at a time, so batch size and number of devices change nothing. (Programs compiled for the
    batch size moved the loss by up to 3e-9 of itself in float32, 6e-5 in bfloat16.) `look()` is called once a batch. Raises
    NotFiniteError.
    """
    losses = make_losses(_alone(cfg), mesh)
    rows = batch_split(mesh) * max(1, PAIRS // cfg.eval.times_per_image)
    batch = -(-cfg.eval.batch_size // rows) * rows
    found = []
    for start in range(0, len(images), rows):
        if start % batch == 0:
            look()
        indices = np.arange(start, start + rows, dtype=np.int32)
        safe = np.minimum(indices, len(images) - 1)  # padding of the last rows, dropped below
        chosen = jax.tree.map(lambda rows, safe=safe: rows[safe], (images, cond))
        values = np.asarray(losses(params, *put_whole(mesh, (*chosen, indices))), np.float64)
        found.append(values[: len(images) - start])
    table = np.concatenate(found)
    if not np.isfinite(table).all():
        why = "the run diverged, and nothing is recorded"
        raise NotFiniteError(f"held-out loss: found values that are not finite; {why}")
    per_image = table.mean(axis=1)
    buckets = table.reshape(len(table), cfg.eval.buckets, -1).mean(axis=(0, 2))
    error = {"loss_se": per_image.std(ddof=1) / np.sqrt(len(per_image))} if len(per_image) > 1 else {}
    return {"loss": per_image.mean(), **error, **{f"loss_t{b}": value for b, value in enumerate(buckets)}}
