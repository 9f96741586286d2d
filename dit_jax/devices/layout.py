"""Layout of a run on a slice (mesh, rematerialisation, accumulation): the shipped ones, and others that may fit.

A layout changes where and how fast a run computes, not what: batch, learning rate and data stay those in the config. This file
chooses by arithmetic; `dit_jax.preflight` compiles the choice.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dit_jax import flops
from dit_jax.config import SIZES, ModelConfig, model_config
from dit_jax.error import UsageError, choice
from dit_jax.hardware import Topology, nearest, topology

# slice -> devices that share the state (`mesh.fsdp`), by model size; the batch is split over all devices. For TPUs this is the first
# choice of `preflight --search`: with fewer devices each has more optimizer work, with more than 16 XL/2's kernels have no whole tiles.
# For v5e, v5p and v6e the same rule without a search: all devices up to 16; docs/preflight.md says what was compiled.
# For GPUs and CPUs no compiler tells a time: small models are replicated, large ones split over all devices.
FSDP = {
    "v3-8": {"S": 4, "B": 4, "L": 8, "XL": 8},
    "v3-32": {"S": 16, "B": 16, "L": 16, "XL": 16},
    "v3-256": {"S": 16, "B": 16, "L": 16, "XL": 16},
    "v4-8": {"S": 4, "B": 4, "L": 4, "XL": 4},
    "v4-64": {"S": 16, "B": 16, "L": 16, "XL": 16},
    "v4-256": {"S": 16, "B": 16, "L": 16, "XL": 16},
    "v4-512": {"S": 16, "B": 16, "L": 16, "XL": 16},
    "v5e-16": {"S": 16, "B": 16, "L": 16, "XL": 16},
    "v5e-64": {"S": 16, "B": 16, "L": 16, "XL": 16},
    "v5e-256": {"S": 16, "B": 16, "L": 16, "XL": 16},
    "v5p-8": {"S": 4, "B": 4, "L": 4, "XL": 4},
    "v5p-64": {"S": 16, "B": 16, "L": 16, "XL": 16},
    "v5p-256": {"S": 16, "B": 16, "L": 16, "XL": 16},
    "v6e-8": {"S": 8, "B": 8, "L": 8, "XL": 8},
    "v6e-64": {"S": 16, "B": 16, "L": 16, "XL": 16},
    "v6e-256": {"S": 16, "B": 16, "L": 16, "XL": 16},
    "h100x8": {"S": 1, "B": 1, "L": 8, "XL": 8},
    "h200x1": {"S": 1, "B": 1, "L": 1, "XL": 1},
    "cpux8": {"S": 2, "B": 2, "L": 8, "XL": 8},
}
SPARE = 0.85  # fraction of a device's memory that the rough estimate `memory` may fill
REMATS = ("none", "dots", "full")
# Bytes that a block saves for its backward pass, per token and channel: the TPU compiler's figures for S/2 to XL/2 at 256 and 512
# pixels (preflight, batches that do not fit). Without remat KEPT_WEIGHT bytes per attention weight (heads x tokens per token) are added.
# Of layers that are not in a loop the compiler keeps less.
KEPT = {"none": 54.0, "dots": 20.0, "full": 5.5}
KEPT_UNROLLED = KEPT | {"none": 26.0}
KEPT_WEIGHT = 2.2
# Bytes per parameter: value, EMA and moments; gradient and update; sums of microbatches.
STATE, PASSING, ADDED = 16, 12, 8
# Relative time of a step, by the compiler's estimates. A loop copies all saved arrays ("none"), which takes longer than the
# recomputation of "dots".
AGAIN = {"none": 1.1, "dots": 1.0, "full": 1.2}
AGAIN_UNROLLED = {"none": 0.82, "dots": 0.88, "full": 1.1}


@dataclass(frozen=True)
class Layout:
    """Devices along the mesh axes, `model.remat`, and microbatches per step."""

    data: int
    fsdp: int
    tensor: int
    remat: str
    accumulate: int

    def keys(self) -> dict:
        """Config keys of the layout: {"mesh.data": 2, ...}."""
        mesh = {f"mesh.{name}": getattr(self, name) for name in ("data", "fsdp", "tensor")}
        return {**mesh, "model.remat": self.remat, "optim.accumulate": self.accumulate}

    def rows(self, batch: int) -> int:
        """Images per device and microbatch; 0 if the batch does not divide."""
        split = self.data * self.fsdp * self.accumulate
        return 0 if batch % split else batch // split


def state_bytes(model: ModelConfig, layout: Layout) -> float:
    """Estimated bytes of the training state per device. Replicated vectors are few and counted as split."""
    return STATE * flops.parameters(model) / (layout.fsdp * layout.tensor)


def temporary_bytes(model: ModelConfig, layout: Layout, batch: int) -> float:
    """Estimated bytes per device that a training step holds besides the state."""
    kept, tokens = (KEPT_UNROLLED if model.unrolled else KEPT)[layout.remat], model.tokens + model.caption_tokens
    if layout.remat == "none":
        kept += KEPT_WEIGHT * model.heads * tokens / model.width
    activations = kept * layout.rows(batch) * model.depth * tokens * model.width
    passing = PASSING + (ADDED if layout.accumulate > 1 else 0)
    return (activations + passing * flops.parameters(model) / layout.fsdp) / layout.tensor


def memory(model: ModelConfig, layout: Layout, batch: int) -> float:
    """Estimated bytes of a training step per device."""
    return state_bytes(model, layout) + temporary_bytes(model, layout, batch)


def seconds(model: ModelConfig, layout: Layout, batch: int, slice: Topology) -> float:
    """Estimated seconds per step, to compare layouts on one slice; 0 if a rate is not known.

    FLOPs run at half the peak, weights at memory bandwidth, collectives at link bandwidth. Each microbatch gathers bfloat16 weights
    forward and backward, reads them three times, scatters their gradients and accumulates in float32; replicas then all-reduce once.
    """
    links = slice.chip.links * slice.chip.link_bandwidth / slice.chip.devices
    if not (slice.peak() > 0 and links > 0):
        return 0.0
    size = flops.parameters(model) / layout.tensor
    again = (AGAIN_UNROLLED if model.unrolled else AGAIN)[layout.remat]
    computed = again * flops.train_flops(model, batch) / slice.devices / (0.5 * slice.peak())
    touched = layout.accumulate * size * (3 * 2 + 2 * 4 / layout.fsdp) / slice.bandwidth
    gathered = layout.accumulate * size * 3 * 2 * (1 - 1 / layout.fsdp) / links
    summed = size * 2 * 4 / layout.fsdp * (1 - 1 / layout.data) / links
    return computed + touched + gathered + summed


def options(model: ModelConfig, batch: int, slice: Topology, least: Layout) -> list[Layout]:
    """Layouts with at least the fsdp, remat and accumulation of `least`, sorted by `seconds`."""

    def every() -> Iterator[Layout]:
        split = slice.devices // least.tensor
        for fsdp in _doubled(least.fsdp, split // slice.slices):
            for accumulate in _doubled(least.accumulate, batch // split):
                for remat in REMATS[REMATS.index(least.remat) :]:
                    yield Layout(split // fsdp, fsdp, least.tensor, remat, accumulate)

    found = [layout for layout in every() if layout.rows(batch)]
    return sorted(found, key=lambda layout: seconds(model, layout, batch, slice))


def _doubled(first: int, most: int) -> Iterator[int]:
    """Yields those of first, 2 first, 4 first, ... that divide `most`."""
    while first <= most:
        if most % first == 0:
            yield first
        first *= 2


def size_of(model: ModelConfig) -> str:
    """Smallest published size with at least as many parameters as the model (within 5 %), else the largest."""
    count = flops.parameters(model)
    return next((s for s in SIZES if count <= 1.05 * flops.parameters(model_config(f"DiT-{s}/2"))), "XL")


def shipped(name: str, model: ModelConfig, batch: int) -> Layout:
    """Layout on a slice in FSDP: its mesh, and the fastest remat and accumulation that fit by `memory`.

    Raises UsageError if the slice is not in the table, or its devices do not divide the batch.
    """
    choice("slice", name, FSDP, nearest)
    slice, fsdp = topology(name), FSDP[name][size_of(model)]
    least = Layout(slice.devices // fsdp, fsdp, 1, "none", 1)
    found = [layout for layout in options(model, batch, slice, least) if layout.fsdp == fsdp]
    if not found:
        raise UsageError(
            f"train.batch_size: found {batch}, expected a multiple of the {slice.devices} devices of {name}"
        )
    if math.isnan(slice.memory_bytes):
        return found[0]
    fitting = [layout for layout in found if memory(model, layout, batch) <= SPARE * slice.memory_bytes]
    return fitting[0] if fitting else min(found, key=lambda layout: memory(model, layout, batch))


def argument(text: str, model: str) -> tuple[str, str, int]:
    """Parses a config file's argument MODEL[,SLICE[,BATCH]] to (model, slice or "", batch or 0); `model` is the default.

    Raises UsageError on another form or a batch of 0.
    """
    parts = text.split(",")
    if len(parts) > 3 or (len(parts) == 3 and not (parts[2].isascii() and parts[2].isdecimal())):
        raise UsageError(
            f"the config's argument: found {text!r}, expected MODEL[,SLICE[,BATCH]], such as {model},v3-256"
        )
    if len(parts) == 3 and not int(parts[2]):
        raise UsageError(f"the config's argument: found {text!r}, expected a batch of at least 1")
    name, slice, batch = [*parts, "", ""][:3]
    return name or model, slice, int(batch or 0)


def lay_out(c, name: str) -> None:
    """Sets mesh, remat, accumulation and unroll of a ConfigDict to the shipped layout of slice `name`; does nothing for "".

    On TPUs the layers are unrolled: a loop copies what its backward pass needs to and from stacks, by the compiler's estimate an eighth
    of a step, a sixth with the recomputation that it makes worth while. Unrolled layers compile three times as long.
    """
    if not name:
        return
    choice("slice", name, FSDP, nearest)
    device = topology(name).device
    if device and device.kind.startswith("tpu"):
        c.model.unroll = c.model.depth
    found = shipped(name, ModelConfig(**c.model.to_dict()), c.train.batch_size)
    for key, value in found.keys().items():
        group, key = key.split(".")
        c[group][key] = value
