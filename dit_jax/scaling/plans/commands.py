"""The command `plan`: its budgets in FLOPs or chip-hours, its tables and its JSON."""

import dataclasses
import functools
import math
from collections.abc import Sequence

from dit_jax import flops
from dit_jax.error import UsageError
from dit_jax.scaling.fits.fit import Fit, predict
from dit_jax.scaling.options import MODEL, chip_rate
from dit_jax.scaling.plans.design import Proposal, next_cells
from dit_jax.scaling.plans.family import DIT, sized
from dit_jax.scaling.plans.overhead import Off
from dit_jax.scaling.plans.plan import require_sizes
from dit_jax.scaling.plans.recipe import Recipe, count_of, counted_flops, make_recipe, outside
from dit_jax.scaling.plans.serving import Served, data_of, serve
from dit_jax.scaling.plans.settings import Settings, settings
from dit_jax.scaling.report.text import DASH, finite, print_table, span
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
    changes = {name: getattr(args, name) for name in (*MODEL, "conditioning") if getattr(args, name)}
    given = settings(runs, args.config, args.model, changes, args.batch)
    given = dataclasses.replace(given, family=DIT) if args.family == "dit" else given
    budgets = [(c, False) for c in args.flops] + [(h * HOUR * chip_rate(args)[1], True) for h in args.chip_hours]
    for c in (min(r.flops for r in fit.runs), fit.largest, *(c for c, _ in budgets)):
        _check_units(fit, c)
    served = _served(args, fit, given, runs)
    unique = args.unique_images or max(
        (r.images * r.unique / r.tokens for r in runs if r.unique == r.unique), default=math.nan
    )
    make = functools.partial(make_recipe, fit, given=given, runs=runs, unique=unique)
    recipes = [make(s.train, size=s.n) for s in served] or [make(c, exact=exact) for c, exact in budgets]
    proposal, models = _proposal(args, fit, runs, recipes[0].flops, given)
    print(f"Settings of {given.source}. Family {given.family}.")
    out = {"settings": given.source, "family": str(given.family), "plans": [_json_of(r, args) for r in recipes]}
    for s, plan in zip(served, out["plans"], strict=bool(served)) if served else ():
        plan["serving"] = dataclasses.asdict(s) | _print_served(s, args, given, fit)
    for recipe in recipes:
        _print_recipe(recipe, args, runs, fit)
    if isinstance(proposal, Proposal):
        models = {cell.params: models[cell.params] for cell in proposal.cells}
        cells = [_built(cell, models[cell.params], given, runs) for cell in proposal.cells]
        _print_cells(proposal, cells, fit, recipes[0])
        deepest, longest = max(models.values(), key=lambda m: m.depth), max(c["steps"] for c in cells)
        far = outside(deepest, longest, given, count_of(runs[0].convention))
        out["next"] = dataclasses.asdict(proposal) | {"cells": cells, "warnings": far}
        for text in far:
            print(f"Note: of these runs, {text}.")
    elif proposal:
        print(f"Next cells: {proposal}")
    return finite(out)


def _check_units(fit: Fit, c: float) -> None:
    """Raise UsageError if N_opt at `c` FLOPs is no size of a model."""
    n, sizes = predict(fit, c)["N_opt"], [r.params for r in fit.runs]
    if not SIZES[0] <= n <= SIZES[1]:
        why = "".join(f"; nor is the law identified: {reason}" for reason in fit.reasons[:1])
        raise UsageError(
            f"RUNS: N_opt is {n:.3g} parameters at {c:.3g} FLOPs, expected {SIZES[0]:g} to {SIZES[1]:g}: params ({min(sizes):.4g} to "
            f"{max(sizes):.4g} in RUNS), flops or the budget are in other units; give the factor with the column, such as "
            f"--column 'params=1e6*NAME' for millions, and tokens and flops likewise{why}"
        )


def _sampling(args, given: Settings) -> tuple:
    """(model evaluations of one image without guidance, the guidance)."""
    sample = given.config.sample if given.config else None
    steps = args.sampling_steps or (sample.steps if sample else 250)
    return steps, (sample.guidance if sample else 1.0) if args.guidance is None else args.guidance


def _served(args, fit: Fit, given: Settings, runs: Sequence[Run]) -> list[Served]:
    """The joint optimum for each total of --flops and for each --target_loss; () without --images_served."""
    if not args.images_served:
        return []
    tokens = given.model.tokens if runs[0].convention.data == "tokens" else 1
    data = data_of(args.images_served, *_sampling(args, given), tokens)
    return [serve(fit, data, total=c) for c in args.flops] + [serve(fit, data, loss=x) for x in args.target_loss]


def _print_served(s: Served, args, given: Settings, fit: Fit) -> dict:
    """Print the joint optimum beside the model that is best to train; what the JSON says of the sampling."""
    steps, guidance = _sampling(args, given)
    ours = (f"{s.n:.4g} ({span(s.n_interval)})", f"{s.d:.4g}", f"{s.train:.4g}",
            f"{s.total:.4g}" + f" ({span(s.total_interval)})" * bool(s.total_interval[1] > s.total_interval[0]),
            f"{s.loss:.4f}" + f" ({span(s.loss_interval, '.4f')})" * (s.total_interval[0] == s.total_interval[1]))  # fmt: skip
    plain = (
        f"{s.plain_n:.4g}",
        f"{s.plain_train / fit.k / s.plain_n:.4g}",
        f"{s.plain_train:.4g}",
        f"{s.plain_total:.4g}",
    )
    rows = [("training and sampling", *ours), ("training alone", *plain, f"{s.plain_loss:.4f}")]
    title = f"Best model for {args.images_served:g} images of {steps} steps at guidance {guidance:g}, {fit.level:.0%} intervals"
    print_table(title, SERVED_HEAD, rows)
    text = f"the best size is {math.exp(abs(math.log(s.n / float(fit.laws['N_opt'](s.train))))):.3g} times off N_opt of its training"
    warnings = [f"{text}, farther than RUNS reach; compare --method=varpro"] if s.reach > 1 else []
    for warning in warnings:
        print(f"Note: {warning}.")
    said = {"images": args.images_served, "steps": steps, "guidance": guidance, "warnings": warnings}
    return said | {"sampling_share": 1 - s.train / s.total}


def _proposal(args, fit: Fit, runs: Sequence[Run], target: float, given: Settings) -> tuple:
    """(the next cells, or in words why there are none, N -> the model of that size). What was asked for and cannot be is an error."""
    limit = sum(r.flops for r in runs) if args.next_flops is None else args.next_flops
    count, models = count_of(runs[0].convention), {}

    @functools.cache
    def real(params: float) -> float:
        model = sized(given.family, params, given.model, count)
        models[float(count(model))] = model
        return float(count(model))

    if not limit or not args.next_cells:
        return "", models
    try:
        return next_cells(fit, runs, target, limit, args.next_cells, real), models
    except UsageError as error:
        if args.next_flops is not None:
            raise
        return str(error).removeprefix("--next_flops: "), models


def _print_recipe(recipe: Recipe, args, runs: Sequence[Run], fit: Fit) -> None:
    convention, m = runs[0].convention, recipe.model
    level, data = f"{fit.level:.0%}", recipe.tokens if convention.data == "tokens" else recipe.images
    far, size = _far(recipe.beyond, "budget"), _far(recipe.n / max(r.params for r in runs), "size")
    loss = DASH if math.isnan(recipe.loss) else f"{recipe.loss:.4f}"
    repeated = f"of different images; that data repeat raises the loss by {recipe.repetition:.3g}"
    rows = [
        ("C", f"{recipe.flops:.4g}", f"FLOPs, {convention.counted}: {far}"),
        ("of the run", f"{recipe.flops_train:.4g}", "FLOPs, exact" + _hours(recipe, args)),
        ("N_opt", f"{recipe.n_opt:.4g}", f"{convention.params} parameters, {level} {span(recipe.n_interval)}"),
        ("D_opt", f"{recipe.d_opt:.4g}", f"{convention.data}, {level} {span(recipe.d_interval)}"),
        ("model", recipe.name, f"width {m.width}, depth {m.depth}, {m.heads} head(s) of {m.width // m.heads}, patch {m.patch}"),
        ("N", f"{recipe.n:,.0f}", f"{recipe.over:.3f} x N_opt, {size}; {recipe.params_active:,} active of {recipe.params:,} trainable"),
        ("D", f"{data:.4g}", f"{convention.data}, {data / recipe.n:.3g} a parameter; {recipe.images:,} images of {m.tokens} tokens"),
        ("steps", f"{recipe.steps:,}", f"of {recipe.batch} images"),
        *((("epochs", f"{recipe.epochs:.3g}", repeated),) if recipe.epochs == recipe.epochs else ()),
        ("loss", loss, f"expected of this run, {level} {span(recipe.loss_interval, '.4f')}, its noise included"),
    ]  # fmt: skip
    print(f"\nPlan for {recipe.flops:.3g} FLOPs")
    for name, value, text in rows:
        print(f"  {name:<11} {value:>14}  {text}")
    print()
    print_table("What a wrong size costs, at the same compute", OFF_HEAD, [_off_row(o) for o in recipe.off])
    known, factors = (
        "not known" if math.isnan(recipe.off[0].rise) else "read from",
        [f"{o.factor:g}" for o in recipe.off],
    )
    print(f"The cost at {' and '.join(factors)} x N_opt is {known}: {recipe.off[0].source}.")
    for text in recipe.assumptions:
        print(f"Assumed: {text}.")
    for warning in recipe.warnings:
        print(f"Note: {warning}.")
    print(f"\n  {recipe.command}\n")


def _far(ratio: float, what: str) -> str:
    if ratio <= 1:
        return f"inside the {what}s fitted"
    return f"{ratio:{'.1f' if ratio < 1000 else '.3g'}}x beyond the largest {what} fitted"


def _off_row(o: Off) -> tuple:
    size = (f"{o.factor:g} x N_opt", f"{o.params:.4g}")
    if math.isnan(o.rise):
        return (*size, *(DASH,) * 5)
    times = DASH if math.isnan(o.compute_interval[0]) else "x " + span(o.compute_interval)
    return (*size, f"{o.loss:.4f}", f"{o.rise:+.3g}", span(o.rise_interval, "+.3g"), f"{o.compute:.3g}x", times)


def _hours(recipe: Recipe, args) -> str:
    if not args.topology:
        return ""
    w = _where(recipe, args)
    uneven = "" if recipe.batch % w["devices"] == 0 else f"; a batch of {recipe.batch} does not divide over them"
    return (
        f": {w['chip_hours']:.4g} chip-hours at an assumed MFU of {args.mfu:g} in {args.dtype}, {w['hours']:.4g} hours on {args.topology}: "
        f"{w['chips']} chips, which JAX counts as {w['devices']} devices{uneven}"
    )


def _where(recipe: Recipe, args) -> dict:
    """Time on a slice, in hours."""
    found, rate = chip_rate(args)
    hours = recipe.flops_train / rate / HOUR
    where = {"topology": args.topology, "chips": found.chips, "devices": found.devices, "hosts": found.hosts}
    where |= {"mfu": args.mfu, "dtype": args.dtype, "peak_chip": rate / args.mfu, "chip_hours": hours}
    return where | {"device_hours": hours * found.chip.devices, "hours": hours / found.chips}


def _json_of(recipe: Recipe, args) -> dict:
    out = dataclasses.asdict(recipe) | {"name": recipe.name, "over": recipe.over}
    return out | ({"hardware": _where(recipe, args)} if args.topology else {})


def _built(cell, model, given: Settings, runs: Sequence[Run]) -> dict:
    """A cell as a model that can be built, and its length."""
    steps = max(round(cell.flops / counted_flops(runs[0].convention, model, given.batch)), 1)
    images = steps * given.batch
    out = {"flops": cell.flops, "flops_train": float(flops.train_flops(model, images)), "params": cell.params}
    out |= {name: getattr(model, name) for name in ("width", "depth", "heads")}
    return out | {"steps": steps, "batch": given.batch, "images": images}


def _print_cells(proposal: Proposal, cells: list[dict], fit: Fit, recipe: Recipe) -> None:
    rows = []
    for c in cells:
        name, over = f"w{c['width']}-d{c['depth']}-h{c['heads']}", c["params"] / float(fit.laws["N_opt"](c["flops"]))
        size = (f"{c['flops']:.3g}", f"{c['params']:.4g}", f"{over:.2f}x")
        rows.append((name, *size, f"{c['images']:,}", f"{c['steps']:,}"))
    print_table(f"Runs to train next, to know N_opt at {proposal.target:.3g} FLOPs better", CELL_HEAD, rows)
    ratio, (low, high), text = proposal.after / proposal.before, recipe.n_interval, ""
    if low > 0:
        ends = tuple(recipe.n_opt * (end / recipe.n_opt) ** ratio for end in (low, high))
        text = f": {span((low, high))} would become about {span(ends)}"
    print(
        f"Together {proposal.cost:.3g} of at most {proposal.limit:.3g} FLOPs; the interval of N_opt would be {ratio:.2f} times as wide in "
        f"log N{text}. This counts the noise of runs and the scatter between budgets; it cannot know of a law that bends.\n"
    )
