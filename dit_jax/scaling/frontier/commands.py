"""The commands `metric`, `compare` and `frontier`: their tables and their JSON."""

import math
import re
import sys
from argparse import Namespace
from dataclasses import replace
from functools import partial

from dit_jax.error import UsageError, one_line
from dit_jax.files import base
from dit_jax.scaling.frontier import answers
from dit_jax.scaling.frontier import compare as ladders
from dit_jax.scaling.frontier.choice import choose, one_guidance
from dit_jax.scaling.frontier.frontier import UNITS, Frontier, fit_frontier, front, serve
from dit_jax.scaling.frontier.metric import best_of_budgets, correlate, doubts, fit_metric
from dit_jax.scaling.frontier.points import SAMPLING, Point, all_training, find_metric, higher_is_better, load_points
from dit_jax.scaling.report.text import DASH, finite, law_text, print_table, span
from dit_jax.scaling.runs import load_runs
from dit_jax.scaling.runs.columns import parse_names
from dit_jax.scaling.runs.conventions import check_units, of_record, training_flops
from dit_jax.scaling.runs.run import require_same_start
from dit_jax.scaling.verdicts.methods import fit_one, options_of
from dit_jax.scaling.verdicts.verdict import ends


def run(args) -> dict:
    """The JSON of the command that `args` names; its warnings go to standard error, and into the JSON."""
    if args.metric is None:
        args.metric = find_metric(args.runs, args.where, parse_names(args.column))
    result, warnings = COMMANDS[args.command](args)
    made = result["verdict"]
    told = "\n".join((made["reason"], *(f["text"] for f in made["findings"])))
    for warning in warnings:
        if (warning.partition(": ")[2] or warning) not in told:  # else the verdict has said it
            print(f"warning: {one_line(warning)}", file=sys.stderr)
    return finite(result | {"warnings": warnings})


def _points(args, paths, sampled: bool = False, fitted: bool = True) -> list[Point]:
    found = load_points(paths, args.metric, args.where, sampled, parse_names(args.column), args.curves)
    for point in found if fitted else ():
        require_same_start(found[0], point)
    return found


def _chosen(points: list[Point], args) -> tuple[list, list[str]]:
    """The choice of each model and what is to be said about it."""
    found = choose(points, args.choose.split(","), higher=higher_is_better(args.metric, points))
    single = "" if args.metric == "loss" else one_guidance(found)
    return found, [w for w in (single, *(c.warning for c in found)) if w]


def _json_of(point: Point) -> dict:
    fields = ("name", "score", "score_se", "flops", "seconds", *SAMPLING, "train", "params", "loss")
    return {name: getattr(point, name) for name in fields}


def _json_of_choice(c) -> dict:
    told = {"interpolated": c.interpolated, "guidance_se": c.guidance_se, "lowest": c.lowest.score}
    return _json_of(c.best) | {"tried": len(c.tried), "edge": c.edge} | told


def run_metric(args) -> tuple[dict, list]:
    """Fit the law of a metric in training compute, each model at its best guidance; and its relation to the loss."""
    found, warnings = _chosen(_points(args, args.runs), args)
    best = [c.best for c in found]
    higher = higher_is_better(args.metric, best)
    used = best if args.each else best_of_budgets(best, higher=higher)
    form = "irreducible" if args.irreducible else "pure" if args.pure else ""
    fit = fit_metric(used, form=form, higher=higher, resamples=args.resamples, seed=args.seed)
    reasons, runs = doubts(fit, args.metric), {p.run_name for p in used}
    again = partial(fit_metric, higher=higher, resamples=0)
    made = answers.of_metric(fit, args.metric, again, max(args.flops, default=0.0), asked=form)
    _say(answers.of_metric_lines(made))
    rows = [(c.best.name, c.best.sampling or DASH, str(len(c.tried)), f"{c.best.score:.4g}", c.edge) for c in found]
    head = ("model", "best", "tried", args.metric, "edge")
    print_table(f"Best sampling of each model, by {args.metric}", head, rows)
    scatter = DASH if math.isnan(fit.taken.noise) else f"{fit.taken.noise:.2%}"
    law = (args.metric, law_text(fit.law), span(fit.span("exponent"), ".4f"), str(len(fit.used)), scatter)
    head = ("metric", "law, C in training FLOPs", "exponent, interval", "points", "scatter")
    print_table(f"Law of compute, {fit.level:.0%} intervals", head, [law])
    parts = ("coefficient", "exponent", "irreducible")
    result = {
        "verdict": made.to_json(),
        "metric": args.metric,
        "choices": [_json_of_choice(c) for c in found],
        "used": [p.name for p in fit.used],
        "law": {part: float(getattr(fit.law, part)) for part in parts},
        "intervals": {part: fit.span(part) for part in parts},
        "noise": fit.taken.noise,
        "form": fit.form,
        "bending_p": fit.bending_p,
        "identifiable": not reasons,
        "predictions": [fit.predict(c) for c in args.flops],
    }
    if args.flops:
        rows = [(f"{p['flops']:.3g}", f"{p['beyond']:.3g}x beyond" if p["beyond"] > 1 else "inside", f"{p['score']:.4g}",
                 span(p["interval"], ".4g"), span(p["run_interval"], ".4g")) for p in result["predictions"]]  # fmt: skip
        print_table("Predictions", ("C (FLOPs)", "beyond the data", args.metric, "interval", "of one model"), rows)
    if args.metric != "loss" and sum(not math.isnan(p.loss) for p in best) >= 4:
        c = result["correlation"] = correlate(best)
        rows = [("Pearson, logarithms", f"{c['pearson']:.3f}", span(c["pearson_interval"], ".3f"), str(c["models"]))]
        rows.append(("Spearman", f"{c['spearman']:.3f}", DASH, str(c["models"])))
        print_table(f"Held-out loss with {args.metric}", ("correlation", "value", "interval", "models"), rows)
    if len(runs) < len(used):
        text = f"{len(used)} points are steps of {len(runs)} runs: what a run has in common is not in the intervals"
        warnings.append(text)
    return result, [*reasons, *warnings, *fit.warnings, *filter(None, [fit.doubt(args.flops)])]


def _say(lines: list[str]) -> None:
    """A verdict, before all else."""
    for line in lines:
        print(one_line(line))
    print()


def _check_lower(metric: str, points: list[Point] | tuple = ()) -> None:
    if higher_is_better(metric, points):
        raise UsageError(
            f"--metric: found {metric}, expected one of which less is better; of a share such as precision give 1-NAME"
        )


def _runs(path: str, name: str, args, warnings: list) -> list:
    """What one side of a comparison goes through: runs, or each model's best sampling as a run whose loss is its score."""
    if args.metric == "loss":
        runs = training_flops(load_runs([path], curves=args.curves, columns=parse_names(args.column), where=args.where))
        check_units(runs)
        return runs
    points = _points(args, path)
    _check_lower(args.metric, points)
    found, said = _chosen(points, args)
    warnings += [f"{name}: {text}" for text in said]
    return [c.best.run() for c in found]


def _ladder(runs: list, name: str, args, warnings: list) -> ladders.Ladder:
    """One side of a comparison."""
    if args.through == "best":
        kept = [Point(r.name, r.loss, r.loss_se, train=r.flops, protocol=r.protocol, source=r.source) for r in runs]
        fit = fit_metric(best_of_budgets(kept), form=args.law, resamples=args.resamples, seed=args.seed)
        ladder = replace(ladders.ladder_of_metric(name, fit), reasons=tuple(doubts(fit, args.metric)))
        if fit.undecided:
            warnings.append(f"{name}: the points do not tell whether the {args.metric} has a floor; --law chooses")
    else:
        fit = fit_one(runs, args.method, **options_of(args, args.method))
        if not math.isfinite(fit.laws["L_opt"].exponent):
            raise UsageError(f"RUNS: {fit.reasons[0]}")
        ladder = ladders.ladder_of_fit(name, fit)
    warnings += [f"{name}: {text}" for text in dict.fromkeys((*ladder.reasons, *fit.warnings))]
    return ladder


def _side(side: str, path: str, name: str, args, warnings: list) -> tuple:
    """(runs, their ladder) of a side, with its own columns and choices; a message about runs says which side's they are."""
    own = {option: getattr(args, option) + getattr(args, f"{side}_{option}") for option in ("column", "where")}
    args = Namespace(**vars(args) | own)
    try:
        runs = _runs(path, name, args, warnings)
        return runs, _ladder(runs, name, args, warnings)
    except UsageError as error:
        raise UsageError(re.sub(r"^RUNS: ", f"{path}: ", str(error))) from None


def _without_ends(sides: list, c: dict, args) -> dict:
    """What was left out -> the comparison of the rest: the smallest and the largest budget of each side."""
    args, found = Namespace(**vars(args) | {"resamples": 0}), {}
    for i, (runs, ladder) in enumerate(sides):
        for what, some in ends(runs):
            pair, gone = [one for _, one in sides], {id(r) for r in some}
            try:
                pair[i] = _ladder([r for r in runs if id(r) not in gone], ladder.name, args, [])
                found[f"{what} of {ladder.name}"] = ladders.compare(*pair, form=c["form"], at=c["common"])
            except UsageError:
                continue
    return found


def run_compare(args) -> tuple[dict, list]:
    """Compare two ladders by their laws: which falls faster with compute, and from what compute on it is lower."""
    _check_lower(args.metric)
    names = [base(p) for p in (args.runs_a, args.runs_b)]
    names = names if names[0] != names[1] else [args.runs_a, args.runs_b]
    names = names if names[0] != names[1] else [f"{base(args.runs_a)} ({side})" for side in "AB"]
    warnings: list = []
    sides = zip("ab", (args.runs_a, args.runs_b), names, strict=True)
    sides = [_side(side, path, name, args, warnings) for side, path, name in sides]
    a, b = (ladder for _, ladder in sides)
    c = ladders.compare(a, b, form=args.law)
    made = answers.of_comparison(a, b, c, args.metric, _without_ends(sides, c, args))
    _say(answers.plain(made))
    rows = [(d["law"], f"{d['a']:.4f}", span(d["a_interval"], ".4f"), f"{d['b']:.4f}", span(d["b_interval"], ".4f"),
             f"{d['difference']:+.4f}", span(d["interval"], "+.4f")) for d in c["exponents"]]  # fmt: skip
    head = ("exponent of", "A", "interval", "B", "interval", "B - A", "interval")
    print_table(
        f"A = {c['a']}, B = {c['b']}; {c['form']} law of the {args.metric}, {c['level']:.0%} intervals", head, rows
    )
    c |= {"verdict": made.to_json(), "identifiable": {"a": not a.reasons, "b": not b.reasons}}
    c |= {"metric": args.metric, "convention": str(of_record(a.protocol)) if a.protocol else None}  # a CSV does not say
    return c, [*warnings, *c["warnings"]]


def run_frontier(args) -> tuple[dict, list]:
    """Find the Pareto front of cost and score, the best model at each cost, and where a smaller model stops winning."""
    points = _points(args, args.runs, sampled=args.cost == "flops", fitted=False)
    fit = fit_frontier(points, args.metric, unit=args.cost, resamples=args.resamples, seed=args.seed)
    made = answers.of_frontier(fit)
    _say(answers.plain(made))
    served = serve(points, args.images_served) if args.images_served else []
    best = front(served, fit.higher) if served else []
    best_at = [dict(zip(("cost", "model", "score", "share"), (c, *fit.best(c)), strict=True)) for c in args.at]
    _print_frontier(fit, best_at)
    result = {
        "verdict": made.to_json(),
        "metric": fit.metric,
        "cost": fit.unit,
        "front": [_json_of(p) | {"share": s} for p, s in zip(fit.front, fit.front_shares, strict=True)],
        "winners": [vars(w) for w in fit.winners],
        "handovers": [vars(h) for h in fit.handovers],
        "best_at": best_at,
        "choices": [_json_of_choice(c) for c in fit.choices],
    }
    if served:
        result["totals"] = [_json_of(s.point) | {"total": s.total, "sampling_share": s.sampling_share} for s in best]
        rows = [(s.point.name, s.point.sampling or DASH, f"{all_training(s.point):.3g}", f"{s.total:.3g}", f"{s.sampling_share:.1%}",
                 f"{s.point.score:.4g}") for s in best]  # fmt: skip
        head = ("model", "sampling", "training FLOPs", "total FLOPs", "for sampling", fit.metric)
        print_table(f"Training and {args.images_served:g} images", head, rows)
    if args.out:
        from dit_jax.scaling.report import axes, figures

        axes.save(figures.frontier(fit, points, served, best), args.out)
        print(args.out)
    return result, list(fit.warnings)


def _percent(share: float) -> str:
    return DASH if math.isnan(share) else f"{share:.0%}"


def _print_frontier(fit: Frontier, best_at: list) -> None:
    unit = UNITS[fit.unit]
    rows = [(p.name, p.sampling or DASH, f"{getattr(p, fit.unit):.4g}", f"{p.score:.4g}", _percent(s))
            for p, s in zip(fit.front, fit.front_shares, strict=True)]  # fmt: skip
    print_table("Pareto front", ("model", "sampling", unit, fit.metric, "share of resamples"), rows)
    rows = [(w.model, f"{w.low:.3g}", f"{w.high:.3g}", _percent(w.share)) for w in fit.winners]
    print_table("Best model at each cost", ("model", f"from ({unit})", "to", "share of resamples"), rows)
    rows = [(h.model, h.then, "at or below " * h.censored + f"{h.cost:.4g}", answers.reach(h.interval, "", "never within the data"))
            for h in fit.handovers]  # fmt: skip
    if rows:
        head = ("model", "stops winning to", f"at ({unit})", f"{fit.level:.0%} interval")
        print_table("Where a model stops winning", head, rows)
    rows = [(f"{b['cost']:.4g}", b["model"] or "none is this cheap", f"{b['score']:.4g}" if b["model"] else DASH,
             _percent(b["share"])) for b in best_at]  # fmt: skip
    if rows:
        print_table(f"Best model at {unit}", ("cost", "model", fit.metric, "share of resamples"), rows)


COMMANDS = {"metric": run_metric, "compare": run_compare, "frontier": run_frontier}
