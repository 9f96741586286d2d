"""What a size other than the best costs: loss at the same compute, and the compute that makes up for it (Kaplan et al. 2020, arXiv
2001.08361, appendix B.4).

On a surface E + A / N^alpha + B / D^beta both terms decay alike along the optimum, so the rise of the loss at f x N_opt is a fixed share of
the reducible loss k C^-x at any compute. That share is read from the loss of the fit along C = k N D, at the budgets fitted (median) or at
the one asked for. A size that stays f x N_opt(C) reaches the best loss with (1 + share)^(1 / x) times the compute.
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
    known = max(losses) - min(losses) > ROUNDING * max(losses)
    return "" if known else f"method {fit.method} tells the loss of the best size alone"


def off_by(fit: Fit, budget: float | int, factor: float) -> Off:
    """What a model of `factor` x N_opt costs at `budget` training FLOPs. The fit must have a law of N_opt."""
    said, at = predict(fit, budget), [p.flops for p in fit.used] or [float(budget)]
    params, unknown = factor * said["N_opt"], said.get("L_opt_reason") or one_size(fit)
    if unknown:
        return Off(factor, params, math.nan, math.nan, NO_INTERVAL, math.nan, NO_INTERVAL, unknown)

    def cost(loss, laws: dict) -> tuple:
        """(rise of the loss, times the compute) at `factor` x N_opt; laws of arrays give arrays."""
        law = laws["L_opt"]
        with np.errstate(all="ignore"):  # of resamples whose term is nothing
            sizes = [factor * laws["N_opt"](c) for c in at]
            rises = [loss(n, c / (fit.k * n)) - law(c) for n, c in zip(sizes, at, strict=True)]
            reducible = [law.coefficient * np.power(c, law.exponent) for c in (*at, float(budget))]
            share = np.median(np.array(rises) / np.array(reducible[:-1]), axis=0)
            power = np.log1p(np.maximum(share, 0.0)) / -np.asarray(law.exponent)
            return share * reducible[-1], np.where(np.isnan(share), math.nan, np.exp(np.clip(power, 0, math.log(MOST))))

    rise, compute = map(float, cost(fit.loss, fit.laws))
    drawn = cost(fit.loss_draws, fit.draws) if fit.draws and fit.loss_draws is not None else ((), ())
    known = [np.asarray(v)[np.isfinite(v)] for v in drawn]
    spans = [fit.interval(v if len(v) > len(all_) / 2 else None) for v, all_ in zip(known, drawn, strict=True)]
    source = f"the curves of the {len(at)} budgets" if fit.used else "the fitted law of loss in N and D"
    return Off(factor, params, said["L_opt"] + rise, rise, spans[0], compute, spans[1], source)
