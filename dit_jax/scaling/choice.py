"""The best guidance of each model, and if asked the best steps, sampler and spacing: chosen before models are compared.

Mei et al. 2024 (arXiv 2404.01367), section 4: the best guidance depends on the model and on the number of steps, so one guidance
for all favours some of them. A choice among noisy scores is itself uncertain; it is repeated in every resample.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dit_jax.error import UsageError
from dit_jax.scaling.points import SAMPLING, Point

KEYS = ("sampler", "steps", "spacing")


@dataclass(frozen=True)
class Choice:
    """The best of some points. `shares`: in how many of the resamples each was best; empty where scores have no error."""

    best: Point
    tried: tuple  # all points chosen from, the best included
    shares: dict  # guidance -> share of resamples
    edge: str  # "" or at which end of the guidances tried the best one lies: "lowest" | "highest"

    @property
    def share(self) -> float:
        """Share of the resamples in which the best guidance is best."""
        return self.shares.get(self.best.guidance, math.nan)

    @property
    def warning(self) -> str:
        """What a reader should know about the choice; "" where there is nothing."""
        of = f"{self.best.name}, {self.best.sampling}"
        if self.edge:
            return f"{of}: the best guidance is the {self.edge} tried; the best one may lie beyond"
        if self.share < 0.5:
            return f"{of}: the best guidance is uncertain, it is best in {self.share:.0%} of the resamples"
        return ""


def log_scores(points: Sequence[Point], higher: bool, resamples: int, seed: int) -> np.ndarray:
    """log score of the points (1 + resamples, points), negative where more is better: lower is always better.

    Row 0 is what was measured; in the others each score is redrawn within its own error, log-normally.
    """
    log = np.log([p.score for p in points]) * (-1.0 if higher else 1.0)
    relative = np.array([p.score_se / p.score for p in points])
    drawn = np.random.default_rng(seed).standard_normal((resamples, len(points)))
    return np.concatenate([log[None], log + relative * drawn])


def choose(
    points: Sequence[Point],
    over: Sequence[str] = ("guidance",),
    *,
    higher: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Choice]:
    """One choice per model: the best over the fields `over` (of SAMPLING). Raises UsageError where another field varies."""
    for name in SAMPLING:
        values = {_key(p, (name,)) for p in points}
        if name not in over and len(values) > 1:
            found = ", ".join(sorted(str(v[0]) for v in values))
            raise UsageError(
                f"RUNS: found {name} {found}, expected one; take one with --where samples.{name}=VALUE (--where {name}=VALUE "
                f"of a CSV), or choose the best of each model with --choose={','.join((*over, name))}"
            )
    return choices(points, [p.name for p in points], log_scores(points, higher, resamples, seed))


def choices(points: Sequence[Point], keys: Sequence, scores: np.ndarray) -> list[Choice]:
    """One choice per distinct key, in order of appearance; `scores` (1 + resamples, points) as of `log_scores`."""
    groups, samplings = _indices(keys), _indices([sampling_key(p) for p in points])
    found = []
    for index in groups.values():
        members, own = [points[i] for i in index], scores[:, index]
        best = members[int(np.argmin(own[0]))]
        edge = _edge(best, [points[i] for i in samplings[sampling_key(best)]])
        found.append(Choice(best, tuple(members), _shares(members, own[1:]), edge))
    return found


def _indices(keys: Sequence) -> dict:
    """Key -> where it is, in order of appearance."""
    found: dict = {}
    for i, key in enumerate(keys):
        found.setdefault(key, []).append(i)
    return found


def _shares(members: list[Point], drawn: np.ndarray) -> dict:
    """Guidance -> share of the resamples in which it is best."""
    if not len(drawn) or not any(p.score_se for p in members):
        return {}
    wins = np.bincount(np.argmin(drawn, axis=1), minlength=len(members)) / len(drawn)
    shares: dict = {}
    for p, share in zip(members, wins, strict=True):
        shares[p.guidance] = shares.get(p.guidance, 0.0) + float(share)
    return shares


def _edge(best: Point, tried: Sequence[Point]) -> str:
    """At which end of the guidances tried at its sampling the best lies; guidance 1 or less, a model unguided, is no lower end."""
    guidances = sorted({p.guidance for p in tried if not math.isnan(p.guidance)})
    if len(guidances) < 2:
        return ""
    if best.guidance == guidances[-1]:
        return "highest"
    return "lowest" if best.guidance == guidances[0] > 1 else ""


def _key(point: Point, names: Sequence[str] = KEYS) -> tuple:
    """Values of fields that compare equal where they are equal, nan too."""
    return tuple(None if isinstance(v := getattr(point, n), float) and math.isnan(v) else v for n in names)


def sampling_key(point: Point) -> tuple:
    """What choices of guidance are made within: a model, its sampler, steps and spacing."""
    return (point.name, *_key(point))


def one_guidance(found: Sequence[Choice]) -> str:
    """A warning where no choice had a second guidance; else ""."""
    if all(len({p.guidance for p in c.tried}) < 2 or math.isnan(c.best.guidance) for c in found):
        return "one guidance only was tried: models are compared at it, not each at its best"
    return ""
