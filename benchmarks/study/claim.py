"""What the study claims, as numbers that can be remade from fewer records: a value, its interval, and what the claim denies."""

import math
import re
from dataclasses import dataclass, field

import numpy as np

from benchmarks.study import measure
from benchmarks.study.select import Data, Family, ends

SMALL_COST, MEI_COST = 3.0, 7.5  # relative costs of Mei et al.'s statements
OUT, TIMES = 0.1, 20  # share of the records left out, and how often
HELD = 19  # of TIMES, from which a claim survives


def short(value: float) -> str:
    """A number of three digits, such as 3.54e6."""
    return re.sub(r"e\+?(-?)0*", r"e\1", f"{value:.3g}")


@dataclass(frozen=True)
class Claim:
    """A number of one answer. `null`: what it would be if there were nothing to claim: 0 of an exponent, 1 of a ratio."""

    answer: int  # 1 to 5
    text: str
    draws: np.ndarray
    null: float
    remade: tuple = field(default=())  # (value, low, high) each time a tenth of the records was left out

    @property
    def value(self) -> float:
        return float(self.draws[0])

    @property
    def interval(self) -> tuple[float, float]:
        return ends(self.draws)

    @property
    def side(self) -> int:
        """1 or -1: the interval lies above or below `null`; 0: the data do not tell."""
        return _side(self.interval, self.null)

    @property
    def held(self) -> int:
        """How often of the times the interval remade says the same."""
        return sum(_side(one[1:], self.null) == self.side for one in self.remade)

    @property
    def verdict(self) -> str:
        if math.isnan(self.value) or math.isnan(self.interval[0]):
            return "no number: too few records"
        if not self.side:
            return "not told"
        if not self.remade:
            return "told"
        return "survives" if self.held >= HELD else f"does not survive ({self.held} of {len(self.remade)})"


def _side(interval: tuple, null: float) -> int:
    return int(interval[0] > null) - int(interval[1] < null)


def claims(data: Data) -> list[Claim]:
    """Every claim that the records of one kind of data allow, in the order of the answers."""
    found: list[Claim] = []
    shares = {name: max((s for n, s in data.students if n == name), default=0.0) for name, _ in data.students}
    main = {name: 0.05 if (name, 0.05) in data.students else share for name, share in shares.items()}
    for budget in data.budgets:
        found += _best_size(data, budget) + _distilled(data, budget, main)
        found += _guidance(data, budget, main) + _training(data, budget) + _free(data, budget)
    return sorted(found, key=lambda claim: claim.answer)


def _best_size(data: Data, budget: float) -> list[Claim]:
    found = []
    for sampler in ("euler", "dpmpp_2m"):
        family = Family(budget, sampler=sampler)
        text = f"budget {short(budget)}, {sampler}: exponent of the best size in FLOPs an image"
        found.append(Claim(1, text, measure.law(data, family)[1], 0.0))
        text = f"budget {short(budget)}, {sampler}: score of the largest size over the best smaller one's at cost {SMALL_COST:g}"
        found.append(Claim(1, text, measure.advantage(data, family, SMALL_COST), 1.0))
    return found


def _distilled(data: Data, budget: float, main: dict) -> list[Claim]:
    found, before = [], Family(budget)
    for name, share in main.items():
        if name == "mean_flow_inside":
            continue
        after, words = Family(budget, name, share), f"budget {short(budget)}, {name} {share:.0%}"
        found.append(
            Claim(2, f"{words}: exponent of the best size in FLOPs an image", measure.law(data, after)[1], 0.0)
        )
        text = f"{words}: best size over the undistilled best size at the same cost"
        found.append(Claim(2, text, measure.size_ratio(data, before, after), 1.0))
        for cost in (1.0, SMALL_COST):
            text = f"{words}: score of the largest size over the best smaller one's at cost {cost:g}"
            found.append(Claim(2, text, measure.advantage(data, after, cost), 1.0))
        text = f"{words}: score of the undistilled second smallest size over the distilled largest one's at cost {MEI_COST:g}"
        found.append(Claim(2, text, measure.small_against_large(data, before, after, MEI_COST), 1.0))
        found.append(
            Claim(2, f"{words}: best score over the undistilled one's", measure.best_ratio(data, before, after), 1.0)
        )
    return found


def _guidance(data: Data, budget: float, main: dict) -> list[Claim]:
    words, scales = f"budget {short(budget)}", tuple(g for g in data.guidances if g != 1.0)

    def ratio(text: str, one: Family, other: Family) -> Claim:
        return Claim(3, f"{words}, {text}", measure.score_ratio(data, one, other), 1.0)

    plain, guided = (Family(budget, guidance=of) for of in ((1.0,), scales))
    found = [ratio("undistilled, outside: guided over unguided score at the same cost", plain, guided)]
    if share := main.get("mean_flow"):
        bare, outside = (Family(budget, "mean_flow", share, guidance=of) for of in ((1.0,), scales))
        found.append(
            ratio(f"mean_flow {share:.0%}, outside: guided over unguided score at the same cost", bare, outside)
        )
        if inside := main.get("mean_flow_inside"):
            own, name = Family(budget, "mean_flow_inside", inside), f"mean_flow {inside:.0%}"
            found.append(ratio(f"{name}, inside: score over that without guidance", bare, own))
            found.append(ratio(f"{name}: score with guidance inside over outside at the same cost", outside, own))
    return found


def _training(data: Data, budget: float) -> list[Claim]:
    found = []
    for name, share in data.students:
        family = Family(budget, name, share)
        for cost in (1.0, MEI_COST):
            words = f"budget {short(budget)}, {name} {share:.0%}"
            text = f"{words}: best score over the undistilled one's of the same total training, cost {cost:g}"
            found.append(Claim(4, text, measure.total_ratio(data, family, cost), 1.0))
    return found


def _free(data: Data, budget: float) -> list[Claim]:
    found = []
    for width, draws in measure.widths_of_ema(data, budget).items():
        text = f"budget {short(budget)}, EMA width {width:g} made afterwards: score over the kept one's"
        found.append(Claim(5, text, draws, 1.0))
    text = f"budget {short(budget)}, euler: score with half of the blocks reused over that without at the same cost"
    found.append(Claim(5, text, measure.reused(data, budget), 1.0))
    return [claim for claim in found if not math.isnan(claim.value)]


def remade(data: Data, times: int = TIMES) -> list[Claim]:
    """The claims with what becomes of each when a tenth of the records is left out at random, with seeds 0, 1, ..."""
    found = claims(data)
    parts = [{claim.text: claim for claim in claims(data.without(OUT, seed))} for seed in range(times)]
    lost = (math.nan, math.nan, math.nan)
    again = [tuple((p[c.text].value, *p[c.text].interval) if c.text in p else lost for p in parts) for c in found]
    return [Claim(c.answer, c.text, c.draws, c.null, one) for c, one in zip(found, again, strict=True)]
