"""The best guidance of each model, and if asked the best steps, sampler and spacing: chosen before models are compared.

Mei et al. 2024 (arXiv 2404.01367), section 4: the best guidance depends on the model and on the number of steps, so one guidance
for all favours some of them. The lowest of noisy scores is too low (winner's curse), so the best guidance is the minimum of a quadratic of
log score in log guidance, through up to five guidances around the lowest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from dit_jax.error import UsageError
from dit_jax.scaling.frontier.points import SAMPLING, Point

KEYS = ("sampler", "steps", "spacing")
AROUND = 2  # guidances on each side of the lowest that a quadratic goes through
MISFIT = 0.01  # chance of residuals as large, below which a quadratic through more than three guidances does not fit
COARSE = 0.1  # the same of scores without errors: relative residuals this large are no noise


@dataclass(frozen=True)
class Choice:
    """The best of some points. `best` is at the interpolated guidance if the scores have a minimum inside, with the score there and its
    standard error; else it is `lowest`, the lowest that was measured. `shares`: in how many of the resamples each guidance tried was best;
    empty where scores have no error. `guidance_se`: standard error of the interpolated guidance; nan without.
    """

    best: Point
    tried: tuple  # all points chosen from
    shares: dict  # guidance -> share of resamples
    edge: str  # "" or at which end of the guidances tried the best one lies: "lowest" | "highest"
    lowest: Point
    guidance_se: float = math.nan

    @property
    def interpolated(self) -> bool:
        return self.best is not self.lowest

    @property
    def share(self) -> float:
        """Share of the resamples in which the guidance with the lowest score is best."""
        return self.shares.get(self.lowest.guidance, math.nan)

    @property
    def warning(self) -> str:
        """What a reader should know about the choice; "" where there is nothing."""
        of = f"{self.best.name}, {self.best.sampling}"
        if self.edge:
            return f"{of}: the best guidance is the {self.edge} tried; the best one may lie beyond"
        if self.interpolated:
            half, tried = 2 * self.guidance_se, [p.guidance for p in self.tried]
            if self.best.guidance - half < min(tried) or self.best.guidance + half > max(tried):
                return f"{of}: the best guidance is uncertain, its standard error is {self.guidance_se:.2g}"
        elif self.share < 0.5:
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
    found = choices(points, [p.name for p in points], log_scores(points, higher, resamples, seed))
    return [_interpolated(c, higher) for c in found]


def _interpolated(choice: Choice, higher: bool) -> Choice:
    """The choice at the best of the interpolated guidances of each sampling."""
    own = _indices([sampling_key(p) for p in choice.tried])
    found = []
    for index in own.values():
        tried = [choice.tried[i] for i in index]
        lowest = min(tried, key=lambda p: -p.score if higher else p.score)
        at = optimum(tried, higher) if lowest.guidance > 0 else None
        best, error = at or (lowest, math.nan)
        found.append((best, "" if best is not lowest else _edge(lowest, tried), lowest, error))
    best, edge, lowest, error = min(found, key=lambda f: -f[0].score if higher else f[0].score)
    return replace(choice, best=best, edge=edge, lowest=lowest, guidance_se=error)


@dataclass(frozen=True)
class _Quadratic:
    """log score = c0 + c1 x + c2 x^2 in x = log guidance through some points of one sampling, and the minimum of it."""

    x: np.ndarray
    c: np.ndarray
    covariance: np.ndarray
    fits: bool  # the residuals are no larger than noise may be

    @property
    def place(self) -> float:
        """log guidance of the minimum; inf without one inside."""
        u = -self.c[1] / (2 * self.c[2]) if self.c[2] > 0 else math.inf
        return u if self.x[0] < u < self.x[-1] else math.inf

    def minimum(self) -> tuple[float, float, float]:
        """(log score, its standard error, the standard error of `place`) at the minimum.

        The minimum of a quadratic through noisy values is lower than that of the true one by c2 times the variance of its place to second
        order. That is added, up to one standard error.
        """
        u, bend = self.place, 2 * self.c[2]
        at, moved = np.array([1.0, u, u**2]), np.array([0.0, 1.0, 2 * u]) / bend
        error, error_u = (math.sqrt(max(float(v @ self.covariance @ v), 0.0)) for v in (at, moved))
        return float(at @ self.c) + min(bend / 2 * error_u**2, error), error, error_u


def _quadratic(points: Sequence[Point], sign: float) -> _Quadratic:
    x, y = np.log([p.guidance for p in points]), sign * np.log([p.score for p in points])
    relative = np.array([p.score_se / p.score for p in points])
    known, freedom = bool(relative.all()), len(points) - 3
    weight = 1 / relative if known else np.ones_like(x)
    design = weight[:, None] * np.stack([np.ones_like(x), x, x**2], 1)
    c = np.linalg.lstsq(design, weight * y, rcond=None)[0]
    squares = float(np.sum((weight * y - design @ c) ** 2))
    scale = 1.0 if known else squares / freedom if freedom else 0.0
    fits = not freedom or (stats.chi2.sf(squares, freedom) > MISFIT if known else scale < COARSE**2)
    return _Quadratic(x, c, scale * np.linalg.inv(design.T @ design), bool(fits))


def optimum(tried: Sequence[Point], higher: bool = False) -> tuple[Point, float] | None:
    """(a point at the best guidance with the score there and its error, the error of that guidance) from scores of one sampling.

    The quadratic goes through up to two guidances on each side of the one nearest to its minimum, which the lowest score stands for at
    first; if it does not fit, through that one and its two neighbours. Scores weigh by their errors if all have them; else the error of
    the score is 0 (not recorded). None with fewer than 3 guidances, or if the lowest score is at their end.
    """
    tried, sign = sorted((p for p in tried if p.guidance > 0), key=lambda p: p.guidance), -1.0 if higher else 1.0
    at = min(range(len(tried)), key=lambda i: sign * tried[i].score, default=0)
    if not 0 < at < len(tried) - 1:
        return None
    kept = None
    for around in (AROUND, AROUND, AROUND, 1):
        own = tried[max(at - around, 0) : at + around + 1]
        found = _quadratic(own, sign)
        inside = math.isfinite(found.place)
        nearest = min(range(1, len(tried) - 1), key=lambda i: abs(math.log(tried[i].guidance) - found.place))
        kept = (found, own) if inside and (found.fits or around == 1) else kept
        if found.fits and (nearest == at or not inside):
            break
        at = nearest if found.fits else at
    if kept is None:
        return None
    (found, own), (log_score, error, error_u) = kept, kept[0].minimum()
    like = min((p for p in own if p.guidance != 1), key=lambda p: abs(math.log(p.guidance) - found.place))
    guidance, score = float(f"{math.exp(found.place):.4g}"), math.exp(sign * log_score)
    known = all(p.score_se for p in own)
    return replace(like, guidance=guidance, score=score, score_se=score * error * known), guidance * error_u


def choices(points: Sequence[Point], keys: Sequence, scores: np.ndarray) -> list[Choice]:
    """One choice per distinct key, in order of appearance; `scores` (1 + resamples, points) as of `log_scores`."""
    groups, samplings = _indices(keys), _indices([sampling_key(p) for p in points])
    found = []
    for index in groups.values():
        members, own = [points[i] for i in index], scores[:, index]
        best = members[int(np.argmin(own[0]))]
        edge = _edge(best, [points[i] for i in samplings[sampling_key(best)]])
        found.append(Choice(best, tuple(members), _shares(members, own[1:]), edge, best))
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
