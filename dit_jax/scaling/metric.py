"""Laws of a metric of samples: against training compute, against a second data set, and against the held-out loss.

FID = k C^x: Liang et al. 2024 (arXiv 2410.08184), section 3, on features of their own; here of any metric, each model at its best
guidance (`choice`). Their study of a second data set finds the same trend with an offset, constant for the losses, growing
with compute for FID: `fit_offset` tests which. Laws are fitted to logarithms; an offset is a ratio unless asked for as a difference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from dit_jax.error import UsageError
from dit_jax.scaling.law import PowerLaw, fit_irreducible, fit_power
from dit_jax.scaling.points import Point
from dit_jax.scaling.predict import NO_INTERVAL, interval

FEWEST = 400  # simulated sets of ranks
LAST, ROUNDS = 6.0, 14  # artanh of the strongest correlation looked at, and halvings of what is left of the range


@dataclass(frozen=True)
class MetricLaw:
    """score = irreducible + coefficient C^exponent through the points used; `draws` holds a law per resample, or None."""

    used: tuple  # points, by compute
    law: PowerLaw
    draws: PowerLaw | None
    noise: float  # standard deviation of log score about the law; nan without
    freedom: int
    level: float
    warnings: tuple

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
        """The score at these training FLOPs, with the law's interval and that of one model, and the distance from the data."""
        law = run = None
        if self.draws is not None:
            law = self.draws(flops)
            run = law * np.exp(self.noise * np.random.default_rng(0).standard_normal(len(law)))
        return {
            "flops": float(flops),
            "beyond": float(flops / self.largest),
            "score": float(self.law(flops)),
            "interval": interval(law, self.level),
            "run_interval": interval(run, self.level),
        }


@dataclass(frozen=True)
class Offset:
    """log(other / one), or other - one, = offset + growth x log10(C / centre), by least squares over the models measured on both.

    `verdict`: "constant" where the interval of `growth` holds 0, else "growing" or "shrinking" as the offset's size does with
    compute. "constant" is no proof: `growth_interval` says what growth the data still allow.
    """

    models: int
    linear: bool  # a difference; else the logarithm of a ratio
    centre: float  # geometric mean of the models' training FLOPs
    offset: float
    offset_interval: tuple
    growth: float  # per factor of 10 in compute
    growth_interval: tuple
    p_value: float  # of no growth, two-sided t-test
    verdict: str
    level: float

    def shift(self, score, flops: float | int):
        """The score on the other data set of a model with this score on the one and this training compute."""
        offset = self.offset + self.growth * math.log10(flops / self.centre)
        return score + offset if self.linear else score * math.exp(offset)


@dataclass(frozen=True)
class Correlation:
    """Of the held-out loss with the metric: Pearson's of the logarithms and Spearman's, with intervals."""

    models: int
    pearson: float
    pearson_interval: tuple
    spearman: float
    spearman_interval: tuple
    level: float


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
    irreducible: bool = False,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> MetricLaw:
    """The law of the points' scores in training compute; every point counts once, so choose first (`choose`, `best_of_budgets`).

    Least squares of log score; with `irreducible`, of the score relative to itself. Intervals: parametric bootstrap with normal
    errors of log score, the scale redrawn from its chi-squared so that few points give the width of Student's t. The scatter holds
    what the evaluation and the choices add. Raises UsageError on fewer distinct budgets than the law has parameters.
    """
    used = sorted(points, key=training)
    C, y = np.array([p.train for p in used]), np.array([p.score for p in used])
    wanted = 3 if irreducible else 2
    if len(np.unique(C)) < wanted:
        raise UsageError(f"RUNS: found {len(np.unique(C))} budget(s), expected at least {wanted} for this law")
    fit = _irreducible if irreducible else _pure
    law = fit(C, y[None])[0]
    freedom = len(used) - wanted
    residuals = np.log(y / law(C))
    warnings, draws, noise = [], None, math.nan
    if freedom > 0:
        noise = math.sqrt(np.sum(residuals**2) / freedom)
        rng = np.random.default_rng(seed)
        scale = noise * np.sqrt(freedom / rng.chisquare(freedom, resamples))
        drawn = law(C) * np.exp(scale[:, None] * rng.standard_normal((resamples, len(C))))
        draws = fit(C, drawn) if resamples >= 20 else None
        warnings += _cautions(law, draws, irreducible, level)
    else:
        warnings.append(
            f"no interval: {len(used)} points and {wanted} parameters leave nothing to judge the scatter by"
        )
    return MetricLaw(tuple(used), law, draws, noise, freedom, level, tuple(warnings))


def _pure(C: np.ndarray, y: np.ndarray) -> PowerLaw:
    return fit_power(C, y, np.ones_like(y))


def _irreducible(C: np.ndarray, y: np.ndarray) -> PowerLaw:
    return fit_irreducible(C, y, 1 / y**2)


def _cautions(law: PowerLaw, draws: PowerLaw | None, irreducible: bool, level: float) -> list[str]:
    if draws is None:
        return []
    low, high = interval(draws.exponent, level)
    found = []
    if low <= 0 <= high and not irreducible:
        found.append(
            f"the data do not show that the metric depends on compute: its exponent is {low:.3f} to {high:.3f}"
        )
    if irreducible and interval(draws.irreducible, level)[0] == 0:
        found.append("the irreducible term is not pinned down: its interval reaches 0")
    return found


def fit_offset(one: Sequence[Point], other: Sequence[Point], *, linear: bool = False, level: float = 0.95) -> Offset:
    """How the scores of the same models on another data set lie above those on one, and whether that changes with compute.

    Models are paired by name, so that what a model has in common on both drops out. Raises UsageError on fewer than 3 pairs or
    budgets, and where a model's training compute differs.
    """
    pairs = _pairs(one, other)
    d = np.array([b.score - a.score if linear else math.log(b.score / a.score) for a, b in pairs])
    x = np.log10([a.train for a, _ in pairs])
    u = x - x.mean()
    growth, freedom = float(u @ d / (u @ u)), len(d) - 2
    noise = math.sqrt(np.sum((d - d.mean() - growth * u) ** 2) / freedom)
    error = noise / math.sqrt(u @ u)
    t = float(stats.t.ppf((1 + level) / 2, freedom))
    exact = error <= 1e-12 * max(1.0, abs(d).max())
    p_value = float(abs(growth) < 1e-9) if exact else float(2 * stats.t.sf(abs(growth) / error, freedom))
    verdict = "constant"
    if p_value < 1 - level:
        verdict = "growing" if growth * d.mean() > 0 else "shrinking"
    half = t * noise / math.sqrt(len(d))
    return Offset(
        models=len(d),
        linear=linear,
        centre=float(10 ** x.mean()),
        offset=float(d.mean()),
        offset_interval=(float(d.mean() - half), float(d.mean() + half)),
        growth=growth,
        growth_interval=(growth - t * error, growth + t * error),
        p_value=p_value,
        verdict=verdict,
        level=level,
    )


def _pairs(one: Sequence[Point], other: Sequence[Point]) -> list[tuple[Point, Point]]:
    ours = {p.name: p for p in one}
    pairs = [(ours[p.name], p) for p in other if p.name in ours]
    if len({training(a) for a, _ in pairs}) < 3:
        names = f"{', '.join(sorted(ours)[:3])} and {', '.join(sorted(p.name for p in other)[:3])}"
        raise UsageError(f"--against: {len(pairs)} models are in both, expected at least 3 budgets; found {names} ...")
    for a, b in pairs:
        if not math.isclose(a.train, training(b), rel_tol=1e-6):
            raise UsageError(f"{b.source}: {b.name} has flops_train {b.train:g}, but {a.train:g} in {a.source}")
    return pairs


def correlate(points: Sequence[Point], *, resamples: int = 2000, seed: int = 0, level: float = 0.95) -> Correlation:
    """Held-out loss against score, one pair per run. Raises UsageError on fewer than 4 runs that carry both.

    Pearson's interval: bootstrap of whole runs, percentiles expanded to the width that n - 1 degrees of freedom ask for (Hesterberg
    2015, arXiv 1411.5279); resamples with fewer than 3 distinct runs are left out. Spearman's: `_spearman_interval`.
    """
    pairs = [(p.loss, p.score) for p in points if not math.isnan(p.loss)]
    if len(pairs) < 4:
        raise UsageError(f"RUNS: {len(pairs)} models have both a held-out loss and the metric, expected at least 4")
    x, y = np.log(np.array(pairs)).T
    rng, n = np.random.default_rng(seed), len(x)
    index = rng.integers(n, size=(resamples, n))
    ordered = np.sort(index, axis=1)
    index = index[(np.diff(ordered, axis=1) > 0).sum(axis=1) >= 2]
    drawn = _pearson(x[index], y[index])
    expanded = 1 - 2 * float(stats.norm.sf(math.sqrt(n / (n - 1)) * stats.t.ppf((1 + level) / 2, n - 1)))
    spearman = float(_spearman(x, y))
    return Correlation(
        models=n,
        pearson=float(_pearson(x, y)),
        pearson_interval=interval(drawn[np.isfinite(drawn)], expanded),
        spearman=spearman,
        spearman_interval=_spearman_interval(spearman, rng.standard_normal((2, max(resamples, FEWEST), n)), level),
        level=level,
    )


def _spearman_interval(value: float, normal: np.ndarray, level: float) -> tuple:
    """The Spearman correlations of a population of which n runs show `value` with a chance that the level allows.

    `normal` (2, resamples, n) are the normal numbers to simulate with. Ranks that nearly agree tell resampled runs nothing of how else they
    might have come out, and of few runs their correlation has few values. So the exact test is turned around: for a bivariate normal
    population, transformed at will, the distribution of the ranks depends on its correlation r alone and is simulated, with the same
    numbers for every r. An end is where the chance beyond `value`, half of that of `value` itself added (mid-p: Lancaster 1961), is
    (1 - level) / 2; Spearman's of the population is 6 / pi arcsin(r / 2) (Pearson 1907).
    """
    if not math.isfinite(value):
        return NO_INTERVAL
    x, e = normal
    ranks, tail = stats.rankdata(x, axis=1), (1 - level) / 2

    def end(sign: int) -> float:
        low, high = -LAST, LAST  # of artanh r
        for _ in range(ROUNDS):
            middle = (low + high) / 2
            r = math.tanh(middle)
            drawn = _pearson(ranks, stats.rankdata(r * x + math.sqrt(1 - r * r) * e, axis=1))
            beyond = np.mean(sign * (drawn - value) > 1e-9) + 0.5 * np.mean(abs(drawn - value) <= 1e-9)
            low, high = (middle, high) if (beyond < tail) == (sign > 0) else (low, middle)
        r = math.copysign(1.0, high) if abs(high) == LAST or abs(low) == LAST else math.tanh((low + high) / 2)
        return 6 / math.pi * math.asin(r / 2)

    return end(1), end(-1)


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _pearson(stats.rankdata(x), stats.rankdata(y))


def _pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlation along the last axis; nan where one of them is constant."""
    x, y = (v - v.mean(-1, keepdims=True) for v in (x, y))
    scale = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    return np.where(scale > 0, (x * y).sum(-1) / np.where(scale > 0, scale, 1.0), math.nan)
