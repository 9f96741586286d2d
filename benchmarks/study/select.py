"""The records of one kind of data as frontiers: score against FLOPs an image, of each size at one training budget.

A family is what is compared within: a budget, teachers or students of one objective and share, and how their images are drawn. Frontiers
and their resamples are the wing's (`dit_jax.scaling.frontier`).
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Sequence

import numpy as np

from benchmarks.study.cells import Cell, Study, config_of
from benchmarks.study.table import STUDIES
from dit_jax import flops
from dit_jax.scaling.frontier.frontier import Frontier, fit_frontier
from dit_jax.scaling.frontier.points import Point, points_of

RESAMPLES, LEVEL = 200, 0.95
COSTS = 25  # sampling budgets looked at, evenly in the logarithm
NORMAL = 1.96  # standard errors in half of an interval
FEWEST = 3  # sizes of a family that can be compared


@dataclasses.dataclass(frozen=True)
class Family:
    """Which records are compared. sampler "" and guidance (): all that were tried; reuse "": without, "any": with and without."""

    budget: float
    objective: str = ""
    share: float = 0.0
    sampler: str = ""
    guidance: tuple = ()
    reuse: str = ""
    seed: int = 0

    @property
    def title(self) -> str:
        name = f"{self.objective.replace('_', ' ')} {self.share:.0%}" if self.objective else "undistilled"
        return name + f", {self.sampler}" * bool(self.sampler) + f", budget {self.budget:.3g}"


class Data:
    """The records of one kind of data, and what is in them."""

    def __init__(self, name: str, records: Sequence[dict], resamples: int = RESAMPLES, study: Study | None = None):
        self.name, self.study, self.resamples = name, study or STUDIES[name], resamples
        self.metric = self.study.metric
        self.records = [r for r in records if r["study"]["data"] == name]
        notes = [r["study"] for r in self.records]
        self.budgets = sorted({note["budget"] for note in notes})
        self.widths = sorted({note["width"] for note in notes})
        drawn = [r["protocol"]["samples"] for r in self.records if "samples" in r["protocol"]]
        self.guidances = sorted({one["guidance"] for one in drawn})
        self.students = sorted({(note["objective"], note["share"]) for note in notes if note["objective"]})
        of = {r["study"]["width"]: r for r in self.records}
        self.params = np.array([of[w]["params_active"] for w in self.widths], float)

    @functools.cached_property
    def unit(self) -> float:
        """FLOPs of one guided step of the largest size, in which relative costs are counted, as Mei et al. count steps of theirs."""
        largest = Cell(self.study, self.study.sizes[-1], self.study.budgets[0])
        return 2.0 * flops.forward_flops(config_of(largest).model)

    @property
    def costs(self) -> np.ndarray:
        """Sampling budgets (COSTS,) in FLOPs an image: from one call of the largest size to 50 guided steps of it."""
        return np.geomspace(self.unit / 2, 50 * self.unit, COSTS)

    def picked(self, family: Family) -> list[dict]:
        """The scored records of a family, of the EMA that training kept and the usual number of images."""
        found = []
        for r in self.records:
            note, drawn = r["study"], r["protocol"].get("samples")
            same = (note["budget"], note["objective"], note["seed"]) == (family.budget, family.objective, family.seed)
            if not (drawn and same and math.isclose(note["share"], family.share) and self.metric in r["metrics"]):
                continue
            kept = "snapshots_of" not in r["protocol"]["weights"] and drawn["num"] == self.study.samples
            kept &= family.sampler in ("", drawn["sampler"]) and (
                not family.guidance or drawn["guidance"] in family.guidance
            )
            if kept and (family.reuse == "any" or "reuse" not in drawn):
                found.append(r)
        return found

    @functools.cache  # noqa: B019, one a study
    def points(self, family: Family) -> tuple[Point, ...]:
        """The points of a family, each called after its width."""
        records = self.picked(family)
        names = {(r["run"], r["flops_train"]): f"w{r['study']['width']}" for r in records}
        found = points_of([(r, f"{r['study']['cell']}, step {r['step']}") for r in records], self.metric)
        return tuple(dataclasses.replace(p, name=names[p.run_name, p.train], run_name=p.run_name) for p in found)

    @functools.cache  # noqa: B019
    def front(self, family: Family) -> Frontier | None:
        """The frontier of a family; None with fewer than FEWEST sizes."""
        points = self.points(family)
        if len({p.name for p in points}) < FEWEST:
            return None
        seed = zlib.crc32(repr(family).encode())  # scores of two families are independent
        return fit_frontier(points, self.metric, resamples=self.resamples, seed=seed, level=LEVEL)

    def logs(self, family: Family, costs: np.ndarray | None = None) -> np.ndarray | None:
        """log score (1 + resamples, widths, costs), inf where a size is missing or cannot draw at this cost; None without a frontier."""
        front, costs = self.front(family), self.costs if costs is None else costs
        if front is None:
            return None
        found = np.full((1 + self.resamples, len(self.widths), len(costs)), np.inf)
        at = [self.widths.index(int(name[1:])) for name in front.costs]
        found[:, at] = front.logs(costs)
        return found

    def drawn(self, record: dict) -> np.ndarray:
        """log score of a record (1 + resamples,), redrawn within its error."""
        score, found = record["metrics"][self.metric], record["metrics"]
        own = int(record["protocol_id"][:8], 16) + record["step"]
        noise = np.random.default_rng(own).standard_normal(self.resamples)
        error = (found[f"{self.metric}_high"] - found[f"{self.metric}_low"]) / (2 * NORMAL) / score
        return np.log(score) + np.concatenate([[0.0], noise * error])

    def without(self, share: float, seed: int) -> "Data":
        """The same with this share of the records left out at random."""
        kept = np.random.default_rng(seed).random(len(self.records)) >= share
        return Data(
            self.name, [r for r, keep in zip(self.records, kept, strict=True) if keep], self.resamples, self.study
        )


def ends(draws: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Central interval of the resamples draws[1:] that are numbers; (nan, nan) if fewer than half are."""
    found = draws[1:][np.isfinite(draws[1:])]
    if 2 * len(found) < len(draws) - 1 or not len(found):
        return math.nan, math.nan
    return tuple(float(v) for v in np.quantile(found, [(1 - level) / 2, (1 + level) / 2]))
