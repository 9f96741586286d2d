"""How a metric relates to the held-out loss of the same models, and to the same metric on a second data set.

Liang et al. 2024 (arXiv 2410.08184), section 3, find the same trend on a second data set with an offset, constant for the losses, growing
with compute for FID: `fit_offset` tests which.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from dit_jax.error import UsageError
from dit_jax.scaling.frontier.metric import training
from dit_jax.scaling.frontier.points import Point


def fit_offset(one: Sequence[Point], other: Sequence[Point], level: float = 0.95) -> dict:
    """How the scores of the same models on another data set lie above those on one: log(other / one) = offset + growth x log10(C / centre)
    by least squares, with Student's t.

    `verdict` is "constant" where the interval of `growth` holds 0, which is no proof: `growth_interval` has what growth the data still
    allow. Models are paired by name, so that what a model has in common on both drops out. Raises UsageError on fewer than 3 budgets, and
    where a model's training compute differs.
    """
    ours = {p.name: p for p in one}
    pairs = [(ours[p.name], p) for p in other if p.name in ours]
    if len({training(a) for a, _ in pairs}) < 3:
        names = f"{', '.join(sorted(ours)[:3])} and {', '.join(sorted(p.name for p in other)[:3])}"
        raise UsageError(f"--against: {len(pairs)} models are in both, expected at least 3 budgets; found {names} ...")
    for a, b in pairs:
        if not math.isclose(a.train, training(b), rel_tol=1e-6):
            raise UsageError(f"{b.source}: {b.name} has flops_train {b.train:g}, but {a.train:g} in {a.source}")
    d, x = np.array([math.log(b.score / a.score) for a, b in pairs]), np.log10([a.train for a, _ in pairs])
    fit, t = stats.linregress(x - x.mean(), d), float(stats.t.ppf((1 + level) / 2, len(d) - 2))
    offset, growth, half, error = (
        float(v) for v in (fit.intercept, fit.slope, t * fit.intercept_stderr, t * fit.stderr)
    )
    verdict = "constant" if not abs(growth) > max(error, 1e-9) else "growing" if growth * offset > 0 else "shrinking"
    out = {"models": len(d), "centre": float(10 ** x.mean()), "offset": offset, "growth": growth, "verdict": verdict}
    return out | {
        "offset_interval": (offset - half, offset + half),
        "growth_interval": (growth - error, growth + error),
    }


def correlate(points: Sequence[Point], level: float = 0.95) -> dict:
    """Held-out loss with score, one pair per model: Pearson's of the logarithms with Fisher's interval, and Spearman's.

    Raises UsageError on fewer than 4 models that carry both.
    """
    pairs = [(p.loss, p.score) for p in points if not math.isnan(p.loss)]
    if len(pairs) < 4:
        raise UsageError(f"RUNS: {len(pairs)} models have both a held-out loss and the metric, expected at least 4")
    x, y = np.log(np.array(pairs)).T
    pearson = stats.pearsonr(x, y)
    ends = tuple(float(v) for v in pearson.confidence_interval(level))
    out = {"models": len(pairs), "pearson": float(pearson.statistic), "pearson_interval": ends}
    return out | {"spearman": float(stats.spearmanr(x, y).statistic)}
