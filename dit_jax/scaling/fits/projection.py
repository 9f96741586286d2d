"""Starts of the surfaces' search: for given exponents E, A and B are linear, so their best values follow (Golub & Pereyra 1973)."""

import math

import numpy as np

from dit_jax.scaling.fits import newton

SHARE = 1e-3  # of the loss that a start gives a term whose best coefficient is 0, so that a search may find it again


def project(problem: newton.Problem, exponents: np.ndarray) -> tuple:
    """The best non-negative (E, A, B) for each pair of exponents (m, 2), as points (m, 5), and their squared errors (m,).

    The error is relative, (law - loss) / loss, where residuals are logarithms, so that it is linear in (E, A, B) too.
    """
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


def grid_minima(errors: np.ndarray) -> np.ndarray:
    """Which cells of a grid are no higher than any neighbour."""
    padded = np.pad(errors, 1, constant_values=math.inf)
    rows, columns = errors.shape
    around = [padded[i : i + rows, j : j + columns] for i in range(3) for j in range(3) if (i, j) != (1, 1)]
    return errors <= np.min(around, axis=0)
