"""What an objective is: random draws of a step, their losses, and extra state beside the weights.

`model` is a bound model (`dit_jax.bind`): model.apply(params, x, t, cond), model.drop(key, cond, rate).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from dit_jax.diffusion.process import Process

OFFSET = 1e-3  # added to the error in the adaptive weight


def nothing(params) -> dict:
    """Empty extras."""
    return {}


def unchanged(extras, params, step):
    """Leaves the extras unchanged."""
    return extras


def adaptive(error: jax.Array, power: float):
    """Losses and their parts of errors (b,), with the weight 1 / (error + 1e-3)^power without gradient (Geng et al. 2025, section 4.3)."""
    if not power:
        return error, {"mse": error}
    weight = jax.lax.stop_gradient((error + OFFSET) ** -power)
    return weight * error, {"mse": error, "weight": weight}


class Objective(NamedTuple):
    """A row of OBJECTIVES, bound to a config.

    process                                   the noising process
    draw(model, key, batch)                   a batch {"image", "cond"} -> points (x, cond, t, eps), a dict of arrays (b, ...)
    losses(model, params, extras, points)     losses (b,) and a dict of their parts (b,); draws nothing
    flops(shape)                              training FLOPs of one image of shape (h, w), by default model.input_size squared
    init_extras(params)                       state kept between steps, a pytree in `TrainState.extras`
    update_extras(extras, params, step)       extras after an accepted step, from the new raw weights and the number of steps before it
    """

    process: Process
    draw: Callable
    losses: Callable
    flops: Callable
    init_extras: Callable = nothing
    update_extras: Callable = unchanged
