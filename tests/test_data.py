"""The data room: what is stored, and in which order it comes."""

import dataclasses
import io
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from digits import TEST, TRAIN, assert_same, batches, built_in, copy_of, error_of
from PIL import Image
from sklearn.datasets import load_digits

from dit_jax.config import DataConfig
from dit_jax.data import pipeline, pixels
from dit_jax.data.order import order as permuted
from dit_jax.data.source import open_source


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return built_in(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def broken(data, tmp_path):
    return copy_of(data, tmp_path)


class Photos(tfds.core.GeneratorBasedBuilder):
    """Encoded images of several sizes and modes, as ImageNet has them."""

    VERSION = tfds.core.Version("1.0.0")
    MODES = ("RGB", "L", "CMYK", "RGB")

    def _info(self):
        image, label = tfds.features.Image(shape=(None, None, 3)), tfds.features.ClassLabel(num_classes=4)
        features = tfds.features.FeaturesDict({"image": image, "label": label, "file": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, mode in enumerate(self.MODES):
            file = io.BytesIO()
            Image.new("RGB", (40 + 30 * i, 64), (200, 200, 200)).convert(mode).save(file, "JPEG", quality=100)
            yield i, {"image": io.BytesIO(file.getvalue()), "label": i, "file": f"{i}.jpg"}


# ---- what is stored


def test_digits_are_those_of_scikit_learn(data):
    levels, labels = load_digits(return_X_y=True)
    held_out = np.zeros(len(labels), bool)
    for k in range(10):
        held_out[np.flatnonzero(labels == k)[4::5]] = True
    for split, rows in (("train", ~held_out), ("test", held_out)):
        opened = open_source(data, split)
        images, cond = opened.read(np.arange(len(opened)))
        stored = images.astype(np.int64)
        assert cond["label"].tolist() == labels[rows].tolist()
        np.testing.assert_array_equal((16 * stored + 127) // 255, levels[rows].reshape(-1, 8, 8, 1))
        np.testing.assert_array_equal(stored, np.rint(levels[rows].reshape(-1, 8, 8, 1) * 255 / 16))
    assert (np.sum(~held_out), np.sum(held_out)) == (TRAIN, TEST)


def test_held_out_images_are_not_in_train(data):
    train, test = (pipeline.load_arrays(data, split)[0] for split in ("train", "test"))
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}


def test_pixels_become_minus_one_to_one():
    floats = pixels.to_float(np.arange(256, dtype=np.uint8))
    assert floats.dtype == np.float32 and (floats[0], floats[255]) == (-1, 1)
    np.testing.assert_array_equal(floats, np.arange(256, dtype=np.float32) / np.float32(127.5) - np.float32(1))
    np.testing.assert_array_equal(np.rint((floats + 1) * 127.5), np.arange(256))


def test_describe_names_records_and_checksum(data, broken):
    found = open_source(data, "test").describe()
    assert {**found, "sha256": ""} == {
        "dataset": "digits",
        "split": "test",
        "records": TEST,
        "classes": 10,
        "image_shape": [8, 8, 1],
        "sha256": "",
    }
    config, _ = broken
    assert open_source(config, "test").describe() == found  # the folder does not matter, the split does
    for split in ("train", "test[:50%]"):
        assert open_source(data, split).describe()["sha256"] != found["sha256"]


@pytest.mark.slow
def test_two_processes_build_at_once_without_tensorflow(tmp_path, data):
    code = (
        "import json, sys\n"
        "import dit_jax.data.pipeline as p; from dit_jax.config import DataConfig\n"
        "import sklearn.datasets; print('ready', flush=True); sys.stdin.readline()\n"
        "data = DataConfig(data_dir=sys.argv[1])\n"
        "next(p.make_batches(data, batch_size=8, seed=0)); p.load_arrays(data, 'test')\n"
        "assert 'tensorflow' not in sys.modules\n"
        "opened = p.open_source(data, 'train'); print(json.dumps([opened.describe(), opened.identity]))"
    )
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command = [sys.executable, "-c", code, str(tmp_path)]
    children = [subprocess.Popen(command, **pipes) for _ in range(2)]
    assert [child.stdout.readline() for child in children] == ["ready\n"] * 2
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    outputs = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    opened = open_source(data, "train")
    here = [opened.describe(), opened.identity]
    assert [json.loads(out) for out, _ in outputs] == [here, here]
    assert os.listdir(tmp_path / "digits") == ["1.0.0"]


# ---- which data they are


def test_two_builds_of_the_digits_are_the_same_source(data, tmp_path):
    other = open_source(dataclasses.replace(data, data_dir=str(tmp_path)), "train")
    assert other.identity == open_source(data, "train").identity
    assert other.identity | {"sha256": ""} == {"name": "digits/1.0.0", "split": "train", "records": TRAIN, "sha256": ""}


def test_another_split_or_part_is_another_source(data):
    splits = ("train", "test", "train[:355]", "train[1:356]")
    assert len({open_source(data, split).identity["sha256"] for split in splits}) == len(splits)


def test_a_position_is_not_continued_on_other_records(data):
    """The number of records, and what the index says of them; an older position kept no identity."""
    before = pipeline.make_batches(data, batch_size=48, seed=0)
    identity = before.source.identity
    for name, value in (("records", 723), ("sha256", "0" * 64)):
        other = dataclasses.replace(before.source, identity=identity | {name: value})
        after = pipeline.make_batches(data, batch_size=48, seed=0, source=other)
        message = error_of(after.set_state, before.get_state())
        expected = f"found {value!r}, expected {identity[name]!r}, as in the data that this run has been trained on; "
        assert message.startswith(f"data.dataset: {name}: {expected}")
        after.set_state({"next_index": 7})


def test_the_checksum_is_computed_once(data):
    opened = open_source(data, "test")
    found = opened.describe()
    object.__setattr__(opened, "source", ())  # nothing is left to read
    assert opened.describe() | {"records": TEST} == found


# ---- order


@pytest.mark.parametrize("processes", [2, 4])
def test_order_is_independent_of_the_process_count(data, processes):
    alone = batches(data, 40)
    parts = [batches(data, 40, process_index=i, process_count=processes) for i in range(processes)]
    joined = [jax.tree.map(lambda *some: np.concatenate(some), *rows) for rows in zip(*parts, strict=True)]
    assert_same(alone, joined)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("workers, prefetch", [(0, 0), (1, 3), (4, 16)])
def test_order_is_independent_of_cache_threads_and_prefetch(data, monkeypatch, cache, workers, prefetch):
    expected = batches(data, 33)
    monkeypatch.setattr(pipeline, "SMALL", 0)
    assert_same(expected, batches(dataclasses.replace(data, cache=cache, workers=workers, prefetch=prefetch), 33))


@pytest.mark.parametrize("small", [0, pipeline.SMALL])
def test_restored_position_continues_exactly(data, monkeypatch, small):
    expected = batches(data, 100)
    monkeypatch.setattr(pipeline, "SMALL", small)
    for start in np.random.default_rng(0).integers(0, 90, 5).tolist():
        first = pipeline.make_batches(data, batch_size=48, seed=3)
        for _ in range(start):
            next(first)
        state = json.loads(json.dumps(first.get_state()))
        assert state == {"next_index": start, "source": open_source(data, "train").identity}
        other = dataclasses.replace(data, workers=3, prefetch=1)
        second = pipeline.make_batches(other, batch_size=48, seed=3)
        next(second)
        second.set_state(state)
        assert_same(expected[start : start + 5], [next(second) for _ in range(5)])
        assert_same(expected[start : start + 5], [next(first) for _ in range(5)])  # asking does not disturb


def test_every_epoch_is_another_permutation(data):
    orders = [permuted(5, epoch, TRAIN) for epoch in range(3)] + [permuted(6, 0, TRAIN)]
    for a in orders:
        assert sorted(a) == list(range(TRAIN))
    for i, a in enumerate(orders):
        assert all(np.mean(a == b) < 0.01 for b in orders[:i])
    images, cond = pipeline.load_arrays(data, "train")
    plain = dataclasses.replace(data, flip=False)
    seen = batches(plain, 31, batch_size=100, seed=5)  # 3,100 examples: two epochs, with borders inside batches
    expected = np.concatenate(orders[:3])[:3100]
    np.testing.assert_array_equal(np.concatenate([b["image"] for b in seen]), images[expected])
    np.testing.assert_array_equal(np.concatenate([b["cond"]["label"] for b in seen]), cond["label"][expected])


def test_order_is_pinned():
    assert permuted(0, 0, 10).tolist() == [2, 9, 5, 7, 8, 4, 6, 0, 1, 3]
    assert permuted(2**31 - 1, 7, 10).tolist() == [3, 2, 1, 0, 9, 4, 6, 5, 8, 7]


def test_a_batch_may_span_several_epochs(data):
    small = dataclasses.replace(data, split="test[:10]", flip=False)
    labels = batches(small, 2, batch_size=32, seed=1)
    order = np.concatenate([permuted(1, epoch, 10) for epoch in range(7)])
    images = pipeline.load_arrays(small, "test[:10]")[0]
    np.testing.assert_array_equal(np.concatenate([b["image"] for b in labels]), images[order[:64]])


def test_flip_depends_on_seed_and_position_only(data):
    plain = dataclasses.replace(data, flip=False)
    kept, mirrored = batches(plain, 60), batches(data, 60)
    kept, mirrored = (np.concatenate([b["image"] for b in some]) for some in (kept, mirrored))
    flipped = np.any(kept != mirrored, axis=(1, 2, 3))
    np.testing.assert_array_equal(mirrored[flipped], kept[flipped][:, :, ::-1])
    assert 0.45 < flipped.mean() < 0.55
    other = np.concatenate([b["image"] for b in batches(data, 90, batch_size=32)])
    np.testing.assert_array_equal(other, mirrored)
    marks = np.arange(2.0).reshape(1, 1, 2, 1).repeat(500, 0)
    first, second = (pixels.flip(marks, np.arange(500), seed)[:, 0, 0, 0] for seed in (3, 4))
    assert 0.4 < np.mean(first == second) < 0.6  # another seed, other flips
    np.testing.assert_array_equal(pixels.flip(marks[:10], np.arange(490, 500), 3)[:, 0, 0, 0], first[490:])


# ---- sizes


def test_resize_is_adms_centre_crop():
    grey = np.random.default_rng(0).integers(0, 256, (8, 8, 1), np.uint8)
    assert pixels.resize(grey, 8) is grey
    blocks = grey.repeat(4, 0).repeat(4, 1)
    np.testing.assert_array_equal(pixels.resize(blocks, 8), grey)  # two halvings, each an exact mean
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, 16:48] = 255
    np.testing.assert_array_equal(pixels.resize(wide, 32), np.full((32, 32, 3), 255))  # the middle, whole
    assert pixels.resize(np.zeros((47, 31, 3), np.uint8), 16).shape == (16, 16, 3)
    assert pixels.resize(grey, 32).shape == (32, 32, 1)


def test_batches_have_the_size_asked_for(data):
    batch = batches(dataclasses.replace(data, image_size=4), 1)[0]
    assert batch["image"].shape == (48, 4, 4, 1) and batch["image"].dtype == np.float32
    assert batch["cond"]["label"].shape == (48,) and batch["cond"]["label"].dtype == np.int32


def test_encoded_images_of_any_mode_become_rgb(tmp_path):
    Photos(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    for cache in (True, False):
        config = DataConfig(dataset="photos", data_dir=str(tmp_path), image_size=16, cache=cache)
        batch = batches(config, 1, batch_size=4)[0]
        assert batch["image"].shape == (4, 16, 16, 3) and sorted(batch["cond"]["label"]) == [0, 1, 2, 3]
        np.testing.assert_allclose(batch["image"], 200 / 127.5 - 1, atol=0.05)
