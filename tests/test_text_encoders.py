"""Encoders of text and images: padding, pooling, positions, precision, FLOPs."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from encoders import BERT, MODULES, T5, TEXT, VISION, VOCABULARY, drawn

from dit_jax import flops
from dit_jax.error import UsageError
from dit_jax.models import bert, clip, t5
from dit_jax.models.encoder import Sizes


@functools.cache
def compiled(cfg):
    """Our encoder of text as a function (params, ids, mask) -> states."""
    if isinstance(cfg, clip.TextConfig):
        return jax.jit(lambda params, ids, mask: clip.apply_text(cfg, params, ids).states)
    return jax.jit(functools.partial(MODULES[type(cfg)].apply, cfg))


@functools.cache
def whole(cfg):
    """CLIP's encoder as a function (params, ids or images) -> (states, pooled)."""
    return jax.jit(functools.partial(clip.apply_text if isinstance(cfg, clip.TextConfig) else clip.apply_vision, cfg))


mean_pool = jax.jit(bert.mean_pool)


def captions(b=3, n=9, seed=0):
    """(ids, mask) with 9, 7 and 5 tokens; the last valid one is the end."""
    ids = np.random.default_rng(seed).integers(3, VOCABULARY - 1, (b, n)).astype(np.int32)
    lengths = n - 2 * np.arange(b)
    mask = np.arange(n) < lengths[:, None]
    ids[np.arange(b), lengths - 1] = VOCABULARY - 1
    return ids, mask


@pytest.mark.parametrize("cfg", [TEXT, T5, BERT], ids=lambda cfg: type(cfg).__name__)
def test_padding_changes_no_valid_state(cfg):
    """Neither what the padding holds nor how much of it there is; and it is no accident that all are equal: a token does matter."""
    ids, mask = captions()
    states = compiled(cfg)(params := drawn(cfg), ids, mask)
    assert states.shape == (3, 9, 16) and states.dtype == jnp.float32
    other = compiled(cfg)(params, np.where(mask, ids, 1), mask)
    np.testing.assert_allclose(other[mask], states[mask], rtol=1e-5, atol=1e-5)
    alone = compiled(cfg)(params, ids[2:, :5], mask[2:, :5])
    np.testing.assert_allclose(alone[0], states[2, :5], rtol=1e-4, atol=1e-4)
    changed = compiled(cfg)(params, np.where(np.arange(9) == 1, 2, ids), mask)
    assert np.abs(changed - states)[0, 4].max() > 1e-2


def test_text_of_clip_sees_no_later_token_and_others_do():
    ids, mask = captions()
    later = np.where(np.arange(9) == 6, 2, ids)
    for cfg, causal in ((TEXT, True), (T5, False), (BERT, False)):
        states, other = (compiled(cfg)(drawn(cfg), some, mask) for some in (ids, later))
        assert (np.abs(other - states)[0, :6].max() < 1e-6) == causal


def test_the_pooled_state_is_at_the_first_end_or_at_the_largest_id():
    """OpenAI's published configs state the end 2, which no caption has: they mean the largest id (the end, also where it pads)."""
    ids, mask = captions()
    ids = np.where(mask, ids, VOCABULARY - 1)
    params = drawn(TEXT)
    states, pooled = whole(TEXT)(params, ids)
    legacy = whole(dataclasses.replace(TEXT, end=clip.LEGACY_END))(params, ids)
    at_end = states[np.arange(3), [8, 6, 4]] @ params["projection"]["kernel"]
    np.testing.assert_allclose(pooled, at_end, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(legacy.pooled, pooled)
    other = whole(dataclasses.replace(TEXT, end=5))(params, np.where(np.arange(9) == 1, 5, ids))
    np.testing.assert_allclose(other.pooled, other.states[:, 1] @ params["projection"]["kernel"], rtol=1e-5, atol=1e-5)


def test_without_a_projection_pooled_is_as_wide_as_a_state():
    cfg = dataclasses.replace(TEXT, projection=0)
    states, pooled = whole(cfg)(drawn(cfg), captions()[0])
    np.testing.assert_array_equal(pooled, states[np.arange(3), [8, 6, 4]])


def test_images_of_bytes_are_normalised_and_pooled_at_the_token():
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    params = drawn(VISION)
    states, pooled = whole(VISION)(params, images)
    assert states.shape == (2, 5, 16) and pooled.shape == (2, 10) and pooled.dtype == jnp.float32
    again = whole(VISION)(params, images.astype(np.float32))
    np.testing.assert_allclose(again.pooled, pooled, rtol=1e-6)
    with pytest.raises(UsageError, match=r"images: found shape \(2, 8, 8\), expected \(b, 8, 8, 3\)"):
        whole(VISION)(params, images[..., 0])


def test_buckets_of_relative_positions_are_the_papers():
    """By hand for 8 buckets up to distance 16: 4 for each direction, 2 of them exact; 2 + floor(2 log(r / 2) / log(8)) from r = 2."""
    past = [0, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    found = t5.buckets(10, 8, 16)
    assert found[9].tolist() == past[::-1]
    assert found[0].tolist() == [0] + [4 + bucket for bucket in past[1:]]
    # T5's own: 8 exact distances, then log-spaced up to 128; the edges, in integers: 8 (16)^(i / 8)
    found = t5.buckets(200, 32, 128)[199][::-1]
    edges = [8, 12, 16, 23, 32, 46, 64, 91]
    expected = [r if r < 8 else 7 + sum(r >= edge for edge in edges) for r in range(200)]
    assert found.tolist() == expected
    np.testing.assert_array_equal(t5.buckets(200, 32, 128)[0, 1:], np.array(expected[1:]) + 16)


def test_an_id_that_is_not_in_the_table_is_loud():
    ids, mask = captions()
    assert np.isnan(compiled(BERT)(drawn(BERT), np.where(np.arange(9) == 1, VOCABULARY, ids), mask)).any()


def test_a_caption_of_padding_alone_gives_finite_states():
    ids, mask = captions()
    for cfg in (T5, BERT):
        states = compiled(cfg)(drawn(cfg), ids, np.zeros_like(mask))
        assert np.isfinite(states).all()
    assert not np.asarray(mean_pool(states, np.zeros_like(mask))).any()


def test_mean_pooling_takes_the_valid_tokens():
    states = np.random.default_rng(0).standard_normal((3, 9, 4)).astype(np.float32)
    mask = captions()[1]
    expected = [states[i, : 9 - 2 * i].mean(axis=0) for i in range(3)]
    np.testing.assert_allclose(mean_pool(states, mask), expected, rtol=1e-5, atol=1e-6)


LOWER = dataclasses.replace(T5, dtype="bfloat16")


def test_bfloat16_does_not_overflow():
    """Activations of T5's MLP leave float16 (65,504) in the large models."""
    params, (ids, mask) = drawn(T5), captions()
    for name in ("fc1", "gate"):
        params["blocks"]["mlp"][name]["kernel"] *= 1000
    layer = jax.tree.map(lambda x: x[0], params["blocks"]["mlp"])
    assert np.abs(layer["fc1"]["kernel"] * layer["gate"]["kernel"]).max() > 65_504
    states, full = (compiled(cfg)(params, ids, mask) for cfg in (LOWER, T5))
    assert states.dtype == jnp.float32 and np.isfinite(states).all()
    assert np.abs(states - full)[mask].max() < 0.1 * np.abs(full).max()


def test_bfloat16_keeps_small_updates_of_a_large_stream():
    """Beside a stream of thousands, where bfloat16 steps by 16, updates below 1 arrive as in float32."""
    params, (ids, mask) = drawn(T5), captions()
    params["tokens"]["embedding"] *= 1e4
    params["blocks"]["attention"]["out"]["kernel"] *= 0
    updates = []
    for cfg in (T5, LOWER):
        states = []
        for scale in (0, 0.01):
            fc2 = {"kernel": params["blocks"]["mlp"]["fc2"]["kernel"] * scale}
            mlp = params["blocks"]["mlp"] | {"fc2": fc2}
            states.append(compiled(cfg)(params | {"blocks": params["blocks"] | {"mlp": mlp}}, ids, mask)[mask])
        updates.append(np.asarray(states[1] - states[0]))
    assert np.abs(updates[0]).max() > 1e-6
    assert np.abs(updates[1] - updates[0]).max() < 0.1 * np.abs(updates[0]).max()


@pytest.mark.parametrize("cfg", [TEXT, T5, BERT], ids=lambda cfg: type(cfg).__name__)
def test_parameters_of_half_precision_are_taken(cfg):
    ids, mask = captions()
    halved = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), drawn(cfg))
    back = jax.tree.map(lambda x: x.astype(np.float32), halved)
    found, expected = (compiled(cfg)(some, ids, mask) for some in (halved, back))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def wide(cfg):
    """One block, so that XLA's loop is gone, and wide, so that norms and activations are few."""
    sizes = {"depth": 1, "width": 256, "heads": 4, "hidden": 640}
    return dataclasses.replace(cfg, **sizes, **({"head_width": 48} if isinstance(cfg, t5.T5Config) else {}))


@pytest.mark.parametrize("cfg", [TEXT, VISION, T5, BERT], ids=lambda cfg: type(cfg).__name__)
def test_flops_match_the_compiler(cfg):
    """XLA counts norms, activations and softmax too, so it must come out above, and near for a wide model."""
    cfg = dataclasses.replace(wide(cfg), **({"size": 32} if cfg is VISION else {}))
    params = MODULES[type(cfg)].shapes(cfg)
    ids = jax.ShapeDtypeStruct((1, 12), jnp.int32)
    if isinstance(cfg, clip.VisionConfig):
        tokens, lowered = (
            cfg.tokens,
            jax.jit(functools.partial(clip.apply_vision, cfg)).lower(
                params, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
            ),
        )
    elif isinstance(cfg, clip.TextConfig):
        tokens, lowered = 12, jax.jit(functools.partial(clip.apply_text, cfg)).lower(params, ids)
    else:
        tokens, lowered = 12, compiled(cfg).lower(params, ids, jax.ShapeDtypeStruct((1, 12), bool))
    found = lowered.compile().cost_analysis()["flops"]
    assert 1.0 < found / flops.encoder_flops(cfg, tokens) < 1.05
    deeper = dataclasses.replace(cfg, depth=3)
    ends = sum(flops.encoder_macs(cfg, tokens)[name] for name in ("patch_embedding", "projection"))
    blocks = flops.encoder_flops(cfg, tokens) - 2 * ends
    assert flops.encoder_flops(deeper, tokens) == 3 * blocks + 2 * ends


def test_sizes_of_the_published_encoders():
    """Parameters as the published files have them."""
    big = clip.TextConfig(depth=32, width=1280, heads=20, hidden=5120, projection=1280, activation="gelu")
    for cfg, expected in (
        (clip.TextConfig(), 123_060_480),
        (clip.VisionConfig(), 303_966_208),
        (big, 694_659_840),
        (t5.T5Config(), 4_762_310_656),
        (bert.BertConfig(), 22_565_376),
    ):
        assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(MODULES[type(cfg)].shapes(cfg))) == expected


@pytest.mark.parametrize(
    "cls,fields,match",
    [
        (bert.BertConfig, {"heads": 7}, "BertConfig.heads: found 7, expected a divisor of 384"),
        (clip.TextConfig, {"depth": 0}, "TextConfig.depth: found 0, expected an integer of at least 1"),
        (
            clip.TextConfig,
            {"activation": "relu"},
            "TextConfig.activation: found 'relu', expected one of quick_gelu, gelu",
        ),
        (clip.VisionConfig, {"patch": 13}, "VisionConfig.patch: found 13, expected a divisor of the side 224"),
        (t5.T5Config, {"dtype": "float16"}, "T5Config.dtype: found 'float16', expected one of float32, bfloat16"),
        (Sizes, {"epsilon": 0.0}, "Sizes.epsilon: found 0.0, expected a small number"),
    ],
)
def test_sizes_that_cannot_be_are_refused(cls, fields, match):
    with pytest.raises(UsageError, match=match):
        cls(**fields)


def test_too_many_tokens_are_refused():
    ids = jnp.ones((1, 13), jnp.int32)
    for call in (lambda: clip.apply_text(TEXT, {}, ids), lambda: bert.apply(BERT, {}, ids, ids > 0)):
        with pytest.raises(UsageError, match="ids: found 13 tokens, expected at most 12"):
            call()
    with pytest.raises(UsageError, match=r"found shape \(1, 13\) and a mask \(1, 12\)"):
        t5.apply(T5, {}, ids, ids[:, :12] > 0)
