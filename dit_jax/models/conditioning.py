"""Conditioning of a DiT: timesteps, fixed 2-D positions and `cond` (Peebles & Xie 2023, section 3.2).

`cond` is a dict of arrays with a leading axis b, one for each field in FIELDS that the model has: class labels, or {} for a model
without classes. Only this file and the data pipeline depend on the fields; all other code treats `cond` as an opaque pytree.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dit_jax import flops
from dit_jax.config import ModelConfig
from dit_jax.error import UsageError

MAX_PERIOD = 10_000.0
small_normal = nn.initializers.normal(0.02)


def timestep_features(t: jax.Array, size: int) -> jax.Array:
    """Sinusoidal embedding of timesteps t (b,), 0 to 1000 as in the published models -> (b, size) float32, cosines then sines."""
    half = size // 2
    frequencies = jnp.exp(-np.log(MAX_PERIOD) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def positions(side: int, width: int, grid: tuple[int, int] | None = None) -> np.ndarray:
    """Fixed sin-cos position table (n, d), float32, of a grid of (rows, columns) patches, by default side x side.

    The first half of d encodes the column, the second the row.
    """
    encoded = [f(angles) for angles in _angles(side, width // 4, grid) for f in (np.sin, np.cos)]
    return np.concatenate(encoded, axis=1).astype(np.float32)


def rotations(side: int, width: int, grid: tuple[int, int], extra: int) -> np.ndarray:
    """Angles (n + extra, h/2), float32, that rotate the queries and keys of a grid of patches, and of `extra` tokens beside, for heads of
    `width` h.

    The first half of the angles is by the column, the second by the row: axial rotary embeddings (Heo et al. 2024, arXiv 2403.13298,
    section 3.1). Tokens of the condition are not rotated (as in FLUX.1, Black Forest Labs 2024, where they are at position 0).
    """
    angles = np.concatenate(_angles(side, width // 4, grid), axis=1)
    return np.pad(angles, ((0, extra), (0, 0))).astype(np.float32)


def _angles(side: int, count: int, grid: tuple[int, int] | None) -> list[np.ndarray]:
    """Coordinates of patches times `count` frequencies, (n, count): of columns, then of rows.

    Coordinates are 0 to side - 1 in a square grid; those of another grid have the same spacing and the same centre, so that they may be
    negative or halves: row r is at r - (rows - side) / 2 (Esser et al. 2024, arXiv 2403.03206, "Positional encodings for variable aspect
    ratios", without the change of scale).
    """
    rows, columns = grid or (side, side)
    frequencies = MAX_PERIOD ** -(np.arange(count, dtype=np.float64) / count)
    row, column = np.divmod(np.arange(rows * columns), columns)
    return [index[:, None] * frequencies[None] for index in (column - (columns - side) / 2, row - (rows - side) / 2)]


class TimeEmbedding(nn.Module):
    """Embedding of t (b,) -> (b, d): sinusoids, then Linear, SiLU, Linear."""

    width: int
    frequencies: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, t):
        h = timestep_features(t, self.frequencies).astype(self.dtype)
        h = nn.Dense(self.width, kernel_init=small_normal, dtype=self.dtype, name="fc1")(h)
        return nn.Dense(self.width, kernel_init=small_normal, dtype=self.dtype, name="fc2")(nn.silu(h))


class LabelEmbedding(nn.Module):
    """Embedding of labels (b,) -> (b, d), a table of K + 1 rows; the last row is the null class."""

    classes: int
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, labels):
        table = nn.Embed(self.classes + 1, self.width, embedding_init=small_normal, dtype=self.dtype, name="table")
        return table(labels)


class TextEmbedding(nn.Module):
    """Embedding of a caption's bytes (b, m) -> (b, m, d): a table of each byte, plus fixed sinusoids of its place."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(flops.BYTES, self.width, embedding_init=small_normal, dtype=self.dtype, name="table")
        places = timestep_features(jnp.arange(ids.shape[1]), self.width)
        return table(ids) + places.astype(self.dtype)[None]


class Condition(NamedTuple):
    """Embedded condition: a vector (b, d) and tokens (b, m, d), each None if the model has none; which tokens are there, bool (b, m)."""

    vector: jax.Array | None
    tokens: jax.Array | None
    mask: jax.Array | None = None  # None: all
    angles: jax.Array | None = None  # (n, h/2) by which queries and keys of self-attention are rotated; None: not


class Field(NamedTuple):
    """A field of `cond`: a row of FIELDS. The row of the same name in `flops.FIELDS` decides which models have the field.

    embed(cfg, name)   module that maps values (b, ...) to vectors (b, d) or tokens (b, m, d); its parameters are named `name`
    example(cfg)       shape of one value, and dtype
    null(cfg, values)  null values, in the shape of `values`
    draw(cfg, rule, keys, indices, wanted)   values (b, ...) for samples: `wanted` in turn if given, else by the rule `sample.labels`
    """

    embed: Callable
    example: Callable
    null: Callable
    draw: Callable


LABEL_DRAW = 2**31 - 1  # folded into image i's key for its label; samplers fold in 0, 1, ... for noise


def draw_labels(cfg: ModelConfig, rule: str, keys: jax.Array, indices: jax.Array, wanted: tuple = ()) -> jax.Array:
    """Labels int32 (b,): `wanted` in turn if given, else class i modulo K (balanced) or uniformly random by image i's key."""
    if wanted:
        return jnp.asarray(wanted, jnp.int32)[indices % len(wanted)]
    if rule == "balanced":
        return (indices % cfg.classes).astype(jnp.int32)
    return jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, LABEL_DRAW), (), 0, cfg.classes))(keys)


def draw_text(cfg: ModelConfig, rule: str, keys: jax.Array, indices: jax.Array, wanted: tuple = ()) -> jax.Array:
    """Captions int32 (b, m): `wanted`, rows of tokens, in turn; without any the empty caption."""
    if wanted:
        return jnp.asarray(wanted, jnp.int32)[indices % len(wanted)]
    return jnp.zeros((len(indices), cfg.text_length), jnp.int32)


FIELDS = {
    "label": Field(
        embed=lambda cfg, name: LabelEmbedding(cfg.classes, cfg.width, jnp.dtype(cfg.dtype), name=name),
        example=lambda cfg: ((), jnp.int32),
        null=lambda cfg, values: jnp.full_like(values, cfg.classes),
        draw=draw_labels,
    ),
    "text": Field(  # tokens from 1, then zeros: the empty caption is all zeros
        embed=lambda cfg, name: TextEmbedding(cfg.width, jnp.dtype(cfg.dtype), name=name),
        example=lambda cfg: ((cfg.text_length,), jnp.int32),
        null=lambda cfg, values: jnp.zeros_like(values),
        draw=draw_text,
    ),
}


def fields(cfg: ModelConfig) -> dict[str, Field]:
    """The rows of FIELDS that a model has."""
    return {name: FIELDS[name] for name in flops.fields(cfg)}


def as_cond(cond) -> Mapping:
    """Returns a mapping unchanged, and bare labels (b,) as {"label": labels}."""
    return cond if isinstance(cond, Mapping) else {"label": cond}


def example(cfg: ModelConfig, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of `cond` for a batch of `rows` images."""
    kinds = {name: field.example(cfg) for name, field in fields(cfg).items()}
    return {name: jax.ShapeDtypeStruct((rows, *shape), dtype) for name, (shape, dtype) in kinds.items()}


def null(cfg: ModelConfig, cond: Mapping) -> dict:
    """Null condition in the shapes of `cond`."""
    return {name: field.null(cfg, cond[name]) for name, field in fields(cfg).items()}


def drop(cfg: ModelConfig, key: jax.Array, cond: Mapping, rate: float) -> dict:
    """Replaces all fields of each image by the null condition with probability `rate`, independently over images."""
    if not cond:
        return {}
    dropped = jax.random.bernoulli(key, rate, jax.tree.leaves(cond)[0].shape[:1])

    def choose(empty, values):
        return jnp.where(dropped.reshape(-1, *[1] * (values.ndim - 1)), empty, values)

    return {name: choose(empty, cond[name]) for name, empty in null(cfg, cond).items()}


def draw(cfg: ModelConfig, rule: str, keys: jax.Array, indices: jax.Array, wanted: Mapping) -> dict:
    """Draws `cond` for samples `indices` (b,); image i depends on `keys[i]` and i only. `wanted`: field -> values taken in turn."""
    found = fields(cfg).items()
    return {name: field.draw(cfg, rule, keys, indices, tuple(wanted.get(name, ()))) for name, field in found}


def labels(cond: Mapping, rows: int) -> jax.Array:
    """Class labels int32 (rows,) in `cond`, as stored beside images; zeros if the model has no labels."""
    return cond.get("label", jnp.zeros(rows, jnp.int32))


def embed(cfg: ModelConfig, t: jax.Array, cond: Mapping) -> Condition:
    """Embeddings of t (b,) and of each field: with adaLN a vector, the sum of all, a caption's by its mean; else tokens, a row of all.

    With `adaln_cross` and `dual_stream` the tokens are the caption's.

    Call it inside a flax module, which gets the parameters `time_embedding` and `NAME_embedding`. Raises UsageError if a field is missing.
    """
    wanted = fields(cfg)
    if missing := [name for name in wanted if name not in cond]:
        raise UsageError(
            f"cond: found {', '.join(cond) or 'no field'}, expected {', '.join(missing)}, as the model has"
        )
    found = [TimeEmbedding(cfg.width, flops.TIME_FREQUENCIES, jnp.dtype(cfg.dtype), name="time_embedding")(t)]
    found += [field.embed(cfg, f"{name}_embedding")(cond[name]) for name, field in wanted.items()]
    if "text" not in wanted:
        return Condition(sum(found[1:], found[0]), None) if cfg.adaptive else Condition(None, jnp.stack(found, axis=1))
    *vectors, text = found
    mask = cond["text"] > 0
    if cfg.adaptive:
        count = jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
        pooled = jnp.where(mask[..., None], text, 0).sum(axis=1) / count.astype(text.dtype)
        # A first token that is always there: attention needs one.
        return Condition(sum(vectors[1:], vectors[0]) + pooled, text, jnp.asarray(mask).at[:, 0].set(True))
    there = jnp.ones((len(t), len(vectors)), bool)
    return Condition(
        None,
        jnp.concatenate([jnp.stack(vectors, axis=1), text], axis=1),
        jnp.concatenate([there, mask], axis=1),
    )
