"""Compiles other layouts of a train step: finds one that fits if the given one does not, or ranks them all."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

from dit_jax import hardware
from dit_jax.config import Config
from dit_jax.devices.layout import REMATS, Layout, memory, options, state_bytes, temporary_bytes
from dit_jax.devices.mesh import abstract_mesh, devices_ahead, mesh_shape, why_not_compiled
from dit_jax.error import UsageError
from dit_jax.log import pace, say
from dit_jax.preflight.compilation import FULL, analysis, bounds, inspect, no_estimate, notes, run_costs
from dit_jax.preflight.text import row
from dit_jax.program import program

TRIES = 4  # most compilations in search of a layout that fits; mostly the first one does


def changed(cfg: Config, changes: dict) -> Config:
    """A copy of a config with {"group.key": value} set."""
    for key, value in changes.items():
        group, name = key.split(".")
        cfg = dataclasses.replace(cfg, **{group: dataclasses.replace(getattr(cfg, group), **{name: value})})
    return cfg


def layout_of(cfg: Config, devices: int) -> Layout:
    """The layout of a config on so many devices."""
    return Layout(*mesh_shape(cfg.mesh, devices), cfg.model.remat, cfg.optim.accumulate)


def flags_of(layout: Layout, present: Layout) -> str:
    """The flags that turn the layout `present` into `layout`."""
    old = present.keys()
    return " ".join(f"--config.{key}={value}" for key, value in layout.keys().items() if value != old[key])


def suggest(cfg: Config, topology: hardware.Topology, devices: list, report: dict) -> tuple[str, int]:
    """Searches a layout in which the train step fits, given the `report` of one that does not: (its flags or "", number tried).

    Tries the fastest layout that is expected to fit. The expectation is a rough rule, rescaled by the compiler's figure for the
    last layout tried.
    """
    batch, present = cfg.train.batch_size, layout_of(cfg, topology.devices)
    left = [o for o in options(cfg.model, batch, topology, present) if o != present]
    tried, off, count = present, 1.0, 0

    def needed(layout: Layout) -> float:
        return state_bytes(cfg.model, layout) + off * temporary_bytes(cfg.model, layout, batch)

    while count < TRIES:
        if report["bytes"]["temporaries"]:
            off = report["bytes"]["temporaries"] / temporary_bytes(cfg.model, tried, batch)
        left = [o for o in left if needed(o) < needed(tried)]
        if not left:
            break
        fitting = [o for o in left if needed(o) <= FULL * topology.memory_bytes]
        tried = fitting[0] if fitting else min(left, key=needed)
        flags, count = flags_of(tried, present), count + 1
        say(f"it does not fit; trying {flags} ...")
        report = inspect(changed(cfg, tried.keys()), "train", topology, devices)
        if report["fits"]:
            return flags, count
    return "", count


def examine(cfg: Config, job: str, topology: hardware.Topology, images: int, price: float | None) -> dict:
    """The report of a job's program, with a suggested layout if the config's does not fit. `images`: 0 means eval.samples."""
    if missing := why_not_compiled(topology):
        mesh = abstract_mesh(cfg.mesh, topology.devices, topology.slices)
        report = analysis(cfg, job, topology, mesh, program(cfg, job, mesh))
        return report | {"message": f"not compiled: {missing}"}
    say("compiling ...")
    devices = devices_ahead(topology)
    report, tried = inspect(cfg, job, topology, devices), None
    if not report["fits"] and job == "train":
        report["suggestion"], tried = suggest(cfg, topology, devices, report)
    if job == "train" and cfg.data.encode == "in_step":
        say("compiling the step on precomputed latents ...")
        report["precomputed"] = inspect(changed(cfg, {"data.encode": "precomputed"}), job, topology, devices)
    wanted = cfg.train.steps * cfg.train.batch_size if job == "train" else images or cfg.eval.samples
    report["run"] = run_costs(report, wanted, price)
    largest = (
        [f"the step is that of the largest bucket, {max(cfg.data.buckets, key=math.prod)}"] if cfg.data.buckets else []
    )
    return report | {"notes": report["notes"] + notes(report, topology, wanted, tried) + largest * (job == "train")}


def check_sizes(asked: Sequence[str], topology: hardware.Topology, split: int) -> list[int]:
    """Values of mesh.fsdp for `--search`. `split`: devices of a slice that split a batch. Raises UsageError for impossible values."""
    sizes = [2**k for k in range(split.bit_length()) if split % 2**k == 0]
    for size in asked:
        if not size.isdecimal() or int(size) not in sizes:
            raise UsageError(
                f"--search: found {size!r}, expected values of mesh.fsdp among {', '.join(map(str, sizes))}"
            )
    if asked and (missing := why_not_compiled(topology)):
        raise UsageError(f"--search: cannot compile for {topology.name}: {missing}")
    if asked and topology.platform == "gpu" and topology.hosts > 1:
        raise UsageError(
            f"--search: found {topology.name}, expected GPUs of one node: the rate of the network between nodes is not known"
        )
    if asked and topology.platform == "cpu":
        raise UsageError(
            f"--search: found {topology.name}, expected TPUs or GPUs: no figure of a CPU's program is known to rank layouts by"
        )
    return [int(size) for size in asked]


def show_ranks(reports: list[dict], topology: hardware.Topology) -> None:
    """Prints the reports of `search`, one row each."""
    for one in reports:
        print(row(one))
    if any(one["fits"] and not one["estimated_step_seconds"] for one in reports):
        by = "the compiler's cycles" if any(one["estimated_cycles"] for one in reports) else "collectives"
        print(f"ranked by {by} alone: {no_estimate(topology)}")


def search(cfg: Config, topology: hardware.Topology, sizes: list[int]) -> list[dict]:
    """Reports of the train step for each mesh.fsdp in `sizes` and each remat, with the least accumulation that may fit.

    Sorted by `cost`; layouts that do not fit come last.
    """
    devices = devices_ahead(topology)
    batch, tensor, reports = cfg.train.batch_size, layout_of(cfg, topology.devices).tensor, []
    found = options(cfg.model, batch, topology, Layout(topology.devices // tensor, 1, tensor, "none", 1))
    found = [o for o in found if not memory(cfg.model, o, batch) > 1.2 * topology.memory_bytes]
    some = [[o for o in found if (o.fsdp, o.remat) == pair] for pair in itertools.product(sizes, REMATS)]
    layouts = [min(alike, key=lambda o: o.accumulate) for alike in some if alike]
    left = pace(len(layouts))
    say(f"compiling {len(layouts)} layouts, one after another ...")
    for done, layout in enumerate(layouts, 1):
        reports.append(inspect(changed(cfg, layout.keys()), "train", topology, devices))
        say(f"{done}/{len(layouts)}  {row(reports[-1])}  {left(done)[1]}")
    return sorted(reports, key=lambda r: (not r["fits"], *(cost(r) if r["fits"] else ())))


def cost(report: dict) -> tuple[float, float]:
    """What layouts are ranked by: the estimated step plus its collectives without overlap, or else cycles, then collectives."""
    return (report["estimated_cycles"] if not report["estimated_step_seconds"] else 0) or 0, bounds(report)[1]
