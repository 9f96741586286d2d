"""Trains the feature network of a data set (`models.classifier`) on its training split, and measures it on the held-out one."""

import dataclasses
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dit_jax.config import DataConfig
from dit_jax.data import pipeline, source
from dit_jax.devices.numerics import random_key
from dit_jax.error import NotFiniteError, UsageError
from dit_jax.log import say
from dit_jax.models import classifier
from dit_jax.networks.folder import save_network

BATCH = 128
LEARNING_RATE = 3e-3
NOISE = 0.15  # largest standard deviation of the noise added in training, in units of the pixel range [-1, 1]
SHIFT = 8  # images are shifted by up to one part of so many of their side
LOOK = 500  # steps between two lines
ROWS = 512  # images measured at a time


def augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Shifts images (b, h, w, c) by up to h / SHIFT pixels in x and y, filling with black, and adds Gaussian noise."""
    shift_key, level_key, noise_key = jax.random.split(key, 3)
    most = max(1, images.shape[1] // SHIFT)
    padded = jnp.pad(images, ((0, 0), (most, most), (most, most), (0, 0)), constant_values=-1.0)
    corners = jax.random.randint(shift_key, (images.shape[0], 2), 0, 2 * most + 1)
    crop = jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:]))
    level = NOISE * jax.random.uniform(level_key, (images.shape[0], 1, 1, 1))
    return crop(padded, corners) + level * jax.random.normal(noise_key, images.shape)


def fit(data: DataConfig, split: source.Source, steps: int, seed: int) -> dict:
    """Trains by AdamW for `steps`, cosine to zero, on cross-entropy with label smoothing 0.1; returns the parameters."""
    init_key, draw_key = jax.random.split(random_key(seed))
    params = classifier.init(init_key, split.image_shape, split.classes)
    optimizer = optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, steps), weight_decay=0.05)

    def loss(params, key, images, labels):
        logits = classifier.apply(params, augment(key, images))[1]
        targets = optax.smooth_labels(jax.nn.one_hot(labels, split.classes), 0.1)
        return optax.softmax_cross_entropy(logits, targets).mean()

    @jax.jit
    def step(params, state, k, images, labels):
        value, grads = jax.value_and_grad(loss)(params, jax.random.fold_in(draw_key, k), images, labels)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    batches = pipeline.make_batches(data, batch_size=BATCH, seed=seed, source=split)
    for k in range(steps):
        batch = next(batches)
        params, state, value = step(params, state, k, batch["image"], batch["cond"]["label"])
        if (k + 1) % LOOK == 0:
            say(f"step {k + 1} of {steps}: loss {float(value):.4f}")
    if not np.isfinite(float(value)):
        raise NotFiniteError(f"step {steps}: the loss is {float(value)}; nothing is written")
    return params


def accuracy(params: dict, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images (n, h, w, c) whose largest logit is at the label (n,)."""
    apply = jax.jit(lambda x: jnp.argmax(classifier.apply(params, x)[1], axis=1))
    found = [np.asarray(apply(images[i : i + ROWS])) for i in range(0, len(images), ROWS)]
    return float(np.mean(np.concatenate(found) == labels))


def run(data: DataConfig, out: str, steps: int, seed: int) -> dict:
    """Trains the network and writes its folder `out`, which must be new or empty; returns the folder's meta. Raises UsageError."""
    data = dataclasses.replace(data, buckets=())  # squares, as the metrics are of
    split, held_out = (source.open_source(data, name) for name in (data.split, data.held_out_split))
    source.introduce(split, held_out)
    if not split.classes or held_out.classes != split.classes:
        found = f"found {split.classes} and {held_out.classes} classes"
        raise UsageError(f"{split.key}: {found}, expected labels in both splits: the network learns to tell classes")
    if data.split == data.held_out_split or split.overlaps(held_out):
        raise UsageError(f"data.held_out_split: found {data.held_out_split!r}, which shares images with data.split")
    params = fit(data, split, steps, seed)
    images, cond = pipeline.load_arrays(data, data.held_out_split, held_out)
    found = {
        "dataset": data.name,
        "split": data.split,
        "steps": steps,
        "seed": seed,
        "accuracy": accuracy(params, images, cond["label"]),
        "held_out": held_out.describe(),
        "versions": {name: metadata.version(name) for name in ("jax", "flax", "optax", "numpy")},
    }
    config = {"image_shape": list(split.image_shape), "classes": split.classes}
    return save_network(out, "classifier", config, jax.device_get(params), found)
