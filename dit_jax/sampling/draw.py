"""Images drawn from a model: image i depends on (seed, i) only, whatever the batch size or the number of devices."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax import flops
from dit_jax.config import Config, ModelConfig, SampleConfig, to_dict
from dit_jax.devices.mesh import batch_sharding, replicated
from dit_jax.diffusion import guidance
from dit_jax.diffusion.process import Process, make_process
from dit_jax.diffusion.samplers import SAMPLERS, draw_noise, evaluation_times, sampling_times
from dit_jax.error import NotFiniteError
from dit_jax.models import dit
from dit_jax.networks.autoencoder import Autoencoder
from dit_jax.training.step import on_device

ROWS = 16  # images that a device computes at a time: another number would round otherwise


UINT8 = "clamp(127.5 x + 128, 0, 255), truncated"


LABEL_DRAW = 2**31 - 1  # the draw that gives image i its label; the sampler's draws count from 0


def make_denoiser(model: ModelConfig, process: Process, cfg: SampleConfig, params, labels: jax.Array) -> Callable:
    """The denoiser that a sampler walks with: plain at guidance 1, else guided in `cfg.interval`, both halves in one batch."""

    def apply(x, t, y):
        return dit.apply(model, params, x, process.model_time(t), y)

    def plain(x, t):
        return apply(x, t, labels)

    if cfg.guidance == 1.0:
        return plain
    channels = model.channels if cfg.channels == "all" else min(3, model.channels)
    guided = guidance.classifier_free(guidance.paired(apply, labels, model.null_class), cfg.guidance, channels)
    low, high = cfg.interval
    return guided if (low, high) == (0.0, 1.0) else guidance.within(guided, plain, low, high)


def image_keys(seed, indices: jax.Array) -> jax.Array:
    """One key per image, from (seed, index) only."""
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(indices)


def draw_labels(
    rule: str, classes: int, keys: jax.Array, indices: jax.Array, wanted: tuple[int, ...] = ()
) -> jax.Array:
    """Labels (b,): `wanted` in turn if given; else class i modulo K (balanced), or uniformly random by image i's key."""
    if wanted:
        return jnp.asarray(wanted, jnp.int32)[indices % len(wanted)]
    if rule == "balanced":
        return (indices % classes).astype(jnp.int32)
    return jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, LABEL_DRAW), (), 0, classes))(keys)


@functools.lru_cache(maxsize=8)
def make_sampler(
    model: ModelConfig, process: Process, cfg: SampleConfig, mesh, wanted: tuple[int, ...] = ()
) -> Callable:
    """One compiled program: (params, seed, indices (b,)) -> images (b, h, w, c) float32 and labels (b,)."""
    times = sampling_times(process, cfg.sampler, cfg.steps, cfg.spacing)
    sampler = SAMPLERS[cfg.sampler]
    shape = (model.input_size, model.input_size, model.channels)
    model = on_device(model)

    def sample(params, seed, indices):
        keys = image_keys(seed, indices)
        labels = draw_labels(cfg.labels, model.classes, keys, indices, wanted)
        denoise = make_denoiser(model, process, cfg, params, labels)
        return sampler(process, denoise, draw_noise(keys, 0, shape), times, keys), labels

    whole, rows = replicated(mesh), batch_sharding(mesh)
    return jax.jit(sample, in_shardings=(whole, whole, rows), out_shardings=(rows, rows))


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[-1, 1] -> 0 to 255 as the published DiT does: clamp(127.5 x + 128, 0, 255), truncated."""
    return np.clip(127.5 * images + 128.0, 0, 255).astype(np.uint8)


def sample_images(
    cfg: Config,
    params,
    sample: SampleConfig,
    num: int,
    seed: int,
    mesh,
    wanted: tuple[int, ...] = (),
    first: int = 0,
    decode: Callable[[np.ndarray], np.ndarray] = lambda images: images,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images `first` to num - 1 in batches: (uint8 (b, h, w, c), labels (b,) int32). `decode` makes images of latents.

    A device always computes ROWS images at a time, and what is too many is dropped, so that on one kind of device images are
    the same, bit for bit, for every batch size and number of devices. (With the batch as the shape of the program, float32
    images differed by up to 7e-7 and 1 of 15,360 pixels by one level; in bfloat16 a quarter of all pixels, by up to 5.)
    """
    process = make_process(cfg.diffusion, cfg.model.learn_sigma)
    draw = make_sampler(cfg.model, process, sample, mesh, wanted)
    rows = ROWS * mesh.shape["data"] * mesh.shape["fsdp"]
    size = -(-min(sample.batch_size, num - first) // rows) * rows
    for start in range(first, num, size):
        end = min(start + size, num)
        chunks = [_draw_rows(draw, decode, params, seed, at, at + rows) for at in range(start, end, rows)]
        images, labels = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
        yield images[: end - start], labels[: end - start]


def _draw_rows(
    draw: Callable, decode: Callable, params, seed: int, start: int, end: int
) -> tuple[np.ndarray, np.ndarray]:
    drawn, labels = jax.device_get(draw(params, seed, np.arange(start, end, dtype=np.int32)))
    images = decode(drawn)
    if not np.isfinite(images).all():
        raise NotFiniteError(f"samples {start} to {end - 1}: found values that are not finite; is the model trained?")
    return to_uint8(images), labels


def image_flops(cfg: Config, sample: SampleConfig) -> int:
    """FLOPs of one sampled image, guided steps counted twice."""
    times = sampling_times(
        make_process(cfg.diffusion, cfg.model.learn_sigma), sample.sampler, sample.steps, sample.spacing
    )
    calls = evaluation_times(sample.sampler, times).astype(np.float32)  # as the program compares them
    low, high = np.float32(sample.interval)
    guided = 0 if sample.guidance == 1.0 else int(((calls >= low) & (calls <= high)).sum())
    return flops.sample_flops(cfg.model, len(calls), guided)


def weights_hash(params) -> str:
    """SHA-256 over the path, shape, dtype and bytes of every leaf."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {np.shape(leaf)}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def describe_job(
    cfg: Config,
    params,
    sample: SampleConfig,
    step: int,
    seed: int,
    wanted: tuple[int, ...] = (),
    autoencoder: Autoencoder | None = None,
) -> dict:
    """Everything that image i depends on besides the kind of device, flat and as JSON gives it back.

    Neither batch size nor number of devices is among it: they change nothing.
    """
    model, settings = to_dict(cfg.model), dataclasses.asdict(sample)
    del model["remat"], model["unroll"], settings["batch_size"]
    classes = wanted if len(wanted) <= 100 else hashlib.sha256(json.dumps(wanted).encode()).hexdigest()
    job = {"step": step, "weights_sha256": weights_hash(params), "seed": seed, "labels": classes}
    for name, group in (("sample", settings), ("model", model), ("diffusion", to_dict(cfg.diffusion))):
        job |= {f"{name}.{key}": value for key, value in group.items()}
    if autoencoder:
        job |= {f"autoencoder.{key}": value for key, value in autoencoder.describe().items()}
    return json.loads(json.dumps(job | {"uint8": UINT8, "rows": ROWS}))
