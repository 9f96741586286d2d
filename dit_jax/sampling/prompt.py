"""Prompts to draw images from: of the command line, or of a file; and what a model is given for each image."""

import csv
import functools
import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from dit_jax.config import ModelConfig
from dit_jax.error import LARGEST, UsageError
from dit_jax.files import read
from dit_jax.log import warn
from dit_jax.networks.caption import ROWS, Text, open_text

COLUMNS = ("prompt", "caption", "text")
NEGATIVE, SEED = "negative_prompt", "seed"  # further columns
MOST = 10_000  # prompts


@dataclass(frozen=True)
class Prompts:
    """Prompts that images take in turn: image i takes row i modulo their number."""

    texts: tuple[str, ...] = ()
    negatives: tuple[
        str, ...
    ] = ()  # in place of the null condition, one a row, "" = the null condition itself; () = none
    seeds: tuple[int | None, ...] = ()  # in place of the command's, one a row; () = none

    def __len__(self) -> int:
        return len(self.texts)


class Asked:
    """What a model is given for each image that is drawn from prompts. Captions are encoded when they are first asked for."""

    def __init__(self, model: ModelConfig, prompts: Prompts):
        self.prompts, self._text = prompts, open_text(model)
        some = {"prompts": prompts.texts, NEGATIVE: prompts.negatives}
        for name, texts in some.items():
            if cut := [text for text, long in zip(texts, _cut(self._text, texts), strict=True) if long]:
                unit = "tokens" if model.encoded else model.text
                warn(
                    f"{name}: {len(cut)} of {len(texts)} are cut after {model.text_length} {unit}, the first: {cut[0]!r}"
                )
        self._tokens = {"text": self._text.tokens([*prompts.texts])}
        if any(prompts.negatives):
            self._tokens["negative"] = self._text.tokens([*prompts.negatives])
        self._block = functools.lru_cache(maxsize=8)(self._encoded)

    def rows(self, indices: np.ndarray, seed: int) -> dict:
        """Captions of images `indices` (b,) and, where a row has its own, what takes the place of the null condition, and seeds.

        {"text": ..., "negative": ..., "has_negative": bool (b,), "seed": int32 (b,)}
        """
        numbers = np.asarray(indices) % len(self.prompts)
        found = {name: self._rows(name, numbers) for name in self._tokens}
        if "negative" in found:
            found["has_negative"] = np.array([bool(self.prompts.negatives[i]) for i in numbers])
        if any(own is not None for own in self.prompts.seeds):
            own = [self.prompts.seeds[i] for i in numbers]
            found["seed"] = np.array([seed if one is None else one for one in own], np.int32)
        return found

    def _rows(self, name: str, numbers: np.ndarray):
        some, blocks = np.unique(numbers // ROWS, return_inverse=True)
        parts = [self._block(name, int(block)) for block in some]
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[blocks * ROWS + numbers % ROWS], *parts)

    def _encoded(self, name: str, block: int):
        """A block of captions, filled up to ROWS, so that a caption's states do not depend on what else is drawn."""
        rows = np.minimum(np.arange(block * ROWS, (block + 1) * ROWS), len(self.prompts) - 1)
        return self._text.encode(jax.tree.map(lambda leaf: leaf[rows], self._tokens[name]))

    def describe(self) -> dict:
        """What images depend on of the prompts: their number and a checksum of their tokens, and of what further columns say."""
        tokens = self._tokens["text"]
        found = {"prompts": tuple(map(tuple, (tokens["ids"] if isinstance(tokens, dict) else tokens).tolist()))}
        found |= {"negative_prompts": self.prompts.negatives} if "negative" in self._tokens else {}
        found |= {"seeds": self.prompts.seeds} if any(own is not None for own in self.prompts.seeds) else {}
        sums = {name: hashlib.sha256(json.dumps(values).encode()).hexdigest() for name, values in found.items()}
        return {name: f"{len(self.prompts)}, SHA-256 {digest}" for name, digest in sums.items()}


def _cut(text: Text, texts: Sequence[str]) -> Sequence[bool]:
    return text.cut([*texts]) if texts else ()


def find_prompts(prompts: Sequence[str], path: str, model: ModelConfig, away: bool = False) -> Prompts:
    """The prompts of `--prompt` or of the file of `--prompts`. Raises UsageError.

    `away`: the file is on another machine, for which the command is checked; it is not read, and there are no prompts.
    """
    given = bool(prompts) + bool(path)
    if given and not model.text:
        raise UsageError(
            f"--prompt{'s' * bool(path)}: found one, expected none: this model has no captions (model.text)"
        )
    if model.text and given != 1:
        expected = "expected one of them for a model of captions"
        raise UsageError(f"--prompt, --prompts: found {'both' if given else 'neither'}, {expected}")
    if not all(prompt.strip() for prompt in prompts):  # an unset variable of a shell would draw without a prompt
        raise UsageError("--prompt: found an empty one, expected words; without a condition draws --guidance=0")
    ending = _ending(path) if path else ""
    found = _read(path, ending) if path and not away else Prompts(tuple(prompts))
    if len(found) > MOST:
        raise UsageError(f"--prompts: found {len(found):,} in {path}, expected at most {MOST:,}")
    return found


def _ending(path: str) -> str:
    """How a file's name ends. Raises UsageError if no file of prompts ends so."""
    ending = os.path.splitext(path)[1].lower()
    if ending not in (".txt", ".csv", ".jsonl"):
        raise UsageError(f"--prompts: found {path!r}, expected a file that ends in .txt, .csv or .jsonl")
    return ending


def _read(path: str, ending: str) -> Prompts:
    """The prompts of a file. Raises UsageError naming what does not fit."""
    try:
        text = read(path).decode("utf-8-sig")
        if ending == ".txt":
            found = Prompts(tuple(row.strip() for row in text.splitlines() if row.strip()))
        else:
            found = _columns(_csv(text) if ending == ".csv" else _jsonl(text))
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        raise UsageError(f"--prompts: {path}: cannot read it: {error}") from None
    if not found or not all(found.texts):
        what = f"an empty prompt in row {found.texts.index('') + 1}" if found else "no prompt"
        raise UsageError(f"--prompts: {path}: found {what}, expected words in each row")
    return found


def _csv(text: str) -> list[dict]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns, found = next(reader, []), []
    for row in filter(None, reader):
        if len(row) != len(columns):
            advice = "put a prompt that has a comma into double quotes"
            raise ValueError(f"line {reader.line_num}: found {len(row)} fields, expected {len(columns)}; {advice}")
        found.append(dict(zip(columns, row, strict=True)))
    return found


def _jsonl(text: str) -> list[dict]:
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("found a line that is no JSON object")
    return rows


def _columns(rows: list[dict]) -> Prompts:
    columns = dict.fromkeys(name for row in rows for name in row)
    name = next((name for name in COLUMNS if name in columns), None)
    if rows and name is None:
        raise ValueError(f"found the columns {', '.join(map(str, columns))}, expected one of {', '.join(COLUMNS)}")

    def of(column: str, *kinds: type) -> tuple[str, ...]:
        values = ["" if row.get(column) is None else row[column] for row in rows]
        for number, value in enumerate(values, 1):
            if type(value) not in (str, *kinds):
                raise ValueError(f"{column}: found {value!r} in row {number}, expected text")
        return tuple(str(value).strip() for value in values)

    seeds = tuple(_seed(*one) for one in enumerate(of(SEED, int), 1)) if SEED in columns else ()
    return Prompts(of(name), of(NEGATIVE) if NEGATIVE in columns else (), seeds) if rows else Prompts()


def _seed(row: int, text: str) -> int | None:
    if text and not (text.isascii() and text.isdecimal() and int(text) <= LARGEST):
        raise ValueError(f"found the seed {text!r} in row {row}, expected a whole number from 0 to {LARGEST}, or none")
    return int(text) if text else None
