"""Kernel distance of features: squared maximum mean discrepancy with a cubic kernel, over random subsets.

k(x, y) = (x . y / d + 1)^3   (Bińkowski et al. 2018, arXiv 1801.01401, section 4)
MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

is unbiased (Gretton et al. 2012, eq. 3), unlike the Fréchet distance, and may be slightly negative. On the Inception network's pooled
features it is called KID.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dit_jax.metrics.features import checked_pair, keep
from dit_jax.metrics.metric import Metric

SUBSETS, SIZE, SEED = 100, 1000, 2020  # torch-fidelity's


@dataclass(frozen=True)
class Estimate:
    """Mean over random subsets, and the standard deviation of one subset (not of the mean)."""

    mean: float
    std: float


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Kernel matrix (n, m) of float64 features (n, d) and (m, d)."""
    k = x @ y.T / x.shape[1] + 1.0
    return k * k * k  # NumPy takes 20 times as long for k**3


def mmd2(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Unbiased MMD^2 of features (n, d) and (m, d), n and m at least 2, in float64.

    Raises ValueError on other shapes, widths that differ, and values that are not finite.
    """
    x, y = (a.astype(np.float64) for a in checked_pair(x, y, 2))
    return _mean_of_others(kernel(x, x)) + _mean_of_others(kernel(y, y)) - 2 * float(kernel(x, y).mean())


def _mean_of_others(k: np.ndarray) -> float:
    return float((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)))


def distance(
    features: npt.ArrayLike, reference: npt.ArrayLike, subsets: int = SUBSETS, size: int = SIZE, seed: int = SEED
) -> Estimate:
    """MMD^2 of features (n, d) and (m, d) over `subsets` pairs of subsets of `size` samples, drawn without replacement.

    Defaults, generator and order of draws are torch-fidelity's, so the subsets are the same; it computes in float32, this in float64.
    Raises ValueError as `mmd2`, and if there are fewer samples than `size`.
    """
    x, y = checked_pair(features, reference, size)
    if subsets < 1 or size < 2:
        raise ValueError(f"kernel distance: found {subsets} subsets of {size}, expected at least 1 of at least 2")
    rng, values = np.random.RandomState(seed), []
    for _ in range(subsets):
        drawn = (a[rng.choice(len(a), size, replace=False)] for a in (x, y))
        values.append(mmd2(*drawn))
    return Estimate(float(np.mean(values)), float(np.std(values)))


def _finish(state, reference: dict, settings) -> dict[str, float]:
    """Distance over subsets of SIZE samples, or of all if there are fewer."""
    features, real = np.concatenate(state), reference["features"]
    least = min(len(features), len(real))
    estimate = distance(features, real, size=min(SIZE, least))
    # A subset that is a whole set makes the spread too small.
    return {"": estimate.mean} | ({"_std": estimate.std} if least > SIZE else {})


KID = Metric(
    "kid",
    needs=("pool", "features"),
    update=keep,
    finish=_finish,
    higher_is_better=False,
    rules={"kernel": f"{SUBSETS} subsets of {SIZE}, seed {SEED}, float64"},
    plain="kd",
)
