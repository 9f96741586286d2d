"""What a DiT is conditioned on: timesteps, class labels and fixed 2-D positions (Peebles & Xie 2023, section 3.2)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

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
        return nn.Embed(self.classes + 1, self.width, embedding_init=small_normal, dtype=self.dtype, name="table")(
            labels
        )
