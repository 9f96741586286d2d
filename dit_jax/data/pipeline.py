"""From records to batches with grain: the global order depends on (seed, index) only, whatever the number of processes.

Example number p of a run (p = 0, 1, ...) is record `order(seed, p // n, n)[p % n]` of a split of n records: every epoch
is a fresh permutation. Global batch k holds examples kB to (k+1)B - 1; process r of P reads its rows rB/P to
(r+1)B/P - 1. All randomness is a hash of integers (SplitMix64; Steele, Lea & Flood 2014), so it depends on no library's
random stream.
"""

import functools
from collections.abc import Callable

import grain
import numpy as np
from PIL import Image

from dit_jax.config import DataConfig, UsageError
from dit_jax.data.datasets import CHUNK, Records, load_source

_ORDER, _FLIP = 1, 2  # streams of the hash
_FOREVER = 1 << 48  # batches
SMALL = 1 << 17  # pixels: a cached batch of fewer is made in less time than a thread takes to hand it over


def make_batches(
    data: DataConfig, *, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Endless iterator over this process's rows of the global batches of `data.split`.

    A batch is {"image": float32 (b, h, w, c) in [-1, 1], "label": int32 (b,)} with b = batch_size / process_count and
    h = w = data.image_size; a pixel u becomes u / 127.5 - 1. `get_state()` gives the JSON value `{"next_index": k}`, k
    being the index of the global batch that `next` returns next: the same on every process, and blind to batches read
    ahead; `set_state` continues there exactly. Raises UsageError where data cannot be read (from `next` too), and where
    the processes do not divide the batch.
    """
    if batch_size % process_count:
        raise UsageError(f"train.batch_size: found {batch_size}, expected a multiple of the {process_count} processes")
    source = load_source(data.dataset, data.split, data.data_dir)
    read = _cached(source, data.image_size) if data.cache else functools.partial(_read, source, data.image_size)
    rows = batch_size // process_count

    def load(k: int) -> dict:
        positions = np.arange(rows) + (k * batch_size + process_index * rows)
        images, labels = read(_records_at(positions, len(source), seed))
        if data.flip:
            images = flip(images, positions, seed)
        return {"image": to_float(images), "label": labels}

    threads = 0 if data.cache and rows * data.image_size**2 < SMALL else data.workers
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=data.prefetch if threads else 0)
    return iter(grain.MapDataset.range(_FOREVER).map(load).to_iter_dataset(options))


def load_arrays(data: DataConfig, split: str) -> tuple[np.ndarray, np.ndarray]:
    """A whole split in record order: images float32 (n, h, w, c) in [-1, 1], labels int32 (n,). Never flipped."""
    images, labels = _decode_all(load_source(data.dataset, split, data.data_dir), data.image_size)
    return to_float(images), labels


def order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Permutation of 0..size-1 in which epoch `epoch` visits the records: the order of their hashes."""
    return np.argsort(_hash(seed, _ORDER, epoch, np.arange(size)), kind="stable")


def flip(images: np.ndarray, positions: np.ndarray, seed: int) -> np.ndarray:
    """Mirrors left to right those images (b, h, w, c) whose global position (b,) has a hash in the upper half."""
    chosen = _hash(seed, _FLIP, 0, positions) >> np.uint64(63) == 1
    return np.where(chosen[:, None, None, None], images[:, :, ::-1], images)


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


def _hash(seed: int, stream: int, index: int, counters: np.ndarray) -> np.ndarray:
    """uint64 per counter: SplitMix64 chained over seed, stream, index and counter."""
    state = np.zeros(1, np.uint64)
    for word in (seed, stream, index):
        state = _mix(state + np.uint64(word))
    return _mix(state + counters.astype(np.uint64))


def _mix(z: np.ndarray) -> np.ndarray:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _read(source: Records, size: int, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    records = source.__getitems__(indices.tolist())
    images = np.stack([resize(record["image"], size) for record in records])
    return images, np.array([record["label"] for record in records], np.int32)


def _decode_all(source: Records, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The whole split in record order: uint8 (n, h, w, c) and int32 (n,)."""
    chunks = [np.arange(start, min(start + CHUNK, len(source))) for start in range(0, len(source), CHUNK)]
    images, labels = zip(*(_read(source, size, chunk) for chunk in chunks), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def _cached(source: Records, size: int) -> Callable:
    images, labels = _decode_all(source, size)
    return lambda indices: (images[indices], labels[indices])
