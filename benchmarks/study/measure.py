"""The numbers of the answers, each as draws (1 + resamples,): row 0 as measured, the others with every score redrawn.

Every ratio is nan where a score is missing or no setting is cheap enough.
"""

import math

import numpy as np

from benchmarks.study.select import Data, Family, Table, undistilled
from dit_jax.scaling.fits.law import fit_power

NONE = np.full(1, np.nan)
LEAST = 4  # sampling budgets with the best size inside the ladder that a law needs
FEW = 4  # steps of a student that Mei et al. count


def _ratio(log: np.ndarray, other: np.ndarray) -> np.ndarray:
    """exp(log - other); nan unless both are finite."""
    return np.exp(np.subtract(log, other, out=np.full(log.shape, np.nan), where=np.isfinite(log) & np.isfinite(other)))


def _tables(data: Data, relative: float, *families: Family) -> list[Table] | None:
    """The tables at one cost, in guided steps of the largest size; None if one is missing."""
    found = [data.table(family, np.array([relative * data.unit])) for family in families]
    return None if any(table is None for table in found) else found


def best_sizes(data: Data, family: Family, costs: np.ndarray) -> np.ndarray | None:
    """Active parameters (1 + resamples, costs) of the size of the ladder that is best within each cost; nan where none can draw."""
    table = data.table(family, costs)
    if table is None:
        return None
    winner, score = table.best()
    return np.where(np.isfinite(score), data.params[winner], np.nan)


def law(data: Data, family: Family) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(coefficients, exponents) of best size = k cost^x, draws each, and the costs (k,) used.

    These are the costs run, from one call of the largest size to where nothing improves any more, at which the best size as measured lies
    inside the ladder.
    """
    costs = data.costs(family)
    sizes = best_sizes(data, family, costs) if len(costs) else None
    if sizes is None:
        return NONE, NONE, np.zeros(0)
    inside = (sizes[0] > data.params[0]) & (sizes[0] < data.params[-1])
    if inside.sum() < LEAST:
        return NONE, NONE, costs[inside]
    found = fit_power(costs[inside], sizes[:, inside], np.ones_like(sizes[:, inside]))
    return found.coefficient, found.exponent.round(9) + 0.0, costs[inside]  # of sizes that are all the same: 0


def size_ratio(data: Data, one: Family, other: Family) -> np.ndarray:
    """Geometric mean over the costs run of the best size of `other` over that of `one`."""
    costs = data.costs(one, other)
    if not len(costs):
        return NONE
    a, b = (np.log(best_sizes(data, family, costs)) for family in (one, other))
    return np.exp((b - a).mean(axis=1))


def best_ratio(data: Data, one: Family, other: Family, relative: float) -> np.ndarray:
    """Score of the best size and settings of `other` over that of `one`, within one cost."""
    tables = _tables(data, relative, one, other)
    if tables is None:
        return NONE
    a, b = (table.best()[1][:, 0] for table in tables)
    return _ratio(b, a)


def advantage(data: Data, family: Family, relative: float) -> np.ndarray:
    """Score of the largest size over that of the best smaller one within this cost; above 1 a smaller one wins."""
    tables = _tables(data, relative, family)
    return NONE if tables is None else _ratio(tables[0].scored[:, -1, 0], tables[0].best(slice(0, -1))[1][:, 0])


def small_against_large(data: Data, before: Family, after: Family, relative: float, small: int = 1) -> np.ndarray:
    """Score of an undistilled small size (its number) over that of the distilled largest one, within one cost."""
    tables = _tables(data, relative, before, after)
    return NONE if tables is None else _ratio(tables[0].scored[:, small, 0], tables[1].scored[:, -1, 0])


def speedup(data: Data, after: Family, steps: int = FEW) -> np.ndarray:
    """How many times cheaper (1 + resamples, widths) than its teacher a student of so many steps draws.

    The lowest cost that its teacher ran for the same score, over its own; inf: the teacher has no score as good; nan: not recorded.
    """
    runs, found = data.runs(undistilled(after.budget)) or {}, np.full((1 + data.resamples, len(data.widths)), np.nan)
    points = [p for p in data.points(after) if p.steps == steps]
    for column, width in enumerate(data.widths):
        own = [p for p in points if p.name == f"w{width}"]
        if not own or f"w{width}" not in runs:
            continue
        log, z = np.log([p.score for p in own]), np.stack([data.noise(p) for p in own], axis=1)
        at = np.argmin(log + z, axis=1)  # its guidance
        score = np.take_along_axis(log - z, at[:, None], 1)
        run, _, scored, _ = runs[f"w{width}"]
        reached = scored <= score
        cost = np.where(reached.any(axis=1), run[np.argmax(reached, axis=1)], np.inf)
        found[:, column] = cost / np.array([p.flops for p in own])[at]
    return found


def at_total(data: Data, family: Family, costs: np.ndarray) -> Table | None:
    """Undistilled models trained with the FLOPs of a teacher and its student together.

    Between two budgets log score is straight in log FLOPs; beyond the last one the last slope is kept.
    """
    there = [c for c in data.budgets if data.table(undistilled(c), costs) is not None]
    if family.budget not in there or len(there) < 2:
        return None
    low = there.index(family.budget) if family.budget != there[-1] else len(there) - 2
    a, b = (data.table(undistilled(c), costs) for c in there[low : low + 2])
    x = math.log(family.budget * (1 + family.share) / there[low]) / math.log(there[low + 1] / there[low])

    def between(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        known = np.isfinite(one) & np.isfinite(other)
        return np.where(known, np.where(known, one, 0) * (1 - x) + x * np.where(known, other, 0), np.inf)

    return Table(between(a.chosen, b.chosen), between(a.scored, b.scored), b.at)


def total_ratio(data: Data, family: Family, relative: float) -> np.ndarray:
    """Best score of students within this cost over that of undistilled models of the same total training FLOPs."""
    costs = np.array([relative * data.unit])
    a, b = at_total(data, family, costs), data.table(family, costs)
    return NONE if a is None or b is None else _ratio(b.best()[1][:, 0], a.best()[1][:, 0])


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
    """Mean over teachers of the score with reused blocks over their best without, of no more FLOPs an image and the same guidance."""
    ratios = []
    for point in (p for p in data.points(Family(budget, sampler="euler", reuse="any")) if p.reuse):
        plain = data.table(undistilled(budget, guidance=(point.guidance,)), np.array([point.flops]))
        if plain is not None:
            own = np.log(point.score) - data.noise(point)
            ratios.append(np.log(_ratio(own, plain.scored[:, data.widths.index(int(point.name[1:])), 0])))
    ratios = [one for one in ratios if np.isfinite(one).all()]  # without those whose teacher has nothing as cheap
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
