"""A small convolutional classifier of images, whose last hidden layer gives the features of sample metrics without Inception.

`python -m dit_jax.features` trains one on any data set with labels; that of `fd_digits` is shipped in networks/digits.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

WIDTH = 64  # numbers in a feature
SIDE = 2  # pixels of the last layer's maps, at most


class Network(nn.Module):
    """Classifier that returns its last hidden layer and its logits; each of the `halvings` halves the side."""

    classes: int
    halvings: int

    @nn.compact
    def __call__(self, images):
        h = nn.gelu(nn.Conv(16, (3, 3))(images))
        for i in range(self.halvings):
            h = nn.gelu(nn.Conv(24 + 8 * i, (3, 3), strides=2)(h))
        features = nn.gelu(nn.Dense(WIDTH)(h.reshape(h.shape[0], -1)))
        return features, nn.Dense(self.classes)(features)


def init(key: jax.Array, shape: tuple[int, int, int], classes: int) -> dict:
    """Initial parameters, float32, for images of `shape` (h, w, c)."""
    halvings = next(k for k in range(20) if max(shape[:2]) <= SIDE * 2**k)
    return jax.jit(Network(classes, halvings).init)(key, jnp.zeros((1, *shape)))["params"]


def apply(params: dict, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Features (b, 64), the last hidden layer, and class logits (b, classes) of images (b, h, w, c), float32 in [-1, 1]."""
    network = Network(params["Dense_1"]["kernel"].shape[1], sum(name.startswith("Conv") for name in params) - 1)
    return network.apply({"params": params}, images)
