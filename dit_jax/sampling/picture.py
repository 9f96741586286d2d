"""Pictures of drawn images: a grid with a row a class, names and a caption; and a folder of PNGs, one an image."""

import os
from collections.abc import Iterator, Sequence

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


def _enlarged(image: np.ndarray, scale: int) -> Image.Image:
    rgb = np.broadcast_to(image[..., :3] if image.shape[-1] >= 3 else image[..., :1], (*image.shape[:2], 3))
    return Image.fromarray(np.repeat(np.repeat(rgb, scale, axis=0), scale, axis=1))


def _wrapped(text: str, font, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken at the spaces of a text."""
    lines = [""] * bool(text)
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if font.getlength(longer) <= width else [lines[-1], word]
    return [line for line in lines if line]


def save_grid(path: str, batches: Iterator[parts.Batch], classes: Sequence[str] = (), caption: str = "") -> None:
    """Writes a PNG of the first GRID images (see `grid`); no more of them are held in memory."""
    images, labels, count = [], [], 0
    for some, of in batches:
        images.append(some[: GRID - count])
        labels.append(of[: GRID - count])
        count += len(images[-1])
        if count == GRID:
            break
    about = PngInfo()
    about.add_text(*MARK.decode().split("\0"))
    picture = grid(np.concatenate(images), np.concatenate(labels), classes, caption)
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
