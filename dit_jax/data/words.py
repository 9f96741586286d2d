"""Captions on their way to a model: read with their images, one drawn for each visit, and turned into tokens."""

import functools
import hashlib
import string
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dit_jax.data.counter import CAPTION, hash_counters
from dit_jax.data.skip import read_kept
from dit_jax.error import UsageError

_KEY = "captions"  # of `cond` on the way


def byte_tokens(texts: list[str], length: int) -> np.ndarray:
    """Tokens int32 (n, length) of texts: each byte of their UTF-8 plus 1, then zeros. Longer texts are cut."""
    found = np.zeros((len(texts), length), np.int32)
    for row, text in zip(found, texts, strict=True):
        some = np.frombuffer(text.encode()[:length], np.uint8)
        row[: len(some)] = some.astype(np.int32) + 1
    return found


def word_tokens(texts: list[str], length: int, rows: int) -> np.ndarray:
    """Tokens int32 (n, length) of texts: each word's number of 1 to rows - 1, then zeros. Longer texts are cut.

    A word's number is a checksum, so there is no vocabulary, and two words may share one (Weinberger et al. 2009, arXiv 0902.2206).
    """
    found = np.zeros((len(texts), length), np.int32)
    for row, text in zip(found, texts, strict=True):
        some = [1 + _checksum(word) % (rows - 1) for word in split_words(text)[:length]]
        row[: len(some)] = some
    return found


@functools.lru_cache(maxsize=1 << 16)
def _checksum(word: str) -> int:
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")


def split_words(text: str) -> list[str]:
    """Words of a text, in small letters, without punctuation around them."""
    return [word for part in text.lower().split() if (word := part.strip(string.punctuation))]


@dataclass(frozen=True)
class Worded:
    """A labelled source with captions made of the names of its classes, and in all else that source."""

    source: object
    template: str
    names: tuple[str, ...]
    key = property(lambda self: self.source.key)
    where = property(lambda self: self.source.where)
    classes = property(lambda self: self.source.classes)
    image_shape = property(lambda self: self.source.image_shape)
    skips = property(lambda self: self.source.skips)
    identity = property(lambda self: self.source.identity | {"template": self.template})

    def __getattr__(self, name: str):  # what only some sources have, such as `sizes`
        return getattr(self.source, name)

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, dict]:
        return self.source.read(indices)

    def training(self, arrays: np.ndarray, positions: np.ndarray, seed: int) -> np.ndarray:
        return self.source.training(arrays, positions, seed)

    def evaluation(self, arrays: np.ndarray) -> np.ndarray:
        return self.source.evaluation(arrays)

    def captions(self, indices: np.ndarray) -> list[tuple[str, ...]]:
        return self.of_labels(self.source.read(indices)[1]["label"])

    def of_labels(self, labels: np.ndarray) -> list[tuple[str, ...]]:
        """The caption of each label."""
        return [(self.template.replace("{}", self.names[label].replace("_", " ")),) for label in labels.tolist()]

    def overlaps(self, other) -> bool:
        return self.source.overlaps(other.source if isinstance(other, Worded) else other)

    def describe(self) -> dict:
        return self.source.describe() | {"template": self.template}


def in_words(source, template: str, names: Callable[[], tuple[str, ...]]):
    """Give captions to a labelled source that has none. Raises UsageError if its classes have no names."""
    if not template or source.captions is not None or not source.classes:
        return source
    found = getattr(source, "class_names", ()) or names()
    if len(found) != source.classes:
        raise UsageError(
            f"data.template: found no names of the {source.classes} classes in {source.where}, expected some"
        )
    return Worded(source, template, tuple(found))


def read_captioned(source, read: Callable, indices: np.ndarray) -> tuple[np.ndarray, dict]:
    """Read by a function of a source, with the captions of each record, tuples of str, in `cond`."""
    arrays, cond = read(indices)
    found = np.empty(len(indices), object)
    said = source.of_labels(cond["label"]) if hasattr(source, "of_labels") else source.captions(indices)
    for i, some in enumerate(said):
        found[i] = some
    return arrays, cond | {_KEY: found}


def as_tokens(cond: dict, positions: np.ndarray, seed: int, tokens: Callable | None) -> dict:
    """Replace the captions in `cond` by `tokens` of one of each, drawn by (seed, position (b,)); without any, return it as it is."""
    if _KEY not in cond:
        return cond
    chosen = draw(cond[_KEY].tolist(), positions, seed)
    return {name: value for name, value in cond.items() if name != _KEY} | {"text": tokens(chosen)}


def draw(captions: list[tuple[str, ...]], positions: np.ndarray, seed: int) -> list[str]:
    """Draw one of the captions of each image, by (seed, position (b,))."""
    draws = hash_counters(seed, CAPTION, 0, positions).tolist()
    return [some[number % len(some)] for some, number in zip(captions, draws, strict=True)]


def prompts(source, most: int) -> list[str]:
    """A caption of each of the first `most` records of a split, the one that `load_arrays` draws. Raises UsageError if it has none."""
    if source.captions is None:
        raise UsageError(f"{source.key}: found no captions in {source.where}, expected some to draw images from")
    numbers = np.arange(min(most, len(source)))
    good, found = read_kept(source.captions, numbers, source.skips)
    return draw(found or [], numbers[good], 0)
