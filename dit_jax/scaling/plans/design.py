"""Which runs to train next: the cells (budget, size) after which log N_opt at a target compute would be known best, within a cost.

The resamples of a fit are draws of all that its runs leave open: each has its own log N_opt at the target and its own loss at any cell. A
run of a cell measures that loss with the noise of a run, sigma. What is then known of log N_opt is its linear regression on the losses y,

    var(log N_opt | y) = var(log N_opt) - c' (S + sigma^2)^-1 c,   c = cov(y, log N_opt), S = cov(y)

(c-optimality: Atkinson, Donev & Tobias 2007, "Optimum Experimental Designs", chapter 10; linearised as by Chernoff 1953, Annals of
Mathematical Statistics 24). The variance counts the noise of runs, and nothing of a law that bends.

A fit that is made of budgets gets two more sizes at an old budget, one on either side of N_opt, or a new budget of 3 or 5: the level and
the bend of a budget, which such a fit finds anew for each, cancel in these. Other fits get single cells. Cells are added that lower the
logarithm of the variance most per FLOP; again per square root of FLOPs, and again whatever they cost. The best of the three sets is taken.
Every cell is a new size at its budget: the optimum on paper repeats few cells many times, which tests nothing of the law's shape.
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
LEAST = 1e-30  # variance that is none
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
class Option:
    """Cells that are trained together, and how much they alone would lower the standard deviation of log N_opt."""

    cells: tuple
    cost: float
    deviation: float  # after them
    gain_per_flop: float  # fall of the logarithm of the variance per FLOP


@dataclass(frozen=True)
class Proposal:
    """The cells to train next. Deviations are standard ones of log N_opt at `target`, from the noise of runs alone."""

    target: float
    limit: float
    cells: tuple
    cost: float
    before: float
    after: float
    ranking: tuple  # Options, the best per FLOP first
    variance: Callable  # cells -> variance of log N_opt at the target


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
    variance, done = _variance(fit, float(target)), [Cell(r.flops, r.params) for r in runs]
    options = [tuple(Cell(c, float(real(n))) for c, n in cells) for cells in _options(fit, float(target), float(limit))]
    options = [cells for cells in options if not _repeats(cells, done) and len(set(cells)) == len(cells)]
    if not options:
        raise UsageError("--next_flops: every cell that could be tried has been trained")
    now, ranking = variance(()), []
    for cells in options:
        if _cost(cells) <= limit and len(cells) <= most:
            after = variance(cells)
            ranking.append(Option(cells, _cost(cells), math.sqrt(after), math.log(now / after) / _cost(cells)))
    if not ranking:
        raise UsageError(f"--next_flops: {limit:.3g} FLOPs buy no cell; the cheapest is {min(map(_cost, options)):.3g}")
    cells = min((_greedy(options, variance, float(limit), most, price) for price in PRICES), key=variance)
    return Proposal(
        target=float(target),
        limit=float(limit),
        cells=tuple(sorted(cells, key=lambda c: (c.flops, c.params))),
        cost=_cost(cells),
        before=math.sqrt(now),
        after=math.sqrt(variance(cells)),
        ranking=tuple(sorted(ranking, key=lambda o: -o.gain_per_flop)),
        variance=variance,
    )


def _cost(cells) -> float:
    return sum((c.flops for c in cells), 0.0)


def _greedy(options: list, variance: Callable, limit: float, most: int, price: float) -> tuple:
    """Options added one by one."""
    chosen, now = (), variance(())
    while True:
        best, value, found = None, 0.0, now
        for cells in options:
            over = _cost(chosen) + _cost(cells) > limit or len(chosen) + len(cells) > most
            if over or _repeats(cells, chosen):
                continue
            after = variance(chosen + cells)
            gain = math.log(now / after) / _cost(cells) ** price
            if gain > value:
                best, value, found = cells, gain, after
        if best is None:
            return chosen
        chosen, now = chosen + best, found


def _repeats(cells: Sequence[Cell], done: Sequence[Cell]) -> bool:
    """Whether one of `cells` is no new one."""
    return any(
        abs(math.log(a.flops / b.flops)) < APART / 2 and abs(math.log(a.params / b.params)) < NEAR
        for a in cells
        for b in done
    )


def _variance(fit: Fit, target: float) -> Callable:
    """cells -> variance of log N_opt at the target after they are trained."""
    unknown = one_size(fit)
    if unknown:
        raise UsageError(f"--next_flops: {unknown} and nothing of single runs; use another, such as isoflop or varpro")
    if not fit.draws or fit.loss_draws is None or not fit.noise > 0:
        raise UsageError(
            f"--next_flops: the fit has no resamples, expected runs that show their noise, and --resamples={FEWEST} or more"
        )
    with np.errstate(all="ignore"):
        drawn = np.log(fit.draws["N_opt"](target))
        low, middle, high = np.nanquantile(drawn, [0.16, 0.5, 0.84])
        kept = np.abs(drawn - middle) <= FAR * (high - low) / 2
    if kept.sum() < FEWEST:
        raise UsageError(f"--next_flops: {kept.sum()} resamples have an N_opt, expected {FEWEST} or more (--resamples)")
    aim, noise = drawn[kept] - drawn[kept].mean(), float(np.mean(fit.noise_draws[kept] ** 2))

    @functools.cache
    def losses(cell: Cell) -> np.ndarray:
        with np.errstate(all="ignore"):
            found = fit.loss_draws(cell.params, cell.flops / (fit.k * cell.params))[kept]
        known = np.isfinite(found)
        return np.where(known, found - found[known].mean(), 0.0) if known.any() else np.zeros(len(found))

    def variance(cells) -> float:
        y = np.stack([losses(c) for c in cells]) if cells else np.zeros((0, len(aim)))
        covariance = y @ y.T / len(aim) + noise * np.eye(len(cells))
        shared = y @ aim / len(aim)
        return max(float(np.mean(aim**2) - shared @ np.linalg.solve(covariance, shared)), LEAST)

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
