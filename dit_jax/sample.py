"""Draw images from a run: `python -m dit_jax.sample --workdir=W --num=64 --guidance=1.5 --sampler=ddpm --steps=250 --out=samples.npz`.

Image i depends on (seed, i) only, not on batch size or devices. Defaults come from the run's `sample` config, as in
`evaluate`; `--config.a.b=v` overrides them. Images are kept in `samples.npz.parts/` as they are drawn: the same command
resumes from there, and finds nothing to do once the npz is whole. SIGTERM exits 75 after the images under
way, or after 20 s without them.
"""

import dataclasses
from collections.abc import Iterator

from absl import flags

from dit_jax.config import Config, MeshConfig, SampleConfig, resolve
from dit_jax.error import UsageError
from dit_jax.files import base
from dit_jax.files.out import check_ending, check_out
from dit_jax.job import compiled
from dit_jax.job.check import Slice
from dit_jax.job.launch import PATIENCE, launch, stop_flag
from dit_jax.log import say


def _sample_config(cfg: Config, values) -> SampleConfig:
    """Override the run's sample config by the command's flags."""
    given = {name: getattr(values, name) for name in ("sampler", "steps", "guidance", "channels", "batch_size")}
    return dataclasses.replace(cfg.sample, **{name: value for name, value in given.items() if value is not None})


def _bound(values) -> tuple[Config, tuple[int, ...]]:
    """Return the config of the command and the classes asked for. Raises UsageError if they do not fit the model."""
    from dit_jax.diffusion.task import make_task
    from dit_jax.sampling.label import find_classes

    cfg = resolve(values.config)
    if values.autoencoder is not None:
        cfg = dataclasses.replace(cfg, autoencoder=dataclasses.replace(cfg.autoencoder, folder=values.autoencoder))
    cfg = dataclasses.replace(cfg, sample=_sample_config(cfg, values))
    make_task(cfg)
    if not (values.out or values.grid or values.images):
        raise UsageError("--out, --grid, --images: found none, expected at least one of them")
    check_ending("--out", values.out, ".npz")
    check_ending("--grid", values.grid, ".png")
    return cfg, find_classes(values.labels, cfg)


def check(_: Config, slice_: Slice | None) -> None:
    """Raises UsageError if the command does not fit the run's model, or the slice has several hosts."""
    _bound(flags.FLAGS)
    if slice_:
        slice_.one_host("sample")


def main() -> None:
    with stop_flag(PATIENCE) as stop:
        _main(flags.FLAGS, stop)


def _main(values, stop: list) -> None:
    from dit_jax import checkpoint
    from dit_jax.devices.mesh import make_mesh
    from dit_jax.sampling import parts, picture
    from dit_jax.sampling.draw import open_sampling
    from dit_jax.sampling.label import names_of

    cfg, wanted = _bound(values)
    check_out("--out", values.out)
    check_out("--grid", values.grid, picture.MARK)
    step = parts.find_step(values.workdir, values.step, values.out, cfg.sample.weights)
    sampling = open_sampling(cfg, make_mesh(MeshConfig()), {"label": wanted} if wanted else None, values.rgb)
    _, params = checkpoint.load(values.workdir, step, cfg.sample.weights, cfg.model)
    settings = f"{cfg.sample.sampler} {len(sampling.task.times) - 1}, guidance {cfg.sample.guidance:g}"
    shape = " x ".join(map(str, sampling.shape))
    say(f"{values.num} images {shape} of {cfg.data.dataset} from step {step} ({cfg.sample.weights}), {settings}")

    def draw(first: int, end: int) -> Iterator:
        return sampling.images(params, values.seed, end, first, stop)

    def drawn(num: int) -> Iterator:
        return parts.read_npz(values.out) if values.out else draw(0, num)

    job = sampling.describe(params, step, values.seed)
    pngs = job | {"images": values.num}
    there = values.images and picture.check_images(values.images, pngs, sampling.shape)
    if values.out:
        parts.complete(values.out, job, sampling.shape, values.num, draw, stop)
    if values.images and not there:
        picture.save_images(values.images, pngs, values.num, drawn(values.num))
    if values.grid:
        model = f"{base(values.workdir)}, depth {cfg.model.depth}, width {cfg.model.width}"
        caption = f"{model}; step {step} ({cfg.sample.weights}); {settings}; seed {values.seed}"
        picture.save_grid(values.grid, drawn(min(values.num, picture.GRID)), names_of(cfg), caption)
    print("\n".join(path for path in (values.out, values.images, values.grid) if path))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "the run's folder", required=True)
    more = "images; a larger number later keeps those drawn before"
    flags.DEFINE_integer("num", 64, more, lower_bound=1, upper_bound=2**30)
    flags.DEFINE_integer("seed", 0, "seed", lower_bound=0, upper_bound=2**31 - 1)
    flags.DEFINE_integer("step", None, "checkpoint; default: that of unfinished parts, else the newest")
    flags.DEFINE_string("sampler", None, "one of those at --config.sample.sampler")
    flags.DEFINE_integer("steps", None, "sampling steps")
    flags.DEFINE_float("guidance", None, "guidance scale; 1 = plainly conditional")
    flags.DEFINE_string("channels", None, "channels that guidance acts on: all or first3")
    flags.DEFINE_string("autoencoder", None, "folder of a converted autoencoder, for a model of latents")
    flags.DEFINE_integer(
        "batch_size", None, "images drawn before they are kept, in multiples of 16 per device; changes none"
    )
    flags.DEFINE_list("labels", [], "classes to draw, in turn: numbers, or (parts of) names; default: the label policy")
    what = "npz of uint8 images and labels; another job's file is never overwritten; empty = none"
    flags.DEFINE_string("out", "samples.npz", what)
    flags.DEFINE_string("grid", "", "PNG of the images, a row a class; of the first 400 if there are more")
    flags.DEFINE_string("images", "", "folder of PNGs, one an image; new or empty")
    flags.DEFINE_bool("rgb", False, "three equal channels for grey images, in every output")
    compiled.define_flag()
    launch(main, config="workdir", check=check)
