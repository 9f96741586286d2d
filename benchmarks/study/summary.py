"""What the study's page says before and after its answers: the state of the records, what to pick, and how it compares with Mei et al."""

import math
from collections.abc import Sequence

import numpy as np

from benchmarks.study import decide, measure
from benchmarks.study.answers import find, ratio, span
from benchmarks.study.cells import Cell, Study, config_of
from benchmarks.study.claim import CHEAP, MEI_COST, SMALL_COST, UNIT, Claim, main_students
from benchmarks.study.select import Data, Family, short, undistilled
from dit_jax import flops

PICKED = (0.05, CHEAP, UNIT, SMALL_COST, MEI_COST)


def steps_of(cell: Cell) -> int:
    return config_of(cell).train.steps


def sizes(study: Study) -> tuple[tuple, list[tuple]]:
    """(head, rows) of the ladder: its parameters, the FLOPs of a call, and training steps at each budget, of students of the main share at
    the smallest."""
    students = [name for name in study.students if name not in study.later]
    head = (
        "size",
        "depth",
        "active parameters",
        "all parameters",
        "FLOPs of a call",
        *(f"steps at {short(b)}" for b in study.budgets),
    )
    head += tuple(f"{name.replace('_', ' ')} {study.main:.0%}, steps at {short(study.budgets[0])}" for name in students)  # fmt: skip
    found = []
    for size in study.sizes:
        model = config_of(Cell(study, size, study.budgets[-1])).model
        numbers = (flops.active_parameters(model), flops.parameters(model), flops.forward_flops(model))
        steps = [steps_of(Cell(study, size, budget)) for budget in study.budgets]
        steps += [steps_of(Cell(study, size, study.budgets[0], student=name, share=study.main)) for name in students]
        found.append((f"w{size[0]}", size[1], *(f"{n:,}" for n in (*numbers, *steps))))
    return head, found


def status(data: Data) -> list[str]:
    """What a reader must know of the records before reading the answers."""
    study, notes = data.study, [r["study"] for r in data.records]
    pairs = decide.rows(data, study)
    done = [row for row in pairs if row[-1] != decide.WAITING]
    of = {s: {p.name for b in data.budgets for p in data.points(undistilled(b, s))} for s in ("euler", "dpmpp_2m")}
    second = ", ".join(sorted(of["dpmpp_2m"])) or "no size"
    low, size = data.budgets[0], study.sizes[-1]
    students = [steps_of(Cell(study, size, low, student=n, share=s)) for n, s in main_students(data).items()]
    few = f"At {short(low)} the largest size had {steps_of(Cell(study, size, low)):,} training steps" + (
        f", its students {', '.join(f'{n:,}' for n in students)}" if students else ""
    )
    return [
        f"{len(data.budgets)} of {len(study.budgets)} training budgets ({', '.join(map(short, data.budgets))}), "
        f"{len({n['seed'] for n in notes})} of {study.seeds} seeds.",
        f"Euler for {len(of['euler'])} of {len(study.sizes)} sizes, DPM-Solver++ for {second}.",
        f"{len(done) or 'None'} of {len(pairs)} orders of the best two sizes scored again with {study.decisive:,} images"
        + f"; {sum(row[-1] == 'holds' for row in done)} hold." * bool(done)
        + "." * (not done),
        f"{few}: if large sizes lose, it may be for want of training.",
    ]


def limit(data: Data) -> str:
    """How much a score falls with infinitely many images, as extrapolated in the records; "" if it is not there."""
    name = data.metric
    found = [r["metrics"][name] - r["metrics"][f"{name}_inf"] for r in data.records if f"{name}_inf" in r["metrics"]]
    if not found:
        return ""
    return f"{np.median(found):.1f} ({min(found):.1f} to {max(found):.1f})"


def picks(data: Data) -> list[tuple]:
    """A row for each sampling budget: the best of teachers and students as measured, its score, and what the second-best size costs."""
    budget, found = data.budgets[-1], []
    families = [undistilled(budget), *(Family(budget, n, s) for n, s in main_students(data).items())]
    families = [family for family in families if data.runs(family) is not None]
    for relative in PICKED if families else ():
        tables = [data.table(family, np.array([relative * data.unit])) for family in families]
        chosen, scored = (np.stack([getattr(t, key)[:, :, 0] for t in tables], axis=1) for key in ("chosen", "scored"))
        if not np.isfinite(chosen[0]).any():
            continue
        family, size = np.unravel_index(np.argmin(chosen[0]), chosen[0].shape)
        best, point = best_of(chosen, scored), data.points(families[family])[tables[family].at[0, size, 0]]
        own, others = (
            (chosen[:, :, some], scored[:, :, some])
            for some in ([size], [i for i in range(len(data.widths)) if i != size])
        )
        regret = ratio(np.exp(best_of(*others) - best_of(*own))) if np.isfinite(others[0]).any() else ""
        second = np.where(np.arange(chosen.shape[2]) == size, np.inf, chosen[0].min(axis=0))
        named = f"w{data.widths[second.argmin()]}" if np.isfinite(second).any() else "none can draw"
        measured = ratio(np.exp(np.log(point.score) - data.noise(point)))
        what = f"w{data.widths[size]}, {families[family].title.partition(',')[0]}"
        numbers = f"{relative:g}", short(relative * data.unit), what, f"{point.steps:g}", f"{point.guidance:g}"
        found.append((*numbers, measured, ratio(np.exp(best)), named, regret))
    return found


def best_of(chosen: np.ndarray, scored: np.ndarray) -> np.ndarray:
    """log score (draws,) of what is chosen among all of (draws, families, sizes)."""
    flat = (len(chosen), -1)
    return np.take_along_axis(scored.reshape(flat), chosen.reshape(flat).argmin(axis=1)[:, None], 1)[:, 0]


def compared(data: Data, claims: Sequence[Claim]) -> list[tuple[str, str]]:
    """Each of Mei et al.'s statements, and what is found here."""
    budget, winner, folds = data.budgets[-1], "not recorded", []
    table = data.table(undistilled(budget), np.array([SMALL_COST * data.unit]))
    if table is not None and np.isfinite(table.chosen[0]).any():
        best = table.best()[0][:, 0]
        winner = f"w{data.widths[best[0]]} as measured, in {(best[1:] == best[0]).mean():.0%} of redraws"
    names = {name: share for name, share in main_students(data).items() if name not in data.study.later}
    for name, share in names.items():
        with np.errstate(invalid="ignore"):
            gains = np.median(measure.speedup(data, Family(budget, name, share))[1:], axis=0)
        if (known := gains[~np.isnan(gains)]).size:
            ends = [
                "more than the teacher reaches" if math.isinf(g) else f"{g:.1f}" for g in (known.min(), known.max())
            ]
            folds.append(f"{name.replace('_', ' ')} {' to '.join(dict.fromkeys(ends))}")
    equal = [(name.replace("_", " "), find(claims, 2, "second smallest", name, MEI_COST)) for name in names]
    equal = "; ".join(f"{name} {span(claim)}" for name, claim in equal if claim) or "not recorded"
    edge = find(claims, 1, "largest", "euler", SMALL_COST)
    return [
        (f"At cost {SMALL_COST:g} the 83M model, second smallest of eleven, has the best FID.",
         f"Best at cost {SMALL_COST:g}: {winner}. Largest over best smaller: {span(edge)}."),
        ("Distillation to 4 steps makes sampling about 5 times cheaper for every size.",
         f"Times cheaper, by size: {'; '.join(folds) or 'not recorded'}."),
        ("At cost 7 to 8 the undistilled 83M model equals the distilled 866M model, the ninth of eleven.",
         f"Undistilled second smallest over distilled largest at cost {MEI_COST:g}: {equal}; 1 = equal."),
    ]  # fmt: skip
