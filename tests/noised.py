"""Weights of a model in which nothing is zero, for tests of what its blocks compute."""

import functools

import jax

from dit_jax.models import dit


@functools.cache
def weights(model):
    """Initial weights and noise, so that no gate and no output is zero."""

    def draw():
        params, keys = dit.init(model, jax.random.key(0)), iter(jax.random.split(jax.random.key(1), 200))
        return jax.tree.map(lambda w: w + 0.1 * jax.random.normal(next(keys), w.shape), params)

    return jax.jit(draw)()
