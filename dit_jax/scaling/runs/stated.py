"""What a table of runs states of its convention: by options of the command, by columns, or by the numbers themselves."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dit_jax.error import UsageError
from dit_jax.scaling.runs.conventions import CHOICES, Convention, word

COLUMNS = {  # of a CSV -> field of a Convention
    "counted": "counted",
    "unit": "unit",
    "pass": "passes",
    "params_kind": "params",
    "data_kind": "data",
    "loss_kind": "loss",
}
SAME = 1e-3  # flops this near to 6 x params x tokens, in all rows, are these
ALIKE = 0.05  # ... are these where they are said to be: those of whole steps, or of a budget


def options_of(args) -> dict:
    """Field of a Convention -> what the command says of it. Raises UsageError on a word that is unknown."""
    if args.tokens_per_image <= 0 or math.isinf(args.tokens_per_image):
        raise UsageError(f"--tokens_per_image: found {args.tokens_per_image:g}, expected a number above 0")
    flags = {name: {"passes": "pass", "loss": "loss_kind"}.get(name, name) for name in CHOICES}
    given = {name: getattr(args, "loss_kind" if name == "loss" else name) for name in flags}
    return {name: word(name, value, f"--{flags[name]}") for name, value in given.items() if value is not None}


def of_cells(row: Mapping, where: str) -> dict:
    """Field -> what the columns of a row say of it; a blank cell says nothing."""
    cells = {name: (row.get(column) or "").strip() for column, name in COLUMNS.items()}
    return {name: word(name, cell, where) for name, cell in cells.items() if cell}


def of_table(
    runs: Sequence, cells: Sequence[dict], columns: Sequence[tuple], options: Mapping, per_image: float | int = math.nan
) -> list:
    """The runs of one table, with their convention.

    `cells` is what each row says of it, `options` what the command says, `columns` which of "tokens" and "flops" a row has. Rows
    without flops get 6 x params x tokens, with `per_image` tokens an image where D counts images; tokens out of flops are checked to
    be those of 6ND. Raises UsageError, naming the field, where rows or options contradict each other or the numbers.
    """
    said, given = _agreed(runs, cells, options), ["flops" in names for names in columns]
    derived = [run for run, names in zip(runs, columns, strict=True) if "tokens" not in names]
    if derived:
        _check_derived(derived[0], said)
    images = said.get("data") == "images"
    if images and math.isnan(per_image) and not all(given):
        raise UsageError(f"{runs[0].source}: D is in images and flops is absent; give flops, or --tokens_per_image")
    simple = [6 * run.params * run.tokens * (per_image if images else 1) for run in runs]
    counted = _counted(runs, given, simple, said)
    assumed = [name for name in CHOICES if name not in said and name != "counted"]
    if derived and "counted" not in said:
        assumed = ["counted", *assumed]
    if counted == "6ND":
        assumed = [name for name in assumed if name not in ("unit", "passes")]  # by definition
    convention = Convention(**{"counted": counted, **said}, assumed=tuple(assumed))
    return [
        replace(run, flops=run.flops if has else float(c), convention=convention)
        for run, has, c in zip(runs, given, simple, strict=True)
    ]


def _check_derived(run, said: Mapping) -> None:
    """Tokens that are flops / (6 params) go with training FLOPs of 6ND alone."""
    for name, value in {"counted": "6ND", "unit": "FLOPs", "passes": "training", "data": "tokens"}.items():
        if said.get(name, value) != value:
            raise UsageError(
                f"{run.source}: tokens is absent, which makes it flops / (6 params), but {name} is {said[name]!r}; give tokens"
            )


def _agreed(runs: Sequence, cells: Sequence[dict], options: Mapping) -> dict:
    for run, found in zip(runs, cells, strict=True):
        for name in CHOICES:
            a, b = cells[0].get(name), found.get(name)
            if a != b:
                raise UsageError(
                    f"{run.source}: {name} is {b or 'not stated'!r} and {a or 'not stated'!r} in {runs[0].source}; one fit takes one "
                    "convention"
                )
            if name in options and b not in (None, options[name]):
                raise UsageError(f"{run.source}: {name} is {b!r} by its column and {options[name]!r} by the command")
    return {**cells[0], **options}


def _counted(runs: Sequence, given: Sequence[bool], simple: Sequence[float], said: Mapping) -> str:
    """exact | 6ND, as stated if the numbers allow it."""
    plain = said.get("unit", "FLOPs") == "FLOPs" and said.get("passes", "training") == "training"
    off = [
        abs(run.flops / c - 1) > (ALIKE if "counted" in said else SAME)
        for run, has, c in zip(runs, given, simple, strict=True)
        if has and not math.isnan(c)
    ]
    known = len(off) == sum(given)  # D in images may leave 6ND unknown
    counted = said.get("counted") or ("6ND" if known and plain and not any(off) else "exact")
    if counted == "6ND" and any(off):
        raise UsageError(f"{runs[0].source}: counted is '6ND', but flops is not 6 x params x tokens in {sum(off)} rows")
    if counted == "exact" and not all(given):
        row = runs[list(given).index(False)].source
        raise UsageError(
            f"{row}: flops is absent, which makes it 6 x params x tokens, but counted is 'exact' in the other rows or by the "
            "command; one fit takes one convention"
        )
    return counted


def require_stated(runs: Sequence, options: Mapping) -> None:
    """Raises UsageError where the command says of a record what it does not say of itself."""
    for run, (name, value) in itertools.product(runs, options.items()):
        if getattr(run.convention, name) != value:
            raise UsageError(
                f"{run.source}: {name} is {getattr(run.convention, name)!r} by the record, {value!r} by the command; records state "
                "their own convention"
            )
