"""One type for a fit of any method: laws of compute, their resamples, and the loss that a run of any size and data is expected to have.

A method is one file: it makes a `Problem` of the runs, which knows the losses of its curve at the very runs and how to fit losses anew.
`run` takes from that the laws, and from losses simulated about the curve (`bootstrap`) their intervals and their bias.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dit_jax.scaling.runs import Run

INSIDE = 1.05  # times the largest compute of the fit, up to which a prediction counts as inside the data
NO_INTERVAL = (math.nan, math.nan)


@dataclass(frozen=True)
class Point:
    """The optimum of one budget: training FLOPs, parameters, tokens and loss there, with the standard errors of log N_opt and of the loss
    that the noise of the runs causes. `problem` says why the laws do not use it; "" = they do."""

    label: str
    flops: float
    runs: tuple
    n_opt: float = math.nan
    d_opt: float = math.nan
    loss: float = math.nan
    n_se: float = math.nan
    loss_se: float = math.nan
    problem: str = ""


@dataclass(frozen=True)
class Estimate:
    """What one fit of losses gives, every entry of an array being one set of losses: laws of compute, the expected loss of a run
    (params, tokens), and the parameters of the method's own law, if it has one. `kept` (m,) says which sets gave laws at all."""

    laws: dict  # N_opt, D_opt, L_opt -> PowerLaw
    loss: Callable
    parameters: dict = field(default_factory=dict)
    kept: np.ndarray | None = None


@dataclass(frozen=True)
class Fit:
    """Laws of compute fitted to runs, and how far to trust them. C in training FLOPs, N in active parameters, D in tokens.

    `laws` holds N_opt, D_opt and L_opt as power laws of C; `draws` the same names, every law with one array entry per resample. Both lack
    what the method cannot tell. `loss(params, tokens)` is the expected loss of a run, `loss_draws` its resamples. No caller asks for the
    method: what only one of them can say stands in `notes`, `tables` and `details`.
    """

    method: str
    runs: tuple  # those that were fitted
    laws: dict
    draws: dict
    loss: Callable
    loss_draws: Callable | None
    noise: float  # standard deviation of a run's loss about the curve
    noise_draws: np.ndarray
    k: float  # FLOPs per parameter and token, geometric mean over the runs
    objective: float  # what the search made least
    level: float
    resamples: int
    points: tuple = ()  # Point of each budget, in order of compute; () of a method that has none
    parameters: dict = field(default_factory=dict)  # of the method's own law: E, A, B, alpha, beta
    parameter_draws: dict = field(default_factory=dict)
    degenerate: int = 0  # resamples that gave no laws
    reasons: tuple = ()  # why the runs do not identify the laws; () = they do
    notes: tuple = ()  # what a reader should know besides
    form: float = (
        math.nan
    )  # the chance of residuals as systematic as these, were the curve of the right form; nan = not tested
    beyond: str = ""  # why L_opt beyond the data may not be given; "" = it may
    tables: tuple = ()  # (title, head, rows) of text that the method prints
    details: dict = field(default_factory=dict)  # what the method adds to the JSON

    @property
    def identified(self) -> bool:
        return not self.reasons

    @property
    def warnings(self) -> tuple:
        """Reasons first, then notes."""
        return (*self.reasons, *self.notes)

    @property
    def used(self) -> tuple:
        """The points that the laws use."""
        return tuple(p for p in self.points if not p.problem)

    @property
    def largest(self) -> float:
        """Training FLOPs of the largest budget or run that the laws use."""
        return max(p.flops for p in self.used or self.runs)

    def interval(self, values) -> tuple:
        """The central percentiles of resamples; (nan, nan) of none."""
        return interval(values, self.level)

    def exponent(self, name: str) -> tuple:
        """(exponent of a law, its interval)."""
        drawn = self.draws.get(name)
        return float(self.laws[name].exponent), self.interval(drawn.exponent if drawn else None)


def interval(values, level: float) -> tuple:
    """The central percentiles of `values`; (nan, nan) of none."""
    if values is None or len(values) == 0:
        return NO_INTERVAL
    tail = (1 - level) / 2
    with np.errstate(invalid="ignore"):  # of a law that is not determined some values are infinite
        low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def predict(fit: Fit, flops: float | int, params: float | int | None = None) -> dict:
    """N_opt, D_opt, L_opt and D/N at `flops` with intervals, and the expected loss of one run there of `params` (None = N_opt).

    `L_run_interval` holds the noise of a run as well. `beyond` is the multiple of the largest compute fitted. L_opt and L_run are nan where
    the fit says that it cannot tell them (`Fit.beyond`).
    """
    out = {"flops": float(flops), "beyond": float(flops / fit.largest)}
    silent = fit.beyond if flops > INSIDE * fit.largest else ""
    draws = {name: law(flops) for name, law in fit.draws.items()}
    for name in ("N_opt", "D_opt", "L_opt"):
        law = fit.laws.get(name)
        none = law is None or (name == "L_opt" and silent)
        out[name] = math.nan if none else float(law(flops))
        out[f"{name}_interval"] = NO_INTERVAL if none else fit.interval(draws.get(name))
    with np.errstate(all="ignore"):
        out["D_over_N"] = float(np.divide(out["D_opt"], out["N_opt"]))
        ratio = draws["D_opt"] / draws["N_opt"] if "D_opt" in draws else None
    out["D_over_N_interval"] = fit.interval(ratio)
    out["params"] = float(out["N_opt"] if params is None else params)
    out["L_run"], out["L_run_interval"] = math.nan, NO_INTERVAL
    if out["params"] > 0 and math.isfinite(out["params"]) and not silent:
        tokens = flops / (fit.k * out["params"])
        out["L_run"] = float(fit.loss(out["params"], tokens))
        if fit.loss_draws is not None and len(fit.noise_draws):
            noise = fit.noise_draws * np.random.default_rng(0).standard_normal(len(fit.noise_draws))
            out["L_run_interval"] = fit.interval(fit.loss_draws(out["params"], tokens) + noise)
    if silent:
        out["L_opt_reason"] = silent
    return out


def per_parameter_and_token(runs: Sequence[Run]) -> float:
    """k of C = k N D, the geometric mean over the runs."""
    return float(np.exp(np.mean([math.log(r.flops / (r.params * r.tokens)) for r in runs])))


def plain(law):
    """A law of arrays of one element, as a law of floats."""
    return type(law)(**{name: float(np.asarray(value).ravel()[0]) for name, value in vars(law).items()})
