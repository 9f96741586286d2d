"""Intervals of an isoFLOP fit: a residual bootstrap whose unit is the run.

Each resample redraws every run's loss about its budget's parabola and fits everything again. The residuals of all budgets
are pooled: r / sqrt(1 - leverage), centred and scaled to the noise s, where s^2 = sum r^2 / v and v = runs - 3 per budget
(Davison & Hinkley 1997, "Bootstrap Methods and their Application", section 6.2.3).

Why not resample the runs themselves: with 5 runs a budget, one draw in six holds fewer than 3 distinct sizes, others lose
an end of the curve, and none restores the noise that the 3 coefficients have absorbed. For that last reason each resample
also redraws the scale of the noise, s sqrt(v / chi2_v): with few degrees of freedom v this widens the intervals as Student's
t does.

Each resample also draws whether the noise is of one size in all budgets or a share of the loss, as far as the residuals allow (`noise`).

**Weights.** A vertex u = -c1 / (2 c2) that errs towards the middle of its sizes has a small delta-method variance, and weighs much
for that very error: weights from the vertices themselves bias a law whose optima are off the middle. The estimate keeps them; were they
drawn again in each resample, its bias would be there twice. So resamples weigh by the estimating equations of the law,

    sum_b h_b (1, log C_b) (c1_b + 2 c2_b u_b(law)) = 0,   h_b = c2_b / var(c1_b + 2 c2_b u_b),

with c2 and u of h taken from smooth power laws through all budgets, the same in all resamples (weights from fitted rather than single
values: Carroll & Ruppert 1988, "Transformation and Weighting in Regression", section 2.3). With h fixed the equations have mean zero at
the true law, and what solves them for redrawn c1 and c2 is Fieller's interval (1954) of a ratio, for all budgets at once: it may reach
beyond the sizes tried. A vertex weighs as h_b times its own redrawn curvature, so flat ones count little.

The evaluation's standard error is not added to the residuals. The part of it that differs between runs is in them already; the
part that is common, since all runs see the same held-out set, shifts every loss alike and moves no comparison. It stands in
for the residuals only where there are none (3 runs in every budget).
"""

import math
from dataclasses import dataclass

import numpy as np

from dit_jax.scaling.law import fit_power
from dit_jax.scaling.noise import Power, power

ROUNDS = 3  # of finding the places of the vertices with the weights that follow from them


@dataclass(frozen=True)
class Noise:
    """Noise of runs about their parabolas: pooled standard deviation, degrees of freedom, and how it goes with the budgets' losses and
    standardised residuals. The last two are None where the evaluation's standard error stands in."""

    scale: float
    freedom: int
    power: Power | None = None
    residuals: np.ndarray | None = None

    def draw(self, rng, resamples: int, count: int) -> np.ndarray:
        """The noise of a run in each resample and each of `count` budgets (resamples, budgets)."""
        return np.full((resamples, count), self.scale) if self.power is None else self.power.draw(rng, resamples)


def noise(budgets) -> Noise | None:
    """The noise about the parabolas of these budgets; None where neither residuals nor standard errors tell."""
    residuals = [b.residuals for b in budgets]
    free = np.array([len(r) - 3 for r in residuals])
    if free.sum() > 0:
        sums = np.array([np.sum(r**2) for r in residuals])
        found = power(sums, np.array([np.mean(np.log(b.losses)) for b in budgets]), free)
        triples = zip(residuals, [1 - b.curve.leverage for b in budgets], found.relative, strict=True)
        pooled = np.concatenate([r[f > 0.01] / np.sqrt(f[f > 0.01]) / scale for r, f, scale in triples])
        pooled = pooled - pooled.mean()
        spread = math.sqrt(np.mean(pooled**2))
        scale = math.sqrt(sums.sum() / free.sum())
        return Noise(scale, int(free.sum()), found, pooled / spread if spread > 0 else pooled)
    errors = [r.loss_se for b in budgets for r in b.runs]
    return Noise(math.sqrt(np.mean(np.square(errors))), 0) if min(errors) > 0 else None


def draw(rng, count: int, residuals, scale: np.ndarray) -> np.ndarray:
    """Noise (resamples, count) of a budget's runs, of these scales (resamples,)."""
    shape = (len(scale), count)
    return scale[:, None] * (rng.standard_normal(shape) if residuals is None else rng.choice(residuals, shape))


def weights(budgets) -> tuple:
    """(h (budgets,) of the vertices' place, weight (budgets,) of their loss), from curvature and places smoothed along the budgets."""
    C = np.array([b.flops for b in budgets])
    covariance = np.stack([b.curve.covariance for b in budgets])
    bend = np.array([b.curvature for b in budgets])
    bend = fit_power(C, bend[None], 1 / covariance[None, :, 2, 2])(C)
    n = np.array([[b.n_opt for b in budgets]])
    moved = np.array([b.shift.log_n - b.curve.centre for b in budgets])
    weight = np.array([[1 / b.var_n for b in budgets]])
    for _ in range(ROUNDS):
        u = np.log(fit_power(C, n, weight)(C)) + moved
        slope = np.stack([np.zeros_like(u), np.ones_like(u), 2 * u], axis=1)
        h = bend / np.einsum("bi,bij,bj->b", slope, covariance, slope)
        weight = (h * bend)[None]
    at = np.stack([np.ones_like(u), u, u**2], axis=1)
    return h, 1 / np.einsum("bi,bij,bj->b", at, covariance, at)
