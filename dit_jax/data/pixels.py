"""Pixels: decoding, ADM's rule of scaling, crops, mirror images, and uint8 to the range [-1, 1] of models."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from dit_jax.data.counter import CROP, hash_counters, mirrored

ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # the tag of EXIF, and its values that exchange the sides
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow starts a program for another
warnings.simplefilter(
    "error", Image.DecompressionBombWarning
)  # more than Image.MAX_IMAGE_PIXELS: raised before decoding


def decode(encoded: bytes, channels: int) -> np.ndarray:
    """Decode an image to uint8 (h, w, channels); see `open_picture`."""
    pixels = np.asarray(open_picture(encoded, channels))
    return pixels.reshape(*pixels.shape[:2], channels)


def open_picture(encoded: bytes, channels: int) -> Image.Image:
    """Decode the first frame of an image, one of `FORMATS`, to grey, RGB, or RGBA for 4 channels.

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
        image.load()
        return image if image.mode == mode else image.convert(mode)  # which copies


def size_of(encoded: bytes | str) -> tuple[int, int]:
    """Read the height and width of an encoded image, or of that in a file, as `decode` gives it, without decoding.

    Raises any error of the decoder. An orientation that a PNG states behind its pixels is not seen.
    """
    with Image.open(encoded if isinstance(encoded, str) else io.BytesIO(encoded), formats=FORMATS) as image:
        height, width = image.size[::-1]  # Pillow turns TIFF itself, and would decode a PNG to look for an orientation
        known = (
            {"exif", "Raw profile type exif", "XML:com.adobe.xmp"} & {*image.info} if image.format == "PNG" else True
        )
        turned = known and image.format != "TIFF" and image.getexif().get(ORIENTATION, 1) in TURNED
        return (width, height) if turned else (height, width)


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


def png(image: np.ndarray) -> bytes:
    """Encode uint8 (h, w, c) without loss; c is 1, 3 or 4."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
    return file.getvalue()


def cover(image: np.ndarray | Image.Image, shape: tuple[int, int]) -> np.ndarray:
    """Scale uint8 (H, W, c), or a picture, so that it covers `shape` (h, w): one side is equal, the other at least as long.

    The rule is that of ADM's `center_crop_arr` (Dhariwal & Nichol 2021, `image_datasets`), whose shape is square: a box filter halves
    the image while both sides are at least twice those of `shape`, then it is scaled bicubically. Raises ValueError for a strip
    that scaled would have more pixels than `Image.MAX_IMAGE_PIXELS`.
    """
    picture, least = image, shape[::-1]
    if isinstance(image, np.ndarray):
        if image.shape[:2] == shape:
            return image
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    if picture.size != least:
        picture = _covering(picture, least)
    return np.asarray(picture).reshape(*picture.size[::-1], len(picture.getbands()))


def _covering(picture: Image.Image, least: tuple[int, int]) -> Image.Image:
    (width, height), box = picture.size, Image.Resampling.BOX
    while all(n >= 2 * m for n, m in zip(picture.size, least, strict=True)):
        picture = picture.resize(tuple(n // 2 for n in picture.size), resample=box)
    scale = max(m / n for n, m in zip(picture.size, least, strict=True))
    scaled = tuple(round(n * scale) for n in picture.size)
    if Image.MAX_IMAGE_PIXELS and scaled[0] * scaled[1] > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"found {width} x {height} pixels, expected sides less unequal")
    return picture.resize(scaled, resample=Image.Resampling.BICUBIC)


def crop(image: np.ndarray, shape: tuple[int, int], draw: int | None = None) -> np.ndarray:
    """Cut `shape` (h, w) out of an image (H, W, c), from the centre, or along each side as the 64 bits of `draw` say."""
    if image.shape[:2] == shape:
        return image
    spare = [have - want for have, want in zip(image.shape, shape, strict=False)]
    top, left = (n // 2 if draw is None else draw * (n + 1) >> 64 for n in spare)
    return image[top : top + shape[0], left : left + shape[1]]


def resize(image: np.ndarray | Image.Image, size: int) -> np.ndarray:
    """Scale and centre-crop uint8 (h, w, c), or a picture, to (size, size, c) by ADM's rule; see `cover`."""
    return crop(cover(image, (size, size)), (size, size))


def crops(
    images: np.ndarray, shape: tuple[int, int], positions: np.ndarray | None = None, seed: int | None = None
) -> np.ndarray:
    """Cut all of `images`, an array (b,) of arrays, by a hash of (seed, global position (b,)), or from the centre without a seed."""
    draws = [None] * len(images) if seed is None else hash_counters(seed, CROP, 0, positions).tolist()
    return np.stack([crop(image, shape, draw) for image, draw in zip(images, draws, strict=True)])


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
