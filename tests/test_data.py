"""The data room: what is stored, in which order it comes, and what is said when it cannot be read."""

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from dit_jax.config import DataConfig
from dit_jax.data import pipeline, pixels, source
from dit_jax.data.order import order as permuted
from dit_jax.data.source import open_source
from dit_jax.error import UsageError

TRAIN, TEST = 1442, 355


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A config whose digits are built, with flips."""
    config = DataConfig(data_dir=str(tmp_path_factory.mktemp("tfds")), flip=True)
    open_source(config, "train")
    return config


@pytest.fixture
def broken(data, tmp_path):
    """A copy of the data to damage: (config, path of the train file)."""
    shutil.copytree(data.data_dir, tmp_path / "tfds")
    config = dataclasses.replace(data, data_dir=str(tmp_path / "tfds"))
    return config, tmp_path / "tfds/digits/1.0.0/digits-train.array_record-00000-of-00001"


def batches(data, count, batch_size=48, seed=3, **kwargs):
    iterator = pipeline.make_batches(data, batch_size=batch_size, seed=seed, **kwargs)
    taken = [next(iterator) for _ in range(count)]
    iterator.close()
    return taken


def assert_same(a, b):
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        jax.tree.map(np.testing.assert_array_equal, left, right)


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


# ---- one line where it cannot be done


def error_of(function, *args, **kwargs):
    with pytest.raises(UsageError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_unknown_split_lists_the_splits(data):
    message = error_of(open_source, data, "validation")
    assert message == "dataset 'digits': found split 'validation', expected one of train, test"


def test_missing_dataset_says_how_to_prepare_it(tmp_path):
    where = f"{tmp_path}/fashion_mnist/3.0.1"
    call = f"tfds.builder('fashion_mnist', data_dir='{tmp_path}', file_format='array_record').download_and_prepare()"
    how = "where TensorFlow is installed (pip install tensorflow-cpu; reading needs none)"
    message = error_of(open_source, DataConfig("fashion_mnist", data_dir=str(tmp_path)), "train")
    assert message == f"dataset 'fashion_mnist': found nothing in {where}; prepare it {how}, by {call}"
    message = error_of(open_source, DataConfig("no_such_images", data_dir=str(tmp_path)), "train")
    expected = f"which is neither known to TFDS nor prepared in {tmp_path}"
    assert message == f"data.dataset: found 'no_such_images', {expected}"
    assert not os.listdir(tmp_path)


def test_digits_are_not_built_among_a_users_files(tmp_path):
    for name in ("flat/photo.jpg", "classes/cat/photo.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    for name in ("flat", "classes"):
        before = os.listdir(tmp_path / name)
        message = error_of(open_source, DataConfig(data_dir=str(tmp_path / name)), "train")
        assert message.startswith(
            f"data.data_dir: found '{tmp_path / name}', which holds other files and no data of TFDS, expected"
        )
        assert os.listdir(tmp_path / name) == before
    (tmp_path / "flat" / "mnist" / "3.0.1").mkdir(parents=True)
    (tmp_path / "flat" / "mnist" / "3.0.1" / "dataset_info.json").touch()
    assert len(open_source(DataConfig(data_dir=str(tmp_path / "flat")), "train")) == 1442


def test_the_first_line_says_which_digits_and_from_where(data, capsys):
    source.introduce(open_source(data, "test"))
    assert capsys.readouterr().err == (
        f"data: digits/1.0.0, test: 355 images 8 x 8 x 1, 10 classes, from {data.data_dir}/digits/1.0.0\n"
    )


def test_other_file_format_is_refused(broken):
    config, path = broken
    shutil.move(path.parents[1], path.parents[2] / "photos")
    info = path.parents[2] / "photos/1.0.0/dataset_info.json"
    text = info.read_text().replace('"array_record"', '"tfrecord"').replace('"digits"', '"photos"')
    info.write_text(text)
    message = error_of(open_source, dataclasses.replace(config, dataset="photos"), "train")
    assert message.startswith(f"dataset 'photos' in {info.parent}: found format tfrecord, expected array_record; ")


def test_unusable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    message = error_of(open_source, DataConfig(data_dir=f"{tmp_path}/file"), "train")
    assert message.startswith(f"dataset 'digits': cannot build it in {tmp_path}/file: [Errno 20] Not a directory")


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
@pytest.mark.parametrize("cache", [True, False])
def test_damaged_file_is_named(broken, damage, cache):
    config, path = broken
    content = bytearray(path.read_bytes())
    content[60_000] ^= 255
    path.write_bytes({"flip": content, "cut": content[:100_000]}.get(damage, b""))
    if damage == "gone":
        path.unlink()

    def read():
        batches(dataclasses.replace(config, cache=cache), 40)

    why = {"flip": "Corrupted", "cut": "Corrupted", "empty": "ArrayRecord file should be", "gone": "open.. failed"}
    place = r"dataset 'digits', split 'train'" + (r", record \d+" if damage == "flip" else "")
    where, advice = place + re.escape(f": cannot read {path}: "), f"; delete {path.parent} and"
    assert re.fullmatch(where + why[damage] + ".*" + re.escape(advice) + ".*", error_of(read))


def test_damaged_notes_are_refused(broken):
    config, path = broken
    (path.parent / "dataset_info.json").write_text("{")
    message = error_of(open_source, config, "train")
    assert message.startswith(f"dataset 'digits': cannot open it in {config.data_dir}: Failed to load JSON")


def test_wrong_records_are_named(data):
    path = f"{data.data_dir}/digits/1.0.0/digits-train.array_record-00000-of-00001"
    opened = open_source(data, "train")
    narrow = dataclasses.replace(opened, classes=3)
    labels = opened.read(np.arange(TRAIN))[1]["label"]
    first = np.flatnonzero(labels >= 3)[0]
    message = error_of(narrow.read, np.arange(TRAIN))
    expected = f"found label {labels[first]}, expected 0 to 2"
    assert message == f"dataset 'digits', split 'train', record {first} of {path}: {expected}"
    message = error_of(dataclasses.replace(opened, stored_shape=(None, 8, 3)).read, np.array([7]))
    expected = "found an image uint8 (8, 8, 1), expected uint8 (None, 8, 3)"
    assert message == f"dataset 'digits', split 'train', record 7 of {path}: {expected}"


class Grids(tfds.core.GeneratorBasedBuilder):
    """Twelve images of one size; tests change the attributes between writing and reading, as another builder would."""

    VERSION = tfds.core.Version("1.0.0")
    SHAPE, DTYPE, CLASSES, ENCODED = (4, 4, 1), np.uint8, 5, False  # CLASSES = 0: no labels

    def _info(self):
        features = {"image": self._image()}
        if self.CLASSES:
            features["label"] = tfds.features.ClassLabel(num_classes=self.CLASSES)
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _image(self):
        if self.ENCODED:
            return tfds.features.Image(shape=(None, None, 3))
        return tfds.features.Tensor(shape=self.SHAPE, dtype=self.DTYPE, encoding=tfds.features.Encoding.BYTES)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(12):
            labels = {"label": 4 if i == 7 else i % min(4, self.CLASSES)} if self.CLASSES else {}
            yield i, {"image": self.image(i), **labels}

    def image(self, i):
        return np.full(self.SHAPE, i, self.DTYPE)


def encoded_but(bad):
    """The encoded image number i, number 7 through `bad`."""

    def image(self, i):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (10 * i, 0, 0)).save(file, "PNG")
        return io.BytesIO(bad(file.getvalue()) if i == 7 else file.getvalue())

    return image


# name -> (attributes when written, attributes when read, message after the file's name)
WRITTEN = {
    "label too large": ({}, dict(CLASSES=4), "found label 4, expected 0 to 3"),
    "another dtype": (
        dict(DTYPE=np.int16),
        dict(DTYPE=np.int16),
        "found an image int16 (4, 4, 1), expected uint8 (4, 4, 1)",
    ),
    "another shape": ({}, dict(SHAPE=(8, 8, 1)), "cannot reshape array of size 16"),
    "a wider dtype": ({}, dict(DTYPE=np.int64), "cannot reshape array"),
    "not an image": (
        dict(ENCODED=True, image=encoded_but(lambda b: b"text")),
        dict(ENCODED=True),
        "cannot decode the image",
    ),
    "half an image": (
        dict(ENCODED=True, image=encoded_but(lambda b: b[: len(b) // 2])),
        dict(ENCODED=True),
        "cannot decode the image",
    ),
    "no bytes": (dict(ENCODED=True, image=encoded_but(lambda b: b"")), dict(ENCODED=True), "cannot decode the image"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", WRITTEN)
def test_malformed_images_are_named(tmp_path, monkeypatch, name, cache):
    written, read, expected = WRITTEN[name]
    for attribute, value in written.items():
        monkeypatch.setattr(Grids, attribute, value)
    Grids(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    for attribute, value in read.items():
        monkeypatch.setattr(Grids, attribute, value)
    config = DataConfig(dataset="grids", data_dir=str(tmp_path), image_size=4, cache=cache)
    message = error_of(lambda: batches(config, 2, batch_size=12))
    path = f"{tmp_path}/grids/1.0.0/grids-train.array_record-00000-of-00001"
    assert path in message and expected in message
    number = re.search(r"dataset 'grids', split 'train', record (\d+)", message)
    assert number and (int(number[1]) == 7 or name in ("another dtype", "another shape", "a wider dtype"))


def test_images_without_labels_have_no_cond(tmp_path, monkeypatch):
    monkeypatch.setattr(Grids, "CLASSES", 0)
    Grids(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    config = DataConfig(dataset="grids", data_dir=str(tmp_path), image_size=4)
    opened = open_source(config, "train")
    assert (opened.classes, opened.image_shape, opened.describe()["classes"]) == (0, (4, 4, 1), 0)
    for cache in (True, False):
        (batch,) = batches(dataclasses.replace(config, cache=cache), 1, batch_size=12, seed=3)
        np.testing.assert_array_equal(np.rint((batch["image"][:, 0, 0, 0] + 1) * 127.5), permuted(3, 0, 12))
        assert batch["cond"] == {}
    images, cond = pipeline.load_arrays(config, "train", opened)
    assert images.shape == (12, 4, 4, 1) and cond == {}


@pytest.mark.timeout(60)
def test_malformed_images_may_be_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(Grids, "ENCODED", True)
    monkeypatch.setattr(Grids, "image", encoded_but(lambda b: b"text"))
    Grids(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    config = DataConfig(dataset="grids", data_dir=str(tmp_path), image_size=32, skip_bad=1)
    order = np.concatenate([permuted(3, epoch, 12) for epoch in range(8)])
    order[order == 7] = 8
    for cache, workers in ((True, 0), (False, 0), (False, 3)):
        data = dataclasses.replace(config, cache=cache, workers=workers)
        opened = open_source(data, "train")
        found = np.concatenate([b["image"] for b in batches(data, 8, batch_size=12, source=opened)])
        np.testing.assert_array_equal(np.rint((found[:, 0, 0, 0] + 1) * 127.5), 10 * order)
        assert list(source.bad_records(opened)) == [7] and "cannot decode" in source.bad_records(opened)[7]


def test_a_damaged_digit_may_be_left_out(broken):
    config, path = broken
    content = bytearray(path.read_bytes())
    content[60_000] ^= 255
    path.write_bytes(content)
    config = dataclasses.replace(config, cache=False, flip=False, skip_bad=2)
    opened = open_source(config, "train")
    images, cond = pipeline.load_arrays(config, "train", opened)
    (bad,) = source.bad_records(opened)
    assert f"record {bad}: cannot read {path}: Corrupted" in source.bad_records(opened)[bad]
    np.testing.assert_array_equal(images[bad], images[bad + 1])
    expected = np.concatenate([permuted(3, epoch, TRAIN) for epoch in range(2)])[: 48 * 40]
    found = batches(config, 40)
    np.testing.assert_array_equal(np.concatenate([b["image"] for b in found]), images[expected])
    np.testing.assert_array_equal(np.concatenate([b["cond"]["label"] for b in found]), cond["label"][expected])


def test_files_of_other_sizes_are_refused(broken):
    config, path = broken
    other = path.parent / "digits-test.array_record-00000-of-00001"
    shutil.copy(path, other)
    message = error_of(open_source, config, "test")
    assert message.startswith(
        f"dataset 'digits', split 'test': {other}: found {TRAIN} records, expected {TEST}; delete"
    )


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_refused(broken, make):
    config, path = broken
    path.unlink()
    make(path)
    message = error_of(open_source, config, "train")
    assert message.startswith(f"dataset 'digits', split 'train': cannot read {path}: found no regular file; delete")


@pytest.mark.parametrize("split", ["train[:0]", "test[355:]"])
def test_empty_splits_are_refused(data, split):
    message = error_of(open_source, data, split)
    assert message == f"dataset 'digits', split {split!r}: found no records, expected at least one"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("trials", [15, pytest.param(60, marks=pytest.mark.slow)])
def test_flipped_bits_are_found_or_harmless(data, broken, trials):
    """Riegeli hashes blocks and chunks: what a flipped bit leaves readable is what was written."""
    config, path = broken
    good, rng = path.read_bytes(), np.random.default_rng(0)
    expected = open_source(data, "train").read(np.arange(TRAIN))
    detected = 0
    for trial in range(trials):
        content = bytearray(good)
        place = (int(rng.integers(len(good))), int(rng.integers(200)), len(good) - 1 - int(rng.integers(1 << 16)))[
            trial % 3
        ]
        content[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        try:
            opened = open_source(config, "train")
            found = [opened.read(np.arange(i, min(i + 103, TRAIN))) for i in range(0, TRAIN, 103)]
        except UsageError as error:
            assert str(path) in str(error)
            detected += 1
        else:
            jax.tree.map(lambda a, *parts: np.testing.assert_array_equal(a, np.concatenate(parts)), expected, *found)
    assert detected >= trials // 3


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"1", b"\xff\xfe", b"[" * 100_000])
def test_no_damage_of_tfds_notes_passes(broken, content):
    config, path = broken
    (path.parent / "dataset_info.json").write_bytes(content)
    assert config.data_dir in error_of(open_source, config, "train")


def test_batch_that_processes_do_not_divide_is_refused(data):
    message = error_of(pipeline.make_batches, data, batch_size=30, seed=0, process_count=4)
    assert message == "train.batch_size: found 30, expected a multiple of the 4 processes"
