"""Operations with a hand-written backward pass: tanh-GELU and softmax attention."""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

KEPT = "kept"  # the name of what `remat = dots` keeps for the backward pass


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
