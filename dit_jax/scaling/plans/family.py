"""A family of sizes: from a number of parameters to the width, depth and heads of a model that can be built.

The rule of a family is its aspect ratio, width / depth, and how wide a head is; both extrapolate to any size. Liang et al. 2024
(arXiv 2410.08184) keep the aspect ratio constant over their ladder, 1 M to 1 B parameters.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import geometric_mean

from dit_jax import flops
from dit_jax.config import SIZES, ModelConfig
from dit_jax.error import UsageError

COARSE, FINE, WIDE = 64, 8, 256  # widths are multiples of COARSE from WIDE on, below of FINE or of the ladder's step
OFF_SIZE, OFF_ASPECT = 0.03, 0.2  # missing the size by the first is as bad as missing the aspect ratio by the second
FAR = 4.0  # times OFF_ASPECT: aspect ratios further off are all alike
LARGEST = 1e15  # parameters


@dataclass(frozen=True)
class Family:
    """Width / depth, and how wide a head is; or, where `heads` is not 0, their number as long as none is wider than that. Small widths
    are multiples of `step`."""

    name: str
    aspect: float
    head_width: float
    heads: int = 0
    step: int = FINE

    def __str__(self) -> str:
        heads = f"heads of about {self.head_width:.3g}"
        heads = f"{self.heads} head(s) up to {self.head_width:.3g} wide" if self.heads else heads
        return f"{self.name}: width = {self.aspect:.3g} x depth, {heads}"


# Peebles & Xie 2023, Table 1: 32 (S), 64 (B), 43 (L) and 41 (XL); heads are 64 wide but for XL's 72.
DIT = Family("DiT", geometric_mean([width / depth for depth, width, _ in SIZES.values()]), 64.0)


def family_of(models: Sequence[ModelConfig]) -> Family:
    """The family of a ladder of models: their mean aspect ratio, and their number of heads if all have the same, else its mean width."""
    heads, widths = {m.heads for m in models}, [m.width / m.heads for m in models]
    same = len(heads) == 1 and len(set(widths)) > 1
    head_width = max(DIT.head_width, *widths) if same else geometric_mean(widths)
    shared = math.gcd(*(m.width for m in models))
    step = shared if len({m.width for m in models}) > 1 and shared <= COARSE else FINE
    return Family("RUNS", geometric_mean([m.width / m.depth for m in models]), head_width, max(heads) * same, step)


def sized(
    family: Family, params: float | int, like: ModelConfig, count: Callable = flops.active_parameters
) -> ModelConfig:
    """The model of the family with about `params` parameters as `count` counts them, in all else as `like`."""
    if not 0 < params < LARGEST:
        raise UsageError(f"size: found {params:.3g} parameters, expected a number above 0 and below {LARGEST:g}")
    whole = like.unrolled
    like = replace(like, heads=1, unroll=1)
    (_, _, one), (_, _, two) = _depths(4096, params, like, count)
    ideal = (params * family.aspect / ((two - one) / 4096**2)) ** (
        1 / 3
    )  # a block has that many parameters over width^2
    middle = max(round(ideal / COARSE), WIDE // COARSE)
    wide = [COARSE * k for k in range(max(WIDE // COARSE, middle - 6), middle + 7)]
    widths = [w for w in (*range(family.step, WIDE, family.step), *wide) if ideal / 2 <= w <= 2 * ideal]
    rows = [row for width in widths or [family.step] for row in _depths(width, params, like, count)]
    width, depth, _ = min(rows, key=lambda row: _score(family, params, row))
    unroll = depth if whole else 1
    return replace(like, width=width, depth=depth, heads=_heads(family, width), unroll=unroll)


def _depths(width: int, params: float | int, like: ModelConfig, count: Callable) -> list[tuple]:
    """(width, depth, parameters) of the two depths nearest to `params`: the count is linear in the depth."""
    one, two = (count(replace(like, width=width, depth=depth)) for depth in (1, 2))
    depth = max(1 + math.floor((params - one) / (two - one)), 1)
    return [(width, d, one + (two - one) * (d - 1)) for d in (depth, depth + 1)]


def _score(family: Family, params: float | int, row: tuple) -> float:
    """How bad a (width, depth, parameters) is. Very small models have no choice of shapes: there the size alone decides."""
    width, depth, found = row
    shape = abs(math.log(width / depth / family.aspect)) / OFF_ASPECT
    return (math.log(found / params) / OFF_SIZE) ** 2 + min(shape, FAR) ** 2


def _heads(family: Family, width: int) -> int:
    """The family's number of heads, or the divisor of the width that makes heads nearest to the family's."""
    if family.heads and width % family.heads == 0 and width / family.heads <= family.head_width:
        return family.heads
    divisors = (h for h in range(1, width + 1) if width % h == 0)
    return min(divisors, key=lambda h: (abs(math.log(width / h / family.head_width)), h))
