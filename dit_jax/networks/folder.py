"""Folders of converted networks: our parameters in `weights.safetensors`, and their description, `meta.json`.

meta: `kind`, `config`, `parameters` (their number), `sha256` of the weights, `source` (`file`, `sha256`, `format`; of a text encoder
also `tokenizer`, the SHA-256 of each of its files beside the weights).
"""

import json
import os
from collections.abc import Mapping

import numpy as np
from safetensors.numpy import save_file

from dit_jax.error import JobError, StorageError, UsageError
from dit_jax.files import file_sha256, is_file, read_json, sync, write_file
from dit_jax.files.out import new_folder
from dit_jax.networks.weights import fetched, read_arrays
from dit_jax.workdir.folder import flatten

DIGITS = os.path.join(os.path.dirname(__file__), "digits")  # the shipped feature network of `fd_digits`
WEIGHTS, META = "weights.safetensors", "meta.json"
KEYS = {"kind": str, "config": dict, "parameters": int, "sha256": str, "source": dict}


def save_network(
    folder: str, kind: str, config: dict, params: Mapping, source: dict, files: Mapping[str, bytes] | None = None
) -> dict:
    """Write a network's folder, whole or not at all; returns its meta. `folder` must be new, or empty.

    `params`: nested dicts of arrays, keys without "/". `config`, `source`: JSON values. `files`: others beside the weights.
    Raises JobError if writing fails.
    """
    try:
        # in C order, because safetensors writes the memory of an array
        flat = {name: np.asarray(value, order="C") for name, value in flatten(params, "/").items()}
        with new_folder(folder) as unfinished:
            weights = os.path.join(unfinished, WEIGHTS)
            save_file(flat, weights)
            sync(weights)
            count = sum(value.size for value in flat.values())
            digest = file_sha256(weights)
            meta = {"kind": kind, "config": config, "parameters": count, "sha256": digest, "source": source}
            for name, content in (files or {}).items():
                write_file(os.path.join(unfinished, name), content)
            write_file(os.path.join(unfinished, META), json.dumps(meta, indent=1) + "\n")
    except StorageError:
        raise
    except Exception as error:  # safetensors raises its own
        raise JobError(f"{folder}: the network could not be written: {error}") from error
    return meta


def load_network(folder: str, kind: str) -> tuple[dict, dict, dict]:
    """Load (config, parameters as nested dicts of NumPy arrays, meta) from a folder of `save_network`.

    Raises UsageError if there is none, it is of another kind, or its weights do not match its meta.
    """
    meta = read_meta(folder, kind)
    weights = os.path.join(folder, WEIGHTS)
    if not is_file(weights):
        raise UsageError(f"{weights}: missing; convert the network again")
    with fetched(weights) as copy:
        if (found := file_sha256(copy)) != meta["sha256"]:
            expected = f"expected {meta['sha256']} of {META}; damaged: convert the network again"
            raise UsageError(f"{weights}: found sha256 {found}, {expected}")
        flat = read_arrays(copy)
    count = sum(value.size for value in flat.values())
    if count != meta["parameters"]:
        raise UsageError(f"{weights}: found {count:,} parameters, expected {meta['parameters']:,} of {META}")
    return meta["config"], _nest(flat, weights), meta


def read_meta(folder: str, kind: str = "") -> dict:
    """Read the meta of a network's folder. Raises UsageError if it is invalid, or of another kind than stated."""
    path = os.path.join(folder, META)
    try:
        meta = read_json(path)
    except StorageError:
        raise
    except OSError as error:
        expected = "expected a folder made by dit_jax.convert or dit_jax.features"
        raise UsageError(f"{path}: cannot be read ({error.strerror}); {expected}") from None
    if set(meta) != set(KEYS):
        raise UsageError(f"{path}: found other keys than expected: {', '.join(KEYS)}")
    for key, expected in KEYS.items():
        if type(meta[key]) is not expected:
            raise UsageError(f"{path}: {key}: found a {type(meta[key]).__name__}, expected {expected.__name__}")
    if kind and meta["kind"] != kind:
        raise UsageError(f"{folder}: found a network of kind {meta['kind']!r}, expected {kind!r}")
    return meta


def _nest(flat: Mapping, where: str) -> dict:
    tree: dict = {}
    for name, value in flat.items():
        *folders, leaf = name.split("/")
        inside = tree
        for part in folders:
            inside = inside.setdefault(part, {}) if isinstance(inside, dict) else inside
        if not isinstance(inside, dict) or leaf in inside:
            raise UsageError(f"{where}: {name}: found a tensor and a group of the same name")
        inside[leaf] = value
    return tree
