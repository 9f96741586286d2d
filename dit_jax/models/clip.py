"""CLIP's encoders of captions and images (Radford et al. 2021, arXiv 2103.00020), for inference; OpenCLIP's too.

Both are transformers with norms before attention and MLP. Text attends to earlier tokens only and is pooled at its end; an image is
pooled at a learned token. The two pooled states, projected, lie in one space, where the cosine says how well a caption fits an image.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.error import UsageError, choice
from dit_jax.models.encoder import HIDDEN, Attention, Mlp, Sizes, check_tokens, embedding, linear, norm, scan
from dit_jax.models.layers import patchify

LEGACY_END = 2  # the id of the end that OpenAI's published configs state, though it is the largest id of a caption
MEAN, STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)  # of the training's pixels in 0..1


@dataclass(frozen=True)
class TextConfig(Sizes):
    """Sizes of a text encoder, by default those of ViT-L/14's without its projection (123,060,480 parameters)."""

    vocabulary: int = 49408
    positions: int = 77  # tokens of the longest caption, its start and end included
    activation: str = "quick_gelu"
    projection: int = 0  # width of the pooled state after a Linear; 0 = no Linear
    end: int = LEGACY_END  # id of the end of a text

    def __post_init__(self):
        super().__post_init__()
        choice("TextConfig.activation", self.activation, ("quick_gelu", "gelu"))


@dataclass(frozen=True)
class VisionConfig(Sizes):
    """Sizes of an image encoder, by default ViT-L/14's (303,966,208 parameters with the projection)."""

    depth: int = 24
    width: int = 1024
    heads: int = 16
    hidden: int = 4096
    size: int = 224  # pixels a side
    patch: int = 14
    activation: str = "quick_gelu"
    projection: int = 768

    def __post_init__(self):
        super().__post_init__()
        choice("VisionConfig.activation", self.activation, ("quick_gelu", "gelu"))
        if self.size % self.patch:
            raise UsageError(f"VisionConfig.patch: found {self.patch}, expected a divisor of the side {self.size}")

    @property
    def tokens(self) -> int:
        """Patches, and the token at which an image is pooled."""
        return (self.size // self.patch) ** 2 + 1


class States(NamedTuple):
    """Outputs of an encoder, float32: states (b, n, d) of all tokens; pooled (b, p), or (b, d) without a projection.

    Text has its last norm in both; an image has it in `pooled` only, as in the published code.
    """

    states: jax.Array
    pooled: jax.Array


class _Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)): (b, n, d) float32 -> the same."""

    cfg: Sizes

    @nn.compact
    def __call__(self, x, bias):
        cfg = self.cfg
        x = x + Attention(cfg, cfg.head_width**-0.5, name="attention")(norm(cfg, "norm1")(x), bias)
        return x + Mlp(cfg, cfg.activation, name="mlp")(norm(cfg, "norm2")(x)), None


class _Text(nn.Module):
    cfg: TextConfig

    @nn.compact
    def __call__(self, ids):
        cfg, (b, n) = self.cfg, ids.shape
        places = self.param("positions", nn.initializers.normal(0.01), (cfg.positions, cfg.width))
        x = embedding(cfg.vocabulary, cfg.width, "tokens")(ids) + places[None, :n].astype(jnp.float32)
        causal = jnp.where(jnp.tri(n, dtype=bool), 0.0, HIDDEN)[None, None]
        x, _ = scan(_Block, cfg.depth)(cfg, name="blocks")(x, causal)
        x = norm(cfg, "norm")(x)
        ends = ids.argmax(axis=1) if cfg.end == LEGACY_END else (ids == cfg.end).argmax(axis=1)
        return States(x, _project(cfg, x[jnp.arange(b), ends]))


class _Vision(nn.Module):
    cfg: VisionConfig

    @nn.compact
    def __call__(self, images):
        cfg, b = self.cfg, len(images)
        x = linear(cfg, cfg.width, "patches", bias=False)(patchify(images, cfg.patch)).astype(jnp.float32)
        token = self.param("token", nn.initializers.normal(0.02), (cfg.width,)).astype(jnp.float32)
        x = jnp.concatenate([jnp.broadcast_to(token[None, None], (b, 1, cfg.width)), x], axis=1)
        places = self.param("positions", nn.initializers.normal(0.02), (cfg.tokens, cfg.width))
        x = norm(cfg, "norm_in")(x + places[None].astype(jnp.float32))
        x, _ = scan(_Block, cfg.depth)(cfg, name="blocks")(x, jnp.zeros((1, 1, 1, 1)))
        return States(x, _project(cfg, norm(cfg, "norm")(x[:, 0])))


def _project(cfg: Sizes, pooled):
    return (linear(cfg, cfg.projection, "projection", bias=False)(pooled) if cfg.projection else pooled).astype(
        jnp.float32
    )


@functools.partial(jax.jit, static_argnums=0)
def init(cfg: TextConfig | VisionConfig, key: jax.Array) -> dict:
    """Initial parameters of either encoder, nested dicts of float32 arrays; those of the blocks have a leading layer axis."""
    if isinstance(cfg, TextConfig):
        return _Text(cfg).init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    return _Vision(cfg).init(key, jnp.zeros((1, cfg.size, cfg.size, 3)))["params"]


def shapes(cfg: TextConfig | VisionConfig) -> dict:
    """Shapes of the parameters from `init`, as jax.ShapeDtypeStruct."""
    return jax.eval_shape(functools.partial(init, cfg), jax.random.key(0))


def apply_text(cfg: TextConfig, params: dict, ids: jax.Array) -> States:
    """States of captions, ids (b, n) with n up to `cfg.positions`, each with its start and end.

    Padding follows the end, so no token of the caption sees it, and no mask is needed. Pooled is the state at the first `cfg.end`, or, if
    that is LEGACY_END, at the largest id. Raises UsageError on another shape.
    """
    check_tokens(ids, None, cfg.positions)
    return _Text(cfg).apply({"params": params}, ids)


def apply_vision(cfg: VisionConfig, params: dict, images: jax.Array) -> States:
    """States of RGB images (b, size, size, 3), uint8 or floats in 0..255. Raises UsageError on another shape."""
    if images.ndim != 4 or images.shape[1:] != (cfg.size, cfg.size, 3):
        raise UsageError(f"images: found shape {images.shape}, expected (b, {cfg.size}, {cfg.size}, 3)")
    mean, std = (np.asarray(v, np.float32).reshape(1, 1, 1, 3) for v in (MEAN, STD))
    return _Vision(cfg).apply({"params": params}, (images.astype(jnp.float32) / 255 - mean) / std)
