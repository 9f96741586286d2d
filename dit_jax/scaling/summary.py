"""The parametric fits in rows of text and in JSON, and several methods side by side."""

import dataclasses
import math

from dit_jax.scaling.optima import PointFit
from dit_jax.scaling.reasons import values
from dit_jax.scaling.study import SurfaceFit, delta_at
from dit_jax.scaling.table import DASH, finite, fit_json, span

SURFACE_HEAD = ("parameter", "value", "bootstrap interval", "delta-method interval")
METHOD_HEAD = (
    "method",
    "runs",
    "a",
    "interval",
    "b",
    "interval",
    "irreducible",
    "interval",
    "L_opt",
    "interval",
    "identified",
)


def surface_rows(fit: SurfaceFit) -> list[tuple]:
    """(parameter, value, bootstrap interval, delta-method interval) as text."""
    rows = []
    for name in ("E", "A", "B", "alpha", "beta", "a", "b"):
        both = (span(i.get(name, (math.nan,) * 2), ".5g") for i in (fit.intervals, fit.delta_intervals))
        rows.append(
            (name + (" (at its bound)" if name in fit.bounds else ""), f"{getattr(fit.surface, name):.6g}", *both)
        )
    if fit.profile:
        rows.append(("E, profile likelihood", f"{fit.surface.E:.6g}", span(fit.profile.interval, ".5g"), ""))
    return rows


def search_text(fit: SurfaceFit) -> str:
    """How the search went and how well the data condition it, in words."""
    s, c = fit.starts, fit.condition
    one, two, correlation = c.correlated
    return (
        f"{fit.method}, {fit.residual} residuals, {fit.loss} loss: objective {fit.objective:.10g}. "
        f"{s.reached:.1%} of {s.count} starts ({s.distinct} distinct) reached the best, {s.converged:.1%} converged. "
        f"Condition number {c.customary:.2g} as written, {c.centred:.2g} about the means, {c.exponents:.2g} in the exponents alone; "
        f"most correlated: {one} and {two}, {correlation:+.4f}. "
        f"Standard deviation of a run about the surface: {fit.noise:.3g}. C = {fit.k:.4g} N D."
    )


def to_json(fit, predictions=()) -> dict:
    """The public JSON of any fit."""
    if isinstance(fit, SurfaceFit):
        return _surface_json(fit, predictions)
    if isinstance(fit, PointFit):
        points = {"points": [dataclasses.asdict(p) for p in fit.points]}
        return finite({**fit_json(fit, predictions), **points})
    return fit_json(fit, predictions)


def _surface_json(fit: SurfaceFit, predictions) -> dict:
    said = [{**p, **{f"{k}_delta_interval": v for k, v in delta_at(fit, p["flops"]).items()}} for p in predictions]
    names = ("E", "A", "B", "alpha", "beta")
    return finite(
        {
            "method": fit.method,
            "n_runs": fit.n_runs,
            "law": {name: getattr(fit.surface, name) for name in names},
            "objective": fit.objective,
            "exponents": {"a": fit.surface.a, "b": fit.surface.b},
            "intervals": {"a": None, "b": None, **fit.intervals},
            "identifiable": fit.identifiable,
            "warnings": list(fit.warnings),
            "predictions": said,
            "residual": fit.residual,
            "loss": fit.loss,
            "level": fit.level,
            "clusters": fit.clusters,
            "flops_per_parameter_and_token": fit.k,
            "optimum": {name: dataclasses.asdict(law) for name, law in fit.laws.items()},
            "delta_intervals": fit.delta_intervals,
            "profile": _profile_json(fit.profile),
            "conditioning": dataclasses.asdict(fit.condition),
            "starts": dataclasses.asdict(fit.starts),
            "bounds": list(fit.bounds),
            "noise": fit.noise,
            "resamples": {"asked": fit.resamples, "degenerate": fit.degenerate},
        }
    )


def _profile_json(profile) -> dict | None:
    if profile is None:
        return None
    return {
        "E": profile.E.tolist(),
        "deviance": profile.deviance.tolist(),
        "threshold": profile.threshold,
        "interval": profile.interval,
    }


def method_rows(fits: dict, flops: float) -> list[tuple]:
    """A row per method: exponents, irreducible loss and the best loss at `flops`, with intervals, as text."""
    rows = []
    for method, fit in fits.items():
        found, cells = values(fit, flops), []
        for name in ("a", "b", "irreducible", "L_opt"):
            value, between = found.get(name, (math.nan, (math.nan,) * 2))
            cells += [DASH if math.isnan(value) else f"{value:.4f}", span(between, ".4f")]
        rows.append((method, str(fit.n_runs), *cells, "yes" if fit.identifiable else "no"))
    return rows
