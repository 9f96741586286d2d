"""What the numbers of a study count, as data: conventions that are compared, refused when they mix, and converted.

Porian et al. 2024 (arXiv 2406.19146): the same runs give exponents that differ by 0.3 when compute or parameters are counted
otherwise. Peebles & Xie 2023 (arXiv 2212.09748) print multiply-adds of one forward pass as "Gflops"; a comparison with training
FLOPs is off by 6. So N, D and C carry what they are. Some conversions are a factor, some need what a run recorded, and some
cannot be: no function turns a smoothed training loss into a held-out one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from dit_jax.config import UsageError
from dit_jax.scaling.law import PowerLaw
from dit_jax.scaling.plan import TRAIN_OVER_FORWARD
from dit_jax.scaling.runs import Run

FLOPS_OVER_MACS = 2
CHOICES = {
    "counted": ("exact", "6ND"),
    "unit": ("FLOPs", "MACs"),
    "passes": ("training", "forward"),
    "params": ("active", "total"),
    "data": ("tokens", "images"),
    "loss": ("held-out, EMA", "held-out, raw", "training, smoothed"),
}
SUSPECT = {  # C / 6ND of every run, and what that looks like
    1 / 2: "multiply-adds (MACs) of training",
    1 / 3: "FLOPs of the forward passes alone",
    1 / 6: "multiply-adds (MACs) of the forward passes alone",
}


@dataclass(frozen=True)
class Convention:
    """How C, N, D and L of a study are counted. The default is that of this project's records.

    `counted` 6ND is 6 x `params` x D in tokens, by definition FLOPs of training. `passes` forward is the same images, forward
    only. `params` active counts per token (an adaLN modulation runs once an image and does not count), total all trainable.
    """

    counted: str = "exact"
    unit: str = "FLOPs"
    passes: str = "training"
    params: str = "active"
    data: str = "tokens"
    loss: str = "held-out, EMA"

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"convention: {name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}")
        if self.counted == "6ND" and (self.unit, self.passes) != ("FLOPs", "training"):
            raise UsageError(f"convention: 6ND is FLOPs of training, found {self.unit} of {self.passes}")

    def __str__(self) -> str:
        return f"C: {self.counted} {self.unit} of {self.passes}; N: {self.params} parameters; D: {self.data}; L: {self.loss}"


def of_record(protocol: dict) -> Convention:
    """The convention of this project's records, from their protocol. Raises UsageError on one that says otherwise."""
    expected = "exact, 2 x MACs, training = 3 x forward"
    if protocol.get("flops", expected) != expected:
        raise UsageError(f"protocol field 'flops' is {protocol['flops']!r}, expected {expected!r}")
    raw = protocol.get("weights") == "params (raw)"
    return Convention(loss="held-out, raw" if raw else "held-out, EMA")


def require_same(ours: Convention, theirs: Convention, what: str = "RUNS") -> None:
    """Raises UsageError naming the first field in which two conventions differ."""
    for field in fields(Convention):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if a != b:
            raise UsageError(
                f"{what}: {field.name} is {b!r} and {a!r}; one fit takes one convention, convert one of them"
            )


def factor(have: Convention, want: Convention) -> float:
    """What C in `have` is multiplied by to be C in `want`, both exact."""
    found = 1.0
    if have.unit != want.unit:
        found *= FLOPS_OVER_MACS if have.unit == "MACs" else 1 / FLOPS_OVER_MACS
    if have.passes != want.passes:
        found *= TRAIN_OVER_FORWARD if have.passes == "forward" else 1 / TRAIN_OVER_FORWARD
    return found


def convert_law(law: PowerLaw, have: Convention, want: Convention) -> PowerLaw:
    """A law of C in `have` as a law of C in `want`: the exponent stays, k becomes k factor^-x.

    Raises UsageError where more than the unit and the passes of exact C differ: those need the runs, see `convert`.
    """
    if have.counted != "exact" or replace(have, unit=want.unit, passes=want.passes) != want:
        raise UsageError(
            f"convention: a law converts between units and passes only; found {have} to {want}; convert the runs"
        )
    return replace(law, coefficient=law.coefficient * factor(have, want) ** -np.asarray(law.exponent))


def convert(
    runs: Sequence[Run], have: Convention, want: Convention, tokens_per_image: float | int = math.nan
) -> list[Run]:
    """Runs counted as `have`, counted as `want`: their `params`, `tokens` (D, whatever it counts) and `flops`.

    `tokens_per_image` serves runs that did not record their images. Raises UsageError, naming the run, where a conversion needs what
    was not recorded, and where none exists: exact FLOPs from 6ND, one kind of loss from another.
    """
    if have.loss != want.loss:
        raise UsageError(
            f"convention: the loss is {have.loss!r}, not {want.loss!r}; that cannot be converted, measure it anew"
        )
    if have.counted == "6ND" and want.counted == "exact":
        raise UsageError("convention: 6ND has lost the exact FLOPs; take them from the records or the architecture")
    return [_convert(run, have, want, tokens_per_image) for run in runs]


def _convert(run: Run, have: Convention, want: Convention, per_image: float | int) -> Run:
    params, other = run.params, run.params_total
    if have.params != want.params:
        params, other = _recorded(run.params_total, run, "params_total"), run.params
    tokens = run.tokens
    if have.data != want.data:
        ratio = _tokens_per_image(run, have, per_image)
        tokens = run.tokens * ratio if have.data == "images" else run.tokens / ratio
    flops = run.flops
    if want.counted == "exact":
        flops = run.flops * factor(have, want)
    elif have.counted == "exact" or have.params != want.params:
        ratio = _tokens_per_image(run, have, per_image) if want.data == "images" else 1.0
        flops = 6.0 * params * tokens * ratio
    return replace(run, params=params, params_total=other, tokens=tokens, flops=flops)


def _tokens_per_image(run: Run, have: Convention, per_image: float | int) -> float | int:
    if not math.isnan(per_image):
        return per_image
    if have.data == "images":
        raise UsageError(f"{run.source or run.name}: D is in images; tokens need tokens_per_image")
    return run.tokens / _recorded(run.images, run, "images")


def _recorded(value: float, run: Run, name: str) -> float:
    if math.isnan(value):
        raise UsageError(f"{run.source or run.name}: {name} is not recorded, the conversion needs it")
    return value


def check_units(runs: Sequence[Run], tolerance: float = 0.02) -> None:
    """Raises UsageError where C is, in every run, what MACs or forward passes would be beside N and D: 6ND / 2, / 3 or / 6.

    Exact FLOPs of training lie above 6ND and vary with the size, so they do not meet this by chance.
    """
    ratios = np.array([run.flops / (6 * run.params * run.tokens) for run in runs])
    for expected, what in SUSPECT.items():
        if len(ratios) > 1 and np.all(np.abs(ratios / expected - 1) <= tolerance):
            raise UsageError(
                f"{runs[0].source}: flops is {expected:.3g} x 6 x params x tokens in all {len(runs)} runs, which looks like "
                f"{what}; expected FLOPs of training: multiply it by {round(1 / expected)}"
            )
