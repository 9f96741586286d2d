"""From the latents that a model draws to images: a converted autoencoder, compiled for the mesh."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from dit_jax.config import AutoencoderConfig, Config, UsageError
from dit_jax.mesh import batch_sharding, replicated
from dit_jax.models import vae
from dit_jax.networks import load_network

AT_ONCE = 4  # images that a device decodes at a time: at 512 px each takes 134 MB in every one of the widest layers


@dataclass(frozen=True)
class Autoencoder:
    """A network with its weights, how a model's latents are normalised, and the checksum of the weights."""

    cfg: vae.VAEConfig
    params: dict
    normalisation: vae.Normalisation
    sha256: str
    source: dict

    def describe(self) -> dict:
        """Which network and normalisation, for records; the file that it was converted from tells ft-ema from ft-mse."""
        return {"sha256": self.sha256, "source": self.source, "latents": self.normalisation.describe()}


def normalisation(cfg: AutoencoderConfig) -> vae.Normalisation:
    """One number for all channels, or one per channel."""
    shift, scale = (value[0] if len(value) == 1 else tuple(value) for value in (cfg.shift, cfg.scale))
    return vae.Normalisation(shift, scale)


def open_autoencoder(cfg: Config) -> Autoencoder | None:
    """The autoencoder of a model of latents; None for a model of pixels. Raises UsageError when it does not fit the model."""
    folder, model = cfg.autoencoder.folder, cfg.model
    if not folder:
        if cfg.data.latents or model.input_size != cfg.data.image_size:
            raise UsageError(
                f"autoencoder.folder: found none for a model of latents of {model.input_size} x {model.input_size}, expected a "
                "folder that `python -m dit_jax.convert --source=sd-vae` wrote"
            )
        return None
    found, params, meta = load_network(folder, "sd-vae")
    network = vae.VAEConfig(**{key: tuple(value) if isinstance(value, list) else value for key, value in found.items()})
    shape, wanted = (cfg.data.image_size // network.factor, network.latent_channels), (model.input_size, model.channels)
    if shape != wanted or cfg.data.image_size % network.factor:
        raise UsageError(
            f"autoencoder.folder: {folder!r} makes latents of side {shape[0]} with {shape[1]} channels from images of "
            f"{cfg.data.image_size} pixels, but the model's have side {wanted[0]} and {wanted[1]} channels"
        )
    return Autoencoder(network, params, normalisation(cfg.autoencoder), meta["sha256"], meta["source"])


def image_shape(cfg: Config, autoencoder: Autoencoder | None) -> tuple[int, int, int]:
    """(h, w, c) of an image that is drawn."""
    if autoencoder is None:
        return (cfg.model.input_size, cfg.model.input_size, cfg.model.channels)
    return (cfg.data.image_size, cfg.data.image_size, autoencoder.cfg.channels)


def make_decoder(autoencoder: Autoencoder | None, mesh) -> Callable[[np.ndarray], np.ndarray]:
    """What a model drew (b, h, w, c) -> images (b, H, W, C) near [-1, 1], both on the host: latents are small.

    A device always decodes AT_ONCE images at a time, so that an image is the same for every batch and number of devices.
    """
    if autoencoder is None:
        return lambda latents: latents
    program = _compiled(autoencoder.cfg, autoencoder.normalisation, mesh)
    params = jax.device_put(autoencoder.params, replicated(mesh))
    rows = AT_ONCE * mesh.shape["data"] * mesh.shape["fsdp"]

    def decode(latents: np.ndarray) -> np.ndarray:
        filled = np.concatenate([latents, np.repeat(latents[-1:], -len(latents) % rows, axis=0)])
        parts = [jax.device_get(program(params, filled[i : i + rows])) for i in range(0, len(filled), rows)]
        return np.concatenate(parts)[: len(latents)]

    return decode


@functools.lru_cache(maxsize=4)
def _compiled(cfg: vae.VAEConfig, by: vae.Normalisation, mesh) -> Callable:
    whole, rows = replicated(mesh), batch_sharding(mesh)
    return jax.jit(
        lambda params, latents: vae.decode(cfg, params, vae.denormalise(by, latents)),
        in_shardings=(whole, rows),
        out_shardings=rows,
    )
