"""Copies the images of splits, as they are, into shards on disk."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from dit_jax.config import Config
from dit_jax.data.images import ImageInfo, open_images
from dit_jax.data.notes import read_notes
from dit_jax.data.shard_writer import write_shards
from dit_jax.data.skip import Skips, read_kept
from dit_jax.data.source import Source, open_source
from dit_jax.devices.processes import by_leader
from dit_jax.error import UsageError
from dit_jax.files import exists
from dit_jax.log import say, warn
from dit_jax.networks.sharing import captions_of, check_left_out, without, write_split

_ROWS = 32  # images that a thread reads at a time
_SOME = 64  # images whose mean size sets the number of those in a shard


@dataclass(frozen=True)
class CopyJob:
    """Settings shared by all splits."""

    cfg: Config
    same = property(lambda self: {"kind": "images"})  # what all processes must agree on besides the data

    def open(self, split: str) -> Source:
        """Open images. Raises UsageError if that fails, or they are none that can be copied."""
        source = open_source(self.cfg.data, split)
        if not hasattr(source, "encoded"):
            raise UsageError(f"{source.key}: found data without files of images or pixels, expected some to be copied")
        if source.arrays and source.stored_shape[-1] not in (1, 3, 4):
            raise UsageError(
                f"{source.key}: found {source.stored_shape[-1]} channels, expected 1, 3 or 4, as PNG has them"
            )
        return source

    def survey(self, out: str, sources: dict[str, Source]) -> tuple[dict, dict[str, str]]:
        """Return {}, and what to say of each split that is done. Raises UsageError if one does not fit."""
        done = {}
        for split, source in sources.items():
            folder = os.path.join(out, split)
            if not exists(os.path.join(folder, "images.json")):
                continue
            info, _ = read_notes(folder, ImageInfo)
            if info.identity != source.identity:
                key = next(
                    key for key in info.identity | source.identity if info.identity.get(key) != source.identity.get(key)
                )
                found = f"{key}: found {info.identity.get(key)!r}, this command has {source.identity.get(key)!r}"
                raise UsageError(f"--out: {folder!r} holds other images: {found}; use another --out")
            open_images(folder, self.cfg.data)
            check_left_out(folder, info.left_out, self.cfg.data.skip_bad)
            done[split] = without(info.left_out)
        if len(done) < len(sources):
            self._introduce(out)
        return {}, done

    def _introduce(self, out: str) -> None:
        """Say what will be written, which may not be what a user of a model of latents expects."""
        side, size = self.cfg.model.input_size, self.cfg.data.image_size
        say(f"{out}: copies of the images, as no --autoencoder is given")
        if side != size:
            warn(
                f"{out}: will hold images, not latents, but the model is one of latents (model.input_size = {side}, data.image_size = "
                f"{size}); for those give --autoencoder, a folder that `python -m dit_jax.convert --source=sd-vae` wrote"
            )

    def encode(self, folder: str, split: str, source: Source, by: dict, shard_bytes: int, stop: list) -> dict:
        """Copy the images of `source` into `folder`. Returns `by`, which images do not need."""
        size, data = len(source), self.cfg.data
        say(f"{folder}: the checksum of {size:,} images ...")
        sha256, captions_sha256, per = by_leader(
            lambda: (source.describe()["sha256"], captions_checksum(source), _per_shard(source, shard_bytes))
        )
        info = ImageInfo(
            shape=source.stored_shape,
            arrays=source.arrays,
            identity=source.identity,
            classes=source.classes,
            dataset=source.name,
            split=split,
            source_sha256=sha256,
            class_names=tuple(getattr(source, "class_names", ())),
            captions_sha256=captions_sha256,
        )

        def settled(info: ImageInfo, *_) -> ImageInfo:
            check_left_out(folder, info.left_out, data.skip_bad)
            return info

        def write(examples_of: Callable, hosts) -> None:
            write_shards(folder, info, size, per, examples_of, settled, hosts)

        write_split(folder, source, _ROWS, lambda indices: _read(source, data.workers, indices), _examples, write, stop)
        found = open_images(folder, data)
        say(f"{folder}: {len(found):,} images{without(found.source.info.left_out)}")
        return by


def captions_checksum(source: Source) -> str:
    """SHA-256 of all captions in order, a JSON list a record; "" without captions."""
    if not source.captions:
        return ""
    digest = hashlib.sha256()
    for said in captions_of(source, np.arange(len(source))):
        digest.update(json.dumps(said).encode() + b"\n")
    return digest.hexdigest()


def _per_shard(source: Source, shard_bytes: int) -> int:
    """Return the number of images in a shard of about `shard_bytes`, by the mean size of some of them."""
    some = np.unique(np.linspace(0, len(source) - 1, _SOME).astype(np.int64))
    _, found = read_kept(source.encoded, some, Skips(len(some)))
    return max(1, int(shard_bytes // np.mean([len(image) for _, image in found or [(0, b"x")]])))


def _read(source: Source, workers: int, indices: np.ndarray) -> Iterator[tuple[np.ndarray, list, dict]]:
    """Yield (which are good, bool (b,), (label, file) of those, {}) of the records `indices`, read ahead by threads."""
    parts = [indices[i : i + _ROWS] for i in range(0, len(indices), _ROWS)]
    with ThreadPoolExecutor(workers or 1) as pool:
        for i in range(0, len(parts), ahead := 2 * (workers or 1)):
            for good, found in pool.map(
                lambda part: read_kept(source.encoded, part, source.skips), parts[i : i + ahead]
            ):
                yield good, found or [], {}


def _examples(batches: Iterator) -> Iterator[tuple[int, bytes] | None]:
    for good, found, _ in batches:
        kept = iter(found)
        yield from (next(kept) if one else None for one in good)
