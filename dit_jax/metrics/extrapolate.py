"""How far a Frechet distance of N samples can be trusted: its limit for infinitely many, and its standard error.

The estimate is biased upwards by about b / N, and b depends on the model, so that small N can order models wrongly. A line
through the distances of random subsets over 1 / N gives the limit (Chong & Forsyth 2020, arXiv 1911.07023, section 4).
"""

from dataclasses import dataclass

import numpy as np

from dit_jax.metrics import frechet


@dataclass(frozen=True)
class Limit:
    """Mean distances of subsets of `sizes` samples, and the line limit + slope / N through them."""

    sizes: tuple[int, ...]
    distances: tuple[float, ...]
    limit: float
    slope: float


def infinite(features: np.ndarray, to_reference: frechet.Distance, points: int = 8, seed: int = 0) -> Limit:
    """From features (n, d); sizes are even in 1 / N from n / 4 to n, and of each as many disjoint subsets as there are.

    Raises ValueError when even the smallest subset would have a singular covariance, so under 4 (d + 1) samples.
    """
    count, width = features.shape
    if count // 4 < width + 1:
        raise ValueError(
            f"limit of the distance: found {count} samples, expected at least {4 * (width + 1)} for {width} features"
        )
    sizes = tuple(round(count / x) for x in np.linspace(4, 1, points))
    rng, found = np.random.default_rng(seed), []
    for size in sizes:
        order = rng.permutation(count)
        subsets = [features[order[start : start + size]] for start in range(0, count - size + 1, size)]
        found.append(float(np.mean([to_reference(*frechet.mean_cov(_statistics(rows))) for rows in subsets])))
    slope, limit = np.polyfit(1 / np.array(sizes), found, 1)
    return Limit(sizes, tuple(found), float(limit), float(slope))


def standard_error(features: np.ndarray, to_reference: frechet.Distance, resamples: int, seed: int = 0) -> float:
    """Bootstrap over samples: the standard deviation of the distance over resamplings of the rows (n, d).

    Resamplings repeat rows and so are themselves biased upwards: their spread is used, not their place.
    """
    rng, found = np.random.default_rng(seed), []
    for _ in range(resamples):
        counts = rng.multinomial(len(features), np.full(len(features), 1 / len(features)))
        rows = features[np.repeat(np.arange(len(features)), counts)]
        found.append(to_reference(*frechet.mean_cov(_statistics(rows))))
    return float(np.std(found, ddof=1))


def _statistics(features: np.ndarray, block: int = 4096) -> frechet.Statistics:
    """Of rows (n, d), a block at a time: in float64 they would take twice the memory."""
    stats = frechet.empty(features.shape[1])
    for start in range(0, len(features), block):
        stats = frechet.update(stats, features[start : start + block])
    return stats
