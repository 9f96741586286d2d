"""Consistency tuning without forward-mode derivatives (Sun et al. 2025, arXiv 2505.07447, UCGM).

The image f(x_t, t) = x_t - t F(x_t, t) should be the same everywhere on a path of the probability-flow ODE. Its derivative along the
velocity v is a central difference, and F moves by it:

    df/dt = (f(x_t + h v, t + h) - f(x_t - h v, t - h)) / 2h,    target of F(x_t, t): stop(F(x_t, t) + clip(df/dt, -1, 1))

At t = 0 this is the flow's loss, because df/dt = v - F there. The fixed point is F = (x_t - x_0) / t with the ODE's end x_0. Without a
teacher v is the path's eps - x, right only in the mean; there the bound of 1 is left out, because it would move the mean.
"""

import jax
import jax.numpy as jnp

from dit_jax import flops
from dit_jax.config import Config
from dit_jax.diffusion.objective.denoising import denoising, velocity
from dit_jax.diffusion.objective.row import Objective, adaptive, nothing
from dit_jax.diffusion.objective.teacher import guided, keep_teacher
from dit_jax.diffusion.process import denoiser

STEP, LARGEST = 0.005, 1.0  # half of the difference in time; bound of the derivative


def consistency(cfg: Config) -> Objective:
    """Objective with the velocity eps - x or, with objective.guidance other than 1, the teacher's guided velocity.

    FLOPs: a forward and backward pass and two forward passes of the student, and the teacher's pair of forward passes.
    """
    noising, scale = denoising(cfg, velocity), cfg.objective.guidance
    process, taught = noising.process, cfg.objective.taught

    def losses(model, params, extras, points: dict):
        x, t, cond, eps = points["x"], points["t"], points["cond"], points["eps"]
        x_t = process.noise(x, t, eps)
        still = jax.lax.stop_gradient(params)
        student, frozen = (denoiser(process, lambda x, t, p=p: model.apply(p, x, t, cond)) for p in (params, still))
        v = guided(process, model, extras["teacher"], cond, scale)(x_t, t) if taught else eps - x

        def image(time):
            at = x_t + (time - t)[:, None, None, None] * v
            return at - time[:, None, None, None] * frozen(at, time)

        ahead, behind = jnp.minimum(t + STEP, 1.0), jnp.maximum(t - STEP, 0.0)
        slope = (image(ahead) - image(behind)) / (ahead - behind)[:, None, None, None]
        out = student(x_t, t)
        slope = jnp.clip(slope, -LARGEST, LARGEST) if taught else slope
        target = jax.lax.stop_gradient(out + slope)
        return adaptive(jnp.square(out - target).mean(axis=(1, 2, 3)), cfg.objective.adaptive)

    def cost(shape: flops.Shape = None) -> int:
        return (5 + 2 * taught) * flops.forward_flops(cfg.model, shape)

    return Objective(process, noising.draw, losses, cost, keep_teacher if taught else nothing)
