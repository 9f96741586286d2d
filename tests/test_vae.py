"""The autoencoder: shapes, keys, normalisation; other people's tensors are taken whole or refused by name."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import write_vae

from dit_jax.error import UsageError
from dit_jax.models import vae
from dit_jax.models.vae import Normalisation, VAEConfig
from dit_jax.networks import vae as foreign
from dit_jax.networks.tensors import Tensors

SMALL = VAEConfig(widths=(8, 16, 16), blocks=1, groups=4)
TINY = VAEConfig(widths=(4, 8), blocks=1, groups=2)
encode = jax.jit(functools.partial(vae.encode, TINY))


def drawn(cfg):
    """Parameters of which no two are alike, in NumPy: quicker than compiling `init`."""
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.3 * draw.standard_normal(leaf.shape, np.float32), vae.shapes(cfg))


@pytest.fixture(scope="module")
def tiny():
    return drawn(TINY)


@pytest.fixture(scope="module")
def params():
    return drawn(SMALL)


@pytest.fixture(scope="module")
def tensors(params):
    """The small autoencoder under diffusers' names."""
    return write_vae(SMALL, params)


def read(arrays):
    return foreign.read(Tensors(arrays, "x.safetensors"), groups=SMALL.groups)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def latent_diffusion_names(tensors, prefix=""):
    """The same tensors as the checkpoints of latent diffusion have them: up stages from the finest, attention 1 x 1."""
    last, renamed = max(int(n) for n in re.findall(r"up_blocks\.(\d+)", " ".join(tensors))), {}
    rules = [
        (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"),
        (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{last - int(m[1])}.block"),
        (r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample"),
        (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        (r"attn_1\.group_norm", "attn_1.norm"),
        (r"to_([qkv])\.", r"\1."),
        (r"to_out\.0", "proj_out"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
    ]
    for name, value in tensors.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        renamed[prefix + name] = value[:, :, None, None] if value.ndim == 2 else value
    return renamed


def old_names(tensors):
    """As diffusers named attention at first."""
    rules = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in tensors.items():
        for new, old in rules.items():
            name = name.replace(new, old)
        renamed[name] = value
    return renamed


def test_the_default_is_stable_diffusions_of_83_653_863_parameters():
    shapes = vae.shapes(VAEConfig())
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == 83_653_863
    images = jax.ShapeDtypeStruct((2, 256, 192, 3), jnp.float32)
    mean, log_variance = jax.eval_shape(lambda p, x: vae.encode(VAEConfig(), p, x), shapes, images)
    assert mean.shape == log_variance.shape == (2, 32, 24, 4)
    decoded = jax.eval_shape(lambda p, z: vae.decode(VAEConfig(), p, z), shapes, mean)
    assert (decoded.shape, decoded.dtype) == (images.shape, images.dtype)


@pytest.mark.slow
def test_parameters_depend_on_the_key_only():
    cfg = VAEConfig(widths=(4,), blocks=1, groups=2)
    first, again, other = (vae.init(cfg, jax.random.key(seed)) for seed in (0, 0, 1))
    assert_same(first, again)
    kernels = [p["decoder"]["conv_in"]["kernel"] for p in (first, other)]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1
    assert kernels[0].std() == pytest.approx(1 / 6, rel=0.3)  # 1 / sqrt(inputs), 4 x 3 x 3 of them
    assert np.all(first["encoder"]["norm_out"]["scale"] == 1) and not np.any(first["encoder"]["norm_out"]["bias"])


def test_an_image_depends_on_no_other_of_its_batch(tiny):
    images = jax.random.uniform(jax.random.key(1), (3, 4, 8, 3), minval=-1.0)
    mean, log_variance = encode(tiny, images)
    assert mean.shape == log_variance.shape == (3, 2, 4, 4)
    changed = encode(tiny, images.at[0].set(0.5))
    np.testing.assert_allclose(changed[0][1:], mean[1:], atol=1e-5)
    np.testing.assert_allclose(changed[1][1:], log_variance[1:], atol=1e-5)
    assert np.abs(changed[0][0] - mean[0]).max() > 1e-2


def test_log_variances_are_clipped(tiny):
    bias = np.array([0, 0, 0, 0, 1e3, -1e3, 0, 0], np.float32)
    encoder = tiny["encoder"] | {"quant_conv": tiny["encoder"]["quant_conv"] | {"bias": bias}}
    _, log_variance = encode(tiny | {"encoder": encoder}, jnp.zeros((3, 4, 8, 3)))
    assert np.all(log_variance[..., 0] == 20) and np.all(log_variance[..., 1] == -30)
    assert np.all(np.abs(log_variance[..., 2:]) < 20)


def test_bfloat16_computes_what_float32_does_in_fewer_digits(tiny):
    latents = jax.random.normal(jax.random.key(3), (2, 2, 3, 4))
    exact, rough = (
        jax.jit(functools.partial(vae.decode, dataclasses.replace(TINY, dtype=dtype)))(tiny, latents)
        for dtype in ("float32", "bfloat16")
    )
    assert rough.dtype == jnp.float32
    assert 0 < np.abs(rough - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("shape", [(1, 10, 8, 3), (1, 8, 6, 3), (1, 8, 8, 4), (8, 8, 3)])
def test_images_that_do_not_fit_are_refused(params, shape):
    with pytest.raises(UsageError, match=r"images: found"):
        vae.encode(SMALL, params, jnp.zeros(shape))


def test_latents_that_do_not_fit_are_refused(params):
    with pytest.raises(UsageError, match=r"latents: found shape \(1, 2, 2, 3\), expected \(b, h, w, 4\)"):
        vae.decode(SMALL, params, jnp.zeros((1, 2, 2, 3)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"widths": ()}, "vae.widths: found ()"),
        ({"widths": (8, 10)}, "vae.groups: found 4, expected a divisor of every width"),
        ({"widths": (8, 0)}, "vae.widths[1]: found 0"),
        ({"blocks": 0}, "vae.blocks: found 0"),
        ({"channels": True}, "vae.channels: found True"),
        ({"latent_channels": -4}, "vae.latent_channels: found -4"),
        ({"dtype": "float64"}, "vae.dtype: found 'float64'"),
    ],
)
def test_configs_that_cannot_be_are_refused(change, says):
    with pytest.raises(UsageError, match=re.escape(says)):
        dataclasses.replace(SMALL, **change)


def test_whitening_measures_mean_0_and_deviation_1_in_every_channel():
    draw = np.random.default_rng(0)
    latents = draw.standard_normal((50, 4, 6, 3)).astype(np.float32) * [1.0, 5.0, 0.1] + [100.0, -2.0, 0.0]
    by = vae.whitening([latents[:7], latents[7:8], latents[8:]])
    white = ((latents - by.shift) * by.scale).astype(np.float32)
    np.testing.assert_allclose(white.mean(axis=(0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(white.std(axis=(0, 1, 2)), 1, atol=1e-4)
    np.testing.assert_allclose(by.shift, latents.mean(axis=(0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(by.scale, 1 / latents.std(axis=(0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(vae.denormalise(by, jnp.asarray(white)), latents, rtol=1e-5, atol=1e-5)


def test_one_number_normalises_all_channels():
    latents = jax.random.normal(jax.random.key(8), (2, 3, 3, 4))
    published = Normalisation(0.0, 0.18215)
    np.testing.assert_allclose(vae.denormalise(published, 0.18215 * latents), latents, rtol=1e-6)
    assert published.describe() == {"shift": 0.0, "scale": 0.18215}
    assert Normalisation((1.0, 2.0), (3.0, 4.0)).describe() == {"shift": [1.0, 2.0], "scale": [3.0, 4.0]}


@pytest.mark.parametrize(
    ("shift", "scale"),
    [(0.0, 0.0), (0.0, -1.0), (math.nan, 1.0), (0.0, math.inf), ((1.0,), (1.0, 2.0)), ((), 1.0), (0.0, (1.0, 0.0))],
)
def test_normalisations_that_cannot_be_are_refused(shift, scale):
    with pytest.raises(UsageError, match="normalisation"):
        Normalisation(shift, scale)


def test_normalisation_of_other_channels_is_refused():
    with pytest.raises(UsageError, match=r"normalisation.shift: found 3 channels, expected the latents' 4"):
        vae.denormalise(Normalisation((0.0,) * 3, (1.0,) * 3), jnp.zeros((1, 2, 2, 4)))


@pytest.mark.parametrize(
    ("batches", "says"),
    [
        ([], "found no latents"),
        ([np.ones((2, 2, 2, 4))], "found variances"),
        ([np.full((2, 2, 2, 4), np.nan)], "found variances"),
    ],
)
def test_whitening_needs_latents_that_vary(batches, says):
    with pytest.raises(UsageError, match=says):
        vae.whitening(batches)


def test_read_undoes_write_in_every_bit(params, tensors):
    cfg, found = read(write_vae(SMALL, params))
    assert cfg == SMALL
    assert_same(found, params)
    again = write_vae(*read(tensors))
    assert again.keys() == tensors.keys()
    assert all(np.array_equal(again[name], tensors[name]) for name in tensors)


def test_either_familys_names_give_the_same_parameters(tensors):
    cfg, expected = read(tensors)
    others = {"model.diffusion_model.input_blocks.0.0.weight": np.zeros(3), "cond_stage_model.ids": np.arange(2)}
    whole = latent_diffusion_names(tensors, foreign.PREFIX) | others
    as_convolutions = {name: v[:, :, None, None] if v.ndim == 2 else v for name, v in tensors.items()}
    for arrays in (latent_diffusion_names(tensors), whole, old_names(tensors), as_convolutions):
        found_cfg, found = read(arrays)
        assert found_cfg == cfg
        assert_same(found, expected)
    assert "first_stage_model.decoder.up.2.block.0.conv1.weight" in whole
    assert "decoder.mid.attn_1.proj_out.bias" in latent_diffusion_names(tensors)


def test_other_networks_are_ignored_beside_the_prefix_only(tensors):
    arrays = latent_diffusion_names(tensors) | {"loss.logvar": np.zeros((), np.float32)}
    with pytest.raises(UsageError, match=r"does not have: loss.logvar"):
        read(arrays)
    arrays = latent_diffusion_names(tensors, foreign.PREFIX) | {f"{foreign.PREFIX}loss.logvar": np.zeros(())}
    with pytest.raises(UsageError, match=r"does not have: first_stage_model.loss.logvar"):
        read(arrays)


def kinds(tensors):
    """One name of each kind: what is left when numbers are struck out."""
    chosen = {re.sub(r"\d+", "", name): name for name in tensors}
    return sorted(chosen.values())


def test_every_kind_of_tensor_is_missed_by_name(tensors):
    for name in kinds(tensors):
        with pytest.raises(UsageError, match=rf"x\.safetensors: .*{re.escape(name.rsplit('.', 1)[0])}"):
            read({other: value for other, value in tensors.items() if other != name})


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (lambda value: np.full_like(value, np.nan), "holds numbers that are not finite"),
        (lambda value: np.ones(value.shape, np.int32), "found int32, expected floats"),
        (lambda value: np.concatenate([value, value]), "found shape"),
        (lambda value: value[None, None, None], "found shape"),
    ],
    ids=["nan", "integer", "longer", "rank"],
)
def test_every_kind_of_tensor_is_refused_by_name(tensors, broken, says):
    for name in kinds(tensors):
        with pytest.raises(UsageError, match=says) as caught:
            read(tensors | {name: broken(tensors[name])})
        sized = re.fullmatch(r"encoder.down_blocks.\d.resnets.0.conv1.weight|decoder.conv_in.weight", name)
        if not (sized and says == "found shape"):  # a width is read off these: then others are found to differ
            assert f"x.safetensors: {name}: " in str(caught.value)


@pytest.mark.parametrize(
    "name", ["encoder.conv_in.scale", "decoder.up_blocks.3.resnets.0.conv1.weight", "quant_conv.weight.ema"]
)
def test_a_tensor_too_many_is_refused_by_name(tensors, name):
    with pytest.raises(UsageError, match=rf"found 1 tensors that the network does not have: {re.escape(name)}"):
        read(tensors | {name: np.zeros(3, np.float32)})


def test_groups_that_no_width_has_are_refused(tensors):
    with pytest.raises(UsageError, match=r"x\.safetensors: .*vae\.groups: found 32, expected a divisor"):
        foreign.read(Tensors(tensors, "x.safetensors"))
