"""The notes of a folder of shards, in JSON beside them: what the records of one split are, and the size and checksum of each shard.

Folders of latents and of images have the same form of notes and files, which begin with the word `latents` or `images`.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import operator
import os
import re
import stat
import typing
from types import UnionType

from dit_jax.data.shard import ADVICE
from dit_jax.error import StorageError, UsageError, shown
from dit_jax.files import parse_json, read, remote

MAX_SHARDS = 10_000  # files
MAX_LEFT = 10_000  # malformed records
_MAX_NOTES = 1 << 22  # bytes
_NOTES_KEYS = {"version": int, "records": int, "content": str, "shards": list, "checksum": str}
_SHARD_KEYS = {"file": str, "records": int, "bytes": int, "sha256": str}


class Info:
    """What frozen dataclasses inherit that describe the records of one split. Making one raises UsageError naming an invalid field.

    Fields with a default are left out of the notes if they have it, so that later ones change no older notes.
    """

    form: str  # what the files are called
    dataset: str  # of the images, as in `describe`
    split: str
    source_sha256: str  # as in `describe`
    classes: int  # 0: no labels
    class_names: tuple  # as they were then; () if the classes have numbers only
    left_out: tuple  # numbers of the split's malformed records, which are not there; the others keep their numbers
    captions_sha256: str  # of the captions of all records, as JSON lines; "": the records have none

    @property
    def version(self) -> int:
        """Of the layout of records."""

    def fits(self, size: int) -> bool:
        """Return whether a record can have so many bytes."""

    def pack(self, where: str, index: int, *example) -> bytes:
        """Pack a record: CRC-32 of the rest (uint32), its number in the split (uint64), and more. Raises UsageError naming `where`."""


def read_notes(folder: str, kind: type[Info]) -> tuple[Info, dict]:
    """Read and check the notes of a folder: (description, notes). Raises UsageError."""
    path = os.path.join(folder, f"{kind.form}.json")
    notes = _load_notes(path, kind)
    try:
        info = kind(**{f.name: _tupled(notes[f.name]) for f in dataclasses.fields(kind)})
        if notes["version"] != info.version:
            raise UsageError(f"version: found {notes['version']!r}, expected {info.version}")
        _check_shards(kind.form, notes)
        sha256("content", notes["content"])
        if info.left_out and info.left_out[-1] >= notes["records"] + len(info.left_out):
            raise UsageError(f"left_out: found {info.left_out[-1]}, expected numbers of the split's records")
    except UsageError as error:
        raise UsageError(f"{kind.form} {path}: {error}; {ADVICE}") from error
    return info, notes


def _load_notes(path: str, kind: type[Info]) -> dict:
    """Read notes and check their keys and checksum. Raises UsageError, StorageError if a bucket refuses."""
    try:
        found = None if remote(path) else os.stat(path)
        if found and not (stat.S_ISREG(found.st_mode) and found.st_size <= _MAX_NOTES):
            raise UsageError(f"{kind.form} {path}: found no regular file of up to {_MAX_NOTES} bytes; {ADVICE}")
        notes = parse_json(read(path, _MAX_NOTES), _MAX_NOTES)
    except FileNotFoundError:
        why = f"found no such file, so the {kind.form} are not complete; run encode (again)"
        raise UsageError(f"{kind.form} {path}: {why}") from None
    except StorageError:
        raise
    except OSError as error:
        raise UsageError(f"{kind.form} {path}: cannot read it: {error.strerror}") from error
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"{kind.form} {path}: found what is no JSON ({error}); {ADVICE}") from error
    try:
        version = notes.get("version", 1) if isinstance(notes, dict) else 1
        if version not in (1, 2):
            raise UsageError(f"version: found {version!r}, expected 1 or 2")
        whole = listed(defaults(kind)) | notes if isinstance(notes, dict) else notes
        _keys("notes", whole, _NOTES_KEYS | {f.name: _as_json(f.type) for f in dataclasses.fields(kind)})
        found, stated = checksum(notes), notes["checksum"]
        if found != stated:
            raise UsageError(f"checksum: found {found}, expected {stated[:64]} (damaged or edited)")
    except UsageError as error:
        raise UsageError(f"{kind.form} {path}: {error}; {ADVICE}") from error
    return whole


def _check_shards(form: str, notes: dict) -> None:
    """Raises UsageError unless the notes list the shards of a whole split."""
    shards, total = notes["shards"], 0
    if not 1 <= len(shards) <= MAX_SHARDS:
        raise UsageError(f"shards: found {len(shards)}, expected 1 to {MAX_SHARDS}")
    for i, shard in enumerate(shards):
        _keys(f"shards[{i}]", shard, _SHARD_KEYS)
        if shard["file"] != shard_name(form, i, len(shards)):
            raise UsageError(
                f"shards[{i}].file: found {shard['file'][:99]!r}, expected {shard_name(form, i, len(shards))!r}"
            )
        for key in ("records", "bytes"):
            if not 1 <= shard[key] < 2**48:
                raise UsageError(f"shards[{i}].{key}: found {shard[key]}, expected at least 1")
        sha256(f"shards[{i}].sha256", shard["sha256"])
        total += shard["records"]
    if notes["records"] != total:
        raise UsageError(f"records: found {notes['records']}, expected {total}, the sum over the shards")


def checksum(notes: dict) -> str:
    """Hash the notes without their checksum, SHA-256."""
    rest = {key: value for key, value in notes.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def shard_name(form: str, number: int, count: int) -> str:
    return f"{form}-{number:05d}-of-{count:05d}.array_record"


def defaults(kind: type[Info]) -> dict:
    """Return the fields that notes may lack, with their values."""
    return {f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}


def check_info(info: Info) -> None:
    """Raises UsageError if a field is of another type, or one that all descriptions have is invalid."""
    for f in dataclasses.fields(info):
        _kind(f.name, getattr(info, f.name), f.type)
    for name in ("dataset", "split"):
        word(name, getattr(info, name))
    if not 0 <= info.classes <= 2**31 - 1:
        raise UsageError(f"classes: found {info.classes}, expected 0 to {2**31 - 1}")
    if len(info.class_names) not in (0, info.classes) or not all(type(name) is str for name in info.class_names):
        raise UsageError(f"class_names: found {shown(info.class_names)[:99]}, expected {info.classes} names, or none")
    lowest = [-1, *info.left_out]
    if len(lowest) > MAX_LEFT or not all(type(n) is int and low < n for low, n in itertools.pairwise(lowest)):
        raise UsageError(f"left_out: found {shown(info.left_out)[:99]}, expected up to {MAX_LEFT} rising numbers")
    for name in ("source_sha256", "captions_sha256"):
        if name == "source_sha256" or info.captions_sha256:
            sha256(name, getattr(info, name))


def word(name: str, value: str) -> None:
    """Raises UsageError if a field is no name."""
    if not 0 < len(value) <= 200 or not value.isprintable():
        raise UsageError(f"{name}: found {value[:50]!r}, expected a name of 1 to 200 characters")


def _keys(name: str, found, kinds: dict) -> None:
    if not isinstance(found, dict) or set(found) != set(kinds):
        keys = sorted(found)[:20] if isinstance(found, dict) else type(found).__name__
        raise UsageError(f"{name}: found {keys}, expected the keys {sorted(kinds)}")
    for key, kind in kinds.items():
        _kind(f"{name}.{key}", found[key], kind)


def _kind(name: str, value, kind: type | UnionType) -> None:
    kinds = typing.get_args(kind) or (kind,)
    if type(value) not in kinds:
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise UsageError(f"{name}: found {shown(value)[:99]} ({type(value).__name__}), expected {expected}")


def _tupled(value):
    return tuple(value) if isinstance(value, list) else value


def listed(fields: dict) -> dict:
    """Return fields as JSON has them, which has no tuples."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def _as_json(kind: type | UnionType) -> type | UnionType:
    kinds = [list if one is tuple else one for one in typing.get_args(kind) or (kind,)]
    return functools.reduce(operator.or_, kinds)


def sha256(name: str, value: str) -> None:
    if not re.fullmatch("[0-9a-f]{64}", value):
        raise UsageError(f"{name}: found {value[:70]!r}, expected the 64 hexadecimal digits of a SHA-256")
