"""The commands `fit`, `predict`, `plan` and `report`: their tables and their JSON."""

import inspect
import os
import sys

from dit_jax.error import UsageError
from dit_jax.scaling import planning, quality, stated, trust
from dit_jax.scaling.columns import parse_names
from dit_jax.scaling.conventions import check_units, training_flops
from dit_jax.scaling.fit import METHODS
from dit_jax.scaling.methods import Methods, fit_methods, predictions
from dit_jax.scaling.page import opening
from dit_jax.scaling.predict import extrapolate, holdout_largest, predict
from dit_jax.scaling.report import Report, report_json, save
from dit_jax.scaling.runs import load_runs, require_varied
from dit_jax.scaling.study import SurfaceFit
from dit_jax.scaling.summary import METHOD_HEAD, SURFACE_HEAD, method_rows, search_text, surface_rows, to_json
from dit_jax.scaling.table import (
    BUDGET_HEAD,
    CHECK_HEAD,
    LAW_HEAD,
    PREDICT_HEAD,
    budget_rows,
    check_rows,
    far,
    finite,
    law_rows,
    print_table,
    span,
)


def _options(args, method: str, strict: bool = True) -> dict:
    """The options of a method; one that it does not have is refused, or left out where not `strict`."""
    known = inspect.signature(METHODS[method]).parameters
    names = ("window", "residual", "loss", "unbias")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name in given:
        if strict and name not in known:
            raise UsageError(f"--{name}: method {method} has no such option")
    return {"seed": args.seed, "resamples": args.resamples} | {k: v for k, v in given.items() if k in known}


def run_fit(args, runs, fit) -> dict:
    """Fit the laws and print them with their intervals."""
    if fit.method == "isoflop":
        print_table("Budgets", _counting(BUDGET_HEAD, runs), budget_rows(fit))
    if isinstance(fit, SurfaceFit):
        print_table("L = E + A / N^alpha + B / D^beta", SURFACE_HEAD, surface_rows(fit))
        print(search_text(fit) + "\n")
    print_table(f"Laws of compute, {fit.level:.0%} intervals", LAW_HEAD, law_rows(fit))
    if fit.method == "isoflop":
        rows = check_rows(fit, holdout_largest(runs, **_options(args, "isoflop")), None)
        if rows:
            print_table("Predicted against measured", CHECK_HEAD, rows)
    if args.flops and "N_opt" in fit.laws:
        _print_predictions(fit, args.flops, runs)
    said = trust.tell_bias(runs, fit) if fit.method == "isoflop" else {}
    said |= trust.tell_quality(runs, [fit.method])
    said |= trust.tell_holdouts(args.holdout, {fit.method: (runs, _options(args, fit.method))})
    return to_json(fit, predictions(fit, args.flops)) | said


def run_all(args, runs) -> dict:
    """Every method that these runs allow, side by side."""
    curves = _curves(args)
    found = _every(args, runs, curves)
    head = (*METHOD_HEAD[:8], f"L_opt at {found.flops:.3g}", *METHOD_HEAD[9:])
    level = found.main.level
    print_table(f"Methods, {level:.0%} intervals", head, method_rows(found.fits, found.flops))
    differ = [str(d) for d in found.disagreements]
    print(
        "\n".join(f"The methods disagree on {text}." for text in differ)
        or "No two methods disagree beyond their intervals."
    )
    for test in found.tests:
        if test.fails:
            print(f"{test.method}: {test.reason}: {test.found}")
    _say(found)
    said = trust.tell_quality(runs, list(found.fits))
    rows = {method: curves if method == "envelope" and curves else runs for method in found.fits}
    options = {method: _options(args, method, strict=False) for method in found.fits}
    said |= trust.tell_holdouts(args.holdout, {method: (rows[method], options[method]) for method in found.fits})
    return {
        "method": "all",
        "n_runs": len(runs),
        "methods": {method: to_json(fit, predictions(fit, args.flops)) for method, fit in found.fits.items()},
        "refused": found.refused,
        "disagreements": differ,
        "tests": finite([vars(test) for test in found.tests]),
    } | said


def _every(args, runs, curves) -> Methods:
    """All methods, or the one asked for, with the tests of their premises."""
    names = tuple(METHODS) if args.method == "all" else (args.method,)
    flops = max(args.flops, default=None)
    return fit_methods(runs, curves, flops, names, lambda method: _options(args, method, strict=len(names) == 1))


def _curves(args) -> tuple | None:
    """Every evaluated step of the runs; None where these cannot be taken together."""
    try:
        return tuple(_loaded(args, curves=True, quiet=True)[0])
    except UsageError as error:
        print(f"warning: training curves are left out: {error}", file=sys.stderr)
        return None


def _say(found: Methods) -> None:
    """What was refused, and every warning."""
    for method, why in found.refused.items():
        print(f"{method}: not fitted: {why}")
    for method, fit in found.fits.items():
        for warning in fit.warnings:
            print(f"warning: {method}: {warning}", file=sys.stderr)


def run_predict(args, runs, fit) -> dict:
    """Predict the best size, data and loss at --flops."""
    if "N_opt" not in fit.laws:
        raise UsageError(f"--method: {fit.method} says nothing of N_opt; predict with another")
    _print_predictions(fit, args.flops, runs)
    return to_json(fit, predictions(fit, args.flops))


def run_plan(args, runs, fit) -> dict:
    """What to train for --flops or --chip_hours: a real model, its steps and loss, its command, and the runs to train next."""
    return to_json(fit) | planning.run(args, runs, fit)


def run_report(args, runs) -> dict:
    """Write a self-contained report.html, with its figures, fit.json and report.json beside it."""
    curves = _curves(args)
    found = _every(args, runs, curves)
    law, held, test, grid = found.fits.get("isoflop"), None, None, None
    if law is not None:
        held = holdout_largest(runs, **_options(args, "isoflop", strict=False))
    if "N_opt" in found.main.laws:
        test = _extrapolation(args.runs, runs, found.main)
    if args.grid:
        with open(args.grid, "rb") as file:
            grid = file.read()
    made = Report(
        args.title,
        found,
        tuple(runs),
        curves,
        held,
        test,
        grid,
        findings=tuple(f.text for f in quality.findings(runs)),
        flops=tuple(args.flops),
    )
    path = save(args.out, made)
    print(opening(made))
    _say(found)
    print(path)
    return to_json(found.main, predictions(found.main, args.flops)) if args.method != "all" else report_json(made, [])


COMMANDS = {"fit": run_fit, "predict": run_predict, "plan": run_plan}


def _extrapolation(paths, runs, fit):
    """The largest run in the `extrapolation` folder of a sweep, if there is one, against the fit."""
    for path in paths:
        folder = os.path.join(path, "extrapolation")
        if os.path.isdir(folder):
            try:
                loaded = load_runs([*paths, folder], protocol_id=runs[0].protocol_id or None)
                largest = max(loaded, key=lambda run: run.flops)
                if largest.source not in {r.source for r in runs}:  # else the user made it part of the fit
                    return extrapolate(fit, largest)
            except UsageError as error:
                print(f"warning: {folder} is left out: {error}", file=sys.stderr)
    return None


def _counting(head: tuple, runs) -> tuple:
    """A head whose D counts what the runs' does."""
    return tuple(name.replace("(tokens)", f"({runs[0].convention.data})") for name in head)


def _print_predictions(fit, flops, runs) -> None:
    rows = []
    for said in (predict(fit, c) for c in flops):
        row = [f"{said['flops']:.3g}", far(said["beyond"])]
        for name, digits in (("N_opt", ".4g"), ("D_opt", ".4g"), ("L_opt", ".4f")):
            row += [f"{said[name]:{digits}}", span(said[f"{name}_interval"], digits)]
        rows.append((*row, span(said["L_run_interval"], ".4f")))
    print_table(f"Predictions, {fit.level:.0%} intervals", _counting(PREDICT_HEAD, runs), rows)


def _loaded(args, curves: bool, quiet: bool = False) -> tuple:
    """(RUNS in one convention, C in FLOPs of training, without what --drop names; what the JSON says of those)."""
    options = dict(stated=stated.options_of(args), tokens_per_image=args.tokens_per_image)
    options |= dict(columns=parse_names(args.column), where=args.where)
    runs = training_flops(load_runs(args.runs, protocol_id=args.protocol, curves=curves, **options))
    check_units(runs)
    kept, said = trust.without(runs, args.drop, curves, quiet)
    require_varied(kept)
    return kept, said


def run(args) -> dict:
    """The JSON of the command that `args` names, after its fit."""
    runs, said = _loaded(args, curves=args.method == "envelope")
    convention = runs[0].convention
    print(f"Convention: {convention}\n")
    said |= {"convention": convention.to_json()}
    if args.command == "report":
        return run_report(args, runs) | said
    if args.method == "all":
        return run_all(args, runs) | said
    fit = METHODS[args.method](runs, **_options(args, args.method))
    for warning in fit.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return COMMANDS[args.command](args, runs, fit) | said
