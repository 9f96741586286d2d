"""Sampling task of a config: process, sampler and grid of times, checked when it is built."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from dit_jax.config import Config, SampleConfig
from dit_jax.diffusion.process import Flow, Process, make_process
from dit_jax.diffusion.samplers import SAMPLERS, Sampler
from dit_jax.diffusion.schedule import SPACINGS
from dit_jax.error import UsageError, nearest, shown


@dataclass(frozen=True)
class Task:
    """Process, sampler and `times` from noise to the clean image, both included."""

    process: Process
    sampler: Sampler
    times: tuple[float, ...]

    def walk(self, denoise: Callable, x: jax.Array, keys: jax.Array) -> jax.Array:
        """Samples images (b, h, w, c) from noise x (b, h, w, c) with one key per image."""
        return self.sampler(self.process, denoise, x, np.array(self.times), keys)

    @property
    def evaluations(self) -> np.ndarray:
        """Times of the denoiser calls."""
        return self.sampler.evaluations(np.array(self.times))


def make_task(cfg: Config) -> Task:
    """Builds the task of `cfg.sample`. Raises UsageError if the process or model does not support its sampler, grid or guidance."""
    process, sample = make_process(cfg.diffusion, cfg.model.learn_sigma), cfg.sample
    if sample.sampler not in SAMPLERS:
        raise UsageError(f"sample.sampler: found {sample.sampler!r}{nearest(sample.sampler, SAMPLERS)}")
    sampler, kind = SAMPLERS[sample.sampler], type(process)
    if kind not in sampler.accepts:
        expected = " or ".join(accepted.__name__.lower() for accepted in sampler.accepts)
        others = ", ".join(name for name, row in SAMPLERS.items() if kind in row.accepts)
        raise UsageError(
            f"sample.sampler: found {sample.sampler!r} for {kind.__name__}, expected a {expected} for it, or another sampler: {others}"
        )
    _check_trained(cfg, sampler)
    check_guidance(cfg)
    return Task(process, sampler, tuple(_times(process, sample).tolist()))


def _check_trained(cfg: Config, sampler: Sampler) -> None:
    """Raises UsageError if the model was trained for other samplers, or has guidance inside that the sampler would double."""
    sample, objective = cfg.sample, cfg.objective
    if objective.name not in sampler.trained:
        what = (
            f"objective.name = {objective.name!r}"
            if objective.name
            else "the loss of its process (objective.name = '')"
        )
        fitting = ", ".join(
            name for name, row in SAMPLERS.items() if objective.name in row.trained and Flow in row.accepts
        )
        raise UsageError(
            f"sample.sampler: found {sample.sampler!r}, expected one of {fitting}: this model was trained with {what}"
        )
    if objective.name and objective.guidance != 1.0 and sample.guidance != 1.0:
        why = f"guidance is inside this model (objective.guidance = {objective.guidance:g}), one forward pass an evaluation"
        raise UsageError(f"sample.guidance: found {sample.guidance:g}, expected 1: {why}")


def check_guidance(cfg: Config, key: str = "sample.guidance", found: float | None = None) -> None:
    """Raises UsageError for a guidance other than 1 if the model was trained without a null class and there is no other guide."""
    found = cfg.sample.guidance if found is None else found
    if found != 1.0 and not cfg.sample.guide and not ((cfg.model.classes or cfg.model.text) and cfg.train.cond_dropout):
        why = "train.cond_dropout is 0" if cfg.model.classes or cfg.model.text else "model.classes is 0"
        raise UsageError(f"{key}: found {found}, expected 1: this model has no null class ({why})")


def _times(process: Process, sample: SampleConfig) -> np.ndarray:
    """Grid `sample.times`, else by `sample.steps` and `sample.spacing`; float64, falling to 0."""
    if sample.times:
        times = np.array(sample.times, np.float64)
        if np.any(np.diff(process.sigma(times)) >= 0):
            raise UsageError(
                f"sample.times: found {shown(sample.times)}, expected less noise at each: two of them are one step of the chain"
            )
        return times
    if sample.spacing not in SPACINGS:
        raise UsageError(f"sample.spacing: found {sample.spacing!r}{nearest(sample.spacing, SPACINGS)}")
    try:
        return process.times(sample.steps, sample.spacing)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"sample.steps: {error}") from None
