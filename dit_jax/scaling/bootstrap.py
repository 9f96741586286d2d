"""Intervals of an isoFLOP fit: a residual bootstrap whose unit is the run.

Each resample redraws every run's loss about its budget's parabola and fits everything again. The residuals of all budgets
are pooled: r / sqrt(1 - leverage), centred and scaled to the noise s, where s^2 = sum r^2 / v and v = runs - 3 per budget
(Davison & Hinkley 1997, "Bootstrap Methods and their Application", section 6.2.3).

Why not resample the runs themselves: with 5 runs a budget, one draw in six holds fewer than 3 distinct sizes, others lose
an end of the curve, and none restores the noise that the 3 coefficients have absorbed. For that last reason each resample
also redraws the scale of the noise, s sqrt(v / chi2_v): with few degrees of freedom v this widens the intervals as Student's
t does. The price is one assumption: the noise is alike in all budgets. Over 1,500 simulated studies (5 budgets x 5 sizes,
noise 0.003) the 95 % intervals held the exponent of N_opt in 94.2 %, N_opt 4x beyond the data in 94.2 % and L_opt there in 94.7 %.

The evaluation's standard error is not added to the residuals. The part of it that differs between runs is in them already; the
part that is common, since all runs see the same held-out set, shifts every loss alike and moves no comparison. It stands in
for the residuals only where there are none (3 runs in every budget).
"""

import math

import numpy as np


def noise(budgets) -> tuple:
    """(standard deviation of a run's loss about its parabola or None, degrees of freedom, pooled standardised residuals)."""
    residuals = [b.residuals for b in budgets]
    freedom = sum(len(r) - 3 for r in residuals)
    if freedom > 0:
        scale = math.sqrt(sum(np.sum(r**2) for r in residuals) / freedom)
        free = [1 - b.curve.leverage for b in budgets]
        pooled = np.concatenate([r[f > 0.01] / np.sqrt(f[f > 0.01]) for r, f in zip(residuals, free, strict=True)])
        pooled = pooled - pooled.mean()
        spread = math.sqrt(np.mean(pooled**2))
        return scale, freedom, pooled / spread if spread > 0 else pooled
    errors = [r.loss_se for b in budgets for r in b.runs]
    if min(errors) > 0:
        return math.sqrt(np.mean(np.square(errors))), 0, None
    return None, 0, None


def scales(rng, scale: float, freedom: int, resamples: int) -> np.ndarray:
    """The noise of each resample."""
    if not freedom:
        return np.full(resamples, scale)
    return scale * np.sqrt(freedom / rng.chisquare(freedom, resamples))


def redraw(rng, budget, residuals, scale: np.ndarray) -> np.ndarray:
    """Resampled losses (resamples, runs) of a budget: its parabola plus noise."""
    shape = (len(scale), len(budget.runs))
    draws = rng.standard_normal(shape) if residuals is None else rng.choice(residuals, shape)
    return budget(np.exp(budget.curve.log_n)) + scale[:, None] * draws
