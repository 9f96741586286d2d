"""Fit scaling laws to runs: `python -m dit_jax.scaling fit|predict|plan|report|metric|compare|frontier RUNS`.

RUNS is one or more workdirs, folders of workdirs, or a CSV with columns params,tokens,loss (optional flops,images,run,group);
`--column params='Model Size'` names the column of a CSV that calls it something else, `--where study=A` takes some of its rows.
`fit --method=all` puts the methods side by side and says why they disagree; `report`, by default of all of them, shows it.
Exit codes: 0 done, 1 error, 2 usage or bad input (nothing is written).
"""

import argparse
import inspect
import json
import os
import sys

from dit_jax.error import UsageError, on_disk
from dit_jax.scaling import jobs, planning, quality, stated, trust
from dit_jax.scaling.columns import parse_names
from dit_jax.scaling.conventions import check_units, training_flops
from dit_jax.scaling.fit import METHODS
from dit_jax.scaling.methods import Methods, fit_methods, predictions
from dit_jax.scaling.page import opening
from dit_jax.scaling.predict import extrapolate, holdout_largest, predict
from dit_jax.scaling.report import Report, report_json, save, write
from dit_jax.scaling.runs import load_runs, require_varied
from dit_jax.scaling.study import LOSSES, RESIDUALS, SurfaceFit
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


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m dit_jax.scaling", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in COMMANDS.items():
        one = commands.add_parser(name, help=what.__doc__.splitlines()[0])
        one.add_argument("runs", nargs="+", metavar="RUNS")
        both = ["all"] if name in ("fit", "report") else []
        one.add_argument("--method", default="all" if name == "report" else "isoflop", choices=[*METHODS, *both])
        one.add_argument(
            "--residual", choices=RESIDUALS, help="of the parametric methods: log law - log loss, or law - loss"
        )
        one.add_argument(
            "--loss", choices=LOSSES, help="of the parametric methods: summed Huber (delta 1e-3), or squares"
        )
        one.add_argument("--window", type=float, help="isoflop: keep sizes within this factor of a budget's best run")
        trust.add_options(one, name)
        stated.add_arguments(one)
        one.add_argument("--protocol", metavar="ID", help="take the records of this protocol_id alone")
        jobs.add_table(one)
        one.add_argument("--resamples", type=int, default=1000)
        one.add_argument("--seed", type=int, default=0)
        one.add_argument("--json", metavar="OUT", help="write the result here too")
        one.add_argument(
            "--flops",
            type=float,
            action="append",
            default=[],
            required=name == "predict",
            help="training FLOPs; may be repeated",
        )
        if name == "plan":
            planning.add_arguments(one)
        if name == "report":
            one.add_argument("--out", default="report.html")
            one.add_argument("--title", default="Scaling law")
            one.add_argument("--grid", help="PNG of samples to embed")
    jobs.add_commands(commands)
    return parser


def _check(args) -> None:
    for flops in getattr(args, "flops", []):
        if not 0 < flops < float("inf"):
            raise UsageError(f"--flops: found {flops}, expected a number above 0")
    window = getattr(args, "window", None)
    if window is not None and not window > 1:
        raise UsageError(f"--window: found {args.window}, expected a factor above 1")
    if args.resamples < 0 or args.seed < 0:
        raise UsageError(f"--resamples, --seed: found {args.resamples}, {args.seed}, expected at least 0")
    if getattr(args, "grid", None) and not os.path.isfile(args.grid):
        raise UsageError(f"--grid: {args.grid}: no such file")
    if args.command == "plan":
        planning.check(args)
    for name in ("json", "out"):
        path = getattr(args, name, None)
        on_disk(f"--{name}", path or "")
        if path and os.path.isdir(path):
            raise UsageError(f"--{name}: {path} is a folder, expected a file")
        above = os.path.abspath(path or ".")
        while not os.path.exists(above):
            above = os.path.dirname(above)
        if path and not os.path.isdir(above) and above != os.path.abspath(path):
            raise UsageError(f"--{name}: {above} is a file, expected a folder to write {os.path.basename(path)} in")


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


COMMANDS = {"fit": run_fit, "predict": run_predict, "plan": run_plan, "report": run_report}


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


def _fitted(args) -> dict:
    """The result of a command of COMMANDS, after its fit."""
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


def main(argv=None) -> int:
    """Runs a command line; returns the exit code."""
    try:
        args = _parser().parse_args(argv)
        _check(args)
        result = _fitted(args) if args.command in COMMANDS else jobs.run(args)
        if args.json:
            write(args.json, (json.dumps(result, indent=1) + "\n").encode())
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
