"""Losses of the noising processes: eps-prediction of DDPM with its learned variance, and the velocity of a flow."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dit_jax import flops
from dit_jax.config import Config
from dit_jax.diffusion.objective.row import Objective
from dit_jax.diffusion.process import Denoiser, Images, Process, Times, denoiser, make_process


def noise_prediction(process: Process, denoise: Denoiser, x: Images, t: Times, eps: Images):
    """Mean squared error of eps plus, with learned variance, the variational term in bits per dimension; per image.

    The mean is detached in the variational term, which trains the variance only (Nichol & Dhariwal 2021, section 3.1).
    """
    x_t = process.noise(x, t, eps)
    out = denoise(x_t, t)
    eps_hat = out[..., : x.shape[-1]]
    mse = jnp.square(eps_hat - eps).mean(axis=(1, 2, 3))
    if not process.learn_sigma:
        return mse, {"mse": mse}
    vb = process.variational_term(jax.lax.stop_gradient(eps_hat), process.variance_share(out), x, x_t, t)
    return mse + vb, {"mse": mse, "vb": vb}


def velocity(process: Process, denoise: Denoiser, x: Images, t: Times, eps: Images):
    """Mean squared error of the velocity, per image (Liu et al. 2022, eq. 1)."""
    x_t = process.noise(x, t, eps)
    mse = jnp.square(denoise(x_t, t) - process.target(x, eps, x_t, t)).mean(axis=(1, 2, 3))
    return mse, {"mse": mse}


def denoising(cfg: Config, loss: Callable) -> Objective:
    """Objective of `loss(process, denoise, x, t, eps)`, with t from the process's law and `cond` dropped at random."""
    process = make_process(cfg.diffusion, cfg.model.learn_sigma)

    def draw(model, key: jax.Array, batch: dict) -> dict:
        time_key, noise_key, cond_key = jax.random.split(key, 3)
        x = batch["image"]
        t = process.time(jax.random.uniform(time_key, x.shape[:1]))
        cond = model.drop(cond_key, batch["cond"], cfg.train.cond_dropout)
        return {"x": x, "cond": cond, "t": t, "eps": jax.random.normal(noise_key, x.shape)}

    def losses(model, params, extras, points: dict):
        denoise = denoiser(process, lambda x, t: model.apply(params, x, t, points["cond"]))
        return loss(process, denoise, points["x"], points["t"], points["eps"])

    return Objective(process, draw, losses, lambda shape=None: flops.train_flops(cfg.model, shape=shape))
