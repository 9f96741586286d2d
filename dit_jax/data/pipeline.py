"""From records to batches with grain: the global order depends on (seed, index) only, whatever the number of processes.

Example number p of a run (p = 0, 1, ...) is record `order(seed, p // n, n)[p % n]` of a split of n records: every epoch
is a fresh permutation. Global batch k holds examples kB to (k+1)B - 1; process r of P reads its rows rB/P to
(r+1)B/P - 1. Order, flips and the noise of latents are functions of counters (`counter`).
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grain
import numpy as np
from PIL import Image

from dit_jax.config import DataConfig
from dit_jax.data.counter import FLIP, ORDER, hash_counters
from dit_jax.data.latents import LatentRecords
from dit_jax.data.posterior import posterior_mean, sample_posterior
from dit_jax.data.skip import read_good
from dit_jax.data.source import open_source
from dit_jax.data.tfds_records import CHUNK, Records
from dit_jax.error import UsageError

_FOREVER = 1 << 48  # batches
SMALL = 1 << 17  # pixels: a cached batch of fewer is made in less time than a thread takes to hand it over


def make_batches(
    data: DataConfig,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    source: Records | LatentRecords | None = None,
) -> "Batches":
    """Endless iterator over this process's rows of the global batches of `data.split`.

    A batch is {"image": float32 (b, h, w, c), "label": int32 (b,)} with b = batch_size / process_count. Of images,
    h = w = data.image_size and a pixel u becomes u / 127.5 - 1; of latents, they are drawn from their posteriors anew in
    every epoch. `source`: the split already opened by `open_source`, so that the caller may ask it for `bad_records`.
    Raises UsageError where data cannot be read (from `next` too), and where the processes do not divide the batch.
    """
    if batch_size % process_count:
        raise UsageError(f"train.batch_size: found {batch_size}, expected a multiple of the {process_count} processes")
    source = open_source(data, data.split) if source is None else source
    read, finish = _reader(source, data), _finisher(source, data.flip, seed)
    rows = batch_size // process_count

    def load(k: int) -> dict:
        positions = np.arange(rows) + (k * batch_size + process_index * rows)
        arrays, labels = read(_records_at(positions, len(source), seed))
        return {"image": finish(arrays, positions), "label": labels}

    side = data.image_size if isinstance(source, Records) else max(source.image_shape[:2])
    threads = 0 if data.cache and rows * side**2 < SMALL else data.workers
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=data.prefetch if threads else 0)
    iterator = iter(grain.MapDataset.range(_FOREVER).map(load).to_iter_dataset(options))
    return Batches(iterator, latents_identity(source) if isinstance(source, LatentRecords) else {})


@dataclass(frozen=True)
class Batches(Iterator):
    """Endless batches, of `make_batches`.

    `get_state()` gives the JSON value {"next_index": k}, k being the index of the global batch that `next` returns next: the
    same on every process, and blind to batches read ahead. Of latents it says which they are, too.
    """

    iterator: grain.DatasetIterator
    latents: dict  # which latents; {} of images

    def __next__(self) -> dict:
        return next(self.iterator)

    def get_state(self) -> dict:
        return {**self.iterator.get_state(), **({"latents": self.latents} if self.latents else {})}

    def set_state(self, state: dict) -> None:
        """Continue exactly where `get_state` was called. Raises UsageError when that was among other latents."""
        there = state.get("latents", self.latents)
        for name, found in self.latents.items():
            if there.get(name) != found:
                expected = f"expected {there.get(name)!r}, that of the latents which this run has been trained on"
                raise UsageError(f"data.latents: {name}: found {found!r}, {expected}")
        self.iterator.set_state({"next_index": state["next_index"]})

    def close(self) -> None:
        self.iterator.close()


def latents_identity(source: LatentRecords) -> dict:
    """What must be the same for a run to go on: the records, and how a model sees them."""
    info = source.info
    return {"sha256": source.content, "autoencoder_sha256": info.autoencoder_sha256, **info.normalisation}


def load_arrays(
    data: DataConfig, split: str, source: Records | LatentRecords | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A whole split in record order: float32 (n, h, w, c) and labels int32 (n,). Never flipped.

    Pixels in [-1, 1], or latents at the mean of their posterior. `source` as in `make_batches`.
    """
    source = open_source(data, split) if source is None else source
    if isinstance(source, Records):
        images, labels = _read_all(source, data)
        return to_float(images), labels
    return _read_all(source, data, functools.partial(posterior_mean, source.info))


def images_in_order(
    source: Records, data: DataConfig, rows: int, first: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A split in record order from record `first` on, `rows` at a time: float32 (b, h, w, c) in [-1, 1], labels int32 (b,).

    Never flipped; read ahead by `data.workers` threads. The last batch holds what is left. Malformed records as in
    `make_batches`.
    """
    read, size = _reading(source, data), len(source)

    def load(k: int) -> tuple[np.ndarray, np.ndarray]:
        start = first + k * rows
        images, labels = read(np.arange(start, min(start + rows, size)))
        return to_float(images), labels

    count = -(-(size - first) // rows)
    if not count:
        return
    options = grain.ReadOptions(num_threads=data.workers, prefetch_buffer_size=data.prefetch if data.workers else 0)
    iterator = iter(grain.MapDataset.range(count).map(load).to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()


def order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Permutation of 0..size-1 in which epoch `epoch` visits the records: the order of their hashes."""
    return np.argsort(hash_counters(seed, ORDER, epoch, np.arange(size)), kind="stable")


def flip(images: np.ndarray, positions: np.ndarray, seed: int) -> np.ndarray:
    """Mirrors left to right those images (b, h, w, c) whose global position (b,) has a hash in the upper half."""
    return np.where(_mirrored(positions, seed)[:, None, None, None], images[:, :, ::-1], images)


def to_float(images: np.ndarray) -> np.ndarray:
    """uint8 0..255 -> float32 in [-1, 1]: u / 127.5 - 1, computed in float32."""
    floats = images.astype(np.float32)
    floats /= np.float32(127.5)
    floats -= np.float32(1)
    return floats


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 (h, w, c) -> (size, size, c), ADM's centre crop (Dhariwal & Nichol 2021, `image_datasets.center_crop_arr`).

    Halves with a box filter while the short side is at least twice `size`, scales it to `size` bicubically, and crops.
    """
    if image.shape[:2] == (size, size):
        return image
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    while min(picture.size) >= 2 * size:
        picture = picture.resize(tuple(n // 2 for n in picture.size), resample=Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize(tuple(round(n * scale) for n in picture.size), resample=Image.Resampling.BICUBIC)
    pixels = np.asarray(picture)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size].reshape(size, size, image.shape[-1])


def _records_at(positions: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Record numbers (b,) of consecutive global positions (b,), which may span epochs."""
    epochs = range(int(positions[0]) // size, int(positions[-1]) // size + 1)
    within = positions - epochs[0] * size
    if len(epochs) == 1:
        return _epoch(seed, epochs[0], size)[within]
    return np.concatenate([_epoch(seed, e, size) for e in epochs])[within]


_epoch = functools.lru_cache(maxsize=4)(order)


def _mirrored(positions: np.ndarray, seed: int) -> np.ndarray:
    """Whether the examples at the global positions (b,) are mirrored, bool (b,)."""
    return hash_counters(seed, FLIP, 0, positions) >> np.uint64(63) == 1


def _finisher(source: Records | LatentRecords, mirror: bool, seed: int) -> Callable:
    """(arrays as stored (b, ...), global positions (b,)) -> what a model sees, float32 (b, h, w, c)."""
    if isinstance(source, Records):
        return lambda images, positions: to_float(flip(images, positions, seed) if mirror else images)
    info = source.info
    if mirror and not info.mirrored:
        raise UsageError(
            f"data.flip: found True, expected False, as the latents in {source.folder} hold no mirrored copies; "
            "or encode again with them"
        )
    return lambda values, positions: sample_posterior(
        info, values, positions, seed, _mirrored(positions, seed) if mirror else None
    )


def _reader(source: Records | LatentRecords, data: DataConfig) -> Callable:
    """Indices (b,) -> arrays as stored (b, ...) and labels int32 (b,), of the split in memory where `data.cache`."""
    if not data.cache:
        return _reading(source, data)
    arrays, labels = _read_all(source, data)
    return lambda indices: (arrays[indices], labels[indices])


def _reading(source: Records | LatentRecords, data: DataConfig) -> Callable:
    """Indices (b,) -> arrays and labels from disk, malformed records replaced as `data.skip_bad` allows."""
    read = functools.partial(_read, source, data.image_size) if isinstance(source, Records) else source.read
    return lambda indices: read_good(read, indices, len(source), source.skips)


def _read(source: Records, size: int, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    records = source.__getitems__(indices.tolist())
    images = np.stack([resize(record["image"], size) for record in records])
    return images, np.array([record["label"] for record in records], np.int32)


def _read_all(
    source: Records | LatentRecords, data: DataConfig, change: Callable = lambda arrays: arrays
) -> tuple[np.ndarray, np.ndarray]:
    """The whole split in record order, arrays through `change`: (n, ...) and int32 (n,)."""
    read, size, arrays, labels = _reading(source, data), len(source), None, np.empty(len(source), np.int32)
    for start in range(0, size, CHUNK):
        chunk = np.arange(start, min(start + CHUNK, size))
        some, labels[chunk] = read(chunk)
        some = change(some)
        arrays = np.empty((size, *some.shape[1:]), some.dtype) if arrays is None else arrays
        arrays[chunk] = some
    return arrays, labels
