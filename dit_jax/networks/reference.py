"""Reference statistics and images of other codebases, checked before a score uses them.

| keys | written by |
|---|---|
| mu, sigma, mu_s, sigma_s, often with the images as arr_0 | ADM's evaluator (Dhariwal & Nichol 2021), used by DiT |
| ref_mu, ref_sigma | FID in JAX |
| mu, sigma | pytorch-fid, EDM |
| arr_0, uint8 images (n, h, w, 3) | samples as ADM and DiT write them |

`sigma` is always the unbiased covariance (divided by n - 1), as in `dit_jax.metrics.frechet.mean_cov`.
"""

import os
from dataclasses import dataclass

import numpy as np

from dit_jax.error import UsageError
from dit_jax.files import file_sha256, is_file
from dit_jax.models import inception
from dit_jax.networks.weights import fetched, read_arrays

KINDS = {"adm": ("mu", "sigma", "mu_s", "sigma_s"), "jax-fid": ("ref_mu", "ref_sigma"), "pytorch-fid": ("mu", "sigma")}
ROUNDING = 1e-5  # relative to the largest entry or the norm, for covariances that were once float32


@dataclass(frozen=True)
class Reference:
    """Contents of a reference file of `kind` "adm", "jax-fid", "pytorch-fid" or "images"; None for what it lacks.

    mean (2048,), cov (2048, 2048) of pooled features and mean_spatial (2023,), cov_spatial (2023, 2023), float64;
    images uint8 (n, h, w, 1 or 3), for the caller to run through the network.
    """

    path: str
    sha256: str
    kind: str
    mean: np.ndarray | None = None
    cov: np.ndarray | None = None
    mean_spatial: np.ndarray | None = None
    cov_spatial: np.ndarray | None = None
    images: np.ndarray | None = None


def read_reference(path: str | os.PathLike, pool: int = inception.WIDTH, spatial: int = inception.SPATIAL) -> Reference:
    """Read an npz of references for a network with `pool` pooled and `spatial` spatial features. Nothing is unpickled.

    Raises UsageError on unknown keys, widths of another feature network, and covariances that are not symmetric, not
    finite, or have negative eigenvalues beyond rounding.
    """
    path = os.fspath(path)
    if not is_file(path):
        raise UsageError(f"{path}: no such file, expected an npz of reference statistics or images")
    with fetched(path) as copy:
        arrays, digest = read_arrays(copy), file_sha256(copy)
    images = _images(arrays["arr_0"], f"{path}: arr_0") if "arr_0" in arrays else None
    kind = next((kind for kind, keys in KINDS.items() if set(keys) <= set(arrays)), None)
    if kind is None and images is None:
        few, known = ", ".join(sorted(arrays)[:8]), "; ".join(", ".join(keys) for keys in KINDS.values())
        raise UsageError(f"{path}: found the arrays {few or 'none'}, expected one of: {known}; or images as arr_0")
    if kind is None:
        return Reference(path, digest, "images", images=images)
    names = KINDS[kind]
    pooled = _gaussian(arrays, names[0], names[1], pool, path)
    of_places = _gaussian(arrays, *names[2:], spatial, path) if kind == "adm" and spatial else (None, None)
    return Reference(path, digest, kind, *pooled, *of_places, images)


def _images(images: np.ndarray, where: str) -> np.ndarray:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise UsageError(f"{where}: found {images.dtype} {images.shape}, expected uint8 images (n, h, w, 1 or 3)")
    return images


def _gaussian(arrays: dict, mean_name: str, cov_name: str, width: int, path: str) -> tuple[np.ndarray, np.ndarray]:
    """Check and return (mean (width,), covariance (width, width)), float64."""
    for name, shape in ((mean_name, (width,)), (cov_name, (width, width))):
        found = arrays[name]
        if found.shape != shape:
            why = "these are statistics of another feature network or layer"
            raise UsageError(f"{path}: {name}: found shape {found.shape}, expected {shape}; {why}")
        if not np.issubdtype(found.dtype, np.floating) or not np.isfinite(found).all():
            raise UsageError(f"{path}: {name}: found {found.dtype} with values that are no finite floats")
    mean, cov = (np.asarray(arrays[name], np.float64) for name in (mean_name, cov_name))
    skew, most = np.abs(cov - cov.T).max(), np.abs(cov).max()
    if skew > ROUNDING * most:
        found = f"found entries that differ by {skew:.3g} from their mirror image"
        raise UsageError(f"{path}: {cov_name}: {found}, expected 0")
    cov = (cov + cov.T) / 2
    if not _nonnegative(cov):
        values = np.linalg.eigvalsh(cov)
        found = f"found the eigenvalue {values[0]:.3g} beside {values[-1]:.3g}"
        raise UsageError(f"{path}: {cov_name}: {found}, expected none below 0")
    return mean, cov


def _nonnegative(cov: np.ndarray) -> bool:
    """Test that no eigenvalue is below -ROUNDING |cov|_F, by a Cholesky factor of the shifted matrix."""
    if (np.diag(cov) < 0).any():
        return False
    shift = ROUNDING * np.linalg.norm(cov) or 1.0
    try:
        np.linalg.cholesky(cov + shift * np.eye(len(cov)))
    except np.linalg.LinAlgError:
        return False
    return True
