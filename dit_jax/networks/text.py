"""Encoders of captions and images in folders of transformers (config.json and weights), to our parameters.

Ours are the paths of `dit_jax.models.clip`, `t5` and `bert`, with one leading layer axis for all blocks; kernels are (in, out), theirs
(out, in). Values keep the file's precision.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import jax
import numpy as np

from dit_jax.error import UsageError, build, choice, shown
from dit_jax.models import bert, clip, t5
from dit_jax.models.encoder import Sizes
from dit_jax.networks.folder import load_network
from dit_jax.networks.tensors import Tensors

# Each table: module of ours -> theirs; {} is the block's number. A name in full is that of a bare parameter.
_CLIP_BLOCK = {
    f"blocks/{ours}": f"encoder.layers.{{}}.{theirs}"
    for ours, theirs in {
        "attention/q": "self_attn.q_proj", "attention/k": "self_attn.k_proj", "attention/v": "self_attn.v_proj",
        "attention/out": "self_attn.out_proj", "norm1": "layer_norm1", "norm2": "layer_norm2",
        "mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2",
    }.items()
}  # fmt: skip
_TEXT = _CLIP_BLOCK | {
    "tokens": "embeddings.token_embedding",
    "positions": "embeddings.position_embedding.weight",
    "norm": "final_layer_norm",
}
_VISION = _CLIP_BLOCK | {
    "patches": "embeddings.patch_embedding",
    "token": "embeddings.class_embedding",
    "positions": "embeddings.position_embedding.weight",
    "norm_in": "pre_layrnorm",  # their spelling
    "norm": "post_layernorm",
}
_T5 = {
    f"blocks/{ours}": f"encoder.block.{{}}.layer.{theirs}"
    for ours, theirs in {
        "attention/q": "0.SelfAttention.q", "attention/k": "0.SelfAttention.k", "attention/v": "0.SelfAttention.v",
        "attention/out": "0.SelfAttention.o", "norm1": "0.layer_norm", "norm2": "1.layer_norm",
        "mlp/fc1": "1.DenseReluDense.wi_0", "mlp/gate": "1.DenseReluDense.wi_1", "mlp/fc2": "1.DenseReluDense.wo",
    }.items()
} | {
    "tokens": "shared",
    "positions": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "norm": "encoder.final_layer_norm",
}  # fmt: skip
_BERT = {
    f"blocks/{ours}": f"encoder.layer.{{}}.{theirs}"
    for ours, theirs in {
        "attention/q": "attention.self.query", "attention/k": "attention.self.key", "attention/v": "attention.self.value",
        "attention/out": "attention.output.dense", "norm1": "attention.output.LayerNorm", "norm2": "output.LayerNorm",
        "mlp/fc1": "intermediate.dense", "mlp/fc2": "output.dense",
    }.items()
} | {
    "tokens": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings.weight",
    "types": "embeddings.token_type_embeddings.weight",
    "norm": "embeddings.LayerNorm",
}  # fmt: skip
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
# Tensors that are not of the encoder: the decoder and heads of whole models, and tables that are recomputed.
UNUSED = {
    "clip": re.compile(r"((text|vision)_model\.)?embeddings\.position_ids|logit_scale"),
    "t5": re.compile(r"decoder\..*|lm_head\.weight"),
    "bert": re.compile(r"(bert\.)?(pooler\..*|embeddings\.position_ids)|cls\..*"),
}
# The kinds of encoder, each with the values of model_type in config.json.
MODEL_TYPES = {"clip": ("clip", "clip_text_model", "clip_vision_model"), "t5": ("t5", "mt5"), "bert": ("bert",)}


# Each table: field of our config -> (key of config.json, its default in transformers).
_BLOCKS = {
    "depth": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
}


def _keys(*defaults: int, **others: tuple) -> dict:
    return {ours: (key, default) for (ours, key), default in zip(_BLOCKS.items(), defaults, strict=True)} | others


_EPSILON = "layer_norm_eps"
TEXT_KEYS = _keys(
    12, 512, 8, 2048, epsilon=(_EPSILON, 1e-5), vocabulary=("vocab_size", 49408), end=("eos_token_id", 49407),
    positions=("max_position_embeddings", 77), activation=("hidden_act", "quick_gelu"),
)  # fmt: skip
VISION_KEYS = _keys(
    12, 768, 12, 3072, epsilon=(_EPSILON, 1e-5), size=("image_size", 224), patch=("patch_size", 32),
    activation=("hidden_act", "quick_gelu"),
)  # fmt: skip
BERT_KEYS = _keys(
    12, 768, 12, 3072, epsilon=(_EPSILON, 1e-12), vocabulary=("vocab_size", 30522), types=("type_vocab_size", 2),
    positions=("max_position_embeddings", 512),
)  # fmt: skip
T5_KEYS = {
    "depth": ("num_layers", 6), "width": ("d_model", 512), "heads": ("num_heads", 8), "hidden": ("d_ff", 2048),
    "head_width": ("d_kv", 64), "epsilon": ("layer_norm_epsilon", 1e-6), "vocabulary": ("vocab_size", 32128),
    "buckets": ("relative_attention_num_buckets", 32), "distance": ("relative_attention_max_distance", 128),
}  # fmt: skip
CONFIGS = {
    "clip": {"text": clip.TextConfig, "vision": clip.VisionConfig},
    "t5": {"text": t5.T5Config},
    "bert": {"text": bert.BertConfig},
}
# Published encoders of text, the usual one first.
PUBLISHED = {
    "clip": tuple(
        clip.TextConfig(depth=depth, width=width, heads=heads, hidden=4 * width)
        for depth, width, heads in ((12, 768, 12), (24, 1024, 16), (32, 1280, 20))
    ),
    "t5": tuple(
        t5.T5Config(depth=depth, width=width, heads=heads, hidden=hidden)
        for depth, width, heads, hidden in (
            (24, 4096, 64, 10240), (24, 2048, 32, 5120), (24, 1024, 16, 2816), (12, 768, 12, 2048), (8, 512, 6, 1024)
        )
    ),
    "bert": (bert.BertConfig(), bert.BertConfig(depth=12, width=768, heads=12, hidden=3072)),
}  # fmt: skip
KEYS = {clip.TextConfig: TEXT_KEYS, clip.VisionConfig: VISION_KEYS, t5.T5Config: T5_KEYS, bert.BertConfig: BERT_KEYS}
# Keys that would change the computation: (the value that is computed here, the default in transformers).
FIXED = {
    "t5": {"feed_forward_proj": ("gated-gelu", "relu")},
    "bert": {
        "hidden_act": ("gelu", "gelu"),
        "position_embedding_type": ("absolute", "absolute"),
        "is_decoder": (False, False),
    },
}


def check_kind(kind: str, config: Mapping, where: str) -> None:
    """Raises UsageError unless a config.json is that of a `kind` of encoder which is computed here."""
    found, allowed = config.get("model_type"), MODEL_TYPES[kind]
    if found not in allowed:
        raise UsageError(
            f"{where}: model_type: found {shown(found)}, expected {' or '.join(allowed)} for --source={kind}"
        )
    for key, (expected, default) in FIXED.get(kind, {}).items():
        if config.get(key, default) != expected:
            raise UsageError(f"{where}: {key}: found {shown(config.get(key, default))}, expected {expected!r}")


def configs(kind: str, config: Mapping, where: str) -> dict[str, Sizes]:
    """Read the encoders that a config.json describes: {"text": ...}, {"vision": ...} or both. Raises UsageError."""
    check_kind(kind, config, where)
    classes, half = CONFIGS[kind], config["model_type"].removeprefix("clip_").removesuffix("_model")
    if half in classes:
        classes = {half: classes[half]}
    found = {}
    for half, cls in classes.items():
        values = _half(config, half, where) if len(classes) > 1 else config
        found[half] = _read_config(cls, KEYS[cls], values, where)
    return found


def _half(config: Mapping, half: str, where: str) -> Mapping:
    """Return the part of a whole CLIP's config about a half. Old files state it twice."""
    found, again = config.get(f"{half}_config") or {}, config.get(f"{half}_config_dict") or {}
    if not isinstance(found, Mapping) or not isinstance(again, Mapping):
        raise UsageError(f"{where}: {half}_config: found {shown(found)}, expected an object")
    for key, value in again.items():
        if key in found and found[key] != value:
            stated = f"found {shown(found[key])} in {half}_config, {shown(value)} in {half}_config_dict"
            raise UsageError(f"{where}: {key}: {stated}, expected the same")
    return {**again, **found}


def _read_config(cls: type[Sizes], keys: Mapping, values: Mapping, where: str) -> Sizes:
    found = {}
    for field, (key, default) in keys.items():
        value = values.get(key, default)
        value = float(value) if type(default) is float and type(value) is int else value
        if type(value) is not type(default):
            raise UsageError(f"{where}: {key}: found {shown(value)}, expected {type(default).__name__}")
        found[field] = value
    try:
        cfg = cls(**found)
    except UsageError as error:
        raise UsageError(f"{where}: by its sizes an encoder that cannot be: {error}") from None
    if isinstance(cfg, clip.TextConfig) and cfg.end >= cfg.vocabulary:
        stated = "found" if "eos_token_id" in values else "missing, and found the usual"
        raise UsageError(f"{where}: eos_token_id: {stated} {cfg.end}, expected an id below {cfg.vocabulary}")
    return cfg


def check_end(cfg: clip.TextConfig, end: int, size: int, where: str) -> None:
    """Raises UsageError unless the tokenizer's `end` is the token at which the encoder pools; `size`: 1 + its largest id."""
    pooled = size - 1 if cfg.end == clip.LEGACY_END else cfg.end
    if end != pooled:
        raise UsageError(
            f"{where}: eos_token_id: found {cfg.end}, expected {end}, the id of the tokenizer's end of a text"
        )


def read(kind: str, tensors: Tensors, cfgs: Mapping[str, Sizes]) -> tuple[dict, dict]:
    """Read ({half: config}, {half: parameters}), all tensors used; `cfgs` get the widths of projections, which only shapes show.

    CLIP's and BERT's names may have a prefix (`text_model.`, `vision_model.`, `bert.`). Raises UsageError naming a tensor that is
    missing, unknown, misshapen or not finite.
    """
    found, params = {}, {}
    for half, cfg in cfgs.items():
        name_of = _namer(kind, half, tensors, whole=len(cfgs) > 1)
        if kind == "clip":
            name = name_of("projection")
            there = name in tensors or len(cfgs) > 1  # half a CLIP need not have it
            cfg = dataclasses.replace(cfg, projection=int(tensors.shape(name)[0]) if there else 0)
        paths, tree = jax.tree_util.tree_flatten_with_path(SHAPES[type(cfg)](cfg))
        leaves = [_leaf(tensors, name_of, [part.key for part in path], leaf.shape) for path, leaf in paths]
        found[half], params[half] = cfg, jax.tree_util.tree_unflatten(tree, leaves)
    tensors.done()
    return found, params


SHAPES: dict[type, Callable] = {
    clip.TextConfig: clip.shapes, clip.VisionConfig: clip.shapes, t5.T5Config: t5.shapes, bert.BertConfig: bert.shapes,
}  # fmt: skip


def _namer(kind: str, half: str, tensors: Tensors, whole: bool) -> Callable[[str], str]:
    """Return a function: module of ours -> theirs."""
    words = {("clip", "text"): _TEXT, ("clip", "vision"): _VISION, ("t5", "text"): _T5, ("bert", "text"): _BERT}[
        kind, half
    ]
    prefix = {"clip": f"{half}_model.", "t5": "", "bert": "bert."}[kind]
    if not whole and not any(name.startswith(prefix) for name in tensors.arrays):
        prefix = ""
    if kind == "t5" and "encoder.embed_tokens.weight" in tensors:  # the same table, which some files hold twice
        if "shared.weight" in tensors:
            tensors.skip("encoder.embed_tokens.weight")
        else:
            words = words | {"tokens": "encoder.embed_tokens"}
    outside = {"text": "text_projection.weight", "vision": "visual_projection.weight"}[half]
    return lambda module: outside if module == "projection" else prefix + words[module]


def _leaf(tensors: Tensors, name_of: Callable[[str], str], path: list[str], shape: tuple[int, ...]) -> np.ndarray:
    """Take one leaf of ours, of all blocks if it is in the blocks."""
    *module, leaf = path
    name = name_of("/".join(module or path))
    if module and not name.endswith(".weight"):
        name = f"{name}.{LEAVES[leaf]}"
    if path[0] != "blocks":
        return _ours(tensors, name, module, leaf, shape)
    first = _ours(tensors, name.format(0), module, leaf, shape[1:])
    stacked = np.empty(shape, first.dtype)
    stacked[0] = first
    for i in range(1, shape[0]):
        one = _ours(tensors, name.format(i), module, leaf, shape[1:])
        if one.dtype != first.dtype:
            found = f"found {one.dtype.name}, expected {first.dtype.name} as in block 0"
            raise UsageError(f"{tensors.where}: {name.format(i)}: {found}")
        stacked[i] = one
    return stacked


def _ours(tensors: Tensors, name: str, module: list[str], leaf: str, shape: tuple[int, ...]) -> np.ndarray:
    """Take their tensor in the layout and shape of our leaf."""
    if module == ["patches"]:  # a convolution of theirs, rows (p p c) of ours
        rows, width = shape
        side = round((rows // 3) ** 0.5)
        values = tensors.pop(name, (width, 3, side, side)).transpose(2, 3, 1, 0)
    elif leaf == "kernel":
        into = 2 if module[-1] == "out" else 1  # axes of ours that are summed over
        values = tensors.pop(name, (prod(shape[into:]), prod(shape[:into]))).T
    elif leaf == "bias" and module[-1] in ("q", "k", "v"):
        values = tensors.pop(name, (prod(shape),))
    else:
        values = tensors.pop(name, shape)
    return np.ascontiguousarray(values).reshape(shape)


@dataclass(frozen=True)
class Encoder:
    """A converted encoder: `cfgs` and `params` by half, "text" or "vision"; `about`, what a protocol says of it."""

    kind: str
    cfgs: dict
    params: dict
    about: dict


def load_encoder(folder: str, kind: str, dtype: str = "float32") -> Encoder:
    """Load a folder that `convert` made, to compute in `dtype`. Raises UsageError if it is of another kind or damaged."""
    config, params, meta = load_network(folder, kind)
    where, source = os.path.join(folder, "meta.json: config."), meta["source"]
    cfgs = {}
    for half, values in config.items():
        choice(f"{where}half", half, CONFIGS[kind])
        cfgs[half] = build(CONFIGS[kind][half], {**values, "dtype": dtype}, f"{where}{half}.")
    about = {"kind": kind, "file": source["file"], "sha256": meta["sha256"], "tokenizer": source["tokenizer"]}
    return Encoder(kind, cfgs, params, about)
