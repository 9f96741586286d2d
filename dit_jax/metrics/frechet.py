"""Fréchet distance between Gaussians fitted to features, from statistics that stream over batches in float64.

d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))   (Heusel et al. 2017, eq. 6; Dowson & Landau 1982)

A score is named after its feature network, such as `fd_digits`; "FID" is the distance on the Inception network only.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

EXACT = 1e-8  # of a sum of singular values
LARGE = 256  # smaller matrices are quick anyway
PIVOT = 1e-5  # of the largest one; smaller pivots of Cholesky's factor may be rounding


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

    tr (S1 S2)^(1/2) is the sum of the singular values of F1^T F2 for any factors with F F^T = S. It needs no inverse or complex root, so
    singular covariances (fewer samples than features) are exact. Raises ValueError on shapes that do not match and on values not finite.
    """
    mean1, cov1, mean2, cov2 = (np.asarray(a, np.float64) for a in (mean1, cov1, mean2, cov2))
    width = mean1.size
    if mean1.shape != (width,) or mean2.shape != (width,) or {cov1.shape, cov2.shape} != {(width, width)}:
        shapes = ", ".join(str(a.shape) for a in (mean1, cov1, mean2, cov2))
        raise ValueError(f"Fréchet distance: found shapes {shapes}, expected (d,), (d, d), (d,), (d, d)")
    if not all(np.isfinite(a).all() for a in (mean1, cov1, mean2, cov2)):
        raise ValueError("Fréchet distance: a mean or covariance is not finite")
    cross = _singular_values(_factor(cov1).T @ _factor(cov2)).sum()
    squared = np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * cross
    return float(max(squared, 0.0))


def _singular_values(x: np.ndarray) -> np.ndarray:
    """Singular values of x (p, q), whose sum is right to EXACT of itself.

    If x is LARGE they are roots of eigenvalues of its square, which take a third of the time, if these are exact enough: rounding of the
    largest eigenvalue is an error of each, so a root is off the more the smaller it is.
    """
    if min(x.shape) >= LARGE:
        values = np.maximum(np.linalg.eigvalsh(x.T @ x if x.shape[1] <= x.shape[0] else x @ x.T), 0.0)
        roots, error = np.sqrt(values), 4 * np.finfo(np.float64).eps * values[-1]
        if roots[0] > 0 and (error / (2 * roots)).sum() <= EXACT * roots.sum():
            return roots
    return np.linalg.svd(x, compute_uv=False)


class Distance:
    """Distance to a fixed reference, which is factored once: `Distance(mean, cov)(mean2, cov2)` -> float.

    Equals `frechet_distance` but for roots of eigenvalues within rounding of 0. Raises ValueError on shapes that do not match and on a
    reference that is not finite.
    """

    def __init__(self, mean: np.ndarray, cov: np.ndarray):
        self.mean, self.trace = np.asarray(mean, np.float64), float(np.trace(cov))
        if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
            raise ValueError("Fréchet distance: the reference's mean or covariance is not finite")
        self.factor = _factor(np.asarray(cov, np.float64))

    def __call__(self, mean: np.ndarray, cov: np.ndarray) -> float:
        if mean.shape != self.mean.shape or cov.shape != 2 * self.mean.shape:
            raise ValueError(
                f"Fréchet distance: found shapes {mean.shape} and {cov.shape}, expected {self.mean.shape} and {2 * self.mean.shape}"
            )
        product = self.factor.T @ np.asarray(cov, np.float64) @ self.factor
        values = np.linalg.eigvalsh((product + product.T) / 2)
        values[values < values[-1] * len(values) * np.finfo(np.float64).eps] = 0.0
        squared = np.sum((self.mean - mean) ** 2) + self.trace + np.trace(cov) - 2 * np.sqrt(values).sum()
        return float(max(squared, 0.0))


def _factor(cov: np.ndarray) -> np.ndarray:
    """F (d, r) with F F^T = cov: Cholesky's, or if the covariance may be singular its r principal axes: roots of eigenvalues that are 0
    but for rounding would add up."""
    rounding, cov = len(cov) * np.finfo(np.float64).eps, (cov + cov.T) / 2
    try:
        factor = np.linalg.cholesky(cov)
        if np.diagonal(factor).min() > PIVOT * np.diagonal(factor).max():
            return factor
    except np.linalg.LinAlgError:
        pass
    values, vectors = np.linalg.eigh(cov)
    kept = values >= max(values[-1], 0.0) * rounding  # of a covariance of zeros, all
    kept[-1] = True
    return vectors[:, kept] * np.sqrt(np.maximum(values[kept], 0.0))
