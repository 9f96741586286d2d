"""The five answers of the study in words: for each one sentence, its interval, a table, and what it does not show."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.study import measure
from benchmarks.study.claim import MEI_COST, SMALL_COST, Claim, short
from benchmarks.study.select import Data, Family
from dit_jax.scaling.frontier.choice import choose

QUESTIONS = {
    1: "Which size wins at which sampling budget?",
    2: "Does the small models' advantage survive distillation?",
    3: "What does guidance add, outside and inside?",
    4: "Relative to training compute, with the student's share counted?",
    5: "With EMAs made after training, and with reuse?",
}


FEW = "Too little is recorded to say: it takes three sizes of a family."


@dataclass(frozen=True)
class Answer:
    """One answer. `table`: (head, rows) of text."""

    number: int
    sentence: str
    interval: str
    table: tuple
    limits: tuple[str, ...]
    claims: tuple[Claim, ...]

    @property
    def question(self) -> str:
        return QUESTIONS[self.number]


def span(claim: Claim | None, digits: int = 2) -> str:
    """A claim's value with its interval, as text."""
    if claim is None or math.isnan(claim.value):
        return "unknown"
    low, high = claim.interval
    return f"{claim.value:.{digits}f}" + (
        "" if math.isnan(low) else f" (95 % interval {low:.{digits}f} to {high:.{digits}f})"
    )


def _find(claims: Sequence[Claim], *words: str) -> Claim | None:
    """The last claim (of the largest budget) whose text has all words."""
    found = [claim for claim in claims if all(word in claim.text for word in words) and not math.isnan(claim.value)]
    return found[-1] if found else None


def _says(claim: Claim | None, above: str, below: str, open_: str) -> str:
    """One of three phrases: the interval lies above what the claim denies, below it, or on both sides."""
    return open_ if claim is None or not claim.side else above if claim.side > 0 else below


def _winners(data: Data, family: Family) -> list[tuple]:
    """(model, from, to, share of the resamples) along the FLOPs of an image; stretches of less than a tenth of a decade are left out."""
    front = data.front(family)
    if front is None:
        return []
    wide = [w for w in front.winners if math.log10(w.high / w.low) >= 0.1]
    found: list = []
    for w in wide:
        if found and found[-1][0] == w.model:
            found[-1] = (w.model, found[-1][1], w.high, min(found[-1][3], w.share))
        else:
            found.append((w.model, w.low, w.high, w.share))
    return found


def best_size(data: Data, claims: Sequence[Claim]) -> Answer:
    rows, sizes = [], dict(zip(data.widths, data.params, strict=True))
    for budget in data.budgets:
        for sampler in ("euler", "dpmpp_2m"):
            for model, low, high, share in _winners(data, Family(budget, sampler=sampler)):
                size = f"{model} ({sizes[int(model[1:])]:,.0f})"
                rows.append((short(budget), sampler, size, short(low), short(high), f"{share:.0%}"))
    budget = data.budgets[-1]
    won = _winners(data, Family(budget, sampler="euler"))
    law, second = (
        _find(claims, f"{short(budget)}, euler", "exponent"),
        _find(claims, f"{short(budget)}, dpmpp_2m", "exponent"),
    )
    if len(won) < 2:
        text = FEW if not won else f"{won[0][0]} is the best size at every sampling budget tried."
    else:
        grows = _says(law, "and the best size grows with the sampling budget", "and it shrinks with the sampling budget",
                      "and no power law of the best size in the sampling budget is told")  # fmt: skip
        (small, _, until, _), (large, since, _, _) = won[0], won[-1]
        text = (
            f"Trained with {short(budget)} FLOPs and sampled by Euler, {small} is the best size below {short(until)} "
            f"FLOPs an image and {large} above {short(since)}, {grows}."
        )
    head = (
        "training FLOPs",
        "sampler",
        "best size (active parameters)",
        "from FLOPs an image",
        "to",
        "share of resamples",
    )
    limits = (
        "The best of several noisy scores is too low, the more so the more were tried. This is in every best score here, on both "
        "sides of a ratio.",
        "All sizes of a row had the same training FLOPs. Mei et al. trained all sizes for equally many steps, so that their larger models "
        "had more compute: the two questions differ, and at equal compute a large model can also be too little trained.",
        "The ladder has a smallest and a largest size: where one of them wins, a size outside it might.",
        _seeds(data),
        "The exponent holds over the sampling budgets whose best size lies inside the ladder, less than two decades.",
    )
    interval = f"Exponent of the best size in FLOPs an image: Euler {span(law)}, DPM-Solver++ {span(second)}."
    return Answer(1, text, interval, (head, rows), limits, _of(claims, 1))


def _seeds(data: Data) -> str:
    """How far two trainings of a cell differ."""
    found = measure.between_seeds(data)
    only = "Intervals hold the errors of the scores only, not a second training"
    if not found:
        return f"{only}: no cell is recorded with two seeds yet."
    spread = float(np.sqrt(np.mean(np.square(found))))
    return f"{only}: over {len(found)} pairs of scores of two seeds the log score differs by {spread:.2f} (root mean square)."


def _of(claims: Sequence[Claim], number: int) -> tuple[Claim, ...]:
    return tuple(claim for claim in claims if claim.answer == number)


def distilled(data: Data, claims: Sequence[Claim]) -> Answer:
    rows, parts = [], []
    for name, share in data.students:
        for budget in data.budgets:
            gains = measure.speedup(data, Family(budget), Family(budget, name, share))
            if not np.isnan(gains).all():
                cells = ["" if math.isnan(g) else "never" if math.isinf(g) else f"{g:.2g}" for g in gains]
                rows.append((short(budget), name.replace("_", " "), f"{share:.0%}", *cells))
    for name in ("consistency", "mean_flow"):
        ratio = _find(claims, f"{name} ", "over the undistilled best size")
        edge = _find(claims, f"{name} ", "best smaller", "cost 1")
        if ratio is None:
            continue
        size = _says(ratio, "larger than before", "smaller than before", "not told apart from before")
        wins = _says(
            edge,
            "a smaller size still beats the largest",
            "the largest size now wins",
            "it is not told whether the largest or a smaller size wins",
        )
        student = ratio.text.partition(":")[0].partition(", ")[2].replace("_", " ")
        parts.append(
            f"by {student} the best size at the same cost is {size}, and at the cost of one guided step of the largest {wins}"
        )
    text = FEW if not parts else f"At the largest budget recorded, {'; '.join(parts)}."
    mei = [_find(claims, f"{name} ", "second smallest") for name in ("consistency", "mean_flow")]
    ratios = [_find(claims, f"{name} ", "over the undistilled best size") for name in ("consistency", "mean_flow")]
    interval = (
        f"Best size after over before: consistency {span(ratios[0])}, mean flow {span(ratios[1])}. Undistilled second smallest over "
        f"distilled largest at cost {MEI_COST:g}: {span(mei[0])} and {span(mei[1])}."
    )
    head = ("training FLOPs", "student", "share", *(f"w{width}" for width in data.widths))
    limits = (
        "A student has few steps of training if its teacher is large and its share small: 5 % of the smallest budget is a "
        "dozen steps of the largest size. The rate was not tuned for each.",
        "Guidance inside is one value for all sizes; the best may differ.",
        "The table counts how many times fewer FLOPs an image the student needs for its own best score than its teacher; "
        "'never': the teacher does not reach that score.",
    )
    return Answer(2, text, interval, (head, rows), limits, _of(claims, 2))


def guidance(data: Data, claims: Sequence[Claim]) -> Answer:
    rows = []
    for budget in data.budgets:
        points = [p for p in data.points(Family(budget, sampler="euler")) if p.steps > 1]
        for steps in sorted({p.steps for p in points}):
            some = [p for p in points if p.steps == steps]
            best = {c.best.name: c for c in choose(some)} if some else {}
            cells = []
            for width in data.widths:
                c = best.get(f"w{width}")
                cells.append("" if c is None else f"{c.best.guidance:.2g}" + f" ({c.edge})" * bool(c.edge))
            rows.append((f"{short(budget)}", f"{steps:g}", *cells))
    plain = _find(claims, "undistilled, outside")
    flow, inside, both = (_find(claims, "mean_flow", word) for word in (", outside", ", inside", "inside over outside"))
    pays = _says(plain, "costs more than it gives", "pays for its second pass", "is not told to pay or to lose")
    makes = _says(inside, "makes the score worse", "makes the score better", "changes nothing that is told")
    which = _says(both, "worse than", "better than", "not told apart from")
    within = f"inside a flow map it {makes}, and is {which} guidance from outside at the same cost"
    within = within if inside else "inside a flow map it is not recorded yet"
    text = f"At the same FLOPs an image, guidance from outside {pays} for the undistilled models; {within}."
    text = text if plain or inside else FEW
    interval = (
        f"Guided over unguided: undistilled {span(plain)}, flow maps outside {span(flow)}, inside {span(inside)}; inside over "
        f"outside {span(both)}."
    )
    limits = (
        f"Scales tried: {', '.join(f'{g:g}' for g in data.guidances)}; inside 1.5 only. The table has the minimum of a quadratic of "
        "log score in log guidance; (highest) means that the best of those tried is the largest.",
        "The Frechet distance rewards variety, which guidance reduces; with a score of pictures one by one the answer may be another.",
        "Guidance in an interval of times and by a weaker model was not tried.",
    )
    head = ("training FLOPs", "Euler steps", *(f"w{width}" for width in data.widths))
    return Answer(3, text, interval, (head, rows), limits, _of(claims, 3))


def training(data: Data, claims: Sequence[Claim]) -> Answer:
    own = [claim for claim in _of(claims, 4) if not math.isnan(claim.value)]
    cheap, dear = ([c for c in own if c.text.endswith(f"cost {cost:g}")] for cost in (1.0, MEI_COST))
    if not own:
        text = "Too little is recorded to say: it takes three sizes of teachers and of students at two budgets."
        interval = "None."
    else:
        (better, worse), (good, bad) = (
            [sum(c.side == side for c in some) for side in (-1, 1)] for some in (cheap, dear)
        )
        last, costly = cheap[-1], dear[-1]
        text = (
            f"If an undistilled model is given the student's training FLOPs as well, distillation still gives the better "
            f"picture at the cost of one guided step of the largest size in {better} of {len(cheap)} cases and the worse one in "
            f"{worse}; at cost {MEI_COST:g} the better in {good} of {len(dear)} and the worse in {bad}."
        )
        interval = f"{last.text}: {span(last)}; cost {MEI_COST:g}: {span(costly)}."
    head = ("budget and student", "score ratio at cost 1", f"at cost {MEI_COST:g}")
    rows = (
        [(a.text.split(":")[0].replace("_", " "), span(a), span(b)) for a, b in zip(cheap, dear, strict=True)]
        if own
        else []
    )
    limits = (
        "The undistilled model of a total between two budgets is interpolated in log-log; above the largest budget the last slope is kept.",
        "A share of the training is counted, the pictures to be drawn are not: with many pictures the cheaper image repays any share.",
        "Students of more than a tenth of the training were not tried.",
    )
    return Answer(4, text, interval, (head, rows), limits, _of(claims, 4))


def free(data: Data, claims: Sequence[Claim]) -> Answer:
    own = _of(claims, 5)
    widths, reuse = [c for c in own if "EMA width" in c.text], [c for c in own if "reused" in c.text]
    parts = []
    for some, what in ((widths, "another width of the EMA made after training"), (reuse, "reusing half of the blocks")):
        better, worse = (sum(c.side == side for c in some) for side in (-1, 1))
        if some:
            parts.append(f"{what} is better at the same cost in {better} and worse in {worse} of {len(some)} cases")
    text = f"At no training cost, {'; '.join(parts)}." if parts else FEW
    rows = [(c.text, span(c), c.verdict) for c in own]
    interval = (
        "; ".join(f"{c.text.split(':')[0]}: {span(c)}" for c in [*widths[-2:], *reuse[-1:]]) + "." if own else "None."
    )
    limits = (
        "Widths are compared at one sampling (Euler, 16 steps, the smallest guidance), reuse at 8 and 16 steps of Euler and two guidances.",
        "FLOPs saved by reuse are not seconds: docs/evaluate.md has both for a larger model.",
        "Students were sampled without either.",
    )
    return Answer(5, text, interval, (("claim", "ratio", "verdict"), rows), limits, own)


def compared(data: Data, claims: Sequence[Claim]) -> list[tuple[str, str]]:
    """Each of Mei et al.'s statements, and what is found here."""
    cost3 = _find(claims, ", euler", f"cost {SMALL_COST:g}")
    mei = {name: _find(claims, f"{name} ", "second smallest") for name in ("consistency", "mean_flow")}
    winner = "unknown"
    if (front := data.front(Family(data.budgets[-1], sampler="euler"))) is not None:
        name, score, share = front.best(SMALL_COST * data.unit)
        winner = f"{name}, {data.metric} {score:.2f}, in {share:.0%} of the resamples"
    seven = "; ".join(f"{name.replace('_', ' ')} {span(claim)}" for name, claim in mei.items() if claim)
    last, folds = data.budgets[-1], []
    for name, share in data.students:
        gains = measure.speedup(data, Family(last), Family(last, name, share))
        if (known := gains[np.isfinite(gains)]).size:
            folds.append(f"{name.replace('_', ' ')} {share:.0%}: {known.min():.1f} to {known.max():.1f}")
    third = f"Best at cost {SMALL_COST:g}: {winner}. Largest over best smaller: {span(cost3)}."
    fold = f"Times cheaper, over the sizes that reach it: {', '.join(folds) or 'unknown'}."
    equal = f"Score of the undistilled second smallest size over the distilled largest at cost {MEI_COST:g}: {seven or 'unknown'}."
    return [
        ("At cost 3 the 83M model, second smallest of eleven, has the best FID.", third),
        ("Distillation to 4 steps makes sampling about 5 times cheaper for every size.", fold),
        ("At cost 7 to 8 the undistilled 83M model equals the distilled 866M model.", f"{equal} 1 = equal."),
    ]


ANSWERS = (best_size, distilled, guidance, training, free)
