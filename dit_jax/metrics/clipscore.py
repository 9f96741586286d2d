"""CLIPScore: how well pictures fit their captions, by CLIP's embeddings of both (Hessel et al. 2021, arXiv 2104.08718, section 3).

clipscore = mean of 2.5 max(cos, 0) over samples. The score of torchmetrics, max(mean of 100 cos, 0), is 40 times as large if no cosine is
negative.
"""

import numpy as np

from dit_jax.metrics.features import keep
from dit_jax.metrics.metric import Metric

WEIGHT = 2.5


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows (n, d) of length 1, float64. Raises ValueError for rows that are 0 or not finite."""
    rows = np.asarray(rows, np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        raise ValueError("CLIP: found embeddings that are 0 or not finite")
    return rows / lengths


def scores(images: np.ndarray, captions: np.ndarray) -> np.ndarray:
    """CLIPScore (n,) of image embeddings (n, d), of which number i is of caption i modulo m, with embeddings (m, d)."""
    cosines = (unit(images) * unit(captions)[np.arange(len(images)) % len(captions)]).sum(axis=1)
    return WEIGHT * np.maximum(cosines, 0.0)


def _finish(state, reference: dict, settings) -> dict[str, float]:
    """Mean, and its standard error over samples."""
    each = scores(np.concatenate(state), reference["captions"])
    return {"": each.mean(), "_se": each.std(ddof=1) / np.sqrt(len(each))}


CLIPSCORE = Metric(
    "clipscore",
    needs=("clip", "pool", "captions"),
    update=keep,
    finish=_finish,
    higher_is_better=True,
    rules={"clipscore": f"{WEIGHT:g} max(cos, 0), sample i with caption i modulo their number"},
)
