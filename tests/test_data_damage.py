"""The data room: what is said when data cannot be read, and what may be left out."""

import dataclasses
import io
import os
import re
import shutil

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from digits import TEST, TRAIN, batches, built_in, copy_of, error_of
from PIL import Image

from dit_jax.config import DataConfig
from dit_jax.data import pipeline, source
from dit_jax.data.order import order as permuted
from dit_jax.data.source import open_source
from dit_jax.error import UsageError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return built_in(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def broken(data, tmp_path):
    return copy_of(data, tmp_path)


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
