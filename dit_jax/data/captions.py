"""Captions to tokens: which caption of an image a visit gets, and its bytes."""

import numpy as np

from dit_jax.data.counter import CAPTION, hash_counters

CAPTIONS = "captions"  # the key of `cond` under which a batch carries tuples of str, before they are tokens


def byte_tokens(texts: list[str], length: int) -> np.ndarray:
    """Tokens int32 (n, length) of texts: each byte of their UTF-8 plus 1, then zeros. Longer texts are cut."""
    found = np.zeros((len(texts), length), np.int32)
    for row, text in zip(found, texts, strict=True):
        some = np.frombuffer(text.encode()[:length], np.uint8)
        row[: len(some)] = some.astype(np.int32) + 1
    return found


def chosen(captions: np.ndarray, positions: np.ndarray, seed: int) -> list[str]:
    """Draw one of the captions of each image, by (seed, global position (b,)). `captions`: tuples of str, object (b,)."""
    draws = hash_counters(seed, CAPTION, 0, positions).tolist()
    return [some[draw % len(some)] for some, draw in zip(captions.tolist(), draws, strict=True)]
