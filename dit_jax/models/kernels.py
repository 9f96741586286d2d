"""Operations with a hand-written derivative, forward and backward: tanh-GELU and softmax attention."""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import linear_call

KEPT = "kept"  # checkpoint name of the residuals that `remat = dots` saves


def keep(x: jax.Array) -> jax.Array:
    """Marks a residual that `remat = dots` saves: the output of a matrix product or of an expensive elementwise operation."""
    return checkpoint_name(x, KEPT)


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """tanh-GELU (Hendrycks & Gimpel 2016, arXiv 1606.08415).

    The forward pass computes and saves the slope. Otherwise TPUs recompute the tanh inside the backward pass's matrix products,
    which then wait for it.
    """
    return _gelu_forward(x)[0]


def _gelu_forward(x):
    h, c = x.astype(jnp.float32), math.sqrt(2 / math.pi)
    tanh = jnp.tanh(c * (h + 0.044715 * h**3))
    slope = 0.5 * (1 + tanh) + 0.5 * h * (1 - tanh**2) * c * (1 + 3 * 0.044715 * h**2)
    return keep((0.5 * h * (1 + tanh)).astype(x.dtype)), keep(slope.astype(x.dtype))


@gelu.defjvp
def _gelu_derivative(inputs, tangents):
    out, slope = _gelu_forward(*inputs)
    return out, tangents[0] * slope


@jax.custom_jvp
def softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Attention softmax(q k^T / sqrt(h)) v: q (b, n, k, h), k and v (b, m, k, h) -> (b, n, k, h), logits and softmax in float32.

    `mask` (b, m): which keys are there, at least one; None: all.

    The backward pass uses the forward pass's weights, in v's dtype, and takes sum_m(dP P) as sum_h(dO O) (Dao et al. 2022, arXiv
    2205.14135, appendix B.2). `remat = dots` recomputes the weights (b, k, n, m), because copying them to and from the scan's memory
    takes longer.
    """
    return _attention_forward(q, k, v, mask)[0]


def _attention_forward(q, k, v, mask):
    logits = jnp.einsum("bnkh,bmkh->bknm", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, -jnp.inf)
    weights = jnp.exp((logits - logits.max(axis=-1, keepdims=True)) / math.sqrt(q.shape[-1]))
    weights = (weights / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)
    out = jnp.einsum("bknm,bmkh->bnkh", weights, v)
    return out, (q, k, v, weights, out)


def _attention_tangent(kept, tangents):
    q, k, v, weights, _ = kept
    dq, dk, dv = tangents
    slope = jnp.einsum("bnkh,bmkh->bknm", dq, k, preferred_element_type=jnp.float32)
    slope = (slope + jnp.einsum("bnkh,bmkh->bknm", q, dk, preferred_element_type=jnp.float32)) / math.sqrt(q.shape[-1])
    change = weights * (slope - (weights * slope).sum(axis=-1, keepdims=True))
    return jnp.einsum("bknm,bmkh->bnkh", change.astype(v.dtype), v) + jnp.einsum("bknm,bmkh->bnkh", weights, dv)


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


@softmax_attention.defjvp
def _attention_derivative(inputs, tangents):
    out, kept = _attention_forward(*inputs)
    return out, linear_call(_attention_tangent, _attention_backward, kept, tangents[:3])
