"""The parts of a transformer block and of its two ends: attention, MLP, patches, modulation."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

xavier = nn.initializers.xavier_uniform()
zeros = nn.initializers.zeros_init()


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """x (b, n, d), shift and scale (b, d): x (1 + scale) + shift (Perez et al. 2018, as in DiT's adaLN)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def layer_norm(x: jax.Array) -> jax.Array:
    """Layer normalisation over d without learned scale or shift, eps 1e-6, computed in float32 and returned in x's dtype."""
    h = x.astype(jnp.float32)
    mean = h.mean(axis=-1, keepdims=True)
    variance = jnp.square(h - mean).mean(axis=-1, keepdims=True)
    return ((h - mean) * jax.lax.rsqrt(variance + 1e-6)).astype(x.dtype)


def patchify(x: jax.Array, patch: int) -> jax.Array:
    """(b, h, w, c) -> (b, n, p p c), rows first."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, patch * patch * c)


def unpatchify(x: jax.Array, patch: int, side: int) -> jax.Array:
    """(b, n, p p c) -> (b, h, w, c) for a square grid of `side` patches a side."""
    b = x.shape[0]
    x = x.reshape(b, side, side, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, side * patch, side * patch, -1)


class Norm(nn.Module):
    """Layer normalisation with a learned scale and shift (b, n, d) -> (b, n, d), computed in float32."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        d = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (d,), jnp.float32).astype(self.dtype)
        return (
            layer_norm(x) * scale[None, None]
            + self.param("bias", zeros, (d,), jnp.float32).astype(self.dtype)[None, None]
        )


class _Heads(nn.Module):
    """What self- and cross-attention share: `qk_norm`, softmax in float32, and the projection of the heads' outputs.

    `qk_norm` applies an RMS norm with a learned scale per head dimension to queries and keys (Henry et al. 2020;
    Dehghani et al. 2023), which keeps logits bounded in reduced precision.
    """

    heads: int
    qk_norm: bool
    implementation: str
    dtype: jnp.dtype

    def attend(self, q, k, v, d: int):
        """q (b, n, k, h), k and v (b, m, k, h) -> (b, n, d)."""
        if self.qk_norm:
            q = nn.RMSNorm(dtype=self.dtype, name="q_norm")(q)
            k = nn.RMSNorm(dtype=self.dtype, name="k_norm")(k)
        h = jax.nn.dot_product_attention(q, k, v, implementation=self.implementation)
        return nn.DenseGeneral(d, axis=(-2, -1), kernel_init=xavier, dtype=self.dtype, name="proj")(h)

    def project(self, x, parts: tuple, name: str):
        """(b, n, d) -> (b, n, *parts, k, h)."""
        shape = (*parts, self.heads, x.shape[-1] // self.heads)
        return nn.DenseGeneral(shape, kernel_init=xavier, dtype=self.dtype, name=name)(x)


class Attention(_Heads):
    """Multi-head self-attention over tokens, (b, n, d) -> (b, n, d)."""

    @nn.compact
    def __call__(self, x):
        qkv = self.project(x, (3,), "qkv")
        return self.attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], x.shape[-1])


class CrossAttention(_Heads):
    """Multi-head attention of tokens x (b, n, d) to tokens c (b, m, d) -> (b, n, d)."""

    @nn.compact
    def __call__(self, x, c):
        q, kv = self.project(x, (), "q"), self.project(c, (2,), "kv")
        return self.attend(q, kv[:, :, 0], kv[:, :, 1], x.shape[-1])


class Mlp(nn.Module):
    """Linear, tanh-GELU, Linear."""

    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(self.hidden, kernel_init=xavier, dtype=self.dtype, name="fc1")(x)
        return nn.Dense(x.shape[-1], kernel_init=xavier, dtype=self.dtype, name="fc2")(nn.gelu(h, approximate=True))


class Modulation(nn.Module):
    """c (b, d) -> `parts` vectors (b, d): SiLU then a Linear, by default one that starts at zero: with gates among the parts,
    every block then starts as the identity."""

    parts: int
    dtype: jnp.dtype
    kernel_init: Callable = zeros

    @nn.compact
    def __call__(self, c):
        h = nn.Dense(self.parts * c.shape[-1], kernel_init=self.kernel_init, dtype=self.dtype, name="linear")(
            nn.silu(c)
        )
        return jnp.split(h, self.parts, axis=-1)
