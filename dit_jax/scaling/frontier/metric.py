"""The law of a metric of samples in training compute: k C^x, or E + k C^x where the scores bend towards a floor.

FID = k C^x: Liang et al. 2024 (arXiv 2410.08184), section 3, on features of their own; here of any metric, each model at its best
guidance (`choice`). A metric whose own noise or reference leaves a floor E bends above every power law, and a pure law through it predicts
too low scores beyond the data. So both are fitted, and a one-sided t-test of the coefficient of log^2 C in log score chooses. Where it is
undecided, the intervals beyond the data hold both laws. The law taken is then tried as the laws of the loss are (`verdicts.beyond`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import special

from dit_jax.error import UsageError
from dit_jax.scaling.fits.bootstrap import FEWEST, between
from dit_jax.scaling.fits.fit import INSIDE, NO_INTERVAL, Fit, interval
from dit_jax.scaling.fits.fit import Point as Optimum
from dit_jax.scaling.fits.law import PowerLaw, fit_irreducible, fit_power
from dit_jax.scaling.frontier.points import Point, training
from dit_jax.scaling.verdicts import beyond

FORMS = {"pure": 2, "irreducible": 3}  # of a law, and how many parameters each has
TELLING = 5  # points from which a bend can be told
CHANCE = 0.05  # of the test of a bend
EXACT = 1e-9  # of the log score: scatter that is rounding
UNKNOWN = 1e-6  # of a score without an error, so that trials take the scatter of the points for it


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
    warnings: tuple = ()

    @property
    def taken(self) -> FormLaw:
        """The law of the form taken."""
        return self.laws[self.form]

    @property
    def law(self) -> PowerLaw:
        return self.taken.law

    @property
    def largest(self) -> float:
        """Training FLOPs of the largest point used."""
        return self.used[-1].train

    def span(self, part: str) -> tuple:
        """Interval of "coefficient", "exponent" or "irreducible"."""
        return interval(None if self.taken.draws is None else getattr(self.taken.draws, part), self.level)

    def predict(self, flops: float | int) -> dict:
        """The score at these training FLOPs, with the law's interval and that of one model, and the distance from the data.

        `both_laws`: the data do not tell the law's form, so the intervals reach over those of the pure law and of the law with a floor.
        """
        score, law, run = self.taken.at(flops, self.level)
        both = self.undecided and self.taken.draws is not None and flops > INSIDE * self.largest
        if both:  # of a form without an interval, its value
            others = [f.at(flops, self.level) for f in self.laws.values()]
            ends = [[(o[0], o[0]) if math.isnan(o[i][0]) else o[i] for o in others] for i in (1, 2)]
            law, run = ((min(low for low, _ in e), max(high for _, high in e)) for e in ends)
        out = {"flops": float(flops), "beyond": float(flops / self.largest), "score": score}
        return out | {"interval": law, "run_interval": run, "both_laws": both}

    def doubt(self, flops: Sequence[float]) -> str:
        """A warning if a prediction at one of these FLOPs depends on which law holds; else ""."""
        if not any(self.predict(c)["both_laws"] for c in flops):
            return ""
        why = f"test of a bend: p = {self.bending_p:.2g}"
        why = f"{len(self.used)} points are too few" if len(self.used) < TELLING else why
        return (
            f"the points do not tell whether the score has a floor ({why}): beyond the data, intervals span the law with a floor and "
            "the one without; --pure or --irreducible chooses"
        )


def best_of_budgets(points: Sequence[Point], tolerance: float = 0.05, higher: bool = False) -> list[Point]:
    """The best point of each budget: training FLOPs within `tolerance` of the budget's smallest. By compute, ascending."""
    found: list[Point] = []
    start = -math.inf
    for point in sorted(points, key=training):
        if point.train > start * (1 + tolerance):
            start = point.train
            found.append(point)
        elif (point.score > found[-1].score) == higher and point.score != found[-1].score:
            found[-1] = point
    return found


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
        least = f"expected at least {FORMS[form or 'pure']} for this law (--curves reads every step of a run)"
        raise UsageError(f"RUNS: found {budgets} budget(s), {least}")
    if form == "irreducible" and higher:
        raise UsageError("--irreducible: found a metric of which more is better, which has no floor; expected --pure")
    variance = _variance(used, C)
    wanted = ("pure",) if form == "pure" or higher else FORMS
    laws = {name: _form(name, C, y, variance, resamples, seed) for name in wanted if budgets >= FORMS[name]}
    p = bend(C, y, variance)
    taken = form or ("irreducible" if p < CHANCE and len(used) >= TELLING and "irreducible" in laws else "pure")
    exact = np.abs(np.log(y / laws["pure"].law(C))).max() < EXACT
    undecided = not form and taken == "pure" and not exact and "irreducible" in laws
    fit = MetricLaw(tuple(used), laws, taken, p, undecided, level)
    return replace(fit, warnings=_cautions(fit))


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
    design = np.vander(x, 3, increasing=True) / np.sqrt(variance)[:, None]
    target = np.log(y) / np.sqrt(variance)
    found = np.linalg.lstsq(design, target, rcond=None)[0]
    noise = math.sqrt(np.sum((target - design @ found) ** 2) / (len(C) - 3))
    error = max(noise, EXACT) * math.sqrt(np.linalg.inv(design.T @ design)[2, 2])
    return float(special.stdtr(len(C) - 3, -found[2] / error))


def doubts(fit: MetricLaw, metric: str) -> list[str]:
    """Why the law may not be followed beyond the data: it bends in log^2 C.

    Its ends are no test, as they are of a law of the loss: intervals here are those of the scatter about the law, which a bend widens, so
    that the laws without the smallest and without the largest compute agree within them however much they differ.
    """
    if fit.taken.draws is None or math.isnan(fit.taken.noise):
        return []
    trial = (beyond.bending_of_loss if fit.law.irreducible else beyond.bending_of_size)(_as_fit(fit))
    if trial is None or not trial.fails:
        return []
    return [beyond.NOT + trial.found.replace("N_opt", metric).replace("L_opt", metric).replace("loss", metric)]


def _as_fit(fit: MetricLaw) -> Fit:
    """The law as one of the fits, for their trials: with a floor in the place of the law of L_opt, else in that of N_opt."""
    name, law = "L_opt" if fit.law.irreducible else "N_opt", fit.taken
    errors = [p.score_se or UNKNOWN * p.score for p in fit.used]
    points = tuple(
        Optimum(p.name, p.train, (p,), n_opt=p.score, loss=p.score, n_se=e / p.score, loss_se=e)
        for p, e in zip(fit.used, errors, strict=True)
    )
    none = dict(loss=lambda n, d: math.nan, loss_draws=None, noise=law.noise, noise_draws=np.zeros(0))
    numbers = dict(k=1.0, objective=math.nan, level=fit.level, resamples=0)
    return Fit(
        "metric", fit.used, {name: law.law}, {name: law.draws} if law.draws else {}, points=points, **none, **numbers
    )


def _cautions(fit: MetricLaw) -> tuple:
    """What a reader should know about the law."""
    if fit.taken.freedom < 1:
        count = FORMS[fit.form]
        return (f"no interval: {len(fit.used)} points and {count} parameters leave nothing to judge the scatter by",)
    found, (low, high) = [], fit.span("exponent")
    if low <= 0 <= high and fit.form == "pure":
        text = f"the data do not show that the metric depends on compute: its exponent is {low:.3f} to {high:.3f}"
        found.append(text)
    if fit.form == "irreducible" and fit.span("irreducible")[0] == 0:
        found.append("the irreducible term is not pinned down: its interval reaches 0")
    return tuple(found)


def correlate(points: Sequence[Point], level: float = 0.95) -> dict:
    """Held-out loss with score, one pair per model: Pearson's of the logarithms with Fisher's interval, and Spearman's.

    Raises UsageError on fewer than 4 models that carry both.
    """
    from scipy import stats  # half a second, for this alone

    pairs = [(p.loss, p.score) for p in points if not math.isnan(p.loss)]
    if len(pairs) < 4:
        raise UsageError(f"RUNS: {len(pairs)} models have both a held-out loss and the metric, expected at least 4")
    x, y = np.log(np.array(pairs)).T
    pearson = stats.pearsonr(x, y)
    ends = tuple(float(v) for v in pearson.confidence_interval(level))
    out = {"models": len(pairs), "pearson": float(pearson.statistic), "pearson_interval": ends}
    return out | {"spearman": float(stats.spearmanr(x, y).statistic)}
