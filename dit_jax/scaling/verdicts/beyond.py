"""Whether a fit may speak of compute beyond its data: the same tests behind every command.

A power law that bends is still a good description of the budgets it was fitted to, and a wrong one beyond them. So each fit is tested for

* bending: the coefficient of log^2 C in log N_opt, and in the reducible part of L_opt, through the optima of the budgets, each weighed by
  the noise of its runs and by the scatter between budgets that is left about the bent law (a random effect: what scatters does not bend);
* repeated data, where a column of unique data tells of them (`fits.repeated`);
* systematic residuals, where one surface describes all runs (`Fit.form`);
* its budgets: two of them lie on any power law of compute;
* its ends: the laws without the smallest and without the largest budget must agree at the target within their intervals.

Where any of these fails the laws are not identified beyond the data, and the reason says what was found.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import special

from dit_jax.error import UsageError
from dit_jax.scaling.fits import bootstrap, fit_varpro
from dit_jax.scaling.fits.fit import Fit, predict
from dit_jax.scaling.runs import Run, budgets, scattered

CHANCE = 0.01  # of a test in words of which the laws would hold
ODD = 0.05  # of the scatter about the bent law, below which it is more than the noise of the runs
FAR = 10.0  # times the largest compute: where the ends are compared, if nothing is asked for
RESAMPLES = 100  # of the refits without an end
PARTS = 5  # of scattered runs, by compute: the first and the last are their ends
ROUNDING = 1e-6  # of a prediction, up to which ends of runs without noise may differ
NOT = "not identified beyond the data: "


@dataclass(frozen=True)
class Trial:
    """One test: what it looks at, its result in words, and whether it failed."""

    name: str
    found: str
    fails: bool


def examine(fit: Fit, refit: Callable[[Sequence[Run]], Fit], flops: float | int = 0.0) -> Fit:
    """The fit with a reason for each trial that failed. `refit` fits other runs in the same way, `flops` is the farthest compute asked for
    (0: ten times the data)."""
    failed = tuple(NOT + t.found for t in trials(fit, refit, flops) if t.fails)
    return replace(fit, reasons=(*fit.reasons, *failed)) if failed else fit


def trials(fit: Fit, refit: Callable[[Sequence[Run]], Fit], flops: float | int = 0.0) -> list[Trial]:
    """Every test that this fit allows."""
    found = [two_budgets(fit), bending_of_size(fit), bending_of_loss(fit), form(fit), repetition(fit)]
    if fit.draws:
        found += ends(fit, refit, max(flops, FAR * fit.largest))
    return [t for t in found if t is not None]


def two_budgets(fit: Fit) -> Trial:
    """Laws of compute through fewer budgets than tell whether they hold."""
    count = len(_parts(fit))
    return Trial("two budgets", f"{count} budget(s) test no law of compute; train a third", count < 3)


def bending_of_size(fit: Fit) -> Trial | None:
    """log^2 C in log N_opt."""
    if "N_opt" not in fit.laws or len(fit.used) < 4:
        return None
    x = np.log([p.flops for p in fit.used])
    x = x - x.mean()
    y, error = np.log([p.n_opt for p in fit.used]), np.array([p.n_se for p in fit.used])
    found = _extra(y, np.stack([np.ones_like(x), x], 1), x * x, error)
    if found is None:
        return None
    bend, p = found
    decade = 2 * bend * math.log(10)
    text = f"the exponent of N_opt changes by {decade:+.2f} a decade of compute (log^2 C, p = {p:.1g})"
    return Trial("bending of N_opt", text, p < CHANCE)


def bending_of_loss(fit: Fit) -> Trial | None:
    """log^2 C in the reducible part of L_opt, the law's own parameters free."""
    law = fit.laws["L_opt"]
    if len(fit.used) < 5 or not law.irreducible:
        return None
    x = np.log([p.flops for p in fit.used])
    reducible = law.coefficient * np.exp(law.exponent * x)
    x = x - x.mean()
    y = np.array([p.loss for p in fit.used]) - law(np.array([p.flops for p in fit.used]))
    design = np.stack([np.ones_like(x), reducible, reducible * x], 1)
    found = _extra(y, design, reducible * x * x, np.array([p.loss_se for p in fit.used]))
    if found is None:
        return None
    bend, p = found
    text = f"the exponent of the reducible loss changes by {2 * bend * math.log(10):+.3f} a decade of compute (log^2 C, p = {p:.1g})"
    return Trial("bending of L_opt", text, p < CHANCE)


def _extra(y: np.ndarray, design: np.ndarray, more: np.ndarray, error: np.ndarray) -> tuple | None:
    """(coefficient of `more` (j,) beside `design` (j, p) in y (j,), the chance of one as large by noise and by the scatter that is left);
    None where the errors (j,) are not known."""
    if not (np.isfinite(error).all() and (error > 0).all()):
        return None
    full = np.concatenate([design, more[:, None]], axis=1)
    full = full / np.abs(full).max(0)
    if np.linalg.matrix_rank(full) < full.shape[1]:
        return None
    left, tau2 = len(y) - full.shape[1], 0.0
    if left > 0:
        solve = np.linalg.lstsq(full / error[:, None], y / error, rcond=None)[0]
        q = float((((y - full @ solve) / error) ** 2).sum())
        tau2 = bootstrap.between(y, full, error**2) if special.chdtrc(left, q) < ODD else 0.0
    weight = 1 / (error**2 + tau2)
    covariance = np.linalg.inv(full.T @ (weight[:, None] * full))
    value = float((covariance @ (full.T @ (weight * y)))[-1])
    z = abs(value) / math.sqrt(covariance[-1, -1])
    p = float(2 * (special.stdtr(left, -z) if tau2 > 0 else special.ndtr(-z)))
    return value / float(np.abs(more).max()), p


def form(fit: Fit) -> Trial | None:
    """Systematic residuals about one surface."""
    if math.isnan(fit.form):
        return None
    text = f"the residuals are systematic (F test of squares and a product of log N and log D, p = {fit.form:.1g})"
    return Trial("form of the surface", text, fit.form < CHANCE)


def repetition(fit: Fit) -> Trial | None:
    """Data that were seen more than once, and lost their worth, where the fit counts all as new."""
    if not any(r.unique < 0.99 * r.tokens for r in fit.runs) or "R_star" in fit.parameters:
        return None
    try:
        better = "R_star" in fit_varpro(fit.runs, resamples=0).parameters
    except UsageError:
        return None
    most = max(r.tokens / r.unique for r in fit.runs if r.unique > 0)
    text = f"the runs repeat their data up to {most:.3g} times, and repeated data count for less in them; fit --method=varpro"
    return Trial("repeated data", text, better)


def ends(fit: Fit, refit: Callable[[Sequence[Run]], Fit], flops: float | int) -> list[Trial]:
    """The laws at `flops` without the smallest and without the largest budget."""
    parts = _parts(fit)
    if len(parts) < 4:
        return []
    try:
        without = [refit([r for part in some for r in part]) for some in (parts[1:], parts[:-1])]
    except UsageError:
        return []
    said, found = [predict(f, flops) for f in without], []
    for name, digits in (("N_opt", ".3g"), ("L_opt", ".4f")):
        (low, high), (lower, higher) = (s[f"{name}_interval"] for s in said)
        if not all(map(math.isfinite, (low, high, lower, higher))):
            continue
        text = (
            f"{name} at {flops:.3g} FLOPs is {said[0][name]:{digits}} without the smallest budget and {said[1][name]:{digits}} without the "
            "largest, beyond their intervals"
        )
        apart = max(lower - high, low - higher) > ROUNDING * said[0][name]
        found.append(Trial(f"ends, {name}", text, apart))
    return found


def _parts(fit: Fit) -> list:
    """The runs by budget in order of compute; scattered ones in parts of as many runs."""
    if fit.used:
        return [p.runs for p in fit.used]
    groups = budgets(fit.runs)
    if not scattered(groups):
        return [members for _, members in sorted(groups, key=lambda g: g[1][0].flops)]
    ordered = sorted(fit.runs, key=lambda r: r.flops)
    return [[ordered[i] for i in part] for part in np.array_split(np.arange(len(ordered)), PARTS)]


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
    multiple: float  # of the largest compute of the fit

    @property
    def inside(self) -> bool:
        return self.interval[0] <= self.measured <= self.interval[1]


def extrapolate(fit: Fit, run: Run) -> Extrapolation:
    """A trained run against what the fit expected of its size and compute."""
    said = predict(fit, run.flops, run.params)
    names = {"n_opt": "N_opt", "n_interval": "N_opt_interval", "predicted": "L_run", "interval": "L_run_interval"}
    found = {ours: said[theirs] for ours, theirs in names.items()}
    return Extrapolation(
        run.flops, run.params, **found, measured=run.loss, measured_se=run.loss_se, multiple=said["beyond"]
    )
