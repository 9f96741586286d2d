"""Decoding: one rule for every mode that Pillow has, on real files; what has no stated range is refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dit_jax.data.pixels import decode

RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)
EIGHT = ((RAMP.astype(np.int64) + 128) // 257).astype(np.uint8)
COLOURS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)


def saved(image, form="PNG", **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def png(header, rows):
    """A PNG by hand: (bit depth, colour type) and the bytes of its rows, for what Pillow does not write."""
    height, width = len(rows), header[2]
    parts = {b"IHDR": struct.pack(">2I5B", width, height, *header[:2], 0, 0, 0)}
    parts |= {b"IDAT": zlib.compress(b"".join(b"\0" + row for row in rows)), b"IEND": b""}
    chunks = [struct.pack(">I", len(v)) + k + v + struct.pack(">I", zlib.crc32(k + v)) for k, v in parts.items()]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


SIXTEEN = {
    "png": lambda: saved(Image.fromarray(RAMP)),
    "tiff": lambda: saved(Image.fromarray(RAMP), "TIFF"),
    "tiff, big-endian": lambda: saved(Image.frombytes("I;16B", (256, 256), RAMP.astype(">u2").tobytes()), "TIFF"),
    "pgm": lambda: b"P5 256 256 65535\n" + RAMP.astype(">u2").tobytes(),
    "png by hand": lambda: png((16, 0, 256), [row.astype(">u2").tobytes() for row in RAMP]),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", SIXTEEN)
def test_sixteen_bits_are_scaled_and_keep_256_levels(name, channels):
    found = decode(SIXTEEN[name](), channels)
    np.testing.assert_array_equal(found, np.repeat(EIGHT[..., None], channels, axis=2))
    assert len(np.unique(found)) == 256 and found[0, 0, 0] == 0 and found[-1, -1, 0] == 255


def test_colours_of_sixteen_bits_keep_their_levels():
    wide = np.stack([RAMP, RAMP[::-1], RAMP.T], axis=2)
    found = decode(png((16, 2, 256), [row.astype(">u2").tobytes() for row in wide]), 3)
    assert np.abs(found.astype(int) - np.round(wide / 257)).max() <= 1  # Pillow keeps the upper byte
    assert [len(np.unique(found[..., c])) for c in range(3)] == [256] * 3


def test_floats_from_0_to_1_are_scaled_and_others_are_refused():
    values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    np.testing.assert_array_equal(decode(saved(Image.fromarray(values), "TIFF"), 1).ravel(), np.arange(256))
    for wrong in (values * 255, values - 0.5, np.where(values == 1, np.nan, values).astype(np.float32)):
        with pytest.raises(ValueError, match=r"found floats from .*, expected 0 to 1; scale them"):
            decode(saved(Image.fromarray(wrong), "TIFF"), 1)


def test_integers_of_32_bits_are_refused():
    with pytest.raises(ValueError, match="found TIFF of 32-bit integers, whose range is not stated"):
        decode(saved(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), 1)


HIDDEN = np.dstack([COLOURS, np.full((6, 8), 255, np.uint8)])
HIDDEN[:3, :, 3] = 0  # colours that must not appear
HIDDEN[3, :, 3] = 128


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_composited_over_white(form):
    encoded = saved(Image.fromarray(HIDDEN), form, **({"lossless": True, "exact": True} if form == "WEBP" else {}))
    found = decode(encoded, 3)
    assert (found[:3] == 255).all()
    np.testing.assert_array_equal(found[4:], COLOURS[4:])
    share = 128 / 255
    assert np.abs(found[3] - (share * COLOURS[3] + (1 - share) * 255)).max() <= 1
    np.testing.assert_array_equal(decode(encoded, 4), HIDDEN)
    assert (decode(encoded, 1)[:3] == 255).all()


def test_transparent_palettes_and_keys_are_composited_too():
    palette = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 200, 100, 0, 0, 0, 255])
    expected = np.array([[[10, 20, 30], [255] * 3], [[0, 0, 255], [255] * 3]])
    np.testing.assert_array_equal(decode(saved(palette, "PNG", transparency=1), 3), expected)
    np.testing.assert_array_equal(decode(saved(palette, "GIF", transparency=1), 3), expected)
    np.testing.assert_array_equal(decode(saved(palette), 3)[0, 1], [200, 100, 0])
    grey = np.array([[7, 9]], np.uint8)
    np.testing.assert_array_equal(decode(saved(Image.fromarray(grey), transparency=7), 1).ravel(), [255, 9])
    both = np.array([[[7, 0], [9, 255]]], np.uint8)
    np.testing.assert_array_equal(decode(saved(Image.fromarray(both, "LA")), 1).ravel(), [255, 9])
    key = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    np.testing.assert_array_equal(
        decode(saved(Image.fromarray(key), transparency=(1, 2, 3)), 3)[0], [[255] * 3, [4, 5, 6]]
    )
    with pytest.raises(ValueError, match="found transparency in mode I"):
        decode(saved(Image.fromarray(RAMP), transparency=7), 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_orientation_is_applied(orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {
        1: COLOURS, 2: COLOURS[:, ::-1], 3: COLOURS[::-1, ::-1], 4: COLOURS[::-1], 5: COLOURS.transpose(1, 0, 2),
        6: np.rot90(COLOURS, -1), 7: COLOURS[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(COLOURS),
    }  # fmt: skip
    found = decode(saved(Image.fromarray(COLOURS), form, exif=exif), 3)
    np.testing.assert_array_equal(found, turned[orientation])


def test_a_photo_on_its_side_stands_up():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(saved(Image.fromarray(COLOURS), "JPEG", exif=exif), 3).shape == (8, 6, 3)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LAB", "RGBA", "LA", "I", "I;16", "F"])
def test_every_mode_is_read_or_refused_with_a_reason(mode):
    """A mid grey keeps its level in every mode that can hold it."""
    grey = np.full((4, 4), 0.5)
    image = {
        "1": lambda: Image.new("1", (4, 4), 1), "F": lambda: Image.fromarray(grey.astype(np.float32)),
        "I;16": lambda: Image.fromarray((grey * 65535).astype(np.uint16)), "I": lambda: Image.new("I", (4, 4), 7),
        "LAB": lambda: Image.new("LAB", (4, 4), (128, 0, 0)),
        "HSV": lambda: Image.fromarray(np.tile(np.array([0, 0, 128], np.uint8), (4, 4, 1)), "HSV").convert("RGB"),
        "CMYK": lambda: Image.new("CMYK", (4, 4), (0, 0, 0, 127)),
    }.get(mode, lambda: Image.new("L", (4, 4), 128).convert(mode))()  # fmt: skip
    encoded = saved(image, "TIFF")
    if mode == "I":
        with pytest.raises(ValueError):
            decode(encoded, 3)
        return
    for channels in (1, 3):
        found = decode(encoded, channels)
        assert found.shape == (4, 4, channels) and found.dtype == np.uint8
        if mode != "LAB":
            assert np.abs(found.astype(int) - (255 if mode == "1" else 128)).max() <= 1, mode
