"""Minimises Huber losses of sums of power laws, for all starts and all resamples at once, by a damped Newton method.

A law is L = sum_k exp(theta . v_k) with known vectors v_k of each run (1, -log N, ...), so log L is the log-sum-exp of
Hoffmann et al. 2022 (arXiv 2203.15556), eq. 10. With p_k the share of term k in L, the gradient of log L is J = sum_k p_k v_k and
its Hessian sum_k p_k v_k v_k' - J J': both exact, and both matrix products over the runs.

The Hessian H of a Huber loss with a small delta counts few runs, and far from the minimum it is not positive definite. So steps
solve (H + damping M) step = -gradient, where M = sum w J J' with the weights w = min(1, delta / |residual|): the Gauss-Newton
matrix of iteratively reweighted least squares (Holland & Welsch 1977), which majorises the loss. Damping falls where the quadratic
model predicts the loss, and rises where it does not.
"""

from dataclasses import dataclass, field

import numpy as np

ROWS = (
    32_768  # numbers in one array of a chunk of problems: small enough for a core's cache, large enough to hide Python
)
STEPS = 300
REACH = 2.0  # the largest change of a parameter in one step
PRECISION = 1e-11  # of the loss, relative: predicted gains below it end a search


@dataclass(frozen=True)
class Problem:
    """Terms (k, n, p) of n runs in p parameters, and the logarithm (n,) of their losses.

    `delta` is where the Huber loss turns from squares to absolute values (inf = squares), in units of the residual:
    log law - log loss, or law - loss when `linear`. `lower` and `upper` (p,) bound the parameters.
    """

    terms: np.ndarray
    log_loss: np.ndarray
    delta: float
    linear: bool
    lower: np.ndarray
    upper: np.ndarray
    pairs: tuple = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "pairs", tuple(_pairs(self.terms)))

    @property
    def width(self) -> int:
        return self.terms.shape[2]


@dataclass(frozen=True)
class Minima:
    """Where the searches ended: parameters (m, p), loss (m,), steps taken (m,) and whether the search had converged (m,)."""

    theta: np.ndarray
    loss: np.ndarray
    steps: np.ndarray
    converged: np.ndarray


@dataclass
class _Local:
    """Loss, gradient, Hessian and majoriser of m problems at their points."""

    loss: np.ndarray
    gradient: np.ndarray
    hessian: np.ndarray
    majoriser: np.ndarray

    def __getitem__(self, index) -> "_Local":
        return _Local(*(v[index] for v in vars(self).values()))

    def put(self, index, other: "_Local", taken) -> None:
        for mine, new in zip(vars(self).values(), vars(other).values(), strict=True):
            mine[index] = new[taken]


def minimize(
    problem: Problem,
    theta: np.ndarray,
    weight: np.ndarray | None = None,
    fixed: np.ndarray | None = None,
    log_loss: np.ndarray | None = None,
) -> Minima:
    """The minimum reached from each start `theta` (m, p); `weight` (m, n) counts each run in each problem (None = once);
    parameters that are `fixed` (p,) stay where they start; `log_loss` (m, n) are losses of each problem's own (None = the problem's)."""
    size = max(ROWS // problem.terms.shape[1], 1)
    parts = []
    for i in range(0, len(theta), size):
        mine, counts = (None if v is None else v[i : i + size] for v in (log_loss, weight))
        start = np.clip(theta[i : i + size], problem.lower, problem.upper)
        parts.append(_search(problem, start, counts, fixed, mine))
    return Minima(*(np.concatenate([getattr(p, name) for p in parts]) for name in vars(parts[0])))


def residuals(problem: Problem, theta: np.ndarray) -> np.ndarray:
    """Residuals (m, n) of the runs under each theta (m, p)."""
    return _shares(problem, theta)[1]


def jacobian(problem: Problem, theta: np.ndarray) -> np.ndarray:
    """Derivatives (n, p) of the residuals at one theta (p,)."""
    shares, _, law = _shares(problem, theta[None])
    slope = sum(s[0][:, None] * v for s, v in zip(shares, problem.terms, strict=True))
    return slope * law[0][:, None] if problem.linear else slope


def local(problem: Problem, theta: np.ndarray, weight: np.ndarray | None = None, log_loss=None) -> _Local:
    """Loss (m,), its gradient (m, p), Hessian and majoriser (m, p, p) at each theta (m, p)."""
    shares, r, law = _shares(problem, theta, log_loss)
    psi = np.clip(r, -problem.delta, problem.delta)
    loss = psi * (r - 0.5 * psi)
    inside = (psi == r).astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        robust = np.where(inside > 0, 1.0, psi / r)
    if weight is not None:
        psi, loss, inside, robust = (weight * v for v in (psi, loss, inside, robust))
    if problem.linear:
        push, curve, robust = psi * law, inside * law**2, robust * law**2
    else:
        push, curve = psi, inside - psi
    width = problem.width
    gradient = np.zeros((len(theta), width))
    hessian, majoriser = np.zeros((2, len(theta), width * width))
    for share, vectors in zip(shares, problem.terms, strict=True):
        gradient += (push * share) @ vectors
    for k, other, columns, place in problem.pairs:
        product = shares[k] * shares[other]
        bend, bound = product * curve, product * robust
        if k == other:
            pull = push * shares[k]
            bend, bound = bend + pull, bound + np.abs(pull)
        hessian += (bend @ columns) @ place
        majoriser += (bound @ columns) @ place
    shape = (len(theta), width, width)
    return _Local(loss.sum(1), gradient, hessian.reshape(shape), majoriser.reshape(shape))


def _shares(problem: Problem, theta: np.ndarray, log_loss: np.ndarray | None = None) -> tuple:
    """(share of each term [k](m, n), residuals (m, n), law (m, n))."""
    parts = [np.exp(theta @ v.T) for v in problem.terms]
    law = sum(parts[1:], start=parts[0])
    seen = problem.log_loss if log_loss is None else log_loss
    residual = law - np.exp(seen) if problem.linear else np.log(law) - seen
    return [p / law for p in parts], residual, law


def _pairs(terms: np.ndarray):
    """For each pair of terms: (k, l, the c distinct nonzero entries of v_k v_l' + its transpose (n, c), and where they go in the
    matrix, as zeros and ones (c, p^2))."""
    width = terms.shape[2]
    for k in range(len(terms)):
        for other in range(k, len(terms)):
            columns, place = [], []
            for i in range(width):
                for j in range(i, width):
                    column = terms[k][:, i] * terms[other][:, j]
                    if k != other:
                        column = column + terms[other][:, i] * terms[k][:, j]
                    if np.any(column):
                        columns.append(column)
                        spot = np.zeros((width, width))
                        spot[i, j] = spot[j, i] = 1.0
                        place.append(spot.ravel())
            yield k, other, np.stack(columns, axis=1), np.array(place)


def _search(problem: Problem, theta: np.ndarray, weight, fixed, log_loss) -> Minima:
    """One chunk. Problems that have ended leave the batch."""
    theta, count = theta.copy(), len(theta)
    steps, converged = np.zeros(count, int), np.zeros(count, bool)
    here = local(problem, theta, weight, log_loss)
    damping, left = np.ones(count), np.arange(count)
    total = np.full(count, float(len(problem.log_loss))) if weight is None else weight.sum(1)
    for _ in range(STEPS):
        now = here[left]
        step, gain, positive = _step(problem, theta[left], now, damping[left], fixed)
        floor = PRECISION * now.loss + 1e-28 * total[left]
        ended = positive & (gain <= floor)
        converged[left[ended]] = True
        damping[left[~positive]] *= 8
        left, step, gain = left[positive & ~ended], step[positive & ~ended], gain[positive & ~ended]
        if len(left):
            there = np.clip(theta[left] + step, problem.lower, problem.upper)
            mine, counts = (None if v is None else v[left] for v in (log_loss, weight))
            new = local(problem, there, counts, mine)
            fell = here.loss[left] - new.loss
            ratio = fell / gain
            taken = fell > 0
            tiny = ~taken & (np.abs(fell) <= 1e-14 * here.loss[left])
            converged[left[tiny]] = True
            steps[left] += 1
            theta[left[taken]] = there[taken]
            here.put(left[taken], new, taken)
            damping[left] *= np.where(ratio > 0.75, 0.2, np.where(ratio < 0.25, 4.0, 1.0))
        left = np.flatnonzero(~converged & (damping < 1e12))
        if not len(left):
            break
    return Minima(theta, here.loss, steps, converged)


def _step(problem: Problem, theta: np.ndarray, here: _Local, damping: np.ndarray, fixed) -> tuple:
    """(step (m, p), the gain in loss that the quadratic model expects (m,), whether the damped matrix is positive definite)."""
    stuck = ((theta <= problem.lower) & (here.gradient >= 0)) | ((theta >= problem.upper) & (here.gradient <= 0))
    if fixed is not None:
        stuck = stuck | fixed
    free = ~stuck
    gradient = np.where(free, here.gradient, 0.0)
    both = free[:, :, None] & free[:, None, :]
    spread = np.einsum("mii->mi", here.majoriser)
    matrix = here.hessian + damping[:, None, None] * here.majoriser
    diagonal = np.einsum("mii->mi", matrix)  # a view
    diagonal += 1e-2 * damping[:, None] * spread + 1e-30
    matrix = np.where(both, matrix, 0.0)
    np.einsum("mii->mi", matrix)[:] += stuck
    step, positive = _solve(matrix, -gradient)
    largest = np.abs(step).max(1)
    short = np.minimum(1.0, REACH / np.maximum(largest, 1e-300))
    slope = np.einsum("mp,mp->m", gradient, step)
    bend = np.einsum("mp,mpq,mq->m", step, np.where(both, here.hessian, 0.0), step)
    return step * short[:, None], -(slope * short + 0.5 * bend * short**2), positive


def _solve(matrix: np.ndarray, right: np.ndarray) -> tuple:
    """Solves m symmetric systems (m, p, p) by Cholesky, after scaling to a unit diagonal; tells which are positive definite."""
    width = matrix.shape[1]
    diagonal = np.einsum("mii->mi", matrix)
    positive = (diagonal > 0).all(1)
    scale = 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
    matrix = matrix * scale[:, :, None] * scale[:, None, :]
    low = np.zeros_like(matrix)
    for j in range(width):
        pivot = matrix[:, j, j] - np.einsum("mk,mk->m", low[:, j, :j], low[:, j, :j])
        positive &= pivot > 1e-14
        low[:, j, j] = root = np.sqrt(np.where(pivot > 1e-14, pivot, 1.0))
        for i in range(j + 1, width):
            low[:, i, j] = (matrix[:, i, j] - np.einsum("mk,mk->m", low[:, i, :j], low[:, j, :j])) / root
    x = np.where(positive[:, None], right * scale, 0.0)
    for j in range(width):
        x[:, j] = (x[:, j] - np.einsum("mk,mk->m", low[:, j, :j], x[:, :j])) / low[:, j, j]
    for j in reversed(range(width)):
        x[:, j] = (x[:, j] - np.einsum("mk,mk->m", low[:, j + 1 :, j], x[:, j + 1 :])) / low[:, j, j]
    return x * scale, positive & np.isfinite(x).all(1)
