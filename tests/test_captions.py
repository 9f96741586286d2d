"""Captions: the same words come through every door, and what is no caption is named."""

import dataclasses
import functools
import importlib.util
import io
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from bucket import leading_here
from job import ROOT, run
from photos import batches, config, refused, small, tar, written

from dit_jax import files
from dit_jax.config import DataConfig
from dit_jax.data import captions
from dit_jax.data.source import class_names, introduce, open_source

COUNT = 12


def image(i):
    return small((9, 5), colour=(i, 2 * i, 0))


def words(i):
    """The captions of picture i: one, or two."""
    return (f"a café, no. {i}", '"two", three')[: 1 + i % 2]


def rows(split):
    """(number, name, bytes, captions) in order of the names."""
    numbers = range(COUNT) if split == "train" else range(COUNT, COUNT + 4)
    return [(i, f"{i:03d}.png", image(i), words(i)) for i in numbers]


def as_text(root):
    for split in ("train", "test"):
        for _, name, content, said in rows(split):
            text = "\ufeff" * (name == "001.png") + "\r\n\n".join(said) + "\n"
            written(root, {f"{split}/{name}": content, f"{split}/{name[:-4]}.txt": text.encode()})


def as_metadata(root):
    for split in ("train", "test"):
        for _, name, content, said in rows(split):
            written(root, {f"{split}/{name}": content})
            row = {"file_name": name, "text": said[0] if len(said) == 1 else list(said), "other": 1}
            with open(root / split / "metadata.jsonl", "a") as out:
                out.write(json.dumps(row) + "\n\n")


def as_tars(root, form="txt"):
    for split in ("train", "test"):
        members = []
        for _, name, content, said in rows(split):
            text = "\n".join(said) if form == "txt" else json.dumps({"caption": said, "url": "x"})
            members += [(f"{name[:-4]}.{form}", text.encode()), (name, content)]
            members += [(f"{name[:-4]}.json", b'{"caption": "another"}')] * (
                form == "txt"
            )  # as img2dataset writes both
        tar(root / f"{split}.tar", members)


def as_parquet(root):
    root.mkdir(exist_ok=True)
    for split in ("train", "test"):
        _, _, contents, said = zip(*rows(split), strict=True)
        table = pa.table({"image": list(contents), "caption": list(map(list, said)), "text": [b"x"] * len(said)})
        pq.write_table(table, root / f"{split}.parquet", row_group_size=3)


class Told(tfds.core.GeneratorBasedBuilder):
    """The same pictures with captions as COCO has them, and with a text that comes after those."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        each = {"id": tfds.features.Scalar(np.int64), "text": tfds.features.Text()}
        features = {"image": tfds.features.Image(shape=(None, None, 3)), "captions": tfds.features.Sequence(each)}
        features["text"] = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split):
        for i, _, content, said in rows(split):
            yield i, {"image": io.BytesIO(content), "text": "", "captions": [{"id": i, "text": one} for one in said]}


FORMS = {"text": as_text, "metadata": as_metadata, "tars": as_tars, "parquet": as_parquet}
FORMS["json"] = functools.partial(as_tars, form="json")


def in_every_form(root):
    """Write the pictures with their captions into `root`, a folder for each door; returns it."""
    Told(data_dir=root / "tfds", file_format="array_record").download_and_prepare()
    for form, write in FORMS.items():
        write(root / form)
    return root


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return in_every_form(tmp_path_factory.mktemp("told"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def flat(root, found, **changes):
    return dataclasses.replace(written(root, found), **{"cache": False, "held_out_split": "other"} | changes)


def all_captions(data):
    """Of both splits, by what names a picture: its file, or its number."""
    sources = [open_source(data, split) for split in (data.split, data.held_out_split)]
    return {
        os.path.basename(source.name_of(i)): source.captions(np.array([i]))[0]
        for source in sources
        for i in range(len(source))
    }


@pytest.mark.parametrize("form", FORMS)
def test_every_door_gives_the_captions_and_batches_of_tfds(told, form, caplog):
    plain = DataConfig(dataset="told", data_dir=str(told / "tfds"), image_size=8, flip=True, workers=0)
    data = config(told / form, workers=0)
    jax.tree.map(np.testing.assert_array_equal, batches(data, 3)[0], batches(plain, 3)[0])
    for split in ("train", "test"):
        found, there = open_source(data, split), open_source(plain, split)
        everything, some = np.arange(len(found)), np.array([3, 0, 3, 2])
        assert found.captions(everything) == there.captions(everything) == [said for *_, said in rows(split)]
        assert found.captions(some) == [words(rows(split)[i][0]) for i in some]
        assert found.describe() == there.describe() | {"dataset": "folder"}
    introduce(found)
    assert "4 images 8 x 8 x 3, no labels, with captions, from" in caplog.text and "left out" not in caplog.text


def test_captions_are_read_when_they_are_asked_for(told, monkeypatch):
    for form in ("text", "tars", "parquet"):
        open_source(config(told / form), "train")  # a tar's index is made
    monkeypatch.setattr(captions, "checked", lambda *_: pytest.fail("read"))
    for form in ("text", "tars", "parquet"):
        source = open_source(config(told / form), "train")
        source.read(np.arange(3))
        assert source.captions


def test_csv_and_class_folders(tmp_path):
    lines = [
        "file_name,width,text",
        'cat/0.png,1,"a cat, ""small"""',
        "./dog/0.png,1,a dog",
        '"cat/1.png",1,"two',
        'lines"',
    ]
    pictures = {f"{c}/{i}.png": small() for c in ("cat", "dog") for i in range(2)}
    data = flat(
        tmp_path, pictures | {"metadata.csv": "\ufeff".encode() + "\r\n".join([*lines, "dog/1.png,2,x"]).encode()}
    )
    source = open_source(dataclasses.replace(data, split="s"), "s")
    assert source.classes == 2
    found = all_captions(dataclasses.replace(data, split="s"))
    assert set(found.values()) <= {('a cat, "small"',), ("a dog",), ("two\r\nlines",), ("x",)} and len(found) == 2


def pair(i, text=b"words", folder=""):
    return {f"{folder}{i}.png": small(colour=(i, 0, 0)), **({f"{folder}{i}.txt": text} if text is not None else {})}


def pairs(**changes):
    return {name: content for i in range(6) for name, content in pair(i).items()} | changes


def meta(*lines, name="metadata.jsonl"):
    """Six pictures with a row each, and more lines."""
    found = [json.dumps({"file_name": f"{i}.png", "caption": "words"}) for i in range(6)]
    return {f"{i}.png": small(colour=(i, 0, 0)) for i in range(6)} | {name: "\n".join([*found, *lines]).encode()}


def table(text):
    return {f"{i}.png": small() for i in range(2)} | {"metadata.csv": text.encode()}


WRONG = {  # -> files, which is named, what is said
    "a picture without": (lambda: pairs() | pair(7, None), "7.png: found no caption, which other pictures have"),
    "a caption alone": (lambda: pairs(**{"readme.txt": b"x"}), "readme.txt: found a caption file without a picture"),
    "an empty file": (lambda: pairs(**{"3.txt": b""}), "3.txt: found an empty caption"),
    "two pictures": (lambda: pairs(**{"3.jpg": small()}), "3.txt: found two pictures of this caption, 3.jpg and 3.png"),
    "too long": (lambda: pairs(**{"3.txt": b"x" * 2**20 + b"x"}), "3.txt: found 1,048,577 bytes, expected text of up"),
    "both": (lambda: pairs() | meta(), "0.png: found captions in 0.txt and in "),
    "a row of no picture": (lambda: meta('{"file_name": "x.png", "caption": "x"}'), "jsonl:7: found file_name 'x.png', no"),
    "a row that leads out": (lambda: meta('{"file_name": "../0.png", "caption": "x"}'), "jsonl:7: found file_name '../0.p"),
    "a second row": (lambda: meta('{"file_name": "./0.png", "caption": "x"}'), "jsonl:7: found 0.png again, the first time"),
    "a row without": (lambda: meta('{"file_name": "0.png", "text": "x"}'), "metadata.jsonl:7: found no 'caption'"),
    "an empty caption": (lambda: meta('{"file_name": "0.png", "caption": " "}'), "metadata.jsonl:7: found an empty caption"),
    "no list": (lambda: meta('{"file_name": "0.png", "caption": []}'), "metadata.jsonl:7: found an empty caption"),
    "a number": (lambda: meta('{"file_name": "0.png", "caption": [1]}'), "metadata.jsonl:7: found 1 (int), expected text"),
    "half a character": (lambda: meta('{"file_name": "0.png", "caption": "\\ud800"}'), "jsonl:7: found '\\ud800', expected te"),
    "no object": (lambda: meta("[]"), "metadata.jsonl:7: found a list, expected an object"),
    "no JSON": (lambda: meta("x"), "metadata.jsonl:7: not readable as JSON in UTF-8"),
    "a number for a name": (lambda: meta('{"file_name": 3, "caption": "x"}'), "jsonl:7: found file_name 3, expected text"),
    "two files of rows": (lambda: meta() | {"metadata.csv": b"file_name,text\n0.png,x"}, "jsonl:1: found 0.png again"),
    "two columns": (lambda: table("file_name,text,caption\n0.png,a,b"), "csv: found the columns file_name, text, caption; e"),
    "no names": (lambda: table("id,text\n0,a"), "metadata.csv: found the columns id, text; expected file_name and one of"),
    "a short row": (lambda: table("file_name,text\n0.png"), "metadata.csv:2: found 1 fields, expected 2"),
    "an open quote": (lambda: table('file_name,text\n0.png,"a'), "metadata.csv:2: not readable as CSV"),
    "a picture without a row": (lambda: table("file_name,text\n0.png,a"), "1.png: found no caption, which other pictures"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_captions_that_do_not_fit_are_named(tmp_path, case):
    found, expected = WRONG[case]
    message = refused(open_source, flat(tmp_path, found()), "train")
    assert message.startswith(f"{tmp_path}/") and expected in message, message


@pytest.mark.parametrize("text, what", [(b"\xff\xfe", "expected text in UTF-8"), (b" \n\n", "found an empty caption")])
def test_a_text_that_is_no_caption_is_named_when_it_is_read(tmp_path, text, what):
    data = flat(tmp_path, pairs(**{f"{i}.txt": text for i in range(6)}))
    source = open_source(data, "train")
    assert re.match(rf"{tmp_path}/\d\.txt: .*{what}", refused(source.captions, np.array([0])))
    written(tmp_path, {f"{i}.txt": b"longer words" for i in range(6)})
    assert "found another size than the" in refused(source.captions, np.array([0]))
    source.read(np.arange(3))  # and does not concern who reads pictures only


def test_a_bad_caption_ends_a_command_with_exit_2_and_its_name(tmp_path, cache_dir):
    data = flat(tmp_path / "photos", pairs(**{"3.txt": b""}))
    flags = [f"--config.data.folder={data.folder}", f"--workdir={tmp_path}/run"]
    code, _, err = run("train", "--config=configs/photos.py", *flags, cache_dir=cache_dir)
    assert code == 2 and f"{data.folder}/3.txt: found an empty caption" in err and not (tmp_path / "run").exists()


NOT_UTF8 = "é".encode("latin-1")


@pytest.mark.parametrize(
    "name, content", [("metadata.csv", b"file_name,text\n0.png," + NOT_UTF8), ("metadata.jsonl", NOT_UTF8)]
)
def test_rows_that_are_not_utf8_are_named(tmp_path, name, content):
    message = refused(open_source, flat(tmp_path, pairs(**{name: content})), "train")
    assert message.startswith(f"{tmp_path}/{name}:{1 + (name == 'metadata.csv')}: ") and "UTF-8" in message


@pytest.mark.parametrize("form", ["text", "metadata", "tars", "parquet"])
def test_a_changed_caption_is_a_changed_source(told, tmp_path, form):
    FORMS[form](tmp_path / "data")
    data = config(tmp_path / "data")
    _, state = batches(data, 1)
    batches(data, 1, start=state)
    older = state["source"].copy()
    del older["captions"]
    path, old, new = {
        "text": ("train/003.txt", b"no. 3", b"number 3"),
        "metadata": ("train/metadata.jsonl", b"no. 3", b"No. 3"),
        "tars": ("train.tar", b"no. 3", b"No. 3"),
        "parquet": ("train.parquet", b"", b""),
    }[form]
    if form == "parquet":
        found = pq.read_table(tmp_path / "data" / path).to_pydict()
        found["caption"][3] = ["A", *found["caption"][3][1:]]
        pq.write_table(pa.table(found), tmp_path / "data" / path, row_group_size=3)
    else:
        whole = (tmp_path / "data" / path).read_bytes()
        assert old in whole
        (tmp_path / "data" / path).write_bytes(whole.replace(old, new))
    message = refused(batches, data, 1, start=state)
    assert re.match(r"data\.folder: (captions|train.parquet/): found '", message), message
    if form != "parquet":  # the position of a version that read no captions
        batches(data, 1, start={**state, "source": older})


def test_what_is_no_caption_beside_pictures_is_left_out_as_before(tmp_path, caplog):
    found = {f"{c}/{i}.png": small() for c in ("cat", "dog") for i in range(20)}
    notes = {"notes.txt": b"\xff", "cat/x.txt": b"", "metadata.csv": b"file_name,label\n0.png,1\n", "x.jsonl": b"x"}
    data = flat(tmp_path, found | notes | {".hidden/metadata.csv": b"x", "dog/metadata.jsonl": b""})
    source = open_source(data, "train")
    assert source.captions is None and "captions" not in source.identity
    assert "left out (2 .txt, 2 .jsonl, 1 .csv)" in caplog.text or "2 .txt" in caplog.text
    assert "metadata.csv: has no captions: found the columns file_name, label" in caplog.text
    introduce(source)
    assert "2 classes (cat, dog), from" in caplog.text


def test_captions_outside_of_the_splits_are_left_out(tmp_path):
    found = {f"{s}/{i}.png": small() for s in ("train", "test", "val") for i in range(3)}
    texts = {f"{s}/{i}.txt": b"x" for s in ("train", "test") for i in range(3)}
    source = open_source(written(tmp_path, found | texts | {"val/lone.txt": b"", "read.txt": b""}), "test")
    assert source.captions(np.arange(3)) == [("x",)] * 3


def sample(i, **more):
    return [(f"{i}.png", small(colour=(i, 0, 0))), *[(f"{i}.{end}", text) for end, text in more.items()]]


TARS = {
    "one without": ([*sample(0, txt=b"a"), *sample(1)], "found no caption beside 1.png, expected .txt or .json"),
    "a JSON without": ([*sample(0, json=b'{"text": "a"}'), *sample(1, json=b"{}")], "found no caption beside 1.png"),
    "no picture": (
        [*sample(0, txt=b"a"), *sample(1, txt=b"a"), ("2.txt", b"a")],
        "a .txt but no picture of the key '2'",
    ),
    "two of one key": ([*sample(0, txt=b"a"), *sample(1, txt=b"a"), ("1.txt", b"b")], "two files of the key '1'"),
    "empty": ([*sample(0, txt=b"a"), *sample(1, txt=b"\n")], "1.txt: found an empty caption"),
    "not UTF-8": ([*sample(0, txt=b"a"), *sample(1, txt=NOT_UTF8)], "1.txt: found b'\\xe9', expected text in UTF-8"),
    "no JSON": ([*sample(0, json=b"{"), *sample(1)], "0.json: not readable as JSON"),
    "no text": ([*sample(0, json=b'{"text": 3}'), *sample(1)], "0.json: found 3 (int), expected text"),
}


@pytest.mark.parametrize("case", TARS)
def test_captions_of_tars_that_do_not_fit_are_named(tmp_path, case):
    members, expected = TARS[case]
    tar(tmp_path / "a.tar", members)
    message = refused(open_source, config(tmp_path), "train")
    assert message.startswith(f"{tmp_path}/a.tar: ") and expected in message, message


def test_texts_without_pictures_in_a_tar_without_captions_are_none(tmp_path):
    tar(tmp_path / "a.tar", [*sample(0, json=b'{"url": "x"}'), *sample(1), ("read.txt", NOT_UTF8), ("s.json", b"")])
    assert open_source(config(tmp_path), "train").captions is None


def test_parquet_rows_without_captions_are_named(tmp_path):
    pq.write_table(pa.table({"image": [small()] * 9, "text": ["a"] * 8 + [None]}), tmp_path / "a.parquet")
    data = config(tmp_path)
    message = refused(
        lambda: [s.captions(np.arange(len(s))) for s in (open_source(data, "train"), open_source(data, "test"))]
    )
    assert f"{tmp_path}/a.parquet/8: column 'text': found an empty caption" in message
    tar_like = {"image": [small()] * 9}
    pq.write_table(pa.table(tar_like), tmp_path / "b.parquet")
    assert "found captions in a.parquet, none in b.parquet, expected them in all" in refused(open_source, data, "train")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_captions_are_read_from_a_bucket_as_from_the_disk(told):
    with leading_here(page=7) as server:
        for form in FORMS:
            for name in files.below(str(told / form)):
                server.damage("add", f"{form}/{name}", data=(told / form / name).read_bytes())
            for split in ("train", "test"):
                here, away = (open_source(config(place), split) for place in (told / form, f"gs://test/{form}"))
                assert away.captions(np.arange(4)) == here.captions(np.arange(4))
                assert away.identity == here.identity


def test_the_builder_of_the_page_needs_no_tensorflow(tmp_path):
    page = (ROOT / "docs" / "data.md").read_text().partition("## A TFDS dataset of your own")[2]
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    names = {f"photos/{s}/{c}/{i}.jpg": (s, c, i) for s in ("train", "test") for c in ("cat", "dog") for i in range(3)}
    written(tmp_path, {name: small(colour=(i, 0, 0), form="JPEG") for name, (_, _, i) in names.items()})
    check = "\nimport sys; assert not {'tensorflow', 'torch'} & {*sys.modules}"
    done = subprocess.run([sys.executable, "-c", code + check], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    data = DataConfig(dataset="animals", data_dir=str(tmp_path / "tfds"), image_size=4)
    source = open_source(data, "train")
    assert (len(source), source.classes, class_names(data)) == (6, 2, ("cat", "dog"))
    _, cond = source.read(np.arange(6))
    said = [(f"a photo of a {('cat', 'dog')[label]}",) for label in cond["label"]]
    assert source.captions(np.arange(6)) == said
    stored = {content for _, content in source.encoded(np.arange(6))}
    assert stored == {small(colour=(i, 0, 0), form="JPEG") for i in range(3)}  # the bytes of the files


@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow is installed, and encodes arrays"
)
def test_a_builder_that_yields_arrays_needs_tensorflow(tmp_path):
    with pytest.raises(ModuleNotFoundError):
        tfds.features.Image(shape=(4, 4, 3)).encode_example(np.zeros((4, 4, 3), np.uint8))
    tfds.features.Image(shape=(None, None, 3)).encode_example(io.BytesIO(small()))
