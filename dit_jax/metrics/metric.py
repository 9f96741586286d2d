"""Row type for a metric of drawn images: its inputs, its streaming update and its final numbers."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Metric:
    """A row of `table.METRICS`; `evaluate` measures every row whose needs are met.

    `needs` names parts of a batch, "pool" (b, d), "spatial" (b, s), "logits" (b, classes), float32, "images" (b, h, w, c) uint8, and
    "cells" (b, 40), the logits of four digits; parts of the reference, "gaussian" and "spatial_gaussian", each (mean, covariance),
    "features" (m, d), "prompts" (`composition.Prompts`), "captions" (m, d), embedded, and "originals" (`psnr.Originals`);
    or a feature network, such as "inception".
    `update(state, batch, total) -> state` adds a batch, a dict of the parts above. Samples come in order. `state` is None at first;
    `total` is the final number of samples.
    `finish(state, reference, settings) -> {ending: value}` computes the numbers; an ending ("", "_std", "_low") follows the name in
    records. `settings` has the `seed` and the number of `bootstrap` resamples. Both raise ValueError on invalid numbers.
    """

    name: str  # on the Inception network, or without a network
    needs: tuple[str, ...]
    update: Callable
    finish: Callable
    higher_is_better: bool
    rules: dict = field(default_factory=dict)  # protocol constants; "{logits}" becomes the kind of logits
    plain: str = ""  # name on other networks, before the network's name; "" = `name`
    few: tuple[int, str] = (0, "")  # samples per pooled feature below which there is a warning, and its text
