"""Inception Score (Salimans et al. 2016, arXiv 1606.03498, section 4): exp(E_x KL(p(y|x) || p(y))), streamed.

The samples are cut into consecutive splits, and mean and standard deviation of the splits' scores are quoted. On another
network than Inception the name must say so.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax


@dataclass(frozen=True)
class Sums:
    """Of the samples seen, per split: how many, the sum of p(y|x) over them, and the sum of its negative entropy in nats."""

    ends: np.ndarray  # (splits,): the number of the first sample after each split
    counts: np.ndarray  # (splits,)
    shares: np.ndarray  # (splits, classes), float64
    negentropy: np.ndarray  # (splits,)


def empty(classes: int, num: int, splits: int = 10) -> Sums:
    """Of no samples yet; `num` will come, split i being those from i num // splits on."""
    if not 1 <= splits <= num:
        raise ValueError(f"Inception Score: found {splits} splits of {num} samples, expected 1 to {num}")
    ends = (np.arange(splits) + 1) * num // splits
    return Sums(ends, np.zeros(splits, np.int64), np.zeros((splits, classes)), np.zeros(splits))


def update(sums: Sums, logits: np.ndarray) -> Sums:
    """Adds the next samples' logits (b, classes). Raises ValueError on values that are not finite or are too many."""
    if not np.isfinite(logits).all():
        raise ValueError("Inception Score: a logit is not finite")
    numbers = sums.counts.sum() + np.arange(len(logits))
    if len(logits) and numbers[-1] >= sums.ends[-1]:
        raise ValueError(f"Inception Score: found more than the {sums.ends[-1]} samples that were announced")
    logs = log_softmax(np.asarray(logits, np.float64), axis=1)
    split = np.searchsorted(sums.ends, numbers, side="right")
    counts, shares, negentropy = sums.counts.copy(), sums.shares.copy(), sums.negentropy.copy()
    np.add.at(counts, split, 1)
    np.add.at(shares, split, np.exp(logs))
    np.add.at(negentropy, split, (np.exp(logs) * logs).sum(axis=1))
    return Sums(sums.ends, counts, shares, negentropy)


def score(sums: Sums) -> tuple[float, float]:
    """Mean and standard deviation over the splits. Raises ValueError before all samples are there."""
    if sums.counts.sum() != sums.ends[-1]:
        raise ValueError(f"Inception Score: found {sums.counts.sum()} samples, expected {sums.ends[-1]}")
    p = sums.shares / sums.counts[:, None]
    logs = np.log(p, where=p > 0, out=np.zeros_like(p))
    scores = np.exp(sums.negentropy / sums.counts - (p * logs).sum(axis=1))
    return float(scores.mean()), float(scores.std())
