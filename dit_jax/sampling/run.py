"""Draws the images that a command asks for, on every host of the job, and writes its files."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from dit_jax import flops
from dit_jax.config import Config
from dit_jax.devices.processes import by_leader, check_folder, everyone_is_here, leader
from dit_jax.devices.rows import drawing_mesh
from dit_jax.files import absolute, base
from dit_jax.files.out import check_out
from dit_jax.log import say
from dit_jax.sampling import parts, picture
from dit_jax.sampling.draw import open_sampling
from dit_jax.sampling.label import names_of
from dit_jax.sampling.low import open_low
from dit_jax.sampling.prompt import Prompts
from dit_jax.sampling.quantize import with_quantize
from dit_jax.sampling.reuse import with_reuse
from dit_jax.sampling.round import tell_rounds
from dit_jax.sampling.weights import load_weights, title, weights_hash


@dataclass(frozen=True)
class Request:
    """What is wanted: `num` images of a run, and the files that get them; "" = none. `labels`: classes in turn, () = by the policy;
    `size`: (h, w) in pixels, None = square."""

    workdir: str
    num: int
    seed: int
    step: int | None
    out: str
    grid: str
    images: str
    labels: tuple[int, ...] = ()
    prompts: Prompts = field(default_factory=Prompts)  # of a model of captions
    low: str = ""  # of super-resolution: a folder or npz of low-resolution images; "" = of the held-out ones
    rgb: bool = False
    size: tuple[int, int] | None = None

    @property
    def files(self) -> list[str]:
        return [path for path in (self.out, self.images, self.grid) if path]


def run(cfg: Config, wanted: Request, stop: list) -> None:
    """Draws and writes. Interrupted once `stop` is not empty: then the images drawn are kept in `wanted.out`.parts."""
    if wanted.out:
        check_folder(os.path.dirname(absolute(wanted.out)), "--out")
    by_leader(lambda: (check_out("--out", wanted.out), check_out("--grid", wanted.grid, picture.MARK)))
    step = by_leader(lambda: parts.find_step(wanted.workdir, wanted.step, wanted.out, cfg.sample.weights))
    mesh = drawing_mesh(4 * flops.parameters(cfg.model))
    labels = {"label": wanted.labels} if wanted.labels else {}
    low = open_low(cfg, wanted.low, labelled=not wanted.labels)
    sampling = open_sampling(cfg, mesh, labels, wanted.rgb, wanted.size, wanted.prompts, low)
    params, notes = load_weights(cfg, wanted.workdir, step, mesh)
    weights = title(cfg.sample, notes)
    settings = f"{cfg.sample.sampler} {len(sampling.task.times) - 1}, guidance {cfg.sample.guidance:g}"
    shape = " x ".join(map(str, sampling.shape))
    say(f"{wanted.num} images {shape} of {cfg.data.title} from step {step} ({weights}), {settings}")
    tell_rounds([cfg], step)

    def draw(indices, most: int) -> Iterator:
        return sampling.draw(params, wanted.seed, indices, most, stop)

    def drawn(num: int) -> Iterator:
        return parts.read_npz(wanted.out) if wanted.out else draw(range(num), num)

    sha256 = weights_hash(params)
    sampling, params = with_quantize(sampling, params, sha256, wanted.workdir, step)
    sampling = with_reuse(sampling, params, sha256, wanted.workdir, step)
    job = sampling.describe(sha256, step, wanted.seed)
    pngs = job | {"images": wanted.num}
    there = by_leader(lambda: wanted.images and picture.check_images(wanted.images, pngs, sampling.shape))
    if wanted.out:
        parts.complete(wanted.out, job, sampling.shape, wanted.num, draw, stop)
    if wanted.images and not there and leader():
        picture.save_images(wanted.images, pngs, wanted.num, drawn(wanted.num))
    if wanted.grid and leader():
        model = f"{base(wanted.workdir)}, depth {cfg.model.depth}, width {cfg.model.width}"
        caption = f"{model}; step {step} ({weights}); {settings}; seed {wanted.seed}"
        batches, texts = drawn(min(wanted.num, picture.GRID)), wanted.prompts.texts
        draw_grid = picture.prompt_grid if texts else picture.grid
        if low:
            caption += f"; each beside {low.beside}"
            draw_grid = low.grid(draw_grid)
        picture.save_grid(wanted.grid, batches, texts or names_of(cfg, wanted.workdir), caption, draw_grid)
    everyone_is_here("files")
