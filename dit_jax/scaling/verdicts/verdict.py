"""The verdict: which method to believe on these runs, what it says of a target, and what would change it.

No method is the best on every table, so the runs themselves choose. Each of the methods that answer is fitted again without the largest
budget, and without each part of the sizes in turn, and predicts the losses left out that lie near their budget's best size. Of the methods
that pass their tests beyond the data (`beyond`) the one with the least error at the largest budget is believed, since a target lies beyond
the data too; where no budget can be left out, the errors of the sizes decide. Its interval is its own, as much wider as it takes to hold
what the others that pass say: they err by the same noise, so intervals laid over each other would be wider than they need be. Where none
passes, the verdict says so and gives no interval.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dit_jax.error import UsageError
from dit_jax.scaling.fits.fit import INSIDE, NO_INTERVAL, Fit, predict
from dit_jax.scaling.names import ANSWER
from dit_jax.scaling.runs import Run, budgets, scattered
from dit_jax.scaling.verdicts.beyond import FAR, ROUNDING, Extrapolation, extrapolate
from dit_jax.scaling.verdicts.holdout import folds

NEAR = 3.0  # sizes within this factor of the best of their budget are predicted
PARTS = 4  # at most, of the sizes that are left out in turn
MOST = 5  # findings
WORTH = 0.5  # of a half-width, from which an effect is a finding
ODD_END = "one more budget beside it would tell whether it is odd or the laws bend"  # advice
TOO_FAR = 100.0  # times the data, from which the distance itself is a finding
DIGITS = {"N_opt": ".3g", "L_opt": ".4f"}
QUANTITIES = tuple(DIGITS)


@dataclass(frozen=True)
class Finding:
    """What changes the verdict: `effect` is the change of each of its numbers, such as N_opt at the target, in percent; nan where it
    cannot be told."""

    text: str
    effect: dict
    advice: str

    def __str__(self) -> str:
        known = {name: value for name, value in self.effect.items() if math.isfinite(value)}
        told = ", ".join(f"{name} {value:+.2g} %" for name, value in known.items() if abs(value) > 100 * ROUNDING)
        told = told or "no change" * bool(known)
        return "; ".join(part for part in (self.text + (f": {told}" if told else ""), self.advice) if part)


@dataclass(frozen=True)
class Verdict:
    """The method to believe at `flops` training FLOPs, why, and its numbers there with intervals: N_opt and L_opt. `scores` are relative
    errors of losses left out, (largest budget, sizes), by method. `passes` names the methods whose numbers the intervals hold; () = none
    may speak. `frontier.answers` says of a metric, of two ladders and of a frontier what these are there."""

    method: str
    reason: str
    flops: float
    beyond: float
    values: dict
    intervals: dict
    scores: dict
    passes: tuple
    findings: tuple = ()

    @property
    def silent(self) -> str:
        """Why nothing may be said at the target; "" = it may."""
        return "" if self.passes or self.beyond <= INSIDE else self.reason

    def to_json(self) -> dict:
        findings = [{"text": f.text, "effect_percent": f.effect, "advice": f.advice} for f in self.findings]
        own = {"method": self.method, "reason": self.reason, "at_flops": self.flops}
        named = set(self.values) <= set(QUANTITIES)  # else a metric, whose name may be any
        own |= self.values if named else {"values": self.values}
        return own | {"intervals": self.intervals, "findings": findings}


def errors(refit: Callable[[Sequence[Run]], Fit], runs: Sequence[Run]) -> tuple:
    """Relative RMS errors of the losses left out: (those of the largest budget, those of each part of the sizes in turn)."""
    near = {id(r) for r in _near(runs)}
    return tuple(_rms(refit, parts, near) for parts in (folds(runs, "largest"), _sizes(runs)))


def _near(runs: Sequence[Run]) -> list[Run]:
    """The runs whose size lies near the best of their budget; all of runs that form no budgets."""
    groups = budgets(runs)
    if not groups or scattered(groups):
        return list(runs)
    best = [(min(members, key=lambda r: r.loss).params, members) for _, members in groups]
    return [r for n, members in best for r in members if n / NEAR <= r.params <= n * NEAR]


def _sizes(runs: Sequence[Run]) -> list[tuple]:
    """(label, left, rest) for every PARTS-th size."""
    sizes = sorted({r.params for r in runs})
    parts = [set(sizes[i::PARTS]) for i in range(min(PARTS, len(sizes)))]
    return [("", [r for r in runs if r.params in part], [r for r in runs if r.params not in part]) for part in parts]


def _rms(refit: Callable, parts: Sequence[tuple], near: set) -> float:
    found = []
    for _, left, rest in parts:
        left = [r for r in left if id(r) in near]
        try:
            fit = refit(rest) if left else None
        except UsageError:
            continue
        found += [float(fit.loss(r.params, r.tokens)) / r.loss - 1 for r in left]
    found = [e for e in found if math.isfinite(e)]
    return math.sqrt(np.mean(np.square(found))) if found else math.nan


def judge(
    runs: Sequence[Run],
    fits: Mapping[str, Fit],
    refit: Callable[[str], Callable[[Sequence[Run]], Fit]],
    flops: float | int = 0.0,
    suspects: Sequence[tuple] = (),
) -> Verdict | None:
    """The verdict on `fits` (by method, examined by `beyond`) at `flops` (0: ten times the data); None if none of them answers.
    `refit(method)` fits other runs by that method; `suspects` are (text, advice, runs, bad): what is odd, the runs that it is about, and
    whether they are so bad that it is said whatever its effect."""
    able = {m: f for m, f in fits.items() if m in ANSWER}
    if not able:
        return None
    at = float(flops) or FAR * max(f.largest for f in able.values())
    again, said = {m: refit(m) for m in able}, {m: predict(f, at) for m, f in able.items()}
    scores = {m: errors(again[m], runs) for m in able}
    drawn = {m: not f.resamples or math.isfinite(said[m]["N_opt_interval"][0]) for m, f in able.items()}
    passes = tuple(m for m, f in able.items() if f.identified and drawn[m])
    order = sorted(passes or able, key=lambda m: next(filter(math.isfinite, scores[m]), math.inf))
    best = able[order[0]]
    own = said[best.method] if passes else dict.fromkeys(("N_opt_interval", "L_opt_interval"), NO_INTERVAL)
    speaks = bool(passes) or at <= INSIDE * best.largest
    made = Verdict(
        method=best.method,
        reason=_reason(order, scores, able, passes),
        flops=at,
        beyond=at / best.largest,
        values={name: said[best.method][name] if speaks else math.nan for name in QUANTITIES},
        intervals={name: _spanning(own[f"{name}_interval"], [said[m][name] for m in passes]) for name in QUANTITIES},
        scores=scores,
        passes=passes,
    )
    return replace(made, findings=_findings(made, best, said, again[best.method], runs, suspects))


def _spanning(own: tuple, others: Sequence) -> tuple:
    """The interval `own`, as much wider as it takes to hold `others`."""
    known = [*own, *(v for v in others if math.isfinite(v))]
    return (min(known), max(known)) if math.isfinite(own[0]) else NO_INTERVAL


def foretold(made: Verdict, fits: Mapping[str, Fit], run: Run) -> Extrapolation:
    """A trained run against the verdict: the expected loss of a run of its size by the method believed, and its interval with the noise of
    a run, so wide that it holds what the other methods that pass expect; none if no method may speak."""
    found, *others = (extrapolate(fits[m], run) for m in (made.method, *(m for m in made.passes if m != made.method)))
    if not made.passes:
        return replace(found, n_interval=NO_INTERVAL, interval=NO_INTERVAL)
    size = _spanning(found.n_interval, [e.n_opt for e in others])
    return replace(found, n_interval=size, interval=_spanning(found.interval, [e.predicted for e in others]))


def _reason(order: Sequence[str], scores: dict, able: Mapping[str, Fit], passes: tuple) -> str:
    """Why the first of `order` is believed, or why none is."""

    def told(method):
        parts = zip(("largest budget", "sizes"), scores[method], strict=True)
        return " and ".join(f"{s:.2%} ({name})" for name, s in parts if math.isfinite(s)) or "not known"

    best, *others = order
    text = f"its error on losses left out is {told(best)}"
    if others:
        text += ", " + ", ".join(f"{m}'s {told(m)}" for m in others)
    failed = [m for m in able if m not in order]
    if not passes:
        why = "; ".join(f"{m}: {f.reasons[0] if f.reasons else 'no interval'}" for m, f in able.items())
        return f"no method passes its tests ({why}); of {best}, {text}"
    return text + (f"; {', '.join(failed)} may not speak beyond the data" if failed else "")


def _findings(
    made: Verdict, best: Fit, said: dict, again: Callable, runs: Sequence[Run], suspects: Sequence[tuple]
) -> tuple:
    """At most MOST findings whose effect is a share WORTH of the half-widths or more, the largest first; first of all why no method passes,
    a target that is very far, and runs that are bad."""
    first, rest = [], []
    if not made.passes:
        first = [Finding(text, {}, "") for text in best.reasons[:MOST]]
    first += too_far(made)
    for method, other in said.items():
        if method != made.method:
            passed = "it passes its tests too" if method in made.passes else "it fails its tests"
            rest.append(Finding(f"{method} instead", effect(made, other), passed))
    tried: list[set] = []
    at_ends = [(f"without {name}", ODD_END, some, False) for name, some in ends(runs)]
    for text, advice, odd, bad in [*suspects, *at_ends]:
        gone = {id(r) for r in odd}
        if gone in tried:
            continue
        tried.append(gone)
        try:
            other = predict(again([r for r in runs if id(r) not in gone]), made.flops) if gone else {}
        except UsageError:
            other = {}
        (first if bad else rest).append(Finding(text, effect(made, other), advice))
    return telling(made, first, rest)


def too_far(made: Verdict) -> list[Finding]:
    """The distance of the target itself, if it is very far."""
    if not made.beyond > TOO_FAR:
        return []
    half = {name: _half(made, name) for name in made.values}
    known = any(map(math.isfinite, half.values()))
    text = f"the target is {made.beyond:.3g} times beyond the largest budget" + "; half of the interval there" * known
    return [Finding(text, half, "train a budget nearer to it")]


def telling(made: Verdict, first: Sequence[Finding], rest: Sequence[Finding]) -> tuple:
    """At most MOST findings: all of `first`, then those of `rest` whose effect is WORTH half-widths or more, the largest first."""
    weight = {id(f): _weight(made, f) for f in rest}
    kept = sorted((f for f in rest if weight[id(f)] >= WORTH), key=lambda f: -weight[id(f)])
    return tuple([*first, *kept][:MOST])


def ends(runs: Sequence[Run]) -> list[tuple]:
    """(which budget, its runs) of the smallest and of the largest one, where enough are left without it."""
    groups = sorted(budgets(runs), key=lambda g: g[1][0].flops)
    if len(groups) < 4 or scattered(groups):
        return []
    return [(f"the {name} budget", groups[i][1]) for name, i in (("smallest", 0), ("largest", -1))]


def effect(made: Verdict, other: Mapping) -> dict:
    """What `other` says of the target, relative to the verdict, in percent."""
    return {n: 100 * (other.get(n, math.nan) / v - 1) if v else math.nan for n, v in made.values.items()}


def _half(made: Verdict, name: str) -> float:
    """Half of the interval in percent."""
    low, high = made.intervals[name]
    return 50 * (high - low) / abs(made.values[name]) if made.values[name] else math.nan


def _weight(made: Verdict, finding: Finding) -> float:
    """The effect in half-widths, or in percent of the value where no interval is given."""
    told = ((n, abs(v)) for n, v in finding.effect.items() if math.isfinite(v) and abs(v) > 100 * ROUNDING)
    sizes = [v / (h if (h := _half(made, n)) > 0 else 1.0) for n, v in told]
    return max(sizes, default=0.0)


def lines(made: Verdict) -> list[str]:
    """The verdict in words: which method, the numbers, and what would change them."""
    name = f"believe {made.method}" if made.passes else "believe none beyond these data"
    parts = []
    for quantity, value in made.values.items():
        digits, (low, high) = DIGITS.get(quantity, ".4g"), made.intervals[quantity]
        if math.isnan(value):
            parts.append(f"{quantity} is not told")
        else:
            between = "no interval" if math.isnan(low) else f"{low:{digits}} to {high:{digits}}"
            parts.append(f"{quantity} {value:{digits}} ({between})")
    others = [name for name in made.passes if name != made.method]
    known = any(math.isfinite(low) for low, _ in made.intervals.values())
    say = "say" if len(others) > 1 else "says"
    spans = f"; the intervals hold what {' and '.join(others)} {say} too" if others and known else ""
    far = f"{made.beyond:.3g}x the largest budget"
    out = [f"Verdict: {name}: {made.reason}.", f"At {made.flops:.3g} FLOPs ({far}): {', '.join(parts)}{spans}."]
    return out + [f"  - {finding}" for finding in made.findings]
