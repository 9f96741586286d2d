"""Laws of compute through points (C, N, D, L), one for each budget: least squares of the logarithms, and their intervals.

Intervals: in each resample the laws are fitted to their own values less the errors of the points (log N, log D, log L). A method that
can simulate its runs gives these errors (`smooth` for isoFLOP curves); they hold the bias of a lowest point too. Of points alone
nothing but their scatter about the laws is known: errors are then normal with its covariance, and its scale is redrawn as
s sqrt(v / chi2_v) for v degrees of freedom, which gives few points the width of Student's t.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dit_jax.error import UsageError
from dit_jax.scaling.law import fit_irreducible, fit_power
from dit_jax.scaling.runs import scattered

NAMES = ("N_opt", "D_opt", "L_opt")
RARE = 0.01  # share of the resamples that scatter as much as the points, below which that is said
LISTED = 3  # budgets with one problem that are named
IRREDUCIBLE_FROM = 4  # points from which the loss law carries an irreducible term, as in `fit`


@dataclass(frozen=True)
class Point:
    """The best of one compute: FLOPs, parameters, tokens and loss there."""

    label: str
    flops: float
    n_opt: float
    d_opt: float
    loss: float


@dataclass(frozen=True)
class PointFit:
    """Laws of compute and their resamples, as in IsoflopFit, with the points that they go through."""

    method: str
    n_runs: int
    points: tuple
    laws: dict
    objective: float  # sum of squared residuals of log N_opt, or of the law's own loss
    level: float
    resamples: int
    draws: dict = field(default_factory=dict)
    intervals: dict = field(default_factory=dict)
    noise: float = float("nan")
    noise_draws: np.ndarray = field(default_factory=lambda: np.zeros(0))
    curvature: float = 0.0
    others: object = None  # what the method knows of other sizes: a function of (fit, away), as `overhead` says
    degenerate: int = 0
    identifiable: bool = False
    warnings: tuple = ()

    @property
    def largest(self) -> float:
        """Training FLOPs of the largest point."""
        return max(p.flops for p in self.points)


@dataclass(frozen=True)
class Errors:
    """Simulated errors of the points: `log` (3, resamples, points) of log N, log D and log L; `found` (resamples, points), where there was
    a point; and the noise of a run's log loss, with its resamples (resamples,)."""

    log: np.ndarray
    found: np.ndarray
    noise: float
    noise_draws: np.ndarray


def left_out(problems: Sequence[tuple]) -> list[str]:
    """Of (label, problem) of the budgets that are not used, a line each; of many with one problem, one line for all."""
    kinds: dict[str, list] = {}
    for label, problem in problems:
        kinds.setdefault(re.sub(r"[0-9][0-9.e+-]*", "", problem), []).append((label, problem))
    lines = []
    for alike in kinds.values():
        if len(alike) <= LISTED:
            lines += [f"budget {label}: {problem}; not used" for label, problem in alike]
        else:
            first = ", ".join(label for label, _ in alike[:LISTED])
            more = f"budgets {first} and {len(alike) - LISTED} more: {alike[0][1]} (at the first, alike at the others)"
            lines.append(f"{more}; not used")
    return lines


def shared(fit, groups: Sequence[tuple], tolerance: float):
    """A fit of budgets' optima; not identified, and saying why, where the runs were not planned at budgets."""
    why = scattered(groups, tolerance)
    text = f"{why}; fit a surface (--method=surface, varpro), or name the budgets in a column 'group'"
    return replace(fit, identifiable=False, warnings=(text, *fit.warnings)) if why else fit


def laws_of(
    method: str, n_runs: int, points: Sequence[Point], warnings: tuple, options: dict, errors: Errors | None = None
) -> PointFit:
    """N_opt, D_opt and L_opt through `points`; `options` are resamples, seed and level. Without `errors` those are the points' scatter."""
    if len(points) < 2:
        raise UsageError(
            f"RUNS: {len(points)} usable point(s) for method {method}, expected at least 2. " + "; ".join(warnings)
        )
    resamples, level = options["resamples"], options["level"]
    C, *values = (np.array([getattr(p, name) for p in points]) for name in ("flops", "n_opt", "d_opt", "loss"))
    laws = laws_through(C, *(v[None] for v in values), np.ones((1, len(C))), len(C))
    laws = {name: law[0] for name, law in laws.items()}
    fitted = np.stack([laws[name](C) for name in NAMES])
    off = np.log(np.stack(values) / fitted)
    objective = float((off[0] ** 2).sum())
    fit = PointFit(method, n_runs, tuple(points), laws, objective, level, resamples, warnings=tuple(warnings))
    if len(points) < 3 or not resamples:
        reasons = ("two points: any two lie on a power law, so nothing tests it",) if len(points) < 3 else ()
        return replace(fit, identifiable=not reasons, warnings=reasons + fit.warnings)
    cautions = ()
    if errors is None:
        errors = scatter(np.random.default_rng(options["seed"]), off, resamples)
    else:
        cautions = _scattered(np.log(C), off[0], errors)
    kept = errors.found.sum(1) >= min(3, len(points))
    draws = laws_through(
        C, *(fitted[:, None] * np.exp(-errors.log[:, kept])), errors.found[kept].astype(float), len(points)
    )
    noise = errors.noise_draws[kept] * values[2][-1]
    return drawn(replace(fit, warnings=cautions + fit.warnings), draws, float(errors.noise * values[2][-1]), noise)


def drawn(fit: PointFit, draws: dict, noise: float, noise_draws: np.ndarray) -> PointFit:
    """The fit with its resampled laws and the noise of a run's loss."""
    fit = replace(fit, degenerate=fit.resamples - len(noise_draws))
    if len(noise_draws) < min(20, fit.resamples):
        text = f"no interval: only {len(noise_draws)} of {fit.resamples} resamples keep points enough for the laws"
        return replace(fit, identifiable=False, warnings=(text, *fit.warnings))
    if fit.degenerate > 0.05 * fit.resamples:
        text = f"{fit.degenerate} of {fit.resamples} resamples are degenerate: they keep too few points for the laws"
        fit = replace(fit, warnings=(*fit.warnings, text))
    low, high = np.quantile(draws["N_opt"].exponent, [(1 - fit.level) / 2, (1 + fit.level) / 2])
    reasons = ()
    if low <= 0 or high >= 1:
        reasons = (f"the exponent of N_opt is not identified: its interval {low:.2f} to {high:.2f} leaves (0, 1)",)
    return replace(
        fit,
        draws=draws,
        noise=noise,
        noise_draws=noise_draws,
        identifiable=not reasons,
        warnings=reasons + fit.warnings,
    )


def scatter(rng: np.random.Generator, off: np.ndarray, resamples: int) -> Errors:
    """Errors that are normal, with the covariance of the residuals `off` (3, points) of log N, log D and log L."""
    count = off.shape[1]
    freedom = count - np.array([2, 2, 3 if count >= IRREDUCIBLE_FROM else 2])
    root, size, _ = np.linalg.svd(off, full_matrices=False)
    drawn = np.einsum("ij,j,jrp->irp", root, size, rng.standard_normal((len(size), resamples, count)))
    scale = 1 / np.sqrt(rng.chisquare(np.broadcast_to(freedom, (resamples, 3)).T))
    spread = float(np.sqrt((off[2] ** 2).sum() / freedom[2]))
    noise = spread * np.sqrt(freedom[2]) * scale[2]
    return Errors(drawn * scale[:, :, None], np.ones((resamples, count), bool), spread, noise)


def _scattered(log_c: np.ndarray, off: np.ndarray, errors: Errors) -> tuple:
    """Says where the points' log N, `off` their law, scatter more than simulated points do."""
    drawn = errors.log[0][errors.found.all(1)]
    if len(drawn) < 1 / RARE:
        return ()
    basis, _ = np.linalg.qr(np.stack([np.ones_like(log_c), log_c - log_c.mean()], axis=1))
    drawn = ((drawn - (drawn @ basis) @ basis.T) ** 2).sum(1)
    if np.mean(drawn >= (off**2).sum()) >= RARE or (off**2).sum() < 1e-12:
        return ()
    ratio = np.sqrt((off**2).sum() / drawn.mean())
    return (
        f"the N_opt of the points scatter {ratio:.1f} times more than the noise of the runs allows: no power law, or noise that "
        "a budget's runs share; the intervals hold neither",
    )


def laws_through(C, n, d, loss, weight, count: int) -> dict:
    """The laws through points (resamples, points), C (points,) or alike; those of weight 0 are left out. `count` points decide on
    the form of the loss law."""
    laws = {name: fit_power(C, v, weight) for name, v in (("N_opt", n), ("D_opt", d), ("L_opt_pure", loss))}
    if count >= IRREDUCIBLE_FROM:
        laws["L_opt_irreducible"] = fit_irreducible(C, loss, weight)
    return {**laws, "L_opt": laws.get("L_opt_irreducible", laws["L_opt_pure"])}
