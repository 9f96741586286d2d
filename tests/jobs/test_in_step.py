"""Runs whose step encodes the images: the same latents, losses and scores as on stored latents, and the encoder is no part of the state."""

import dataclasses
import json
import math
import os
import shutil

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from job import run
from runs import saved, scalars, train
from test_hosts import STEPS, train_on

from dit_jax import checkpoint
from dit_jax.config import (
    AutoencoderConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    model_config,
)
from dit_jax.data.pipeline import load_arrays, make_batches
from dit_jax.data.source import Source, open_source
from dit_jax.devices.mesh import abstract_mesh, make_mesh
from dit_jax.error import UsageError
from dit_jax.models import vae
from dit_jax.networks import encoding
from dit_jax.networks.autoencoder import follow_latents
from dit_jax.networks.folder import save_network
from dit_jax.networks.in_step import encoder_flops, encoder_of, open_splits
from dit_jax.program import autoencoder, program
from dit_jax.training.diagnose import find_layer
from dit_jax.training.state import abstract_state, make_state
from dit_jax.training.step import make_train_step

TINY = vae.VAEConfig(channels=1, widths=(8, 8), groups=4, blocks=1, scale=0.5, shift=0.1)
TRAIN, TEST = "train[:72]", "test[:20]"
MODEL = ["--config.model.input_size=4", "--config.model.channels=4", "--config.model.patch=1"]
DATA = [f"--config.data.split={TRAIN}", f"--config.data.held_out_split={TEST}", "--config.data.flip=True"]


def save_vae(folder, seed, network=TINY):
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.3).astype(np.float32), vae.shapes(network))
    source = {"file": "tiny.safetensors", "sha256": f"{seed}" * 64, "format": "sd-vae"}
    save_network(str(folder), "sd-vae", dataclasses.asdict(network), params, source)
    return folder


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("networks") / "tiny", 0)


def config(network, **data):
    """The config of this file's runs, for this process."""
    return Config(
        model=ModelConfig(depth=2, input_size=4, channels=4, patch=1, width=16, heads=2, classes=10, learn_sigma=False),
        data=DataConfig(**dict(split=TRAIN, held_out_split=TEST, flip=True, encode="in_step") | data),
        autoencoder=AutoencoderConfig(folder=str(network)),
        optim=OptimConfig(accumulate=2),
        train=TrainConfig(batch_size=16),
        mesh=MeshConfig(data=2, fsdp=2),
    )


@pytest.fixture(scope="module")
def latents(network, tmp_path_factory, data_dir):
    """The same images, encoded before in float32."""
    out = tmp_path_factory.mktemp("latents")
    job = encoding.open_job(config(network, encode="precomputed"), "float32", whiten=False)
    encoding.encode_splits(job, str(out), [TRAIN, TEST], 1 << 30, [])
    return out


def stored(network, latents):
    return config(network, encode="precomputed", latents=str(latents))


def mesh_of(cfg):
    return make_mesh(cfg.mesh, jax.devices()[:4])


def batches(cfg, source, count, rows=16):
    made = make_batches(cfg.data, batch_size=rows, seed=3, source=source)
    return [next(made) for _ in range(count)]


@pytest.mark.parametrize("rows", [16, 48])
def test_the_step_makes_the_latents_that_encode_stores(network, latents, rows):
    """Over more than one epoch, with mirror images, in one part and in several."""
    cfg = config(network)
    (source,) = open_splits(cfg, TRAIN)
    encoder = encoder_of(source, mesh_of(cfg))
    apply = jax.jit(encoder.apply)
    expected = batches(stored(network, latents), open_source(stored(network, latents).data, TRAIN), 6, rows)
    for batch, wanted in zip(batches(cfg, source, 6, rows), expected, strict=True):
        found = apply(batch, *encoder.weights)
        np.testing.assert_allclose(found["image"], wanted["image"], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found["cond"]["label"], wanted["cond"]["label"])
    assert isinstance(source, Source) and source.image_shape == (4, 4, 4)


def test_held_out_latents_are_the_means_that_encode_stores(network, latents):
    (source,) = open_splits(config(network), TEST)
    found, cond = load_arrays(config(network).data, TEST, source, 13)
    expected, labels = load_arrays(stored(network, latents).data, TEST)
    np.testing.assert_array_equal(found, expected[:13])
    np.testing.assert_array_equal(cond["label"], labels["label"][:13])


def test_what_a_run_says_of_its_latents_is_what_stored_ones_say(network, latents):
    (source,) = open_splits(config(network), TEST)
    found, expected = source.describe(), open_source(stored(network, latents).data, TEST).describe()
    assert {k: found[k] for k in expected if k not in ("sha256", "source_sha256", "autoencoder")} == {
        k: expected[k] for k in expected if k not in ("sha256", "source_sha256", "autoencoder")
    }
    assert found["sha256"] == expected["source_sha256"]
    names = ("autoencoder_sha256", "scale", "shift")
    identity = open_source(stored(network, latents).data, TEST).identity
    assert {name: source.identity[name] for name in names} == {name: identity[name] for name in names}
    followed = follow_latents(config(network)).autoencoder
    assert (followed.scale, followed.shift) == ((0.5,), (0.1,))


def lowered(cfg, folder):
    (source,) = open_splits(dataclasses.replace(cfg, autoencoder=AutoencoderConfig(folder=str(folder))), TRAIN)
    mesh = mesh_of(cfg)
    encoder, state = encoder_of(source, mesh), abstract_state(cfg, mesh)
    batch = batches(cfg, source, 1)[0]
    return make_train_step(cfg, mesh, encoder).lower(state, batch, *encoder.weights), state, batch, encoder


def test_the_encoder_is_an_argument_of_the_step_and_no_part_of_its_state(network, tmp_path):
    cfg = config(network)
    one, state, batch, encoder = lowered(cfg, network)
    other = lowered(cfg, save_vae(tmp_path / "other", 1))[0]
    assert one.as_text() == other.as_text()
    assert len(jax.tree.leaves(one.in_avals)) == len(jax.tree.leaves((state, batch, encoder.weights)))
    assert "decoder" not in encoder.weights[0] and all(w.is_fully_replicated for w in jax.tree.leaves(encoder.weights))
    one_device, (source,) = make_mesh(MeshConfig(), jax.devices()[:1]), open_splits(cfg, TRAIN)
    batch["image"]["pixels"][3] = np.nan
    found = find_layer(cfg, make_state(cfg, one_device), batch, encoder_of(source, one_device))
    assert found == "the first output that is not finite is that of the encoder"


def macs(jaxpr):
    """Multiply-adds of all convolutions and products of a program."""
    found = 0
    for eqn in jaxpr.eqns:
        found += sum(map(macs, jaxprs_in_params(eqn.params)))
        if eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            found += math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel[:-1])
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            found += math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    return found


@pytest.mark.parametrize(
    "cfg, size",
    [(TINY, (8, 8)), (vae.VAEConfig(), (256, 256)), (vae.VAEConfig(latent_channels=16, quant=False), (64, 32))],
)
def test_the_flops_of_the_encoder_are_those_of_its_products(cfg, size):
    images = jax.ShapeDtypeStruct((1, *size, cfg.channels), np.float32)
    traced = jax.make_jaxpr(lambda params, images: vae.encode(cfg, params, images))(vae.shapes(cfg), images)
    assert macs(traced.jaxpr) == vae.encoder_macs(cfg, *size)


def arguments(workdir, network, *more, steps=20):
    model = [*MODEL, *DATA, f"--config.autoencoder.folder={network}", "--config.train.keep=9"]
    guarded = ["--config.train.replay_every=7", "--config.train.evaluate_every=20", "--config.optim.accumulate=2"]
    return train(workdir, *model, *guarded, "--config.mesh.fsdp=2", *more, steps=steps)


IN_STEP = "--config.data.encode=in_step"
SMALL = ["--config.model.depth=2", "--config.model.width=16", "--config.model.heads=2"]


@pytest.fixture(scope="module")
def whole(network, tmp_path_factory, cache_dir):
    """A run of 20 steps in one go, and what it said."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    code, _, err = run("train", *arguments(workdir, network, IN_STEP), cache_dir=cache_dir)
    assert code == 0, err
    return workdir, err


def test_a_run_has_the_losses_and_scores_of_one_on_stored_latents(whole, network, latents, tmp_path, cache_dir):
    workdir = tmp_path / "run"
    code, _, err = run("train", *arguments(workdir, network, f"--config.data.latents={latents}"), cache_dir=cache_dir)
    assert code == 0, err
    found, expected = ([line["loss"] for line in scalars(w) if "loss" in line][:5] for w in (whole[0], workdir))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    here, there = (json.loads((w / "eval" / "records.jsonl").read_text()) for w in (whole[0], workdir))
    assert here["metrics"].keys() == there["metrics"].keys()
    np.testing.assert_allclose(here["metrics"]["loss"], there["metrics"]["loss"], rtol=1e-4)
    assert here["protocol"]["held_out"] == there["protocol"]["held_out"]
    assert here["flops_train"] == there["flops_train"] and "flops_encoder" not in there
    cfg = config(network)
    assert here["flops_encoder"] == 20 * 16 * encoder_flops(cfg) == 20 * 16 * 2 * vae.encoder_macs(TINY, 8, 8)
    assert f"leaves out the encoder's {encoder_flops(cfg):.3g} FLOPs an image" in whole[1]
    shapes = [
        jax.tree.map(np.shape, {k: saved(w, 20)[k] for k in ("params", "ema", "opt")}) for w in (whole[0], workdir)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.slow
def test_it_resumes_bitwise_from_an_encoder_that_moved_and_not_with_another(whole, network, tmp_path, cache_dir):
    workdir = shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(checkpoint.path_of(str(workdir), 20))
    other = arguments(workdir, save_vae(tmp_path / "other", 1), IN_STEP)
    code, _, err = run("train", *other, cache_dir=cache_dir)
    assert code == 2 and "autoencoder_sha256: found" in err and not os.path.exists(checkpoint.path_of(str(workdir), 20))
    moved = shutil.copytree(network, tmp_path / "moved")
    code, _, err = run("train", *arguments(workdir, moved, IN_STEP, "--config.data.cache=False"), cache_dir=cache_dir)
    assert code == 0, err
    a, b = saved(workdir, 20), saved(whole[0], 20)
    for name in ("params", "ema", "opt", "data"):
        np.testing.assert_equal(a[name], b[name])


WRONG = [
    (
        ["--config.autoencoder.folder="],
        "autoencoder.folder: found none with data.encode = 'in_step', expected a folder",
    ),
    (["--config.data.latents=/some"], "data.latents: found '/some', expected none with data.encode = 'in_step'"),
    (["--config.data.encode=later"], "data.encode: found 'later', expected one of precomputed, in_step"),
    (
        ["--config.model.channels=8"],
        "makes latents of side 4 with 4 channels from images of 8 pixels, but the model's",
    ),
    (["--config.data.image_size=16"], "makes latents of side 8 with 4 channels from images of 16 pixels"),
    (["--config.data.image_size=9"], "data.image_size: found 9, expected a multiple of 2"),
]


@pytest.mark.parametrize(
    "check, more, message",
    [
        *(([], *wrong) for wrong in WRONG),
        *(
            pytest.param(["--check"], *wrong, marks=[pytest.mark.slow] * (i not in (0, 3)))
            for i, wrong in enumerate(WRONG)
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_2(network, tmp_path, cache_dir, more, message, check):
    command = [*arguments(tmp_path / "run", network, IN_STEP, *more), *check]
    code, _, err = run("train", *command, cache_dir=cache_dir)
    assert code == 2 and message in err and len(err.splitlines()) == 1, err
    assert not (tmp_path / "run").exists()


def test_an_encoder_of_other_images_is_named(tmp_path, data_dir):
    folder = save_vae(tmp_path / "rgb", 2, dataclasses.replace(TINY, channels=3))
    with pytest.raises(
        UsageError, match=r"data.dataset: found 'digits' with images of 1 channels, expected 3, as the autoen"
    ):
        open_splits(config(folder), TRAIN)
    folder = save_vae(tmp_path / "unscaled", 2, dataclasses.replace(TINY, scale=0.0))
    with pytest.raises(UsageError, match=r"autoencoder.scale: found none for .*unscaled', whose file did not say it"):
        follow_latents(config(folder))


@pytest.mark.slow
def test_preflight_compiles_both_steps_and_the_encoder_moves_nothing(network, tmp_path, cache_dir):
    out, tiny = (
        tmp_path / "report.json",
        ["--config.model.depth=2", "--config.model.width=16", "--config.model.heads=2"],
    )
    command = ["--config=configs/digits.py", "--topology=cpux8", "--config.mesh.fsdp=2", IN_STEP, *MODEL, *tiny]
    command += [f"--config.autoencoder.folder={network}", f"--json={out}"]
    code, said, err = run("preflight", *command, cache_dir=cache_dir)
    assert code == 0, err
    found = json.loads(out.read_text())
    other = found["precomputed"]
    assert found["fits"] and other["fits"] and found["collectives"] == other["collectives"]
    assert found["flops_step"] == other["flops_step"] and other["flops_encoder"] == 0
    assert found["flops_encoder"] == 64 * 2 * vae.encoder_macs(TINY, 8, 8)
    weights = 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(vae.shapes(TINY)["encoder"]))
    images = 64 // 8 * 8 * 8 * 4
    assert found["bytes"]["arguments"] - other["bytes"]["arguments"] == pytest.approx(weights + images, abs=64)
    assert found["bytes"]["state"] == found["bytes"]["donated"] == other["bytes"]["state"]
    assert "the same step on precomputed latents, without the encoder" in said


def test_an_absent_encoder_has_the_sizes_of_stable_diffusions(capsys):
    cfg = dataclasses.replace(
        config("/nowhere", image_size=256),
        model=model_config("DiT-S/8", depth=1),
        mesh=MeshConfig(),
        optim=OptimConfig(),
    )
    found = program(cfg, "train", abstract_mesh(cfg.mesh, 4))
    assert "notice: autoencoder.folder: '/nowhere' is not on this machine" in capsys.readouterr().err
    assert found.arguments[1]["image"]["pixels"].shape == (16, 256, 256, 3)
    assert found.arguments[1]["image"]["noise"].shape == (16, 32, 32, 4)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(found.arguments[2])) == 34_163_664
    with pytest.raises(
        UsageError, match=r"autoencoder.folder: found no '/nowhere' here for latents of side 32 of images of 512 pixels"
    ):
        autoencoder(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, image_size=512)))


@pytest.mark.slow
def test_a_benchmark_times_the_step_with_its_encoder(network, tmp_path, cache_dir):
    out, folder = tmp_path / "report.json", f"--config.autoencoder.folder={network}"
    command = [
        "--config=configs/digits.py",
        IN_STEP,
        folder,
        *MODEL,
        *SMALL,
        "--parts=train",
        "--repeats=1",
        "--seconds=0",
    ]
    code, said, err = run("bench", *command, f"--json={out}", cache_dir=cache_dir)
    assert code == 0, err
    found = json.loads(out.read_text())["train"]
    assert found["flops_encoder"] == 64 * 2 * vae.encoder_macs(TINY, 8, 8) and found["sides"]["jax"]["recompiles"] == 0
    assert "model TFLOP/s and MFU leave out the encoder in the step" in said


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_train_and_score_as_one(network, tmp_path, data_dir, cache_dir):
    found = {}
    for count in (1, 2):
        workdir = tmp_path / str(count)
        more = [
            *MODEL,
            *DATA,
            IN_STEP,
            f"--config.autoencoder.folder={network}",
            f"--config.train.evaluate_every={STEPS}",
        ]
        train_on(count, workdir, cache_dir, *more)
        record = json.loads((workdir / "eval" / "records.jsonl").read_text())
        found[count] = [line["loss"] for line in scalars(workdir) if "loss" in line], record
    np.testing.assert_allclose(found[2][0], found[1][0], rtol=1e-5)
    assert found[2][1]["protocol"] == found[1][1]["protocol"]
    np.testing.assert_allclose(found[2][1]["metrics"]["loss"], found[1][1]["metrics"]["loss"], rtol=1e-5)
