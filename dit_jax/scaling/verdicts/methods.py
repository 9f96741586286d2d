"""Several methods on the same runs: which of them these allow, what each finds, and where they disagree beyond their intervals."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dit_jax.error import UsageError
from dit_jax.scaling.fits import METHODS
from dit_jax.scaling.fits.fit import Fit
from dit_jax.scaling.runs import Run
from dit_jax.scaling.verdicts.beyond import RESAMPLES, examine

LISTED = 4  # parts of a refusal that are said
QUANTITIES = ("a", "N_opt", "irreducible", "L_opt")


@dataclass(frozen=True)
class Methods:
    """Fits by method, why others were refused, and where they disagree at `flops`, in words."""

    fits: dict
    refused: dict
    flops: float
    disagreements: tuple
    refits: dict  # method -> a function that fits other runs in the same way (`again`)

    @property
    def main(self) -> Fit:
        """The fit that a report opens with: the first that the runs identify."""
        return next((fit for fit in self.fits.values() if fit.identified), next(iter(self.fits.values())))


def options_of(args, method: str) -> dict:
    """The options of a method; one that the method asked for does not have is refused."""
    known = set(inspect.signature(METHODS[method]).parameters)
    names = ("window", "residual", "loss", "unbias")
    given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    for name in given:
        if method == args.method and name not in known:
            raise UsageError(f"--{name}: method {method} has no such option")
    return {"seed": args.seed, "resamples": args.resamples} | {k: v for k, v in given.items() if k in known}


def fit_one(runs: Sequence[Run], method: str, flops: float | int = 0.0, **options) -> Fit:
    """The fit of one method, examined for what it says beyond its data, as far as `flops`. `options` are those of its function."""
    return examine(METHODS[method](runs, **options), again(method, **options), flops)


def again(method: str, most: int = RESAMPLES, **options) -> Callable[[Sequence[Run]], Fit]:
    """A function that fits other runs in the same way, with at most `most` resamples; it remembers what it has fitted."""
    options, known = {**options, "resamples": min(options.get("resamples", most), most)}, {}

    def fit(runs: Sequence[Run]) -> Fit:
        key = frozenset(map(id, runs))
        if key not in known:
            known[key] = METHODS[method](runs, **options), runs  # which keeps them, and so their ids, alive
        return known[key][0]

    return fit


def fit_methods(
    runs: Sequence[Run],
    flops: float | int = 0.0,
    names: Sequence[str] = tuple(METHODS),
    options: Callable[[str], dict] = lambda method: {},
) -> Methods:
    """Every method of `names` that these runs allow. `flops` is the farthest compute asked for (0: none), where they are compared;
    `options(method)` are keyword arguments of its fit. Raises UsageError where no method fits."""
    fits, refused = {}, {}
    refits = {method: again(method, **options(method)) for method in names}
    for method in names:
        try:
            fits[method] = examine(METHODS[method](runs, **options(method)), refits[method], flops)
        except UsageError as error:
            parts = str(error).split("; ")
            refused[method] = "; ".join(parts if len(parts) <= LISTED else [*parts[:LISTED], "and so on"])
    if not fits:
        raise UsageError("; ".join(f"{method}: {why}" for method, why in refused.items()))
    at = flops or max(r.flops for r in runs)
    return Methods(fits, refused, at, tuple(_disagreements(fits, at)), refits)


def values(fit: Fit, flops: float | int) -> dict:
    """name -> (value, interval) of what methods have in common: a, b, irreducible, and N_opt and L_opt at `flops`."""
    out = {}
    for name, ours in (("a", "N_opt"), ("b", "D_opt")):
        if ours in fit.laws:
            out[name] = fit.exponent(ours)
    silent = fit.beyond and flops > fit.largest
    for name in ("N_opt", "L_opt"):
        law, drawn = fit.laws.get(name), fit.draws.get(name)
        if law is not None and not (name == "L_opt" and silent):
            out[name] = float(law(flops)), fit.interval(drawn(flops) if drawn else None)
    law, drawn = fit.laws["L_opt"], fit.draws.get("L_opt")
    if law.irreducible or (drawn and np.any(drawn.irreducible)):
        out["irreducible"] = float(law.irreducible), fit.interval(drawn.irreducible if drawn else None)
    return out


def _disagreements(fits: dict, flops: float | int) -> list[str]:
    """Where the intervals of two methods do not overlap; an interval of no width is a method's premise, not its finding."""
    table, found = {method: values(fit, flops) for method, fit in fits.items()}, []
    methods = list(table)
    for name in QUANTITIES:
        for i, one in enumerate(methods):
            for two in methods[i + 1 :]:
                if name not in table[one] or name not in table[two]:
                    continue
                (x, (low, high)), (y, (lower, higher)) = table[one][name], table[two][name]
                if low < high and lower < higher and (high < lower or higher < low):
                    d = ".4g" if name == "N_opt" else ".4f"
                    sides = (
                        f"{m} finds {v:{d}} ({p:{d}} to {q:{d}})"
                        for m, v, p, q in ((one, x, low, high), (two, y, lower, higher))
                    )
                    found.append(f"{name}: {', '.join(sides)}")
    return found
