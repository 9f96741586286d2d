"""`isoflop`: a parabola of loss against log N at each budget, then laws of compute through the minima.

Approach 2 of Hoffmann et al. 2022 (arXiv 2203.15556), as Liang et al. 2024 (arXiv 2410.08184) use it on diffusion transformers.

**Weights.** The estimate weighs each minimum by the inverse of its variance: that of the runs' noise (delta method) plus tau^2, the scatter
between budgets that this noise does not explain (`bootstrap.between`). A minimum u = -c1 / (2 c2) that errs towards the middle of its
sizes has a small delta-method variance for that very error; were such weights drawn again in each resample, their bias would be there
twice. So resamples weigh by the estimating equations of the law,

    sum_b h_b (1, log C_b) (c1_b + 2 c2_b u_b(law)) = 0,   h_b = c2_b / var(c1_b + 2 c2_b u_b),

with c2 and u of h taken from smooth power laws through all budgets (Carroll & Ruppert 1988, "Transformation and Weighting in Regression",
section 2.3). What solves them for redrawn c1 and c2 is Fieller's interval (1954) of a ratio, for all budgets at once.

**Scatter between budgets** is drawn in each resample too, tau sqrt(v / chi2_v) times a normal number for each budget, v = budgets - 2:
Student's t with as many degrees of freedom as there are budgets to tell it.

**Bias.** An isoFLOP curve of L = E + A / N^alpha + B / D^beta is no parabola, so its minimum is off even without noise (Czech et al. 2026,
arXiv 2603.22339). A surface through the same runs tells by how much: the minimum of the parabola through the surface's losses at the very
(N, D) of a budget, less the surface's own optimum there. Where that moves a law by more than a quarter of its half-width, or where
`unbias` asks for it, it is subtracted, in each resample with a surface fitted to that resample's losses.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dit_jax.error import UsageError
from dit_jax.scaling.fits import bootstrap
from dit_jax.scaling.fits.fit import Fit, Point, per_parameter_and_token, plain
from dit_jax.scaling.fits.law import EXPONENTS, fit_irreducible, fit_power
from dit_jax.scaling.fits.minima import WIDEST, Budget, Minima, make_budget, minima_of, no_parabola
from dit_jax.scaling.fits.points import IRREDUCIBLE_FROM, left_out, three_budgets
from dit_jax.scaling.fits.surface import Reference, reference
from dit_jax.scaling.runs import Run, budgets, scattered

MOST_DEGENERATE = 0.5  # of the resamples of laws that the data identify
MATERIAL = 0.25  # of a half-width, from which a predicted bias is subtracted
ROUNDS = 3  # of finding the places of the minima with the weights that follow from them
HEAD = ("budget (FLOPs)", "runs", "sizes", "N_opt", "D_opt", "L_opt", "curvature", "check")


def fit_isoflop(
    runs: Sequence[Run],
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    tolerance: float = 0.05,
    window: float = math.inf,
    unbias: bool | None = None,
) -> Fit:
    """N_opt, D_opt and L_opt as laws of compute through the minima of the isoFLOP curves of `runs`.

    Budgets are the runs' groups, else clusters of training FLOPs within `tolerance`. A budget is used when it has at least 3 distinct
    sizes and its parabola has a minimum strictly inside them; `window` keeps only sizes within that factor of the budget's best run.
    `unbias`: subtract the bias that a surface predicts (None: where it is material). The loss law has an irreducible term, E + k C^x, from
    4 used budgets on; of 3 it is a pure power law and says nothing of losses beyond the data. Raises UsageError with fewer than 2 used
    budgets, or if `unbias` is asked for and no surface tells the bias.
    """
    groups = budgets(runs, tolerance)
    every = sorted((make_budget(label, members, window) for label, members in groups), key=lambda b: b.flops)
    used = [b for b in every if not b.problem]
    notes = left_out([(b.label, b.problem) for b in every if b.problem])
    if len(used) < 2:
        why = f" ({'; '.join(notes)})" if notes else ""
        raise UsageError(f"RUNS: {len(used)} usable budget(s), expected at least 2{why}")
    surface = reference([r for b in used for r in b.runs], needed=bool(unbias))
    rng = np.random.default_rng(seed)
    fit = _fit(every, used, None, rng, resamples, level)
    told = surface and _bias(surface, used, fit)
    if told and (unbias or (unbias is None and told["material"])):
        plain_fit, fit = fit, _fit(every, used, surface, np.random.default_rng(seed), resamples, level)
        text = (
            f"the parabolas' bias is subtracted ({told['a']:+.4f} on the exponent of N_opt, {math.expm1(told['N_opt']):+.1%} on N_opt "
            f"at the largest budget, as a surface through the same runs predicts); without that a = {plain_fit.laws['N_opt'].exponent:.4f}"
        )
        fit = replace(fit, notes=(*fit.notes, text))
    details = fit.details | {"bias": told | {"corrected": any("bias is sub" in n for n in fit.notes)} if told else None}
    why = scattered(groups, tolerance)
    reasons = (f"{why}; fit a surface (--method=varpro), or name the budgets in a column 'group'",) if why else ()
    every_run = tuple(runs)
    return replace(fit, runs=every_run, reasons=(*reasons, *fit.reasons), notes=(*notes, *fit.notes), details=details)


def _shift(surface: Reference, used: Sequence[Budget], losses: np.ndarray | None = None) -> np.ndarray:
    """What the parabolas add to the optima of the surface, (3, m, budgets): log N, log D and loss; nan where it has no optimum. The
    surface is the one of the runs, or with `losses` (m, runs) one for each set of them."""
    law = surface.law if losses is None else surface.refit(losses)
    n, d = (np.concatenate(v) for v in ([np.exp(b.curve.log_n) for b in used], [b.tokens for b in used]))
    at = {name: np.asarray(v)[..., None] for name, v in vars(law).items()}
    drawn = np.atleast_2d(type(law)(**at)(n, d))
    found, C = minima_of(used, drawn), np.array([b.flops for b in used])
    k = np.array([math.exp(np.mean(np.log([r.flops / (r.params * r.tokens) for r in b.runs]))) for b in used])
    with np.errstate(all="ignore"):
        laws = [type(law)(**at).optimum(k)[name](C) for name in ("N_opt", "D_opt", "L_opt")]
        best = [np.log(laws[0]), np.log(laws[1]), laws[2]]
        off = [found.log_n - best[0], found.log_d - best[1], found.loss - best[2]]
    return np.stack([np.where(found.curvature > 0, np.broadcast_to(o, found.loss.shape), math.nan) for o in off])


@dataclass(frozen=True)
class _Laws:
    """Laws through the minima of `used`, with the weights that resamples take: h (budgets,) of the places, weight of the losses, and tau^2
    of log N in units of the loss variance."""

    used: tuple
    h: np.ndarray
    weight_loss: np.ndarray
    tau: float

    @property
    def C(self) -> np.ndarray:
        return np.array([b.flops for b in self.used])

    def through(self, minima: Minima, redrawn: bool) -> dict:
        """The laws of each set of minima; a minimum that is none has no weight."""
        with np.errstate(divide="ignore", invalid="ignore"):
            if redrawn:
                weight_n, weight_l = 4 * self.h * np.maximum(minima.curvature, 0.0), self.weight_loss * minima.inside
            else:
                weight_n, weight_l = minima.inside / minima.var_n, minima.inside / minima.var_loss
            weight_n = np.where(weight_n > 0, 1 / (1 / weight_n + self.tau), 0.0)
        n, d = (np.exp(np.where(weight_n > 0, np.clip(v, -WIDEST, WIDEST), 0.0)) for v in (minima.log_n, minima.log_d))
        laws = {"N_opt": fit_power(self.C, n, weight_n), "D_opt": fit_power(self.C, d, weight_n)}
        if len(self.used) >= IRREDUCIBLE_FROM:
            return laws | {"L_opt": fit_irreducible(self.C, minima.loss, weight_l)}
        weight = weight_l * np.where(minima.inside, minima.loss, 1.0) ** 2
        return laws | {"L_opt": fit_power(self.C, np.where(minima.inside, minima.loss, 1.0), weight)}


def _weights(used: Sequence[Budget], found: Minima) -> tuple:
    """(h (budgets,) of the places, weight (budgets,) of the losses) from curvatures and places smoothed along the budgets."""
    C, covariance = np.array([b.flops for b in used]), np.stack([b.curve.covariance for b in used])
    bend = fit_power(C, found.curvature, 1 / covariance[None, :, 2, 2])(C)
    centre, weight = np.array([b.curve.centre for b in used]), 1 / found.var_n
    for _ in range(ROUNDS):
        u = np.log(fit_power(C, np.exp(found.log_n), weight)(C)) - centre
        slope = np.stack([np.zeros_like(u), np.ones_like(u), 2 * u], axis=1)
        h = bend / np.einsum("bi,bij,bj->b", slope, covariance, slope)
        weight = (h * bend)[None]
    at = np.stack([np.ones_like(u), u, u**2], axis=1)
    return h, 1 / np.einsum("bi,bij,bj->b", at, covariance, at)


def _noise(used: Sequence[Budget]) -> bootstrap.Noise | None:
    """The noise of the runs about the parabolas; where those go through all runs, the evaluation's standard error."""
    parts, runs = [(b.losses, b.fitted, b.curve.leverage) for b in used], [r for b in used for r in b.runs]
    losses, fitted, leverage = (np.concatenate(p) for p in zip(*parts, strict=True))
    groups = bootstrap.clusters(runs)
    absorbed = float((np.bincount(groups, leverage) / np.bincount(groups)).sum())  # a run has one row in each parabola
    return bootstrap.noise(losses, fitted, leverage, groups, absorbed) or bootstrap.stated(runs, fitted)


def _fit(every: list, used: list, surface: Reference | None, rng, resamples: int, level: float) -> Fit:
    """The fit, its minima less the bias that `surface` predicts, if there is one."""
    noise, runs = _noise(used), [r for b in used for r in b.runs]
    losses, fitted = np.array([r.loss for r in runs]), np.concatenate([b.fitted for b in used])
    found = minima_of(used, losses[None])
    h, weight_loss = _weights(used, found)
    if surface:
        found = found.less(_shift(surface, used))
    tau = _between(used, found, noise)
    laws = _Laws(tuple(used), h, weight_loss, tau / noise.scale**2 if tau else 0.0)
    estimate = {name: plain(law) for name, law in laws.through(found, redrawn=False).items()}
    fit = Fit(
        method="isoflop",
        runs=tuple(runs),
        laws=estimate,
        draws={},
        loss=lambda params, tokens: math.nan,
        loss_draws=None,
        noise=noise.scale if noise else math.nan,
        noise_draws=np.zeros(0),
        k=per_parameter_and_token(runs),
        objective=float(((losses - fitted) ** 2).sum()),
        level=level,
        resamples=resamples,
        points=_points(every, used, found, noise),
        beyond=three_budgets(len(used)),
        tables=(("Budgets", HEAD, _rows(every, found)),),
        details={"approach_2": _approach_2(used, found), "tau": math.sqrt(tau)},
    )
    if noise and resamples:
        fit = _redrawn(fit, laws, noise, fitted, surface, rng)
    elif resamples:
        fit = replace(fit, notes=("no interval: no budget has a fourth run; train one more size per budget",))
    if noise and noise.freedom == 0 and resamples:
        text = "3 runs per budget leave no residual: intervals hold the evaluation's standard error only"
        fit = replace(fit, notes=(*fit.notes, text))
    fit = replace(fit, **_losses(fit, found))
    return replace(fit, reasons=_reasons(fit), notes=(*fit.notes, *_notes(fit, used, math.sqrt(tau))))


def _between(used: Sequence[Budget], found: Minima, noise: bootstrap.Noise | None) -> float:
    """tau^2 of log N_opt between the budgets, beyond the noise of the runs."""
    if noise is None or noise.scale == 0 or len(used) < 3:
        return 0.0
    x = np.log([b.flops for b in used])
    design, variance = np.stack([np.ones_like(x), x - x.mean()], 1), found.var_n[0] * noise.scale**2
    return bootstrap.between(found.log_n[0], design, variance, float(noise.freedom or math.inf))


def _redrawn(fit: Fit, laws: _Laws, noise: bootstrap.Noise, fitted: np.ndarray, surface, rng) -> Fit:
    """The fit with its resampled laws."""
    used, resamples = laws.used, fit.resamples
    added = noise.draw(rng, resamples)
    minima = minima_of(used, fitted + added)
    inside = minima.inside.mean(0)
    if surface:
        shift = _shift(surface, used, surface.fitted + added)
        minima = minima.less(np.where(np.isfinite(shift), shift, _shift(surface, used)))
    errors = np.diff(np.quantile(np.stack([minima.log_n, minima.loss]), [0.1587, 0.8413], axis=1), axis=0)[0] / 2
    if laws.tau:
        freedom = len(used) - 2
        tau = noise.scale * math.sqrt(laws.tau) * np.sqrt(freedom / rng.chisquare(freedom, (resamples, 1)))
        moved = tau * rng.standard_normal((resamples, len(used)))
        minima = replace(minima, log_n=minima.log_n + moved, log_d=minima.log_d - moved)
    kept = (minima.curvature > 0).sum(1) >= min(3, len(used))
    kept &= minima.inside.sum(1) >= 2
    degenerate = int((~kept).sum())
    notes = [
        f"budget {b.label}: its curve is flat for the noise, {1 - share:.0%} of the resamples have no minimum inside"
        for b, share in zip(used, inside, strict=True)
        if share < 0.9
    ]
    if degenerate > 0.05 * resamples:
        notes.append(f"{degenerate} of {resamples} resamples are degenerate: too few budgets keep a minimum")
    fit = replace(fit, degenerate=degenerate, notes=(*fit.notes, *notes))
    if kept.sum() < bootstrap.FEWEST:
        return fit
    spread = np.sqrt(np.mean(added[kept] ** 2, axis=1))
    pairs = iter(errors.T.tolist())  # what simulation finds, the surface's own error in it
    points = tuple(
        p if p.problem else replace(p, **dict(zip(("n_se", "loss_se"), next(pairs), strict=True))) for p in fit.points
    )
    return replace(fit, draws=laws.through(minima[kept], redrawn=True), noise_draws=spread, points=points)


def _losses(fit: Fit, found: Minima) -> dict:
    """`loss` and `loss_draws`: L_opt, plus what the median curvature of the parabolas charges for the distance to N_opt. Resamples draw a
    curvature as the budgets' own scatter about the median."""
    curvature, count = float(np.median(found.curvature)), found.curvature.shape[1]
    spread = math.sqrt(float(((found.curvature - curvature) ** 2).sum()) / max(count - 1, 1))

    def loss(params, tokens):
        c = fit.k * params * tokens
        return fit.laws["L_opt"](c) + curvature * np.log(params / fit.laws["N_opt"](c)) ** 2

    def drawn(params, tokens):
        c, count_ = fit.k * params * tokens, len(fit.noise_draws)
        bend = np.maximum(curvature + spread * np.random.default_rng(2).standard_t(count - 1, count_), 0.0)
        with np.errstate(all="ignore"):  # of resamples that determine no law
            return fit.draws["L_opt"](c) + bend * np.log(params / fit.draws["N_opt"](c)) ** 2

    return {"loss": loss, "loss_draws": drawn if fit.draws else None}


def _points(every: list, used: list, found: Minima, noise) -> tuple:
    place = {b.label: i for i, b in enumerate(used)}
    points = []
    for b in every:
        if b.problem:
            points.append(Point(b.label, b.flops, b.runs, problem=b.problem))
            continue
        i, scale = place[b.label], noise.scale if noise else math.nan
        n, d, loss, var_n, var_loss = (
            float(getattr(found, k)[0, i]) for k in ("log_n", "log_d", "loss", "var_n", "var_loss")
        )
        errors = scale * math.sqrt(var_n), scale * math.sqrt(var_loss)
        points.append(Point(b.label, b.flops, b.runs, math.exp(n), math.exp(d), loss, *errors))
    return tuple(points)


def _rows(every: list, found: Minima) -> tuple:
    """A row per budget: its runs, its minimum and whether it is used."""
    rows, i = [], 0
    for b in every:
        sizes, cells = [r.params for r in b.runs], ("\N{EN DASH}",) * 4
        if not b.problem:
            n, d, loss, bend = (
                float(v[0, i]) for v in (np.exp(found.log_n), np.exp(found.log_d), found.loss, found.curvature)
            )
            cells, i = (f"{n:.4g}", f"{d:.4g}", f"{loss:.4f}", f"{bend:.3g}"), i + 1
        span = f"{min(sizes):.3g} to {max(sizes):.3g}"
        rows.append((f"{b.flops:.3g}", str(len(b.runs)), span, *cells, b.problem or "minimum inside, used"))
    return tuple(rows)


def _approach_2(used: Sequence[Budget], found: Minima) -> dict:
    """The exponents that papers print: least squares through the minima, every budget counted alike."""
    C, one = np.array([b.flops for b in used]), np.ones((1, len(used)))
    return {
        name: float(fit_power(C, np.exp(v), one).exponent[0]) for name, v in (("a", found.log_n), ("b", found.log_d))
    }


def _bias(surface: Reference, used: Sequence[Budget], fit: Fit) -> dict | None:
    """What the parabolas put on the laws: on the exponent of N_opt, on log N_opt and on L_opt at the largest budget, and whether any of
    them is material; None where the surface has an optimum on fewer than 2 budgets."""
    shift = _shift(surface, used)[:, 0]
    told = np.isfinite(shift[0])
    if told.sum() < 2:
        return None
    C = np.array([b.flops for b in used])
    error = np.array([p.n_se for p in fit.used])
    known = np.isfinite(error).all() and (error > 0).all()
    weight = np.where(told, 1 / (error**2 + fit.details["tau"] ** 2) if known else 1.0, 0.0)[None]
    factor = fit_power(C, np.exp(np.where(told, shift[0], 0.0))[None], weight)
    last = np.flatnonzero(told)[-1]
    found = {
        "a": float(factor.exponent[0]),
        "N_opt": float(np.log(factor(C[last])[0])),
        "L_opt": float(shift[2, last]),
    }
    sizes = {}
    if fit.draws:
        with np.errstate(divide="ignore"):  # of a resample that determines no law
            n_opt = np.log(fit.draws["N_opt"](C[last]))
        drawn = {"a": fit.draws["N_opt"].exponent, "N_opt": n_opt, "L_opt": fit.draws["L_opt"](C[last])}
        sizes = {name: np.ptp(fit.interval(v)) / 2 for name, v in drawn.items()}
    material = any(abs(found[name]) > MATERIAL * size for name, size in sizes.items())
    budgets_ = [
        {"budget": b.label, "flops": b.flops, "N_opt": math.expm1(s[0]), "D_opt": math.expm1(s[1]), "L_opt": float(s[2])}
        for b, s in zip(used, shift.T, strict=True)
    ]  # fmt: skip
    return found | {"material": bool(material), "budgets": budgets_}


def _reasons(fit: Fit) -> tuple:
    """Why the data do not identify the law of N_opt; empty when they do."""
    if len(fit.used) < 3:
        return ("two budgets: any two minima lie on a power law, so nothing tests it",)
    if not fit.draws:
        return ("the laws have no interval",) if fit.resamples else ()
    if fit.degenerate > MOST_DEGENERATE * fit.resamples:
        return (f"the curves are flat for the noise: {fit.degenerate} of {fit.resamples} resamples are degenerate",)
    low, high = fit.interval(fit.draws["N_opt"].exponent)
    if low <= 0 or high >= 1:
        return (f"the exponent of N_opt is not identified: its interval {low:.2f} to {high:.2f} leaves (0, 1)",)
    return ()


def _notes(fit: Fit, used: Sequence[Budget], tau: float) -> tuple:
    """What a reader should know about laws that are identified."""
    found = []
    if tau > 0.01:
        found.append(
            f"the N_opt of the budgets scatter by {math.expm1(tau):.0%} beyond the noise of their runs; the intervals hold that too"
        )
    chance = no_parabola(used)
    if chance < 0.01:
        found.append(
            f"the curves are no parabolas (F test against quartics, p = {chance:.1g}); keep nearby sizes with --window, or compare "
            "--method=varpro"
        )
    law = fit.laws["L_opt"]
    if len(used) >= IRREDUCIBLE_FROM and fit.draws:
        if law.irreducible == 0 or np.quantile(fit.draws["L_opt"].irreducible, (1 - fit.level) / 2) == 0:
            found.append("the irreducible loss is not pinned down: its interval reaches 0")
        if -law.exponent > 0.99 * EXPONENTS[1] or -law.exponent < 1.01 * EXPONENTS[0]:
            found.append(f"the exponent of the reducible loss is at the bound of its search ({law.exponent:.3g})")
    return tuple(found)
