"""Feature network of `fd_digits`: a small convolutional classifier of 8 x 8 digits, trained by benchmarks/train_digit_features.py.

The package ships its weights with their held-out accuracy and their checksum, which identifies the network in a score's protocol.
"""

import hashlib
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from safetensors.numpy import load as load_tensors

from dit_jax.error import UsageError

NAME = "digit_features"
WIDTH = 64  # numbers in a feature


class Network(nn.Module):
    """Classifier that returns its last hidden layer and its logits."""

    @nn.compact
    def __call__(self, images):
        h = nn.gelu(nn.Conv(16, (3, 3))(images))
        h = nn.gelu(nn.Conv(24, (3, 3), strides=2)(h))
        h = nn.gelu(nn.Conv(32, (3, 3), strides=2)(h))
        features = nn.gelu(nn.Dense(WIDTH)(h.reshape(h.shape[0], -1)))
        return features, nn.Dense(10)(features)


def apply(params: dict, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Features (b, 64), the last hidden layer, and class logits (b, 10) of images (b, 8, 8, 1), float32 in [-1, 1]."""
    return Network().apply({"params": params}, images)


def load(folder: Path = Path(__file__).parent) -> tuple[dict, dict]:
    """Loads the shipped (params, meta); meta holds `sha256` of the weights, `accuracy`, `held_out`, `command`, `versions`.

    Raises UsageError if a file is missing or unreadable, or if the weights' checksum is not the one in meta.
    """
    weights, notes = Path(folder) / f"{NAME}.safetensors", Path(folder) / f"{NAME}.json"
    try:
        packed, meta = weights.read_bytes(), json.loads(notes.read_text())
        expected = meta["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"feature network: cannot read {weights} and {notes.name}: {error!r}; reinstall") from error
    found = hashlib.sha256(packed).hexdigest()
    if found != expected:
        raise UsageError(
            f"feature network: {weights} has sha256 {found}, expected {expected} of {notes.name}; reinstall"
        )
    flat = {name: jnp.asarray(value) for name, value in load_tensors(packed).items()}
    return traverse_util.unflatten_dict(flat, sep="/"), meta
