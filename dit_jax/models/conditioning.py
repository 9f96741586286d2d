"""Conditioning of a DiT: timesteps, fixed 2-D positions and `cond` (Peebles & Xie 2023, section 3.2).

`cond` is a dict of arrays with a leading axis b, one for each field in FIELDS that the model has: class labels, or {} for a model
without classes; and, of a flow map, the target time, which objectives and samplers add (`aim`). Only this file and the data pipeline
depend on the fields; all other code treats `cond` as an opaque pytree. A low-resolution image is no condition that guidance leaves out.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dit_jax import flops
from dit_jax.config import ModelConfig
from dit_jax.error import UsageError
from dit_jax.models.layers import LAYERS, Attention, Norm, layer_norm, patchify, zeros

MAX_PERIOD = 10_000.0
small_normal = nn.initializers.normal(0.02)
unit_normal = nn.initializers.normal(1.0)  # as large as the sinusoids that are added


def timestep_frequencies(size: int) -> np.ndarray:
    """Angular frequencies (size / 2,), from 1 down, of the sinusoids that embed a timestep."""
    half = size // 2
    return np.exp(-np.log(MAX_PERIOD) * np.arange(half) / half)


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


def learned_positions(module: nn.Module, cfg: ModelConfig, grid: tuple[int, int]) -> jax.Array:
    """Trained table (n, d) of a square grid, a parameter of `module` (Dosovitskiy et al. 2021, arXiv 2010.11929, eq. 1).

    It begins as large as the tokens: neighbours of few patches differ by little in sinusoids. Raises UsageError for another grid.
    """
    side = cfg.input_size // cfg.patch
    if grid != (side, side):
        found, expected = (" x ".join(map(str, shape)) for shape in (grid, (side, side)))
        raise UsageError(f"model.positions: found learned for {found} patches, expected {expected}, as the table has")
    return module.param("positions", unit_normal, (side * side, cfg.width))


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
    out_init: Callable = small_normal

    @nn.compact
    def __call__(self, t):
        h = timestep_features(t, self.frequencies).astype(self.dtype)
        h = nn.Dense(self.width, kernel_init=small_normal, dtype=self.dtype, name="fc1")(h)
        return nn.Dense(self.width, kernel_init=self.out_init, dtype=self.dtype, name="fc2")(nn.silu(h))


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
    """Embedding of captions -> (b, m, d).

    Bytes or words (b, m): a table, plus fixed sinusoids of the place. States of an encoder (b, m, w): a norm, because encoders
    differ in scale (Saharia et al. 2022, arXiv 2205.11487, section 2.3), then a Linear, whose weights also serve as the norm's.
    `text_depth` blocks of self-attention follow, a small encoder that is trained with the model (as in GLIDE, Nichol et al. 2021,
    arXiv 2112.10741, section 4), and a norm. With `null = learned` the rows of the null condition are a trained table (m, d).
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(self, values):
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        if cfg.encoded:
            states = layer_norm(values["states"])
            found = nn.Dense(cfg.width, kernel_init=small_normal, dtype=dtype, name="projection")(states)
        else:
            table = nn.Embed(flops.TABLES[cfg.text], cfg.width, embedding_init=unit_normal, dtype=dtype, name="table")
            places = timestep_features(jnp.arange(values.shape[1]), cfg.width)
            found = table(values) + places.astype(dtype)[None]
        if cfg.text_depth:
            found = self.contextual(found, text_mask(cfg, values))
        if cfg.null == "empty":
            return found
        learned = self.param("null", small_normal, (cfg.text_length, cfg.width)).astype(dtype)
        return jnp.where(_is_null(cfg, values)[:, None, None], learned[None], found)

    @nn.nowrap
    def contextual(self, x, mask):
        """Tokens (b, m, d) after `text_depth` pre-norm blocks, in which those of `mask` (b, m) attend to each other, and a norm."""
        cfg, dtype, (kind, mlp) = self.cfg, jnp.dtype(self.cfg.dtype), LAYERS[self.cfg.block]
        mask = mask.at[:, 0].set(True)  # attention needs one
        for i in range(cfg.text_depth):
            attention = Attention(cfg.width, cfg.heads, cfg.qk_norm, "xla", dtype, name=f"attention{i}")
            x = x + attention(Norm(dtype, kind, name=f"attention_norm{i}")(x), mask)
            x = x + mlp(cfg.hidden, dtype, name=f"mlp{i}")(Norm(dtype, kind, name=f"mlp_norm{i}")(x))
        return Norm(dtype, kind, name="norm")(x)


def _is_null(cfg: ModelConfig, values) -> jax.Array:
    """Which captions are the learned null condition, bool (b,): those without any token of their own."""
    return ~values["mask"].any(axis=1) if cfg.encoded else values[:, 0] < 0


def text_mask(cfg: ModelConfig, values) -> jax.Array:
    """Which tokens of captions are there, bool (b, m); of the learned null condition all."""
    mask = jnp.asarray(values["mask"] if cfg.encoded else values > 0)
    return mask if cfg.null == "empty" else mask | _is_null(cfg, values)[:, None]


class Condition(NamedTuple):
    """Embedded condition: a vector (b, d) and tokens (b, m, d), each None if the model has none; which tokens are there, bool (b, m)."""

    vector: jax.Array | None
    tokens: jax.Array | None
    mask: jax.Array | None = None  # None: all
    angles: jax.Array | None = None  # (n, h/2) by which queries and keys of self-attention are rotated; None: not
    later: jax.Array | None = (
        None  # (b, d), the vector of later blocks and of the output, by the target time; None: the same
    )


class Field(NamedTuple):
    """A field of `cond`: a row of FIELDS. The row of the same name in `flops.FIELDS` decides which models have the field.

    embed(cfg, name)   module that maps values (b, ...) to vectors (b, d) or tokens (b, m, d); its parameters are named `name`; None: the
                       values add to the patches, see `add_low`
    example(cfg)       (shape of one value, dtype), or a tree of them
    null(cfg, values)  null values, in the shape of `values`
    draw(cfg, rule, keys, indices, wanted)   values (b, ...) for samples: `wanted` in turn if given, else by the rule `sample.labels`
    """

    embed: Callable | None
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


def draw_text(cfg: ModelConfig, rule: str, keys: jax.Array, indices: jax.Array, wanted: tuple = ()):
    """The null condition: captions are given to a sampler image by image."""
    return null_text(
        cfg, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), _rows_of(cfg, "text", len(indices)))
    )


EMPTY = {"clip": 2, "t5": 1, "bert": 2}  # tokens of the empty caption: its start and end


def text_example(cfg: ModelConfig):
    """Shape and dtype of a caption: ids of bytes (m,); or states (m, w), which tokens are there (m,), and the empty caption's states."""
    if not cfg.encoded:
        return ((cfg.text_length,), jnp.int32)
    empty = {"empty": ((EMPTY[cfg.text], cfg.state_width), jnp.dtype(cfg.dtype))} if cfg.null == "empty" else {}
    states = ((cfg.text_length, cfg.state_width), jnp.dtype(cfg.dtype))
    return {"states": states, "mask": ((cfg.text_length,), jnp.bool_), **empty}


def null_text(cfg: ModelConfig, values):
    """The null condition in the shape of captions: the empty caption, or what stands for the learned one."""
    if not cfg.encoded:
        return jnp.zeros_like(values) if cfg.null == "empty" else jnp.full_like(values, -1)
    if cfg.null == "learned":
        return jax.tree.map(jnp.zeros_like, values)
    (b, m, _), empty = values["states"].shape, values["empty"]
    there = jnp.broadcast_to(jnp.arange(m)[None] < empty.shape[1], (b, m))
    return {"states": jnp.pad(empty, ((0, 0), (0, m - empty.shape[1]), (0, 0))), "mask": there, "empty": empty}


FIELDS = {
    "label": Field(
        embed=lambda cfg, name: LabelEmbedding(cfg.classes, cfg.width, jnp.dtype(cfg.dtype), name=name),
        example=lambda cfg: ((), jnp.int32),
        null=lambda cfg, values: jnp.full_like(values, cfg.classes),
        draw=draw_labels,
    ),
    "text": Field(  # of bytes tokens from 1, then zeros: the empty caption is all zeros, the learned null condition all -1
        embed=lambda cfg, name: TextEmbedding(cfg, name=name),
        example=text_example,
        null=null_text,
        draw=draw_text,
    ),
    "low": Field(  # images in [-1, 1], given to a sampler image by image
        embed=None,
        example=lambda cfg: ((*[cfg.input_size // cfg.superres] * 2, cfg.channels), jnp.float32),
        null=lambda cfg, values: values,
        draw=lambda cfg, rule, keys, indices, wanted: jnp.zeros(_rows_of(cfg, "low", len(indices)).shape),
    ),
}


def fields(cfg: ModelConfig) -> dict[str, Field]:
    """The rows of FIELDS that a model has."""
    return {name: FIELDS[name] for name in flops.fields(cfg)}


def as_cond(cond) -> Mapping:
    """Returns a mapping unchanged, and bare labels (b,) as {"label": labels}."""
    return cond if isinstance(cond, Mapping) else {"label": cond}


def example(cfg: ModelConfig, rows: int) -> dict:
    """Shapes and dtypes of `cond` for a batch of `rows` images."""
    return {name: _rows_of(cfg, name, rows) for name in fields(cfg)}


def _rows_of(cfg: ModelConfig, name: str, rows: int):
    """Shapes and dtypes of `rows` values of a field."""
    return jax.tree.map(
        lambda kind: jax.ShapeDtypeStruct((rows, *kind[0]), kind[1]),
        FIELDS[name].example(cfg),
        is_leaf=lambda found: isinstance(found, tuple),
    )


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

    return {name: jax.tree.map(choose, empty, cond[name]) for name, empty in null(cfg, cond).items()}


def draw(cfg: ModelConfig, rule: str, keys: jax.Array, indices: jax.Array, wanted: Mapping) -> dict:
    """Draws `cond` for samples `indices` (b,); image i depends on `keys[i]` and i only. `wanted`: field -> values taken in turn."""
    found = fields(cfg).items()
    return {name: field.draw(cfg, rule, keys, indices, tuple(wanted.get(name, ()))) for name, field in found}


def labels(cond: Mapping, rows: int) -> jax.Array:
    """Class labels int32 (rows,) in `cond`, as stored beside images; zeros if the model has no labels."""
    return cond.get("label", jnp.zeros(rows, jnp.int32))


def aim(cond: Mapping, target: jax.Array) -> dict:
    """Adds the time (b,), 0 to 1000, that a flow map goes to; without it a model has the velocity, as if it were t."""
    return {**as_cond(cond), "target": target}


def embed(cfg: ModelConfig, t: jax.Array, cond: Mapping) -> Condition:
    """Embeddings of t (b,) and of each field: with adaLN a vector, the sum of all, a caption's by its mean; else tokens, a row of all.

    With `adaln_cross` and `dual_stream` the tokens are the caption's. A target time has an embedding of its own, zero at first, or is
    embedded as t for the later blocks.

    Call it inside a flax module, which gets the parameters `time_embedding` and `NAME_embedding`. Raises UsageError if a field is missing.
    """
    wanted, target = fields(cfg), cond.get("target", t)
    t, target = (t, target) if cfg.time_scale == 1 else (cfg.time_scale * t, cfg.time_scale * target)
    if missing := [name for name in wanted if name not in cond]:
        raise UsageError(
            f"cond: found {', '.join(cond) or 'no field'}, expected {', '.join(missing)}, as the model has"
        )
    time = functools.partial(TimeEmbedding, cfg.width, flops.TIME_FREQUENCIES, jnp.dtype(cfg.dtype))
    of_t = time(name="time_embedding")
    found = [
        of_t(t),
        *(field.embed(cfg, f"{name}_embedding")(cond[name]) for name, field in wanted.items() if field.embed),
    ]
    vectors = [array for array in found if array.ndim == 2]
    if cfg.target == "all":
        vectors.append(time(nn.initializers.zeros_init(), name="target_embedding")(target))
    text, mask = (found[-1], text_mask(cfg, cond["text"])) if "text" in wanted else (None, None)
    if not cfg.adaptive:
        rows = jnp.stack(vectors, axis=1)
        if text is None:
            return Condition(None, rows)
        there = jnp.ones(rows.shape[:2], bool)
        return Condition(None, jnp.concatenate([rows, text], axis=1), jnp.concatenate([there, mask], axis=1))
    if text is not None:
        count = jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
        vectors.append(jnp.where(mask[..., None], text, 0).sum(axis=1) / count.astype(text.dtype))
        mask = jnp.asarray(mask).at[:, 0].set(True)  # a first token that is always there: attention needs one
    later = sum(vectors[1:], of_t(target)) if cfg.target == "later" else None
    return Condition(sum(vectors[1:], vectors[0]), text, mask, later=later)


def add_low(cfg: ModelConfig, h: jax.Array, cond: Mapping, shape: tuple) -> jax.Array:
    """Adds to tokens h (b, n, d) the low-resolution images, enlarged by cubic interpolation to `shape` (b, h, w, c), by a Linear of their
    patches, zero at first; a model without gets h back.

    This is the patch embedding of images with these as further channels (Saharia et al. 2021, arXiv 2104.07636, SR3, section 2.3). Call
    it inside a flax module, which gets the parameters `low_embedding`.
    """
    if not cfg.superres:
        return h
    patches = patchify(jax.image.resize(cond["low"], shape, "cubic"), cfg.patch)
    linear = nn.Dense(cfg.width, use_bias=False, kernel_init=zeros, dtype=jnp.dtype(cfg.dtype), name="low_embedding")
    return h + linear(patches)


def by_block(cfg: ModelConfig, c: Condition) -> Condition:
    """The condition of each block, whose vectors (l, b, d) are by t in the earlier blocks and by the target time in the later ones."""
    earlier = (jnp.arange(cfg.depth) < cfg.earlier)[:, None, None]
    return c._replace(vector=jnp.where(earlier, c.vector[None], c.later[None]), later=None)
