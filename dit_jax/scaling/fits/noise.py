"""How noise goes with the loss: is it of one size in all runs, or a share of the loss?

A few runs cannot tell. So it is taken as s (loss / mean loss)^p with p between these two, 0 and 1, each as likely as any other beforehand,
and with a flat prior of log s. With the mean a geometric one the likelihood of p, s integrated out, is sum(r^2 / loss^2p)^(-v/2) for
residuals r of v degrees of freedom; given p, v s^2 over that sum is the inverse of a chi-squared. Power-of-the-mean variances: Carroll &
Ruppert 1988, "Transformation and Weighting in Regression", chapter 2.
"""

from dataclasses import dataclass

import numpy as np

SHARES = np.linspace(0.0, 1.0, 21)  # the powers p


@dataclass(frozen=True)
class Power:
    """Logarithms (m,) of losses about their mean, the chance of each of SHARES, and the sums of squared residuals over loss^2p."""

    log_loss: np.ndarray
    chance: np.ndarray
    squares: np.ndarray
    freedom: int

    def draw(self, rng: np.random.Generator, resamples: int) -> np.ndarray:
        """Standard deviations of the noise (resamples, m) at each loss."""
        which = rng.choice(len(SHARES), resamples, p=self.chance)
        scale = np.sqrt(self.squares[which] / rng.chisquare(self.freedom, resamples))
        return scale[:, None] * np.exp(SHARES[which, None] * self.log_loss)

    @property
    def variance(self) -> np.ndarray:
        """The mean variance (m,) of the noise at each loss, s^2 at its estimate for each p."""
        return (self.chance * self.squares / self.freedom) @ np.exp(2 * SHARES[:, None] * self.log_loss)

    @property
    def relative(self) -> np.ndarray:
        """The noise (m,) at each loss over that at the mean loss, for the mean of p."""
        return np.exp(float(self.chance @ SHARES) * self.log_loss)


def power(squares: np.ndarray, log_loss: np.ndarray, free: np.ndarray) -> Power:
    """From sums of squared residuals (m,) with `free` (m,) degrees of freedom, above 0 in all, at these log losses (m,)."""
    freedom = free.sum()
    log_loss = log_loss - (free @ log_loss) / freedom
    sums = np.exp(-2 * SHARES[:, None] * log_loss) @ squares
    chance = np.ones(len(SHARES))
    if sums.min() > 0:  # residuals of 0 tell nothing
        chance = np.exp(-freedom / 2 * np.log(sums / sums.min()))
    return Power(log_loss, chance / chance.sum(), sums, round(freedom))
