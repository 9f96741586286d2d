"""Kernel distance: the squared maximum mean discrepancy of features under a cubic kernel, KID on the Inception network.

k(x, y) = (x . y / d + 1)^3, the unbiased estimator, averaged over random subsets (Binkowski et al. 2018, arXiv 1801.01401,
section 4). Unlike the Frechet distance its expectation does not depend on the number of samples.
"""

import numpy as np


def squared_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased estimate of MMD^2 between the laws of rows (m, d) and (n, d); it may be below 0. At least 2 rows each."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"kernel distance: found {len(a)} and {len(b)} samples, expected at least 2 of each")
    return _within(a) + _within(b) - 2 * _kernel(a, b).mean()


def kernel_distance(
    a: np.ndarray, b: np.ndarray, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation of `squared_mmd` over random subsets of `size` rows, or of all rows where they are fewer.

    Raises ValueError on widths that differ and on values that are not finite.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"kernel distance: found shapes {a.shape} and {b.shape}, expected (m, d) and (n, d)")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("kernel distance: a feature is not finite")
    rng, found = np.random.default_rng(seed), []
    for _ in range(subsets):
        rows = [x[rng.choice(len(x), min(size, len(x)), replace=False)] for x in (a, b)]
        found.append(squared_mmd(*rows))
    return float(np.mean(found)), float(np.std(found))


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _within(a: np.ndarray) -> float:
    """Mean of the kernel over pairs of different rows."""
    kernel = _kernel(a, a)
    return (kernel.sum() - np.trace(kernel)) / (len(a) * (len(a) - 1))
