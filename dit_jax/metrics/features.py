"""Features of a whole set in memory, for metrics that cannot be streamed: kernel distance, precision and recall, resampling.

50,000 samples of 2048 numbers take 410 MB as float32. `frechet` and `inception_score` stream.
"""

import numpy as np
import numpy.typing as npt

MOST = 2**30  # bytes of kept features: 131,072 samples of 2048 numbers


def check_room(samples: int, width: int) -> None:
    """Raises ValueError if float32 features (samples, width) take more than MOST bytes."""
    if samples * width * 4 > MOST:
        raise ValueError(
            f"features: {samples:,} samples of {width} numbers take {samples * width * 4:,} bytes, expected at most "
            f"{MOST:,}; keep fewer samples, or only metrics that stream (Fréchet distance, Inception Score)"
        )


def keep(state: tuple | None, batch: dict, total: int) -> tuple:
    """`Metric.update` for metrics of the whole set: collects the pooled features, a tuple of batches."""
    return (*(state or ()), batch["pool"])


def checked(features: npt.ArrayLike, least: int = 1) -> np.ndarray:
    """Returns features (n, d). Raises ValueError on other shapes, fewer than `least` samples and values that are not finite."""
    features = np.asarray(features)
    if features.ndim != 2 or not features.shape[1]:
        raise ValueError(f"features: found shape {features.shape}, expected (n, d)")
    if len(features) < least:
        raise ValueError(f"features: found {len(features)} samples, expected at least {least}")
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise ValueError(f"features: sample {int(np.argmin(finite))} is not finite, one of {np.sum(~finite)}")
    return features


def checked_pair(a: npt.ArrayLike, b: npt.ArrayLike, least: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Returns both feature arrays. Raises ValueError as `checked`, and on different widths."""
    a, b = checked(a, least), checked(b, least)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features: found widths {a.shape[1]} and {b.shape[1]}, expected the same")
    return a, b
