"""One isoFLOP curve: loss = c0 + c1 u + c2 u^2 with u = log N - its mean, and where it is lowest.

Approach 2 of Hoffmann et al. 2022 (arXiv 2203.15556), section 3.2. D at the vertex comes from the runs' own D (log D as a
quadratic of log N on the same runs), since exact training FLOPs are not 6 N D.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Vertex:
    """The minimum of a parabola; arrays hold one value per resample. Variances are per unit of loss variance (delta method)."""

    log_n: np.ndarray
    log_d: np.ndarray
    loss: np.ndarray
    curvature: np.ndarray  # second-order coefficient of loss in log N
    var_n: np.ndarray  # of log_n
    var_loss: np.ndarray
    inside: np.ndarray  # a minimum, strictly between the smallest and the largest size

    def __getitem__(self, index) -> "Vertex":
        """A selection of resamples."""
        return Vertex(**{name: values[index] for name, values in vars(self).items()})


@dataclass(frozen=True)
class Curve:
    """The least-squares problem of one budget: sizes and data are fixed, losses may be resampled."""

    log_n: np.ndarray  # (n,)
    centre: float
    solve: np.ndarray  # (3, n) losses -> coefficients
    covariance: np.ndarray  # (3, 3) per unit of loss variance
    leverage: np.ndarray  # (n,)
    log_d: np.ndarray  # (3,) coefficients of log D

    @property
    def basis(self) -> np.ndarray:
        return powers(self.log_n - self.centre)


def powers(u: np.ndarray) -> np.ndarray:
    """u (n,) -> the columns 1, u, u^2 (n, 3) of a parabola's design."""
    return np.stack([np.ones_like(u), u, u**2], axis=-1)


def curve(params: np.ndarray, tokens: np.ndarray) -> Curve:
    """The problem of fitting runs of these sizes (at least 3 distinct)."""
    log_n = np.log(params)
    centre = float(log_n.mean())
    basis = powers(log_n - centre)
    solve = np.linalg.pinv(basis)
    return Curve(log_n, centre, solve, solve @ solve.T, np.einsum("nc,cn->n", basis, solve), solve @ np.log(tokens))


def vertex(problem: Curve, losses: np.ndarray) -> Vertex:
    """Minima of the parabolas through `losses` (resamples, n)."""
    c0, c1, c2 = np.moveaxis(losses @ problem.solve.T, -1, 0)
    minimum = c2 > 0
    safe = np.where(minimum, c2, 1.0)
    u = np.where(minimum, -c1 / (2 * safe), 0.0)
    low, high = problem.log_n.min() - problem.centre, problem.log_n.max() - problem.centre
    inside = minimum & (u > low) & (u < high)
    at = powers(np.clip(u, low, high))
    slope = np.stack([np.zeros_like(u), -0.5 / safe, c1 / (2 * safe**2)], axis=-1)
    loss = c0 + c1 * u + c2 * u**2
    return Vertex(
        log_n=problem.centre + u,
        log_d=powers(u) @ problem.log_d,
        loss=loss,
        curvature=c2,
        var_n=np.einsum("bi,ij,bj->b", slope, problem.covariance, slope),
        var_loss=np.einsum("bi,ij,bj->b", at, problem.covariance, at),
        inside=inside & (loss > 0),
    )
