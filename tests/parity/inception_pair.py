"""The same random weights in our Inception and in torch-fidelity's, and real photographs for both."""

import functools

import jax
import numpy as np
from foreign import write_inception
from sklearn.datasets import load_digits, load_sample_images

from dit_jax.models import inception
from dit_jax.networks import inception as foreign
from dit_jax.networks.tensors import Tensors
from dit_jax.networks.weights import read_arrays


def random_weights(seed=0):
    """A state dict of the published names, nothing in it at a value that changes nothing; activations stay near 1."""
    rng = np.random.default_rng(seed)

    def drawn(path, leaf):
        name = path[-1].key
        if name == "kernel":
            return (rng.standard_normal(leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))).astype(np.float32)
        if name in ("scale", "var"):
            return rng.uniform(0.7, 1.4, leaf.shape).astype(np.float32)
        return 0.2 * rng.standard_normal(leaf.shape).astype(np.float32)

    return write_inception(jax.tree_util.tree_map_with_path(drawn, inception.shapes()))


def save(torch, path):
    """The random weights as torch.save writes the published file, counters of batches included."""
    state = random_weights()
    counters = {name.replace("running_var", "num_batches_tracked"): 0 for name in state if name.endswith("running_var")}
    torch.save({name: torch.tensor(value) for name, value in (state | counters).items()}, path)
    return path


def ours(path):
    return foreign.read(Tensors(read_arrays(path), str(path)))


def theirs(torch_fidelity, path):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    names = ["2048", "logits_unbiased", "logits"]
    return FeatureExtractorInceptionV3("inception", names, feature_extractor_weights_path=str(path))


@functools.cache
def photographs():
    return load_sample_images().images


def crops(image, n, h, w, seed=0):
    """uint8 (n, h, w, 3): places drawn at random."""
    rng = np.random.default_rng(seed)
    places = zip(
        rng.integers(image.shape[0] - h + 1, size=n), rng.integers(image.shape[1] - w + 1, size=n), strict=True
    )
    return np.stack([image[y : y + h, x : x + w] for y, x in places])


def digits(n):
    """uint8 (n, 8, 8, 3)."""
    gray = (load_digits().images[:n] * (255 / 16)).astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=3)
