"""Draw images from a run: `python -m dit_jax.sample --workdir=W --num=64 --guidance=1.5 --sampler=ddpm --steps=250 --out=samples.npz`.

Image i depends on (seed, i) only, not on batch size or devices. Defaults come from the run's `sample` config, as in
`evaluate`; `--config.a.b=v` overrides them. Images are kept in `samples.npz.parts/` as they are drawn: the same command
resumes from there, and finds nothing to do once the npz is whole. SIGTERM exits 75 after the images under
way, or on one host after 20 s without them. On several hosts each draws its share into that folder, and process 0 writes the files.
"""

import dataclasses
import re

from absl import flags

from dit_jax.config import Config, SampleConfig, resolve
from dit_jax.error import UsageError
from dit_jax.files.out import check_ending
from dit_jax.job import compiled, hosts
from dit_jax.job.check import Slice, reachable
from dit_jax.job.launch import PATIENCE, launch, stop_flag


def _sample_config(cfg: Config, values) -> SampleConfig:
    """Override the run's sample config by the command's flags."""
    given = {name: getattr(values, name) for name in ("sampler", "steps", "guidance", "channels", "batch_size", "ema")}
    return dataclasses.replace(cfg.sample, **{name: value for name, value in given.items() if value is not None})


def _bound(values, away: bool = False) -> tuple:
    """Return the config and the `sampling.run.Request` of the command; `away`: without its file of prompts, which is on another machine.

    Raises UsageError if they do not fit the model."""
    from dit_jax.diffusion.task import make_task
    from dit_jax.sampling.label import find_classes
    from dit_jax.sampling.prompt import find_prompts
    from dit_jax.sampling.run import Request

    cfg = resolve(values.config)
    if values.autoencoder is not None:
        cfg = dataclasses.replace(cfg, autoencoder=dataclasses.replace(cfg.autoencoder, folder=values.autoencoder))
    cfg = dataclasses.replace(cfg, sample=_sample_config(cfg, values))
    make_task(cfg)
    names = ("workdir", "num", "seed", "step", "out", "grid", "images", "low", "rgb")
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", values.size or "0x0", re.ASCII)
    if not found:
        raise UsageError(f"--size: found {values.size!r}, expected HxW in pixels, such as 64x96")
    wanted = Request(
        **{name: getattr(values, name) for name in names},
        labels=find_classes(values.labels, cfg, values.workdir),
        size=(int(found[1]), int(found[2])) if values.size else None,
        prompts=find_prompts(values.prompt, values.prompts, cfg.model, away),
    )
    if values.low and not cfg.model.superres:
        raise UsageError(
            f"--low: found {values.low!r}, expected none: this model takes no such images (model.superres)"
        )
    if not wanted.files:
        raise UsageError("--out, --grid, --images: found none, expected at least one of them")
    check_ending("--out", values.out, ".npz")
    check_ending("--grid", values.grid, ".png")
    return cfg, wanted


def check(_: Config, slice_: Slice | None) -> None:
    """Raises UsageError if the command does not fit the run's model, or several hosts."""
    _, wanted = _bound(flags.FLAGS, away=not reachable(flags.FLAGS.prompts))
    _check_hosts(wanted, slice_.hosts if slice_ else 1)


def _check_hosts(wanted, hosts: int) -> None:
    if hosts > 1 and not wanted.out:
        raise UsageError("--out: empty, expected an npz, which the hosts draw into together")


def main() -> None:
    from dit_jax.devices.processes import leader, together
    from dit_jax.sampling.run import run

    cfg, wanted = _bound(flags.FLAGS)
    count = hosts.join(resolve(flags.FLAGS.config))  # without paths of the flags, which may differ
    _check_hosts(wanted, count)
    with stop_flag(PATIENCE if count == 1 else None) as stop, together():
        run(cfg, wanted, stop)
        if leader():
            print("\n".join(wanted.files))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "the run's folder", required=True)
    more = "images; a larger number later keeps those drawn before"
    flags.DEFINE_integer("num", 64, more, lower_bound=1, upper_bound=2**30)
    flags.DEFINE_integer("seed", 0, "seed", lower_bound=0, upper_bound=2**31 - 1)
    flags.DEFINE_integer("step", None, "checkpoint; default: that of unfinished parts, else the newest")
    flags.DEFINE_string("sampler", None, "one of those at --config.sample.sampler")
    flags.DEFINE_integer("steps", None, "sampling steps")
    flags.DEFINE_float("guidance", None, "guidance scale; 1 = plainly conditional")
    flags.DEFINE_float("ema", None, "width of the EMA, made of the run's snapshots, such as 0.08; 0 = the EMA kept")
    flags.DEFINE_string("channels", None, "channels that guidance acts on: all or first3")
    flags.DEFINE_string("autoencoder", None, "folder of a converted autoencoder, for a model of latents")
    flags.DEFINE_integer(
        "batch_size", None, "images drawn before they are kept, in multiples of 16 to 64 per device; changes none"
    )
    flags.DEFINE_list("labels", [], "classes to draw, in turn: numbers, or (parts of) names; default: the label policy")
    flags.DEFINE_multi_string("prompt", [], "words to draw from, for a model of captions; may be given again: in turn")
    flags.DEFINE_string(
        "prompts", "", "file of them: .txt, a prompt a line; .csv or .jsonl, with a column prompt, caption or text"
    )
    what = "npz of uint8 images and labels; another job's file is never overwritten; empty = none"
    flags.DEFINE_string("out", "samples.npz", what)
    flags.DEFINE_string("grid", "", "PNG of the images, a row a class; of the first 400 if there are more")
    flags.DEFINE_string("images", "", "folder of PNGs, one an image; new or empty")
    flags.DEFINE_string("size", "", "HxW of the images in pixels, such as a bucket's; default: data.image_size")
    flags.DEFINE_string(
        "low",
        "",
        "folder of low-resolution pictures, or npz, that super-resolution enlarges, in turn; default: held-out",
    )
    flags.DEFINE_bool("rgb", False, "three equal channels for grey images, in every output")
    compiled.define_flag()
    hosts.define_flags()
    launch(main, config="workdir", check=check)
