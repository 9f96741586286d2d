"""The command `plan`: its budgets in FLOPs or chip-hours, its tables and its JSON."""

import dataclasses
import functools
import math
from collections.abc import Sequence

from dit_jax import flops
from dit_jax.error import UsageError
from dit_jax.scaling.fits.fit import Fit, predict
from dit_jax.scaling.options import chip_rate
from dit_jax.scaling.plans.design import Proposal, next_cells
from dit_jax.scaling.plans.family import DIT, sized
from dit_jax.scaling.plans.overhead import Off
from dit_jax.scaling.plans.plan import require_sizes
from dit_jax.scaling.plans.recipe import count_of, counted_flops, make_recipe, outside
from dit_jax.scaling.plans.serving import Served, data_of, serve
from dit_jax.scaling.plans.settings import Settings, settings
from dit_jax.scaling.report.text import DASH, far, finite, print_table, span, written
from dit_jax.scaling.runs import Run

HOUR = 3600.0
SIZES = (500.0, 1e15)  # parameters: an N_opt outside these is in other units
CELL_HEAD = ("cell", "C (FLOPs)", "N", "over N_opt", "images", "steps")
OFF_HEAD = ("size", "N", "loss", "over the best", "interval", "compute to make up", "interval")
SERVED_HEAD = ("", "N", "data", "training FLOPs", "total FLOPs", "loss")


def run(args, runs: Sequence[Run], fit: Fit) -> dict:
    """Print what to train for each budget of `args`, and return it as JSON.

    Raises UsageError if the fit has no law of N_opt, or an N_opt that can only be in other units.
    """
    require_sizes(fit)
    given = settings(runs, args.config, args.model, args.image_size, args.batch)
    given = dataclasses.replace(given, family=DIT) if args.family == "dit" else given
    budgets = [(c, False) for c in args.flops] + [(h * HOUR * chip_rate(args)[1], True) for h in args.chip_hours]
    for c in (min(r.flops for r in fit.runs), fit.largest, *(c for c, _ in budgets)):
        _check_units(fit, c)
    served = _served(args, fit, given, runs) if args.images_served else []
    stated = [r.images * r.unique / r.tokens for r in runs if r.unique == r.unique]
    unique = args.unique_images or max(stated, default=math.nan)
    make = functools.partial(make_recipe, fit, given=given, runs=runs, unique=unique)
    recipes = [make(s.train, size=s.n) for s in served] or [make(c, exact=exact) for c, exact in budgets]
    proposal = _proposal(args, fit, runs, recipes[0]["flops"], given)
    print(f"Settings of {given.source}. Family {given.family}.")
    out = {"settings": given.source, "family": str(given.family), "plans": []}
    for i, r in enumerate(recipes):
        said = {"model": dataclasses.asdict(r["model"]), "off": [dataclasses.asdict(o) for o in r["off"]]}
        said |= {"hardware": _where(r, args)} if args.topology else {}
        said |= {"serving": _print_served(served[i], args, given, fit)} if served else {}
        out["plans"].append(r | said)
        _print_recipe(r, args, runs, fit)
    if isinstance(proposal, Proposal):
        out["next"] = _print_cells(proposal, fit, recipes[0], given, runs)
    elif proposal:
        print(f"Next cells: {proposal}")
    return finite(out)


def _check_units(fit: Fit, c: float) -> None:
    """Raise UsageError if N_opt at `c` FLOPs is no size of a model."""
    n = predict(fit, c)["N_opt"]
    if not SIZES[0] <= n <= SIZES[1]:
        why = "".join(f"; nor is the law identified: {reason}" for reason in fit.reasons[:1])
        raise UsageError(
            f"RUNS: N_opt is {n:.3g} parameters at {c:.3g} FLOPs, expected {SIZES[0]:g} to {SIZES[1]:g}: params, flops or the budget are "
            f"in other units; give the factor, as --column 'params=1e6*NAME' for millions, likewise of tokens and flops{why}"
        )


def _sampling(args, given: Settings) -> tuple:
    """(model evaluations of one image without guidance, the guidance)."""
    sample = given.config.sample if given.config else None
    steps = args.sampling_steps or (sample.steps if sample else 250)
    return steps, (sample.guidance if sample else 1.0) if args.guidance is None else args.guidance


def _served(args, fit: Fit, given: Settings, runs: Sequence[Run]) -> list[Served]:
    """The joint optimum for each total of --flops and for each --target_loss."""
    tokens = given.model.tokens if runs[0].convention.data == "tokens" else 1
    data = data_of(args.images_served, *_sampling(args, given), tokens)
    return [serve(fit, data, total=c) for c in args.flops] + [serve(fit, data, loss=x) for x in args.target_loss]


def _print_served(s: Served, args, given: Settings, fit: Fit) -> dict:
    """Print the joint optimum beside the model that is best to train; return it as JSON."""
    steps, guidance = _sampling(args, given)
    fixed = s.total_interval[0] == s.total_interval[1]  # the total was asked for, not the loss
    ours = (f"{s.n:.4g} ({span(s.n_interval)})", f"{s.d:.4g}", f"{s.train:.4g}",
            f"{s.total:.4g}" + f" ({span(s.total_interval)})" * (not fixed),
            f"{s.loss:.4f}" + f" ({span(s.loss_interval, '.4f')})" * fixed)  # fmt: skip
    plain = (f"{v:.4g}" for v in (s.plain_n, s.plain_train / fit.k / s.plain_n, s.plain_train, s.plain_total))
    rows = [("training and sampling", *ours), ("training alone", *plain, f"{s.plain_loss:.4f}")]
    title = f"Best model for {args.images_served:g} images of {steps} steps at guidance {guidance:g}, {fit.level:.0%} intervals"
    print_table(title, SERVED_HEAD, rows)
    off, warnings = math.exp(abs(math.log(s.n / float(fit.laws["N_opt"](s.train))))), []
    if s.reach > 1:
        text = f"the best size is {off:.3g} times off N_opt of its training, farther than RUNS reach; compare --method=varpro"
        warnings.append(text)
        print(f"Note: {text}.")
    said = {"images": args.images_served, "steps": steps, "guidance": guidance, "warnings": warnings}
    return dataclasses.asdict(s) | said | {"sampling_share": 1 - s.train / s.total}


def _proposal(args, fit: Fit, runs: Sequence[Run], target: float, given: Settings) -> Proposal | str:
    """The next cells, or in words why there are none. What was asked for and cannot be is an error."""
    limit = sum(r.flops for r in runs) if args.next_flops is None else args.next_flops
    count = count_of(runs[0].convention)
    real = functools.cache(lambda params: float(count(sized(given.family, params, given.model, count))))
    if not limit or not args.next_cells:
        return ""
    try:
        return next_cells(fit, runs, target, limit, args.next_cells, real)
    except UsageError as error:
        if args.next_flops is not None:
            raise
        return str(error).removeprefix("--next_flops: ")


def _print_recipe(r: dict, args, runs: Sequence[Run], fit: Fit) -> None:
    convention, m, level = runs[0].convention, r["model"], f"{fit.level:.0%}"
    data = r["tokens"] if convention.data == "tokens" else r["images"]
    far, size = _far(r["beyond"], "budget"), _far(r["n"] / max(run.params for run in runs), "size")
    shape = f"width {m.width}, depth {m.depth}, {m.heads} head(s) of {m.width // m.heads}, patch {m.patch}"
    counts = f"{r['params_active']:,} active of {r['params']:,} trainable"
    rows = [
        ("C", f"{r['flops']:.4g}", f"FLOPs, {convention.counted}: {far}"),
        ("of the run", f"{r['flops_train']:.4g}", "FLOPs, exact" + _hours(r, args)),
        ("N_opt", f"{r['n_opt']:.4g}", f"{convention.params} parameters, {level} {span(r['n_interval'])}"),
        ("D_opt", f"{r['d_opt']:.4g}", f"{convention.data}, {level} {span(r['d_interval'])}"),
        ("model", r["name"], shape),
        ("N", f"{r['n']:,.0f}", f"{r['over']:.3f} x N_opt, {size}; {counts}"),
        ("D", f"{data:.4g}", f"{convention.data}, {data / r['n']:.3g} a parameter; {r['images']:,} images of {m.tokens} tokens"),
        ("steps", f"{r['steps']:,}", f"of {r['batch']} images"),
        ("epochs", written(r["epochs"], ".3g"), f"of different images; that they repeat raises the loss by {r['repetition']:.3g}"),
        ("loss", written(r["loss"], ".4f"), f"expected of this run, {level} {span(r['loss_interval'], '.4f')}, its noise included"),
    ]  # fmt: skip
    print(f"\nPlan for {r['flops']:.3g} FLOPs")
    for name, value, text in rows:
        if name != "epochs" or value != DASH:
            print(f"  {name:<11} {value:>14}  {text}")
    print()
    print_table("What a wrong size costs, at the same compute", OFF_HEAD, [_off_row(o) for o in r["off"]])
    half, twice = r["off"]
    known = "not known" if math.isnan(half.rise) else "read from"
    print(f"The cost at {half.factor:g} and {twice.factor:g} x N_opt is {known}: {half.source}.")
    for text in (*(f"Assumed: {t}." for t in r["assumptions"]), *(f"Note: {t}." for t in r["warnings"])):
        print(text)
    print(f"\n  {r['command']}\n")


def _far(ratio: float, what: str) -> str:
    return (
        f"{far(ratio).removesuffix(' beyond')} beyond the largest {what} fitted"
        if ratio > 1
        else f"inside the {what}s fitted"
    )


def _off_row(o: Off) -> tuple:
    size = (f"{o.factor:g} x N_opt", f"{o.params:.4g}")
    if math.isnan(o.rise):
        return (*size, *(DASH,) * 5)
    times = DASH if math.isnan(o.compute_interval[0]) else "x " + span(o.compute_interval)
    return (*size, f"{o.loss:.4f}", f"{o.rise:+.3g}", span(o.rise_interval, "+.3g"), f"{o.compute:.3g}x", times)


def _hours(r: dict, args) -> str:
    if not args.topology:
        return ""
    w = _where(r, args)
    uneven = "" if r["batch"] % w["devices"] == 0 else f"; a batch of {r['batch']} does not divide over them"
    return (
        f": {w['chip_hours']:.4g} chip-hours at an assumed MFU of {args.mfu:g} in {args.dtype}, {w['hours']:.4g} hours on {args.topology}: "
        f"{w['chips']} chips, which JAX counts as {w['devices']} devices{uneven}"
    )


def _where(r: dict, args) -> dict:
    """Time on a slice, in hours."""
    found, rate = chip_rate(args)
    hours = r["flops_train"] / rate / HOUR
    where = {"topology": args.topology, "chips": found.chips, "devices": found.devices, "hosts": found.hosts}
    where |= {"mfu": args.mfu, "dtype": args.dtype, "peak_chip": rate / args.mfu, "chip_hours": hours}
    return where | {"device_hours": hours * found.chip.devices, "hours": hours / found.chips}


def _print_cells(proposal: Proposal, fit: Fit, r: dict, given: Settings, runs: Sequence[Run]) -> dict:
    """Print the cells as models that can be built, with their lengths; return them as JSON."""
    convention, rows, cells = runs[0].convention, [], []
    count = count_of(convention)
    for cell in proposal.cells:
        model = sized(given.family, cell.params, given.model, count)
        steps = max(round(cell.flops / counted_flops(convention, model, given.batch)), 1)
        c = {
            "flops": cell.flops,
            "params": cell.params,
            "steps": steps,
            "batch": given.batch,
            "images": steps * given.batch,
        }
        c |= {name: getattr(model, name) for name in ("width", "depth", "heads")}
        cells.append(c | {"flops_train": float(flops.train_flops(model, c["images"]))})
        over = cell.params / float(fit.laws["N_opt"](cell.flops))
        size = (
            f"w{model.width}-d{model.depth}-h{model.heads}",
            f"{cell.flops:.3g}",
            f"{cell.params:.4g}",
            f"{over:.2f}x",
        )
        rows.append((*size, f"{c['images']:,}", f"{steps:,}"))
    print_table(f"Runs to train next, to know N_opt at {proposal.target:.3g} FLOPs better", CELL_HEAD, rows)
    ratio, (low, high), text = proposal.after / proposal.before, r["n_interval"], ""
    if low > 0:
        ends = tuple(r["n_opt"] * (end / r["n_opt"]) ** ratio for end in (low, high))
        text = f": {span((low, high))} would become about {span(ends)}"
    print(
        f"Together {proposal.cost:.3g} of at most {proposal.limit:.3g} FLOPs; the interval of N_opt would be {ratio:.2f} times as wide in "
        f"log N{text}. This counts the noise of runs and the scatter between budgets; it cannot know of a law that bends.\n"
    )
    warnings = []
    if cells:
        deepest = dataclasses.replace(given.model, depth=max(c["depth"] for c in cells))
        warnings = outside(deepest, max(c["steps"] for c in cells), given, count)
    for warning in warnings:
        print(f"Note: of these runs, {warning}.")
    return dataclasses.asdict(proposal) | {"cells": cells, "warnings": warnings}
