"""The DiT of diffusers (`DiTTransformer2DModel`, a folder of config.json and weights) as our parameters.

It holds the published tensors under other names: separate queries, keys and values, and equal copies of the time and label
embedders in every block. Two of its constants differ from the published model's: timestep frequencies 10000^(-i/127) instead
of 10000^(-i/128), and, by default, eps 1e-5 instead of 1e-6 in the norm before the MLP. We keep the published constants,
because the weights were trained with them.
"""

import re
from collections.abc import Mapping

import numpy as np

from dit_jax.config import ModelConfig
from dit_jax.error import UsageError, shown
from dit_jax.networks import dit
from dit_jax.networks.tensors import Tensors

CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the latter in older folders
# Allowed values of keys that change the computation; the first is the default.
FIXED = {
    "norm_type": ("ada_norm_zero",),
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "norm_elementwise_affine": (False,),
    "norm_eps": (1e-5, 1e-6),
    "cross_attention_dim": (None,),
    "double_self_attention": (False,),
    "only_cross_attention": (False,),
    "num_vector_embeds": (None,),
}
DEFAULTS = {
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": None, "num_layers": 28,
    "sample_size": 32, "patch_size": 2, "num_embeds_ada_norm": 1000,
}  # fmt: skip
TIME, LABEL = "norm1.emb.timestep_embedder", "norm1.emb.class_embedder.embedding_table"
ENDS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
BLOCK = {
    "adaLN_modulation.1": ("norm1.linear",),
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
EMBEDDERS = {
    "t_embedder.mlp.0": f"{TIME}.linear_1",
    "t_embedder.mlp.2": f"{TIME}.linear_2",
    "y_embedder.embedding_table": LABEL,
}
POSITIONS = "pos_embed.pos_embed"  # stored in some files only


def read(tensors: Tensors, config: Mapping) -> tuple[ModelConfig, dict]:
    """Read (model config, parameters as NumPy arrays) from a folder's tensors, all of which are used, and its config.json.

    Raises UsageError naming the config key, the tensor (see `dit_jax.networks.dit.read`), or the block whose copy of an
    embedder differs from block 0.
    """
    cfg = _config(config, tensors.where)
    found = dit.count_blocks(tensors, r"transformer_blocks\.(\d+)\.")
    if found != cfg.depth:
        raise UsageError(f"{tensors.where}: found {found} transformer_blocks, expected num_layers = {cfg.depth}")
    for name, shape in dit.shapes(cfg).items():
        parts = [] if name == "pos_embed" else _places(name, 1)
        for part in parts:
            wanted = (shape[0] // len(parts), *shape[1:])
            if tensors.shape(part) != wanted:
                tensors.take(part, wanted)  # raises before the arrays are made
    _check_copies(tensors, cfg)

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        places = _places(name, 1)
        parts = [tensors.take(place, (shape[0] // len(places), *shape[1:])) for place in places]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    params = dit.assemble(cfg, take)
    if POSITIONS in tensors:
        dit.check_positions(tensors, POSITIONS, cfg)
    tensors.done()
    return cfg, params


def write(cfg: ModelConfig, params: dict) -> tuple[dict[str, np.ndarray], dict]:
    """Return (tensors, config.json) of a folder that diffusers reads. Raises UsageError as `dit.write` does."""
    found = {}
    for name, values in dit.write(cfg, params).items():
        if name != "pos_embed":  # diffusers computes it
            places = _places(name, cfg.depth)
            parts = [values] * cfg.depth if _embedder(name) else np.split(values, len(places))
            found |= dict(zip(places, parts, strict=True))
    config = {key: allowed[0] for key, allowed in list(FIXED.items())[:4]} | {
        "_class_name": CLASSES[0],
        "num_attention_heads": cfg.heads,
        "attention_head_dim": cfg.width // cfg.heads,
        "in_channels": cfg.channels,
        "out_channels": cfg.out_channels,
        "num_layers": cfg.depth,
        "sample_size": cfg.input_size,
        "patch_size": cfg.patch,
        "num_embeds_ada_norm": cfg.classes,
        "norm_eps": 1e-6,
    }
    return found, config


def _embedder(name: str) -> str:
    """Return the name inside a block of an embedder's tensor; "" for other tensors."""
    module, _, kind = name.rpartition(".")
    return f"{EMBEDDERS[module]}.{kind}" if module in EMBEDDERS else ""


def _places(name: str, copies: int) -> list[str]:
    """Return the names that hold a published tensor: the first `copies` of an embedder, or the three parts of a qkv."""
    module, _, kind = name.rpartition(".")
    if place := _embedder(name):
        return [f"transformer_blocks.{i}.{place}" for i in range(copies)]
    if module in ENDS:
        return [f"{ENDS[module]}.{kind}"]
    number, inside = re.fullmatch(r"blocks\.(\d+)\.(.*)", module).groups()
    return [f"transformer_blocks.{number}.{part}.{kind}" for part in BLOCK[inside]]


def _check_copies(tensors: Tensors, cfg: ModelConfig) -> None:
    for name, shape in dit.shapes(cfg).items():
        if not _embedder(name):
            continue
        first, *others = _places(name, cfg.depth)
        values = tensors.take(first, shape)
        for other in others:
            if not np.array_equal(tensors.take(other, shape), values):
                raise UsageError(
                    f"{tensors.where}: {other}: differs from {first}; expected one embedder for all blocks, as a DiT has"
                )


def _config(values: Mapping, where: str) -> ModelConfig:
    if not isinstance(values, Mapping) or values.get("_class_name") not in CLASSES:
        found = shown(values.get("_class_name") if isinstance(values, Mapping) else values)
        raise UsageError(f"{where}: config.json: _class_name: found {found}, expected {CLASSES[0]!r}")
    for key, allowed in FIXED.items():
        if values.get(key, allowed[0]) not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise UsageError(f"{where}: config.json: {key}: found {shown(values[key])}, expected {expected}")
    sizes = {key: values.get(key, default) for key, default in DEFAULTS.items()}
    if sizes["out_channels"] is None:
        sizes["out_channels"] = sizes["in_channels"]
    for key, value in sizes.items():
        if type(value) is not int or not 1 <= value < 2**31:
            raise UsageError(f"{where}: config.json: {key}: found {shown(value)}, expected a number of at least 1")
    channels, out = sizes["in_channels"], sizes["out_channels"]
    if out not in (channels, 2 * channels):
        expected = f"expected {channels} or, with a variance, {2 * channels}"
        raise UsageError(f"{where}: config.json: out_channels: found {out}, {expected}")
    return dit.make_config(
        f"{where}: config.json",
        depth=sizes["num_layers"],
        width=sizes["num_attention_heads"] * sizes["attention_head_dim"],
        heads=sizes["num_attention_heads"],
        patch=sizes["patch_size"],
        input_size=sizes["sample_size"],
        channels=channels,
        classes=sizes["num_embeds_ada_norm"],
        learn_sigma=out == 2 * channels,
    )
