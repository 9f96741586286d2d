"""What an image costs against how good it is: the Pareto front, the best model at each cost, and where it changes.

Mei et al. 2024 (arXiv 2404.01367): at a small sampling cost smaller models win. The cost of an image is FLOPs of one call x
calls x passes of guidance (or measured seconds). Peebles & Xie 2023 (arXiv 2212.09748), Fig. 10: more sampling compute does
not buy back a smaller model; with a number of images to serve, training and sampling share one total.

The curve of a model is its best score within a cost, over all its samplers, steps and guidances; between the costs that were
tried it is straight in log-log, below the cheapest it does not exist, above the dearest it stays. A smaller model stops winning at
the last cost where it leads the model that follows it. Intervals redraw every score within its own error and repeat all of it, the
choice of guidance included; scores without an error give none. No law of steps is assumed. `serve` adds training, among the trained
models; `scaling plan --images_served` asks the laws which model would be best.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dit_jax.error import UsageError
from dit_jax.scaling.fits.fit import NO_INTERVAL
from dit_jax.scaling.frontier.choice import Choice, lowest, one_guidance, sampling_key
from dit_jax.scaling.frontier.points import Point, all_training, higher_is_better

UNITS = {"flops": "FLOPs an image", "seconds": "seconds an image"}  # of a cost, in words
GRID = 4001  # costs, evenly in the logarithm, at which the best model is looked for


@dataclass(frozen=True)
class Handover:
    """Where `model` stops winning to `then`. `cost` is nan with `never`; `interval` may end at inf (never, within the data)."""

    model: str
    then: str
    cost: float
    interval: tuple
    censored: bool  # `then` wins from its cheapest sampling on: with fewer steps it might win earlier


@dataclass(frozen=True)
class Winner:
    """The best model from cost `low` to cost `high`. `share`: of the resamples, at the middle of the range; nan without."""

    model: str
    low: float
    high: float
    share: float


@dataclass(frozen=True)
class Frontier:
    """`choices`: the best guidance of every (model, sampler, steps, spacing) and cost; `front`: the points that no other
    point beats in both cost and score, by cost; `front_shares`: in how many of the resamples each is on the front."""

    metric: str
    higher: bool  # more is better
    unit: str  # of cost: "flops" | "seconds", of one image
    level: float
    choices: tuple
    front: tuple
    front_shares: tuple
    winners: tuple
    handovers: tuple
    costs: dict  # model -> the costs tried (k,)
    curves: dict  # model -> its score at those costs, resampled (1 + resamples, k)
    warnings: tuple

    def logs(self, costs: Sequence | np.ndarray) -> np.ndarray:
        """log score of every model at these costs (1 + resamples, models, costs), inf below its cheapest; negative where more is better."""
        sign, at = -1.0 if self.higher else 1.0, np.log(np.asarray(costs, float))
        return np.stack([_at(np.log(x), sign * np.log(self.curves[m]), at) for m, x in self.costs.items()], axis=1)

    def best(self, cost: float | int) -> tuple:
        """(model, its score, share of the resamples in which it is best) with at most this cost an image; None below all."""
        sign, table = -1.0 if self.higher else 1.0, self.logs([cost])[:, :, 0]
        if not np.isfinite(table[0]).any():
            return None, math.nan, math.nan
        winner = int(np.argmin(table[0]))
        return list(self.costs)[winner], math.exp(sign * table[0, winner]), _share(table[1:], winner)


def _share(drawn: np.ndarray, winner: int) -> float:
    """How often column `winner` is the lowest; nan without resamples."""
    return float(np.mean(np.argmin(drawn, axis=1) == winner)) if len(drawn) else math.nan


def cost_of(point: Point, unit: str) -> float | int:
    """FLOPs or seconds of one image. Raises UsageError where they are not recorded."""
    cost = getattr(point, unit)
    if math.isnan(cost):
        name = {"flops": "flops_sample", "seconds": "seconds_sample"}[unit]
        raise UsageError(f"{point.source}: no {name} of {point.name}, expected the {unit} of one sampled image")
    return cost


def fit_frontier(
    points: Sequence[Point],
    metric: str,
    *,
    unit: str = "flops",
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Frontier:
    """The frontier of `points` (of `load_points`) over the cost of an image in `unit`: "flops" or "seconds"."""
    costs = np.array([cost_of(p, unit) for p in points])
    higher, known = higher_is_better(metric, points), any(p.score_se for p in points)
    drawn = _log_scores(points, higher, resamples if known else 0, seed)
    # Guidance 1 takes one pass, any other two: a choice is made among equal costs, so that the cheaper one stays in the race.
    found = lowest(points, [(*sampling_key(p), c) for p, c in zip(points, costs, strict=True)], higher)
    curves = {name: _curve(points, costs, drawn, name) for name in _by_size(points, costs)}
    front, shares = _front(costs, drawn)
    winners = _winners(curves)
    stops = _handovers(winners, curves, level, known)
    sign = -1.0 if higher else 1.0
    return Frontier(
        metric=metric,
        higher=higher,
        unit=unit,
        level=level,
        choices=tuple(found),
        front=tuple(points[i] for i in front),
        front_shares=tuple(shares[i] for i in front),
        winners=tuple(winners),
        handovers=tuple(stops),
        costs={name: np.exp(x) for name, (x, _) in curves.items()},
        curves={name: np.exp(sign * y) for name, (_, y) in curves.items()},
        warnings=_warnings(points, found, known, len(curves)),
    )


def _log_scores(points: Sequence[Point], higher: bool, resamples: int, seed: int) -> np.ndarray:
    """log score of the points (1 + resamples, points), negative where more is better: lower is always better.

    Row 0 is what was measured; in the others each score is redrawn within its own error, log-normally.
    """
    log = np.log([p.score for p in points]) * (-1.0 if higher else 1.0)
    relative = np.array([p.score_se / p.score for p in points])
    drawn = np.random.default_rng(seed).standard_normal((resamples, len(points)))
    return np.concatenate([log[None], log + relative * drawn])


def _warnings(points, found: list[Choice], known: bool, models: int) -> tuple:
    edges, said = {sampling_key(c.best): c for c in found if c.edge}, []
    if edges:
        first, many = next(iter(edges.values())), len({sampling_key(c.best) for c in found})
        said.append(
            f"the best guidance is at the edge of those tried in {len(edges)} of {many} samplings (the first: "
            f"{first.best.name}, {first.best.sampling}, the {first.edge}); the best one may lie beyond"
        )
    said.append(one_guidance(found))
    if not known:
        said.append("no score has an error (METRIC_se, or METRIC_low and METRIC_high): there are no intervals")
    elif not all(p.score_se for p in points):
        said.append("some scores have no error: the intervals take those for exact")
    if models < 2:
        said.append("one model only: nothing can stop winning")
    return tuple(text for text in said if text)


def _by_size(points: Sequence[Point], costs: np.ndarray) -> list[str]:
    """Names of the models, by parameters where all are known, else by their cheapest image."""
    known = not any(math.isnan(p.params) for p in points)
    size: dict = {}
    for p, cost in zip(points, costs, strict=True):
        size[p.name] = min(p.params if known else float(cost), size.get(p.name, math.inf))
    return sorted(size, key=size.get)


def _curve(points, costs: np.ndarray, drawn: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """log costs (k,) of a model, ascending, and the best log score within each of them (1 + resamples, k)."""
    own = np.flatnonzero([p.name == name for p in points])
    x = np.unique(costs[own])
    best = np.stack([drawn[:, own[costs[own] == c]].min(axis=1) for c in x], axis=1)
    return np.log(x), np.minimum.accumulate(best, axis=1)


def _at(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Curves y (r, k) over x (k,) at `at` (g,) -> (r, g): straight between, inf below, constant above."""
    high = np.clip(np.searchsorted(x, at, side="right"), 1, len(x) - 1) if len(x) > 1 else np.zeros(len(at), int)
    low = np.maximum(high - 1, 0)
    span = np.where(high > low, x[high] - x[low], 1.0)
    part = np.clip((at - x[low]) / span, 0.0, 1.0)
    return np.where(at < x[0] - 1e-12, np.inf, y[:, low] + part * (y[:, high] - y[:, low]))


def _front(costs: np.ndarray, drawn: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Indices of the points on the front of row 0, by cost, and every point's share of the resamples on it."""
    order = np.lexsort((drawn[0], costs))
    cost, y = costs[order], drawn[:, order]
    group = np.unique(cost, return_inverse=True)[1]
    best = np.stack([y[:, group == g].min(axis=1) for g in range(group.max() + 1)], axis=1)
    before = np.minimum.accumulate(np.pad(best, ((0, 0), (1, 0)), constant_values=np.inf), axis=1)[:, :-1]
    on = (y == best[:, group]) & (y < before[:, group])
    shares = np.full(len(costs), math.nan)
    if len(drawn) > 1:
        shares[order] = on[1:].mean(axis=0)
    return [int(order[i]) for i in np.flatnonzero(on[0])], shares


def _winners(curves: dict) -> list[Winner]:
    """The best model along the costs tried; neighbours meet where their curves do."""
    knots, names = np.concatenate([x for x, _ in curves.values()]), list(curves)
    at = np.unique(np.concatenate([knots, np.linspace(knots.min(), knots.max(), GRID)]))
    best = np.argmin(np.stack([_at(x, y[:1], at)[0] for x, y in curves.values()]), axis=0)
    starts = [0, *(np.flatnonzero(np.diff(best)) + 1)]
    found = []
    for start, end in zip(starts, [*starts[1:], len(at)], strict=True):
        middle = np.array([(at[start] + at[end - 1]) / 2])
        drawn = np.stack([_at(x, y[1:], middle)[:, 0] for x, y in curves.values()], axis=1)
        ends = (float(np.exp(at[start])), float(np.exp(at[min(end, len(at) - 1)])))
        found.append(Winner(names[best[start]], *ends, _share(drawn, int(best[start]))))
    return found


def _handovers(winners: list[Winner], curves: dict, level: float, known: bool) -> list[Handover]:
    """Where each winner but the last stops winning for good."""
    found = []
    for i, winner in enumerate(winners[:-1]):
        if winner.model in {w.model for w in winners[i + 1 :]}:
            continue
        then = winners[i + 1].model
        at, start = _stop(curves[winner.model], curves[then])
        between = reached(np.exp(at[1:]), level) if known else NO_INTERVAL
        found.append(Handover(winner.model, then, float(np.exp(at[0])), between, bool(at[0] <= start)))
    return found


def reached(costs: np.ndarray, level: float) -> tuple:
    """The central resamples of costs, of which some are infinite (never reached); (nan, nan) of none."""
    if not len(costs):
        return NO_INTERVAL
    return tuple(float(v) for v in np.quantile(costs, [(1 - level) / 2, (1 + level) / 2], method="nearest"))


def _stop(one: tuple, other: tuple) -> tuple[np.ndarray, float]:
    """The last log cost at which curve `one` leads `other` (1 + resamples,), inf where it leads to the end; and from where."""
    start = other[0][0]
    at = np.unique(np.concatenate([one[0], other[0]]))
    at = at[at >= max(start, one[0][0])]
    at = at if len(at) else np.array([max(start, one[0][0])])
    ahead = _at(*other, at) - _at(*one, at)  # above 0 where `one` leads
    leads = ahead > 0
    last = len(at) - 1 - np.argmax(leads[:, ::-1], axis=1)
    row, after = np.arange(len(ahead)), np.minimum(last + 1, len(at) - 1)
    d0, d1 = ahead[row, last], ahead[row, after]
    step = np.where(d0 > d1, d0 / np.where(d0 > d1, d0 - d1, 1.0), 0.0)
    cross = at[last] + step * (at[after] - at[last])
    cross = np.where(last == len(at) - 1, np.inf, cross)
    return np.where(leads.any(axis=1), cross, at[0]), at[0]


@dataclass(frozen=True)
class Served:
    """A model and a sampling of it that together draw `images` images."""

    point: Point
    images: float
    total: float  # FLOPs: training and all images

    @property
    def sampling_share(self) -> float:
        """Of the total."""
        return 1 - all_training(self.point) / self.total


def serve(points: Sequence[Point], images: float | int) -> list[Served]:
    """Every point with its total, cheapest first. Raises UsageError without training FLOPs or the cost of an image."""
    found = [Served(p, float(images), all_training(p) + images * cost_of(p, "flops")) for p in points]
    return sorted(found, key=lambda s: s.total)


def front(served: Sequence[Served], higher: bool = False) -> list[Served]:
    """Those that no other beats in both total and score, by total."""
    scores = np.log([[s.point.score for s in served]]) * (-1.0 if higher else 1.0)
    return [served[i] for i in _front(np.array([s.total for s in served]), scores)[0]]
