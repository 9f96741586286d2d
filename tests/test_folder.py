"""Photo folders: the same pictures give the same batches however they lie, and what does not fit is named."""

import dataclasses
import errno
import functools
import hashlib
import io
import json
import os
import re
import tarfile

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from bucket import leading_here
from job import ROOT, TINY, run
from PIL import Image

from dit_jax import files
from dit_jax.config import Config, DataConfig, ModelConfig
from dit_jax.data import folder, parquet, pictures, pipeline, webdataset
from dit_jax.data.source import bad_records, class_names, introduce, open_source
from dit_jax.error import UsageError
from dit_jax.models import vae
from dit_jax.networks.folder import save_network
from dit_jax.sampling import label
from dit_jax.sweep import ladder

CLASSES = ("cat", "dog")
NETWORK = vae.VAEConfig(channels=3, widths=(8, 8), groups=4, blocks=1)


def picture(number):
    """An encoded picture of any size and form, by its number; the suffix of its file."""
    rng = np.random.default_rng(number)
    height, width = rng.integers(9, 40, 2)
    array = rng.integers(0, 256, (height, width, 3), np.uint8)
    image, out = Image.fromarray(array).convert(("RGB", "L", "RGBA", "P")[number % 4]), io.BytesIO()
    form = "JPEG" if number % 4 < 2 else "PNG"
    image.save(out, form)
    return out.getvalue(), "jpg" if form == "JPEG" else "png"


def rows(split):
    """(class, name of the file, bytes) of 30 pictures to train on, or of 10 others, in order of their paths."""
    numbers = range(30) if split == "train" else range(30, 40)
    found = [(CLASSES[i % 2], f"{i:03d}.{picture(i)[1]}", picture(i)[0]) for i in numbers]
    return sorted(found, key=lambda row: row[:2])


def as_folder(root):
    for split in ("train", "test"):
        for name, file, content in rows(split):
            os.makedirs(root / split / name, exist_ok=True)
            (root / split / name / file).write_bytes(content)


def tar(path, members):
    """Write a tar of (name, bytes)."""
    os.makedirs(path.parent, exist_ok=True)
    with tarfile.open(path, "w") as out:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))


def as_tars(root):
    for split in ("train", "test"):
        found = [(f"{name}/{file}", content, CLASSES.index(name)) for name, file, content in rows(split)]
        for i in range(2):
            some = found[i * 7 : (7, 999)[i]]
            members = [
                [(name, x), (f"{name[:-4]}.cls", str(label).encode()), (f"{name[:-4]}.json", b"{}")]
                for name, x, label in some
            ]
            tar(root / f"pets-{split}-{i}.tar", [m for three in members for m in three])


def as_parquet(root, nested=True, named=True):
    """As Hugging Face writes data sets: a struct of bytes and path, the names of the classes in the file's notes."""
    notes = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}}}
    os.makedirs(root / "data")
    for split in ("train", "test"):
        names, files, contents = zip(*rows(split), strict=True)
        images = (
            [{"bytes": x, "path": file} for x, file in zip(contents, files, strict=True)] if nested else list(contents)
        )
        table = pa.table({"image": images, "label": [CLASSES.index(name) for name in names]})
        table = table.replace_schema_metadata({"huggingface": json.dumps(notes)}) if named else table
        for i in range(2):
            some = table.slice(i * 7, (7, 999)[i])
            pq.write_table(some, root / "data" / f"{split}-0000{i}-of-00002.parquet", row_group_size=4)


class Pets(tfds.core.GeneratorBasedBuilder):
    """The same pictures as a TFDS dataset."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=CLASSES),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split):
        for i, (name, _, content) in enumerate(rows(split)):
            yield i, {"image": io.BytesIO(content), "label": name}


FORMS = {"folder": as_folder, "tars": as_tars, "parquet": as_parquet}
FORMS["bytes"] = functools.partial(as_parquet, nested=False, named=False)
NAMED = {"tars": (), "bytes": ()}  # forms that keep no names of classes


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    root = tmp_path_factory.mktemp("pets")
    Pets(data_dir=root / "tfds", file_format="array_record").download_and_prepare()
    for name, write in FORMS.items():
        (root / name).mkdir()
        write(root / name)
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def config(folder, **changes):
    return DataConfig(folder=str(folder), **{"image_size": 8, "flip": True} | changes)


def batches(data, count, start=None, batch_size=12, **how):
    iterator = pipeline.make_batches(data, batch_size=batch_size, seed=3, **how)
    if start is not None:
        iterator.set_state(start)
    found = [next(iterator) for _ in range(count)]
    state = iterator.get_state()
    iterator.close()
    return found, state


def refused(function, *args, **how):
    with pytest.raises(UsageError) as found:
        function(*args, **how)
    assert "\n" not in str(found.value)
    return str(found.value)


def small(size=(4, 4), mode="RGB", colour=0, form="PNG", **how):
    out = io.BytesIO()
    Image.new(mode, size, colour).save(out, form, **how)
    return out.getvalue()


def written(root, found):
    for name, content in found.items():
        os.makedirs(os.path.dirname(root / name), exist_ok=True)
        (root / name).write_bytes(content)
    return config(root)


@pytest.mark.parametrize("form", FORMS)
def test_every_door_gives_the_batches_of_tfds_bit_for_bit(pets, form):
    plain = DataConfig(dataset="pets", data_dir=str(pets / "tfds"), image_size=8, flip=True, workers=0)
    (expected, _), data = batches(plain, 5), config(pets / form, workers=0)
    for one in (data, dataclasses.replace(data, cache=False), dataclasses.replace(data, cache=False, workers=2)):
        jax.tree.map(np.testing.assert_array_equal, batches(one, 5)[0], expected)
    for split in ("train", "test"):
        found, there = open_source(data, split), open_source(plain, split)
        for ours, theirs in zip(*(pipeline.load_arrays(data, split, s) for s in (found, there)), strict=True):
            jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        assert found.describe() == there.describe() | {"dataset": "folder"}


@pytest.mark.parametrize("form", FORMS)
def test_a_run_goes_on_from_its_position(pets, form):
    data = config(pets / form, cache=False)
    whole, _ = batches(data, 6)
    _, state = batches(data, 2)
    jax.tree.map(np.testing.assert_array_equal, batches(data, 4, start=state)[0], whole[2:])
    halves = [batches(data, 2, process_index=i, process_count=2)[0] for i in range(2)]
    jax.tree.map(lambda x, *y: np.testing.assert_array_equal(x, np.concatenate(y)), whole[:2], *halves)


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


def test_shards_are_found_below_all_levels(pets, tmp_path):
    (tmp_path / "hub" / "mnist").mkdir(parents=True)
    for path in (pets / "parquet" / "data").iterdir():
        (tmp_path / "hub" / "mnist" / path.name).symlink_to(path)
    found = open_source(config(tmp_path), "train")
    assert (len(found), found.classes) == (30, 2) and class_names(config(tmp_path)) == CLASSES


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


def test_names_of_classes_come_from_the_folders(pets, tmp_path):
    assert all(class_names(config(pets / form)) == NAMED.get(form, CLASSES) for form in FORMS)
    assert class_names(config(pets / "folder", latents="somewhere")) == CLASSES
    assert class_names(config(tmp_path / "absent")) == () == class_names(written(tmp_path, {"a.png": small()}))


def test_a_run_keeps_the_names_of_its_classes(tmp_path):
    data = written(tmp_path / "photos", {f"{c}/{i}.png": small() for c in CLASSES for i in range(20)})
    cfg, workdir = Config(data=data, model=ModelConfig(classes=2)), str(tmp_path / "run")
    os.mkdir(workdir)
    assert label.names_of(cfg, workdir) == CLASSES
    label.keep_names(workdir, open_source(data, "train").class_names)
    (tmp_path / "photos/dog").rename(tmp_path / "photos/ant")
    assert class_names(data) == ("ant", "cat") and label.names_of(cfg, workdir) == CLASSES
    assert label.find_classes(["cat", "dog"], cfg, workdir) == (0, 1)


def test_names_are_not_asked_of_a_place_that_does_not_answer(monkeypatch, tmp_path):
    def absent(*_):
        raise UsageError("gs://: the clients are not installed")

    monkeypatch.setattr(pictures, "names", absent)
    assert class_names(config("gs://test/photos")) == ()
    monkeypatch.undo()
    tar(tmp_path / "a.tar", twins())
    monkeypatch.setattr(webdataset, "open_shard", absent)
    monkeypatch.setattr(webdataset, "_scan", lambda path: pytest.fail("scanned"))
    assert class_names(config(tmp_path)) == ()


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


@pytest.mark.parametrize("form", ["tars", "parquet"])
def test_a_shard_that_is_replaced_in_a_run_is_refused(pets, tmp_path, form):
    FORMS[form](tmp_path)
    source = open_source(config(tmp_path), "train")
    for path in tmp_path.rglob("*-*"):
        os.utime(path, ns=(1, 1))
    assert re.search("found another size or time than at the start", refused(source.read, np.array([0])))


@pytest.mark.slow
def test_the_commands_of_the_page_lead_from_photos_to_a_grid(pets, tmp_path, cache_dir):
    page = (ROOT / "docs" / "data.md").read_text().partition("## A photo folder")[2]
    lines = re.search(r"```bash\n(.*?)```", page, re.DOTALL)[1].replace("\\\n", "").splitlines()
    assert len(lines) == 5 and [line.split()[0] for line in lines[:2]] == ["make", "source"]
    small_run = [*TINY, "--config.model.input_size=8", "--config.data.image_size=8", "--config.train.steps=3"]
    for line in lines[2:]:
        _, _, job, *flags = line.split()
        flags = [
            flag.replace("=photos.", f"={tmp_path}/photos.").replace("=runs", f"={tmp_path}/runs") for flag in flags
        ]
        flags = [flag.replace("=photos", f"={pets}/folder") for flag in flags]
        extra = {"dit_jax.train": small_run, "dit_jax.sample": ["--num=4"]}.get(job, [])
        code, _, err = run(job.removeprefix("dit_jax."), *flags, *extra, cache_dir=cache_dir)
        assert code == 0, err
    assert json.loads((tmp_path / "runs/photos/classes.json").read_text()) == {"names": [*CLASSES]}
    with Image.open(tmp_path / "photos.png") as grid:
        assert "4 images" in err and grid.size[0] > 0
    with np.load(tmp_path / "photos.npz") as found:
        assert set(found["arr_1"].tolist()) == {0, 1}


# ---- shards


def twins(count=20, label=lambda i: i % 2, start=0):
    """Members of a tar: pictures with labels."""
    pairs = [
        ((f"{i:03d}.png", small(colour=(i, 0, 0))), (f"{i:03d}.cls", b"%d\n" % label(i)))
        for i in range(start, start + count)
    ]
    return [member for pair in pairs for member in pair]


SPOILED = {
    "two pictures": (lambda m: [*m, ("003.jpg", small())], "found two files of the key '003', the second 003.jpg"),
    "the same twice": (lambda m: [*m, m[0]], "found two files of the key '000', the second 000.png"),
    "no label": (lambda m: m[:-1], "found no .cls beside 019.png, expected one for each picture"),
    "no picture": (lambda m: m[1:], "found a .cls but no picture of the key '000'"),
    "words": (lambda m: [*m[:-1], ("019.cls", b"cat")], "019.cls: found b'cat', expected the number of a class"),
    "a class without pictures": (lambda m: [*m[:-1], ("019.cls", b"5")], "class 2: found no pictures in '"),
    "a label of billions": (lambda m: [*m[:-1], ("019.cls", b"999999999")], "class 2: found no pictures in '"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_tars_that_do_not_fit_are_named(tmp_path, case):
    change, expected = SPOILED[case]
    tar(tmp_path / "a.tar", change(twins()))
    message = refused(open_source, config(tmp_path), "train")
    assert expected in message and (message.startswith(f"{tmp_path}/a.tar: ") or "class 2" in message)


@pytest.mark.parametrize("size", [0, 300, 512, 700, 1024, 1536, 2000, 5000, 10_000])
def test_a_tar_cut_short_is_named(tmp_path, size):
    tar(tmp_path / "a.tar", twins())
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:size])
    assert refused(open_source, config(tmp_path), "train").startswith(f"{tmp_path}/a.tar: ")
    for bad in (whole + whole, whole[:1024] + b"x" * 512 + whole[1536:], b"x" * 2000):
        (tmp_path / "a.tar").write_bytes(bad)
        assert refused(open_source, config(tmp_path), "train").startswith(f"{tmp_path}/a.tar: ")


def test_a_tar_is_indexed_once_and_anew_if_it_changes(tmp_path, monkeypatch):
    data = dataclasses.replace(config(tmp_path / "tars"), cache=False)
    tar(tmp_path / "tars/a.tar", twins())
    first, state = batches(data, 2)
    with monkeypatch.context() as patched:
        patched.setattr(webdataset, "_scan", lambda path: pytest.fail("indexed again"))
        jax.tree.map(np.testing.assert_array_equal, batches(data, 2)[0], first)
    for kept in (tmp_path / "cache/dit_jax").iterdir():
        kept.write_text(kept.read_text()[:-9])  # damaged
    jax.tree.map(np.testing.assert_array_equal, batches(data, 2)[0], first)
    tar(tmp_path / "tars/a.tar", twins(label=lambda i: (i + 1) % 2))
    assert re.match(
        r"data\.folder: a\.tar/: found '\d+ pictures, .*', expected", refused(batches, data, 1, start=state)
    )


def test_shards_of_several_kinds_or_splits_are_refused(tmp_path):
    tar(tmp_path / "train-0.tar", twins())
    data = config(tmp_path)
    assert "data.held_out_split: found 'train' but no 'test' in" in refused(open_source, data, "train")
    tar(tmp_path / "test-0.tar", [m for m in twins(start=40) if m[0].endswith("png")])
    assert "found other labels or names of classes in train-0.tar than in test-0.tar" in refused(
        open_source, data, "train"
    )
    tar(tmp_path / "test-0.tar", twins(start=40))
    assert [len(open_source(data, split)) for split in ("train", "test")] == [20, 20]
    assert len(open_source(dataclasses.replace(data, split="nowhere", held_out_split="drawn"), "drawn")) < 12
    tar(tmp_path / "train/test.tar", twins())
    assert "/train/test.tar: found the names of both splits in the path" in refused(open_source, data, "train")
    written(tmp_path, {"a.png": small()})
    assert "found both test-0.tar and a.png in" in refused(open_source, data, "train")


SCHEMAS = {
    "no pictures": ({"label": [0, 1]}, r"found the columns label \(int64\); expected one of encoded pictures"),
    "two columns": (
        {"a": [b"x", b"y"], "b": [b"x", b"y"]},
        r"a \(binary\), b \(binary\); expected one of encoded pictures",
    ),
    "words": (
        {"image": [b"x", b"y"], "label": ["cat", "dog"]},
        "column 'label': found string, expected the number",
    ),
    "empty labels": ({"image": [b"x", b"y"], "label": [0, None]}, "column 'label': found int64 with 1 empty rows"),
    "a label below 0": (
        {"image": [small()] * 40, "label": [0] * 20 + [-1] * 20},
        r"a.parquet/\d+: found label -1, expected 0 to 0",
    ),
    "no bytes": ({"image": [{"bytes": None, "path": "x.png"}] * 2}, r"a.parquet/\d: cannot decode"),
    "paths": ({"image": ["x.png", "y.png"]}, r"found the columns image \(string\)"),
    "text": ({"image": [b"x", b"y"]}, r"a.parquet/\d: cannot decode .*: cannot identify image file"),
}


@pytest.mark.parametrize("case", SCHEMAS)
def test_parquet_files_of_another_schema_are_named(tmp_path, case):
    columns, expected = SCHEMAS[case]
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    message = refused(batches, config(tmp_path), 1)
    assert message.startswith(f"{tmp_path}/a.parquet") and re.search(expected, message), message


def test_damaged_parquet_files_are_named(tmp_path):
    pq.write_table(
        pa.table({"image": [small(colour=(i, 0, 0)) for i in range(60)]}), tmp_path / "a.parquet", row_group_size=20
    )
    whole, data = (tmp_path / "a.parquet").read_bytes(), config(tmp_path)
    for bad in (b"", whole[:-9], whole[:500], b"x" * 900):
        (tmp_path / "a.parquet").write_bytes(bad)
        assert refused(open_source, data, "train").startswith(f"{tmp_path}/a.parquet: ")
    (tmp_path / "a.parquet").write_bytes(whole)
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(200) + whole[204:])
    assert re.search(r"a\.parquet/\d+: cannot read it, it may be cut short", refused(batches, data, 1))


def test_parquet_files_that_would_fill_the_memory_are_refused_before_they_are_read(tmp_path, monkeypatch):
    rows = pa.table({"image": [b"x"] * 100_000, "label": [0] * 100_000})
    pq.write_table(rows, tmp_path / "a.parquet")
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *_, **how: pytest.fail("read"))
    assert "a.parquet: found notes of 100,000 rows that its columns do not" in refused(
        open_source, config(tmp_path), "train"
    )
    monkeypatch.setattr(parquet, "_LARGEST", 200)
    pq.write_table(pa.table({"image": [small(), small((9, 9))], "label": [0, 0]}), tmp_path / "a.parquet")
    assert re.search(r"a row group of \d+ bytes, expected 200; write", refused(open_source, config(tmp_path), "train"))


def test_of_several_records_the_one_that_cannot_be_read_is_named(tmp_path):
    pq.write_table(
        pa.table({"image": [small(colour=(i, 0, 0)) for i in range(60)]}), tmp_path / "a.parquet", row_group_size=20
    )
    start = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(2).column(0)
    whole = bytearray((tmp_path / "a.parquet").read_bytes())
    offset = start.dictionary_page_offset or start.data_page_offset
    whole[offset : offset + 30] = bytes(30)
    (tmp_path / "a.parquet").write_bytes(whole)
    fetch = open_source(config(tmp_path), "train").source.listing.fetch
    assert len(fetch([0, 25])) == 2
    assert f"{tmp_path}/a.parquet/45: cannot read it" in refused(fetch, [0, 25, 45])


def test_a_sweep_goes_on_with_its_data_only(tmp_path):
    data = written(tmp_path / "photos", {f"{c}/{i}.png": small() for c in CLASSES for i in range(20)})
    cfg = Config(data=data, model=ModelConfig(input_size=8, channels=3, classes=2))
    for _ in range(2):
        ladder.prepare(cfg, str(tmp_path / "sweep"))
    written(tmp_path / "photos", {"cat/new.png": small()})
    message = refused(ladder.prepare, cfg, str(tmp_path / "sweep"))
    assert f"{tmp_path}/sweep: found other data than the sweep began with" in message


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_every_door_reads_a_bucket_as_the_disk(pets):
    with leading_here(page=7) as server:
        for form in FORMS:
            for name in files.below(str(pets / form)):
                server.damage("add", f"{form}/{name}", data=(pets / form / name).read_bytes())
            here, away = (config(place, cache=False) for place in (pets / form, f"gs://test/{form}"))
            jax.tree.map(np.testing.assert_array_equal, batches(away, 3), batches(here, 3))
            assert open_source(away, "test").describe() == open_source(here, "test").describe()
            assert class_names(away) == class_names(here)
        server.damage("add", "odd//etc/x.png", data=small())
        assert "gs://test/odd: found the object '/etc/x.png', expected" in refused(
            open_source, config("gs://test/odd"), "train"
        )
        gone = files.below(str(pets / "folder"))[0]
        source = open_source(config("gs://test/folder"), "test")
        server.damage("delete", f"folder/{gone}")
        assert f"gs://test/folder/{gone}: cannot read it" in refused(source.read, np.array([0]))
    assert "data.folder: found 's3://x', expected a path on a disk or gs" in refused(
        open_source, config("s3://x"), "train"
    )


def test_latents_are_made_of_a_folder_and_keep_its_names(pets, tmp_path, cache_dir):
    params = jax.tree.map(np.asarray, vae.init(NETWORK, jax.random.key(0)))
    made = {"file": "tiny.safetensors", "sha256": "0" * 64, "format": "sd-vae"}
    save_network(str(tmp_path / "vae"), "sd-vae", dataclasses.asdict(NETWORK), params, made)
    flags = [
        f"--autoencoder={tmp_path}/vae",
        f"--out={tmp_path}/z",
        "--config.model.input_size=4",
        "--config.model.patch=1",
    ]
    flags += [f"--config.data.folder={pets}/folder", "--config.data.image_size=8", "--config.model.channels=4"]
    code, _, err = run("encode", "--config=configs/photos.py", *flags, cache_dir=cache_dir, devices=1)
    assert code == 0, err
    data = config(pets / "folder", latents=f"{tmp_path}/z", flip=False)
    found, images = open_source(data, "train"), open_source(config(pets / "folder"), "train")
    assert (len(found), found.image_shape) == (30, (4, 4, 4)) and not found.overlaps(open_source(data, "test"))
    assert found.describe()["source_sha256"] == images.describe()["sha256"]
    np.testing.assert_array_equal(found.read(np.arange(30))[1]["label"], images.read(np.arange(30))[1]["label"])
    renamed = written(tmp_path / "renamed", {f"{c}/{i}.png": small() for c in ("ant", "cat") for i in range(20)})
    assert class_names(dataclasses.replace(data, folder=renamed.folder)) == CLASSES == found.class_names
    other = dataclasses.replace(data, folder="")
    assert "data.dataset: found 'digits', expected 'folder', which the latents in" in refused(
        open_source, other, "train"
    )
