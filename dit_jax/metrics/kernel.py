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
BLOCK = 2**20  # numbers of a kernel matrix at a time


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
    rng = np.random.RandomState(seed)
    drawn = [[rng.choice(len(a), size, replace=False) for a in (x, y)] for _ in range(subsets)]
    if len(x) ** 2 + len(x) * len(y) + len(y) ** 2 < 3 * subsets * size**2:
        values = _of_all_pairs(x, y, *(np.array(chosen) for chosen in zip(*drawn, strict=True)))
    else:
        values = [mmd2(x[mine], y[theirs]) for mine, theirs in drawn]
    return Estimate(float(np.mean(values)), float(np.std(values)))


def _of_all_pairs(x: np.ndarray, y: np.ndarray, mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """`mmd2` of x[mine[i]] and y[theirs[i]] for indices (subsets, size), with the kernel of each pair of samples computed once."""
    x, y, size = x.astype(np.float64), y.astype(np.float64), mine.shape[1]
    of_x, of_y = (_members(len(a), chosen) for a, chosen in ((x, mine), (y, theirs)))

    def sums(a: np.ndarray, b: np.ndarray, of_a: np.ndarray, of_b: np.ndarray) -> np.ndarray:
        """Sums of the kernel over the pairs of each subset, (subsets,)."""
        count = max(1, BLOCK // len(b))
        rows = (slice(start, start + count) for start in range(0, len(a), count))
        return sum(((kernel(a[some], b) @ of_b) * of_a[some]).sum(axis=0) for some in rows)

    def others(a: np.ndarray, of_a: np.ndarray) -> np.ndarray:
        """Means of the kernel over the pairs of different samples of each subset, (subsets,)."""
        own = ((a * a).sum(axis=1) / a.shape[1] + 1.0) ** 3
        return (sums(a, a, of_a, of_a) - own @ of_a) / (size * (size - 1))

    return others(x, of_x) + others(y, of_y) - 2 * sums(x, y, of_x, of_y) / size**2


def _members(count: int, chosen: np.ndarray) -> np.ndarray:
    """1.0 where a sample is in a subset, (count, subsets), from indices (subsets, size)."""
    found = np.zeros((count, len(chosen)))
    np.put_along_axis(found, chosen.T, 1.0, axis=0)
    return found


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
