"""Images in ArrayRecord that `encode` copies: batches, checksums and captions of the data they were made of, whatever kills it."""

import dataclasses
import io
import json
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sklearn.datasets
from array_record.python.array_record_module import ArrayRecordWriter
from bucket import leading_here
from job import Job, run
from photos import batches, config, refused, small, tar, written
from PIL import Image
from test_captions import FORMS, in_every_form, words

from dit_jax import files
from dit_jax.config import Config, DataConfig, ModelConfig
from dit_jax.data import images, notes, pipeline
from dit_jax.data.latents import open_latents
from dit_jax.data.source import class_names, introduce, open_source
from dit_jax.models import vae
from dit_jax.networks import encoding, sharing
from dit_jax.networks.autoencoder import Autoencoder

SHARD = 700  # bytes: a few of the pictures


def copy(data, out, splits=("train", "test"), shard_bytes=SHARD, **model):
    """Copy by the job's own function, in this process."""
    model = ModelConfig(**{"input_size": data.image_size} | model)
    job = encoding.open_job(Config(model=model, data=data), "float16", whiten=False)
    encoding.encode_splits(job, str(out), list(splits), shard_bytes, [])
    return dataclasses.replace(data, folder=str(out))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return in_every_form(tmp_path_factory.mktemp("told"))


@pytest.fixture(scope="module")
def stored(told, tmp_path_factory):
    """The pictures with captions, copied from a folder."""
    out = tmp_path_factory.mktemp("stored") / "data"
    copy(config(told / "text", cache=False), out)
    return out


def contents(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(Path(out).rglob("*")) if path.is_file()}


def assert_same_source(one, other, splits=("train", "test")):
    """Batches, whole splits, checksums and captions."""
    jax.tree.map(np.testing.assert_array_equal, batches(one, 4)[0], batches(other, 4)[0])
    for split in splits:
        found, there = (open_source(data, split) for data in (one, other))
        assert found.describe() == there.describe() and found.identity == there.identity
        assert found._checksum == there._checksum
        assert bool(found.captions) == bool(there.captions)
        everything = np.arange(len(found))
        assert not found.captions or found.captions(everything) == there.captions(everything)
        for ours, theirs in zip(*(pipeline.load_arrays(s, split) for s in (one, other)), strict=True):
            jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("form", [*FORMS, "tfds"])
def test_copies_give_what_their_source_gives(told, stored, tmp_path, form, caplog):
    data = config(told / form, cache=False, workers=2)
    if form == "tfds":
        data = DataConfig(dataset="told", data_dir=str(told / "tfds"), image_size=8, flip=True, cache=False)
    copied = copy(data, tmp_path / "data")
    assert_same_source(copied, data)
    found = open_source(copied, "train")
    introduce(found)
    assert f"12 images 8 x 8 x 3, no labels, with captions, from {tmp_path}/data/train" in caplog.text
    assert "not latents" not in caplog.text and len(found.source.shards.files) == 2
    assert found.captions(np.array([3, 0, 3])) == [words(3), words(0), words(3)]
    assert not found.overlaps(open_source(copied, "test")) and found.overlaps(open_source(copied, "train"))
    shards = {name: content for name, content in contents(tmp_path / "data").items() if name.endswith("record")}
    assert shards == {name: contents(stored)[name] for name in shards}  # whatever the door
    _, state = batches(data, 2)
    jax.tree.map(
        np.testing.assert_array_equal, batches(copied, 1, start=state)[0], batches(data, 3)[0][2:]
    )  # a run goes on


def real_pictures():
    """Crops of the photos that come with scikit-learn: as JPEG, in grey, and as PNG with transparency."""
    found = [Image.fromarray(sklearn.datasets.load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    for number in range(18):
        left, top = 90 * (number // 6), 60 * (number % 6)
        crop = found[number % 2].crop((left, top, left + 70 + number, top + 90))
        mode, form, end = (("RGB", "JPEG", "jpg"), ("L", "JPEG", "jpg"), ("RGBA", "PNG", "png"))[number % 3]
        crop.convert(mode).save(out := io.BytesIO(), form)
        yield f"{number:02d}.{end}", out.getvalue(), f"picture {number}"


def test_real_pictures_with_labels_names_and_captions_come_through_every_door(tmp_path, data_dir):
    found = [(name, content, said, "ab"[i % 2]) for i, (name, content, said) in enumerate(real_pictures())]
    found = sorted(found, key=lambda row: (row[3], row[0]))
    for split in ("train", "test"):
        some = found[:: 1 if split == "train" else 3]
        for name, content, said, label in some:
            path = f"folder/{split}/{label}/{name}"
            written(tmp_path, {path: content, f"{path[:-4]}.txt": said.encode()})
        members = []
        for name, content, said, label in some:
            more = {"cls": str("ab".index(label)).encode(), "txt": said.encode()}
            members += [(f"{label}/{name}", content), *((f"{label}/{name[:-4]}.{end}", x) for end, x in more.items())]
        tar(tmp_path / "tars" / f"{split}.tar", members)
        _, images, texts, labels = zip(*some, strict=True)
        table = pa.table({"image": list(images), "text": list(texts), "label": list(map("ab".index, labels))})
        (tmp_path / "parquet").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "parquet" / f"{split}.parquet", row_group_size=5)
    data = config(tmp_path / "folder", image_size=16, cache=False)
    copied = copy(data, tmp_path / "copied", shard_bytes=9000)
    assert_same_source(copied, data)
    assert class_names(copied) == ("a", "b") == open_source(copied, "test").class_names
    for form in ("tars", "parquet"):
        other = dataclasses.replace(data, folder=str(tmp_path / form))
        jax.tree.map(np.testing.assert_array_equal, batches(other, 3)[0], batches(copied, 3)[0])
        everything = np.arange(18)
        assert open_source(other, "train").captions(everything) == open_source(copied, "train").captions(everything)


def test_pixels_are_stored_as_png_and_give_the_same_checksum(tmp_path, data_dir):
    data = DataConfig(split="train[:40]", held_out_split="test[:9]", cache=False)
    copied = copy(data, tmp_path / "data", ("train[:40]", "test[:9]"), shard_bytes=2000)
    assert_same_source(copied, data, ("train[:40]", "test[:9]"))
    first = open_source(copied, "test[:9]")
    assert first.image_shape == (8, 8, 1) and first.classes == 10 and first.name == "digits"
    assert first.source.parts(np.array([0]))[0][1].startswith(b"\x89PNG")


def test_the_command_copies_what_it_is_given_and_finds_it_done(told, stored, tmp_path, cache_dir):
    flags = ["--config=configs/photos.py", f"--config.data.folder={told}/text", f"--out={tmp_path}/data"]
    code, said, err = run(
        "encode", *flags, f"--shard_bytes={SHARD}", "--config.data.image_size=256", cache_dir=cache_dir
    )
    assert code == 0, err
    assert said.splitlines() == [f"{tmp_path}/data/train", f"{tmp_path}/data/test"]
    assert f"{tmp_path}/data: copies of the images, as no --autoencoder is given" in err
    assert contents(tmp_path / "data") == contents(stored)
    code, _, err = run("encode", *flags, cache_dir=cache_dir)
    assert (code, err) == (0, f"{tmp_path}/data/train: done before\n{tmp_path}/data/test: done before\n")


def test_who_forgot_the_autoencoder_is_told(told, tmp_path, caplog):
    copy(config(told / "text"), tmp_path / "data", input_size=4)
    assert "will hold images, not latents, but the model is one of latents (model.input_size = 4, data.i" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_costs_one_shard_and_the_files_are_those_of_one_go(tmp_path, cache_dir, number):
    data = written(tmp_path / "photos", {f"{c}/{i:03d}.png": small(colour=(i, i, 9)) for c in "ab" for i in range(99)})
    whole = copy(data, tmp_path / "whole", ("train",), shard_bytes=400).folder
    flags = ["--config=configs/photos.py", f"--config.data.folder={data.folder}", "--split=train", "--shard_bytes=400"]
    for attempt in range(10):  # a fast machine may be done before the signal comes
        out = tmp_path / str(attempt)
        job = Job("encode", *flags, f"--out={out}", cache_dir=cache_dir, devices=1)
        while not (out / "train/images-00001.whole").exists() and job.poll() is None:
            time.sleep(0.001)
        if job.poll() is None:
            job.send_signal(number)
        _, err = job.communicate()
        if job.returncode:
            break
    assert job.returncode == (75 if number == signal.SIGTERM else -number), err
    assert "found no such file, so the images are not complete" in refused(
        open_source, dataclasses.replace(data, folder=str(out)), "train"
    )
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "train").glob("*.whole")}
    assert len(kept) >= 2
    code, _, err = run("encode", *flags[:-1], f"--out={out}", cache_dir=cache_dir, devices=1)  # shards keep their size
    assert code == 0 and " were before" in err, err
    assert contents(out) == contents(whole)


def test_shards_of_changed_captions_are_of_another_job(told, tmp_path, monkeypatch):
    shutil.copytree(told / "text", tmp_path / "photos")
    data = config(tmp_path / "photos", cache=False)
    with monkeypatch.context() as patched:
        patched.setattr(sharing, "without", lambda *_: pytest.fail("not complete"))
        patched.setattr(images, "open_images", lambda *_: pytest.fail("not complete"))
        patched.setattr("dit_jax.data.shard_writer._publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            copy(data, tmp_path / "data", ("train",))
    path = tmp_path / "photos/train/003.txt"
    path.write_bytes(path.read_bytes().replace(b"no. 3", b"No. 3"))
    message = refused(copy, data, tmp_path / "data", ("train",))
    assert f"images {tmp_path}/data/train: holds unfinished images of another job: captions_sha256: found" in message


def test_malformed_pictures_are_left_out_and_the_others_keep_their_place(tmp_path, caplog):
    found = {f"{s}/{i:02d}.png": small(colour=(i, 0, 0)) for s in ("train", "test") for i in range(20)}
    data = written(tmp_path / "photos", found | {"train/03.png": b"text", "train/17.png": small()[:40]})
    data = dataclasses.replace(data, cache=False)
    assert f"{tmp_path}/photos/train/03.png: cannot decode" in refused(copy, data, tmp_path / "data")
    assert "train/images.json" not in contents(tmp_path / "data")
    copied = copy(dataclasses.replace(data, skip_bad=2), tmp_path / "data")
    source = open_source(copied, "train")
    assert len(source) == 18 and source.source.numbers.tolist() == [i for i in range(20) if i not in (3, 17)]
    assert source.identity["records"] == 18 and source.read(np.array([3]))[0][0, 0, 0].tolist() == [4, 0, 0]
    assert "record 3 is left out" in caplog.text and "18 images without 2 malformed records: 3, 17" in caplog.text
    assert "data.skip_bad: found 1, expected at least 2" in refused(
        copy, dataclasses.replace(data, skip_bad=1), tmp_path / "data"
    )


def test_copies_of_other_data_are_refused(told, stored, tmp_path):
    other = written(tmp_path / "photos", {f"{s}/{i}.png": small() for s in ("train", "test") for i in range(9)})
    message = refused(copy, other, stored)
    assert f"--out: '{stored}/train' holds other images: train/: found '12 pictures, " in message
    data = dataclasses.replace(config(stored), split="../train")
    assert "data.split: found '../train', expected the name" in refused(images.open_split, data, "../train")
    shutil.copytree(stored / "test", tmp_path / "again" / "train")
    assert "found 'train', expected 'test', which the images in" in refused(
        open_source, config(tmp_path / "again"), "train"
    )


DAMAGE = {
    "a byte": (lambda x: x[:40] + bytes([x[40] ^ 1]) + x[41:], "found CRC-32 "),
    "another number": (lambda x: images.sealed(b"\7" + x[5:]), "found record number 7, expected number 0 (a duplicate"),
    "cut short": (lambda x: images.sealed(x[4:16]), "found 16 bytes, expected number 0"),
    "no picture": (
        lambda x: images.sealed(x[4:16] + images.strings([b"x"])),
        "cannot decode the image (3 channels): cannot id",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_and_can_be_skipped(stored, tmp_path, case):
    change, expected = DAMAGE[case]
    shutil.copytree(stored, tmp_path / "data")
    data = config(tmp_path / "data", cache=False)
    source = open_source(data, "train")
    entry = source.source.shards.files[0]
    path = tmp_path / "data" / "train" / entry["file"]
    records = source.source.shards.read(np.arange(entry["records"]))
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for record in [change(records[0]), *records[1:]]:
        writer.write(record)
    writer.close()
    said = json.loads((path.parent / "images.json").read_text())
    said["shards"][0] |= {"bytes": path.stat().st_size, "sha256": files.file_sha256(str(path))}
    (path.parent / "images.json").write_text(json.dumps(said | {"checksum": notes.checksum(said)}))
    source = open_source(data, "train")
    message = refused(source.read, np.arange(3))
    assert message.startswith(f"images {path}, record 0: ") and expected in message, message
    assert len(batches(dataclasses.replace(data, skip_bad=1), 3)[0]) == 3
    path.write_bytes(path.read_bytes()[:-9])
    assert f"images {path}: found " in refused(open_source, data, "train")


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda n: n.update(version=2), "version: found 2, expected 1"),
        (lambda n: n.update(version=3), "version: found 3, expected 1 or 2"),
        (lambda n: n.update(shape=[None, None, 2]), "shape: found (None, None, 2), expected (h, w, c)"),
        (lambda n: n.update(arrays=1), "notes.arrays: found 1 (int), expected bool"),
        (lambda n: n.pop("identity"), "notes: found ["),
        (lambda n: n.update(captions_sha256="x"), "captions_sha256: found 'x', expected the 64"),
    ],
)
def test_damaged_notes_are_named(stored, tmp_path, change, expected):
    shutil.copytree(stored, tmp_path / "data")
    path = tmp_path / "data/train/images.json"
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said | {"checksum": notes.checksum(said)}))
    message = refused(open_source, config(tmp_path / "data"), "train")
    assert message.startswith(f"images {path}: ") and expected in message, message


def test_latents_keep_the_captions_of_their_images(told, tmp_path, monkeypatch):
    monkeypatch.setattr(
        encoding, "make_encoder", lambda *_: lambda x: np.repeat(x[:, None, ::2, ::2, :1], 2, 1) * np.ones(4)
    )
    cfg = Config(model=ModelConfig(input_size=4, channels=4, patch=1), data=config(told / "text", flip=False))
    cfg = dataclasses.replace(cfg, autoencoder=dataclasses.replace(cfg.autoencoder, folder="tiny"))
    network = vae.VAEConfig(channels=3, widths=(8, 8), groups=4, blocks=1)
    job = encoding.Job(cfg, Autoencoder(network, {}, vae.Normalisation(0.0, 1.0), "0" * 64, {}), "float16", False)
    encoding.encode_splits(job, str(tmp_path / "z"), ["train"], 600, [])
    latents, source = open_latents(str(tmp_path / "z/train"), verify=True), open_source(cfg.data, "train")
    assert latents.info.version == 2 and len(latents.files) > 1
    some = np.array([5, 0, 5, 11])
    assert latents.captions(some) == source.captions(some)
    plain = dataclasses.replace(
        job, cfg=dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, folder=bare(told, tmp_path)))
    )
    encoding.encode_splits(plain, str(tmp_path / "plain"), ["train"], 600, [])
    without = open_latents(str(tmp_path / "plain/train"))
    assert without.captions is None and without.info.version == 1
    np.testing.assert_array_equal(latents.read(some)[0], without.read(some)[0])
    said = json.loads((tmp_path / "plain/train/latents.json").read_text())
    assert "captions_sha256" not in said and said["version"] == 1
    other = dataclasses.replace(cfg.data, latents=str(tmp_path / "z"))
    introduced = open_source(other, "train")
    assert introduced.captions(some) == source.captions(some)


def bare(told, tmp_path):
    """The pictures without captions."""
    shutil.copytree(told / "text", tmp_path / "bare", ignore=shutil.ignore_patterns("*.txt"))
    return str(tmp_path / "bare")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_copies_lie_in_a_bucket_as_on_a_disk(told, stored):
    data = config(told / "text", cache=False)
    with leading_here(page=7) as server:
        copied = copy(data, "gs://test/data")
        found = {name.removeprefix("data/"): content for name, (_, content) in server.buckets["test"].items()}
        assert found == contents(stored)
        assert_same_source(copied, data)
