"""Peak signal-to-noise ratio of super-resolution: samples beside the images whose low-resolution images they began with.

PSNR = 10 log10(255^2 / MSE) in dB of each image, over all its pixels and channels (Saharia et al. 2021, arXiv 2104.07636, SR3, Table 1),
averaged over images; samples of one image are averaged first. An image without any error counts as if one value was off by one level.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dit_jax.metrics.metric import Metric

PEAK, LEVEL = 255.0, 1.96  # of uint8; of the normal, for 95 %
BLOCK = 256  # images at a time


class Originals(NamedTuple):
    """`read(numbers (b,))` gives the originals uint8 (b, h, w, c); `floors(numbers)` images of other methods, by name. Sample i is of
    original i modulo `count`."""

    count: int
    read: Callable
    floors: Callable


def psnr(images: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """PSNR in dB, float64 (b,), of images uint8 (b, h, w, c). Raises ValueError for other shapes."""
    if images.shape != originals.shape:
        raise ValueError(f"images: found shape {images.shape}, expected {originals.shape}, as the originals have")
    size = images[0].size
    squares = np.square(images.astype(np.float64) - originals.astype(np.float64)).reshape(len(images), -1).mean(axis=1)
    return 10 * np.log10(PEAK**2 / np.maximum(squares, 1 / size))


def _update(state, batch: dict, total: int) -> list:
    return [*(state or []), batch["images"]]


def _finish(state, reference: dict, settings) -> dict[str, float]:
    """Mean over originals with its 95 % interval, by the normal; and the means of other methods, on the same originals."""
    originals, images = reference["originals"], np.concatenate(state)
    numbers, used = np.arange(len(images)) % originals.count, min(len(images), originals.count)
    ours = np.concatenate(
        [psnr(images[i : i + BLOCK], originals.read(numbers[i : i + BLOCK])) for i in range(0, len(images), BLOCK)]
    )
    each = np.bincount(numbers, ours, used) / np.bincount(numbers, minlength=used)
    found = {"": float(each.mean())}
    if used > 1:
        half = LEVEL * float(each.std(ddof=1)) / math.sqrt(used)
        found |= {"_low": found[""] - half, "_high": found[""] + half}
    floors: dict = {}
    for start in range(0, used, BLOCK):
        some = numbers[start : min(start + BLOCK, used)]
        real = originals.read(some)
        for name, others in originals.floors(some).items():
            floors.setdefault(name, []).append(psnr(others, real))
    return found | {f"_{name}": float(np.concatenate(values).mean()) for name, values in floors.items()}


PSNR = Metric("psnr", needs=("images", "originals"), update=_update, finish=_finish, higher_is_better=True)
