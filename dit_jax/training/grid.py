"""Grids of samples while a run trains, drawn from the EMA weights as `sample` draws them."""

import dataclasses
import os
from collections.abc import Callable

from dit_jax.config import Config
from dit_jax.data.source import open_source
from dit_jax.data.words import prompts
from dit_jax.devices.mesh import local_mesh
from dit_jax.devices.processes import leader, whole
from dit_jax.error import NotFiniteError, UsageError
from dit_jax.files import make_folder
from dit_jax.log import warn
from dit_jax.sampling.draw import open_sampling
from dit_jax.sampling.label import names_of
from dit_jax.sampling.low import open_low
from dit_jax.sampling.picture import grid, prompt_grid, save_grid
from dit_jax.sampling.prompt import Prompts

FOLDER = "samples"  # in the run's folder
NUMBER = 64  # images of a grid
PROMPTS = 16  # of them, for a model of captions: those of the first held-out images


def make_grid(cfg: Config, workdir: str) -> Callable[[int, dict, list], str]:
    """Return draw(step, ema, stop) -> path of the PNG, or "" if there is none: on other processes, or once `stop` is not empty.

    All processes call it, because the weights are gathered from all; process 0 draws, by `cfg.sample` and train.seed, and holds the
    weights whole on each of its devices meanwhile. Raises UsageError now if the settings exclude each other or lack an autoencoder.
    """
    if cfg.sample.ema:
        expected = "expected 0 with train.grid_every: grids are of the EMA that training keeps"
        raise UsageError(f"sample.ema: found {cfg.sample.ema:g}, {expected}")
    names, asked = names_of(cfg, workdir), None
    if cfg.model.text:
        names = tuple(prompts(open_source(cfg.data, cfg.data.held_out_split), PROMPTS))
        asked = Prompts(names)
    cfg = dataclasses.replace(
        cfg, sample=dataclasses.replace(cfg.sample, reuse=1.0, quantize="")
    )  # the weights change from grid to grid
    low = open_low(cfg)
    sampling = open_sampling(cfg, local_mesh(), prompts=asked, low=low)
    draw_grid = prompt_grid if asked else grid

    def draw(step: int, ema: dict, stop: list) -> str:
        params = whole(ema)
        if not leader():
            return ""
        try:
            batches = list(sampling.images(params, cfg.train.seed, NUMBER, stop=stop))
        except NotFiniteError as error:
            warn(f"no grid of step {step}: {error}")
            return ""
        if sum(len(images) for images, _ in batches) < NUMBER:
            return ""
        make_folder(os.path.join(workdir, FOLDER))
        path = os.path.join(workdir, FOLDER, f"step_{step:08}.png")
        save_grid(path, iter(batches), names, draw=low.grid(draw_grid) if low else draw_grid)
        return path

    return draw
