"""Noise schedules and respacings of the discrete chain, as float64 NumPy constants.

Step k of a T-step chain has time t = (k + 1) / T, so t = 0 is the clean image and t = 1 the last step.
"""

import numpy as np


def linear_betas(timesteps: int) -> np.ndarray:
    """Betas (T,) of Ho et al. 2020, 1e-4 to 2e-2 over 1000 steps; other T keep the total noise (Nichol & Dhariwal 2021)."""
    scale = 1000 / timesteps
    return np.minimum(np.linspace(scale * 1e-4, scale * 2e-2, timesteps, dtype=np.float64), 0.999)


def cosine_betas(timesteps: int) -> np.ndarray:
    """Betas (T,) of Nichol & Dhariwal 2021, eq. 17, with offset 0.008 and betas at most 0.999."""
    grid = np.arange(timesteps + 1, dtype=np.float64) / timesteps
    alpha_bar = np.cos((grid + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


BETAS = {"linear": linear_betas, "cosine": cosine_betas}


def alpha_bars(schedule: str, timesteps: int) -> np.ndarray:
    """Signal's share of the variance at times 0, 1/T, ..., 1: (T + 1,), 1 for the clean image."""
    return np.concatenate([[1.0], np.cumprod(1 - BETAS[schedule](timesteps))])


def linspace_steps(timesteps: int, count: int) -> np.ndarray:
    """Equally spaced steps that include the chain's first and last: the published DiT's respacing.

    A single step is the noisiest; the published code and diffusers take the cleanest.
    """
    return np.round(np.linspace(timesteps - 1 if count == 1 else 0, timesteps - 1, count)).astype(np.int64)[::-1]


def leading_steps(timesteps: int, count: int) -> np.ndarray:
    """Multiples of T // count from 0 (DDIM, Song et al. 2021): they include the cleanest step, not the noisiest."""
    return np.arange(count, dtype=np.int64)[::-1] * (timesteps // count)


def trailing_steps(timesteps: int, count: int) -> np.ndarray:
    """Steps T / count apart from the noisiest down (Lin et al. 2024, arXiv 2305.08891, Table 2).

    If T / count is inexact in float64, ties between two steps follow the rounding errors of `arange`, as in diffusers.
    """
    ends = np.arange(timesteps, 0, -timesteps / count)[:count]  # rounding errors can add an entry
    return np.round(ends).astype(np.int64) - 1


SPACINGS = {"linspace": linspace_steps, "leading": leading_steps, "trailing": trailing_steps}


def respace(timesteps: int, count: int, spacing: str = "linspace") -> np.ndarray:
    """Selects `count` of the steps 0..T-1, descending int64, as diffusers' `timestep_spacing` of the same name.

    Raises ValueError on an unknown spacing, or a count outside 1..T.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing: found {spacing!r}, expected one of {', '.join(SPACINGS)}")
    if not 1 <= count <= timesteps:
        raise ValueError(f"sampling steps: found {count}, expected 1 to {timesteps}, the length of the chain")
    return SPACINGS[spacing](timesteps, count)
