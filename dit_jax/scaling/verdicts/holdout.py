"""What a fit says of runs that it has not seen.

Left out are the **largest** budget, each of the **budgets** in turn, or each of the **models** (all runs of one size N) in turn. Of runs
scattered over compute, which form no budgets, the largest are those above one compute, a fifth of all or a little more. The fit is made
again of the rest, in the same way, and predicts

* N_opt and L_opt of a budget left out, as the whole fit measures them, or where that has no optimum of single budgets, parabolas do;
* the loss of each run left out.

Intervals are for what was measured: the resamples of the refit, with the noise of the run or of the optimum on top.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dit_jax.error import UsageError
from dit_jax.scaling.fits import fit_isoflop
from dit_jax.scaling.fits.fit import NO_INTERVAL, Fit, predict
from dit_jax.scaling.names import SPLITS
from dit_jax.scaling.runs import Run, budgets, scattered

FIFTH = 0.2  # of scattered runs, the share with the largest compute that is left out
HEAD = ("left out", "beyond the rest", "of", "predicted", "interval", "measured", "error", "inside")
SUMMARY_HEAD = ("method", "of", "left out", "RMS error", "worst", "worst at", "inside")
DASH = "\N{EN DASH}"


@dataclass(frozen=True)
class Item:
    """One quantity of what was left out. `interval` is (nan, nan) where the refit has no resamples."""

    left: str
    quantity: str  # N_opt, L_opt, or loss: of one run
    run: str
    flops: float
    params: float  # active per token; nan for L_opt
    beyond: float  # multiple of the largest compute of the refit
    predicted: float
    interval: tuple
    measured: float

    @property
    def error(self) -> float:
        """Relative."""
        return self.predicted / self.measured - 1

    @property
    def inside(self) -> bool | None:
        """Whether the interval holds what was measured; None without an interval."""
        return None if math.isnan(self.interval[0]) else self.interval[0] <= self.measured <= self.interval[1]


@dataclass(frozen=True)
class Holdout:
    """All items of one method, and (label, why) of what could not be left out."""

    method: str
    split: str
    items: tuple
    refused: tuple

    def summary(self) -> dict:
        """quantity -> {count, rms, worst, worst_left, inside, judged}; errors are relative, `judged` counts items with an interval."""
        out = {}
        for name in ("N_opt", "L_opt", "loss"):
            some = [i for i in self.items if i.quantity == name]
            if some:
                worst = max(some, key=lambda i: abs(i.error))
                judged = [i.inside for i in some if i.inside is not None]
                out[name] = {
                    "count": len(some),
                    "rms": math.sqrt(np.mean([i.error**2 for i in some])),
                    "worst": worst.error,
                    "worst_left": worst.left,
                    "inside": sum(judged),
                    "judged": len(judged),
                }
        return out

    def to_json(self) -> dict:
        items = [{**vars(i), "error": i.error, "inside": i.inside} for i in self.items]
        refused = [{"left": label, "why": why} for label, why in self.refused]
        return {
            "method": self.method,
            "split": self.split,
            "items": items,
            "summary": self.summary(),
            "refused": refused,
        }


def hold_out(fit: Fit, refit: Callable[[Sequence[Run]], Fit], split: str, runs: Sequence[Run]) -> Holdout:
    """Leaves out each part of `split` of the `runs` that `fit` was made of, refits and predicts. Raises UsageError where nothing can be."""
    if split not in SPLITS:
        raise UsageError(f"--holdout: found {split!r}, expected one of {', '.join(SPLITS)}")
    items, refused = [], []
    measured = measured_optima(runs, fit)
    for label, left, rest in folds(runs, split, measured):
        try:
            again = refit(rest)
        except UsageError as error:
            refused.append((label, str(error).removeprefix("RUNS: ")))
            continue
        items += _optima(label, left, again, measured) if split != "models" else []
        items += [i for i in (_of_run(label, r, again) for r in left) if math.isfinite(i.predicted)]
    if not items:
        why = "; ".join(f"{label}: {text}" for label, text in refused) or "nothing is left out"
        raise UsageError(f"--holdout: method {fit.method} predicts nothing that {split} leaves out ({why})")
    return Holdout(fit.method, split, tuple(items), tuple(refused))


def measured_optima(runs: Sequence[Run], fit: Fit | None = None) -> tuple:
    """The optima of single budgets: the fit's own, else those of parabolas; () of scattered runs."""
    if scattered(budgets(runs)):
        return ()
    try:
        return fit.used if fit and fit.used else fit_isoflop(runs, resamples=20).used
    except UsageError:
        return ()


def folds(runs: Sequence[Run], split: str, measured: tuple = ()) -> list[tuple]:
    """(label, runs left out, the rest) of each part."""
    groups = sorted(budgets(runs), key=lambda g: g[1][0].flops)
    if split == "models":
        sizes = sorted({r.params for r in runs})
        parts = [(f"{n:.4g} params", [r for r in runs if r.params == n]) for n in sizes]
    elif scattered(groups):
        if split == "budgets":
            raise UsageError(
                "--holdout: the runs are scattered over compute and form no budgets; use models or largest"
            )
        cut = sorted(r.flops for r in runs)[-max(1, math.ceil(FIFTH * len(runs)))]
        parts = [(f"from {cut:.3g}", [r for r in runs if r.flops >= cut])]
    else:
        top = max((p.flops for p in measured), default=math.inf) * 1.05
        parts = groups if split == "budgets" else [g for g in groups if g[1][0].flops <= top][-1:]
    folds = []
    for label, left in parts:
        gone, most = {id(r) for r in left}, max(r.flops for r in left)
        # beside the largest budget nothing is left that is larger still, but has no optimum
        rest = [r for r in runs if id(r) not in gone and (split != "largest" or r.flops < most)]
        folds.append((label, list(left), rest))
    return folds


def _optima(label: str, left: Sequence[Run], fit: Fit, measured: tuple) -> list[Item]:
    """The optimum of a budget that was left out."""
    gone = {id(r) for r in left}
    point = next((p for p in measured if id(p.runs[0]) in gone), None)
    if point is None:
        return []
    said, found = predict(fit, point.flops), []
    for name, value, error in (("N_opt", point.n_opt, point.n_se), ("L_opt", point.loss, point.loss_se)):
        if name not in fit.laws or not math.isfinite(said[name]):
            continue
        between, draws = NO_INTERVAL, fit.draws.get(name)
        if draws:
            own = np.random.default_rng(1).standard_normal(len(draws.exponent)) * (
                error if math.isfinite(error) else 0.0
            )
            drawn = draws(point.flops)
            between = fit.interval(drawn * np.exp(own) if name == "N_opt" else drawn + own)
        params = value if name == "N_opt" else math.nan
        found.append(Item(label, name, "", point.flops, params, said["beyond"], said[name], between, value))
    return found


def _of_run(label: str, run: Run, fit: Fit) -> Item:
    """The loss of one run, at its own params and tokens."""
    predicted, between = float(fit.loss(run.params, run.tokens)), NO_INTERVAL
    if fit.beyond and run.flops > fit.largest:
        predicted = math.nan
    elif fit.loss_draws is not None and len(fit.noise_draws):
        noise = fit.noise_draws * np.random.default_rng(0).standard_normal(len(fit.noise_draws))
        between = fit.interval(fit.loss_draws(run.params, run.tokens) + noise)
    return Item(label, "loss", run.name, run.flops, run.params, run.flops / fit.largest, predicted, between, run.loss)


def rows(found: Holdout) -> list[tuple]:
    """HEAD's cells: a row for each optimum, and one for the losses of each part left out."""
    out = []
    for label in dict.fromkeys(i.left for i in found.items):
        some = [i for i in found.items if i.left == label]
        losses = [i for i in some if i.quantity == "loss"]
        for i in some:
            if i.quantity != "loss" or len(losses) == 1:
                digits = ".4g" if i.quantity == "N_opt" else ".4f"
                what = i.quantity if i.quantity != "loss" else f"loss of {i.run or 'a run'}"
                span = DASH if math.isnan(i.interval[0]) else f"{i.interval[0]:{digits}} to {i.interval[1]:{digits}}"
                cells = (f"{i.predicted:{digits}}", span, f"{i.measured:{digits}}", f"{i.error:+.2%}", _inside([i]))
                out.append((label, f"{i.beyond:.2g}x", what, *cells))
        if len(losses) > 1:
            worst, rms = max((i.error for i in losses), key=abs), math.sqrt(np.mean([i.error**2 for i in losses]))
            low, high = (f"{f(i.beyond for i in losses):.2g}x" for f in (min, max))
            far, error = low if low == high else f"{low} to {high}", f"RMS {rms:.2%}, worst {worst:+.2%}"
            out.append((label, far, f"loss of {len(losses)} runs", DASH, DASH, DASH, error, _inside(losses)))
    return out


def summary_rows(found: Sequence[Holdout]) -> list[tuple]:
    """SUMMARY_HEAD's cells."""
    out = []
    for one in found:
        for name, s in one.summary().items():
            inside = f"{s['inside']} of {s['judged']}" if s["judged"] else DASH
            cells = (name, str(s["count"]), f"{s['rms']:.2%}", f"{s['worst']:+.2%}", s["worst_left"], inside)
            out.append((one.method, *cells))
    return out


def _inside(items: Sequence[Item]) -> str:
    judged = [i.inside for i in items if i.inside is not None]
    if not judged:
        return DASH
    return f"{sum(judged)} of {len(judged)}" if len(items) > 1 else ("yes" if judged[0] else "no")
