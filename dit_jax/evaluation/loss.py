"""Held-out loss of EMA or raw weights on a fixed set of (image, noise, t): over the law of t, and at equidistant t."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.bind import bind_to_draw
from dit_jax.config import Config, EvalConfig
from dit_jax.devices.mesh import batch_sharding, batch_split, replicated
from dit_jax.devices.numerics import random_key
from dit_jax.devices.processes import common
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
    """Compiles (params, images (b, h, w, c), cond, indices (b,)) -> losses (b, times). `cfg`: stripped by `alone`."""
    model, weights = bind_to_draw(cfg.model, mesh)
    objective, k = make_objective(cfg), cfg.eval.fixed_times or cfg.eval.times_per_image

    def times(indices):
        if cfg.eval.fixed_times:
            return jnp.tile(jnp.asarray(objective.process.equidistant(k), jnp.float32), len(indices))
        return objective.process.time(stratified(cfg.eval.seed, indices, k).reshape(-1))

    def losses(params, images, cond, indices):
        t = times(indices)
        eps = fixed_noise(cfg.eval.seed, indices, k, images.shape[1:]).reshape(-1, *images.shape[1:])
        x, cond = jax.tree.map(lambda rows: jnp.repeat(rows, k, axis=0), (images, cond))
        total, _ = objective.losses(model, params, {}, {"x": x, "cond": cond, "t": t, "eps": eps})
        return total.reshape(-1, k)

    rows = batch_sharding(mesh)
    return jax.jit(losses, in_shardings=(weights, rows, rows, rows), out_shardings=replicated(mesh))


def alone(cfg: Config, fixed: int) -> Config:
    """The parts of a config that the losses depend on, so that configs equal in them share a program."""
    points = EvalConfig(times_per_image=cfg.eval.times_per_image, fixed_times=fixed, buckets=1, seed=cfg.eval.seed)
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
    losses, at_once = make_losses(alone(cfg, 0), mesh), max(1, PAIRS // cfg.eval.times_per_image)
    found = table(losses, at_once, cfg.eval.batch_size, params, images, cond, mesh, look)
    buckets = found.reshape(len(found), cfg.eval.buckets, -1).mean(axis=(0, 2))
    return mean_and_error("loss", found.mean(axis=1)) | {f"loss_t{b}": value for b, value in enumerate(buckets)}


def fixed_time_loss(
    cfg: Config, params, images: np.ndarray, cond, mesh, look: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """As `held_out_loss`, at the same eval.fixed_times times `process.equidistant` for each image, whatever the law of t in training.

    `loss_fixed` is the plain mean over images and times, `loss_fixed_se` its standard error over images, `loss_fixed_t0`, ... the mean
    at each time. The noise depends on (seed, image, time) only. With 8 times in [0, 1) it is the validation loss of MLPerf's text-to-image
    benchmark.
    """
    losses, at_once = make_losses(alone(cfg, cfg.eval.fixed_times), mesh), max(1, PAIRS // cfg.eval.fixed_times)
    found = table(losses, at_once, cfg.eval.batch_size, params, images, cond, mesh, look)
    times = {f"loss_fixed_t{k}": value for k, value in enumerate(found.mean(axis=0))}
    return mean_and_error("loss_fixed", found.mean(axis=1)) | times


def mean_and_error(name: str, each: np.ndarray) -> dict[str, float]:
    """Mean of one number an image, (images,), and its standard error, absent for one image."""
    error = {f"{name}_se": each.std(ddof=1) / np.sqrt(len(each))} if len(each) > 1 else {}
    return {name: each.mean(), **error}


def table(
    program: Callable, at_once: int, size: int, params, images: np.ndarray, cond, mesh, look: Callable[[], None]
) -> np.ndarray:
    """Numbers (images, k), float64, of `program(params, images, cond, indices)`, of which a device always takes `at_once` images.

    `look()` is called once in about `size` images. `images`: (n, h, w, c), or an array (n,) of arrays (h, w, c), of which those of one
    shape are computed together. Raises NotFiniteError.
    """
    shapes, rows = [image.shape for image in images], batch_split(mesh) * at_once
    batch, found = -(-size // rows) * rows, {}
    for shape in dict.fromkeys(shapes):
        alike = np.array([i for i, other in enumerate(shapes) if other == shape], np.int32)
        for start in range(0, len(alike), rows):
            if start % batch == 0:
                look()
            some = alike[start : start + rows]
            filled = np.concatenate([some, np.repeat(some[-1:], rows - len(some))])  # padding, dropped below
            chosen, of = np.stack([*images[filled]]), jax.tree.map(lambda rows, filled=filled: rows[filled], cond)
            values = np.asarray(program(params, *put_whole(mesh, (chosen, of, filled))), np.float64)
            found |= dict(zip(some.tolist(), values, strict=False))
    made = np.stack([found[i] for i in range(len(images))])
    if not np.isfinite(made).all():
        why = "the run diverged, and nothing is recorded"
        raise common(NotFiniteError(f"held-out loss: found values that are not finite; {why}"))
    return made
