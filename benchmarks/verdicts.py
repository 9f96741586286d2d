"""How the verdict does on real tables: the largest budget is left out, the verdict is made of the rest, and both are compared.

`python benchmarks/verdicts.py` prints a row for each table of tests/data: the error of L_opt (of runs scattered over compute: the RMS error
of their losses) that each method has at what was left out, whether its interval holds what was measured, and what the verdict chose.
"""

import csv
import math
import os

import numpy as np

from dit_jax.error import UsageError
from dit_jax.log import table
from dit_jax.scaling.fits.fit import predict
from dit_jax.scaling.runs import Run, load_runs
from dit_jax.scaling.verdicts import verdict
from dit_jax.scaling.verdicts.holdout import folds, measured_optima
from dit_jax.scaling.verdicts.methods import fit_methods

DATA = os.path.join(os.path.dirname(__file__), "..", "tests", "data")
CONFIGURATION = ("file", "dataset", "hparams", "warmup", "decay", "param_count", "val")


def rows(name: str) -> list[dict]:
    with open(os.path.join(DATA, name), newline="") as file:
        return list(csv.DictReader(file))


def tables():
    """(name, runs) of each real table."""
    points = rows("porian_isoflop_points.csv")
    for key in dict.fromkeys(tuple(p[k] for k in CONFIGURATION) for p in points):
        some = [p for p in points if tuple(p[k] for k in CONFIGURATION) == key]
        runs = [Run("", *(float(p[k]) for k in ("n", "t", "flops", "loss"))) for p in some]
        yield "Porian " + " ".join(part.removeprefix("summary_df") or "df" for part in key), runs
    points = rows("gadre_models_104.csv")
    for data in dict.fromkeys(p["dataset"] for p in points):
        some = [[float(p[k]) for k in ("params", "tokens", "loss_c4_val")] for p in points if p["dataset"] == data]
        yield f"Gadre {data}", [Run("", n, d, 6 * n * d, loss) for n, d, loss in some]
    yield "digits", load_runs([os.path.join(DATA, "digits_isoflop.csv")])


def tried(runs) -> dict:
    """What each method and the verdict say of the largest budget, made of the rest; {} where nothing can be left out."""
    options = {"resamples": 300, "seed": 0}
    points = measured_optima(runs)
    ((_, left, rest),) = folds(runs, "largest", points)
    gone = {id(r) for r in left}
    point = next((p for p in points if id(p.runs[0]) in gone), None)
    at = point.flops if point else max(r.flops for r in left)
    found = fit_methods(rest, at, verdict.ANSWER, lambda m: options)
    fits, made = found.fits, verdict.judge(rest, found.fits, found.refits.__getitem__, at)
    out = {
        "at": at,
        "beyond": at / max(r.flops for r in rest),
        "verdict": made.method if made.passes else "none",
        "best": "",
    }
    errors = {}
    for method, fit in fits.items():
        said = predict(fit, at)
        if point:
            error = said["L_opt"] / point.loss - 1
            inside = _holds(said["L_opt_interval"], point)
        else:
            errors_ = [float(fit.loss(r.params, r.tokens)) / r.loss - 1 for r in left]
            error, inside = math.sqrt(np.mean(np.square(errors_))), None
        errors[method] = abs(error)
        out[method] = (error, inside, fit.identified)
    order = sorted(errors, key=errors.get)
    out |= {"rank": order.index(made.method) + 1, "of": len(order), "chosen": made.method}
    if point:
        out["inside"] = _holds(made.intervals["L_opt"], point) if made.passes else None
    return out


def _holds(between: tuple, point) -> bool:
    error = 1.96 * point.loss_se if math.isfinite(point.loss_se) else 0.0
    return between[0] - error <= point.loss <= between[1] + error


def main() -> None:
    head, lines, ranks, inside, declined = (
        ("table", "left out", *verdict.ANSWER, "verdict", "its rank", "inside"),
        [],
        [],
        [],
        0,
    )
    for name, runs in tables():
        try:
            found = tried(runs)
        except (UsageError, ValueError) as error:
            lines.append((name, str(error)[:60], *[""] * (len(head) - 2)))
            continue
        cells = []
        for method in verdict.ANSWER:
            error, held, speaks = found.get(method, (math.nan, None, False))
            mark = {True: " in", False: " out", None: ""}[held] + ("" if speaks else ", fails its tests")
            cells.append("" if math.isnan(error) else f"{error:+.2%}{mark}")
        declined += found["verdict"] == "none"
        ranks.append(found["rank"])
        if found.get("inside") is not None:
            inside.append(found["inside"])
        said = {True: "yes", False: "no", None: ""}[found.get("inside")]
        chosen = found["chosen"] + ("" if found["verdict"] != "none" else " (none passes)")
        lines.append(
            (
                name,
                f"{found['at']:.3g} ({found['beyond']:.2g}x)",
                *cells,
                chosen,
                f"{found['rank']} of {found['of']}",
                said,
            )
        )
    table(head, lines, "The largest budget, left out")
    best, two = (sum(r <= n for r in ranks) for n in (1, 2))
    print(
        f"chosen was the best of {best} and one of the best two of {two} of {len(ranks)} tables; no method passed on {declined};"
    )
    print(f"the verdict's interval held L_opt of {sum(inside)} of {len(inside)}")


if __name__ == "__main__":
    main()
