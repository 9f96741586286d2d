"""Pixels: decoding, ADM's centre crop, mirror images, and uint8 to the range [-1, 1] of models."""

import io

import numpy as np
from PIL import Image

from dit_jax.data.counter import mirrored


def decode(encoded: bytes, channels: int) -> np.ndarray:
    """Decode an image to uint8 (h, w, channels), grey and CMYK converted as in ADM. Raises any error of the decoder."""
    with Image.open(io.BytesIO(encoded)) as image:
        pixels = np.asarray(image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels]))
    return pixels.reshape(*pixels.shape[:2], channels)


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Resize uint8 (h, w, c) to (size, size, c) by ADM's `center_crop_arr` (Dhariwal & Nichol 2021, `image_datasets`).

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
    """Mirror images (b, h, w, c) left to right at random, by a hash of (seed, global position (b,))."""
    return np.where(mirrored(seed, positions)[:, None, None, None], images[:, :, ::-1], images)


def to_float(images: np.ndarray) -> np.ndarray:
    """Map uint8 to float32 in [-1, 1]: u / 127.5 - 1, computed in float32."""
    floats = images.astype(np.float32)
    floats /= np.float32(127.5)
    floats -= np.float32(1)
    return floats
