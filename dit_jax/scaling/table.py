"""A fit in words, in rows of text and in JSON: what the command prints and the report shows."""

import math

from dit_jax.log import table
from dit_jax.scaling import bias
from dit_jax.scaling.predict import interval

DASH = "\N{EN DASH}"
PREDICT_HEAD = (
    "C (FLOPs)",
    "beyond the data",
    "N_opt",
    "interval",
    "D_opt (tokens)",
    "interval",
    "loss",
    "interval",
    "of one run",
)
LAW_HEAD = ("law", "coefficient", "interval", "exponent", "interval", "irreducible", "interval")
BUDGET_HEAD = ("budget (FLOPs)", "runs", "sizes", "N_opt", "D_opt (tokens)", "L_opt", "curvature", "check")
CHECK_HEAD = ("check", "beyond the data", "of", "predicted", "interval", "measured", "error")


def fit_json(fit, predictions=()) -> dict:
    """The public JSON of a fit; numbers that do not exist are null."""
    intervals = {"a": None, "b": None}
    for name, draws in fit.draws.items():
        for part in ("coefficient", "exponent") + (("irreducible",) if name == "L_opt_irreducible" else ()):
            intervals[f"{name}.{part}"] = interval(getattr(draws, part), fit.level)
    intervals |= {k: intervals.get(f"{n}_opt.exponent") for k, n in (("a", "N"), ("b", "D"))}
    out = {
        "method": fit.method,
        "n_runs": fit.n_runs,
        "law": {
            name: {"coefficient": law.coefficient, "exponent": law.exponent}
            | ({"irreducible": law.irreducible} if name.startswith("L_opt") else {})
            for name, law in fit.laws.items()
        },
        "objective": fit.objective,
        "exponents": {
            k: fit.laws[f"{n}_opt"].exponent if f"{n}_opt" in fit.laws else None for k, n in (("a", "N"), ("b", "D"))
        },
        "intervals": intervals,
        "identifiable": fit.identifiable,
        "warnings": list(fit.warnings),
        "predictions": list(predictions),
    }
    if getattr(fit, "bias", None):
        out["bias"] = bias.to_json(fit.bias)
    return finite(out)


def finite(value):
    """A value for JSON: numbers that do not exist are None."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def law_text(law) -> str:
    """A law as a formula in C."""
    term = f"{law.coefficient:.4g} C^{law.exponent:.4f}"
    return f"{law.irreducible:.4f} + {term}" if law.irreducible else term


def span(low_high, digits: str = ".3g") -> str:
    """An interval, or a dash where there is none."""
    low, high = low_high
    return DASH if math.isnan(low) else f"{low:{digits}} to {high:{digits}}"


def answer(fit, extrapolation=None) -> str:
    """The result in one paragraph of plain words."""
    a = fit.laws["N_opt"].exponent
    between = interval(fit.draws["N_opt"].exponent if fit.draws else None, fit.level)
    text = (
        f"The best model size grows as compute to the power {a:.3f} ({fit.level:.0%} interval {span(between, '.3f')}), "
        f"so {10**a:.1f} times more parameters for 10 times more training compute; data grows as compute to the power "
        f"{fit.laws['D_opt'].exponent:.3f}. The best held-out loss follows {law_text(fit.laws['L_opt'])}, "
        f"fitted to {sum(len(b.runs) for b in fit.used)} runs at {len(fit.used)} budgets "
        f"from {fit.used[0].flops:.2g} to {fit.largest:.2g} FLOPs."
    )
    if not fit.identifiable:
        text += " These data do not identify the law: " + "; ".join(fit.warnings) + "."
    if extrapolation:
        e = extrapolation
        verdict = "inside" if e.inside else ("without" if math.isnan(e.interval[0]) else "outside")
        text += (
            f" Tested {e.multiple:.1f}x beyond the largest budget, with {e.params:,.0f} active parameters at {e.flops:.2g} FLOPs: "
            f"predicted loss {e.predicted:.4f} (interval {span(e.interval, '.4f')}), measured {e.measured:.4f} ± {e.measured_se:.4f}, "
            f"{e.predicted / e.measured - 1:+.1%} off and {verdict} the interval."
        )
    return text


def law_rows(fit) -> list[tuple]:
    """(law, coefficient, its interval, exponent, its interval, irreducible, its interval) as text."""
    rows = []
    for name, law in fit.laws.items():
        if name == "L_opt" and "L_opt_pure" in fit.laws:
            continue  # one of the two below it in the table, marked there
        draws = fit.draws.get(name)
        chosen = " (chosen)" if name.startswith("L_opt_") and law == fit.laws["L_opt"] else ""
        cells = [name.replace("_opt_", "_opt, ") + chosen]
        for part, digits in (("coefficient", ".3g"), ("exponent", ".4f"), ("irreducible", ".4f")):
            if part == "irreducible" and name not in ("L_opt", "L_opt_irreducible"):
                cells += ["", ""]
                continue
            values = getattr(draws, part) if draws else None
            cells += [f"{getattr(law, part):{digits}}", span(interval(values, fit.level), digits)]
        rows.append(tuple(cells))
    return rows


def budget_rows(fit) -> list[tuple]:
    """A row per budget: its runs, its minimum and whether it is used."""
    rows = []
    for b in fit.budgets:
        sizes = [r.params for r in b.runs]
        found = (DASH,) * 3 if b.problem else (f"{b.n_opt:.4g}", f"{b.d_opt:.4g}", f"{b.loss:.4f}")
        curvature = f"{b.curvature:.3g}" if b.coefficients else DASH
        span_ = f"{min(sizes):.3g} to {max(sizes):.3g}"
        rows.append((f"{b.flops:.3g}", str(len(b.runs)), span_, *found, curvature, b.problem or "minimum inside, used"))
    return rows


def check_rows(fit, holdout, extrapolation) -> list[tuple]:
    """(check, beyond, quantity, predicted, interval, measured, error) as text."""
    rows = []
    if holdout:
        h, what = holdout, f"fit without the largest budget, {holdout.flops:.2g}"
        rows.append(
            (
                what,
                f"{h.multiple:.1f}x",
                "N_opt",
                f"{h.n_opt:.4g}",
                span(h.n_interval, ".4g"),
                f"{h.n_measured:.4g}",
                f"{h.n_error:+.1%}",
            )
        )
        rows.append(
            (
                what,
                f"{h.multiple:.1f}x",
                "L_opt",
                f"{h.loss:.4f}",
                span(h.loss_interval, ".4f"),
                f"{h.loss_measured:.4f}",
                f"{h.loss_error:+.1%}",
            )
        )
    if extrapolation:
        e = extrapolation
        what = f"model trained at {e.flops:.2g}"
        rows.append(
            (
                what,
                f"{e.multiple:.1f}x",
                "loss",
                f"{e.predicted:.4f}",
                span(e.interval, ".4f"),
                f"{e.measured:.4f} ± {e.measured_se:.4f}",
                f"{e.predicted / e.measured - 1:+.1%}",
            )
        )
    return rows


def far(beyond: float) -> str:
    """How far from the data a prediction reaches, in words."""
    if beyond <= 1.0001:
        return f"{beyond:.1f}x, inside"
    return f"{beyond:.1f}x beyond" if beyond < 1e6 else f"{beyond:.3g}x beyond"


def print_table(title: str, head, rows) -> None:
    """Print rows of text under a title."""
    table(head, rows, title)
