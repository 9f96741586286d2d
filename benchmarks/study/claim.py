"""What the study claims, as numbers that can be remade from fewer records: a value, its interval, and what the claim denies."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.study import measure
from benchmarks.study.select import Data, Family, middle, undistilled

CHEAP, UNIT, SMALL_COST, MEI_COST = 0.25, 1.0, 3.0, 7.5  # relative costs; the last two of Mei et al.'s statements
OUT, TIMES = 0.1, 20  # share of the records left out, and how often
HELD = 0.95  # of the remakes that can be computed, from which a claim is stable
COMPUTED = 0.5  # of the remakes that must be computable


@dataclass(frozen=True)
class Claim:
    """A number of one answer. `null`: what it would be if there were nothing to claim: 0 of an exponent, 1 of a ratio."""

    answer: int  # 1 to 5
    kind: str  # what it compares
    text: str  # the same at all budgets, and of one claim only
    draws: np.ndarray
    null: float = 1.0
    who: str = ""  # objective or sampler that it is about
    budget: float = 0.0
    cost: float = 0.0  # relative; 0: over all costs run
    remade: tuple = field(default=())  # (value, low, high) each time a tenth of the records was left out

    @property
    def value(self) -> float:
        """The median of the redraws, which lies inside the interval; nan if it cannot be computed."""
        return middle(self.draws)[0]

    @property
    def interval(self) -> tuple[float, float]:
        return middle(self.draws)[1:]

    @property
    def side(self) -> int:
        """1 or -1: the interval lies above or below `null`; 0: the data do not tell."""
        return _side(self.interval, self.null)

    @property
    def computed(self) -> list[tuple]:
        """The remakes in which there are records enough."""
        return [one for one in self.remade if not math.isnan(one[1])]

    @property
    def held(self) -> int:
        """How many of these say the same."""
        return sum(_side(one[1:], self.null) == self.side for one in self.computed)

    @property
    def stable(self) -> bool:
        enough = len(self.computed) >= max(COMPUTED * len(self.remade), 1)
        return self.side != 0 and enough and self.held >= HELD * len(self.computed)

    @property
    def verdict(self) -> str:
        if math.isnan(self.value):
            return "not computable"
        return "undecided" if not self.side else "stable" if self.stable else "unstable"

    @property
    def remakes(self) -> str:
        """What became of it when records were left out, in words."""
        lost = len(self.remade) - len(self.computed)
        return f"{self.held} of {len(self.computed)}" + f", {lost} not computable" * (lost > 0)


def _side(interval: tuple, null: float) -> int:
    return int(interval[0] > null) - int(interval[1] < null)


def main_students(data: Data) -> dict[str, float]:
    """Objective -> the share that is looked at: the study's main one if it is recorded, else the largest."""
    main, names = data.study.main, {name: None for name, _ in data.students}
    return {
        name: main if (name, main) in data.students else max(s for n, s in data.students if n == name) for name in names
    }


def claims(data: Data) -> list[Claim]:
    """Every claim that the records of one kind of data allow, in the order of the answers."""
    found: list[Claim] = []
    for budget in data.budgets:
        own = [*_best_size(data, budget), *_distilled(data, budget), *_guidance(data, budget)]
        own += [*_training(data, budget), *_free(data, budget)]
        found += [dataclasses.replace(c, budget=budget) for c in own]
    return sorted((c for c in found if not math.isnan(c.value)), key=lambda claim: claim.answer)


def _best_size(data: Data, budget: float):
    for sampler in ("euler", "dpmpp_2m"):
        family = undistilled(budget, sampler)
        text = f"{sampler}: exponent of the best size in FLOPs an image"
        yield Claim(1, "exponent", text, measure.law(data, family)[1], 0.0, who=sampler)
        for cost in (UNIT, SMALL_COST, MEI_COST):
            text = f"{sampler}: score of the largest size over the best smaller one's at cost {cost:g}"
            yield Claim(1, "largest", text, measure.advantage(data, family, cost), who=sampler, cost=cost)


def _distilled(data: Data, budget: float):
    before = undistilled(budget)
    for name, share in main_students(data).items():
        if name in data.study.later:
            continue
        after, words = Family(budget, name, share), f"{name.replace('_', ' ')} {share:.0%}"
        text = f"{words}: exponent of the best size in FLOPs an image"
        yield Claim(2, "exponent", text, measure.law(data, after)[1], 0.0, who=name)
        text = f"{words}: best size over the undistilled best size at the same cost"
        yield Claim(2, "size", text, measure.size_ratio(data, before, after), who=name)
        for cost in (UNIT, SMALL_COST):
            text = f"{words}: score of the largest size over the best smaller one's at cost {cost:g}"
            yield Claim(2, "largest", text, measure.advantage(data, after, cost), who=name, cost=cost)
        text = f"{words}: score of the undistilled second smallest size over the distilled largest one's at cost {MEI_COST:g}"
        small = measure.small_against_large(data, before, after, MEI_COST)
        yield Claim(2, "second smallest", text, small, who=name, cost=MEI_COST)
        for cost in (CHEAP, UNIT, MEI_COST):
            text = f"{words}: best score over the undistilled one's at cost {cost:g}"
            yield Claim(2, "worth", text, measure.best_ratio(data, before, after, cost), who=name, cost=cost)


def _guidance(data: Data, budget: float):
    scales, students = tuple(g for g in data.guidances if g != 1.0), main_students(data)
    pairs = [("undistilled, outside", "", undistilled(budget, guidance=(1.0,)), undistilled(budget, guidance=scales))]
    if share := students.get("mean_flow"):
        bare, outside = (Family(budget, "mean_flow", share, guidance=of) for of in ((1.0,), scales))
        pairs.append((f"mean flow {share:.0%}, outside", "mean_flow", bare, outside))
        if share := students.get("mean_flow_inside"):
            inside = Family(budget, "mean_flow_inside", share)
            pairs.append((f"mean flow {share:.0%}, inside", "inside", bare, inside))
            pairs.append((f"mean flow {share:.0%}, inside against outside", "both", outside, inside))
    for words, who, without, given in pairs:
        over = "score inside over outside" if who == "both" else "best score guided over unguided"
        for cost in (CHEAP, MEI_COST):
            text = f"{words}: {over} at cost {cost:g}"
            yield Claim(3, "guided", text, measure.best_ratio(data, without, given, cost), who=who, cost=cost)


def _training(data: Data, budget: float):
    for name, share in data.students:
        family = Family(budget, name, share)
        for cost in (UNIT, MEI_COST):
            words = f"{name.replace('_', ' ')} {share:.0%}"
            text = f"{words}: best score over the undistilled one's of the same total training, cost {cost:g}"
            yield Claim(4, "total", text, measure.total_ratio(data, family, cost), who=words, cost=cost)


def _free(data: Data, budget: float):
    for width, draws in measure.widths_of_ema(data, budget).items():
        yield Claim(5, "EMA", f"EMA width {width:g} made afterwards: score over the kept one's", draws)
    text = "half of the blocks reused: score over that without at the same cost"
    yield Claim(5, "reuse", text, measure.reused(data, budget))


def remakes(data: Data, times: int = TIMES) -> list[Data]:
    """The data with a tenth of the records left out at random, with seeds 0, 1, ..."""
    return [data.without(OUT, seed) for seed in range(times)]


def remade(data: Data, parts: Sequence[Data]) -> list[Claim]:
    """The claims with what becomes of each in `parts`."""
    again, lost = [{(c.budget, c.text): c for c in claims(part)} for part in parts], (math.nan,) * 3
    found = []
    for claim in claims(data):
        there = [part.get((claim.budget, claim.text)) for part in again]
        found.append(dataclasses.replace(claim, remade=tuple((c.value, *c.interval) if c else lost for c in there)))
    return found
