"""From a fit and a budget to a size: the nearest of a ladder to N_opt, and the images that the budget buys."""

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
    """Raise UsageError if the fit says nothing of the best size."""
    if "N_opt" not in fit.laws:
        raise UsageError(
            f"--method: {fit.method} says nothing of N_opt, for it has no law of the best size in compute; plan with another"
        )


def plan(fit: Fit, flops: float | int, ladder: Sequence[tuple]) -> Plan:
    """The row of `ladder`, (name, parameters active per token, forward FLOPs of one image), nearest to N_opt in log N.

    `flops` are training FLOPs. Raises UsageError on a ladder without sizes, and if the fit says nothing of N_opt.
    """
    require_sizes(fit)
    rows = list(ladder)
    if not rows:
        raise UsageError("ladder: found no size, expected (name, params_active, flops_image) rows")
    for name, params, cost in rows:
        if not (math.isfinite(params) and math.isfinite(cost) and params > 0 and cost > 0):
            raise UsageError(
                f"ladder: {name!r} has params_active {params} and flops_image {cost}, expected both above 0"
            )
    name, params, cost = nearest(rows, predict(fit, flops)["N_opt"])
    said = predict(fit, flops, params)
    return Plan(
        flops=said["flops"],
        beyond=said["beyond"],
        n_opt=said["N_opt"],
        loss=said["L_run"],
        loss_interval=said["L_run_interval"],
        name=str(name),
        params=float(params),
        images=float(flops / (TRAIN_OVER_FORWARD * cost)),
    )


def nearest(ladder: Sequence[tuple], n_opt: float) -> tuple:
    """The row of a ladder nearest to `n_opt` parameters in log N."""
    return min(ladder, key=lambda row: abs(math.log(row[1] / n_opt)))


def ladder_of(runs) -> list[tuple]:
    """The distinct sizes of `runs` as ladder rows; empty if images were not recorded."""
    rows = {
        r.params: (r.name, r.params, r.flops / r.images / TRAIN_OVER_FORWARD)
        for r in sorted(runs, key=lambda r: -r.flops)
        if math.isfinite(r.images)
    }
    return sorted(rows.values(), key=lambda row: row[1])
