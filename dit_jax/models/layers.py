"""Layers of the transformer: attention, MLP, norms, patches, modulation."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.models.kernels import gelu, keep, softmax_attention

xavier = nn.initializers.xavier_uniform()
zeros = nn.initializers.zeros_init()


def as_it_is(name: str, x):
    """Default `place`: returns the arrays unchanged."""
    return x


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Feature-wise x (1 + scale) + shift, for x (b, n, d), shift and scale (b, d) (Perez et al. 2018, as in DiT's adaLN)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def layer_norm(x: jax.Array) -> jax.Array:
    """Layer normalisation over d without learned scale or shift, eps 1e-6, computed in float32 and returned in x's dtype.

    The variance is E[x^2] - E[x]^2, so one pass over x suffices.
    """
    h = x.astype(jnp.float32)
    mean = h.mean(axis=-1, keepdims=True)
    variance = jnp.maximum(jnp.square(h).mean(axis=-1, keepdims=True) - jnp.square(mean), 0.0)
    return ((h - mean) * jax.lax.rsqrt(variance + 1e-6)).astype(x.dtype)


def patchify(x: jax.Array, patch: int) -> jax.Array:
    """Cuts images (b, h, w, c) into patches (b, n, p p c), row by row."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, patch * patch * c)


def unpatchify(x: jax.Array, patch: int, rows: int, columns: int) -> jax.Array:
    """Inverse of `patchify`, (b, n, p p c) -> (b, h, w, c), for a grid of rows x columns patches."""
    b = x.shape[0]
    x = x.reshape(b, rows, columns, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, rows * patch, columns * patch, -1)


class Norm(nn.Module):
    """Layer normalisation with learned scale and shift, (b, n, d) -> (b, n, d), computed in float32."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        d = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (d,), jnp.float32).astype(self.dtype)
        bias = self.param("bias", zeros, (d,), jnp.float32).astype(self.dtype)
        return layer_norm(x) * scale[None, None] + bias[None, None]


class Heads(nn.Module):
    """Projections (b, n, d) -> `parts` arrays (b, n, k, h), one kernel (d, parts, k, h) but one matmul for each part.

    A fused matmul would force copies to split its output and to concatenate its gradient.
    """

    parts: int
    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x) -> tuple:
        d, shape = x.shape[-1], (self.parts, self.heads, x.shape[-1] // self.heads)
        kernel = self.param("kernel", lambda key, full: xavier(key, (d, math.prod(shape))).reshape(full), (d, *shape))
        bias = self.param("bias", zeros, shape)
        kernel, bias = kernel.astype(self.dtype), bias.astype(self.dtype)
        x = x.astype(self.dtype)
        return tuple(
            keep(jnp.einsum("bnd,dkh->bnkh", x, kernel[:, i])) + bias[None, None, i] for i in range(self.parts)
        )


class _Heads(nn.Module):
    """Common part of self- and cross-attention: `qk_norm`, softmax in float32, output projection.

    `qk_norm` applies an RMS norm with a learned scale per head dimension to queries and keys (Henry et al. 2020;
    Dehghani et al. 2023), which keeps logits bounded in reduced precision.
    """

    heads: int
    qk_norm: bool
    implementation: str
    dtype: jnp.dtype
    out_init: Callable = xavier

    def attend(self, q, k, v, d: int, mask=None):
        """Attention and output projection: q (b, n, k, h), k and v (b, m, k, h), mask of keys (b, m) or None -> (b, n, d)."""
        if self.qk_norm:
            q = nn.RMSNorm(dtype=self.dtype, name="q_norm")(q)
            k = nn.RMSNorm(dtype=self.dtype, name="k_norm")(k)
        if self.implementation == "xla":
            h = softmax_attention(q, k, v, mask)
        else:
            keys = None if mask is None else mask[:, None, None]
            h = keep(jax.nn.dot_product_attention(q, k, v, mask=keys, implementation=self.implementation))
        return keep(nn.DenseGeneral(d, axis=(-2, -1), kernel_init=self.out_init, dtype=self.dtype, name="proj")(h))

    def project(self, x, name: str):
        """Linear projection to heads, (b, n, d) -> (b, n, k, h)."""
        shape = (self.heads, x.shape[-1] // self.heads)
        return keep(nn.DenseGeneral(shape, kernel_init=xavier, dtype=self.dtype, name=name)(x))


class Attention(_Heads):
    """Multi-head self-attention over tokens, (b, n, d) -> (b, n, d). `mask` (b, n): which tokens are there; None: all."""

    @nn.compact
    def __call__(self, x, mask=None):
        return self.attend(*Heads(3, self.heads, self.dtype, name="qkv")(x), x.shape[-1], mask)


class CrossAttention(_Heads):
    """Multi-head attention of tokens x (b, n, d) to tokens c (b, m, d) -> (b, n, d). `mask` (b, m): which c are there; None: all."""

    @nn.compact
    def __call__(self, x, c, mask=None):
        k, v = Heads(2, self.heads, self.dtype, name="kv")(c)
        return self.attend(self.project(x, "q"), k, v, x.shape[-1], mask)


class Mlp(nn.Module):
    """Linear, tanh-GELU, Linear: (b, n, d) -> (b, n, d)."""

    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(self.hidden, kernel_init=xavier, dtype=self.dtype, name="fc1")(x)
        return keep(nn.Dense(x.shape[-1], kernel_init=xavier, dtype=self.dtype, name="fc2")(gelu(h)))


class Modulation(nn.Module):
    """SiLU, then a Linear: c (b, d) -> `parts` vectors (b, d). The Linear starts at zero by default, so a gated block starts as identity.

    These weights, a third of XL's, act once per image and stay split over devices. `place("condition", c)` gathers the conditions of
    all images instead, which are far fewer bytes, and each device computes its columns for all images.
    """

    parts: int
    dtype: jnp.dtype
    kernel_init: Callable = zeros
    place: Callable = as_it_is

    @nn.compact
    def __call__(self, c):
        width = self.parts * c.shape[-1]
        linear = nn.Dense(width, kernel_init=self.kernel_init, dtype=self.dtype, name="linear")
        h = self.place("condition", linear(self.place("condition", nn.silu(c))))
        return jnp.split(keep(h), self.parts, axis=-1)
