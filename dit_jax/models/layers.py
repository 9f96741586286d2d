"""Layers of the transformer: attention, MLP, norms, patches, modulation."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.models.kernels import gelu, keep, layer_norm, softmax_attention

xavier = nn.initializers.xavier_uniform()
zeros = nn.initializers.zeros_init()


def as_it_is(name: str, x):
    """Default `place`: returns the arrays unchanged."""
    return x


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Feature-wise x (1 + scale) + shift, for x (b, n, d), shift and scale (b, d) (Perez et al. 2018, as in DiT's adaLN)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def rms_norm(x: jax.Array) -> jax.Array:
    """Root-mean-square normalisation over d without a learned scale, eps 1e-6, in float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""
    h = x.astype(jnp.float32)
    return (h * jax.lax.rsqrt(jnp.square(h).mean(axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


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
    """Normalisation by `kind` with a learned scale and, of `layer_norm`, shift: (b, n, d) -> (b, n, d), computed in float32."""

    dtype: jnp.dtype
    kind: Callable = layer_norm

    @nn.compact
    def __call__(self, x):
        d = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (d,), jnp.float32).astype(self.dtype)
        if self.kind is rms_norm:
            return rms_norm(x) * scale[None, None]
        bias = self.param("bias", zeros, (d,), jnp.float32).astype(self.dtype)
        return layer_norm(x) * scale[None, None] + bias[None, None]


class Parts(nn.Module):
    """Linear maps (b, n, d) -> `features[0]` arrays (b, n, *features[1:]), one kernel (d, *features) but one matmul for each part.

    A fused matmul would force copies to split its output and to concatenate its gradient.
    """

    features: tuple[int, ...]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x) -> tuple:
        d, shape = x.shape[-1], self.features
        kernel = self.param("kernel", lambda key, full: xavier(key, (d, math.prod(shape))).reshape(full), (d, *shape))
        bias = self.param("bias", zeros, shape)
        kernel, bias = kernel.astype(self.dtype), bias.astype(self.dtype)
        x = x.astype(self.dtype)
        return tuple(
            keep(jnp.einsum("bnd,d...->bn...", x, kernel[:, i])) + bias[None, None, i] for i in range(shape[0])
        )


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates features j and j + h/2 of x (b, n, k, h) by angles (n, h/2), in float32 (Su et al. 2021, RoFormer, arXiv 2104.09864)."""
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


class _Heads(nn.Module):
    """Common part of self- and cross-attention: `qk_norm`, softmax in float32, output projection.

    `qk_norm` applies an RMS norm with a learned scale per head dimension to queries and keys (Henry et al. 2020;
    Dehghani et al. 2023), which keeps logits bounded in reduced precision.
    """

    width: int
    heads: int
    qk_norm: bool
    implementation: str
    dtype: jnp.dtype
    out_init: Callable = xavier

    def setup(self):
        if self.qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(dtype=self.dtype) for _ in "qk")
        self.proj = nn.DenseGeneral(self.width, axis=(-2, -1), kernel_init=self.out_init, dtype=self.dtype)

    @nn.nowrap  # so that operations have the names of their modules alone
    def norms(self, q, k):
        """Queries and keys after `qk_norm`."""
        return (self.q_norm(q), self.k_norm(k)) if self.qk_norm else (q, k)

    @nn.nowrap
    def mix(self, q, k, v, mask=None):
        """Softmax attention: q (b, n, k, h), k and v (b, m, k, h), mask of keys (b, m) or None -> (b, n, k, h)."""
        if self.implementation == "xla":
            return softmax_attention(q, k, v, mask)
        keys = None if mask is None else mask[:, None, None]
        return jax.nn.dot_product_attention(q, k, v, mask=keys, implementation=self.implementation)

    @nn.nowrap
    def out(self, h):
        """Output projection, (b, n, k, h) -> (b, n, d)."""
        return self.proj(h)


class Attention(_Heads):
    """Multi-head self-attention over tokens, (b, n, d) -> (b, n, d).

    `mask` (b, n): which tokens are there; `angles` (n, h/2): their rotations; None: all, none.
    """

    def setup(self):
        super().setup()
        self.qkv = Parts((3, self.heads, self.width // self.heads), self.dtype)

    @nn.nowrap
    def project(self, x, angles=None) -> tuple:
        """Queries, keys and values (b, n, k, h)."""
        q, k, v = self.qkv(x)
        q, k = self.norms(q, k)
        return (q, k, v) if angles is None else (rotate(q, angles), rotate(k, angles), v)

    def __call__(self, x, mask=None, angles=None):
        return self.out(self.mix(*self.project(x, angles), mask))


class CrossAttention(_Heads):
    """Multi-head attention of tokens x (b, n, d) to tokens c (b, m, d) -> (b, n, d). `mask` (b, m): which c are there; None: all."""

    def setup(self):
        super().setup()
        shape = (self.heads, self.width // self.heads)
        self.q = nn.DenseGeneral(shape, kernel_init=xavier, dtype=self.dtype)
        self.kv = Parts((2, *shape), self.dtype)

    def __call__(self, x, c, mask=None):
        k, v = self.kv(c)
        return self.out(self.mix(*self.norms(keep(self.q(x)), k), v, mask))


class Mlp(nn.Module):
    """Linear, tanh-GELU, Linear: (b, n, d) -> (b, n, d)."""

    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(self.hidden, kernel_init=xavier, dtype=self.dtype, name="fc1")(x)
        return keep(nn.Dense(x.shape[-1], kernel_init=xavier, dtype=self.dtype, name="fc2")(gelu(keep(h))))


class SwiGlu(nn.Module):
    """Two Linears, SiLU of the one times the other, Linear: (b, n, d) -> (b, n, d) (Shazeer 2020, arXiv 2002.05202, equation 6)."""

    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        gate, up = Parts((2, self.hidden), self.dtype, name="fc1")(x)
        h = nn.silu(gate.astype(jnp.float32)).astype(self.dtype) * up
        return keep(nn.Dense(x.shape[-1], kernel_init=xavier, dtype=self.dtype, name="fc2")(h))


LAYERS = {"dit": (layer_norm, Mlp), "llama": (rms_norm, SwiGlu)}  # model.block -> its norm and its MLP


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
