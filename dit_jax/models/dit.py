"""Diffusion Transformer: its four conditionings (Peebles & Xie 2023, arXiv 2212.09748, section 3.2 and Figure 3), and two of captions."""

import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.config import ModelConfig
from dit_jax.models import conditioning
from dit_jax.models.conditioning import Condition, positions, rotations
from dit_jax.models.kernels import KEPT
from dit_jax.models.layers import (
    LAYERS,
    Attention,
    CrossAttention,
    Modulation,
    Norm,
    as_it_is,
    modulate,
    patchify,
    unpatchify,
    xavier,
    zeros,
)


def _attention(cls, cfg: ModelConfig, name: str | None = None, **how):
    implementation = "xla" if cfg.attention == "auto" else cfg.attention
    return cls(cfg.width, cfg.heads, cfg.qk_norm, implementation, jnp.dtype(cfg.dtype), name=name, **how)


class AdaptiveBlock(nn.Module):
    """Block of `adaln`, `adaln_zero` or `adaln_cross`: x (b, n, d), c a Condition -> x. Only `adaln` has no gates, which start at zero.

    `adaln_cross` also attends to a caption, without modulation, by a projection that starts at zero (Chen et al. 2023, PixArt-alpha,
    arXiv 2310.00426, section 2.3).
    """

    cfg: ModelConfig
    place: Callable = as_it_is

    @nn.compact
    def __call__(self, x, c):
        cfg, dtype, (c, tokens, mask, angles, _) = self.cfg, jnp.dtype(self.cfg.dtype), c
        norm, mlp = LAYERS[cfg.block]
        attention = functools.partial(_attention(Attention, cfg, "attention"), angles=angles)
        mlp = mlp(cfg.hidden, dtype, name="mlp")
        if cfg.conditioning == "adaln":
            shift1, scale1, shift2, scale2 = Modulation(4, dtype, xavier, self.place, name="modulation")(c)
            x = x + attention(modulate(norm(x), shift1, scale1))
            return x + mlp(modulate(norm(x), shift2, scale2)), None
        shift1, scale1, gate1, shift2, scale2, gate2 = Modulation(6, dtype, place=self.place, name="modulation")(c)
        x = x + gate1[:, None] * attention(modulate(norm(x), shift1, scale1))
        if cfg.conditioning == "adaln_cross":
            x = x + _attention(CrossAttention, cfg, "cross_attention", out_init=zeros)(x, tokens, mask)
        return x + gate2[:, None] * mlp(modulate(norm(x), shift2, scale2)), None


class PlainBlock(nn.Module):
    """Standard pre-norm block of `in_context` or `cross_attention`: x (b, n, d), c a Condition -> x.

    With `in_context`, the condition is already among the tokens x, and its mask is that of x.
    """

    cfg: ModelConfig
    place: Callable = as_it_is

    @nn.compact
    def __call__(self, x, c):
        cfg, dtype, within = self.cfg, jnp.dtype(self.cfg.dtype), self.cfg.conditioning == "in_context"
        kind, mlp = LAYERS[cfg.block]
        h = Norm(dtype, kind, name="norm1")(x)
        x = x + _attention(Attention, cfg, "attention")(h, c.mask if within else None, c.angles)
        if not within:
            h = Norm(dtype, kind, name="cross_norm")(x)
            x = x + _attention(CrossAttention, cfg, "cross_attention")(h, c.tokens)
        return x + mlp(cfg.hidden, dtype, name="mlp")(Norm(dtype, kind, name="norm2")(x)), None


class Stream(nn.Module):
    """Layers of `adaln_zero` for one of the two streams of tokens (b, n, d) of a DualBlock, before and after their joint attention."""

    cfg: ModelConfig
    place: Callable = as_it_is

    def setup(self):
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        self.modulation = Modulation(6, dtype, place=self.place)
        self.attention = _attention(Attention, cfg)
        self.mlp = LAYERS[cfg.block][1](cfg.hidden, dtype)

    def enter(self, x, c, angles=None) -> tuple:
        """Queries, keys and values (b, n, k, h), and the modulation that `leave` takes."""
        shift, scale, *rest = self.modulation(c)
        return self.attention.project(modulate(LAYERS[self.cfg.block][0](x), shift, scale), angles), rest

    def leave(self, x, h, rest):
        """Tokens after the block, from those before, what they attended to (b, n, k, h), and the modulation."""
        gate1, shift, scale, gate2 = rest
        x = x + gate1[:, None] * self.attention.out(h)
        return x + gate2[:, None] * self.mlp(modulate(LAYERS[self.cfg.block][0](x), shift, scale))


class DualBlock(Stream):
    """Block of `dual_stream`: image (b, n, d) and caption (b, m, d), with weights of their own, attend to both jointly; c a Condition.

    MM-DiT (Esser et al. 2024, arXiv 2403.03206, section 4 and Figure 2). SD3's last block has no layers that only the caption's output
    depends on; here it has them, without a gradient, so that all blocks are alike.
    """

    def setup(self):
        super().setup()
        self.text = Stream(self.cfg, self.place)

    def __call__(self, both, c):
        (x, text), n = both, both[0].shape[1]
        of_image, rest = self.enter(x, c.vector, c.angles)
        of_text, rest_of_text = self.text.enter(text, c.vector)
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(of_image, of_text, strict=True))
        h = self.attention.mix(q, k, v, c.mask)
        return (self.leave(x, h[:, :n], rest), self.text.leave(text, h[:, n:], rest_of_text)), None


class Output(nn.Module):
    """Output layer, x (b, n, d), c a Condition -> (b, n, p p c_out): adaLN, or a plain norm, then a Linear; both start at zero."""

    cfg: ModelConfig
    place: Callable = as_it_is

    @nn.compact
    def __call__(self, x, c):
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        norm, _ = LAYERS[cfg.block]
        if cfg.adaptive:
            shift, scale = Modulation(2, dtype, place=self.place, name="modulation")(c.vector)
            h = modulate(norm(x), shift, scale)
        else:
            h = Norm(dtype, norm, name="norm")(x)
        return nn.Dense(cfg.patch**2 * cfg.out_channels, kernel_init=zeros, dtype=dtype, name="linear")(h)


def _scanned_block(cfg: ModelConfig, place: Callable):
    """Scan over `depth` blocks: parameters have a leading layer axis l, and XLA compiles one body."""
    block = DualBlock if cfg.conditioning == "dual_stream" else AdaptiveBlock if cfg.adaptive else PlainBlock
    if place is not as_it_is:
        block = nn.map_variables(block, "params", trans_in_fn=functools.partial(place, "weights"))
    if cfg.remat != "none":
        policy = {"dots": jax.checkpoint_policies.save_only_these_names(KEPT), "full": None}[cfg.remat]
        block = nn.remat(block, policy=policy, prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=(Condition(0, *[nn.broadcast] * 4),) if cfg.target == "later" else nn.broadcast,
        length=cfg.depth,
        unroll=cfg.unroll,
    )(cfg, place, name="blocks")


class DiT(nn.Module):
    """Patch embedding, blocks and output layer: x (b, h, w, c), t (b,), cond -> (b, h, w, c_out)."""

    cfg: ModelConfig
    place: Callable = as_it_is

    @nn.compact
    def __call__(self, x, t, cond):
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        rows, columns = (size // cfg.patch for size in x.shape[1:3])
        h = nn.Dense(cfg.width, kernel_init=xavier, dtype=dtype, name="patch_embedding")(patchify(x, cfg.patch))
        side, grid = cfg.input_size // cfg.patch, (rows, columns)
        if cfg.positions == "sincos":
            h = h + positions(side, cfg.width, grid).astype(dtype)[None]
        c = conditioning.embed(cfg, t, cond)
        if cfg.positions == "rope":
            extra = c.tokens.shape[1] if cfg.conditioning == "in_context" else 0
            c = c._replace(angles=jnp.asarray(rotations(side, cfg.width // cfg.heads, grid, extra)))
        dual = cfg.conditioning == "dual_stream"
        if cfg.conditioning == "in_context" or dual:
            if c.mask is not None:
                c = c._replace(mask=jnp.concatenate([jnp.ones(h.shape[:2], bool), c.mask], axis=1))
            h = (h, c.tokens) if dual else jnp.concatenate([h, c.tokens], axis=1)
        later = cfg.target == "later"
        h, _ = _scanned_block(cfg, self.place)(h, conditioning.by_block(cfg, c) if later else c)
        c = c._replace(vector=c.later) if later else c
        h = Output(cfg, self.place, name="output")(h[0] if dual else h[:, : rows * columns], c)
        return unpatchify(h, cfg.patch, rows, columns).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def init(cfg: ModelConfig, key: jax.Array) -> dict:
    """Initial parameters, a plain nested dict of float32 arrays; those of the blocks have a leading layer axis."""
    x = jnp.zeros((1, cfg.input_size, cfg.input_size, cfg.channels))
    cond = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), conditioning.example(cfg, 1))
    return DiT(cfg).init(key, x, jnp.zeros((1,)), cond)["params"]


def apply(
    cfg: ModelConfig, params: dict, x: jax.Array, t: jax.Array, cond: Mapping | jax.Array, place: Callable = as_it_is
) -> jax.Array:
    """Runs the model: x (b, h, w, c) with h and w any multiples of the patch, t (b,) in 0 to 1000, cond -> (b, h, w, c_out) float32.

    `cond`: see `conditioning`; bare labels (b,) in 0 to K (K = null) stand for {"label": labels}. With `cfg.learn_sigma` the last half
    of c_out is the learned-range variance. On several devices, `place(name, arrays)` lays out arrays by name: "weights", a tree of one
    layer's weights; "condition", vectors (b, d) that are multiplied by weights which stay split. Raises UsageError if a field is missing.
    """
    ends = place("weights", {name: weights for name, weights in params.items() if name != "blocks"})
    params = {**ends, "blocks": params["blocks"]}
    return DiT(cfg, place).apply({"params": params}, x, t, conditioning.as_cond(cond))


# Modules of a block in the order of execution.
ORDER = (
    "modulation", "norm1", "attention/qkv", "attention/q_norm", "attention/k_norm",
    "text/modulation", "text/attention/qkv", "text/attention/q_norm", "text/attention/k_norm", "attention/proj",
    "cross_norm", "cross_attention/q", "cross_attention/kv", "cross_attention/q_norm", "cross_attention/k_norm",
    "cross_attention/proj", "norm2", "mlp/fc1", "mlp/fc2", "text/attention/proj", "text/mlp/fc1", "text/mlp/fc2",
)  # fmt: skip


def activations(
    cfg: ModelConfig, params: dict, x: jax.Array, t: jax.Array, cond: Mapping
) -> list[tuple[str, jax.Array]]:
    """Outputs of the modules in the order of execution: ("patch_embedding", array), ("blocks[0]/mlp/fc1", array), ..."""
    _, found = DiT(cfg).apply({"params": params}, x, t, cond, capture_intermediates=True, mutable=["intermediates"])
    outputs = {}
    for path, value in jax.tree_util.tree_flatten_with_path(found["intermediates"])[0]:
        keys = [part.key for part in path if hasattr(part, "key")]
        outputs.setdefault("/".join(key for key in keys if key != "__call__"), []).append(value)
    outputs.pop("blocks", None)
    outputs = {name: values[0] if len(values) == 1 else jnp.stack(values, -3) for name, values in outputs.items()}
    blocks = [
        (f"blocks[{layer}]/{name}", outputs[f"blocks/{name}"][layer])
        for layer in range(cfg.depth)
        for name in ORDER
        if f"blocks/{name}" in outputs
    ]
    first = ("patch_embedding", "time_embedding", *(f"{name}_embedding" for name in conditioning.fields(cfg)))
    return [*((name, outputs[name]) for name in first), *blocks, ("output", outputs["output"])]
