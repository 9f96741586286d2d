"""Compile a job's real step for a slice that is not there, and report its memory, collectives and time.

    python -m dit_jax.preflight --config=configs/imagenet256.py:DiT-XL/2,v3-256 [--job=evaluate --num=50000] [--price=2.0] [--json=OUT]
    python -m dit_jax.preflight --config=configs/imagenet256.py:DiT-XL/2 --topology=v3-256 --search=4,8,16,32

libtpu compiles TPU programs on any x86-64 Linux machine, and so does XLA's compiler of GPU programs (`make gpu`). Programs for `cpux8`
and the like are compiled by this machine's XLA. Memory and collectives are those of the program that would run; for GPUs the memory is
an estimate. The step time is the TPU compiler's own estimate, made to compare layouts. It omits collectives, so their bytes over the
links' bandwidth stand beside it. For GPUs there is no estimate of the time.
"""

from absl import flags

from dit_jax.config import Config, resolve
from dit_jax.error import JobError, UsageError, typed
from dit_jax.files.out import check_json, write_report
from dit_jax.hardware import Topology, topology
from dit_jax.job.launch import launch
from dit_jax.log import say


def _check(cfg: Config, job: str, slice_: Topology, values) -> list[int]:
    """The sizes of fsdp to search. Raises UsageError for an impossible mesh, batch, file or size."""
    from dit_jax.devices.mesh import abstract_mesh, batch_split, check_batch
    from dit_jax.preflight import evaluation
    from dit_jax.preflight.search import check_sizes
    from dit_jax.program import autoencoder

    mesh = abstract_mesh(cfg.mesh, slice_.devices, slice_.slices)
    if job == "train":
        check_batch(mesh, cfg.train.batch_size, cfg.optim.accumulate, slice_.devices // slice_.hosts)
        if cfg.data.encode == "in_step":
            autoencoder(cfg)
    if job == "evaluate":
        evaluation.check(cfg, values.num or cfg.eval.samples)
    check_json(values.json)
    if values.price is not None:
        typed(values.price, float, "--price")
    if values.search and job != "train":
        raise UsageError(f"--search: found --job={job}, expected the train step, whose layout there is a choice of")
    return check_sizes(values.search, slice_, batch_split(mesh) // slice_.slices)


def _topology(values) -> Topology:
    """The slice of --topology, else the one that the config's argument names."""
    from dit_jax.devices.layout import FSDP

    words = flags.FLAGS["config"].config_filename.partition(":")[2].split(",")
    name = values.topology or next((word for word in words if word in FSDP), "")
    if not name:
        raise UsageError(
            "--topology: not given, expected a slice such as v3-256, or a config that names it: FILE:MODEL,v3-256"
        )
    return topology(name)


def main() -> None:
    from dit_jax.devices.mesh import missing_compiler
    from dit_jax.preflight import evaluation
    from dit_jax.preflight.search import changed, examine, search, show_ranks
    from dit_jax.preflight.text import show
    from dit_jax.program import sized

    values = flags.FLAGS
    cfg, slice_, job = sized(resolve(values.config)), _topology(values), values.job
    if job != "train":
        cfg = changed(cfg, {"mesh.data": -1, "mesh.fsdp": 1, "mesh.tensor": 1})  # as these jobs do
    sizes, kind = _check(cfg, job, slice_, values), slice_.device.kind if slice_.device else "CPU"
    say(f"{job} of {cfg.data.title} for {slice_.name}: {slice_.devices} x {kind}, hosts: {slice_.hosts}")
    if sizes:
        found = reports = search(cfg, slice_, sizes)
        show_ranks(reports, slice_)
    else:
        if job == "evaluate":
            found = evaluation.examine(cfg, slice_, values.num or cfg.eval.samples, values.price)
        else:
            found = examine(cfg, job, slice_, values.num, values.price)
        show(found)
        reports = [found]
    if values.json:
        write_report(values.json, found)
    if missing := missing_compiler(slice_):
        raise UsageError(f"cannot compile for {slice_.name}, so the report has only what needs no compiler: {missing}")
    if all(one["fits"] is False for one in reports):
        few = f"none of the {len(reports)} layouts that were compiled fits" if sizes else "the program does not fit"
        raise JobError(
            f"{few} a device of {slice_.name}" if reports else "by the rule of memory no layout fits: none was compiled"
        )


if __name__ == "__main__":
    flags.DEFINE_string(
        "topology",
        None,
        "v3-8 to v6e-256, tpu7x-8, 2xv4-64, h100x8, t4x1, cpux8, ...; default: the slice of the config",
    )
    jobs = "the step of a training, the sampling of one batch, or all programs that score a checkpoint"
    flags.DEFINE_enum("job", "train", ("train", "sample", "evaluate"), jobs)
    flags.DEFINE_integer("num", 0, "images to estimate hours for; default: eval.samples; not for train", lower_bound=0)
    flags.DEFINE_list("search", [], "values of mesh.fsdp: compile the step with each and each remat, and rank them")
    flags.DEFINE_float("price", None, "of a chip-hour", lower_bound=0.0)
    flags.DEFINE_string("json", "", "write the report here")
    launch(main, config="file")
