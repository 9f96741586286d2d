"""The digits as tests read, compare and damage them."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from dit_jax.config import DataConfig
from dit_jax.data import pipeline
from dit_jax.data.source import open_source
from dit_jax.error import UsageError

TRAIN, TEST = 1442, 355


def built_in(folder):
    """A config whose digits are built, with flips."""
    config = DataConfig(data_dir=str(folder), flip=True)
    open_source(config, "train")
    return config


def copy_of(data, tmp_path):
    """A copy of the data to damage: (config, path of the train file)."""
    shutil.copytree(data.data_dir, tmp_path / "tfds")
    config = dataclasses.replace(data, data_dir=str(tmp_path / "tfds"))
    return config, tmp_path / "tfds/digits/1.0.0/digits-train.array_record-00000-of-00001"


def batches(data, count, batch_size=48, seed=3, **kwargs):
    iterator = pipeline.make_batches(data, batch_size=batch_size, seed=seed, **kwargs)
    taken = [next(iterator) for _ in range(count)]
    iterator.close()
    return taken


def assert_same(a, b):
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        jax.tree.map(np.testing.assert_array_equal, left, right)


def error_of(function, *args, **kwargs):
    with pytest.raises(UsageError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message
