"""What a run would be on a slice that is not there: its real step, compiled by the slice's own compiler.

    python -m dit_jax.preflight --config=configs/imagenet256.py:DiT-XL/2,v3-256 [--job=sample --num=50000] [--price=2.0] [--json=OUT]
    python -m dit_jax.preflight --config=configs/imagenet256.py:DiT-XL/2 --topology=v3-256 --search=4,8,16,32

TPU programs are compiled by libtpu, on any x86-64 Linux machine; programs for `cpux8` and the like here; of GPUs only what needs no
compiler is given. Memory and collectives are those of the program that would run. The step time is the compiler's own estimate,
made to compare layouts: it leaves out collectives, whose bytes over the links' bandwidth therefore stand beside it.
"""

import json

from absl import flags

from dit_jax import hardware
from dit_jax.config import Config, resolve
from dit_jax.devices.layout import FSDP
from dit_jax.devices.mesh import abstract_mesh, batch_split, check_batch, devices_ahead, why_not_compiled
from dit_jax.error import JobError, UsageError, typed
from dit_jax.files import check_json, write_file
from dit_jax.job.launch import launch
from dit_jax.preflight.compilation import analysis, inspect, no_estimate, notes, run_costs
from dit_jax.preflight.search import changed, search, suggest
from dit_jax.preflight.text import row, show


def _check(cfg: Config, job: str, topology: hardware.Topology, values) -> list[int]:
    """The sizes of fsdp to search. Raises UsageError for a mesh, batch, file or size that cannot be."""
    mesh = abstract_mesh(cfg.mesh, topology.devices)
    if job == "train":
        check_batch(mesh, cfg.train.batch_size, cfg.optim.accumulate, topology.devices // topology.hosts)
    check_json(values.json)
    if values.price is not None:
        typed(values.price, float, "--price")
    if values.search and job != "train":
        raise UsageError("--search: found --job=sample, expected the train step, whose layout there is a choice of")
    split = batch_split(mesh)
    sizes = [2**k for k in range(split.bit_length()) if split % 2**k == 0]
    for size in values.search:
        if not size.isdecimal() or int(size) not in sizes:
            raise UsageError(
                f"--search: found {size!r}, expected values of mesh.fsdp among {', '.join(map(str, sizes))}"
            )
    if values.search and (missing := why_not_compiled(topology)):
        raise UsageError(f"--search: cannot compile for {topology.name}: {missing}")
    if values.search and topology.platform == "cpu":
        raise UsageError(
            f"--search: found {topology.name}, expected a TPU slice: no figure of a CPU's program is known to rank layouts by"
        )
    return [int(size) for size in values.search]


def _topology(values) -> hardware.Topology:
    """That of --topology, else the slice that the config's argument names."""
    words = flags.FLAGS["config"].config_filename.partition(":")[2].split(",")
    name = values.topology or next((word for word in words if word in FSDP), "")
    if not name:
        raise UsageError(
            "--topology: not given, expected a slice such as v3-256, or a config that names it: FILE:MODEL,v3-256"
        )
    return hardware.topology(name)


def _one(cfg: Config, job: str, topology: hardware.Topology, values) -> dict:
    """The report of the job's program."""
    if missing := why_not_compiled(topology):
        report = analysis(cfg, job, topology, abstract_mesh(cfg.mesh, topology.devices))
        return report | {"message": f"not compiled: {missing}"}
    devices = devices_ahead(topology)
    report, tried = inspect(cfg, job, topology, devices), None
    if not report["fits"] and job == "train":
        report["suggestion"], tried = suggest(cfg, topology, devices, report)
    wanted = cfg.train.steps * cfg.train.batch_size if job == "train" else values.num or cfg.eval.samples
    report["run"] = run_costs(report, wanted, values.price)
    return report | {"notes": notes(report, topology, wanted, tried)}


def _search(cfg: Config, topology: hardware.Topology, sizes: list[int]) -> list[dict]:
    """The reports of all layouts, shown as a table."""
    reports = search(cfg, topology, devices_ahead(topology), sizes)
    for one in reports:
        print(row(one))
    if any(one["fits"] and not one["estimated_step_seconds"] for one in reports):
        print(f"ranked by collectives alone: {no_estimate(topology)}")
    return reports


def main() -> None:
    values = flags.FLAGS
    cfg, topology, job = resolve(values.config), _topology(values), values.job
    if job == "sample":
        cfg = changed(cfg, {"mesh.data": -1, "mesh.fsdp": 1, "mesh.tensor": 1})  # as the job does
    sizes = _check(cfg, job, topology, values)
    if sizes:
        found = reports = _search(cfg, topology, sizes)
    else:
        found = _one(cfg, job, topology, values)
        show(found)
        reports = [found]
    if values.json:
        write_file(values.json, json.dumps(found, indent=1) + "\n")
    if all(one["fits"] is False for one in reports):
        few = f"none of the {len(reports)} layouts that were compiled fits" if sizes else "the program does not fit"
        raise JobError(
            f"{few} a device of {topology.name}"
            if reports
            else "by the rule of memory no layout fits: none was compiled"
        )


if __name__ == "__main__":
    flags.DEFINE_string(
        "topology", None, "v3-8 to v6e-256, h100x8, cpux8, ...; default: the slice that the config names"
    )
    flags.DEFINE_enum("job", "train", ("train", "sample"), "the step of a training, or the sampling of one batch")
    flags.DEFINE_integer("num", 0, "with --job=sample: images to say hours of; default: eval.samples", lower_bound=0)
    flags.DEFINE_list("search", [], "values of mesh.fsdp: compile the step with each and each remat, and rank them")
    flags.DEFINE_float("price", None, "of a chip-hour", lower_bound=0.0)
    flags.DEFINE_string("json", "", "write the report here")
    launch(main, config="file")
