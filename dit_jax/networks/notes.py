"""What the published names of a DiT cannot say: the run's config, noted in the metadata of an exported file and read back."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from dit_jax.config import Config, DiffusionConfig, ModelConfig, resolve, to_dict
from dit_jax.error import UsageError
from dit_jax.files import parse_json
from dit_jax.job.launch import CONFIGS, load_config

KEY = "dit_jax"
GROUPS = ("model", "diffusion", "data", "train", "optim", "sample", "autoencoder", "eval")
LOCAL = (
    ("data", "data_dir"),
    ("data", "folder"),
    ("data", "latents"),
    ("data", "captions"),
    ("model", "text_encoder"),
    ("autoencoder", "folder"),
    ("eval", "inception"),
    ("eval", "reference"),
    ("sample", "guide"),
)


@dataclass(frozen=True)
class Notes:
    """The run of exported weights: its config without paths, the step, and whether the null row is trained."""

    config: Config
    step: int
    null: bool


def space(cfg: Config) -> str:
    """Return what a model sees."""
    return "pixels" if cfg.model.input_size == cfg.data.image_size and not cfg.autoencoder.folder else "latents"


def write(cfg: Config, step: int) -> dict[str, str]:
    """Return the metadata of a safetensors file."""
    config = {group: value for group, value in to_dict(cfg).items() if group in GROUPS}
    for group, name in LOCAL:
        config[group][name] = ""
    found = {"config": config, "step": step, "null": bool(cfg.train.cond_dropout), "input": space(cfg)}
    return {KEY: json.dumps(found)}  # one key, because safetensors writes several in any order


def read(metadata: Mapping, where: str) -> Notes | None:
    """Return what `write` wrote, or None for a file without it. Raises UsageError naming the file if it is malformed."""
    if KEY not in metadata:
        return None
    try:
        found = parse_json(metadata[KEY].encode())
        config, step, null = found["config"], found["step"], found["null"]
        if type(step) is not int or step < 0 or type(null) is not bool:
            raise ValueError(f"found step {step!r} and null {null!r}, expected a number and true or false")
        return Notes(resolve(config), step, null)
    except (ValueError, TypeError, KeyError) as error:  # UsageErrors too
        raise UsageError(f"{where}: its notes ({KEY}): {error}") from None


def apply(stated: Notes | None, model: ModelConfig, null: bool, where: str) -> Config:
    """Return the run's config for a model read from tensors: as stated, else the paper's at 8 pixels a latent.

    Without a trained null class, train.cond_dropout is 0. Raises UsageError if the tensors are of another model than stated.
    """
    if stated:
        named = to_dict(stated.config.model)
        inferred = {
            key: value for key, value in to_dict(model).items() if key not in ("dtype", "attention", "remat", "unroll")
        }
        if other := [key for key, value in inferred.items() if named[key] != value]:
            found = f"found {named[other[0]]!r} in its notes, expected {inferred[other[0]]!r} by its tensors"
            raise UsageError(f"{where}: model.{other[0]}: {found} and the command")
        return stated.config
    pixels = 8 * model.input_size
    values = load_config(str(CONFIGS / ("imagenet512.py" if pixels == 512 else "imagenet256.py")))
    values.data.image_size = pixels
    values.model.update(to_dict(model))
    if not null:
        values.train.cond_dropout = 0.0
    return resolve(values)


def unsaid(cfg: Config, single: bool) -> list[str]:
    """Return what a reader of names alone would not know of a run; `single`: of the published file, else diffusers' folder."""
    found, default = [], DiffusionConfig()
    for key in ("process", "schedule", "timesteps", "prediction"):
        if getattr(cfg.diffusion, key) != getattr(default, key):
            found.append(f"diffusion.{key} is {getattr(cfg.diffusion, key)!r}")
    if space(cfg) == "pixels":
        found.append("the model sees pixels, not latents")
    if not single and not cfg.train.cond_dropout:
        found.append("the null row was never trained: it must be sampled at guidance 1")
    return found
