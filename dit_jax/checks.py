"""Checks of single values that people type: each raises UsageError naming the key, what was found and what was expected."""

import difflib
import math
import re
import types

from dit_jax.error import UsageError, shown


def choice(name: str, found, allowed) -> None:
    if found not in allowed:
        near = difflib.get_close_matches(str(found)[:100], [str(a) for a in allowed], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"{name}: found {shown(found)}, expected one of {', '.join(map(str, allowed))}{hint}")


def number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**1000


def in_range(name: str, found, low=-math.inf, high=math.inf) -> None:
    if not low <= found <= high:
        expected = f"a value from {low:g} to {high:g}" if high < math.inf else f"at least {low:g}"
        raise UsageError(f"{name}: found {shown(found)}, expected {expected}")


def nearest(key: str, known) -> str:
    """A hint at the known key that looks most like `key`."""
    near = difflib.get_close_matches(key[:100], list(known), 1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(known)}"


def on_disk(name: str, path: str) -> None:
    """A bucket is no folder: what is written is renamed, locked and made durable as on a disk."""
    if re.match(r"[a-z][a-z\d+.-]*:/", path, re.IGNORECASE):
        raise UsageError(
            f"{name}: found {shown(path)}, expected a path on a disk: buckets are not supported; hosts share a disk by NFS, such as "
            "Filestore (docs/launch.md)"
        )


def typed(value, kind: type | types.GenericAlias, name: str):
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000:
        return float(value)
    if kind is tuple and isinstance(value, (list, tuple)):
        return tuple(tuple(v) if isinstance(v, (list, tuple)) else v for v in value)
    if type(value) is not kind:
        raise UsageError(f"{name}: found {shown(value)} ({type(value).__name__}), expected {kind.__name__}")
    if kind is int and abs(value) >= 2**63:
        raise UsageError(f"{name}: found {shown(value)}, expected an integer of 64 bits")
    if kind is float and not math.isfinite(value):
        raise UsageError(f"{name}: found {value!r}, expected a finite number")
    return value
