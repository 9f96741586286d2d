"""The parts of a transformer block and of its two ends: attention, MLP, patches, modulation."""

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

xavier = nn.initializers.xavier_uniform()
zeros = nn.initializers.zeros_init()
KEPT = "kept"  # the name of what `remat = dots` keeps for the backward pass


def as_it_is(x):
    """What a program of one device does with weights and activations to lay them out."""
    return x


class Placement(NamedTuple):
    """What a program of several devices does to lay out weights and conditions.

    `gather`: a tree of a layer's weights, split over devices -> the same, whole; `share`: conditions (b, d) -> the same, on each
    device those of all devices that a layer is split over.
    """

    gather: Callable = as_it_is
    share: Callable = as_it_is


def keep(x: jax.Array) -> jax.Array:
    """Marks what `remat = dots` keeps for the backward pass: what a matrix product puts out, or an expensive elementwise one."""
    return checkpoint_name(x, KEPT)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """tanh-GELU (Hendrycks & Gimpel 2016, arXiv 1606.08415).

    Its slope is computed and kept in the forward pass. The backward pass then multiplies by it, where TPUs would else evaluate
    the tanh again inside the matrix products before and after, which wait for it.
    """
    return _gelu_forward(x)[0]


def _gelu_forward(x):
    h, c = x.astype(jnp.float32), math.sqrt(2 / math.pi)
    tanh = jnp.tanh(c * (h + 0.044715 * h**3))
    slope = 0.5 * (1 + tanh) + 0.5 * h * (1 - tanh**2) * c * (1 + 3 * 0.044715 * h**2)
    return keep((0.5 * h * (1 + tanh)).astype(x.dtype)), keep(slope.astype(x.dtype))


gelu.defvjp(_gelu_forward, lambda slope, gradient: (gradient * slope,))


@jax.custom_vjp
def softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """q (b, n, k, h), k and v (b, m, k, h) -> (b, n, k, h): softmax(q k^T / sqrt(h)) v, logits and softmax in float32.

    The backward pass uses the forward pass's weights, in v's dtype, and takes sum_m(dP P) as sum_h(dO O) (Dao et al. 2022,
    arXiv 2205.14135, appendix B.2), so that it need not sum over m. With `remat = dots` they are computed again: the copies of
    (b, k, n, m) into the loop's memory and back would take longer.
    """
    return _attention_forward(q, k, v)[0]


def _attention_forward(q, k, v):
    logits = jnp.einsum("bnkh,bmkh->bknm", q, k, preferred_element_type=jnp.float32)
    weights = jnp.exp((logits - logits.max(axis=-1, keepdims=True)) / math.sqrt(q.shape[-1]))
    weights = (weights / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)
    out = jnp.einsum("bknm,bmkh->bnkh", weights, v)
    return out, (q, k, v, weights, out)


def _attention_backward(kept, gradient):
    q, k, v, weights, out = kept
    total = (gradient.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1).transpose(0, 2, 1)[..., None]
    slope = jnp.einsum("bnkh,bmkh->bknm", gradient, v, preferred_element_type=jnp.float32) - total
    logits = (weights.astype(jnp.float32) * slope / math.sqrt(q.shape[-1])).astype(q.dtype)
    return (
        jnp.einsum("bknm,bmkh->bnkh", logits, k),
        jnp.einsum("bknm,bnkh->bmkh", logits, q),
        jnp.einsum("bknm,bnkh->bmkh", weights, gradient),
    )


softmax_attention.defvjp(_attention_forward, _attention_backward)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """x (b, n, d), shift and scale (b, d): x (1 + scale) + shift (Perez et al. 2018, as in DiT's adaLN)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def layer_norm(x: jax.Array) -> jax.Array:
    """Layer normalisation over d without learned scale or shift, eps 1e-6, computed in float32 and returned in x's dtype.

    The variance is the mean square less the squared mean, so that one pass over x gives both.
    """
    h = x.astype(jnp.float32)
    mean = h.mean(axis=-1, keepdims=True)
    variance = jnp.maximum(jnp.square(h).mean(axis=-1, keepdims=True) - jnp.square(mean), 0.0)
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


class Heads(nn.Module):
    """`parts` projections (b, n, d) -> (b, n, k, h) each, with one kernel (d, parts, k, h): a product for each part.

    One product for all would put out what attention has to take apart again, and its gradient what it has to put together, both by
    copies.
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
        if self.implementation == "xla":
            h = softmax_attention(q, k, v)
        else:
            h = keep(jax.nn.dot_product_attention(q, k, v, implementation=self.implementation))
        return keep(nn.DenseGeneral(d, axis=(-2, -1), kernel_init=xavier, dtype=self.dtype, name="proj")(h))

    def project(self, x, name: str):
        """(b, n, d) -> (b, n, k, h)."""
        shape = (self.heads, x.shape[-1] // self.heads)
        return keep(nn.DenseGeneral(shape, kernel_init=xavier, dtype=self.dtype, name=name)(x))


class Attention(_Heads):
    """Multi-head self-attention over tokens, (b, n, d) -> (b, n, d)."""

    @nn.compact
    def __call__(self, x):
        return self.attend(*Heads(3, self.heads, self.dtype, name="qkv")(x), x.shape[-1])


class CrossAttention(_Heads):
    """Multi-head attention of tokens x (b, n, d) to tokens c (b, m, d) -> (b, n, d)."""

    @nn.compact
    def __call__(self, x, c):
        k, v = Heads(2, self.heads, self.dtype, name="kv")(c)
        return self.attend(self.project(x, "q"), k, v, x.shape[-1])


class Mlp(nn.Module):
    """Linear, tanh-GELU, Linear."""

    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(self.hidden, kernel_init=xavier, dtype=self.dtype, name="fc1")(x)
        return keep(nn.Dense(x.shape[-1], kernel_init=xavier, dtype=self.dtype, name="fc2")(gelu(h)))


class Modulation(nn.Module):
    """c (b, d) -> `parts` vectors (b, d): SiLU then a Linear, by default one that starts at zero: with gates among the parts,
    every block then starts as the identity.

    A third of XL's weights act once an image. They stay split over devices, each of which computes its columns for the images of
    all, since those move in far fewer bytes than the weights.
    """

    parts: int
    dtype: jnp.dtype
    kernel_init: Callable = zeros
    share: Callable = as_it_is

    @nn.compact
    def __call__(self, c):
        width = self.parts * c.shape[-1]
        linear = nn.Dense(width, kernel_init=self.kernel_init, dtype=self.dtype, name="linear")
        h = self.share(linear(self.share(nn.silu(c))))
        return jnp.split(keep(h), self.parts, axis=-1)
