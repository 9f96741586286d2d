"""The autoencoder's tensors in files of diffusers (AutoencoderKL) and of latent diffusion, to our parameters.

Ours are the paths of `dit_jax.models.vae`, kernels (h, w, in, out) and (in, out); theirs are (out, in, h, w) and (out, in).
"""

import re
from collections.abc import Callable, Mapping

import jax
import numpy as np

from dit_jax.error import UsageError, shown
from dit_jax.models import vae
from dit_jax.models.vae import VAEConfig
from dit_jax.networks.tensors import Tensors

PREFIX = "first_stage_model."  # of the autoencoder in a whole checkpoint of latent diffusion
# Each table: part of our path -> part of theirs, {} being its number. Parts not listed are the same in both.
_LEAVES = {"kernel": "weight", "scale": "weight"}
_DIFFUSERS = _LEAVES | {
    "down_": "down_blocks.{}",
    "up_": "up_blocks.{}",
    "block_": "resnets.{}",
    "shortcut": "conv_shortcut",
    "downsample": "downsamplers.0.conv",
    "upsample": "upsamplers.0.conv",
    "middle": "mid_block",
    "first": "resnets.0",
    "attention": "attentions.0",
    "second": "resnets.1",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "out": "to_out.0",
    "norm_out": "conv_norm_out",
}
_DIFFUSERS_OLD = _DIFFUSERS | {"q": "query", "k": "key", "v": "value", "out": "proj_attn"}
_LATENT_DIFFUSION = _LEAVES | {
    "down_": "down.{}",
    "up_": "up.{}",  # numbered from the finest, ours from the coarsest
    "block_": "block.{}",
    "shortcut": "nin_shortcut",
    "downsample": "downsample.conv",
    "upsample": "upsample.conv",
    "middle": "mid",
    "first": "block_1",
    "attention": "attn_1",
    "second": "block_2",
    "out": "proj_out",
}


# Allowed values of keys of config.json that change the computation; the first is the default.
FIXED = {
    "_class_name": ("AutoencoderKL",),
    "act_fn": ("silu",),
    "mid_block_add_attention": (True,),
    "latents_mean": (None,),
    "latents_std": (None,),
}


def read(tensors: Tensors, groups: int = 32, config: Mapping | None = None) -> tuple[VAEConfig, dict]:
    """Read (config inferred from the shapes, parameters as in `vae.init`, in NumPy).

    Shapes do not show `groups`, scale and shift: the `config`, diffusers' config.json, does if it is given. Without it they
    are Stable Diffusion's for 4 channels, and scale is 0, unknown, for others. Both families' names, old and new names of
    attention, linear or 1 x 1 attention weights, and networks without quant convolutions are recognised. Names without
    PREFIX are ignored if any has it. Raises UsageError naming a tensor that is missing, unknown or misshapen.
    """
    config = config or {}
    for key, allowed in FIXED.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UsageError(
                f"{tensors.where}: config.json: {key}: found {shown(config[key])}, expected {allowed[0]!r}"
            )
    if any(name.startswith((PREFIX, "encoder.down.")) for name in tensors.arrays):
        words = _LATENT_DIFFUSION
    else:
        old = "encoder.mid_block.attentions.0.query.weight" in tensors
        words = _DIFFUSERS_OLD if old else _DIFFUSERS
    prefix = PREFIX if any(name.startswith(PREFIX) for name in tensors.arrays) else ""
    tensors.skip(*(name for name in tensors.arrays if not name.startswith(prefix)))
    cfg = _config(tensors, prefix, words, config.get("norm_num_groups", groups), config)
    name_of = _namer(cfg, prefix, words)
    paths, tree = jax.tree_util.tree_flatten_with_path(vae.shapes(cfg))
    values = [_ours(tensors, name_of(path), path[-1].key, leaf.shape) for path, leaf in paths]
    tensors.done()
    return cfg, jax.tree_util.tree_unflatten(tree, values)


def _config(tensors: Tensors, prefix: str, words: dict, groups: int, config: Mapping) -> VAEConfig:
    """Infer sizes from the shapes of a few convolutions."""
    block = f"{prefix}encoder.{words['down_']}.{words['block_']}.conv1.weight".format  # of (stage, block)
    widths, blocks = [_size(tensors, block(0, 0), 0)], 1
    while block(len(widths), 0) in tensors:
        widths.append(_size(tensors, block(len(widths), 0), 0))
    while block(0, blocks) in tensors:
        blocks += 1
    channels = _size(tensors, f"{prefix}encoder.conv_in.weight", 1)
    latent_channels = _size(tensors, f"{prefix}decoder.conv_in.weight", 1)
    quant = f"{prefix}post_quant_conv.weight" in tensors
    scale, shift = (
        config.get("scaling_factor", 0.18215 if latent_channels == 4 else 0.0),
        config.get("shift_factor") or 0.0,
    )
    try:
        return VAEConfig(
            channels, latent_channels, tuple(widths), blocks, groups, quant=quant, scale=scale, shift=shift
        )
    except UsageError as error:
        raise UsageError(f"{tensors.where}: by its shapes an autoencoder that cannot be: {error}") from error


def _size(tensors: Tensors, name: str, axis: int) -> int:
    """Return the size of one axis of a convolution's weight."""
    shape = tensors.shape(name)
    if len(shape) != 4:
        raise UsageError(f"{tensors.where}: {name}: found shape {shape}, expected (out, in, h, w)")
    return int(shape[axis])


def _namer(cfg: VAEConfig, prefix: str, words: dict) -> Callable[[tuple], str]:
    """Return a function: path in our parameters -> their name."""

    def word(part: str) -> str:
        numbered = re.fullmatch(r"([a-z]+_)(\d+)", part)
        if not numbered:
            return words.get(part, part)
        head, number = numbered[1], int(numbered[2])
        if head == "up_" and words is _LATENT_DIFFUSION:
            number = len(cfg.widths) - 1 - number
        return words[head].format(number)

    def name_of(path: tuple) -> str:
        parts = [part.key for part in path]
        if parts[1] in ("quant_conv", "post_quant_conv"):  # theirs are outside encoder and decoder
            parts = parts[1:]
        return prefix + ".".join(map(word, parts))

    return name_of


def _ours(tensors: Tensors, name: str, leaf: str, shape: tuple[int, ...]) -> np.ndarray:
    """Take their tensor `name` in the layout and shape of our leaf."""
    if leaf == "kernel" and len(shape) == 4:
        found = tensors.take(name, (shape[3], shape[2], shape[0], shape[1])).transpose(2, 3, 1, 0)
    elif leaf == "kernel":
        as_conv = len(tensors.shape(name)) == 4
        found = tensors.take(name, (*shape[::-1], 1, 1) if as_conv else shape[::-1]).reshape(shape[::-1]).T
    else:
        found = tensors.take(name, shape)
    return np.ascontiguousarray(found)
