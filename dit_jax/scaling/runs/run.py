"""One trained model as a row, and the compute budgets that rows belong to."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from dit_jax.error import UsageError
from dit_jax.log import notice
from dit_jax.scaling.runs.conventions import Convention

ROUNDING = 1e-12  # of a loss: what differs by less differs by how float64 rounds
MOVED = 4  # tolerances by which C is moved
CROWDED = 1.5  # runs in a group over those of moved runs, from which budgets are meant


@dataclass(frozen=True)
class Run:
    """One trained model at its last evaluated step. D is counted in tokens and in images; FLOPs are 2 x MACs."""

    name: str
    params: float  # active per token: the N of the fits
    tokens: float  # D
    flops: float  # training
    loss: float  # held out
    loss_se: float = 0.0  # of the evaluation; 0 = not recorded
    params_total: float = math.nan  # nan = not recorded
    images: float = math.nan  # nan = not recorded
    unique: float = math.nan  # different tokens that the run could see, in the unit of `tokens`; nan = not recorded
    group: str = ""  # budget label; "" = runs are grouped by their FLOPs
    setting: str = ""  # of what a sweep at one size and budget varies, such as its learning rate
    protocol: dict = field(default_factory=dict)
    protocol_id: str = ""
    init: dict = field(default_factory=dict)  # run, step and flops_train of the weights that it began with; {} = none
    metrics: dict = field(default_factory=dict)
    source: str = ""  # file and line, for messages
    convention: Convention = field(default_factory=Convention)


def require_same_start(first, other) -> None:
    """Raises UsageError if one of two runs or points began with the weights of another training and the other did not."""
    if bool(first.init) != bool(other.init):
        a, b = (run.init or "(absent)" for run in (first, other))
        raise UsageError(
            f"{other.source}: init is {b}, but {a} in {first.source}; one fit takes runs that all began with other weights, or all "
            "without: leave the others out"
        )


def tell_start(runs: Sequence) -> None:
    """Log a notice if runs or points began with other weights, because C does not count the training of these."""
    begun = {(run.init["run"], run.init["step"]): run.init["flops_train"] for run in runs if run.init}
    if not begun:
        return
    from_, *more = (f"{name} at step {step}" for name, step in begun)
    known = [cost for cost in begun.values() if cost is not None]
    cost = f"up to {max(known):.3g} FLOPs" if known else "of unknown FLOPs"
    count = sum(bool(run.init) for run in runs)
    notice(
        f"init: {count} of {len(runs)} runs began with other weights ({from_}{f' and {len(more)} more' if more else ''}), whose training "
        f"({cost} a run) is not in flops_train"
    )


def require_varied(runs: Sequence[Run]) -> None:
    """Raises UsageError where the losses of 2 runs or more are all the same, rounding apart."""
    losses = [run.loss for run in runs]
    if len(runs) > 1 and max(losses) - min(losses) <= ROUNDING * max(losses):
        sources = runs[0].source if runs[0].source == runs[-1].source else f"{runs[0].source} to {runs[-1].source}"
        raise UsageError(
            f"{sources or 'RUNS'}: loss is {losses[0]:g} in all {len(runs)} runs, expected losses that differ: no law can be read from "
            "these; check the column, or name another with --column=loss=THEIRS"
        )


def budgets(runs: Iterable[Run], tolerance: float = 0.05) -> list[tuple[str, tuple]]:
    """(label, runs) of each compute budget: runs grouped by label where all have one, else by training FLOPs within `tolerance`."""
    runs, groups = list(runs), {}
    if all(r.group for r in runs):
        for run in runs:
            groups.setdefault(run.group, []).append(run)
        return [(label, tuple(members)) for label, members in groups.items()]
    start, key = -math.inf, ""
    for run in sorted(runs, key=lambda r: r.flops):
        if run.flops > start * (1 + tolerance) or not key:
            start, key = run.flops, f"{run.flops:.3g}"
            while key in groups:
                key += "'"
        groups.setdefault(key, []).append(run)
    return [(label, tuple(members)) for label, members in groups.items()]


def scattered(groups: Sequence[tuple], tolerance: float = 0.05) -> str:
    """Why `groups`, as `budgets` gives them, are no planned budgets, or "".

    Fewer than half of the runs are at budgets of 3 sizes or more; or the groups hold hardly more runs than they would if every C were
    another, by up to MOVED x `tolerance` either way: then they are chance.
    """
    runs = [run for _, members in groups for run in members]
    full = sum(len(members) for _, members in groups if len({r.params for r in members}) >= 3)
    if 2 * full < len(runs):
        return f"the runs share no compute budgets: {full} of {len(runs)} are at a budget of 3 sizes or more"
    if all(run.group for run in runs):
        return ""
    size, chance = len(runs) / len(groups), len(runs) / len(budgets(_moved(runs, MOVED * tolerance), tolerance))
    if size >= CROWDED * chance:
        return ""
    return (
        f"the runs share no compute budgets: groups within {tolerance:.0%} of C hold {size:.1f} runs, and would hold {chance:.1f} if every "
        f"C were up to {MOVED * tolerance:.0%} off"
    )


def _moved(runs: Sequence[Run], most: float) -> list[Run]:
    """The runs with their log C moved evenly between -`most` and `most`, neighbours differently."""
    steps = (i * (math.sqrt(5) - 1) % 2 - 1 for i in range(len(runs)))  # golden ratio: fills an interval evenly
    ordered = sorted(runs, key=lambda run: run.flops)
    return [replace(run, flops=run.flops * math.exp(most * u)) for run, u in zip(ordered, steps, strict=True)]
