"""The weaker run of autoguidance, `sample.guide`: which checkpoint it is, whether it fits, its weights."""

import functools
from dataclasses import dataclass, replace

from dit_jax.checkpoint import find_step
from dit_jax.config import Config, to_dict
from dit_jax.devices.processes import by_leader
from dit_jax.diffusion.samplers import SAMPLERS
from dit_jax.error import UsageError
from dit_jax.files import base
from dit_jax.networks.notes import space
from dit_jax.sampling.weights import load_weights, weights_hash
from dit_jax.workdir.folder import read_config

ALIKE = {  # what a guide shares with the model that it guides, and a teacher with its student; the rest, such as depth, may differ
    "model": ("input_size", "channels", "classes", "text", "text_length", "text_width", "text_sha256", "superres"),
    "diffusion": ("process", "schedule", "timesteps"),
    "autoencoder": ("scale", "shift"),
    "input": ("space",),
}


@dataclass(frozen=True)
class Guide:
    """A run's EMA weights at a step."""

    workdir: str
    step: int
    cfg: Config

    def weights(self, mesh) -> dict:
        """Weights on the mesh; the last ones that were asked for stay there."""
        return _weights(self, mesh)

    def describe(self, mesh) -> dict:
        """Run, step, and SHA-256 of the weights, for records."""
        return {"run": base(self.workdir), "step": self.step, "weights_sha256": _hash(self, mesh)}


@functools.lru_cache(maxsize=1)
def _weights(guide: Guide, mesh) -> dict:
    return load_weights(guide.cfg, guide.workdir, guide.step, mesh)[0]


@functools.lru_cache(maxsize=64)
def _hash(guide: Guide, mesh) -> str:
    return weights_hash(guide.weights(mesh))


def _check_objective(cfg: Config, found: Config, workdir: str) -> None:
    """Raises UsageError if the guide's output is not what the sampler takes."""
    name = cfg.sample.sampler
    if name in SAMPLERS and found.objective.name not in SAMPLERS[name].trained:
        expected = " or ".join(repr(one) for one in SAMPLERS[name].trained)
        raise UsageError(
            f"sample.guide: {workdir}: objective.name: found {found.objective.name!r}, expected {expected}, as sampler {name!r} takes"
        )


def alike(cfg: Config) -> dict:
    """Values of ALIKE, by "group.name"."""
    values = to_dict(cfg) | {"input": {"space": space(cfg)}}
    return {f"{group}.{name}": values[group][name] for group, names in ALIKE.items() for name in names}


def open_guide(cfg: Config) -> Guide | None:
    """Find the checkpoint that `sample.guide` names; None for "". Raises UsageError if there is none, or it does not fit the model."""
    text = cfg.sample.guide
    if not text:
        return None
    workdir, _, step = text.rpartition("@")
    workdir, step = (workdir, int(step)) if workdir and step.isascii() and step.isdecimal() else (text, None)
    found = read_config(workdir, flag="sample.guide")
    ours, theirs = alike(cfg), alike(found)
    for key in ours:
        if theirs[key] != ours[key]:
            expected = f"expected {ours[key]!r}, as the model that it guides"
            raise UsageError(f"sample.guide: {workdir}: {key}: found {theirs[key]!r}, {expected}")
    _check_objective(cfg, found, workdir)
    kept = replace(found, sample=replace(found.sample, weights="ema", ema=0.0, guide=""))
    return Guide(workdir, by_leader(lambda: find_step(workdir, step, "ema")), kept)
