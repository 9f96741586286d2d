"""The law of a metric of samples in training compute: k C^x, or E + k C^x where the scores bend towards a floor.

FID = k C^x: Liang et al. 2024 (arXiv 2410.08184), section 3, on features of their own; here of any metric, each model at its best
guidance (`choice`). A metric whose own noise or reference leaves a floor E bends above every power law, and a pure law through it predicts
too low scores beyond the data. So both are fitted, and a one-sided t-test of the coefficient of log^2 C in log score chooses. Where it is
undecided, the intervals beyond the data hold both laws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from dit_jax.error import UsageError
from dit_jax.scaling.fits.bootstrap import FEWEST, between
from dit_jax.scaling.fits.fit import INSIDE, NO_INTERVAL, interval
from dit_jax.scaling.fits.law import PowerLaw, fit_irreducible, fit_power
from dit_jax.scaling.frontier.points import Point

FORMS = {"pure": 2, "irreducible": 3}  # of a law, and how many parameters each has
TELLING = 5  # points from which a bend can be told
CHANCE = 0.05  # of the test of a bend
EXACT = 1e-9  # of the log score: scatter that is rounding


@dataclass(frozen=True)
class FormLaw:
    """A law of one form through the points; `draws` holds a law per resample, or None."""

    law: PowerLaw
    draws: PowerLaw | None
    noise: float  # standard deviation of log score about the law; nan without
    freedom: int

    def at(self, flops: float, level: float) -> tuple:
        """(score, interval of the law, interval of one model) at these training FLOPs."""
        if self.draws is None:
            return float(self.law(flops)), NO_INTERVAL, NO_INTERVAL
        law = self.draws(flops)
        run = law * np.exp(self.noise * np.random.default_rng(0).standard_normal(len(law)))
        return float(self.law(flops)), interval(law, level), interval(run, level)


@dataclass(frozen=True)
class MetricLaw:
    """score = irreducible + coefficient C^exponent through the points used, C in training FLOPs.

    `laws` holds what could be fitted of "pure" and "irreducible", `form` the one taken. `bending_p` is the one-sided chance of scores that
    bend upwards as much, were the law pure (nan of fewer than 4 points). `undecided`: the points do not tell the two laws apart.
    """

    used: tuple  # points, by compute
    laws: dict  # form -> FormLaw
    form: str
    bending_p: float
    undecided: bool
    level: float
    warnings: tuple

    @property
    def law(self) -> PowerLaw:
        return self.laws[self.form].law

    @property
    def draws(self) -> PowerLaw | None:
        return self.laws[self.form].draws

    @property
    def noise(self) -> float:
        return self.laws[self.form].noise

    @property
    def smallest(self) -> float:
        return self.used[0].train

    @property
    def largest(self) -> float:
        """Training FLOPs of the largest point used."""
        return self.used[-1].train

    def span(self, part: str) -> tuple:
        """Interval of "coefficient", "exponent" or "irreducible"."""
        return interval(None if self.draws is None else getattr(self.draws, part), self.level)

    def predict(self, flops: float | int) -> dict:
        """The score at these training FLOPs, with the law's interval and that of one model, and the distance from the data.

        `both_laws`: the data do not tell the law's form, so the intervals reach over those of the pure law and of the law with a floor.
        """
        score, law, run = self.laws[self.form].at(flops, self.level)
        both = self.undecided and self.draws is not None and flops > INSIDE * self.largest
        if both:
            others = [f.at(flops, self.level) for f in self.laws.values()]
            law, run = (_around([other[0] for other in others], [other[i] for other in others]) for i in (1, 2))
        return {
            "flops": float(flops),
            "beyond": float(flops / self.largest),
            "score": score,
            "interval": law,
            "run_interval": run,
            "both_laws": both,
        }

    def doubt(self, flops: Sequence[float]) -> str:
        """A warning if a prediction at one of these FLOPs depends on which law holds; else ""."""
        if not any(self.predict(c)["both_laws"] for c in flops):
            return ""
        few = (
            f"{len(self.used)} points are too few"
            if len(self.used) < TELLING
            else f"test of a bend: p = {self.bending_p:.2g}"
        )
        return (
            f"the points do not tell whether the score has a floor ({few}): beyond the data, intervals span the law with a floor and "
            "the one without; --pure or --irreducible chooses"
        )


def _around(values: list, spans: list) -> tuple:
    """From the lowest to the highest of some intervals and of the values of those without any; no interval if none has."""
    if all(math.isnan(low) for low, _ in spans):
        return NO_INTERVAL
    ends = [(v, v) if math.isnan(s[0]) else s for v, s in zip(values, spans, strict=True)]
    return min(low for low, _ in ends), max(high for _, high in ends)


def best_of_budgets(points: Sequence[Point], tolerance: float = 0.05, higher: bool = False) -> list[Point]:
    """The best point of each budget: training FLOPs within `tolerance` of the budget's smallest. By compute, ascending."""
    found: list[Point] = []
    start = -math.inf
    for point in sorted(points, key=training):
        if not found or point.train > start * (1 + tolerance):
            start = point.train
            found.append(point)
        elif (point.score > found[-1].score) == higher and point.score != found[-1].score:
            found[-1] = point
    return found


def training(point: Point) -> float | int:
    """Training FLOPs. Raises UsageError where they are not recorded."""
    if math.isnan(point.train):
        raise UsageError(f"{point.source}: no flops_train of {point.name}, expected its training FLOPs")
    return point.train


def fit_metric(
    points: Sequence[Point],
    *,
    form: str = "",
    higher: bool = False,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> MetricLaw:
    """The law of the points' scores in training compute; every point counts once, so choose first (`choose`, `best_of_budgets`).

    `form`: "pure", "irreducible", or "" = irreducible if the scores bend upwards at the 5 % level, else pure. If more is better (`higher`),
    scores have a ceiling and no floor, and the law is pure. Least squares of log score; with a floor, of the score relative to itself.
    If all scores have errors, points weigh by 1 / (error^2 + tau^2), tau^2 the scatter beyond the errors. Intervals: parametric
    bootstrap with normal errors of log score, the scale redrawn from its chi-squared so that few points give the width of Student's t.
    Raises UsageError on fewer distinct budgets than the law has parameters.
    """
    used = sorted(points, key=training)
    C, y = np.array([p.train for p in used]), np.array([p.score for p in used])
    budgets = len(np.unique(C))
    if budgets < FORMS[form or "pure"]:
        raise UsageError(f"RUNS: found {budgets} budget(s), expected at least {FORMS[form or 'pure']} for this law")
    if form == "irreducible" and higher:
        raise UsageError("--irreducible: found a metric of which more is better, which has no floor; expected --pure")
    variance = _variance(used, C)
    wanted = ("pure",) if form == "pure" or higher else FORMS
    laws = {name: _form(name, C, y, variance, resamples, seed) for name in wanted if budgets >= FORMS[name]}
    p = bend(C, y, variance)
    taken = form or ("irreducible" if p < CHANCE and len(used) >= TELLING and "irreducible" in laws else "pure")
    exact = np.abs(np.log(y / laws["pure"].law(C))).max() < EXACT
    undecided = not form and taken == "pure" and not exact and "irreducible" in laws
    fit = MetricLaw(tuple(used), laws, taken, p, undecided, level, ())
    return MetricLaw(**vars(fit) | {"warnings": _cautions(fit)})


def _variance(used: Sequence[Point], C: np.ndarray) -> np.ndarray:
    """Variance (n,) of log score, relative to its mean over the points; 1 if not all scores have errors."""
    if not all(p.score_se for p in used) or len(used) < 3:
        return np.ones(len(used))
    own, x = np.array([(p.score_se / p.score) ** 2 for p in used]), np.log(C)
    tau = between(np.log([p.score for p in used]), np.stack([np.ones_like(x), x - x.mean()], 1), own)
    return (own + tau) / np.mean(own + tau)


def _form(name: str, C: np.ndarray, y: np.ndarray, variance: np.ndarray, resamples: int, seed: int) -> FormLaw:
    """The law of one form and its resamples."""

    def fit(values: np.ndarray) -> PowerLaw:
        if name == "pure":
            return fit_power(C, values, np.broadcast_to(1 / variance, values.shape))
        return fit_irreducible(C, values, 1 / (values**2 * variance))

    law, freedom = fit(y[None])[0], len(C) - FORMS[name]
    if freedom < 1:
        return FormLaw(law, None, math.nan, freedom)
    noise = math.sqrt(np.sum(np.log(y / law(C)) ** 2 / variance) / freedom)
    rng = np.random.default_rng(seed)
    scale = noise * np.sqrt(freedom / rng.chisquare(freedom, resamples))
    drawn = law(C) * np.exp(scale[:, None] * np.sqrt(variance) * rng.standard_normal((resamples, len(C))))
    return FormLaw(law, fit(drawn) if resamples >= FEWEST else None, noise, freedom)


def bend(C: np.ndarray, y: np.ndarray, variance: np.ndarray) -> float:
    """One-sided t-test of the coefficient of log^2 C in log score: the chance of one as large, were the law pure. nan of too few points."""
    if len(C) < 4 or len(np.unique(C)) < 3:
        return math.nan
    x = np.log(C) - np.log(C).mean()
    design = np.stack([np.ones_like(x), x, x**2], 1) / np.sqrt(variance)[:, None]
    target = np.log(y) / np.sqrt(variance)
    found = np.linalg.lstsq(design, target, rcond=None)[0]
    noise = math.sqrt(np.sum((target - design @ found) ** 2) / (len(C) - 3))
    error = max(noise, EXACT) * math.sqrt(np.linalg.inv(design.T @ design)[2, 2])
    return float(stats.t.sf(found[2] / error, len(C) - 3))


def _cautions(fit: MetricLaw) -> tuple:
    """What a reader should know about the law."""
    taken, found = fit.laws[fit.form], []
    if taken.freedom < 1:
        count = FORMS[fit.form]
        return (f"no interval: {len(fit.used)} points and {count} parameters leave nothing to judge the scatter by",)
    if taken.draws is None:
        return ()
    low, high = fit.span("exponent")
    if low <= 0 <= high and fit.form == "pure":
        found.append(
            f"the data do not show that the metric depends on compute: its exponent is {low:.3f} to {high:.3f}"
        )
    if fit.form == "irreducible" and fit.span("irreducible")[0] == 0:
        found.append("the irreducible term is not pinned down: its interval reaches 0")
    unexplained = fit.form == "pure" and (fit.bending_p < CHANCE or fit.bending_p > 1 - CHANCE / 2)
    if (
        unexplained
        and len(fit.used) >= TELLING
        and np.abs(np.log([p.score / fit.law(p.train) for p in fit.used])).max() > EXACT
    ):
        found.append(
            f"the scores bend {'above' if fit.bending_p < 0.5 else 'below'} a power law (p = {min(fit.bending_p, 1 - fit.bending_p):.2g}): "
            "its predictions beyond the data are doubtful"
        )
    return tuple(found)
