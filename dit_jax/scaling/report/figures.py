"""Every figure of fits, each a function that returns a matplotlib Figure. C in training FLOPs, N in active parameters, D in tokens."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure, FigureBase

from dit_jax.scaling.fits.fit import Fit
from dit_jax.scaling.report.axes import MOST, SIZE, legend, panels, plain, raised, save, scale, shaded, style, thin
from dit_jax.scaling.report.text import expected, law_text, worth
from dit_jax.scaling.runs import Run, budgets, scattered

__all__ = ["frontier", "isoflop", "law", "main", "residuals", "save"]

C_LABEL, N_LABEL, D_LABEL, L_LABEL = "C (training FLOPs)", "N (active parameters)", "D (tokens)", "loss"
POINT = {"N_opt": "n_opt", "D_opt": "d_opt", "L_opt": "loss"}  # law -> the field of a Point
RUN = {"N_opt": "params", "D_opt": "tokens", "L_opt": "loss"}  # law -> the field of a Run
SHOWN = 8  # budgets in one panel
CURVE = 120  # places along a line
FIFTHS = 5  # groups of runs in order, whose medians are drawn
STAR = dict(marker="*", markersize=11, markerfacecolor="white", markeredgecolor="black", linestyle="", zorder=5)
RING = dict(marker="o", markerfacecolor="none", markeredgecolor="black", markersize=9)
BAR = dict(color="0.2", linewidth=1.4, marker="|", markersize=7)
UNITS = {"flops": "FLOPs of one sampled image", "seconds": "seconds of one sampled image"}


def isoflop(fit: Fit, runs: Sequence[Run], on: FigureBase | None = None) -> FigureBase:
    """Loss against N at each budget: the runs, the curve that the fit expects with D = C / (k N), and the minima it goes through."""
    groups = [(p.flops, p.runs, p) for p in fit.points] or [
        (float(np.exp(np.mean([math.log(r.flops) for r in members]))), members, None) for _, members in budgets(runs)
    ]
    groups = thin(sorted(groups, key=lambda g: g[0]), SHOWN)
    figure, ((axis,),) = panels(on=on)
    sizes, losses, stars = [], [], []
    for i, (flops, members, point) in enumerate(groups):
        look = shaded(i, len(groups))
        members = thin(sorted(members, key=lambda r: r.params), MOST // len(groups))
        n, loss = [r.params for r in members], [r.loss for r in members]
        idle = point is not None and bool(point.problem)
        fill = {"markerfacecolor": "white" if idle else look["color"]}
        name = raised(f"{flops:.3g} FLOPs") + " (not used)" * idle
        axis.plot(n, loss, linestyle="", marker=look["marker"], color=look["color"], markersize=4.5, label=name, **fill)
        sizes.append(n), losses.append(loss)
        grid = np.geomspace(min(n) / 1.15, max(n) * 1.15, CURVE)
        unique = np.interp(grid, n, [r.unique for r in members])
        curve = np.broadcast_to(fit.loss(grid, worth(fit, flops / (fit.k * grid), unique)), grid.shape)
        if np.ptp(curve) > 1e-9 * np.max(curve):  # else the fit says nothing of sizes
            faint = dict(linewidth=1.2, alpha=0.4 if idle else 1)
            axis.plot(grid, curve, linestyle=look["linestyle"], color=look["color"], **faint)
        if point is not None and math.isfinite(point.n_opt) and not idle:
            stars.append((point.n_opt, point.loss))
    if stars:
        axis.plot(*np.transpose(stars), label="optimum of a budget", **STAR)
    scale(axis, "x", N_LABEL, sizes)
    scale(axis, "y", L_LABEL, losses)
    legend(figure)
    return figure


def law(
    fits: Mapping[str, Fit],
    name: str,
    flops: Sequence[float] = (),
    runs: Sequence[Run] = (),
    test=None,
    on: FigureBase | None = None,
) -> FigureBase:
    """N_opt, D_opt or L_opt (`name`) of every fit against compute, as far as the farthest of `flops`, with intervals as bands; `runs` as
    dots. Further panels show the laws of several fits over the first one's, and a loss less each fit's irreducible term E, of which a power
    law is a straight line. `test` is a model trained beyond the data (see `Report`), with the loss that the first fit predicted."""
    fits = {m: f for m, f in fits.items() if name in f.laws}
    first, largest = next(iter(fits.values())), max(f.largest for f in fits.values())
    smallest, field = min(p.flops for f in fits.values() for p in f.used or f.runs), RUN[name]
    views = [(name, lambda fit, c, y: y)]
    if len(fits) > 1:
        views.append((f"{name} over {plain(first.method)}'s", lambda fit, c, y: y / first.laws[name](c)))
    if any(f.laws[name].irreducible > 0 for f in fits.values()):
        views.append((f"{name} \N{MINUS SIGN} E", lambda fit, c, y: y - fit.laws[name].irreducible))
    figure, axes = panels([2.6] * len(views) if len(views) > 1 else SIZE[1:], on=on)
    grid = np.geomspace(min([smallest / 1.3, *flops]), max([largest * 1.3, *flops]), CURVE)
    dots = np.array([(r.flops, getattr(r, field)) for r in thin(sorted(runs, key=lambda r: r.flops))]).reshape(-1, 2).T
    for axis, (label, view) in zip(axes[:, 0], views, strict=True):
        lines, bands, ratio = [], [], len(fits) > 1 and axis is axes[1, 0]
        if not ratio and len(runs):
            axis.plot(dots[0], view(first, *dots), ".", color="0.7", markersize=4, label="a run", zorder=1)
            lines.append(view(first, *dots))
        for i, (method, fit) in enumerate(fits.items()):
            look = style(i) | {"fillstyle": "none", "linewidth": 1.5, "markersize": 5}
            c, y = np.array([(p.flops, getattr(p, POINT[name])) for p in thin(fit.used)]).reshape(-1, 2).T
            said, y = view(fit, grid, fit.laws[name](grid)), view(fit, c, y)
            if ratio or len(fits) == 1:
                bands += _band(axis, fit, name, grid, look, "" if i else f"{fit.level:.0%} interval", view)
            axis.plot(grid, said, **look | {"marker": ""})
            axis.plot(c, y, **look | {"linestyle": ""})
            text = plain(method) if len(fits) > 1 else raised(f"{name} = {law_text(fit.laws[name])}")
            axis.plot([], [], label=text, **look if len(c) else look | {"marker": ""})
            lines += [y, said]
        if test is not None:
            lines.append(_tested(axis, test, lambda y, view=view: view(first, np.array(test.flops), y)))
        axis.axvline(
            largest, color="0.6", linewidth=0.9, linestyle=(0, (3, 3)), label="largest compute fitted", zorder=1
        )
        wide = np.array([np.max(np.nan_to_num(high - low)) for low, high in bands] or [0.0])
        usual = [edges for edges, w in zip(bands, wide, strict=False) if w <= 2 * np.median(wide)]
        scale(axis, "x", C_LABEL if axis is axes[-1, 0] else "", [grid])
        scale(axis, "y", label, [*lines, *usual], bands)
    legend(figure)
    return figure


def _band(axis, fit: Fit, name: str, grid: np.ndarray, look: Mapping, label: str, view: Callable) -> list:
    """Draw the interval of a law along the grid, as `view` shows it; returns [its two edges], or nothing if there are no resamples."""
    if name not in fit.draws:
        return []
    tail = (1 - fit.level) / 2
    with np.errstate(all="ignore"):  # of a law that is not determined some resamples are infinite
        low, high = view(fit, grid, np.quantile(fit.draws[name](grid[:, None]), [tail, 1 - tail], axis=1))
    axis.fill_between(grid, low, high, color=look["color"], alpha=0.1, linewidth=0, label=label or None)
    for edge in (low, high):
        axis.plot(grid, edge, color=look["color"], linestyle=look["linestyle"], linewidth=0.5, alpha=0.6)
    return [(low, high)]


def _tested(axis, test, view: Callable) -> list:
    """Draw the predicted loss with its interval and the measured one beside it; returns the losses that must be seen."""
    low, middle, high, measured = (
        view(np.array(v)) for v in (test.interval[0], test.predicted, test.interval[1], test.measured)
    )
    bars = dict(yerr=[[max(middle - low, 0)], [max(high - middle, 0)]]) if math.isfinite(high - low) else {}
    look = dict(fmt="D", color="#d55e00", markerfacecolor="white", capsize=5, markersize=8)
    axis.errorbar(test.flops, middle, **bars, **look, label="predicted, for one run")
    bars = dict(yerr=test.measured_se) if test.measured_se else {}
    axis.errorbar(test.flops, measured, fmt="s", color="#0072b2", markersize=4, zorder=6, label="measured", **bars)
    return [float(v) for v in (low, middle, high, measured) if math.isfinite(v)]


def residuals(fit: Fit, runs: Sequence[Run]) -> Figure | None:
    """Measured loss over the expected one, less 1, against N, D and C; a heavy line joins medians of fifths of the runs. None if the fit
    tells no two sizes of one compute apart."""
    n, d, c, loss = (np.array([getattr(r, name) for r in runs]) for name in ("params", "tokens", "flops", "loss"))
    off = 100 * (loss / expected(fit, runs) - 1)
    if not np.isfinite(off).any():
        return None
    figure, axes = panels([2.3] * 3)
    for axis, x, label in zip(axes[:, 0], (n, d, c), (N_LABEL, D_LABEL, C_LABEL), strict=True):
        order = np.argsort(x, kind="stable")
        kept = np.array(thin(order.tolist()))
        axis.axhline(0, color="0.5", linewidth=0.8)
        axis.plot(x[kept], off[kept], "o", markersize=3.5, color="#0072b2", alpha=0.7, label="a run")
        if len(runs) > 2 * FIFTHS:
            parts = np.array_split(order, FIFTHS)
            middle = [[np.exp(np.median(np.log(x[p]))), np.median(off[p])] for p in parts]
            axis.plot(*np.transpose(middle), color="black", linewidth=1.8, label="median of a fifth of the runs")
        scale(axis, "x", label, [x])
        scale(axis, "y", "loss / law \N{MINUS SIGN} 1 (%)", [off, [0.0]], log=False)
    legend(figure)
    return figure


def main(fit: Fit, runs: Sequence[Run], flops: Sequence[float] = (), test=None) -> Figure:
    """The runs, N_opt and L_opt of one fit side by side, for a paper."""
    parts = [lambda on: isoflop(fit, runs, on=on)] * (not scattered(budgets(runs)))
    parts += [lambda on: law({fit.method: fit}, "N_opt", flops, runs, on=on)] * ("N_opt" in fit.laws)
    parts += [lambda on: law({fit.method: fit}, "L_opt", flops, (), test, on=on)] * ("L_opt" in fit.laws)
    figure = Figure(figsize=(SIZE[0] * len(parts), 1.4 * SIZE[1]), layout="constrained")
    for draw, on in zip(parts, np.atleast_1d(figure.subfigures(1, len(parts))), strict=True):
        draw(on)
    return figure


def frontier(fit, points: Sequence, served: Sequence = (), best: Sequence = ()) -> Figure:
    """Score against the cost of an image: every sampling, each model's best within a cost as a line with a marker where that best was
    measured, the Pareto front, and the costs at which a model stops winning. `served` adds a panel over training and all images; `best`
    is its Pareto front."""
    stops = [h for h in fit.handovers if np.isfinite(h.cost)]
    figure, axes = panels([0.2 * len(stops)] * bool(stops) + [SIZE[1]], 2 if served else 1)
    metric = f"{plain(fit.metric)} ({'higher' if fit.higher else 'lower'} is better)"
    axis, models = axes[-1, 0], {name: shaded(i, len(fit.costs) + 1) for i, name in enumerate(fit.costs)}
    _cloud(axis, [(p.name, getattr(p, fit.unit), p.score) for p in points], models, UNITS[fit.unit], metric)
    for name, look in models.items():
        score = np.asarray(fit.curves[name][0])
        marked = np.flatnonzero(np.diff(score, prepend=np.nan) != 0)  # elsewhere a cheaper sampling is carried on
        axis.plot(
            fit.costs[name], score, linewidth=1.2, markersize=5, markevery=marked.tolist(), label=plain(name), **look
        )
    _front(axis, [(getattr(p, fit.unit), p.score) for p in fit.front])
    if stops:
        _handovers(axes[0, 0], axis, stops)
        [above.set_axis_off() for above in axes[0]]
    if served:
        axis, totals = axes[-1, 1], [(s.point.name, s.total, s.point.score) for s in served]
        _cloud(axis, totals, models, raised(f"training FLOPs + FLOPs of {served[0].images:.4g} images"), metric)
        _front(axis, [(s.total, s.point.score) for s in best])
    axis.plot([], [], color="0.75", linewidth=3, label="Pareto front", **RING)
    if stops:
        axis.plot([], [], label="a model stops winning, with interval", **BAR)
    legend(figure)
    return figure


def _cloud(axis, dots: Sequence[tuple], models: Mapping, label: str, metric: str) -> None:
    """Faint marks of (model, x, y), thinned within each model, and axes that hold them."""
    for name, look in models.items():
        own = thin([(x, y) for model, x, y in dots if model == name])
        if own:
            axis.plot(*np.transpose(own), **look | {"linestyle": ""}, markersize=3, alpha=0.35)
    scale(axis, "x", label, [[x for _, x, _ in dots]])
    scale(axis, "y", metric, [[y for _, _, y in dots]])


def _front(axis, best: Sequence[tuple]) -> None:
    if best:
        axis.plot(*np.transpose(best), "-", color="black", linewidth=3, alpha=0.25, zorder=1)
        axis.plot(*np.transpose(best), linestyle="", **RING, zorder=5)


def _handovers(above, axis, stops: Sequence) -> None:
    """Vertical lines at the costs where models stop winning, and `above` them a bar with caps for each interval, and names."""
    above.set(xscale="log", xlim=axis.get_xlim(), ylim=(-0.5, len(stops) - 0.5))
    ends = axis.get_xlim()
    for i, stop in enumerate(stops):
        axis.axvline(stop.cost, color="0.55", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        low, high = np.clip(np.where(np.isfinite(stop.interval[0]), stop.interval, stop.cost), *ends)
        above.plot([low, high], [i, i], **BAR if high > low else {})
        above.plot(stop.cost, i, "o", color="0.2", markersize=3.5)
        left = high > math.sqrt(ends[0] * ends[1])  # room for the words is on the side of the middle
        look = dict(ha="right" if left else "left", va="center", textcoords="offset points", fontsize=7.5)
        text = plain(f"{stop.model} to {stop.then}") + " or earlier" * stop.censored
        above.annotate(text, (low if left else high, i), (-6 if left else 6, 0), **look)
