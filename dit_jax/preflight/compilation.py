"""Compiles a job's program for a mesh and reports its memory, collectives and estimated time."""

import math
import re
import time

import jax

from dit_jax import flops, hardware
from dit_jax.config import Config, SampleConfig
from dit_jax.devices.mesh import bytes_per_device, make_mesh
from dit_jax.devices.rows import drawing_mesh
from dit_jax.log import waiting
from dit_jax.preflight import hlo
from dit_jax.program import Program, encoder_flops, program, reuse_notes

FULL = 0.9  # share of a device's memory above which a program counts as one that does not fit
PREALLOCATED = 0.75  # share of a GPU's memory that JAX takes at its start, by default


def compiled(found: Program) -> tuple:
    """Compiles: (executable or None if it does not fit, the compiler's message or "", wall seconds, CPU seconds)."""
    start, computing = time.perf_counter(), time.process_time()
    try:
        with waiting("tracing"):
            lowered = found.make().lower(*found.arguments)
        with waiting("compiling"):
            executable, message = lowered.compile(), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        executable, message = None, str(error).strip().splitlines()[0]
    return executable, message, time.perf_counter() - start, time.process_time() - computing


def temporaries_of(message: str, arguments: int) -> int | None:
    """Bytes of temporaries in the TPU compiler's message that they do not fit; it states them alone or with the arguments."""
    alone = re.search(r"temporaries \(([\d.]+)([KMGT])\)", message)
    whole = re.search(r"Used ([\d.]+)([KMGT]) of", message)
    if not (found := alone or whole):
        return None
    size = round(float(found[1]) * 1024 ** (1 + "KMGT".index(found[2])))
    return size if alone else max(size - arguments, 0)


def analysis(cfg: Config, job: str, topology: hardware.Topology, mesh, found: Program) -> dict:
    """The report of a program without compiling: None for all that only a compiler can tell."""
    return {
        "topology": topology.name,
        "job": job,
        "devices": topology.devices,
        "chips": topology.chips,
        "hosts": topology.hosts,
        "mesh": dict(mesh.shape),
        "remat": cfg.model.remat,
        "accumulate": cfg.optim.accumulate,
        "images": found.images,
        "parameters": flops.parameters(cfg.model),
        "bytes": {
            "arguments": bytes_per_device(found.arguments),
            "temporaries": None,
            "code": None,
            "memory": None if math.isnan(topology.memory_bytes) else topology.memory_bytes,
            "donated": None,
            "state": bytes_per_device(jax.tree.leaves(found.arguments)[: found.state]),
        },
        "fits": None,
        "flops_step": found.flops,
        "flops_encoder": encoder_flops(cfg) * found.images if job == "train" else 0,
        "collectives": None,
        "collective_seconds": None,
        "compile_seconds": None,
        "compile_cpu_seconds": None,
        "estimated_cycles": None,
        "estimated_step_seconds": None,
        "estimated_mfu": None,
        "run": None,
        "message": "",
        "suggestion": "",
        "notes": reuse_notes(cfg.sample) + of_int8(cfg.sample) if job == "sample" else [],
    }


def inspect(cfg: Config, job: str, topology: hardware.Topology, devices: list) -> dict:
    """The whole report, by compiling the job for a mesh of `devices`."""
    mesh = make_mesh(cfg.mesh, devices) if job == "train" else drawing_mesh(4 * flops.parameters(cfg.model), devices)
    found = program(cfg, job, mesh)
    return measured(analysis(cfg, job, topology, mesh, found), topology, found)


def measured(report: dict, topology: hardware.Topology, found: Program) -> dict:
    """The report of `analysis`, filled in by compiling its program."""
    executable, report["message"], report["compile_seconds"], report["compile_cpu_seconds"] = compiled(found)
    report["fits"] = executable is not None
    if executable is None:
        report["bytes"]["temporaries"] = temporaries_of(report["message"], report["bytes"]["arguments"])
        return report
    memory, sizes = executable.memory_analysis(), report["bytes"]
    sizes["arguments"], sizes["temporaries"] = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    sizes["code"], sizes["donated"] = memory.generated_code_size_in_bytes or None, memory.alias_size_in_bytes
    text = executable.as_text()
    sizes["state"] = sum(hlo.argument_bytes(text)[: found.state])
    report["message"] = too_large(sizes["arguments"] + sizes["temporaries"], sizes["memory"])
    report["fits"] = not report["message"]
    return report | timing(hlo.parse(text), topology, found)


def too_large(used: int, memory: int | None) -> str:
    """Why a compiled program counts as one that does not fit; "" if it fits."""
    if not memory or used <= FULL * memory:
        return ""
    if used > memory:
        return f"{gib(used)} of {gib(memory)}: it compiles, and needs more than there is"
    return f"{gib(used)} of {gib(memory)}: it compiles, with less than {1 - FULL:.0%} to spare"


def timing(module: hlo.Module, topology: hardware.Topology, found: Program) -> dict:
    """Collectives by kind, the compiler's estimate of the step, and the time and MFU that follow from them."""
    moved, sent = {}, 0.0
    for one in hlo.collectives(module, topology.devices):
        entry = moved.setdefault("reduce-scatter-edge" if one.edge else one.kind, {"count": 0, "bytes": 0, "sent": 0.0})
        entry["count"] += one.count
        entry["bytes"] += one.count * one.bytes
        entry["sent"] += one.sent
        sent += one.sent
    chip, cycles = topology.chip, hlo.estimated_cycles(module, found.plan.share if found.plan else 1.0)
    nodes = topology.platform == "gpu" and topology.hosts > 1  # no rate of the network between them is known
    links = math.nan if nodes else chip.links * chip.link_bandwidth / chip.devices
    seconds = cycles / chip.clock if cycles and chip.clock > 0 else None
    peak = topology.peak() * topology.devices
    return {
        "collectives": moved,
        "collective_seconds": sent / links if links > 0 else None,
        "estimated_cycles": cycles or None,
        "estimated_step_seconds": seconds,
        "estimated_mfu": found.flops / seconds / peak if seconds and found.flops else None,
    }


def no_estimate(topology: hardware.Topology) -> str:
    """Why the compiled program of a slice has no estimate of its time."""
    if topology.platform == "tpu" and math.isnan(topology.chip.clock):
        return f"the clock of {topology.generation} is not published"
    return f"the compiler of {topology.platform.upper()} programs gives none"


def missing_time(topology: hardware.Topology) -> str:
    """The note that a report has neither hours nor a price."""
    return f"no estimate of the step: {no_estimate(topology)}, so no hours and no price"


def notes(report: dict, topology: hardware.Topology, wanted: int, tried: int | None) -> list[str]:
    """What the report omits, and why. `wanted`: images of the run; `tried`: number of layouts compiled in search of one that fits."""
    found = []
    if tried is not None and not report["suggestion"]:
        none = "none was tried: no other layout of this batch should take less memory"
        found.append(f"none of the {tried} layouts tried fits" if tried else none)
    if report["collectives"] is not None and not report["estimated_step_seconds"]:
        found.append(missing_time(topology))
    elif report["collectives"] is not None and not wanted:
        found.append("no hours and no price: eval.samples is 0; say for how many images, such as --num=50000")
    if report["collectives"] is not None and topology.slices > 1 and report["job"] == "train":
        found.append(
            f"in no time: the sums of gradients between the {topology.slices} slices, which cross the data-center network"
        )
    if report["collectives"] is not None and topology.platform == "gpu":
        found += gpu_notes(report, topology)
    return found


def of_int8(sample: SampleConfig) -> list[str]:
    """The note on the MFU of a sampler with int8 products; [] of others."""
    return ["the MFU is of the 16-bit peak, which int8 products exceed"] * (sample.quantize == "int8")


def gpu_notes(report: dict, topology: hardware.Topology) -> list[str]:
    """What else is not known about a program that XLA compiled for absent GPUs."""
    found = [
        "the memory is an estimate: attention is compiled by XLA (a GPU takes cuDNN's for 'auto' in bfloat16), and no product "
        "was tuned on a device"
    ]
    used = report["bytes"]["arguments"] + (report["bytes"]["temporaries"] or 0)
    if report["fits"] and used > PREALLOCATED * topology.memory_bytes:
        found.append(
            f"JAX takes {PREALLOCATED:.0%} of a GPU's memory, less than this needs, unless XLA_PYTHON_CLIENT_MEM_FRACTION says more"
        )
    if topology.hosts > 1:
        found.append(
            f"no time of the collectives: the rate of the network between the {topology.hosts} nodes is not known"
        )
    return found


def bounds(report: dict) -> list[float]:
    """Seconds of a step: [collectives fully overlapped with compute, no overlap]."""
    seconds, moved = report["estimated_step_seconds"] or 0.0, report["collective_seconds"] or 0.0
    return [max(seconds, moved), seconds + moved]


def run_costs(report: dict, images: int, price: float | None) -> dict | None:
    """Hours, chip-hours and price of `images`, each as in `bounds`; None without an estimate or without images."""
    steps = -(-images // report["images"])
    if report["estimated_step_seconds"] is None or not steps:
        return None
    hours = [steps * seconds / 3600 for seconds in bounds(report)]
    chip_hours = [report["chips"] * h for h in hours]
    return {
        "steps": steps,
        "images": images,
        "hours": hours,
        "chip_hours": chip_hours,
        "price": [price * h for h in chip_hours] if price is not None else None,
    }


def gib(size: float) -> str:
    return f"{size / hardware.GIB:.2f} GiB" if size >= 0.1 * hardware.GIB else f"{size / 2**20:.1f} MiB"
