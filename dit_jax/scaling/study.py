"""What the parametric fits share: the search from many starts, its intervals, its bounds and whether the data identify the law."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import stats

from dit_jax.error import UsageError
from dit_jax.scaling import inference, newton
from dit_jax.scaling.names import LOSSES, RESIDUALS
from dit_jax.scaling.runs import Run

FEW = 15  # independent runs below which a bootstrap of a Huber fit, or of whole training curves, is rough
FEWEST = 20  # resamples that make an interval
WORST = 1e13  # condition number of a normal matrix above which float64 holds three digits at most
ONE_BUDGET = 0.05  # runs whose compute differs by less are one budget


@dataclass(frozen=True)
class Design:
    """A method's problem, its way from parameters (m, p) to m laws, and the names of the parameters in order."""

    method: str
    residual: str
    loss: str
    problem: newton.Problem
    law: Callable
    names: tuple
    centre: tuple  # means of log N, log D and log L


@dataclass(frozen=True)
class Starts:
    """How the search went: starts, the distinct points they were projected to, and the share of starts that reached the best."""

    count: int
    distinct: int
    reached: float  # within a millionth of the lowest loss
    converged: float


@dataclass(frozen=True)
class SurfaceFit:
    """A surface, its optimum of compute C = k N D, and how far to trust them. `laws` and `draws` hold N_opt, D_opt and L_opt as power
    laws of C, as in IsoflopFit. `intervals` are those of a cluster bootstrap over runs, `delta_intervals` those of the delta method.
    """

    method: str
    n_runs: int
    clusters: int
    residual: str
    loss: str
    surface: object  # Surface
    k: float  # FLOPs per parameter and token, geometric mean over the runs
    spread: float  # the largest of these over the smallest
    laws: dict
    condition: inference.Conditioning
    starts: Starts
    bounds: tuple  # names of parameters at a bound
    objective: float  # sum of Huber losses, or of squared residuals
    noise: float  # standard deviation of a run's loss about the surface, at the mean loss
    largest: float  # training FLOPs of the largest run
    level: float
    resamples: int
    theta: np.ndarray = field(repr=False)
    design: Design = field(repr=False)
    surfaces: object = None  # Surface of arrays: the resamples
    draws: dict = field(default_factory=dict)
    noise_draws: np.ndarray = field(default_factory=lambda: np.zeros(0))
    intervals: dict = field(default_factory=dict)
    delta_intervals: dict = field(default_factory=dict)
    covariance: np.ndarray | None = field(default=None, repr=False)
    profile: inference.Profile | None = None
    degenerate: int = 0  # resamples that hold too few runs; not in `draws`
    identifiable: bool = False
    warnings: tuple = ()

    @property
    def freedom(self) -> int:
        """Runs beyond the number of parameters."""
        return self.clusters - self.design.problem.width

    def __call__(self, params, tokens):
        """The surface's loss."""
        return self.surface(params, tokens)


def check(runs: Sequence[Run], method: str, parameters: int, residual: str, loss: str) -> None:
    """Refuses what no search can mend."""
    for name, found, known in (("--residual", residual, RESIDUALS), ("--loss", loss, LOSSES)):
        if found not in known:
            raise UsageError(f"{name}: found {found!r}, expected one of {', '.join(known)}")
    for r in runs:
        if not all(math.isfinite(v) and v > 0 for v in (r.params, r.tokens, r.flops, r.loss)):
            raise UsageError(f"RUNS: {r.source or r.name}: params, tokens, flops and loss must be finite and above 0")
    distinct = len({(r.params, r.tokens) for r in runs})
    if distinct < parameters:
        raise UsageError(
            f"RUNS: {distinct} runs of different (params, tokens), but method {method} has {parameters} parameters; "
            f"expected at least {parameters}, and one more for intervals"
        )
    flops = [r.flops for r in runs]
    if max(flops) <= min(flops) * (1 + ONE_BUDGET):
        raise UsageError(
            f"RUNS: all {len(runs)} runs are of one budget, {flops[0]:.3g} FLOPs; a law of compute needs at least 2"
        )


def study(design: Design, runs: Sequence[Run], starts: tuple, resamples: int, seed: int, level: float) -> SurfaceFit:
    """The best of all starts, and what a reader needs to judge it. `starts` are (points (m, p), starts that each stands for (m,))."""
    problem, groups = design.problem, inference.clusters(runs)
    found = newton.minimize(problem, starts[0])
    theta, objective = found.theta[found.loss.argmin()], float(found.loss.min())
    r = newton.residuals(problem, theta[None])[0]
    scale = math.exp(design.centre[2])
    ratio = np.log([r.flops / (r.params * r.tokens) for r in runs])
    k, surface = float(np.exp(ratio.mean())), plain(design.law(theta[None]))
    noise = float(math.sqrt((r**2).sum() / max(len(r) - problem.width, 1)) * scale)
    fit = SurfaceFit(
        method=design.method,
        n_runs=len(runs),
        clusters=int(groups.max() + 1),
        residual=design.residual,
        loss=design.loss,
        surface=surface,
        k=k,
        spread=float(np.exp(ratio.max() - ratio.min())),
        laws={name: plain(law) for name, law in surface.optimum(k).items()},
        condition=inference.conditioning(problem, theta, design.centre, design.names),
        starts=_counted(found, starts[1]),
        bounds=_bounds(design, theta),
        objective=objective if design.loss == "huber" else 2 * objective,
        noise=noise,
        largest=max(r.flops for r in runs),
        level=level,
        resamples=resamples,
        theta=theta,
        design=design,
    )
    fit = _intervals(fit, groups, objective, seed) if fit.freedom > 0 else fit
    reasons = _reasons(fit, runs)
    return replace(fit, identifiable=not reasons, warnings=reasons + _cautions(fit))


def plain(law):
    """A law of arrays of one element, as a law of floats."""
    return type(law)(**{name: float(np.asarray(value).ravel()[0]) for name, value in vars(law).items()})


def quantities(design: Design, k: float, flops: float | None = None):
    """theta (m, p) -> name -> (values (m,), the scale its interval is taken on)."""

    def measure(theta: np.ndarray) -> dict:
        surface = design.law(theta)
        laws = surface.optimum(k)
        if flops is not None:
            out = {name: (law(flops), "log") for name, law in laws.items()}
            return {**out, "D_over_N": (out["D_opt"][0] / out["N_opt"][0], "log")}
        out = {name: (getattr(surface, name), "log") for name in ("A", "B", "alpha", "beta")}
        out |= {name: (getattr(surface, name), "plain") for name in ("E", "a", "b")}
        for name, law in laws.items():
            out[f"{name}.coefficient"] = (law.coefficient, "log")
            out[f"{name}.exponent"] = (law.exponent, "plain")
        return {**out, "L_opt.irreducible": out["E"]}

    return measure


def delta_at(fit: SurfaceFit, flops: float) -> dict:
    """Delta-method intervals of N_opt, D_opt, L_opt and D_opt / N_opt at `flops`; empty where no run is left to test the law."""
    if fit.covariance is None:
        return {}
    return inference.delta(quantities(fit.design, fit.k, flops), fit.theta, fit.covariance, fit.freedom, fit.level)


def _intervals(fit: SurfaceFit, groups: np.ndarray, objective: float, seed: int) -> SurfaceFit:
    problem, theta = fit.design.problem, fit.theta
    measure, scale = quantities(fit.design, fit.k), math.exp(fit.design.centre[2])
    matrix = inference.covariance(problem, theta, groups)
    fit = replace(
        fit,
        covariance=matrix,
        delta_intervals=inference.delta(measure, theta, matrix, fit.freedom, fit.level),
        profile=inference.profile(problem, theta, objective, scale, fit.freedom, fit.level),
    )
    if not fit.resamples:
        return fit
    draws, degenerate = inference.resample(problem, theta, groups, fit.resamples, seed, fit.level)
    if len(draws) < FEWEST:
        return replace(fit, degenerate=degenerate)
    surfaces = fit.design.law(draws)
    values = {name: value for name, (value, _) in measure(draws).items()}
    return replace(
        fit,
        degenerate=degenerate,
        surfaces=surfaces,
        draws=surfaces.optimum(fit.k),
        noise_draws=np.full(len(draws), fit.noise),
        intervals=inference.percentiles(values, fit.level),
    )


def _counted(found: newton.Minima, counts: np.ndarray) -> Starts:
    near = found.loss <= found.loss.min() * (1 + 1e-6) + 1e-20
    total = counts.sum()
    shares = (float(counts[which].sum() / total) for which in (near, found.converged))
    return Starts(int(total), len(counts), *shares)


def _bounds(design: Design, theta: np.ndarray) -> tuple:
    """Names of the parameters at a bound: a coefficient that is nothing, an exponent of 0 or as steep as is searched."""
    problem = design.problem
    hits = inference.vanished(problem, theta) | (theta >= problem.upper - 1e-9)
    return tuple(name for name, hit in zip(design.names, hits, strict=True) if hit)


def _reasons(fit: SurfaceFit, runs: Sequence[Run]) -> tuple:
    """Why the data do not identify the law; empty when they do."""
    found = []
    n, d = (np.log([getattr(r, name) for r in runs]) for name in ("params", "tokens"))
    for name, values in (("params", n), ("tokens", d)):
        if np.ptp(values) < 1e-6:
            found.append(f"all runs have the same {name}: its term cannot be told from the irreducible loss")
    if not found:
        slope, off = np.polyfit(n - n.mean(), d - d.mean(), 1)
        if np.std(d - d.mean() - slope * (n - n.mean()) - off) < 0.01 * np.std(d):
            found.append(
                f"tokens follow params^{slope:.2f} in all runs: nothing tells the two terms of the law apart; train some sizes "
                "on more or fewer tokens"
            )
    found += [
        f"{name} is at the bound of its search ({getattr(fit.surface, name):.3g}): its term is not determined"
        for name in fit.bounds
        if name != "E"
    ]
    if fit.freedom <= 0:
        return (
            *found,
            f"{fit.clusters} runs for {fit.design.problem.width} parameters: nothing is left to test the law",
        )
    if fit.condition.centred > WORST:
        found.append(
            f"the fit's condition number is {fit.condition.centred:.1g}: {fit.condition.correlated[0]} and "
            f"{fit.condition.correlated[1]} cannot be told apart"
        )
    if not found:
        half = np.sqrt(np.diag(fit.covariance)) * stats.t.ppf((1 + fit.level) / 2, fit.freedom)
        found += [
            f"{name} is {value:.3g} plus or minus {error:.2g}: its interval reaches 0, so the exponent is not determined"
            for name, value, error in zip(fit.design.names[3:], fit.theta[3:], half[3:], strict=True)
            if error >= value
        ]
    if fit.resamples and fit.degenerate > 0.1 * fit.resamples:
        found.append(f"{fit.degenerate} of {fit.resamples} resamples hold too few different runs for the law")
    return tuple(found)


def _cautions(fit: SurfaceFit) -> tuple:
    """What a reader should know about a law that is identified."""
    found = []
    if fit.profile is not None and fit.profile.interval[0] <= 1e-3 * fit.profile.interval[1]:
        found.append(f"the irreducible loss E is not pinned down: its interval is 0 to {fit.profile.interval[1]:.4g}")
    elif "E" in fit.bounds:
        found.append("the irreducible loss E is at its bound, 0")
    if fit.starts.reached < 0.01 * min(1.0, 100 / fit.starts.distinct):
        found.append(f"only {fit.starts.reached:.2%} of the starts reached the best: a better one may exist")
    if fit.intervals and fit.clusters < FEW and (fit.loss == "huber" or fit.clusters < fit.n_runs):
        found.append(
            f"{fit.clusters} independent runs are few for the bootstrap: its intervals are stretched for that, and rough; the delta method "
            "and the profile of E are given beside them"
        )
    if fit.spread > 1.05:
        found.append(
            f"flops / (params x tokens) varies {fit.spread:.2f}-fold over the runs; the optimum of compute takes their mean, {fit.k:.3g}"
        )
    return tuple(found)
