"""Diffusion Transformer: its four conditionings (Peebles & Xie 2023, arXiv 2212.09748, section 3.2 and Figure 3), and two of captions."""

import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax import flops
from dit_jax.config import ModelConfig
from dit_jax.models import conditioning, quantize
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


def _reused(block: nn.Module, part: str, compute: Callable):
    """Output of a part of a block, `compute(block)`; of `apply_reusing` the one of the call before, unless `fresh` asks for a new one."""
    if not block.has_variable("fresh", part):
        return compute(block)
    kept = block.get_variable("kept", part)
    with jax.named_scope("reuse"):  # by which preflight/hlo.py knows it
        out = nn.cond(block.get_variable("fresh", part), compute, lambda block: kept, block)
    block.put_variable("kept", part, out)
    return out


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
        x = self.place("fence", x)

        def attend(x, shift, scale):
            h = lambda block: _attention(Attention, cfg, "attention")(modulate(norm(x), shift, scale), angles=angles)  # noqa: E731
            return _reused(self, "attention", h)

        def transform(x, shift, scale):
            h = lambda block: mlp(cfg.hidden, dtype, name="mlp")(modulate(norm(x), shift, scale))  # noqa: E731
            return _reused(self, "mlp", h)

        def cross(x):
            h = lambda block: _attention(CrossAttention, cfg, "cross_attention", out_init=zeros)(x, tokens, mask)  # noqa: E731
            return _reused(self, "cross_attention", h)

        if cfg.conditioning == "adaln":
            shift1, scale1, shift2, scale2 = Modulation(4, dtype, xavier, self.place, name="modulation")(c)
            x = x + attend(x, shift1, scale1)
            return x + transform(x, shift2, scale2), None
        shift1, scale1, gate1, shift2, scale2, gate2 = Modulation(6, dtype, place=self.place, name="modulation")(c)
        x = x + gate1[:, None] * attend(x, shift1, scale1)
        x = x + cross(x) if cfg.conditioning == "adaln_cross" else x
        return x + gate2[:, None] * transform(x, shift2, scale2), None


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
        x = self.place("fence", x)

        def attend(block):
            h = Norm(dtype, kind, name="norm1")(x)
            return _attention(Attention, cfg, "attention")(h, c.mask if within else None, c.angles)

        def cross(block):
            return _attention(CrossAttention, cfg, "cross_attention")(Norm(dtype, kind, name="cross_norm")(x), c.tokens)

        def transform(block):
            return mlp(cfg.hidden, dtype, name="mlp")(Norm(dtype, kind, name="norm2")(x))

        x = x + _reused(self, "attention", attend)
        x = x if within else x + _reused(self, "cross_attention", cross)
        return x + _reused(self, "mlp", transform), None


class Stream(nn.Module):
    """Layers of `adaln_zero` for one of the two streams of tokens (b, n, d) of a DualBlock, before and after their joint attention."""

    cfg: ModelConfig
    place: Callable = as_it_is

    def setup(self):
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        self.modulation = Modulation(6, dtype, place=self.place)
        self.attention = _attention(Attention, cfg)
        self.mlp = LAYERS[cfg.block][1](cfg.hidden, dtype)

    def enter(self, x, shift, scale, angles=None) -> tuple:
        """Queries, keys and values (b, n, k, h)."""
        return self.attention.project(modulate(LAYERS[self.cfg.block][0](x), shift, scale), angles)

    def transform(self, x, shift, scale):
        """Output of the MLP."""
        return self.mlp(modulate(LAYERS[self.cfg.block][0](x), shift, scale))


class DualBlock(Stream):
    """Block of `dual_stream`: image (b, n, d) and caption (b, m, d), with weights of their own, attend to both jointly; c a Condition.

    MM-DiT (Esser et al. 2024, arXiv 2403.03206, section 4 and Figure 2). SD3's last block has no layers that only the caption's output
    depends on; here it has them, without a gradient, so that all blocks are alike.
    """

    def setup(self):
        super().setup()
        self.text = Stream(self.cfg, self.place)

    def __call__(self, both, c):
        (x, text), n = self.place("fence", both), both[0].shape[1]
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c.vector)
        of_text = self.text.modulation(c.vector)

        def attend(block):
            pairs = zip(block.enter(x, shift1, scale1, c.angles), block.text.enter(text, *of_text[:2]), strict=True)
            h = block.attention.mix(*(jnp.concatenate(pair, axis=1) for pair in pairs), c.mask)
            return block.attention.out(h[:, :n]), block.text.attention.out(h[:, n:])

        def transform(block):
            return block.transform(x, shift2, scale2), block.text.transform(text, *of_text[3:5])

        h, of = _reused(self, "attention", attend)
        x, text = x + gate1[:, None] * h, text + of_text[2][:, None] * of
        h, of = _reused(self, "mlp", transform)
        return (x + gate2[:, None] * h, text + of_text[5][:, None] * of), None


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
        variable_axes={"params": 0, "intermediates": 0, "fresh": 0, "kept": 0},
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
        if cfg.positions == "learned":
            h = h + conditioning.learned_positions(self, cfg, grid).astype(dtype)[None]
        c = conditioning.embed(cfg, t, cond)
        h = conditioning.add_low(cfg, h, cond, x.shape)
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
    layer's weights; "condition", vectors (b, d) that are multiplied by weights which stay split; "fence", arrays that are computed once.
    `params` may be quantised, see `quantize`. Raises UsageError if a field is missing.
    """
    ends = place("weights", {name: weights for name, weights in params.items() if name != "blocks"})
    params = {**ends, "blocks": params["blocks"]}
    with quantize.by_kernels(params):
        return DiT(cfg, place).apply({"params": params}, x, t, conditioning.as_cond(cond))


def apply_measuring(
    cfg: ModelConfig, params: dict, x: jax.Array, t: jax.Array, cond: Mapping, place: Callable = as_it_is
) -> tuple[jax.Array, dict]:
    """As `apply`, and {product of a block: largest magnitude of its inputs (l,)}, which quantised products need."""
    ends = place("weights", {name: weights for name, weights in params.items() if name != "blocks"})
    variables = {"params": {**ends, "blocks": params["blocks"]}}
    with quantize.measuring():
        out, noted = DiT(cfg, place).apply(variables, x, t, conditioning.as_cond(cond), mutable=["intermediates"])
    return out, quantize.ranges_of(noted["intermediates"]["blocks"], params)


def kept_outputs(cfg: ModelConfig, images: int, tokens: int) -> dict:
    """Zeros in the shapes of the outputs of the parts of all blocks (l, b, n, d): what `apply_reusing` keeps. `tokens`: of an image."""
    extra = sum(flops.FIELDS[name].tokens(cfg) for name in flops.fields(cfg)) + 1

    def zeros(n: int) -> jax.Array:
        return jnp.zeros((cfg.depth, images, n, cfg.width), cfg.dtype)

    def one():
        if cfg.conditioning == "dual_stream":
            return zeros(tokens), zeros(cfg.caption_tokens)
        return zeros(tokens + extra if cfg.conditioning == "in_context" else tokens)

    return {part: one() for part in flops.part_macs(cfg)}


def apply_reusing(
    cfg: ModelConfig,
    params: dict,
    x: jax.Array,
    t: jax.Array,
    cond: Mapping,
    kept: dict,
    fresh: dict,
    place: Callable = as_it_is,
) -> tuple[jax.Array, dict]:
    """As `apply`, but a part of a block computes only where `fresh`, {part: bool (l,)}, says so; elsewhere its output is the kept one.

    `kept`: outputs of the call before, as `kept_outputs`. Also returns the outputs of this call. What is added up in the blocks,
    modulated and gated is always of this call.
    """
    ends = place("weights", {name: weights for name, weights in params.items() if name != "blocks"})
    variables = {"params": {**ends, "blocks": params["blocks"]}, "kept": {"blocks": kept}, "fresh": {"blocks": fresh}}
    with quantize.by_kernels(params):
        out, found = DiT(cfg, place).apply(variables, x, t, conditioning.as_cond(cond), mutable=["kept"])
    return out, found["kept"]["blocks"]


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
