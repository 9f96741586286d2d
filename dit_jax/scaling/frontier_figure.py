"""The frontier as PNG bytes: score against the cost of an image, and against the total of training and images served."""

import numpy as np
from matplotlib.lines import Line2D

from dit_jax.scaling.figure import LINES, MARKERS, _figure, _loss_axis, _png, _shade
from dit_jax.scaling.frontier.frontier import Frontier, cost_of
from dit_jax.scaling.frontier.serving import front

UNITS = {"flops": "FLOPs of one sampled image", "seconds": "seconds of one sampled image"}


def frontier(fit: Frontier, points, served=()) -> bytes:
    """Every sampling as a mark, each model's best within a cost as a line, the Pareto front in bold, and where a smaller model
    stops winning as a vertical line with its interval as a bar. With `served`, a second panel over the total."""
    figure, axes = _figure(2 if served else 1, 12.0 if served else 8.0, 5.0)
    models = {name: i for i, name in enumerate(fit.costs)}
    _of_an_image(axes[0], fit, points, models)
    if served:
        _of_all(axes[1], fit, served, models)
    axes[-1].legend(
        handles=_legend(fit, models), frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5)
    )
    return _png(figure)


def _style(index: int, count: int) -> dict:
    return dict(color=_shade(index, count + count // 4 + 1), marker=MARKERS[index % len(MARKERS)])


def _score_axis(axis, fit: Frontier) -> None:
    _loss_axis(axis)
    axis.set_ylabel(f"{fit.metric} ({'higher' if fit.higher else 'lower'} is better)")


def _of_an_image(axis, fit: Frontier, points, models: dict) -> None:
    for p in points:
        style = _style(models[p.name], len(models))
        axis.plot(cost_of(p, fit.unit), p.score, linestyle="", markersize=3, alpha=0.35, **style)
    for name, i in models.items():
        style = _style(i, len(models))
        axis.plot(fit.costs[name], fit.curves[name][0], LINES[i % len(LINES)], linewidth=1.1, markersize=5, **style)
    x, y = ([*values] for values in zip(*((cost_of(p, fit.unit), p.score) for p in fit.front), strict=True))
    axis.plot(x, y, "-", color="black", linewidth=3, alpha=0.25, zorder=1)
    axis.plot(x, y, "o", markerfacecolor="none", markeredgecolor="black", markersize=9, markeredgewidth=1.0, zorder=5)
    right = max(costs.max() for costs in fit.costs.values())
    for n, h in enumerate(fit.handovers):
        if np.isfinite(h.cost):
            _handover(axis, h, right, 0.97 - 0.04 * n)
    axis.set_xlabel(UNITS[fit.unit])
    _score_axis(axis, fit)


def _handover(axis, h, right: float, height: float) -> None:
    """A vertical line at the cost, and its interval as a bar with caps at this height of the axes."""
    top = axis.get_xaxis_transform()
    end = h.cost
    axis.plot(
        [h.cost, h.cost], [0, height], color="0.55", linewidth=0.8, linestyle=(0, (4, 3)), transform=top, zorder=1
    )
    if np.isfinite(h.interval[0]):
        end = min(h.interval[1], right)
        bar = dict(color="0.2", linewidth=1.4, marker="|", markersize=7, transform=top, zorder=4)
        axis.plot([h.interval[0], end], [height, height], **bar)
    axis.plot(h.cost, height, "o", color="0.2", markersize=3.5, transform=top, zorder=4)
    label = f" {h.model} to {h.then}" + (" or earlier" if h.censored else "")
    axis.annotate(label, (end, height), (3, 0), xycoords=top, textcoords="offset points", va="center", fontsize=7)


def _of_all(axis, fit: Frontier, served, models: dict) -> None:
    for s in served:
        axis.plot(
            s.total, s.point.score, linestyle="", markersize=4, alpha=0.5, **_style(models[s.point.name], len(models))
        )
    best = front(served, fit.higher)
    x, y = [s.total for s in best], [s.point.score for s in best]
    axis.plot(x, y, "-", color="black", linewidth=3, alpha=0.25, zorder=1)
    axis.plot(x, y, "o", markerfacecolor="none", markeredgecolor="black", markersize=9, markeredgewidth=1.0, zorder=5)
    axis.set_xlabel(f"training FLOPs + FLOPs of {served[0].images:,.3g} images")
    _score_axis(axis, fit)


def _legend(fit: Frontier, models: dict) -> list:
    lines = [
        Line2D([], [], linestyle=LINES[i % len(LINES)], markersize=5, label=name, **_style(i, len(models)))
        for name, i in models.items()
    ]
    ring = dict(marker="o", markerfacecolor="none", markeredgecolor="black", markersize=10)
    lines.append(Line2D([], [], color="0.75", linewidth=3, label="Pareto front", **ring))
    if fit.handovers:
        stops = "a model stops winning" + (
            f", {fit.level:.0%} interval" if np.isfinite(fit.handovers[0].interval[0]) else ""
        )
        lines.append(Line2D([], [], color="0.2", linewidth=1.4, marker="|", markersize=7, label=stops))
    return lines
