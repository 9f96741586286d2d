"""The forms in which people have weights, made without PyTorch: groups, prefixes, shards, halves; and what names cannot say."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest
from converted import TINY, random_params, same
from foreign import write_diffusers_dit, write_vae
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_vae import SMALL, drawn

from dit_jax import checkpoint
from dit_jax.config import AutoencoderConfig, Config, DataConfig, DiffusionConfig, SampleConfig, TrainConfig, to_dict
from dit_jax.error import JobError, UsageError
from dit_jax.models import vae
from dit_jax.networks import dit as published
from dit_jax.networks import encoding, folder, locate, notes, transfer
from dit_jax.networks import vae as foreign
from dit_jax.networks.tensors import Tensors
from dit_jax.workdir.folder import read_config

STEM = locate.STEM
ARRAYS = published.write(TINY, random_params())
OTHERS = published.write(TINY, random_params(seed=1))


def prefixed(prefix, arrays):
    return {prefix + name: values for name, values in arrays.items()}


def read(path, marker="dit", part="transformer", item=""):
    """(tensors, what is said of them) of a file or folder."""
    tensors, _, line = locate.read(locate.find(str(path), part), transfer.MARKERS[marker], item)
    return tensors.arrays, line


def equal(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "state_dict.", "state_dict.model.", "model._orig_mod."]
)
def test_wrappers_of_names_say_nothing(tmp_path, prefix):
    save_file(prefixed(prefix, ARRAYS), tmp_path / "x.safetensors")
    equal(read(tmp_path / "x.safetensors")[0], ARRAYS)


def test_of_weights_and_their_average_the_average_is_taken_and_said(tmp_path):
    path, rest = tmp_path / "x.safetensors", {"opt.state.0.step": np.ones(()), "train_steps": np.ones(())}
    save_file({**prefixed("model.module.", ARRAYS), **prefixed("ema.", OTHERS), **rest}, path)
    found, line = read(path)
    equal(found, OTHERS)
    assert line == f"{path}: 32 tensors of float32, ema of the file's groups"
    equal(read(path, item="ema")[0], OTHERS)
    equal(read(path, item="params")[0], ARRAYS)
    save_file(prefixed("model.", ARRAYS), path)
    equal(read(path)[0], ARRAYS)
    with pytest.raises(UsageError, match=r"--item: found weights 'model', expected one ema among several"):
        read(path, item="ema")
    save_file({**prefixed("ema_a.", ARRAYS), **prefixed("ema_b.", OTHERS)}, path)
    with pytest.raises(UsageError, match=r"--item: found weights 'ema_a', 'ema_b', expected one ema among several"):
        read(path)
    save_file({**ARRAYS, **prefixed("module.", ARRAYS)}, path)
    with pytest.raises(UsageError, match="the same tensors with and without"):
        read(path)


def sharded(root, arrays, variant="", count=3):
    """A folder of diffusers in shards, with its index."""
    names, weight_map = sorted(arrays), {}
    root.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        file = f"{STEM}{variant}-{i + 1:05d}-of-{count:05d}.safetensors"
        save_file({name: arrays[name] for name in names[i::count]}, root / file)
        weight_map |= dict.fromkeys(names[i::count], file)
    index = root / f"{STEM}.safetensors.index{variant}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def test_folders_of_diffusers_in_shards_in_half_and_in_a_pipeline(tmp_path):
    arrays, config = write_diffusers_dit(TINY, random_params())
    half = {name: values.astype(np.float16) for name, values in arrays.items()}
    for number, (make, expected) in enumerate(
        [
            (lambda root: sharded(root, arrays), arrays),
            (lambda root: sharded(root, half, ".fp16"), half),
            (lambda root: save_file(half, root / f"{STEM}.fp16.safetensors"), half),
            (lambda root: [save_file(half, root / f"{STEM}.fp16.safetensors"), sharded(root, arrays)], arrays),
        ]
    ):
        pipeline = tmp_path / str(number)
        (pipeline / "transformer").mkdir(parents=True)
        (pipeline / "transformer" / "config.json").write_text(json.dumps(config))
        make(pipeline / "transformer")
        for where in (pipeline, pipeline / "transformer"):
            equal(read(where, "diffusers")[0], expected)
    out = tmp_path / "w"
    transfer.import_dit("diffusers", str(tmp_path / "0"), str(out))
    same(jax.tree.map(np.asarray, checkpoint.load(str(out))[1]), random_params())
    source = checkpoint.read_meta(str(out), 0)["source"]
    assert source["file"] == f"{STEM}.safetensors.index.json" and len(source["sha256"]) == 64
    transfer.import_dit("diffusers", str(tmp_path / "0"), str(out))  # done before
    shard = sorted((tmp_path / "0" / "transformer").glob("*-00002-*"))[0]
    save_file({name: values + 1 for name, values in load_file(shard).items()}, shard)
    with pytest.raises(UsageError, match="holds other weights"):
        transfer.import_dit("diffusers", str(tmp_path / "0"), str(out))


def test_an_index_that_lies_is_refused(tmp_path):
    arrays, _ = write_diffusers_dit(TINY, random_params())
    index = sharded(tmp_path, arrays)
    whole = json.loads(index.read_text())["weight_map"]
    name, files = next(iter(whole)), sorted(set(whole.values()))
    for changed, message in (
        ({**whole, name: "../secret.safetensors"}, "expected one of this folder"),
        ({**whole, name: "/etc/passwd"}, "expected one of this folder"),
        ({**whole, name: 3}, "expected one of this folder"),
        ({**whole, name: "gone.safetensors"}, "does not place there|no such file"),
        ({**whole, name: next(f for f in files if f != whole[name])}, "does not place there"),
        ({**whole, "extra": files[0]}, f"extra: missing from {files[0]}"),
        ([], "expected a file for each tensor"),
    ):
        index.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(UsageError, match=message):
            read(tmp_path, "diffusers")


# what the names cannot say

FLOW = Config(
    model=dataclasses.replace(TINY, learn_sigma=False, dtype="bfloat16"),
    diffusion=DiffusionConfig(process="flow", time_law="logit_normal", logit_mean=0.5),
    data=DataConfig(image_size=8, data_dir="/home/me/data"),
    train=TrainConfig(steps=70, cond_dropout=0.0),
    sample=SampleConfig(sampler="heun", steps=7),
)
LATENTS = dataclasses.replace(
    FLOW,
    model=TINY,
    diffusion=DiffusionConfig(schedule="cosine"),
    data=DataConfig(image_size=64, latents="/home/me/latents"),
    train=TrainConfig(steps=70),
    autoencoder=AutoencoderConfig(folder="/home/me/vae", scale=(1.0, 2.0, 3.0), shift=(0.5,)),
)


def make_run(folder, cfg):
    """A run folder of weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"config": to_dict(cfg)}))
    (folder / "checkpoints").mkdir()
    checkpoint.write_weights(str(folder), 70, cfg.model, random_params(cfg.model), {})
    return str(folder)


@pytest.mark.parametrize("form", ["dit.safetensors", "transformer"])
@pytest.mark.parametrize(
    "cfg,unsaid",
    [
        (FLOW, ["diffusion.process is 'flow'", "the model sees pixels, not latents"]),
        (LATENTS, ["diffusion.schedule is 'cosine'"]),
    ],
    ids=["flow", "latents"],
)
def test_an_exported_run_comes_back_as_the_run_it_was(tmp_path, monkeypatch, caplog, cfg, unsaid, form):
    run, out, back = make_run(tmp_path / "run", cfg), str(tmp_path / form), str(tmp_path / "back")
    monkeypatch.setattr(logging.getLogger("dit_jax"), "propagate", True)
    transfer.export_dit(run, out)
    transfer.export_dit(run, out)
    assert "done before, from the same weights" in caplog.text
    for reason in unsaid:
        assert f"other programs will not see that {reason}" in caplog.text
    source = "dit" if form.endswith("s") else "diffusers"
    assert ("the null row was never trained" in caplog.text) == (source == "diffusers" and cfg is FLOW)
    caplog.clear()
    transfer.import_dit(source, out, back)
    found = read_config(back)
    for group in notes.GROUPS:
        changes = {name: "" for other, name in notes.LOCAL if other == group}
        assert getattr(found, group) == dataclasses.replace(getattr(cfg, group), **changes)
    model, params = checkpoint.load(back, 70)
    assert model == cfg.model
    expected = random_params(cfg.model)
    if source == "dit" and cfg is FLOW:  # its null row was not exported
        expected["label_embedding"]["table"]["embedding"][-1] = 0
    same(jax.tree.map(np.asarray, params), expected)
    kind = "flow of pixels of images of 8 pixels" if cfg is FLOW else "ddpm of latents of images of 64 pixels"
    assert f"{kind} (by its notes)" in caplog.text
    with safe_open(out if source == "dit" else f"{out}/{STEM}.safetensors", "numpy") as file:
        stated = json.loads(file.metadata()["dit_jax"])
    assert (stated["input"], stated["null"]) == (("pixels", False) if cfg is FLOW else ("latents", True))
    assert "/home/me" not in json.dumps(stated)


def test_what_a_file_does_not_say_is_said_to_be_assumed(tmp_path, monkeypatch, caplog):
    save_file(ARRAYS, tmp_path / "x.safetensors")
    monkeypatch.setattr(logging.getLogger("dit_jax"), "propagate", True)
    transfer.import_dit("dit", str(tmp_path / "x.safetensors"), str(tmp_path / "w"), heads=2, classes=5)
    assert "ddpm of latents of images of 64 pixels (as published, for the file does not say)" in caplog.text
    assert "5 classes, and a null class (by --classes)" in caplog.text and "32 tensors of float32" in caplog.text


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda n: {**n, "config": {"modle": {}}}, "modle: unknown config key"),
        (lambda n: {**n, "config": {**n["config"], "model": {**n["config"]["model"], "depth": 4}}}, "found 4 in its notes, expected 2"),
        (lambda n: {**n, "step": "many"}, "found step 'many'"), (lambda n: {**n, "null": 1}, "and null 1"),
        (lambda n: [n], "its notes"), (lambda n: {"config": {}}, "its notes"),
    ],
)  # fmt: skip
def test_notes_that_lie_or_are_broken_are_refused(tmp_path, change, message):
    said = notes.write(LATENTS, 7)
    said["dit_jax"] = json.dumps(change(json.loads(said["dit_jax"])))
    save_file(ARRAYS, tmp_path / "x.safetensors", said)
    with pytest.raises(UsageError, match=message):
        transfer.import_dit("dit", str(tmp_path / "x.safetensors"), str(tmp_path / "w"), classes=5)
    assert not (tmp_path / "w").exists()


def test_an_export_overwrites_nothing_and_leaves_nothing(tmp_path):
    run = make_run(tmp_path / "run", LATENTS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    for out in ("mine", "x.pt", "gone/x.safetensors"):
        with pytest.raises(UsageError, match="--out"):
            transfer.export_dit(run, str(tmp_path / out))
    (tmp_path / "blocked").write_text("mine")
    with pytest.raises((UsageError, JobError)):
        transfer.export_dit(run, str(tmp_path / "blocked"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blocked", "mine", "run"]


# autoencoders

SIXTEEN = vae.VAEConfig(latent_channels=16, widths=(8, 16), blocks=1, groups=4, quant=False, scale=1.5305, shift=0.0609)
DESCRIBED = {
    "_class_name": "AutoencoderKL", "norm_num_groups": 4, "scaling_factor": 1.5305, "shift_factor": 0.0609, "latents_mean": None
}  # fmt: skip


def test_an_autoencoder_without_quant_convolutions_has_its_own_normalisation(tmp_path):
    params = drawn(SIXTEEN)
    assert "quant_conv" not in params["encoder"] and "post_quant_conv" not in params["decoder"]
    arrays = write_vae(SIXTEEN, params)
    found, again = foreign.read(Tensors(arrays, "F"), config=DESCRIBED)
    assert found == SIXTEEN
    same(again, params)
    assert foreign.read(Tensors(arrays, "F"), groups=4)[0].scale == 0  # unknown: neither SD3's nor FLUX's is guessed
    assert foreign.read(Tensors(write_vae(SMALL, drawn(SMALL)), "F"), groups=4)[0].scale == 0.18215
    (tmp_path / "pipeline" / "vae").mkdir(parents=True)
    (tmp_path / "pipeline" / "vae" / "config.json").write_text(json.dumps(DESCRIBED))
    sharded(tmp_path / "pipeline" / "vae", arrays)
    transfer.import_network("sd-vae", str(tmp_path / "pipeline"), str(tmp_path / "n"))
    config, loaded, _ = folder.load_network(str(tmp_path / "n"), "sd-vae")
    assert config == {**dataclasses.asdict(SIXTEEN), "widths": [8, 16]}
    same(loaded, params)


@pytest.mark.parametrize(
    "key,value", [("_class_name", "AutoencoderTiny"), ("act_fn", "relu"), ("mid_block_add_attention", False), ("latents_mean", [0.1])]
)  # fmt: skip
def test_a_config_of_another_autoencoder_is_refused(key, value):
    with pytest.raises(UsageError, match=f"F: config.json: {key}: found"):
        foreign.read(Tensors({}, "F"), config={**DESCRIBED, key: value})


@pytest.mark.parametrize(
    "own,config,expected",
    [
        ((1.5305, 0.0609), {}, (1.5305, 0.0609)), ((1.5305, 0.0609), {"scale": (2.0,)}, (2.0, 0.0)),
        ((0.18215, 0.0), {}, (0.18215, 0.0)), ((0.0, 0.0), {"scale": (2.0,)}, (2.0, 0.0)), ((0.0, 0.0), {}, None),
    ],
)  # fmt: skip
def test_latents_are_noted_with_the_configs_normalisation_else_the_autoencoders_own(tmp_path, own, config, expected):
    network = dataclasses.replace(SIXTEEN, scale=own[0], shift=own[1])
    source = {"file": "x", "sha256": "0" * 64, "format": "sd-vae"}
    folder.save_network(str(tmp_path / "n"), "sd-vae", dataclasses.asdict(network), drawn(SIXTEEN), source)
    model = dataclasses.replace(TINY, channels=16, input_size=4)
    cfg = Config(model=model, autoencoder=AutoencoderConfig(folder=str(tmp_path / "n"), **config))
    if expected is None:
        with pytest.raises(UsageError, match=r"autoencoder.scale: found none for .*n', whose file did not say it"):
            encoding.open_job(cfg, "float32", whiten=False)
        cfg, expected = cfg, (0.18215, 0.0)
    job = encoding.open_job(cfg, "float32", whiten=expected == (0.18215, 0.0) and own[0] == 0)
    assert (job.autoencoder.normalisation.scale, job.autoencoder.normalisation.shift) == expected
