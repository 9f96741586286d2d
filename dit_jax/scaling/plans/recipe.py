"""From a fit and a budget to a run one can start: a model that exists, its steps, the loss to expect and what a wrong size costs.

N and D are those of the fit's convention; FLOPs of the run are exact (`dit_jax.flops`), whatever the fit's C counts.
"""

import math
from collections.abc import Sequence

from dit_jax import flops
from dit_jax.config import SIZES, ModelConfig
from dit_jax.error import UsageError
from dit_jax.scaling.fits.fit import Fit, predict
from dit_jax.scaling.fits.repeated import effective
from dit_jax.scaling.plans.family import DIT, sized
from dit_jax.scaling.plans.overhead import FACTOR, off_by
from dit_jax.scaling.plans.settings import Settings, command
from dit_jax.scaling.runs import Run
from dit_jax.scaling.runs.conventions import Convention

ROUNDED = 0.01  # of the tokens an image, as far as rounded numbers of images may be off
UNLIKE = 1.25  # FLOPs per parameter and token, planned over fitted, above which the two are not the same study
ROUNDS = 4  # of finding the model of an exact budget, whose C in 6ND depends on the model
PRACTICE = {
    "depth": max(depth for depth, _, _ in SIZES.values()),
    "steps": 7_000_000,
}  # of DiT-XL/2, the largest trained
OUTSIDE = 10.0  # times the deepest or longest of RUNS, from which a plan says so whatever practice has trained
R_STAR = 15.39  # Muennighoff et al. 2023 (arXiv 2305.16264): repetitions over which repeated data lose their worth


def count_of(convention: Convention):
    """ModelConfig -> N as the convention counts it."""
    return flops.active_parameters if convention.params == "active" else flops.parameters


def counted_flops(convention: Convention, model: ModelConfig, images: float | int) -> float:
    """C of training `model` on `images`, as the convention counts it."""
    if convention.counted == "exact":
        return float(flops.train_flops(model)) * images
    return 6.0 * count_of(convention)(model) * model.tokens * images


def make_recipe(
    fit: Fit,
    budget: float | int,
    given: Settings,
    runs: Sequence[Run],
    exact: bool = False,
    size: float = 0.0,
    unique: float = math.nan,
) -> dict:
    """The run that the fit recommends for `budget`: FLOPs as the fit's C counts them, or `exact` ones, of a machine.

    `size` is N (0: N_opt), `unique` how many different images there are. The result is JSON's but for `model` (a ModelConfig) and `off` (of
    Off, half and twice N_opt): `flops` is C as the fit counts it, `flops_train` the run's own exact FLOPs, `n` the model's size as the fit
    counts it, `loss_interval` holds the noise of a run; `epochs` and `repetition`, the rise of the loss because data repeat, are nan if
    `unique` is. Raises UsageError if the budget does not buy one step.
    """
    model, c, steps = _buildable(fit, float(budget), given, runs[0].convention, exact, size)
    count = count_of(runs[0].convention)
    images, n, name = steps * given.batch, float(count(model)), f"w{model.width}-d{model.depth}"
    said = predict(fit, c, n)
    repetition, assumed = _repetition(fit, n, c, images / unique)
    silent = [f"no loss is expected of this run: {said['L_opt_reason']}"] if "L_opt_reason" in said else []
    ours = {"n_opt": "N_opt", "d_opt": "D_opt", "loss": "L_run"}
    names = (
        {"beyond": "beyond"}
        | ours
        | {f"{k[0] if k != 'loss' else k}_interval": f"{v}_interval" for k, v in ours.items()}
    )
    return {key: said[theirs] for key, theirs in names.items()} | {
        "flops": c,
        "flops_train": float(flops.train_flops(model, images)),
        "name": name,
        "model": model,
        "n": n,
        "over": n / said["N_opt"],
        "params": flops.parameters(model),
        "params_active": flops.active_parameters(model),
        "steps": steps,
        "batch": given.batch,
        "learning_rate": given.learning_rate(model),
        "images": images,
        "tokens": images * model.tokens,
        "epochs": images / unique,
        "repetition": repetition,
        "off": [off_by(fit, c, factor) for factor in (1 / FACTOR, FACTOR)],
        "command": command(given, model, steps, f"runs/C{c:.2e}-{name}".replace("+", "")),
        "assumptions": [*_assumptions(given, model), *assumed],
        "warnings": [
            *given.warnings,
            *silent,
            *_cautions(c, model, n, size, said, runs),
            *outside(model, steps, given, count),
        ],
    }


def _buildable(fit: Fit, budget: float, given: Settings, convention: Convention, exact: bool, size: float) -> tuple:
    """(model, C as the fit counts it, steps)."""
    count, c = count_of(convention), budget
    for _ in range(ROUNDS if exact and convention.counted != "exact" else 1):
        model = sized(given.family, size or predict(fit, c)["N_opt"], given.model, count)
        per_image = counted_flops(convention, model, 1)
        c = budget / flops.train_flops(model) * per_image if exact else c
    steps = round(c / per_image / given.batch)
    if steps < 1:
        raise UsageError(
            f"--batch: {budget:.3g} FLOPs buy {c / per_image:.3g} images of the recommended model, less than a batch of {given.batch}"
        )
    return model, c, steps


def _assumptions(given: Settings, model: ModelConfig) -> tuple:
    """What the plan takes for granted: no fit of size and data tells the best batch and rate."""
    rate, of = given.learning_rate(model), "those of RUNS at every width" if given.rate else f"from {given.source}"
    text = "unknown (no config)" if rate is None else f"{rate:.4g}"
    text += f" (RUNS: as width^{given.rate[1]:.2f})" if given.rate and given.rate[1] else ""
    return (
        f"batch of {given.batch} images and learning rate {text}, {of}; the law takes them to stay good at this compute",
    )


def _repetition(fit: Fit, n: float, c: float, epochs: float) -> tuple:
    """(how much data that repeat raise the loss, what that assumes)."""
    if not epochs > 1:
        return (0.0 if epochs <= 1 else math.nan), ()
    again, d = fit.parameters.get("R_star", R_STAR), c / (fit.k * n)
    worth = float(effective(d, d / epochs, again))
    rise = float(fit.loss(n, worth)) - float(fit.loss(n, d))
    source = "fitted" if "R_star" in fit.parameters else "of language models"
    text = f"data seen {epochs:.3g} times are worth {worth / d * epochs:.3g} times (arXiv 2305.16264, eq. 5, R* = {again:.3g}, {source})"
    return rise, (text,)


def outside(model: ModelConfig, steps: int, given: Settings, count) -> list[str]:
    """How a run is far outside what RUNS or practice have trained, and what would be nearer."""
    found, planned = [], {"depth": model.depth, "steps": steps}
    for name, value in planned.items():
        usual, seen = PRACTICE[name], given.seen.get(name, math.inf)
        if not (value > usual and value > given.seen.get(name, 0)) and value <= OUTSIDE * seen:
            continue
        ratio = f"{value / usual:.3g}x DiT-XL/2's {usual:,}" if value > usual else ""
        ladder = f"{value / seen:.3g}x the largest of RUNS, {seen:,}" if seen < value else ""
        text = f"{name} {value:,} is outside what has been trained ({', '.join(filter(None, (ratio, ladder)))})"
        if name == "steps":
            batch = given.batch * 2 ** math.ceil(math.log2(value / (usual if value > usual else OUTSIDE * seen)))
            text += f"; --batch={batch} takes {steps * given.batch // batch:,} (its learning rate is to be found)"
        elif given.family.aspect < DIT.aspect:
            other = sized(DIT, count(model), given.model, count)
            text += f"; --family=dit makes it width {other.width}, depth {other.depth}"
        found.append(text)
    return found


def _cautions(c: float, model: ModelConfig, n: float, size: float, said: dict, runs: Sequence[Run]) -> list[str]:
    """How the planned run is unlike those that were fitted."""
    found, convention = [], runs[0].convention
    in_tokens = convention.data == "tokens"
    seen = {float(f"{r.tokens / r.images:.3g}") for r in runs if in_tokens and r.images == r.images}
    if any(abs(tokens / model.tokens - 1) > ROUNDED for tokens in seen):
        found.append(
            f"the planned model has {model.tokens} tokens an image, RUNS {' to '.join(f'{v:g}' for v in sorted({min(seen), max(seen)}))}: "
            "name their model, --config or --model"
        )
    a_datum = counted_flops(convention, model, 1) / n / (model.tokens if in_tokens else 1)
    ratio = a_datum / (c / said["N_opt"] / said["D_opt"])
    if abs(math.log(ratio)) > math.log(UNLIKE):
        text = f"the planned model spends {ratio:.2f} times the FLOPs per parameter and {convention.data[:-1]} of RUNS"
        found.append(f"{text}: the law may not be its own")
    off = n / (size or said["N_opt"])
    if abs(math.log(off)) > math.log(1.1):
        found.append(f"no model of the family is nearer than {off:.2f} times the size wanted")
    return found
