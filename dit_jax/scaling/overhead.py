"""What a size other than the best costs: loss at the same compute, and the compute that makes up for it (Kaplan et al. 2020, arXiv
2001.08361, appendix B.4).

On a surface E + A / N^alpha + B / D^beta both terms decay alike along the optimum, so the rise of the loss at f x N_opt is a fixed share of
the reducible loss k C^-x at any compute. Every method that sees other sizes than the best tells that share in its own way, each budget or
curve for itself, and the median is taken. A size that stays f x N_opt(C) reaches the best loss with (1 + share)^(1 / x) times the compute.
"""

import math
from dataclasses import dataclass

import numpy as np

from dit_jax.scaling.fit import Fit, IsoflopFit
from dit_jax.scaling.predict import interval, predict
from dit_jax.scaling.study import SurfaceFit

FACTOR = 2.0  # of a size that is off
MOST = 1e6  # times the compute: more is never made up for


@dataclass(frozen=True)
class Off:
    """A size that is `factor` times the best, at the same compute. `compute`: how many times the compute make up for it. `source`: where
    that is read, or, where the numbers are nan, why it is not known."""

    factor: float
    params: float
    loss: float
    rise: float  # of the loss over the best
    rise_interval: tuple
    compute: float
    compute_interval: tuple
    source: str


def off_by(fit: Fit, budget: float | int, factor: float) -> Off:
    """What a model of `factor` x N_opt costs at the compute `budget`. Raises UsageError of a method that says nothing of N_opt."""
    said, law, laws = predict(fit, budget), fit.laws["L_opt"], fit.draws.get("L_opt")
    share, shares, source = _share(fit, float(budget), factor)
    rise, rises, computes = share * _reducible(law, budget), None, None
    if shares is not None and laws is not None:
        with np.errstate(invalid="ignore"):  # of a resample whose law has no reducible loss
            rises, computes = _known(shares * _reducible(laws, budget)), _known(_made_up(laws, shares))
    return Off(
        factor=factor,
        params=factor * said["N_opt"],
        loss=float(said["L_opt"] + rise),
        rise=float(rise),
        rise_interval=interval(rises, fit.level),
        compute=float(_made_up(law, share)),
        compute_interval=interval(computes, fit.level),
        source=source,
    )


def _known(drawn: np.ndarray) -> np.ndarray | None:
    """Resamples without those that know nothing of such sizes; None where these are the most."""
    known = drawn[~np.isnan(drawn)]
    return known if len(known) > len(drawn) / 2 else None


def _reducible(law, flops: float | int):
    return law.coefficient * np.power(flops, law.exponent)


def _share(fit: Fit, budget: float, factor: float) -> tuple:
    """(rise over the reducible loss, its resamples or None, where that is read or why it is not known)."""
    if isinstance(fit, SurfaceFit):
        share = float(_off_surface(fit.surface, fit.laws, fit.k, budget, factor))
        return share, _off_surface(fit.surfaces, fit.draws, fit.k, budget, factor) if fit.draws else None, "the surface"
    if isinstance(fit, IsoflopFit):
        share, shares = _off_parabola(fit, math.log(factor))
        return share, shares, f"the curvature of the {len(fit.used)} parabolas, which is alike either way"
    if fit.others is None:
        return math.nan, None, f"{fit.method} found no curve of loss against size: it knows only the best"
    each, drawn, source = fit.others(fit, math.log(factor))
    if not np.isfinite(each).any():
        return math.nan, None, f"{fit.method} found no smooth curve of loss that reaches so far from the best size"
    return float(np.nanmedian(each)), _medians(drawn), source


def _medians(drawn: np.ndarray | None) -> np.ndarray | None:
    """The median of what each resample (m, j) knows; nan of one that knows nothing."""
    if drawn is None:
        return None
    known = ~np.isnan(drawn).all(1)
    found = np.full(len(drawn), math.nan)
    found[known] = np.nanmedian(drawn[known], axis=1)
    return found


def _off_parabola(fit: IsoflopFit, away: float) -> tuple:
    """(share, shares or None): the parabolas' curvature over the reducible loss of their budget."""
    C, curvature = np.array([b.flops for b in fit.used]), np.array([b.curvature for b in fit.used])
    share = float(np.median(curvature / fit.laws["L_opt"].at(C)[1])) * away**2
    if not fit.draws:
        return share, None
    error = np.sqrt([b.curve.covariance[2, 2] for b in fit.used])
    noise = np.random.default_rng(0).standard_normal((len(fit.noise_draws), len(C))) * fit.noise_draws[:, None]
    with np.errstate(all="ignore"):
        return share, np.median((curvature + noise * error) / fit.draws["L_opt"].at(C)[1], axis=1) * away**2


def _off_surface(surface, laws: dict, k: float, c: float, factor: float):
    with np.errstate(all="ignore"):  # of resamples whose term is nothing
        n = laws["N_opt"](c) * factor
        return (surface(n, c / (k * n)) - laws["L_opt"](c)) / _reducible(laws["L_opt"], c)


def _made_up(law, share):
    """Times the compute, at most MOST."""
    with np.errstate(all="ignore"):
        power = np.log1p(np.maximum(share, 0.0)) / -np.asarray(law.exponent)
        found = np.exp(np.clip(np.nan_to_num(power, nan=math.inf), 0.0, math.log(MOST)))
    return np.where(np.isnan(share), math.nan, found)
