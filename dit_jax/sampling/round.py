"""A student of progressive distillation, whose checkpoint is trained for the sampling steps of its round."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dit_jax.config import Config, SampleConfig
from dit_jax.devices.processes import leader
from dit_jax.diffusion.task import make_task
from dit_jax.log import notice


def tell_rounds(cfgs: Sequence[Config], step: int, key: str = "sample.steps") -> None:
    """Log if one of `cfgs`, of one run, samples at other times than the round of the checkpoint of `step`. `key`: what gave the steps."""
    if not cfgs or not (count := cfgs[0].objective.steps_at(step)) or not leader():
        return
    others = dict.fromkeys(cfg.sample.times or cfg.sample.steps for cfg in cfgs if not _of_round(cfg, count))
    if others:
        found = f"{'sample.times' if cfgs[0].sample.times else key}: found {', '.join(map(str, others))}"
        notice(
            f"{found}; at step {step} this progressive student is of {count} equal steps, and other images may be worse"
        )


def _of_round(cfg: Config, count: int) -> bool:
    """Whether the sampling has the grid of `count` equal steps."""

    def grid(sample: SampleConfig) -> tuple[float, ...]:
        return make_task(dataclasses.replace(cfg, sample=sample)).times

    found, expected = grid(cfg.sample), grid(dataclasses.replace(cfg.sample, steps=count, times=()))
    return len(found) == len(expected) and np.allclose(found, expected, rtol=0, atol=1e-6)
