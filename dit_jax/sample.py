"""Draw images from a run: `python -m dit_jax.sample --workdir=W --num=64 --guidance=1.5 --sampler=ddpm --steps=250 --out=samples.npz`.

Image i depends on (seed, i) only, whatever the batch size or the devices. Defaults come from the run's `sample` config,
the same that `evaluate` uses.
"""

import dataclasses
import functools
import os
import zipfile
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image

from dit_jax import checkpoint, flops
from dit_jax.command import launch, read_config
from dit_jax.config import Config, MeshConfig, ModelConfig, SampleConfig, UsageError
from dit_jax.diffusion import guidance
from dit_jax.diffusion.process import Process, make_process
from dit_jax.diffusion.samplers import SAMPLERS, draw_noise, evaluation_times, sampling_times
from dit_jax.log import say
from dit_jax.mesh import batch_sharding, make_mesh, replicated
from dit_jax.models import dit
from dit_jax.step import on_device

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
    times = sampling_times(process, cfg.sampler, cfg.steps)
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
    cfg: Config, params, sample: SampleConfig, num: int, seed: int, mesh, wanted: tuple[int, ...] = ()
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images 0..num-1 in batches: (uint8 (b, h, w, c), labels (b,))."""
    process = make_process(cfg.diffusion, cfg.model.learn_sigma)
    draw = make_sampler(cfg.model, process, sample, mesh, wanted)
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    size = -(-min(sample.batch_size, num) // split) * split
    for start in range(0, num, size):
        images, labels = jax.device_get(draw(params, seed, np.arange(start, start + size, dtype=np.int32)))
        if not np.isfinite(images).all():
            raise UsageError(
                f"samples {start} to {start + size - 1}: found values that are not finite; is the model trained?"
            )
        yield to_uint8(images)[: num - start], labels[: num - start]


def image_flops(cfg: Config, sample: SampleConfig) -> int:
    """FLOPs of one sampled image, guided steps counted twice."""
    times = sampling_times(make_process(cfg.diffusion, cfg.model.learn_sigma), sample.sampler, sample.steps)
    calls = evaluation_times(sample.sampler, times).astype(np.float32)  # as the program compares them
    low, high = np.float32(sample.interval)
    guided = 0 if sample.guidance == 1.0 else int(((calls >= low) & (calls <= high)).sum())
    return flops.sample_flops(cfg.model, len(calls), guided)


def grid(images: np.ndarray, columns: int, scale: int = 0) -> Image.Image:
    """uint8 (n, h, w, c) as one picture, row by row, enlarged by whole pixels when small."""
    n, h, w, c = images.shape
    rows = -(-n // columns)
    scale = scale or max(1, 48 // h)
    canvas = np.full((rows * columns, h + 2, w + 2, 3), 255, np.uint8)
    canvas[:n, 1:-1, 1:-1] = images[..., :3] if c >= 3 else images[..., :1]
    canvas = canvas.reshape(rows, columns, h + 2, w + 2, 3).transpose(0, 2, 1, 3, 4).reshape(rows * (h + 2), -1, 3)
    return Image.fromarray(canvas).resize((canvas.shape[1] * scale, canvas.shape[0] * scale), Image.Resampling.NEAREST)


def save_npz(path: str, images: np.ndarray, labels: np.ndarray) -> None:
    """The ADM layout: arr_0 uint8 (n, h, w, c), arr_1 labels (n,). The bytes depend on the arrays only; whole or not at all."""
    temporary = f"{path}.tmp{os.getpid()}"
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, array in (("arr_0", images), ("arr_1", labels)):
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as f:
                np.lib.format.write_array(f, array, allow_pickle=False)
    os.replace(temporary, path)


def _sample_config(cfg: Config, values) -> SampleConfig:
    """The run's sample config with the command's flags over it."""
    names = {
        "sampler": values.sampler,
        "steps": values.steps,
        "guidance": values.guidance,
        "batch_size": values.batch_size,
    }
    return dataclasses.replace(cfg.sample, **{name: value for name, value in names.items() if value is not None})


def _wanted(values: list[str], classes: int) -> tuple[int, ...]:
    for value in values:
        if not value.isdigit() or not int(value) < classes:
            raise UsageError(f"--labels: found {value!r}, expected class numbers from 0 to {classes - 1}, with commas")
    return tuple(int(value) for value in values)


def main() -> None:
    values = flags.FLAGS
    cfg = read_config(values.workdir)
    sample = _sample_config(cfg, values)
    sampling_times(make_process(cfg.diffusion, cfg.model.learn_sigma), sample.sampler, sample.steps)
    wanted = _wanted(values.labels, cfg.model.classes)
    step = checkpoint.find_step(values.workdir, values.step)
    for path in (values.out, values.grid):
        if path and not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise UsageError(f"{path}: its folder does not exist")
    if values.grid and not values.grid.endswith(".png"):
        raise UsageError(f"--grid: found {values.grid!r}, expected a name that ends in .png")
    mesh = make_mesh(MeshConfig())
    _, params = checkpoint.load(values.workdir, step, sample.weights)
    say(
        f"{values.num} images from step {step} ({sample.weights}), {sample.sampler} {sample.steps}, guidance {sample.guidance:g}"
    )
    batches = []
    for batch in sample_images(cfg, params, sample, values.num, values.seed, mesh, wanted):
        batches.append(batch)
        say(f"  {sum(len(b[1]) for b in batches)}/{values.num}")
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    if values.out:
        save_npz(values.out, images, labels)
        print(values.out)
    if values.grid:
        order = np.argsort(labels, kind="stable")
        grid(images[order], columns=int(np.ceil(np.sqrt(len(images))))).save(values.grid)
        print(values.grid)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "the run's folder", required=True)
    flags.DEFINE_integer("num", 64, "images", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "seed", lower_bound=0, upper_bound=2**31 - 1)
    flags.DEFINE_integer("step", None, "checkpoint; default: the newest")
    flags.DEFINE_string("sampler", None, "one of " + ", ".join(SAMPLERS))
    flags.DEFINE_integer("steps", None, "sampling steps")
    flags.DEFINE_float("guidance", None, "guidance scale; 1 = plainly conditional")
    flags.DEFINE_integer("batch_size", None, "images per batch")
    flags.DEFINE_list("labels", [], "classes to draw, in turn; default: the run's label policy")
    flags.DEFINE_string("out", "samples.npz", "npz of uint8 images and labels")
    flags.DEFINE_string("grid", "", "PNG of all images, sorted by class")
    launch(main)
