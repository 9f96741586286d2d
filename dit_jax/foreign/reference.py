"""Reference statistics of Frechet distances, as other projects publish them in npz files; never unpickled.

mu, sigma [, mu_s, sigma_s] [, arr_0]   ADM's reference batches: pooled and spatial features, and images
ref_mu, ref_sigma                       statistics of JAX projects
arr_0 alone                             images uint8 (n, h, w, c), to be run through the network
"""

import hashlib
import os
from dataclasses import dataclass

import numpy as np

from dit_jax.error import UsageError
from dit_jax.weights import read_arrays

NAMES = (("mu", "sigma"), ("ref_mu", "ref_sigma"))
SPATIAL = ("mu_s", "sigma_s")
IMAGES = "arr_0"


@dataclass(frozen=True)
class ReferenceFile:
    """Mean and covariance (float64) of pooled and of spatial features, and images; what the file has not is None."""

    path: str
    sha256: str
    pool: tuple[np.ndarray, np.ndarray] | None
    spatial: tuple[np.ndarray, np.ndarray] | None
    images: np.ndarray | None


def read_reference(path: str, width: int, spatial_width: int = 0) -> ReferenceFile:
    """A reference for a network with `width` pooled (and `spatial_width` spatial) features. Raises UsageError.

    A file of another network's statistics is told by its width, or by a covariance that is none.
    """
    if not os.path.isfile(path):
        raise UsageError(f"reference {path!r}: no such file, expected an npz of statistics or images")
    arrays = read_arrays(path)
    pool = next((_gaussian(arrays, names, width, path) for names in NAMES if names[0] in arrays), None)
    spatial = _gaussian(arrays, SPATIAL, spatial_width, path) if spatial_width and SPATIAL[0] in arrays else None
    images = _images(arrays[IMAGES], path) if IMAGES in arrays else None
    if pool is None and images is None:
        expected = "mu and sigma, ref_mu and ref_sigma, or arr_0"
        raise UsageError(f"reference {path}: found {', '.join(sorted(arrays)[:5]) or 'nothing'}, expected {expected}")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ReferenceFile(path, digest, pool, spatial, images)


def _gaussian(arrays: dict, names: tuple, width: int, path: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and covariance (d, d), checked."""
    mean_name, cov_name = names
    if cov_name not in arrays:
        raise UsageError(f"reference {path}: {cov_name}: missing, though {mean_name} is there")
    for name, shape in ((mean_name, (width,)), (cov_name, (width, width))):
        found = arrays[name]
        if found.shape != shape:
            raise UsageError(
                f"reference {path}: {name}: found shape {found.shape}, expected {shape}: it is of another feature network"
            )
        if not np.issubdtype(found.dtype, np.floating) or not np.isfinite(found).all():
            raise UsageError(f"reference {path}: {name}: found {found.dtype}, expected floats, all of them finite")
    mean, cov = (np.asarray(arrays[name], np.float64) for name in names)
    scale = np.abs(cov).max()
    if not np.allclose(cov, cov.T, rtol=0, atol=1e-4 * scale):
        raise UsageError(f"reference {path}: {cov_name}: not symmetric, so no covariance")
    if (least := np.linalg.eigvalsh((cov + cov.T) / 2)[0]) < -1e-3 * scale:
        raise UsageError(f"reference {path}: {cov_name}: has the eigenvalue {least:.3g}, expected none below 0")
    return mean, cov


def _images(found: np.ndarray, path: str) -> np.ndarray:
    if found.dtype != np.uint8 or found.ndim != 4 or found.shape[-1] not in (1, 3) or not found.size:
        raise UsageError(
            f"reference {path}: {IMAGES}: found {found.dtype} {found.shape}, expected uint8 (n, h, w, c) with 1 or 3 channels"
        )
    return found
