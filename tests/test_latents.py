"""Latents on disk: what is stored comes back, noise depends on seed and position only, and damage is named, never read."""

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from runs import write_latents
from scipy import stats

from dit_jax.config import DataConfig
from dit_jax.data import counter, latent_writer, latents, pipeline, pixels, posterior, source
from dit_jax.data.latent_notes import DTYPES, LatentInfo, checksum, shard_name
from dit_jax.data.latent_writer import Hosts
from dit_jax.data.latents import open_latents
from dit_jax.data.order import order as permuted
from dit_jax.error import UsageError

pytestmark = pytest.mark.timeout(60)  # nothing hangs, whatever is broken

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


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A folder with the splits train (three shards) and test."""
    root = tmp_path_factory.mktemp("latents")
    write_latents(f"{root}/train", INFO, examples(INFO, SIZE), shard_bytes=25 * INFO.layout.itemsize)
    write_latents(f"{root}/test", TEST, examples(TEST, 11, seed=1))
    return str(root)


@pytest.fixture
def broken(store, tmp_path):
    """A copy of the folder of the split train, to damage."""
    shutil.copytree(f"{store}/train", tmp_path / "train")
    return tmp_path / "train"


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


# ---- what is stored


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("moments, mirrored", [(True, True), (True, False), (False, True), (False, False)])
def test_what_is_written_comes_back(tmp_path, dtype, moments, mirrored):
    info = dataclasses.replace(INFO, dtype=dtype, moments=moments, mirrored=mirrored)
    written = examples(info, 9)
    found = write_latents(str(tmp_path / "x"), info, iter(written), shard_bytes=4 * info.layout.itemsize)
    assert (found.info, len(found), len(found.files), found.classes, found.image_shape) == (info, 9, 3, 7, (4, 4, 2))
    stored = np.stack([values for _, values in written]).astype(DTYPES[dtype])
    values, cond = found.read(np.array([8, 0, 3, 8, 4]))  # across shards, out of order, twice
    np.testing.assert_array_equal(values, stored[[8, 0, 3, 8, 4]])
    assert cond["label"].tolist() == [1, 0, 3, 1, 4] and cond["label"].dtype == np.int32
    assert info.layout.itemsize == 16 + stored[0].nbytes
    assert sorted(os.listdir(tmp_path / "x")) == [*(shard_name(i, 3) for i in range(3)), "latents.json"]


def test_a_record_is_laid_out_as_documented(store):
    found = open_latents(f"{store}/train")
    raw = found._stored(np.array([31]))[0]
    assert int.from_bytes(raw[:4], "little") == zlib.crc32(raw[4:])
    assert int.from_bytes(raw[4:12], "little") == 31 and int.from_bytes(raw[12:16], "little") == 31 % 7
    expected = examples(INFO, SIZE)[31][1].astype(np.float16)
    np.testing.assert_array_equal(np.frombuffer(raw[16:], "<f2").reshape(INFO.record_shape), expected)


def test_the_same_latents_give_the_same_checksum_however_sharded(store, tmp_path):
    one = write_latents(str(tmp_path / "one"), INFO, examples(INFO, SIZE))
    assert len(one.files) == 1 and one.content == open_latents(f"{store}/train").content
    other = write_latents(str(tmp_path / "other"), INFO, examples(INFO, SIZE, seed=5))
    assert other.content != one.content
    assert source.open_source(config(store), "train").describe()["sha256"] == one.content


def test_describe_and_overlap_of_latents(store, tmp_path):
    data = config(store)
    found = source.open_source(data, "test").describe()
    assert {k: found[k] for k in ("dataset", "split", "records", "classes", "image_shape")} == {
        "dataset": "digits",
        "split": "test",
        "records": 11,
        "classes": 7,
        "image_shape": [4, 4, 2],
    }
    assert (found["autoencoder_sha256"], found["scale"], found["shift"]) == ("a" * 64, 0.5, 0.25)
    train, test = (source.open_source(data, split) for split in ("train", "test"))
    assert train.overlaps(train) and not train.overlaps(test)
    write_latents(str(tmp_path / "copy"), TEST, examples(INFO, SIZE))
    assert train.overlaps(open_latents(str(tmp_path / "copy")))
    other = dataclasses.replace(test, info=dataclasses.replace(TEST, autoencoder_sha256="c" * 64))
    assert re.search("autoencoder_sha256: found c+, expected a+", error_of(train.overlaps, other))


# ---- what a model sees


def test_latents_of_unlabelled_images_have_no_labels(tmp_path):
    info = dataclasses.replace(INFO, classes=0)
    write_latents(str(tmp_path / "train"), info, [(0, values) for _, values in examples(INFO, 9)])
    opened = source.open_source(config(tmp_path), "train")
    assert opened.classes == 0 and opened.describe()["classes"] == 0
    assert next(pipeline.make_batches(config(tmp_path), batch_size=4, seed=0))["cond"] == {}
    bad = [(1, examples(INFO, 1)[0][1])]
    assert "found label 1, expected a whole number from 0 to 0" in error_of(write_latents, f"{tmp_path}/x", info, bad)


def test_a_position_of_an_older_version_is_compared_in_what_it_states(store):
    iterator, identity = (
        pipeline.make_batches(config(store), batch_size=4, seed=0),
        open_latents(f"{store}/train").identity,
    )
    assert {name: identity[name] for name in ("name", "split", "records")} == {
        "name": "digits",
        "split": "train",
        "records": SIZE,
    }
    older = {name: identity[name] for name in ("sha256", "autoencoder_sha256", "scale", "shift")}
    iterator.set_state({"next_index": 3, "latents": older})
    iterator.set_state({"next_index": 3})
    assert iterator.get_state() == {"next_index": 3, "source": identity}
    for key in ("latents", "source"):
        message = error_of(iterator.set_state, {"next_index": 3, key: older | {"scale": 2.0}})
        assert message.startswith(
            "data.latents: scale: found 0.5, expected 2.0, as in the data that this run has been trained on;"
        )


# ---- random numbers


def test_normals_are_normal():
    drawn = counter.normals(1, np.arange(1000), 2048)
    assert drawn.dtype == np.float32 and np.isfinite(drawn).all()
    flat = drawn.ravel().astype(np.float64)
    n = flat.size
    assert stats.kstest(flat, "norm").statistic < 1.95 / math.sqrt(n)  # p = 0.001
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(np.mean(flat**power) - moment) < 4 * math.sqrt(variance / n)
    share = 2 * stats.norm.sf(4.0)
    assert abs(np.sum(np.abs(flat) > 4) - share * n) < 5 * math.sqrt(share * n)
    halves = drawn.reshape(1000, 2, 1024)
    for a, b in (
        (drawn[:-1], drawn[1:]),
        (halves[:, 0], halves[:, 1]),
        (halves[:, 0] ** 2 - 1, halves[:, 1] ** 2 - 1),
        (drawn[:, :-1], drawn[:, 1:]),
        (drawn, counter.normals(2, np.arange(1000), 2048)),
    ):
        assert abs(np.mean(a * b)) < 4 * math.sqrt(np.mean(a**2) * np.mean(b**2) / a.size)


def test_normals_depend_on_seed_and_position_only():
    whole = counter.normals(7, np.arange(1000), 33)
    for chosen in (np.array([5]), np.arange(500, 537), np.array([999, 3, 3])):
        np.testing.assert_array_equal(counter.normals(7, chosen, 33), whole[chosen])
    assert len(np.unique(whole)) > 0.999 * whole.size
    assert counter.normals(7, np.array([2**47]), 33).shape == (1, 33)


def test_normals_are_box_mullers_of_splitmix64():
    word = (1 << 64) - 1

    def mixed(z):
        z = (z + 0x9E3779B97F4A7C15) & word
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
        return z ^ (z >> 31)

    assert mixed(0) == 0xE220A8397B1DCDAF  # the first output of the published generator of seed 0
    key = 0
    for number in (11, 3, 0, 123_456_789):  # seed, stream, index, position
        key = mixed((key + number) & word)
    bits = [mixed((key + j * 0x9E3779B97F4A7C15) & word) for j in range(5)]
    radius = [math.sqrt(-2 * math.log(((b >> 32) + 0.5) / 2**32)) for b in bits]
    angle = [2 * math.pi * (b & 0xFFFFFFFF) / 2**32 for b in bits]
    expected = [r * math.cos(a) for r, a in zip(radius, angle, strict=True)]
    expected += [r * math.sin(a) for r, a in zip(radius, angle, strict=True)]
    drawn = counter.normals(11, np.array([123_456_789]), 9)
    np.testing.assert_allclose(drawn, [expected[:9]], atol=2e-6)


def test_samples_have_the_posteriors_moments(tmp_path):
    info = dataclasses.replace(INFO, dtype="float32", mirrored=False)
    mean, deviation = np.float32(3.0), np.float32(0.5)
    values = np.zeros(info.record_shape, np.float32)
    values[0, 0], values[0, 1] = mean, 2 * np.log(deviation)
    write_latents(str(tmp_path / "train"), info, [(0, values)] * 50)
    drawn = batches(config(tmp_path), 20, batch_size=100)["image"]
    assert drawn.dtype == np.float32 and drawn.shape == (2000, 4, 4, 2)
    n = drawn.size
    assert abs(drawn.mean() - (mean - 0.25) * 0.5) < 4 * 0.25 / math.sqrt(n)
    assert abs(drawn.std() - deviation * 0.5) < 4 * 0.25 / math.sqrt(2 * n)
    epochs = drawn.reshape(40, 50, -1)
    assert abs(np.corrcoef(epochs[0].ravel(), epochs[1].ravel())[0, 1]) < 0.1  # another epoch, other noise


def test_held_out_latents_are_means(store):
    images, cond = pipeline.load_arrays(config(store), "test")
    written = examples(TEST, 11, seed=1)
    expected = np.stack([values[0, 0] for _, values in written]).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(images, (expected - np.float32(0.25)) * np.float32(0.5))
    assert images.dtype == np.float32 and cond["label"].tolist() == [label for label, _ in written]


def test_scale_and_shift_may_be_one_per_channel(tmp_path):
    info = dataclasses.replace(INFO, scale=(0.5, 2.0), shift=(0.25, -1.0))
    found = write_latents(str(tmp_path / "train"), info, examples(info, 20))
    assert found.info == info
    values, _ = found.read(np.arange(20))
    for see in (
        posterior.posterior_mean,
        lambda info, values: posterior.sample_posterior(info, values, np.arange(20), 3),
    ):
        z = see(info, values)
        assert z.dtype == np.float32
        for c in range(2):
            alone = dataclasses.replace(INFO, scale=info.scale[c], shift=info.shift[c])
            np.testing.assert_array_equal(z[..., c], see(alone, values)[..., c])
    described = source.open_source(config(tmp_path), "train").describe()
    assert (described["scale"], described["shift"]) == ([0.5, 2.0], [0.25, -1.0])
    one, other = batches(config(tmp_path), 1), pipeline.make_batches(config(tmp_path), batch_size=16, seed=3)
    other.set_state(json.loads(json.dumps(other.get_state())))  # as a checkpoint keeps it
    np.testing.assert_array_equal(next(other)["image"], one["image"][:16])


def test_means_alone_are_not_sampled(tmp_path):
    info = dataclasses.replace(INFO, moments=False, mirrored=False, dtype="bfloat16")
    write_latents(str(tmp_path / "train"), info, examples(info, 20))
    images, cond = pipeline.load_arrays(config(tmp_path), "train")
    order = np.concatenate([permuted(3, epoch, 20) for epoch in range(4)])
    drawn = batches(config(tmp_path), 5)
    np.testing.assert_array_equal(drawn["image"], images[order])
    np.testing.assert_array_equal(drawn["label"], cond["label"][order])


def test_log_variance_is_bounded(tmp_path):
    info = dataclasses.replace(INFO, mirrored=False, dtype="float32")
    values = np.zeros(info.record_shape, np.float32)
    values[0, 1] = 1e30
    write_latents(str(tmp_path / "train"), info, [(0, values)])
    drawn = batches(config(tmp_path), 4)["image"]
    assert np.isfinite(drawn).all() and np.abs(drawn).max() < 0.5 * 7 * math.exp(10)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("cache", [True, False])
def test_latents_are_independent_of_processes_batches_and_cache(store, processes, cache):
    expected = batches(config(store, flip=True), 12)
    assert_same(expected, batches(config(store, flip=True, cache=cache), 6, batch_size=32))
    threads = config(store, flip=True, cache=cache, workers=3, prefetch=4)
    parts = [batches(threads, 12, process_index=i, process_count=processes) for i in range(processes)]
    rows = 16 // processes
    joined = {
        k: np.concatenate([p[k].reshape(12, rows, *p[k].shape[1:]) for p in parts], 1).reshape(expected[k].shape)
        for k in ("image", "label")
    }
    assert_same(expected, joined)
    assert_same({k: v[80:] for k, v in expected.items()}, batches(threads, 7, start=5))  # resumed
    assert not np.array_equal(expected["image"], batches(config(store, flip=True), 12, seed=4)["image"])


def test_flip_takes_the_mirrored_copy_where_pixels_would_be_flipped(tmp_path):
    info = dataclasses.replace(INFO, moments=False, scale=1.0, shift=0.0)
    values = np.stack([np.zeros((1, 4, 4, 2)), np.ones((1, 4, 4, 2))]).astype(np.float32)
    write_latents(str(tmp_path / "train"), info, [(0, values)] * 20)
    marks = np.arange(2.0).reshape(1, 1, 2, 1).repeat(160, 0)
    flipped = pixels.flip(marks, np.arange(160), 3)[:, 0, 0, 0] == 1
    drawn = batches(config(tmp_path, flip=True), 10)["image"]
    np.testing.assert_array_equal(drawn[:, 0, 0, 0] == 1, flipped)
    assert not batches(config(tmp_path), 10)["image"].any()


def test_flip_needs_mirrored_copies(tmp_path):
    info = dataclasses.replace(INFO, mirrored=False)
    write_latents(str(tmp_path / "train"), info, examples(info, 5))
    message = error_of(batches, config(tmp_path, flip=True), 1)
    assert message.startswith(f"data.flip: found True, expected False, as the latents in {tmp_path}/train hold no ")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(dataset="mnist"), "data.dataset: found 'mnist', expected 'digits', which the latents in "),
        (dict(image_size=64), "data.image_size: found 64, expected 32, which the latents in "),
        (
            dict(split="test2"),
            "latents {store}/test2/latents.json: found no such file, so the latents are not complete",
        ),
        (dict(split="../train"), "data.split: found '../train', expected the name of a folder in data.latents"),
        (dict(split=""), "data.split: found '', expected the name of a folder in data.latents"),
    ],
)
def test_latents_of_something_else_are_refused(store, changes, message):
    assert error_of(batches, config(store, **changes), 1).startswith(message.format(store=store))


def test_a_renamed_split_is_refused(store, tmp_path):
    shutil.copytree(f"{store}/test", tmp_path / "train")
    message = error_of(batches, config(tmp_path), 1)
    assert message.startswith("data.split or data.held_out_split: found 'train', expected 'test', which the latents in")


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
        notes["shards"][shard] |= {"bytes": path.stat().st_size, "sha256": latents.file_sha256(str(path))}

    change_notes(folder, change)


def cut(folder, path):
    path.write_bytes(path.read_bytes()[:-70_000])
    return f"latents {path}: found {path.stat().st_size} bytes, expected "


def cut_unnoticed(folder, path):
    cut(folder, path)
    seal_shard(folder, 1)
    return f"latents {path}: cannot read it: ArrayRecord file should be"


def extra(folder, path):
    path.write_bytes(path.read_bytes() + b"x")
    return f"latents {path}: found {path.stat().st_size} bytes, expected {path.stat().st_size - 1}; delete"


def empty(folder, path):
    path.write_bytes(b"")
    return f"latents {path}: found 0 bytes, expected "


def missing(folder, path):
    path.unlink()
    return f"latents {path}: cannot read it: [Errno 2] No such file or directory"


def directory(folder, path):
    path.unlink()
    path.mkdir()
    return f"latents {path}: found "


def pipe(folder, path):
    path.unlink()
    os.mkfifo(path)
    return f"latents {path}: found 0 bytes, expected "


def foreign_link(folder, path):
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")
    return f"latents {path}: found a link to {folder.parent}/elsewhere, expected a file of this folder"


def other_shard(folder, path):
    shutil.copy(folder / shard_name(2, 3), path)
    seal_shard(folder, 1)
    return f"latents {path}: found 10 records, expected 25; delete"


def no_notes(folder, path):
    (folder / "latents.json").unlink()
    return f"latents {folder}/latents.json: found no such file, so the latents are not complete; run encode"


def notes_pipe(folder, path):
    (folder / "latents.json").unlink()
    os.mkfifo(folder / "latents.json")
    return f"latents {folder}/latents.json: found no regular file"


def huge_notes(folder, path):
    os.truncate(folder / "latents.json", 1 << 33)
    return f"latents {folder}/latents.json: found no regular file of up to 4194304 bytes"


WHOLE = [cut, cut_unnoticed, extra, empty, missing, directory, pipe, foreign_link, other_shard]
WHOLE += [no_notes, notes_pipe, huge_notes]


@pytest.mark.parametrize("damage", WHOLE, ids=lambda f: f.__name__)
def test_damaged_files_are_named(broken, damage):
    expected = damage(broken, broken / shard_name(1, 3))
    assert error_of(open_latents, str(broken)).startswith(expected)


def test_verify_hashes_whole_shards(broken):
    open_latents(str(broken), verify=True)
    path = broken / shard_name(1, 3)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1  # padding that no record needs
    path.write_bytes(content)
    open_latents(str(broken))
    assert error_of(open_latents, str(broken), verify=True).startswith(f"latents {path}: found SHA-256 ")


NOTES = {
    "version": (lambda n: n.update(version=2), "version: found 2, expected 1"),
    "missing key": (lambda n: n.pop("scale"), "notes: found ["),
    "unknown key": (lambda n: n.update(more=1), "notes: found ["),
    "float as text": (lambda n: n.update(scale="0.5"), "notes.scale: found '0.5' (str), expected float"),
    "bool as int": (lambda n: n.update(records=True), "notes.records: found True (bool), expected int"),
    "not finite": (lambda n: n.update(shift=math.nan), "scale, shift: found 0.5, nan, expected finite"),
    "other channels": (
        lambda n: n.update(scale=[0.5] * 3),
        "scale: found 3 numbers, expected one, or one for each of the 2",
    ),
    "text among numbers": (
        lambda n: n.update(shift=["1", 0.0]),
        "scale, shift: found 0.5, ('1', 0.0), expected finite",
    ),
    "lists in lists": (
        lambda n: n.update(shift=[[1.0], 0.0]),
        "scale, shift: found 0.5, ([1.0], 0.0), expected finite",
    ),
    "a channel of scale 0": (lambda n: n.update(scale=[1.0, 0.0]), "scale, shift: found (1.0, 0.0), 0.25, expected"),
    "dtype": (lambda n: n.update(dtype="int8"), "dtype: found 'int8', expected one of float16"),
    "absurd shape": (lambda n: n.update(shape=[4096, 4096, 4096]), "shape: found "),
    "negative shape": (lambda n: n.update(shape=[-1, 4, 2]), "shape: found (-1, 4, 2), expected (h, w, c)"),
    "digest": (lambda n: n.update(autoencoder_sha256="xyz"), "autoencoder_sha256: found 'xyz', expected the 64"),
    "no shards": (lambda n: n.update(shards=[], records=0), "shards: found 0, expected 1 to"),
    "zero records": (lambda n: n["shards"][0].update(records=0), "shards[0].records: found 0, expected at least 1"),
    "other sum": (lambda n: n.update(records=59), "records: found 59, expected 60, the sum over the shards"),
    "path": (lambda n: n["shards"][0].update(file="../x"), "shards[0].file: found '../x', expected 'latents-00000-of"),
    "absolute": (lambda n: n["shards"][2].update(file="/etc/passwd"), "shards[2].file: found '/etc/passwd', expected"),
    "shard twice": (lambda n: n["shards"].__setitem__(1, n["shards"][0]), "shards[1].file: found 'latents-00000-of"),
    "shard keys": (lambda n: n["shards"][1].pop("sha256"), "shards[1]: found ['bytes', 'file', 'records'], expected"),
    "shard text": (lambda n: n["shards"].__setitem__(1, "x"), "shards[1]: found str, expected the keys"),
    "control characters": (lambda n: n.update(dataset="a\x1b[31m"), "dataset: found 'a\\x1b[31m', expected a name"),
}


@pytest.mark.parametrize("name", NOTES)
def test_wrong_notes_are_named(broken, name):
    change, expected = NOTES[name]
    change_notes(broken, change)
    assert error_of(open_latents, str(broken)).startswith(f"latents {broken}/latents.json: {expected}")


def test_edited_notes_are_refused(broken):
    change_notes(broken, lambda notes: notes.update(scale=0.6), seal=False)
    message = error_of(open_latents, str(broken))
    assert message.startswith(f"latents {broken}/latents.json: checksum: found ") and "(damaged or edited)" in message


def test_no_damage_of_the_notes_passes(broken):
    path, rng = broken / "latents.json", np.random.default_rng(0)
    good, info = path.read_bytes(), open_latents(str(broken)).info
    wholes = [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"1" * 5000,
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"version": "1"}',
        b'{"version": {}}',
    ]
    for trial in range(150):
        content = bytearray(good)
        place = int(rng.integers(len(good)))
        if trial < len(wholes):
            content = wholes[trial]
        elif trial % 3 == 0:
            content = content[:place]
        elif trial % 3 == 1:
            content[place] ^= 1 << int(rng.integers(8))
        else:
            del content[place : place + int(rng.integers(1, 60))]
        path.write_bytes(content)
        try:
            assert open_latents(str(broken)).info == info  # white space
        except UsageError as error:
            assert str(broken) in str(error)


# ---- damage: records


def records_of(shard):
    """The bytes of the records of one shard of the split of the fixture."""
    reader = latents.open_shard(str(shard))
    return reader.read(list(range(reader.num_records())))


def rewrite(folder, shard, records):
    """Writes a shard of these records, sealed: nothing but the records tells that it is damaged."""
    path = folder / shard_name(shard, 3)
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for record in records:
        writer.write(record)
    writer.close()
    seal_shard(folder, shard)


def sealed(record, **fields):
    """A record with changed fields and the right CRC."""
    table = np.frombuffer(record, INFO.layout).copy()
    for name, value in fields.items():
        table[name] = value
    content = table.tobytes()[4:]
    return zlib.crc32(content).to_bytes(4, "little") + content


def with_value(record, value):
    values = np.frombuffer(record, INFO.layout)["values"].copy()
    values[0, 1, 1, 2, 3, 1] = value
    return sealed(record, values=values)


def replaced(records, i, new):
    return [*records[:i], new, *records[i + 1 :]]


# name -> (records of shard 1 -> damaged ones, number of the first bad record in the split, message)
BAD = 25 + 4
RECORDS = {
    "truncated record": (lambda r: replaced(r, 4, r[4][:-1]), BAD, "found 271 bytes, expected 272"),
    "empty record": (lambda r: replaced(r, 4, b""), BAD, "found 0 bytes, expected 272"),
    "another dtype": (lambda r: replaced(r, 4, r[4] + r[4][16:]), BAD, "found 528 bytes, expected 272"),
    "another shape": (lambda r: replaced(r, 4, r[4][:144]), BAD, "found 144 bytes, expected 272"),
    "changed value": (lambda r: replaced(r, 4, r[4][:99] + b"?" + r[4][100:]), BAD, "found CRC-32 "),
    "zeros": (lambda r: replaced(r, 4, bytes(272)), BAD, "found CRC-32 "),
    "NaN": (lambda r: replaced(r, 4, with_value(r[4], np.nan)), BAD, "found NaN or infinity, expected finite values"),
    "infinity": (lambda r: replaced(r, 4, with_value(r[4], -np.inf)), BAD, "found NaN or infinity, expected finite"),
    "label too large": (lambda r: replaced(r, 4, sealed(r[4], label=7)), BAD, "found label 7, expected 0 to 6"),
    "negative label": (lambda r: replaced(r, 4, sealed(r[4], label=-1)), BAD, "found label -1, expected 0 to 6"),
    "duplicate": (lambda r: replaced(r, 4, r[3]), BAD, f"found record number {BAD - 1}, expected number {BAD} (a dupl"),
    "swapped": (lambda r: [*r[:4], r[5], r[4], *r[6:]], BAD, f"found record number {BAD + 1}, expected number {BAD}"),
    "reversed": (lambda r: r[::-1], 25, "found record number 49, expected number 25"),
    "huge number": (lambda r: replaced(r, 4, sealed(r[4], index=2**64 - 1)), BAD, f"found record number {2**64 - 1}"),
}


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", RECORDS)
def test_malformed_records_are_named(broken, name, cache):
    change, number, expected = RECORDS[name]
    path = broken / shard_name(1, 3)
    rewrite(broken, 1, change(records_of(path)))
    message = error_of(lambda: [open_latents(str(broken)).read(np.array([i])) for i in range(SIZE)])
    assert message.startswith(f"latents {path}, record {number}: {expected}") and "encode again" in message
    data = config(broken.parent, cache=cache, workers=2, prefetch=2)
    message = error_of(batches, data, 4)  # from any thread; one epoch has 3.75 batches
    assert f"latents {path}, record " in message


def test_swapped_shards_are_named(broken):
    first, second = (records_of(broken / shard_name(i, 3)) for i in (0, 1))
    rewrite(broken, 0, second)
    rewrite(broken, 1, first)
    message = error_of(lambda: [open_latents(str(broken)).read(np.array([i])) for i in range(SIZE)])
    expected = "record 0: found record number 25, expected number 0 (a duplicate, or another order)"
    assert message.startswith(f"latents {broken}/{shard_name(0, 3)}, {expected}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_values_that_are_not_finite_are_found_in_every_dtype(tmp_path, dtype):
    info = dataclasses.replace(INFO, dtype=dtype)
    found = write_latents(str(tmp_path / "train"), info, examples(info, 5))
    table = np.zeros(4, info.layout)
    values = table["values"]
    values[1, 0, 0, 0, 0, 0], values[2, 1, 1, 3, 3, 1] = np.inf, np.nan
    assert latents._finite(values, dtype).tolist() == [True, False, False, True]
    assert latents._finite(found.read(np.arange(5))[0], dtype).all()


def test_flipped_bits_are_found_or_harmless(broken):
    path, rng = broken / shard_name(1, 3), np.random.default_rng(0)
    good, split = path.read_bytes(), open_latents(str(broken))
    expected, detected = split.read(np.arange(SIZE)), 0
    for trial in range(60):
        content = bytearray(good)
        place = int(rng.integers(12_000)) if trial % 2 else int(rng.integers(len(good)))
        content[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        try:
            values, cond = open_latents(str(broken)).read(np.arange(SIZE))
            np.testing.assert_array_equal(values, expected[0])
            np.testing.assert_array_equal(cond["label"], expected[1]["label"])
        except UsageError as error:
            assert str(path) in str(error)
            detected += 1
    assert detected >= 20


# ---- malformed records left out


@pytest.fixture
def spoiled(broken):
    """Records 29, 30 and 59, the last one, are malformed. The rule: 31, 31 and 0 stand in their places."""
    path = broken / shard_name(1, 3)
    records = records_of(path)
    rewrite(broken, 1, replaced(replaced(records, 4, records[4][:-1]), 5, with_value(records[5], np.nan)))
    records = records_of(broken / shard_name(2, 3))
    rewrite(broken, 2, replaced(records, 9, sealed(records[9], label=99)))
    return broken.parent


STANDS = np.array([{29: 31, 30: 31, 59: 0}.get(i, i) for i in range(SIZE)])


@pytest.mark.parametrize("cache", [True, False])
def test_malformed_records_are_replaced_and_counted(store, spoiled, cache):
    data = config(spoiled, skip_bad=3, cache=cache, flip=True)
    opened = source.open_source(data, "train")
    found = batches(data, 12, source=opened)
    bad = source.bad_records(opened)
    assert list(bad) == [29, 30, 59]
    for number, what in ((29, "found 271 bytes"), (30, "found NaN"), (59, "found label 99")):
        assert f"record {number}: {what}" in bad[number]
    good = open_latents(f"{store}/train")
    positions = np.arange(192)
    order = STANDS[np.concatenate([permuted(3, epoch, SIZE) for epoch in range(4)])[:192]]
    values, cond = good.read(order)
    mirror = counter.mirrored(3, positions)
    np.testing.assert_array_equal(found["image"], posterior.sample_posterior(INFO, values, positions, 3, mirror))
    np.testing.assert_array_equal(found["label"], cond["label"])


def test_replacing_is_independent_of_processes_threads_and_resuming(spoiled):
    data = config(spoiled, skip_bad=3)
    expected = batches(data, 12)
    threads = dataclasses.replace(data, workers=4, prefetch=8)
    parts = [batches(threads, 12, process_index=i, process_count=2)["label"].reshape(12, 8) for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts, 1).ravel(), expected["label"])
    assert_same(expected, batches(threads, 4, batch_size=48))
    assert_same({k: v[-48:] for k, v in expected.items()}, batches(threads, 3, start=9))


@pytest.mark.parametrize("cap", [1, 2])
@pytest.mark.parametrize("workers", [0, 4])
def test_too_many_malformed_records_are_an_error(spoiled, cap, workers):
    data = config(spoiled, skip_bad=cap, workers=workers, prefetch=2 * workers)
    message = error_of(batches, data, 4)
    expected = (
        f"data.skip_bad: found {cap + 1} malformed records, expected at most {cap}; the first: latents {spoiled}/train"
    )
    assert message.startswith(expected) and len(re.findall(r"record \d+: found", message)) == cap + 1


def test_nothing_but_malformed_records_is_an_error(broken):
    for shard in range(3):
        rewrite(broken, shard, [b"x"] * len(records_of(broken / shard_name(shard, 3))))
    message = error_of(batches, config(broken.parent, skip_bad=1000), 4)
    assert message.startswith(f"data.skip_bad: found all {SIZE} records malformed; the first: latents {broken}")


def test_a_missing_shard_is_not_skipped(broken):
    (broken / shard_name(1, 3)).unlink()
    assert "cannot read it: [Errno 2]" in error_of(batches, config(broken.parent, skip_bad=1000), 1)


# ---- writing


def bad_values(value):
    values = np.zeros(INFO.record_shape)
    values[1, 1, 3, 3, 1] = value
    return values


@pytest.mark.parametrize(
    "example, expected",
    [
        (
            (0, np.zeros((2, 2, 4, 4, 1))),
            "found an array float64 (2, 2, 4, 4, 1), expected floating point (2, 2, 4, 4, 2)",
        ),
        ((0, np.zeros(INFO.record_shape, np.int32)), "found an array int32 (2, 2, 4, 4, 2), expected floating point"),
        ((0, bad_values(np.nan)), "found values up to nan, expected finite ones that float16 can hold"),
        ((0, bad_values(70_000)), "found values up to 70000.0, expected finite ones that float16 can hold"),
        ((7, bad_values(0)), "found label 7, expected a whole number from 0 to 6"),
        ((-1, bad_values(0)), "found label -1, expected a whole number from 0 to 6"),
        ((1.5, bad_values(0)), "found label 1.5, expected a whole number from 0 to 6"),
    ],
)
def test_what_cannot_be_stored_is_named_and_nothing_is_left(tmp_path, example, expected):
    folder = str(tmp_path / "x")
    message = error_of(write_latents, folder, INFO, [*examples(INFO, 4), example])
    assert message.startswith(f"latents {folder}, record 4: {expected}")
    assert os.listdir(folder) == []


def test_a_failing_source_leaves_nothing(tmp_path):
    def failing(_):
        yield from examples(INFO, 4)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        latent_writer.write_latents(str(tmp_path), INFO, SIZE, failing)
    assert os.listdir(tmp_path) == []
    assert error_of(write_latents, str(tmp_path), INFO, []).endswith("found no records to write, expected at least one")
    assert len(write_latents(str(tmp_path), INFO, [(1, bad_values(ml_dtypes.bfloat16(3)))])) == 1


def test_complete_latents_foreign_files_and_other_writers_are_refused(store, tmp_path):
    before = sorted(os.listdir(f"{store}/train"))
    expected = f"latents {store}/train: found complete latents, expected none"
    assert error_of(write_latents, f"{store}/train", INFO, examples(INFO, 1)).startswith(expected)
    assert sorted(os.listdir(f"{store}/train")) == before
    (tmp_path / "thesis.tex").write_text("x")
    expected = f"latents {tmp_path}: found 'thesis.tex', expected an empty folder"
    assert error_of(write_latents, str(tmp_path), INFO, examples(INFO, 1)).startswith(expected)
    expected = f"latents {tmp_path}/thesis.tex: cannot make the folder: File exists"
    assert error_of(write_latents, f"{tmp_path}/thesis.tex", INFO, examples(INFO, 1)).startswith(expected)

    def nested(_):
        yield from examples(INFO, 2)
        message = error_of(write_latents, f"{tmp_path}/two", INFO, examples(INFO, 1))
        assert message == f"latents {tmp_path}/two: found another process writing there, expected none"

    assert len(latent_writer.write_latents(f"{tmp_path}/two", INFO, 2, nested)) == 2


WRITER = """
import json, os, resource, signal, sys
import numpy as np
from dit_jax.data.latent_writer import write_latents
from dit_jax.data.latent_notes import LatentInfo

fields = json.loads(sys.argv[3])
info = LatentInfo(**{**fields, "shape": tuple(fields["shape"]), "class_names": (), "left_out": ()})
def some(numbers):
    for i in numbers:
        if i == 30 and sys.argv[2] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        yield i % 7, np.zeros(info.record_shape, np.float32)
if sys.argv[2] == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    write_latents(sys.argv[1], info, 40, some, shard_bytes=10 * info.layout.itemsize)
except Exception as error:
    print(type(error).__name__, error)
"""


def run_writer(folder, how):
    """A writer in a process of its own, which is killed or finds the disk full."""
    command = [sys.executable, "-c", WRITER, folder, how, json.dumps(dataclasses.asdict(INFO))]
    return subprocess.run(command, capture_output=True, text=True, cwd=os.path.dirname(os.path.dirname(__file__)))


def test_a_killed_writer_leaves_no_latents(tmp_path):
    folder = str(tmp_path / "x")
    assert run_writer(folder, "kill").returncode == -signal.SIGKILL
    left = os.listdir(folder)
    assert left and "latents.json" not in left
    assert "found no such file, so the latents are not complete" in error_of(open_latents, folder)
    again = write_latents(folder, INFO, examples(INFO, 40))
    assert len(again) == 40 and sorted(os.listdir(folder)) == [*(shard_name(i, 4) for i in range(4)), "latents.json"]


TENS = 10 * INFO.layout.itemsize  # shard_bytes


def interrupted(folder, at):
    """A writer of SIZE records in shards of ten that fails at record `at`."""

    def some(numbers):
        yield from examples(INFO, at)[numbers[0] :]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        latent_writer.write_latents(str(folder), INFO, SIZE, some, shard_bytes=TENS)


def go_on(folder, info=INFO, **how):
    """Finish it. Returns the latents, and the shards that were asked for."""
    asked = []

    def rest(numbers):
        asked.extend(numbers.tolist())
        return [examples(INFO, SIZE)[i] for i in numbers]

    found = latent_writer.write_latents(str(folder), info, SIZE, rest, **{"shard_bytes": TENS, **how})
    assert asked == [i for first in asked[::10] for i in range(first, first + 10)]
    return found, [first // 10 for first in asked[::10]]


def spoil(path):
    """Another value in the last record of a shard that is whole otherwise."""
    records = ArrayRecordReader(str(path)).read(list(range(10)))
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for record in [*records[:9], records[9][:30] + bytes([records[9][30] ^ 1]) + records[9][31:]]:
        writer.write(record)
    writer.close()


LEFT = {  # what a kill or a disk makes of the three whole shards -> which of them are made again
    "as they were": (lambda folder: None, []),
    "killed in a shard": (lambda folder: (folder / "latents-00003.part").write_bytes(b"x"), []),
    "killed while naming them": (
        lambda folder: (folder / "latents-00000.whole").rename(folder / "latents-00000-of-00003.array_record"),
        [],
    ),
    "killed in the notes": (lambda folder: (folder / "latents.json.part").write_text("{"), []),
    "one is missing": (lambda folder: (folder / "latents-00001.whole").unlink(), [1]),
    "one is cut": (lambda folder: os.truncate(folder / "latents-00002.whole", 1000), [2]),
    "a shard twice": (
        lambda folder: shutil.copy(folder / "latents-00000.whole", folder / "latents-00001.whole"),
        [1],
    ),
    "a value is another": (lambda folder: spoil(folder / "latents-00001.whole"), [1]),
}


@pytest.mark.parametrize("name", LEFT)
def test_a_writer_goes_on_from_the_shards_that_are_whole(store, tmp_path, name):
    interrupted(tmp_path, 34)
    assert sorted(os.listdir(tmp_path)) == [*(f"latents-0000{i}.whole" for i in range(3)), "latents.job"]
    assert "found no such file, so the latents are not complete" in error_of(open_latents, str(tmp_path))
    damage, again = LEFT[name]
    damage(tmp_path)
    found, asked = go_on(tmp_path)
    assert asked == [*again, 3, 4, 5]
    whole = open_latents(f"{store}/train")
    assert (found.content, len(found), found.info) == (whole.content, SIZE, INFO)
    assert sorted(os.listdir(tmp_path)) == [*(shard_name(i, 6) for i in range(6)), "latents.json"]
    open_latents(str(tmp_path), verify=True)


BAD = (0, 4, 10, 11, 29, 30, 33, 59)


def test_malformed_records_are_left_out_and_the_others_keep_number_and_label(tmp_path, store):
    """Also if the writer is killed on the way: gaps in the shards, at their ends and after the last are noted."""
    kept = [i for i in range(SIZE) if i not in BAD]
    given = [None if i in BAD else example for i, example in enumerate(examples(INFO, SIZE))]

    def cut(numbers):
        yield from given[:45]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        latent_writer.write_latents(str(tmp_path / "cut"), INFO, SIZE, cut, shard_bytes=TENS)
    for folder in ("cut", "whole"):
        found = latent_writer.write_latents(
            str(tmp_path / folder), INFO, SIZE, lambda numbers: given[numbers[0] :], shard_bytes=TENS
        )
        assert found.info == dataclasses.replace(INFO, left_out=BAD) and len(found) == len(kept)
        values, cond = open_latents(str(tmp_path / folder), verify=True).read(np.arange(len(kept)))
        expected, labels = open_latents(f"{store}/train").read(np.array(kept))
        np.testing.assert_array_equal(values, expected)
        np.testing.assert_array_equal(cond["label"], labels["label"])
        np.testing.assert_array_equal(found.numbers, kept)
    notes = tmp_path / "whole" / "latents.json"
    said = json.loads(notes.read_text())
    for wrong in ([4, 0], [0, 0], [-1], [60, 61, 62, 63, 64, 65, 66, 99], ["0"]):
        said["left_out"] = wrong
        notes.write_text(json.dumps({**said, "checksum": checksum(said)}))
        assert "left_out: found" in error_of(open_latents, str(tmp_path / "whole"))
    said["left_out"] = list(range(8))  # others than those that are missing
    notes.write_text(json.dumps({**said, "checksum": checksum(said)}))
    assert "found record number 1, expected number 8" in error_of(open_latents(str(notes.parent)).read, np.arange(3))


def malformed(bad):
    return lambda numbers: [None if i in bad else examples(INFO, SIZE)[i] for i in numbers]


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_a_shard_has_its_range_of_the_split_less_the_malformed(tmp_path):
    """Also if nothing is left of it: then it has no file."""
    bad = [0, 9, *range(20, 30), 59]
    found = latent_writer.write_latents(str(tmp_path), INFO, SIZE, malformed(bad), shard_bytes=TENS)
    assert [file["records"] for file in found.files] == [8, 10, 10, 10, 9]
    assert sorted(os.listdir(tmp_path)) == [*(shard_name(i, 5) for i in range(5)), "latents.json"]
    assert found.info.left_out == tuple(bad)
    (tmp_path / "latents.json").unlink()  # killed while it named them
    (tmp_path / "latents-00004-of-00005.array_record").rename(tmp_path / "latents-00005.whole")
    (tmp_path / "latents.job").write_text(json.dumps({**latent_writer._job(INFO), "shard_records": 10}))
    asked = []
    again = latent_writer.write_latents(
        str(tmp_path), INFO, SIZE, lambda numbers: asked.extend(numbers) or malformed(bad)(numbers), shard_bytes=99
    )
    assert asked == list(range(20, 30)) and again.files == found.files and again.info == found.info


def test_shards_of_older_versions_are_kept_only_if_nothing_was_left_out(store, tmp_path):
    """They had equal numbers of good records, whatever the numbers of those in the split, and named no size."""
    for bad in ((), (3,)):
        folder, given = tmp_path / str(bad), [(i, e) for i, e in enumerate(examples(INFO, SIZE)) if i not in bad]
        folder.mkdir()
        for number in range(3):
            writer = ArrayRecordWriter(str(folder / f"latents-0000{number}.whole"), "group_size:1,uncompressed")
            for i, example in given[10 * number : 10 * number + 10]:
                writer.write(latent_writer._encode("", INFO, i, *example))
            writer.close()
        (folder / "latents.job").write_text(json.dumps(latent_writer._job(INFO)))
        found, asked = go_on(folder)
        assert asked == ([0, 1, 2] if bad else []) + [3, 4, 5] and len(found) == SIZE
        assert found.content == open_latents(f"{store}/train").content


def test_shards_keep_the_size_that_they_began_with(tmp_path):
    interrupted(tmp_path / "cut", 34)
    found, asked = go_on(tmp_path / "cut", shard_bytes=7 * INFO.layout.itemsize)
    assert asked == [3, 4, 5] and [file["records"] for file in found.files] == [10] * 6
    damaged = json.dumps({**latent_writer._job(INFO), "shard_records": "10"})
    interrupted(tmp_path / "again", 34)
    (tmp_path / "again" / "latents.job").write_text(damaged)
    assert go_on(tmp_path / "again")[1] == [3, 4, 5]


class Threads:
    """Processes of one job, as threads of this one: what `devices.processes` does for those of several hosts."""

    def __init__(self, count):
        self.count, self.barrier, self.said = count, threading.Barrier(count), [None] * count

    def hosts(self, index):
        def gather(value):
            self.barrier.wait(30)
            self.said[index] = value
            self.barrier.wait(30)
            return list(self.said)

        def by_leader(work):
            return json.loads(json.dumps(gather(work() if index == 0 else None)[0]))

        @contextlib.contextmanager
        def agreed():
            error = None
            try:
                yield
            except UsageError as found:
                error = found
            for found in filter(None, gather(error)):
                raise UsageError(str(found))

        return Hosts(index, self.count, by_leader, agreed)

    def write(self, folder, examples_of, **how):
        def one(index):
            return latent_writer.write_latents(str(folder), INFO, SIZE, examples_of, hosts=self.hosts(index), **how)

        with concurrent.futures.ThreadPoolExecutor(self.count) as pool:
            return [run.exception() or run.result() for run in [pool.submit(one, i) for i in range(self.count)]]


@pytest.mark.parametrize("count", [2, 3, 8])
def test_any_number_of_hosts_writes_the_same_files(count, tmp_path):
    """Also if they go on after others, with gaps between the whole shards; and after an error of one, which all raise."""
    bad = [3, 10, 11, *range(20, 30), 59]
    latent_writer.write_latents(str(tmp_path / "one"), INFO, SIZE, malformed(bad), shard_bytes=TENS)
    some = Threads(count).write(tmp_path / "some", malformed(bad), shard_bytes=TENS)
    assert {found.content for found in some} == {open_latents(str(tmp_path / "one"), verify=True).content}
    assert contents(tmp_path / "some") == contents(tmp_path / "one")

    def failing(numbers):
        for i in numbers:
            if i == 15:
                raise UsageError("record 15")
            yield from malformed(bad)([i])

    errors = Threads(count).write(tmp_path / "cut", failing, shard_bytes=TENS)
    assert [str(error) for error in errors] == ["record 15"] * count
    left = sorted(os.listdir(tmp_path / "cut"))
    assert "latents-00000.whole" in left and "latents-00001.whole" not in left and "latents.json" not in left
    assert all(name.endswith((".whole", ".job")) for name in left)
    Threads(2).write(tmp_path / "cut", malformed(bad), shard_bytes=1)
    assert contents(tmp_path / "cut") == contents(tmp_path / "one")


def test_a_writer_does_not_go_on_with_another_job(tmp_path):
    interrupted(tmp_path, 34)
    before = sorted(os.listdir(tmp_path))
    message = error_of(go_on, tmp_path, dataclasses.replace(INFO, dtype="float32"))
    found = "dtype: found 'float16', this command has 'float32'"
    assert message.startswith(f"latents {tmp_path}: holds unfinished latents of another job: {found}")
    assert sorted(os.listdir(tmp_path)) == before
    for content in ("[]", "{", '{"dtype": "float16"}'):
        (tmp_path / "latents.job").write_text(content)
        assert "holds unfinished latents of another job: shape: found None" in error_of(go_on, tmp_path)
    interrupted(tmp_path / "other", 34)
    found, asked = go_on(tmp_path / "other", dataclasses.replace(INFO, scale=3.0, shift=1.0))  # notes only
    assert (asked, found.info.scale, len(found)) == ([3, 4, 5], 3.0, SIZE)


def test_scale_and_shift_may_be_settled_by_the_records(store, tmp_path):
    def settle(records):
        values, _ = records.read(np.arange(len(records)))
        return dataclasses.replace(records.info, shift=(float(values[:, 0, 0].max()), 0.0))

    interrupted(tmp_path, 34)
    found, _ = go_on(tmp_path, settle=settle)
    whole = open_latents(f"{store}/train")
    assert found.content == whole.content
    assert found.info.shift == (float(whole.read(np.arange(SIZE))[0][:, 0, 0].max()), 0.0)


def test_a_writer_that_fails_in_the_first_shard_leaves_nothing(tmp_path):
    interrupted(tmp_path, 7)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_a_job_error(tmp_path):
    done = run_writer(str(tmp_path), "full")
    assert done.stdout.startswith(f"JobError latents {tmp_path}: cannot write them: "), done
    assert "they are not complete, encode again" in done.stdout and os.listdir(tmp_path) == []
