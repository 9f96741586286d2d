"""`manifest.json`: size and SHA-256 of every file in a folder, to detect changed, missing or added files."""

import json
import os
from collections.abc import Iterator

from dit_jax.files import file_sha256, parse_json, read, sync, write_file

NAME = "manifest.json"
LARGEST = 64 << 20  # bytes of a manifest
ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


def write_manifest(folder: str) -> None:
    """Sync and hash the files of `folder` and write its manifest, whole or not at all."""
    files = {name: _entry(os.path.join(folder, name)) for name in _files(folder)}
    for path in (*(os.path.join(folder, name) for name in files), *(root for root, _, _ in os.walk(folder))):
        sync(path)
    write_file(os.path.join(folder, NAME), _text({"version": 1, "files": files}))


def problems(folder: str, parts: tuple[str, ...] = ("",)) -> list[str]:
    """List the differences of a folder from its manifest, a line each.

    Compares all names and sizes, and contents of files whose names begin with one of `parts`. Raises OSError if an existing
    file cannot be read now, because that does not make it damaged.
    """
    try:
        wanted = _read(os.path.join(folder, NAME))
    except ABSENT as error:
        return [f"{NAME}: {error.strerror}"]
    except ValueError as error:
        return [f"{NAME}: {error}"]
    there = set(_files(folder))
    found = [f"{name}: missing" for name in sorted(wanted.keys() - there)]
    found += [f"{name}: not in {NAME}" for name in sorted(there - wanted.keys())]
    for name in sorted(there & wanted.keys()):
        found += _compare(folder, name, wanted[name], name.startswith(parts))
    return found


def _compare(folder: str, name: str, wanted: dict, hashes: bool) -> Iterator[str]:
    path = os.path.join(folder, name)
    try:
        size = os.path.getsize(path)
        if size != wanted["bytes"]:
            yield f"{name}: found {size:,} bytes, expected {wanted['bytes']:,}"
        elif hashes and _entry(path)["sha256"] != wanted["sha256"]:
            yield f"{name}: its bytes changed (SHA-256)"
    except ABSENT as error:
        yield f"{name}: {error.strerror}"


def _files(folder: str) -> list[str]:
    """List all files below, relative with forward slashes, without the manifest. Links are not followed."""
    found = []
    for root, _, names in os.walk(folder):
        found += [os.path.relpath(os.path.join(root, name), folder).replace(os.sep, "/") for name in names]
    return sorted(name for name in found if name != NAME)


def _entry(path: str) -> dict:
    return {"bytes": os.path.getsize(path), "sha256": file_sha256(path)}


def _text(manifest: dict) -> str:
    return json.dumps(manifest, indent=0, sort_keys=True) + "\n"


def _read(path: str) -> dict:
    """Read {file: {bytes, sha256}}. Raises ValueError unless the bytes are as `write_manifest` writes them."""
    if os.path.getsize(path) > LARGEST:
        raise ValueError(f"larger than {LARGEST:,} bytes")
    text = read(path, LARGEST)
    try:
        manifest = parse_json(text, LARGEST)
        files = manifest["files"]
        sound = manifest["version"] == 1 and all(
            type(entry["bytes"]) is int and isinstance(entry["sha256"], str) for entry in files.values()
        )
        if not sound or _text(manifest).encode() != text:
            raise ValueError("damaged")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("damaged") from None
    return files
