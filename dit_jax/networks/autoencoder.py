"""Images to latents and back: a converted autoencoder, compiled for the mesh.

The notes of a run's training latents set their normalisation, (z - shift) scale. Training copies it to the run's config
(`follow_latents`) for sampling without the latents; if the latents are present, sampling compares the two.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.config import AutoencoderConfig, Config
from dit_jax.data.latent_notes import NOTES, LatentInfo, read_info
from dit_jax.devices.mesh import batch_sharding, batch_split, replicated
from dit_jax.error import UsageError
from dit_jax.files import is_file
from dit_jax.models import vae
from dit_jax.networks.folder import load_network

AT_ONCE = 4  # images that a device encodes or decodes at a time; one of 512 px takes 134 MB in a widest layer


@dataclass(frozen=True)
class Autoencoder:
    """A network with its weights, their checksum, and the normalisation of a model's latents."""

    cfg: vae.VAEConfig
    params: dict
    normalisation: vae.Normalisation
    sha256: str
    source: dict

    def describe(self) -> dict:
        """Return checksums of the weights and their source file (not its name), and the normalisation."""
        of = {"sha256": self.sha256, "source_sha256": self.source["sha256"]}
        return of | {"latents": self.normalisation.describe(), "images_at_once": AT_ONCE}


def normalisation(cfg: AutoencoderConfig) -> vae.Normalisation:
    """Return the config's normalisation: one number for all channels, or one per channel."""
    shift, scale = (value[0] if len(value) == 1 else tuple(value) for value in (cfg.shift, cfg.scale))
    return vae.Normalisation(shift, scale)


def follow_latents(cfg: Config) -> Config:
    """Set `autoencoder.scale` and `shift` of a run on latents from their notes; other configs are returned as they are.

    Raises UsageError if the config sets other values than the notes, unless both are its defaults.
    """
    info = _notes_of(cfg)
    if info is None:
        return cfg
    default = AutoencoderConfig()
    if (cfg.autoencoder.scale, cfg.autoencoder.shift) != (default.scale, default.shift):
        _check_normalisation(cfg, info)
        return cfg
    taken = {name: _by_channel(getattr(info, name), 1) for name in ("scale", "shift")}
    return dataclasses.replace(cfg, autoencoder=dataclasses.replace(cfg.autoencoder, **taken))


def _notes_of(cfg: Config) -> LatentInfo | None:
    """Read the notes of the latents of `data.split`; None if the config names none, or they are not present."""
    data = cfg.data.parts[0]
    folder = os.path.join(data.latents, data.split)
    return read_info(folder) if data.latents and is_file(os.path.join(folder, NOTES)) else None


def _check_normalisation(cfg: Config, info: LatentInfo) -> None:
    """Raises UsageError unless the config and the notes normalise each channel alike."""
    for name in ("scale", "shift"):
        found, expected = getattr(cfg.autoencoder, name), getattr(info, name)
        if _by_channel(found, info.shape[-1]) != _by_channel(expected, info.shape[-1]):
            raise UsageError(
                f"autoencoder.{name}: found {found}, expected {expected}, that of the latents in {cfg.data.parts[0].latents!r} "
                "(data.latents), which a model learns in this normalisation"
            )


def _by_channel(value: float | tuple, channels: int) -> tuple:
    values = value if isinstance(value, tuple) else (value,)
    return values * channels if len(values) == 1 else values


def open_autoencoder(cfg: Config) -> Autoencoder | None:
    """Load the autoencoder of a model of latents; None for a model of pixels.

    Raises UsageError if it does not fit the model, or if `data.latents` are present and normalised otherwise.
    """
    folder, model = cfg.autoencoder.folder, cfg.model
    if not folder:
        if cfg.data.parts[0].latents or model.input_size != cfg.data.image_size:
            raise UsageError(
                f"autoencoder.folder: found none for a model of latents of {model.input_size} x {model.input_size}, expected a "
                "folder that `python -m dit_jax.convert --source=sd-vae` wrote"
            )
        return None
    found, params, meta = load_network(folder, "sd-vae")
    network = vae.VAEConfig(**{key: tuple(value) if isinstance(value, list) else value for key, value in found.items()})
    if cfg.data.image_size % network.factor:
        raise UsageError(
            f"data.image_size: found {cfg.data.image_size}, expected a multiple of {network.factor}, the pixels that "
            f"{folder!r} makes one latent of"
        )
    shape, wanted = (cfg.data.image_size // network.factor, network.latent_channels), (model.input_size, model.channels)
    if shape != wanted:
        raise UsageError(
            f"autoencoder.folder: {folder!r} makes latents of side {shape[0]} with {shape[1]} channels from images of "
            f"{cfg.data.image_size} pixels, but the model's have side {wanted[0]} and {wanted[1]} channels"
        )
    if (info := _notes_of(cfg)) is not None:
        _check_normalisation(cfg, info)
    return Autoencoder(network, params, normalisation(cfg.autoencoder), meta["sha256"], meta["source"])


def images_at_once(mesh) -> int:
    """Return the number of images that the whole mesh encodes or decodes at a time."""
    return AT_ONCE * batch_split(mesh)


def make_encoder(autoencoder: Autoencoder, mesh) -> Callable[[np.ndarray], jax.Array]:
    """Return a function: images (b, H, W, C) in [-1, 1] -> mean and log variance (rows, 2, h, w, c), not normalised.

    b is at most rows = `images_at_once`; rows from b on are padding. The call is asynchronous. A device always encodes
    AT_ONCE images at a time, so that a latent does not depend on the number of devices.
    """
    program = _encoder(autoencoder.cfg, mesh)
    params = jax.device_put({"encoder": autoencoder.params["encoder"]}, replicated(mesh))
    rows = images_at_once(mesh)

    def encode(images: np.ndarray) -> jax.Array:
        filled = np.concatenate([images, np.repeat(images[-1:], rows - len(images), axis=0)])
        return program(params, filled)

    return encode


def make_decoder(autoencoder: Autoencoder | None, mesh) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function: a model's samples (b, h, w, c) -> images (b, H, W, C) near [-1, 1], both on the host.

    A device always decodes AT_ONCE images at a time, so that an image does not depend on batch size or number of devices.
    """
    if autoencoder is None:
        return lambda latents: latents
    program = _decoder(autoencoder.cfg, autoencoder.normalisation, mesh)
    params = jax.device_put(autoencoder.params, replicated(mesh))
    rows = images_at_once(mesh)

    def decode(latents: np.ndarray) -> np.ndarray:
        filled = np.concatenate([latents, np.repeat(latents[-1:], -len(latents) % rows, axis=0)])
        parts = [jax.device_get(program(params, filled[i : i + rows])) for i in range(0, len(filled), rows)]
        return np.concatenate(parts)[: len(latents)]

    return decode


@functools.lru_cache(maxsize=4)
def _encoder(cfg: vae.VAEConfig, mesh) -> Callable:
    whole, rows = replicated(mesh), batch_sharding(mesh)
    return jax.jit(
        lambda params, images: jnp.stack(vae.encode(cfg, params, images), axis=1),
        in_shardings=(whole, rows),
        out_shardings=rows,
    )


@functools.lru_cache(maxsize=4)
def _decoder(cfg: vae.VAEConfig, by: vae.Normalisation, mesh) -> Callable:
    whole, rows = replicated(mesh), batch_sharding(mesh)
    return jax.jit(
        lambda params, latents: vae.decode(cfg, params, vae.denormalise(by, latents)),
        in_shardings=(whole, rows),
        out_shardings=rows,
    )
