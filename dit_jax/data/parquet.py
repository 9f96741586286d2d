"""Parquet files of encoded pictures: a column of structs {bytes, path}, as Hugging Face has it, or of bytes; labels; captions.

A picture is read with its row group, so reading at random is fast with small row groups or `data.cache`.
"""

import bisect
import functools
import hashlib
import io
import itertools
import json
import os
import re

import numpy as np

from dit_jax.data import pictures
from dit_jax.data.captions import NAMES, Captions, checked
from dit_jax.data.pictures import Listing
from dit_jax.error import UsageError
from dit_jax.files import opened

_GROUPS = 8  # columns of row groups that are kept, of all files
_LARGEST = 1 << 31  # bytes of one
_TEXT = r"(large_)?string(_view)?|(large_)?list(_view)?<\w+: (large_)?string(_view)?( not null)?>"  # types of captions
_kept = functools.lru_cache(maxsize=_GROUPS)(lambda group, column, number: group(column, number))


def open_shard(path: str, about: dict) -> Listing:
    """List one file. `about`: of `files.sizes`. Raises UsageError naming what does not fit, pyarrow's errors."""
    import pyarrow.parquet as pq  # here because few jobs need it

    with opened(path) as file, pq.ParquetFile(file) as found:
        meta, schema = found.metadata, found.schema_arrow
        groups, count = [meta.row_group(i) for i in range(meta.num_row_groups)], meta.num_rows
        starts = [0, *itertools.accumulate(group.num_rows for group in groups)]
        damaged = f"{path}: found notes of {count:,} rows that its columns do not hold; it is damaged, copy it again"
        if not count == starts[-1] <= about["bytes"]:
            raise UsageError(damaged)
        if (most := max((group.total_byte_size for group in groups), default=0)) > _LARGEST:
            raise UsageError(f"{path}: found a row group of {most:,} bytes, expected {_LARGEST:,}; write smaller ones")
        image, nested, label, class_names, text = _columns(path, schema)
        stamp = _footer(file) if text else ""
        kind = str(schema.field(label).type) if label else ""
        labels = found.read([label], use_threads=False)[label] if kind.startswith(("int", "uint")) else None
    if label and (labels is None or labels.null_count):
        what = f"{kind} with {labels.null_count} empty rows" if labels else kind
        raise UsageError(f"{path}: column {label!r}: found {what}, expected the number of a class in each row")
    if label and len(labels) != count:
        raise UsageError(damaged)

    def group(column: str, number: int):
        with pictures.unchanged(path, about) as file, pq.ParquetFile(file, metadata=meta) as found:
            columns = [f"{column}.bytes" if nested and column == image else column]
            return found.read_row_group(number, columns=columns, use_threads=False)[column]

    def fetch(column: str, rows: list[int]) -> list:
        numbers = [bisect.bisect_right(starts, row) - 1 for row in rows]
        return [_kept(group, column, i)[row - starts[i]].as_py() for i, row in zip(numbers, rows, strict=True)]

    def fetch_images(rows: list[int]) -> list[bytes]:
        return [(value["bytes"] if nested and value else value) or b"" for value in fetch(image, rows)]

    def fetch_captions(rows: list[int]) -> list[tuple[str, ...]]:
        found = zip(rows, fetch(text, rows), strict=True)
        return [checked(f"{path}/{row}: column {text!r}", "" if value is None else value) for row, value in found]

    names, stamps = [str(row) for row in range(count)], [about["bytes"]] * count
    numbers = labels.to_numpy().astype(np.int64) if label else None
    words = Captions([stamp] * count, fetch_captions) if text else None
    return Listing(names, stamps, None, numbers, class_names, fetch_images, words)


def _footer(file: io.BufferedIOBase) -> str:
    """Return a checksum of a file's own notes: sizes of all columns' chunks, and of text the first and last in order."""
    file.seek(-8, os.SEEK_END)
    file.seek(-8 - int.from_bytes(file.read(4), "little"), os.SEEK_END)
    return hashlib.sha256(file.read()).hexdigest()


def _columns(path: str, schema) -> tuple[str, bool, str, tuple, str]:
    """Find in a file: the column of pictures, whether it is of structs, of labels, the names of the classes, of captions; "": none."""
    types = {column.name: str(column.type) for column in schema}

    def one(name: str, fitting: list[str], what: str) -> str:
        if name not in fitting and len(fitting) != 1:
            found = ", ".join(f"{column} ({kind})" for column, kind in types.items())[:500]
            raise UsageError(f"{path}: found the columns {found}; expected one of {what}, or one called {name!r}")
        return name if name in fitting else fitting[0]

    structs = [name for name, kind in types.items() if kind.startswith("struct<") and "bytes: " in kind]
    plain = [name for name, kind in types.items() if kind in ("binary", "large_binary")]
    image = one("image", structs + plain, "encoded pictures (bytes)")
    notes = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    known = [name for name in types if notes.get(name, {}).get("_type") == "ClassLabel"]
    fitting = known + ["label"] * ("label" in types)
    label = one("label", fitting, "labels") if fitting else ""
    text = next((name for name in NAMES if re.fullmatch(_TEXT, types.get(name, ""))), "")
    return image, image in structs, label, tuple(notes.get(label, {}).get("names", ())), text


_list_all = functools.partial(pictures.list_shards, ".parquet", open_shard)
open_split = functools.partial(pictures.open_split, _list_all)
