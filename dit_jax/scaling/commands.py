"""The commands `fit`, `predict`, `plan` and `report`: their tables and their JSON."""

import os
import sys
from collections.abc import Sequence

from dit_jax.error import UsageError, one_line
from dit_jax.files import LARGEST, is_folder, read
from dit_jax.scaling.fits import METHODS
from dit_jax.scaling.fits.fit import Fit, predict
from dit_jax.scaling.plans import commands as plans
from dit_jax.scaling.report import Report, save
from dit_jax.scaling.report.text import (
    LAW_HEAD,
    METHOD_HEAD,
    PREDICT_HEAD,
    finite,
    law_rows,
    method_rows,
    prediction_rows,
    print_table,
    to_json,
)
from dit_jax.scaling.runs import budgets, load_runs, require_varied, stated
from dit_jax.scaling.runs.columns import parse_names
from dit_jax.scaling.runs.conventions import check_units, training_flops
from dit_jax.scaling.verdicts import holdout, quality, verdict
from dit_jax.scaling.verdicts.beyond import Extrapolation
from dit_jax.scaling.verdicts.methods import Methods, again, fit_methods, options_of


def run(args) -> dict:
    """The JSON of the command that `args` names."""
    runs, said = _loaded(args)
    try:
        require_varied(runs)
    except UsageError as error:
        if args.command != "fit":
            raise
        return said | _no_law(runs, str(error))
    odd = quality.findings(runs)
    found, made = _judged(args, runs, odd)
    print(f"Convention: {runs[0].convention}\n")
    for line in verdict.lines(made) if made else (f"Verdict: none: {_why(found.refused)}",):
        print(one_line(line))
    print()
    if args.verbose:
        _tell(found, odd)
    said |= {"convention": runs[0].convention.to_json(), "verdict": finite(made.to_json()) if made else None}
    said |= {"quality": [{"kind": f.kind, "runs": f.runs, "budgets": f.budgets, "text": f.text} for f in odd]}
    if args.command == "report":
        return _report(args, runs, found, made, said) | said
    if args.method == "all":
        return _fit_all(args, runs, found) | said
    silent = made.silent if made and not args.method else ""
    if silent and args.command in ("predict", "plan"):
        raise UsageError(
            f"RUNS: at {made.flops:.3g} FLOPs, {made.beyond:.3g}x the largest budget, {silent}; train what the reasons ask for, or "
            f"see what one method says with --method={made.method}"
        )
    fit = found.fits[args.method or (made.method if made else found.main.method)]
    for reason in fit.reasons if args.method else ():  # else the verdict has said them
        print(one_line(f"warning: {fit.method}: {reason}"), file=sys.stderr)
    args.flops = [c for c in args.flops if not silent or c <= fit.largest]
    return {"fit": _fit, "predict": _predict, "plan": _plan}[args.command](args, runs, fit) | said


def _no_law(runs: list, why: str) -> dict:
    """The JSON of runs from which no law can be read."""
    print(one_line(f"Verdict: none: {why}"))
    none: dict = {"a": None, "b": None}
    out = {"method": None, "n_runs": len(runs), "exponents": none, "intervals": none, "identifiable": False}
    return out | {"warnings": [why], "predictions": [], "verdict": None, "convention": runs[0].convention.to_json()}


def _judged(args, runs: list, odd: Sequence) -> tuple:
    """(every fit that the command needs, the verdict on those that answer). Raises UsageError where the method asked for cannot be
    fitted."""
    flops, options = max(args.flops, default=0.0), {m: options_of(args, m) for m in METHODS}
    names = tuple(METHODS) if args.method == "all" else dict.fromkeys((*verdict.ANSWER, args.method or "isoflop"))
    found = fit_methods(runs, flops, tuple(names), options.__getitem__)
    if args.method in found.refused:
        raise UsageError(found.refused[args.method])
    return found, verdict.judge(runs, found.fits, found.refits.__getitem__, flops, _suspects(runs, odd))


def _suspects(runs: list, odd: Sequence) -> list[tuple]:
    """What is odd about the runs, for the verdict: bad rows of one kind together; several losses of one cell, with those that are not the
    best of it; else each finding with the runs of its budgets. What is wrong with the table as a whole is said whatever its effect."""
    out = []
    for kind in dict.fromkeys(f.kind for f in odd if f.rows):
        same = [f for f in odd if f.kind == kind]
        more = f" (and {len(same) - 1} more: --verbose)" if len(same) > 1 else ""
        out.append((f"{kind}: {same[0].what}{more}", same[0].advice, [runs[i] for f in same for i in f.rows], True))
    for f in odd:
        members = [r for label, some in budgets(runs) if label in f.budgets for r in some]
        if f.worse:
            out.append((f"{f.what}; of the best of each alone", f.advice, [runs[i] for i in f.worse], True))
        elif not f.rows:
            out.append((f.what, f.advice, members, f.kind in ("split", "noise", "unnamed")))
    return out


def _why(refused: dict) -> str:
    return "; ".join(f"{method}: {why}" for method, why in refused.items())


def _tell(found: Methods, odd: Sequence) -> None:
    """All that --verbose says: what is odd about the runs, what each fit warns of, and where methods disagree."""
    for f in odd:
        print(one_line(f"{f.kind}: {f.text}"))
    for method, fit in found.fits.items():
        for warning in fit.warnings:
            print(one_line(f"{method}: {warning}"))
    for method, why in found.refused.items():
        print(f"{method}: not fitted: {why}")
    for text in found.disagreements or ("no two methods disagree beyond their intervals",):
        print(text)
    print()


def _loaded(args) -> tuple:
    """(RUNS in one convention, C in FLOPs of training, without what --drop names; what the JSON says of those)."""
    options = dict(stated=stated.options_of(args), tokens_per_image=args.tokens_per_image)
    kinds = quality.kinds_of(args.drop)
    missing = "missing" in kinds or args.best_of is not None
    options |= dict(columns=parse_names(args.column), where=args.where, best_of=args.best_of, missing=missing)
    runs = training_flops(load_runs(args.runs, protocol_id=args.protocol, curves=args.curves, **options))
    check_units(runs)
    kept, said = _without(runs, kinds) if kinds or args.best_of else (runs, {})
    return kept, said


def _without(runs: list, kinds: tuple) -> tuple:
    """(the runs, {"dropped": those that --drop and --best_of have left out}), which are printed too."""
    kept = quality.drop(runs, kinds)
    for f in dict.fromkeys(f for f, _ in kept.dropped):
        print(one_line(f"dropped ({f.kind}): {f.what}"), file=sys.stderr)
    print(f"{len(runs) - len(kept.runs)} of {len(runs)} runs dropped", file=sys.stderr)
    for note in kept.notes:
        print(f"warning: {note}", file=sys.stderr)
    dropped = [{"kind": f.kind, "run": r.name, "source": r.source, "text": f.what} for f, r in kept.dropped]
    return kept.runs, {"dropped": dropped, "dropped_notes": list(kept.notes)}


def _fit(args, runs: list, fit: Fit) -> dict:
    """Print the laws with their intervals."""
    for title, head, rows in fit.tables:
        print_table(title, head, rows)
    print_table(f"Laws of compute by {fit.method}, {fit.level:.0%} intervals", LAW_HEAD, law_rows(fit))
    if args.flops and "N_opt" in fit.laws:
        _print_predictions(fit, args.flops, runs)
    return to_json(fit, _predictions(fit, args.flops)) | _tell_holdouts(args, runs, {fit.method: fit})


def _predict(args, runs: list, fit: Fit) -> dict:
    """Predict the best size, data and loss at --flops."""
    if "N_opt" not in fit.laws:
        raise UsageError(f"--method: {fit.method} says nothing of N_opt; predict with another")
    _print_predictions(fit, args.flops, runs)
    return to_json(fit, _predictions(fit, args.flops))


def _plan(args, runs: list, fit: Fit) -> dict:
    """What to train for --flops or --chip_hours."""
    return to_json(fit) | plans.run(args, runs, fit)


def _predictions(fit: Fit, flops) -> list[dict]:
    return [predict(fit, c) for c in flops] if "N_opt" in fit.laws else []


def _print_predictions(fit: Fit, flops, runs: list) -> None:
    found = _predictions(fit, flops)
    for said in (s for s in found if "L_opt_reason" in s):
        print(f"warning: no loss at {said['flops']:.3g} FLOPs: {said['L_opt_reason']}", file=sys.stderr)
    head = tuple(name.replace("(tokens)", f"({runs[0].convention.data})") for name in PREDICT_HEAD)
    print_table(f"Predictions of {fit.method}, {fit.level:.0%} intervals of this method", head, prediction_rows(found))


def _fit_all(args, runs: list, found: Methods) -> dict:
    """Every method that these runs allow, side by side."""
    head = (*METHOD_HEAD[:8], f"L_opt at {found.flops:.3g}", *METHOD_HEAD[9:])
    print_table(f"Methods, {found.main.level:.0%} intervals", head, method_rows(found.fits, found.flops))
    return {
        "method": "all",
        "n_runs": len(runs),
        "methods": {method: to_json(fit, _predictions(fit, args.flops)) for method, fit in found.fits.items()},
        "refused": found.refused,
        "disagreements": list(found.disagreements),
    } | _tell_holdouts(args, runs, found.fits)


def _tell_holdouts(args, runs: list, fits: dict) -> dict:
    """Print the errors of the fits on what --holdout leaves out; {"holdout": their JSON}, of several methods by name; {} without."""
    split = getattr(args, "holdout", None)
    if split is None:
        return {}
    found, refused = {}, {}
    for method, fit in fits.items():
        most = args.resamples if split == "largest" else 200
        try:
            refit = again(method, most, **options_of(args, method))
            found[method] = holdout.hold_out(fit, refit, split, runs)
        except UsageError as error:
            if len(fits) == 1:
                raise
            refused[method] = str(error)
    if len(found) == len(fits) == 1:
        (one,) = found.values()
        print_table(f"Held out: {split}", holdout.HEAD, holdout.rows(one))
        for label, why in one.refused:
            print(f"{label} cannot be held out: {why}")
    title = f"Errors on what is held out ({split})"
    print_table(title, holdout.SUMMARY_HEAD, holdout.summary_rows(list(found.values())))
    for method, why in refused.items():
        print(f"{method}: {why}")
    said = {method: finite(one.to_json()) for method, one in found.items()}
    return {"holdout": said if len(fits) > 1 else next(iter(said.values()))}


def _report(args, runs: list, found: Methods, made, said: dict) -> dict:
    """Write the page, with report.json beside it, or figures."""
    fits = found.fits if args.method == "all" else {args.method: found.fits[args.method]}
    main = fits[made.method if made and made.method in fits else next(iter(fits))]
    report = Report(
        title=args.title,
        fits=fits,
        main=main.method,
        runs=tuple(runs),
        findings=tuple(f["text"] for f in said["quality"]),
        dropped=tuple(dict.fromkeys([d["text"] for d in said.get("dropped", ())] + said.get("dropped_notes", []))),
        refused=found.refused,
        disagreements=found.disagreements,
        test=_extrapolation(args.runs, runs, found, made),
        grid=read(args.grid, LARGEST) if args.grid else None,
        flops=tuple(args.flops),
        verdict=made,
    )
    print(save(args.out, report))
    if args.method != "all":
        return to_json(main, _predictions(main, args.flops))
    methods = {m: to_json(f, _predictions(f, args.flops)) for m, f in fits.items()}
    return {"method": "all", "n_runs": len(runs), "main": main.method, "methods": methods}


def _extrapolation(paths, runs: list, found: Methods, made) -> Extrapolation | None:
    """The largest run in the `extrapolation` folder of a sweep, if there is one, against the verdict."""
    for path in paths if made else ():
        folder = os.path.join(path, "extrapolation")
        if is_folder(folder):
            try:
                loaded = load_runs([*paths, folder], protocol_id=runs[0].protocol_id or None)
                largest = max(loaded, key=lambda run: run.flops)
                if largest.source not in {r.source for r in runs}:  # else the user made it part of the fit
                    return verdict.foretold(made, found.fits, largest)
            except UsageError as error:
                print(f"warning: {folder} is left out: {error}", file=sys.stderr)
    return None
