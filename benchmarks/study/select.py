"""The records of one kind of data: the best score of each size within each sampling budget, at one training budget.

A family is what is compared within: a budget, teachers or students of one objective and share, and how their images are drawn. Only
settings that were run count: the score of a size within a cost is its best at that cost or below, so curves are steps. (The wing's frontier
is straight between the costs tried.) The lowest of noisy scores is too low, the more so the more were tried. So each redraw adds noise z of
the score's own error to choose settings and sizes, and takes it off to report their scores: log score + z and log score - z have
independent errors ("data fission", Leiner et al. 2023, arXiv 2112.11079).
"""

import dataclasses
import functools
import json
import math
import re
import zlib
from collections.abc import Sequence

import numpy as np

from benchmarks.study.cells import Cell, Study, config_of
from benchmarks.study.table import STUDIES
from dit_jax import flops
from dit_jax.scaling.frontier.points import Point, points_of

RESAMPLES, LEVEL = 200, 0.95
FEWEST = 3  # sizes of a family that can be compared
SLACK = 1.01  # of a budget: a call of a flow map costs up to 3 % more than its teacher's, of the largest size 0.5 %


def short(value: float) -> str:
    """A number of three digits, such as 3.54e6."""
    return re.sub(r"e\+?(-?)0*", r"e\1", f"{value:.3g}")


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
        return f"{name}, {short(self.budget)} training FLOPs"


def undistilled(budget: float, sampler: str = "euler", guidance: tuple = ()) -> Family:
    """The teachers of a budget, by one sampler: a size must not win because more samplers of it are recorded."""
    return Family(budget, sampler=sampler, guidance=guidance)


@dataclasses.dataclass(frozen=True)
class Table:
    """Best log scores (1 + resamples, sizes, costs) within each cost, inf where nothing was run; row 0 as measured. Sizes and settings are
    chosen by `chosen`; `scored` is what is reported of these. `at`: which of the family's points was chosen."""

    chosen: np.ndarray
    scored: np.ndarray
    at: np.ndarray

    def best(self, sizes: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """(which of all sizes is best, its log score), each (1 + resamples, costs), among `sizes`; score inf where none can draw."""
        first = sizes.indices(self.chosen.shape[1])[0]
        winner = np.argmin(self.chosen[:, sizes], axis=1)
        return winner + first, np.take_along_axis(self.scored[:, sizes], winner[:, None], 1)[:, 0]


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

    def noise(self, point: Point) -> np.ndarray:
        """(1 + resamples,) in units of log score: 0, then draws of the score's error, the same wherever the point is used."""
        own = zlib.crc32(json.dumps([point.run_name, point.train, point.protocol], sort_keys=True).encode())
        drawn = np.random.default_rng(own).standard_normal(self.resamples)
        return np.concatenate([[0.0], drawn * point.score_se / point.score])

    @functools.cache  # noqa: B019
    def runs(self, family: Family) -> dict | None:
        """Size -> (costs run, ascending, and at each the best of this cost or below: chosen, scored, which point)."""
        points, found = self.points(family), {}
        if len({p.name for p in points}) < FEWEST:
            return None
        for name in {p.name: None for p in points}:
            own = sorted((i for i, p in enumerate(points) if p.name == name), key=lambda i: points[i].flops)
            log, z = np.log([points[i].score for i in own]), np.stack([self.noise(points[i]) for i in own], axis=1)
            chosen = np.minimum.accumulate(log + z, axis=1)
            before = np.pad(chosen, ((0, 0), (1, 0)), constant_values=np.inf)[:, :-1]
            at = np.maximum.accumulate(np.where(log + z < before, np.arange(len(own)), 0), axis=1)
            scored = np.take_along_axis(log - z, at, 1)
            found[name] = np.array([points[i].flops for i in own], float), chosen, scored, np.array(own)[at]
        return found

    def table(self, family: Family, costs: np.ndarray) -> Table | None:
        """The best scores of a family within each of `costs` FLOPs an image; None with fewer than FEWEST sizes."""
        runs, shape = self.runs(family), (1 + self.resamples, len(self.widths), len(costs))
        if runs is None:
            return None
        found = Table(np.full(shape, np.inf), np.full(shape, np.inf), np.full(shape, -1))
        for name, (run, *best) in runs.items():
            last = np.searchsorted(run, SLACK * np.asarray(costs), side="right") - 1
            for to, values in zip((found.chosen, found.scored, found.at), best, strict=True):
                to[:, self.widths.index(int(name[1:])), last >= 0] = values[:, last[last >= 0]]
        return found

    def costs(self, *families: Family, sizes: int = 0) -> np.ndarray:
        """The FLOPs an image that one of the families ran, distinct to SLACK: from where `sizes` of each can draw (0: all) to the last that
        makes the best score of one of them better, as measured. Empty if one is not there."""
        every = [self.runs(family) for family in families]
        if any(runs is None for runs in every):
            return np.zeros(0)
        found = np.unique(np.concatenate([run for runs in every for run, *_ in runs.values()]))
        start = max(sorted(run[0] for run, *_ in runs.values())[sizes - 1] for runs in every)
        best = [self.table(family, found).chosen[0].min(axis=0) for family in families]
        end = max(found[1:][score[1:] < score[:-1]].max(initial=start) for score in best)
        found = found[(found >= start) & (found <= end)]
        return found[np.append(found[1:] > SLACK * found[:-1], True)]

    def point(self, record: dict) -> Point:
        """A record as a point."""
        return points_of([(record, record["study"]["cell"])], self.metric)[0]

    def drawn(self, record: dict) -> np.ndarray:
        """log score of a record (1 + resamples,), redrawn within its error."""
        point = self.point(record)
        return np.log(point.score) - self.noise(point)

    def without(self, share: float, seed: int) -> "Data":
        """The same with this share of the records left out at random."""
        kept = np.random.default_rng(seed).random(len(self.records)) >= share
        return Data(
            self.name, [r for r, keep in zip(self.records, kept, strict=True) if keep], self.resamples, self.study
        )


def middle(draws: np.ndarray, level: float = LEVEL) -> tuple[float, float, float]:
    """(median, low, high) of the resamples draws[1:] that are numbers, with a central interval; nan if fewer than half are."""
    found = draws[1:][np.isfinite(draws[1:])]
    if 2 * len(found) < len(draws) - 1 or not len(found):
        return math.nan, math.nan, math.nan
    return tuple(float(v) for v in np.quantile(found, [0.5, (1 - level) / 2, (1 + level) / 2]))
