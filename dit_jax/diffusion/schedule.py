"""Noise schedules of the discrete chain and grids of times, as float64 NumPy arrays: they are constants of a program.

Step k of a T-step chain sits at time t = (k + 1) / T, so that t = 0 is the clean image and t = 1 the last step.
"""

import numpy as np


def linear_betas(timesteps: int) -> np.ndarray:
    """Ho et al. 2020: 1e-4 to 2e-2 over 1000 steps; other lengths keep the same total noise (Nichol & Dhariwal 2021)."""
    scale = 1000 / timesteps
    return np.minimum(np.linspace(scale * 1e-4, scale * 2e-2, timesteps, dtype=np.float64), 0.999)


def cosine_betas(timesteps: int) -> np.ndarray:
    """Nichol & Dhariwal 2021, eq. 17, with offset 0.008 and betas at most 0.999."""
    grid = np.arange(timesteps + 1, dtype=np.float64) / timesteps
    alpha_bar = np.cos((grid + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


BETAS = {"linear": linear_betas, "cosine": cosine_betas}


def alpha_bars(schedule: str, timesteps: int) -> np.ndarray:
    """(T + 1,): the signal's share of the variance at times 0, 1/T, ..., 1. The first entry, the clean image, is 1."""
    return np.concatenate([[1.0], np.cumprod(1 - BETAS[schedule](timesteps))])


def linspace_steps(timesteps: int, count: int) -> np.ndarray:
    """`count` equally spaced steps, the first and the last of the chain among them: the published DiT's respacing.

    A single step is the noisiest, where the published code and diffusers take the cleanest.
    """
    return np.round(np.linspace(timesteps - 1 if count == 1 else 0, timesteps - 1, count)).astype(np.int64)[::-1]


def leading_steps(timesteps: int, count: int) -> np.ndarray:
    """Multiples of T // count from 0: the cleanest step is among them, the noisiest is not (Song et al. 2021's DDIM)."""
    return np.arange(count, dtype=np.int64)[::-1] * (timesteps // count)


def trailing_steps(timesteps: int, count: int) -> np.ndarray:
    """Steps T / count apart from the noisiest down (Lin et al. 2024, arXiv 2305.08891, Table 2).

    Where T / count is no float, what is halfway between two steps falls as the rounding of `arange` has it, in diffusers too.
    """
    ends = np.arange(timesteps, 0, -timesteps / count)[:count]  # rounding can make it one too long
    return np.round(ends).astype(np.int64) - 1


SPACINGS = {"linspace": linspace_steps, "leading": leading_steps, "trailing": trailing_steps}


def respace(timesteps: int, count: int, spacing: str = "linspace") -> np.ndarray:
    """`count` of the steps 0..T-1, descending, int64: those of diffusers' `timestep_spacing` of that name.

    `linspace` is the published DiT's own. Raises ValueError for another name, or a count that the chain does not have.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing: found {spacing!r}, expected one of {', '.join(SPACINGS)}")
    if not 1 <= count <= timesteps:
        raise ValueError(f"sampling steps: found {count}, expected 1 to {timesteps}, the length of the chain")
    return SPACINGS[spacing](timesteps, count)
