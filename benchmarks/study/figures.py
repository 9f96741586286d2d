"""The figures of the study's page, of the wing's axes: a PNG each, the same bytes each time."""

import numpy as np
from matplotlib.figure import Figure

from benchmarks.study import measure
from benchmarks.study.answers import Answer
from benchmarks.study.select import Data, Family, ends
from dit_jax.scaling.report import axes

COST = "FLOPs an image"


def _band(axis, x, draws, index: int, label: str) -> None:
    """A line of draws[0] over x with the band of its resamples."""
    low, high = np.array([ends(column) for column in draws.T]).T
    look = axes.style(index)
    axis.plot(x, draws[0], label=label, markersize=3, **look)
    axis.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)


def _sizes(data: Data, families: dict[str, list[Family]], title: str) -> Figure:
    """Best active parameters against FLOPs an image: a panel for each budget, a line for each family."""
    figure, grid = axes.panels(columns=max(len(data.budgets), 1))
    for axis, budget in zip(grid[0], data.budgets, strict=True):
        for index, (label, some) in enumerate(families.items()):
            own = [family for family in some if family.budget == budget]
            draws = measure.best_sizes(data, own[0]) if own else None
            if draws is not None:
                _band(axis, data.costs, draws, index, label)
        axes.scale(axis, "x", COST, data.costs)
        axes.scale(axis, "y", "best size, active parameters", data.params)
        axis.set_title(f"{title}{axes.raised(f'{budget:.3g}')} training FLOPs", fontsize=10)
    axes.legend(figure)
    return figure


def best_size(data: Data, answer: Answer) -> Figure:
    """The best size at each sampling budget, with each sampler."""
    samplers = {"Euler": "euler", "DPM-Solver++": "dpmpp_2m"}
    return _sizes(data, {label: [Family(b, sampler=s) for b in data.budgets] for label, s in samplers.items()}, "")


def distilled(data: Data, answer: Answer) -> Figure:
    """The best size before and after distillation, above the best scores."""
    named = {"undistilled": ("", 0.0)}
    for name, share in data.students:
        if share == 0.05 and name != "mean_flow_inside":
            named[f"{name.replace('_', ' ')}, {share:.0%} of the training"] = (name, share)
    figure, grid = axes.panels((3.4, 3.4), columns=max(len(data.budgets), 1))
    for column, budget in enumerate(data.budgets):
        scores = []
        for index, (label, (name, share)) in enumerate(named.items()):
            family = Family(budget, name, share)
            draws, table = measure.best_sizes(data, family), data.logs(family)
            if draws is None:
                continue
            _band(grid[0, column], data.costs, draws, index, label)
            scores.append(np.exp(table.min(axis=1)))
            _band(grid[1, column], data.costs, scores[-1], index, label)
        grid[0, column].set_title(f"{axes.raised(f'{budget:.3g}')} training FLOPs", fontsize=10)
        axes.scale(grid[0, column], "y", "best size, active parameters", data.params)
        axes.scale(grid[1, column], "y", f"{data.metric} of the best size", [s[0] for s in scores])
        for axis in grid[:, column]:
            axes.scale(axis, "x", COST, data.costs)
    axes.legend(figure)
    return figure


def forest(data: Data, answer: Answer) -> Figure:
    """Ratios with their intervals, a row each; left of the line the first named is better."""
    rows = [claim for claim in answer.claims if np.isfinite(claim.interval[0])]
    figure, grid = axes.panels((0.9 + 0.28 * max(len(rows), 1),), columns=1)
    axis = grid[0, 0]
    figure.set_size_inches(2 * axes.SIZE[0], figure.get_size_inches()[1])
    for y, claim in enumerate(rows):
        low, high = claim.interval
        look = axes.style(0 if claim.side else 6)
        axis.plot([low, high], [y, y], color=look["color"], linewidth=1.4)
        axis.plot(
            [claim.value],
            [y],
            color=look["color"],
            marker="o" if claim.side else "s",
            fillstyle="full" if claim.side else "none",
        )
    axis.axvline(1.0, color="0.3", linewidth=1)
    axis.set_yticks(range(len(rows)), [claim.text.replace("_", " ") for claim in rows], fontsize=8)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axes.scale(axis, "x", "ratio of scores with 95 % interval; below 1 the first named is better", [1.0, *(c.value for c in rows)],
               [v for c in rows for v in c.interval])  # fmt: skip
    return figure


def training(data: Data, answer: Answer) -> Figure:
    """The best score at two sampling costs against the training FLOPs of teacher and student together."""
    figure, grid = axes.panels(columns=2)
    for axis, relative in zip(grid[0], (1.0, 7.5), strict=True):
        at, values, totals = np.array([relative * data.unit]), [], []
        series = {"undistilled": [(b, Family(b)) for b in data.budgets]}
        for name in dict.fromkeys(name for name, _ in data.students):
            shares = [share for other, share in data.students if other == name]
            series[name.replace("_", " ")] = [(b * (1 + s), Family(b, name, s)) for b in data.budgets for s in shares]
        for index, (label, some) in enumerate(series.items()):
            found = [
                (total, np.exp(table.min(axis=1)[:, 0])) for total, f in some if (table := data.logs(f, at)) is not None
            ]
            if not found:
                continue
            look, x, y = axes.style(index), [total for total, _ in found], [draws[0] for _, draws in found]
            bars = np.abs(np.array([ends(draws) for _, draws in found]).T - y)
            look |= {"linestyle": look["linestyle"] if index == 0 else "none"}
            axis.errorbar(x, y, bars, label=label, markersize=5, capsize=2, elinewidth=0.8, **look)
            values += y
            totals += x
        axes.scale(axis, "x", "training FLOPs, teacher and student", totals)
        axes.scale(axis, "y", f"{data.metric} of the best size", values)
        axis.set_title(
            f"at cost {relative:g}: {axes.raised(f'{relative * data.unit:.3g}')} FLOPs an image", fontsize=10
        )
    axes.legend(figure)
    return figure


FIGURES = {1: best_size, 2: distilled, 3: forest, 4: training, 5: forest}
