"""Laws of compute through points (C, N, D, L), one for each budget: least squares of the logarithms, and their intervals.

Intervals are a residual bootstrap whose unit is the point, since each point already stands for several runs: residuals of log N, log D
and log L are drawn together, stretched as `inference.stretch` says.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dit_jax.error import UsageError
from dit_jax.scaling.inference import stretch
from dit_jax.scaling.law import fit_irreducible, fit_power

IRREDUCIBLE_FROM = 4  # points from which the loss law carries an irreducible term, as in `fit`


@dataclass(frozen=True)
class Point:
    """The best of one compute: FLOPs, parameters, tokens and loss there."""

    label: str
    flops: float
    n_opt: float
    d_opt: float
    loss: float


@dataclass(frozen=True)
class PointFit:
    """Laws of compute and their resamples, as in IsoflopFit, with the points that they go through."""

    method: str
    n_runs: int
    points: tuple
    laws: dict
    objective: float  # sum of squared residuals of log N_opt, or of the law's own loss
    level: float
    resamples: int
    draws: dict = field(default_factory=dict)
    intervals: dict = field(default_factory=dict)
    noise: float = float("nan")
    noise_draws: np.ndarray = field(default_factory=lambda: np.zeros(0))
    curvature: float = 0.0
    degenerate: int = 0
    identifiable: bool = False
    warnings: tuple = ()

    @property
    def largest(self) -> float:
        """Training FLOPs of the largest point."""
        return max(p.flops for p in self.points)


def laws_of(method: str, n_runs: int, points: Sequence[Point], warnings: tuple, options: dict) -> PointFit:
    """N_opt, D_opt and L_opt through `points`; `options` are resamples, seed and level."""
    if len(points) < 2:
        raise UsageError(
            f"RUNS: {len(points)} usable point(s) for method {method}, expected at least 2. " + "; ".join(warnings)
        )
    resamples, level = options["resamples"], options["level"]
    C, n, d, loss = (np.array([getattr(p, name) for p in points]) for name in ("flops", "n_opt", "d_opt", "loss"))
    laws = _laws(C, n[None], d[None], loss[None])
    fitted = {name: law(C[None])[0] for name, law in ((k, laws[k]) for k in ("N_opt", "D_opt", "L_opt"))}
    off = np.stack([np.log(v / fitted[name]) for name, v in (("N_opt", n), ("D_opt", d), ("L_opt", loss))])
    fit = PointFit(
        method=method,
        n_runs=n_runs,
        points=tuple(points),
        laws={name: law[0] for name, law in laws.items()},
        objective=float((off[0] ** 2).sum()),
        level=level,
        resamples=resamples,
        warnings=tuple(warnings),
    )
    freedom = len(points) - 2
    if freedom < 1 or not resamples:
        reasons = ("two points: any two lie on a power law, so nothing tests it",) if freedom < 1 else ()
        return _replaced(fit, identifiable=not reasons, warnings=reasons + fit.warnings)
    rng = np.random.default_rng(options["seed"])
    pick = rng.integers(len(points), size=(resamples, len(points)))
    noise = stretch(len(points), freedom, level) * (off - off.mean(1, keepdims=True))[:, pick]
    drawn = [fitted[name] * np.exp(noise[i]) for i, name in enumerate(("N_opt", "D_opt", "L_opt"))]
    draws = _laws(C, *drawn)
    spread = float(np.std(off[2]) * loss[-1])
    low, high = np.quantile(draws["N_opt"].exponent, [(1 - level) / 2, (1 + level) / 2])
    reasons = ()
    if low <= 0 or high >= 1:
        reasons = (f"the exponent of N_opt is not identified: its interval {low:.2f} to {high:.2f} leaves (0, 1)",)
    return _replaced(
        fit,
        draws=draws,
        noise=spread,
        noise_draws=np.full(resamples, spread),
        identifiable=not reasons,
        warnings=reasons + fit.warnings,
    )


def _replaced(fit: PointFit, **changes) -> PointFit:
    return PointFit(**{**vars(fit), **changes})


def _laws(C, n, d, loss) -> dict:
    one = np.ones_like(n)
    laws = {"N_opt": fit_power(C, n, one), "D_opt": fit_power(C, d, one), "L_opt_pure": fit_power(C, loss, one)}
    if len(C) >= IRREDUCIBLE_FROM:
        laws["L_opt_irreducible"] = fit_irreducible(C, loss, one)
    return {**laws, "L_opt": laws.get("L_opt_irreducible", laws["L_opt_pure"])}
