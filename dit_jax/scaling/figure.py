"""The report's figures, as PNG bytes. Markers and line styles carry the meaning, so that they read in black and white."""

import io

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

MARKERS = "osD^vPX<>hp"
LINES = ("-", "--", "-.", ":")
FLOPS, PARAMS, TOKENS, LOSS = (
    "training FLOPs",
    "parameters active per token",
    "training tokens",
    "held-out loss (EMA weights)",
)


def _figure(columns: int, width: float, height: float):
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.set_xscale("log")
        axis.grid(True, color="0.9", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _shade(index: int, count: int):
    """Dark to light, in colours that keep their order in grey."""
    return colormaps["viridis"](0.85 * index / max(count - 1, 1))


def _loss_axis(axis) -> None:
    """A log axis whose ticks stay readable over a range of less than a decade."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.4g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_minor_locator(LogLocator(subs=()))


def _plain_ticks(axis) -> None:
    """A log axis of about one or two decades: ticks at 1, 2 and 5, written out."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{x:.3g}" if x < 1e3 else f"{x / 1e3:.3g}k" if x < 1e6 else f"{x / 1e6:.3g}M")
    )
    axis.set_minor_formatter(NullFormatter())


def isoflop(fit) -> bytes:
    """Loss against N at each budget, its parabola, and the minimum as a star; a budget not used is drawn hollow."""
    figure, (axis,) = _figure(1, 7.5, 4.8)
    for i, budget in enumerate(fit.budgets):
        color = _shade(i, len(fit.budgets))
        sizes = np.array([r.params for r in budget.runs])
        axis.errorbar(
            sizes,
            budget.losses,
            yerr=[r.loss_se for r in budget.runs],
            fmt=MARKERS[i % len(MARKERS)],
            color=color,
            markerfacecolor="none" if budget.problem else color,
            markersize=5,
            elinewidth=0.8,
            label=f"{budget.flops:.2g} FLOPs" + (" (not used)" if budget.problem else ""),
        )
        if budget.coefficients:
            u = np.geomspace(sizes.min() / 1.1, sizes.max() * 1.1, 100)
            axis.plot(
                u, budget(u), LINES[i % len(LINES)], color=color, linewidth=1.2, alpha=0.4 if budget.problem else 1
            )
        if not budget.problem:
            axis.plot(budget.n_opt, budget.loss, "*", color="black", markersize=11, markeredgecolor="white", zorder=5)
    axis.plot([], [], "*", color="black", markersize=11, label="minimum of the parabola")
    axis.set_xlabel(PARAMS)
    axis.set_ylabel(LOSS)
    _plain_ticks(axis.xaxis)
    _loss_axis(axis)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _png(figure)


def laws(fit, extrapolation=None) -> bytes:
    """N_opt, D_opt and L_opt against compute, with bands, the budgets' minima and the model that tests the law."""
    figure, axes = _figure(3, 11.5, 4.2)
    used = fit.used
    C = np.array([b.flops for b in used])
    far = max(C.max() * 4, extrapolation.flops * 1.3 if extrapolation else 0.0)
    grid = np.geomspace(C.min() / 1.3, far, 80)
    for axis, name, label, ours in zip(
        axes, ("N_opt", "D_opt", "L_opt"), (PARAMS, TOKENS, LOSS), ("n_opt", "d_opt", "loss"), strict=True
    ):
        if fit.draws:
            tail = (1 - fit.level) / 2
            low, high = np.quantile(fit.draws[name](grid[:, None]), [tail, 1 - tail], axis=1)
            axis.fill_between(grid, low, high, color="0.85", linewidth=0, label=f"{fit.level:.0%} band")
        law = fit.laws[name]
        fitted = grid <= C.max()
        axis.plot(grid[fitted], law(grid[fitted]), "k-", linewidth=1.3, label=formula(law))
        axis.plot(grid[~fitted], law(grid[~fitted]), "k--", linewidth=1.3, label="beyond the data")
        axis.plot(C, [getattr(b, ours) for b in used], "k*", markersize=9, label="minimum of a budget")
        axis.set_xlabel(FLOPS)
        axis.set_ylabel(label)
        axis.set_title(name.replace("_opt", "$_{opt}$"), fontsize=11)
    axes[2].plot(grid, fit.laws["L_opt_pure"](grid), "k:", linewidth=1, label="pure power law")
    for axis in axes[:2]:
        axis.set_yscale("log")
        _plain_ticks(axis.yaxis)
    _loss_axis(axes[2])
    if extrapolation:
        _test_point(axes, extrapolation)
    for axis, corner in zip(axes, ("upper left", "upper left", "upper right"), strict=True):
        axis.legend(frameon=False, fontsize=7.5, loc=corner)
    return _png(figure)


def _test_point(axes, e) -> None:
    def bar(value, interval):
        return None if np.isnan(interval).any() else [[max(value - interval[0], 0)], [max(interval[1] - value, 0)]]

    style = dict(fmt="D", color="C3", markerfacecolor="white", capsize=4, markersize=7, zorder=6)
    axes[0].errorbar(e.flops, e.n_opt, yerr=bar(e.n_opt, e.n_interval), label="predicted", **style)
    axes[0].plot(e.flops, e.params, "s", color="C0", markersize=6, zorder=7, label="trained")
    axes[2].errorbar(e.flops, e.predicted, yerr=bar(e.predicted, e.interval), label="predicted, for one run", **style)
    axes[2].errorbar(
        e.flops, e.measured, yerr=e.measured_se, fmt="s", color="C0", markersize=6, zorder=7, label="measured"
    )


def formula(law) -> str:
    """The law in words of mathematics."""
    term = f"{law.coefficient:.3g} C$^{{{law.exponent:.3f}}}$"
    return f"{law.irreducible:.3g} + {term}" if law.irreducible else term
