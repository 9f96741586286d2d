"""Precision and recall of generated features: the fraction within the manifold of the real ones, and the reverse.

A set's manifold is the union of balls around its samples; each radius is the distance to the sample's k-th nearest neighbour
(Kynkäänniemi et al. 2019, arXiv 1904.06991, eq. 1 and 2). They use VGG-16; published ImageNet scores use Inception's pooled features and
k = 3 (Dhariwal & Nichol 2021, arXiv 2105.05233). Distances are float64, computed in blocks of about BLOCK^2 numbers; two sets of
50,000 x 2048 take 3e13 operations.
"""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from dit_jax.metrics.features import checked_pair, keep
from dit_jax.metrics.metric import Metric

NEAREST = 3  # k
BLOCK = 2000  # samples a side


def precision(generated: npt.ArrayLike, real: npt.ArrayLike, k: int = NEAREST, block: int = BLOCK) -> float:
    """Fraction of the generated features (n, d) within the manifold of the real ones (m, d).

    Raises ValueError on other shapes, different widths, values that are not finite and sets of k samples or fewer.
    """
    return _fraction(generated, real, k, block, False)


def recall(generated: npt.ArrayLike, real: npt.ArrayLike, k: int = NEAREST, block: int = BLOCK) -> float:
    """Fraction of the real features (m, d) within the manifold of the generated ones (n, d); raises as `precision`."""
    return _fraction(generated, real, k, block, True)


def _fraction(generated: npt.ArrayLike, real: npt.ArrayLike, k: int, block: int, reverse: bool) -> float:
    if k < 1 or block < 1:
        raise ValueError(f"precision and recall: found k = {k}, block = {block}, expected at least 1")
    generated, real = checked_pair(generated, real, k + 1)
    center = real.mean(axis=0, dtype=np.float64)  # leaves distances and shrinks |x|^2, so fewer digits cancel
    x, y = (real, generated) if reverse else (generated, real)
    return _inside(x, y, _radii(y, k, block, center), block, center)


def _blocks(x: np.ndarray, size: int, center: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    for start in range(0, len(x), size):
        place = slice(start, min(start + size, len(x)))
        yield place, x[place].astype(np.float64) - center


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.sum(x**2, axis=1)[:, None] + np.sum(y**2, axis=1)[None] - 2 * (x @ y.T), 0.0)


def _radii(x: np.ndarray, k: int, block: int, center: np.ndarray) -> np.ndarray:
    """Squared distance of each sample to its k-th nearest neighbour, (n,)."""
    radii = np.empty(len(x))
    for rows, a in _blocks(x, block, center):
        nearest = np.full((len(a), k), np.inf)
        for columns, b in _blocks(x, block, center):
            d = _squared_distances(a, b)
            if rows == columns:
                np.fill_diagonal(d, np.inf)  # itself
            nearest = np.partition(np.concatenate([nearest, d], axis=1), k - 1, axis=1)[:, :k]
        radii[rows] = nearest.max(axis=1)
    return radii


def _inside(x: np.ndarray, y: np.ndarray, radii: np.ndarray, block: int, center: np.ndarray) -> float:
    """Fraction of x within the ball of any y."""
    inside = np.zeros(len(x), bool)
    for rows, a in _blocks(x, block, center):
        for columns, b in _blocks(y, block, center):
            inside[rows] |= (_squared_distances(a, b) <= radii[columns][None]).any(axis=1)
    return float(inside.mean())


def _row(fraction: Callable) -> Metric:
    return Metric(
        fraction.__name__,
        needs=("pool", "features"),
        update=keep,
        finish=lambda state, reference, settings: {"": fraction(np.concatenate(state), reference["features"])},
        higher_is_better=True,
        rules={"precision_recall": f"k = {NEAREST}, float64"},
    )


PRECISION, RECALL = _row(precision), _row(recall)
