"""Pixels: decoding, ADM's centre crop, mirror images, and uint8 to the range [-1, 1] of models."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from dit_jax.data.counter import mirrored

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow starts a program for another
warnings.simplefilter(
    "error", Image.DecompressionBombWarning
)  # more than Image.MAX_IMAGE_PIXELS: raised before decoding


def decode(encoded: bytes, channels: int) -> np.ndarray:
    """Decode the first frame of an image, one of `FORMATS`, to uint8 (h, w, channels): grey, RGB, or RGBA for 4 channels.

    It is turned as its EXIF orientation says. 16 bits are scaled, 65535 to 255, and so are floats, 1 to 255. Transparent
    images are composited over white, unless there are 4 channels. Palettes, CMYK, YCbCr, HSV and LAB are converted by Pillow,
    grey from RGB too (ITU-R 601-2). Raises ValueError for pixels without such a range: integers of 32 bits, other floats,
    transparency beside 16 bits or more. Raises any error of the decoder,
    and an error before decoding for more pixels than Pillow's `Image.MAX_IMAGE_PIXELS` (89,478,485).
    """
    with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):
            image = _scaled(image, image.format)
        image = image.convert("RGB") if image.mode == "LAB" else image  # which Pillow converts to no other mode
        if image.has_transparency_data and channels < 4:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))  # convert copies
    return pixels.reshape(*pixels.shape[:2], channels)


def _scaled(image: Image.Image, form: str | None) -> Image.Image:
    """Return an image of integers of 16 bits, or of floats, with 8 bits. Raises ValueError if its range is not known."""
    values, mode = np.asarray(image), image.mode
    if image.has_transparency_data:
        raise ValueError(f"found transparency in mode {mode}, expected none beside more than 8 bits; composite it")
    if mode == "F":
        if not ((values >= 0) & (values <= 1)).all():  # NaN too
            raise ValueError(f"found floats from {values.min():g} to {values.max():g}, expected 0 to 1; scale them")
        return Image.fromarray(np.round(values * 255).astype(np.uint8))
    if mode == "I" and form not in ("PNG", "PPM"):  # Pillow reads grey of 16 bits as 32 in these
        raise ValueError(f"found {form} of 32-bit integers, whose range is not stated; save them with 8 or 16 bits")
    return Image.fromarray(((values.astype(np.int64) + 128) // 257).astype(np.uint8))


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Resize uint8 (h, w, c) to (size, size, c) by ADM's `center_crop_arr` (Dhariwal & Nichol 2021, `image_datasets`).

    Halves with a box filter while the short side is at least twice `size`, scales it to `size` bicubically, and crops. Raises
    ValueError for a strip that scaled would have more pixels than `Image.MAX_IMAGE_PIXELS`.
    """
    if image.shape[:2] == (size, size):
        return image
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    while min(picture.size) >= 2 * size:
        picture = picture.resize(tuple(n // 2 for n in picture.size), resample=Image.Resampling.BOX)
    scale = size / min(picture.size)
    scaled = tuple(round(n * scale) for n in picture.size)
    if Image.MAX_IMAGE_PIXELS and scaled[0] * scaled[1] > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"found {image.shape[1]} x {image.shape[0]} pixels, expected sides less unequal")
    picture = picture.resize(scaled, resample=Image.Resampling.BICUBIC)
    pixels = np.asarray(picture)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size].reshape(size, size, image.shape[-1])


def flip(images: np.ndarray, positions: np.ndarray, seed: int) -> np.ndarray:
    """Mirror images (b, h, w, c) left to right at random, by a hash of (seed, global position (b,))."""
    found, rows = images.copy(), np.flatnonzero(mirrored(seed, positions))
    backwards = np.arange(images.shape[2])[::-1]  # `take` copies whole pixels, a slice goes by channels
    found[rows] = np.take(images[rows], backwards, axis=2)
    return found


def reason(error: BaseException) -> str:
    """Return the first line of an error's message, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def to_float(images: np.ndarray) -> np.ndarray:
    """Map uint8 to float32 in [-1, 1]: u / 127.5 - 1, computed in float32."""
    floats = images.astype(np.float32)
    floats /= np.float32(127.5)
    floats -= np.float32(1)
    return floats
