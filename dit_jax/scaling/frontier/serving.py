"""Training and sampling under one total among trained models: training FLOPs + N x FLOPs of an image. `scaling plan --images_served` asks
the laws for the model that would be best.

Peebles & Xie 2023 (arXiv 2212.09748), section 5 and Fig. 10, ask whether sampling compute can stand in for model compute.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dit_jax.error import UsageError
from dit_jax.scaling.frontier.frontier import cost_of
from dit_jax.scaling.frontier.metric import training
from dit_jax.scaling.frontier.points import Point


@dataclass(frozen=True)
class Served:
    """A model and a sampling of it that together draw `images` images."""

    point: Point
    images: float
    total: float  # FLOPs: training and all images

    @property
    def sampling_share(self) -> float:
        """Of the total."""
        return 1 - self.point.train / self.total


def serve(points: Sequence[Point], images: float | int) -> list[Served]:
    """Every point with its total, cheapest first. Raises UsageError without training FLOPs or the cost of an image."""
    found = [Served(p, float(images), training(p) + images * cost_of(p, "flops")) for p in points]
    return sorted(found, key=lambda s: s.total)


def front(served: Sequence[Served], higher: bool = False) -> list[Served]:
    """Those that no other beats in both total and score, by total."""
    sign, found = -1.0 if higher else 1.0, []
    for one in sorted(served, key=lambda s: (s.total, sign * s.point.score)):
        if not found or sign * one.point.score < sign * found[-1].point.score:
            found.append(one)
    return found


def within(served: Sequence[Served], total: float | int, higher: bool = False) -> list[Served]:
    """The best sampling of each model within a total, best model first; a model that is too dear is left out.

    Raises UsageError where none is cheap enough.
    """
    sign, best = -1.0 if higher else 1.0, {}
    ranked = sorted((s for s in served if s.total <= total), key=lambda s: sign * s.point.score)
    if not ranked:
        least = min(s.total for s in served)
        raise UsageError(
            f"--total: found {total:g} FLOPs, expected at least {least:.3g}, what the cheapest model needs"
        )
    for one in ranked:
        best.setdefault(one.point.name, one)
    return list(best.values())
