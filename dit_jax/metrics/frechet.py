"""Fréchet distance between Gaussians fitted to features, from statistics that stream over batches in float64.

d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))   (Heusel et al. 2017, eq. 6; Dowson & Landau 1982)

A score is named after its feature network, such as `fd_digits`; "FID" is the distance on the Inception network only.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Statistics:
    """Count, mean (d,) and scatter (d, d), the sum of outer products of deviations from the mean."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray


def empty(width: int) -> Statistics:
    """Statistics of no samples, for features of `width` numbers."""
    return Statistics(0, np.zeros(width), np.zeros((width, width)))


def update(stats: Statistics, features: npt.ArrayLike) -> Statistics:
    """Adds features (b, d) of any dtype (Chan, Golub & LeVeque 1983, eq. 2.1).

    Raises ValueError on another shape and on values that are not finite.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or features.shape[1] != len(stats.mean):
        raise ValueError(f"features: found shape {features.shape}, expected (b, {len(stats.mean)})")
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        row, bad = stats.count + int(np.argmin(finite)), np.sum(~finite)
        raise ValueError(f"features: sample {row} is not finite, one of {bad} in a batch of {len(features)}")
    if not len(features):
        return stats
    mean, new = features.mean(axis=0), len(features)
    deviations = features - mean
    count, delta = stats.count + new, mean - stats.mean
    scatter = stats.scatter + deviations.T @ deviations + np.outer(delta, delta) * (stats.count * new / count)
    return Statistics(count, stats.mean + delta * (new / count), scatter)


def mean_cov(stats: Statistics) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and unbiased covariance (d, d). Raises ValueError on fewer than 2 samples."""
    if stats.count < 2:
        raise ValueError(f"statistics: found {stats.count} samples, expected at least 2 for a covariance")
    return stats.mean, stats.scatter / (stats.count - 1)


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """Squared distance d^2 (eq. 6) between Gaussians with means (d,) and covariances (d, d); at least 0.

    tr (S1 S2)^(1/2) is the sum of the singular values of S1^(1/2) S2^(1/2) with symmetric roots. It needs no inverse or complex root, so
    singular covariances (fewer samples than features) are exact. Raises ValueError on shapes that do not match and on values not finite.
    """
    mean1, cov1, mean2, cov2 = (np.asarray(a, np.float64) for a in (mean1, cov1, mean2, cov2))
    width = mean1.size
    if mean1.shape != (width,) or mean2.shape != (width,) or {cov1.shape, cov2.shape} != {(width, width)}:
        shapes = ", ".join(str(a.shape) for a in (mean1, cov1, mean2, cov2))
        raise ValueError(f"Fréchet distance: found shapes {shapes}, expected (d,), (d, d), (d,), (d, d)")
    if not all(np.isfinite(a).all() for a in (mean1, cov1, mean2, cov2)):
        raise ValueError("Fréchet distance: a mean or covariance is not finite")
    cross = np.linalg.svd(_root(cov1) @ _root(cov2), compute_uv=False).sum()
    squared = np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * cross
    return float(max(squared, 0.0))


class Distance:
    """Distance to a fixed reference, whose root is computed once: `Distance(mean, cov)(mean2, cov2)` -> float.

    Equals `frechet_distance`, by one symmetric eigendecomposition instead of two and a singular value decomposition. Raises ValueError
    on shapes that do not match and on a reference that is not finite.
    """

    def __init__(self, mean: np.ndarray, cov: np.ndarray):
        self.mean, self.trace = np.asarray(mean, np.float64), float(np.trace(cov))
        if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
            raise ValueError("Fréchet distance: the reference's mean or covariance is not finite")
        self.root = _root(np.asarray(cov, np.float64))

    def __call__(self, mean: np.ndarray, cov: np.ndarray) -> float:
        if mean.shape != self.mean.shape or cov.shape != self.root.shape:
            raise ValueError(
                f"Fréchet distance: found shapes {mean.shape} and {cov.shape}, expected {self.mean.shape} and {self.root.shape}"
            )
        product = self.root @ np.asarray(cov, np.float64) @ self.root
        values = np.linalg.eigvalsh((product + product.T) / 2)
        values[values < values[-1] * len(values) * np.finfo(np.float64).eps] = 0.0
        squared = np.sum((self.mean - mean) ** 2) + self.trace + np.trace(cov) - 2 * np.sqrt(values).sum()
        return float(max(squared, 0.0))


def _root(cov: np.ndarray) -> np.ndarray:
    """Symmetric square root of a covariance (d, d); eigenvalues within rounding of 0 are set to 0, or their roots would add up."""
    values, vectors = np.linalg.eigh((cov + cov.T) / 2)
    values[values < values[-1] * len(values) * np.finfo(np.float64).eps] = 0.0
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
