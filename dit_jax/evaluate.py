"""Evaluate a run's checkpoints: `python -m dit_jax.evaluate --workdir=W [--config.eval.samples=1000 ...] [--watch]`.

Measures the held-out loss on a fixed set of (image, noise, t), and sample metrics (FID or another Frechet distance, and the
metrics beside it) for every combination of `eval.weights`, `samplers`, `steps`, `guidance`, `ema` (widths made of snapshots, of
which the best is named), `interval`, `guide`, `rescale`, `reuse` and `quantize`. One record per checkpoint and protocol goes to
`W/eval/records.jsonl` and is not computed again. Sample i depends on (seed, i) only: a sample metric that was interrupted resumes
from `W/eval/partial/`, also with other batches or devices, and ends in the same record.
`--at=2000,4000` evaluates these steps alone, `--at=all` those on the disk now. SIGTERM saves and exits 75. On several hosts
each draws its share of the images and process 0 adds up and records: the same metrics, bit for bit.
`--launcher=slurm|print` hands the combinations, with `--at` those of each step, to a scheduler (dit_jax.job.launcher), and
`--cell` evaluates one of them.
"""

import os

from absl import flags

from dit_jax.config import Config, resolve, to_dict
from dit_jax.error import UsageError
from dit_jax.job import compiled, hosts
from dit_jax.job.check import Slice
from dit_jax.job.launch import launch
from dit_jax.job.launcher import define_flags, find_cell, hand_over
from dit_jax.workdir.folder import read_config
from dit_jax.workdir.goodput import process_start
from dit_jax.workdir.records import place


def check(cfg: Config, _: Slice | None) -> None:
    """Raises UsageError if the evaluation would refuse the config."""
    from dit_jax.evaluation.protocol import check_config

    _check_model(cfg, flags.FLAGS.workdir)
    check_config(cfg)
    _steps(flags.FLAGS)


def main() -> None:
    from dit_jax import checkpoint
    from dit_jax.devices.processes import by_leader, check_folder, leader, together
    from dit_jax.evaluation.protocol import cells, check_config
    from dit_jax.evaluation.run import follow, report_failed

    values = flags.FLAGS
    cfg = resolve(values.config)
    if not values.watch and not checkpoint.steps(values.workdir):
        checkpoint.find_step(values.workdir)  # says what is missing
    _check_model(cfg, values.workdir)
    steps = _steps(values)
    parts = {name: (part, steps) for name, part in cells(cfg).items()}
    if steps:
        parts = {f"{step}-{name}": (part, [step]) for step in steps for name, (part, _) in parts.items()}
    if values.cell is not None:
        cfg, steps = list(parts.values())[find_cell(list(parts), values.cell)]
    elif values.launcher != "local":
        check_config(cfg)
        at = {"at": ",".join(map(str, steps))} if steps else {}  # "all" may be others when a cell starts
        hand_over(values.launcher, "evaluate", list(parts), range(len(parts)), conclude=False, changes=at)
        return
    if sum(not name.endswith("loss") for name in parts) > 1 and not values.compilation_cache:  # a grid
        compiled.use_cache(os.path.join(values.workdir, "compiled"))
    hosts.join(cfg)
    with together():
        check_folder(values.workdir)
        steps = by_leader(lambda: steps)
        failed = follow(cfg, values.workdir, values.watch, process_start(), steps)
        if leader():
            print(place(values.workdir))
        report_failed(failed)


def _steps(values) -> list[int] | None:
    """Return the checkpoints that `--at` names, rising; None without it. Raises UsageError if one of them is not there."""
    from dit_jax import checkpoint

    if values.at and values.watch:
        raise UsageError("--at, --watch: found both, expected one of them: a live run has further steps")
    for text in values.at if values.at != ["all"] else ():
        if not (text.isascii() and text.isdecimal()):
            raise UsageError(f"--at: found {text!r}, expected steps with commas, or all")
    there = checkpoint.steps(values.workdir)
    steps = there if values.at == ["all"] else sorted({int(text) for text in values.at})
    if gone := [step for step in steps if step not in there]:
        raise UsageError(f"--at: found {gone[0]}, expected steps among {there}, the checkpoints of {values.workdir}")
    return steps or None


def _check_model(cfg: Config, workdir: str) -> None:
    """Raises UsageError if the command changes the run's model, which protocols and records do not name."""
    from dit_jax import checkpoint

    asked, found = to_dict(cfg.model), to_dict(read_config(workdir).model)
    for key in found:
        if key not in checkpoint.FREE and asked[key] != found[key]:
            raise UsageError(f"model.{key}: found {asked[key]!r}, expected {found[key]!r}, as the run {workdir} has")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "the run's folder", required=True)
    flags.DEFINE_list(
        "at", [], "steps of the checkpoints, with commas; all = those there now; default: every one not yet done"
    )
    flags.DEFINE_bool("watch", False, "follow a live run until its last step")
    define_flags()
    compiled.define_flag()
    hosts.define_flags()
    launch(main, config="workdir", check=check)
