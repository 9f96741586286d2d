"""Low-resolution images that samples of super-resolution begin with: of the held-out images, or of files."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dit_jax.config import Config
from dit_jax.data.degrade import enlarged, make_degrade, to_levels
from dit_jax.data.pixels import decode, reason, to_float
from dit_jax.data.source import all_of, open_source
from dit_jax.error import UsageError
from dit_jax.files import is_folder, names, read
from dit_jax.networks.reference import read_reference

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # of pictures in a folder
GAP = 255  # level of the column between the pictures of one image, and of two behind them


@dataclass(frozen=True)
class Low:
    """Low-resolution images that samples take in turn: image i begins with number i modulo `count`.

    read(numbers (b,))        {"low": float32 (b, h, w, c) in [-1, 1]}, and "label" int32 (b,) if known
    originals(numbers (b,))   the images that they were made of, uint8 (b, H, W, c); None: not known
    about                     what they depend on, for jobs and protocols
    """

    count: int
    factor: int
    read: Callable = field(repr=False)
    about: dict
    originals: Callable | None = field(default=None, repr=False)

    def rows(self, indices: np.ndarray) -> dict:
        """What `read` gives the samples `indices` (b,)."""
        return self.read(np.asarray(indices) % self.count)

    @property
    def beside(self) -> str:
        """What stands beside each sample in a grid, in words."""
        return "its low-resolution image (left)" + " and its original (right)" * bool(self.originals)

    def grid(self, draw: Callable) -> Callable:
        """A function as `picture.grid`, of samples 0, 1, ..., each between its low-resolution image and its original."""

        def beside(images: np.ndarray, *more):
            numbers = np.arange(len(images)) % self.count
            shown = [enlarged(to_levels(self.read(numbers)["low"]), self.factor), images]
            shown += [self.originals(numbers)] if self.originals else []
            line = np.full((*images.shape[:2], 1, images.shape[-1]), GAP, np.uint8)
            shown = [np.broadcast_to(part, images.shape) for part in shown]
            return draw(np.concatenate([*(part for one in shown for part in (one, line)), line], axis=2), *more)

        return beside


def open_low(cfg: Config, path: str = "", labelled: bool = True) -> Low | None:
    """The low-resolution images of `path`, a folder or an npz, or by default of the held-out images; None for a model without.

    With `labelled` a sample has the label of its held-out image. Raises UsageError if they cannot be read, or do not fit the model.
    """
    if not cfg.model.superres:
        return None
    return _of_files(cfg, path) if path else _held_out(cfg, labelled)


def _held_out(cfg: Config, labelled: bool) -> Low:
    data = all_of(cfg.data)
    try:
        source = open_source(data, data.held_out_split)
    except UsageError as error:
        raise UsageError(f"--low: found none, and no held-out images; expected one of them: {error}") from None
    degrade = make_degrade(cfg)

    def images(numbers: np.ndarray) -> tuple[np.ndarray, dict]:
        known, rows = np.unique(numbers, return_inverse=True)
        arrays, cond = source.read(known)
        return source.evaluation(arrays)[rows], {name: values[rows] for name, values in cond.items()}

    def rows(numbers: np.ndarray) -> dict:
        found, cond = images(numbers)
        label = {"label": cond["label"]} if labelled and cfg.model.classes else {}
        return {"low": degrade(found, np.asarray(numbers), 0), **label}

    about = {"of": "held-out images", **source.identity, **degrade.describe()}
    return Low(len(source), degrade.factor, rows, about, lambda numbers: to_levels(images(numbers)[0]))


def _of_files(cfg: Config, path: str) -> Low:
    channels, side = cfg.model.channels, cfg.model.input_size // cfg.model.superres
    named = _npz(path) if path.endswith(".npz") else _folder(path, channels)
    for where, image in named:
        if image.shape != (expected := (side, side, channels)):
            of = f"as model.input_size = {cfg.model.input_size} and model.superres = {cfg.model.superres} have"
            raise UsageError(f"--low: {where}: found an image of shape {image.shape}, expected {expected}, {of}")
    images = np.stack([image for _, image in named])
    about = {"of": "files", "images": len(images), "sha256": hashlib.sha256(images.tobytes()).hexdigest()}
    return Low(len(images), cfg.model.superres, lambda numbers: {"low": to_float(images[numbers])}, about)


def _npz(path: str) -> list[tuple[str, np.ndarray]]:
    images = read_reference(path).images
    if images is None:
        raise UsageError(f"--low: {path}: found no arr_0, expected uint8 images (n, h, w, 1 or 3) under that name")
    return [(f"{path}: image {i}", image) for i, image in enumerate(images)]


def _folder(path: str, channels: int) -> list[tuple[str, np.ndarray]]:
    """The pictures of a folder, by name. Raises UsageError if there is none, or one cannot be read."""
    files = [name for name in sorted(names(path)) if name.lower().endswith(ENDINGS)] if is_folder(path) else []
    if not files:
        expected = f"expected a folder of pictures ({', '.join(ENDINGS)}) or an .npz"
        raise UsageError(f"--low: found no picture in {path!r}, {expected}")
    found = []
    for name in files:
        where = os.path.join(path, name)
        try:
            found.append((where, decode(read(where), channels)))
        except Exception as error:  # of any decoder
            raise UsageError(f"--low: {where}: cannot read it: {reason(error)}") from None
    return found
