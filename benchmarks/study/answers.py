"""The five answers of the study in words: for each one sentence, its interval, a table, and what it does not show.

A sentence uses only claims that are stable; all others it calls undecided.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.study import measure
from benchmarks.study.claim import CHEAP, MEI_COST, SMALL_COST, UNIT, Claim, main_students
from benchmarks.study.select import Data, Family, short, undistilled
from dit_jax.scaling.frontier.choice import choose

QUESTIONS = {
    1: "Which size wins at which sampling budget?",
    2: "Does the small models' advantage survive distillation?",
    3: "What does guidance add, outside and inside?",
    4: "What is best if training compute, the student's share included, is counted?",
    5: "Do EMAs made after training, or reuse of blocks, help?",
}
CAPTIONS = {
    1: "Best size within each cost. Black dots: as measured, at costs that some size ran. Band: the sizes best in at least 1 of 40 "
    "redraws, and the measured one. Dashed: the sizes of the ladder. Dotted: from here every size can draw.",
    2: "A column for each student, beside the undistilled models. Above, the best size, as in figure 1. Below, the score of the best size: "
    "median and 95 % interval of the redraws.",
    3: "Best score with guidance over that without, at the same cost: median and 95 % interval. Below 1 guidance pays.",
    4: "Best score within a sampling cost against the training FLOPs of teacher and student: median and 95 % interval.",
    5: "Score with over without, at the same cost: median and 95 % interval. Below 1 it helps.",
}
FEW = "Too little is recorded to say: it takes three sizes of a family."


@dataclass(frozen=True)
class Answer:
    """One answer. `table`: (caption, head, rows) of text; `drawn`: there is something to draw."""

    number: int
    sentence: str
    interval: str
    table: tuple
    limits: tuple[str, ...]
    claims: tuple[Claim, ...]
    drawn: bool = True

    @property
    def question(self) -> str:
        return QUESTIONS[self.number]

    @property
    def caption(self) -> str:
        return CAPTIONS[self.number]


def span(claim: Claim | None) -> str:
    """A claim's value with its interval, as text."""
    if claim is None:
        return "not recorded"
    return f"{claim.value + 0.0:z.2f} ({claim.interval[0]:z.2f} to {claim.interval[1]:z.2f})"


def ratio(draws: np.ndarray) -> str:
    """The same of draws."""
    claim = Claim(0, "", "", draws)
    return "" if math.isnan(claim.value) else span(claim)


def find(claims: Sequence[Claim], answer: int, kind: str, who: str = "", cost: float = 0.0) -> Claim | None:
    """The claim of this kind at the largest budget; None if it was not recorded there, whatever was at smaller ones."""
    key = (answer, kind, who, cost, max((c.budget for c in claims), default=0.0))
    return next((c for c in claims if (c.answer, c.kind, c.who, c.cost, c.budget) == key), None)


def says(claim: Claim | None, above: str, below: str, open_: str) -> str:
    """One of three phrases: the claim is stable and lies above what it denies, or below it, or it is not stable."""
    return open_ if claim is None or not claim.stable else above if claim.side > 0 else below


def place(data: Data) -> str:
    """The budget that sentences are about, in words."""
    only = "the only budget recorded" if len(data.budgets) == 1 else "the largest budget recorded"
    return f"At {short(data.budgets[-1])} training FLOPs, {only},"


def _of(claims: Sequence[Claim], number: int) -> tuple[Claim, ...]:
    return tuple(claim for claim in claims if claim.answer == number)


def _costs(costs: Sequence[float]) -> str:
    text = [f"{cost:g}" for cost in costs]
    return " and ".join(part for part in (", ".join(text[:-1]), *text[-1:]) if part)


def stretches(data: Data, family: Family) -> list[tuple[int, float, float]]:
    """(best size, from, to) as measured over the costs run, from where two sizes can draw; the last one holds at any higher cost."""
    costs = data.costs(family, sizes=2)
    if not len(costs):
        return []
    best, found = data.table(family, costs).best()[0][0], []
    for i, cost in enumerate(costs):
        if not i or best[i] != best[i - 1]:
            found.append([int(best[i]), cost, math.inf])
            if i:
                found[-2][2] = cost
    return [tuple(one) for one in found]


def _rows(data: Data, parts: Sequence[Data], budget: float, sampler: str) -> list[tuple]:
    """Rows of the table of winners: with how often each wins at its lowest and highest cost in redraws, and in remakes."""
    family, found = undistilled(budget, sampler), []
    costs = data.costs(family, sizes=2)
    for size, low, high in stretches(data, family):
        own = costs[(costs >= low) & (costs < high)]
        best, names = data.table(family, own).best()[0], f"w{data.widths[size]} ({data.params[size]:,.0f})"
        share = (best[1:] == size).mean(axis=0)
        tables = [(part, part.table(family, own)) for part in parts]
        same = [(t.best()[0][0] == p.widths.index(data.widths[size])).mean() > 0.5 for p, t in tables if t is not None]
        until = "on" if math.isinf(high) else f"below {short(high)}"
        share = f"{share.min():.0%} to {share.max():.0%}" if len(own) > 1 else f"{share[0]:.0%}"
        found.append((short(budget), sampler, names, short(low), until, share, f"{sum(same)} of {len(same)}"))
    return found


def best_size(data: Data, claims: Sequence[Claim], parts: Sequence[Data] = ()) -> Answer:
    rows = [row for b in data.budgets for s in ("euler", "dpmpp_2m") for row in _rows(data, parts, b, s)]
    costs = (UNIT, SMALL_COST, MEI_COST)
    edges, law = [find(claims, 1, "largest", "euler", cost) for cost in costs], find(claims, 1, "exponent", "euler")
    text = FEW
    if any(edges):
        said = []
        for who, side in (("a smaller size beats the largest", 1), ("the largest size beats all smaller ones", -1)):
            some = [cost for cost, edge in zip(costs, edges, strict=True) if edge and edge.stable and edge.side == side]
            said += [f"{who} at cost {_costs(some)}"] * bool(some)
        grows = says(law, "the best size grows with the sampling budget", "the best size shrinks with the sampling budget",
                     "whether the best size moves with the sampling budget is undecided")  # fmt: skip
        first = "; ".join(said) or "it is undecided whether a smaller size or the largest wins"
        text = f"{place(data)} {first}; {grows}."
    caption = (
        "Best size as measured, within costs that were run. In redraws: its share, over the costs of the row. In remakes: how often it is "
        "best at most of these costs."
    )
    head = ("training FLOPs", "sampler", "best size (active parameters)", "FLOPs an image from", "to")
    head += ("in redraws", "in remakes")
    used = measure.law(data, undistilled(data.budgets[-1]))[2]
    limits = (
        "All sizes had the same training FLOPs, so large ones had few steps: where they lose, they may be undertrained. Mei et al. trained "
        "all sizes for equally many steps, which is another question.",
        "Where the smallest or the largest size of the ladder wins, a size outside it might.",
        _seeds(data),
        f"The exponent is of the {len(used)} costs run, {short(used[0])} to {short(used[-1])}, at which the best size is inside the ladder."
        if len(used)
        else "No exponent: the best size lies inside the ladder at too few costs.",
    )
    interval = (
        f"Largest over best smaller at cost {_costs(costs)}: {', '.join(map(span, edges))}. Exponent of the best size in FLOPs an image: "
        f"Euler {span(law)}, DPM-Solver++ {span(find(claims, 1, 'exponent', 'dpmpp_2m'))}."
    )
    return Answer(1, text, interval, (caption, head, rows), limits, _of(claims, 1), bool(rows))


def _seeds(data: Data) -> str:
    """How far two trainings of a cell differ."""
    found = measure.between_seeds(data)
    only = "Intervals hold the errors of the scores only, not a second training"
    if not found:
        return f"{only}: no cell is recorded with two seeds yet."
    spread = float(np.sqrt(np.mean(np.square(found))))
    return f"{only}: over {len(found)} pairs of scores of two seeds the log score differs by {spread:.2f} (root mean square)."


def _times(data: Data, family: Family) -> str:
    """Size by size, how many times cheaper four steps of a student are."""
    with np.errstate(invalid="ignore"):
        gains, found = np.median(measure.speedup(data, family)[1:], axis=0), []
    for width, gain in zip(data.widths, gains, strict=True):
        if not math.isnan(gain):
            found.append(f"w{width} " + ("beats the teacher's best" if math.isinf(gain) else f"{gain:.2g}"))
    return ", ".join(found)


def distilled(data: Data, claims: Sequence[Claim], parts: Sequence[Data] = ()) -> Answer:
    rows, said, ratios, pays = [], [], [], []
    names = {name: share for name, share in main_students(data).items() if name not in data.study.later}
    for name, share in data.students:
        for budget in data.budgets:
            family = Family(budget, name, share)
            worth = [ratio(measure.best_ratio(data, undistilled(budget), family, c)) for c in (CHEAP, UNIT, MEI_COST)]
            if any(worth):
                rows.append((short(budget), f"{name.replace('_', ' ')} {share:.0%}", *worth, _times(data, family)))
    for name in names:
        size, edge = find(claims, 2, "size", name), find(claims, 2, "largest", name, UNIT)
        if size is None:
            continue
        now = says(size, "larger than before", "smaller than before", "not told apart from before")
        wins = says(edge, "a smaller size still beats the largest at cost 1", "the largest size now wins at cost 1",
                    "at cost 1 it is undecided whether the largest or a smaller size wins")  # fmt: skip
        worth = [find(claims, 2, "worth", name, cost) for cost in (CHEAP, UNIT, MEI_COST)]
        gives = []
        for what, side in (("better", -1), ("worse", 1), ("undecided", 0)):
            some = [c.cost for c in worth if c and (c.side if c.stable else 0) == side]
            gives += [f"{what} at cost {_costs(some)}"] * bool(some)
            pays += [f"by {name.replace('_', ' ')} at cost {_costs(some)}"] * bool(some and side < 0)
        said.append(
            f"by {name.replace('_', ' ')} {wins}, the best size is {now}, and the best score is {', '.join(gives)}"
        )
        ratios.append(f"{name.replace('_', ' ')} {span(size)}")
    whether = f"Distilling pays {' and '.join(pays)}" if pays else "Nothing here says that distilling pays"
    text = f"{place(data)} {'; '.join(said)}. {whether}." if said else FEW
    interval = f"Best size after over before, over all costs run: {', '.join(ratios)}." if ratios else ""
    caption = (
        "Best score over the undistilled one's at three costs, below 1 where distillation pays; and how many times cheaper "
        f"{measure.FEW} steps of the student are than what its teacher ran for the same score (median; below 1: dearer; steps run "
        "double, so to a factor of 2)."
    )
    if any("beats" in row[-1] for row in rows):
        caption += " 'Beats the teacher's best': no sampling that the teacher ran has so good a score."
    head = ("training FLOPs", "student", *(f"cost {c:g}" for c in (CHEAP, UNIT, MEI_COST)), "times cheaper")
    limits = (
        "Students of large sizes had few steps (table of sizes), and the rate was not tuned for each.",
        "Consistency has its guidance of 1.5 inside and takes one pass, so at the same cost it can be of twice the size or steps; and that "
        "guidance is one for all sizes.",
    )
    return Answer(2, text, interval, (caption, head, rows), limits, _of(claims, 2), bool(said))


def guidance(data: Data, claims: Sequence[Claim], parts: Sequence[Data] = ()) -> Answer:
    rows, highest, count = [], set(), 0
    for budget in data.budgets:
        points = [p for p in data.points(undistilled(budget)) if p.steps > 1]
        for steps in sorted({p.steps for p in points}):
            best = {c.best.name: c for c in choose([p for p in points if p.steps == steps])}
            cells = []
            for width in data.widths:
                c = best.get(f"w{width}")
                cells.append("" if c is None else f"{c.best.guidance:.3g}" + "*" * bool(c.edge))
                count += c is not None
                highest |= {(budget, steps, width)} if c is not None and c.edge else set()
            rows.append((short(budget), f"{steps:g}", *cells))
    said = []
    for who, name in (
        ("", "undistilled models"),
        ("mean_flow", "mean flow from outside"),
        ("inside", "mean flow inside"),
    ):
        own = [find(claims, 3, "guided", who, cost) for cost in (CHEAP, MEI_COST)]
        low, high = (says(c, "costs more than it gives", "pays", "is undecided") for c in own)
        if any(own):
            more = f"at cost {CHEAP:g} and {high} at" if low != high else f"at cost {CHEAP:g} and"
            said.append(f"{low} {more} {MEI_COST:g} for {name}")
    inside = "" if find(claims, 3, "guided", "inside", MEI_COST) else "; inside a flow map it is not recorded yet"
    text = f"{place(data)} guidance {'; '.join(said)}{inside}." if said else FEW
    shown = [(find(claims, 3, "guided", who, MEI_COST), words) for who, words in
              (("", "undistilled"), ("mean_flow", "mean flow outside"), ("inside", "inside"), ("both", "inside over outside"))]  # fmt: skip
    interval = f"Guided over unguided at cost {MEI_COST:g}: {', '.join(f'{words} {span(c)}' for c, words in shown)}."
    caption = "Best guidance: the minimum of a quadratic of log score in log guidance. *: the highest tried; the best may lie beyond."
    large = sorted({width for *_, width in highest})
    tried = f"Scales tried: {', '.join(f'{g:g}' for g in data.guidances)}; inside 1.5 only."
    if large:
        sizes = ", ".join(f"w{width}" for width in large)
        tried += f" {len(highest)} of {count} best ones are the highest tried, of {sizes}: a handicap for these."
    limits = (
        tried,
        "A Frechet distance rewards variety, which guidance reduces; with a score of pictures one by one the answer may be another.",
    )
    head = ("training FLOPs", "Euler steps", *(f"w{width}" for width in data.widths))
    return Answer(3, text, interval, (caption, head, rows), limits, _of(claims, 3), bool(_of(claims, 3)))


def training(data: Data, claims: Sequence[Claim], parts: Sequence[Data] = ()) -> Answer:
    own = _of(claims, 4)
    text, interval = (
        "Too little is recorded to say: it takes three sizes of teachers and of students at two budgets.",
        "",
    )
    if own:
        said = []
        for cost in (UNIT, MEI_COST):
            some = [c for c in own if c.cost == cost]
            good, bad = (sum(c.stable and c.side == side for c in some) for side in (-1, 1))
            said.append(f"better at cost {cost:g} in {good} of {len(some)} cases and worse in {bad}")
        text = f"Against undistilled models of the same total training FLOPs, students are {', '.join(said)}; the others are undecided."
        interval = f"{own[-1].text}: {span(own[-1])}."
    head = ("budget and student", f"cost {UNIT:g}", f"cost {MEI_COST:g}")
    keys = dict.fromkeys((c.budget, c.who) for c in own)
    spans = {(c.budget, c.who, c.cost): span(c) for c in own}
    rows = [(f"{short(b)}, {who}", *(spans.get((b, who, cost), "") for cost in (UNIT, MEI_COST))) for b, who in keys]
    limits = (
        "Undistilled scores at a total between two budgets are interpolated in log-log; above the largest the last slope goes on.",
        "The images to be drawn are not counted. The more there are, the less the training of a student matters.",
    )
    caption = "Best score over the undistilled one's of the same total training FLOPs."
    return Answer(4, text, interval, (caption, head, rows), limits if own else (), own, bool(own))


def free(data: Data, claims: Sequence[Claim], parts: Sequence[Data] = ()) -> Answer:
    own, said = _of(claims, 5), []
    for kind, what in (
        ("EMA", "another width of the EMA, made after training,"),
        ("reuse", "reusing half of the blocks"),
    ):
        some = [c for c in own if c.kind == kind]
        good, bad = (sum(c.stable and c.side == side for c in some) for side in (-1, 1))
        if some:
            said.append(f"{what} is better in {good} and worse in {bad} of {len(some)} cases")
    text = f"At the same cost, {'; '.join(said)}; the others are undecided or unstable." if said else FEW
    interval = "; ".join(f"{c.text}: {span(c)}" for c in own[-1:]) + "." * bool(own)
    limits = (
        "Widths are compared at one sampling (Euler, 16 steps, the smallest guidance), reuse at 8 and 16 steps of Euler and two guidances, "
        "with a sampling without reuse that costs at most as much, not the same.",
        "FLOPs saved by reuse are not seconds: [evaluate.md](evaluate.md) has both for a larger model.",
        "Students were sampled without either.",
    )
    return Answer(5, text, interval, ("", (), ()), limits, own, bool(own))


ANSWERS = (best_size, distilled, guidance, training, free)
