"""Teachers: weights in `TrainState.extras`, and the velocity that they give with guidance."""

import jax
import jax.numpy as jnp

from dit_jax.diffusion import guidance
from dit_jax.diffusion.process import Denoiser, Process, denoiser


def keep_teacher(params) -> dict:
    """Extras of a student: the weights that it begins with as its teacher."""
    return {"teacher": jax.tree.map(jnp.copy, params)}


def guided(process: Process, model, params, cond, scale: float) -> Denoiser:
    """Denoiser of a teacher's weights, guided by `scale`, both halves in one pass of twice the images; without gradient."""
    still = jax.lax.stop_gradient(params)

    def apply(x, t, cond):
        return denoiser(process, lambda x, t: model.apply(still, x, t, cond))(x, t)

    if scale == 1.0:
        return lambda x, t: apply(x, t, cond)
    return guidance.guided(guidance.paired(apply, cond, model.null(cond)), scale, model.cfg.channels)
