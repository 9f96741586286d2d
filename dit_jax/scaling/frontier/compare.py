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
    """One side: its laws by name, each a law of arrays whose first entry is the estimate and the others its resamples, and the compute
    that its data reach."""

    name: str
    laws: dict
    smallest: float
    largest: float
    protocol: dict
    form: str = "pure"  # of its loss law, if nobody asks for another
    reasons: tuple = ()  # why its laws may not be followed beyond its data; () = they may


def _joined(law: PowerLaw, draws: PowerLaw | None) -> PowerLaw:
    """A law of arrays: the estimate, then its resamples."""
    if draws is None:
        return PowerLaw(*(np.atleast_1d(v) for v in vars(law).values()))
    parts = (
        (v, np.broadcast_to(d, np.shape(draws.exponent)))
        for v, d in zip(vars(law).values(), vars(draws).values(), strict=True)
    )
    return PowerLaw(*(np.concatenate([[float(v)], d]) for v, d in parts))


def ladder_of_fit(name: str, fit: Fit) -> Ladder:
    """The ladder of a fit of losses.

    Of budgets with an irreducible term from 4 on. The pure power law goes through the losses of the same points, with the intervals that
    their scatter about it gives; a surface has none.
    """
    C, loss = np.array([p.flops for p in fit.used or fit.runs]), np.array([[p.loss for p in fit.used]])
    laws = {law: _joined(fit.laws[law], fit.draws.get(law)) for law in fit.laws}
    form = "irreducible" if len(C) >= IRREDUCIBLE_FROM else "pure"
    laws[LOSS[form]] = laws.pop("L_opt")
    if form == "irreducible" and fit.used:
        pure, count, draws = fit_power(C, loss, np.ones_like(loss))[0], len(laws[LOSS[form]].exponent) - 1, None
        if count:
            drawn = scatter(np.random.default_rng(0), np.log(loss / pure(C)), [len(C) - 2], count)[0]
            draws = fit_power(C, pure(C) * np.exp(drawn), np.ones_like(drawn))
        laws[LOSS["pure"]] = _joined(pure, draws)
    return Ladder(name, laws, min(C), max(C), fit.runs[0].protocol, form, fit.reasons)


def ladder_of_metric(name: str, fit: MetricLaw) -> Ladder:
    """The ladder of a law through the best model of each budget."""
    laws = {LOSS[form]: _joined(f.law, f.draws) for form, f in fit.laws.items()}
    return Ladder(name, laws, fit.used[0].train, fit.largest, fit.used[0].protocol, fit.form)


def compare(a: Ladder, b: Ladder, *, level: float = 0.95, form: str = "", at: float | int = 0.0) -> dict:
    """Compares two ladders. `form` of the loss laws: pure, irreducible, or "" = irreducible if either side takes it and both have it.

    The result is JSON's: `exponents` of the loss, and of N_opt and D_opt where both have them, with B - A and its interval; `steeper`, the
    side whose loss falls faster, or "" if that interval holds 0; `ratio`, the loss of B over that of A at `common`, which is `at` (0: the
    largest compute both reach); `crossing`, None where levels cannot be compared; `warnings`, which say why. Raises UsageError where the
    conventions of FLOPs differ, or where a side has no law of that form.
    """
    warnings, comparable = _protocols(a, b)
    if not form:
        floor = any(s.form == "irreducible" for s in (a, b)) and all(LOSS["irreducible"] in s.laws for s in (a, b))
        form = "irreducible" if floor else "pure"
    for side in (a, b):
        if LOSS[form] not in side.laws:
            if form == "pure":
                raise UsageError(
                    f"{side.name}: a surface has a loss law with an irreducible term only; leave out --law=pure"
                )
            raise UsageError(f"{side.name}: too few budgets for a law with an irreducible term; use the pure power law")
        if len(side.laws[LOSS[form]].exponent) == 1:
            warnings.append(f"{side.name} has no interval, so neither has the comparison")
    if form == "irreducible":
        warnings.append("exponents are of the reducible part; at large compute the irreducible terms decide")
    names = [LOSS[form], *(n for n in ("N_opt", "D_opt") if n in a.laws and n in b.laws)]
    exponents = [_difference(a, b, name, level) for name in names]
    pair, common, (low, high) = _paired(a, b, LOSS[form]), at or min(a.largest, b.largest), exponents[0]["interval"]
    ratio = pair[1](common) / pair[0](common)
    out = {"a": a.name, "b": b.name, "form": form, "steeper": b.name if high < 0 else a.name if low > 0 else ""}
    out |= {
        "exponents": exponents,
        "common": common,
        "ratio": float(ratio[0]),
        "ratio_interval": interval(ratio[1:], level),
    }
    crossing = _crossing(a, b, *pair, level) if comparable else None
    return out | {"crossing": crossing, "level": level, "warnings": warnings}


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


def _paired(a: Ladder, b: Ladder, name: str) -> tuple:
    """Both laws with as many resamples, those of B in reverse."""
    ours, theirs = a.laws[name], b.laws[name]
    order = np.arange(min(len(ours.exponent), len(theirs.exponent)))
    return ours[order], theirs[np.concatenate([[0], order[:0:-1]])]


def _difference(a: Ladder, b: Ladder, name: str, level: float) -> dict:
    """An exponent on both sides, and B - A; intervals are (nan, nan) without resamples."""
    (ours, theirs), pair = (a.laws[name].exponent, b.laws[name].exponent), _paired(a, b, name)
    out, apart = (
        {"law": name, "a": float(ours[0]), "a_interval": interval(ours[1:], level)},
        pair[1].exponent - pair[0].exponent,
    )
    out |= {"b": float(theirs[0]), "b_interval": interval(theirs[1:], level)}
    return out | {"difference": float(apart[0]), "interval": interval(apart[1:], level)}


def _crossing(a: Ladder, b: Ladder, one: PowerLaw, other: PowerLaw, level: float) -> dict:
    """The last crossing of the laws and of their resamples, looked for from 1 / FAR of the data to FAR beyond.

    From `flops` on, `lower` is the lower law; 0 where it is so at all compute looked at. `interval` ends at inf where resamples never see
    it become the lower one, at 0 where they always do. `beyond` is the multiple of the larger ladder's largest budget.
    """
    largest = max(a.largest, b.largest)
    at = np.linspace(math.log(min(a.smallest, b.smallest) / FAR), math.log(largest * FAR), GRID)

    def ahead(log_c):  # (r, g): whether `other` is lower at log C (g,) or (r, 1)
        return one.at(np.exp(log_c))[0] > other.at(np.exp(log_c))[0]

    lower = ahead(at)
    changes = lower[:, :-1] != lower[:, 1:]
    last = changes.shape[1] - 1 - np.argmax(changes[:, ::-1], axis=1)
    low, high, end = at[last][:, None], at[last + 1][:, None], lower[:, -1:]
    for _ in range(50):  # bisection
        middle = (low + high) / 2
        same = ahead(middle) == end
        low, high = np.where(same, low, middle), np.where(same, middle, high)
    crossed = np.where(changes.any(axis=1), np.exp(high[:, 0]), 0.0)
    flops = np.where(lower[:, -1] == lower[0, -1], crossed, math.inf)
    out = {"lower": (b if lower[0, -1] else a).name, "flops": float(flops[0])}
    return out | {"interval": reached(flops[1:], level), "beyond": float(flops[0] / largest)}
