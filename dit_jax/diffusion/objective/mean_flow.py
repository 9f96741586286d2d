"""Flow maps by their mean velocity (Geng et al. 2025, arXiv 2505.13447, MeanFlow; model.target = later: 2510.24474, Decoupled MeanFlow).

The network u(x_t, r, t) is the mean of the velocity from t to a target time r <= t. Along a path with the velocity v,

    u(x_t, r, t) = v - (t - r) du/dt,    du/dt = v d_x u + d_t u, one forward-mode derivative (eq. 6 to 8).

The right side is the target of u, without gradient. With r = t it is v, which makes this the flow's loss. With a guidance scale w, v is
w (eps - x) + (1 - w) u(x_t, t, t) of the null condition (section 4.2), and the map that is learned is of the guided flow.
"""

import jax
import jax.numpy as jnp

from dit_jax import flops
from dit_jax.config import Config
from dit_jax.diffusion.objective.denoising import denoising, velocity
from dit_jax.diffusion.objective.row import Objective, adaptive
from dit_jax.diffusion.process import denoiser


def mean_flow(cfg: Config) -> Objective:
    """Objective whose error e, a mean square, has the weight 1 / (e + 1e-3)^p without gradient; p is objective.adaptive.

    FLOPs: a forward and backward pass and the tangents of one, whose own values are the forward pass's; with guidance another pass.
    """
    noising, how = denoising(cfg, velocity), cfg.objective
    process = noising.process

    def draw(model, key: jax.Array, batch: dict) -> dict:
        points = noising.draw(model, key, batch)
        kind_key, time_key = jax.random.split(jax.random.fold_in(key, 3))  # the flow's own draws have 0 to 2
        t = points["t"]
        other = process.time(jax.random.uniform(time_key, t.shape))
        other = jnp.where(jax.random.uniform(kind_key, t.shape) < how.ratio, other, t)
        return {**points, "t": jnp.maximum(t, other), "r": jnp.minimum(t, other)}

    def losses(model, params, extras, points: dict):
        x, t, r, cond, eps = (points[name] for name in ("x", "t", "r", "cond", "eps"))
        still = jax.lax.stop_gradient(params)

        def mean_velocity(model, params, cond):
            return denoiser(process, lambda x, t, r: model.apply(params, x, t, cond, r))

        x_t, v = process.noise(x, t, eps), eps - x
        if how.guidance != 1.0:
            v = how.guidance * v + (1 - how.guidance) * mean_velocity(model, still, model.null(cond))(x_t, t, t)
        frozen = mean_velocity(model.forward_mode, still, cond)
        _, slope = jax.jvp(lambda x, t: frozen(x, t, r), (x_t, t), (v, jnp.ones_like(t)))
        target = jax.lax.stop_gradient(v - (t - r)[:, None, None, None] * slope)
        error = jnp.square(mean_velocity(model, params, cond)(x_t, t, r) - target).mean(axis=(1, 2, 3))
        return adaptive(error, how.adaptive)

    def cost(shape: flops.Shape = None) -> int:
        passes = 3 + (how.guidance != 1.0)
        return passes * flops.forward_flops(cfg.model, shape) + flops.tangent_flops(cfg.model, shape)

    return Objective(process, draw, losses, cost)
