"""Encodes the images of splits to latents on disk, or copies them, each split whole or not at all."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from dit_jax.config import Config
from dit_jax.data.latent_notes import NOTES, LatentInfo, read_info
from dit_jax.data.latent_writer import write_latents
from dit_jax.data.latents import LatentRecords, open_latents
from dit_jax.data.pipeline import CHUNK, in_order
from dit_jax.data.posterior import deviations
from dit_jax.data.shard_writer import Hosts
from dit_jax.data.source import Source
from dit_jax.devices.mesh import local_mesh
from dit_jax.devices.processes import agreed, by_leader, check_folder, compare, leader, of_all
from dit_jax.error import Interrupted, UsageError
from dit_jax.files import base, exists
from dit_jax.log import say
from dit_jax.models import vae
from dit_jax.networks.autoencoder import (
    Autoencoder,
    images_at_once,
    make_encoder,
    open_autoencoder,
    own_normalisation,
)
from dit_jax.networks.copying import CopyJob, captions_checksum
from dit_jax.networks.in_step import open_images
from dit_jax.networks.sharing import check_left_out, without, write_split

DTYPE = "float16"  # by default


@dataclass(frozen=True)
class Job:
    """Settings of latents, shared by all splits. `cfg` names images, not latents."""

    cfg: Config
    autoencoder: Autoencoder
    dtype: str
    whiten: bool

    @property
    def same(self) -> dict:
        """What all processes must agree on besides the data."""
        return {"autoencoder: sha256": self.autoencoder.sha256}

    def describe(self, by: vae.Normalisation) -> dict:
        """Return the fields of LatentInfo that the splits share."""
        side = self.cfg.data.image_size // self.autoencoder.cfg.factor
        return {
            "shape": (side, side, self.autoencoder.cfg.latent_channels),
            "dtype": self.dtype,
            "moments": True,
            "mirrored": self.cfg.data.flip,
            "autoencoder_sha256": self.autoencoder.sha256,
            "scale": _floats(by.scale),
            "shift": _floats(by.shift),
            "dataset": self.cfg.data.name,
            "image_size": self.cfg.data.image_size,
        }

    def open(self, split: str) -> Source:
        """Open images. Raises UsageError if that fails, or the autoencoder expects another number of channels."""
        return open_images(self.cfg, self.autoencoder.cfg, split)

    def survey(self, out: str, sources: dict[str, Source]) -> tuple[dict, dict[str, str]]:
        """Return scale and shift of the latents to make, and what to say of each split that is done. Raises UsageError."""
        known = [self.cfg.data.split, self.cfg.data.held_out_split, *sources]
        held = {s: read_info(os.path.join(out, s)) for s in known if exists(os.path.join(out, s, NOTES))}
        by = _normalisation(self, out, held, list(sources))
        for split, info in held.items():
            folder = os.path.join(out, split)
            _refuse_other(folder, info, self.describe(by))
            if split in sources:
                there, expected = len(open_latents(folder)) + len(info.left_out), len(sources[split])
                if there != expected:
                    why = f"holds {there:,} latents, expected {expected:,}, one an image"
                    raise UsageError(f"--out: {folder!r} {why}; use another --out")
                check_left_out(folder, info.left_out, self.cfg.data.skip_bad)
        return dataclasses.asdict(by), {split: without(info.left_out) for split, info in held.items()}

    def encode(self, folder: str, split: str, source: Source, by: dict, shard_bytes: int, stop: list) -> dict:
        """Encode the images of `source` into `folder`. `by`: scale and shift; returns those of the latents."""
        data, size = self.cfg.data, len(source)
        say(f"{folder}: the checksum of {size:,} images ...")
        sha256, captions_sha256 = by_leader(lambda: (source.describe()["sha256"], captions_checksum(source)))
        info = LatentInfo(
            **self.describe(vae.Normalisation(**{k: tuple(v) if isinstance(v, list) else v for k, v in by.items()})),
            autoencoder=base(self.cfg.autoencoder.folder),
            classes=source.classes,
            class_names=tuple(getattr(source, "class_names", ())),
            split=split,
            source_sha256=sha256,
            captions_sha256=captions_sha256,
        )
        mesh, found = local_mesh(), []
        encode, rows = make_encoder(self.autoencoder, mesh), images_at_once(mesh)

        def settled(records: LatentRecords) -> LatentInfo:
            left = records.info.left_out  # of all processes, and those that an earlier start left out
            check_left_out(folder, left, data.skip_bad)
            return whitened(records, stop) if self.whiten and split == data.split else records.info

        def write(examples_of: Callable, hosts: Hosts) -> None:
            found.append(
                write_latents(folder, info, size, examples_of, settle=settled, shard_bytes=shard_bytes, hosts=hosts)
            )

        batches = lambda indices: in_order(source, data, rows, indices)  # noqa: E731
        write_split(folder, source, rows, batches, lambda some: encoded(encode, some, data.flip), write, stop)
        made = found[0].info
        what = f"{len(found[0]):,} latents of {made.shape}, scale {made.scale}, shift {made.shift}"
        say(f"{folder}: {what}{without(made.left_out)}")
        return made.normalisation


def open_job(cfg: Config, dtype: str, whiten: bool) -> Job | CopyJob:
    """Make a job: to copy images if there is no autoencoder.

    The latents' scale and shift are the config's, or the autoencoder's own if those are the defaults. Raises UsageError if the
    autoencoder does not fit image size and model, or no scale is known.
    """
    if cfg.data.mixture:
        raise UsageError("data.mixture: found a mixture, expected none: encode each part, then mix what is encoded")
    cfg = dataclasses.replace(cfg, data=cfg.data.images)
    if not cfg.autoencoder.folder:
        if whiten or dtype != DTYPE:
            given = "--whiten" if whiten else f"--dtype={dtype}"
            raise UsageError(
                f"{given}: found no --autoencoder, expected one, as it is of latents; or leave {given} out"
            )
        return CopyJob(cfg)
    autoencoder = open_autoencoder(cfg)
    if autoencoder.cfg.scale or not whiten:
        by = own_normalisation(cfg.autoencoder, autoencoder.cfg)
        autoencoder = dataclasses.replace(autoencoder, normalisation=by)
    return Job(cfg, autoencoder, dtype, whiten)


def encode_splits(job: Job | CopyJob, out: str, splits: list[str], shard_bytes: int, stop: list) -> None:
    """Make `out`/SPLIT for each split, unless it is done. All processes of the job call it; each makes some of the shards.

    Raises UsageError before anything is written, for example if `out` holds other latents; JobError if writing fails;
    Interrupted when `stop` fills.
    """
    first = job.cfg.data.split
    with agreed():
        sources = {split: job.open(split) for split in sorted(dict.fromkeys(splits), key=lambda s: s != first)}
    found = {f"{split}: {name}": value for split in sources for name, value in sources[split].identity.items()}
    compare(of_all(found | job.same), "give every host the same data")
    check_folder(out, "--out")
    by, done = by_leader(lambda: job.survey(out, sources))
    for split, source in sources.items():
        folder = os.path.join(out, split)
        if split in done:
            say(f"{folder}: done before" + done[split])
        else:
            by = job.encode(folder, split, source, by, shard_bytes, stop)
        if leader():
            print(folder)


def encoded(encode: Callable, batches: Iterable, mirrored: bool) -> Iterator[tuple[int, np.ndarray] | None]:
    """Yield (label or 0, float32 (copies, 2, h, w, c)) for each image in `batches`, None for a malformed one.

    `batches`: as from `in_order`. The devices work on the next batch while one is fetched.
    """
    waiting = None
    for good, images, cond in batches:
        copies = [images, images[:, :, ::-1]] if mirrored else [images]
        labels = cond.get("label", np.zeros(len(images), np.int32))
        under_way = good, labels, [encode(copy) for copy in copies if len(copy)]
        if waiting:
            yield from _fetched(*waiting)
        waiting = under_way
    if waiting:
        yield from _fetched(*waiting)


def _fetched(good: np.ndarray, labels: np.ndarray, copies: list[jax.Array]) -> Iterator[tuple[int, np.ndarray] | None]:
    values = np.stack(jax.device_get(copies), axis=1)[: len(labels)] if copies else []
    found = zip(labels.tolist(), values, strict=True)
    yield from (next(found) if kept else None for kept in good)


def whitened(records: LatentRecords, stop: Sequence = ()) -> LatentInfo:
    """Return the notes with the shift and scale that give posterior samples mean 0 and variance 1 in each channel.

    Computed without sampling: the points mean - deviation and mean + deviation have the posterior's mean and variance. Raises
    Interrupted once `stop` is not empty.
    """

    def points() -> Iterator[np.ndarray]:
        for start in range(0, len(records), CHUNK):
            if stop:
                raise Interrupted(
                    f"{records.folder}: no scale yet; the same command goes on from the shards that are there"
                )
            values, _ = records.read(np.arange(start, min(start + CHUNK, len(records))))
            mean, deviation = values[:, :, 0].astype(np.float32), deviations(values[:, :, 1])
            yield np.stack([mean - deviation, mean + deviation])

    by = vae.whitening(points())
    return dataclasses.replace(records.info, shift=by.shift, scale=by.scale)


def _normalisation(job: Job, out: str, held: dict[str, LatentInfo], splits: list[str]) -> vae.Normalisation:
    """Return the config's normalisation or, with --whiten, the one of complete whitened latents of `data.split`.

    Raises UsageError if those neither exist nor are to be made now, or if other splits were made without them.
    """
    first, others = job.cfg.data.split, [split for split in held if split != job.cfg.data.split]
    if not job.whiten:
        return job.autoencoder.normalisation
    if first in held:
        by = held[first]
        if not isinstance(by.scale, tuple):
            where = os.path.join(out, first)
            raise UsageError(
                f"--whiten: {where!r} holds latents of scale {by.scale}, expected whitened ones; use another --out"
            )
        return vae.Normalisation(by.shift, by.scale)
    if first not in splits or others:
        found = f"{os.path.join(out, others[0])!r} is there" if others else f"--split={splits[0]}"
        raise UsageError(
            f"--whiten: found {found} and no latents of {first!r}, expected those first: they are the measure"
        )
    return job.autoencoder.normalisation


def _refuse_other(folder: str, info: LatentInfo, wanted: dict) -> None:
    """Raises UsageError unless complete latents match this command."""
    for key, value in wanted.items():
        if getattr(info, key) != value:
            raise UsageError(
                f"--out: {folder!r} holds other latents: {key}: found {getattr(info, key)!r}, this command has {value!r}; "
                "use another --out"
            )


def _floats(value: float | tuple) -> float | tuple:
    return tuple(map(float, value)) if isinstance(value, tuple) else float(value)
