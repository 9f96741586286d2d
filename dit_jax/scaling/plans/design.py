"""Which runs to train next: the cells (budget, size) after which log N_opt at a target compute would be known best, within a cost.

The resamples of a fit are draws of all that its runs leave open: each has its own log N_opt at the target and its own loss y at any cell. A
run of a cell measures that loss with the noise sigma of a run, after which

    var(log N_opt | y) = var(log N_opt) - c' (S + sigma^2)^-1 c,   c = cov(y, log N_opt), S = cov(y)

(c-optimality: Atkinson, Donev & Tobias 2007, "Optimum Experimental Designs", chapter 10). Where the minima of budgets scatter by tau about
the law, cells of a new budget share that error, tau dy / dlog N; and of an old budget, whose minimum is known with variance v, more runs
lower v alone, so y counts there by v / (v + tau^2). The variance counts nothing of a law that bends.

A fit of budgets gets two more sizes at an old budget, one on either side of N_opt, or a new budget of 3 or 5: its level and bend cancel in
these. Other fits get single cells. Cells are added that lower the logarithm of the variance most per FLOP; again per square root of FLOPs,
and again whatever they cost; the best of the three sets is taken. Every cell is a new size at its budget.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dit_jax.error import UsageError
from dit_jax.scaling.fits.bootstrap import FEWEST
from dit_jax.scaling.fits.fit import Fit
from dit_jax.scaling.plans.overhead import one_size
from dit_jax.scaling.runs import Run

GRID = 24  # budgets looked at
APART = 0.1  # in log C: nearer budgets are one
NEAR = 0.15  # in log N: nearer sizes of a budget are one
FAR = 6.0  # times half the middle 68 %: resamples of log N_opt farther from the median are no guide to a variance
STEP = 0.05  # of log N, between which a slope is read
PRICES = (1.0, 0.5, 0.0)  # powers of the cost that a gain is divided by
# sizes that are looked at, in units of how far the runs reach from N_opt: at old budgets, at new ones, and those of single cells
PAIRS = tuple((-u, u) for u in (0.25, 0.5, 0.75, 1.0))
CURVES = ((-1.0, 0.0, 1.0), (-1.0, -0.5, 0.0, 0.5, 1.0))
SINGLE = tuple((u,) for u in np.linspace(-1.0, 1.0, 9).tolist())


@dataclass(frozen=True)
class Cell:
    """A run to train: C as the fit counts it, and N."""

    flops: float
    params: float


@dataclass(frozen=True)
class Proposal:
    """The cells to train next. Deviations are standard ones of log N_opt at `target`, from the noise of runs and the scatter of budgets."""

    target: float
    limit: float
    cells: tuple
    cost: float
    before: float
    after: float


def next_cells(
    fit: Fit,
    runs: Sequence[Run],
    target: float | int,
    limit: float | int,
    most: int = 12,
    real: Callable = lambda params: params,
) -> Proposal:
    """The cells to train next, at most `most` and for at most `limit` training FLOPs in all, each at most `target`.

    `real` is N -> N of a model that can be built. Raises UsageError for a fit that tells no loss of single sizes or has no resamples, and
    if the limit buys nothing.
    """
    variance, done = make_variance(fit, float(target)), [Cell(r.flops, r.params) for r in runs]
    options = [tuple(Cell(c, float(real(n))) for c, n in cells) for cells in _options(fit, float(target), float(limit))]
    options = [cells for cells in options if not _repeats(cells, done) and len(set(cells)) == len(cells)]
    cheapest = min(map(_cost, options), default=math.inf)
    if cheapest > limit or not any(len(cells) <= most for cells in options):
        raise UsageError(f"--next_flops: {limit:.3g} FLOPs buy no cell; the cheapest is {cheapest:.3g}")

    def greedy(price: float) -> tuple:
        chosen: tuple = ()
        while True:
            now, gains = variance(chosen), {}
            for cells in options:
                both = chosen + cells
                if _cost(both) <= limit and len(both) <= most and not _repeats(cells, chosen):
                    gains[cells] = math.log(now / variance(both)) / _cost(cells) ** price
            best = max(gains, key=gains.get, default=None)
            if best is None or gains[best] <= 0:
                return chosen
            chosen += best

    cells = tuple(sorted(min(map(greedy, PRICES), key=variance), key=lambda c: (c.flops, c.params)))
    before, after = (math.sqrt(variance(some)) for some in ((), cells))
    return Proposal(float(target), float(limit), cells, _cost(cells), before, after)


def _cost(cells) -> float:
    return sum((c.flops for c in cells), 0.0)


def _repeats(cells: Sequence[Cell], done: Sequence[Cell]) -> bool:
    """Whether one of `cells` is no new one."""
    pairs = ((math.log(a.flops / b.flops), math.log(a.params / b.params)) for a in cells for b in done)
    return any(abs(c) < APART / 2 and abs(n) < NEAR for c, n in pairs)


def make_variance(fit: Fit, target: float) -> Callable:
    """cells -> variance of log N_opt at the target after they are trained. Raises UsageError as `next_cells`."""
    unknown = one_size(fit)
    if unknown:
        raise UsageError(f"--next_flops: {unknown} and nothing of single runs; use another, such as isoflop or varpro")
    drawn = np.zeros(0)
    if fit.draws and fit.loss_draws is not None and fit.noise > 0:
        with np.errstate(all="ignore"):
            drawn = np.log(fit.draws["N_opt"](target))
    low, middle, high = np.nanquantile(drawn, [0.16, 0.5, 0.84]) if len(drawn) else (0.0, 0.0, 0.0)
    kept = np.abs(drawn - middle) <= FAR * (high - low) / 2
    if kept.sum() < FEWEST:
        raise UsageError(
            f"--next_flops: the fit has no resamples, expected runs that show their noise, and --resamples={FEWEST} or more"
        )
    aim, noise = drawn[kept] - drawn[kept].mean(), float(np.mean(fit.noise_draws[kept] ** 2))
    tau = fit.details.get("tau", 0.0)

    @functools.cache
    def told(cell: Cell) -> tuple:
        """(resamples of the loss less their mean, what a new budget's own N_opt adds to it)."""
        with np.errstate(all="ignore"):
            y = fit.loss_draws(cell.params, cell.flops / (fit.k * cell.params))[kept]
        y = np.where(np.isfinite(y), y - y[np.isfinite(y)].mean(), 0.0)
        old = [p.n_se**2 for p in fit.used if abs(math.log(p.flops / cell.flops)) < APART / 2]
        if old:
            return y * (old[0] / (old[0] + tau**2) if tau else 1.0), 0.0
        n = cell.params * np.exp([-STEP, STEP])
        low, high = (float(fit.loss(size, cell.flops / (fit.k * size))) for size in n.tolist())
        return y, tau * (high - low) / (2 * STEP)

    def variance(cells) -> float:
        y, own = np.array([told(c)[0] for c in cells]).reshape(-1, len(aim)), np.array([told(c)[1] for c in cells])
        budgets, shared = np.array([c.flops for c in cells]), y @ aim / len(aim)
        covariance = y @ y.T / len(aim) + noise * np.eye(len(cells))
        covariance += np.outer(own, own) * (budgets[:, None] == budgets)
        return max(float(np.mean(aim**2) - shared @ np.linalg.solve(covariance, shared)), 1e-30)

    return variance


def _options(fit: Fit, target: float, limit: float) -> list[tuple]:
    """Cells (C, N) that may be trained together, sizes as far from N_opt as those that were fitted."""
    law, flops = fit.laws["N_opt"], [r.flops for r in fit.runs]
    half = float(np.quantile([abs(math.log(r.params / law(r.flops))) for r in fit.runs], 0.9))
    old = [p.flops for p in fit.used]
    top = max(min(target, limit / 3 if old else limit), min(flops))
    new: list[float] = []
    for c in np.geomspace(min(flops), top, GRID).tolist():
        if all(abs(math.log(c / other)) > 2 * APART for other in (*old, *new)):
            new.append(c)
    tried = [(c, where) for c in new for where in (CURVES if old else SINGLE)]
    tried += [(c, where) for c in old if c <= target for where in PAIRS]
    return [tuple((c, float(law(c) * math.exp(half * u))) for u in where) for c, where in tried]
