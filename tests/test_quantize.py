"""Facts about int8 products: their arithmetic, what they are in the model, and the calibration of a checkpoint."""

import dataclasses
import functools
import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from noised import weights

from dit_jax import hardware
from dit_jax.bind import weight_shapes
from dit_jax.config import Config, DiffusionConfig, MeshConfig, ModelConfig, SampleConfig, TrainConfig, model_config
from dit_jax.devices.mesh import make_mesh
from dit_jax.error import UsageError
from dit_jax.evaluation.protocol import draws_protocol
from dit_jax.models import conditioning, dit, layers, quantize
from dit_jax.sampling import draw
from dit_jax.sampling import quantize as calibration
from dit_jax.sampling.reuse import with_reuse
from dit_jax.scaling.frontier.points import points_of

TINY = dict(depth=3, width=16, heads=2, input_size=8, channels=1, classes=10, learn_sigma=False)
WORDS = dict(text="bytes", text_length=8, text_depth=1)
KINDS = [("adaln_zero", dict(block="llama")), ("dual_stream", WORDS)]
SLOW = [("adaln", {}), ("in_context", {}), ("cross_attention", {}), ("adaln_cross", WORDS)]
RNG = np.random.default_rng(0)


def bytes_of(params):
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def settings(mode="int8", **sample):
    cfg = Config(model=ModelConfig(**TINY), diffusion=DiffusionConfig(process="flow"), train=TrainConfig(batch_size=16))
    how = {"sampler": "euler", "steps": 3, "labels": "balanced", "guidance": 2.0}
    sample = SampleConfig(**how | {"quantize": mode} | sample)
    return dataclasses.replace(cfg, sample=sample, data=dataclasses.replace(cfg.data, image_size=8))


def mesh_of(count, **axes):
    return make_mesh(MeshConfig(**axes), jax.devices()[:count])


def images(sampling, params, num=16):
    return np.concatenate([images for images, _ in sampling.images(params, 3, num)])


def drawn(cfg, mesh, workdir, num=16):
    """Images of the weights that are given, and the sampling."""
    sampling = draw.open_sampling(cfg, mesh)
    sampling, params = calibration.with_quantize(sampling, weights(cfg.model), "sha", str(workdir), 7)
    return images(sampling, params, num), sampling


@pytest.mark.parametrize("inner", [(40,), (5, 8)])
def test_a_product_is_the_exact_integer_arithmetic(inner):
    """Sums of int8 products in int32, then one multiplication; inputs rounded to the nearest level and clipped at 127."""
    kernel = RNG.integers(-127, 128, (*inner, 6)).astype(np.int8)
    x = (RNG.standard_normal((2, 3, *inner)) * 60).astype(np.float32)
    run = jax.jit(lambda tree, x: quantize.product(tree, quantize.enter(tree, x, jnp.float32), jnp.float32))
    scale, bias = np.ones(6, np.float32), np.zeros(6, np.float32)
    levels = np.clip(np.rint(x), -127, 127).astype(np.int64)
    assert np.abs(x).max() > 127
    exact = levels.reshape(2, 3, -1) @ kernel.reshape(-1, 6).astype(np.int64)
    tree = {"kernel": kernel, "scale": scale, "bias": bias, "input": np.float32(1)}
    found = run(jax.tree.map(jnp.asarray, tree), jnp.asarray(x))
    np.testing.assert_array_equal(found, exact)
    tree |= {"scale": RNG.random(6, np.float32), "bias": RNG.random(6, np.float32)}
    found = run(jax.tree.map(jnp.asarray, tree), jnp.asarray(x))
    np.testing.assert_allclose(found, exact * tree["scale"] + tree["bias"], rtol=1e-5, atol=1e-3)


def test_a_weight_is_off_by_at_most_half_a_level_of_its_channel():
    kernel = RNG.standard_normal((2, 30, 4, 5)).astype(np.float32) * np.logspace(-3, 3, 5, dtype=np.float32)
    kernel[1, :, 2, 3] = 0
    levels, scale = quantize.quantize_kernel(jnp.asarray(kernel), 1)
    assert levels.dtype == jnp.int8 and scale.shape == (2, 4, 5)
    error = np.abs(np.asarray(levels, np.float32) * scale[:, None] - kernel)
    assert (error <= 0.5001 * scale[:, None]).all()
    np.testing.assert_array_equal(np.abs(levels).max(axis=1), np.where(np.abs(kernel).max(axis=1) > 0, 127, 0))


@pytest.mark.parametrize(("kind", "more"), [*KINDS, *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW)])
def test_a_quantised_model_is_near_the_model(kind, more):
    """Every product of a block and nothing else is int8; the model's own inputs have the ranges that are measured."""
    model = ModelConfig(**TINY, conditioning=kind, **more)
    params, x = weights(model), jax.random.normal(jax.random.key(2), (2, 8, 8, 1))
    cond = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), conditioning.example(model, 2))
    both = jax.jit(functools.partial(dit.apply_measuring, model))
    run = jax.jit(dit.apply, static_argnums=0)
    plain, ranges = both(params, x, jnp.full(2, 300.0), cond)
    for mode, most in (("int8_weights", 0.03), ("int8", 0.06)):
        tree = quantize.quantize(params, ranges if mode == "int8" else None)
        paths = jax.tree_util.tree_flatten_with_path(tree)[0]
        small = {jax.tree_util.keystr(path) for path, leaf in paths if leaf.dtype == jnp.int8}
        kernels = {
            jax.tree_util.keystr(path) for path, _ in paths if path[0].key == "blocks" and path[-1].key == "kernel"
        }
        assert small == kernels and len(kernels) >= 4
        found = run(model, tree, x, jnp.full(2, 300.0), cond)
        assert 0 < float(jnp.linalg.norm(found - plain) / jnp.linalg.norm(plain)) < most
    if kind == "adaln_zero":
        seen = jax.jit(lambda *arguments: dict(dit.activations(model, *arguments)))(params, x, jnp.full(2, 300.0), cond)
        gate, up = seen["blocks[1]/mlp/fc1"][:, 0], seen["blocks[1]/mlp/fc1"][:, 1]
        np.testing.assert_allclose(ranges["mlp/fc2"][1], jnp.abs(jax.nn.silu(gate) * up).max(), rtol=1e-4)


def test_a_model_that_is_not_quantised_is_the_same_program():
    model = ModelConfig(**TINY)
    arguments = (weights(model), jnp.zeros((2, 8, 8, 1)), jnp.zeros(2), {"label": jnp.zeros(2, jnp.int32)})

    def direct(params, *rest):
        return dit.DiT(model, layers.as_it_is).apply({"params": params}, *rest)

    def apply(*every):
        return dit.apply(model, *every)

    texts = [jax.jit(f).lower(*arguments).as_text().partition("\n")[2] for f in (direct, apply)]
    assert texts[0] == texts[1] and "i8" not in texts[0]


def test_images_depend_on_neither_devices_nor_batches_nor_where_the_weights_are(tmp_path):
    """One device, two, and weights split over 2 x 2; each calibrates for itself."""
    cfg = settings()
    one, sampling = drawn(cfg, mesh_of(1), tmp_path / "one", 40)
    small = dataclasses.replace(cfg, sample=dataclasses.replace(cfg.sample, batch_size=16))
    for name, mesh in {"two": mesh_of(2), "split": mesh_of(4, data=2, fsdp=2)}.items():
        other, found = drawn(small, mesh, tmp_path / name, 40)
        assert found.scales.ranges == sampling.scales.ranges
        np.testing.assert_array_equal(other, one)
    plain, _ = drawn(settings(""), mesh_of(1), tmp_path / "plain")
    assert not (tmp_path / "plain").exists() and not np.array_equal(plain, one[:16])
    assert np.abs(plain.astype(int) - one[:16]).mean() < 4


def test_weights_alone_need_no_calibration_and_a_quarter_of_the_memory(tmp_path):
    found, sampling = drawn(settings("int8_weights"), mesh_of(1), tmp_path)
    assert sampling.scales is None and not os.listdir(tmp_path)
    plain, _ = drawn(settings(""), mesh_of(1), tmp_path)
    assert 0 < np.abs(plain.astype(int) - found).mean() < 2
    model = model_config("DiT-XL/2", image_size=256)
    for mode in ("int8", "int8_weights"):
        share = bytes_of(weight_shapes(model, mode)) / bytes_of(weight_shapes(model))
        assert 0.25 < share < 0.27


def test_scales_are_saved_and_never_another_models(tmp_path):
    cfg, mesh = settings(interval=(0.3, 0.8)), mesh_of(1)
    first, sampling = drawn(cfg, mesh, tmp_path)
    (name,) = os.listdir(tmp_path / "quantize")
    path, params = tmp_path / "quantize" / name, weights(cfg.model)
    kept = json.loads(path.read_text())
    assert name.startswith("7-") and kept["job"]["weights_sha256"] == "sha" and "images, seed 0" in kept["rule"]
    kept["ranges"]["mlp/fc2"] = [most / 8 for most in kept["ranges"]["mlp/fc2"]]
    path.write_text(json.dumps(kept))
    again, other = drawn(cfg, mesh, tmp_path)
    assert other.scales.sha256 != sampling.scales.sha256 and not np.array_equal(first, again)  # what is saved is used
    described = [found.describe("sha", 7, 3) for found in (sampling, other)]
    assert [job["sample.quantize"] for job in described] == ["int8", "int8"] and described[0] != described[1]

    def quantized(sha256):
        return calibration.with_quantize(draw.open_sampling(cfg, mesh), params, sha256, str(tmp_path), 7)

    quantized("other")
    (new,) = set(os.listdir(tmp_path / "quantize")) - {name}
    assert json.loads((tmp_path / "quantize" / new).read_text())["ranges"] == sampling.scales.ranges
    (tmp_path / "quantize" / new).write_bytes(path.read_bytes())
    with pytest.raises(UsageError, match=r"another model or sampling \(its weights_sha256 differs\).*remove it"):
        quantized("other")
    path.write_text(json.dumps(kept | {"ranges": {"mlp/fc1": [1.0]}}))
    with pytest.raises(UsageError, match=r"damaged, expected ranges of mlp/fc1, mlp/fc2 for 3 layers"):
        quantized("sha")


def test_reuse_is_calibrated_with_the_quantised_model(tmp_path):
    cfg, mesh = settings(reuse=0.6), mesh_of(1)
    sampling, params = calibration.with_quantize(
        draw.open_sampling(cfg, mesh), weights(cfg.model), "sha", str(tmp_path), 7
    )
    both = with_reuse(sampling, params, "sha", str(tmp_path), 7)
    (kept,) = (tmp_path / "reuse").iterdir()
    assert json.loads(kept.read_text())["job"]["quantize.sha256"] == sampling.scales.sha256
    assert not both.plan.everything and images(both, params).shape == (16, 8, 8, 1)


def test_records_name_it_and_only_then():
    plain, small = (draws_protocol(settings(mode)) for mode in ("", "int8"))
    assert "quantize" not in plain["samples"] and small["samples"] == plain["samples"] | {"quantize": "int8"}
    record = {"run": "a", "step": 1, "params": 1, "flops_train": 1.0, "flops_sample": 1.0, "metrics": {"fid": 2.0}}
    records = [
        (record | {"protocol": plain, "protocol_id": "p"}, "a:1"),
        (record | {"protocol": small | {"quantize": calibration.RULES["int8"]}, "protocol_id": "s"}, "a:2"),
    ]
    points = points_of(records, "fid")
    assert [point.quantize for point in points] == ["", "int8"] and "quantize int8" in points[1].sampling


def test_what_cannot_be_quantised_is_named():
    with pytest.raises(UsageError, match=r"sample.quantize: found 'int4', expected"):
        SampleConfig(quantize="int4")
    with pytest.raises(UsageError, match=r"sample.quantize: found 'int8', expected '' with sample.guide = 'w'"):
        SampleConfig(quantize="int8", guide="w")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            "TPU v4",
            "TPU v4 computes int8 products at 1 of the rate of 16-bit ones: an image takes at least 1.00 of its time",
        ),
        ("Tesla V100", "at 0.5 of the rate of 16-bit ones: an image takes at least 1.64 of its time"),
        (
            "TPU v3",
            "no rate of int8 products is known of TPU v3: 64% of the model's FLOPs may take several times as long",
        ),
        ("TPU v5 lite", ""),
    ],
)
def test_a_device_without_faster_int8_is_told_with_the_cost(caplog, kind, said):
    calibration.tell_speed.cache_clear()
    calibration.tell_speed(model_config("DiT-XL/2", image_size=256), "int8", kind)
    assert said in caplog.text if said else not caplog.text


def test_every_device_of_the_table_with_a_rate_of_int8_is_there():
    assert set(hardware.INT8) <= {device.kind for device in hardware.DEVICES.values()}
