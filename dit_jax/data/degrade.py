"""Low-resolution images, the condition of super-resolution: what a model sees, scaled down, then with noise and JPEG if asked.

The order is that of Real-ESRGAN's first-order model (Wang et al. 2021, arXiv 2107.10833, section 3.1). They have 256 levels, as in a file.
"""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dit_jax.config import Config
from dit_jax.data.counter import DEGRADE, normals
from dit_jax.data.pixels import to_float


def to_levels(images: np.ndarray) -> np.ndarray:
    """Inverse of `pixels.to_float`, exact for 256 levels: [-1, 1] to uint8, rounded, and cut to 0 to 255."""
    return np.clip(np.rint((images + 1) * np.float32(127.5)), 0, 255).astype(np.uint8)


def resized(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Images uint8 (b, h, w, c) at another size (h, w): bicubic with a = -0.5, antialiased if smaller; each channel by Pillow."""
    found = np.empty((len(images), *size, images.shape[-1]), np.uint8)
    for one, out in zip(images, found, strict=True):
        for c in range(images.shape[-1]):
            picture = Image.fromarray(np.ascontiguousarray(one[..., c]))
            out[..., c] = np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC))
    return found


def enlarged(images: np.ndarray, factor: int) -> np.ndarray:
    """Images (b, h, w, c), each pixel as a square of `factor` x `factor`."""
    return np.repeat(np.repeat(images, factor, axis=1), factor, axis=2)


@dataclass(frozen=True)
class Degrade:
    """How low-resolution images are made."""

    factor: int
    kind: str = "area"  # area (means of squares) | bicubic
    noise: float | int = 0.0  # standard deviation, in levels of 0 to 255
    jpeg: int = 0  # quality; 0 = none

    def __call__(self, images: np.ndarray, positions: np.ndarray, seed: int) -> np.ndarray:
        """Low-resolution images float32 (b, h/f, w/f, c) of images float32 (b, h, w, c), both in [-1, 1].

        The noise depends on (seed, position (b,)) only.
        """
        levels, f = to_levels(images), self.factor
        b, h, w, c = levels.shape
        if self.kind == "area":
            low = levels.reshape(b, h // f, f, w // f, f, c).mean(axis=(2, 4))
        else:
            low = resized(levels, (h // f, w // f)).astype(np.float64)
        if self.noise:
            low += self.noise * normals(seed, positions, low[0].size, DEGRADE).reshape(low.shape)
        low = np.clip(np.rint(low), 0, 255).astype(np.uint8)
        if self.jpeg:
            low = np.stack([_through_jpeg(one, self.jpeg) for one in low])
        return to_float(low)

    def describe(self) -> dict:
        """What low-resolution images depend on, for protocols."""
        more = {name: getattr(self, name) for name in ("noise", "jpeg") if getattr(self, name)}
        return {"factor": self.factor, "degrade": self.kind, **more}


def _through_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """An image uint8 (h, w, 1 or 3) as JPEG of a quality of 1 to 100 gives it back."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)).reshape(image.shape)


def make_degrade(cfg: Config) -> Degrade | None:
    """How the low-resolution images of a config's model are made; None for a model without."""
    factor, data = cfg.model.superres, cfg.data
    return Degrade(factor, data.degrade, data.degrade_noise, data.degrade_jpeg) if factor else None
