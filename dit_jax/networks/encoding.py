"""Encodes the images of splits to latents on disk, each split whole or not at all."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import jax
import numpy as np

from dit_jax.config import AutoencoderConfig, Config
from dit_jax.data.latent_notes import NOTES, LatentInfo, read_info
from dit_jax.data.latent_writer import Hosts, write_latents
from dit_jax.data.latents import LatentRecords, open_latents
from dit_jax.data.pipeline import CHUNK, in_order
from dit_jax.data.posterior import deviations
from dit_jax.data.source import Source, bad_records, open_source
from dit_jax.devices.mesh import local_mesh
from dit_jax.devices.processes import agree, agreed, by_leader, check_folder, compare, leader, of_all
from dit_jax.error import Interrupted, UsageError
from dit_jax.files import base, exists
from dit_jax.log import drawing_progress, say, warn
from dit_jax.models import vae
from dit_jax.networks.autoencoder import Autoencoder, images_at_once, make_encoder, open_autoencoder


@dataclass(frozen=True)
class Job:
    """Settings shared by all splits. `cfg` names images, not latents."""

    cfg: Config
    autoencoder: Autoencoder
    dtype: str
    whiten: bool

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


def open_job(cfg: Config, dtype: str, whiten: bool) -> Job:
    """Make a Job. The latents' scale and shift are the config's, or the autoencoder's own if those are the defaults.

    Raises UsageError if there is no autoencoder, it does not fit image size and model, or no scale is known.
    """
    if not cfg.autoencoder.folder:
        raise UsageError(
            "--autoencoder: not given, expected a folder that `python -m dit_jax.convert --source=sd-vae` wrote"
        )
    if cfg.data.mixture:
        raise UsageError("data.mixture: found a mixture, expected none: encode each part, then mix the latents")
    cfg = dataclasses.replace(cfg, data=cfg.data.images)
    autoencoder, default = open_autoencoder(cfg), AutoencoderConfig()
    if (cfg.autoencoder.scale, cfg.autoencoder.shift) == (default.scale, default.shift):
        by = autoencoder.cfg
        if not (by.scale or whiten):
            found = f"found none for {cfg.autoencoder.folder!r}, whose file did not say it"
            raise UsageError(f"autoencoder.scale: {found}; give --config.autoencoder.scale and shift, or --whiten")
        own = vae.Normalisation(by.shift, by.scale or default.scale[0])
        autoencoder = dataclasses.replace(autoencoder, normalisation=own)
    return Job(cfg, autoencoder, dtype, whiten)


def encode_splits(job: Job, out: str, splits: list[str], shard_bytes: int, stop: list) -> None:
    """Make `out`/SPLIT for each split, unless it is done. All processes of the job call it; each makes some of the shards.

    Raises UsageError before anything is written, for example if `out` holds other latents; JobError if writing fails;
    Interrupted when `stop` fills.
    """
    first = job.cfg.data.split
    with agreed():
        sources = {split: _open_images(job, split) for split in sorted(dict.fromkeys(splits), key=lambda s: s != first)}
    found = {f"{split}: {name}": value for split in sources for name, value in sources[split].identity.items()}
    compare(of_all(found | {"autoencoder: sha256": job.autoencoder.sha256}), "give every host the same data")
    check_folder(out, "--out")
    by, done = by_leader(lambda: _survey(job, out, sources))
    for split, source in sources.items():
        folder = os.path.join(out, split)
        if split in done:
            say(f"{folder}: done before" + done[split])
        else:
            settle = whitened if job.whiten and split == first else None
            by = encode_split(job, folder, split, source, by, settle, shard_bytes, stop).info.normalisation
        if leader():
            print(folder)


def _survey(job: Job, out: str, sources: dict[str, Source]) -> tuple[dict, dict[str, str]]:
    """Return scale and shift of the latents to make, and what to say of each split that is done. Raises UsageError if one does not fit."""
    known = [job.cfg.data.split, job.cfg.data.held_out_split, *sources]
    held = {split: read_info(os.path.join(out, split)) for split in known if exists(os.path.join(out, split, NOTES))}
    by = _normalisation(job, out, held, list(sources))
    for split, info in held.items():
        folder = os.path.join(out, split)
        _refuse_other(folder, info, job.describe(by))
        if split in sources:
            there, expected = len(open_latents(folder)) + len(info.left_out), len(sources[split])
            if there != expected:
                why = f"holds {there:,} latents, expected {expected:,}, one an image"
                raise UsageError(f"--out: {folder!r} {why}; use another --out")
            _check_left_out(job, folder, info)
    return dataclasses.asdict(by), {split: _without(info) for split, info in held.items()}


def encode_split(
    job: Job,
    folder: str,
    split: str,
    source: Source,
    by: dict,
    settle: Callable[[LatentRecords], LatentInfo] | None,
    shard_bytes: int,
    stop: list,
) -> LatentRecords:
    """Encode the images of `source` into `folder`. `by`: scale and shift; `settle` as in `write_latents`."""
    data, size = job.cfg.data, len(source)
    say(f"{folder}: the checksum of {size:,} images ...")
    info = LatentInfo(
        **job.describe(vae.Normalisation(**{k: tuple(v) if isinstance(v, list) else v for k, v in by.items()})),
        autoencoder=base(job.cfg.autoencoder.folder),
        classes=source.classes,
        class_names=tuple(getattr(source, "class_names", ())),
        split=split,
        source_sha256=by_leader(lambda: source.describe()["sha256"]),
    )
    mesh = local_mesh()
    encode, rows = make_encoder(job.autoencoder, mesh), images_at_once(mesh)

    def go_on() -> None:
        """Raise Interrupted on all processes if one is to stop."""
        if agree(bool(stop)):
            raise Interrupted(f"{folder}: not complete; the same command goes on from the shards that are")

    def examples_of(indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        counts = of_all(len(indices))
        before = size - sum(counts)
        say(f"{folder}: {sum(counts):,} images to encode" + (f", {before:,} were before" if before else ""))
        progress, own = drawing_progress(0, size), max(len(indices), 1)  # all hosts are about as far as this one
        report = lambda done: progress(before + sum(counts) * done // own)  # noqa: E731
        batches = _watched(in_order(source, data, rows, indices), -(-max(counts) // rows), go_on, report)
        return encoded(encode, batches, data.flip)

    def step(work: Callable) -> object:
        go_on()
        return by_leader(work)

    def settled(records: LatentRecords) -> LatentInfo:
        _check_left_out(job, folder, records.info)  # of all processes, and those that an earlier start left out
        return settle(records) if settle else records.info

    hosts = Hosts(jax.process_index(), jax.process_count(), step, agreed)
    found = write_latents(folder, info, size, examples_of, settle=settled, shard_bytes=shard_bytes, hosts=hosts)
    malformed = sorted(itertools.chain(*of_all(list(bad_records(source).items()))))
    for index, problem in malformed if leader() else ():
        warn(f"record {index} is left out: {problem}")
    what = f"{len(found):,} latents of {info.shape}, scale {found.info.scale}, shift {found.info.shift}"
    say(f"{folder}: {what}{_without(found.info)}")
    return found


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


def whitened(records: LatentRecords) -> LatentInfo:
    """Return the notes with the shift and scale that give posterior samples mean 0 and variance 1 in each channel.

    Computed without sampling: the points mean - deviation and mean + deviation have the posterior's mean and variance.
    """

    def points() -> Iterator[np.ndarray]:
        for start in range(0, len(records), CHUNK):
            values, _ = records.read(np.arange(start, min(start + CHUNK, len(records))))
            mean, deviation = values[:, :, 0].astype(np.float32), deviations(values[:, :, 1])
            yield np.stack([mean - deviation, mean + deviation])

    by = vae.whitening(points())
    return dataclasses.replace(records.info, shift=by.shift, scale=by.scale)


def _watched(batches: Iterator, rounds: int, go_on: Callable[[], None], report: Callable[[int], None]) -> Iterator:
    """Yield the batches, empty ones after them up to `rounds`, and report the images so far. Calls `go_on()` before each."""
    done = 0
    for _ in range(rounds):
        go_on()
        yield (batch := next(batches, (np.zeros(0, bool), np.zeros((0, 1, 1, 1)), {})))
        done += len(batch[0])
        report(done)


def _open_images(job: Job, split: str) -> Source:
    """Open images. Raises UsageError if that fails, or the autoencoder expects another number of channels."""
    source, channels = open_source(job.cfg.data, split), job.autoencoder.cfg.channels
    if source.image_shape[-1] != channels:
        name = job.cfg.data.folder or job.cfg.data.dataset
        found = f"found {name!r} with images of {source.image_shape[-1]} channels"
        expected = f"expected {channels}, as the autoencoder {job.cfg.autoencoder.folder!r} has"
        raise UsageError(f"{source.key}: {found}, {expected}")
    return source


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


def _check_left_out(job: Job, folder: str, info: LatentInfo) -> None:
    """Raises UsageError if more malformed records were left out of the latents than this command allows."""
    if len(info.left_out) > job.cfg.data.skip_bad:
        raise UsageError(
            f"data.skip_bad: found {job.cfg.data.skip_bad}, expected at least {len(info.left_out)}: {folder!r} is made{_without(info)}; "
            "mend the images and delete the folder, or use another --out"
        )


def _without(info: LatentInfo) -> str:
    few = ", ".join(map(str, info.left_out[:5])) + ", ..." * (len(info.left_out) > 5)
    return f" without {len(info.left_out)} malformed records: {few}" if info.left_out else ""


def _floats(value: float | tuple) -> float | tuple:
    return tuple(map(float, value)) if isinstance(value, tuple) else float(value)
