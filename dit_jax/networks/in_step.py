"""Images that a frozen autoencoder encodes inside the training step (data.encode = "in_step"), as a `Source`.

The step samples each posterior with noise from (seed, global position), as `data.posterior` does for stored latents: both roads give
the same latents, but for roundings and the dtype in which latents are stored.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from dit_jax.config import Config
from dit_jax.data.counter import normals
from dit_jax.data.source import Source, open_source
from dit_jax.devices.mesh import local_mesh
from dit_jax.error import UsageError
from dit_jax.models import vae
from dit_jax.networks.autoencoder import (
    Autoencoder,
    StepEncoder,
    find_network,
    images_at_once,
    make_encoder,
    make_step_encoder,
    open_autoencoder,
    own_normalisation,
    put_encoder,
)


@dataclass(frozen=True)
class EncodedImages:
    """The `Source` for images of one split, and their autoencoder. Threads may share it."""

    images: Source
    autoencoder: Autoencoder
    folder: str  # of the autoencoder
    key = property(lambda self: self.images.key)
    classes = property(lambda self: self.images.classes)
    skips = property(lambda self: self.images.skips)
    class_names = property(lambda self: getattr(self.images, "class_names", ()))
    captions = property(lambda self: self.images.captions)

    def __getattr__(self, name: str):  # an order of its own that the images may have
        if name in ("make_order", "drawn", "scaled", "of_labels"):
            return getattr(self.images, name)
        raise AttributeError(name)

    @property
    def where(self) -> str:
        return f"{self.images.where}, encoded in the step by {self.folder}"

    @property
    def image_shape(self) -> tuple:
        """(h, w, c) of a latent, which is what a model sees."""
        return self._latent_shape(self.images.image_shape)

    @property
    def identity(self) -> dict:
        """The images, their encoder, and the normalisation of the latents, under the names that stored latents have."""
        by = self.autoencoder.normalisation.describe()
        return {**self.images.identity, "autoencoder_sha256": self.autoencoder.sha256, **by}

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, dict]:
        return self.images.read(indices)

    def training(self, arrays: np.ndarray, positions: np.ndarray, seed: int) -> dict:
        """Return what the step makes latents of: images (b, H, W, C), flipped as any, and noise (b, h, w, c), both float32."""
        pixels = self.images.training(arrays, positions, seed)
        shape = self._latent_shape(pixels.shape[1:])
        return {"pixels": pixels, "noise": normals(seed, positions, math.prod(shape)).reshape(-1, *shape)}

    def evaluation(self, arrays: np.ndarray) -> np.ndarray:
        """Return latents float32 (b, h, w, c) at the posterior's mean, encoded on this process's devices as `encode` does."""
        rows, encode = self._encoder
        images = self.images.evaluation(arrays)
        parts = [encode(images[i : i + rows]) for i in range(0, len(images), rows)]
        means = np.concatenate([np.asarray(part)[:, 0] for part in parts])[: len(images)]
        return np.asarray(vae.normalise(self.autoencoder.normalisation, jnp.asarray(means)))

    def overlaps(self, other: "EncodedImages") -> bool:
        return self.images.overlaps(other.images)

    def describe(self) -> dict:
        """Describe the images, then the latents: `sha256` is of the images."""
        found = self.images.describe() | {"image_shape": list(self.image_shape)}
        of = {"autoencoder": self.autoencoder.source["file"], "autoencoder_sha256": self.autoencoder.sha256}
        return {**found, **of, **self.autoencoder.normalisation.describe(), "latent_dtype": "float32"}

    def _latent_shape(self, image: tuple) -> tuple:
        network = self.autoencoder.cfg
        return (image[0] // network.factor, image[1] // network.factor, network.latent_channels)

    @functools.cached_property
    def _encoder(self) -> tuple[int, Callable]:
        mesh = local_mesh()
        return images_at_once(mesh), make_encoder(self.autoencoder, mesh)


def open_images(cfg: Config, network: vae.VAEConfig, split: str) -> Source:
    """Open a split of images. Raises UsageError if that fails, or the autoencoder expects another number of channels."""
    source, channels = open_source(cfg.data, split), network.channels
    if source.image_shape[-1] != channels:
        name = cfg.data.title
        found = f"found {name!r} with images of {source.image_shape[-1]} channels"
        expected = f"expected {channels}, as the autoencoder {cfg.autoencoder.folder!r} has"
        raise UsageError(f"{source.key}: {found}, {expected}")
    return source


def open_splits(cfg: Config, *splits: str) -> list[Source]:
    """Open splits of a config's data, stored or to be encoded. Raises UsageError, also if the autoencoder does not fit."""
    if cfg.data.encode == "precomputed":
        return [open_source(cfg.data, split) for split in splits]
    sources = [open_images(cfg, find_network(cfg), split) for split in splits]
    opened = open_autoencoder(cfg)
    opened = dataclasses.replace(opened, normalisation=own_normalisation(cfg.autoencoder, opened.cfg))
    return [EncodedImages(source, opened, cfg.autoencoder.folder) for source in sources]


def encoder_of(source: Source, mesh) -> StepEncoder:
    """Return what a step does with the batches of a source, with the encoder's weights on the mesh."""
    found = getattr(source, "autoencoder", None)
    if found is None:
        return StepEncoder()
    return make_step_encoder(found.cfg, found.normalisation, put_encoder(found, mesh), mesh)


def encoder_flops(cfg: Config) -> int:
    """Return the FLOPs of encoding one image in the step, which the model's do not include; 0 for other runs."""
    if cfg.data.encode == "precomputed":
        return 0
    return 2 * vae.encoder_macs(find_network(cfg), cfg.data.image_size, cfg.data.image_size)
