"""All statistics of a set of images that its metrics need, streamed over batches in any order and merged across processes."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dit_jax.metrics import frechet, inception_score
from dit_jax.metrics.features import check_room


@dataclass(frozen=True)
class Plan:
    """What is known of a set beforehand. It must be the same in all parts that are merged.

    `total` samples; `splits` of the Inception Score and the `seed` they are shuffled with (None: in order); `keep` the pooled
    features of all samples as float32 (50,000 x 2048 take 410 MB), which kernel distance, precision and recall and
    resampling need.
    """

    total: int
    splits: int = 10
    seed: int | None = None
    keep: bool = False


@dataclass(frozen=True)
class Statistics:
    """Of the samples seen: for FID `pool`, for sFID `spatial`, for the Inception Score `scores` of each split.

    `kept` holds (index of the first, pooled features float32) of each batch where the plan says so.
    """

    plan: Plan
    pool: frechet.Statistics
    spatial: frechet.Statistics
    scores: tuple[inception_score.Sums, ...]
    kept: tuple[tuple[int, np.ndarray], ...] = ()


def empty(plan: Plan, pool: int = 2048, spatial: int = 2023, classes: int = 1008) -> Statistics:
    """Statistics of no samples yet; the widths are the Inception network's. Raises ValueError on too many to keep."""
    if plan.keep:
        check_room(plan.total, pool)
    inception_score.assign(plan.total, plan.splits)
    scores = tuple(inception_score.empty(classes) for _ in range(plan.splits))
    return Statistics(plan, frechet.empty(pool), frechet.empty(spatial), scores)


def update(
    stats: Statistics, start: int, pool: npt.ArrayLike, spatial: npt.ArrayLike, logits: npt.ArrayLike
) -> Statistics:
    """Adds samples start, start + 1, ...: pool (b, 2048), spatial (b, 2023), logits (b, 1008), float32.

    Raises ValueError on other shapes, values that are not finite, and samples beyond the plan's total.
    """
    pool, logits, plan = np.asarray(pool), np.asarray(logits), stats.plan
    if not len(pool) == len(logits) == len(np.asarray(spatial)) or start < 0 or start + len(pool) > plan.total:
        sizes = (len(pool), len(np.asarray(spatial)), len(logits))
        raise ValueError(f"statistics: found {sizes} features from sample {start}, expected alike, of {plan.total}")
    split = inception_score.assign(plan.total, plan.splits, plan.seed)[start : start + len(pool)]
    scores = (inception_score.update(s, logits[split == i]) for i, s in enumerate(stats.scores))
    kept = ((start, pool.astype(np.float32)),) if plan.keep and len(pool) else ()
    return replace(
        stats,
        pool=frechet.update(stats.pool, pool),
        spatial=frechet.update(stats.spatial, spatial),
        scores=tuple(scores),
        kept=stats.kept + kept,
    )


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Statistics of both parts; the same in any grouping and order up to rounding."""
    if a.plan != b.plan:
        raise ValueError(f"statistics: found the plans {a.plan} and {b.plan}, expected the same")
    return Statistics(
        a.plan,
        frechet.merge(a.pool, b.pool),
        frechet.merge(a.spatial, b.spatial),
        tuple(inception_score.merge(x, y) for x, y in zip(a.scores, b.scores, strict=True)),
        a.kept + b.kept,
    )


def features(stats: Statistics) -> np.ndarray:
    """The kept pooled features (total, 2048), float32, in the samples' order.

    Raises ValueError where they were not kept, or a sample is missing or there twice.
    """
    place, parts = 0, sorted(stats.kept, key=lambda part: part[0])
    for start, part in parts:
        if start != place:
            raise ValueError(f"statistics: sample {min(start, place)} is missing or there twice, expected each once")
        place += len(part)
    if place != stats.plan.total:
        raise ValueError(f"statistics: found kept features of {place} samples, expected {stats.plan.total}")
    return np.concatenate([part for _, part in parts])
