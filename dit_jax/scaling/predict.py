"""What a fit says about compute it has not seen, and how far off it was where it can be checked."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dit_jax.error import UsageError
from dit_jax.scaling.fit import Fit, fit_isoflop
from dit_jax.scaling.runs import Run, budgets, scattered

NO_INTERVAL = (math.nan, math.nan)


@dataclass(frozen=True)
class Prediction:
    """The largest budget, predicted from the others. Intervals are for what its own runs measure: law and vertex noise."""

    flops: float
    multiple: float  # of the largest budget in the fit
    n_opt: float
    n_interval: tuple
    n_measured: float
    loss: float
    loss_interval: tuple
    loss_measured: float

    @property
    def n_error(self) -> float:
        """Relative error of the predicted N_opt."""
        return self.n_opt / self.n_measured - 1

    @property
    def loss_error(self) -> float:
        return self.loss / self.loss_measured - 1


@dataclass(frozen=True)
class Extrapolation:
    """A model trained to test the law. The predicted loss is that of a run of its size, `interval` holds a run's noise."""

    flops: float
    params: float  # active per token
    n_opt: float
    n_interval: tuple
    predicted: float
    interval: tuple
    measured: float
    measured_se: float
    multiple: float  # of the largest budget in the fit

    @property
    def inside(self) -> bool:
        return self.interval[0] <= self.measured <= self.interval[1]


def interval(values, level: float) -> tuple:
    """The central percentiles of `values`; (nan, nan) of none."""
    if values is None or len(values) == 0:
        return NO_INTERVAL
    tail = (1 - level) / 2
    with np.errstate(invalid="ignore"):  # of a law that is not determined some values are infinite
        low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def predict(fit: Fit, flops: float | int, params: float | int | None = None) -> dict:
    """N_opt, D_opt and L_opt at `flops` with intervals, and the expected loss of one run there.

    `L_run` is the loss of a run of `params` (None = N_opt): that of a surface, else L_opt plus what the median curvature of the
    parabolas charges for the distance to N_opt; its interval also holds the noise of a run, and how the parabolas' own curvatures
    scatter about the median one. `beyond` is the multiple of the largest
    budget fitted.
    """
    if not (math.isfinite(flops) and flops > 0):
        raise UsageError(f"--flops: found {flops!r}, expected a number above 0")
    out = {"flops": float(flops), "beyond": float(flops / fit.largest)}
    draws = {name: law(flops) for name, law in fit.draws.items()}
    for name in ("N_opt", "D_opt", "L_opt"):
        out[name] = float(fit.laws[name](flops))
        out[f"{name}_interval"] = interval(draws.get(name), fit.level)
    out["D_over_N"] = out["D_opt"] / out["N_opt"] if out["N_opt"] > 0 else math.nan
    with np.errstate(all="ignore"):
        ratio = draws["D_opt"] / draws["N_opt"] if draws else None
    out["D_over_N_interval"] = interval(ratio, fit.level)
    params = out["N_opt"] if params is None else float(params)
    out["params"] = params
    sized = params > 0 and 0 < out["N_opt"] < math.inf  # a law that is not determined may say 0 or infinity
    out["L_run"], runs = _one_run(fit, out, draws, params) if sized else (math.nan, None)
    out["L_run_interval"] = interval(runs, fit.level)
    return out


def _one_run(fit: Fit, said: dict, draws: dict, params: float) -> tuple:
    """(expected loss of a run of `params`, its resamples with the noise of a run or None)."""
    away = math.log(params / said["N_opt"])
    noise = fit.noise_draws * np.random.default_rng(0).standard_normal(len(fit.noise_draws))
    if hasattr(fit, "surface"):
        tokens = said["flops"] / (fit.k * params)
        return fit.surface(params, tokens), fit.surfaces(params, tokens) + noise if draws else None
    if not draws:
        return said["L_opt"] + fit.curvature * away**2, None
    far = np.log(params / draws["N_opt"]) if params != said["N_opt"] else 0.0
    curvature = fit.curvature
    if fit.curvature:  # of a budget of its own, as those of the fit are
        scatter = np.random.default_rng(2).standard_t(len(fit.used) - 1, len(fit.noise_draws))
        curvature = np.maximum(curvature + fit.curvature_scatter * scatter, 0.0)
    return said["L_opt"] + fit.curvature * away**2, draws["L_opt"] + curvature * far**2 + noise


def extrapolate(fit: Fit, run: Run) -> Extrapolation:
    """A trained run against what the fit expected of its size and compute."""
    said = predict(fit, run.flops, run.params)
    return Extrapolation(
        flops=run.flops,
        params=run.params,
        n_opt=said["N_opt"],
        n_interval=said["N_opt_interval"],
        predicted=said["L_run"],
        interval=said["L_run_interval"],
        measured=run.loss,
        measured_se=run.loss_se,
        multiple=said["beyond"],
    )


def holdout_largest(runs: Sequence[Run], **options) -> Prediction | None:
    """Fits without the largest usable budget and predicts its vertex; None with fewer than 3 usable budgets, or of scattered runs."""
    whole = fit_isoflop(runs, **{**options, "resamples": 0})
    if len(whole.used) < 3 or scattered(budgets(runs)):
        return None
    last = whole.used[-1]
    left = {id(r) for b in whole.budgets if b.label != last.label and b.flops < last.flops for r in b.runs}
    fit = fit_isoflop([r for r in runs if id(r) in left], **options)
    said = predict(fit, last.flops)
    n = loss = None
    if fit.draws:
        own = fit.noise_draws * np.random.default_rng(1).standard_normal((2, len(fit.noise_draws)))
        n = fit.draws["N_opt"](last.flops) * np.exp(own[0] * math.sqrt(last.var_n))
        loss = fit.draws["L_opt"](last.flops) + own[1] * math.sqrt(last.var_loss)
    return Prediction(
        flops=last.flops,
        multiple=said["beyond"],
        n_opt=said["N_opt"],
        n_interval=interval(n, fit.level),
        n_measured=last.n_opt,
        loss=said["L_opt"],
        loss_interval=interval(loss, fit.level),
        loss_measured=last.loss,
    )
