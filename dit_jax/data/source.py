"""One split of the data, pixels or latents, as a config names it; and what is to be known of it."""

import dataclasses
import os

from dit_jax.config import DataConfig
from dit_jax.data import tfds_records
from dit_jax.data.latents import LatentRecords, open_latents
from dit_jax.data.skip import Skips
from dit_jax.data.tfds_records import Records, load_source
from dit_jax.error import UsageError


def open_source(data: DataConfig, split: str) -> Records | LatentRecords:
    """The records of `split`: the latents in `data.latents`/`split`, or without `data.latents` the images.

    Both have `classes` and `image_shape`, (h, w, c) of what a model sees. Raises UsageError where they cannot be opened,
    and where latents are of another data set, split or image size than the config has.
    """
    if not data.latents:
        return load_source(data.dataset, split, data.data_dir, Skips(data.skip_bad))
    if split in ("", ".", "..") or "/" in split or os.sep in split:
        raise UsageError(
            f"data.split: found {split!r}, expected the name of a folder in data.latents = {data.latents!r}"
        )
    source = open_latents(os.path.join(data.latents, split), skips=Skips(data.skip_bad))
    for key, found, expected in (
        ("data.dataset", data.dataset, source.info.dataset),
        ("data.split or data.held_out_split", split, source.info.split),
        ("data.image_size", data.image_size, source.info.image_size),
    ):
        if found != expected:
            where = f"which the latents in {source.folder} were encoded from"
            raise UsageError(f"{key}: found {found!r}, expected {expected!r}, {where}")
    return source


def overlap(a: Records | LatentRecords, b: Records | LatentRecords) -> bool:
    """Whether two splits share a record."""
    if isinstance(a, Records) and isinstance(b, Records):
        return tfds_records.overlap(a, b)
    if not (isinstance(a, LatentRecords) and isinstance(b, LatentRecords)):
        raise UsageError(f"data: found {type(a).__name__} and {type(b).__name__}, expected two splits of one kind")
    shards = [{shard["sha256"] for shard in source.files} for source in (a, b)]
    return (
        os.path.realpath(a.folder) == os.path.realpath(b.folder)
        or a.content == b.content
        or bool(shards[0] & shards[1])
    )


def match(a: LatentRecords, b: LatentRecords) -> None:
    """Raises UsageError unless the latents of two splits lie in one space: of one autoencoder, shape, scale and shift."""
    for name in ("autoencoder_sha256", "shape", "scale", "shift", "classes"):
        first, second = getattr(a.info, name), getattr(b.info, name)
        if first != second:
            raise UsageError(
                f"latents {b.folder}: {name}: found {second}, expected {first}, as in {a.folder}; encode again"
            )


def describe(data: DataConfig, split: str) -> dict:
    """What an evaluation protocol states of a split: `tfds_records.describe` of images, the same keys and more of latents."""
    if not data.latents:
        return tfds_records.describe(data.dataset, split, data.data_dir)
    source = open_source(data, split)
    info = source.info
    return {
        "dataset": info.dataset,
        "split": info.split,
        "records": len(source),
        "classes": info.classes,
        "image_shape": list(info.shape),
        "sha256": source.content,
        "source_sha256": info.source_sha256,
        "autoencoder": info.autoencoder,
        "autoencoder_sha256": info.autoencoder_sha256,
        **info.normalisation,
        "latent_dtype": info.dtype,
    }


def bad_records(source: Records | LatentRecords) -> dict[int, str]:
    """The malformed records met so far that were left out: number in the split -> what is wrong with it."""
    with source.skips.lock:
        return dict(sorted(source.skips.found.items()))


def all_of(data: DataConfig) -> DataConfig:
    """The same data, none of which may be left out: a score is of the records that its protocol names."""
    return dataclasses.replace(data, skip_bad=0)
