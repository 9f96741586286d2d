"""Emoji with words: 1,594 concepts in three styles, 309 of them, people and hands, in five skin tones too, 32 x 32 pixels on white.

The file beside this one has them all (NOTICE has licences; `benchmarks/make_emoji.py` makes it again). Concept c (0, 1, ... in the order
of Unicode's charts) has styles s = 0, 1, 2 and tones t = 0 (none) to 5. Splits, so that what is held out is a pair of things that are
both trained on in other pairs:

`unseen`: t = 1 + c mod 5, one tone of each concept with tones, in all styles;
`test`: of the others c mod 5 = 0 and s = (c div 5) mod 3, one style of every fifth concept;
`train`: all else.
"""

import functools
import hashlib
import json
import lzma
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dit_jax.config import DataConfig
from dit_jax.data.skip import Skips
from dit_jax.data.tfds import Records
from dit_jax.error import UsageError

NAME, SIDE, STYLES, SPLITS = "emoji", 32, ("noto", "fluent", "twemoji"), ("train", "test", "unseen")
TONES = ("", "light", "medium-light", "medium", "medium-dark", "dark")
FILE = Path(__file__).parent / "emoji.xz"
SHA256 = "3486eafe5603c9320c614834917746776f652f3c029865c1529e15a1d7064d0c"


@dataclass(frozen=True)
class Some:
    """Some of the emoji, as a data source of TFDS: pixels uint8 (n, 32, 32, 3), and (concept, style, tone) of each (n, 3)."""

    pictures: np.ndarray
    which: np.ndarray

    def __len__(self) -> int:
        return len(self.which)

    def __getitems__(self, indices: list[int]) -> list[dict]:
        return [{"image": self.pictures[i], "captions": captions(*self.which[i].tolist())} for i in indices]


class Emoji(Records):
    """The `Source` for emoji of one split."""

    where = property(lambda self: str(FILE))
    _checksum = SHA256  # of the captions too

    def name_of(self, index: int) -> str:
        return f"data.dataset = {NAME!r}, split {self.split!r}, record {index}"

    def overlaps(self, other: "Emoji") -> bool:
        return self.split == other.split


@functools.cache
def read_all() -> tuple[list, np.ndarray, np.ndarray]:
    """Read the concepts (name, tags, name with each tone), all pictures uint8 (n, 32, 32, 3), and (concept, style, tone) of each (n, 3).

    Raises UsageError if the file is damaged.
    """
    content = FILE.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        raise UsageError(f"{FILE}: found SHA-256 {found}, expected {SHA256}; install dit_jax again")
    head, _, pixels = lzma.decompress(content).partition(b"\n")
    concepts = json.loads(head)
    which = [
        (concept, style, tone)
        for concept, (_, _, toned) in enumerate(concepts)
        for style in range(len(STYLES))
        for tone in range(1 + len(toned))
    ]
    return concepts, np.frombuffer(pixels, np.uint8).reshape(-1, SIDE, SIDE, 3), np.array(which)


def captions(concept: int, style: int, tone: int) -> tuple[str, str]:
    """Two captions of a picture: its name, or its tags; then its style."""
    name, tags, toned = read_all()[0][concept]
    skin = [f"{TONES[tone]} skin tone"] if tone else []
    return tuple(
        f"{text}, {STYLES[style]} style" for text in (toned[tone - 1] if tone else name, ", ".join(tags + skin))
    )


def split_of(which: np.ndarray) -> np.ndarray:
    """The split of each (concept, style, tone) (n, 3), its number in SPLITS (n,)."""
    concept, style, tone = which.T
    held_out = (concept % 5 == 0) & (style == concept // 5 % 3)
    return np.where(tone == 1 + concept % 5, 2, np.where(held_out, 1, 0))


def open_split(data: DataConfig, split: str) -> Emoji:
    """Open a split of emoji. Raises UsageError for another split than SPLITS, for flips, or if the file is damaged."""
    if split not in SPLITS:
        raise UsageError(f"split: found {split!r}, expected {', '.join(SPLITS)} of emoji")
    if data.flip:
        raise UsageError("data.flip: found True, expected False for emoji: a left arrow would become a right one")
    _, pictures, which = read_all()
    here = split_of(which) == SPLITS.index(split)
    some = Some(pictures[here], which[here])
    identity = {"name": NAME, "split": split, "records": len(some), "sha256": SHA256}
    return Emoji(
        NAME,
        split,
        some,
        (SIDE, SIDE, 3),
        0,
        (),
        identity,
        data.image_size,
        False,
        Skips(data.skip_bad),
        "captions",
        True,
    )
