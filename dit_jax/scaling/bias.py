"""How far a parabola's vertex lies from the true optimum of a budget, predicted from a surface, and the correction that follows.

An isoFLOP curve of L = E + A / N^alpha + B / D^beta is no parabola, so the vertex of the parabola fitted to it is off even without noise.
The shift depends on the surface and on the sizes tried, both of which are known once a surface is fitted to the same runs: it is the
vertex of the parabola through the *surface's own* losses at the budget's own (N, D), less the surface's optimum on that budget. Czech et
al. 2026 (arXiv 2603.22339) describe the effect.

Only this difference is taken from the surface; the vertex itself stays the parabola's. So is the noise of a run: what the parabola leaves
of the surface's losses is taken out of the residuals. The error of the shift is in the intervals to first order: the noise of a resample
moves the surface too, by the linear response of its least squares (the delta method), and with it every shift.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.optimize import brentq

from dit_jax.error import UsageError
from dit_jax.scaling import newton, parabola
from dit_jax.scaling.law import PowerLaw, fit_power
from dit_jax.scaling.runs import Run
from dit_jax.scaling.study import SurfaceFit, plain
from dit_jax.scaling.surface import Surface, fit_varpro

WIDEST = 1e20  # ratio of the largest to the smallest params, tokens and losses to which a surface is fitted
FAR = 30.0  # half-width, in log N, of where an optimum is looked for
BIAS_HEAD = ("budget (FLOPs)", "N_opt, parabola", "over the optimum", "D_opt", "over the optimum", "L_opt", "shift")


@dataclass(frozen=True)
class Shift:
    """What a budget's parabola adds to the truth: of log N_opt, log D_opt and of the loss there; nan where it has no vertex. `misfit` is
    what it leaves of the surface's loss at each run, which is no noise. `response` (3, runs of all used budgets) is by how much the three
    change with the losses of the runs, through the surface."""

    log_n: float
    log_d: float
    loss: float
    misfit: tuple = ()
    response: np.ndarray | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Bias:
    """The shifts of the used budgets, and what they do to the law of N_opt: N_fitted / N_true = factor(C), a power law, so that its
    exponent is what the parabolas add to the law's exponent, and its coefficient what they multiply its coefficient by."""

    surface: Surface
    labels: tuple
    flops: tuple
    n_opt: tuple  # as the parabolas give it, before any correction
    d_opt: tuple
    loss: tuple
    shifts: tuple  # a Shift for each label
    factor: PowerLaw
    corrected: bool  # whether the fit has subtracted the shifts


NONE = Shift(0.0, 0.0, 0.0)


def shift(surface: Surface, curve: parabola.Curve, tokens: np.ndarray) -> Shift:
    """The shift of one budget, whose runs have the sizes of `curve` and these tokens (n,)."""
    losses = surface(np.exp(curve.log_n), tokens)
    found = parabola.vertex(curve, losses[None])
    place = optimum(surface, curve)
    if place is None or not found.curvature[0] > 0:
        return Shift(math.nan, math.nan, math.nan)
    log_d = float(parabola.powers(np.array([place - curve.centre]))[0] @ curve.log_d)
    best = float(surface(math.exp(place), math.exp(log_d)))
    misfit = losses - curve.basis @ (curve.solve @ losses)
    off = float(found.log_n[0]) - place, float(found.log_d[0]) - log_d, float(found.loss[0]) - best
    return Shift(*off, tuple(misfit.tolist()))


def optimum(surface: Surface, curve: parabola.Curve) -> float | None:
    """log N where the surface is lowest along the budget, D following the runs' own sizes as in `parabola`; None = nowhere.

    With C = k N D this is the closed form of `Surface.optimum`.
    """
    if not (surface.A > 0 and surface.B > 0 and surface.alpha > 0 and surface.beta > 0):
        return None
    c0, c1, c2 = curve.log_d

    def slope(u: float) -> float:
        """Its sign is that of dL / d log N: logarithms of the two terms, which neither overflow nor cancel."""
        fall = -(c1 + 2 * c2 * u)
        if fall <= 0:
            return -math.inf
        return (
            math.log(surface.beta * surface.B * fall)
            - surface.beta * (c0 + c1 * u + c2 * u**2)
            - math.log(surface.alpha * surface.A)
            + surface.alpha * (u + curve.centre)
        )

    low, high = float(curve.log_n.min()) - curve.centre, float(curve.log_n.max()) - curve.centre
    for _ in range(40):  # outwards from the sizes tried, so that a bend of log D far from them is not met
        below, above = slope(low), slope(high)
        if below < 0 < above and math.isfinite(below):
            return curve.centre + float(brentq(slope, low, high, xtol=1e-13, rtol=1e-14))
        low, high = (low - 0.75 if not below < 0 else low), (high + 0.75 if not above > 0 else high)
        if max(-low, high) > FAR or not math.isfinite(below) or not math.isfinite(above):
            return None
    return None


def fit_sane(runs: Sequence[Run]) -> SurfaceFit:
    """`fit_varpro` without resamples; refuses runs that span more than float64 can take to the powers that it tries."""
    for name in ("params", "tokens", "loss"):
        values = [getattr(r, name) for r in runs]
        if max(values) > WIDEST * min(values):
            raise UsageError(f"RUNS: {name} from {min(values):.3g} to {max(values):.3g}, too wide for a surface")
    return fit_varpro(runs, resamples=0)


def surface_of(runs: Sequence[Run]) -> Surface:
    """The surface that shifts are taken from: variable projection of all the runs. Refuses runs that do not identify one."""
    return _identified(runs).surface


def _identified(runs: Sequence[Run]) -> SurfaceFit:
    fit = fit_sane(runs)
    if not fit.identifiable:
        raise UsageError(
            f"RUNS: a parabola's bias is predicted from a surface, which these runs do not identify: {fit.warnings[0]}"
        )
    return fit


def estimate(surface: Surface, used: Sequence, corrected: bool = False) -> Bias:
    """The bias of the used budgets of an isoFLOP fit. Their n_opt, d_opt and loss hold the correction where it is `corrected`."""
    shifts = tuple(b.shift if corrected else shift(surface, b.curve, _tokens(b)) for b in used)
    added = shifts if corrected else (NONE,) * len(shifts)
    weight = np.array([[0.0 if math.isnan(s.log_n) else 1 / b.var_n for s, b in zip(shifts, used, strict=True)]])
    if np.count_nonzero(weight) < 2:
        raise UsageError("RUNS: on fewer than 2 budgets does the surface have an optimum, so no bias can be predicted")
    C = np.array([b.flops for b in used])
    ratio = np.exp([[0.0 if math.isnan(s.log_n) else s.log_n for s in shifts]])
    return Bias(
        surface=surface,
        labels=tuple(b.label for b in used),
        flops=tuple(b.flops for b in used),
        n_opt=tuple(b.n_opt * math.exp(s.log_n) for s, b in zip(added, used, strict=True)),
        d_opt=tuple(b.d_opt * math.exp(s.log_d) for s, b in zip(added, used, strict=True)),
        loss=tuple(b.loss + s.loss for s, b in zip(added, used, strict=True)),
        shifts=shifts,
        factor=fit_power(C, ratio, weight)[0],
        corrected=corrected,
    )


def shifts_of(runs: Sequence[Run], used: Sequence) -> tuple:
    """(a surface through the runs, a Shift for each used budget); refuses a budget on which the surface has no optimum."""
    fit = _identified(runs)
    found = [shift(fit.surface, b.curve, _tokens(b)) for b in used]
    lost = [b.label for b, s in zip(used, found, strict=True) if math.isnan(s.log_n)]
    if lost:
        raise UsageError(f"--unbias: the surface through these runs has no optimum at budget {', '.join(lost)}")
    moved = _response(fit, runs, used)
    return fit.surface, tuple(replace(s, response=_slopes(fit, b) @ moved) for s, b in zip(found, used, strict=True))


def _response(fit: SurfaceFit, runs: Sequence[Run], used: Sequence) -> np.ndarray:
    """By how much the surface's parameters (p, runs of all used budgets) change with the losses of those runs."""
    place = {id(r): i for i, r in enumerate(runs)}
    chosen = [place[id(r)] for b in used for r in b.runs]
    solve = np.linalg.pinv(newton.jacobian(fit.design.problem, fit.theta))  # of residuals log law - log loss
    return solve[:, chosen] / np.array([runs[i].loss for i in chosen])


def _slopes(fit: SurfaceFit, budget) -> np.ndarray:
    """Derivatives (3, p) of a budget's shift by the surface's parameters, central differences."""
    step, columns = 1e-5, []
    for unit in np.eye(len(fit.theta)):
        ends = [
            shift(plain(fit.design.law((fit.theta + h * unit)[None])), budget.curve, _tokens(budget))
            for h in (step, -step)
        ]
        high, low = (np.array([s.log_n, s.log_d, s.loss]) for s in ends)
        columns.append((high - low) / (2 * step))
    return np.stack(columns, axis=1)


def correct(vertex: parabola.Vertex, by: Shift, noise: np.ndarray | None = None) -> parabola.Vertex:
    """The vertices, of one budget's resamples, less the shift; `noise` (resamples, runs of all used budgets) of the losses moves it."""
    log_n, log_d, loss = by.log_n, by.log_d, by.loss
    if noise is not None and by.response is not None:
        log_n, log_d, loss = (noise @ by.response.T + np.array([log_n, log_d, loss])).T
    return replace(vertex, log_n=vertex.log_n - log_n, log_d=vertex.log_d - log_d, loss=vertex.loss - loss)


def rows(bias: Bias) -> list[tuple]:
    """BIAS_HEAD's cells of each budget, as text."""
    found = []
    for i, s in enumerate(bias.shifts):
        cells = (f"{bias.n_opt[i]:.4g}", _ratio(s.log_n), f"{bias.d_opt[i]:.4g}", _ratio(s.log_d))
        found.append((f"{bias.flops[i]:.3g}", *cells, f"{bias.loss[i]:.4f}", f"{s.loss:+.2g}"))
    return found


def text(bias: Bias) -> str:
    """What the shifts do to the law of N_opt, in words."""
    low, high = (_ratio(math.log(bias.factor(c))) for c in (min(bias.flops), max(bias.flops)))
    what = "have been taken out of" if bias.corrected else "are in"
    rest = "" if bias.corrected else "; --unbias takes them out"
    return (
        f"Predicted from a surface through the same runs, the parabolas put {bias.factor.exponent:+.4f} on the exponent of N_opt, and "
        f"{low} on N_opt at the smallest budget, {high} at the largest. These shifts {what} the laws{rest}."
    )


def to_json(bias: Bias) -> dict:
    """The public JSON of a bias: ratios are parabola over optimum, less 1."""
    budgets = [
        {"budget": bias.labels[i], "flops": bias.flops[i], "N_opt": math.expm1(s.log_n), "D_opt": math.expm1(s.log_d), "L_opt": s.loss}
        for i, s in enumerate(bias.shifts)
    ]  # fmt: skip
    return {
        "corrected": bias.corrected,
        "exponent": bias.factor.exponent,
        "coefficient_factor": bias.factor.coefficient,
        "surface": {name: float(value) for name, value in vars(bias.surface).items()},
        "budgets": budgets,
    }


def _ratio(log: float) -> str:
    return f"{math.expm1(log):+.2%}"


def _tokens(budget) -> np.ndarray:
    return np.array([r.tokens for r in budget.runs])
