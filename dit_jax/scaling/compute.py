"""Loss as a power of compute alone: L = k C^x of Liang et al. 2024 (arXiv 2410.08184), section 3.2, and E + k C^x with an irreducible term.

The points are the best run of each budget; runs alike in params and tokens (seeds) count as one, by their mean. The best of noisy runs is a
little too good, and the more so the more sizes a budget has; the best of a few sizes is a little too bad. Estimates are the published
method's and leave that as it is; intervals do not.

**Intervals**: the law is fitted anew to its own values less simulated errors of the points. Where every budget has 4 sizes or more, all its
runs are drawn about smooth curves and the best is taken again (`smooth`); an error is its distance from the curve's minimum. Where
each budget has one run, or too few for curves, errors are normal about the law, the scale of their noise drawn as s sqrt(v / chi2_v) for
v = points - parameters (Student's t). Every draw is a fit within the bounds of the law, so the interval's ends are laws too. The
Huber fit without curves weights its points instead, as `inference` says.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dit_jax.scaling import inference, newton
from dit_jax.scaling.law import PowerLaw, fit_irreducible, fit_power
from dit_jax.scaling.optima import IRREDUCIBLE_FROM, Errors, Point, PointFit
from dit_jax.scaling.runs import Run, budgets
from dit_jax.scaling.smooth import at_minima, smooth
from dit_jax.scaling.study import check
from dit_jax.scaling.surface import DELTA, NOTHING, STEEPEST

SIZES = 4  # of a budget whose noise its own curve tells


def fit_compute(
    runs: Sequence[Run],
    *,
    residual: str = "log",
    loss: str = "mse",
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> PointFit:
    """L_opt_pure, from 4 budgets on L_opt_irreducible, and L_opt, the latter where there is one. Says nothing of N_opt or D_opt."""
    check(runs, "power", 2, residual, loss)
    pairs = [(min(_seeds_averaged(members), key=lambda r: r.loss), members) for _, members in budgets(runs)]
    best, grids = zip(*sorted(pairs, key=lambda pair: pair[0].flops), strict=True)
    points = tuple(Point(f"{r.flops:.3g}", r.flops, r.params, r.tokens, r.loss) for r in best)
    C, y = np.array([r.flops for r in best]), np.array([r.loss for r in best])
    delta = DELTA if loss == "huber" else math.inf
    errors = _errors(best, grids, resamples, seed) if resamples else None
    draw = {"resamples": resamples, "seed": seed, "level": level, "errors": errors}
    laws, draws, sums = {}, {}, {}
    for name in ("L_opt_pure", "L_opt_irreducible")[: 1 + (len(best) >= IRREDUCIBLE_FROM)]:
        laws[name], drawn, sums[name] = _fit(C, y, name == "L_opt_irreducible", delta, residual == "linear", draw)
        if drawn is not None:
            draws[name] = drawn
    laws["L_opt"] = laws[name]
    if name in draws:
        draws["L_opt"] = draws[name]
    reasons = () if name in draws or not resamples else (f"{len(best)} budgets leave nothing to test the law",)
    low = np.quantile(draws["L_opt_irreducible"].irreducible, (1 - level) / 2) if len(draws) > 2 else math.inf
    cautions = ("the irreducible loss is not pinned down: its interval reaches 0",) if low < 1e-3 * y.min() else ()
    if resamples and errors is None and any(len({r.params for r in members}) > 1 for members in grids):
        cautions += (CHOSEN,)
    spread = float(errors.noise * y[-1]) if errors else float(np.std(y - laws["L_opt"](C)))
    return PointFit(
        method="power",
        n_runs=len(runs),
        points=points,
        laws=laws,
        objective=sums[name] if loss == "huber" else 2 * sums[name],
        level=level,
        resamples=resamples,
        draws=draws,
        noise=spread,
        noise_draws=np.full(len(draws["L_opt"].exponent) if "L_opt" in draws else 0, spread),
        identifiable=not reasons,
        warnings=reasons + cautions,
    )


CHOSEN = (
    "too few sizes for smooth curves about which the runs' noise could be drawn: the intervals hold the scatter of the best runs "
    "about the law, and not that the best of noisy runs is too good"
)


def _cells(members: Sequence[Run]) -> np.ndarray:
    """Which of the different (params, tokens) each run (runs,) has."""
    return np.unique([(r.params, r.tokens) for r in members], axis=0, return_inverse=True)[1].ravel()


def _seeds_averaged(members: Sequence[Run]) -> list[Run]:
    """A run for each (params, tokens): its loss the geometric mean over seeds, else as they come."""
    same: dict = {}
    for run, cell in zip(members, _cells(members).tolist(), strict=True):
        same.setdefault(cell, []).append(run)
    return [
        s[0] if len(s) == 1 else replace(s[0], loss=math.exp(np.mean([math.log(r.loss) for r in s])))
        for s in same.values()
    ]


def _errors(best, grids, resamples: int, seed: int) -> Errors | None:
    """Errors of the best runs by simulation; None where a budget has too few sizes, or curves without a minimum."""
    if len(best) < 2 or min(len({r.params for r in members}) for members in grids) < SIZES:
        return None
    sizes, losses = ([np.log([getattr(r, k) for r in members]) for members in grids] for k in ("params", "loss"))
    log_c = np.log([r.flops for r in best])
    x = log_c - log_c.mean()
    start = np.polyval(np.polyfit(x, np.log([r.params for r in best]), 1), x)
    curves = smooth(log_c, sizes, losses, start)
    if curves is None:
        return None
    curves = curves.least(*at_minima(sizes, losses))
    drawn, scale = curves.draw(np.random.default_rng(seed), resamples)
    cells = [_cells(members)[inside] for members, inside in zip(grids, curves.inside, strict=True)]
    means = [own / np.maximum(own.sum(0), 1) for own in (np.equal.outer(c, np.unique(c)) for c in cells)]
    off = np.stack([(d @ mean).min(1) for d, mean in zip(drawn, means, strict=True)], axis=1)
    return Errors(np.broadcast_to(off, (3, *off.shape)), np.ones(off.shape, bool), curves.noise, scale)


def _fit(C, y, irreducible: bool, delta: float, linear: bool, draw: dict) -> tuple:
    """(the law, its resamples or None, its loss). Starts from the least squares of all exponents of a grid."""
    one = np.ones((1, len(C)))
    start = (fit_irreducible if irreducible else fit_power)(C, y[None], one)[0]
    x, mean = np.log(C), np.log(y).mean()
    centre = x.mean()
    x, log_y = x - centre, np.log(y) - mean
    floor = log_y.min() - NOTHING
    flat = np.ones_like(x)
    law = np.stack([flat, -x], axis=1)
    terms, lower = law[None], np.array([floor, -STEEPEST])
    reducible = max(start.coefficient * math.exp(start.exponent * centre), math.exp(mean + floor + inference.LIFT))
    theta = [math.log(reducible) - mean, -start.exponent]
    if irreducible:
        terms = np.zeros((2, len(x), 3))
        terms[0, :, 0], terms[1, :, 1:] = 1.0, law
        lower = np.array([floor, floor, 0.0])
        theta = [max(math.log(max(start.irreducible, 1e-300)) - mean, floor + inference.LIFT), *theta]
    upper = np.append(np.full(len(lower) - 1, 60.0), STEEPEST)
    problem = newton.Problem(terms, log_y, delta, linear, lower, upper)
    found = newton.minimize(problem, np.array([theta]))

    def law_of(t) -> PowerLaw:
        E = np.exp(t[:, 0] + mean) if irreducible else np.zeros(len(t))
        return PowerLaw(np.exp(t[:, -2] + mean + t[:, -1] * centre), -t[:, -1], E)

    drawn = None
    if len(C) > len(lower) and draw["resamples"]:
        thetas = _redrawn(problem, found.theta[0], draw)
        drawn = law_of(thetas) if len(thetas) >= 20 else None
    return law_of(found.theta)[0], drawn, float(found.loss[0])


def _redrawn(problem: newton.Problem, theta: np.ndarray, draw: dict) -> np.ndarray:
    """Estimates (resamples, p) from the law's own values less errors of the points."""
    count, resamples, errors = len(problem.log_loss), draw["resamples"], draw["errors"]
    if errors is None and math.isfinite(problem.delta):
        return inference.resample(problem, theta, np.arange(count), resamples, draw["seed"], draw["level"])[0]
    off = newton.residuals(problem, theta[None])[0]
    law = np.log(np.exp(problem.log_loss) + off) if problem.linear else problem.log_loss + off
    if errors is not None:
        log_loss = law - errors.log[2]
    else:
        rng, freedom = np.random.default_rng(draw["seed"]), count - problem.width
        scale = np.sqrt((off**2).sum() / rng.chisquare(freedom, (resamples, 1)))
        noise = scale * rng.standard_normal((resamples, count))
        log_loss = np.log(np.maximum(np.exp(law) + noise, np.exp(law - 3.0))) if problem.linear else law + noise
    found = newton.minimize(problem, np.tile(inference.lifted(problem, theta), (resamples, 1)), log_loss=log_loss)
    return found.theta[np.isfinite(found.theta).all(1)]
