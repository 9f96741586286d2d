"""From a fit and a budget to the nearest size of a ladder."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dit_jax.error import UsageError
from dit_jax.scaling.fits.fit import Fit, predict
from dit_jax.scaling.runs.conventions import TRAIN_OVER_FORWARD


@dataclass(frozen=True)
class Plan:
    """What to train with `flops`. Loss and interval are those of one run of the chosen size, its noise included."""

    flops: float  # training
    beyond: float  # multiple of the largest budget fitted
    n_opt: float  # parameters active per token
    loss: float
    loss_interval: tuple
    name: str
    params: float  # active per token, of the chosen size
    images: float  # that the budget buys at the chosen size

    @property
    def off(self) -> float:
        """Chosen size over N_opt."""
        return self.params / self.n_opt


def require_sizes(fit: Fit) -> None:
    """Raise UsageError if the fit has no law of the best size."""
    if "N_opt" not in fit.laws:
        raise UsageError(f"--method: {fit.method} has no law of N_opt in compute; plan with another")


def plan(fit: Fit, flops: float | int, ladder: Sequence[tuple]) -> Plan:
    """The row of `ladder`, (name, parameters active per token, forward FLOPs of one image), nearest to N_opt in log N.

    `flops` are training FLOPs. Raises UsageError on a ladder without sizes, and if the fit has no law of N_opt.
    """
    require_sizes(fit)
    if not ladder or not all(0 < v < math.inf for row in ladder for v in row[1:]):
        raise UsageError(f"ladder: found {ladder!r}, expected (name, params_active, flops_image) rows above 0")
    n_opt = predict(fit, flops)["N_opt"]
    if not 0 < n_opt < math.inf:
        raise UsageError(
            f"runs: {fit.method} puts N_opt at {n_opt:g} for {flops:g} FLOPs, so they do not determine it; add runs"
        )
    name, params, cost = min(ladder, key=lambda row: abs(math.log(row[1] / n_opt)))
    said, images = predict(fit, flops, params), float(flops / (TRAIN_OVER_FORWARD * cost))
    run = (said["L_run"], said["L_run_interval"])
    return Plan(said["flops"], said["beyond"], n_opt, *run, str(name), float(params), images)
