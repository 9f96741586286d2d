"""Pictures of drawn images."""

from collections.abc import Iterator

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dit_jax.files import whole
from dit_jax.sampling import parts

GRID = 400  # most images in a grid
MARK = b"Software\0dit_jax"  # in the head of a picture that is written here


def grid(images: np.ndarray, columns: int, scale: int = 0) -> Image.Image:
    """Images uint8 (n, h, w, c) as one picture, row by row, enlarged by whole pixels if they are small."""
    n, h, w, c = images.shape
    rows, scale = -(-n // columns), scale or max(1, 48 // h)
    canvas = np.full((rows * columns, h + 2, w + 2, 3), 255, np.uint8)
    canvas[:n, 1:-1, 1:-1] = images[..., :3] if c >= 3 else images[..., :1]
    canvas = canvas.reshape(rows, columns, h + 2, w + 2, 3).transpose(0, 2, 1, 3, 4).reshape(rows * (h + 2), -1, 3)
    return Image.fromarray(canvas).resize((canvas.shape[1] * scale, canvas.shape[0] * scale), Image.Resampling.NEAREST)


def save_grid(path: str, batches: Iterator[parts.Batch]) -> None:
    """Writes a PNG of the first GRID images, sorted by class; no more of them are held in memory."""
    images, labels, count = [], [], 0
    for some, classes in batches:
        images.append(some[: GRID - count])
        labels.append(classes[: GRID - count])
        count += len(images[-1])
        if count == GRID:
            break
    order = np.argsort(np.concatenate(labels), kind="stable")
    about = PngInfo()
    about.add_text(*MARK.decode().split("\0"))
    picture = grid(np.concatenate(images)[order], columns=int(np.ceil(np.sqrt(count))))
    with whole(path) as unfinished:
        picture.save(unfinished, "PNG", pnginfo=about)
