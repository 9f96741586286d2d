"""One metric of drawn images as a row: what it needs, how it streams over batches, and its numbers at the end."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Metric:
    """A row of `table.METRICS`; `evaluate` measures every row whose needs are met.

    `needs` names parts of a batch: "pool" (b, d), "spatial" (b, s) and "logits" (b, classes), float32, of the feature
    network, "images" (b, h, w, c) uint8; what there is of the reference: "gaussian" and "spatial_gaussian", each (mean,
    covariance) of those features, "features" (m, d) of its images; or a feature network, such as "inception".
    `update(state, batch, total) -> state` adds a batch, a dict of the network's parts (and the images, if any metric needs
    them). Samples come in order; `state` is None at first, `total` the number of samples that there will be.
    `finish(state, reference, settings) -> {ending: value}` gives the numbers; an ending ("", "_std", "_low") follows the
    name in records. `reference` is a dict as above; `settings` has the `seed` and the number of `bootstrap` resamples.
    Both raise ValueError on numbers that cannot be scored.
    """

    name: str  # on the Inception network, or without a network
    needs: tuple[str, ...]
    update: Callable
    finish: Callable
    higher_is_better: bool
    rules: dict = field(default_factory=dict)  # constants for the protocol; "{logits}" stands for which ones they are
    plain: str = ""  # the name on other networks, before the network's own; "" = `name`
    few: tuple[int, str] = (0, "")  # samples for each pooled feature below which a warning is given, and its text
