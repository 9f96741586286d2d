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
from scipy import special

from dit_jax.scaling.fits.noise import Power, power
from dit_jax.scaling.runs import Run

FEWEST = 20  # resamples that make an interval
LEAST = 0.5  # degrees of freedom that tell a variance


@dataclass(frozen=True)
class Noise:
    """Noise of the runs about a curve: its standard deviation at the mean loss, the degrees of freedom that tell it, how it goes with the
    loss, the standardised residuals to draw from, and the share of the variance that the rows of one run have in common, which `free_runs`
    degrees of freedom tell."""

    scale: float
    freedom: int
    power: Power
    residuals: np.ndarray
    shared: float
    groups: np.ndarray  # (n,) the run of each row, counted from 0
    free_runs: float = math.inf

    def draw(self, rng: np.random.Generator, resamples: int) -> np.ndarray:
        """Noise (resamples, n) to add to the curve's losses."""
        scale = self.power.draw(rng, resamples)
        own = rng.choice(self.residuals, (resamples, len(self.groups)))
        if self.shared:
            together = rng.choice(self.residuals, (resamples, int(self.groups.max()) + 1))[:, self.groups]
            told = np.sqrt(self.free_runs / rng.chisquare(self.free_runs, (resamples, 1)))
            own = math.sqrt(self.shared) * told * together + math.sqrt(1 - self.shared) * own
        return scale * own

    def independent(self, values: np.ndarray) -> np.ndarray:
        """Columns (n, p) less the part of their means over each run that makes the rows' errors independent: generalised least squares
        of errors with a part in common (Fuller & Battese 1973)."""
        count = np.bincount(self.groups).astype(float)
        part = 1 - np.sqrt((1 - self.shared) / (1 - self.shared + count * self.shared))
        sums = np.zeros((len(count), values.shape[1]))
        np.add.at(sums, self.groups, values)
        return values - ((part / count)[:, None] * sums)[self.groups]


def clusters(runs: Sequence[Run]) -> np.ndarray:
    """The run (n,) of each row, counted from 0: rows of one name and size are one run, a row without a name is its own."""
    found: dict = {}
    return np.array([found.setdefault((r.name, r.params) if r.name else id(r), len(found)) for r in runs])


def noise(
    losses: np.ndarray, fitted: np.ndarray, leverage: np.ndarray, groups: np.ndarray, absorbed: float
) -> Noise | None:
    """The noise of `losses` (n,) about a curve `fitted` to them; None where it goes through all of them. `leverage` (n,) is the share of
    each residual that the curve has absorbed, `absorbed` how many of the means of the runs (`absorbed_means`)."""
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
    free_runs = int(groups.max()) + 1 - absorbed
    shared, known = _shared(residual / found.relative, groups, freedom, free_runs)
    if shared:  # the runs' part is drawn with its own degrees of freedom, the rows' with what is left
        left = max(1, round(freedom - free_runs))
        found = Power(found.log_loss, found.chance, found.squares * left / found.freedom, left)
        freedom = max(1, min(freedom, round(known)))
    return Noise(scale, freedom, found, pooled, shared, groups, free_runs)


def absorbed_means(basis: np.ndarray, groups: np.ndarray) -> float:
    """How many of the means of the runs a linear fit absorbs: the trace of its projection, of orthonormal `basis` (n, p), within the
    space of vectors that are constant in each run. With one row a run, p."""
    sums = np.zeros((int(groups.max()) + 1, basis.shape[1]))
    np.add.at(sums, groups, basis)
    return float((sums**2 / np.bincount(groups)[:, None]).sum())


def stated(runs: Sequence[Run], fitted: np.ndarray) -> Noise | None:
    """Noise that no residual tells: the evaluation's standard error, which stands in where every run has one; else None."""
    errors = [r.loss_se for r in runs]
    if min(errors) <= 0:
        return None
    scale, many = math.sqrt(np.mean(np.square(errors))), 10**6
    flat = power(np.full(len(runs), scale**2), np.zeros(len(runs)), np.ones(len(runs)))
    known = Power(np.zeros(len(runs)), flat.chance, np.full(len(flat.chance), scale**2 * many), many)
    normal = special.ndtri((np.arange(200) + 0.5) / 200)
    return Noise(scale, 0, known, normal / normal.std(), 0.0, clusters(runs))


def _shared(residual: np.ndarray, groups: np.ndarray, freedom: int, free_runs: float) -> tuple:
    """(the share of the variance that rows of one run have in common, from 0 to 1; the degrees of freedom of the whole by Satterthwaite
    1946). Of the `freedom` of all residuals, `free_runs` are of the means of the runs, the others of the rows within them."""
    count = np.bincount(groups)
    rows, runs = len(groups), len(count)
    free_rows = freedom - free_runs
    if rows == runs or free_runs < LEAST or free_rows < LEAST:
        return 0.0, float(freedom)
    mean = np.bincount(groups, residual) / count
    within = float(((residual - mean[groups]) ** 2).sum()) / free_rows
    between = float((count * mean**2).sum()) / free_runs
    size = (rows - float((count**2).sum()) / rows) / (runs - 1)
    common = (between - within) / size
    if common <= 0:
        return 0.0, float(freedom)
    part = between / size, (1 - 1 / size) * within
    return common / (common + within), sum(part) ** 2 / (part[0] ** 2 / free_runs + part[1] ** 2 / free_rows)


def between(y: np.ndarray, design: np.ndarray, variance: np.ndarray, freedom: float = math.inf) -> float:
    """tau^2, the variance of `y` (j,) about the best `design` (j, p) beyond its own `variance` (j,): DerSimonian & Laird 1986, the moment
    estimate of a random effect, with regressors (Raudenbush 2009); 0 where the scatter is as expected or less. `freedom`: the degrees of
    freedom that tell the variance. Where they are few, the scatter in units of it is expected to be larger (the mean of Fisher's F)."""
    weight = 1 / variance
    gram = design.T @ (weight[:, None] * design)
    solve = np.linalg.solve(gram, design.T * weight)
    q = float((weight * (y - design @ (solve @ y)) ** 2).sum())
    spread = float(weight.sum() - np.trace(solve @ (weight[:, None] * design)))
    expected = len(y) - design.shape[1]
    if math.isfinite(freedom):
        expected *= max(freedom, 3) / (max(freedom, 3) - 2)
    return max((q - expected) / spread, 0.0)


def scatter(rng: np.random.Generator, off: np.ndarray, freedom: Sequence[int], resamples: int) -> np.ndarray:
    """Errors (q, resamples, points) that are normal with the covariance of the residuals `off` (q, points) of q quantities about their
    laws, which leave each of them `freedom`."""
    root, size, _ = np.linalg.svd(off, full_matrices=False)
    drawn = np.einsum("ij,j,jrp->irp", root, size, rng.standard_normal((len(size), resamples, off.shape[1])))
    scale = 1 / np.sqrt(rng.chisquare(np.broadcast_to(np.asarray(freedom), (resamples, len(off))).T))
    return drawn * scale[:, :, None]
