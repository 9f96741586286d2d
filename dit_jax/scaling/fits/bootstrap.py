"""The one bootstrap: losses are simulated at the very runs, about the curve of the fit and with the noise that its residuals show, and
fitted again. Quantiles of these fits are the intervals; their middle less the estimate is the bias.

The noise is of one size in all runs or a share of the loss, as far as the residuals can tell (`noise`); its scale is drawn anew each time,
s sqrt(v / chi2_v) for v degrees of freedom, which gives few runs the width of Student's t. What is drawn are the residuals themselves,
enlarged for the coefficients that have absorbed part of them. Where runs are training curves, several rows of one run, each run has a
term of its own besides that of each point (variance components by the mean squares between and within runs).

Points that stand for budgets and leave no residuals, as interpolated minima do, have one other scheme: their scatter about the laws
(`scatter`), with the same Student's t.

Davison & Hinkley 1997, "Bootstrap Methods and their Application", sections 4.2 and 6.2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from dit_jax.scaling.fits.noise import Power, power
from dit_jax.scaling.runs import Run

FEWEST = 20  # resamples that make an interval


@dataclass(frozen=True)
class Noise:
    """Noise of the runs about a curve: its standard deviation at the mean loss, the degrees of freedom that tell it, how it goes with the
    loss, the standardised residuals to draw from, and the share of the variance that the rows of one run have in common."""

    scale: float
    freedom: int
    power: Power
    residuals: np.ndarray
    shared: float
    groups: np.ndarray  # (n,) the run of each row, counted from 0

    def draw(self, rng: np.random.Generator, resamples: int) -> np.ndarray:
        """Noise (resamples, n) to add to the curve's losses."""
        scale = self.power.draw(rng, resamples)
        own = rng.choice(self.residuals, (resamples, len(self.groups)))
        if self.shared:
            together = rng.choice(self.residuals, (resamples, int(self.groups.max()) + 1))[:, self.groups]
            own = math.sqrt(self.shared) * together + math.sqrt(1 - self.shared) * own
        return scale * own


def clusters(runs: Sequence[Run]) -> np.ndarray:
    """The run (n,) of each row, counted from 0: rows of one name and size are one run, a row without a name is its own."""
    found: dict = {}
    return np.array([found.setdefault((r.name, r.params) if r.name else id(r), len(found)) for r in runs])


def noise(losses: np.ndarray, fitted: np.ndarray, leverage: np.ndarray, groups: np.ndarray) -> Noise | None:
    """The noise of `losses` (n,) about a curve `fitted` to them; None where it goes through all of them. `leverage` (n,) is the share of
    each residual that the curve has absorbed."""
    residual, free = losses - fitted, np.clip(1 - leverage, 0.0, 1.0)
    freedom = round(float(free.sum()))
    if freedom < 1:
        return None
    found = power(residual**2, np.log(fitted), np.maximum(free, 1e-9))
    told = free > 0.01
    pooled = residual[told] / np.sqrt(free[told]) / found.relative[told]
    pooled = pooled - pooled.mean()
    spread = math.sqrt(np.mean(pooled**2))
    pooled = pooled / spread if spread > 0 else pooled
    scale = math.sqrt(float((residual**2).sum()) / float(free.sum()))
    shared = _shared(residual / found.relative, groups)
    if shared:  # what a run's rows have in common is told by as many numbers as there are runs
        runs = int(groups.max()) + 1
        freedom = max(1, min(freedom, runs - round(float(leverage.sum()))))
        found = Power(found.log_loss, found.chance, found.squares * freedom / found.freedom, freedom)
    return Noise(scale, freedom, found, pooled, shared, groups)


def stated(runs: Sequence[Run], fitted: np.ndarray) -> Noise | None:
    """Noise that no residual tells: the evaluation's standard error, which stands in where every run has one; else None."""
    errors = [r.loss_se for r in runs]
    if min(errors) <= 0:
        return None
    scale, many = math.sqrt(np.mean(np.square(errors))), 10**6
    flat = power(np.full(len(runs), scale**2), np.zeros(len(runs)), np.ones(len(runs)))
    known = Power(np.zeros(len(runs)), flat.chance, np.full(len(flat.chance), scale**2 * many), many)
    normal = stats.norm.ppf((np.arange(200) + 0.5) / 200)
    return Noise(scale, 0, known, normal / normal.std(), 0.0, clusters(runs))


def _shared(residual: np.ndarray, groups: np.ndarray) -> float:
    """The share of the variance that rows of one run have in common, from 0 to 1."""
    count = np.bincount(groups)
    rows, runs = len(groups), len(count)
    if rows == runs or runs < 2:
        return 0.0
    mean = np.bincount(groups, residual) / count
    within = float(((residual - mean[groups]) ** 2).sum()) / (rows - runs)
    between = float((count * (mean - residual.mean()) ** 2).sum()) / (runs - 1)
    size = (rows - float((count**2).sum()) / rows) / (runs - 1)
    common = max((between - within) / size, 0.0)
    return common / (common + within) if common + within > 0 else 0.0


def between(y: np.ndarray, design: np.ndarray, variance: np.ndarray) -> float:
    """tau^2, the variance of `y` (j,) about the best `design` (j, p) beyond its own `variance` (j,): DerSimonian & Laird 1986, the moment
    estimate of a random effect, with regressors (Raudenbush 2009); 0 where the scatter is as expected or less."""
    weight = 1 / variance
    gram = design.T @ (weight[:, None] * design)
    solve = np.linalg.solve(gram, design.T * weight)
    q = float((weight * (y - design @ (solve @ y)) ** 2).sum())
    spread = float(weight.sum() - np.trace(solve @ (weight[:, None] * design)))
    return max((q - (len(y) - design.shape[1])) / spread, 0.0)


def scatter(rng: np.random.Generator, off: np.ndarray, freedom: Sequence[int], resamples: int) -> np.ndarray:
    """Errors (q, resamples, points) that are normal with the covariance of the residuals `off` (q, points) of q quantities about their
    laws, which leave each of them `freedom`."""
    root, size, _ = np.linalg.svd(off, full_matrices=False)
    drawn = np.einsum("ij,j,jrp->irp", root, size, rng.standard_normal((len(size), resamples, off.shape[1])))
    scale = 1 / np.sqrt(rng.chisquare(np.broadcast_to(np.asarray(freedom), (resamples, len(off))).T))
    return drawn * scale[:, :, None]
