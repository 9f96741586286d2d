"""`surface`, `varpro`, `gadre`: parametric surfaces L = E + A / N^alpha + B / D^beta through all runs at once.

`surface` is approach 3 of Hoffmann et al. 2022 (arXiv 2203.15556), section 3.3, with the loss *summed* over runs: averaged, it is so small
that a search stops early, which Besiroglu et al. 2024 (arXiv 2404.10102) found in the published estimate. `varpro` searches the two
exponents alone, E, A and B being linear for given exponents (variable projection, Golub & Pereyra 1973), and takes squares. `gadre` has
one exponent for both terms, eq. 4 of Gadre et al. 2024 (arXiv 2403.08540): a check of published numbers. N in parameters active per token,
D in tokens.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import special

from dit_jax.error import UsageError
from dit_jax.scaling.fits import bootstrap, newton
from dit_jax.scaling.fits.fit import Fit, per_parameter_and_token, plain
from dit_jax.scaling.fits.law import PowerLaw
from dit_jax.scaling.fits.projection import grid_minima, project
from dit_jax.scaling.names import LOSSES, RESIDUALS
from dit_jax.scaling.runs import Run

DELTA = 1e-3  # of the Huber loss: relative to the loss, whatever the residual
NOTHING = 25.0  # a term e^25 times smaller than the smallest loss is none: the lower bound of log E, log A and log B
SEARCHED = 6  # of the customary starts
LIFT = 18.0  # above that bound: where a search may leave a term that is nothing
STEEPEST = 5.0  # upper bound of the exponents
ONE_BUDGET = 0.05  # runs whose compute differs by less are one budget
WIDEST = 1e20  # ratio of the largest to the smallest params, tokens and losses to which a surface is fitted
CHANCE = 0.01  # of the test of a surface's form
LEAST = 1e-8  # of the log loss: scatter that is rounding
HEAD = ("parameter", "value", "interval")


@dataclass(frozen=True)
class Surface:
    """(N, D) -> E + A / N^alpha + B / D^beta. Arrays in the fields are resamples of one law."""

    E: float | np.ndarray
    A: float | np.ndarray
    B: float | np.ndarray
    alpha: float | np.ndarray
    beta: float | np.ndarray

    def __call__(self, N, D):
        with np.errstate(over="ignore", invalid="ignore"):  # as in PowerLaw
            return self.E + self.A * np.power(N, -self.alpha) + self.B * np.power(D, -self.beta)

    @property
    def a(self):
        """Exponent of N_opt in compute; nan where both exponents are 0."""
        return _share(self.beta, self.alpha)

    @property
    def b(self):
        """Exponent of D_opt in compute."""
        return _share(self.alpha, self.beta)

    def optimum(self, k) -> dict:
        """N_opt, D_opt and L_opt as laws of compute C = k N D: eq. 4 of Hoffmann et al. All three are exact power laws,
        the loss with E, since both terms fall as C^(-alpha beta / (alpha + beta)) along the optimum."""
        with np.errstate(all="ignore"):
            log_g = (np.log(self.alpha * self.A) - np.log(self.beta * self.B)) / (self.alpha + self.beta)
            n = PowerLaw(np.exp(log_g - self.a * np.log(k)), self.a)
            d = PowerLaw(np.exp(-log_g - self.b * np.log(k)), self.b)
            reducible = self.A * n.coefficient**-self.alpha + self.B * d.coefficient**-self.beta
        return {"N_opt": n, "D_opt": d, "L_opt": PowerLaw(reducible, -self.alpha * self.a, self.E)}


def _share(one, other):
    with np.errstate(invalid="ignore"):
        return np.divide(one, np.add(one, other))


@dataclass(frozen=True)
class Design:
    """The problem of one method in logarithms about the means of the runs, its starts, and the names of its parameters in order."""

    problem: newton.Problem
    centre: tuple  # means of log N, log D and log L
    names: tuple

    def law(self, theta: np.ndarray) -> Surface:
        """theta (m, p) -> m surfaces."""
        e, a, b, alpha = np.moveaxis(theta[..., :4], -1, 0)
        beta = theta[..., -1]
        with np.errstate(over="ignore"):
            E, A, B = (np.exp(v + self.centre[2]) for v in (e, a + alpha * self.centre[0], b + beta * self.centre[1]))
        return Surface(E, A, B, alpha, beta)

    def fitted(self, theta: np.ndarray) -> np.ndarray:
        """The law's losses (n,) at the runs."""
        log = replace(self.problem, linear=False)
        return np.exp(newton.residuals(log, theta[None])[0] + self.problem.log_loss + self.centre[2])

    def refit(self, theta: np.ndarray, losses: np.ndarray) -> np.ndarray:
        """Parameters (m, p) fitted to losses (m, n), from `theta` with its vanished terms raised to where their slopes can be felt."""
        coefficient = self.problem.lower < -LIFT / 2
        start = np.where(coefficient, np.maximum(theta, self.problem.lower + LIFT), theta)
        lowest = math.exp(self.centre[2] + self.problem.log_loss.min() - 3.0)
        log_loss = np.log(np.maximum(losses, lowest)) - self.centre[2]
        return newton.minimize(self.problem, np.tile(start, (len(losses), 1)), log_loss=log_loss).theta

    def vanished(self, theta: np.ndarray) -> np.ndarray:
        """Which parameters (p,) are at their lower bound: a coefficient whose term is nothing, or an exponent of 0."""
        lower = self.problem.lower
        return theta <= lower + np.where(lower < -LIFT / 2, LIFT / 2, 1e-9)

    def basis(self, theta: np.ndarray) -> np.ndarray:
        """An orthonormal basis (n, p) of the changes of the law's losses that its free parameters make."""
        return np.linalg.qr(newton.jacobian(self.problem, theta)[:, ~self.vanished(theta)])[0]

    def leverage(self, theta: np.ndarray) -> np.ndarray:
        """The share (n,) of each residual that the law has absorbed."""
        return (self.basis(theta) ** 2).sum(1)

    def noise(self, theta: np.ndarray, runs: Sequence[Run]) -> bootstrap.Noise | None:
        """The noise of the runs about the law."""
        basis, groups, losses = self.basis(theta), bootstrap.clusters(runs), np.array([r.loss for r in runs])
        return bootstrap.noise(
            losses, self.fitted(theta), (basis**2).sum(1), groups, bootstrap.absorbed_means(basis, groups)
        )


def fit_surface(runs: Sequence[Run], *, residual: str = "log", loss: str = "huber", **options) -> Fit:
    """The five-parameter surface from the customary 4,500 starts: alpha, beta in {0, .5, 1, 1.5, 2}, log E in {-1, ..., 1}, log A and
    log B in {0, 5, ..., 25}. Options as of `fit_new`.

    Before a search, a start's E, A and B are replaced by the best ones for its exponents, so starts that share their exponents are one
    point, of 25; the SEARCHED of least squared error are searched.
    """
    design, exponents = make_design(runs, residual, loss), np.arange(5) / 2
    return _fit("surface", design, runs, _best_starts(design, itertools.product(exponents, exponents)), **options)


def _best_starts(design: Design, exponents: Iterable) -> np.ndarray:
    """Points (SEARCHED, 5): the pairs of exponents whose best E, A and B leave the least squared error."""
    starts, errors = project(design.problem, np.array(list(exponents)))
    return starts[np.argsort(errors, kind="stable")[:SEARCHED]]


def fit_new(runs: Sequence[Run], *, residual: str = "log", loss: str = "mse", **options) -> Fit:
    """The five-parameter surface by variable projection: the squared error over a grid of exponents, each with its best non-negative
    (E, A, B); then a search of the loss asked for from every minimum of that grid. All data count as new.

    `residual` is log law - log loss ("log") or law - loss ("linear"), `loss` a Huber loss of delta 1e-3 ("huber") or squares ("mse").
    `options`: `resamples`, `seed` and `level` of the intervals. Raises UsageError on runs that no search can mend.
    """
    design = make_design(runs, residual, loss)
    return _fit("varpro", design, runs, grid_starts(design), **options)


def fit_gadre(runs: Sequence[Run], *, residual: str = "linear", loss: str = "mse", **options) -> Fit:
    """L = E + A N^-b + B D^-b: four parameters, so N_opt and D_opt both grow as the square root of compute by assumption.
    The paper fits the losses themselves by least squares, hence the defaults. Options as of `fit_new`."""
    design = make_design(runs, residual, loss, shared=True)
    line = np.geomspace(0.02, 3.0, 33)
    starts = np.delete(_best_starts(design, zip(line, line, strict=True)), 4, axis=1)
    return _fit("gadre", design, runs, starts, **options)


@dataclass(frozen=True)
class Reference:
    """A surface by which another method's bias is predicted: its law, its losses (n,) at the runs, and its refits of losses (m, n)."""

    law: Surface
    fitted: np.ndarray
    design: Design
    theta: np.ndarray

    def refit(self, losses: np.ndarray) -> Surface:
        return self.design.law(self.design.refit(self.theta, losses))


def located(runs: Sequence[Run]) -> tuple:
    """(Design, parameters (p,)) of the surface of least squares of log losses. Raises UsageError on runs that span more than float64 can
    take to the powers that are tried, or that no search can mend."""
    for name in ("params", "tokens", "loss"):
        values = [getattr(r, name) for r in runs]
        if max(values) > WIDEST * min(values):
            raise UsageError(f"RUNS: {name} from {min(values):.3g} to {max(values):.3g}, too wide for a surface")
    design = make_design(runs, "log", "mse")
    return design, search(design, grid_starts(design))[0]


def reference(runs: Sequence[Run], needed: bool = False) -> Reference | None:
    """The surface through the runs if they identify one and its form is not refuted; else None, or a UsageError where it is `needed`."""
    try:
        design, theta = located(runs)
        reasons = reasons_of(design, theta, runs)
        if reasons:
            raise UsageError(
                f"RUNS: a parabola's bias is predicted from a surface, which these runs do not identify: {reasons[0]}"
            )
    except UsageError:
        if needed:
            raise
        return None
    if not needed and form(design, theta, runs) < CHANCE:
        return None
    return Reference(plain(design.law(theta[None])), design.fitted(theta), design, theta)


def _check(runs: Sequence[Run], parameters: int, residual: str, loss: str) -> None:
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
            f"RUNS: {distinct} runs of different (params, tokens), but a surface has {parameters} parameters; "
            f"expected at least {parameters}, and one more for intervals"
        )
    flops = [r.flops for r in runs]
    if max(flops) <= min(flops) * (1 + ONE_BUDGET):
        raise UsageError(
            f"RUNS: all {len(runs)} runs are of one budget, {flops[0]:.3g} FLOPs; a law of compute needs at least 2"
        )


def make_design(runs: Sequence[Run], residual: str, loss: str, shared: bool = False) -> Design:
    """The problem in logarithms about the means of the runs; `shared`: one exponent for both terms."""
    _check(runs, 4 if shared else 5, residual, loss)
    n, d, y = (np.log([getattr(r, name) for r in runs]) for name in ("params", "tokens", "loss"))
    centre = n.mean(), d.mean(), y.mean()
    x, z, one, none = n - centre[0], d - centre[1], np.ones(len(n)), np.zeros(len(n))
    terms = np.array([[one, none, none, none, none], [none, one, none, -x, none], [none, none, one, none, -z]])
    if shared:
        terms = np.concatenate([terms[:, :3], terms[:, 3:4] + terms[:, 4:5]], axis=1)
    y = y - centre[2]
    width = terms.shape[1]
    lower, upper = np.zeros(width), np.full(width, STEEPEST)
    lower[:3], upper[:3] = y.min() - NOTHING, 60.0
    delta = DELTA if loss == "huber" else math.inf
    problem = newton.Problem(terms.transpose(0, 2, 1), y, delta, residual == "linear", lower, upper)
    return Design(problem, centre, ("E", "A", "B", "beta") if shared else ("E", "A", "B", "alpha", "beta"))


def grid_starts(design: Design) -> np.ndarray:
    """The minima of the squared error over a grid of exponents, as points (m, 5)."""
    line = np.geomspace(0.02, 3.0, 33)
    grid = np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1).reshape(-1, 2)
    starts, errors = project(design.problem, grid)
    return starts[grid_minima(errors.reshape(33, 33)).ravel()]


def search(design: Design, starts: np.ndarray) -> tuple:
    """(the best parameters (p,) reached from the starts, what was made least there)."""
    found = newton.minimize(design.problem, starts)
    return found.theta[found.loss.argmin()], float(found.loss.min())


def _fit(
    method: str,
    design: Design,
    runs: Sequence[Run],
    starts: np.ndarray,
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Fit:
    """The best of all starts, and its resamples."""
    theta, objective = search(design, starts)
    fitted = design.fitted(theta)
    surface, k = plain(design.law(theta[None])), per_parameter_and_token(runs)
    noise = design.noise(theta, runs)
    drawn, spread = None, np.zeros(0)
    if noise and resamples:
        added = noise.draw(np.random.default_rng(seed), resamples)
        thetas = design.refit(theta, fitted + added)
        kept = np.isfinite(thetas).all(1)
        drawn, spread = design.law(thetas[kept]), np.sqrt(np.mean(added[kept] ** 2, axis=1))
    laws, reasons = {n: plain(law) for n, law in surface.optimum(k).items()}, reasons_of(design, theta, runs)
    if drawn is None and resamples and not reasons:
        reasons = (f"{len(runs)} runs for {design.problem.width} parameters: nothing is left to test the law",)
    parameters = {name: float(getattr(surface, name)) for name in ("E", "A", "B", "alpha", "beta", "a", "b")}
    if _same(runs):  # no optimum follows from such a law
        laws, drawn = {name: replace(law, coefficient=math.nan, exponent=math.nan) for name, law in laws.items()}, None
        parameters |= {"a": math.nan, "b": math.nan}
    fit = Fit(
        method=method,
        runs=tuple(runs),
        laws=laws,
        draws=drawn.optimum(k) if drawn else {},
        loss=surface,
        loss_draws=drawn,
        noise=noise.scale if noise else math.nan,
        noise_draws=spread,
        k=k,
        objective=objective if math.isfinite(design.problem.delta) else 2 * objective,
        level=level,
        resamples=resamples,
        parameters=parameters,
        parameter_draws={name: getattr(drawn, name) for name in parameters} if drawn else {},
        degenerate=resamples - len(spread) if drawn else 0,
        reasons=reasons,
    )
    bound = tuple(n for n, hit in zip(design.names, design.vanished(theta), strict=True) if hit)
    rows = [(n + (" (at its bound)" if n in bound else ""), f"{v:.6g}", span_of(fit, n)) for n, v in parameters.items()]
    title = f"L = E + A / N^alpha + B / D^beta, C = {k:.4g} N D, a run scatters by {fit.noise:.3g} about it"
    details = {"flops_per_parameter_and_token": k, "bounds": list(bound)}
    fit = replace(fit, tables=((title, HEAD, tuple(rows)),), details=details, form=form(design, theta, runs))
    return replace(fit, notes=notes_of(fit))


def span_of(fit: Fit, name: str) -> str:
    """The interval of a parameter as text."""
    low, high = fit.interval(fit.parameter_draws.get(name))
    return "\N{EN DASH}" if math.isnan(low) else f"{low:.5g} to {high:.5g}"


def _same(runs: Sequence[Run]) -> str:
    """params or tokens, whichever all runs have alike; "" = neither."""
    return next((n for n in ("params", "tokens") if np.ptp(np.log([getattr(r, n) for r in runs])) < 1e-6), "")


def reasons_of(design: Design, theta: np.ndarray, runs: Sequence[Run]) -> tuple:
    """Why the data do not identify the law; empty when they do."""
    if same := _same(runs):
        return (f"all runs have the same {same}: its term cannot be told from the irreducible loss",)
    n, d = (np.log([getattr(r, name) for r in runs]) for name in ("params", "tokens"))
    slope, off = np.polyfit(n - n.mean(), d - d.mean(), 1)
    if np.std(d - d.mean() - slope * (n - n.mean()) - off) < 0.01 * np.std(d):
        return (
            f"tokens follow params^{slope:.2f} in all runs: nothing tells the two terms of the law apart; train some sizes on more or "
            "fewer tokens",
        )
    hit = design.vanished(theta) | (theta >= design.problem.upper - 1e-9)
    surface = plain(design.law(theta[None]))
    at_bound = [name for name, h in zip(design.names, hit, strict=True) if h and name != "E"]
    if at_bound:
        return tuple(
            f"{name} is at the bound of its search ({getattr(surface, name):.3g}): its term is not determined"
            for name in at_bound
        )
    groups = bootstrap.clusters(runs)
    freedom = int(groups.max()) + 1 - bootstrap.absorbed_means(design.basis(theta), groups)
    if freedom < bootstrap.LEAST:
        return (f"{groups.max() + 1} runs for {design.problem.width} parameters: nothing is left to test the law",)
    noise = design.noise(theta, runs)
    freedom = noise.freedom if noise else freedom
    half = _errors(design, theta) * special.stdtrit(freedom, 0.975)
    return tuple(
        f"{name} is {value:.3g} plus or minus {error:.2g}: its interval reaches 0, so the exponent is not determined"
        for name, value, error in zip(design.names[3:], theta[3:], half[3:], strict=True)
        if error >= value
    )


def _errors(design: Design, theta: np.ndarray) -> np.ndarray:
    """Standard errors (p,) of the parameters by the delta method, of squares; those at a bound are taken as known."""
    slope, free = newton.jacobian(design.problem, theta), ~design.vanished(theta)
    r = newton.residuals(design.problem, theta[None])[0]
    variance = float((r**2).sum()) / max(len(r) - int(free.sum()), 1)
    out = np.zeros(len(theta))
    out[free] = np.sqrt(np.maximum(np.diag(np.linalg.pinv(slope[:, free].T @ slope[:, free])) * variance, 0.0))
    return out


def form(design: Design, theta: np.ndarray, runs: Sequence[Run]) -> float:
    """The chance of residuals as systematic as these, were the surface's form right: an F test of squares and the product of log N
    and log D in what it leaves (Ramsey 1969), the errors of the rows of one run having a part in common. 1 where too few runs are left."""
    x, z = -design.problem.terms[1, :, 3], -design.problem.terms[2, :, -1]
    slope = newton.jacobian(design.problem, theta)[:, ~design.vanished(theta)]
    r = newton.residuals(design.problem, theta[None])[0]
    more, noise = np.concatenate([slope, np.stack([x * x, z * z, x * z], axis=1)], axis=1), design.noise(theta, runs)
    if noise and noise.shared:
        slope, more, r = (noise.independent(v) for v in (slope, more, r[:, None]))
        r = r[:, 0]
    freedom = len(r) - np.linalg.matrix_rank(more)
    added = np.linalg.matrix_rank(more) - np.linalg.matrix_rank(slope)
    if freedom < 2 or added < 1:
        return 1.0
    left = [float(((r - m @ np.linalg.lstsq(m, r, rcond=None)[0]) ** 2).sum()) for m in (slope, more)]
    if left[0] < len(r) * LEAST**2:
        return 1.0
    return float(special.fdtrc(added, freedom, max(left[0] - left[1], 0.0) / added / max(left[1] / freedom, 1e-300)))


def notes_of(fit: Fit) -> tuple:
    """What a reader should know about a law that is identified."""
    found = []
    low, high = fit.interval(fit.parameter_draws.get("E"))
    if fit.parameters["E"] <= 1e-3 * min(r.loss for r in fit.runs) or low <= 1e-3 * high:
        found.append("the irreducible loss E is not pinned down: its interval reaches 0")
    ratio = [r.flops / (r.params * r.tokens) for r in fit.runs]
    if max(ratio) > 1.05 * min(ratio):
        found.append(
            f"flops / (params x tokens) varies {max(ratio) / min(ratio):.2f}-fold over the runs; the optimum of compute takes their mean, "
            f"{fit.k:.3g}"
        )
    return tuple(found)
