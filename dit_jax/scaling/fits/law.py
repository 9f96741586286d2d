"""Power laws of compute, y = E + k C^x, and their least-squares fits; every fit is vectorised over resamples.

N_opt = k C^a, D_opt = k C^b and L = k C^x: Liang et al. 2024 (arXiv 2410.08184), section 3; the optima of compute are
eq. 4 of Hoffmann et al. 2022 (arXiv 2203.15556). The irreducible term E is that of Henighan et al. 2020
(arXiv 2010.14701), eq. 1.1. C in training FLOPs (2 x MACs, forward and backward), N in parameters active per token, D in
tokens, L in units of the held-out loss.
"""

from dataclasses import dataclass

import numpy as np

EXPONENTS = (0.005, 2.0)  # searched for the decay of the reducible loss


@dataclass(frozen=True)
class PowerLaw:
    """C -> irreducible + coefficient * C^exponent, C in training FLOPs. Arrays in the fields are resamples of one law."""

    coefficient: float | np.ndarray
    exponent: float | np.ndarray
    irreducible: float | np.ndarray = 0.0

    def __call__(self, C):
        with np.errstate(
            over="ignore", invalid="ignore"
        ):  # laws that are not determined reach beyond what float64 holds
            return self.irreducible + self.coefficient * np.power(C, self.exponent)

    def at(self, C: np.ndarray) -> tuple:
        """(law, its reducible part), (..., c) each, of every resample at every C (c,)."""
        coefficient, exponent, irreducible = (np.asarray(v)[..., None] for v in vars(self).values())
        reducible = coefficient * np.power(C, exponent)
        return irreducible + reducible, reducible

    def __getitem__(self, index) -> "PowerLaw":
        """One resample, as plain floats; or a selection of resamples."""
        parts = (np.asarray(v)[index] for v in (self.coefficient, self.exponent, self.irreducible))
        return PowerLaw(*(float(p) if p.ndim == 0 else p for p in parts))


def fit_power(C: np.ndarray, y: np.ndarray, weight: np.ndarray) -> PowerLaw:
    """y = k C^x by weighted least squares of log y on log C. C (j,) or (resamples, j), y and
    weight (resamples, j); weight 0 leaves a point out."""
    log_c = np.log(C)
    centre = log_c.mean()
    total = weight.sum(-1)
    x_mean = (weight * (log_c - centre)).sum(-1) / total
    y = np.log(np.where(weight > 0, y, 1.0))
    y_mean = (weight * y).sum(-1) / total
    x = log_c - centre - x_mean[:, None]
    slope = (weight * x * (y - y_mean[:, None])).sum(-1) / (weight * x**2).sum(-1)
    with np.errstate(over="ignore"):  # of a resample that determines no law
        return PowerLaw(np.exp(y_mean - slope * (x_mean + centre)), slope, np.zeros_like(slope))


def fit_irreducible(C: np.ndarray, y: np.ndarray, weight: np.ndarray) -> PowerLaw:
    """y = E + k C^-x by weighted least squares, E >= 0, k >= 0, x within EXPONENTS; shapes as in `fit_power`.

    For fixed x the law is linear in (E, k), so x alone is searched: a grid over the whole range, then zooms around its best.
    There is no start to choose and no local minimum narrower than a grid cell to fall into.
    """
    y = np.where(weight > 0, y, 0.0)
    log_c = np.log(C)
    centre = log_c.mean()
    grid = np.broadcast_to(np.log(np.geomspace(*EXPONENTS, 65)), (len(y), 65))
    for _ in range(15):
        sse = _linear(grid, log_c - centre, y, weight)[0]
        best = np.argmin(sse, axis=1)[:, None]
        low = np.take_along_axis(grid, np.maximum(best - 1, 0), 1)
        high = np.take_along_axis(grid, np.minimum(best + 1, grid.shape[1] - 1), 1)
        grid = low + (high - low) * np.linspace(0.0, 1.0, 9)
    sse, E, k = _linear(grid, log_c - centre, y, weight)
    best = np.argmin(sse, axis=1)[:, None]
    x, E, k = (np.take_along_axis(v, best, 1)[:, 0] for v in (np.exp(grid), E, k))
    return PowerLaw(k * np.exp(x * centre), -x, E)


def _linear(log_x, log_c, y, weight):
    """Best non-negative (E, k) for each exponent of `log_x` (resamples, g) and its sum of squares."""
    f = np.exp(-np.exp(log_x)[..., None] * np.expand_dims(log_c, -2))  # (resamples, g, j)
    y, w = y[:, None], weight[:, None]
    total = w.sum(-1)
    f_mean, y_mean = (w * f).sum(-1) / total, (w * y).sum(-1) / total
    df = f - f_mean[..., None]
    k = (w * df * (y - y_mean[..., None])).sum(-1) / np.maximum((w * df**2).sum(-1), 1e-300)
    k = np.maximum(k, 0.0)
    E = y_mean - k * f_mean
    below = E < 0
    k = np.where(below, (w * f * y).sum(-1) / (w * f**2).sum(-1), k)
    E = np.where(below, 0.0, E)
    return (w * (y - E[..., None] - k[..., None] * f) ** 2).sum(-1), E, k
