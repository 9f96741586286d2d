"""From fits to charts: curves of each budget or size, training curves, the laws with their bands, and the methods side by side."""

import math

import numpy as np

from dit_jax.scaling import plane
from dit_jax.scaling.chart import Axis, Chart, Mark, Panel, Style, frame, numbers, series, style_of
from dit_jax.scaling.optima import PointFit
from dit_jax.scaling.runs import budgets, scattered
from dit_jax.scaling.study import SurfaceFit

GRID = 80  # points of a line
WIDE = 3  # panels in a row
APART = 15.0  # times the median interval, from which a bar may leave its panel
FAR = 4.0  # laws are drawn to this multiple of the largest run
END = Style("#888888", "", (3, 3), width=0.9)
BEST = Style("#000000", "*", (), size=10)
OFTEN = 12  # levels of a ladder from which it is shown as isoFLOP curves or as curves of one size, at most


def labels_of(runs) -> dict:
    """What C, N, D and L are called on axes: records say what their loss is, a CSV does not."""
    loss = "loss"
    if runs and runs[0].protocol:
        raw = runs[0].protocol.get("weights") == "params (raw)"
        loss = f"held-out loss ({'raw' if raw else 'EMA'} weights)"
    params = "parameters active per token" if runs and runs[0].protocol else "parameters"
    return {"C": "training FLOPs", "N": params, "D": "training tokens", "L": loss}


def curves(fits: dict, runs, tips: dict, labels: dict) -> Chart:
    """Loss against N at each budget with every method's curve; of runs that share no budgets, loss against D at each size, or, where
    they share no sizes either, the runs and surfaces in the plane of compute and size."""
    groups = budgets(runs)
    groups = (
        []
        if scattered(groups)
        else [(label, members) for label, members in groups if len({r.params for r in members}) > 2]
    )
    spoken = {m: f for m, f in fits.items() if m == "isoflop" or isinstance(f, SurfaceFit) or m == "akima"}
    if groups:
        groups.sort(key=lambda g: g[1][0].flops)
        unused = {b.label for b in fits["isoflop"].budgets if b.problem} if "isoflop" in fits else set()
        panels = [_budgets(m, f, groups, unused, tips, labels) for m, f in (spoken or {"": None}).items()]
        title, text = (
            "IsoFLOP curves",
            "Each curve is one compute budget spent on models of different sizes; stars mark the minima.",
        )
        if unused:
            text += " Budgets drawn hollow are not used by isoflop."
    else:
        surfaces = {m: f for m, f in spoken.items() if isinstance(f, SurfaceFit)}
        if surfaces and plane.fits_plane(runs):
            panels = [plane.panel(f, runs, tips, labels) for f in surfaces.values()]
            title, text = "Lines of equal loss", "Each line is where a surface has the loss between two bands of runs."
        else:
            panels = [_sizes(m, f, runs, tips, labels) for m, f in (surfaces or {"": None}).items()]
            title, text = (
                "Loss against data at each size",
                "Each curve is one model size trained on different amounts of data.",
            )
    rows = tuple(tuple(panels[i : i + WIDE]) for i in range(0, len(panels), WIDE))
    return Chart("isoflop", title, text, rows)


def _budgets(method: str, fit, groups, unused, tips, labels) -> Panel:
    """One panel: the runs of each budget and a method's curves through them."""
    marks: list = []
    stars: list = []
    for i, (label, members) in enumerate(groups):
        members = sorted(members, key=lambda r: r.params)
        hollow = label in unused
        style = series(i, len(groups), filled=not hollow)
        flops = math.exp(np.mean([math.log(r.flops) for r in members]))
        name = f"{flops:.2g} FLOPs" + (" (not used)" if hollow else "")
        line, star = _curve(fit, label, members)
        if line:
            marks.append(Mark("line", *line, style, name, method, faint=hollow))
        marks.append(_points(members, style, name, "params", tips))
        stars += [star] if star else []
    if stars:
        said = tuple(f"{method}: lowest at N = {n:.4g}, loss {loss:.4f}" for n, loss in stars)
        marks.append(Mark("points", *zip(*stars, strict=True), BEST, "lowest of the curve", method, tips=said))
    return Panel(Axis(labels["N"], kind="count"), Axis(labels["L"]), tuple(marks), method, method)


def _curve(fit, label: str, members) -> tuple:
    """((N, loss) of a method's curve at a budget or None, (N, loss) of its lowest point or None)."""
    n = np.array([r.params for r in members])
    grid = np.geomspace(n.min() / 1.1, n.max() * 1.1, GRID)
    if isinstance(fit, SurfaceFit):
        product = np.exp(np.interp(np.log(grid), np.log(n), [math.log(r.params * r.tokens) for r in members]))
        loss = np.asarray(fit(grid, product / grid))  # D as the runs' own: exact FLOPs are no multiple of N D
        i = int(loss.argmin())
        star = (float(grid[i]), float(loss[i])) if 0 < i < len(grid) - 1 else None
        return (numbers(grid), numbers(loss)), star
    if isinstance(fit, PointFit):
        found = [(p.n_opt, p.loss) for p in fit.points if p.label == label]
        return _interpolated(members, grid), found[0] if found else None
    if fit is None:
        return None, None
    budget = next((b for b in fit.budgets if b.label == label), None)
    if budget is None or not budget.coefficients:
        return None, None
    inside = [r.params for r in budget.runs]
    grid = np.geomspace(min(inside) / 1.1, max(inside) * 1.1, GRID)
    return (numbers(grid), numbers(budget(grid))), None if budget.problem else (budget.n_opt, budget.loss)


def _interpolated(members, grid) -> tuple | None:
    """Akima's curve of log loss through a budget's runs, those of one size by their mean."""
    from scipy.interpolate import Akima1DInterpolator

    sizes = sorted({r.params for r in members})
    if len(sizes) < 4:
        return None
    loss = [np.mean([math.log(r.loss) for r in members if r.params == size]) for size in sizes]
    grid = grid[(grid >= sizes[0]) & (grid <= sizes[-1])]
    return numbers(grid), numbers(np.exp(Akima1DInterpolator(np.log(sizes), loss)(np.log(grid))))


def _sizes(method: str, fit, runs, tips, labels) -> Panel:
    """One panel: the runs of each size against D, and the surface there."""
    marks: list = []
    sizes = sorted({r.params for r in runs})
    if len(sizes) > OFTEN:
        sizes = [sizes[i] for i in np.linspace(0, len(sizes) - 1, OFTEN).round().astype(int)]
    else:
        sizes = list(sizes)
    for i, size in enumerate(sizes):
        members = sorted((r for r in runs if r.params == size), key=lambda r: r.tokens)
        style = series(i, len(sizes))
        d = [r.tokens for r in members]
        if fit is not None:
            grid = np.geomspace(min(d) / 1.2, max(d) * 1.2, GRID)
            marks.append(Mark("line", numbers(grid), numbers(fit(size, grid)), style, f"N = {size:.3g}", method))
        marks.append(_points(members, style, f"N = {size:.3g}", "tokens", tips))
    return Panel(Axis(labels["D"], kind="count"), Axis(labels["L"]), tuple(marks), method, method)


def _points(members, style: Style, label: str, by: str, tips: dict) -> Mark:
    errors = any(r.loss_se for r in members)
    return Mark(
        "points",
        numbers([getattr(r, by) for r in members]),
        numbers([r.loss for r in members]),
        style,
        label,
        low=numbers([r.loss - r.loss_se for r in members]) if errors else (),
        high=numbers([r.loss + r.loss_se for r in members]) if errors else (),
        tips=tuple(tips.get(r.name, r.name) for r in members),
        runs=tuple(r.name for r in members),
    )


def training(rows, fit, labels: dict) -> Chart | None:
    """Loss against compute along each training run with at least 3 checkpoints, and the crossings that the envelope goes through."""
    found: dict = {}
    for r in rows:
        found.setdefault((r.name, r.params), []).append(r)
    found = {key: sorted(part, key=lambda r: r.flops) for key, part in found.items() if len(part) > 2}
    if len(found) < 2:
        return None
    marks = []
    ordered = sorted(found, key=lambda key: key[1])
    for i, (name, params) in enumerate(ordered):
        part = found[name, params]
        c, loss = numbers([r.flops for r in part]), numbers([r.loss for r in part])
        said = tuple(f"{name}\nN {params:.4g}, D {r.tokens:.4g}, C {r.flops:.4g}\nloss {r.loss:.4f}" for r in part)
        style = series(i, len(ordered), size=2.5)
        legend = f"N = {params:.3g}" if len(ordered) <= 2 * OFTEN else ""
        marks.append(Mark("line", c, loss, style, legend))
        marks.append(Mark("points", c, loss, style, "", tips=said, runs=(name,) * len(part)))
    if fit is not None:
        c, loss = (numbers([getattr(p, name) for p in fit.points]) for name in ("flops", "loss"))
        said = tuple(
            f"envelope: two sizes cross at C = {p.flops:.4g}; best between them N = {p.n_opt:.4g}, loss {p.loss:.4f}"
            for p in fit.points
        )
        marks.append(Mark("points", c, loss, BEST, "crossing of two sizes", "envelope", tips=said))
        grid = np.geomspace(min(c), max(c), GRID)
        law = Style("#000000", "", (7, 2), width=2)
        marks.append(
            Mark("line", numbers(grid), numbers(fit.laws["L_opt"](grid)), law, "law of the envelope", "envelope")
        )
    panel = Panel(Axis(labels["C"], kind="flops"), Axis(labels["L"]), tuple(marks))
    text = (
        "Each line is one training run through its checkpoints; the envelope is what no run undercuts at that compute."
    )
    return Chart("training", "Training curves and their envelope", text, ((panel,),))


def laws(fits: dict, labels: dict, extrapolation=None) -> Chart:
    """N_opt, D_opt and L_opt against compute, each method's line and band, and what they go through."""
    largest = max(f.largest for f in fits.values())
    smallest = min(_smallest(f) for f in fits.values())
    far = max(largest * FAR, extrapolation.flops * 1.3 if extrapolation else 0.0)
    grid = np.geomspace(smallest / 1.3, far, GRID)
    panels = []
    for name, letter, ours in (("N_opt", "N", "n_opt"), ("D_opt", "D", "d_opt"), ("L_opt", "L", "loss")):
        marks = [
            Mark(
                "rule",
                (largest, largest),
                (0.0, 1.0),
                END,
                "largest run; beyond it, the law alone",
            )
        ]
        for fit in fits.values():
            if name in fit.laws:
                marks += _law(fit, name, ours, grid, len(fits) == 1)
        if extrapolation:
            marks += _tested(extrapolation, name)
        if len(marks) == 1:
            continue
        axis = Axis(labels["L"]) if letter == "L" else Axis(f"{name}: {labels[letter]}", kind="count")
        panels.append(Panel(Axis(labels["C"], kind="flops"), axis, tuple(marks), name))
    level = next(iter(fits.values())).level
    return Chart(
        "laws",
        "Laws of compute",
        f"Bands: {level:.0%} bootstrap intervals. C is training FLOPs (2 x MACs). Marks are the optima that a law goes through; the "
        "laws of a surface go through none. Right of the dashed line no run was trained."
        + " Below, every law over one of them."
        * (len(fits) > 1),
        (tuple(panels), *_ratios(fits, grid, largest, labels)),
    )


def _ratios(fits: dict, grid: np.ndarray, largest: float | int, labels: dict) -> list[tuple]:
    """A row of panels of every method's law over that of the first that is identified, where there are several."""
    panels = []
    for name in ("N_opt", "D_opt", "L_opt"):
        having = {m: f for m, f in fits.items() if name in f.laws}
        if len(having) < 2:
            continue
        first = next((m for m, f in having.items() if f.identifiable), next(iter(having)))
        one = having[first].laws[name](grid)
        marks: list = [Mark("rule", (largest, largest), (0.0, 1.0), END)]
        for method, fit in having.items():
            law = Mark("line", numbers(grid), numbers(fit.laws[name](grid) / one), style_of(method), "", method)
            marks += [*_band(fit, name, grid, one, ""), law]
        parts = [v for m in having for v in [[u for k in marks if k.method == m for u in (*k.y, *k.high)]]]
        box = ((grid[0] * 0.95, grid[-1] * 1.05), frame(parts, False))
        axis = Axis(f"{name} over {first}'s", log=False)
        panels.append(Panel(Axis(labels["C"], kind="flops"), axis, tuple(marks), limits=box))
    return [tuple(panels)] if panels else []


def _band(fit, name: str, grid: np.ndarray, over: np.ndarray | float | int, label: str) -> list[Mark]:
    """The interval of a law along the grid, divided by `over`; nothing where it has none."""
    if name not in fit.draws:
        return []
    tail = (1 - fit.level) / 2
    with np.errstate(invalid="ignore"):  # of a law that is not determined some draws are infinite
        low, high = np.quantile(fit.draws[name](grid[:, None]), [tail, 1 - tail], axis=1) / over
    return [Mark("band", numbers(grid), numbers(low), style_of(fit.method), label, fit.method, high=numbers(high))]


def _smallest(fit) -> float:
    if isinstance(fit, PointFit):
        return min(p.flops for p in fit.points)
    return min(b.flops for b in fit.used) if hasattr(fit, "budgets") else fit.largest / 100


def _law(fit, name: str, ours: str, grid: np.ndarray, single: bool) -> list[Mark]:
    style, method, law = style_of(fit.method), fit.method, fit.laws[name]
    marks = _band(fit, name, grid, 1.0, f"{fit.level:.0%} band" if single else "")
    formula = f"{name} = {_formula(law)}" if single else method
    marks.append(Mark("line", numbers(grid), numbers(law(grid)), style, formula, method))
    if single and name == "L_opt" and "L_opt_pure" in fit.laws:
        pure = Style("#000000", "", (1.5, 2), width=1)
        marks.append(Mark("line", numbers(grid), numbers(fit.laws["L_opt_pure"](grid)), pure, "pure power law", method))
    if isinstance(fit, SurfaceFit):
        return marks
    points = [(p.flops, getattr(p, ours), p.label) for p in (fit.points if isinstance(fit, PointFit) else fit.used)]
    c, y, names = zip(*points, strict=True)
    said = tuple(
        f"{method}, {label}\n{name} {v:.4g}, law {float(law(x)):.4g} ({v / float(law(x)) - 1:+.1%})"
        for x, v, label in zip(c, y, names, strict=True)
    )
    big = Style(style.color, style.marker, style.dash, size=9 if style.marker == "*" else 5)
    return [
        *marks,
        Mark("points", numbers(c), numbers(y), big, "optimum of a budget" if single else method, method, tips=said),
    ]


def _formula(law) -> str:
    term = f"{law.coefficient:.3g} C^{law.exponent:.3f}"
    return f"{law.irreducible:.3g} + {term}" if law.irreducible else term


def _tested(e, name: str) -> list[Mark]:
    """The model that tests the law: what was predicted, and what it is."""
    hollow, solid = Style("#d55e00", "D", (), filled=False, size=7), Style("#0072b2", "s", (), size=6)
    if name == "D_opt":
        return []
    value, between, measured = (
        (e.n_opt, e.n_interval, e.params) if name == "N_opt" else (e.predicted, e.interval, e.measured)
    )
    bar = {"low": (float(between[0]),), "high": (float(between[1]),)} if all(map(math.isfinite, between)) else {}
    what, found = ("predicted N_opt", "trained") if name == "N_opt" else ("predicted, for one run", "measured")
    said = (f"{what}: {value:.4g}",)
    own = (
        {"low": (e.measured - e.measured_se,), "high": (e.measured + e.measured_se,)}
        if name == "L_opt" and e.measured_se
        else {}
    )
    return [
        Mark("points", (e.flops,), (float(value),), hollow, what, tips=said, **bar),
        Mark("points", (e.flops,), (float(measured),), solid, found, tips=(f"{found}: {measured:.4g}",), **own),
    ]


def forest(table: dict, flops: float | int) -> Chart:
    """Estimates and intervals of every method, one panel for each quantity. `table`: method -> name -> (value, (low, high))."""
    methods = list(table)
    panels = []
    titles = {
        "a": "a, exponent of N_opt",
        "b": "b, exponent of D_opt",
        "N_opt": f"N_opt at {flops:.3g} FLOPs",
        "irreducible": "irreducible loss",
        "L_opt": f"best loss at {flops:.3g} FLOPs",
    }
    for name, title in titles.items():
        if not any(name in row for row in table.values()):
            continue
        marks, ends = [], []
        for i, method in enumerate(reversed(methods)):
            if name not in table[method]:
                continue
            value, (low, high) = table[method][name]
            ends.append([v for v in (value, low, high) if math.isfinite(v)])
            bar = {"low": (low,), "high": (high,)} if math.isfinite(low) else {}
            said = f"{method}: {value:.4g}" + (f" ({low:.4g} to {high:.4g})" if bar else ", no interval")
            style = style_of(method)
            style = Style(style.color, style.marker, (), size=8 if style.marker == "*" else 6)
            marks.append(Mark("points", (value,), (float(i),), style, "", method, across=True, tips=(said,), **bar))
        names = tuple(reversed(methods))
        kind = "count" if name == "N_opt" else "plain"
        box = (frame(ends, name == "N_opt", APART), (-0.6, len(names) - 0.4))
        axes = Axis(title, name == "N_opt", kind), Axis("", log=False, names=names)
        panels.append(Panel(*axes, tuple(marks), limits=box))
    rows = tuple(tuple(panels[i : i + WIDE]) for i in range(0, len(panels), WIDE))
    text = "Estimates and intervals; a bar that leaves its panel is far wider than the others, a method without one has no interval. "
    text += "gadre's a = b = 1/2 is its premise, not a finding."
    return Chart("methods", "Methods side by side", text, rows, legend=False)
