"""Typed configs: frozen dataclasses of all settings with their defaults, built from ml_collections config files.

A config file in `configs/` changes the `ConfigDict` of all defaults from `template()` and returns it. `resolve` turns that into a
`Config` and raises UsageError naming a key that is unknown, mistyped or out of range. `--help` prints the comment beside each field.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import ml_collections

from dit_jax.config.data import DataConfig
from dit_jax.config.evaluation import EvalConfig, SampleConfig
from dit_jax.config.model import AutoencoderConfig, DiffusionConfig, ModelConfig
from dit_jax.config.objective import ObjectiveConfig
from dit_jax.config.training import MeshConfig, OptimConfig, SweepConfig, TrainConfig
from dit_jax.error import UsageError, build, choice, shown

RENAMED = (("train", "label_dropout", "cond_dropout"),)  # (group, older name, name) of keys that are read under both
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
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)

    def __post_init__(self):
        if self.diffusion.process == "flow" and self.model.learn_sigma:
            raise UsageError("model.learn_sigma: found True, expected False with diffusion.process = 'flow'")
        if self.data.captions and not self.model.encoded:
            expected = f"expected '' with model.text = {self.model.text!r}, which has no encoder"
            raise UsageError(f"data.captions: found {self.data.captions!r}, {expected}")
        self._check_objective()
        self._check_superres()
        batch, parts = self.train.batch_size, self.optim.accumulate
        if batch % parts:
            raise UsageError(f"train.batch_size: found {batch}, expected a multiple of optim.accumulate = {parts}")
        for shape in self.data.buckets:
            if any(side % self.model.patch for side in shape):
                expected = f"sides that are multiples of model.patch = {self.model.patch}"
                raise UsageError(f"data.buckets: found {shape}, expected {expected}")
        if self.data.buckets and self.model.positions == "learned":
            expected = "expected sincos or rope with data.buckets: a table has one grid of patches"
            raise UsageError(f"model.positions: found 'learned', {expected}")
        if self.data.buckets and self.sweep.budgets:
            why = "the budgets of a ladder count images of one shape"
            raise UsageError(f"data.buckets: found {self.data.buckets}, expected () with sweep.budgets: {why}")
        for name, needed in (("schedule", "constant"), ("ema", "power")):
            if self.sweep.curves and (found := getattr(self.optim, name)) != needed:
                why = "else a run stopped at a budget's step is not the run of that budget"
                raise UsageError(f"optim.{name}: found {found!r}, expected {needed!r} with sweep.curves: {why}")

    def _check_superres(self) -> None:
        factor, data = self.model.superres, self.data
        usual = (("degrade", "area"), ("degrade_noise", 0.0), ("degrade_jpeg", 0))
        for name, value in usual if not factor else ():
            if (found := getattr(data, name)) != value:
                expected = f"expected {value!r} with model.superres = 0, whose model sees no low-resolution images"
                raise UsageError(f"data.{name}: found {found!r}, {expected}")
        if not factor:
            return
        latents = {f"data.latents = {part.latents!r}": part.latents for part in data.parts} | {
            "data.encode = 'in_step'": data.encode == "in_step",
            f"autoencoder.folder = {self.autoencoder.folder!r}": self.autoencoder.folder,
            f"model.input_size = {self.model.input_size} and data.image_size = {data.image_size}": data.image_size
            != self.model.input_size,
        }
        for what in (name for name, found in latents.items() if found):
            expected = f"expected 0 with {what}: super-resolution is of pixels, and latents are not built"
            raise UsageError(f"model.superres: found {factor}, {expected}")
        if data.buckets:
            why = "low-resolution images are squares"
            raise UsageError(f"data.buckets: found {data.buckets}, expected () with model.superres = {factor}: {why}")
        if data.degrade_jpeg and self.model.channels not in (1, 3):
            why = f"JPEG has 1 or 3 channels, the images have {self.model.channels}"
            raise UsageError(f"data.degrade_jpeg: found {data.degrade_jpeg}, expected 0: {why}")

    def _check_objective(self) -> None:
        objective, needed = self.objective, self.objective.rounds * self.objective.round_steps
        if objective.name and self.diffusion.process != "flow":
            expected = f"expected 'flow' with objective.name = {objective.name!r}, which learns paths of a flow"
            raise UsageError(f"diffusion.process: found {self.diffusion.process!r}, {expected}")
        if objective.name == "mean_flow" and not self.model.target:
            expected = "expected 'later' or 'all' with objective.name = 'mean_flow', whose model reads a target time"
            raise UsageError(f"model.target: found '', {expected}")
        null_trained = (self.model.classes or self.model.text) and self.train.cond_dropout
        if objective.name == "mean_flow" and objective.guidance != 1.0 and not null_trained:
            expected = "expected 1 without a trained null condition (train.cond_dropout, model.classes or model.text)"
            raise UsageError(f"objective.guidance: found {objective.guidance:g}, {expected}")
        if objective.taught and self.sweep.budgets:
            why = "a sweep's cells begin without the weights of a teacher"
            raise UsageError(
                f"objective.name: found {objective.name!r}, expected '' or 'mean_flow' with sweep.budgets: {why}"
            )
        if objective.name == "progressive" and self.train.steps < needed:
            expected = f"expected at least {needed}, objective.rounds x objective.round_steps"
            raise UsageError(f"train.steps: found {self.train.steps}, {expected}")


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


def template(cfg: Config | None = None) -> ml_collections.ConfigDict:
    """ConfigDict of a config, by default of all defaults: the starting point of a config file. It is locked: a new key is an error.

    It also has the keys of RENAMED, each one value under two names.
    """
    values = ml_collections.ConfigDict(to_dict(cfg or Config()), type_safe=False)
    for group, old, new in RENAMED:
        values[group][old] = values[group].get_ref(new)
    return values.lock()


def resolve(values: object) -> Config:
    """Builds a Config from a nested mapping (ConfigDict or JSON). Raises UsageError with the key, the value found and the expected."""
    return build(Config, _renamed(values.to_dict() if isinstance(values, ml_collections.ConfigDict) else values), "")


def _renamed(values: object) -> object:
    """Give the keys of RENAMED their new names. Raises UsageError for both names with two values."""
    for group, old, new in RENAMED:
        found = values.get(group) if isinstance(values, Mapping) else None
        if isinstance(found, Mapping) and old in found:
            if shown(found.get(new, found[old])) != shown(found[old]):
                both = f"found {shown(found[old])}, and {group}.{new} = {shown(found[new])}"
                raise UsageError(f"{group}.{old}: {both}, expected {group}.{new} alone, which is its new name")
            kept = {key: value for key, value in found.items() if key != old}
            values = {**values, group: {new: found[old], **kept}}
    return values
