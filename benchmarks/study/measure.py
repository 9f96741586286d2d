"""The numbers of the answers, each as draws (1 + resamples,): row 0 as measured, the others with every score redrawn."""

import numpy as np

from benchmarks.study.select import FEWEST, Data, Family
from dit_jax.scaling.fits.law import fit_power

NONE = np.full(1, np.nan)
LEAST = 4  # sampling budgets with the best size inside the ladder that a law needs


def best_sizes(data: Data, family: Family, costs: np.ndarray | None = None) -> np.ndarray | None:
    """Best active parameters (1 + resamples, costs) at each sampling budget.

    Where the best size has neighbours on both sides, it is the minimum of the parabola of log score in log size through the three, within
    these; at the ends of the ladder it is the end.
    """
    table, log_n = data.logs(family, costs), np.log(data.params)
    if table is None or len(log_n) < FEWEST:
        return None
    best = np.argmin(table, axis=1)  # (draws, costs)
    middle = np.clip(best, 1, len(log_n) - 2)
    y = [np.take_along_axis(table, (middle + k)[:, None], 1)[:, 0] for k in (-1, 0, 1)]
    x = [log_n[middle + k] for k in (-1, 0, 1)]
    with np.errstate(invalid="ignore", divide="ignore"):
        left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
        bend = (right - left) / (x[2] - x[0])
        place = (x[0] + x[1]) / 2 - left / (2 * bend)
    inside = (best == middle) & np.isfinite(place) & (bend > 0)
    place = np.where(inside, np.clip(place, x[0], x[2]), log_n[best])
    return np.exp(np.where(np.isfinite(table.min(axis=1)), place, np.nan))


def law(data: Data, family: Family) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(coefficients, exponents) of best size = k cost^x, draws each, and the costs (k,) used: best size inside the ladder."""
    sizes = best_sizes(data, family)
    if sizes is None:
        return NONE, NONE, np.zeros(0)
    inside = (sizes[0] > data.params[0] * 1.001) & (sizes[0] < data.params[-1] * 0.999)
    if inside.sum() < LEAST:
        return NONE, NONE, data.costs[inside]
    found = fit_power(data.costs[inside], sizes[:, inside], np.ones_like(sizes[:, inside]))
    return found.coefficient, found.exponent, data.costs[inside]


def size_ratio(data: Data, one: Family, other: Family) -> np.ndarray:
    """Geometric mean over the sampling budgets of the best size of `other` over that of `one`."""
    a, b = best_sizes(data, one), best_sizes(data, other)
    return NONE if a is None or b is None else np.exp(np.nanmean(np.log(b / a), axis=1))


def score_ratio(data: Data, one: Family, other: Family, costs: np.ndarray | None = None) -> np.ndarray:
    """Geometric mean over sizes and sampling budgets of the score of `other` over that of `one`, where both have one."""
    a, b = data.logs(one, costs), data.logs(other, costs)
    if a is None or b is None:
        return NONE
    known = np.isfinite(a[0]) & np.isfinite(b[0])
    return np.exp((b[:, known] - a[:, known]).mean(axis=1)) if known.any() else NONE


def best_ratio(data: Data, one: Family, other: Family) -> np.ndarray:
    """Geometric mean over the sampling budgets of the score of the best size of `other` over that of the best size of `one`."""
    a, b = data.logs(one), data.logs(other)
    return NONE if a is None or b is None else np.exp((b.min(axis=1) - a.min(axis=1)).mean(axis=1))


def advantage(data: Data, family: Family, relative: float) -> np.ndarray:
    """Score of the largest size over that of the best smaller one at this cost, in guided steps of the largest; above 1 a smaller wins."""
    table = data.logs(family, np.array([relative * data.unit]))
    return NONE if table is None else np.exp(table[:, -1, 0] - table[:, :-1, 0].min(axis=1))


def small_against_large(data: Data, before: Family, after: Family, relative: float, small: int = 1) -> np.ndarray:
    """Score of an undistilled small size (its number) over that of the distilled largest one, at one cost."""
    costs = np.array([relative * data.unit])
    a, b = data.logs(before, costs), data.logs(after, costs)
    return NONE if a is None or b is None else np.exp(a[:, small, 0] - b[:, -1, 0])


def speedup(data: Data, before: Family, after: Family) -> np.ndarray:
    """How many times cheaper (widths,) a student's best score is than its teacher's of the same value; inf: it has none."""
    a, b = data.logs(before), data.logs(after)
    if a is None or b is None:
        return np.full(len(data.widths), np.nan)
    found = []
    for one, other in zip(a[0], b[0], strict=True):
        if not np.isfinite(other).any() or not np.isfinite(one).any():
            found.append(np.nan)
            continue
        at = int(np.argmin(other))
        reached = np.flatnonzero(one <= other[at])
        found.append(data.costs[reached[0]] / data.costs[at] if len(reached) else np.inf)
    return np.array(found)


def at_total(data: Data, family: Family) -> np.ndarray | None:
    """log score (draws, widths, costs) of undistilled models trained with the FLOPs of a teacher and its student together.

    Between two budgets log score is straight in log FLOPs; beyond the last one the last slope is kept.
    """
    there = [c for c in data.budgets if data.front(Family(c)) is not None]
    if family.budget not in there or len(there) < 2:
        return None
    low = there.index(family.budget) if family.budget != there[-1] else len(there) - 2
    a, b = (data.logs(Family(c)) for c in there[low : low + 2])
    x = np.log(family.budget * (1 + family.share) / there[low]) / np.log(there[low + 1] / there[low])
    with np.errstate(invalid="ignore"):
        return a + x * (b - a)


def total_ratio(data: Data, family: Family, relative: float) -> np.ndarray:
    """Best score of students at this cost over that of undistilled models of the same total training FLOPs."""
    a, b = at_total(data, family), data.logs(family)
    if a is None or b is None:
        return NONE
    at = int(np.argmin(abs(np.log(data.costs / (relative * data.unit)))))
    a = np.where(np.isfinite(a), a, np.inf)
    return np.exp(b[:, :, at].min(axis=1) - a[:, :, at].min(axis=1))


def widths_of_ema(data: Data, budget: float) -> dict[float, np.ndarray]:
    """Width of an EMA made after training -> mean over sizes of its score over that of the EMA kept, as draws, at one sampling."""
    kept, made = {}, {}
    for r in data.records:
        note, drawn = r["study"], r["protocol"].get("samples")
        if not drawn or note["objective"] or note["seed"] or note["budget"] != budget or "reuse" in drawn:
            continue
        key = note["width"], drawn["sampler"], drawn["steps"], drawn["guidance"], drawn["num"]
        weights = r["protocol"]["weights"]
        (made if "snapshots_of" in weights else kept).setdefault(weights["width"], {})[key] = data.drawn(r)
    base = next(iter(kept.values()), {})
    found = {}
    for width, scores in sorted(made.items()):
        both = [key for key in scores if key in base]
        if both:
            found[width] = np.exp(np.mean([scores[key] - base[key] for key in both], axis=0))
    return found


def reused(data: Data, budget: float) -> np.ndarray:
    """Mean over teachers of the score with reused blocks over that without at the same FLOPs an image, sampler and guidance."""
    ratios = []
    points = [p for p in data.points(Family(budget, sampler="euler", reuse="any")) if p.reuse]
    for point in points:
        plain = Family(budget, sampler="euler", guidance=(point.guidance,))
        if (table := data.logs(plain, np.array([point.flops]))) is not None:
            noise = (
                np.random.default_rng(int(point.flops)).standard_normal(data.resamples) * point.score_se / point.score
            )
            own = np.log(point.score) + np.concatenate([[0.0], noise])
            ratios.append(own - table[:, data.widths.index(int(point.name[1:])), 0])
    return np.exp(np.mean(ratios, axis=0)) if ratios else NONE


def between_seeds(data: Data) -> list[float]:
    """Log ratios of the scores of two seeds of a cell at the same sampling."""
    found: dict = {}
    for r in data.records:
        drawn = r["protocol"].get("samples")
        if drawn and "snapshots_of" not in r["protocol"]["weights"]:
            note = r["study"]
            key = note["width"], note["budget"], note["objective"], note["share"], str(sorted(drawn.items(), key=str))
            found.setdefault(key, {})[note["seed"]] = np.log(r["metrics"][data.metric])
    return [float(seeds[1] - seeds[0]) for seeds in found.values() if {0, 1} <= {*seeds}]
