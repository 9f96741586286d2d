"""The road from images to latents and back: what `encode` stores is the posterior of each image, whatever computes it or kills it."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import time
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from job import Job, run
from runs import train

from dit_jax.config import AutoencoderConfig, Config, DataConfig, MeshConfig, ModelConfig
from dit_jax.data import tfds
from dit_jax.data.latent_notes import read_info
from dit_jax.data.latents import open_latents
from dit_jax.data.pipeline import load_arrays, make_batches
from dit_jax.data.posterior import deviations, posterior_mean
from dit_jax.data.source import open_source
from dit_jax.devices.mesh import make_mesh
from dit_jax.error import Interrupted, UsageError
from dit_jax.models import vae
from dit_jax.networks import encoding
from dit_jax.networks.autoencoder import follow_latents, images_at_once, make_encoder, open_autoencoder
from dit_jax.networks.folder import save_network
from dit_jax.workdir.folder import read_config

TINY = vae.VAEConfig(channels=1, widths=(8, 8), groups=4, blocks=1)
TRAIN, TEST = "train[:205]", "test[:50]"  # 205: no number of devices divides it
MODEL = ["--config.model.input_size=4", "--config.model.channels=4", "--config.model.patch=1"]
DATA = [f"--config.data.split={TRAIN}", f"--config.data.held_out_split={TEST}"]


def save_vae(folder, seed):
    params = jax.tree.map(np.asarray, vae.init(TINY, jax.random.key(seed)))
    source = {"file": "tiny.safetensors", "sha256": "0" * 64, "format": "sd-vae"}
    save_network(str(folder), "sd-vae", dataclasses.asdict(TINY), params, source)
    return params


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A tiny autoencoder: its folder, and its parameters."""
    folder = tmp_path_factory.mktemp("networks") / "tiny"
    return folder, save_vae(folder, 0)


def command(network, out, *more):
    return ["--config=configs/digits.py", f"--autoencoder={network[0]}", f"--out={out}", *MODEL, *DATA, *more]


def config(network, **changes):
    """The same config in this process."""
    data = DataConfig(split=TRAIN, held_out_split=TEST, flip=True)
    model = ModelConfig(input_size=4, channels=4, patch=1, width=16, heads=2, classes=10, learn_sigma=False)
    cfg = Config(model=model, data=data, autoencoder=AutoencoderConfig(folder=str(network[0])))
    groups = {"data": cfg.data, "autoencoder": cfg.autoencoder}
    return dataclasses.replace(cfg, **{k: dataclasses.replace(groups[k], **v) for k, v in changes.items()})


FLOATS = ["--dtype=float32", "--config.data.flip=True"]


@pytest.fixture(scope="module")
def plain(network, tmp_path_factory, data_dir, cache_dir):
    """Both splits in float32, with mirrored copies, normalised as is published; encoded on 2 devices."""
    out = tmp_path_factory.mktemp("plain") / "latents"
    code, said, err = run("encode", *command(network, out, *FLOATS), cache_dir=cache_dir, devices=2)
    assert code == 0, err
    assert said.splitlines() == [f"{out}/{TRAIN}", f"{out}/{TEST}"]
    return out


@pytest.fixture(scope="module")
def whitened(network, tmp_path_factory, data_dir, cache_dir):
    """Both splits in float16, no mirrored copies, whitened."""
    out = tmp_path_factory.mktemp("whitened") / "latents"
    code, _, err = run("encode", *command(network, out, "--whiten"), cache_dir=cache_dir, devices=2)
    assert code == 0, err
    return out


@pytest.mark.parametrize("split", [TRAIN, TEST])
def test_records_are_the_posteriors_of_images_and_mirror_images(plain, network, split):
    images, cond = load_arrays(DataConfig(), split)
    found = open_latents(f"{plain}/{split}", verify=True)
    values, stored = found.read(np.arange(len(found)))
    encoder = jax.jit(functools.partial(vae.encode, TINY, network[1]))
    np.testing.assert_array_equal(stored["label"], cond["label"])
    assert values.shape == (len(images), 2, 2, 4, 4, 4) and values.dtype == np.float32
    for copy, shown in enumerate((images, images[:, :, ::-1])):
        for i in range(0, len(images), 5):
            expected = np.stack(encoder(shown[i : i + 5]), axis=1)
            np.testing.assert_allclose(values[i : i + 5, copy], expected, rtol=1e-5, atol=1e-5)
    assert np.abs(values[:, 0] - values[:, 1]).max() > 0.1


def test_the_notes_say_what_the_latents_are(plain, network, data_dir):
    info = read_info(f"{plain}/{TRAIN}")
    assert (info.shape, info.dtype, info.moments, info.mirrored) == ((4, 4, 4), "float32", True, True)
    assert (info.scale, info.shift, info.classes, info.image_size) == (0.18215, 0.0, 10, 8)
    assert (info.dataset, info.split, info.autoencoder) == ("digits", TRAIN, "tiny")
    assert info.source_sha256 == open_source(DataConfig(data_dir=data_dir), TRAIN).describe()["sha256"]
    assert info.autoencoder_sha256 == json.loads((network[0] / "meta.json").read_text())["sha256"]


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_latents_are_bitwise_those_of_other_device_counts(plain, network, tmp_path, cache_dir, devices):
    once = [f"--split={TRAIN}", "--config.data.workers=0"]
    code, _, err = run("encode", *command(network, tmp_path, *FLOATS, *once), cache_dir=cache_dir, devices=devices)
    assert code == 0, err
    assert open_latents(f"{tmp_path}/{TRAIN}").content == open_latents(f"{plain}/{TRAIN}").content


def test_a_latent_does_not_depend_on_the_images_beside_it(network, data_dir):
    autoencoder, mesh = open_autoencoder(config(network)), make_mesh(MeshConfig(), jax.devices()[:2])
    images, _ = load_arrays(DataConfig(), TEST)
    encoder, rows = make_encoder(autoencoder, mesh), images_at_once(mesh)
    whole = np.asarray(encoder(images[:rows]))
    np.testing.assert_array_equal(np.asarray(encoder(images[3:5]))[:2], whole[3:5])
    np.testing.assert_array_equal(np.asarray(encoder(images[rows - 1 : 2 * rows - 1]))[0], whole[-1])


def test_float16_is_the_same_rounded(plain, network, tmp_path, data_dir):
    job = encoding.open_job(config(network), "float16", whiten=False)
    encoding.encode_splits(job, str(tmp_path), [TEST], 1 << 30, [])
    half, single = (open_latents(f"{out}/{TEST}") for out in (tmp_path, plain))
    assert half.info.dtype == "float16" and half.info.source_sha256 == single.info.source_sha256
    expected = single.read(np.arange(50))[0].astype(np.float16)
    np.testing.assert_array_equal(half.read(np.arange(50))[0], expected)


def test_whitened_channels_have_mean_0_and_variance_1(whitened, data_dir):
    found = open_latents(f"{whitened}/{TRAIN}")
    values, _ = found.read(np.arange(len(found)))
    means = posterior_mean(found.info, values).astype(np.float64)
    variances = (deviations(values[:, 0, 1]).astype(np.float64) * found.info.scale) ** 2
    np.testing.assert_allclose(means.mean(axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(means.var(axis=(0, 1, 2)) + variances.mean(axis=(0, 1, 2)), 1, rtol=1e-5)
    assert len(set(found.info.scale)) == len(set(found.info.shift)) == 4
    assert read_info(f"{whitened}/{TEST}").normalisation == found.info.normalisation
    data = config((whitened,), data={"latents": str(whitened), "flip": False}).data
    drawn = next(make_batches(data, batch_size=8 * 205, seed=0))["image"]  # 8 epochs
    np.testing.assert_allclose(drawn.mean(axis=(0, 1, 2)), 0, atol=0.02)
    np.testing.assert_allclose(drawn.std(axis=(0, 1, 2)), 1, atol=0.02)


@pytest.fixture(scope="module")
def trained(whitened, tmp_path_factory, cache_dir):
    """A run of 5 steps on the whitened latents."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    command = train(workdir, *MODEL, *DATA, f"--config.data.latents={whitened}", steps=5)
    code, _, err = run("train", *command, cache_dir=cache_dir)
    assert code == 0, err
    return workdir


def npz(path):
    with zipfile.ZipFile(path) as archive, np.load(path) as arrays:
        return arrays["arr_0"], arrays["arr_1"], json.loads(archive.comment)


def test_images_come_out_of_a_model_of_latents(trained, whitened, network, tmp_path, cache_dir):
    """Also where the latents are not at hand; and the same on 1 and 2 devices."""
    found, away = [], "--config.data.latents=/gone"
    for devices in (1, 2):
        out = tmp_path / f"{devices}.npz"
        how = [
            f"--autoencoder={network[0]}",
            "--num=5",
            "--sampler=euler",
            "--steps=2",
            "--guidance=1",
            f"--out={out}",
            away,
        ]
        code, _, err = run("sample", f"--workdir={trained}", *how, cache_dir=cache_dir, devices=devices)
        assert code == 0, err
        found.append(npz(out))
    (images, labels, job), (others, other_labels, _) = found
    assert images.shape == (5, 8, 8, 1) and images.dtype == np.uint8 and len(np.unique(images)) > 20
    np.testing.assert_array_equal(images, others)
    np.testing.assert_array_equal(labels, other_labels)
    assert job["autoencoder.latents"] == read_info(f"{whitened}/{TRAIN}").normalisation


def test_a_run_keeps_how_its_latents_are_normalised(trained, whitened):
    info, kept = read_info(f"{whitened}/{TRAIN}"), read_config(str(trained)).autoencoder
    assert (kept.scale, kept.shift) == (info.scale, info.shift) and len(kept.scale) == 4


def test_another_normalisation_is_refused_by_both_jobs(trained, whitened, network, tmp_path, cache_dir):
    other = "--config.autoencoder.scale=(0.5,)"
    latents = [*MODEL, *DATA, f"--config.data.latents={whitened}"]
    code, _, err = run("train", *train(tmp_path / "run", *latents, other, steps=5), cache_dir=cache_dir)
    scale = str(read_info(f"{whitened}/{TRAIN}").scale)
    assert code == 2 and f"autoencoder.scale: found (0.5,), expected {scale}, that of the latents" in err
    assert err.count("\n") == 1 and not (tmp_path / "run").exists()
    how = [f"--workdir={trained}", f"--autoencoder={network[0]}", f"--out={tmp_path}/x.npz", other]
    code, _, err = run("sample", *how, cache_dir=cache_dir)
    assert code == 2 and f"autoencoder.scale: found (0.5,), expected {scale}" in err and err.count("\n") == 1


def test_only_the_defaults_give_way_to_the_latents(plain, whitened, network):
    for root in (plain, whitened):
        info, cfg = read_info(f"{root}/{TRAIN}"), config(network, data={"latents": str(root)})
        settled = follow_latents(cfg)
        assert settled == follow_latents(settled) and open_autoencoder(settled).normalisation.scale == info.scale
    assert follow_latents(config(network)) == config(network)
    four = config(network, data={"latents": str(plain)}, autoencoder={"scale": (0.18215,) * 4})
    assert follow_latents(four) == four  # the same numbers, said for each channel
    for changes in ({"scale": (0.18215, 0.18215, 0.18215, 0.2)}, {"shift": (0.1,)}, {"scale": (0.18215,) * 3}):
        with pytest.raises(UsageError, match=r"autoencoder.(scale|shift): found \(.*expected 0"):
            follow_latents(config(network, data={"latents": str(plain)}, autoencoder=changes))
    with pytest.raises(UsageError, match=r"autoencoder.scale: found \(0.18215,\), expected \("):
        open_autoencoder(config(network, data={"latents": str(whitened)}))


def test_the_same_command_finds_it_done(plain, whitened, network, cache_dir):
    for out, how in ((plain, FLOATS), (whitened, ["--whiten"])):
        before = {path: path.stat().st_mtime_ns for path in Path(out).rglob("*")}
        code, said, err = run("encode", *command(network, out, *how), cache_dir=cache_dir)
        assert (code, err) == (0, f"{out}/{TRAIN}: done before\n{out}/{TEST}: done before\n")
        assert said.splitlines() == [f"{out}/{TRAIN}", f"{out}/{TEST}"]
        assert {path: path.stat().st_mtime_ns for path in Path(out).rglob("*")} == before


def error(network, out, splits=(TRAIN, TEST), dtype="float32", whiten=False, **changes):
    """The message of a command that is refused."""
    with pytest.raises(UsageError) as found:
        encoding.encode_splits(
            encoding.open_job(config(network, **changes), dtype, whiten), str(out), list(splits), 99, []
        )
    return str(found.value)


def test_other_latents_are_refused(plain, whitened, network, tmp_path):
    for changes, message in (
        ({"dtype": "float16"}, "dtype: found 'float32', this command has 'float16'"),
        ({"data": {"flip": False}}, "mirrored: found True, this command has False"),
        ({"autoencoder": {"shift": (1.0,)}}, "shift: found 0.0, this command has 1.0"),
        ({"whiten": True}, "holds latents of scale 0.18215, expected whitened ones"),
    ):
        assert message in error(network, plain, **changes) and "use another --out" in error(network, plain, **changes)
    assert "scale: found (" in error(network, whitened, dtype="float16", data={"flip": False})
    save_vae(tmp_path / "other", 1)
    assert "autoencoder_sha256: found" in error((tmp_path / "other",), plain)
    shutil.copytree(plain / TEST, tmp_path / "test" / TEST)
    assert f"no latents of '{TRAIN}', expected those first" in error(network, tmp_path / "test", whiten=True)
    assert f"no latents of '{TRAIN}', expected those first" in error(network, tmp_path / "new", [TEST], whiten=True)
    assert not (tmp_path / "new").exists()


def encode_without(network, out, bad, skip_bad, monkeypatch):
    """Encode TEST, whose images `bad` cannot be decoded."""
    checked = tfds.Records._checked

    def some(self, index, record, shape):
        if index in bad:
            raise UsageError(f"record {index}: cannot decode the image")
        return checked(self, index, record, shape)

    with monkeypatch.context() as patch:
        patch.setattr(tfds.Records, "_checked", some)
        job = encoding.open_job(config(network, data={"skip_bad": skip_bad}), "float32", whiten=False)
        encoding.encode_splits(job, str(out), [TEST], 1 << 30, [])


@pytest.mark.parametrize("bad", [(0, 7, 8, 49), tuple(range(33))], ids=["some", "a whole batch"])
def test_malformed_images_are_left_out_and_the_others_keep_their_place(
    network, plain, tmp_path, monkeypatch, capfd, bad
):
    kept = np.array([i for i in range(50) if i not in bad])
    with pytest.raises(UsageError, match=rf"data.skip_bad: found {len(bad)} malformed records, expected at most"):
        encode_without(network, tmp_path / "strict", bad, len(bad) - 1, monkeypatch)
    encode_without(network, tmp_path, bad, len(bad), monkeypatch)
    found, whole = open_latents(f"{tmp_path}/{TEST}"), open_latents(f"{plain}/{TEST}")
    for ours, expected in zip(found.read(np.arange(len(kept))), whole.read(kept), strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, expected)
    np.testing.assert_array_equal(found.numbers, kept)
    said = capfd.readouterr().err
    assert f"record {bad[1]} is left out: record {bad[1]}: cannot decode" in said
    assert f"without {len(bad)} malformed records: {bad[0]}, {bad[1]}" in said
    encode_without(network, tmp_path, bad, len(bad), monkeypatch)
    assert f"done before without {len(bad)} malformed records" in capfd.readouterr().err
    for fewer in (0, len(bad) - 1):  # a stricter rerun
        with pytest.raises(
            UsageError, match=rf"data.skip_bad: found {fewer}, expected at least {len(bad)}: .*use another --out"
        ):
            encode_without(network, tmp_path, bad, fewer, monkeypatch)


def test_what_cannot_be_encoded_is_named(network, tmp_path, data_dir):
    out = tmp_path / "out"
    assert error((tmp_path / "none",), out).startswith(f"{tmp_path}/none/meta.json: cannot be read")
    assert error(("",), out).startswith("--dtype=float32: found no --autoencoder, expected one, as it is of latents")
    assert error(("",), out, whiten=True).startswith("--whiten: found no --autoencoder, expected one")
    assert error(network, out, data={"image_size": 9}).startswith("data.image_size: found 9, expected a multiple of 2")
    assert "makes latents of side 8 with 4 channels from images of 16" in error(network, out, data={"image_size": 16})
    assert "found split 'tset'" in error(network, out, ["tset"])
    broken = tmp_path / "tfds"
    shutil.copytree(data_dir, broken)
    for path in broken.rglob("*test.array_record*"):
        path.write_bytes(path.read_bytes()[:-100])
    assert "test.array_record" in error(network, out, data={"data_dir": str(broken)})
    assert not out.exists()


def test_an_error_is_one_line_and_exit_2(plain, network, tmp_path, cache_dir):
    for more, message in (
        (["--config.data.image_size=9"], "data.image_size: found 9"),
        ([f"--autoencoder={tmp_path}"], "meta.json: cannot be read"),
        ([f"--out={plain}"], "holds other latents: dtype"),
    ):
        code, said, err = run("encode", *command(network, tmp_path / "new"), *more, cache_dir=cache_dir)
        assert (code, said, err.count("\n")) == (2, "", 1) and err.startswith("error: ") and message in err
    assert not (tmp_path / "new").exists()


def stopped(number, arguments, folder, cache_dir):
    """Send the job a signal when it has finished two shards. Returns its exit code, or None where it was done before."""
    job = Job("encode", *arguments, cache_dir=cache_dir, devices=2)
    while not (folder / "latents-00001.whole").exists() and job.poll() is None:
        time.sleep(0.001)
    if job.poll() is None:
        job.send_signal(number)
    _, err = job.communicate()
    return (job.returncode, err) if job.returncode else (None, err)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_costs_one_shard_at_most(plain, network, tmp_path, cache_dir, number):
    for attempt in range(10):  # a fast machine may be done before the signal comes
        out = tmp_path / str(attempt)
        arguments = command(network, out, *FLOATS, f"--split={TRAIN}", "--shard_bytes=9000")  # 8 records
        code, err = stopped(number, arguments, out / TRAIN, cache_dir)
        if code is not None:
            break
    assert code == (75 if number == signal.SIGTERM else -number), err
    left = {name: (out / TRAIN / name).stat().st_mtime_ns for name in os.listdir(out / TRAIN)}
    whole = sorted(name for name in left if name.endswith(".whole"))
    assert len(whole) >= 2 and "latents.json" not in left
    with pytest.raises(UsageError, match="the latents are not complete"):
        open_latents(f"{out}/{TRAIN}")
    code, _, err = run("encode", *arguments[:-1], "--shard_bytes=20000", cache_dir=cache_dir, devices=1)
    assert code == 0 and f"{205 - 8 * len(whole)} images to encode, {8 * len(whole)} were before" in err, err
    assert open_latents(f"{out}/{TRAIN}", verify=True).content == open_latents(f"{plain}/{TRAIN}").content
    assert all(name == "latents.json" or name.endswith(".array_record") for name in os.listdir(out / TRAIN))


def test_a_stop_while_the_scale_is_found_loses_no_latent(network, tmp_path):
    """The shards stay, and the same command gives the files of one that was not stopped."""
    folders, whole = [tmp_path / name for name in ("stopped", "whole")], []
    for out in folders:
        job, stop = encoding.open_job(config(network), "float32", whiten=True), []
        try:
            with pytest.MonkeyPatch.context() as patch:
                if out == folders[0]:
                    patch.setattr(encoding, "whitened", lambda records, stop, of=encoding.whitened: of(records, [1]))
                encoding.encode_splits(job, str(out), [TRAIN], 1 << 30, stop)
        except Interrupted as error:
            whole.append(str(error))
            encoding.encode_splits(job, str(out), [TRAIN], 1 << 30, stop)
    assert len(whole) == 1 and "goes on from the shards" in whole[0]
    one, other = ({p.name: p.read_bytes() for p in (out / TRAIN).iterdir()} for out in folders)
    assert one == other
