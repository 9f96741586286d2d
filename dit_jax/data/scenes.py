"""Scenes with words: one to four of scikit-learn's handwritten digits in six colours, in the quarters of a picture of 16 x 16 pixels.

Scene i is a function of i alone, so training is one epoch without end: example p of a run with seed s is scene s 2^40 + p, with s modulo
2^20. Splits: `train` draws from the writings that `digits` trains on and from the pairs of colour and digit, and of digits in a relation,
that are not held out; `test` is the same with the writings that are held out; each scene of `unseen` has a pair that is; `plain`, a
second data set, is those of `test` that are one white digit. `test`, `unseen` and `plain` have SIZE scenes.
"""

import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from dit_jax.config import DataConfig
from dit_jax.data import pixels
from dit_jax.data.counter import SCENE, hash_counters
from dit_jax.data.skip import Skips
from dit_jax.error import UsageError
from dit_jax.metrics.composition import NONE, SHIFTS, Prompts

NAME, SIDE, CELL, SIZE, ENDLESS = "scenes", 16, 8, 4096, 1 << 60
COLOURS = {
    "red": (255, 32, 32),
    "green": (32, 224, 32),
    "blue": (64, 64, 255),
    "yellow": (255, 224, 0),
    "purple": (208, 0, 208),
    "white": (255, 255, 255),
}
WHITE = list(COLOURS).index("white")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLACES = ("top left", "top right", "bottom left", "bottom right")
COUNTS = {2: "two", 3: "three", 4: "four"}
NAMES = ("left of", "right of", "above", "below")
# (first place, second place) -> the relation of the first to the second, if they share a row or a column.
RELATIONS = {
    (2 * r + c, 2 * (r - down) + c - across): name
    for name, (down, across) in zip(NAMES, SHIFTS, strict=True)
    for r in (0, 1)
    for c in (0, 1)
    if 0 <= r - down <= 1 and 0 <= c - across <= 1
}
KINDS = ("single", "two", "two", "relation", "counting", "three", "three", "four")  # equally likely
_DRAWS = 24  # numbers that most scenes take
_PALETTE = np.array(list(COLOURS.values()), np.uint16)


class Thing(NamedTuple):
    """A digit 0 to 9 of a colour (its number in COLOURS) at a place (its number in PLACES), the first named first."""

    digit: int
    colour: int
    place: int

    @property
    def words(self) -> str:
        return f"{list(COLOURS)[self.colour]} {DIGITS[self.digit]}"


class Scene(NamedTuple):
    """What a picture shows. kind: a row of KINDS; captions: equally true ones; things: in the order of the first caption."""

    kind: str
    captions: tuple[str, ...]
    things: tuple[Thing, ...]
    writings: tuple[int, ...]  # of each thing: which of its digit's images in the split, a large number


def held_out_pair(colour: int, digit: int) -> bool:
    """Whether a colour and a digit, two of ten digits for each colour, never meet in training."""
    return (digit - 2 * colour) % 5 == 1


def held_out_relation(first: int, second: int) -> bool:
    """Whether two digits never stand in a stated relation in training, a fifth of all pairs. The order does not matter: each relation has
    a caption from either side."""
    return (first + second) % 5 == 0


def make_scenes(indices: np.ndarray, split: str) -> list[Scene]:
    """Draw scenes `indices` (b,) of a split; those of `train` and `test` follow one rule."""
    draw = _plain if split == "plain" else functools.partial(_scene, unseen=split == "unseen")
    table = np.stack([hash_counters(0, SCENE, column, indices) for column in range(_DRAWS)], axis=1).tolist()
    return [draw(_stream(row)) for row in table]


def _stream(row: list[int]):
    """Yield the numbers of a row, then others that follow from its last."""
    yield from row
    for block in itertools.count(_DRAWS):
        yield from hash_counters(row[-1], SCENE, block, np.arange(_DRAWS)).tolist()


def _scene(draws: Iterator[int], unseen: bool) -> Scene:
    kind = KINDS[next(draws) % len(KINDS)]
    places = _permuted(draws)
    count = {"single": 1, "two": 2, "relation": 2, "counting": 2 + next(draws) % 3, "three": 3, "four": 4}[kind]
    if kind == "relation":
        places = list(list(RELATIONS)[next(draws) % len(RELATIONS)])
    by_relation = kind == "relation" and unseen and next(draws) % 2 == 0
    while True:
        pairs = [_pair(draws, unseen and i == 0 and not by_relation) for i in range(1 if kind == "counting" else count)]
        crossed = kind == "relation" and held_out_relation(pairs[0][1], pairs[1][1])
        if kind != "relation" or crossed == by_relation:
            break
    pairs = pairs * count if kind == "counting" else pairs
    things = tuple(Thing(digit, colour, place) for (colour, digit), place in zip(pairs, places, strict=False))
    return Scene(kind, _captions(kind, things), things, tuple(next(draws) for _ in things))


def _plain(draws: Iterator[int]) -> Scene:
    pairs = [pair for pair in _pairs(False) if pair[0] == WHITE]
    colour, digit = pairs[next(draws) % len(pairs)]
    things = (Thing(digit, colour, next(draws) % len(PLACES)),)
    return Scene("single", _captions("single", things), things, (next(draws),))


def _permuted(draws: Iterator[int]) -> list[int]:
    places, found = [0, 1, 2, 3], []
    while places:
        found.append(places.pop(next(draws) % len(places)))
    return found


@functools.cache
def _pairs(held_out: bool) -> list[tuple[int, int]]:
    every = ((colour, digit) for colour in range(len(COLOURS)) for digit in range(10))
    return [pair for pair in every if held_out_pair(*pair) == held_out]


def _pair(draws: Iterator[int], held_out: bool) -> tuple[int, int]:
    return _pairs(held_out)[next(draws) % len(_pairs(held_out))]


def _captions(kind: str, things: tuple[Thing, ...]) -> tuple[str, ...]:
    if kind == "counting":
        plural = things[0].words + ("es" if things[0].words.endswith("x") else "s")
        return (f"{COUNTS[len(things)]} {plural}",)
    names = [thing.words for thing in things]
    if kind == "relation":
        (a, b), (first, second) = things, names
        return (
            f"{first} {RELATIONS[a.place, b.place]} {second}",
            f"{second} {RELATIONS[b.place, a.place]} {first}",
        )
    placed = [f"{thing.words} {PLACES[thing.place]}" for thing in things]
    orders = [some for lists in (names, placed) for some in (lists, [*lists[:0:-1], lists[0]])]
    return tuple(dict.fromkeys(" and ".join([", ".join(some[:-1]), some[-1]][len(some) < 2 :]) for some in orders))


_THING = rf"(?P<colour{{0}}>{'|'.join(COLOURS)}) (?P<digit{{0}}>{'|'.join(DIGITS)})"
_COUNTED = re.compile(rf"(?P<count>{'|'.join(COUNTS.values())}) " + _THING.format("") + "(es|s)")
_RELATED = re.compile(_THING.format("1") + rf" (?P<relation>{'|'.join(NAMES)}) " + _THING.format("2"))
_LISTED = re.compile(_THING.format("") + rf"( (?P<place>{'|'.join(PLACES)}))?")
LISTS = {1: "single", 2: "two", 3: "three", 4: "four"}
ASKED = (*LISTS.values(), "place", "relation", "counting")  # kinds of captions; place: of a single thing


class Wish(NamedTuple):
    """What a caption asks for: its kind in ASKED, things with the place that is stated of each or -1, relation in NAMES or -1."""

    kind: str
    things: list[Thing]
    relation: int = NONE


def _thing(found: re.Match, which: str = "", place: str | None = None) -> Thing:
    where = PLACES.index(place) if place else NONE
    return Thing(DIGITS.index(found[f"digit{which}"]), list(COLOURS).index(found[f"colour{which}"]), where)


def parse(caption: str) -> Wish:
    """What a caption of scenes asks for. Raises UsageError for other text."""
    if found := _COUNTED.fullmatch(caption):
        count = next(n for n, word in COUNTS.items() if word == found["count"])
        return Wish("counting", [_thing(found)] * count)
    if found := _RELATED.fullmatch(caption):
        return Wish("relation", [_thing(found, "1"), _thing(found, "2")], NAMES.index(found["relation"]))
    listed = [_LISTED.fullmatch(part) for part in re.split(", | and ", caption)]
    if not all(listed) or len(listed) not in LISTS or len({part["place"] is None for part in listed}) > 1:
        some = "'red three left of blue seven', 'two green fives', 'red three top left and blue seven bottom right'"
        raise UsageError(f"caption: found {caption!r}, expected one such as {some}")
    things = [_thing(part, place=part["place"]) for part in listed]
    return Wish("place" if len(things) == 1 and listed[0]["place"] else LISTS[len(things)], things)


def asked(captions: Sequence[str]) -> Prompts:
    """The captions as the arrays that the metric of composition takes. Raises UsageError as `parse`."""
    found = [parse(caption) for caption in captions]
    things = np.full((len(found), 4, 3), NONE)
    for row, wish in zip(things, found, strict=True):
        row[: len(wish.things)] = wish.things
    kind, relation = np.array([[ASKED.index(wish.kind), wish.relation] for wish in found]).reshape(-1, 2).T
    return Prompts(*np.moveaxis(things, 2, 0), relation, kind, ASKED, _PALETTE.astype(np.float64))


@functools.cache
def writings(held_out: bool) -> tuple[np.ndarray, ...]:
    """Each digit's images uint8 (n, 8, 8) in `digits`, of the split `test` or `train`, in their order there."""
    from dit_jax.data.digits import digit_images

    images, labels, test = digit_images()
    return tuple(images[(labels == digit) & (test == held_out)] for digit in range(10))


def paint(scene: Scene, held_out: bool) -> np.ndarray:
    """Picture uint8 (16, 16, 3) of a scene: grey levels of each writing times its colour, on black."""
    picture, images = np.zeros((SIDE, SIDE, 3), np.uint8), writings(held_out)
    for thing, number in zip(scene.things, scene.writings, strict=True):
        some = images[thing.digit]
        grey = some[number % len(some)].astype(np.uint16)
        top, left = CELL * (thing.place // 2), CELL * (thing.place % 2)
        picture[top : top + CELL, left : left + CELL] = (grey[..., None] * _PALETTE[thing.colour] + 127) // 255
    return picture


@dataclass(frozen=True)
class Scenes:
    """The `Source` for scenes of one split."""

    split: str
    first: int
    count: int
    skips: Skips = field(default_factory=Skips, compare=False)
    key, where, classes, image_shape = "data.dataset", "scikit-learn's digits", 0, (SIDE, SIDE, 3)

    def __len__(self) -> int:
        return self.count

    @property
    def identity(self) -> dict:
        few = self.scenes(np.arange(16))
        digest = hashlib.sha256(
            b"".join(paint(scene, self.held_out).tobytes() for scene in few) + repr(few).encode()
        ).hexdigest()
        finite = {} if self.split == "train" else {"records": self.count}
        return {"name": NAME, "split": self.split, **finite, "sha256": digest}

    @property
    def held_out(self) -> bool:
        return self.split != "train"

    def scenes(self, indices: np.ndarray) -> list[Scene]:
        """Return what the pictures show."""
        return make_scenes(self.first + indices, self.split)

    def make_order(self, seed: int) -> Callable[[np.ndarray], np.ndarray]:
        """Return the order of a training: positions (b,) -> indices (b,), each once."""
        return lambda positions: positions + (seed % 2**20 << 40)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, dict]:
        return np.stack([paint(scene, self.held_out) for scene in self.scenes(indices)]), {}

    def captions(self, indices: np.ndarray) -> list[tuple[str, ...]]:
        return [scene.captions for scene in self.scenes(indices)]

    def training(self, arrays: np.ndarray, positions: np.ndarray, seed: int) -> np.ndarray:
        return pixels.to_float(arrays)

    def evaluation(self, arrays: np.ndarray) -> np.ndarray:
        return pixels.to_float(arrays)

    def describe(self) -> dict:
        about = self.identity
        return {
            "dataset": NAME,
            "split": self.split,
            "records": self.count,
            "classes": 0,
            "image_shape": list(self.image_shape),
            "sha256": about["sha256"],
        }

    def overlaps(self, other: "Scenes") -> bool:
        return self.split == other.split


def open_split(data: DataConfig, split: str) -> Scenes:
    """Open a split of scenes. Raises UsageError for another split, size, flip or cache than scenes have."""
    numbers = {"train": (0, ENDLESS), "test": (1 << 61, SIZE), "unseen": (1 << 62, SIZE), "plain": (1 << 62, SIZE)}
    if split not in numbers:
        raise UsageError(f"split: found {split!r}, expected {', '.join(numbers)} of scenes")
    for key, expected in (("image_size", SIDE), ("flip", False), ("cache", False)):
        if (found := getattr(data, key)) != expected:
            raise UsageError(f"data.{key}: found {found}, expected {expected} for scenes")
    return Scenes(split, *numbers[split], Skips(data.skip_bad))
