"""Latents on disk: what is stored comes back, noise depends on seed and position only, other latents are refused."""

import dataclasses
import json
import math
import os
import re
import shutil
import zlib

import numpy as np
import pytest
from latents import INFO, SIZE, TEST, assert_same, batches, config, error_of, examples, shard_name, write_store
from runs import write_latents
from scipy import stats

from dit_jax.data import counter, pipeline, pixels, posterior, source
from dit_jax.data.latent_notes import DTYPES
from dit_jax.data.latents import open_latents
from dit_jax.data.order import order as permuted

pytestmark = pytest.mark.timeout(60)  # nothing hangs, whatever is broken


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("latents"))


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
    raw = found.shards.read(np.array([31]))[0]
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
