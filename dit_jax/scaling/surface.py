"""Parametric surfaces L = E + A / N^alpha + B / D^beta: the law, its optimum of compute, and its three fits.

`fit_surface` is approach 3 of Hoffmann et al. 2022 (arXiv 2203.15556), section 3.3, with the loss *summed* over runs: averaged, it
is so small that a search stops early, which Besiroglu et al. 2024 (arXiv 2404.10102) found in the published estimate.
`fit_varpro` searches the two exponents alone, E, A and B being linear for given exponents (variable projection, Golub & Pereyra
1973). `fit_gadre` is the surface with one exponent for both terms of Gadre et al. 2024 (arXiv 2403.08540), eq. 4. N in
parameters active per token, D in tokens.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dit_jax.scaling import newton
from dit_jax.scaling.law import PowerLaw
from dit_jax.scaling.runs import Run
from dit_jax.scaling.study import Design, SurfaceFit, check, study

DELTA = 1e-3  # of the Huber loss: relative to the loss, whatever the residual
NOTHING = 25.0  # a term e^25 times smaller than the smallest loss is none: the lower bound of log E, log A and log B
STEEPEST = 5.0  # upper bound of the exponents
SHARE = 1e-3  # of the loss that a start gives a term whose best coefficient is 0, so that a search may find it again


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

    def optimum(self, k: float) -> dict:
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


def fit_surface(
    runs: Sequence[Run],
    *,
    residual: str = "log",
    loss: str = "huber",
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> SurfaceFit:
    """The five-parameter surface from the customary 4,500 starts: alpha, beta in {0, .5, 1, 1.5, 2}, log E in {-1, ..., 1}, log A and
    log B in {0, 5, ..., 25}.

    Before a search, a start's E, A and B are replaced by the best ones for its exponents, so starts that share their exponents are one
    point and are searched once; the share of starts that reached the best counts all of them.
    """
    exponents, half = np.arange(5) / 2, np.arange(-2, 3) / 2
    starts = np.array(list(itertools.product(half, 5.0 * np.arange(6), 5.0 * np.arange(6), exponents, exponents)))
    design = _design("surface", runs, residual, loss)
    return study(design, runs, _projected(design, starts), resamples, seed, level)


def fit_varpro(
    runs: Sequence[Run],
    *,
    residual: str = "log",
    loss: str = "mse",
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> SurfaceFit:
    """The five-parameter surface by variable projection: the squared error over a grid of exponents, each with its best
    non-negative (E, A, B); then a search of the loss asked for from every minimum of that grid."""
    design = _design("varpro", runs, residual, loss)
    line = np.geomspace(0.02, 3.0, 33)
    grid = np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1).reshape(-1, 2)
    starts, errors = _project(design, grid)
    lowest = _grid_minima(errors.reshape(33, 33)).ravel()
    return study(design, runs, (starts[lowest], np.ones(lowest.sum(), int)), resamples, seed, level)


def fit_gadre(
    runs: Sequence[Run],
    *,
    residual: str = "linear",
    loss: str = "mse",
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> SurfaceFit:
    """L = E + A N^-b + B D^-b: four parameters, so N_opt and D_opt both grow as the square root of compute by assumption.
    The paper fits the losses themselves by least squares, hence the defaults."""
    design = _design("gadre", runs, residual, loss)
    line = np.geomspace(0.02, 3.0, 33)
    starts = np.delete(_project(design, np.stack([line, line], axis=-1))[0], 4, axis=1)
    return study(design, runs, (starts, np.ones(len(line), int)), resamples, seed, level)


def _design(method: str, runs: Sequence[Run], residual: str, loss: str) -> Design:
    """The problem in logarithms about the means of the runs, and the way back to a Surface."""
    check(runs, method, 4 if method == "gadre" else 5, residual, loss)
    n, d, y = (np.log([getattr(r, name) for r in runs]) for name in ("params", "tokens", "loss"))
    centre = n.mean(), d.mean(), y.mean()
    x, z, one, none = n - centre[0], d - centre[1], np.ones(len(n)), np.zeros(len(n))
    terms = np.array([[one, none, none, none, none], [none, one, none, -x, none], [none, none, one, none, -z]])
    shared = method == "gadre"
    if shared:
        terms = np.concatenate([terms[:, :3], terms[:, 3:4] + terms[:, 4:5]], axis=1)
    y = y - centre[2]
    width = terms.shape[1]
    lower, upper = np.zeros(width), np.full(width, STEEPEST)
    lower[:3], upper[:3] = y.min() - NOTHING, 60.0
    delta = DELTA if loss == "huber" else math.inf
    problem = newton.Problem(terms.transpose(0, 2, 1), y, delta, residual == "linear", lower, upper)

    def law(theta: np.ndarray) -> Surface:
        """theta (m, p) -> m surfaces."""
        e, a, b, alpha = np.moveaxis(theta[..., :4], -1, 0)
        beta = theta[..., -1]
        with np.errstate(over="ignore"):
            E, A, B = (np.exp(v + centre[2]) for v in (e, a + alpha * centre[0], b + beta * centre[1]))
        return Surface(E, A, B, alpha, beta)

    names = ("E", "A", "B", "beta") if shared else ("E", "A", "B", "alpha", "beta")
    return Design(method, residual, loss, problem, law, names, centre)


def _projected(design: Design, starts: np.ndarray) -> tuple:
    """(distinct points that the starts are projected to, how many starts each stands for)."""
    exponents, counts = np.unique(starts[:, 3:], axis=0, return_counts=True)
    return _project(design, exponents)[0], counts


def _project(design: Design, exponents: np.ndarray) -> tuple:
    """The best non-negative (E, A, B) for each pair of exponents (m, 2), as points (m, 5), and their squared errors (m,).

    The error is relative, (law - loss) / loss, where residuals are logarithms, so that it is linear in (E, A, B) too.
    """
    problem = design.problem
    x, z = -problem.terms[1, :, 3], -problem.terms[2, :, -1]
    loss = np.exp(problem.log_loss)
    unit = np.ones_like(loss) if problem.linear else loss
    columns = np.stack(
        [np.ones((len(exponents), len(x))), np.exp(-exponents[:, :1] * x), np.exp(-exponents[:, 1:] * z)], axis=1
    )
    columns = columns / unit
    scale = np.sqrt((columns**2).sum(-1))
    columns /= scale[:, :, None]
    coefficients, errors = _nonnegative(columns, loss / unit)
    coefficients = coefficients / scale
    least = SHARE * coefficients.sum(1, keepdims=True)
    return np.concatenate([np.log(np.maximum(coefficients, least)), exponents], axis=1), errors


def _nonnegative(columns: np.ndarray, target: np.ndarray) -> tuple:
    """Least squares target = c . columns with c >= 0, columns (m, 3, n): the best of all subsets of columns that are feasible."""
    gram = np.einsum("min,mjn->mij", columns, columns) + 1e-12 * np.eye(3)
    right = columns @ target
    best, lowest = np.zeros((len(columns), 3)), np.full(len(columns), math.inf)
    for subset in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)):
        part = list(subset)
        found = np.zeros_like(best)
        found[:, part] = np.linalg.solve(gram[:, part][:, :, part], right[:, part, None])[..., 0]
        error = ((target - np.einsum("mi,min->mn", found, columns)) ** 2).sum(1)
        better = (found >= 0).all(1) & (error < lowest)
        best[better], lowest[better] = found[better], error[better]
    return best, lowest


def _grid_minima(errors: np.ndarray) -> np.ndarray:
    """Which cells of a grid are no higher than any neighbour."""
    padded = np.pad(errors, 1, constant_values=math.inf)
    rows, columns = errors.shape
    around = [padded[i : i + rows, j : j + columns] for i in range(3) for j in range(3) if (i, j) != (1, 1)]
    return errors <= np.min(around, axis=0)
