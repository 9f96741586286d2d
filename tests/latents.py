"""Latents that tests write, read and spoil."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from runs import write_latents

from dit_jax.config import DataConfig
from dit_jax.data import notes, pipeline
from dit_jax.data import shard as shard_files
from dit_jax.data.latent_notes import LatentInfo
from dit_jax.data.notes import checksum
from dit_jax.error import UsageError

shard_name = functools.partial(notes.shard_name, "latents")
SIZE = 60
INFO = LatentInfo(
    shape=(4, 4, 2),
    dtype="float16",
    moments=True,
    mirrored=True,
    autoencoder="tiny",
    autoencoder_sha256="a" * 64,
    scale=0.5,
    shift=0.25,
    classes=7,
    dataset="digits",
    split="train",
    source_sha256="b" * 64,
    image_size=32,
)
TEST = dataclasses.replace(INFO, split="test")


def examples(info, count, seed=0):
    """Labels and random means and log-variances, of the image and of its mirror image."""
    rng = np.random.default_rng(seed)
    return [(i % info.classes, rng.standard_normal(info.record_shape, dtype=np.float32)) for i in range(count)]


def write_store(root):
    """A folder with the splits train (three shards) and test."""
    write_latents(f"{root}/train", INFO, examples(INFO, SIZE), shard_bytes=25 * INFO.layout.itemsize)
    write_latents(f"{root}/test", TEST, examples(TEST, 11, seed=1))
    return str(root)


def config(store, **changes):
    return DataConfig(**{**dict(latents=str(store), image_size=32, cache=False, workers=0, prefetch=0), **changes})


def batches(data, count, batch_size=16, seed=3, start=0, **kwargs):
    iterator = pipeline.make_batches(data, batch_size=batch_size, seed=seed, **kwargs)
    iterator.set_state({"next_index": start})
    taken = [next(iterator) for _ in range(count)]
    iterator.close()
    return {
        "image": np.concatenate([batch["image"] for batch in taken]),
        "label": np.concatenate([batch["cond"]["label"] for batch in taken]),
    }


def assert_same(a, b):
    for key in ("image", "label"):
        np.testing.assert_array_equal(a[key], b[key])


def error_of(function, *args, kind=UsageError, **kwargs):
    with pytest.raises(kind) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- damage: whole files


def change_notes(folder, change, seal=True):
    """Applies `change` to the notes; `seal` makes their checksum right again."""
    path = folder / "latents.json"
    notes = json.loads(path.read_text())
    change(notes)
    if seal:
        notes["checksum"] = checksum(notes)
    path.write_text(json.dumps(notes))


def seal_shard(folder, shard):
    """Makes the notes fit a damaged shard, as if it had been written so."""

    def change(notes):
        path = folder / notes["shards"][shard]["file"]
        notes["shards"][shard] |= {"bytes": path.stat().st_size, "sha256": shard_files.file_sha256(str(path))}

    change_notes(folder, change)


def cut(folder, path):
    path.write_bytes(path.read_bytes()[:-70_000])
    return f"latents {path}: found {path.stat().st_size} bytes, expected "


# ---- damage: records


def records_of(shard):
    """The bytes of the records of one shard of the split of the fixture."""
    reader = shard_files.open_shard(str(shard))
    return reader.read(list(range(reader.num_records())))


def rewrite(folder, shard, records):
    """Writes a shard of these records, sealed: nothing but the records tells that it is damaged."""
    path = folder / shard_name(shard, 3)
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for record in records:
        writer.write(record)
    writer.close()
    seal_shard(folder, shard)
