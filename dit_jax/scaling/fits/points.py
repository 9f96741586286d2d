"""`akima` and `power`: laws through one point a budget, as two papers take them; named checks of published numbers.

`akima` takes the lowest point of a curve of log loss against log N through every run (Akima 1970), as Porian et al. 2024
(arXiv 2406.19146), section 2.2, do. It assumes no shape, so a wide or lopsided grid of sizes does not bias it as it does a parabola; in
return it takes each run at its word, so noise moves its minima more, and always downwards in loss.

`power` takes the best run of each budget and says nothing of N_opt: L = k C^x of Liang et al. 2024 (arXiv 2410.08184), section 3.2, and
from 4 budgets on E + k C^x. Runs alike in params and tokens (seeds) count as one, by their mean.

Both leave no residuals at the runs. Their intervals come from the scatter of the points about the laws, with Student's t
(`bootstrap.scatter`); that the lowest of noisy values is a little too low stays in the estimate.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dit_jax.error import UsageError
from dit_jax.scaling.fits import bootstrap
from dit_jax.scaling.fits.fit import Fit, Point, per_parameter_and_token, plain
from dit_jax.scaling.fits.law import fit_irreducible, fit_power
from dit_jax.scaling.runs import Run, budgets, scattered

IRREDUCIBLE_FROM = 4  # used budgets from which the loss law carries an irreducible term
SIZES = 4  # an Akima curve through fewer points is a parabola or less
LISTED = 3  # budgets with one problem that are named
NAMES = ("N_opt", "D_opt", "L_opt")


def left_out(problems: Sequence[tuple]) -> list[str]:
    """Of (label, problem) of the budgets that are not used, a line each; of many with one problem, one line for all."""
    kinds: dict[str, list] = {}
    for label, problem in problems:
        kinds.setdefault(re.sub(r"[0-9][0-9.e+-]*", "", problem), []).append((label, problem))
    lines = []
    for alike in kinds.values():
        if len(alike) <= LISTED:
            lines += [f"budget {label}: {problem}; not used" for label, problem in alike]
        else:
            first = ", ".join(label for label, _ in alike[:LISTED])
            more = f"budgets {first} and {len(alike) - LISTED} more: {alike[0][1]} (at the first, alike at the others)"
            lines.append(f"{more}; not used")
    return lines


def three_budgets(count: int) -> str:
    """Why so few budgets say nothing of losses beyond them; "" of enough."""
    if count >= IRREDUCIBLE_FROM:
        return ""
    return (
        f"{count} budgets cannot tell the irreducible loss, and without it every loss beyond the data would be too low; train a fourth "
        "budget, or fit a surface (--method=varpro)"
    )


def fit_akima(runs: Sequence[Run], *, tolerance: float = 0.05, **options) -> Fit:
    """N_opt, D_opt and L_opt as laws of compute through the interpolated minima, each budget counted alike. A budget is used when it has
    at least 4 sizes and its lowest point is not at their edge. `options`: `resamples`, `seed`, `level`."""
    groups = budgets(runs, tolerance)
    points = sorted((_minimum(label, members) for label, members in groups), key=lambda p: p.flops)
    fit = _through("akima", runs, points, NAMES, **options)
    why = scattered(groups, tolerance)
    reasons = (f"{why}; fit a surface (--method=varpro), or name the budgets in a column 'group'",) if why else ()
    return replace(fit, reasons=(*reasons, *fit.reasons))


def fit_best(runs: Sequence[Run], **options) -> Fit:
    """L_opt through the best run of each budget. `options` as of `fit_akima`."""
    best = [(label, min(_seeds_averaged(members), key=lambda r: r.loss), members) for label, members in budgets(runs)]
    best = sorted(best, key=lambda b: b[1].flops)
    points = [Point(label, r.flops, tuple(m), r.params, r.tokens, r.loss) for label, r, m in best]
    return _through("power", runs, points, ("L_opt",), **options)


def _seeds_averaged(members: Sequence[Run]) -> list[Run]:
    """A run for each (params, tokens), its loss the geometric mean over seeds."""
    same: dict = {}
    for run in members:
        same.setdefault((run.params, run.tokens), []).append(run)
    return [replace(s[0], loss=math.exp(np.mean([math.log(r.loss) for r in s]))) for s in same.values()]


def _minimum(label: str, runs: Sequence[Run]) -> Point:
    """The lowest point of a budget's curve. Runs of one size count by their mean."""
    sizes = sorted({r.params for r in runs})
    flops = math.exp(np.mean([math.log(r.flops) for r in runs]))
    point = Point(label, flops, tuple(runs))
    if len(sizes) < SIZES:
        return replace(point, problem=f"{len(sizes)} distinct size(s), interpolation needs {SIZES}")
    same = [[r for r in runs if r.params == size] for size in sizes]
    loss, tokens = (np.array([np.mean([math.log(getattr(r, k)) for r in s]) for s in same]) for k in ("loss", "tokens"))
    u = np.log(sizes)
    best, low = (float(v[0]) for v in lowest(u, loss[None]))
    if best in (u[0], u[-1]):
        where = f"the edge of the sizes tried ({sizes[0]:.3g} to {sizes[-1]:.3g})"
        return replace(point, problem=f"minimum at {math.exp(best):.3g} parameters, {where}")
    return replace(point, n_opt=math.exp(best), d_opt=math.exp(float(np.interp(best, u, tokens))), loss=math.exp(low))


def lowest(u: np.ndarray, losses: np.ndarray) -> tuple:
    """(where (m,), how low (m,)) the interpolants through `losses` (m, n) at u (n,) are."""
    # coefficients of cubics in the distance from a piece's left end, (n - 1, m) each
    from scipy.interpolate import Akima1DInterpolator  # a quarter of a second, for this alone

    a, b, c, d = Akima1DInterpolator(u, losses.T).c
    with np.errstate(invalid="ignore", divide="ignore"):  # pieces without a minimum
        t = -c / (b + np.sqrt(b * b - 3 * a * c))
    inside = (t > 0) & (t < np.diff(u)[:, None])
    t = np.where(inside, t, 0.0)
    value = np.concatenate([np.where(inside, ((a * t + b) * t + c) * t + d, math.inf), losses.T])
    place = np.concatenate([u[:-1, None] + t, np.broadcast_to(u[:, None], losses.T.shape)])
    best = value.argmin(0)[None]
    return tuple(np.take_along_axis(v, best, 0)[0] for v in (place, value))


def _laws(C: np.ndarray, values: dict) -> dict:
    """The laws through values (m, points) of each name, every point counted alike."""
    one = np.ones_like(next(iter(values.values())))
    form = fit_irreducible if len(C) >= IRREDUCIBLE_FROM else fit_power
    return {name: (form if name == "L_opt" else fit_power)(C, v, one) for name, v in values.items()}


def _through(
    method: str,
    runs,
    points: Sequence[Point],
    names: tuple,
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Fit:
    """A fit of the laws `names` through the points."""
    used, notes = [p for p in points if not p.problem], left_out([(p.label, p.problem) for p in points if p.problem])
    if len(used) < 2:
        raise UsageError(
            f"RUNS: {len(used)} usable point(s) for method {method}, expected at least 2. " + "; ".join(notes)
        )
    fields = dict(zip(NAMES, ("n_opt", "d_opt", "loss"), strict=True))
    C = np.array([p.flops for p in used])
    values = {name: np.array([[getattr(p, fields[name]) for p in used]]) for name in names}
    laws = {name: plain(law) for name, law in _laws(C, values).items()}
    fitted = np.stack([law(C) for law in laws.values()])
    off = np.log(np.concatenate(list(values.values())) / fitted)
    freedom = [len(C) - (3 if name == "L_opt" and len(C) >= IRREDUCIBLE_FROM else 2) for name in names]
    draws, spread, k = {}, np.zeros(0), per_parameter_and_token(runs)
    noise = math.nan
    if min(freedom) > 0:
        noise = float(np.sqrt((off[-1] ** 2).sum() / freedom[-1]) * used[-1].loss)
        if resamples:
            errors = bootstrap.scatter(np.random.default_rng(seed), off, freedom, resamples)
            draws = _laws(C, dict(zip(names, fitted[:, None] * np.exp(errors), strict=True)))
            spread = np.full(resamples, noise)
    fit = Fit(
        method=method,
        runs=tuple(runs),
        laws=laws,
        draws=draws,
        loss=lambda params, tokens: laws["L_opt"](k * params * tokens),
        loss_draws=(lambda params, tokens: draws["L_opt"](k * params * tokens)) if draws else None,
        noise=noise,
        noise_draws=spread,
        k=k,
        objective=float((off[0] ** 2).sum()),
        level=level,
        resamples=resamples,
        points=tuple(points),
        beyond=three_budgets(len(used)),
        notes=tuple(notes),
    )
    return replace(fit, reasons=_reasons(fit))


def _reasons(fit: Fit) -> tuple:
    """Why the points do not identify the laws; empty when they do."""
    if not fit.draws and (fit.resamples or len(fit.used) < 3):
        return (f"{len(fit.used)} points leave nothing to test the law",)
    if "N_opt" in fit.draws:
        low, high = fit.interval(fit.draws["N_opt"].exponent)
        if low <= 0 or high >= 1:
            return (f"the exponent of N_opt is not identified: its interval {low:.2f} to {high:.2f} leaves (0, 1)",)
    return ()
