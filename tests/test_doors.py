"""The same 200 pictures through every door of the data: one order on any number of hosts, and kills that change no bit."""

import dataclasses
import functools
import signal
import time

import jax
import numpy as np
import photos
import pytest
import tensorflow_datasets as tfds
from job import Job, run, steps_logged
from photos import CLASSES, NETWORK, as_folder, as_parquet, as_tars, picture
from runs import assert_same_run, saved, scalars, train
from test_hosts import train_on
from test_records import copy

from dit_jax.config import DataConfig
from dit_jax.models import vae
from dit_jax.networks.folder import save_network

pytestmark = [pytest.mark.doors, pytest.mark.timeout(900)]
TRAIN, TEST, STEPS, BATCH = 170, 30, 30, 16
SIZE = 8


def rows(split):
    """(class, name of the file, bytes) of 170 pictures to train on, or of 30 others, in order of their paths."""
    numbers = range(TRAIN) if split == "train" else range(TRAIN, TRAIN + TEST)
    found = [(CLASSES[i % 2], f"{i:03d}.{picture(i)[1]}", picture(i)[0]) for i in numbers]
    return sorted(found, key=lambda row: row[:2])


@pytest.fixture(scope="module")
def doors(tmp_path_factory):
    """Door -> the settings of `data` that open it, all with the same pictures; a mixture has some of them again, as another part."""
    root = tmp_path_factory.mktemp("doors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photos, "rows", rows)
        forms = {"folder": as_folder, "tars": as_tars, "parquet": as_parquet}
        for name, write in forms.items():
            (root / name).mkdir()
            write(root / name)
        photos.Pets(data_dir=root / "tfds", file_format="array_record").download_and_prepare()
    found = {name: {"folder": str(root / name)} for name in forms}
    found["tfds"] = {"dataset": "pets", "data_dir": str(root / "tfds")}
    copy(DataConfig(folder=str(root / "folder"), image_size=SIZE), root / "copy", shard_bytes=20_000)
    found["copy"] = {"folder": str(root / "copy")}
    found["crops"] = found["folder"] | {"crop": "random"}
    found["buckets"] = found["folder"] | {"buckets": ((8, 8), (8, 16), (16, 8)), "crop": "random"}
    found["mixture"] = {"mixture": ((3, f"folder={root}/tars"), (1, f"folder={root}/other"))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photos, "rows", lambda split: [(a, f"x{b}", c) for a, b, c in rows(split)[::4]])
        (root / "other").mkdir()
        as_folder(root / "other")
    return found


SAME = ("folder", "tars", "parquet", "tfds", "copy")  # doors that give the same batches
DOORS = (*SAME, "crops", "buckets", "mixture")


def config(settings, **changes):
    return DataConfig(**{"image_size": SIZE, "flip": True, "cache": False, "workers": 0} | settings | changes)


batches = functools.partial(photos.batches, batch_size=BATCH)


@pytest.mark.parametrize("door", SAME[1:])
def test_all_doors_give_the_same_batches_bit_for_bit(doors, door):
    count = 3 * TRAIN // BATCH  # three epochs
    for changes in ({}, {"cache": True}, {"workers": 3}):
        found, expected = (batches(config(doors[name], **changes), count)[0] for name in (door, "folder"))
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("door", DOORS)
def test_one_two_and_four_processes_have_one_order_and_go_on_from_any_position(doors, door):
    data, count = config(doors[door]), 26  # more than two epochs
    whole, _ = batches(data, count)
    for processes in (2, 4):
        parts = [batches(data, count, process_index=i, process_count=processes)[0] for i in range(processes)]
        jax.tree.map(lambda one, *some: np.testing.assert_array_equal(one, np.concatenate(some)), whole, *parts)
    for done in (1, 10, 11, 25):
        state = batches(data, done)[1]
        jax.tree.map(np.testing.assert_array_equal, batches(data, count - done, start=state)[0], whole[done:])


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae") / "net"
    params = jax.tree.map(np.asarray, vae.init(NETWORK, jax.random.key(0)))
    source = {"file": "tiny.safetensors", "sha256": "0" * 64, "format": "sd-vae"}
    save_network(str(folder), "sd-vae", dataclasses.asdict(NETWORK), params, source)
    return folder


def flags(doors, door, network, cache_dir, tmp_path):
    """Flags of a training through a door; `latents` and `in_step` are of pictures of 16 pixels."""
    size = 16 if door in ("latents", "in_step") else SIZE
    settings = {"image_size": size, "flip": True, "cache": False} | doors.get(door, doors["folder"])
    of_latents = {"input_size": size // NETWORK.factor, "channels": 4, "patch": 1}
    model = {"classes": 2, "channels": 3} | (of_latents if size == 16 else {})
    found = [f"--config.data.{key}={value}" for key, value in settings.items()]
    found += [f"--config.model.{key}={value}" for key, value in model.items()]
    if size == 16:
        found += [f"--config.autoencoder.folder={network}"]
    if door == "in_step":
        found += ["--config.data.encode=in_step"]
    if door == "latents":
        out = tmp_path / "latents"
        command = ["--config=configs/digits.py", *found, f"--out={out}"]
        code, _, err = run("encode", *command, cache_dir=cache_dir)
        assert code == 0, err
        found += [f"--config.data.latents={out}"]
    return found


@pytest.mark.parametrize("door", [*DOORS, "latents", "in_step"])
def test_kills_change_no_bit(doors, door, network, cache_dir, tmp_path):
    """A training that is killed twice, once by SIGTERM, ends in the bits of one that is not."""
    chosen = flags(doors, door, network, cache_dir, tmp_path)
    start = functools.partial(Job, "train", cache_dir=cache_dir, devices=1)
    whole, killed = (
        train(tmp_path / name, *chosen, "--config.train.checkpoint_every=5", steps=STEPS)
        for name in ("whole", "killed")
    )
    code, _, err = run("train", *whole, cache_dir=cache_dir, devices=1)
    assert code == 0, err
    for signals, at in ((signal.SIGKILL, 8), (signal.SIGTERM, 16)):
        job = start(*killed)
        end = time.monotonic() + 200
        while steps_logged(tmp_path / "killed") < at and job.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.005)
        job.send_signal(signals)
        job.communicate(100)
    code, _, err = run("train", *killed, cache_dir=cache_dir, devices=1)
    assert code == 0, err
    assert_same_run(tmp_path / "whole", tmp_path / "killed", STEPS)


@pytest.mark.parametrize("door", ["folder", "tfds", "mixture", "buckets", "latents", "in_step"])
def test_jobs_of_one_two_and_four_processes_train_alike(doors, door, network, cache_dir, tmp_path):
    """Losses of each step to 1e-5, which another order of the images would change by far more, and one position in the data."""
    chosen, found = flags(doors, door, network, cache_dir, tmp_path), []
    for count in (1, 2, 4):
        train_on(count, tmp_path / str(count), cache_dir, *chosen)
        found.append((scalars(tmp_path / str(count)), saved(tmp_path / str(count), STEPS)["data"]))
    losses = [[line["loss"] for line in lines] for lines, _ in found]
    assert len(losses[0]) == STEPS and np.std(losses[0]) > 0.01
    for other, (_, position) in zip(losses[1:], found[1:], strict=True):
        np.testing.assert_allclose(other, losses[0], rtol=1e-5)
        assert position == found[0][1]


def test_there_are_200_pictures(doors):
    assert sum(len(rows(split)) for split in ("train", "test")) == 200
    assert tfds.builder("pets", data_dir=doors["tfds"]["data_dir"]).info.splits["train"].num_examples == TRAIN
