"""Photo folders: the same pictures give the same batches and names however they lie, on a disk or in a bucket."""

import dataclasses
import json
import os
import re

import jax
import numpy as np
import pytest
from bucket import leading_here
from job import ROOT, TINY, run
from photos import CLASSES, FORMS, NETWORK, Pets, batches, config, refused, small, tar, twins, written
from PIL import Image

from dit_jax import files
from dit_jax.config import Config, DataConfig, ModelConfig
from dit_jax.data import pictures, pipeline, webdataset
from dit_jax.data.source import class_names, open_source
from dit_jax.error import UsageError
from dit_jax.models import vae
from dit_jax.networks.folder import save_network
from dit_jax.sampling import label
from dit_jax.sweep import ladder

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


def test_shards_are_found_below_all_levels(pets, tmp_path):
    (tmp_path / "hub" / "mnist").mkdir(parents=True)
    for path in (pets / "parquet" / "data").iterdir():
        (tmp_path / "hub" / "mnist" / path.name).symlink_to(path)
    found = open_source(config(tmp_path), "train")
    assert (len(found), found.classes) == (30, 2) and class_names(config(tmp_path)) == CLASSES


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
