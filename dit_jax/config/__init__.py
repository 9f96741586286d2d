"""Typed configs: frozen dataclasses of all settings with their defaults, built from ml_collections config files.

A config file in `configs/` changes the `ConfigDict` of all defaults from `template()` and returns it. `resolve` turns that into a
`Config` and raises UsageError naming a key that is unknown, mistyped or out of range. `--help` prints the comment beside each field.
"""

import dataclasses
from dataclasses import dataclass, field

import ml_collections

from dit_jax.config.data import DataConfig
from dit_jax.config.evaluation import EvalConfig, SampleConfig
from dit_jax.config.model import AutoencoderConfig, DiffusionConfig, ModelConfig
from dit_jax.config.training import MeshConfig, OptimConfig, SweepConfig, TrainConfig
from dit_jax.error import UsageError, build, choice

# name -> (depth, width, heads): Peebles & Xie 2023, Table 1.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


@dataclass(frozen=True)
class Config:
    """All settings of a run, in groups."""

    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)

    def __post_init__(self):
        if self.diffusion.process == "flow" and self.model.learn_sigma:
            raise UsageError("model.learn_sigma: found True, expected False with diffusion.process = 'flow'")
        batch, parts = self.train.batch_size, self.optim.accumulate
        if batch % parts:
            raise UsageError(f"train.batch_size: found {batch}, expected a multiple of optim.accumulate = {parts}")
        for shape in self.data.buckets:
            if any(side % self.model.patch for side in shape):
                expected = f"sides that are multiples of model.patch = {self.model.patch}"
                raise UsageError(f"data.buckets: found {shape}, expected {expected}")
        if self.data.buckets and self.sweep.budgets:
            why = "the budgets of a ladder count images of one shape"
            raise UsageError(f"data.buckets: found {self.data.buckets}, expected () with sweep.budgets: {why}")
        for name, needed in (("schedule", "constant"), ("ema", "power")):
            if self.sweep.curves and (found := getattr(self.optim, name)) != needed:
                why = "else a run stopped at a budget's step is not the run of that budget"
                raise UsageError(f"optim.{name}: found {found!r}, expected {needed!r} with sweep.curves: {why}")


def model_config(name: str, image_size: int = 256, **changes) -> ModelConfig:
    """Model config of a published name such as "DiT-XL/2", on SD-VAE latents of `image_size` pixels. Raises UsageError for another name."""
    allowed = [f"DiT-{size}/{patch}" for size in SIZES for patch in (2, 4, 8)]
    choice("model name", name, allowed)
    if image_size % 8:
        raise UsageError(f"image_size: found {image_size}, expected a multiple of 8 pixels")
    size, patch = name.removeprefix("DiT-").split("/")
    found = dict(zip(("depth", "width", "heads"), SIZES[size], strict=True))
    return ModelConfig(**found | dict(patch=int(patch), input_size=image_size // 8) | changes)


def to_dict(config) -> dict:
    """Nested dict of a config, as in `config.json`."""
    return dataclasses.asdict(config)


def template() -> ml_collections.ConfigDict:
    """ConfigDict of all defaults, the starting point of a config file. It is locked: a new key is an error."""
    return ml_collections.ConfigDict(to_dict(Config()), type_safe=False).lock()


def resolve(values: object) -> Config:
    """Builds a Config from a nested mapping (ConfigDict or JSON). Raises UsageError with the key, the value found and the expected."""
    return build(Config, values.to_dict() if isinstance(values, ml_collections.ConfigDict) else values, "")
