"""Super-resolution: the low-resolution image as a condition, from the data to the scores."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from job import TINY, run
from PIL import Image
from runs import assert_same_run, trained_on_meshes
from test_init import MODEL, weights_of
from test_seams import SMALL

from dit_jax import flops
from dit_jax.bind import bind
from dit_jax.config import Config, DataConfig, MeshConfig, ModelConfig, SampleConfig, resolve, template
from dit_jax.data.degrade import Degrade, enlarged, make_degrade, resized, to_levels
from dit_jax.data.pipeline import load_arrays, make_batches
from dit_jax.data.pixels import to_float
from dit_jax.devices.mesh import make_mesh
from dit_jax.devices.numerics import random_key
from dit_jax.diffusion.task import make_task
from dit_jax.error import UsageError
from dit_jax.metrics.psnr import PSNR, Originals, psnr
from dit_jax.models import dit
from dit_jax.models.warm_start import NEW, TAKEN, WarmStart
from dit_jax.program import program
from dit_jax.sampling.draw import open_sampling
from dit_jax.sampling.low import open_low
from dit_jax.sampling.picture import grid
from dit_jax.scaling.__main__ import main
from dit_jax.scaling.runs.task import task_of

TWICE = dataclasses.replace(MODEL, superres=2)
LOW = "low_embedding/kernel"


def config(data_dir="", **changes):
    model = dataclasses.replace(SMALL.model, superres=2)
    return dataclasses.replace(SMALL, model=model, data=DataConfig(data_dir=data_dir, **changes))


def conditions(rows=2, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "label": jnp.asarray(rng.integers(3, size=rows), jnp.int32),
        "low": jnp.asarray(rng.uniform(-1, 1, (rows, 4, 4, 1)), jnp.float32),
    }


# The low-resolution image


def test_degrading_is_exact():
    levels = np.array([[[0, 4, 10, 20], [8, 0, 30, 41], [255, 255, 0, 0], [255, 254, 0, 1]]], np.uint8)[..., None]
    low = Degrade(2)(to_float(levels), np.arange(1), 0)
    np.testing.assert_array_equal(to_levels(low)[0, ..., 0], [[3, 25], [255, 0]])  # means 3, 25.25, 254.75, 0.25
    assert low.dtype == np.float32 and np.array_equal(low, to_float(to_levels(low)))
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(to_levels(to_float(every)), every)
    images = np.random.default_rng(0).integers(256, size=(2, 8, 8, 3), dtype=np.uint8)
    small = to_levels(Degrade(4, "bicubic")(to_float(images), np.arange(2), 0))
    expected = [np.asarray(Image.fromarray(image).resize((2, 2), Image.Resampling.BICUBIC)) for image in images]
    np.testing.assert_array_equal(small, expected)
    np.testing.assert_array_equal(enlarged(small, 2)[:, ::2, 1::2], small)


def test_noise_is_of_seed_and_position_and_jpeg_changes_pixels():
    grey = np.zeros((64, 16, 16, 1), np.float32)
    degrade = Degrade(2, noise=10.0)
    low = degrade(grey, np.arange(64), 3)
    np.testing.assert_array_equal(low[5:9], degrade(grey[:4], np.arange(5, 9), 3))
    assert not np.array_equal(low, degrade(grey, np.arange(64), 4))
    assert np.std(to_levels(low).astype(float)) == pytest.approx(math.sqrt(100 + 1 / 12), rel=0.03)
    images = np.random.default_rng(0).uniform(-1, 1, (3, 16, 16, 3)).astype(np.float32)
    fine, coarse = (Degrade(2, jpeg=quality)(images, np.arange(3), 0) for quality in (100, 5))
    plain = Degrade(2)(images, np.arange(3), 0)
    errors = [np.abs(found - plain).mean() for found in (fine, coarse)]
    assert 0 < errors[0] < errors[1] and fine.shape == (3, 8, 8, 3)
    assert Degrade(2, jpeg=5).describe() == {"factor": 2, "degrade": "area", "jpeg": 5}


def test_batches_hold_low_resolution_images_of_what_the_model_sees(data_dir):
    """Also of mirrored images; on two processes as on one. The held-out images have them as well."""
    cfg = config(data_dir, flip=True, degrade_noise=4.0)
    how = dict(batch_size=16, seed=2, degrade=make_degrade(cfg))
    whole = next(make_batches(cfg.data, **how))
    parts = [next(make_batches(cfg.data, process_index=i, process_count=2, **how)) for i in (0, 1)]
    np.testing.assert_array_equal(np.concatenate([part["cond"]["low"] for part in parts]), whole["cond"]["low"])
    np.testing.assert_array_equal(whole["cond"]["low"], make_degrade(cfg)(whole["image"], np.arange(16), 2))
    assert whole["cond"]["low"].shape == (16, 4, 4, 1) and set(whole["cond"]) == {"label", "low"}
    images, cond = load_arrays(cfg.data, "test", most=20, degrade=make_degrade(cfg))
    np.testing.assert_array_equal(cond["low"], make_degrade(cfg)(images, np.arange(20), 0))
    assert "low" not in next(make_batches(cfg.data, batch_size=16, seed=2))["cond"]


# The model


@pytest.mark.parametrize(
    "kind", ["adaln_zero", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("in_context", "cross_attention"))]
)
def test_a_model_begins_as_its_source_bit_for_bit(kind):
    """The low-resolution image then adds its enlarged patches times a kernel, whose gradient is not zero."""
    old = dataclasses.replace(MODEL, conditioning=kind)
    new = dataclasses.replace(old, superres=2)
    start = WarmStart(old, new, (0, 1, 2))
    weights, fresh = weights_of(old), jax.jit(bind(new).init)(random_key(5))
    assert {name for name, how in start.kinds(fresh, weights).items() if how != TAKEN} == {LOW}
    assert start.kinds(fresh, weights)[LOW] == NEW
    begun = start.begin(fresh, weights)
    x, t, cond = jax.random.normal(random_key(1), (2, 8, 8, 1)), jnp.array([10.0, 900.0]), conditions()
    found = jax.jit(bind(new).apply)(begun, x, t, cond)
    np.testing.assert_array_equal(found, jax.jit(bind(old).apply)(weights, x, t, {"label": cond["label"]}))

    grads = jax.jit(jax.grad(lambda params: jnp.square(bind(new).apply(params, x, t, cond)).mean()))(begun)
    assert np.abs(grads["low_embedding"]["kernel"]).max() > 1e-3


def test_the_low_resolution_image_is_enlarged_and_adds_to_the_patches():
    """By cubic interpolation as Pillow's of floats, patch by patch."""
    params, cond = weights_of(TWICE), conditions()
    inputs = jnp.zeros((2, 8, 8, 1)), jnp.zeros(2), cond
    found = jax.jit(lambda *a: dict(dit.activations(TWICE, *a))["low_embedding"])(params, *inputs)
    for low, tokens in zip(np.asarray(cond["low"]), np.asarray(found), strict=True):
        big = np.asarray(Image.fromarray(low[..., 0], "F").resize((8, 8), Image.Resampling.BICUBIC))
        patches = [
            big[row : row + 2, column : column + 2].ravel() for row in range(0, 8, 2) for column in range(0, 8, 2)
        ]
        np.testing.assert_allclose(tokens, np.stack(patches) @ params["low_embedding"]["kernel"], atol=1e-5)


def test_parameters_and_flops_are_exact():
    sizes = {name: leaf.size for name, leaf in flatten_dict(weights_of(TWICE), sep="/").items()}
    assert sum(sizes.values()) == flops.parameters(TWICE) == flops.parameters(MODEL) + sizes[LOW]
    assert sizes[LOW] == flops.active_parameters(TWICE) - flops.active_parameters(MODEL) == 4 * 16
    assert flops.forward_macs(TWICE) - flops.forward_macs(MODEL) == 16 * 4 * 16  # tokens, values of a patch, width
    large = flops.forward_macs(TWICE, (16, 16)) - flops.forward_macs(MODEL, (16, 16))
    assert large == 64 * 4 * 16 and flops.tangent_flops(TWICE) == flops.tangent_flops(MODEL)


def test_guidance_leaves_out_the_label_only():
    cond = conditions(64)
    null = bind(TWICE).null(cond)
    np.testing.assert_array_equal(null["low"], cond["low"])
    assert set(np.asarray(null["label"]).tolist()) == {3}
    dropped = bind(TWICE).drop(random_key(0), cond, 0.5)
    np.testing.assert_array_equal(dropped["low"], cond["low"])
    assert 10 < np.sum(np.asarray(dropped["label"]) == 3) < 54
    bare = dataclasses.replace(TWICE, classes=0)
    np.testing.assert_array_equal(bind(bare).drop(random_key(0), {"low": cond["low"]}, 1.0)["low"], cond["low"])
    cfg = dataclasses.replace(config(), model=dataclasses.replace(bare, superres=4), sample=SampleConfig("euler", 2))
    make_task(cfg)
    with pytest.raises(UsageError, match=r"sample\.guidance: found 2.0, expected 1: this model has no null class"):
        make_task(dataclasses.replace(cfg, sample=dataclasses.replace(cfg.sample, guidance=2.0)))


def test_a_missing_image_is_named():
    with pytest.raises(UsageError, match="cond: found label, expected low, as the model has"):
        bind(TWICE).apply(weights_of(TWICE), jnp.zeros((2, 8, 8, 1)), jnp.zeros(2), {"label": jnp.zeros(2, jnp.int32)})


@pytest.mark.slow
def test_shards_train_super_resolution():
    """On 2 x 2 x 2 devices the losses are those of one device."""
    cfg = config()
    rng = np.random.default_rng(0)
    cond = {"label": rng.integers(10, size=16, dtype=np.int32), "low": rng.uniform(-1, 1, (16, 4, 4, 1)).astype("f")}
    state = trained_on_meshes(cfg, {"image": rng.standard_normal((16, 8, 8, 1), np.float32), "cond": cond})
    assert np.abs(np.asarray(state.params["low_embedding"]["kernel"])).max() > 1e-4


@pytest.mark.parametrize("job", ["train", "sample"])
def test_preflight_compiles_its_programs(job):
    found = program(config(), job, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    found.make().lower(*found.arguments).compile()
    assert found.flops > 0


# Samples


@pytest.fixture(scope="module")
def drawing(data_dir):
    """A config, its held-out images, and weights without zeros."""
    cfg = config(data_dir)
    images, cond = load_arrays(cfg.data, "test")
    return cfg, images, cond["label"], weights_of(cfg.model)


def drawn(cfg, weights, low, indices=(0, 1, 354, 355), **how):
    """Images and labels of a few samples."""
    sampling = open_sampling(cfg, make_mesh(MeshConfig(), jax.devices()[:1]), low=low, **how)
    return next(sampling.draw(weights, 0, np.array(indices), len(indices)))


def test_sample_i_begins_with_held_out_image_i(drawing, tmp_path):
    """Modulo their number, and has its label; the same bits from a folder or npz of these low-resolution images."""
    cfg, images, labels, weights = drawing
    low = open_low(cfg)
    numbers = np.array([0, 1, 354, 0])
    assert low.count == len(images) == 355
    np.testing.assert_array_equal(low.rows(np.array([0, 355, 5]))["low"], Degrade(2)(images[[0, 0, 5]], numbers, 0))
    np.testing.assert_array_equal(low.originals(numbers), to_levels(images[numbers]))
    found, of = drawn(cfg, weights, low)
    np.testing.assert_array_equal(of, labels[numbers])
    small = to_levels(low.read(numbers)["low"])
    np.savez(tmp_path / "low.npz", arr_0=small)
    (tmp_path / "pictures").mkdir()
    for i, image in enumerate(small):
        Image.fromarray(image[..., 0]).save(tmp_path / "pictures" / f"{i}.png")
    wanted = {"label": tuple(labels[numbers].tolist())}
    for path in ("low.npz", "pictures"):
        given = open_low(cfg, str(tmp_path / path))
        same, of = drawn(cfg, weights, given, (0, 1, 2, 3), wanted=wanted)
        np.testing.assert_array_equal(of, labels[numbers])
        np.testing.assert_array_equal(same[:2], found[:2])  # noise is of the index
    other = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, degrade_noise=60.0))
    assert not np.array_equal(drawn(other, weights, open_low(other))[0], found)
    bare = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, superres=0))
    with pytest.raises(UsageError, match=r"model\.superres: found no low-resolution images, expected such images"):
        drawn(cfg, weights, None)
    assert open_low(bare) is None


def test_a_grid_shows_samples_between_low_resolution_images_and_originals(drawing):
    cfg, images, _, _ = drawing
    low, seen = open_low(cfg), []
    samples = np.full((3, 8, 8, 1), 7, np.uint8)
    low.grid(lambda *shown: seen.extend(shown))(samples, np.zeros(3, int), ("a",), "caption")
    wide, (small, ours, original) = seen[0], (slice(0, 8), slice(9, 17), slice(18, 26))
    assert wide.shape == (3, 8, 28, 1) and seen[2:] == [("a",), "caption"]
    np.testing.assert_array_equal(wide[:, :, small], enlarged(to_levels(low.read(np.arange(3))["low"]), 2))
    np.testing.assert_array_equal(wide[:, :, ours], samples)
    np.testing.assert_array_equal(wide[:, :, original], to_levels(images[:3]))
    assert low.grid(grid)(samples, np.zeros(3, int)).size[0] > 300


# Scores


def test_psnr_is_that_of_the_formula():
    """One value of four off by 10 levels: 10 log10(255^2 / 25) dB."""
    original = np.zeros((2, 2, 2, 1), np.uint8)
    image = original.copy()
    image[0, 0, 1] = 10
    by_hand = [10 * math.log10(255**2 / 25), 10 * math.log10(255**2 * 4)]
    assert by_hand[0] == pytest.approx(34.1514, abs=1e-4)
    np.testing.assert_allclose(psnr(image, original), by_hand, rtol=1e-12)
    with pytest.raises(ValueError, match="expected \\(1, 2, 2, 1\\)"):
        psnr(image, original[:1])


def test_samples_of_one_image_count_once_and_the_interval_is_over_images():
    rng = np.random.default_rng(0)
    real = rng.integers(256, size=(3, 4, 4, 1), dtype=np.uint8)
    images = np.concatenate([np.clip(real.astype(int) + e, 0, 255).astype(np.uint8) for e in (3, 9)])[:5]
    reference = {"originals": Originals(3, lambda n: real[n], lambda n: {"same": real[n]})}
    state = PSNR.update(PSNR.update(None, {"images": images[:2]}, 5), {"images": images[2:]}, 5)
    found = PSNR.finish(state, reference, None)
    one, two = psnr(images[:3], real), psnr(images[3:], real[:2])
    each = [(one[0] + two[0]) / 2, (one[1] + two[1]) / 2, one[2]]
    half = 1.96 * np.std(each, ddof=1) / math.sqrt(3)
    assert found == {
        "": pytest.approx(np.mean(each)),
        "_low": pytest.approx(np.mean(each) - half),
        "_high": pytest.approx(np.mean(each) + half),
        "_same": pytest.approx(10 * math.log10(255**2 * 16)),
    }


# Jobs


def steps_of(workdir, source, steps=20):
    more = [f"--config.train.steps={steps}", "--config.model.superres=2", "--config.optim.warmup_steps=2"]
    return ["--config=configs/digits.py", f"--workdir={workdir}", *TINY, *more, f"--init={source}"]


@pytest.fixture(scope="module")
def twice(uninterrupted, tmp_path_factory, cache_dir):
    """A run of super-resolution, begun from the small run."""
    folder = tmp_path_factory.mktemp("superres") / "twice"
    code, _, err = run("train", *steps_of(folder, uninterrupted), cache_dir=cache_dir)
    assert code == 0, err
    assert "new:     64 parameters in 1 arrays: low_embedding" in err
    return folder


def test_a_resumed_run_ends_in_the_same_bits(twice, uninterrupted, tmp_path, cache_dir):
    copy = tmp_path / "copy"
    shutil.copytree(twice, copy)
    shutil.rmtree(copy / "checkpoints" / "20")
    code, _, err = run("train", *steps_of(copy, uninterrupted), cache_dir=cache_dir)
    assert code == 0, err
    assert_same_run(twice, copy, 20)


def test_a_record_has_the_psnr_and_a_task_of_its_own(twice, tmp_path, cache_dir):
    """And the floors, exact; a protocol that names how low-resolution images are made; the grid and the samples of the job."""
    code, _, err = run("evaluate", f"--workdir={twice}", "--config.eval.samples=70", cache_dir=cache_dir)
    assert code == 0, err
    records = [json.loads(line) for line in (twice / "eval" / "records.jsonl").read_text().splitlines()]
    (loss,) = [r for r in records if "held_out" in r["protocol"] and r["step"] == 20]
    (scored,) = [r for r in records if "samples" in r["protocol"] and r["step"] == 20]
    made = {"factor": 2, "degrade": "area"}
    assert loss["protocol"]["held_out"]["superres"] == made and "superres" in scored["protocol"]
    assert {"of": "held-out images", "records": 355, **made}.items() <= scored["protocol"]["superres"].items()
    for record in (loss, scored):
        assert record["task"] == "labels, superres 2" == task_of(record, "here")
    metrics = scored["metrics"]
    assert metrics["psnr_low"] < metrics["psnr"] < metrics["psnr_high"] and metrics["fd_digits"] > 0
    assert scored["metric_signs"]["psnr"] == 1
    images = to_levels(load_arrays(DataConfig(), "test", most=70)[0])
    small = to_levels(Degrade(2)(to_float(images), np.arange(70), 0))
    for name, others in {"nearest": enlarged(small, 2), "bicubic": resized(small, (8, 8))}.items():
        assert metrics[f"psnr_{name}"] == pytest.approx(psnr(others, images).mean(), rel=1e-9)
    out, png = tmp_path / "out.npz", tmp_path / "grid.png"
    given = ["--num=70", "--guidance=2", f"--seed={scored['protocol']['samples']['seed']}", f"--grid={png}"]
    code, _, err = run("sample", f"--workdir={twice}", f"--out={out}", *given, cache_dir=cache_dir)
    assert code == 0, err
    assert metrics["psnr"] == pytest.approx(psnr(np.load(out)["arr_0"], images).mean(), rel=1e-9)
    assert png.read_bytes()[:4] == b"\x89PNG"


def test_a_frontier_of_psnr_takes_the_higher_one(tmp_path):
    """And knows so by its name, in a table."""
    rows = ["name,flops_sample,psnr", "small,1e6,20", "large,1e7,19", "larger,1e8,21"]
    (tmp_path / "x.csv").write_text("\n".join(rows) + "\n")
    assert main(["frontier", str(tmp_path / "x.csv"), "--metric=psnr", f"--json={tmp_path / 'out.json'}"]) == 0
    front = json.loads((tmp_path / "out.json").read_text())["front"]
    assert [point["name"] for point in front] == ["small", "larger"]


def test_a_task_that_is_none_is_refused():
    for wrong in ("labels, superres", "images, superres 2", "labels, superres 2x"):
        with pytest.raises(UsageError, match=r"task is .*expected one of labels, text, unconditional, or one of these"):
            task_of({"task": wrong}, "here:1")


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("model.superres: found 3, expected 0, or a divisor of model.input_size = 8", {"model.superres": 3}),
        ("model.superres: found 1, expected 0, or a divisor", {"model.superres": 1}),
        ("expected 0 with data.latents = 'x'", {"model.superres": 2, "data.latents": "x"}),
        ("expected 0 with data.encode = 'in_step'", {"model.superres": 2, "data.encode": "in_step"}),
        ("expected 0 with autoencoder.folder = 'x'", {"model.superres": 2, "autoencoder.folder": "x"}),
        (
            "expected 0 with model.input_size = 8 and data.image_size = 64",
            {"model.superres": 2, "data.image_size": 64},
        ),
        ("data.buckets: found ((8, 16),), expected () with model.superres", {"model.superres": 2, "data.buckets": ((8, 16),)}),
        ("data.degrade: found 'blur', expected one of area, bicubic", {"model.superres": 2, "data.degrade": "blur"}),
        ("data.degrade_noise: found 5.0, expected 0.0 with model.superres = 0", {"data.degrade_noise": 5.0}),
        ("data.degrade_jpeg: found 101, expected a value from 0 to 100", {"data.degrade_jpeg": 101}),
        ("JPEG has 1 or 3 channels, the images have 4", {"model.superres": 2, "data.degrade_jpeg": 50, "model.channels": 4}),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(message, changes):
    values = template(Config(ModelConfig(input_size=8, channels=1, learn_sigma=False), SMALL.diffusion))
    for key, value in changes.items():
        group, name = key.split(".")
        values[group][name] = value
    with pytest.raises(UsageError) as error:
        resolve(values)
    assert message in str(error.value)


def test_low_resolution_images_that_do_not_fit_are_refused(drawing, tmp_path):
    cfg = drawing[0]
    np.savez(tmp_path / "big.npz", arr_0=np.zeros((2, 8, 8, 1), np.uint8))
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((2, 4, 4, 1), np.float32))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    for name, message in {
        "big.npz": r"image 0: found an image of shape \(8, 8, 1\), expected \(4, 4, 1\), as model.input_size = 8",
        "floats.npz": "found float32 .*expected uint8 images",
        "gone.npz": "no such file",
        "empty": "found no picture in",
        "broken": "a.png: cannot read it",
    }.items():
        with pytest.raises(UsageError, match=message):
            open_low(cfg, str(tmp_path / name))
    gone = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, folder=str(tmp_path / "gone"), dataset="x"))
    with pytest.raises(
        UsageError, match=r"--low: found none, and no held-out images; expected one of them: data.folder"
    ):
        open_low(gone)


def test_a_job_that_does_not_fit_ends_with_2(twice, uninterrupted, tmp_path, cache_dir):
    wrong = [*steps_of(tmp_path / "new", uninterrupted), "--config.model.width=32"]
    for command, message in {
        ("train", *wrong): "model.width: found 32, expected 16",
        ("sample", f"--workdir={uninterrupted}", "--low=x", "--num=4"): "--low: found 'x', expected none",
        (
            "sample",
            f"--workdir={twice}",
            "--size=16x16",
            "--num=4",
        ): "model.superres: found --size 16x16, expected none",
    }.items():
        code, _, err = run(*command, cache_dir=cache_dir)
        assert code == 2 and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_short_training_beats_enlarged_pixels(tmp_path, cache_dir, data_dir):
    """PSNR of 355 held-out digits after 1,000 steps of 64 from scratch, above nearest by more than its interval."""
    more = ["--config.train.steps=1000", "--config.model.width=32", "--config.train.checkpoint_every=1000"]
    more += ["--config.train.batch_size=64", "--config.optim.learning_rate=3e-3", "--config.sample.steps=4"]
    more += ["--config.eval.samples=355", "--config.eval.max_images=0", "--config.sample.guidance=1"]
    command = ["--config=configs/digits_sr.py", f"--workdir={tmp_path / 'x2'}", *TINY, *more]
    for job, arguments in (("train", command), ("evaluate", [f"--workdir={tmp_path / 'x2'}"])):
        code, _, err = run(job, *arguments, cache_dir=cache_dir)
        assert code == 0, err
    records = [json.loads(line) for line in (tmp_path / "x2" / "eval" / "records.jsonl").read_text().splitlines()]
    metrics = next(record["metrics"] for record in records if "psnr" in record["metrics"])
    assert metrics["psnr_low"] > metrics["psnr_nearest"]
