"""Folders of pictures: what makes a class, a split and a picture, and what is said of anything else."""

import dataclasses
import errno
import hashlib
import io
import os
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from photos import CLASSES, batches, config, refused, small, written
from PIL import Image

from dit_jax.data import folder
from dit_jax.data.source import bad_records, introduce, open_source


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_without_folders_of_splits_a_tenth_is_drawn_by_name(tmp_path):
    data = written(tmp_path, {f"{i:04d}.png": small(colour=(i % 256, i // 256, 0)) for i in range(400)})
    train, test = (open_source(data, split) for split in ("train", "test"))
    assert train.classes == 0 and len(train) + len(test) == 400 and 25 <= len(test) <= 55
    assert not train.overlaps(test) and train.overlaps(train)
    names = set(map(train.name_of, range(len(train))))
    written(tmp_path, {"more.png": small()})
    again = open_source(data, "train")
    assert set(map(again.name_of, range(len(again)))) >= names
    (image,), cond = test.read(np.array([0]))
    assert image.shape == (8, 8, 3) and cond == {}
    two = written(tmp_path / "two", {"a.png": small(), "b.png": small(colour=9)})
    assert [len(open_source(two, split)) for split in ("train", "test")] == [1, 1]


def test_any_mode_gives_its_colours_in_rgb(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    tall = Image.fromarray(np.repeat(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8), 2, axis=0))
    out = io.BytesIO()
    tall.save(out, "PNG", exif=exif)
    sixteen = io.BytesIO()
    Image.fromarray(np.full((2, 2), 0x8080, np.uint16)).save(sixteen, "PNG")
    files = {
        "a.png": small(mode="RGBA", colour=(9, 9, 9, 0)), "b.PNG": small(mode="L", colour=7), "c.png": sixteen.getvalue(),
        "d.jpeg": small(mode="CMYK", colour=(0, 0, 0, 0), form="JPEG"), "e.gif": small(mode="P", form="GIF"), "f.png": out.getvalue(),
    }  # fmt: skip
    data = written(tmp_path, files | {".hidden.png": b"x", ".thumbs/a.png": b"x", "notes.txt": b"x"})
    data = dataclasses.replace(data, image_size=2)
    one = open_source(data, "train")
    assert list(one.source.listing.names) == sorted(files)
    all_of = dataclasses.replace(one, source=dataclasses.replace(one.source, numbers=np.arange(6)))
    images, _ = all_of.read(np.arange(6))
    assert [images[i, 0, 0].tolist() for i in range(6)] == [
        [255] * 3,
        [7] * 3,
        [128] * 3,
        [255] * 3,
        [0] * 3,
        [255, 0, 0],
    ]
    assert images[5, 1, 1].tolist() == [0, 0, 255]


OUT = "found a picture outside the class folders"
WRONG = {  # -> files, what is said of them
    "nothing": ({}, "found no folder '"),
    "no pictures": ({"a.txt"}, "found 0 pictures in '"),
    "one picture": ({"a.png"}, "found 1 pictures in '"),
    "a stray picture": (
        {"cat/a.png", "dog/b.png", "c.png"},
        f"/c.png: {OUT} (cat, dog), expected all in them, or none",
    ),
    "an empty class": ({"cat/a.png", "cat/b.png", "dog/b.txt"}, "class dog: found no pictures in '"),
    "a class held out only": ({"train/cat/a.png", "test/dog/a.png"}, f"/test/dog/a.png: {OUT} (cat), expected"),
    "no training": ({"cat/a.png", "test/cat/a.png"}, "data.split: found 'test' but no 'train' in '"),
    "one split": ({"train/cat/a.png", "val/cat/b.png"}, "data.held_out_split: found 'train' but no 'test' in '"),
}


@pytest.mark.parametrize("case", WRONG)
def test_folders_that_do_not_fit_are_refused(tmp_path, case):
    names, expected = WRONG[case]
    files = {name: small() for name in names}
    assert expected in refused(open_source, written(tmp_path / "photos", files), "train")


def test_a_class_of_which_all_is_held_out_is_refused(tmp_path):
    drawn = next(n for n in (f"dog/{i}.png" for i in range(999)) if hashlib.sha256(n.encode()).digest()[0] < 25)
    data = written(tmp_path, {f"cat/{i}.png": small() for i in range(30)} | {drawn: small()})
    message = refused(open_source, data, "train")
    assert "data.folder: class 1 (dog): found no pictures in" in message and "to train on (split 'train')" in message


def test_a_split_that_is_no_plain_name_is_refused(tmp_path):
    data = written(tmp_path, {"a.png": small(), "b.png": small()})
    part = dataclasses.replace(data, split="train[:90%]")
    assert "data.split: found 'train[:90%]', expected for data.folder a plain name" in refused(
        open_source, part, "test"
    )


def test_corrupt_files_are_named_or_skipped_with_a_count(tmp_path):
    bad = {"cat/05.jpg": b"text", "cat/06.png": small()[:40], "cat/07.png": b""}
    files = {f"cat/{i:02d}.png": small(colour=(i, 0, 0)) for i in range(12) if i not in (5, 6, 7)}
    data = dataclasses.replace(written(tmp_path, files | bad), cache=False, held_out_split="other")
    message = refused(batches, data, 3)
    assert any(f"{tmp_path}/{name}: " in message for name in bad), message
    source = open_source(dataclasses.replace(data, skip_bad=3), "train")
    found, _ = batches(dataclasses.replace(data, skip_bad=3), 3, source=source)
    assert len(found) == 3 and set(bad_records(source)) <= {5, 6, 7} and len(bad_records(source)) >= 2
    assert "found an empty file" in refused(source.source.listing.fetch, [7])
    os.unlink(tmp_path / "cat/00.png")
    assert re.search(
        r"cat/00.png: cannot read it, .*: \[Errno 2\] No such file", refused(source.source.listing.fetch, [0])
    )
    written(tmp_path, {"cat/01.png": small((9, 9))})
    assert "found another size than the" in refused(source.source.listing.fetch, [1])


def test_pictures_of_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    data = written(tmp_path, {"a.png": small((30, 30)), "b.png": small((30, 30))})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 800)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert "channels): Image size (900 pixels) exceeds limit of 800" in refused(batches, data, 1)


def test_a_strip_that_would_be_scaled_beyond_that_is_refused(tmp_path, monkeypatch):
    data = written(tmp_path, {"a.png": small((1, 500)), "b.png": small((1, 500))})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 800)
    assert "found 1 x 500 pixels, expected sides less unequal" in refused(batches, data, 1)


def test_a_picture_of_another_form_than_its_name_says_starts_no_program(tmp_path, monkeypatch):
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n%%EOF\n"
    data = written(tmp_path, {"a.png": eps, "b.png": eps})
    monkeypatch.setattr("subprocess.Popen", lambda *_, **how: pytest.fail("started"))
    assert re.search(r"/[ab]\.png: cannot decode .*: cannot identify image file", refused(batches, data, 1))


ODD = {
    "._x.tar": "file",
    "x.tar": "folder",
    "x.parquet": "folder",
    "cat/.#notes": "link",
    ".a/b.png": "link",
    "cat/c.txt": "link",
}


@pytest.mark.parametrize("name", ODD)
def test_hidden_files_folders_and_dead_links_beside_pictures_are_passed_over(tmp_path, name):
    data = written(tmp_path, {f"{c}/{i}.png": small() for c in CLASSES for i in range(20)})
    os.makedirs(os.path.dirname(tmp_path / name), exist_ok=True)
    {"file": lambda p: p.touch(), "folder": lambda p: p.mkdir(), "link": lambda p: p.symlink_to("nowhere")}[ODD[name]](
        tmp_path / name
    )
    if ODD[name] == "folder":
        assert f"class {name}: found no pictures" in refused(open_source, data, "train")
    else:
        assert open_source(data, "train").classes == 2
    os.renames(tmp_path / name, tmp_path / "only" / name)
    assert "found 0 pictures in" in refused(open_source, config(tmp_path / "only"), "train")


def test_a_dead_link_of_a_picture_is_named(tmp_path):
    data = written(tmp_path, {f"{i}.png": small() for i in range(20)})
    (tmp_path / "x.png").symlink_to("nowhere")
    assert f"{tmp_path}/x.png: found a link that leads nowhere" in refused(open_source, data, "train")


def test_a_split_without_a_picture_is_refused(tmp_path):
    data = written(tmp_path / "flat", {"26.jpg": small(), "34.jpg": small()})  # both below a tenth
    assert [len(open_source(data, split)) for split in ("train", "test")] == [1, 1]
    (tmp_path / "shards").mkdir()
    for split, image in (("train", [small(), small()]), ("test", [])):
        pq.write_table(pa.table({"image": pa.array(image, pa.binary())}), tmp_path / "shards" / f"{split}.parquet")
    data = config(tmp_path / "shards")
    assert len(open_source(data, "train")) == 2
    assert "data.folder: found no pictures of split 'test' in" in refused(open_source, data, "test")


@pytest.mark.parametrize("change", ["added", "gone", "another"])
def test_a_folder_that_changed_since_the_run_began_is_refused(tmp_path, change):
    data = written(tmp_path, {f"{c}/{i}.png": small(colour=(i, 0, 0)) for c in CLASSES for i in range(20)})
    _, state = batches(data, 1)
    batches(data, 1, start=state)
    source = open_source(data, "train")
    path = source.name_of(-1).removeprefix(f"{tmp_path}/")
    if change == "gone":
        os.unlink(tmp_path / path)
    else:
        written(tmp_path, {"dog/new.png" if change == "added" else path: small((9, 9))})
    assert re.match(
        r"data\.folder: dog/: found '\d+ pictures, .*', expected '\d+ pict", refused(batches, data, 1, start=state)
    )


SPLITS = {
    "training_set and test_set": {
        f"{s}_set/{c}/{i}.png" for s in ("training", "test") for c in CLASSES for i in range(9)
    },
    "Train and Test": {f"{s}/{i}.png" for s in ("Train", "Test") for i in range(9)},
    "parts": {f"{s}/{c}/{i}.png" for s in ("one", "two") for c in CLASSES for i in range(9)},
}


@pytest.mark.parametrize("case", SPLITS)
def test_splits_are_not_taken_for_classes(tmp_path, case):
    data = written(tmp_path, dict.fromkeys(SPLITS[case], small()))
    first, *_, last = sorted({name.partition("/")[0] for name in SPLITS[case]})
    why = "hold the folders cat, dog" if case == "parts" else "are named like splits"
    message = refused(open_source, data, "train")
    assert f"data.folder: found classes {first}, {last} in" in message and why in message
    assert "name two in data.split and data.held_out_split" in message
    data = dataclasses.replace(data, split=last, held_out_split=first)
    assert len(open_source(data, last)) == len(SPLITS[case]) // 2


def test_names_of_classes_and_pictures_outside_of_splits_are_told(tmp_path, caplog):
    names = {f"{s}/{c}/{i}.png" for s in ("train", "test") for c in ("tram", "train", "trial") for i in range(3)}
    data = written(tmp_path, dict.fromkeys(names | {"val/cat/0.png", "extra.png"}, small()))
    introduce(open_source(data, "train"))
    assert "9 images 8 x 8 x 3, 3 classes (train, tram, trial), from" in caplog.text
    assert "2 pictures outside 'train' and 'test' are left out" in caplog.text


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EMFILE])
def test_what_a_machine_refuses_is_no_malformed_picture(tmp_path, number, monkeypatch):
    data = written(tmp_path, {f"{i}.png": small() for i in range(20)})
    source = open_source(dataclasses.replace(data, skip_bad=9), "train")

    def fails(*_):
        raise OSError(number, "refused")

    monkeypatch.setattr(folder, "read", fails)
    with pytest.raises(OSError, match="refused"):
        source.read(np.array([0]))
