"""The minima of isoFLOP curves: budgets with a parabola of loss against log N through their runs, and where those are lowest."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import special

from dit_jax.scaling.fits import parabola
from dit_jax.scaling.runs import ROUNDING

WIDEST = 700.0  # log N and log D of a resampled minimum, at most: what float64 holds


@dataclass(frozen=True)
class Budget:
    """The runs of one compute budget and the parabola through them. `problem` says why it is not used; "" = used."""

    label: str
    flops: float  # geometric mean of its runs
    runs: tuple
    problem: str = ""
    curve: parabola.Curve | None = None
    coefficients: np.ndarray | None = None  # of loss in u = log N - curve.centre

    @property
    def losses(self) -> np.ndarray:
        return np.array([r.loss for r in self.runs])

    @property
    def fitted(self) -> np.ndarray:
        """The parabola's losses at the runs."""
        return self.curve.basis @ self.coefficients

    @property
    def tokens(self) -> np.ndarray:
        return np.array([r.tokens for r in self.runs])


@dataclass(frozen=True)
class Minima:
    """Minima of all used budgets for m sets of losses, (m, budgets) each; variances per unit of loss variance."""

    log_n: np.ndarray
    log_d: np.ndarray
    loss: np.ndarray
    curvature: np.ndarray
    var_n: np.ndarray
    var_loss: np.ndarray
    inside: np.ndarray

    def less(self, shift: np.ndarray) -> "Minima":
        """The minima less a shift (3, m or 1, budgets) of log N, log D and loss."""
        moved = {name: getattr(self, name) - s for name, s in zip(("log_n", "log_d", "loss"), shift, strict=True)}
        return replace(self, **moved)

    def __getitem__(self, kept: np.ndarray) -> "Minima":
        return Minima(**{name: values[kept] for name, values in vars(self).items()})


def make_budget(label: str, members: tuple, window: float) -> Budget:
    """A budget with its parabola, or with the problem that keeps it out of the laws."""
    flops = float(np.exp(np.mean([math.log(r.flops) for r in members])))
    best = min(members, key=lambda r: r.loss).params
    runs = tuple(r for r in members if best / window <= r.params <= best * window)
    budget, sizes = Budget(label, flops, runs), sorted({r.params for r in runs})
    if len(sizes) < 3:
        return replace(budget, problem=f"{len(sizes)} distinct size(s), a parabola needs 3")
    tokens = [r.tokens * flops / r.flops for r in runs]  # at the budget's compute, not a little off it
    curve = parabola.curve(np.array([r.params for r in runs]), np.array(tokens))
    vertex = parabola.vertex(curve, budget.losses[None])
    budget = replace(budget, curve=curve, coefficients=curve.solve @ budget.losses)
    bend = float(budget.coefficients[2])
    if bend * np.abs(curve.log_n - curve.centre).max() ** 2 <= ROUNDING * budget.losses.max():
        return replace(budget, problem=f"the parabola has no minimum (curvature {bend:.2g})")
    if not vertex.inside[0]:
        n, span = math.exp(min(float(vertex.log_n[0]), WIDEST)), f"{sizes[0]:.3g} to {sizes[-1]:.3g}"
        return replace(
            budget, problem=f"minimum at {n:.3g} parameters, at or beyond the edge of the sizes tried ({span})"
        )
    return budget


def minima_of(used: Sequence[Budget], losses: np.ndarray) -> Minima:
    """Minima for sets of losses (m, runs of all used budgets)."""
    found, place = [], 0
    for b in used:
        found.append(parabola.vertex(b.curve, losses[:, place : place + len(b.runs)]))
        place += len(b.runs)
    return Minima(**{name: np.stack([getattr(v, name) for v in found], axis=-1) for name in Minima.__annotations__})


def no_parabola(used: Sequence[Budget]) -> float:
    """The chance of scatter about parabolas as systematic as this, were they true: an F test of two more powers at each budget."""
    simple, more, powers, freedom = 0.0, 0.0, 0, 0
    for b in used:
        u, residual = b.curve.log_n - b.curve.centre, b.losses - b.fitted
        if len(set(u)) < 6:
            continue
        design = np.stack([(u / np.abs(u).max()) ** i for i in range(5)], axis=1)
        left = residual - design @ np.linalg.lstsq(design, residual, rcond=None)[0]
        simple += float(np.sum(residual**2))
        more += float(np.sum(left**2))
        powers, freedom = powers + 2, freedom + len(u) - 5
    if not freedom or simple < 1e-18:
        return 1.0
    return float(special.fdtrc(powers, freedom, max(simple - more, 0.0) / powers / max(more / freedom, 1e-300)))
