"""How a metric relates to a second data set and to the held-out loss of the same models.

Liang et al. 2024 (arXiv 2410.08184), section 3, find the same trend on a second data set with an offset, constant for the losses, growing
with compute for FID: `fit_offset` tests which. An offset is a ratio unless asked for as a difference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from dit_jax.error import UsageError
from dit_jax.scaling.fits.fit import NO_INTERVAL, interval
from dit_jax.scaling.frontier.metric import training
from dit_jax.scaling.frontier.points import Point

FEWEST = 400  # simulated sets of ranks
LAST, ROUNDS = 6.0, 14  # artanh of the strongest correlation looked at, and halvings of what is left of the range


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
