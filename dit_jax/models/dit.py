"""The Diffusion Transformer with adaLN-Zero conditioning (Peebles & Xie 2023, arXiv 2212.09748, section 3.2 and Figure 3)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.config import ModelConfig
from dit_jax.flops import TIME_FREQUENCIES
from dit_jax.models.conditioning import LabelEmbedding, TimeEmbedding, positions
from dit_jax.models.layers import Attention, Mlp, Modulation, layer_norm, modulate, patchify, unpatchify, xavier, zeros


class Block(nn.Module):
    """One adaLN-Zero block: x (b, n, d), c (b, d) -> x."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x, c):
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        shift1, scale1, gate1, shift2, scale2, gate2 = Modulation(6, dtype, name="modulation")(c)
        implementation = "xla" if cfg.attention == "auto" else cfg.attention
        attention = Attention(cfg.heads, cfg.qk_norm, implementation, dtype, name="attention")
        x = x + gate1[:, None] * attention(modulate(layer_norm(x), shift1, scale1))
        mlp = Mlp(cfg.mlp_ratio * cfg.width, dtype, name="mlp")
        return x + gate2[:, None] * mlp(modulate(layer_norm(x), shift2, scale2)), None


class Output(nn.Module):
    """x (b, n, d), c (b, d) -> (b, n, p p c_out): adaLN, then a Linear; both start at zero."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x, c):
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        shift, scale = Modulation(2, dtype, name="modulation")(c)
        size = cfg.patch**2 * cfg.out_channels
        return nn.Dense(size, kernel_init=zeros, dtype=dtype, name="linear")(modulate(layer_norm(x), shift, scale))


def _scanned_block(cfg: ModelConfig):
    """`depth` blocks as one scan: their parameters carry a leading layer axis l, and XLA compiles one body."""
    block = Block
    if cfg.remat != "none":
        keep = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}[cfg.remat]
        block = nn.remat(block, policy=keep, prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=cfg.depth,
        unroll=cfg.unroll,
    )(cfg, name="blocks")


class DiT(nn.Module):
    """x (b, h, w, c), t (b,), labels (b,) -> (b, h, w, c_out): patches, blocks, output."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x, t, labels):
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        side = cfg.input_size // cfg.patch
        h = nn.Dense(cfg.width, kernel_init=xavier, dtype=dtype, name="patch_embedding")(patchify(x, cfg.patch))
        h = h + positions(side, cfg.width).astype(dtype)[None]
        c = TimeEmbedding(cfg.width, TIME_FREQUENCIES, dtype, name="time_embedding")(t)
        c = c + LabelEmbedding(cfg.classes, cfg.width, dtype, name="label_embedding")(labels)
        h, _ = _scanned_block(cfg)(h, c)
        h = Output(cfg, name="output")(h, c)
        return unpatchify(h, cfg.patch, side).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def init(cfg: ModelConfig, key: jax.Array) -> dict:
    """Parameters as a plain nested dict of float32 arrays; the blocks' carry a leading layer axis."""
    x = jnp.zeros((1, cfg.input_size, cfg.input_size, cfg.channels))
    return DiT(cfg).init(key, x, jnp.zeros((1,)), jnp.zeros((1,), jnp.int32))["params"]


def apply(cfg: ModelConfig, params: dict, x: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
    """x (b, h, w, c), t (b,) in 0 to 1000, labels (b,) in 0 to K (K = no class) -> (b, h, w, c_out) float32.

    With `cfg.learn_sigma` the last half of c_out is the learned-range variance.
    """
    return DiT(cfg).apply({"params": params}, x, t, labels)


# Modules of a block in the order in which they run.
ORDER = ("modulation", "attention/qkv", "attention/q_norm", "attention/k_norm", "attention/proj", "mlp/fc1", "mlp/fc2")


def activations(
    cfg: ModelConfig, params: dict, x: jax.Array, t: jax.Array, labels: jax.Array
) -> list[tuple[str, jax.Array]]:
    """What the modules put out, in the order in which they run: ("patch_embedding", array), ("blocks[0]/mlp/fc1", array), ..."""
    _, found = DiT(cfg).apply({"params": params}, x, t, labels, capture_intermediates=True, mutable=["intermediates"])
    outputs = {}
    for path, value in jax.tree_util.tree_flatten_with_path(found["intermediates"])[0]:
        keys = [part.key for part in path if hasattr(part, "key")]
        outputs.setdefault("/".join(key for key in keys if key != "__call__"), value)
    blocks = [
        (f"blocks[{layer}]/{name}", outputs[f"blocks/{name}"][layer])
        for layer in range(cfg.depth)
        for name in ORDER
        if f"blocks/{name}" in outputs
    ]
    ends = [[(name, outputs[name])] for name in ("patch_embedding", "time_embedding", "label_embedding", "output")]
    return [*ends[0], *ends[1], *ends[2], *blocks, *ends[3]]
