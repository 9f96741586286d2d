"""Held-out targets beside the loss, of the same images: the variational bound, and the exact likelihood, in bits per dimension."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.bind import bind_to_draw
from dit_jax.config import Config, EvalConfig
from dit_jax.devices.mesh import batch_sharding, replicated
from dit_jax.devices.numerics import random_key
from dit_jax.diffusion.likelihood import FLOW_ENDS, LEAST_ALPHA, bound, find_solver, negative_log_likelihood
from dit_jax.diffusion.objective import make_objective
from dit_jax.diffusion.process import Flow, denoiser
from dit_jax.evaluation.loss import PAIRS, fixed_noise, mean_and_error, stratified, table

LEVEL = 2 / 255  # width of an 8-bit level in [-1, 1]
IMAGES = 16  # of which a device integrates the ODE at a time; fixed, because another batch shape rounds differently


def of_latents(cfg: Config) -> bool:
    """Whether a model's inputs are latents, so that its likelihood is of a density and not of 8-bit images."""
    return bool(cfg.data.parts[0].latents) or cfg.data.encode == "in_step"


def _alone(cfg: Config, *names: str) -> Config:
    """The parts of a config that a target depends on, with these settings of `eval`, so that configs equal in them share a program."""
    chosen = {name: getattr(cfg.eval, name) for name in ("seed", *names)}
    return Config(model=cfg.model, diffusion=cfg.diffusion, eval=EvalConfig(**chosen))


def _denoiser(cfg: Config, mesh):
    """The process, (params, cond) -> denoise(x, t), and the places of the weights."""
    model, weights = bind_to_draw(cfg.model, mesh)
    process = make_objective(cfg).process

    def bound_to(params, cond) -> Callable:
        return denoiser(process, lambda x, t: model.apply(params, x, t, cond))

    return process, bound_to, weights


def _draws(seed: int, indices: jax.Array, shape: tuple) -> tuple[jax.Array, jax.Array]:
    """Uniform noise in [0, 1) and signs -1 and 1, each (b, *shape), from (seed, i) only."""

    def one(i):
        keys = [jax.random.fold_in(jax.random.fold_in(random_key(seed), i), n) for n in (2, 3)]
        return jax.random.uniform(keys[0], shape), jax.random.rademacher(keys[1], shape, jnp.float32)

    return jax.vmap(one)(indices)


@functools.lru_cache(maxsize=4)
def make_bounds(cfg: Config, mesh, levels: bool):
    """Compiles (params, images (b, h, w, c), cond, indices (b,)) -> bits per dimension (b, 3): see `bound`. `cfg`: stripped."""
    process, bound_to, weights = _denoiser(cfg, mesh)
    k = cfg.eval.vlb_times
    calls = k if isinstance(process, Flow) else k + 1

    def bounds(params, images, cond, indices):
        u, eps = stratified(cfg.eval.seed, indices, k), fixed_noise(cfg.eval.seed, indices, k + 1, images.shape[1:])
        cond = jax.tree.map(lambda rows: jnp.repeat(rows, calls, axis=0), cond)
        return bound(process, bound_to(params, cond), images, u, eps, levels)

    rows = batch_sharding(mesh)
    return jax.jit(bounds, in_shardings=(weights, rows, rows, rows), out_shardings=replicated(mesh))


@functools.lru_cache(maxsize=4)
def make_likelihoods(cfg: Config, mesh, levels: bool):
    """Compiles (params, images (b, h, w, c), cond, indices (b,)) -> -log2 p per dimension (b, 1). `cfg`: stripped."""
    process, bound_to, weights = _denoiser(cfg, mesh)

    def likelihoods(params, images, cond, indices):
        u, probe = _draws(cfg.eval.seed, indices, images.shape[1:])
        x = images + LEVEL * (u - 0.5) if levels else images
        steps, solver = cfg.eval.likelihood_steps, cfg.eval.likelihood_solver
        bits = negative_log_likelihood(process, bound_to(params, cond), x, probe, steps, solver)
        return (bits - np.log2(LEVEL) if levels else bits)[:, None]

    rows = batch_sharding(mesh)
    return jax.jit(likelihoods, in_shardings=(weights, rows, rows, rows), out_shardings=replicated(mesh))


def held_out_bound(
    cfg: Config, params, images: np.ndarray, cond, mesh, look: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Mean variational bound over the images, its standard error, and its prior and reconstruction terms.

    The noise depends on (eval.seed, image, number of the time) only. Batch size and number of devices change nothing, as in
    `held_out_loss`. Raises NotFiniteError.
    """
    made = make_bounds(_alone(cfg, "vlb_times"), mesh, not of_latents(cfg))
    at_once = max(1, PAIRS // (cfg.eval.vlb_times + 1))
    found = table(made, at_once, cfg.eval.batch_size, params, images, cond, mesh, look)
    parts = {f"vlb_{name}_bits_per_dim": found[:, 1 + i].mean() for i, name in enumerate(("reconstruction", "prior"))}
    return mean_and_error("vlb_bits_per_dim", found.sum(axis=1)) | parts


def held_out_likelihood(
    cfg: Config, params, images: np.ndarray, cond, mesh, look: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Mean of -log2 p per dimension over the first `eval.likelihood_images` images, and its standard error.

    8-bit images are dequantised by uniform noise, and log2 of the width of a level is subtracted. This noise and the probe of
    the divergence depend on (eval.seed, image) only. The standard error includes both. Batch size and number of devices
    change nothing, as in `held_out_loss`. Raises NotFiniteError.
    """
    names = ("likelihood_steps", "likelihood_solver")
    made = make_likelihoods(_alone(cfg, *names), mesh, not of_latents(cfg))
    images, cond = jax.tree.map(lambda x: x[: cfg.eval.likelihood_images or len(x)], (images, cond))
    found = table(made, IMAGES, cfg.eval.batch_size, params, images, cond, mesh, look)
    return mean_and_error("likelihood_bits_per_dim", found[:, 0])


def describe_bound(cfg: Config) -> dict:
    """What the bound depends on besides model, images and seed, for protocols."""
    flow = isinstance(make_objective(cfg).process, Flow)
    ends = f"times {FLOW_ENDS[0]:g} to {FLOW_ENDS[1]:g}, decoder N(x_t / alpha, (sigma / alpha)^2)"
    return {
        "times_per_image": cfg.eval.vlb_times,
        "bound": f"continuous, {ends}" if flow else "all steps of the chain, decoder at the first",
        "unit": _unit(cfg, ", of discretised Gaussians"),
    }


def describe_likelihood(cfg: Config) -> dict:
    """What the likelihood depends on besides model, images and seed, for protocols."""
    process, steps = make_objective(cfg).process, cfg.eval.likelihood_steps
    clock = "squares of equal steps" if isinstance(process, Flow) else f"angle, to alpha of at least {LEAST_ALPHA:g}"
    return {
        "ode": f"{find_solver(process, cfg.eval.likelihood_solver, steps)}, {steps} steps, {clock}",
        "divergence": "Hutchinson, one fixed Rademacher probe an image",
        "unit": _unit(cfg, ", dequantised by uniform noise"),
    }


def _unit(cfg: Config, of_images: str) -> str:
    if of_latents(cfg):
        return "bits per dimension of the normalised latent, of the density"
    return f"bits per dimension of 8-bit images{of_images}"
