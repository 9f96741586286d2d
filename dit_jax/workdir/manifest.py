"""`manifest.json`: size and checksum of every file in a folder, to detect changed, missing or added files.

The checksum is SHA-256, of bytes that are read back. In a bucket it is the service's own CRC-32C, which a listing gives without a read.
"""

import json
import os
from collections.abc import Callable, Collection, Iterator

from dit_jax.files import create, file_crc32c, file_sha256, parse_json, read, remote, sizes, sync, write_file

NAME = "manifest.json"
LARGEST = 64 << 20  # bytes of a manifest
SUMS = {"sha256": ("SHA-256", file_sha256), "crc32c": ("CRC-32C", file_crc32c)}
ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


def write_manifest(folder: str, parts: Collection[str] = (), check: Callable[[], None] = lambda: None) -> None:
    """Sync and hash the files of `folder` and write its manifest, whole or not at all. `check`: raises if this process may not.

    Raises OSError if there is no file in one of the folders `parts`.
    """
    there = _files(folder)
    if gone := [part for part in parts if not any(name.startswith(f"{part}/") for name in there)]:
        raise FileNotFoundError(2, f"what was written of {', '.join(gone)} is gone", folder)
    check()
    if remote(folder):
        if not create(os.path.join(folder, NAME), _text({"version": 1, "files": there})):
            raise FileExistsError(17, "another process has written this checkpoint", folder)
        return
    files = {name: found | {"sha256": file_sha256(os.path.join(folder, name))} for name, found in there.items()}
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
    there = _files(folder)
    found = [f"{name}: missing" for name in sorted(wanted.keys() - there.keys())]
    found += [f"{name}: not in {NAME}" for name in sorted(there.keys() - wanted.keys())]
    for name in sorted(there.keys() & wanted.keys()):
        found += _compare(os.path.join(folder, name), name, there[name], wanted[name], name.startswith(parts))
    return found


def _compare(path: str, name: str, there: dict, wanted: dict, hashes: bool) -> Iterator[str]:
    kind = "sha256" if "sha256" in wanted else "crc32c"
    called, of_file = SUMS[kind]
    try:
        if there["bytes"] != wanted["bytes"]:
            yield f"{name}: found {there['bytes']:,} bytes, expected {wanted['bytes']:,}"
        elif (hashes or kind in there) and (there.get(kind) or of_file(path)) != wanted[kind]:
            yield f"{name}: its bytes changed ({called})"
    except ABSENT as error:
        yield f"{name}: {error.strerror}"


def _files(folder: str) -> dict[str, dict]:
    """Map all files below, relative with forward slashes, without the manifest, to what is known without reading them."""
    return {name: known for name, known in sizes(folder).items() if name != NAME}


def _text(manifest: dict) -> str:
    return json.dumps(manifest, indent=0, sort_keys=True) + "\n"


def _read(path: str) -> dict:
    """Read {file: {bytes, sha256 or crc32c}}. Raises ValueError unless the bytes are as `write_manifest` writes them."""
    text = read(path, LARGEST)
    if len(text) > LARGEST:
        raise ValueError(f"larger than {LARGEST:,} bytes")
    try:
        manifest = parse_json(text, LARGEST)
        files = manifest["files"]
        sound = manifest["version"] == 1 and all(
            type(entry["bytes"]) is int and isinstance(entry.get("sha256", entry.get("crc32c")), str)
            for entry in files.values()
        )
        if not sound or _text(manifest).encode() != text:
            raise ValueError("damaged")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("damaged") from None
    return files
