"""What `metric`, `compare` and `frontier` say first: the answer, how sure it is, and what would change it (`verdicts.verdict`)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from dit_jax.error import UsageError
from dit_jax.scaling.fits.fit import INSIDE, NO_INTERVAL
from dit_jax.scaling.frontier.compare import Ladder
from dit_jax.scaling.frontier.frontier import UNITS, Frontier, Handover
from dit_jax.scaling.frontier.metric import CHANCE, MetricLaw, doubts
from dit_jax.scaling.report.text import DASH, span
from dit_jax.scaling.verdicts.beyond import FAR, NOT
from dit_jax.scaling.verdicts.verdict import ODD_END, Finding, Verdict, effect, lines, telling, too_far

CALLED = {"pure": "the pure power law", "irreducible": "the law with a floor"}
TELLING = 3  # points, from which a law may be followed beyond them
SAME = 1.05  # points within this factor of compute are of one budget
SURE = 0.95  # share of the resamples from which the best model at a cost is no question


def of_metric(fit: MetricLaw, metric: str, refit: Callable, flops: float | int = 0.0, asked: str = "") -> Verdict:
    """The verdict on a metric at `flops` training FLOPs (0: ten times the data): the law of the form that the scores ask for, or that was
    `asked` for, beside the other form and without each model in turn. `refit(points, form=)` fits other points. The methods are the forms
    of laws, `scores` the relative error of each at the largest budget without it."""
    at = float(flops) or FAR * fit.largest
    said, why, inside = fit.predict(at), doubts(fit, metric), at <= INSIDE * fit.largest
    if len(fit.used) < TELLING:
        why = [f"{len(fit.used)} points test no law of compute; train a further budget"]
    passes = () if why else (fit.form, *(form for form in fit.laws if form != fit.form and said["both_laws"]))
    scores = {form: (_error(fit, refit, form), math.nan) for form in fit.laws}
    made = Verdict(
        method=fit.form,
        reason=why[0].removeprefix(NOT) if why else _reason(fit, scores, asked),
        flops=at,
        beyond=said["beyond"],
        values={metric: said["score"] if passes or inside else math.nan},
        intervals={metric: said["interval"] if passes or inside else NO_INTERVAL},
        scores=scores,
        passes=passes,
    )
    first = too_far(made)
    if all(abs(p.score) <= 1 for p in fit.used) and made.values[metric] > 1:
        first.append(Finding("a share is at most 1", {}, f"follow 1-{metric}, which falls with compute"))
    rest = []
    for form in fit.laws:
        if form != fit.form:
            other = {metric: fit.laws[form].at(at, fit.level)[0]}
            held = "the scores speak against it" if _refuted(fit, form) else "the scores do not tell the two apart"
            rest.append(Finding(f"{CALLED[form]} instead", effect(made, other), held))
    for point in fit.used:
        try:
            other = {metric: refit([p for p in fit.used if p is not point], form=fit.form).predict(at)["score"]}
        except UsageError:
            continue
        rest.append(Finding(f"without {point.name}", effect(made, other), "train another model of nearly its compute"))
    return replace(made, findings=telling(made, first, rest))


def _refuted(fit: MetricLaw, form: str) -> bool:
    """Whether the test of a bend speaks against this form, as it does against a pure law only."""
    return form == "pure" and fit.bending_p < CHANCE


def _error(fit: MetricLaw, refit: Callable, form: str) -> float:
    """The relative error of the best score at the largest budget, by the law of this form through the other budgets."""
    rest = [p for p in fit.used if p.train * SAME < fit.largest]
    left = [p.score for p in fit.used if p.train * SAME >= fit.largest]
    try:
        return refit(rest, form=form).predict(fit.largest)["score"] / math.exp(sum(map(math.log, left)) / len(left)) - 1
    except (UsageError, IndexError):
        return math.nan


def _reason(fit: MetricLaw, scores: dict, asked: str) -> str:
    bend = f"test of a bend, p = {fit.bending_p:.2g}"
    bend = "too few points to tell a bend" if math.isnan(fit.bending_p) else bend
    forms = (fit.form, *(form for form in fit.laws if form != fit.form))
    told = ", ".join(f"{scores[f][0]:+.2%} by {CALLED[f]}" for f in forms if math.isfinite(scores[f][0]))
    wanted = f"--{asked} asks for it; " if asked else ""
    return wanted + bend + (f"; the largest budget, left out, is predicted {told}" if told else "")


def of_metric_lines(made: Verdict) -> list[str]:
    """The verdict on a metric in words."""
    passes = tuple(CALLED[form] for form in made.passes)
    return lines(replace(made, method=CALLED[made.method], passes=passes))


def of_comparison(a: Ladder, b: Ladder, c: dict, metric: str, without: dict) -> Verdict:
    """The verdict on two ladders, of their comparison `c`; `without` holds, by what was left out of one of them, the comparison of the
    rest. Its reason is the whole answer; `passes` are the sides, "a" and "b", whose laws may be followed beyond their data."""
    first, silent = c["exponents"][0], [side for side in (a, b) if side.reasons]
    apart = f"{abs(first['difference']):.4f} ({_between(first['interval'], '+.4f')})"
    if c["steeper"]:
        inside = "inside the data, " * bool(silent)
        text = f"{inside}{c['steeper']} scales better: its exponent is steeper by {apart}"
    else:
        text = f"the data do not say which scales better: the exponents differ by {apart}"
    level = f"{c['ratio']:.4f} times that of {c['a']} ({_between(c['ratio_interval'], '.4f')})"
    text += f". At {c['common']:.3g} FLOPs, the most that both reach, the {metric} of {c['b']} is {level}. "
    made = Verdict(
        method=c["form"],
        reason=text
        + (_crossing(c["crossing"], c["level"]) if c["crossing"] else "No crossing: the two are not measured alike"),
        flops=c["common"],
        beyond=1.0,
        values=_numbers(c),
        intervals={"ratio": c["ratio_interval"], "exponent_a": first["a_interval"], "exponent_b": first["b_interval"]},
        scores={},
        passes=tuple(name for name, side in zip("ab", (a, b), strict=True) if side not in silent),
    )
    said = []
    for side in silent:
        what = f"{side.name} tells no law beyond its data, so neither does the comparison: {side.reasons[0]}"
        said.append(Finding(what, {}, ""))
    rest = [Finding(f"without {what}", effect(made, _numbers(other)), ODD_END) for what, other in without.items()]
    return replace(made, findings=telling(made, said, rest))


def _numbers(c: dict) -> dict:
    first = c["exponents"][0]
    return {"ratio": c["ratio"], "exponent_a": first["a"], "exponent_b": first["b"]}


def _between(ends: tuple, digits: str) -> str:
    return "no interval" if math.isnan(ends[0]) else span(ends, digits)


def _crossing(x: dict, level: float) -> str:
    """The crossing of two ladders in words."""
    if x["flops"] == 0:
        text = f"{x['lower']} is the lower one at all compute looked at"
    else:
        far = f"{x['beyond']:.3g}x beyond the data" if x["beyond"] > 1 else f"{x['beyond']:.2g} of the largest budget"
        text = f"{x['lower']} is the lower one from {x['flops']:.3g} FLOPs on, {far}"
    between = reach(x["interval"], "always", "never, as far as one can say")
    return text + (f"; {level:.0%} interval of the crossing: {between}" if between != DASH else "")


def of_frontier(fit: Frontier) -> Verdict:
    """The verdict on a frontier, whose reason is the whole answer: the best model at each cost of an image. `passes` names the winners."""
    unit, stops = UNITS[fit.unit], {(h.model, h.then): h for h in fit.handovers}
    pairs = list(zip(fit.winners, [*fit.winners[1:], None], strict=True))
    parts = [
        f"{one.model} is the best {_until(one.high, unit, stops.get((one.model, then.model)))}"
        for one, then in pairs[:-1]
    ]
    last = fit.winners[-1].model
    text = ", then ".join([*parts, f"{last} from there on"]) if parts else f"{last} is the best at every cost tried"
    first = [
        Finding(f"{h.then} leads {h.model} from its cheapest sampling on", {}, f"score {h.then} with fewer steps")
        for h in fit.handovers
        if h.censored
    ]
    for w in fit.winners:
        if w.share < SURE:
            where = f"from {w.low:.3g} to {w.high:.3g} {unit}"
            what = f"{w.model} is the best in {w.share:.0%} of the resamples {where}"
            first.append(Finding(what, {}, "score with more images"))
    names = tuple(dict.fromkeys(w.model for w in fit.winners))
    made = Verdict("", text, math.nan, math.nan, {}, {}, {}, names)
    return replace(made, findings=telling(made, first, ()))


def _until(cost: float, unit: str, stop: Handover | None) -> str:
    """Up to which cost a model is the best, in words."""
    if stop is None:
        return f"up to {cost:.3g} {unit}"
    between = reach(stop.interval, "", "no end within the data")
    told = "" if between in (DASH, f"{stop.cost:.3g}") else f" ({between})"
    return f"{'at or below' if stop.censored else 'up to'} {stop.cost:.3g} {unit}{told}"


def plain(made: Verdict) -> list[str]:
    """A verdict whose reason is the whole answer, in words."""
    return [f"Verdict: {made.reason}.", *(f"  - {finding}" for finding in made.findings)]


def reach(ends: Sequence, none: str, never: str) -> str:
    """An interval of costs in words: 0 is `none`, inf is `never`, a dash where there is none."""
    if math.isnan(ends[0]):
        return DASH
    low, high = (never if math.isinf(v) else none if v == 0 else f"{v:.3g}" for v in ends)
    return low if low == high else f"{low} to {high}"
