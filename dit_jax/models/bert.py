"""BERT (Devlin et al. 2019, arXiv 1810.04805), and models of its architecture such as MiniLM (Wang et al. 2020, arXiv 2002.10957).

Norms follow attention and MLP. A sentence is the mean of its tokens' states (Reimers & Gurevych 2019, arXiv 1908.10084).
"""

import functools
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.models.encoder import Attention, Mlp, Sizes, check_tokens, embedding, norm, padding_bias, scan


@dataclass(frozen=True)
class BertConfig(Sizes):
    """Sizes of an encoder, by default MiniLM-L6's (22,565,376 parameters without the pooler, which is not used)."""

    depth: int = 6
    width: int = 384
    heads: int = 12
    hidden: int = 1536
    epsilon: float = 1e-12
    vocabulary: int = 30522
    positions: int = 512  # tokens of the longest text, [CLS] and [SEP] included
    types: int = 2  # rows of the table of segments; a caption is segment 0


class _Block(nn.Module):
    """norm(x + attention(x)), then norm(x + MLP(x)): (b, n, d) float32 -> the same."""

    cfg: BertConfig

    @nn.compact
    def __call__(self, x, bias):
        cfg = self.cfg
        x = norm(cfg, "norm1")(x + Attention(cfg, cfg.head_width**-0.5, name="attention")(x, bias))
        return norm(cfg, "norm2")(x + Mlp(cfg, "gelu", name="mlp")(x)), None


class _Encoder(nn.Module):
    cfg: BertConfig

    @nn.compact
    def __call__(self, ids, mask):
        cfg, n = self.cfg, ids.shape[1]
        places = self.param("positions", nn.initializers.normal(0.02), (cfg.positions, cfg.width))
        types = self.param("types", nn.initializers.normal(0.02), (cfg.types, cfg.width))
        x = embedding(cfg.vocabulary, cfg.width, "tokens")(ids)
        x = x + (places[None, :n].astype(jnp.float32) + types[None, :1].astype(jnp.float32))
        x, _ = scan(_Block, cfg.depth)(cfg, name="blocks")(norm(cfg, "norm")(x), padding_bias(mask))
        return x


@functools.partial(jax.jit, static_argnums=0)
def init(cfg: BertConfig, key: jax.Array) -> dict:
    """Initial parameters, nested dicts of float32 arrays; those of the blocks have a leading layer axis."""
    ids = jnp.zeros((1, 1), jnp.int32)
    return _Encoder(cfg).init(key, ids, ids == 0)["params"]


def shapes(cfg: BertConfig) -> dict:
    """Shapes of the parameters from `init`, as jax.ShapeDtypeStruct."""
    return jax.eval_shape(functools.partial(init, cfg), jax.random.key(0))


def apply(cfg: BertConfig, params: dict, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """States (b, n, d) float32 of captions, ids (b, n) with mask (b, n), False for padding, which nothing attends to.

    Raises UsageError on other shapes, or more tokens than positions.
    """
    check_tokens(ids, mask, cfg.positions)
    return _Encoder(cfg).apply({"params": params}, ids, mask)


def mean_pool(states: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean (b, d) of the states (b, n, d) whose `mask` (b, n) is True, as sentence-transformers pools; zeros if there are none.

    Its cosines compare sentences. MiniLM's pipeline then scales it to length 1, which changes no cosine.
    """
    kept = mask[..., None].astype(states.dtype)
    return (states * kept).sum(axis=1) / jnp.maximum(kept.sum(axis=1), 1e-9)
