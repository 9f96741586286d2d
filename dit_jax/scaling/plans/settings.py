"""Where the settings of a planned run come from: a config file, the configs of the runs that were fitted, or a published model."""

import json
import math
import os
import shlex
from collections.abc import Sequence
from concurrent import futures
from dataclasses import dataclass, field, replace

import numpy as np

from dit_jax.config import Config, ModelConfig, model_config, resolve, to_dict
from dit_jax.error import UsageError
from dit_jax.files import is_file
from dit_jax.job.launch import load_config
from dit_jax.scaling.plans.family import DIT, Family, family_of
from dit_jax.scaling.runs import Run, flatten
from dit_jax.scaling.runs.load import OBJECT
from dit_jax.workdir.folder import read_config

ASSUMED, BATCH = "DiT-XL/2", 256
FILES = {("digits", 8): "configs/digits.py", ("imagenet2012", 256): "configs/imagenet256.py"}  # (dataset, pixels)
FILES[("imagenet2012", 512)] = "configs/imagenet512.py"
SIZE = ("depth", "width", "heads", "unroll")  # what a plan changes in a model
STUDY = ("model.", "diffusion.", "data.", "optim.", "autoencoder.", "train.cond_dropout")  # settings that make a run
LOCAL = ("data.data_dir", "data.workers", "data.prefetch", "data.cache")  # of these, what belongs to a machine
SAME_RATE = 0.01  # learning rates this near to a power of the width are one


@dataclass(frozen=True)
class Settings:
    """What a planned run has besides its size and length. `file` is the config that its command starts from."""

    model: ModelConfig
    batch: int
    family: Family
    source: str  # in words
    file: str = ""
    config: Config | None = None  # all settings, where they are known
    rate: tuple = ()  # (learning rate at width 1, power of the width), where the runs' follow one
    seen: dict = field(default_factory=dict)  # the largest depth, width and steps of the runs' configs
    warnings: tuple = field(default=(), compare=False)

    def learning_rate(self, model: ModelConfig) -> float | None:
        """The rate of a model of these settings; None if no config is known."""
        if self.rate:
            return float(f"{self.rate[0] * model.width ** self.rate[1]:.4g}")
        return self.config and self.config.optim.learning_rate


def configs_of(runs: Sequence[Run]) -> list[tuple[Run, Config]]:
    """The runs whose folder holds their config.json, with it. Raises UsageError where one cannot be read."""
    first: dict = {}
    for run in runs:
        if match := OBJECT.fullmatch(run.source.rpartition(":")[0]):
            first.setdefault(match[1] or ".", run)
    with futures.ThreadPoolExecutor(8) as pool:
        configs = list(pool.map(_config, first))
    return [(run, config) for run, config in zip(first.values(), configs, strict=True) if config]


def _config(folder: str) -> Config | None:
    return read_config(folder) if is_file(os.path.join(folder, "config.json")) else None


def settings(runs: Sequence[Run], file: str = "", name: str = "", size: int = 0, batch: int = 0) -> Settings:
    """Settings from `file`, a published model's `name` (at `size` pixels, 0 = 256), the runs' own configs or, failing these, DiT-XL/2's, in
    this order. `batch` 0 = that of the config, else 256."""
    known = configs_of(sorted(runs, key=lambda r: -r.flops))
    models = [config.model for _, config in known]
    family = family_of(models) if len({(m.width, m.depth) for m in models}) > 1 else DIT
    if file and name:
        raise UsageError("--config, --model: found both, expected one")
    if size and (file or (known and not name)):
        raise UsageError("--image_size: found it with the settings of a config, expected --model")
    if file:
        config = read(file)
        found = Settings(config.model, config.train.batch_size, family, file, file, config)
    elif known and not name:
        found = _of_runs(known, family)
    else:
        found = _published(name, size or 256, family)
    seen = {k: max(getattr(m, k) for m in models) for k in ("depth", "width") if models}
    seen |= {"steps": max(config.train.steps for _, config in known)} if known else {}
    return replace(found, batch=batch or found.batch, seen=seen)


def read(file: str) -> Config:
    """The config of a file of configs/, with :ARG where it takes one."""
    try:
        return resolve(load_config(file))
    except UsageError:
        raise
    except Exception as error:  # it is a program, which may raise anything
        raise UsageError(f"--config: {file} cannot be read: {type(error).__name__}: {error}") from None


def at_hand(file: str) -> Config | None:
    """The config of a file that may not be here, or not be this project's."""
    try:
        return read(file) if os.path.isfile(file.partition(":")[0]) else None
    except UsageError:
        return None


def _published(name: str, size: int, family: Family) -> Settings:
    """A model of the DiT paper, and its config file if that is at hand."""
    model, file = model_config(name or ASSUMED, size), FILES.get(("imagenet2012", size), "")
    file = f"{file}:{name or ASSUMED}" if file else ""
    assumed = "" if name else ", since neither RUNS nor --config nor --model say otherwise"
    source, config = f"{name or ASSUMED} at {size} pixels{assumed}", at_hand(file)
    if config is None:
        return Settings(model, BATCH, family, source, file)
    return Settings(config.model, config.train.batch_size, family, source, file, config)


def _of_runs(known: list[tuple[Run, Config]], family: Family) -> Settings:
    """The settings of the first, the largest, of these runs."""
    (run, config), rate = known[0], _rate(known)
    text = f"the learning rates of RUNS follow no power of the width; the plan takes that of {run.name}"
    file = FILES.get((config.data.name, config.data.image_size), "")
    source, warnings = f"config.json of RUNS ({run.name})", () if rate else (text,)
    return Settings(config.model, config.train.batch_size, family, source, file, config, rate, warnings=warnings)


def _rate(known: list[tuple[Run, Config]]) -> tuple:
    """(coefficient, power) of the learning rate in the width; () if the runs' follow none."""
    width = np.log([c.model.width for _, c in known])
    rate = np.log([c.optim.learning_rate or 1e-30 for _, c in known])
    if np.ptp(rate) < SAME_RATE:
        return math.exp(rate.mean()), 0.0
    if np.ptp(width) == 0:
        return ()
    power, start = np.polyfit(width, rate, 1)
    off = np.abs(rate - start - power * width).max()
    return () if off > SAME_RATE else (math.exp(start), float(power))


def command(given: Settings, model: ModelConfig, steps: int, workdir: str) -> str:
    """The command that trains a planned run. Settings that the config file has already are left out, if it is at hand to be compared."""
    config = given.config or Config()
    train = replace(config.train, steps=steps, batch_size=given.batch)
    optim = replace(config.optim, learning_rate=given.learning_rate(model)) if given.rate else config.optim
    wanted = flatten(to_dict(replace(config, model=model, train=train, optim=optim)))
    keys = [f"model.{name}" for name in SIZE[:3]] + ["train.steps", "train.batch_size"]
    file = at_hand(given.file) if given.config else None
    if file:
        have = flatten(to_dict(file))
        changed = [k for k in wanted if k.startswith(STUDY) and not k.startswith(LOCAL) and wanted[k] != have[k]]
        keys += [k for k in changed if k not in keys]
    else:
        keys += ["optim.learning_rate"] if given.rate else []
        keys += [f"model.{k}" for k in ("patch", "input_size", "channels", "classes", "conditioning", "learn_sigma")]
    values = {k: json.dumps(wanted[k]) if isinstance(wanted[k], float) else wanted[k] for k in keys}
    words = [f"--config={given.file or 'CONFIG.py'}", *(f"--config.{key}={value}" for key, value in values.items())]
    return shlex.join(["python", "-m", "dit_jax.train", *words, f"--workdir={workdir}"])
