"""From a fit and a budget to a run one can start: a model that exists, its steps, the loss to expect and what a wrong size costs.

N and D are those of the fit's convention; FLOPs of the run are exact (`dit_jax.flops`), whatever the fit's C counts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dit_jax import flops
from dit_jax.config import ModelConfig
from dit_jax.error import UsageError
from dit_jax.scaling.fits.fit import Fit, predict
from dit_jax.scaling.plans.family import sized
from dit_jax.scaling.plans.overhead import FACTOR, off_by
from dit_jax.scaling.plans.settings import Settings, command
from dit_jax.scaling.runs import Run
from dit_jax.scaling.runs.conventions import Convention

ROUNDED = 1e-3  # of the tokens an image, as far as rounded numbers of images may be off
UNLIKE = 1.25  # FLOPs per parameter and token, planned over fitted, above which the two are not the same study
ROUNDS = 4  # of finding the model of an exact budget, whose C in 6ND depends on the model


@dataclass(frozen=True)
class Recipe:
    """A run for a budget. `flops` is C as the fit counts it, `flops_train` the run's own exact FLOPs.

    `loss_interval` holds the noise of a run, `off` what sizes cost that are half and twice the best.
    """

    flops: float
    flops_train: float
    beyond: float  # multiple of the largest budget fitted
    n_opt: float
    n_interval: tuple
    d_opt: float
    d_interval: tuple
    model: ModelConfig
    n: float  # of the model, as the fit counts
    params: int  # trainable
    params_active: int
    steps: int
    batch: int
    images: int
    tokens: int
    loss: float
    loss_interval: tuple
    off: tuple  # of Off
    command: str
    warnings: tuple

    @property
    def over(self) -> float:
        """The model's size over N_opt."""
        return self.n / self.n_opt

    @property
    def name(self) -> str:
        return f"w{self.model.width}-d{self.model.depth}"


def count_of(convention: Convention):
    """ModelConfig -> N as the convention counts it."""
    return flops.active_parameters if convention.params == "active" else flops.parameters


def counted_flops(convention: Convention, model: ModelConfig, images: float | int) -> float:
    """C of training `model` on `images`, as the convention counts it."""
    if convention.counted == "exact":
        return float(flops.train_flops(model)) * images
    return 6.0 * count_of(convention)(model) * model.tokens * images


def make_recipe(fit: Fit, budget: float | int, given: Settings, runs: Sequence[Run], exact: bool = False) -> Recipe:
    """The run that the fit recommends for `budget`: FLOPs as the fit's C counts them, or `exact` ones, of a machine.

    Raises UsageError if the budget does not buy one step.
    """
    convention, model, c = runs[0].convention, given.model, float(budget)
    count = count_of(convention)
    for _ in range(ROUNDS if exact and convention.counted != "exact" else 1):
        model = sized(given.family, predict(fit, c)["N_opt"], given.model, count)
        per_image = counted_flops(convention, model, 1)
        c = float(budget) / flops.train_flops(model) * per_image if exact else c
    steps = round(c / per_image / given.batch)
    if steps < 1:
        raise UsageError(
            f"--batch: {budget:.3g} FLOPs buy {c / per_image:.3g} images of the recommended model, less than a batch of {given.batch}"
        )
    images, n = steps * given.batch, float(count(model))
    said, workdir = predict(fit, c, n), f"runs/C{c:.2e}-w{model.width}-d{model.depth}".replace("+", "")
    silent = said.get("L_opt_reason")
    return Recipe(
        flops=c,
        flops_train=float(flops.train_flops(model, images)),
        beyond=said["beyond"],
        n_opt=said["N_opt"],
        n_interval=said["N_opt_interval"],
        d_opt=said["D_opt"],
        d_interval=said["D_opt_interval"],
        model=model,
        n=n,
        params=flops.parameters(model),
        params_active=flops.active_parameters(model),
        steps=steps,
        batch=given.batch,
        images=images,
        tokens=images * model.tokens,
        loss=said["L_run"],
        loss_interval=said["L_run_interval"],
        off=tuple(off_by(fit, c, factor) for factor in (1 / FACTOR, FACTOR)),
        command=command(given, model, steps, workdir),
        warnings=(
            *given.warnings,
            *((f"no loss is expected of this run: {silent}",) if silent else ()),
            *_cautions(c, model, n, said, runs),
        ),
    )


def _cautions(c: float, model: ModelConfig, n: float, said: dict, runs: Sequence[Run]) -> list[str]:
    """How the planned run is unlike those that were fitted."""
    found, convention, over = [], runs[0].convention, n / said["N_opt"]
    known = [r for r in runs if r.images == r.images] if convention.data == "tokens" else []
    per_image = sorted({float(f"{r.tokens / r.images:.3g}") for r in known})
    if any(abs(r.tokens / r.images / model.tokens - 1) > ROUNDED for r in known):
        seen = f"{per_image[0]:g}" if len(per_image) == 1 else f"{per_image[0]:g} to {per_image[-1]:g}"
        found.append(
            f"the planned model has {model.tokens} tokens an image, RUNS {seen}: name their model, --config or --model"
        )
    a_datum = counted_flops(convention, model, 1) / n / (model.tokens if convention.data == "tokens" else 1)
    ratio = a_datum / (c / said["N_opt"] / said["D_opt"])
    if abs(math.log(ratio)) > math.log(UNLIKE):
        found.append(
            f"the planned model spends {ratio:.2f} times the FLOPs per parameter and {convention.data[:-1]} of RUNS: the law may not "
            "be its own"
        )
    if abs(math.log(over)) > math.log(1.1):
        found.append(f"no model of the family is nearer to N_opt than {over:.2f} times it")
    return found
