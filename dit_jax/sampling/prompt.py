"""Prompts to draw images from: of the command line, or of a file."""

import csv
import io
import json
import os
from collections.abc import Sequence

from dit_jax.config import ModelConfig
from dit_jax.data.words import byte_tokens
from dit_jax.error import UsageError
from dit_jax.files import read
from dit_jax.log import warn

COLUMNS = ("prompt", "caption", "text")
MOST = 10_000  # prompts


def wanted_prompts(model: ModelConfig, texts: Sequence[str]) -> dict[str, tuple]:
    """The field of `cond` that draws images from prompts in turn; {} without prompts."""
    if not texts:
        return {}
    return {"text": tuple(map(tuple, byte_tokens([*texts], model.text_length).tolist()))}


def find_prompts(prompts: Sequence[str], path: str, model: ModelConfig) -> tuple[str, ...]:
    """The prompts of `--prompt` or of the file of `--prompts`. Raises UsageError; warns of those that are cut."""
    given = bool(prompts) + bool(path)
    if given and not model.text:
        raise UsageError(
            f"--prompt{'s' * bool(path)}: found one, expected none: this model has no captions (model.text)"
        )
    if model.text and given != 1:
        expected = "expected one of them for a model of captions"
        raise UsageError(f"--prompt, --prompts: found {'both' if given else 'neither'}, {expected}")
    found = tuple(_read(path) if path else prompts)
    if len(found) > MOST:
        raise UsageError(f"--prompts: found {len(found):,} in {path}, expected at most {MOST:,}")
    if long := [text for text in found if len(text.encode()) > model.text_length]:
        warn(f"{len(long)} prompts are cut after {model.text_length} bytes, the first: {long[0]!r}")
    return found


def _read(path: str) -> list[str]:
    """The prompts of a file. Raises UsageError naming what does not fit."""
    ending = os.path.splitext(path)[1].lower()
    if ending not in (".txt", ".csv", ".jsonl"):
        raise UsageError(f"--prompts: found {path!r}, expected a file that ends in .txt, .csv or .jsonl")
    try:
        text = read(path).decode("utf-8-sig")
        rows = text.splitlines() if ending == ".txt" else _column(path, text, ending)
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        raise UsageError(f"--prompts: {path}: cannot read it: {error}") from None
    found = [row.strip() for row in rows]
    if ending == ".txt":
        found = [row for row in found if row]
    if not found or not all(found):
        what = f"an empty prompt in row {found.index('') + 1}" if found else "no prompt"
        raise UsageError(f"--prompts: {path}: found {what}, expected words in each row")
    return found


def _column(path: str, text: str, ending: str) -> list[str]:
    if ending == ".csv":
        rows = list(csv.DictReader(io.StringIO(text)))
    else:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("found a line that is no JSON object")
    columns = list(rows[0]) if rows else []
    name = next((name for name in COLUMNS if name in columns), None)
    if rows and name is None:
        raise ValueError(f"found the columns {', '.join(map(str, columns))}, expected one of {', '.join(COLUMNS)}")
    return [str(row.get(name) or "") for row in rows]
