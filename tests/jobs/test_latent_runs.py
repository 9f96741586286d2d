"""A run on latents, the digits as 4 x 4 x 4 of them: trained, interrupted, evaluated, and never continued on others."""

import dataclasses
import json
import os
import re
import shutil

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from job import run
from runs import saved, train, write_latents

from dit_jax import checkpoint
from dit_jax.config import DataConfig
from dit_jax.data.latent_notes import LatentInfo
from dit_jax.data.latents import open_latents
from dit_jax.data.pipeline import load_arrays
from dit_jax.data.source import open_source


def encode(root, data_dir, split, **changes):
    """Writes the latents of one split of the digits: blocks of 2 x 2 pixels as channels."""
    source = open_source(DataConfig(data_dir=data_dir), split)
    images, cond = load_arrays(DataConfig(), split, source)
    blocks = images.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 1, 1, 4, 4, 4)
    info = LatentInfo(
        shape=(4, 4, 4),
        dtype="float16",
        moments=False,
        mirrored=False,
        autoencoder="blocks of 2 x 2 pixels",
        autoencoder_sha256="0" * 64,
        scale=1.0,
        shift=0.0,
        classes=10,
        dataset="digits",
        split=split,
        source_sha256=source.describe()["sha256"],
        image_size=8,
    )
    examples = zip(cond["label"].tolist(), blocks, strict=True)
    return write_latents(f"{root}/{split}", dataclasses.replace(info, **changes), examples, shard_bytes=20_000)


@pytest.fixture(scope="module")
def latents(tmp_path_factory, data_dir):
    root = tmp_path_factory.mktemp("latents")
    for split in ("train", "test"):
        encode(root, data_dir, split)
    return root


def arguments(workdir, latents, *more, steps=20):
    model = ["--config.model.input_size=4", "--config.model.channels=4", "--config.model.patch=1"]
    return train(workdir, *model, f"--config.data.latents={latents}", "--config.train.keep=9", *more, steps=steps)


@pytest.fixture(scope="module")
def whole(latents, tmp_path_factory, cache_dir):
    """A run of 20 steps in one go."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    code, _, err = run("train", *arguments(workdir, latents), cache_dir=cache_dir)
    assert code == 0, err
    return workdir


@pytest.fixture(scope="module")
def trained(whole, latents, tmp_path_factory, cache_dir):
    """The same, resumed at step 10 with its latents moved elsewhere and read from disk."""
    workdir = shutil.copytree(whole, tmp_path_factory.mktemp("runs") / "run")
    shutil.rmtree(checkpoint.path_of(str(workdir), 20))
    moved = tmp_path_factory.mktemp("moved") / "latents"
    shutil.copytree(latents, moved)
    code, _, err = run("train", *arguments(workdir, moved, "--config.data.cache=False"), cache_dir=cache_dir)
    assert code == 0, err
    return workdir


def test_a_run_on_latents_trains_and_resumes_bitwise(whole, trained, latents):
    a, b = saved(trained, 20), saved(whole, 20)
    for name in ("params", "ema", "opt", "data"):
        np.testing.assert_equal(a[name], b[name])
    assert a["data"]["source"]["sha256"] == open_latents(f"{latents}/train").content


def test_its_held_out_loss_names_the_latents_and_samples_need_an_autoencoder(trained, latents, tmp_path, cache_dir):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    code, _, err = run("evaluate", f"--workdir={workdir}", cache_dir=cache_dir)
    assert code == 0, err
    record = json.loads((workdir / "eval" / "records.jsonl").read_text().splitlines()[-1])
    assert record["protocol"]["data"]["sha256"] == open_latents(f"{latents}/test").content
    assert record["protocol"]["data"]["autoencoder"] == "blocks of 2 x 2 pixels"
    assert record["protocol"]["held_out"]["latents"] == "mean of the posterior"
    assert 0 < record["metrics"]["loss"] < 3
    code, _, err = run("evaluate", f"--workdir={workdir}", "--config.eval.samples=10", cache_dir=cache_dir)
    assert code == 2 and "eval.reference: empty, expected an npz" in err
    code, _, err = run("sample", f"--workdir={workdir}", f"--out={tmp_path}/x.npz", cache_dir=cache_dir)
    assert (
        code == 2
        and "autoencoder.folder: found none for a model of latents" in err
        and not os.path.exists(f"{tmp_path}/x.npz")
    )


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"scale": 0.5}, "autoencoder.scale: the folder has (1.0,), the command (0.5,)"),
        ({"autoencoder_sha256": "1" * 64}, "data.latents: autoencoder_sha256: found '1111"),
        ({"dtype": "bfloat16"}, "data.latents: sha256: found"),
    ],
)
def test_a_run_does_not_go_on_with_other_latents(trained, tmp_path, data_dir, cache_dir, changes, message):
    for split in ("train", "test"):
        encode(tmp_path, data_dir, split, **changes)
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    code, _, err = run("train", *arguments(workdir, tmp_path, steps=30), cache_dir=cache_dir)
    assert code == 2 and message in err, err


@pytest.mark.parametrize(
    "more,message",
    [
        (["--config.model.input_size=8"], "model.input_size: found 8, expected 4"),
        (["--config.model.classes=11"], "model.classes: found 11, expected 10"),
        (["--config.data.held_out_split=train"], "data.held_out_split: found 'train', which shares images"),
        (["--config.data.latents=/nowhere"], "/nowhere"),
    ],
)
def test_latents_that_do_not_fit_are_named(latents, tmp_path, cache_dir, more, message):
    code, _, err = run("train", *arguments(tmp_path / "run", latents, *more), cache_dir=cache_dir)
    assert code == 2 and message in err and len(err.splitlines()) == 1, err
    assert not (tmp_path / "run").exists()


def test_splits_of_two_autoencoders_are_refused(latents, tmp_path, data_dir, cache_dir):
    shutil.copytree(latents / "train", tmp_path / "train")
    encode(tmp_path, data_dir, "test", autoencoder_sha256="2" * 64)
    code, _, err = run("train", *arguments(tmp_path / "run", tmp_path), cache_dir=cache_dir)
    assert code == 2 and "autoencoder_sha256" in err and "encode again" in err


def spoil(path):
    """Overwrites the middle of one record of a shard. Returns its number there."""
    reader = ArrayRecordReader(str(path))
    record = reader.read([3])[0]
    data = path.read_bytes()
    at = data.find(record[20:60])
    assert at > 0, "the shard is compressed"
    path.write_bytes(data[:at] + bytes(40) + data[at + 40 :])


@pytest.mark.slow
def test_malformed_records_end_a_run_unless_they_may_be_left_out(latents, tmp_path, cache_dir):
    root = tmp_path / "latents"
    shutil.copytree(latents, root)
    spoil(sorted((root / "train").glob("*.array_record"))[1])
    every = arguments(tmp_path / "run", root, "--config.data.cache=False", steps=110)  # more than one epoch
    code, _, err = run("train", *every, cache_dir=cache_dir)
    assert code == 2 and re.search(r"error: latents .*latents-00001-of-\d+\.array_record, record \d+: ", err), err
    code, _, err = run("train", *every, "--config.data.skip_bad=100", cache_dir=cache_dir)
    assert code == 0 and re.search(r"warning: record \d+ was left out: latents .*latents-00001-of-", err), err
