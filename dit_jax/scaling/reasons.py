"""Where methods disagree beyond their intervals, and why: only reasons that a test on the runs supports.

`premises` holds the tests. A test that fails and touches the quantity two methods disagree on is named as a reason; where none does, that
is said instead.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dit_jax.scaling.predict import interval

SHARE = 0.2  # of a disagreement that a simulated bias must account for, at least
UNEXPLAINED = "no premise that was tested on these runs explains it"
QUANTITIES = ("a", "N_opt", "irreducible", "L_opt")


@dataclass(frozen=True)
class Check:
    """A premise of a method, put to the runs. `bias`: quantity -> how far the middle of the method's interval
    would be off, where a simulation says so."""

    method: str
    premise: str
    reason: str  # what its failure means, in a few words
    found: str  # the result in words
    fails: bool
    affects: tuple = QUANTITIES
    p: float = math.nan  # chance of runs as odd as these were the premise true; nan of tests that are simulations
    bias: dict | None = None


@dataclass(frozen=True)
class Disagreement:
    """Two methods whose intervals of a quantity do not overlap, and the failed tests that explain it."""

    quantity: str
    methods: tuple
    values: tuple
    intervals: tuple
    reasons: tuple = ()  # of Check

    @property
    def sides(self) -> tuple:
        """What each of the two methods finds, as text."""
        digits = ".4g" if self.quantity == "N_opt" else ".4f"
        pairs = zip(self.values, self.intervals, strict=True)
        return tuple(f"{v:{digits}} ({low:{digits}} to {high:{digits}})" for v, (low, high) in pairs)

    @property
    def why(self) -> str:
        """The reasons of each of the two methods in a few words."""
        named = {m: [t.reason for t in self.reasons if t.method == m] for m in self.methods}
        return "; ".join(f"{m}: {', '.join(texts)}" for m, texts in named.items() if texts) or UNEXPLAINED

    def __str__(self) -> str:
        sides = (f"{m} finds {text}" for m, text in zip(self.methods, self.sides, strict=True))
        return f"{self.quantity}: {', '.join(sides)}, beyond their intervals. Why: {self.why}"


def values(fit, flops: float | int) -> dict:
    """name -> (value, interval) of what methods have in common: a, b, irreducible, and N_opt and L_opt at `flops`."""
    return {name: (value, interval(drawn, fit.level)) for name, (value, drawn) in _quantities(fit, flops).items()}


def middles(fit, flops: float | int) -> dict:
    """name -> the median of the resamples: what the interval lies about, which is not the estimate where the resamples are cleared of
    its bias. Empty of a fit without resamples."""
    return {name: float(np.median(drawn)) for name, (_, drawn) in _quantities(fit, flops).items() if drawn is not None}


def _quantities(fit, flops: float | int) -> dict:
    """name -> (value, its resamples or None)."""
    law, draws = fit.laws["L_opt"], fit.draws.get("L_opt")
    out = {}
    for name, ours in (("a", "N_opt"), ("b", "D_opt")):
        if ours in fit.laws:
            drawn = fit.draws.get(ours)
            out[name] = (float(fit.laws[ours].exponent), drawn.exponent if drawn else None)
    if "N_opt" in fit.laws:
        drawn = fit.draws.get("N_opt")
        out["N_opt"] = (float(fit.laws["N_opt"](flops)), drawn(flops) if drawn else None)
    if law.irreducible or (draws and np.any(draws.irreducible)):
        out["irreducible"] = (float(law.irreducible), draws.irreducible if draws else None)
    out["L_opt"] = (float(law(flops)), draws(flops) if draws else None)
    return out


def disagreements(fits: dict, flops: float | int, tests: Sequence[Check] = ()) -> list[Disagreement]:
    """Where the intervals of two methods do not overlap, with the reasons that `tests` support."""
    table = {method: values(fit, flops) for method, fit in fits.items()}
    found, methods = [], list(table)
    for i, one in enumerate(methods):
        for two in methods[i + 1 :]:
            for name in QUANTITIES:
                if name not in table[one] or name not in table[two]:
                    continue
                (x, (low, high)), (y, (lower, higher)) = table[one][name], table[two][name]
                assumed = low == high or lower == higher  # a method's premise, not its finding
                if not assumed and (high < lower or higher < low):
                    gap = (low + high - lower - higher) / 2
                    reasons = tuple(t for t in tests if _explains(t, name, {one: gap, two: -gap}))
                    found.append(Disagreement(name, (one, two), (x, y), ((low, high), (lower, higher)), reasons))
    return sorted(found, key=lambda d: QUANTITIES.index(d.quantity))


def _explains(test: Check, quantity: str, gaps: dict) -> bool:
    """Whether a failed test touches this quantity, and a simulated bias of the interval goes the way of the gap between the middles of
    the two intervals and fills a part of it."""
    if not test.fails or test.method not in gaps or quantity not in test.affects:
        return False
    if test.bias is None:
        return True
    gap, bias = gaps[test.method], test.bias.get(quantity, 0.0)
    return gap * bias > 0 and abs(bias) >= SHARE * abs(gap)
