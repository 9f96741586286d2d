"""Operations with a hand-written derivative, forward and backward: tanh-GELU, layer normalisation and softmax attention."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero, linear_call

KEPT = "kept"  # checkpoint name of the residuals that `remat = dots` saves


def keep(x: jax.Array) -> jax.Array:
    """Marks a residual that `remat = dots` saves: the output of a product of large matrices, or few numbers that take a pass to compute."""
    return checkpoint_name(x, KEPT)


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """tanh-GELU (Hendrycks & Gimpel 2016, arXiv 1606.08415). The forward pass computes the slope too."""
    return _gelu_forward(x)[0]


def _gelu_forward(x):
    h, c = x.astype(jnp.float32), math.sqrt(2 / math.pi)
    square = jnp.square(h)
    gate = 0.5 + 0.5 * jnp.tanh(h * (c + 0.044715 * c * square))
    out = h * gate
    slope = gate + out * (1 - gate) * (2 * c + 6 * 0.044715 * c * square)
    return out.astype(x.dtype), slope.astype(x.dtype)


@gelu.defjvp
def _gelu_derivative(inputs, tangents):
    out, slope = _gelu_forward(*inputs)
    return out, tangents[0] * slope


@jax.custom_jvp
def layer_norm(x: jax.Array) -> jax.Array:
    """Layer normalisation over d without learned scale or shift, eps 1e-6, computed in float32 and returned in x's dtype.

    The variance is E[x^2] - E[x]^2, so one pass over x suffices. `remat = dots` saves the means and scales, and the derivative, a
    symmetric map of tangents, needs two sums, which one pass gives too.
    """
    return _layer_norm_forward(x)[0].astype(x.dtype)


def _layer_norm_forward(x):
    h = x.astype(jnp.float32)
    mean = h.mean(axis=-1, keepdims=True)
    variance = jnp.maximum(jnp.square(h).mean(axis=-1, keepdims=True) - jnp.square(mean), 0.0)
    mean, scale = keep(mean), keep(jax.lax.rsqrt(variance + 1e-6))
    return (h - mean) * scale, scale


@layer_norm.defjvp
def _layer_norm_derivative(inputs, tangents):
    (x,), (tangent,) = inputs, tangents
    out, scale = _layer_norm_forward(x)
    t = tangent.astype(jnp.float32)
    slope = scale * (t - t.mean(axis=-1, keepdims=True) - out * (out * t).mean(axis=-1, keepdims=True))
    return out.astype(x.dtype), slope.astype(x.dtype)


@jax.custom_jvp
def softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Attention softmax(q k^T / sqrt(h)) v: q (b, n, k, h), k and v (b, m, k, h) -> (b, n, k, h), logits and softmax in float32.

    `mask` (b, m): which keys are there, at least one; None: all.

    The weights are divided by their sum (b, k, n) after the product with v, in the output's size, and so in the backward pass, which
    takes sum_m(dP P) as sum_h(dO O) (Dao et al. 2022, arXiv 2205.14135, section 3.1 and appendix B.2). `remat = dots` recomputes
    the output and the weights (b, k, n, m), because copying these to and from the scan's memory takes longer.
    """
    return _attention_forward(q, k, v, mask)[0]


def _attention_forward(q, k, v, mask):
    logits = jnp.einsum("bnkh,bmkh->bknm", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, -jnp.inf)
    weights = jnp.exp((logits - logits.max(axis=-1, keepdims=True)) / math.sqrt(q.shape[-1]))
    share, weights = 1 / weights.sum(axis=-1), weights.astype(v.dtype)
    out = _shared(jnp.einsum("bknm,bmkh->bnkh", weights, v, preferred_element_type=jnp.float32), share).astype(v.dtype)
    return out, (q, k, v, weights, share, out)


def _shared(x: jax.Array, share: jax.Array) -> jax.Array:
    """x (b, n, k, h) times `share` (b, k, n), one over the sum of each query's weights."""
    return x * share.transpose(0, 2, 1)[..., None]


def _attention_tangent(kept, tangents: dict):
    """Tangent of the output from those of q, k and v by name, of which some may be missing, as a caption's are in derivatives by x."""
    q, k, v, weights, share, _ = kept
    slopes, parts = [], []
    if "q" in tangents:
        slopes.append(jnp.einsum("bnkh,bmkh->bknm", tangents["q"], k, preferred_element_type=jnp.float32))
    if "k" in tangents:
        slopes.append(jnp.einsum("bnkh,bmkh->bknm", q, tangents["k"], preferred_element_type=jnp.float32))
    if slopes:
        slope = sum(slopes[1:], slopes[0]) / math.sqrt(q.shape[-1])
        change = weights * (slope - share[..., None] * (weights * slope).sum(axis=-1, keepdims=True))
        parts.append(jnp.einsum("bknm,bmkh->bnkh", change.astype(v.dtype), v))
    if "v" in tangents:
        parts.append(jnp.einsum("bknm,bmkh->bnkh", weights, tangents["v"]))
    return _shared(sum(parts[1:], parts[0]), share).astype(v.dtype)


def _attention_backward(kept, gradient, wanted: tuple) -> dict:
    """Gradients of `wanted`, names of q, k and v."""
    q, k, v, weights, share, out = kept
    total = (gradient.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1).transpose(0, 2, 1)[..., None]
    slope = jnp.einsum("bnkh,bmkh->bknm", gradient, v, preferred_element_type=jnp.float32) - total
    scale = share[..., None] / math.sqrt(q.shape[-1])
    logits = (weights.astype(jnp.float32) * (slope * scale)).astype(q.dtype)
    found = {
        "q": lambda: jnp.einsum("bknm,bmkh->bnkh", logits, k),
        "k": lambda: jnp.einsum("bknm,bnkh->bmkh", logits, q),
        "v": lambda: jnp.einsum("bknm,bnkh->bmkh", weights, _shared(gradient, share).astype(gradient.dtype)),
    }
    return {name: found[name]() for name in wanted}


def _attention_derivative(inputs, tangents):
    out, kept = _attention_forward(*inputs)
    moving = {name: d for name, d in zip("qkv", tangents, strict=False) if not isinstance(d, SymbolicZero)}
    backward = functools.partial(_attention_backward, wanted=tuple(moving))
    return out, linear_call(_attention_tangent, backward, kept, moving)


softmax_attention.defjvp(_attention_derivative, symbolic_zeros=True)
