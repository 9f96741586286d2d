"""Captions on their way to a model: read with their images, one drawn for each visit, and turned into tokens."""

from collections.abc import Callable

import numpy as np

from dit_jax.data.counter import CAPTION, hash_counters
from dit_jax.error import UsageError

_KEY = "captions"  # of `cond` on the way


def byte_tokens(texts: list[str], length: int) -> np.ndarray:
    """Tokens int32 (n, length) of texts: each byte of their UTF-8 plus 1, then zeros. Longer texts are cut."""
    found = np.zeros((len(texts), length), np.int32)
    for row, text in zip(found, texts, strict=True):
        some = np.frombuffer(text.encode()[:length], np.uint8)
        row[: len(some)] = some.astype(np.int32) + 1
    return found


def read_captioned(source, read: Callable, indices: np.ndarray) -> tuple[np.ndarray, dict]:
    """Read by a function of a source, with the captions of each record, tuples of str, in `cond`."""
    arrays, cond = read(indices)
    found = np.empty(len(indices), object)
    for i, some in enumerate(source.captions(indices)):
        found[i] = some
    return arrays, cond | {_KEY: found}


def as_tokens(cond: dict, positions: np.ndarray, seed: int, length: int) -> dict:
    """Replace the captions in `cond` by the tokens of one of each, drawn by (seed, position (b,)); without any, return it as it is."""
    if _KEY not in cond:
        return cond
    chosen = draw(cond[_KEY].tolist(), positions, seed)
    return {name: value for name, value in cond.items() if name != _KEY} | {"text": byte_tokens(chosen, length)}


def draw(captions: list[tuple[str, ...]], positions: np.ndarray, seed: int) -> list[str]:
    """Draw one of the captions of each image, by (seed, position (b,))."""
    draws = hash_counters(seed, CAPTION, 0, positions).tolist()
    return [some[number % len(some)] for some, number in zip(captions, draws, strict=True)]


def prompts(source, most: int) -> list[str]:
    """A caption of each of the first `most` records of a split, the one that `load_arrays` draws. Raises UsageError if it has none."""
    if source.captions is None:
        raise UsageError(f"{source.key}: found no captions in {source.where}, expected some to draw images from")
    numbers = np.arange(min(most, len(source)))
    return draw(source.captions(numbers), numbers, 0)
