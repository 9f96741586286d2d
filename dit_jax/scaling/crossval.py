"""Cross-validation: what a method says of runs that it has not seen, for every method that predicts.

What is left out: the **largest** budget, each of the **budgets** in turn, or each of the **models** (all runs of one size N) in turn; for
the envelope, whose runs are training curves, the largest or each of the sizes. Of runs scattered over compute, which form no budgets, the
largest are those above one compute, a FIFTH of all or a little more, for every method. The method is fitted to the rest and predicts

* the optimum, N_opt and L_opt, of a budget left out. It is measured as the method itself would: parabolas for isoflop and, less
  the shift that the surface predicts (`bias`), for the surfaces; the method's own point for akima, power and envelope;
* the loss of each run left out, where the method has one for a run off its optimum: isoflop and the surfaces. Of scattered runs they
  predict these alone: nobody has measured an optimum there.

What is neither fitted nor compared, such as a budget without an optimum, is counted as unscored.

**Intervals** are for what was measured: the resamples of the refit, and the noise of the run or of the vertex on top. Each refit takes
RESAMPLES of them at most, enough for an interval and few enough to refit for each item.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dit_jax.error import UsageError
from dit_jax.scaling import bias
from dit_jax.scaling.fit import METHODS, IsoflopFit, fit_isoflop
from dit_jax.scaling.names import SPLITS
from dit_jax.scaling.optima import PointFit
from dit_jax.scaling.predict import NO_INTERVAL, interval, predict
from dit_jax.scaling.runs import Run, budgets, scattered
from dit_jax.scaling.study import SurfaceFit
from dit_jax.scaling.table import DASH, span

RESAMPLES = 200
FIFTH = 0.2  # of scattered runs, the share with the largest compute that is left out
HOLDOUT_HEAD = ("left out", "beyond the rest", "of", "predicted", "interval", "measured", "error", "inside")


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
class CrossValidation:
    """All items of one method, and (label, why) of what could not be left out."""

    method: str
    split: str
    items: tuple
    refused: tuple
    resamples: int
    unscored: int = 0  # runs that were in no refit and are in no item either, over all parts

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


def cross_validate(runs: Sequence[Run], method: str, split: str, **options) -> CrossValidation:
    """Leaves out, refits `METHODS[method]` with `options` (those of its fit) and predicts, for each part of `split`."""
    if split not in SPLITS:
        raise UsageError(f"--holdout: found {split!r}, expected one of {', '.join(SPLITS)}")
    options = {"resamples": 1000, **options}
    if split != "largest":
        options["resamples"] = min(options["resamples"], RESAMPLES)
    measured = _measure(runs, method, options)
    items, refused, unscored = [], [], 0
    for label, left, rest in _folds(runs, method, split, measured):
        try:
            fit = METHODS[method](rest, **options)
            optima = _has_optima(runs, fit, split)
            found = _optima(label, left, fit, measured) if optima else []
            found += [_run_loss(label, r, fit) for r in left] if not isinstance(fit, PointFit) else []
        except UsageError as error:
            refused.append((label, str(error).removeprefix("RUNS: ")))
            continue
        items += found
        unscored += len(runs) - len(rest) - _scored(left, found, fit)
    if not items:
        why = "; ".join(f"{label}: {text}" for label, text in refused) or "nothing is left out"
        raise UsageError(f"--holdout: method {method} predicts nothing that {split} leaves out ({why})")
    return CrossValidation(method, split, tuple(items), tuple(refused), options["resamples"], unscored)


def _has_optima(runs, fit, split: str) -> bool:
    """Whether optima are compared: those of budgets, and the own points of a method that has no more."""
    if isinstance(fit, PointFit):
        return split != "models" or fit.method == "envelope"
    return split == "budgets" or (split == "largest" and not scattered(budgets(runs)))


def _scored(left, items: Sequence[Item], fit) -> int:
    """How many of the runs left out these items are of; all runs of a budget are, if its point is."""
    if not isinstance(fit, PointFit):
        return len(left)
    if fit.method == "envelope":
        return len(left) if items else 0
    ends = [[f(r.flops for r in members) for f in (min, max)] for _, members in budgets(left)]
    told = [any(low * 0.999 <= i.flops <= high * 1.001 for i in items) for low, high in ends]
    return sum(len(members) for (_, members), said in zip(budgets(left), told, strict=True) if said)


@dataclass(frozen=True)
class _Measured:
    """The optima of all budgets, from all runs: a method's own points, or the parabolas of `whole` (None = the runs have none)."""

    points: tuple
    whole: IsoflopFit | None

    def budget(self, left: Sequence[Run]):
        """The used budget of parabolas that these runs are, or None."""
        ids = {id(r) for r in left}
        used = self.whole.used if self.whole else ()
        return next((b for b in used if id(b.runs[0]) in ids), None)

    def largest(self) -> float:
        """FLOPs of the largest budget that has an optimum."""
        return max((b.flops for b in (self.whole.used if self.whole else self.points)), default=math.inf)


def _measure(runs, method: str, options: dict) -> _Measured:
    """What to compare with; refuses what the method itself refuses."""
    without = {**options, "resamples": 0}
    if method in ("akima", "power", "envelope"):
        return _Measured(METHODS[method](runs, **without).points, None)
    if method == "isoflop":
        return _Measured((), fit_isoflop(runs, **without))
    try:
        return _Measured((), fit_isoflop(runs, resamples=0))
    except UsageError:
        return _Measured((), None)


def _folds(runs, method: str, split: str, measured: _Measured) -> list[tuple]:
    """(label, runs left out, the rest) of each part."""
    if split == "models" or method == "envelope":
        if split == "budgets":
            raise UsageError("--holdout: training curves have no budgets; use models or largest")
        if method in ("akima", "power"):
            raise UsageError(
                f"--holdout: method {method} says nothing of a run off its optimum; use budgets or largest"
            )
        sizes = sorted({r.params for r in runs})
        names = {r.params: r.name for r in runs} if method == "envelope" else {}
        parts = [(names.get(n) or f"{n:.4g} params", [r for r in runs if r.params == n]) for n in sizes]
        parts = parts[-1:] if split == "largest" else parts
    else:
        parts = sorted(budgets(runs), key=lambda part: part[1][0].flops)
        if split == "largest" and scattered(parts):
            parts = [_top(runs, parts)]
        elif split == "largest":
            parts = [p for p in parts if p[1][0].flops <= measured.largest() * 1.05][-1:]
        elif sum(len({r.params for r in p[1]}) >= 3 for p in parts) < 2:
            raise UsageError(
                "--holdout: the runs are scattered over compute and form no budgets; use models or largest"
            )
    folds = []
    for label, left in parts:
        ids, most = {id(r) for r in left}, max(r.flops for r in left)
        rest = [r for r in runs if id(r) not in ids]
        if split == "largest" and method != "envelope":  # nor what is larger still, but without an optimum
            rest = [r for r in rest if r.flops < most]
        folds.append((label, list(left), rest))
    return folds


def _top(runs, parts) -> tuple:
    """(label, all runs from one compute on, a FIFTH or a little more). It parts no two of a chance group, so that groups stay the same."""
    cut, count = math.inf, 0
    for _, members in reversed(parts[1:]):
        cut, count = min(cut, *(r.flops for r in members)), count + len(members)
        if count >= FIFTH * len(runs):
            break
    return f"from {cut:.3g}", [r for r in runs if r.flops >= cut]


def _optima(label: str, left, fit, measured: _Measured) -> list[Item]:
    """Predicted and measured optima of what was left out."""
    if isinstance(fit, PointFit):
        kept = {p.flops for p in fit.points}
        low, high = (f(r.flops for r in left) for f in (min, max))
        gone = [p for p in measured.points if p.flops not in kept]
        gone = gone if fit.method == "envelope" else [p for p in gone if low * 0.999 <= p.flops <= high * 1.001]
        return [item for p in gone for item in _of_point(label, p, fit)]
    budget = measured.budget(left)
    if budget is None:
        return []
    n, loss = budget.n_opt, budget.loss
    if isinstance(fit, SurfaceFit):
        off = bias.shift(fit.surface, budget.curve, np.array([r.tokens for r in budget.runs]))
        n, loss = (n * math.exp(-off.log_n), loss - off.loss) if math.isfinite(off.log_n) else (n, loss)
    noise = fit.noise_draws if fit.method == "isoflop" else np.full(len(fit.noise_draws), measured.whole.noise)
    said, wide = predict(fit, budget.flops), {"N_opt": NO_INTERVAL, "L_opt": NO_INTERVAL}
    if fit.draws and np.isfinite(noise).all():
        own = noise * np.random.default_rng(1).standard_normal((2, len(noise)))
        drawn = {name: fit.draws[name](budget.flops) for name in wide}
        wide["N_opt"] = interval(drawn["N_opt"] * np.exp(own[0] * math.sqrt(budget.var_n)), fit.level)
        wide["L_opt"] = interval(drawn["L_opt"] + own[1] * math.sqrt(budget.var_loss), fit.level)
    return [
        Item(label, name, "", budget.flops, n if name == "N_opt" else math.nan, said["beyond"], said[name], wide[name], value)
        for name, value in (("N_opt", n), ("L_opt", loss))
    ]  # fmt: skip


def _of_point(label: str, point, fit: PointFit) -> list[Item]:
    """The items of a method's own point; its interval holds the scatter of such points about their law."""
    found = []
    for name, value in (("N_opt", point.n_opt), ("L_opt", point.loss)):
        if name not in fit.laws:
            continue
        law, between = fit.laws[name], NO_INTERVAL
        if name in fit.draws:
            off = [math.log((p.n_opt if name == "N_opt" else p.loss) / law(p.flops)) for p in fit.points]
            scatter = math.sqrt(np.sum(np.square(off)) / max(len(off) - 2, 1))
            drawn = fit.draws[name](point.flops)
            between = interval(
                drawn * np.exp(scatter * np.random.default_rng(1).standard_normal(len(drawn))), fit.level
            )
        params = point.n_opt if name == "N_opt" else math.nan
        beyond = point.flops / fit.largest
        found.append(Item(label, name, "", point.flops, params, beyond, float(law(point.flops)), between, value))
    return found


def _run_loss(label: str, run: Run, fit) -> Item:
    """The loss of one run, at its own params and tokens."""
    if isinstance(fit, SurfaceFit):
        predicted, between = float(fit.surface(run.params, run.tokens)), NO_INTERVAL
        if fit.draws:
            noise = fit.noise_draws * np.random.default_rng(0).standard_normal(len(fit.noise_draws))
            between = interval(fit.surfaces(run.params, run.tokens) + noise, fit.level)
    else:
        said = predict(fit, run.flops, run.params)
        predicted, between = said["L_run"], said["L_run_interval"]
    return Item(label, "loss", run.name, run.flops, run.params, run.flops / fit.largest, predicted, between, run.loss)


def rows(found: CrossValidation) -> list[tuple]:
    """HOLDOUT_HEAD's cells: a row for each optimum, and one for the losses of each part left out."""
    out = []
    for label in dict.fromkeys(i.left for i in found.items):
        some = [i for i in found.items if i.left == label]
        for i in some:
            if i.quantity != "loss" or sum(j.quantity == "loss" for j in some) == 1:
                digits = ".4g" if i.quantity == "N_opt" else ".4f"
                cells = (
                    f"{i.predicted:{digits}}",
                    span(i.interval, digits),
                    f"{i.measured:{digits}}",
                    f"{i.error:+.2%}",
                )
                what = i.quantity if i.quantity != "loss" else f"loss of {i.run or 'a run'}"
                out.append((label, f"{i.beyond:.2g}x", what, *cells, _inside([i])))
        losses = [i for i in some if i.quantity == "loss"]
        if len(losses) > 1:
            worst = max((i.error for i in losses), key=abs)
            rms = math.sqrt(np.mean([i.error**2 for i in losses]))
            what, error = f"loss of {len(losses)} runs", f"RMS {rms:.2%}, worst {worst:+.2%}"
            low, high = (f"{f(i.beyond for i in losses):.2g}x" for f in (min, max))
            out.append(
                (label, low if low == high else f"{low} to {high}", what, DASH, DASH, DASH, error, _inside(losses))
            )
    return out


def _inside(items: Sequence[Item]) -> str:
    judged = [i.inside for i in items if i.inside is not None]
    if len(items) == 1:
        return {True: "yes", False: "no"}[judged[0]] if judged else DASH
    return f"{sum(judged)} of {len(judged)}" if judged else DASH


def to_json(found: CrossValidation) -> dict:
    """The public JSON of a cross-validation."""
    items = [{**vars(i), "error": i.error, "inside": i.inside} for i in found.items]
    refused = [{"left": label, "why": why} for label, why in found.refused]
    return {
        "method": found.method,
        "split": found.split,
        "resamples": found.resamples,
        "items": items,
        "summary": found.summary(),
        "refused": refused,
        "unscored": found.unscored,
    }
