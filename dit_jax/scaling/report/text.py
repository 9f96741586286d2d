"""Texts of a fit: rows of its tables, its result in plain words, and its public JSON."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from dit_jax.log import table
from dit_jax.scaling.fits.fit import Fit, predict
from dit_jax.scaling.fits.repeated import effective
from dit_jax.scaling.runs import Run

DASH = "\N{EN DASH}"
LAW_HEAD = ("law", "coefficient", "interval", "exponent", "interval", "irreducible", "interval")
PREDICT_HEAD = (
    "C (FLOPs)", "beyond the data", "N_opt", "interval", "D_opt (tokens)", "interval", "loss", "interval", "of one run"
)  # fmt: skip
METHOD_HEAD = (
    "method", "runs", "a", "interval", "b", "interval", "irreducible", "interval", "L_opt", "interval", "identified"
)  # fmt: skip
TESTED_HEAD = ("model trained at (FLOPs)", "beyond the data", "N", "predicted loss", "interval", "measured", "error")
NUMBER = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)e([+-]?\d+)(?!\w)")
EXPONENT = re.compile(r"(?<![\w.])([CND](?:'|&#39;)?|10)\^(-?[a-z]+|-?\d+(?:\.\d+)?)")
GREEK = {"alpha": "\N{GREEK SMALL LETTER ALPHA}", "beta": "\N{GREEK SMALL LETTER BETA}"}


def typeset(text: str, superscript: str) -> str:
    """A text with its powers raised, 3e+18 as 3 x 10 to the 18 and C^0.52, by a format `superscript`; minus signs as such."""

    def minus(value) -> str:
        return re.sub("alpha|beta", lambda found: GREEK[found[0]], str(value)).replace("-", "\N{MINUS SIGN}")

    def number(found) -> str:
        lead = "" if float(found[1]) == 1 else f"{found[1]}\N{MULTIPLICATION SIGN}"
        return f"{lead}10{superscript.format(minus(int(found[2])))}"

    text = NUMBER.sub(number, text)
    text = EXPONENT.sub(lambda found: found[1] + superscript.format(minus(found[2])), text)
    return re.sub(r"(?<![\w.)\]-])-(?=\d)", "\N{MINUS SIGN}", text)


def finite(value):
    """A value for JSON: plain numbers and lists, and None for numbers that do not exist."""
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [finite(v) for v in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def written(value: float, digits: str = ".4g") -> str:
    """A number, or a dash if there is none."""
    return DASH if math.isnan(value) else f"{value:{digits}}"


def span(low_high: tuple, digits: str = ".3g") -> str:
    """An interval, or a dash if there is none."""
    low, high = low_high
    return DASH if math.isnan(low) else f"{low:{digits}} to {high:{digits}}"


def law_text(law) -> str:
    """A law as a formula in C."""
    term = f"{law.coefficient:.4g} C^{law.exponent:.4f}"
    return f"{law.irreducible:.4f} + {term}" if law.irreducible else term


def far(beyond: float) -> str:
    """How far from the data a prediction reaches, in words."""
    if beyond <= 1.0001:
        return f"{beyond:.2g}x, inside"
    return f"{beyond:.1f}x beyond" if beyond < 1e6 else f"{beyond:.3g}x beyond"


def worth(fit: Fit, tokens, unique):
    """The tokens (n,) that a fit counts: fewer than `tokens` if it takes repeated data (`unique` different tokens) for less than new."""
    return effective(tokens, unique, fit.parameters["R_star"]) if "R_star" in fit.parameters else tokens


def print_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows of text under a title."""
    table(head, rows, title)


def expected(fit: Fit, runs: Sequence[Run]) -> np.ndarray:
    """The loss (n,) that a fit expects of each run; nan if the fit tells no two sizes of one compute apart."""
    n, d, unique = (np.array([getattr(r, name) for r in runs]) for name in ("params", "tokens", "unique"))
    d = worth(fit, d, unique)
    law, other = (np.broadcast_to(fit.loss(n * f, d / f), n.shape) for f in (1.0, 2.0))
    return np.full(n.shape, math.nan) if np.allclose(law, other, rtol=1e-9, atol=0.0) else law


def law_rows(fit: Fit) -> list[tuple]:
    """Give a row of LAW_HEAD for each law."""
    rows = []
    for name, law in fit.laws.items():
        draws, cells = fit.draws.get(name), [name]
        for part, digits in (("coefficient", ".4g"), ("exponent", ".4f"), ("irreducible", ".4f")):
            if part == "irreducible" and not law.irreducible:
                cells += ["", ""]
                continue
            cells += [f"{getattr(law, part):{digits}}", span(fit.interval(getattr(draws, part, None)), digits)]
        rows.append(tuple(cells))
    return rows


def prediction_rows(predictions: Iterable[Mapping]) -> list[tuple]:
    """Give a row of PREDICT_HEAD for each prediction (`fits.fit.predict`)."""
    rows = []
    for said in predictions:
        cells = [f"{said['flops']:.3g}", far(said["beyond"])]
        for name, digits in (("N_opt", ".4g"), ("D_opt", ".4g"), ("L_opt", ".4f")):
            cells += [written(said[name], digits), span(said[f"{name}_interval"], digits)]
        rows.append((*cells, span(said["L_run_interval"], ".4f")))
    return rows


def method_rows(fits: Mapping[str, Fit], flops: float) -> list[tuple]:
    """Give a row of METHOD_HEAD for each fit, with the best loss at `flops`."""
    rows = []
    for name, fit in fits.items():
        said, cells = predict(fit, flops), []
        for law, part in (("N_opt", "exponent"), ("D_opt", "exponent"), ("L_opt", "irreducible")):
            value, drawn = getattr(fit.laws.get(law), part, math.nan), getattr(fit.draws.get(law), part, None)
            told = part == "exponent" or value
            cells += [written(value, ".4f"), span(fit.interval(drawn), ".4f")] if told else [DASH, DASH]
        cells += [written(said["L_opt"], ".4f"), span(said["L_opt_interval"], ".4f")]
        rows.append((name, str(len(fit.runs)), *cells, "yes" if fit.identified else "no"))
    return rows


def tested_rows(test) -> list[tuple]:
    """Give the row of TESTED_HEAD of a model trained beyond the data."""
    measured = f"{test.measured:.4f}" + (f" ± {test.measured_se:.4f}" if test.measured_se else "")
    error = written(test.predicted / test.measured - 1, "+.2%")
    cells = (far(test.multiple), f"{test.params:.4g}", written(test.predicted, ".4f"), span(test.interval, ".4f"))
    return [(f"{test.flops:.3g}", *cells, measured, error)]


def answer(fit: Fit, test=None) -> str:
    """The result in plain words: exponents, the law of the loss, whether the data identify them, and the test beyond the data."""
    parts = []
    if "N_opt" in fit.laws:
        a, between = fit.exponent("N_opt")
        sure = f"{fit.level:.0%} interval {span(between, '.3f')}" if not math.isnan(between[0]) else "no interval"
        parts.append(
            f"The best model size grows as compute to the power a = {a:.3f} ({sure}), so 10 times more training compute asks for "
            f"{10**a:.1f} times more parameters."
        )
    if "L_opt" in fit.laws:
        smallest = min(p.flops for p in fit.used or fit.runs)
        over = f"{len(fit.runs)} runs of {smallest:.3g} to {fit.largest:.3g} FLOPs"
        parts.append(
            f"The best loss at compute C follows {law_text(fit.laws['L_opt'])}, by {fit.method} through {over}."
        )
    why = ": " + "; ".join(fit.reasons)
    parts.append("The data identify this law." if fit.identified else f"The data do not identify this law{why}.")
    if test is not None:
        verdict = "inside" if test.inside else "without" if math.isnan(test.interval[0]) else "outside"
        error = f" ± {test.measured_se:.4f}" if test.measured_se else ""
        parts.append(
            f"Tested {test.multiple:.1f}x beyond the largest compute fitted, by a model of {test.params:.4g} parameters at "
            f"{test.flops:.3g} FLOPs: predicted loss {written(test.predicted, '.4f')} (interval {span(test.interval, '.4f')}), measured "
            f"{test.measured:.4f}{error}, {verdict} the interval."
        )
    return " ".join(parts)


def opening(report) -> str:
    """The result of a `Report` in plain words: the answer of its main fit, and whether the methods agree."""
    text, many = answer(report.fits[report.main], report.test), len(report.disagreements)
    if len(report.fits) < 2:
        return text
    where = f"they disagree beyond their intervals on {many} quantit{'y' if many == 1 else 'ies'}"
    agree = where if many else "no two disagree beyond their intervals"
    return f"{text} {len(report.fits)} methods were fitted; {agree}."


def to_json(fit: Fit, predictions: Iterable[Mapping] = ()) -> dict:
    """The public JSON of a fit; numbers that do not exist are null, and so are intervals."""
    laws = {name: _law(law, name) for name, law in fit.laws.items()}
    intervals = {"a": None, "b": None}
    for name, law in fit.draws.items():
        intervals |= {f"{name}.{part}": _interval(fit, getattr(law, part)) for part in laws[name]}
    for letter, name in (("a", "N_opt"), ("b", "D_opt")):
        intervals[letter] = intervals.get(f"{name}.exponent")
    intervals |= {name: _interval(fit, v) for name, v in fit.parameter_draws.items()}
    parameters = {k: v for k, v in fit.parameters.items() if k not in ("a", "b")}
    own = {"law": parameters, "optimum": laws} if parameters else {"law": laws}
    out = {
        "method": fit.method,
        "n_runs": len(fit.runs),
        **own,
        "objective": fit.objective,
        "exponents": {k: laws.get(name, {}).get("exponent") for k, name in (("a", "N_opt"), ("b", "D_opt"))},
        "intervals": intervals,
        "identifiable": fit.identified,
        "warnings": list(fit.warnings),
        "predictions": list(predictions),
        "level": fit.level,
        "noise": fit.noise,
        "resamples": {"asked": fit.resamples, "degenerate": fit.degenerate},
    }
    if fit.points:
        out["points"] = [_point(p) for p in fit.points]
    return finite(fit.details | out)


def _law(law, name: str) -> dict:
    """A law's coefficient and exponent, and of a loss its irreducible term."""
    parts = dataclasses.asdict(law)
    return parts if name == "L_opt" else {k: v for k, v in parts.items() if k != "irreducible"}


def _interval(fit: Fit, values) -> tuple | None:
    found = fit.interval(values)
    return None if math.isnan(found[0]) else found


def _point(point) -> dict:
    return {f.name: getattr(point, f.name) for f in dataclasses.fields(point)} | {"runs": [r.name for r in point.runs]}
