"""Inception Score from logits, by float64 sums that stream over batches, one set per split.

IS = exp(E_x KL(p(y|x) || p(y)))   (Salimans et al. 2016, arXiv 1606.03498, section 4)
   = exp(E_x sum_y p(y|x) log p(y|x) - sum_y p(y) log p(y)),   p(y) = E_x p(y|x)

within each split. The score is the mean over splits, its spread their standard deviation (divided by their number, as in all
published scores). The second form streams: it only sums p(y|x) and the inner sum. A logit that underflows to p = 0 adds nothing.
The caller chooses the logits; published scores leave out the last layer's bias.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dit_jax.metrics.metric import Metric

SPLITS = 10


@dataclass(frozen=True)
class Sums:
    """Sums over the samples of a split: count, p(y|x) (classes,), and sum_y p(y|x) log p(y|x)."""

    count: int
    probabilities: np.ndarray
    entropies: float  # negative


def empty(classes: int) -> Sums:
    """Sums of no samples."""
    return Sums(0, np.zeros(classes), 0.0)


def update(sums: Sums, logits: npt.ArrayLike) -> Sums:
    """Adds logits (b, classes). Raises ValueError on another shape and on values that are not finite."""
    logits = np.asarray(logits, np.float64)
    if logits.ndim != 2 or logits.shape[1] != len(sums.probabilities):
        raise ValueError(f"logits: found shape {logits.shape}, expected (b, {len(sums.probabilities)})")
    if not np.isfinite(logits).all():
        raise ValueError(f"logits: found {np.sum(~np.isfinite(logits))} values that are not finite")
    if not len(logits):
        return sums
    shifted = logits - logits.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    p = np.exp(logs)
    return Sums(sums.count + len(logits), sums.probabilities + p.sum(axis=0), sums.entropies + float((p * logs).sum()))


def assign(total: int, splits: int = SPLITS) -> np.ndarray:
    """Split of each sample (total,): split s has samples [s N/S, (s+1) N/S). Raises ValueError on fewer samples than splits.

    As in papers and ADM's evaluator. torch-fidelity shuffles first, which matters only for ordered samples (by class, say).
    """
    if not 1 <= splits <= total:
        raise ValueError(f"Inception Score: found {splits} splits of {total} samples, expected 1 to {total}")
    bounds = [s * total // splits for s in range(splits + 1)]
    return np.repeat(np.arange(splits), np.diff(bounds))


def score(splits: Sequence[Sums]) -> tuple[float, float]:
    """Mean and standard deviation of the splits' scores (1 to the number of classes). Raises ValueError on an empty split."""
    if not splits or not all(s.count for s in splits):
        raise ValueError(f"Inception Score: found splits of {[s.count for s in splits]} samples, expected at least 1")
    scores = [_score(s) for s in splits]
    return float(np.mean(scores)), float(np.std(scores))


def _score(sums: Sums) -> float:
    marginal = sums.probabilities / sums.count
    seen = marginal[marginal > 0]
    return float(np.exp(sums.entropies / sums.count - np.sum(seen * np.log(seen))))


def _update(state, batch: dict, total: int) -> tuple[Sums, ...]:
    """State: the sums of each split. There are at most as many splits as samples."""
    logits, splits = batch["logits"], min(SPLITS, total)
    state = state or (empty(logits.shape[1]),) * splits
    start = sum(sums.count for sums in state)
    place = assign(total, splits)[start : start + len(logits)]
    return tuple(update(sums, logits[place == i]) for i, sums in enumerate(state))


def _finish(state, reference: dict, settings) -> dict[str, float]:
    return dict(zip(("", "_std"), score(state), strict=True))


IS = Metric(
    "is",
    needs=("logits",),
    update=_update,
    finish=_finish,
    higher_is_better=True,
    rules={"score": f"{SPLITS} consecutive splits, logits {{logits}}"},
)
