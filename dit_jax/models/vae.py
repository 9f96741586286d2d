"""Autoencoder of latent diffusion: images to the moments of a Gaussian over latents, latents to images.

Rombach et al. 2022 (arXiv 2112.10752), section 3.1 and appendix G, the variant with a KL penalty. The posterior of a
latent is q(z|x) = N(mean, exp(log variance)); a diffusion model sees (z - shift) scale.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.error import UsageError, number, shown

LOG_VARIANCE = (-30.0, 20.0)  # bounds in the training of the published weights


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of an autoencoder, by default Stable Diffusion 1.x's (83,653,863 parameters). Raises UsageError on an invalid field."""

    channels: int = 3  # of an image
    latent_channels: int = 4
    widths: tuple = (128, 256, 512, 512)  # channels of each resolution, finest first; all but the last halve the sides
    blocks: int = 2  # residual blocks per resolution in the encoder; the decoder has one more
    groups: int = 32  # of the group norms; affects no tensor's shape
    dtype: str = "float32"  # of the compute; parameters, norms, softmax and results are always float32
    quant: bool = (
        True  # a 1 x 1 convolution on each side of the latent, as in Stable Diffusion 1 and 2, not in SD3 and FLUX
    )
    scale: float = (
        0.18215  # published normalisation, (z - shift) scale, which `encode` notes beside latents; 0 = unknown
    )
    shift: float = 0.0

    def __post_init__(self):
        if not (number(self.scale) and number(self.shift) and self.scale >= 0):
            found = f"{shown(self.scale)}, {shown(self.shift)}"
            raise UsageError(f"vae.scale, shift: found {found}, expected numbers, scale above 0, or 0 = unknown")
        if not isinstance(self.widths, tuple) or not self.widths:
            raise UsageError(f"vae.widths: found {shown(self.widths)}, expected a tuple of at least one width")
        numbers = {name: getattr(self, name) for name in ("channels", "latent_channels", "blocks", "groups")}
        for name, value in numbers.items() | {(f"widths[{i}]", width) for i, width in enumerate(self.widths)}:
            if type(value) is not int or value < 1:
                raise UsageError(f"vae.{name}: found {shown(value)}, expected an integer of at least 1")
        for width in self.widths:
            if width % self.groups:
                raise UsageError(f"vae.groups: found {self.groups}, expected a divisor of every width in {self.widths}")
        if self.dtype not in ("float32", "bfloat16"):
            raise UsageError(f"vae.dtype: found {shown(self.dtype)}, expected float32 or bfloat16")

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel along a side."""
        return 2 ** (len(self.widths) - 1)


def _conv(cfg: VAEConfig, width: int, name: str, side: int = 3, **options):
    """A convolution that keeps height and width unless `options` say otherwise."""
    return nn.Conv(width, (side, side), dtype=jnp.dtype(cfg.dtype), name=name, **options)


def _norm(cfg: VAEConfig, name: str):
    """Group norm (Wu & He 2018) in float32; the variance is the mean squared deviation, as E[x^2] - E[x]^2 would cancel."""
    return nn.GroupNorm(cfg.groups, epsilon=1e-6, dtype=jnp.float32, use_fast_variance=False, name=name)


class Block(nn.Module):
    """Residual block, (b, h, w, c) -> (b, h, w, width): norm, SiLU, convolution, twice; a 1 x 1 shortcut if c differs from width."""

    cfg: VAEConfig
    width: int

    @nn.compact
    def __call__(self, x):
        cfg = self.cfg
        h = _conv(cfg, self.width, "conv1")(nn.silu(_norm(cfg, "norm1")(x)))
        h = _conv(cfg, self.width, "conv2")(nn.silu(_norm(cfg, "norm2")(h)))
        if x.shape[-1] != self.width:
            x = _conv(cfg, self.width, "shortcut", side=1)(x)
        return x + h


class Attention(nn.Module):
    """Residual single-head self-attention over all positions, (b, h, w, c) -> (b, h, w, c)."""

    cfg: VAEConfig

    @nn.compact
    def __call__(self, x):
        b, height, width, c = x.shape
        dense = functools.partial(nn.Dense, c, dtype=jnp.dtype(self.cfg.dtype))
        tokens = _norm(self.cfg, "norm")(x).reshape(b, height * width, c)
        q, k, v = (dense(name=name)(tokens)[:, :, None] for name in ("q", "k", "v"))
        h = jax.nn.dot_product_attention(q, k, v, implementation="xla")
        return x + dense(name="out")(h[:, :, 0]).reshape(x.shape)


class Middle(nn.Module):
    """Block, attention, block at the coarsest resolution, (b, h, w, c) -> (b, h, w, c)."""

    cfg: VAEConfig

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        h = Block(self.cfg, width, name="first")(x)
        h = Attention(self.cfg, name="attention")(h)
        return Block(self.cfg, width, name="second")(h)


class Stage(nn.Module):
    """Residual blocks at one resolution, then `resample`: "down" halves the sides, "up" doubles them, "" keeps them."""

    cfg: VAEConfig
    width: int
    blocks: int
    resample: str

    @nn.compact
    def __call__(self, x):
        for j in range(self.blocks):
            x = Block(self.cfg, self.width, name=f"block_{j}")(x)
        if self.resample == "down":  # pads below and at the right only
            return _conv(self.cfg, self.width, "downsample", strides=2, padding=((0, 1), (0, 1)))(x)
        if self.resample == "up":
            return _conv(self.cfg, self.width, "upsample")(_doubled(x))
        return x


def _doubled(x: jax.Array) -> jax.Array:
    """Nearest-neighbour upsampling, (b, h, w, c) -> (b, 2h, 2w, c)."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


class Encoder(nn.Module):
    """Images (b, h, w, c) -> concatenated mean and log variance (b, h / factor, w / factor, 2 z), float32."""

    cfg: VAEConfig

    @nn.compact
    def __call__(self, images):
        cfg, last = self.cfg, len(self.cfg.widths) - 1
        h = _conv(cfg, cfg.widths[0], "conv_in")(images)
        for i, width in enumerate(cfg.widths):
            h = Stage(cfg, width, cfg.blocks, "down" if i < last else "", name=f"down_{i}")(h)
        h = _norm(cfg, "norm_out")(Middle(cfg, name="middle")(h))
        h = _conv(cfg, 2 * cfg.latent_channels, "conv_out")(nn.silu(h))
        h = _conv(cfg, 2 * cfg.latent_channels, "quant_conv", side=1)(h) if cfg.quant else h
        return h.astype(jnp.float32)


class Decoder(nn.Module):
    """Latents (b, h / factor, w / factor, z) -> images (b, h, w, c), float32. Its stages are numbered from the coarsest."""

    cfg: VAEConfig

    @nn.compact
    def __call__(self, latents):
        cfg, last = self.cfg, len(self.cfg.widths) - 1
        h = _conv(cfg, cfg.latent_channels, "post_quant_conv", side=1)(latents) if cfg.quant else latents
        h = _conv(cfg, cfg.widths[-1], "conv_in")(h)
        h = Middle(cfg, name="middle")(h)
        for i, width in enumerate(reversed(cfg.widths)):
            h = Stage(cfg, width, cfg.blocks + 1, "up" if i < last else "", name=f"up_{i}")(h)
        h = nn.silu(_norm(cfg, "norm_out")(h))
        return _conv(cfg, cfg.channels, "conv_out")(h).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def init(cfg: VAEConfig, key: jax.Array) -> dict:
    """Initial parameters {"encoder": ..., "decoder": ...}, nested dicts of float32 arrays."""
    first, second = jax.random.split(key)
    images = jnp.zeros((1, cfg.factor, cfg.factor, cfg.channels))
    latents = jnp.zeros((1, 1, 1, cfg.latent_channels))
    return {
        "encoder": Encoder(cfg).init(first, images)["params"],
        "decoder": Decoder(cfg).init(second, latents)["params"],
    }


def shapes(cfg: VAEConfig) -> dict:
    """Shapes of the parameters from `init`, as jax.ShapeDtypeStruct."""
    return jax.eval_shape(functools.partial(init, cfg), jax.random.key(0))


def encode(cfg: VAEConfig, params: dict, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Posterior of images (b, h, w, channels) in [-1, 1]: mean and log variance, each (b, h / factor, w / factor, z) float32.

    The log variance is clipped to LOG_VARIANCE. Raises UsageError on a wrong number of channels, or if `cfg.factor` does not divide
    height and width.
    """
    _check("images", images, cfg.channels)
    if images.shape[1] % cfg.factor or images.shape[2] % cfg.factor:
        height, width = images.shape[1:3]
        raise UsageError(
            f"images: found {height} x {width} pixels, expected multiples of {cfg.factor}; crop or resize them"
        )
    mean, log_variance = jnp.split(Encoder(cfg).apply({"params": params["encoder"]}, images), 2, axis=-1)
    return mean, jnp.clip(log_variance, *LOG_VARIANCE)


def decode(cfg: VAEConfig, params: dict, latents: jax.Array) -> jax.Array:
    """Images (b, factor h, factor w, channels), float32 near [-1, 1] but not clipped, of unnormalised latents (b, h, w, z).

    Raises UsageError on a wrong number of channels.
    """
    _check("latents", latents, cfg.latent_channels)
    return Decoder(cfg).apply({"params": params["decoder"]}, latents)


def sample(mean: jax.Array, log_variance: jax.Array, noise: jax.Array) -> jax.Array:
    """Draw from the posterior by standard normal noise; all are (b, h, w, z)."""
    return mean + jnp.exp(log_variance / 2) * noise


def encoder_macs(cfg: VAEConfig, height: int, width: int) -> int:
    """MACs of encoding one image of height x width pixels: convolutions and attention, as `flops` counts a DiT.

    A convolution at n places has 9 n c_in c_out MACs (1 x 1: n c_in c_out), its padding included, and attention 4 n c^2 + 2 n^2 c.
    """
    area, c, z, last = height * width, cfg.widths[0], 2 * cfg.latent_channels, len(cfg.widths) - 1
    macs = 9 * area * cfg.channels * c
    for i, out in enumerate(cfg.widths):
        for _ in range(cfg.blocks):
            macs += area * (9 * c * out + 9 * out * out + (c * out if c != out else 0))
            c = out
        area = area if i == last else area // 4
        macs += 0 if i == last else 9 * area * c * c
    middle = 4 * 9 * area * c * c + 4 * area * c * c + 2 * area * area * c  # two blocks and the attention between them
    return macs + middle + 9 * area * c * z + (area * z * z if cfg.quant else 0)


def _check(name: str, x: jax.Array, channels: int) -> None:
    if x.ndim != 4 or x.shape[-1] != channels:
        raise UsageError(f"{name}: found shape {x.shape}, expected (b, h, w, {channels})")


@dataclass(frozen=True)
class Normalisation:
    """Latents for the diffusion model, (z - shift) scale; each is a number, or a tuple with one number per channel.

    Raises UsageError if a number is not finite, a scale is not positive, or the two tuples differ in length.
    """

    shift: float | tuple
    scale: float | tuple

    def __post_init__(self):
        for name, low in (("shift", -math.inf), ("scale", 0.0)):
            found = getattr(self, name)
            values = found if isinstance(found, tuple) and found else (found,)
            if not all(isinstance(value, (int, float)) and low < value < math.inf for value in values):
                expected = "finite numbers" if name == "shift" else "finite positive numbers"
                raise UsageError(f"normalisation.{name}: found {shown(found)}, expected {expected}")
        lengths = {len(value) for value in (self.shift, self.scale) if isinstance(value, tuple)}
        if len(lengths) > 1:
            raise UsageError(
                f"normalisation: found {self.shift} and {self.scale}, expected one number a channel in both"
            )

    def describe(self) -> dict:
        """Plain values for a record."""
        values = {"shift": self.shift, "scale": self.scale}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def normalise(by: Normalisation, latents: jax.Array) -> jax.Array:
    """Latents of the diffusion model from those of the autoencoder (b, h, w, z). Raises UsageError on a wrong number of channels."""
    shift, scale = _rows(by, latents)
    return (latents - shift) * scale


def denormalise(by: Normalisation, latents: jax.Array) -> jax.Array:
    """Latents of the autoencoder from those of the diffusion model (b, h, w, z). Raises UsageError on a wrong number of channels."""
    shift, scale = _rows(by, latents)
    return latents / scale + shift


def _rows(by: Normalisation, latents: jax.Array) -> list:
    """Shift and scale, each a number or an array (1, 1, 1, z)."""
    channels, rows = latents.shape[-1], []
    for name, value in (("shift", by.shift), ("scale", by.scale)):
        if isinstance(value, tuple) and len(value) != channels:
            raise UsageError(f"normalisation.{name}: found {len(value)} channels, expected the latents' {channels}")
        rows.append(jnp.asarray(value, latents.dtype).reshape(1, 1, 1, -1) if isinstance(value, tuple) else value)
    return rows


def whitening(batches: Iterable) -> Normalisation:
    """Normalisation to mean 0 and standard deviation 1 per channel over batches of latents (b, h, w, z), in float64.

    Raises UsageError if there are no latents, one is not finite, or a channel is constant.
    """
    count, mean, scatter = 0, 0.0, 0.0
    for batch in batches:
        values = np.asarray(batch, np.float64)
        values = values.reshape(-1, values.shape[-1])
        total, delta = count + len(values), values.mean(axis=0) - mean
        scatter = scatter + ((values - values.mean(axis=0)) ** 2).sum(axis=0) + delta**2 * count * len(values) / total
        mean, count = mean + delta * len(values) / total, total
    if not count:
        raise UsageError("whitening: found no latents, expected at least one batch")
    if not (np.isfinite(scatter).all() and np.all(scatter > 0)):
        raise UsageError(f"whitening: found variances {scatter / count}, expected finite positive ones of the channels")
    return Normalisation(tuple(mean.tolist()), tuple(np.sqrt(count / scatter).tolist()))
