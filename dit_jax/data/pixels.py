"""Pixels: encoded images to arrays, ADM's centre crop, mirror images, and uint8 to the [-1, 1] that a model sees."""

import io

import numpy as np
from PIL import Image

from dit_jax.data.counter import mirrored


def decode(encoded: bytes, channels: int) -> np.ndarray:
    """An encoded image -> uint8 (h, w, channels), grey and CMYK converted as ADM does. Raises whatever the decoder does."""
    with Image.open(io.BytesIO(encoded)) as image:
        pixels = np.asarray(image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels]))
    return pixels.reshape(*pixels.shape[:2], channels)


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 (h, w, c) -> (size, size, c), ADM's centre crop (Dhariwal & Nichol 2021, `image_datasets.center_crop_arr`).

    Halves with a box filter while the short side is at least twice `size`, scales it to `size` bicubically, and crops.
    """
    if image.shape[:2] == (size, size):
        return image
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    while min(picture.size) >= 2 * size:
        picture = picture.resize(tuple(n // 2 for n in picture.size), resample=Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize(tuple(round(n * scale) for n in picture.size), resample=Image.Resampling.BICUBIC)
    pixels = np.asarray(picture)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size].reshape(size, size, image.shape[-1])


def flip(images: np.ndarray, positions: np.ndarray, seed: int) -> np.ndarray:
    """Mirrors left to right those images (b, h, w, c) whose global position (b,) has a hash in the upper half."""
    return np.where(mirrored(seed, positions)[:, None, None, None], images[:, :, ::-1], images)


def to_float(images: np.ndarray) -> np.ndarray:
    """uint8 0..255 -> float32 in [-1, 1]: u / 127.5 - 1, computed in float32."""
    floats = images.astype(np.float32)
    floats /= np.float32(127.5)
    floats -= np.float32(1)
    return floats
