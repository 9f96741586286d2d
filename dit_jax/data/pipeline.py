"""Records to batches with grain, in a global order that does not depend on the number of processes.

Example p of a run (p = 0, 1, ...) is record `order(seed, p // n, n)[p % n]` of a split of n records: every epoch is a new
permutation. A mixture, and pictures in buckets (`aspect`), have orders of their own. Global batch k holds examples kB to
(k+1)B - 1; process r of P reads its rows rB/P to (r+1)B/P - 1.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grain
import jax
import numpy as np

from dit_jax.config import DataConfig
from dit_jax.data import pixels
from dit_jax.data.aspect import Buckets, open_buckets
from dit_jax.data.order import make_order
from dit_jax.data.skip import read_good, read_kept
from dit_jax.data.source import Source, open_source
from dit_jax.data.words import as_tokens, read_captioned
from dit_jax.error import UsageError

CHUNK = 256  # records read at a time from a whole split
_FOREVER = 1 << 48  # batches
SMALL = 1 << 17  # pixels; a smaller cached batch is made faster than a thread hands it over


def make_batches(
    data: DataConfig,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    source: Source | None = None,
    tokens: Callable | None = None,
    degrade: Callable | None = None,
) -> "Batches":
    """Make an endless iterator over this process's rows of the global batches of `data.split`.

    A batch is {"image": float32 (b, h, w, c), "cond": tree of arrays (b, ...)}, b = batch_size / process_count, with images
    from `Source.training`. `source`: the split if already open (for `bad_records`). With `tokens`, a function of captions,
    `cond` has those of a caption of each image, drawn by (seed, position), as "text"; with `degrade`, see `degrade.Degrade`, the
    low-resolution image of each, made of what the model sees, as "low". Raises UsageError if data cannot be read
    (also in `next`), or if the processes do not divide the batch.
    """
    if batch_size % process_count:
        raise UsageError(f"train.batch_size: found {batch_size}, expected a multiple of the {process_count} processes")
    source = open_source(data, data.split) if source is None else source
    buckets, square = open_buckets(source, data.buckets) if data.buckets else None, (data.image_size, data.image_size)
    if data.crop == "random" and not hasattr(source, "scaled"):
        raise UsageError(
            f"data.crop: found 'random' for {source.key}, expected 'center': its images are cropped already"
        )
    records_at = getattr(source, "make_order", functools.partial(make_order, len(source)))(seed)
    shapes = _shapes_of(buckets, data, square)
    read, rows = _reader(source, data, shapes, tokens is not None), batch_size // process_count

    def load(k: int) -> dict:
        positions = np.arange(rows) + (k * batch_size + process_index * rows)
        if buckets:
            records, shape = buckets.batch(k, batch_size, seed)
            arrays, cond = read(records[process_index * rows :][:rows])
        else:
            (arrays, cond), shape = read(records_at(positions)), square
        if shapes:
            arrays = pixels.crops(arrays, shape, positions, seed if data.crop == "random" else None)
        images = source.training(arrays, positions, seed)
        low = {"low": degrade(images, positions, seed)} if degrade else {}
        return {"image": images, "cond": as_tokens(cond, positions, seed, tokens) | low}

    threads = 0 if data.cache and rows * max(source.image_shape[:2]) ** 2 < SMALL else data.workers
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=data.prefetch if threads else 0)
    iterator = iter(grain.MapDataset.range(_FOREVER).map(load).to_iter_dataset(options))
    if not hasattr(source, "drawn"):
        return Batches(iterator, source, buckets)
    return Batches(iterator, source, buckets, lambda k: {"drawn": source.drawn(k * batch_size, seed)})


@dataclass(frozen=True)
class Batches(Iterator):
    """Endless batches made by `make_batches`.

    `get_state()` returns the JSON value {"next_index": k, "source": identity}. k is the index of the next global batch, the
    same on every process; batches read ahead do not count. For a mixture "drawn" says the position of each part, for people: k
    alone restores it.
    """

    iterator: grain.DatasetIterator
    source: Source
    buckets: Buckets | None = None
    position: Callable[[int], dict] = lambda k: {}

    @property
    def identity(self) -> dict:
        """Of the source, with the number of records in each bucket."""
        return self.source.identity | ({"buckets": self.buckets.describe()} if self.buckets else {})

    def __next__(self) -> dict:
        return next(self.iterator)

    def get_state(self) -> dict:
        state = self.iterator.get_state()
        return {**state, "source": self.identity, **self.position(state["next_index"])}

    def set_state(self, state: dict) -> None:
        """Continue where `get_state` was called. Raises UsageError if that was on another source.

        Older states have part of the identity, for latents only, under "latents".
        """
        identity = self.identity
        for name, expected in state.get("source", state.get("latents", {})).items():
            if identity.get(name) != expected:
                raise UsageError(
                    f"{self.source.key}: {name}: found {identity.get(name)!r}, expected {expected!r}, as in the data that this run "
                    "has been trained on; give it those, or start a new run from its weights (--init=RUN in another --workdir)"
                )
        self.iterator.set_state({"next_index": state["next_index"]})

    def close(self) -> None:
        self.iterator.close()


def load_arrays(
    data: DataConfig,
    split: str,
    source: Source | None = None,
    most: int = 0,
    buckets: tuple = (),
    tokens: Callable | None = None,
    degrade: Callable | None = None,
) -> tuple[np.ndarray, dict]:
    """Read a split, or its first `most` records, in record order by `Source.evaluation`: float32 (n, h, w, c), and `cond` (n, ...).

    With `buckets` each image has the shape (h, w) of its own, and they come as an array (n,) of arrays (h, w, c). With `tokens`
    those of a caption of each record, drawn by its number, are in `cond` as "text", as in a batch, and with `degrade` the
    low-resolution images as "low".
    """
    source = open_source(data, split) if source is None else source
    shapes = open_buckets(source, buckets).shapes_of if buckets else None

    def cut(arrays: np.ndarray, indices: np.ndarray) -> np.ndarray:
        if not shapes:
            return source.evaluation(arrays)
        for i, shape in enumerate(shapes(indices)):
            arrays[i] = source.evaluation(pixels.crop(arrays[i], shape)[None])[0]
        return arrays

    arrays, cond = _read_all(source, cut, shapes, most, tokens is not None)
    numbers = np.arange(len(arrays))
    return arrays, as_tokens(cond, numbers, 0, tokens) | ({"low": degrade(arrays, numbers, 0)} if degrade else {})


def in_order(
    source: Source, data: DataConfig, rows: int, indices: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, dict]]:
    """Yield (which records are good, bool (b,), the good ones as in `load_arrays`) of the records `indices`, b = `rows` or fewer.

    `data.workers` threads read ahead; malformed records are left out, at most `data.skip_bad`.
    """

    def load(k: int) -> tuple[np.ndarray, np.ndarray, dict]:
        good, found = read_kept(source.read, indices[k * rows : (k + 1) * rows], source.skips)
        arrays, cond = found or (np.empty((0, *source.image_shape), np.uint8), {})
        return good, source.evaluation(arrays), cond

    count = -(-len(indices) // rows)
    if not count:
        return
    options = grain.ReadOptions(num_threads=data.workers, prefetch_buffer_size=data.prefetch if data.workers else 0)
    iterator = iter(grain.MapDataset.range(count).map(load).to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()


def _shapes_of(buckets: Buckets | None, data: DataConfig, square: tuple) -> Callable | None:
    """Return a function: records (b,) -> the shapes (h, w) that they are cropped to here; None if the source crops them."""
    if buckets:
        return buckets.shapes_of
    return (lambda indices: [square] * len(indices)) if data.crop == "random" else None


def _read(source: Source, shapes: Callable | None, captions: bool, indices: np.ndarray) -> tuple[np.ndarray, dict]:
    """Read arrays and `cond`, with captions if asked, replacing malformed records if `data.skip_bad` allows it.

    `shapes`: see `_shapes_of`.
    """
    read = source.read
    if shapes:
        wanted = shapes(indices)
        read = lambda some: source.scaled(some, wanted[: len(some)])  # noqa: E731, a replacement has the shape of what it replaces
    if captions:
        read = functools.partial(read_captioned, source, read)
    return read_good(read, indices, len(source), source.skips)


def _reader(source: Source, data: DataConfig, shapes: Callable | None, captions: bool) -> Callable:
    """Return a function: indices (b,) -> stored arrays (b, ...) and `cond`, from memory if `data.cache`."""
    if not data.cache:
        return functools.partial(_read, source, shapes, captions)
    whole = _read_all(source, lambda arrays, _: arrays, shapes, captions=captions)
    return lambda indices: jax.tree.map(lambda x: x[indices], whole)


def _read_all(
    source: Source, change: Callable, shapes: Callable | None = None, most: int = 0, captions: bool = False
) -> tuple[np.ndarray, dict]:
    """Read the split, or its first `most` records, in order, applying `change` to arrays and their records; memory holds it once."""
    size, whole = min(len(source), most or len(source)), None
    for start in range(0, size, CHUNK):
        chunk = np.arange(start, min(start + CHUNK, size))
        arrays, cond = _read(source, shapes, captions, chunk)
        part = change(arrays, chunk), cond
        if whole is None:
            whole = jax.tree.map(lambda x: np.empty((size, *x.shape[1:]), x.dtype), part)
        for rows, some in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
            rows[chunk] = some
    return whole
