"""Stored moments to latents z = (x - shift) scale, x being a draw from the posterior N(mean, variance), or its mean.

Rombach et al. 2022 (arXiv 2112.10752), appendix G. The noise of a draw depends on (seed, position) only (`counter`).
"""

import math

import numpy as np

from dit_jax.data.counter import normals
from dit_jax.data.latent_notes import LatentInfo

LOG_VARIANCE = (-30.0, 20.0)  # bounds of latent diffusion's autoencoder


def sample_posterior(
    info: LatentInfo, values: np.ndarray, positions: np.ndarray, seed: int, mirror: np.ndarray | None = None
) -> np.ndarray:
    """Draw latents z float32 (b, h, w, c) for the global positions (b,).

    `values`: (b, copies, parts, h, w, c) as stored. `mirror`: bool (b,), chooses the mirrored copies.
    """
    if mirror is None:
        parts = values[:, 0].astype(np.float32)
    else:
        parts = values[np.arange(len(values)), mirror.astype(np.int64)].astype(np.float32)
    x = parts[:, 0]
    if info.moments:
        x = x + deviations(parts[:, 1]) * normals(seed, positions, math.prod(info.shape)).reshape(x.shape)
    return _normalise(info, x)


def posterior_mean(info: LatentInfo, values: np.ndarray) -> np.ndarray:
    """Return latents z float32 (b, h, w, c) at the posterior's mean, not mirrored."""
    return _normalise(info, values[:, 0, 0].astype(np.float32))


def deviations(log_variances: np.ndarray) -> np.ndarray:
    """Convert stored log-variances of any shape to standard deviations, float32."""
    return np.exp(np.clip(log_variances.astype(np.float32), *LOG_VARIANCE) * np.float32(0.5))


def _normalise(info: LatentInfo, x: np.ndarray) -> np.ndarray:
    return (x - np.asarray(info.shift, np.float32)) * np.asarray(info.scale, np.float32)
