"""Encoder of T5 v1.1 (Raffel et al. 2020, arXiv 1910.10683; Shazeer 2020, arXiv 2002.05202, for its gated MLP), for inference.

Attention has no scale and no biases. It learns a number for each head and bucket of relative positions, one table for all blocks, which
is added to the logits. Norms only scale: x / rms(x) g.

Activations of the large models leave float16's range, and rounding the residual stream to bfloat16 would lose updates: the stream, norms,
logits and the gated activation are float32 in any compute dtype (`dit_jax.models.encoder`).
"""

import functools
import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.models.encoder import Attention, Mlp, Sizes, check_tokens, embedding, padding_bias, scan


@dataclass(frozen=True)
class T5Config(Sizes):
    """Sizes of an encoder, by default T5 v1.1 XXL's (4,762,310,656 parameters)."""

    depth: int = 24
    width: int = 4096
    heads: int = 64
    hidden: int = 10240
    epsilon: float = 1e-6
    head_width: int = 64  # T5's heads need not fill the width
    vocabulary: int = 32128
    buckets: int = 32  # of relative positions, half for each direction
    distance: int = 128  # from which on all positions share the last bucket

    gated = True


def buckets(n: int, count: int, distance: int) -> np.ndarray:
    """Bucket (n, n) of each pair (query, key), int32: Raffel et al. 2020, section 2.1, as in the published code.

    Later keys have the upper half of the buckets. In each half, half of the buckets are for one distance each; the others grow
    logarithmically up to `distance`.
    """
    apart = np.arange(n)[None, :] - np.arange(n)[:, None]
    half = count // 2
    exact, far = half // 2, np.abs(apart)
    # float32 in this order, as published: it decides on which side of an edge a distance falls
    grown = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(distance / exact))
    wide = np.minimum(exact + (grown * np.float32(half - exact)).astype(np.int32), half - 1)
    return (np.where(apart > 0, half, 0) + np.where(far < exact, far, wide)).astype(np.int32)


def _norm(cfg: T5Config, name: str) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=cfg.epsilon, dtype=jnp.float32, name=name)


class _Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)): (b, n, d) float32 -> the same."""

    cfg: T5Config

    @nn.compact
    def __call__(self, x, bias):
        cfg = self.cfg
        x = x + Attention(cfg, 1.0, biased=False, name="attention")(_norm(cfg, "norm1")(x), bias)
        return x + Mlp(cfg, "gelu_tanh", biased=False, name="mlp")(_norm(cfg, "norm2")(x)), None


class _Encoder(nn.Module):
    cfg: T5Config

    @nn.compact
    def __call__(self, ids, mask):
        cfg = self.cfg
        x = embedding(cfg.vocabulary, cfg.width, "tokens")(ids)
        places = buckets(ids.shape[1], cfg.buckets, cfg.distance)
        bias = embedding(cfg.buckets, cfg.heads, "positions")(places).transpose(2, 0, 1)[None] + padding_bias(mask)
        x, _ = scan(_Block, cfg.depth)(cfg, name="blocks")(x, bias)
        return _norm(cfg, "norm")(x)


@functools.partial(jax.jit, static_argnums=0)
def init(cfg: T5Config, key: jax.Array) -> dict:
    """Initial parameters, nested dicts of float32 arrays; those of the blocks have a leading layer axis."""
    ids = jnp.zeros((1, 1), jnp.int32)
    return _Encoder(cfg).init(key, ids, ids == 0)["params"]


def shapes(cfg: T5Config) -> dict:
    """Shapes of the parameters from `init`, as jax.ShapeDtypeStruct."""
    return jax.eval_shape(functools.partial(init, cfg), jax.random.key(0))


def apply(cfg: T5Config, params: dict, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """States (b, n, d) float32 of captions, ids (b, n) with mask (b, n), False for padding, which nothing attends to.

    Any n is allowed. Raises UsageError on other shapes.
    """
    check_tokens(ids, mask)
    return _Encoder(cfg).apply({"params": params}, ids, mask)
