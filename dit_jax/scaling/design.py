"""Which runs to train next: the cells (budget, size) after which log N_opt at a target compute would be known best, within a cost.

The variance is that of the fit's own estimator, linearised, in units of a run's noise variance (locally optimal design: Chernoff 1953,
Annals of Mathematical Statistics 24; Atkinson, Donev & Tobias 2007, "Optimum Experimental Designs", chapter 10 for one function of the
parameters, c-optimality). It knows what more runs average away, and nothing of a law that bends.

* isoFLOP: each budget's vertex has the delta-method variance of its parabola, taken at the law's N_opt with the median curvature; the law
  through the vertices is least squares weighted by it, and its variance at the target follows.
* surfaces: g' (J'J)^-1 g with the derivatives J of the residuals and g of log N_opt by the parameters (the delta method).

Cells are added one by one (a new budget with 3 or 5 sizes at once, since fewer make no parabola), each time the one that lowers the
logarithm of the variance most per FLOP; again per square root of FLOPs, and again whatever it costs. The best of the three sets is
taken. Every cell is a new size at its budget: the optimum on paper repeats few cells many times, which tests nothing of the law's shape.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dit_jax.error import UsageError
from dit_jax.scaling.fit import Fit, IsoflopFit
from dit_jax.scaling.runs import Run
from dit_jax.scaling.study import SurfaceFit, quantities

GRID = 24  # budgets looked at
APART = 0.1  # in log C: nearer budgets are one
NEAR = 0.15  # in log N: nearer sizes of a budget are one
PRICES = (1.0, 0.5, 0.0)  # powers of the cost that a gain is divided by
ACROSS = np.linspace(
    -1.0, 1.0, 9
)  # sizes of a budget that are looked at, in units of how far the runs reach from N_opt
SMALL = 1e-5  # step of a central difference


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
    gain: float  # fall of the logarithm of the variance per FLOP


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
    """The cells to train next, at most `most` and for at most `limit` FLOPs in all, each at most `target`.

    `real` is N -> N of a model that can be built. Raises UsageError for methods without a variance of single runs, and where the limit
    buys nothing.
    """
    if isinstance(fit, IsoflopFit):
        variance, options = _isoflop(fit, float(target)), _isoflop_options(fit, float(target), float(limit))
    elif isinstance(fit, SurfaceFit):
        variance, options = _surface(fit, float(target)), _surface_options(fit, runs, float(target), float(limit))
    else:
        raise UsageError(
            f"--next_flops: method {fit.method} says nothing of single runs; use isoflop, surface, varpro or gadre"
        )
    now = variance(())
    if not (fit.noise > 0 and math.isfinite(now)):
        raise UsageError("--next_flops: the noise of a run is not known, so neither is what another run would tell")
    done = [Cell(r.flops, r.params) for r in runs]
    options = [tuple(Cell(c.flops, float(real(c.params))) for c in cells) for cells in options]
    options = [cells for cells in options if not _repeats(cells, done) and len(set(cells)) == len(cells)]
    if not options:
        raise UsageError("--next_flops: every cell that could be tried has been trained")
    ranking = [
        _option(cells, variance, fit.noise, now) for cells in options if _cost(cells) <= limit and len(cells) <= most
    ]
    if not ranking:
        raise UsageError(f"--next_flops: {limit:.3g} FLOPs buy no cell; the cheapest is {min(map(_cost, options)):.3g}")
    sets = [_greedy(options, variance, float(limit), most, price) for price in PRICES]
    cells = min(sets, key=variance)
    return Proposal(
        target=float(target),
        limit=float(limit),
        cells=tuple(sorted(cells, key=lambda c: (c.flops, c.params))),
        cost=_cost(cells),
        before=fit.noise * math.sqrt(now),
        after=fit.noise * math.sqrt(variance(cells)),
        ranking=tuple(sorted(ranking, key=lambda o: -o.gain)),
        variance=variance,
    )


def _cost(cells) -> float:
    return sum((c.flops for c in cells), 0.0)


def _option(cells: tuple, variance: Callable, noise: float, now: float) -> Option:
    after, cost = variance(cells), _cost(cells)
    return Option(cells, cost, noise * math.sqrt(after), math.log(now / after) / cost)


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


def _isoflop(fit: IsoflopFit, target: float) -> Callable:
    """cells -> variance of log N_opt at the target, per unit of a run's noise variance."""
    law = fit.laws["N_opt"]
    known = [(math.log(b.flops), b.curve.log_n - math.log(law(b.flops))) for b in fit.used]
    aim = np.array([1.0, math.log(target)])

    def variance(cells) -> float:
        budgets = [(c, list(u)) for c, u in known]
        for cell in cells:
            c, u = math.log(cell.flops), math.log(cell.params / law(cell.flops))
            near = next((sizes for at, sizes in budgets if abs(at - c) < APART / 2), None)
            if near is None:
                budgets.append((c, [u]))
            else:
                near.append(u)
        matrix = np.zeros((2, 2))
        for c, sizes in budgets:
            x = np.array([1.0, c])
            matrix += _precision(np.array(sizes), fit.curvature) * np.outer(x, x)
        return float(aim @ np.linalg.solve(matrix, aim))

    return variance


def _precision(u: np.ndarray, curvature: float) -> float:
    """1 / variance of a vertex at u = 0 from runs at u, per unit of noise variance; 0 where they make no parabola around it."""
    if len(np.unique(np.round(u, 6))) < 3 or not u.min() < 0 < u.max():
        return 0.0
    basis = np.stack([np.ones_like(u), u, u**2], axis=1)
    return float(4 * curvature**2 / np.linalg.inv(basis.T @ basis)[1, 1])


def _isoflop_options(fit: IsoflopFit, target: float, limit: float) -> list[tuple]:
    """One more run at a budget there is, or a new budget of 3 or 5 sizes, as wide as the budgets are."""
    law = fit.laws["N_opt"]
    half = float(np.median([np.ptp(b.curve.log_n) for b in fit.used])) / 2
    old = [b.flops for b in fit.used]

    def cells(c: float, where) -> tuple:
        return tuple(Cell(c, float(law(c) * math.exp(half * u))) for u in where)

    found = [cells(c, [u]) for c in old for u in ACROSS if c <= target]
    for c in _budgets(old[0], max(min(target, limit / 3), old[0]), old):
        found += [cells(c, (-1.0, 0.0, 1.0)), cells(c, (-1.0, -0.5, 0.0, 0.5, 1.0))]
        found += [
            cells(c, [u]) for u in (-1.0, 0.0, 1.0)
        ]  # more runs there, once it is chosen: alone they gain nothing
    return found


def _budgets(low: float, high: float, old: Sequence[float]) -> list[float]:
    """New budgets, evenly spread in log C, none near an old one."""
    grid = np.geomspace(low, high, GRID).tolist()
    found: list[float] = []
    for c in grid:
        if all(abs(math.log(c / other)) > 2 * APART for other in [*old, *found]):
            found.append(c)
    return found


def _surface(fit: SurfaceFit, target: float) -> Callable:
    """As `_isoflop`, for residuals of log loss (of the loss over its mean where the fit takes linear ones)."""
    design, theta = fit.design, fit.theta
    free = np.diag(fit.covariance) > 0 if fit.covariance is not None else np.ones(len(theta), bool)
    aim = _slope(lambda t: np.log(quantities(design, fit.k, target)(t)["N_opt"][0]), theta)[free]
    known = _rows(fit, [(n, d) for n, d in _where(fit)])[:, free]
    scale = math.exp(design.centre[2]) if design.residual == "log" else 1.0

    @functools.cache
    def row(cell: Cell) -> np.ndarray:
        return _rows(fit, [(cell.params, cell.flops / (fit.k * cell.params))])[0, free]

    information = known.T @ known
    information += 1e-12 * np.trace(information) / len(information) * np.eye(len(information))

    def variance(cells) -> float:
        matrix = information + sum(np.outer(row(c), row(c)) for c in cells)
        return float(aim @ np.linalg.solve(matrix, aim)) / scale**2

    return variance


def _where(fit: SurfaceFit) -> list[tuple]:
    """(N, D) of the runs that were fitted, from the terms of their problem."""
    terms, centre = fit.design.problem.terms, fit.design.centre
    log_n, log_d = centre[0] - terms[1, :, 3], centre[1] - terms[2, :, -1]
    return list(zip(np.exp(log_n).tolist(), np.exp(log_d).tolist(), strict=True))


def _rows(fit: SurfaceFit, at: list) -> np.ndarray:
    """Derivatives (n, p) of the residuals of runs at (N, D)."""
    n, d = (np.array(v) for v in zip(*at, strict=True))
    linear = fit.design.residual == "linear"

    def residual(theta: np.ndarray) -> np.ndarray:
        law = fit.design.law(theta[:, None, :])(n, d)
        return law if linear else np.log(law)

    return _slope(residual, fit.theta)


def _slope(function: Callable, theta: np.ndarray) -> np.ndarray:
    """Derivatives (..., p) of function: theta (m, p) -> (m, ...), by central differences."""
    step = SMALL * np.eye(len(theta))
    up, down = function(theta + step), function(theta - step)
    return np.moveaxis((up - down) / (2 * SMALL), 0, -1)


def _surface_options(fit: SurfaceFit, runs: Sequence[Run], target: float, limit: float) -> list[tuple]:
    """Single runs at budgets and sizes as far from N_opt as those that were fitted."""
    law, flops = fit.laws["N_opt"], [r.flops for r in runs]
    half = float(np.quantile([abs(math.log(r.params / law(r.flops))) for r in runs], 0.9))
    top = max(min(target, limit), min(flops))
    return [
        (Cell(c, float(law(c) * math.exp(half * u))),)
        for c in np.geomspace(min(flops), top, GRID).tolist()
        for u in ACROSS
    ]
