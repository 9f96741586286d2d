"""Fits: one `fit_*` function and one row of METHODS per method; each returns a frozen result of laws, resamples and warnings.

`fit_isoflop` is approach 2 of Hoffmann et al. 2022 (arXiv 2203.15556) as Liang et al. 2024 (arXiv 2410.08184) use it on
diffusion transformers: a parabola of loss against log N at each budget, then laws of compute through the vertices.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from dit_jax.error import UsageError
from dit_jax.scaling import bias as bias_
from dit_jax.scaling import bootstrap, parabola
from dit_jax.scaling.akima import fit_akima
from dit_jax.scaling.compute import fit_compute
from dit_jax.scaling.envelope import fit_envelope
from dit_jax.scaling.law import EXPONENTS, fit_irreducible, fit_power
from dit_jax.scaling.optima import PointFit, left_out, shared
from dit_jax.scaling.runs import ROUNDING, Run, budgets, scattered
from dit_jax.scaling.study import SurfaceFit
from dit_jax.scaling.surface import fit_gadre, fit_surface, fit_varpro

IRREDUCIBLE_FROM = 4  # used budgets from which the loss law carries an irreducible term
MOST_DEGENERATE = 0.5  # of the resamples of laws that the data identify
NORMAL = float(stats.norm.ppf(0.75))  # median distance from its mean of what is normal with variance 1
WIDEST = 700.0  # log N and log D of a resampled minimum, at most: what float64 holds


@dataclass(frozen=True)
class Budget:
    """The runs of one compute budget and the parabola through them. `problem` says why it is not used; "" = used."""

    label: str
    flops: float  # geometric mean of its runs
    runs: tuple
    problem: str = ""
    curve: parabola.Curve | None = None
    coefficients: tuple = ()  # of loss in u = log N - curve.centre
    n_opt: float = math.nan
    d_opt: float = math.nan
    loss: float = math.nan
    var_n: float = math.nan  # of log N_opt, per unit of loss variance
    var_loss: float = math.nan
    shift: bias_.Shift = bias_.NONE  # what has been subtracted from the parabola's vertex

    @property
    def curvature(self) -> float:
        return self.coefficients[2] if self.coefficients else math.nan

    @property
    def losses(self) -> np.ndarray:
        return np.array([r.loss for r in self.runs])

    @property
    def residuals(self) -> np.ndarray:
        """Losses (runs,) about the parabola, without what it leaves of a surface's losses where a shift has been subtracted."""
        return (
            self.losses - self(np.exp(self.curve.log_n)) - (np.array(self.shift.misfit) if self.shift.misfit else 0.0)
        )

    def vertex(self, losses: np.ndarray, noise: np.ndarray | None = None) -> parabola.Vertex:
        """The minima of the parabolas through `losses` (resamples, runs), less the shift, which `noise` moves (`bias.correct`)."""
        return bias_.correct(parabola.vertex(self.curve, losses), self.shift, noise)

    def __call__(self, params):
        """The parabola's loss at these sizes."""
        return parabola.powers(np.log(params) - self.curve.centre) @ np.array(self.coefficients)


@dataclass(frozen=True)
class IsoflopFit:
    """Laws of compute and their resamples. `laws` has N_opt, D_opt, L_opt (the chosen loss law), L_opt_pure and, where
    there are enough budgets, L_opt_irreducible; `draws` has the same names, each law holding one array entry per resample.
    """

    method: str
    n_runs: int
    budgets: tuple
    laws: dict
    draws: dict  # empty when the runs say nothing about their noise
    noise: float  # standard deviation of a run's loss about its parabola
    freedom: int  # degrees of freedom of `noise`; 0 = the evaluation's standard error stands in
    noise_draws: np.ndarray
    curvature: float  # median over used budgets: loss rises by curvature (log N/N_opt)^2
    objective: float  # sum of squared residuals of the parabolas
    level: float
    resamples: int
    degenerate: int  # resamples in which too few budgets kept a minimum; not in `draws`
    identifiable: bool
    warnings: tuple
    bias: bias_.Bias | None = None  # where the vertices are corrected for it
    weights: tuple = (math.inf, math.inf)  # the most of a vertex in the laws of (N_opt, loss), 1 / loss variance

    @property
    def curvature_scatter(self) -> float:
        """Standard deviation of the used budgets' own curvatures about `curvature`."""
        return math.sqrt(sum((b.curvature - self.curvature) ** 2 for b in self.used) / (len(self.used) - 1))

    @property
    def used(self) -> tuple:
        return tuple(b for b in self.budgets if not b.problem)

    @property
    def largest(self) -> float:
        """Training FLOPs of the largest budget used."""
        return max(b.flops for b in self.used)


def fit_isoflop(
    runs: Sequence[Run],
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    tolerance: float = 0.05,
    window: float = math.inf,
    unbias: bool = False,
) -> IsoflopFit:
    """Fits N_opt, D_opt and L_opt as laws of compute to the isoFLOP curves of `runs`.

    Budgets are the runs' groups, else clusters of training FLOPs within `tolerance`. A budget is used when it has at least
    3 distinct sizes and its parabola has a minimum strictly inside them; `window` keeps only sizes within that factor of the
    budget's best run. Laws are least squares, each vertex weighted by the inverse of its variance. Where the runs are scattered over
    compute and a budget is a group by chance, that variance is at least the scatter of the vertices about the laws.

    `unbias` subtracts from each vertex, and from those of its resamples, the shift that a surface through the same runs predicts (`bias`).

    **Loss law**, chosen before any look at the data: with an irreducible term, E + k C^x, from 4 used budgets on, else pure.

    **Intervals** are percentiles of a residual bootstrap whose unit is the run; `bootstrap` says how, and why not otherwise.
    """
    groups = budgets(runs, tolerance)
    found = tuple(_fit_budget(b, window) for b in _budgets(groups))
    used = [b for b in found if not b.problem]
    warnings = left_out([(b.label, b.problem) for b in found if b.problem])
    if len(used) < 2:
        raise UsageError(f"RUNS: {len(used)} usable budget(s), expected at least 2. " + "; ".join(warnings))
    if unbias:
        surface, shifts = bias_.shifts_of(runs, used)
        used = [_vertex(replace(b, shift=s)) for b, s in zip(used, shifts, strict=True)]
        same = {b.label: b for b in used}
        found = tuple(same.get(b.label, b) for b in found)
    predicted = bias_.estimate(surface, used, corrected=True) if unbias else None
    most = _most(used) if scattered(groups, tolerance) else (math.inf, math.inf)
    fit = IsoflopFit(
        method="isoflop",
        n_runs=len(runs),
        budgets=found,
        laws={name: law[0] for name, law in _laws(used, [b.vertex(b.losses[None]) for b in used], most).items()},
        draws={},
        noise=math.nan,
        freedom=0,
        noise_draws=np.zeros(0),
        curvature=float(np.median([b.curvature for b in used])),
        objective=float(sum(np.sum((b.losses - b(np.exp(b.curve.log_n))) ** 2) for b in used)),
        level=level,
        resamples=resamples,
        degenerate=0,
        identifiable=False,
        warnings=tuple(warnings) + ((bias_.text(predicted),) if unbias else ()),
        bias=predicted,
        weights=most,
    )
    fit = _resample(fit, np.random.default_rng(seed))
    reasons = _reasons(fit)
    fit = replace(fit, identifiable=not reasons, warnings=fit.warnings + reasons + _cautions(fit))
    return shared(fit, groups, tolerance)


Fit = IsoflopFit | PointFit | SurfaceFit
METHODS = {
    "isoflop": fit_isoflop,
    "akima": fit_akima,
    "surface": fit_surface,
    "varpro": fit_varpro,
    "gadre": fit_gadre,
    "envelope": fit_envelope,
    "power": fit_compute,
}


def _budgets(groups: Sequence[tuple]) -> list[Budget]:
    found = [
        Budget(label, float(np.exp(np.mean([math.log(r.flops) for r in members]))), members)
        for label, members in groups
    ]
    return sorted(found, key=lambda b: b.flops)


def _fit_budget(budget: Budget, window: float) -> Budget:
    """The budget with its parabola, or with the problem that keeps it out of the fit."""
    best = min(budget.runs, key=lambda r: r.loss).params
    runs = tuple(r for r in budget.runs if best / window <= r.params <= best * window)
    budget = replace(budget, runs=runs)
    sizes = sorted({r.params for r in runs})
    if len(sizes) < 3:
        return replace(budget, problem=f"{len(sizes)} distinct size(s), a parabola needs 3")
    tokens = [r.tokens * budget.flops / r.flops for r in runs]  # at the budget's compute, not a little off it
    problem = parabola.curve(np.array([r.params for r in runs]), np.array(tokens))
    vertex = parabola.vertex(problem, budget.losses[None])
    budget = replace(budget, curve=problem, coefficients=tuple((problem.solve @ budget.losses).tolist()))
    rise = budget.curvature * np.abs(problem.log_n - problem.centre).max() ** 2
    if rise <= ROUNDING * budget.losses.max():
        return replace(budget, problem=f"the parabola has no minimum (curvature {budget.curvature:.2g})")
    if not vertex.inside[0]:
        n, span = math.exp(min(float(vertex.log_n[0]), 700.0)), f"{sizes[0]:.3g} to {sizes[-1]:.3g}"
        return replace(
            budget, problem=f"minimum at {n:.3g} parameters, at or beyond the edge of the sizes tried ({span})"
        )
    return _vertex(budget)


def _vertex(budget: Budget) -> Budget:
    """The budget with its minimum, less the shift."""
    vertex = budget.vertex(budget.losses[None])
    return replace(
        budget,
        n_opt=math.exp(vertex.log_n[0]),
        d_opt=math.exp(vertex.log_d[0]),
        loss=float(vertex.loss[0]),
        var_n=float(vertex.var_n[0]),
        var_loss=float(vertex.var_loss[0]),
    )


def _most(used) -> tuple:
    """The most that a vertex of chance groups may weigh in (N_opt, loss): the inverse of their scatter, by its median about laws that
    count all alike, per unit of loss variance."""
    C, noise = np.array([b.flops for b in used]), bootstrap.noise(used)
    if noise is None or not noise.scale:
        return tuple(1 / max(getattr(b, name) for b in used) for name in ("var_n", "var_loss"))
    n, loss = (np.array([getattr(b, name) for b in used]) for name in ("n_opt", "loss"))
    one = np.ones((1, len(C)))
    form = fit_irreducible if len(used) >= IRREDUCIBLE_FROM else fit_power
    off = np.log(n / fit_power(C, n[None], one)[0](C)), loss - form(C, loss[None], one)[0](C)
    return tuple(noise.scale**2 / max(float((np.median(np.abs(o)) / NORMAL) ** 2), 1e-300) for o in off)


def _laws(used, vertices, most: tuple, weights: tuple | None = None) -> dict:
    """The laws through the vertices of the used budgets, for all resamples at once; a vertex that is no minimum has weight 0.

    `weights` are those of `bootstrap.weights`; None = the vertices' own delta-method variances. None weighs more than `most`.
    """
    C = np.array([b.flops for b in used])
    n, d, loss, curvature, var_n, var_loss, inside = (
        np.stack([getattr(v, name) for v in vertices], axis=-1)
        for name in ("log_n", "log_d", "loss", "curvature", "var_n", "var_loss", "inside")
    )
    weight_n, weight_loss = inside / var_n, inside / var_loss
    if weights is not None:
        weight_n, weight_loss = 4 * weights[0] * np.maximum(curvature, 0.0), weights[1] * inside
    weight_n, weight_loss = (np.minimum(w, m) for w, m in zip((weight_n, weight_loss), most, strict=True))
    n, d = (np.exp(np.where(weight_n > 0, np.clip(v, -WIDEST, WIDEST), 0.0)) for v in (n, d))
    laws = {
        "N_opt": fit_power(C, n, weight_n),
        "D_opt": fit_power(C, d, weight_n),
        "L_opt_pure": fit_power(C, loss, weight_loss * np.where(inside, loss, 1.0) ** 2),
    }
    if len(used) >= IRREDUCIBLE_FROM:
        laws["L_opt_irreducible"] = fit_irreducible(C, loss, weight_loss)
    return {**laws, "L_opt": laws.get("L_opt_irreducible", laws["L_opt_pure"])}


def _resample(fit: IsoflopFit, rng) -> IsoflopFit:
    """The fit with its noise and its resampled laws."""
    used = fit.used
    noise = bootstrap.noise(used)
    if noise is None:
        text = "no interval: no budget has a fourth run and no run has a standard error; train one more size per budget"
        return replace(fit, warnings=(*fit.warnings, text))
    fit = replace(fit, noise=noise.scale, freedom=noise.freedom)
    scales = noise.draw(rng, fit.resamples, len(used))
    drawn = [bootstrap.draw(rng, len(b.runs), noise.residuals, s) for b, s in zip(used, scales.T, strict=True)]
    every = np.concatenate(drawn, axis=1)
    vertices = [b.vertex(b(np.exp(b.curve.log_n)) + own, every) for b, own in zip(used, drawn, strict=True)]
    kept = np.sum([v.curvature > 0 for v in vertices], axis=0) >= min(3, len(used))
    kept &= np.sum([v.inside for v in vertices], axis=0) >= 2
    warnings = [
        f"budget {b.label}: its curve is flat for the noise, {1 - v.inside.mean():.0%} of the resamples have no minimum inside"
        for b, v in zip(used, vertices, strict=True)
        if fit.resamples and v.inside.mean() < 0.9
    ]
    if noise.freedom == 0:
        warnings.append("3 runs per budget leave no residual: intervals hold the evaluation's standard error only")
    degenerate = int((~kept).sum())
    if degenerate > 0.05 * fit.resamples:
        warnings.append(f"{degenerate} of {fit.resamples} resamples are degenerate: too few budgets keep a minimum")
    if kept.sum() >= 20:
        draws = _laws(used, [v[kept] for v in vertices], fit.weights, bootstrap.weights(used))
        fit = replace(fit, draws=draws, noise_draws=np.sqrt(np.mean(scales[kept] ** 2, axis=1)))
    return replace(fit, degenerate=degenerate, warnings=(*fit.warnings, *warnings))


def _reasons(fit: IsoflopFit) -> tuple:
    """Why the data do not identify the law of N_opt; empty when they do."""
    if len(fit.used) < 3:
        return ("two budgets: any two vertices lie on a power law, so nothing tests it",)
    if not fit.draws:
        return ("the laws have no interval",) if fit.resamples else ()
    if fit.degenerate > MOST_DEGENERATE * fit.resamples:
        return (f"the curves are flat for the noise: {fit.degenerate} of {fit.resamples} resamples are degenerate",)
    tail = (1 - fit.level) / 2
    low, high = np.quantile(fit.draws["N_opt"].exponent, [tail, 1 - tail])
    if low <= 0 or high >= 1:
        return (f"the exponent of N_opt is not identified: its interval {low:.2f} to {high:.2f} leaves (0, 1)",)
    return ()


def _cautions(fit: IsoflopFit) -> tuple:
    """What a reader should know about laws that are identified."""
    found = []
    C = np.array([b.flops for b in fit.used])
    if fit.freedom and fit.noise > 1e-9 * fit.used[-1].loss and len(fit.used) > 2:
        off = np.log([b.n_opt for b in fit.used]) - np.log(fit.laws["N_opt"](C))
        ratio = np.mean(off**2 / np.array([b.var_n for b in fit.used])) / fit.noise**2 * len(C) / (len(C) - 2)
        if stats.f.sf(ratio, len(C) - 2, fit.freedom) < 0.01:
            found.append(
                f"the N_opt of the budgets scatter {math.sqrt(ratio):.1f} times more than the noise of the runs allows"
            )
    chance = _no_parabola(fit)
    if chance < 0.01 and fit.bias:
        found.append(
            f"the curves are not the surface's that corrected them (F test of quartics, p = {chance:.1g}); compare other methods"
        )
    elif chance < 0.01:
        found.append(
            f"the curves are no parabolas (F test against quartics, p = {chance:.1g}), so their minima are biased; keep nearby sizes "
            "with --window, subtract the bias with --unbias, or compare --method=akima"
        )
    law = fit.laws.get("L_opt_irreducible")
    if law and fit.draws:
        E = fit.draws["L_opt_irreducible"].irreducible
        if law.irreducible == 0 or np.quantile(E, (1 - fit.level) / 2) == 0:
            found.append("the irreducible loss is not pinned down: its interval reaches 0")
        if -law.exponent > 0.99 * EXPONENTS[1] or -law.exponent < 1.01 * EXPONENTS[0]:
            found.append(f"the exponent of the reducible loss is at the bound of its search ({law.exponent:.3g})")
    return tuple(found)


def _no_parabola(fit: IsoflopFit) -> float:
    """The chance of scatter about parabolas as systematic as this, were they true: an F test of two more powers at each budget."""
    plain, more, powers, freedom = 0.0, 0.0, 0, 0
    for b in fit.used:
        u = b.curve.log_n - b.curve.centre
        if len(set(u)) < 6:
            continue
        design = np.stack([(u / np.abs(u).max()) ** i for i in range(5)], axis=1)
        left = b.residuals - design @ np.linalg.lstsq(design, b.residuals, rcond=None)[0]
        plain += float(np.sum(b.residuals**2))
        more += float(np.sum(left**2))
        powers, freedom = powers + 2, freedom + len(u) - 5
    if not freedom or plain < 1e-18:
        return 1.0
    return float(stats.f.sf((plain - more) / powers / max(more / freedom, 1e-300), powers, freedom))
