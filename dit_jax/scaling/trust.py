"""What the commands say beside the laws: the quality of the runs, the bias of the parabolas, and errors on what was held out."""

import sys

from dit_jax.error import UsageError, one_line
from dit_jax.scaling import bias, crossval, quality
from dit_jax.scaling.table import DASH, finite, print_table

UNSCORED = "no optimum at their compute is known to compare with, so they are neither fitted nor predicted"
SAID = ("sizes", "budgets", "edge", "curvature")  # kinds of findings of which isoflop and akima warn themselves
GRID = (
    *SAID,
    "untested",
    "off-centre",
    "drifting",
)  # kinds that concern a minimum of each budget: isoflop and akima alone
PRINTED = 8  # findings of one kind
SUMMARY_HEAD = ("method", "of", "left out", "RMS error", "worst", "worst at", "inside")


def without(runs: list, drop: str | None, curves: bool, quiet: bool = False) -> tuple:
    """(the runs, {"dropped": those that --drop has left out}), which are printed too, but for `quiet`."""
    if drop is None:
        return runs, {}
    kinds = quality.DROPPED if drop == "all" else tuple(drop.split(","))
    for kind in kinds:
        if kind not in quality.DROPPED:
            raise UsageError(f"--drop: found {kind!r}, expected {', '.join(quality.DROPPED)} or all")
    kept = quality.drop(runs, kinds, curves=curves)
    if quiet:
        return kept.runs, {}
    dropped = [{"kind": f.kind, "run": r.name, "source": r.source, "text": f.what} for f, r in kept.dropped]
    for f, _ in kept.dropped:
        print(one_line(f"dropped ({f.kind}): {f.what}"), file=sys.stderr)
    print(f"{len(runs) - len(kept.runs)} of {len(runs)} runs dropped", file=sys.stderr)
    for note in kept.notes:
        print(f"warning: {note}", file=sys.stderr)
    return kept.runs, {"dropped": dropped, "dropped_notes": list(kept.notes)}


def tell_quality(runs, methods: list) -> dict:
    """Warns of what is wrong with the runs, as far as the fits of `methods` have not; returns {"quality": all of it}."""
    found = quality.findings(runs, curves=methods == ["envelope"])
    silent = SAID if {"isoflop", "akima"} & set(methods) else GRID
    for kind in dict.fromkeys(f.kind for f in found if f.kind not in silent):
        same = [f for f in found if f.kind == kind]
        for f in same[:PRINTED]:
            print(one_line(f"warning: {f.text}"), file=sys.stderr)
        if len(same) > PRINTED:
            print(f"warning: {kind}: {len(same) - PRINTED} more; --json lists them all", file=sys.stderr)
    return {"quality": [{"kind": f.kind, "runs": f.runs, "budgets": f.budgets, "text": f.text} for f in found]}


def tell_bias(runs, fit) -> dict:
    """Prints the bias of an isoFLOP fit's parabolas; returns {"bias": its JSON, null where none can be predicted}."""
    try:
        found = fit.bias or bias.estimate(bias.surface_of(runs), fit.used)
    except UsageError as error:
        print(f"Bias of the parabolas: not predicted: {str(error).removeprefix('RUNS: ')}\n")
        return {"bias": None}
    title = "Bias of the parabolas, as a surface through the same runs predicts it"
    print_table(title, bias.BIAS_HEAD, bias.rows(found))
    if not found.corrected:
        print(bias.text(found) + "\n")
    return {"bias": finite(bias.to_json(found))}


def tell_holdouts(split: str | None, methods: dict) -> dict:
    """Prints the errors of methods, name -> (runs, options of its fit), on what is held out; returns {"holdout": their JSON}, of
    several methods by name. {} without a split."""
    if split is None:
        return {}
    found, refused = {}, {}
    for method, (runs, options) in methods.items():
        try:
            found[method] = crossval.cross_validate(runs, method, split, **options)
        except UsageError as error:
            if len(methods) == 1:
                raise
            refused[method] = str(error)
    if len(methods) == 1:
        (one,) = found.values()
        print_table(f"Held out: {split}", crossval.HOLDOUT_HEAD, crossval.rows(one))
        for label, why in one.refused:
            print(f"{label} cannot be held out: {why}")
    if found:
        print_table(f"Errors on what is held out ({split})", SUMMARY_HEAD, _summary_rows(found))
    for method, why in refused.items():
        print(f"{method}: {why}")
    for method, one in found.items():
        if one.unscored:
            print(f"{method}: {one.unscored} run(s) set aside and not scored: {UNSCORED}")
    said = {method: finite(crossval.to_json(one)) for method, one in found.items()}
    return {"holdout": said if len(methods) > 1 else next(iter(said.values()))}


def _summary_rows(found: dict) -> list[tuple]:
    rows = []
    for method, one in found.items():
        for name, s in one.summary().items():
            inside = f"{s['inside']} of {s['judged']}" if s["judged"] else DASH
            rows.append(
                (method, name, str(s["count"]), f"{s['rms']:.2%}", f"{s['worst']:+.2%}", s["worst_left"], inside)
            )
    return rows
