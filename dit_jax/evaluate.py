"""Evaluate a run's checkpoints: `python -m dit_jax.evaluate --workdir=W [--config.eval.samples=1000 ...] [--watch]`.

Measures the held-out loss on a fixed set of (image, noise, t), and sample metrics (FID or another Frechet distance, and the
metrics beside it) for every combination of `eval.weights`, `samplers`, `steps` and `guidance`. One record per checkpoint
and protocol goes to `W/eval/records.jsonl` and is not computed again. Sample i depends on (seed, i) only: a sample metric
that was interrupted resumes from `W/eval/partial/`, also with other batches or devices, and ends in the same record.
SIGTERM saves and exits 75. `--launcher=slurm|print` hands the combinations to a scheduler (dit_jax.job.launcher), and
`--cell` evaluates one of them.
"""

import os
import time

from absl import flags

from dit_jax.config import Config, MeshConfig, resolve, to_dict
from dit_jax.error import UsageError
from dit_jax.job import compiled
from dit_jax.job.launch import launch, stop_flag
from dit_jax.job.launcher import define_flags, find_cell, hand_over
from dit_jax.workdir.folder import read_config
from dit_jax.workdir.goodput import process_start
from dit_jax.workdir.records import RECORDS


def main() -> None:
    from dit_jax import checkpoint
    from dit_jax.devices.mesh import make_mesh
    from dit_jax.evaluation.protocol import cells, check_config
    from dit_jax.evaluation.run import _ledger, _report_failed, _run, tasks

    values = flags.FLAGS
    cfg = resolve(values.config)
    if not values.watch and not checkpoint.steps(values.workdir):
        checkpoint.find_step(values.workdir)  # says what is missing
    _check_model(cfg, values.workdir)
    parts = cells(cfg)
    if values.cell is not None:
        cfg = list(parts.values())[find_cell(list(parts), values.cell)]
    elif values.launcher != "local":
        check_config(cfg)
        hand_over(values.launcher, "evaluate", list(parts), range(len(parts)), conclude=False)
        return
    failed: dict[int, str] = {}
    with stop_flag() as stop, _ledger(values.workdir, False, process_start()) as ledger:
        wanted = tasks(cfg, make_mesh(MeshConfig()), values.workdir, stop, False)
        while True:
            records = _run(wanted, values.workdir, None, False, stop, failed, ledger)
            newest = max([*(record["step"] for record in records), *failed], default=0)
            if not values.watch or newest >= read_config(values.workdir).train.steps:
                break
            with ledger.spend("wait"):
                _wait(cfg.eval.poll_seconds, stop)
    print(os.path.join(values.workdir, RECORDS))
    _report_failed(failed)


def _check_model(cfg: Config, workdir: str) -> None:
    """Raises UsageError if the command changes the run's model, which protocols and records do not name."""
    from dit_jax import checkpoint

    asked, found = to_dict(cfg.model), to_dict(read_config(workdir).model)
    for key in found:
        if key not in checkpoint.FREE and asked[key] != found[key]:
            raise UsageError(f"model.{key}: found {asked[key]!r}, expected {found[key]!r}, as the run {workdir} has")


def _wait(seconds: float, stop: list) -> None:
    from dit_jax.evaluation.run import _check_stop

    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        _check_stop(stop, "what is recorded stays")
        time.sleep(min(left, 0.2))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "the run's folder", required=True)
    flags.DEFINE_bool("watch", False, "follow a live run until its last step")
    define_flags()
    compiled.define_flag()
    launch(main, config="workdir")
