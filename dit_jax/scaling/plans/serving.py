"""The model that is best once images have been drawn from it: training and sampling under one total.

Sardana et al. 2024 (arXiv 2401.00448), section 2: of all (N, D) with L(N, D) = l, the one that makes 6 N D + 2 N D_served least; or, for a
total, the one of least loss. Here training costs k N D, a forward pass a third of that, and an image is steps x passes forward passes of
its tokens: served images count as V = images x steps x passes x tokens / 3 more data, at the same k N each. So the total is k N (D + V),
and in log N the loss at a total, E + A / N^alpha + B / (total / (k N) - V)^beta, is convex: one minimum, searched by zooming.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dit_jax.error import UsageError
from dit_jax.scaling.fits.fit import INSIDE, Fit
from dit_jax.scaling.plans.overhead import one_size
from dit_jax.scaling.runs.conventions import TRAIN_OVER_FORWARD

POINTS, ZOOMS, HALVINGS = 33, 9, 60  # of the searches of log N and of log total
LEAST = 500  # parameters of a model
WIDE = 1e6  # times N_opt at the total, as far as sizes are looked at


@dataclass(frozen=True)
class Served:
    """A model, its training and all images drawn from it. FLOPs as the fit counts them; intervals are (nan, nan) without resamples.

    `plain_*`: the model that is best to train, N_opt of its own training compute, which has the same total, or the same loss if that was
    the target.
    """

    served: float  # V, in the unit of D
    total: float
    total_interval: tuple
    n: float
    n_interval: tuple
    d: float
    train: float  # FLOPs
    loss: float
    loss_interval: tuple
    plain_n: float
    plain_train: float
    plain_total: float
    plain_loss: float
    reach: float  # |log(n / N_opt)| over how far the runs reach: above 1 the fit has seen no such sizes


def data_of(images: float | int, steps: int, guidance: float | int, tokens: int) -> float:
    """V: the data whose training costs as much as drawing `images`, two passes a step with a guidance other than 1."""
    return images * steps * (1 if guidance == 1 else 2) * tokens / TRAIN_OVER_FORWARD


def serve(fit: Fit, served: float, total: float | int = math.nan, loss: float | int = math.nan) -> Served:
    """The best model for a `total` of FLOPs, or the cheapest in total that reaches a `loss`.

    Raises UsageError for a fit that tells no loss of other sizes or none beyond its data, and for a loss or a total out of reach.
    """
    unknown = one_size(fit) or (fit.beyond if not total <= INSIDE * fit.largest else "")
    if unknown:
        raise UsageError(f"--images_served: {unknown}; use another method, such as varpro")
    if not math.isnan(loss) and loss <= fit.laws["L_opt"].irreducible:
        raise UsageError(
            f"--target_loss: found {loss:g}, expected more than {fit.laws['L_opt'].irreducible:.4g}, where the law ends"
        )
    n, d, found, spent = _best(fit.loss, fit.laws["N_opt"], fit.k, served, total, loss)
    spans = (fit.interval(None),) * 3
    if fit.draws and fit.loss_draws is not None:
        drawn = _best(fit.loss_draws, fit.draws["N_opt"], fit.k, served, total, loss)
        known = [v[np.isfinite(v)] for v in drawn]
        spans = tuple(fit.interval(v if len(v) > len(drawn[0]) / 2 else None) for v in (known[0], known[2], known[3]))
    train, plain = float(fit.k * n * d), _plain(fit, served, float(spent), loss)
    if not (math.isfinite(train) and train > 0 and n >= LEAST):
        raise UsageError(
            "--images_served: no size and data reach the target; expected fewer images, or a higher total or loss"
        )
    n_opt, size = float(fit.laws["N_opt"](train)), fit.laws["N_opt"]
    half = max(abs(math.log(r.params / float(size(r.flops)))) for r in fit.runs)
    return Served(served, float(spent), spans[2], float(n), spans[0], float(d), train, float(found), spans[1], *plain,
                  abs(math.log(float(n) / n_opt)) / half)  # fmt: skip


def _best(loss: Callable, size: Callable, k: float, served: float, total: float, target: float) -> tuple:
    """(N, D, loss, total) (...,) of least loss at a total, or of the least total at which that is the target."""
    if math.isnan(target):
        return *_at(loss, size, k, served, total), np.broadcast_to(total, np.shape(size(1.0)))
    low, high = (np.full(np.shape(size(1.0)), v) for v in (math.log(k * served + k), 200.0))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        above = ~(_at(loss, size, k, served, np.exp(middle))[2] <= target)
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    spent = np.where(high > 199, math.nan, np.exp(high))
    return *_at(loss, size, k, served, spent), spent


def _at(loss: Callable, size: Callable, k: float, served: float, total) -> tuple:
    """(N, D, loss) of least loss at totals (...,)."""
    with np.errstate(all="ignore"):  # of resamples that determine no law
        middle, top = np.log(size(total)), np.log(total / k / max(served, 1e-300))
        low, high = middle - math.log(WIDE), np.minimum(middle + math.log(WIDE), top)
        part = np.linspace(0, 1, POINTS).reshape(-1, *[1] * np.ndim(low))
        for _ in range(ZOOMS):
            x = low + (high - low) * part
            data = total / (k * np.exp(x)) - served
            value = loss(np.exp(x), np.where(data > 0, data, math.nan))
            value = np.where(np.isfinite(value), value, math.inf)
            i = value.argmin(0)[None]
            low, high = (np.take_along_axis(x, np.clip(i + s, 0, POINTS - 1), 0)[0] for s in (-1, 1))
        n = np.exp(np.take_along_axis(x, i, 0)[0])
        found = np.take_along_axis(value, i, 0)[0]
        return n, total / (k * n) - served, np.where(np.isfinite(found), found, math.nan)


def _plain(fit: Fit, served: float, total: float, target: float) -> tuple:
    """(N, training FLOPs, total, loss) of the model that is best to train."""
    size, law, low, high = fit.laws["N_opt"], fit.laws["L_opt"], 0.0, 200.0
    for _ in range(HALVINGS):
        c = math.exp((low + high) / 2)
        less = law(c) > target if not math.isnan(target) else c + fit.k * size(c) * served < total
        low, high = ((low + high) / 2, high) if less else (low, (low + high) / 2)
    c = math.exp(high)
    return float(size(c)), c, float(c + fit.k * size(c) * served), float(law(c))
