"""The best guidance of each model, and if asked the best steps, sampler and spacing: chosen before models are compared.

Mei et al. 2024 (arXiv 2404.01367), section 4: the best guidance depends on the model and on the number of steps, so one guidance
for all favours some of them. The lowest of noisy scores is too low (winner's curse), so the best guidance is the minimum of a quadratic of
log score in log guidance, through up to five guidances around the lowest; and so is the best number of steps, if there are three or more.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import special

from dit_jax.error import UsageError
from dit_jax.scaling.frontier.points import SAMPLING, Point
from dit_jax.scaling.names import HOW

KEYS = ("sampler", "spacing", "steps", *HOW)
AROUND = 2  # guidances on each side of the lowest that a quadratic goes through
MISFIT = 0.01  # chance of residuals as large, below which a quadratic through more than three guidances does not fit
COARSE = 0.1  # the same of scores without errors: relative residuals this large are no noise


@dataclass(frozen=True)
class Choice:
    """The best of some points. `best` is at the interpolated guidance if the scores have a minimum inside, with the score there and its
    standard error; else it is `lowest`, the lowest that was measured. `guidance_se`: standard error of the interpolated guidance."""

    best: Point
    tried: tuple  # all points chosen from
    edge: str  # "" or at which end of the guidances tried the best one lies: "lowest" | "highest"
    lowest: Point
    guidance_se: float = math.nan

    @property
    def interpolated(self) -> bool:
        return self.best is not self.lowest

    @property
    def warning(self) -> str:
        """What a reader should know about the choice; "" where there is nothing."""
        of, half, tried = (
            f"{self.best.name}, {self.best.sampling}",
            2 * self.guidance_se,
            [p.guidance for p in self.tried],
        )
        if self.edge:
            return f"{of}: the best guidance is the {self.edge} tried; the best one may lie beyond"
        if self.interpolated and not min(tried) + half <= self.best.guidance <= max(tried) - half:
            return f"{of}: the best guidance is uncertain, its standard error is {self.guidance_se:.2g}"
        return ""


def choose(points: Sequence[Point], over: Sequence[str] = ("guidance",), *, higher: bool = False) -> list[Choice]:
    """One choice per model: the best over the fields `over` (of SAMPLING). Raises UsageError where another field varies."""
    for name in SAMPLING:
        values = {_key(p, (name,)) for p in points}
        if name not in over and len(values) > 1:
            found = ", ".join(sorted(str(v[0]) for v in values))
            raise UsageError(
                f"RUNS: found {name} {found}, expected one; take one with --where samples.{name}=VALUE (--where {name}=VALUE "
                f"of a CSV), or choose the best of each model with --choose={','.join((*over, name))}"
            )
    return [_interpolated(c, higher) for c in lowest(points, [p.name for p in points], higher)]


def lowest(points: Sequence[Point], keys: Sequence, higher: bool = False) -> list[Choice]:
    """One choice per distinct key, in order of appearance, of the scores as measured."""
    samplings, found = _indices([sampling_key(p) for p in points]), []
    for index in _indices(keys).values():
        members = [points[i] for i in index]
        best = min(members, key=lambda p: -p.score if higher else p.score)
        edge = _edge(best, [points[i] for i in samplings[sampling_key(best)]])
        found.append(Choice(best, tuple(members), edge, best))
    return found


def _interpolated(choice: Choice, higher: bool) -> Choice:
    """The choice at the best of the interpolated guidances of each sampling, and of the interpolated steps through these."""
    sign, found = -1.0 if higher else 1.0, []
    for index in _indices([sampling_key(p) for p in choice.tried]).values():
        tried = [choice.tried[i] for i in index]
        lowest = min(tried, key=lambda p: sign * p.score)
        best, error = optimum(tried, higher) or (lowest, math.nan)
        found.append((best, "" if best is not lowest else _edge(lowest, tried), lowest, error))
    for index in _indices([_key(f[0], tuple(k for k in KEYS if k != "steps")) for f in found]).values():
        own = [found[i] for i in index]
        steps = optimum([f[0] for f in own], higher, "steps")
        if steps:
            _, edge, lowest, error = min(own, key=lambda f: abs(math.log(f[0].steps / steps[0].steps)))
            found.append((steps[0], edge, lowest, error))
    best, edge, lowest, error = min(found, key=lambda f: sign * f[0].score)
    return replace(choice, best=best, edge=edge, lowest=lowest, guidance_se=error)


def optimum(tried: Sequence[Point], higher: bool = False, axis: str = "guidance") -> tuple[Point, float] | None:
    """(a point at the best guidance with the score there and its error, the error of that guidance) from scores of one sampling; or, with
    `axis` steps, at the best number of steps.

    The quadratic goes through up to two guidances on each side of the one nearest to its minimum, which the lowest score stands for at
    first; if it does not fit, through that one and its two neighbours. Scores weigh by their errors if all have them; else the error of
    the score is 0 (not recorded). None with fewer than 3 guidances, or if the lowest score is at their end.
    """
    sign = -1.0 if higher else 1.0
    tried = sorted((p for p in tried if getattr(p, axis) > 0), key=lambda p: getattr(p, axis))
    x = np.log([getattr(p, axis) for p in tried])
    at = min(range(len(tried)), key=lambda i: sign * tried[i].score, default=0)
    if not 0 < at < len(tried) - 1:
        return None
    kept = None
    for around in (AROUND, AROUND, AROUND, 1):
        part = slice(max(at - around, 0), at + around + 1)
        fits, place, *ends = _quadratic(tried[part], x[part], sign)
        inside = x[part][0] < place < x[part][-1]
        nearest = 1 + int(np.argmin(abs(x[1:-1] - place)))
        kept = (part, place, *ends) if inside and (fits or around == 1) else kept
        if fits and (nearest == at or not inside):
            break
        at = nearest if fits else at
    if kept is None:
        return None
    part, place, log_score, error, error_x = kept
    own = [p for p in tried[part] if axis != "guidance" or p.guidance != 1]
    like, value = min(own, key=lambda p: abs(math.log(getattr(p, axis)) - place)), float(f"{math.exp(place):.4g}")
    score = math.exp(sign * log_score)
    error *= all(p.score_se for p in tried[part])
    return replace(like, **{axis: value}, score=score, score_se=score * error), value * error_x


def _quadratic(points: Sequence[Point], x: np.ndarray, sign: float) -> tuple:
    """(whether the residuals are no larger than noise may be, the place of the minimum or inf, log score there, its standard error, that of
    the place) of log score = c0 + c1 x + c2 x^2.

    The minimum of a quadratic through noisy values is lower than that of the true one by c2 times the variance of its place to second
    order. That is added, up to one standard error.
    """
    y, relative = sign * np.log([p.score for p in points]), np.array([p.score_se / p.score for p in points])
    known, freedom = bool(relative.all()), len(points) - 3
    weight = 1 / relative if known else np.ones_like(x)
    design = weight[:, None] * np.vander(x, 3, increasing=True)
    c = np.linalg.lstsq(design, weight * y, rcond=None)[0]
    squares = float(np.sum((weight * y - design @ c) ** 2))
    scale = 1.0 if known else squares / freedom if freedom else 0.0
    fits = not freedom or (special.chdtrc(freedom, squares) > MISFIT if known else scale < COARSE**2)
    if c[2] <= 0:
        return bool(fits), math.inf, math.nan, math.nan, math.nan
    covariance, place, bend = scale * np.linalg.inv(design.T @ design), float(-c[1] / (2 * c[2])), float(2 * c[2])
    at, moved = np.array([1.0, place, place**2]), np.array([0.0, 1.0, 2 * place]) / bend
    error, error_x = (math.sqrt(max(float(v @ covariance @ v), 0.0)) for v in (at, moved))
    return bool(fits), place, float(at @ c) + min(bend / 2 * error_x**2, error), error, error_x


def _indices(keys: Sequence) -> dict:
    """Key -> where it is, in order of appearance."""
    found: dict = {}
    for i, key in enumerate(keys):
        found.setdefault(key, []).append(i)
    return found


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
    """What choices of guidance are made within: a model, and all of its sampling but the guidance."""
    return (point.name, *_key(point))


def one_guidance(found: Sequence[Choice]) -> str:
    """A warning where no choice had a second guidance; else ""."""
    if all(len({p.guidance for p in c.tried}) < 2 or math.isnan(c.best.guidance) for c in found):
        return "one guidance only was tried: models are compared at it, not each at its best"
    return ""
