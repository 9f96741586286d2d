"""The metrics of samples: feature networks, the reference they are compared with, and the numbers from their features.

A network makes one row of float32 of an image: its pooled features, where it has them spatial features, and its logits. A
score is named after its network: FID, sFID, KID and IS are those of the Inception network only, the others say which.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.config import Config, UsageError
from dit_jax.data.pipeline import load_arrays
from dit_jax.data.source import describe
from dit_jax.foreign.reference import read_reference
from dit_jax.heldout import all_of
from dit_jax.mesh import batch_sharding, replicated
from dit_jax.models import digit_features, inception
from dit_jax.networks import load_network

ROWS = 16  # images that a device looks at at a time: another number would round otherwise
BLOCK = 1024  # rows that enter the statistics at a time, whatever the parts were that they came in
NAMES = {
    "inception": {"distance": "fid", "spatial": "sfid", "kernel": "kid", "score": "is", "precision": "precision", "recall": "recall"},
    "digits": {
        "distance": "fd_digits", "kernel": "kd_digits", "score": "is_digits", "precision": "precision_digits", "recall": "recall_digits",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Network:
    """A feature network on the mesh. `parts`: the name and width of what makes up a row."""

    name: str
    sha256: str
    parts: dict
    rows: Callable = field(repr=False)  # uint8 (b, h, w, c) -> float32 (b, width)

    @property
    def width(self) -> int:
        return sum(self.parts.values())

    def split(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The parts of rows (b, width)."""
        ends = np.cumsum(list(self.parts.values()))[:-1]
        return dict(zip(self.parts, np.split(rows, ends, axis=1), strict=True))


def _on_mesh(apply: Callable, params, mesh) -> Callable[[np.ndarray], np.ndarray]:
    """`apply(params, images)` -> rows, a fixed number of images at a time on every device."""
    whole, batch = replicated(mesh), batch_sharding(mesh)
    program = jax.jit(apply, in_shardings=(whole, batch), out_shardings=batch)
    params = jax.device_put(params, whole)
    count = ROWS * mesh.shape["data"] * mesh.shape["fsdp"]

    def rows(images: np.ndarray) -> np.ndarray:
        filled = np.concatenate([images, np.repeat(images[-1:], -len(images) % count, axis=0)])
        found = [jax.device_get(program(params, filled[i : i + count])) for i in range(0, len(filled), count)]
        return np.ascontiguousarray(np.concatenate(found)[: len(images)], np.dtype("<f4"))

    return rows


def _digits(mesh) -> Network:
    weights, meta = digit_features.load()

    def apply(params, images):
        return jnp.concatenate(digit_features.apply(params, images.astype(jnp.float32) / 127.5 - 1), axis=1)

    parts = {"pool": digit_features.WIDTH, "logits": 10}
    return Network("digits", meta["sha256"], parts, _on_mesh(apply, weights, mesh))


def _inception(folder: str, mesh) -> Network:
    _, weights, meta = load_network(folder, "inception")

    def apply(params, images):
        rgb = jnp.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
        found = inception.apply(params, rgb)
        return jnp.concatenate([found.pool, found.spatial, found.logits_unbiased], axis=1)

    parts = {"pool": 2048, "spatial": 2023, "logits": 1008}
    return Network("inception", meta["sha256"], parts, _on_mesh(apply, weights, mesh))


def check_config(cfg: Config) -> None:
    """Raises UsageError for sample metrics that cannot be."""
    if cfg.eval.features == "inception" and not cfg.eval.inception:
        raise UsageError(
            "eval.inception: empty, expected the folder of the Inception network; write it with `python -m dit_jax.convert "
            "--source=inception --weights=FILE --out=DIR`"
        )
    if cfg.eval.features == "digits" and cfg.data.dataset != "digits":
        raise UsageError(
            f"eval.features: found 'digits' for {cfg.data.dataset!r}, expected 'inception'; or set eval.samples=0 for the "
            "held-out loss alone"
        )
    if not cfg.eval.reference and (cfg.data.latents or not cfg.data.cache):
        raise UsageError(
            "eval.reference: empty, expected an npz of reference statistics or images: the data set is too large to be held "
            "in memory, or is of latents"
        )


def open_network(cfg: Config, mesh) -> Network:
    """The network that `eval.features` names. Raises UsageError when its folder is not what it should be."""
    return _digits(mesh) if cfg.eval.features == "digits" else _inception(cfg.eval.inception, mesh)


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: statistics of pooled and of spatial features, and, where images were at hand, the
    pooled features themselves, which KID, precision and recall need."""

    source: dict
    pool: tuple  # mean, covariance
    spatial: tuple | None
    features: np.ndarray | None

    def describe(self) -> dict:
        return self.source


def open_reference(cfg: Config, network: Network) -> Reference:
    """The npz of `eval.reference`, else the images of `data.split`. Raises UsageError when it is another network's."""
    if not cfg.eval.reference:
        images, _ = load_arrays(all_of(cfg.data), cfg.data.split)
        return _of_images(as_uint8(images), network, describe(cfg.data, cfg.data.split))
    found = read_reference(cfg.eval.reference)


def as_uint8(images: np.ndarray) -> np.ndarray:
    """Images in [-1, 1] as the data pipeline makes them of uint8, back to uint8 exactly."""
    return np.rint((images + 1) * 127.5).astype(np.uint8)
