"""Parquet files of encoded pictures: a column of structs {bytes, path}, as Hugging Face's data sets have it, or of bytes; `label`.

A picture is read with its row group, so reading at random is fast with small row groups or `data.cache`.
"""

import bisect
import functools
import itertools
import json

import numpy as np

from dit_jax.data import pictures
from dit_jax.data.pictures import Listing
from dit_jax.error import UsageError
from dit_jax.files import opened

_GROUPS = 8  # row groups that are kept, of all files
_kept = functools.lru_cache(maxsize=_GROUPS)(lambda group, number: group(number))


def open_shard(path: str, about: dict) -> Listing:
    """List one file. `about`: of `files.sizes`. Raises UsageError naming what does not fit, pyarrow's errors."""
    import pyarrow.parquet as pq  # here because few jobs need it

    with opened(path) as file, pq.ParquetFile(file) as found:
        meta = found.metadata
        image, nested, label, class_names = _columns(path, found.schema_arrow)
        labels = found.read([label], use_threads=False)[label] if label else None
    if label and ("int" not in str(labels.type) or labels.null_count):
        what = f"{labels.type} with {labels.null_count} empty rows"
        raise UsageError(f"{path}: column {label!r}: found {what}, expected the number of a class in each row")
    starts = [0, *itertools.accumulate(meta.row_group(i).num_rows for i in range(meta.num_row_groups))]
    count = meta.num_rows
    if not count == starts[-1] == (len(labels) if label else count) <= about["bytes"]:
        raise UsageError(
            f"{path}: found notes of {count:,} rows that its columns do not hold; it is damaged, copy it again"
        )

    def group(number: int):
        with opened(path) as file, pq.ParquetFile(file, metadata=meta) as found:
            columns = [f"{image}.bytes" if nested else image]
            return found.read_row_group(number, columns=columns, use_threads=False)[image]

    def fetch(rows: list[int]) -> list[bytes]:
        found = []
        for row in rows:
            number = bisect.bisect_right(starts, row) - 1
            value = _kept(group, number)[row - starts[number]].as_py()
            found.append((value["bytes"] if nested and value else value) or b"")
        return found

    names, stamps = [str(row) for row in range(count)], [about["bytes"]] * count
    return Listing(names, stamps, None, labels.to_numpy().astype(np.int64) if label else None, class_names, fetch)


def _columns(path: str, schema) -> tuple[str, bool, str, tuple]:
    """Find in a file: the column of pictures, whether it is of structs, the column of labels or "", the names of the classes."""
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
    return image, image in structs, label, tuple(notes.get(label, {}).get("names", ()))


_list_all = functools.partial(pictures.list_shards, ".parquet", open_shard)
open_split, class_names = (functools.partial(f, _list_all) for f in (pictures.open_split, pictures.class_names))
