"""Captions as a model reads them: bytes, words, or states of a frozen encoder, which the step computes or a cache holds.

Batches hold tokens, of which `step_encoder` makes states. Scores and samples encode captions beforehand, on the devices of each process.
All roads give the same states, but for roundings: of the tokens that are there, zeros elsewhere, in the model's dtype, in which the encoder
computes too.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax import flops
from dit_jax.config import Config, ModelConfig
from dit_jax.data.words import byte_tokens, split_words, word_tokens
from dit_jax.devices.mesh import batch_sharding, batch_split, local_mesh, replicated
from dit_jax.error import UsageError, build
from dit_jax.log import say
from dit_jax.models import bert, clip, t5
from dit_jax.models.encoder import Sizes
from dit_jax.networks.autoencoder import StepEncoder
from dit_jax.networks.folder import read_meta
from dit_jax.networks.sharing import captions_of
from dit_jax.networks.text import CONFIGS, load_encoder
from dit_jax.networks.tokenizer import open_tokenizer

ROWS = 16  # captions that a device encodes at a time; fixed, because another batch shape rounds differently
APPLY: dict[str, Callable] = {
    "clip": lambda cfg, params, ids, mask: clip.apply_text(cfg, params, ids).states,
    "t5": t5.apply,
    "bert": bert.apply,
}


@dataclass(frozen=True)
class Text:
    """How a model reads captions. Threads may share it.

    tokens(captions)   arrays (n, ...) that batches hold
    cut(captions)      which are too long, bool (n,)
    """

    cfg: ModelConfig
    tokens: Callable
    cut: Callable

    def encode(self, tokens):
        """Return captions as the model takes them, `cond["text"]`, of their tokens (n, ...), both on the host."""
        if not self.cfg.encoded:
            return tokens
        found = {"states": self._states(tokens), "mask": tokens["mask"]}
        return found | (
            {"empty": np.repeat(self.empty, len(found["mask"]), axis=0)} if self.cfg.null == "empty" else {}
        )

    @functools.cached_property
    def empty(self) -> np.ndarray:
        """States (1, e, w) of the empty caption."""
        tokens = self.tokens([""])
        return self._states(tokens)[:, : int(tokens["mask"].sum())]

    @functools.cached_property
    def params(self) -> dict:
        """The encoder's parameters, on the host. Raises UsageError if they are not those of the model."""
        return load_encoder(self.cfg.text_encoder, self.cfg.text, self.cfg.dtype).params["text"]

    def _states(self, tokens: dict) -> np.ndarray:
        program, place, count = self._program
        parts = []
        for start in range(0, len(tokens["ids"]), count):
            some = {name: values[start : start + count] for name, values in tokens.items()}
            rows = len(some["ids"])
            filled = {
                name: np.concatenate([values, np.repeat(values[-1:], count - rows, 0)]) for name, values in some.items()
            }
            parts.append(jax.device_get(program(place, filled))[:rows])
        return np.concatenate(parts)

    @functools.cached_property
    def _program(self) -> tuple:
        mesh = local_mesh()
        program = _compiled(self.cfg.text, sizes_of(self.cfg), self.cfg.dtype, mesh)
        return program, jax.device_put(self.params, replicated(mesh)), ROWS * batch_split(mesh)


@functools.lru_cache(maxsize=4)
def _compiled(kind: str, cfg: Sizes, dtype: str, mesh) -> Callable:
    whole, rows = replicated(mesh), batch_sharding(mesh)
    return jax.jit(functools.partial(_encode, kind, cfg, dtype), in_shardings=(whole, rows), out_shardings=rows)


def _encode(kind: str, cfg: Sizes, dtype: str, params: dict, tokens: dict) -> jax.Array:
    """States (b, m, w) of tokens (b, m), zeros where there is none."""
    with jax.named_scope("text_encoder"):
        found = APPLY[kind](cfg, params, tokens["ids"], tokens["mask"])
        return jnp.where(tokens["mask"][..., None], found, 0).astype(dtype)


def open_text(model: ModelConfig) -> Text | None:
    """Open what reads captions; None for a model without. Raises UsageError if the encoder or its tokenizer does not fit."""
    return _open(follow_text(model)) if model.text else None


@functools.lru_cache(maxsize=2)  # so that training and its evaluation hold an encoder's weights once
def _open(model: ModelConfig) -> Text:
    length = model.text_length
    if not model.encoded:
        if model.text == "bytes":
            units, tokens = str.encode, functools.partial(byte_tokens, length=length)
        else:
            units, tokens = split_words, functools.partial(word_tokens, length=length, rows=flops.TABLES["words"])
        return Text(model, tokens, lambda captions: np.array([len(units(text)) > length for text in captions], bool))
    positions = getattr(sizes_of(model), "positions", length)
    if length > positions:
        raise UsageError(f"model.text_length: found {length}, expected at most {positions}, the encoder's positions")
    tokenizer = open_tokenizer(model.text_encoder)
    tokenizer.encode([""], length)  # raises if there is no room

    def tokens(captions: Sequence[str]) -> dict:
        found = tokenizer.encode([*captions], length)
        return {"ids": found.ids, "mask": found.mask}

    room = length - len(tokenizer.start) - 1
    cut = lambda captions: np.array([len(ids) > room for ids in tokenizer.split([*captions])], bool)  # noqa: E731
    return Text(model, tokens, cut)


def follow_text(model: ModelConfig) -> ModelConfig:
    """Set `model.text_width` and `text_sha256` as the folder of its encoder has them. Other models are returned as they are.

    Raises UsageError if there is no such folder, or the model has others.
    """
    if not model.encoded:
        return model
    if not model.text_encoder:
        written = f"a folder that `python -m dit_jax.convert --source={model.text}` wrote"
        raise UsageError(f"model.text_encoder: found none with model.text = {model.text!r}, expected {written}")
    meta = read_meta(model.text_encoder, model.text)
    width = sizes_of(model).width
    tokenizer = hashlib.sha256(json.dumps(meta["source"].get("tokenizer"), sort_keys=True).encode()).hexdigest()
    sums = f"{meta['sha256']} {tokenizer}"
    for name, found in (("text_width", width), ("text_sha256", sums)):
        if (stated := getattr(model, name)) not in (0, "", found):
            what = f"{model.text_encoder!r} has {name.removeprefix('text_')} {found}, expected {stated}"
            raise UsageError(
                f"model.text_encoder: {what}, as the model has: give it the encoder that it was trained with"
            )
    return dataclasses.replace(model, text_width=width, text_sha256=sums)


def follow(cfg: Config) -> Config:
    """Return the config with `follow_text` of its model."""
    return dataclasses.replace(cfg, model=follow_text(cfg.model)) if cfg.model.encoded else cfg


def sizes_of(model: ModelConfig) -> Sizes:
    """Read the sizes of a model's encoder. Raises UsageError if its folder is of another kind."""
    config = read_meta(model.text_encoder, model.text)["config"]
    if "text" not in config:
        raise UsageError(
            f"model.text_encoder: found an encoder of images in {model.text_encoder!r}, expected one of text"
        )
    return build(
        CONFIGS[model.text]["text"], {**config["text"], "dtype": model.dtype}, "model.text_encoder: config.text."
    )


def in_step(cfg: Config) -> bool:
    """Whether the step encodes captions."""
    return cfg.model.encoded and not cfg.data.captions


def step_encoder(cfg: Config, mesh) -> StepEncoder:
    """Return what a step does with the captions of a batch: their tokens become states. The encoder's weights are whole on each device."""
    if not in_step(cfg):
        return StepEncoder()
    text, whole = open_text(cfg.model), replicated(mesh)
    weights = {"text_encoder": text.params, "empty": text.empty}
    placed = jax.tree.map(lambda leaf: jax.make_array_from_callback(leaf.shape, whole, leaf.__getitem__), weights)
    return make_text_encoder(text.cfg, sizes_of(text.cfg), placed)


def make_text_encoder(model: ModelConfig, cfg: Sizes, weights: dict) -> StepEncoder:
    """Return the encoding of a batch whose `cond["text"]` is {"ids": int32 (b, m), "mask": bool (b, m)}.

    `weights`: {"text_encoder": parameters, "empty": states (1, e, w) of the empty caption} on the mesh, or their shapes.
    """

    def apply(batch: dict, weights: dict) -> dict:
        tokens, empty = batch["cond"]["text"], weights["empty"]
        found = {
            "states": _encode(model.text, cfg, model.dtype, weights["text_encoder"], tokens),
            "mask": tokens["mask"],
        }
        if model.null == "empty":
            found["empty"] = jnp.broadcast_to(empty, (len(tokens["mask"]), *empty.shape[1:]))
        return batch | {"cond": batch["cond"] | {"text": found}}

    return StepEncoder(apply, (weights,))


def chained(*encoders: StepEncoder) -> StepEncoder:
    """Return what does one after another; each has one tree of weights, or does nothing."""
    given = [encoder for encoder in encoders if encoder.weights]

    def apply(batch: dict, *weights: dict) -> dict:
        for encoder, own in zip(given, weights, strict=True):
            batch = encoder.apply(batch, own)
        return batch

    return (
        StepEncoder(apply, tuple(weights for encoder in given for weights in encoder.weights))
        if given
        else StepEncoder()
    )


def tell_cut(model: ModelConfig, source, most: int) -> None:
    """Log how many captions of the first `most` records are too long for a model; captions that cannot be read are not counted."""
    if (text := open_text(model)) is None:
        return
    captions, count = [], min(most, len(source))
    with contextlib.suppress(UsageError):  # reading them says so
        captions += itertools.chain.from_iterable(captions_of(source, np.arange(count)))
    if cut := int(text.cut(captions).sum()) if captions else 0:
        unit = "tokens" if text.cfg.encoded else text.cfg.text
        of = f"{len(captions):,} captions of the first {count:,} images"
        say(f"data: {cut:,} of {of} are cut after model.text_length = {text.cfg.text_length} {unit}")


def text_flops(cfg: Config) -> int:
    """Return the FLOPs of encoding a caption in the step, which the model's do not include; 0 for other runs."""
    return flops.encoder_flops(sizes_of(cfg.model), cfg.model.text_length) if in_step(cfg) else 0


def describe_text(model: ModelConfig) -> dict:
    """The frozen encoder of captions, for protocols; {} for a model without."""
    if not model.encoded:
        return {}
    sums = zip(("encoder_sha256", "tokenizer_sha256"), model.text_sha256.split(), strict=True)
    return {"text": {"encoder": model.text, **dict(sums), "length": model.text_length}}
