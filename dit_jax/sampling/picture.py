"""Pictures of drawn images: a grid with a row a class, names and a caption; and a folder of PNGs, one an image."""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from dit_jax.error import Interrupted, UsageError
from dit_jax.files import is_file, json_text, parse_json, read, whole, write_file
from dit_jax.files.out import holds, new_folder
from dit_jax.sampling import parts

GRID = 400  # most images in a grid
MARK = b"Software\0dit_jax"  # in the head of a picture that is written here
SIDE = 48  # least pixels of an image in a grid: smaller ones are enlarged
WIDE = 2000  # pixels of a row, from which on a class takes several rows
FONT, LINE, MARGIN = 14, 20, 8  # pixels of letters, of a line of them, and beside them
NAME = 32  # most letters of a class
NARROW = 140  # least pixels of a line of a prompt


def grid(images: np.ndarray, labels: np.ndarray, classes: Sequence[str] = (), caption: str = "") -> Image.Image:
    """Images uint8 (n, h, w, c) of `labels` (n,) as one picture, sorted by class, below a caption.

    With names of all `classes` a class has a row, or several if it is long, unless most classes have one image. Images below SIDE pixels
    are enlarged by a whole factor, a pixel to a square.
    """
    n, h, w, _ = images.shape
    scale = max(1, -(-SIDE // h))
    h, w = h * scale + 2, w * scale + 2
    order = np.argsort(labels, kind="stable")
    found, counts = np.unique(labels, return_counts=True)
    columns, blocks = int(np.ceil(np.sqrt(n))), [("", order)]
    if classes and 2 * len(found) <= n:
        columns = min(counts.max(), max(columns, WIDE // w))
        blocks = [(classes[label][:NAME], order[labels[order] == label]) for label in found]
    rows = [(name * (i == 0), some[i : i + columns]) for name, some in blocks for i in range(0, len(some), columns)]
    font = ImageFont.load_default(FONT)
    left = int(max(font.getlength(name) for name, _ in rows)) + MARGIN * 2 * any(name for name, _ in rows)
    lines = _wrapped(caption, font, max(left + columns * w, 300) - 2 * MARGIN)
    top = (len(lines) * LINE + MARGIN) * bool(lines)
    wide = max([left + columns * w, *(int(font.getlength(line)) + 2 * MARGIN for line in lines)])
    canvas = Image.new("RGB", (wide, top + len(rows) * h), "white")
    pen = ImageDraw.Draw(canvas)
    for i, line in enumerate(lines):
        pen.text((MARGIN, MARGIN // 2 + i * LINE), line, "black", font)
    for i, (name, some) in enumerate(rows):
        pen.text((MARGIN, top + i * h + h // 2), name, "black", font, anchor="lm")
        for j, index in enumerate(some):
            canvas.paste(_enlarged(images[index], scale), (left + j * w + 1, top + i * h + 1))
    return canvas


def prompt_grid(images: np.ndarray, numbers: np.ndarray, prompts: Sequence[str], caption: str = "") -> Image.Image:
    """Images uint8 (n, h, w, c) as one picture, with their prompts, `numbers` (n,) of `prompts`, under them, below a caption.

    A prompt has a row of images, or several if they are many; prompts with one image each stand side by side.
    """
    _, h, w, _ = images.shape
    scale = max(1, -(-SIDE // h))
    found, counts = np.unique(numbers, return_counts=True)
    each, font = min(counts.max(), max(1, WIDE // (w * scale + 2))), ImageFont.load_default(FONT)
    wide = max(each * (w * scale + 2), NARROW)  # of a prompt's block
    blocks = [
        _block(
            [_enlarged(images[i], scale) for i in np.flatnonzero(numbers == number)], prompts[number], each, wide, font
        )
        for number in found
    ]
    beside = max(1, min(len(blocks), WIDE // wide, int(np.ceil(np.sqrt(len(blocks)))))) if each == 1 else 1
    rows = [blocks[i : i + beside] for i in range(0, len(blocks), beside)]
    lines = _wrapped(caption, font, max(beside * wide, 300) - 2 * MARGIN)
    top = (len(lines) * LINE + MARGIN) * bool(lines)
    heights = [max(block.height for block in row) for row in rows]
    canvas = Image.new("RGB", (max(beside * wide, 300 * bool(lines)), top + sum(heights)), "white")
    _write(canvas, lines, font, MARGIN // 2)
    for row, y in zip(rows, itertools.accumulate([top, *heights]), strict=False):
        for j, block in enumerate(row):
            canvas.paste(block, (j * wide, y))
    return canvas


def _block(pictures: Sequence[Image.Image], text: str, each: int, wide: int, font) -> Image.Image:
    """Pictures of one size, `each` in a row, above a text."""
    w, h = pictures[0].width + 2, pictures[0].height + 2
    lines, rows = _wrapped(text, font, wide - MARGIN), -(-len(pictures) // each)
    canvas = Image.new("RGB", (wide, rows * h + len(lines) * LINE + MARGIN), "white")
    for i, picture in enumerate(pictures):
        canvas.paste(picture, (i % each * w + 1, i // each * h + 1))
    _write(canvas, lines, font, rows * h)
    return canvas


def _write(canvas: Image.Image, lines: Sequence[str], font, top: int) -> None:
    for i, line in enumerate(lines):
        ImageDraw.Draw(canvas).text((MARGIN // 2, top + i * LINE), line, "black", font)


def _enlarged(image: np.ndarray, scale: int) -> Image.Image:
    rgb = np.broadcast_to(image[..., :3] if image.shape[-1] >= 3 else image[..., :1], (*image.shape[:2], 3))
    return Image.fromarray(np.repeat(np.repeat(rgb, scale, axis=0), scale, axis=1))


def _wrapped(text: str, font, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken at the spaces of a text, and within words that are longer."""
    lines = [""] * bool(text)
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if font.getlength(longer) <= width else [lines[-1], word]
        while font.getlength(lines[-1]) > width and len(lines[-1]) > 1:
            fits = next(n for n in range(len(lines[-1]) - 1, 0, -1) if n == 1 or font.getlength(lines[-1][:n]) <= width)
            lines[-1:] = [lines[-1][:fits], lines[-1][fits:]]
    return [line for line in lines if line]


def save_grid(
    path: str, batches: Iterator[parts.Batch], names: Sequence[str] = (), caption: str = "", draw: Callable = grid
) -> None:
    """Writes a PNG of the first GRID images (by `grid` or `prompt_grid`); no more of them are held in memory."""
    images, labels, count = [], [], 0
    for some, of in batches:
        images.append(some[: GRID - count])
        labels.append(of[: GRID - count])
        count += len(images[-1])
        if count == GRID:
            break
    about = PngInfo()
    about.add_text(*MARK.decode().split("\0"))
    picture = draw(np.concatenate(images), np.concatenate(labels), names, caption)
    with whole(path) as unfinished:
        picture.save(unfinished, "PNG", pnginfo=about)


def check_images(folder: str, job: dict, shape: tuple[int, ...]) -> bool:
    """Whether `folder` holds the PNGs of `job` already. Raises UsageError if it holds anything else, or if a PNG cannot hold `shape`."""
    if shape[-1] not in (1, 3):
        raise UsageError(f"--images: found images of {shape[-1]} channels, expected 1 or 3; use --out")
    if is_file(folder):
        raise UsageError(f"--images: {folder} is a file, expected a folder")
    if not holds(folder):
        return False
    advice = "remove it or use another folder"
    try:
        found = parse_json(read(os.path.join(folder, parts.JOB)))
    except (OSError, ValueError):
        raise UsageError(f"--images: {folder} exists and does not say which job drew it; {advice}") from None
    parts.refuse_other(folder, found, job, advice)
    return True


def save_images(folder: str, job: dict, num: int, batches: Iterator[parts.Batch]) -> None:
    """Writes image i as `{i:06d}.png`, all of them or none, and the job beside them. Raises Interrupted if fewer than `num` come."""
    with new_folder(folder) as unfinished:
        count = 0
        for images, _ in batches:
            for image in images[: num - count]:
                grey = image[..., 0] if image.shape[-1] == 1 else image
                Image.fromarray(grey).save(os.path.join(unfinished, f"{count:06d}.png"))
                count += 1
        if count < num:
            raise Interrupted(f"{count} of {num} images were drawn and, without --out, none is kept")
        write_file(os.path.join(unfinished, parts.JOB), json_text(job, indent=1) + "\n")
