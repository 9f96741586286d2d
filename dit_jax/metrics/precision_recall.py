"""Precision and recall of samples (Kynkaanniemi et al. 2019, arXiv 1904.06991, eq. 1 to 3).

The manifold of a set is the union of balls around its features, each as wide as the distance to the k-th nearest other
feature. Precision is the share of samples on the manifold of real images, recall the share of real images on that of samples.
"""

from collections.abc import Iterator

import numpy as np

BLOCK = 1024  # rows whose distances to all others are in memory at a time


def precision_recall(real: np.ndarray, drawn: np.ndarray, k: int = 3) -> tuple[float, float]:
    """(precision, recall) from features (m, d) of real images and (n, d) of samples.

    Raises ValueError on widths that differ, values that are not finite, and sets of k features or fewer.
    """
    if real.ndim != 2 or drawn.ndim != 2 or real.shape[1] != drawn.shape[1]:
        raise ValueError(
            f"precision and recall: found shapes {real.shape} and {drawn.shape}, expected (m, d) and (n, d)"
        )
    if not (np.isfinite(real).all() and np.isfinite(drawn).all()):
        raise ValueError("precision and recall: a feature is not finite")
    if min(len(real), len(drawn)) <= k:
        raise ValueError(
            f"precision and recall: found {len(real)} and {len(drawn)} features, expected more than k = {k}"
        )
    return _covered(drawn, real, _squared_radii(real, k)), _covered(real, drawn, _squared_radii(drawn, k))


def _squared_distances(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows of a, their squared distances to all of b), a block at a time, in float64."""
    b = np.asarray(b, np.float64)
    norms = np.square(b).sum(axis=1)
    for start in range(0, len(a), BLOCK):
        rows = slice(start, min(start + BLOCK, len(a)))
        x = np.asarray(a[rows], np.float64)
        yield rows, np.maximum(np.square(x).sum(axis=1)[:, None] + norms[None] - 2 * x @ b.T, 0.0)


def _squared_radii(features: np.ndarray, k: int) -> np.ndarray:
    """(m,): squared distance of each feature to its k-th nearest other one."""
    radii = np.empty(len(features))
    for rows, squared in _squared_distances(features, features):
        squared[np.arange(len(squared)), np.arange(rows.start, rows.stop)] = -1.0  # itself, before all others
        radii[rows] = np.partition(squared, k, axis=1)[:, k]
    return radii


def _covered(points: np.ndarray, centres: np.ndarray, squared_radii: np.ndarray) -> float:
    """Share of points within the radius of at least one centre."""
    inside = sum(
        int((squared <= squared_radii[None]).any(axis=1).sum()) for _, squared in _squared_distances(points, centres)
    )
    return inside / len(points)
