"""Every figure of fits, each a function that returns a matplotlib Figure. C in training FLOPs, N in active parameters, D in tokens."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dit_jax.scaling.fits.fit import Fit
from dit_jax.scaling.report.axes import (
    MOST,
    formula,
    legend,
    panels,
    plain,
    power,
    save,
    scale,
    shaded,
    style,
    thin,
    ticks,
)
from dit_jax.scaling.report.text import expected
from dit_jax.scaling.runs import Run, budgets

__all__ = ["frontier", "isoflop", "law", "plane", "reducible", "residuals", "save", "tested"]

C_LABEL, N_LABEL, D_LABEL, L_LABEL = "C (training FLOPs)", "N (active parameters)", "D (tokens)", "loss"
POINT = {"N_opt": "n_opt", "D_opt": "d_opt", "L_opt": "loss"}  # law -> the field of a Point
SHOWN = 8  # budgets in one panel
CURVE = 120  # places along a line
FIFTHS = 5  # groups of runs in order, whose medians are drawn
STAR = dict(marker="*", markersize=11, markerfacecolor="white", markeredgecolor="black", linestyle="", zorder=5)
UNITS = {"flops": "FLOPs of one sampled image", "seconds": "seconds of one sampled image"}


def isoflop(fit: Fit, runs: Sequence[Run]) -> Figure:
    """Loss against N at each budget: the runs, the curve that the fit expects with D = C / (k N), and the minima it goes through."""
    groups = [(p.label, p.flops, p.runs, p) for p in fit.points] or [
        (label, float(np.exp(np.mean([math.log(r.flops) for r in members]))), members, None)
        for label, members in budgets(runs)
    ]
    groups = thin(sorted(groups, key=lambda g: g[1]), SHOWN)
    figure, ((axis,),) = panels()
    sizes, losses, stars = [], [], []
    for i, (_, flops, members, point) in enumerate(groups):
        look = shaded(i, len(groups))
        members = thin(sorted(members, key=lambda r: r.params), MOST // len(groups))
        n, loss = [r.params for r in members], [r.loss for r in members]
        idle = point is not None and bool(point.problem)
        fill = {"markerfacecolor": "white" if idle else look["color"]}
        name = f"{power(flops, 2)} FLOPs" + " (not used)" * idle
        axis.plot(n, loss, linestyle="", marker=look["marker"], color=look["color"], markersize=4.5, label=name, **fill)
        sizes.append(n), losses.append(loss)
        grid = np.geomspace(min(n) / 1.15, max(n) * 1.15, CURVE)
        curve = np.broadcast_to(fit.loss(grid, flops / (fit.k * grid)), grid.shape)
        if np.ptp(curve) > 1e-9 * np.max(curve):  # else the fit says nothing of sizes
            axis.plot(
                grid, curve, linestyle=look["linestyle"], color=look["color"], linewidth=1.2, alpha=0.4 if idle else 1
            )
        if point is not None and math.isfinite(point.n_opt) and not idle:
            stars.append((point.n_opt, point.loss))
    if stars:
        axis.plot(*np.transpose(stars), label="optimum of a budget", **STAR)
    scale(axis, "x", N_LABEL, sizes)
    scale(axis, "y", L_LABEL, losses)
    legend(axis)
    return figure


def law(fits: Mapping[str, Fit], name: str, flops: Sequence[float] = ()) -> Figure:
    """N_opt, D_opt or L_opt (`name`) of every fit against compute, as far as the farthest of `flops`, with intervals as bands. Several
    fits have a second panel, of each law over the first fit's."""
    fits = {m: f for m, f in fits.items() if name in f.laws}
    figure, axes = panels(min(len(fits), 2), 1, 3.9 if len(fits) == 1 else 2.9)
    largest, first = max(f.largest for f in fits.values()), next(iter(fits.values()))
    smallest = min(p.flops for f in fits.values() for p in f.used or f.runs)
    grid = np.geomspace(smallest / 1.3, max([largest * 1.3, *flops]), CURVE)
    for axis, over in zip(axes[:, 0], (lambda c: 1.0, first.laws[name]), strict=False):
        lines, bands = [], []
        for i, (method, fit) in enumerate(fits.items()):
            look = style(i) | {"fillstyle": "none", "linewidth": 1.5, "markersize": 5}
            c, y = np.array([(p.flops, getattr(p, POINT[name])) for p in thin(fit.used)]).reshape(-1, 2).T
            y, best = y / over(c), fit.laws[name](grid) / over(grid)
            if axis is axes[-1, 0]:
                bands += _band(axis, fit, name, grid, look, "" if i else f"{fit.level:.0%} interval", over(grid))
            axis.plot(grid, best, **look | {"marker": ""})
            axis.plot(c, y, **look | {"linestyle": ""})
            label = formula(name, fit.laws[name]) if len(fits) == 1 else plain(method)
            axis.plot([], [], label=label, **look if len(c) else look | {"marker": ""})
            lines += [y, best]
        _edge(axis, largest)
        scale(axis, "x", C_LABEL, [grid])
        wide = np.array([np.max(np.nan_to_num(high - low)) for low, high in bands] or [0.0])
        usual = [edges for edges, w in zip(bands, wide, strict=False) if w <= 2 * np.median(wide)]
        scale(
            axis, "y", name if axis is axes[0, 0] else f"{name} over {plain(first.method)}'s", [*lines, *usual], bands
        )
    legend(axes[-1, 0])
    return figure


def _band(axis, fit: Fit, name: str, grid: np.ndarray, look: Mapping, label: str = "", over=1.0) -> list:
    """Draw the interval of a law along the grid, divided by `over`; returns [its two edges], or nothing if there are no resamples."""
    if name not in fit.draws:
        return []
    tail = (1 - fit.level) / 2
    with np.errstate(all="ignore"):  # of a law that is not determined some resamples are infinite
        low, high = np.quantile(fit.draws[name](grid[:, None]), [tail, 1 - tail], axis=1) / over
    axis.fill_between(grid, low, high, color=look["color"], alpha=0.1, linewidth=0, label=label or None)
    for edge in (low, high):
        axis.plot(grid, edge, color=look["color"], linestyle=look["linestyle"], linewidth=0.5, alpha=0.6)
    return [(low, high)]


def _edge(axis, largest: float) -> None:
    axis.axvline(largest, color="0.6", linewidth=0.9, linestyle=(0, (3, 3)), label="largest compute fitted", zorder=1)


def plane(fit: Fit, runs: Sequence[Run], flops: Sequence[float] = ()) -> Figure:
    """Runs in the plane of C and N, coloured by their loss, and N_opt with its interval if the fit tells it."""
    figure, ((axis,),) = panels()
    shown = thin(sorted(runs, key=lambda r: r.flops))
    c, n, loss = (np.array([getattr(r, name) for r in shown]) for name in ("flops", "params", "loss"))
    drawn = axis.scatter(c, n, c=loss, cmap="viridis_r", s=22, edgecolors="black", linewidths=0.3, label="a run")
    values, texts = ticks(loss.min(), loss.max(), log=False)
    bar = figure.colorbar(drawn, ax=axis, label=L_LABEL, pad=0.02)
    bar.set_ticks(values, labels=texts)
    firm, soft, grid = [n], [], np.geomspace(c.min(), max([c.max(), *flops]), CURVE)
    if "N_opt" in fit.laws:
        soft = _band(axis, fit, "N_opt", grid, style(0))
        axis.plot(
            grid, fit.laws["N_opt"](grid), color="black", linewidth=1.5, label=formula("N_opt", fit.laws["N_opt"])
        )
        firm.append(fit.laws["N_opt"](grid))
    scale(axis, "x", C_LABEL, [grid])
    scale(axis, "y", N_LABEL, firm, soft)
    legend(axis)
    return figure


def residuals(fit: Fit, runs: Sequence[Run]) -> Figure | None:
    """Measured loss over the expected one, less 1, against N, D and C; a heavy line joins medians of fifths of the runs. None if the fit
    tells no two sizes of one compute apart."""
    n, d, c, loss = (np.array([getattr(r, name) for r in runs]) for name in ("params", "tokens", "flops", "loss"))
    off = 100 * (loss / expected(fit, runs) - 1)
    if not np.isfinite(off).any():
        return None
    figure, axes = panels(3, 1, 2.3)
    for axis, x, label in zip(axes[:, 0], (n, d, c), (N_LABEL, D_LABEL, C_LABEL), strict=True):
        order = np.argsort(x, kind="stable")
        kept = np.array(thin(order.tolist()))
        axis.axhline(0, color="0.5", linewidth=0.8)
        axis.plot(
            x[kept], off[kept], linestyle="", marker="o", markersize=3.5, color="#0072b2", alpha=0.7, label="a run"
        )
        if len(runs) > 2 * FIFTHS:
            parts = np.array_split(order, FIFTHS)
            middle = [[np.exp(np.median(np.log(x[p]))), np.median(off[p])] for p in parts]
            axis.plot(*np.transpose(middle), color="black", linewidth=1.8, label="median of a fifth of the runs")
        scale(axis, "x", label, [x])
        scale(axis, "y", "loss / law \N{MINUS SIGN} 1 (%)", [off, [0.0]], log=False)
    legend(axes[-1, 0])
    return figure


def reducible(fits: Mapping[str, Fit], runs: Sequence[Run], flops: Sequence[float] = ()) -> Figure | None:
    """The reducible loss, less each fit's own irreducible term, against compute; None if no fit has such a term."""
    fits = {m: f for m, f in fits.items() if getattr(f.laws.get("L_opt"), "irreducible", 0.0) > 0}
    if not fits:
        return None
    figure, ((axis,),) = panels()
    first = next(iter(fits.values())).laws["L_opt"].irreducible
    shown = [r for r in thin(sorted(runs, key=lambda r: r.flops)) if r.loss > first]
    c = [r.flops for r in shown] or [f.largest for f in fits.values()]
    over, firm = [r.loss - first for r in shown], []
    axis.plot(c[: len(over)], over, ".", color="0.6", markersize=4, label=f"a run, less {first:.3g}")
    grid = np.geomspace(min(c), max([*c, *flops]), CURVE)
    for i, (method, fit) in enumerate(fits.items()):
        best, look = fit.laws["L_opt"], style(i)
        y = best(grid) - best.irreducible
        points = [(p.flops, p.loss - best.irreducible) for p in thin(fit.used)]
        axis.plot(grid, y, color=look["color"], linestyle=look["linestyle"], linewidth=1.5)
        axis.plot(
            *np.reshape(points, (-1, 2)).T, color=look["color"], linestyle="", marker=look["marker"], fillstyle="none"
        )
        look |= {} if points else {"marker": ""}
        axis.plot([], [], label=f"{plain(method)}, E = {best.irreducible:.3g}", **look, fillstyle="none")
        firm += [y, [v for _, v in points]]
    _edge(axis, max(f.largest for f in fits.values()))
    scale(axis, "x", C_LABEL, [grid])
    scale(axis, "y", "loss \N{MINUS SIGN} E", [*firm, over])
    legend(axis)
    return figure


def tested(fit: Fit, test) -> Figure:
    """The law of the best loss, and a model trained beyond the data: its predicted loss with interval, and the measured one."""
    figure, ((axis,),) = panels()
    grid, firm, soft = np.geomspace(fit.largest / 30, test.flops * 2, CURVE), [[test.measured]], []
    if "L_opt" in fit.laws:
        soft = _band(axis, fit, "L_opt", grid, style(0), f"{fit.level:.0%} interval of the law")
        axis.plot(
            grid, fit.laws["L_opt"](grid), color="black", linewidth=1.5, label=formula("L_opt", fit.laws["L_opt"])
        )
        firm.append(fit.laws["L_opt"](grid))
    used = [p for p in thin(fit.used) if p.flops >= grid[0]]
    axis.plot([p.flops for p in used], [p.loss for p in used], "ko", fillstyle="none", markersize=5)
    firm.append([p.loss for p in used])
    if math.isfinite(test.predicted):
        ends = np.array([[test.predicted - test.interval[0]], [test.interval[1] - test.predicted]])
        bar = dict(yerr=ends.clip(0)) if math.isfinite(ends.sum()) else {}
        look = dict(fmt="D", color="#d55e00", markerfacecolor="white", capsize=4, markersize=7)
        axis.errorbar(test.flops, test.predicted, **bar, **look, label="predicted, for one run")
        firm.append([test.predicted])
        soft = [*soft, [v for v in test.interval if math.isfinite(v)]]
    bar = dict(yerr=test.measured_se) if test.measured_se else {}
    axis.errorbar(test.flops, test.measured, fmt="s", color="#0072b2", markersize=5, zorder=6, label="measured", **bar)
    _edge(axis, fit.largest)
    scale(axis, "x", C_LABEL, [grid])
    scale(axis, "y", L_LABEL, firm, soft)
    legend(axis)
    return figure


def frontier(fit, points: Sequence, served: Sequence = ()) -> Figure:
    """Score against the cost of an image: every sampling, each model's best within a cost as a line with a marker where that best was
    measured, the Pareto front, and the costs at which a model stops winning. `served` adds a panel over training and all images."""
    figure, axes = panels(1, 2 if served else 1)
    axis, models = axes[0, 0], {name: shaded(i, len(fit.costs) + 1) for i, name in enumerate(fit.costs)}
    dots = [(p.name, getattr(p, fit.unit), p.score) for p in points]
    _cloud(axis, dots, models)
    for name, look in models.items():
        score = np.asarray(fit.curves[name][0])
        marked = np.flatnonzero(np.diff(score, prepend=np.nan) != 0)  # elsewhere a cheaper sampling is carried on
        axis.plot(fit.costs[name], score, linewidth=1.2, markersize=5, markevery=marked.tolist(), **look)
    _front(axis, [(getattr(p, fit.unit), p.score) for p in fit.front])
    for i, stop in enumerate(h for h in fit.handovers if np.isfinite(h.cost)):
        _handover(axis, stop, max(np.max(c) for c in fit.costs.values()), 0.97 - 0.05 * i)
    spread = [[score for _, _, score in dots]]
    scale(axis, "x", UNITS[fit.unit], [[cost for _, cost, _ in dots]])
    scale(axis, "y", f"{plain(fit.metric)} ({'higher' if fit.higher else 'lower'} is better)", spread)
    if served:
        axis, totals = axes[0, 1], [(s.point.name, s.total, s.point.score) for s in served]
        _cloud(axis, totals, models)
        sign, best = (-1 if fit.higher else 1), []
        for _, total, score in sorted(totals, key=lambda t: (t[1], sign * t[2])):
            if not best or sign * score < sign * best[-1][1]:
                best.append((total, score))
        _front(axis, best)
        scale(axis, "x", f"training FLOPs + FLOPs of {power(served[0].images)} images", [[t for _, t, _ in totals]])
        scale(axis, "y", plain(fit.metric), [[score for _, _, score in totals]])
    handles = [Line2D([], [], label=plain(name), linewidth=1.2, markersize=5, **look) for name, look in models.items()]
    ring = dict(marker="o", markerfacecolor="none", markeredgecolor="black", markersize=9)
    handles.append(Line2D([], [], color="0.75", linewidth=3, label="Pareto front", **ring))
    if fit.handovers:
        text = "a model stops winning, with interval"
        handles.append(Line2D([], [], color="0.2", linewidth=1.4, marker="|", markersize=7, label=text))
    figure.legend(handles=handles, loc="outside lower center", ncols=2 * len(axes[0]), frameon=False, fontsize=8.5)
    return figure


def _cloud(axis, dots: Sequence[tuple], models: Mapping) -> None:
    """Faint marks of (model, x, y), thinned within each model."""
    for name, look in models.items():
        own = thin([(x, y) for model, x, y in dots if model == name])
        if own:
            axis.plot(*np.transpose(own), **look | {"linestyle": ""}, markersize=3, alpha=0.35)


def _front(axis, best: Sequence[tuple]) -> None:
    if best:
        axis.plot(*np.transpose(best), "-", color="black", linewidth=3, alpha=0.25, zorder=1)
        axis.plot(*np.transpose(best), "o", markerfacecolor="none", markeredgecolor="black", markersize=9, zorder=5)


def _handover(axis, stop, right: float, height: float) -> None:
    """A vertical line at the cost, and its interval as a bar with caps at this height of the axes."""
    top, end = axis.get_xaxis_transform(), stop.cost
    axis.plot([stop.cost] * 2, [0, height], color="0.55", linewidth=0.8, linestyle=(0, (4, 3)), transform=top, zorder=1)
    if np.isfinite(stop.interval[0]):
        end = min(stop.interval[1], right)
        bar = dict(color="0.2", linewidth=1.4, marker="|", markersize=7, transform=top, zorder=4)
        axis.plot([stop.interval[0], end], [height] * 2, **bar)
    axis.plot(stop.cost, height, "o", color="0.2", markersize=3.5, transform=top, zorder=4)
    text = plain(f"{stop.model} to {stop.then}") + " or earlier" * stop.censored
    axis.annotate(f" {text}", (end, height), (3, 0), xycoords=top, textcoords="offset points", va="center", fontsize=7)
