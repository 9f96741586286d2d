"""The figures of the study's page: a PNG each, the same bytes each time. Lines and bands are the page's own numbers."""

import math

import numpy as np
from matplotlib.figure import Figure

from benchmarks.study import measure
from benchmarks.study.answers import Answer
from benchmarks.study.claim import MEI_COST, UNIT, Claim, main_students
from benchmarks.study.select import Data, Family, middle, short, undistilled
from dit_jax.scaling.report import axes

COST = "FLOPs an image"
SHARE = 0.025  # of the redraws in which a size of the band is best


def scores(data: Data) -> Figure:
    """Scores against FLOPs an image, a curve for each size, a panel for the teachers and each student of the largest budget."""
    budget = data.budgets[-1]
    named = {"undistilled, Euler": undistilled(budget)}
    for name, share in main_students(data).items():
        named[f"{name.replace('_', ' ')}, {share:.0%} of the training"] = Family(budget, name, share)
    named = {title: family for title, family in named.items() if data.runs(family) is not None}
    figure, grid = axes.panels(columns=max(len(named), 1))
    every = [p for family in named.values() for p in data.points(family)]
    for axis, (title, family) in zip(grid[0], named.items(), strict=True):
        for index, width in enumerate(data.widths):
            points = [p for p in data.points(family) if p.name == f"w{width}"]
            if not points:
                continue
            look = axes.shaded(index, len(data.widths))
            run, best, _, _ = data.runs(family)[f"w{width}"]
            axis.step(run, np.exp(best[0]), where="post", color=look["color"], linewidth=1.5)
            axis.plot([p.flops for p in points], [p.score for p in points], color=look["color"], marker=look["marker"],
                      linestyle="none", markersize=4, alpha=0.6, label=f"w{width}")  # fmt: skip
        axes.scale(axis, "x", COST, [p.flops for p in every])
        axes.scale(axis, "y", data.metric, [p.score for p in every])
        axis.set_title(title, fontsize=10)
    axes.legend(figure)
    return figure


def band(data: Data, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(smallest, largest) of the sizes (1 + resamples, costs) best in at least SHARE of the redraws, and the measured one in row 0."""
    often = np.stack([(sizes[1:] == n).mean(axis=0) >= SHARE for n in data.params]) | (sizes[0] == data.params[:, None])
    return np.where(often, data.params[:, None], np.inf).min(axis=0), np.where(often, data.params[:, None], 0).max(
        axis=0
    )


def _sizes(axis, data: Data, family: Family, index: int, label: str) -> np.ndarray:
    """Draw the best size of a family against the costs run; returns these."""
    costs = data.costs(family, sizes=2)
    if not len(costs):
        return costs
    sizes, look = measure.best_sizes(data, family, costs), axes.style(index)
    low, high = (
        v * 1.03**side for v, side in zip(band(data, sizes), (-1, 1), strict=True)
    )  # a band of one size is seen too
    axis.fill_between(costs, low, high, step="post", color=look["color"], alpha=0.18, linewidth=0)
    axis.step(costs, sizes[0], where="post", color=look["color"], linestyle=look["linestyle"])
    axis.plot(costs, sizes[0], color=look["color"], marker=look["marker"], linestyle="none", markersize=4, label=label)
    return costs


def _ladder(axis, data: Data, costs, *families: Family) -> None:
    """The sizes as dashed lines, and a dotted one from where every size can draw."""
    for width, params in zip(data.widths, data.params, strict=True):
        axis.axhline(params, color="0.6", linewidth=0.7, linestyle="--", zorder=0)
        axis.annotate(f"w{width}", (1.0, params), xycoords=("axes fraction", "data"), fontsize=8, color="0.4", va="center",
                      xytext=(3, 0), textcoords="offset points")  # fmt: skip
    start = max((run[0] for f in families for run, *_ in (data.runs(f) or {}).values()), default=math.nan)
    axis.axvline(start, color="0.4", linewidth=1, linestyle=":", zorder=0)
    axes.scale(axis, "y", "best size, active parameters", [data.params[0] / 1.1, data.params[-1] * 1.1])
    axes.scale(axis, "x", COST, [costs])


def best_size(data: Data, answer: Answer) -> Figure:
    """The best size at each sampling budget, with each sampler: a panel for each training budget."""
    figure, grid = axes.panels(columns=len(data.budgets))
    for axis, budget in zip(grid[0], data.budgets, strict=True):
        families = {"Euler": undistilled(budget), "DPM-Solver++": undistilled(budget, "dpmpp_2m")}
        costs = [_sizes(axis, data, family, i, label) for i, (label, family) in enumerate(families.items())]
        _ladder(axis, data, np.concatenate(costs), *families.values())
        axis.set_title(f"{axes.raised(short(budget))} training FLOPs", fontsize=10)
    axes.legend(figure)
    return figure


def distilled(data: Data, answer: Answer) -> Figure:
    """The best size before and after distillation, above the best scores: a column for each student, at the largest budget."""
    budget = data.budgets[-1]
    students = [Family(budget, n, s) for n, s in main_students(data).items() if n not in data.study.later]
    students = [family for family in students if data.runs(family) is not None]
    figure, grid = axes.panels((3.4, 3.4), columns=len(students))
    drawn = []
    for column, student in enumerate(students):
        name, own, every = student.title.partition(",")[0], [], []
        for index, family in ((0, undistilled(budget)), (1 + column, student)):
            costs = _sizes(grid[0, column], data, family, index, "undistilled" if index == 0 else name)
            if not len(costs):
                continue
            draws, look = data.table(family, costs).best()[1], axes.style(index)
            value, low, high = np.exp([middle(draws[:, i]) for i in range(len(costs))]).T
            grid[1, column].fill_between(costs, low, high, step="post", color=look["color"], alpha=0.18, linewidth=0)
            grid[1, column].step(costs, value, where="post", color=look["color"], linestyle=look["linestyle"])
            grid[1, column].plot(
                costs, value, color=look["color"], marker=look["marker"], linestyle="none", markersize=4
            )
            own.append(costs)
            drawn += [low, high]
            every.append(family)
        _ladder(grid[0, column], data, np.concatenate(own), *every)
        axes.scale(grid[1, column], "x", COST, np.concatenate(own))
        grid[0, column].set_title(name, fontsize=10)
    for axis in grid[1]:
        axes.scale(axis, "y", f"{data.metric} of the best size", drawn)
    axes.legend(figure)
    return figure


LOOKS = {
    "stable": dict(color=axes.COLORS[0], marker="o", fillstyle="full"),
    "unstable": dict(color=axes.COLORS[3], marker="D", fillstyle="none"),
    "undecided": dict(color=axes.COLORS[6], marker="s", fillstyle="none"),
}


SHARED = (
    ": best score guided over unguided",
    ": score over the kept one's",
    ": score over that without at the same cost",
    " made afterwards",
)


def label_of(claim: Claim, many: bool) -> str:
    """What a row of a forest is called: without what the caption says."""
    text = claim.text
    for words in SHARED:
        text = text.replace(words, "")
    return f"{short(claim.budget)}, {text}" if many else text


def forest(data: Data, answer: Answer) -> Figure:
    """Ratios with their intervals, a row each; left of the line the first named is better."""
    rows = answer.claims
    figure, grid = axes.panels((1.6 + 0.3 * len(rows),), columns=1)
    axis, seen = grid[0, 0], set()
    figure.set_size_inches(1.6 * axes.SIZE[0], figure.get_size_inches()[1])
    for y, claim in enumerate(rows):
        look = LOOKS[claim.verdict]
        axis.plot(claim.interval, [y, y], color=look["color"], linewidth=1.6)
        axis.plot([claim.value], [y], linestyle="none", label=None if claim.verdict in seen else claim.verdict, **look)
        seen.add(claim.verdict)
    axis.axvline(1.0, color="0.3", linewidth=1)
    axis.set_yticks(range(len(rows)), [label_of(claim, len(data.budgets) > 1) for claim in rows], fontsize=9)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axes.scale(axis, "x", "ratio of scores, with over without", [1.0, *(v for c in rows for v in c.interval)])
    axes.legend(figure)
    return figure


def training(data: Data, answer: Answer) -> Figure:
    """The best score at two sampling costs against the training FLOPs of teacher and student together."""
    figure, grid = axes.panels(columns=2)
    for axis, relative in zip(grid[0], (UNIT, MEI_COST), strict=True):
        at, values, totals = np.array([relative * data.unit]), [], []
        series = {"undistilled": [(b, undistilled(b)) for b in data.budgets]}
        for name in dict.fromkeys(name for name, _ in data.students):
            shares = [share for other, share in data.students if other == name]
            series[name.replace("_", " ")] = [(b * (1 + s), Family(b, name, s)) for b in data.budgets for s in shares]
        for index, (label, some) in enumerate(series.items()):
            found = [(x, t.best()[1][:, 0]) for x, f in some if (t := data.table(f, at)) is not None]
            found = [(x, *np.exp(middle(draws))) for x, draws in found if np.isfinite(draws[0])]
            if not found:
                continue
            x, y, low, high = np.array(found).T
            look = axes.style(index)
            look |= {"linestyle": look["linestyle"] if index == 0 else "none"}
            axis.errorbar(x, y, [y - low, high - y], label=label, markersize=5, capsize=2, elinewidth=0.8, **look)
            values += [*low, *high]
            totals += [*x]
        axes.scale(axis, "x", "training FLOPs, teacher and student", totals)
        axes.scale(axis, "y", f"{data.metric} of the best size", values)
        axis.set_title(f"at cost {relative:g}: {axes.raised(short(relative * data.unit))} FLOPs an image", fontsize=10)
    axes.legend(figure)
    return figure


FIGURES = {1: best_size, 2: distilled, 3: forest, 4: training, 5: forest}
