"""The DiT: identity at the start, positions, free sizes, and options that change speed but not results."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.config import ModelConfig
from dit_jax.models import dit
from dit_jax.models.conditioning import positions, timestep_features
from dit_jax.models.layers import gelu, layer_norm, patchify, softmax_attention, unpatchify

SMALL = ModelConfig(depth=3, width=32, heads=4, patch=2, input_size=8, channels=3, classes=5)


def inputs(cfg, batch=4):
    x = jax.random.normal(jax.random.key(1), (batch, cfg.input_size, cfg.input_size, cfg.channels))
    return x, jnp.linspace(0.0, 999.0, batch), jnp.arange(batch) % (cfg.classes + 1)


apply = jax.jit(dit.apply, static_argnums=0)


@functools.cache
def _initial(cfg):
    return jax.jit(dit.init, static_argnums=0)(cfg, jax.random.key(0))


def initial_params(cfg):
    """Weights as they are born; the nested dictionaries are the caller's own."""
    return jax.tree.map(lambda leaf: leaf, _initial(cfg))


def random_params(cfg, seed=0):
    """Weights with no zeros left, so that every path matters."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: leaf + (0.05 * rng.standard_normal(leaf.shape)).astype(np.float32), initial_params(cfg)
    )


def test_output_is_zero_at_the_start():
    out = apply(SMALL, initial_params(SMALL), *inputs(SMALL))
    assert out.shape == (4, 8, 8, 6)
    assert not np.any(np.asarray(out))


def test_blocks_start_as_the_identity():
    """With zero gates, labels and times cannot reach the tokens: the deepest activations are the patch embedding."""
    params = initial_params(SMALL)
    params["output"]["linear"]["kernel"] = jax.random.normal(
        jax.random.key(5), params["output"]["linear"]["kernel"].shape
    )
    x, t, labels = inputs(SMALL)
    out = apply(SMALL, params, x, t, labels)
    assert np.any(np.asarray(out))
    np.testing.assert_array_equal(out, apply(SMALL, params, x, t[::-1], labels[::-1]))


def test_labels_times_and_positions_matter_once_trained():
    params, (x, t, labels) = random_params(SMALL), inputs(SMALL)
    out = apply(SMALL, params, x, t, labels)
    assert np.abs(out - apply(SMALL, params, x, t, (labels + 1) % 6)).max() > 1e-3
    assert np.abs(out - apply(SMALL, params, x, t + 50, labels)).max() > 1e-3
    rolled = apply(SMALL, params, jnp.roll(x, 2, axis=1), t, labels)
    assert np.abs(jnp.roll(out, 2, axis=1) - rolled).max() > 1e-3


def test_initial_scales():
    cfg = dataclasses.replace(SMALL, width=256, heads=4, classes=1000)
    params = initial_params(cfg)
    qkv = np.asarray(params["blocks"]["attention"]["qkv"]["kernel"])
    assert np.abs(qkv).max() == pytest.approx(np.sqrt(6 / (256 + 3 * 256)), rel=0.01)  # Xavier on the fused matrix
    patch = np.asarray(params["patch_embedding"]["kernel"])
    assert np.abs(patch).max() == pytest.approx(np.sqrt(6 / (12 + 256)), rel=0.01)
    assert np.std(params["label_embedding"]["table"]["embedding"]) == pytest.approx(0.02, rel=0.02)
    assert np.std(params["time_embedding"]["fc1"]["kernel"]) == pytest.approx(0.02, rel=0.02)
    assert params["label_embedding"]["table"]["embedding"].shape == (1001, 256)
    for part in (params["blocks"]["modulation"], params["output"]["modulation"], params["output"]):
        assert not np.any(np.asarray(part["linear"]["kernel"]))


def test_layers_start_different():
    kernel = np.asarray(initial_params(SMALL)["blocks"]["mlp"]["fc1"]["kernel"])
    assert kernel.shape == (3, 32, 128)
    assert not np.allclose(kernel[0], kernel[1])


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(cfg, params, batch):
    return jax.value_and_grad(lambda p: jnp.square(dit.apply(cfg, p, *batch)).mean())(params)


@pytest.mark.parametrize("changes", [{"remat": "dots"}, {"remat": "full"}, {"unroll": 3}])
def test_remat_and_unroll_change_nothing_but_speed(changes):
    params, batch = random_params(SMALL), inputs(SMALL)
    value, grads = loss_and_gradients(SMALL, params, batch)
    value2, grads2 = loss_and_gradients(dataclasses.replace(SMALL, **changes), params, batch)
    assert float(value) == pytest.approx(float(value2), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5), grads, grads2)


def test_bfloat16_compute_keeps_float32_weights_and_output():
    cfg = dataclasses.replace(SMALL, dtype="bfloat16", qk_norm=True)
    params = random_params(cfg)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    out = apply(cfg, params, *inputs(cfg))
    exact = apply(dataclasses.replace(cfg, dtype="float32"), params, *inputs(cfg))
    assert out.dtype == jnp.float32
    assert 0 < np.abs(out - exact).max() < 0.05 * np.abs(exact).max()


def test_qk_norm_bounds_the_logits():
    """Queries and keys of any size give the same attention: scaling the projection of q and k changes nothing."""
    cfg = dataclasses.replace(SMALL, qk_norm=True)
    params, batch = random_params(cfg), inputs(cfg)
    scaled = jax.tree.map(lambda a: a, params)
    for name in ("kernel", "bias"):
        weight = params["blocks"]["attention"]["qkv"][name]
        axis = 2 if name == "kernel" else 1
        factor = jnp.array([100.0, 100.0, 1.0]).reshape([3 if i == axis else 1 for i in range(weight.ndim)])
        scaled["blocks"]["attention"]["qkv"][name] = weight * factor
    np.testing.assert_allclose(apply(cfg, params, *batch), apply(cfg, scaled, *batch), atol=2e-4)
    plain = dataclasses.replace(cfg, qk_norm=False)
    assert np.abs(apply(plain, params, *batch) - apply(plain, scaled, *batch)).max() > 1e-2


@pytest.mark.parametrize("size,patch,channels", [(8, 1, 1), (12, 4, 3), (16, 8, 4)])
def test_sizes_patches_and_channels_are_free(size, patch, channels):
    cfg = ModelConfig(depth=1, width=16, heads=2, patch=patch, input_size=size, channels=channels, classes=3)
    out = apply(cfg, initial_params(cfg), *inputs(cfg, 2))
    assert out.shape == (2, size, size, 2 * channels)


def test_positions_encode_the_column_first():
    table = positions(4, 16)
    assert table.shape == (16, 16)
    np.testing.assert_array_equal(table[0::4, :8], np.tile(table[:1, :8], (4, 1)))  # one column: equal first halves
    np.testing.assert_array_equal(table[:4, 8:], np.tile(table[:1, 8:], (4, 1)))  # one row: equal second halves
    frequencies = 1 / 10_000 ** (np.arange(4) / 4)
    np.testing.assert_allclose(
        table[3, :8], np.concatenate([np.sin(3 * frequencies), np.cos(3 * frequencies)]), rtol=1e-6
    )


def test_timesteps_are_cosines_then_sines():
    features = np.asarray(timestep_features(jnp.array([0.0, 10.0]), 256))
    np.testing.assert_array_equal(features[0], np.repeat([1.0, 0.0], 128))
    frequencies = np.exp(-np.log(10_000) * np.arange(128) / 128)
    expected = np.concatenate([np.cos(10 * frequencies), np.sin(10 * frequencies)])
    np.testing.assert_allclose(features[1], expected, atol=2e-6)


def test_patches_go_row_by_row_and_back():
    x = jnp.arange(2 * 4 * 4 * 3).reshape(2, 4, 4, 3).astype(jnp.float32)
    patches = patchify(x, 2)
    np.testing.assert_array_equal(patches[0, 1], x[0, :2, 2:].reshape(-1))
    np.testing.assert_array_equal(unpatchify(patches, 2, 2, 2), x)


def pulled_back(function, *inputs):
    """What a function puts out and, for a random direction of that, the gradients of its inputs."""
    out, pull = jax.vjp(function, *inputs)
    return out, *pull(jax.random.normal(jax.random.key(9), out.shape).astype(out.dtype))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_attention_and_its_gradient_are_those_of_jax(dtype, tolerance):
    """The yardstick is computed in float32: keys are as many as queries or not, logits as large as 30."""
    for keys in (9, 2):
        shapes = [(3, 9, 4, 16), (3, keys, 4, 16), (3, keys, 4, 16)]
        parts = [2.7 * jax.random.normal(jax.random.key(i), shape).astype(dtype) for i, shape in enumerate(shapes)]
        found = jax.jit(lambda *p: pulled_back(softmax_attention, *p))(*parts)
        exact = pulled_back(jax.nn.dot_product_attention, *[p.astype(jnp.float32) for p in parts])
        for ours, theirs in zip(found, exact, strict=True):
            assert ours.dtype == dtype
            scale = float(jnp.abs(theirs).max())
            np.testing.assert_allclose(ours.astype(jnp.float32), theirs, rtol=0, atol=tolerance * scale)


def test_gelu_and_its_kept_slope_are_those_of_jax():
    x = jnp.linspace(-12, 12, 4001)
    for ours, theirs in zip(
        pulled_back(gelu, x), pulled_back(functools.partial(jax.nn.gelu, approximate=True), x), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)  # tanh near -1 is multiplied by 7


def test_layer_norm_in_one_pass_is_exact_also_far_from_zero():
    """Against float64, rows whose mean is up to 30 deviations; a constant row gives zeros, not NaN."""
    for mean, tolerance in ((0.0, 1e-6), (30.0, 3e-4)):
        x = mean + np.random.default_rng(0).standard_normal((64, 1152))
        x = x.astype(np.float32)
        wide = x.astype(np.float64)
        exact = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
        np.testing.assert_allclose(layer_norm(jnp.asarray(x)), exact, rtol=0, atol=tolerance * np.abs(exact).max())
    assert np.abs(layer_norm(jnp.full((2, 64), 7.3))).max() < 1.0
