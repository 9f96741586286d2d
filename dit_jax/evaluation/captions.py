"""Captions of a file to draw the scored images from: COCO's annotations, for the COCO-30k protocol, or a text file.

COCO-30k (as Imagen, Saharia et al. 2022, arXiv 2205.11487, section 4.1): 30,000 captions of the validation set of 2014, one an image. Which
captions of which images is not fixed by the papers, so it is stated here by rules and checksums.
"""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dit_jax.data.captions import checked, of_lines
from dit_jax.error import UsageError, shown
from dit_jax.files import LARGEST, parse_json, read

RULE = "of each image the caption of the lowest id"


class Captions(NamedTuple):
    """Captions in the order in which images take them, and what a protocol says of the file."""

    texts: tuple[str, ...]
    about: dict


def read_captions(path: str, most: int, seed: int) -> Captions:
    """The captions of a file, `most` of them at most.

    A `.json` file holds COCO's "images" and "annotations". If it has more than `most` images, `most` are drawn by `seed`, and stay in the
    order of their ids. A `.txt` file has a caption a line, of which the first count. Raises UsageError naming an image without a
    caption, a caption without its image, or what is not such a file.
    """
    if not path.lower().endswith((".json", ".txt")):
        raise UsageError(
            f"eval.captions: found {path!r}, expected COCO's .json of captions, or a .txt of one caption a line"
        )
    try:
        content = read(path, LARGEST)
    except FileNotFoundError:
        raise UsageError(f"eval.captions: {path}: no such file") from None
    about = {"file_sha256": hashlib.sha256(content).hexdigest()}
    if path.lower().endswith(".txt"):
        return Captions(of_lines(f"eval.captions: {path}", content)[:most], about)
    texts = _of_coco(f"eval.captions: {path}", content)
    chosen = np.arange(len(texts))
    if most < len(texts):
        chosen = np.sort(np.random.Generator(np.random.PCG64(seed)).choice(len(texts), most, replace=False))
        about["drawn"] = f"{most} of {len(texts)} images by PCG64 from seed {seed}"
    return Captions(tuple(texts[i] for i in chosen), about | {"rule": RULE})


def _of_coco(where: str, content: bytes) -> list[str]:
    """The caption of each image, in order of the images' ids."""
    try:
        found = parse_json(content, LARGEST)
    except ValueError as error:
        raise UsageError(f"{where}: not readable as JSON in UTF-8 ({error})") from None
    rows = {name: found.get(name) if isinstance(found, Mapping) else None for name in ("images", "annotations")}
    for name, value in rows.items():
        if not isinstance(value, list) or not all(isinstance(row, Mapping) for row in value):
            raise UsageError(
                f"{where}: {name}: found {shown(value)[:50]}, expected a list of objects, as in COCO's files of captions"
            )
    names = {_id(where, "images", "id", row): row.get("file_name", "") for row in rows["images"]}
    if len(names) < len(rows["images"]) or not names:
        raise UsageError(
            f"{where}: images: found {'an id twice' if names else 'none'}, expected images of different ids"
        )
    first: dict[int, tuple[int, str]] = {}
    for row in rows["annotations"]:
        number, image = _id(where, "annotations", "id", row), _id(where, "annotations", "image_id", row)
        if image not in names:
            raise UsageError(
                f"{where}: annotation {number}: found image_id {image}, no image of the file; add it, or delete the caption"
            )
        (caption,) = checked(f"{where}: annotation {number}", [row.get("caption")])
        first[image] = min(first.get(image, (number, caption)), (number, caption))
    if lone := sorted(names.keys() - first.keys()):
        raise UsageError(
            f"{where}: image {lone[0]} {names[lone[0]]}: found no caption, one of {len(lone)}; delete the image, or add one"
        )
    return [first[image][1] for image in sorted(first)]


def _id(where: str, rows: str, key: str, row: Mapping) -> int:
    if type(found := row.get(key)) is not int:
        raise UsageError(f"{where}: {rows}: {key}: found {shown(found)}, expected a whole number")
    return found
