"""Two ladders by their laws: which falls faster with compute, by how much, and from what compute on it is the lower one.

A ladder is a design, a conditioning or a data set, trained at several budgets. Liang et al. 2024 (arXiv 2410.08184), section 4,
use exponents as a benchmark of designs; without intervals those of neighbours cannot be told apart, so here each has one.
The two are independent studies: resamples of A are paired with those of B in reverse, so that equal seeds do not tie them.
"""

import math
from dataclasses import dataclass

import numpy as np

from dit_jax.error import UsageError
from dit_jax.scaling.fits.bootstrap import scatter
from dit_jax.scaling.fits.fit import Fit, interval
from dit_jax.scaling.fits.law import PowerLaw, fit_power
from dit_jax.scaling.fits.points import IRREDUCIBLE_FROM
from dit_jax.scaling.frontier.frontier import reached
from dit_jax.scaling.frontier.metric import MetricLaw
from dit_jax.scaling.runs import flatten

FAR = 1e6  # times beyond the data at which laws are still looked at
GRID = 2001  # budgets, evenly in the logarithm, between which a crossing is bracketed
DATA = ("data", "reference")  # fields in which two ladders may differ and still have their levels compared
LOSS = {"pure": "L_opt_pure", "irreducible": "L_opt_irreducible"}


@dataclass(frozen=True)
class Ladder:
    """One side: its laws and their resamples by name (`L_opt` among them), and the compute its data reach."""

    name: str
    laws: dict
    draws: dict  # empty without intervals
    smallest: float
    largest: float
    protocol: dict
    form: str = "pure"  # of its loss law, if nobody asks for another


@dataclass(frozen=True)
class Difference:
    """An exponent on both sides, and B - A; `interval` is (nan, nan) without resamples."""

    law: str
    a: float
    a_interval: tuple
    b: float
    b_interval: tuple
    difference: float
    interval: tuple

    @property
    def known(self) -> bool:
        """Whether the interval of the difference leaves out 0."""
        return self.interval[0] > 0 or self.interval[1] < 0


@dataclass(frozen=True)
class Crossing:
    """From `flops` on, `lower` is the lower law and stays so, as far as FAR beyond the data.

    `flops` is 0 where it is lower at all compute looked at. `interval` ends at inf where resamples never see it become the
    lower one, at 0 where they always do. `beyond` is the multiple of the larger ladder's largest budget.
    """

    lower: str
    flops: float
    interval: tuple
    beyond: float


@dataclass(frozen=True)
class Comparison:
    """`form`: pure | irreducible, that of both loss laws. `ratio`: loss of B over that of A at `common`, the largest compute both
    ladders reach, with its interval. `crossing` is None where levels cannot be compared; `warnings` say why."""

    a: str
    b: str
    form: str
    exponents: tuple  # of Difference: the loss first, then N_opt and D_opt where both have them
    common: float
    ratio: float
    ratio_interval: tuple
    crossing: Crossing | None
    level: float
    warnings: tuple

    @property
    def steeper(self) -> str:
        """The side whose loss falls faster with compute; "" where the interval of the difference holds 0."""
        first = self.exponents[0]
        return "" if not first.known else self.b if first.difference < 0 else self.a


def ladder_of_fit(name: str, fit: Fit) -> Ladder:
    """The ladder of a fit of losses.

    With an irreducible term from 4 budgets on. The pure power law goes through the losses of the same points, with the intervals that their
    scatter about it gives.
    """
    C, loss = np.array([p.flops for p in fit.used]), np.array([[p.loss for p in fit.used]])
    laws, draws, protocol = dict(fit.laws), dict(fit.draws), fit.used[0].runs[0].protocol
    form = "irreducible" if len(C) >= IRREDUCIBLE_FROM else "pure"
    laws[LOSS[form]] = laws.pop("L_opt")
    if "L_opt" in draws:
        draws[LOSS[form]] = draws.pop("L_opt")
    if form == "irreducible":
        pure = laws[LOSS["pure"]] = fit_power(C, loss, np.ones_like(loss))[0]
        if draws:
            off, count = np.log(loss / pure(C)), len(draws["N_opt"].exponent) if "N_opt" in draws else fit.resamples
            drawn = pure(C) * np.exp(scatter(np.random.default_rng(0), off, [len(C) - 2], count)[0])
            draws[LOSS["pure"]] = fit_power(C, drawn, np.ones_like(drawn))
    return Ladder(name, laws, draws, min(C), max(C), protocol, form)


def ladder_of_metric(name: str, fit: MetricLaw) -> Ladder:
    """The ladder of a law through the best model of each budget."""
    laws = {LOSS[form]: f.law for form, f in fit.laws.items()}
    draws = {LOSS[form]: f.draws for form, f in fit.laws.items() if f.draws is not None}
    return Ladder(name, laws, draws, fit.used[0].train, fit.largest, fit.used[0].protocol, fit.form)


def compare(a: Ladder, b: Ladder, *, level: float = 0.95, form: str = "") -> Comparison:
    """Compares two ladders. `form` of the loss laws: pure, irreducible, or "" = irreducible if either side takes it and both have it.

    Raises UsageError where the conventions of FLOPs differ, or where a side has no law of that form.
    """
    warnings, comparable = _protocols(a, b)
    if not form:
        floor = any(s.form == "irreducible" for s in (a, b)) and all(LOSS["irreducible"] in s.laws for s in (a, b))
        form = "irreducible" if floor else "pure"
    for side in (a, b):
        if LOSS[form] not in side.laws:
            raise UsageError(f"{side.name}: too few budgets for a law with an irreducible term; use the pure power law")
        if not side.draws:
            warnings.append(f"{side.name} has no interval, so neither has the comparison")
    names = [LOSS[form], *(n for n in ("N_opt", "D_opt") if n in a.laws and n in b.laws)]
    common = min(a.largest, b.largest)
    count = min(len(_drawn(side, LOSS[form])) for side in (a, b))
    order = np.arange(count)
    pair = _with_draws(a, LOSS[form], order), _with_draws(b, LOSS[form], order[::-1])
    ratio = pair[1](common) / pair[0](common)
    crossing = _crossing(a, b, *pair, level) if comparable else None
    if form == "irreducible":
        warnings.append("exponents are of the reducible part; at large compute the irreducible terms decide")
    return Comparison(
        a=a.name,
        b=b.name,
        form=form,
        exponents=tuple(_difference(a, b, n, level) for n in names),
        common=common,
        ratio=float(ratio[0]),
        ratio_interval=interval(ratio[1:], level),
        crossing=crossing,
        level=level,
        warnings=tuple(warnings),
    )


def _protocols(a: Ladder, b: Ladder) -> tuple[list[str], bool]:
    """Warnings, and whether the levels of the two can be compared."""
    one, two = flatten(a.protocol), flatten(b.protocol)
    differ = [k for k in dict.fromkeys([*one, *two]) if one.get(k) != two.get(k)]
    if "flops" in differ and one and two:
        raise UsageError(
            f"{b.name}: protocol field 'flops' is {two.get('flops')!r}, but {one.get('flops')!r} in {a.name}; convert one of "
            "them: exponents of different conventions do not compare"
        )
    if not differ:
        return [], True
    what = "; ".join(f"{k} is {one.get(k, '(absent)')!r} and {two.get(k, '(absent)')!r}" for k in differ[:3])
    if all(k.split(".")[0] in DATA for k in differ):
        text = f"the ladders are measured on different data ({what}): a crossing compares scores on each one's own"
        return [text], True
    text = f"the ladders are measured differently ({what}): their exponents compare, their levels do not; no crossing"
    return [text], False


def _drawn(side: Ladder, name: str) -> np.ndarray:
    return np.atleast_1d(side.draws[name].exponent) if name in side.draws else np.zeros(0)


def _with_draws(side: Ladder, name: str, order: np.ndarray) -> PowerLaw:
    """The law and these of its resamples, by index, as one law of arrays (1 + resamples,)."""
    law, draws = side.laws[name], side.draws.get(name)
    parts = []
    for part in ("coefficient", "exponent", "irreducible"):
        drawn = np.broadcast_to(getattr(draws, part), len(_drawn(side, name)))[order] if len(order) else np.zeros(0)
        parts.append(np.concatenate([[float(getattr(law, part))], drawn]))
    return PowerLaw(*parts)


def _difference(a: Ladder, b: Ladder, name: str, level: float) -> Difference:
    ours, theirs = (_drawn(side, name) for side in (a, b))
    one, other, count = float(a.laws[name].exponent), float(b.laws[name].exponent), min(len(ours), len(theirs))
    apart = interval(theirs[:count][::-1] - ours[:count], level)
    return Difference(name, one, interval(ours, level), other, interval(theirs, level), other - one, apart)


def _crossing(a: Ladder, b: Ladder, one: PowerLaw, other: PowerLaw, level: float) -> Crossing:
    """The last crossing of the laws and of their resamples, looked for from 1 / FAR of the data to FAR beyond."""
    largest = max(a.largest, b.largest)
    at = np.linspace(math.log(min(a.smallest, b.smallest) / FAR), math.log(largest * FAR), GRID)
    b_last, crossed = _last_change(one, other, at)
    lower = b if b_last[0] else a
    flops = np.where(b_last == b_last[0], crossed, math.inf)
    return Crossing(lower.name, float(flops[0]), reached(flops[1:], level), float(flops[0] / largest))


def _last_change(one: PowerLaw, other: PowerLaw, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether `other` is the lower law at the end of `at` (log C), per resample, and where the last crossing lies; 0 = none."""

    def ahead(log_c):  # above 0 where `other` is lower
        return np.log(_value(one, log_c)) - np.log(_value(other, log_c))

    lower = ahead(at) > 0  # (r, g)
    changes = lower[:, :-1] != lower[:, 1:]
    last = changes.shape[1] - 1 - np.argmax(changes[:, ::-1], axis=1)
    low, high, end = at[last][:, None], at[last + 1][:, None], lower[:, -1:]
    for _ in range(50):  # bisection
        middle = (low + high) / 2
        same = (ahead(middle) > 0) == end
        low, high = np.where(same, low, middle), np.where(same, middle, high)
    return lower[:, -1], np.where(changes.any(axis=1), np.exp(high[:, 0]), 0.0)


def _value(law: PowerLaw, log_c: np.ndarray) -> np.ndarray:
    """Resampled laws (r,) at log C (g,) or (r, 1)."""
    k, x, E = (np.asarray(v)[:, None] for v in (law.coefficient, law.exponent, law.irreducible))
    return E + np.exp(np.log(np.maximum(k, 1e-300)) + x * log_c)
