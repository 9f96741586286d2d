"""The points that decide: the best and the second-best size at a few sampling costs, scored again with ten times the images.

The first scores choose, and the lowest of noisy scores is too low; the second ones, of other images of the same two, do not share that.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from benchmarks.study.cells import Cell, Study
from benchmarks.study.select import SLACK, Data, Family, middle, undistilled

COSTS = (1.0, 3.0, 7.5)  # in guided steps of the largest size
WAITING = "to be scored again"


@dataclasses.dataclass(frozen=True)
class Pair:
    """The best and the second-best size of a family at a cost, each as (width, sampler, steps, guidance)."""

    family: Family
    cost: float
    best: tuple
    second: tuple


def families(data: Data, study: Study) -> list[Family]:
    """Undistilled models and the students of the main share, at every budget recorded."""
    students = [
        (name, share) for name, share in data.students if math.isclose(share, study.main) and name not in study.later
    ]
    return [
        family
        for budget in data.budgets
        for family in (undistilled(budget), *(Family(budget, name, share) for name, share in students))
    ]


def pairs(data: Data, study: Study) -> list[Pair]:
    """The deciding pair of each family with enough sizes, at each of COSTS."""
    found = []
    for family in families(data, study):
        if data.runs(family) is None:
            continue
        for cost in COSTS:
            best: dict = {}
            for p in data.points(family):
                if p.flops <= SLACK * cost * data.unit and (p.name not in best or p.score < best[p.name].score):
                    best[p.name] = p
            order = sorted(best.values(), key=lambda p: p.score)
            if len(order) > 1:
                told = [(int(p.name[1:]), p.sampler, int(p.steps), float(p.guidance)) for p in order[:2]]
                found.append(Pair(family, cost, *told))
    return found


def deciding_cells(studies: Sequence[Study], records: Sequence[dict], cells: Sequence[Cell]) -> list[Cell]:
    """The cells, among `cells`, whose points decide, each with the samplings to score again."""
    found: dict = {}
    for study in studies:
        if not any(r["study"]["data"] == study.name for r in records):
            continue
        for pair in pairs(Data(study.name, records, 0, study), study):
            for width, *sampling in (pair.best, pair.second):
                key = width, pair.family.budget, pair.family.objective, pair.family.share
                found.setdefault(key, set()).add(tuple(sampling))
    return [
        dataclasses.replace(cell, chosen=tuple(sorted(found[key])))
        for cell in cells
        if not (cell.rest or cell.seed) and (key := (cell.size[0], cell.budget, cell.student, cell.share)) in found
    ]


def again(data: Data, study: Study, family: Family, model: tuple) -> np.ndarray | None:
    """log score (1 + resamples,) of a model's sampling with many images; None if it is not recorded."""
    for r in data.records:
        note, drawn = r["study"], r["protocol"].get("samples")
        if drawn is None or drawn["num"] != study.decisive or note["seed"]:
            continue
        same = (note["budget"], note["objective"], note["share"]) == (family.budget, family.objective, family.share)
        if same and (note["width"], drawn["sampler"], drawn["steps"], drawn["guidance"]) == model:
            return data.drawn(r)
    return None


def rows(data: Data, study: Study) -> list[tuple]:
    """A row for each pair: the two, the ratio of their scores, as chosen and with many images, with its interval; and whether it holds."""
    found = []
    for pair in pairs(data, study):
        a, b = (again(data, study, pair.family, one) for one in (pair.best, pair.second))
        names = [
            f"w{width}, {steps} steps, guidance {guidance:g}" for width, _, steps, guidance in (pair.best, pair.second)
        ]
        row = (pair.family.title, f"{pair.cost:g}", *names)
        if a is None or b is None:
            found.append((*row, "", WAITING))
            continue
        ratio = np.exp(a - b)
        value, low, high = middle(ratio)
        verdict = "holds" if high < 1 else "reversed" if low > 1 else "undecided"
        found.append((*row, f"{value:.2f} ({low:.2f} to {high:.2f})", verdict))
    return found
