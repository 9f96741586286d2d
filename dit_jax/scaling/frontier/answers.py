"""What `metric`, `compare` and `frontier` say first: the answer, how sure it is, and what would change it (`verdicts.verdict`)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from dit_jax.error import UsageError
from dit_jax.scaling.fits.fit import INSIDE, NO_INTERVAL
from dit_jax.scaling.frontier.compare import Ladder
from dit_jax.scaling.frontier.frontier import Frontier
from dit_jax.scaling.frontier.metric import MetricLaw, doubts
from dit_jax.scaling.report.text import DASH, span
from dit_jax.scaling.verdicts.beyond import FAR
from dit_jax.scaling.verdicts.verdict import Finding, Verdict, effect, lines, telling, too_far

CALLED = {"pure": "the pure power law", "irreducible": "the law with a floor"}
SURE = 0.95  # share of the resamples from which the best model at a cost is no question


def of_metric(fit: MetricLaw, metric: str, refit: Callable, flops: float | int = 0.0) -> Verdict:
    """The verdict on a metric at `flops` training FLOPs (0: ten times the data): the law of the form that the scores ask for, against
    the other form and without each model in turn. `refit(points, form)` fits other points."""
    at = float(flops) or FAR * fit.largest
    said, why = fit.predict(at), doubts(fit, metric)
    passes = () if why else tuple(f for f in (fit.form, *fit.laws) if f == fit.form or said["both_laws"])
    passes = tuple(dict.fromkeys(passes))
    speaks = bool(passes) or at <= INSIDE * fit.largest
    made = Verdict(
        method=fit.form,
        reason=_reason(fit, refit, why),
        flops=at,
        beyond=said["beyond"],
        values={metric: said["score"] if speaks else math.nan},
        intervals={metric: said["interval"] if passes else NO_INTERVAL},
        scores={form: (_error(fit, refit, form), math.nan) for form in fit.laws},
        passes=passes,
    )
    rest = []
    for form in fit.laws:
        if form != fit.form:
            held = "the scores do not tell the two apart" if fit.undecided else "the scores speak against it"
            other = {metric: fit.laws[form].at(at, fit.level)[0]}
            rest.append(Finding(f"{CALLED[form]} instead", effect(made, other), held))
    for point in fit.used:
        try:
            other = {metric: refit([p for p in fit.used if p is not point], fit.form).predict(at)["score"]}
        except UsageError:
            continue
        rest.append(Finding(f"without {point.name}", effect(made, other), "another training beside it would tell"))
    first = [Finding(text, {}, "train a budget nearer to the target") for text in why]
    return replace(made, findings=telling(made, [*first, *too_far(made)], rest))


def _error(fit: MetricLaw, refit: Callable, form: str) -> float:
    """The relative error of the score at the largest compute, by the law of this form through the others."""
    largest = fit.used[-1]
    try:
        return refit(fit.used[:-1], form).predict(largest.train)["score"] / largest.score - 1
    except UsageError:
        return math.nan


def _reason(fit: MetricLaw, refit: Callable, why: Sequence[str]) -> str:
    if why:
        return why[0]
    bend = "too few points tell a bend" if math.isnan(fit.bending_p) else f"test of a bend, p = {fit.bending_p:.2g}"
    errors = ((form, _error(fit, refit, form)) for form in (fit.form, *(f for f in fit.laws if f != fit.form)))
    told = ", ".join(f"{error:+.2%} by {CALLED[form]}" for form, error in errors if math.isfinite(error))
    return bend + (f"; the largest budget left out is predicted {told}" if told else "")


def of_metric_lines(made: Verdict) -> list[str]:
    """The verdict on a metric in words."""
    return lines(replace(made, passes=tuple(CALLED[form] for form in made.passes)), CALLED[made.method])


def of_comparison(a: Ladder, b: Ladder, c: dict, metric: str, ends: dict) -> Verdict:
    """The verdict on two ladders, of their comparison `c`; `ends` holds, by what was left out of both, the comparison of the rest."""
    first, x, silent = c["exponents"][0], c["crossing"], [side for side in (a, b) if side.reasons]
    apart = span(first["interval"], "+.4f")
    if c["steeper"]:
        inside = "inside the data, " * bool(silent)
        text = f"{inside}{c['steeper']} scales better, its exponent is {abs(first['difference']):.4f} steeper ({apart})"
    else:
        text = f"the data do not say which scales better, the exponents differ by {apart}"
    level = f"{c['ratio']:.4f} times that of {c['a']} (interval {span(c['ratio_interval'], '.4f')})"
    text += f"; at {c['common']:.3g} FLOPs, the most that both reach, the {metric} of {c['b']} is {level}; "
    made = Verdict(
        method=c["form"],
        reason=text + (crossing(x) if x else "no crossing, because the two are not measured alike"),
        flops=c["common"],
        beyond=1.0,
        values={"ratio": c["ratio"], "exponent_a": first["a"], "exponent_b": first["b"]},
        intervals={"ratio": c["ratio_interval"], "exponent_a": first["a_interval"], "exponent_b": first["b_interval"]},
        scores={},
        passes=tuple(name for name, side in zip("ab", (a, b), strict=True) if side not in silent),
    )
    said = [
        Finding(
            f"{side.name} tells no law beyond its data, so neither does the comparison: {side.reasons[0]}",
            {},
            "train budgets nearer to the target",
        )
        for side in silent
    ]
    advice = "one more budget beside it would tell whether it is odd or the laws bend"
    rest = [Finding(f"without {name}", effect(made, _numbers(other)), advice) for name, other in ends.items()]
    return replace(made, findings=telling(made, said, rest))


def _numbers(c: dict) -> dict:
    first = c["exponents"][0]
    return {"ratio": c["ratio"], "exponent_a": first["a"], "exponent_b": first["b"]}


def crossing(x: dict) -> str:
    """The crossing of two ladders in words."""
    if x["flops"] == 0:
        text = f"{x['lower']} is the lower one at all compute looked at"
    else:
        far = f"{x['beyond']:.3g}x beyond the data" if x["beyond"] > 1 else f"{x['beyond']:.2g} of the largest budget"
        text = f"{x['lower']} is the lower one from {x['flops']:.3g} FLOPs on, {far}"
    return f"{text}; interval {reach(x['interval'], 'always', 'never, as far as one can say')}"


def of_frontier(fit: Frontier) -> Verdict:
    """The verdict on a frontier: the best model at each cost of an image, and what is not sure about it."""
    unit, steps = {"flops": "FLOPs an image", "seconds": "seconds an image"}[fit.unit], []
    stops = {(h.model, h.then): h for h in fit.handovers}
    for one, then in zip(fit.winners, [*fit.winners[1:], None], strict=True):
        stop = stops.get((one.model, then.model)) if then else None
        between = reach(stop.interval, "", "never within the data") if stop else DASH
        told = f" ({between})" if between != DASH else ""
        steps.append(
            f"{one.model} is the best up to {one.high:.3g} {unit}{told}" if then else f"{one.model} from there on"
        )
    if len(fit.winners) == 1:
        steps = [f"{fit.winners[0].model} is the best at every cost tried"]
    first = [
        Finding(f"{h.then} leads {h.model} from its cheapest sampling on", {}, f"try {h.then} with fewer steps")
        for h in fit.handovers
        if h.censored
    ]
    for w in fit.winners:
        if w.share < SURE:
            where = f"from {w.low:.3g} to {w.high:.3g} {unit}"
            text = f"{w.model} is the best in {w.share:.0%} of the resamples {where}"
            first.append(Finding(text, {}, "more images a score would tell"))
    names = tuple(dict.fromkeys(w.model for w in fit.winners))
    made = Verdict("", ", then ".join(steps), math.nan, math.nan, {}, {}, {}, names)
    return replace(made, findings=telling(made, first, ()))


def plain(made: Verdict) -> list[str]:
    """A verdict whose reason is the whole answer, in words."""
    return [f"Verdict: {made.reason}.", *(f"  - {finding}" for finding in made.findings)]


def reach(ends: tuple, none: str, never: str) -> str:
    """An interval of costs in words: 0 is `none`, inf is `never`, a dash where there is none."""
    if math.isnan(ends[0]):
        return DASH
    low, high = (never if math.isinf(v) else none if v == 0 else f"{v:.3g}" for v in ends)
    return low if low == high else f"{low} to {high}"
