"""Bias and variance of a Fréchet distance in the number of samples: its limit for infinitely many, and an interval.

FD(N) = FD_inf + b / N to first order (Chong & Forsyth 2020, arXiv 1911.07023, section 3). b depends on the model, so the ranking of two
models may change with N. Distances at several N, each from samples drawn without replacement, give a line in 1/N.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

from dit_jax.metrics import frechet
from dit_jax.metrics.features import checked


@dataclass(frozen=True)
class Line:
    """Distances `values` (p,) of `counts` (p,) samples, and their least-squares line limit + slope / N.

    `limit_se`, the limit's standard error from the residuals, is a lower bound because the draws share samples.
    """

    counts: np.ndarray
    values: np.ndarray
    limit: float
    slope: float
    limit_se: float


@dataclass(frozen=True)
class Interval:
    """Distance, its confidence interval at `level`, and the distances (r,) of the resamples."""

    value: float
    low: float
    high: float
    level: float
    values: np.ndarray


def fit_line(counts: npt.ArrayLike, values: npt.ArrayLike) -> Line:
    """Fits distances (p,) of counts (p,) samples. Raises ValueError if fewer than 3, not finite, or all at one count."""
    counts, values = np.asarray(counts, np.float64), np.asarray(values, np.float64)
    if counts.ndim != 1 or counts.shape != values.shape or len(counts) < 3 or len(set(counts)) < 2:
        raise ValueError(f"extrapolation: found counts {counts.tolist()}, expected at least 3, not all the same")
    if not (np.isfinite(values).all() and np.isfinite(counts).all() and (counts > 0).all()):
        raise ValueError("extrapolation: a count or a distance is not finite, or a count not above 0")
    x = 1 / counts
    spread = np.sum((x - x.mean()) ** 2)
    slope = float(np.sum((x - x.mean()) * (values - values.mean())) / spread)
    limit = float(values.mean() - slope * x.mean())
    residuals = values - limit - slope * x
    noise = np.sum(residuals**2) / (len(x) - 2)
    return Line(counts, values, limit, slope, float(np.sqrt(noise * (1 / len(x) + x.mean() ** 2 / spread))))


def infinite(features: npt.ArrayLike, mean: np.ndarray, cov: np.ndarray, counts: Sequence[int], seed: int = 0) -> Line:
    """Fréchet distance of features (n, d) to the reference's Gaussian (d,), (d, d), extrapolated to infinite n.

    Each count is a new draw without replacement and a distance, some seconds at d = 2048. The paper takes 15 counts from 5,000 to n in
    equal steps. Raises ValueError on counts below 2 or above n, and as `fit_line` and `frechet` do.
    """
    features = checked(features, 2)
    rng, n = np.random.default_rng(seed), len(features)
    if not all(2 <= c <= n for c in counts):
        raise ValueError(f"extrapolation: found counts {list(counts)}, expected each of 2 to the {n} samples")
    reference = frechet.Distance(mean, cov)
    values = [_distance(features, rng.permutation(n)[:c], reference) for c in counts]
    return fit_line(counts, values)


def bootstrap(
    features: npt.ArrayLike, mean: np.ndarray, cov: np.ndarray, resamples: int = 100, level: float = 0.95, seed: int = 0
) -> Interval:
    """Bootstrap interval of the Fréchet distance of features (n, d) to the reference's Gaussian (d,), (d, d), at this n.

    A resample with replacement has 63 % of the samples, so its distance is biased upwards. Only the resamples' standard deviation is
    used: value +- t sd, Student's t with resamples - 1 degrees of freedom. On 3 x 400 held-out sets of 8 normal features the coverage of
    95 % intervals was 95.2 % (n = 300, 60 resamples), 95.2 % (300, 10) and 97.0 % (2000, 20), and 91 to 93 % for resample quantiles.
    Raises ValueError on fewer than 2 samples or resamples and on a level not between 0 and 1.
    """
    features = checked(features, 2)
    if resamples < 2 or not 0 < level < 1:
        raise ValueError(f"bootstrap: found {resamples} resamples, level {level}, expected at least 2, between 0 and 1")
    rng, n = np.random.default_rng(seed), len(features)
    reference = frechet.Distance(mean, cov)
    values = np.array([_distance(features, rng.integers(n, size=n), reference) for _ in range(resamples)])
    value = _distance(features, np.arange(n), reference)
    half = float(special.stdtrit(resamples - 1, (1 + level) / 2) * values.std(ddof=1))
    return Interval(value, value - half, value + half, level, values)


def _distance(features: np.ndarray, rows: np.ndarray, reference: frechet.Distance) -> float:
    """Distance of the given rows, copied block by block."""
    stats = frechet.empty(features.shape[1])
    for start in range(0, len(rows), 4096):
        stats = frechet.update(stats, features[rows[start : start + 4096]])
    return reference(*frechet.mean_cov(stats))
