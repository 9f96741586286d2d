"""Our samplers beside diffusers' schedulers: whole trajectories from the same noise, with the same toy network, in float32.

Each test says which settings correspond. Where a scheduler is for a chain, its timesteps k are our times (k + 1) / T.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import schedule
from dit_jax.diffusion.process import DDPM, Flow
from dit_jax.diffusion.samplers import SAMPLERS, draw_noise

TOLERANCE = 1e-4
SHAPE = (4, 4, 3)
LINEAR = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
MIX = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32) / 2
CHAIN, LEARNED, FLOW = DDPM(learn_sigma=False), DDPM(), Flow()


def network(x, t, tanh, channels=3):
    """Channels last, t in 0 to 1000; smooth, bounded, not linear, the same in both frameworks. More channels: the variance."""
    return tanh((x @ MIX[:, :3]) * 0.7 + t / 1000 - 0.3) if channels == 3 else tanh(x @ MIX + t / 1000 - 0.8)


def start(count=3):
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(5), i))(jnp.arange(count))
    return keys, draw_noise(keys, 0, SHAPE)


def path_of(sampler, process, times, channels=3):
    """The images after every step, (steps, b, h, w, c): the sampler on ever longer starts of the grid.

    The draws of a step depend on its number alone, so that a shorter walk is the beginning of the longer one; only Heun's
    last step differs from those before, and its walks are told apart by `heun_ends`.
    """
    keys, x = start()

    def denoise(x, t):
        k = process.model_time(t)[:, None, None, None]
        return network(x, k, jnp.tanh, channels)

    walk = jax.jit(lambda x, times=times: SAMPLERS[sampler](process, denoise, x, times, keys))
    return np.asarray(x), np.asarray(walk(x))


def relative(found, expected):
    return float(np.abs(np.asarray(found) - np.asarray(expected)).max() / max(1.0, np.abs(np.asarray(expected)).max()))
