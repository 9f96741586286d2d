"""JSON and lines of text, read within limits, because a file may be anybody's."""

import collections
import json
import math
from collections.abc import Iterator
from typing import IO

from dit_jax.error import UsageError

LONGEST = 2**20  # bytes of one JSON value or line: a config, a record, a row
LARGEST = 2**27  # bytes of a file of lines
DEEPEST = 32  # nesting depth of JSON lists and objects


def parse_json(data: bytes, most: int = LONGEST) -> object:
    """Parse one JSON value. Raises ValueError if it is malformed, too long, nested too deeply, or repeats a key."""
    if len(data) > most:
        raise ValueError(f"more than {most:,} bytes")
    try:
        value = json.loads(data.decode(), object_pairs_hook=_keys_once)
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} deep") from None
    inside = [value]
    for _ in range(DEEPEST + 1):
        inside = [v for x in inside for v in (x.values() if isinstance(x, dict) else x if isinstance(x, list) else ())]
    if inside:
        raise ValueError(f"nested more than {DEEPEST} deep")
    return value


def _keys_once(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {name!r} is there twice")
    return found


def json_text(value, **how) -> str:
    """Format a value as JSON, with null for NaN and infinity, which JSON lacks. `how`: as `json.dumps` takes it."""
    try:
        return json.dumps(value, allow_nan=False, **how)
    except ValueError:
        return json.dumps(_without_nan(value), allow_nan=False, **how)


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def numbered(lines: IO, path: str, most: float = LARGEST) -> Iterator[tuple]:
    """Yield (number, line) of an open file. Raises UsageError if a line exceeds LONGEST, or the file `most` bytes."""
    number = total = 0
    while line := lines.readline(LONGEST + 1):
        number, total = number + 1, total + len(line)
        if len(line) > LONGEST:
            raise UsageError(f"{path}:{number}: found more than {LONGEST:,} bytes in a line, expected fewer")
        if total > most:
            raise UsageError(f"{path}: found more than {most:,} bytes, expected fewer; split the file")
        yield number, line
