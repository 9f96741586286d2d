"""What a DiT is conditioned on: timesteps, fixed 2-D positions and `cond` (Peebles & Xie 2023, section 3.2).

`cond` is a dict of arrays with a leading axis b, one array for each field in FIELDS that the model has: class labels now, {} for a
model without classes. Only this file and the data that fill it know the fields; everything between passes `cond` on as a pytree.
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
    """Sinusoids of timesteps in the published models' units, 0 to 1000: t (b,) -> (b, size), cosines then sines, float32."""
    half = size // 2
    frequencies = jnp.exp(-np.log(MAX_PERIOD) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def positions(side: int, width: int) -> np.ndarray:
    """Fixed sin-cos table of a side x side grid: (n, d) float32. The first half of d encodes the column, the second the row."""
    quarter = width // 4
    frequencies = MAX_PERIOD ** -(np.arange(quarter, dtype=np.float64) / quarter)

    def encode(index):
        angles = index[:, None] * frequencies[None]
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    row, column = np.divmod(np.arange(side * side), side)
    return np.concatenate([encode(column), encode(row)], axis=1).astype(np.float32)


class TimeEmbedding(nn.Module):
    """t (b,) -> (b, d): a 256-d sinusoid, then Linear, SiLU, Linear."""

    width: int
    frequencies: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, t):
        h = timestep_features(t, self.frequencies).astype(self.dtype)
        h = nn.Dense(self.width, kernel_init=small_normal, dtype=self.dtype, name="fc1")(h)
        return nn.Dense(self.width, kernel_init=small_normal, dtype=self.dtype, name="fc2")(nn.silu(h))


class LabelEmbedding(nn.Module):
    """Labels (b,) -> (b, d), from a table of K + 1 rows; the last row stands for "no class"."""

    classes: int
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, labels):
        table = nn.Embed(self.classes + 1, self.width, embedding_init=small_normal, dtype=self.dtype, name="table")
        return table(labels)


class Field(NamedTuple):
    """A field of `cond`: one row of FIELDS, and one of `flops.FIELDS` under the same name, which says which models have it.

    embed(cfg, name)   module that maps values (b, ...) to vectors (b, d); its parameters are named `name`
    example(cfg)       shape of one value, and dtype
    null(cfg, values)  the values of "no condition", like `values`
    draw(cfg, rule, keys, indices, wanted)   values (b, ...) for samples: `wanted` in turn if given, else by `rule` of SampleConfig.labels
    """

    embed: Callable
    example: Callable
    null: Callable
    draw: Callable


LABEL_DRAW = 2**31 - 1  # the draw that gives image i its label; the sampler's draws count from 0


def draw_labels(cfg: ModelConfig, rule: str, keys: jax.Array, indices: jax.Array, wanted: tuple = ()) -> jax.Array:
    """Labels int32 (b,): `wanted` in turn if given; else class i modulo K (balanced), or uniformly random by image i's key."""
    if wanted:
        return jnp.asarray(wanted, jnp.int32)[indices % len(wanted)]
    if rule == "balanced":
        return (indices % cfg.classes).astype(jnp.int32)
    return jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, LABEL_DRAW), (), 0, cfg.classes))(keys)


FIELDS = {
    "label": Field(
        embed=lambda cfg, name: LabelEmbedding(cfg.classes, cfg.width, jnp.dtype(cfg.dtype), name=name),
        example=lambda cfg: ((), jnp.int32),
        null=lambda cfg, values: jnp.full_like(values, cfg.classes),
        draw=draw_labels,
    ),
}


def fields(cfg: ModelConfig) -> dict[str, Field]:
    """The rows of FIELDS that a model has."""
    return {name: FIELDS[name] for name in flops.fields(cfg)}


def as_cond(cond) -> Mapping:
    """`cond` itself; bare labels (b,) as {"label": labels}."""
    return cond if isinstance(cond, Mapping) else {"label": cond}


def example(cfg: ModelConfig, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of `cond` for a batch of `rows` images."""
    kinds = {name: field.example(cfg) for name, field in fields(cfg).items()}
    return {name: jax.ShapeDtypeStruct((rows, *shape), dtype) for name, (shape, dtype) in kinds.items()}


def null(cfg: ModelConfig, cond: Mapping) -> dict:
    """The `cond` of "no condition", of the same shapes."""
    return {name: field.null(cfg, cond[name]) for name, field in fields(cfg).items()}


def drop(cfg: ModelConfig, key: jax.Array, cond: Mapping, rate: float) -> dict:
    """`cond` with all fields of an image set to "no condition" with probability `rate`, image by image."""
    if not cond:
        return {}
    dropped = jax.random.bernoulli(key, rate, jax.tree.leaves(cond)[0].shape[:1])
    empty = null(cfg, cond)

    def choose(nothing, values):
        return jnp.where(dropped.reshape(-1, *[1] * (values.ndim - 1)), nothing, values)

    return {name: choose(empty[name], cond[name]) for name in empty}


def draw(cfg: ModelConfig, rule: str, keys: jax.Array, indices: jax.Array, wanted: Mapping) -> dict:
    """The `cond` of samples `indices` (b,), image i's from `keys[i]` and i alone. `wanted`: values of a field, taken in turn."""
    return {
        name: field.draw(cfg, rule, keys, indices, tuple(wanted.get(name, ()))) for name, field in fields(cfg).items()
    }


def labels(cond: Mapping, rows: int) -> jax.Array:
    """Class labels int32 (rows,) of a `cond`, as files of images store them; zeros where there are none."""
    return cond.get("label", jnp.zeros(rows, jnp.int32))


def embed(cfg: ModelConfig, t: jax.Array, cond: Mapping) -> tuple[jax.Array | None, jax.Array | None]:
    """(vector (b, d), None) with adaLN, else (None, tokens (b, m, d)): the embeddings of t (b,) and of each field, summed or in turn.

    To be called inside a module: its parameters are `time_embedding` and `NAME_embedding`. Raises UsageError for a missing field.
    """
    wanted = fields(cfg)
    if missing := [name for name in wanted if name not in cond]:
        raise UsageError(
            f"cond: found {', '.join(cond) or 'no field'}, expected {', '.join(missing)}, as the model has"
        )
    found = [TimeEmbedding(cfg.width, flops.TIME_FREQUENCIES, jnp.dtype(cfg.dtype), name="time_embedding")(t)]
    found += [field.embed(cfg, f"{name}_embedding")(cond[name]) for name, field in wanted.items()]
    if cfg.adaptive:
        return sum(found[1:], found[0]), None
    return None, jnp.stack(found, axis=1)
