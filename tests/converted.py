"""A tiny DiT as published files hold it, for tests of `convert`."""

import functools

import jax
import numpy as np
from job import run

from dit_jax.config import ModelConfig
from dit_jax.models import dit
from dit_jax.networks import diffusers_dit
from dit_jax.networks import dit as published
from dit_jax.networks.tensors import Tensors

TINY = ModelConfig(depth=2, width=16, heads=2, patch=2, input_size=8, channels=3, classes=5)


@functools.cache
def shapes_of(cfg):
    return jax.eval_shape(lambda: dit.init(cfg, jax.random.key(0)))


def random_params(cfg=TINY, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32) / 8, shapes_of(cfg))


def read_dit(arrays, heads=2):
    return published.read(Tensors(arrays, "F"), heads)


def read_diffusers(arrays, config):
    return diffusers_dit.read(Tensors(arrays, "F"), config)


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def convert(cache_dir, *arguments):
    return run("convert", *arguments, cache_dir=cache_dir)
