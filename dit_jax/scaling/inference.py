"""Intervals of the parametric fits: cluster bootstrap, delta method, profile likelihood, and how well the data condition the law.

The unit is the run: rows of one run (checkpoints of one training) are drawn together and share their errors. Bootstrap draws of a least-
squares fit are stretched about the estimate by sqrt(n / (n - p)) t / z for n runs and p parameters, which undoes the shrinking of residuals
that p fitted parameters cause and widens few runs' percentiles to Student's t; without it, percentiles of a small study cover too rarely.
What is stretched are the draws' losses at the runs, not their parameters: see `stretched`.
Those of a Huber fit of small delta are not: it passes through p runs in each resample, which widens its draws enough by itself. Drawn
with replacement they would be too wide (97.3 to 98 % of the studies covered for 95), so there the runs' weights are drawn from a Dirichlet
distribution (the Bayesian bootstrap of Rubin 1981), which leaves none out: 95.7 to 96.7 %. Draws of few training curves, of several rows
each, are stretched by what they need beyond 40 curves (`stretch_robust`).

The delta method of squares takes the noise as a power of the loss between none and one (`noise`), whichever of the two the residuals are
of: a fit of losses whose noise is a share of them, taken for even, covered an exponent in 92.4 %.

For a Huber loss the variance is that of an M-estimator (Huber 1964), E[psi^2] / E[psi']^2 (J'J)^-1. E[psi'], the share of residuals within
delta, is counted in a window no narrower than the scatter of the residuals allows (Powell 1991), since delta is often narrower.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from dit_jax.scaling import newton
from dit_jax.scaling.noise import power

POINTS = 33  # of a profile, in each of its rounds
ENOUGH = 40  # runs from which on the draws of a Huber fit cover as they are
FARTHEST = 1.0  # of the logarithm of a law's loss at a run from the estimate's, once stretched
LIFT = 18.0  # above the lower bound: where a search may leave a term that is nothing


@dataclass(frozen=True)
class Profile:
    """Profile likelihood of the irreducible loss: the lowest loss of the fit at each E, and the interval of E that it allows."""

    E: np.ndarray
    deviance: np.ndarray  # times the noise variance allows; its square root is in standard errors
    threshold: float
    interval: tuple


@dataclass(frozen=True)
class Conditioning:
    """Condition numbers of the fit's normal matrix, columns scaled to unit length; 1 is best, 1e16 is no information in float64."""

    customary: float  # in (log E, log A, log B, alpha, beta), as the law is written
    centred: float  # about the means of log N and log D, as it is searched
    exponents: float  # of the exponents alone, the rest projected out
    correlated: tuple  # the two parameters most correlated, and their correlation


def clusters(runs) -> np.ndarray:
    """The cluster (n,) of each run, counted from 0: rows of one name are one run, a row without a name is its own."""
    found: dict = {}
    return np.array([found.setdefault((r.name, r.params) if r.name else id(r), len(found)) for r in runs])


def stretch(count: int, freedom: int, level: float) -> float:
    """By how much bootstrap draws are moved away from the estimate."""
    tail = (1 + level) / 2
    return math.sqrt(count / freedom) * stats.t.ppf(tail, freedom) / stats.norm.ppf(tail)


def stretch_robust(count: int, rows: int, freedom: int, level: float) -> float:
    """The same of a Huber fit: of runs of several rows, as much more than ENOUGH runs need, where there are fewer; of single rows none."""
    if count == rows:
        return 1.0
    enough = stretch(ENOUGH, ENOUGH - count + freedom, level)
    return max(stretch(count, freedom, level) / enough, 1.0)


def resample(problem: newton.Problem, theta, groups, resamples: int, seed: int, level: float) -> tuple:
    """(stretched estimates of as many resamples of the clusters as determine the law, how many did not)."""
    count, width = int(groups.max()) + 1, problem.width
    rng, robust = np.random.default_rng(seed), math.isfinite(problem.delta)
    if robust:
        drawn = count * rng.dirichlet(np.ones(count), resamples)
    else:
        drawn = rng.multinomial(count, np.full(count, 1 / count), resamples).astype(float)
    enough = (drawn > 0).sum(1) >= width
    weight = drawn[enough][:, groups]
    start = lifted(problem, theta)
    found = newton.minimize(problem, np.tile(start, (len(weight), 1)), weight)
    kept = found.theta[np.isfinite(found.theta).all(1)]
    freedom = count - width
    factor = stretch_robust(count, len(groups), freedom, level) if robust else stretch(count, freedom, level)
    return stretched(problem, theta, kept, factor), resamples - len(kept)


def stretched(problem: newton.Problem, theta: np.ndarray, draws: np.ndarray, factor: float) -> np.ndarray:
    """Draws (m, p) moved away from theta by `factor`: the losses of their laws at the runs are, and laws are fitted to these anew.

    Near the estimate that moves the parameters by the same factor. Far from it, and at bounds, every draw remains a law of terms of at
    least 0, with E no higher than the lowest of the losses; parameters moved by themselves would be a law far from all runs.
    """
    if factor == 1 or not len(draws):
        return draws
    law, drawn = (newton.residuals(replace(problem, linear=False), t) for t in (theta[None], draws))
    away = np.clip(factor * (drawn - law), -FARTHEST, FARTHEST)
    upper = problem.upper.copy()
    upper[0] = max(theta[0], problem.log_loss.min())
    squares = replace(problem, delta=math.inf, upper=upper)
    return newton.minimize(squares, draws, log_loss=problem.log_loss + law + away).theta


def lifted(problem: newton.Problem, theta: np.ndarray) -> np.ndarray:
    """theta with its vanished terms raised to where their slopes can be felt."""
    return np.where(coefficients(problem), np.maximum(theta, problem.lower + LIFT), theta)


def coefficients(problem: newton.Problem) -> np.ndarray:
    """Which parameters (p,) are logarithms of coefficients, the others being exponents."""
    return problem.lower < -LIFT / 2


def vanished(problem: newton.Problem, theta: np.ndarray) -> np.ndarray:
    """Which parameters (p,) are at their lower bound: a coefficient so small that its term is nothing, or an exponent of 0."""
    return theta <= problem.lower + np.where(coefficients(problem), LIFT / 2, 1e-9)


def percentiles(values: dict, level: float) -> dict:
    """Name -> the central interval of its draws."""
    tail = (1 - level) / 2
    with np.errstate(invalid="ignore"):  # of a law that is not determined some draws are infinite
        return {name: tuple(np.quantile(v, [tail, 1 - tail]).tolist()) for name, v in values.items()}


def curvature(problem: newton.Problem, theta: np.ndarray) -> tuple:
    """(derivatives (n, p), scores psi (n,), the share of residuals that pull with full force E[psi'])."""
    r = newton.residuals(problem, theta[None])[0]
    psi = np.clip(r, -problem.delta, problem.delta)
    inside = 1.0
    if math.isfinite(problem.delta):
        spread = np.median(np.abs(r)) / 0.6745 * math.sqrt(len(r) / max(len(r) - problem.width, 1))
        window = max(problem.delta, 1.06 * spread * len(r) ** -0.2)
        near = np.sum(np.abs(r) <= window) - problem.width  # as many as there are parameters are fitted exactly
        inside = max(near, 1) / max(len(r) - problem.width, 1) * problem.delta / window
    return newton.jacobian(problem, theta), psi, inside


def covariance(problem: newton.Problem, theta: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Covariance (p, p) of the estimate; parameters at a bound are taken as known."""
    slope, psi, inside = curvature(problem, theta)
    count, width = int(groups.max()) + 1, problem.width
    free = ~vanished(problem, theta) & (theta < problem.upper)
    bread = np.linalg.pinv(slope[:, free].T @ slope[:, free], hermitian=True) / inside
    if count < len(groups):
        scores = np.zeros((count, free.sum()))
        np.add.at(scores, groups, psi[:, None] * slope[:, free])
        middle = scores.T @ scores * count / max(count - width, 1)
    else:
        middle = slope[:, free].T @ (_variance(problem, theta, psi)[:, None] * slope[:, free])
    out = np.zeros((width, width))
    out[np.ix_(free, free)] = bread @ middle @ bread
    return out


def _variance(problem: newton.Problem, theta: np.ndarray, psi: np.ndarray) -> np.ndarray:
    """Variance (n,) of the scores psi of independent runs: of squares by a power of the law's loss, of a Huber loss the same for all."""
    count = len(psi)
    if math.isfinite(problem.delta):
        return np.full(count, (psi**2).sum() / max(count - problem.width, 1))
    log_law = np.log(np.exp(problem.log_loss) + psi) if problem.linear else problem.log_loss + psi
    unit = np.ones(count) if problem.linear else np.exp(log_law)
    free = np.full(count, max(count - problem.width, 1) / count)
    return power((psi * unit) ** 2, log_law, free).variance / unit**2


def delta(quantities, theta: np.ndarray, matrix: np.ndarray, freedom: int, level: float) -> dict:
    """Delta-method intervals of `quantities`: theta (m, p) -> name -> (values (m,), "log" where the interval is taken of the logarithm).

    Derivatives are central differences of closed forms.
    """
    width, small = len(theta), 1e-5
    points = np.concatenate([theta[None], theta + small * np.eye(width), theta - small * np.eye(width)])
    half = stats.t.ppf((1 + level) / 2, freedom)
    out = {}
    with np.errstate(all="ignore"):  # of a law that is not determined some are infinite, and their intervals nan
        for name, (values, scale) in quantities(points).items():
            log = scale == "log" and values[0] > 0
            values = np.log(values) if log else values
            slope = (values[1 : width + 1] - values[width + 1 :]) / (2 * small)
            error = half * np.sqrt(np.maximum(slope @ matrix @ slope, 0.0))
            ends = values[0] - error, values[0] + error
            out[name] = tuple(float(np.exp(min(e, 700.0)) if log else e) for e in ends)
    return out


def profile(problem: newton.Problem, theta: np.ndarray, loss: float, scale: float, freedom: int, level: float):
    """Profile of the first parameter, log E: the other parameters fitted anew at each E, `scale` = the mean loss.

    Twice the rise of the loss over the noise variance is compared with the F distribution of 1 and `freedom` degrees (for squares this is
    the exact test of one linear parameter; for Huber losses the likelihood-ratio-type test of Ronchetti 1982).
    """
    _, psi, inside = curvature(problem, theta)
    variance = (psi**2).sum() / freedom / inside
    threshold = float(stats.f.ppf(level, 1, freedom))
    best, top = math.exp(theta[0]), math.exp(problem.log_loss.min())
    if loss <= 1e-20 * len(psi):
        return Profile(np.array([best * scale]), np.zeros(1), threshold, (best * scale, best * scale))

    def deviance(E):
        start = np.tile(lifted(problem, theta), (len(E), 1))
        start[:, 0] = np.log(np.maximum(E, math.exp(problem.lower[0])))
        fixed = np.arange(problem.width) == 0
        return 2 * (newton.minimize(problem, start, fixed=fixed).loss - loss) / variance

    grid = np.unique(np.append(np.linspace(0, 0.9999 * top, POINTS), min(best, 0.9999 * top)))
    rise = deviance(grid)
    ends = [_crossing(grid, rise, deviance, best, threshold, side) for side in (-1, 1)]
    return Profile(grid * scale, rise, threshold, (ends[0] * scale, ends[1] * scale))


def _crossing(grid, rise, deviance, best: float, threshold: float, side: int) -> float:
    """Where the profile first exceeds the threshold on one side of the best, or the last point of that side."""
    for _ in range(3):
        chosen = (grid - best) * side >= 0
        E, up = grid[chosen][::side], rise[chosen][::side]
        above = np.flatnonzero(up > threshold)
        if not len(above):
            return float(E[-1]) if len(E) else best
        j = above[0]
        if j == 0:
            return float(E[0])
        low, high = (E[j - 1], up[j - 1]), (E[j], up[j])
        grid = np.sort(np.linspace(low[0], high[0], 9))
        rise = deviance(grid)
        found = low[0] + (high[0] - low[0]) * (threshold - low[1]) / (high[1] - low[1])
    return float(found)


def conditioning(problem: newton.Problem, theta: np.ndarray, centre: tuple, names: tuple) -> Conditioning:
    """How well the runs determine each direction of the parameters, at `theta`."""
    slope = newton.jacobian(problem, theta)
    moved = slope.copy()
    moved[:, 3] -= centre[0] * slope[:, 1]
    moved[:, -1] -= centre[1] * slope[:, 2]
    rest, _ = np.linalg.qr(slope[:, :3])
    alone = slope[:, 3:] - rest @ (rest.T @ slope[:, 3:])
    normal = np.linalg.pinv(slope.T @ slope, hermitian=True)
    error = np.sqrt(np.maximum(np.diag(normal), 1e-300))
    shared = np.abs(np.triu(normal / np.outer(error, error), 1))
    i, j = np.unravel_index(shared.argmax(), shared.shape)
    value = float((normal / np.outer(error, error))[i, j])
    return Conditioning(_condition(moved), _condition(slope), _condition(alone), (names[i], names[j], value))


def _condition(columns: np.ndarray) -> float:
    lengths = np.sqrt((columns**2).sum(0))
    if not (lengths > 0).all():
        return math.inf
    values = np.linalg.svd(columns / lengths, compute_uv=False)
    return float((values[0] / values[-1]) ** 2) if values[-1] > 0 else math.inf
