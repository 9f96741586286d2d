"""Transformer encoders of text and images: what CLIP, T5 and BERT have in common.

A block is attention, softmax(s Q K^T + B) V (Vaswani et al. 2017, arXiv 1706.03762, eq. 1), then an MLP. The bias B hides padding and
later tokens, or states relative positions.

Compute in bfloat16 means that matrix products take bfloat16 factors, with sums in float32. The residual stream, norms, logits, softmax
and activations are float32 in any case, so nothing overflows and small updates of a large stream are not lost.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.error import UsageError, choice, shown

HIDDEN = -1e30  # bias of a pair of tokens that do not see each other; finite, so a row of them gives no NaN
ACTIVATIONS: dict[str, Callable] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


@dataclass(frozen=True)
class Sizes:
    """Sizes that every encoder has. Raises UsageError on an invalid field; a field that may be 0 says so."""

    depth: int = 12
    width: int = 768
    heads: int = 12
    hidden: int = 3072  # width inside the MLP
    epsilon: float = 1e-5  # of the norms
    dtype: str = "float32"  # of the factors of matrix products; see above

    gated = False  # whether the MLP has a second matrix, which gates the first
    projection = 0  # width of a projection of the pooled state; 0 = none
    patch = 0  # side of an image's patches; 0 = text

    def __post_init__(self):
        names = [field.name for field in fields(self)]
        for field in fields(self):
            value, name = getattr(self, field.name), f"{type(self).__name__}.{field.name}"
            low = 0 if field.name in ("projection", "end") else 1
            if field.type is int and (type(value) is not int or value < low):
                raise UsageError(f"{name}: found {shown(value)}, expected an integer of at least {low}")
        if type(self.epsilon) is not float or not 0 < self.epsilon < 1:
            raise UsageError(f"{type(self).__name__}.epsilon: found {shown(self.epsilon)}, expected a small number")
        if self.width % self.heads and "head_width" not in names:
            raise UsageError(f"{type(self).__name__}.heads: found {self.heads}, expected a divisor of {self.width}")
        choice(f"{type(self).__name__}.dtype", self.dtype, ("float32", "bfloat16"))

    @property
    def head_width(self) -> int:
        """Numbers of a head's query."""
        return self.width // self.heads


def _precision(dtype):
    """Full float32 products on devices that would reduce them: outputs are compared across machines."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def linear(cfg: Sizes, width: int, name: str, bias: bool = True) -> nn.Dense:
    """A Linear to `width` in the compute dtype."""
    dtype = jnp.dtype(cfg.dtype)
    return nn.Dense(width, use_bias=bias, dtype=dtype, precision=_precision(dtype), name=name)


def norm(cfg: Sizes, name: str) -> nn.LayerNorm:
    """Layer normalisation with learned scale and bias, in float32; the variance is the mean squared deviation."""
    return nn.LayerNorm(epsilon=cfg.epsilon, dtype=jnp.float32, use_fast_variance=False, name=name)


def embedding(rows: int, width: int, name: str) -> nn.Embed:
    """A table (rows, width), read in float32. An id that is not in it gives NaN."""
    return nn.Embed(rows, width, dtype=jnp.float32, name=name)


def padding_bias(mask: jax.Array) -> jax.Array:
    """Attention bias (b, 1, 1, n) that hides the tokens whose `mask` (b, n) is False."""
    return jnp.where(mask, 0.0, HIDDEN)[:, None, None]


class Attention(nn.Module):
    """Multi-head self-attention, x (b, n, d) and bias (1 or b, 1 or k, 1 or n, n) -> (b, n, d) float32.

    `scale` multiplies the logits. Projections have biases if `biased`.
    """

    cfg: Sizes
    scale: float
    biased: bool = True

    @nn.compact
    def __call__(self, x, bias):
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        options = {"use_bias": self.biased, "dtype": dtype, "precision": _precision(dtype)}
        q, k, v = (nn.DenseGeneral((cfg.heads, cfg.head_width), name=name, **options)(x) for name in ("q", "k", "v"))
        products = {"preferred_element_type": jnp.float32, "precision": _precision(dtype)}
        logits = self.scale * jnp.einsum("bnkh,bmkh->bknm", q, k, **products) + bias
        weights = jax.nn.softmax(logits, axis=-1).astype(dtype)
        h = jnp.einsum("bknm,bmkh->bnkh", weights, v, **products)
        return nn.DenseGeneral(cfg.width, axis=(-2, -1), name="out", **options)(h).astype(jnp.float32)


class Mlp(nn.Module):
    """Linear, activation, Linear, (b, n, d) -> (b, n, d) float32. With `cfg.gated` another Linear's output multiplies the activation."""

    cfg: Sizes
    activation: str
    biased: bool = True

    @nn.compact
    def __call__(self, x):
        cfg = self.cfg
        h = linear(cfg, cfg.hidden, "fc1", self.biased)(x).astype(jnp.float32)
        h = ACTIVATIONS[self.activation](h)
        if cfg.gated:
            h = h * linear(cfg, cfg.hidden, "gate", self.biased)(x).astype(jnp.float32)
        return linear(cfg, cfg.width, "fc2", self.biased)(h).astype(jnp.float32)


def scan(block: type[nn.Module], depth: int):
    """`depth` copies of a block `(x, bias) -> (x, None)`, scanned: parameters have a leading layer axis l, and XLA compiles one body."""
    rules = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": nn.broadcast}
    return nn.scan(block, length=depth, **rules)


def check_tokens(ids: jax.Array, mask: jax.Array | None, most: int = 0) -> None:
    """Raises UsageError unless ids are (b, n), n at most `most` if that is not 0, and mask, if any, has their shape."""
    if ids.ndim != 2 or (mask is not None and mask.shape != ids.shape):
        found = f"{ids.shape}" if mask is None else f"{ids.shape} and a mask {mask.shape}"
        raise UsageError(f"ids: found shape {found}, expected (b, n){' both' * (mask is not None)}")
    if most and ids.shape[1] > most:
        raise UsageError(f"ids: found {ids.shape[1]} tokens, expected at most {most}, the encoder's positions")
