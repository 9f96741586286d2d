"""What a size other than the best costs: loss at the same compute, and the compute that makes up for it (Kaplan et al. 2020, arXiv
2001.08361, appendix B.4).

On a surface E + A / N^alpha + B / D^beta both terms decay alike along the optimum, so the rise of the loss at f x N_opt is a fixed share of
the reducible loss k C^-x at any compute. That share is read from the loss of the fit along C = k N D, at the budgets that it is made of
(median) if it has any. A size that stays f x N_opt(C) reaches the best loss with (1 + share)^(1 / x) times the compute.
"""

import math
from dataclasses import dataclass

import numpy as np

from dit_jax.scaling.fits.fit import NO_INTERVAL, Fit, predict

FACTOR = 2.0  # of a size that is off
MOST = 1e6  # times the compute: more is never made up for
ROUNDING = 1e-12  # of the loss: a smaller difference is none


@dataclass(frozen=True)
class Off:
    """A size that is `factor` times the best, at the same compute. `compute`: how many times the compute make up for it. `source`: from
    what it is read, or, if the numbers are nan, why it is not known."""

    factor: float
    params: float
    loss: float
    rise: float  # of the loss over the best
    rise_interval: tuple
    compute: float
    compute_interval: tuple
    source: str


def one_size(fit: Fit) -> str:
    """Why the fit cannot tell the loss of sizes other than the best; "" if it can."""
    best = float(fit.laws["N_opt"](fit.largest))
    losses = [float(fit.loss(n, fit.largest / (fit.k * n))) for n in (best / FACTOR, best, best * FACTOR)]
    if max(losses) - min(losses) > ROUNDING * max(losses):
        return ""
    return f"method {fit.method} tells the loss of the best size alone"


def off_by(fit: Fit, budget: float | int, factor: float) -> Off:
    """What a model of `factor` x N_opt costs at `budget` training FLOPs. The fit must have a law of N_opt."""
    said, law, laws = predict(fit, budget), fit.laws.get("L_opt"), fit.draws.get("L_opt")
    params, unknown = factor * said["N_opt"], said.get("L_opt_reason") or one_size(fit)
    if unknown or law is None:
        unknown = unknown or f"method {fit.method} has no law of the loss"
        return Off(factor, params, math.nan, math.nan, NO_INTERVAL, math.nan, NO_INTERVAL, unknown)
    at = [p.flops for p in fit.used] or [float(budget)]
    share, rises, computes = _share(fit.loss, fit.laws, fit.k, at, factor), None, None
    if laws is not None and fit.loss_draws is not None:
        shares = _share(fit.loss_draws, fit.draws, fit.k, at, factor)
        rises, computes = _finite(shares * _reducible(laws, budget)), _finite(_made_up(laws, shares))
    rise = float(share * _reducible(law, budget))
    return Off(
        factor=factor,
        params=params,
        loss=said["L_opt"] + rise,
        rise=rise,
        rise_interval=fit.interval(rises),
        compute=float(_made_up(law, share)),
        compute_interval=fit.interval(computes),
        source=f"the curves of the {len(at)} budgets" if fit.used else "the fitted law of loss in N and D",
    )


def _share(loss, laws: dict, k: float, at: list, factor: float):
    """The rise at `factor` x N_opt over the reducible loss, the median over the computes `at`; laws of arrays give arrays."""
    found = []
    with np.errstate(all="ignore"):  # of resamples whose term is nothing
        for c in at:
            n = factor * laws["N_opt"](c)
            found.append((loss(n, c / (k * n)) - laws["L_opt"](c)) / _reducible(laws["L_opt"], c))
    return np.median(found, axis=0)


def _reducible(law, flops: float | int):
    with np.errstate(all="ignore"):
        return law.coefficient * np.power(float(flops), law.exponent)


def _finite(drawn: np.ndarray) -> np.ndarray | None:
    """The finite resamples; None if fewer than half are finite."""
    known = drawn[np.isfinite(drawn)]
    return known if len(known) > len(drawn) / 2 else None


def _made_up(law, share):
    """Times the compute, at most MOST."""
    with np.errstate(all="ignore"):
        power = np.log1p(np.maximum(share, 0.0)) / -np.asarray(law.exponent)
        found = np.exp(np.clip(np.nan_to_num(power, nan=math.inf), 0.0, math.log(MOST)))
    return np.where(np.isnan(share), math.nan, found)
