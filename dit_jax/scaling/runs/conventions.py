"""What the numbers of a study count, as data: conventions that are compared, refused when they mix, and converted to FLOPs of training.

Porian et al. 2024 (arXiv 2406.19146): the same runs give exponents that differ by 0.3 when compute or parameters are counted
otherwise. Peebles & Xie 2023 (arXiv 2212.09748) print multiply-adds of one forward pass as "Gflops"; a comparison with training
FLOPs is off by 6. So N, D and C carry what they are.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from dit_jax.error import UsageError, shown

FLOPS_OVER_MACS = 2
TRAIN_OVER_FORWARD = 3  # forward, gradient of the inputs, gradient of the weights
CHOICES = {
    "counted": ("exact", "6ND"),
    "unit": ("FLOPs", "MACs"),
    "passes": ("training", "forward"),
    "params": ("active", "total"),
    "data": ("tokens", "images"),
    "loss": ("held-out, EMA", "held-out, raw", "training, smoothed"),
}
SHORT = {  # how options and columns may say it too
    "passes": {"train": "training"},
    "loss": {"ema": "held-out, EMA", "raw": "held-out, raw", "training": "training, smoothed"},
}
SUSPECT = {  # C / 6ND of every run, what that looks like, and how to say so
    1 / 2: ("multiply-adds (MACs) of training", "--unit=macs"),
    1 / 3: ("FLOPs of the forward passes alone", "--pass=forward"),
    1 / 6: ("multiply-adds (MACs) of the forward passes alone", "--unit=macs --pass=forward"),
}
FAR = (1 / 12, 30.0)  # times 6ND: below and above that no way to count is known
PF_DAY = 8.64e19  # FLOPs
LEAST = {"params": 500, "flops": 1e7, "tokens": 1e-3}  # of a training, if all runs have less; tokens for each parameter
EXACTLY = "exact, 2 x MACs, training = 3 x forward"  # how the protocol of a record begins to say it


@dataclass(frozen=True)
class Convention:
    """How C, N, D and L of a study are counted. The default is that of this project's records.

    `counted` 6ND is 6 x `params` x D in tokens, by definition FLOPs of training. `passes` forward is the same images, forward
    only. `params` active counts per token (an adaLN modulation runs once an image and does not count), total all trainable.
    `assumed` names the fields that the data did not state; two conventions are equal whatever was assumed.
    """

    counted: str = "exact"
    unit: str = "FLOPs"
    passes: str = "training"
    params: str = "active"
    data: str = "tokens"
    loss: str = "held-out, EMA"
    assumed: tuple = field(default=(), compare=False)

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"convention: {name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}")
        if self.counted == "6ND" and (self.unit, self.passes) != ("FLOPs", "training"):
            raise UsageError(f"convention: 6ND is FLOPs of training, found {self.unit} of {self.passes}")

    def __str__(self) -> str:
        assumed = f" (assumed, not stated: {', '.join(self.assumed)})" if self.assumed else ""
        return f"C: {self.counted} {self.unit} of {self.passes}; N: {self.params} parameters; D: {self.data}; L: {self.loss}{assumed}"

    def to_json(self) -> dict:
        """Field -> what it counts, and the list of fields that were assumed."""
        return asdict(self) | {"assumed": list(self.assumed)}


def of_record(protocol: dict) -> Convention:
    """The convention of this project's records, from their protocol. Raises UsageError on one that says otherwise."""
    found = protocol.get("flops", EXACTLY)
    if not (isinstance(found, str) and found.startswith(EXACTLY)):
        raise UsageError(f"protocol field 'flops' is {shown(found)}, expected {EXACTLY!r}")
    raw = protocol.get("weights") == "params (raw)"
    return Convention(loss="held-out, raw" if raw else "held-out, EMA")


def word(name: str, value: str, where: str) -> str:
    """What an option or a cell says of the field `name`, in the words of CHOICES; case does not matter."""
    known = {choice.lower(): choice for choice in CHOICES[name]} | SHORT.get(name, {})
    if value.strip().lower() not in known:
        raise UsageError(f"{where}: found {value!r}, expected one of {', '.join(known)}")
    return known[value.strip().lower()]


def require_same(ours: Convention, theirs: Convention, what: str = "RUNS") -> None:
    """Raises UsageError naming the first field in which two conventions differ."""
    for name in CHOICES:
        a, b = getattr(ours, name), getattr(theirs, name)
        if a != b:
            raise UsageError(f"{what}: {name} is {b!r} and {a!r}; one fit takes one convention")


def factor(have: Convention, want: Convention) -> float:
    """What C in `have` is multiplied by to be C in `want`, both exact."""
    found = 1.0
    if have.unit != want.unit:
        found *= FLOPS_OVER_MACS if have.unit == "MACs" else 1 / FLOPS_OVER_MACS
    if have.passes != want.passes:
        found *= TRAIN_OVER_FORWARD if have.passes == "forward" else 1 / TRAIN_OVER_FORWARD
    return found


def training_flops(runs: Sequence) -> list:
    """Runs whose C is FLOPs of training: those of MACs or of forward passes are converted, the others as they are.

    Raises UsageError where the stated unit cannot be: C is 6ND, FLOPs of training, already.
    """
    have = runs[0].convention
    want = replace(have, unit="FLOPs", passes="training")
    if have == want:
        return list(runs)
    if have.data == "tokens" and _all_near(_over_6nd(runs), 1.0, 0.02):
        raise UsageError(
            f"{runs[0].source}: flops is 6 x params x tokens in all {len(runs)} runs, which looks like FLOPs of training, but "
            f"is said to be {have.unit} of {have.passes}"
        )
    return [replace(run, flops=run.flops * factor(have, want), convention=want) for run in runs]


def check_units(runs: Sequence, tolerance: float = 0.02) -> None:
    """Raises UsageError where C, N and D are in units that cannot be meant, and says which they look like.

    C may be, in every run, what MACs or forward passes would be beside N and D: 6ND / 2, / 3 or / 6. Exact FLOPs of training lie above 6ND
    and vary with the size, so they do not meet this by chance. C may be FAR from 6ND in every run, or as many times 6ND as an image has
    tokens. And a table may count in millions, so that it has fewer parameters, tokens or FLOPs than any training (LEAST).
    """
    first, few = runs[0], _few(runs)
    ratios = _over_6nd(runs) if first.convention.data == "tokens" else np.ones(1)
    for expected, (what, option) in SUSPECT.items():
        if len(ratios) > 1 and _all_near(ratios, expected, tolerance):
            raise UsageError(
                f"{first.source}: flops is {expected:.3g} x 6 x params x tokens in all {len(runs)} runs, which looks like "
                f"{what}; expected FLOPs of training: multiply it by {round(1 / expected)}, or say {option}"
            )
    middle = float(np.exp(np.log(ratios).mean()))
    side = math.sqrt(middle)
    images = len(ratios) > 1 and _all_near(ratios, middle, tolerance) and 3.9 < side < 181
    images = images and abs(side / round(side) - 1) < tolerance
    if not (images or few or ratios.min() > FAR[1] or ratios.max() < FAR[0]):
        return
    thousands = math.log10(middle) / 3
    if images:
        looks = f"tokens seems to count images, of {round(middle)} tokens each: say --data=images"
    elif any(abs(math.log(middle * PF_DAY * 1000.0**k)) < tolerance for k in range(-4, 5)):
        looks = f"flops seems to be in PF-days: say --column 'flops={PF_DAY:.3g}*NAME', and give the factors of params and tokens"
    elif few or (abs(thousands - round(thousands)) < 0.001 and abs(thousands) > 2 / 3):
        looks = "params, tokens or flops seem to be counted in thousands, millions or billions, or in PF-days: give the factor of each, "
        looks += "such as --column 'params=1e6*NAME' --column 'tokens=1e6*NAME'"
    else:
        looks = "they cannot be FLOPs, parameters and tokens all three; give them in these units, or say --data=images"
    found = few if few and abs(math.log(middle)) < tolerance else f"flops is about {middle:.3g} x 6 x params x tokens"
    raise UsageError(f"{first.source}: {found} in these {len(runs)} runs; {looks}")


def _few(runs: Sequence) -> str:
    """What a table has too little of for any training, in words; "" where there is enough. Records count in ones."""
    n, d, c = (np.array([getattr(run, name) for run in runs]) for name in ("params", "tokens", "flops"))
    tokens = runs[0].convention.data == "tokens" and (d.min() < 1 or (d / n).max() < LEAST["tokens"])
    bad = {"params": n.min() < LEAST["params"], "flops": c.max() < LEAST["flops"], "tokens": tokens}
    name = next((name for name, yes in bad.items() if yes), "")
    values = {"params": n, "flops": c, "tokens": d}.get(name)
    return f"{name} is {values.min():,.4g} to {values.max():,.4g}" if name and not runs[0].protocol else ""


def _over_6nd(runs: Sequence) -> np.ndarray:
    return np.array([run.flops / (6 * run.params * run.tokens) for run in runs])


def _all_near(ratios: np.ndarray, expected: float, tolerance: float) -> bool:
    return bool(np.all(np.abs(ratios / expected - 1) <= tolerance))
