"""How far the lowest of noisy runs lies from the true optimum, by simulation: isoFLOP curves of all budgets are smoothed together and
every run's loss is drawn anew about them.

The lowest of noisy runs is too low (the winner's curse), the best of a coarse grid of sizes is too high, and neither error is normal.
So each resample draws the log losses of all runs about the smooth curves, looks for the lowest point as the method does, and notes how far
it lies from the curve's own minimum. Laws are then fitted to their own values less these errors: the basic bootstrap (Davison & Hinkley
1997, "Bootstrap Methods and their Application", section 5.2.1) at the level of the points, which corrects their bias as well.

The smooth curve of budget b is c_b + l_b v + sum_k (p_k + q_k x) v^k, k = 2 to a degree, with x = log C about its mean and v = log N
about a power law through the minima. Level and slope are each budget's own; the shape is common and may change with compute, so that a
few runs of each budget are enough. Runs far from the minimum that do not fit such a curve (F test) are left out. What is not known is
drawn in each resample: the scale of the noise, s sqrt(v / chi2_v) as in `bootstrap`, and the shape, by its covariance. Whether noise is
a share of the loss or of one size in all runs a few runs cannot tell; where a loss is below the mean, the larger of the two is taken.

Where wide grids are no such curves, what these leave is misfit as well as noise. So the noise is also read where the minima are, from
differences (Gasser, Sroka & Jennen-Steinmetz 1986, Biometrika 73): how far each budget's lowest run lies from the cubic through two
neighbours on either side. Where the residuals are larger than that by more than chance (F test), that is the noise (`Curves.least`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

DEGREES = ((12, 6), (10, 5), (7, 4), (6, 3), (4, 2))  # median sizes of a budget, and the degree that they allow
WINDOWS = (1.0, 0.7, 0.5, 0.35, 0.25)  # of the farthest run's distance from the minimum
CHANCE = 0.01  # of the F tests by which a narrower window, or a noise less than the residuals', is taken
ASIDE = 2  # neighbours of the lowest run on either side that tell its noise
CHANGING = 3  # budgets from which the shape may change with compute
ROUNDS = 20  # of moving the centres onto the minima


@dataclass(frozen=True)
class Curves:
    """Smooth curves of log loss; tuples hold an array for each budget."""

    x: np.ndarray  # (budgets,) log C about its mean
    inside: tuple  # (all runs,) which of them are near enough to the minimum to be of use: the others are left out of what follows
    places: tuple  # (runs,) log N about the law of the minima
    powers: tuple  # (runs, p) of the common terms
    weights: tuple  # (runs,) noise of a run over `noise`
    shape: np.ndarray  # (p,) coefficients of the common terms
    root: np.ndarray  # (p, q) of their covariance per unit of noise variance
    noise: float  # standard deviation of a run's log loss
    freedom: int
    residuals: np.ndarray  # pooled, of mean 0 and variance 1

    def least(self, variance: float, freedom: int) -> "Curves":
        """The curves with another estimate of the noise, its variance of a log loss, where their residuals are larger by more than
        chance; else as they are."""
        if not freedom or variance >= self.noise**2 * stats.f.ppf(CHANCE, freedom, self.freedom):
            return self
        return self.with_noise(variance, freedom)

    def with_noise(self, variance: float, freedom: int) -> "Curves":
        return replace(self, noise=math.sqrt(variance), freedom=freedom)

    def shapes(self, rng: np.random.Generator, resamples: int) -> tuple:
        """(shapes (resamples, p), scale of the noise (resamples, 1)); a shape with another minimum is the estimate instead."""
        scale = self.noise * np.sqrt(self.freedom / rng.chisquare(self.freedom, (resamples, 1)))
        shapes = self.shape + scale * (rng.standard_normal((resamples, self.root.shape[1])) @ self.root.T)
        odd = np.any([(shapes @ p.T < 0).any(1) for p in self.powers], axis=0)
        return np.where(odd[:, None], self.shape, shapes), scale

    def draw(self, rng: np.random.Generator, resamples: int) -> tuple:
        """(log losses of each budget's runs above the lowest of its curve [b](resamples, runs), scale of their noise (resamples,))."""
        shapes, scale = self.shapes(rng, resamples)
        pairs = zip(self.powers, self.weights, strict=True)
        losses = [shapes @ p.T + scale * w * rng.choice(self.residuals, (resamples, len(p))) for p, w in pairs]
        return losses, scale[:, 0]

    def rise(self, away: float, shapes: np.ndarray) -> np.ndarray:
        """Log loss (m, budgets) at log N = `away` from the minimum, above the minimum, of the curves of `shapes` (m, p); nan where a
        budget has no runs so far from it."""
        common = _common(np.full(len(self.x), away), self.x, len(self.shape), len(self.x) >= CHANGING)
        reached = np.array([v.min() <= away <= v.max() for v in self.places])
        return np.where(reached, shapes @ common.T, math.nan)


def at_minima(sizes: Sequence[np.ndarray], losses: Sequence[np.ndarray]) -> tuple:
    """(variance of a log loss, degrees of freedom) from each budget's lowest run and its neighbours; (nan, 0) where there are too few.
    The lowest being chosen, its noise is more often below than above, which makes this a little too large, not too small."""
    found = []
    for u, y in zip(sizes, losses, strict=True):
        places, which, count = np.unique(u, return_inverse=True, return_counts=True)
        y = np.bincount(which, y) / count
        low = int(y.argmin())
        if ASIDE <= low < len(places) - ASIDE:
            near = slice(low - ASIDE, low + ASIDE + 1)
            v = places[near] - places[low]
            weight = np.linalg.inv(v[:, None] ** np.arange(len(v)))[-1]  # of the power that a cubic does not have
            found.append((weight @ y[near]) ** 2 / (weight**2 / count[near]).sum())
    return (float(np.mean(found)), len(found)) if found else (math.nan, 0)


def smooth(
    log_c: np.ndarray,
    sizes: Sequence[np.ndarray],
    losses: Sequence[np.ndarray],
    start: np.ndarray,
    reach: float = 0.0,
) -> Curves | None:
    """The curves through `losses`, log loss (runs,) of each budget at `sizes`, log N (runs,); `start` (budgets,) is about where they are
    lowest. Runs as far as `reach` from there are not left out. None where the runs leave no degree of freedom or have no minimum."""
    away = [np.abs(u - m) for u, m in zip(sizes, start, strict=True)]
    farthest, best = max(a.max() for a in away), None
    for window in [w for w in WINDOWS if w * farthest >= reach]:
        inside = tuple(a <= window * farthest for a in away)
        near = [[v[i] for v, i in zip(values, inside, strict=True)] for values in (sizes, losses)]
        found = _widest(log_c - log_c.mean(), *near, start)
        if found is None:
            continue
        ratio = 0.0 if best is None or not best.noise else (found.noise / best.noise) ** 2
        if best is None or ratio < stats.f.ppf(CHANCE, found.freedom, best.freedom):
            best = replace(found, inside=inside)
    return best


def _widest(x, sizes, losses, start) -> Curves | None:
    """The curves of the highest degree that these runs allow and that have a minimum."""
    count = [len(np.unique(u)) for u in sizes]
    for degree in [d for least, d in DEGREES if np.median(count) >= least and min(count) >= DEGREES[-1][0]]:
        found = _centred(x, sizes, losses, start, degree)
        if found is not None:
            return found
    return None


def _centred(x, sizes, losses, centre, degree: int) -> Curves | None:
    """The curves about centres on a power law through their own minima."""
    for _ in range(ROUNDS):
        found = _fit(x, [u - m for u, m in zip(sizes, centre, strict=True)], losses, degree)
        if found is None:
            return None
        curves, off, bend = found
        move = np.polyval(np.polyfit(x, off, min(1, len(x) - 1), w=bend), x)
        if np.abs(move).max() < 1e-6:
            break
        centre = centre + move
    return curves if all(v.min() < 0 < v.max() for v in curves.places) else None


def _common(v: np.ndarray, x: np.ndarray, count: int, changing: bool) -> np.ndarray:
    """The `count` terms (n, p) that budgets share, of runs at v (n,) of budgets at x (n,)."""
    powers = v[:, None] ** np.arange(2, 2 + count // (1 + changing))
    return np.hstack([powers, powers * x[:, None]]) if changing else powers


def _fit(x, places, losses, degree: int) -> tuple | None:
    """(curves about these places, the minima's distance from there (budgets,), curvature (budgets,)) by least squares."""
    owner, ends = np.repeat(np.arange(len(x)), [len(v) for v in places]), np.cumsum([len(v) for v in places])[:-1]
    v, y = np.concatenate(places), np.concatenate(losses)
    own = (owner[:, None] == np.arange(len(x))).astype(float)
    changing = len(x) >= CHANGING
    common = _common(v, x[owner], (degree - 1) * (1 + changing), changing)
    design = np.hstack([own, own * v[:, None], common])
    lengths, freedom = np.sqrt((design**2).sum(0)), len(y) - design.shape[1]
    if freedom < 1 or not (lengths > 0).all():
        return None
    left, values, right = np.linalg.svd(design / lengths, full_matrices=False)
    if values[-1] < 1e-10 * values[0]:
        return None
    solve = right.T / values / lengths[:, None]  # (parameters, parameters): left' y -> coefficients
    solution = solve @ (left.T @ y)
    slope, shape = solution[len(x) : 2 * len(x)], solution[2 * len(x) :]
    bend, rise = shape[0] + (shape[degree - 1] * x if changing else 0 * x), common @ shape
    if not ((bend > 0).all() and (rise >= 0).all()):
        return None
    off, free = y - design @ solution, 1 - (left**2).sum(1)
    pooled = off[free > 0.01] / np.sqrt(free[free > 0.01])
    pooled = pooled - pooled.mean()
    curves = Curves(
        x=x,
        inside=(),
        places=tuple(places),
        powers=tuple(np.split(common, ends)),
        weights=tuple(np.split(np.exp(np.maximum(y.mean() - (y - off), 0.0)), ends)),
        shape=shape,
        root=solve[2 * len(x) :],
        noise=math.sqrt((off**2).sum() / freedom),
        freedom=freedom,
        residuals=pooled / max(pooled.std(), 1e-300),
    )
    return curves, -slope / (2 * bend), bend
