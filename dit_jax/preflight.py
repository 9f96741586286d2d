"""What a run would be on a slice that is not there: its real step, compiled by the slice's own compiler.

    python -m dit_jax.preflight --config=configs/imagenet256.py:DiT-XL/2 --topology=v3-256 [--job=sample] [--price=2.0] [--json=OUT]

TPU programs are compiled by libtpu, on any x86-64 Linux machine; programs for `cpux8` and the like here; of GPUs only what needs no
compiler is given. Memory and collectives are those of the program that would run. The step time is the compiler's own estimate,
made to compare layouts: it leaves out collectives, whose bytes over the links' bandwidth therefore stand beside it.
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from absl import flags
from rich.console import Console

from dit_jax import flops, hardware, hlo
from dit_jax.command import launch, write_file
from dit_jax.config import Config, UsageError, resolve
from dit_jax.diffusion.process import make_process
from dit_jax.log import say
from dit_jax.mesh import (
    abstract_mesh,
    batch_sharding,
    bytes_per_device,
    check_batch,
    devices_ahead,
    make_mesh,
    replicated,
    why_not_compiled,
)
from dit_jax.sample import ROWS, image_flops, make_sampler
from dit_jax.state import abstract_batch, abstract_state
from dit_jax.step import make_train_step, on_device

FULL = 0.9  # of a device's memory: beyond it a step counts as one that does not fit
TRIES = 6  # compilations in search of what would fit


@dataclass(frozen=True)
class Program:
    """A job's program for a mesh. `arguments`: abstract arrays; `flops` and `images`: of one call on all devices."""

    make: Callable  # () -> the jitted function
    arguments: tuple
    flops: int
    images: int
    state: int  # bytes on a device that a call takes and gives back


def program(cfg: Config, job: str, mesh) -> Program:
    """The train step, or the sampler of one batch with the run's `sample` config."""
    if job == "train":
        state, batch = abstract_state(cfg, mesh), abstract_batch(cfg, mesh)
        rows, held = cfg.train.batch_size, bytes_per_device(state)
        return Program(
            lambda: make_train_step(cfg, mesh), (state, batch), flops.train_flops(cfg.model, rows), rows, held
        )
    process = make_process(cfg.diffusion, cfg.model.learn_sigma)
    whole, rows = replicated(mesh), ROWS * mesh.shape["data"] * mesh.shape["fsdp"]
    shapes = abstract_state(cfg, mesh).params
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), shapes)
    seed = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    indices = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=batch_sharding(mesh))
    count = image_flops(cfg, cfg.sample) * rows
    return Program(lambda: make_sampler(cfg.model, process, cfg.sample, mesh), (params, seed, indices), count, rows, 0)


def compiled(found: Program) -> tuple:
    """(executable or None, "" or the compiler's message that it does not fit, seconds)."""
    start = time.perf_counter()
    try:
        executable, message = found.make().lower(*found.arguments).compile(), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        executable, message = None, str(error).strip().splitlines()[0]
    return executable, message, time.perf_counter() - start


def analysis(cfg: Config, job: str, topology: hardware.Topology, mesh) -> dict:
    """What needs no compiler."""
    found = program(cfg, job, mesh)
    return {
        "topology": topology.name,
        "job": job,
        "devices": topology.devices,
        "chips": topology.chips,
        "hosts": topology.hosts,
        "mesh": dict(mesh.shape),
        "images": found.images,
        "parameters": flops.parameters(cfg.model),
        "bytes": {
            "arguments": bytes_per_device(found.arguments),
            "temporaries": None,
            "code": None,
            "memory": None if math.isnan(topology.memory_bytes) else topology.memory_bytes,
            "donated": None,
            "state": found.state,
        },
        "fits": None,
        "flops_step": found.flops,
        "collectives": None,
        "collective_seconds": None,
        "compile_seconds": None,
        "estimated_step_seconds": None,
        "estimated_mfu": None,
        "run": None,
        "message": "",
        "suggestion": "",
    }


def inspect(cfg: Config, job: str, topology: hardware.Topology, devices: list) -> dict:
    """All of it, by compiling the job for a mesh of `devices`."""
    mesh = make_mesh(cfg.mesh, devices)
    found, report = program(cfg, job, mesh), analysis(cfg, job, topology, mesh)
    executable, report["message"], report["compile_seconds"] = compiled(found)
    report["fits"] = executable is not None
    if executable is None:
        return report
    memory, sizes = executable.memory_analysis(), report["bytes"]
    sizes["arguments"], sizes["temporaries"] = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    sizes["code"], sizes["donated"] = memory.generated_code_size_in_bytes, memory.alias_size_in_bytes
    used = sizes["arguments"] + sizes["temporaries"]
    if sizes["memory"] and used > FULL * sizes["memory"]:
        report["fits"] = False
        report["message"] = (
            f"{gib(used)} of {gib(sizes['memory'])}: it compiles, with less than {1 - FULL:.0%} to spare"
        )
    return report | timing(hlo.parse(executable.as_text()), topology, found)


def timing(module: hlo.Module, topology: hardware.Topology, found: Program) -> dict:
    """The collectives, the compiler's estimate and what follows from them."""
    moved, sent = {}, 0.0
    for one in hlo.collectives(module, topology.devices):
        entry = moved.setdefault(one.kind, {"count": 0, "bytes": 0, "sent": 0.0})
        entry["count"] += one.count
        entry["bytes"] += one.count * one.bytes
        entry["sent"] += one.sent
        sent += one.sent
    chip, cycles = topology.chip, hlo.estimated_cycles(module)
    links = chip.links * chip.link_bandwidth / chip.devices
    seconds = cycles / chip.clock if cycles and chip.clock > 0 else None
    peak = topology.peak() * topology.devices
    return {
        "collectives": moved,
        "collective_seconds": sent / links if links > 0 else None,
        "estimated_step_seconds": seconds,
        "estimated_mfu": found.flops / seconds / peak if seconds else None,
    }


def run_costs(report: dict, steps: int, price: float | None) -> dict | None:
    """Hours, chip-hours and money of so many steps: [collectives hidden behind the compute, nothing hidden]."""
    seconds, moved = report["estimated_step_seconds"], report["collective_seconds"] or 0.0
    if seconds is None or report["job"] != "train":
        return None
    hours = [steps * max(seconds, moved) / 3600, steps * (seconds + moved) / 3600]
    chip_hours = [report["chips"] * h for h in hours]
    return {
        "steps": steps,
        "hours": hours,
        "chip_hours": chip_hours,
        "price": [price * h for h in chip_hours] if price is not None else None,
    }


def candidates(cfg: Config, devices: int) -> list[dict]:
    """Changes of a config that need less memory, the cheapest in time first, as {"model.remat": "full", ...}."""
    remats = ("none", "dots", "full")
    split = devices // cfg.mesh.tensor
    whole = {"mesh.data": 1, "mesh.fsdp": split} if cfg.mesh.fsdp != split else {}
    stronger = [{"model.remat": remat} for remat in remats[remats.index(cfg.model.remat) + 1 :]]
    found = [*stronger[:1], *([whole] if whole else []), *[whole | change for change in stronger if whole]]
    found += stronger[1:]
    count = 2 * cfg.optim.accumulate
    while cfg.train.batch_size % (split * count) == 0:
        found += [{**whole, **(stronger[0] if stronger else {}), "optim.accumulate": count}]
        count *= 2
    return found


def changed(cfg: Config, changes: dict) -> Config:
    """A config with {"group.key": value} set."""
    for key, value in changes.items():
        group, name = key.split(".")
        cfg = dataclasses.replace(cfg, **{group: dataclasses.replace(getattr(cfg, group), **{name: value})})
    return cfg


def suggest(cfg: Config, job: str, topology: hardware.Topology, devices: list) -> str:
    """The first changes with which the job fits, as flags; "" if none of those tried did."""
    if job != "train":
        return ""
    for changes in candidates(cfg, topology.devices)[:TRIES]:
        text = " ".join(f"--config.{key}={value}" for key, value in changes.items())
        say(f"it does not fit; trying {text} ...")
        report = inspect(changed(cfg, changes), job, topology, devices)
        if report["fits"]:
            return text
    return ""


def gib(size: float) -> str:
    return f"{size / hardware.GIB:.2f} GiB"


def _number(value: float) -> str:
    return f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"


def show(report: dict, console: Console) -> None:
    """The report for people."""
    sizes, mesh = report["bytes"], " x ".join(f"{name} {size}" for name, size in report["mesh"].items())
    console.print(
        f"{report['topology']}: {report['devices']} devices, {report['chips']} chips, {report['hosts']} hosts; {mesh}"
    )
    console.print(f"parameters   {report['parameters']:,}")
    console.print(f"FLOPs        {report['flops_step']:.4e} for {report['images']:,} images")
    console.print(f"arguments    {gib(sizes['arguments'])} a device")
    if sizes["temporaries"] is not None:
        used = sizes["arguments"] + sizes["temporaries"]
        of = f" of {gib(sizes['memory'])}: {used / sizes['memory']:.0%}" if sizes["memory"] else ""
        console.print(
            f"temporaries  {gib(sizes['temporaries'])}, code {gib(sizes['code'])}; in all {gib(used + sizes['code'])}{of}"
        )
        console.print(f"donated      {sizes['donated']:,} bytes of a state of {sizes['state']:,}")
    if report["fits"] is not None:
        console.print(
            f"fits         {'yes' if report['fits'] else 'NO'}; compiled in {report['compile_seconds']:.0f} s"
        )
    for name, entry in (report["collectives"] or {}).items():
        console.print(
            f"  {name:18} {entry['count']:6,} a step, {entry['bytes'] / 1e9:9.3f} GB, sent by a device {entry['sent'] / 1e9:9.3f} GB"
        )
    if report["estimated_step_seconds"]:
        seconds, moved = report["estimated_step_seconds"], report["collective_seconds"]
        console.print(
            f"step         {1e3 * seconds:.1f} ms ({1 / seconds:.1f} a second), MFU {report['estimated_mfu']:.1%}: the compiler's estimate"
        )
        console.print(f"links        {1e3 * moved:.1f} ms beside it, for the collectives at the links' full rate")
    if report["run"]:
        run = report["run"]
        low, high = run["hours"]
        text = f"{run['steps']:,} steps {_number(low)} to {_number(high)} hours, {' to '.join(map(_number, run['chip_hours']))} chip-hours"
        console.print(
            f"run          {text}{', price ' + ' to '.join(map(_number, run['price'])) if run['price'] else ''}"
        )
    for name in ("message", "suggestion"):
        if report[name]:
            console.print(f"{name:12} {report[name]}")


def _check(cfg: Config, job: str, topology: hardware.Topology, path: str) -> None:
    mesh = abstract_mesh(cfg.mesh, topology.devices)
    if job == "train":
        check_batch(mesh, cfg.train.batch_size, cfg.optim.accumulate, topology.devices // topology.hosts)
    if path and not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise UsageError(f"--json: found {path!r}, whose folder does not exist")


def main() -> None:
    values = flags.FLAGS
    cfg, topology, job = resolve(values.config), hardware.topology(values.topology), values.job
    if job == "sample":
        cfg = changed(cfg, {"mesh.data": -1, "mesh.fsdp": 1, "mesh.tensor": 1})  # as the job does
    _check(cfg, job, topology, values.json)
    missing = why_not_compiled(topology)
    if missing:
        report = analysis(cfg, job, topology, abstract_mesh(cfg.mesh, topology.devices))
        report["message"] = f"not compiled: {missing}"
    else:
        devices = devices_ahead(topology)
        cfg = dataclasses.replace(cfg, model=on_device(cfg.model))
        report = inspect(cfg, job, topology, devices)
        if not report["fits"]:
            report["suggestion"] = suggest(cfg, job, topology, devices)
        report["run"] = run_costs(report, cfg.train.steps, values.price)
    if values.json:
        write_file(values.json, json.dumps(report, indent=1) + "\n")
    show(report, Console(width=160, highlight=False))


if __name__ == "__main__":
    flags.DEFINE_string("topology", None, "v3-8 to v6e-256, h100x8, cpux8, ...", required=True)
    flags.DEFINE_enum("job", "train", ("train", "sample"), "the step of a training, or the sampling of one batch")
    flags.DEFINE_float("price", None, "of a chip-hour", lower_bound=0.0)
    flags.DEFINE_string("json", "", "write the report here")
    launch(main, config="file")
