"""Intervals of an isoFLOP fit: a residual bootstrap whose unit is the run.

Each resample redraws every run's loss about its budget's parabola and fits everything again. The residuals of all budgets
are pooled: r / sqrt(1 - leverage), centred and scaled to the noise s, where s^2 = sum r^2 / v and v = runs - 3 per budget
(Davison & Hinkley 1997, "Bootstrap Methods and their Application", section 6.2.3).

Why not resample the runs themselves: with 5 runs a budget, one draw in six holds fewer than 3 distinct sizes, others lose
an end of the curve, and none restores the noise that the 3 coefficients have absorbed. For that last reason each resample
also redraws the scale of the noise, s sqrt(v / chi2_v): with few degrees of freedom v this widens the intervals as Student's
t does.

**Noise and loss.** Is the noise of one size in all budgets, or a share of the loss? A few runs cannot tell, so it is taken as
s (loss / mean loss)^p, and each resample draws p between 0 and 1 by its likelihood, s^2 given p as above.

**Weights.** A vertex u = -c1 / (2 c2) that errs towards the middle of its sizes has a small delta-method variance, and weighs much
for that very error: weights from the vertices themselves bias a law whose optima are off the middle. The estimate keeps them; were they
drawn again in each resample, its bias would be there twice. So resamples weigh by the estimating equations of the law,

    sum_b h_b (1, log C_b) (c1_b + 2 c2_b u_b(law)) = 0,   h_b = c2_b / var(c1_b + 2 c2_b u_b),

with c2 and u of h taken from smooth power laws through all budgets (weights from fitted rather than single values: Carroll & Ruppert
1988, "Transformation and Weighting in Regression", section 2.3), the same in all resamples. With h fixed the equations have mean zero at the true
law, and what solves them for redrawn c1 and c2 is Fieller's interval (1954) of a ratio, for all budgets at once: it may reach beyond the
sizes tried. A vertex weighs as h_b times its own redrawn curvature, so flat ones count little.

The evaluation's standard error is not added to the residuals. The part of it that differs between runs is in them already; the
part that is common, since all runs see the same held-out set, shifts every loss alike and moves no comparison. It stands in
for the residuals only where there are none (3 runs in every budget).
"""

import math
from dataclasses import dataclass

import numpy as np

from dit_jax.scaling.law import fit_power

SHARES = np.linspace(0.0, 1.0, 21)  # powers of the loss that the noise may follow
ROUNDS = 3  # of finding the places of the vertices with the weights that follow from them


@dataclass(frozen=True)
class Noise:
    """Noise of runs about their parabolas: pooled standard deviation, degrees of freedom, standardised residuals (None where the
    evaluation's standard error stands in), log of each budget's loss over a mean, and the posterior of SHARES with its variances."""

    scale: float
    freedom: int
    residuals: np.ndarray | None
    log_loss: np.ndarray
    chance: np.ndarray
    squares: np.ndarray  # sums of squared residuals over loss^2p, one for each of SHARES

    def draw(self, rng, resamples: int) -> np.ndarray:
        """The noise of a run in each resample and budget (resamples, budgets)."""
        if not self.freedom:
            return np.full((resamples, len(self.log_loss)), self.scale)
        which = rng.choice(len(SHARES), resamples, p=self.chance)
        scale = np.sqrt(self.squares[which] / rng.chisquare(self.freedom, resamples))
        return scale[:, None] * np.exp(SHARES[which, None] * self.log_loss)


def noise(budgets) -> Noise | None:
    """The noise about the parabolas of these budgets; None where neither residuals nor standard errors tell."""
    residuals = [b.residuals for b in budgets]
    free = np.array([len(r) - 3 for r in residuals])
    log_loss = np.array([np.mean(np.log(b.losses)) for b in budgets])
    freedom = int(free.sum())
    if freedom > 0:
        log_loss = log_loss - (free @ log_loss) / freedom
        sums = np.array([np.sum(r**2) for r in residuals])
        chance, squares = _shares(sums, log_loss, freedom)
        power = float(chance @ SHARES)
        pairs = zip(residuals, budgets, log_loss, strict=True)
        pooled = np.concatenate([_standard(r, 1 - b.curve.leverage, math.exp(power * x)) for r, b, x in pairs])
        pooled = pooled - pooled.mean()
        spread = math.sqrt(np.mean(pooled**2))
        pooled = pooled / spread if spread > 0 else pooled
        return Noise(math.sqrt(sums.sum() / freedom), freedom, pooled, log_loss, chance, squares)
    errors = [r.loss_se for b in budgets for r in b.runs]
    if min(errors) > 0:
        return Noise(math.sqrt(np.mean(np.square(errors))), 0, None, log_loss, np.zeros(0), np.zeros(0))
    return None


def _standard(residuals: np.ndarray, free: np.ndarray, scale: float) -> np.ndarray:
    """Residuals at one scale, without those that the parabola goes through whatever they are."""
    kept = free > 0.01
    return residuals[kept] / np.sqrt(free[kept]) / scale


def _shares(sums: np.ndarray, log_loss: np.ndarray, freedom: int) -> tuple:
    """(posterior of SHARES under flat priors of the power and of log s, sums of squares over loss^2p); residuals of 0 tell nothing."""
    squares = np.exp(-2 * SHARES[:, None] * log_loss) @ sums
    if not squares.min() > 0:
        return np.full(len(SHARES), 1 / len(SHARES)), squares
    chance = np.exp(-freedom / 2 * np.log(squares / squares.min()))
    return chance / chance.sum(), squares


def redraw(rng, budget, residuals, scale: np.ndarray) -> np.ndarray:
    """Resampled losses (resamples, runs) of a budget: its parabola plus noise of these scales (resamples,)."""
    shape = (len(scale), len(budget.runs))
    draws = rng.standard_normal(shape) if residuals is None else rng.choice(residuals, shape)
    return budget(np.exp(budget.curve.log_n)) + scale[:, None] * draws


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
