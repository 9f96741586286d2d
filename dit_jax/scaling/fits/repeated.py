"""`varpro`: the surface by variable projection, and the law of repeated data where runs saw theirs more than once.

Muennighoff et al. 2023 (arXiv 2305.16264): tokens that are repeated are worth less than new ones, so a surface in D as counted bends. Where
the column of unique data says that runs repeat, and the law describes them better (F test), the surface is fitted in the tokens that the
data are worth, with R*, the repetitions over which they lose it, as a sixth parameter. The excess of parameters over unique data, the other
half of that paper's law, is not modelled.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy import special

from dit_jax.scaling.fits import bootstrap, newton
from dit_jax.scaling.fits.fit import Fit, per_parameter_and_token, plain
from dit_jax.scaling.fits.surface import (
    CHANCE,
    HEAD,
    Design,
    Surface,
    fit_new,
    form,
    grid_starts,
    make_design,
    notes_of,
    reasons_of,
    search,
    span_of,
)
from dit_jax.scaling.runs import Run

AGAIN = np.geomspace(0.5, 500.0, 40)  # searched for R*
NEAR = 8.0  # times the best of these, as far as resamples look
NAMES = ("E", "A", "B", "alpha", "beta", "a", "b")


def fit_varpro(runs: Sequence[Run], *, residual: str = "log", loss: str = "mse", **options) -> Fit:
    """The five-parameter surface of least squares; in tokens that count less when they are repeated, where the runs show that they do.

    `residual` is log law - log loss ("log") or law - loss ("linear"), `loss` squares ("mse") or a Huber loss of delta 1e-3 ("huber", all
    data as new). `options`: `resamples`, `seed` and `level` of the intervals. Raises UsageError on runs that no search can mend.
    """
    new = fit_new(runs, residual=residual, loss=loss, **options)
    return (_repeated(new, runs, residual, **options) if loss == "mse" else None) or new


def effective(tokens, unique, again: float):
    """Tokens that repeated data are worth: those beyond `unique` count less and less, by half of what is left after about 0.7 `again`
    repetitions (Muennighoff et al. 2023, arXiv 2305.16264, eq. 5; their `again`, R*_D, is 15.4). `unique` nan: all are new."""
    most = np.where(np.isnan(unique), tokens, np.minimum(tokens, unique))
    more = np.maximum(tokens / most - 1, 0.0)
    return most + most * again * -np.expm1(-more / again)


def _repeated(
    fit: Fit, runs: Sequence[Run], residual: str, *, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> Fit | None:
    """The surface in tokens that count less when they are repeated, where that describes the runs better than `fit` does (F test
    at 1 %); None where it does not, or where no run repeats data. It has R_star too, and its laws are those of data that are always new."""
    tokens, unique = (np.array([getattr(r, k) for r in runs]) for k in ("tokens", "unique"))
    freedom = int(bootstrap.clusters(runs).max()) + 1 - 6
    if not (unique < 0.99 * tokens).any() or freedom < 1:
        return None
    tried = {}
    for again in AGAIN:
        design = make_design(_worth(runs, tokens, unique, again), residual, "mse")
        tried[again] = (design, *search(design, grid_starts(design)))
    best = min(tried, key=lambda again: tried[again][2])
    gain = (fit.objective / 2 - tried[best][2]) / max(tried[best][2] / freedom, 1e-300)
    if special.fdtrc(1, freedom, max(gain, 0.0)) > CHANCE:
        return None
    design, theta, objective = tried[best]
    near = [(*tried[again][:2], again) for again in AGAIN if best / NEAR <= again <= best * NEAR]
    fitted, noise = design.fitted(theta), design.noise(theta, runs)
    added = noise.draw(np.random.default_rng(seed), resamples) if resamples and noise else np.zeros((0, len(runs)))
    drawn, stars = _redrawn(near, fitted + added) if len(added) else (None, None)
    k, surface = per_parameter_and_token(runs), plain(design.law(theta[None]))
    parameters = {name: float(getattr(surface, name)) for name in NAMES} | {"R_star": float(best)}
    draws = {name: getattr(drawn, name) for name in NAMES} | {"R_star": stars} if drawn else {}
    made = replace(
        fit,
        laws={name: plain(law) for name, law in surface.optimum(k).items()},
        draws=drawn.optimum(k) if drawn else {},
        loss=surface,
        loss_draws=drawn,
        noise=noise.scale if noise else math.nan,
        noise_draws=np.sqrt(np.mean(added**2, axis=1)),
        objective=2 * objective,
        parameters=parameters,
        parameter_draws=draws,
        reasons=reasons_of(design, theta, _worth(runs, tokens, unique, best)),
        form=form(design, theta, _worth(runs, tokens, unique, best)),
    )
    rows = tuple((n, f"{v:.6g}", span_of(made, n)) for n, v in parameters.items())
    title = f"L = E + A / N^alpha + B / D'^beta, D' of repeated data, C = {k:.4g} N D for new data"
    text = f"data are repeated up to {np.nanmax(tokens / unique):.3g} times; the laws are those of data that are always new"
    return replace(made, tables=((title, HEAD, rows),), notes=(*notes_of(made), text))


def _redrawn(near: Sequence[tuple], losses: np.ndarray) -> tuple:
    """(surfaces of arrays (m,), R* (m,)) fitted to losses (m, n): of the R* near the best, the one of least squares for each."""
    found = [design.refit(theta, losses) for design, theta, _ in near]
    sums = np.stack([_squares(design, t, losses) for (design, _, _), t in zip(near, found, strict=True)])
    pick, rows = sums.argmin(0), np.arange(len(losses))
    laws = [design.law(t) for (design, _, _), t in zip(near, found, strict=True)]
    parts = {name: np.stack([getattr(law, name) for law in laws])[pick, rows] for name in NAMES[:5]}
    return Surface(**parts), np.array([again for _, _, again in near])[pick]


def _worth(runs: Sequence[Run], tokens, unique, again: float) -> list[Run]:
    """The runs with the tokens that their data are worth."""
    return [replace(r, tokens=float(d)) for r, d in zip(runs, effective(tokens, unique, again), strict=True)]


def _squares(design: Design, thetas: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """The sum of squares (m,) of laws (m, p) about losses (m, n), in the residuals of the design."""
    law = newton.residuals(replace(design.problem, linear=False), thetas) + design.problem.log_loss
    seen = np.log(np.maximum(losses, 1e-300)) - design.centre[2]
    off = np.exp(law) - np.exp(seen) if design.problem.linear else law - seen
    return (off**2).sum(1)
