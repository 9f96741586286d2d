"""Train an isoFLOP ladder, evaluate it, fit its scaling law and test the law on a larger model.

    python -m dit_jax.sweep --config=configs/digits_isoflop.py --workdir=runs/demo

Cells run side by side in `sweep.processes` processes, each as an ordinary run in `W/cells/<name>`. Finished cells are skipped.
A cell that fails is reported and does not stop the others; the exit code is then 1. `--launcher=slurm|print` hands the cells to
a scheduler instead (dit_jax.job.launcher), and `--cell` runs one of them alone.
"""

import os
import signal

from absl import flags

from dit_jax.config import resolve
from dit_jax.error import INTERRUPTED, Interrupted, JobError
from dit_jax.job.launch import launch
from dit_jax.job.launcher import define_flags


def main() -> None:
    from dit_jax.sweep.ladder import run, run_apart

    signal.signal(signal.SIGTERM, _interrupt)
    cfg, workdir, launcher, cell = (getattr(flags.FLAGS, name) for name in ("config", "workdir", "launcher", "cell"))
    if launcher != "local" or cell is not None:
        run_apart(resolve(cfg), workdir, launcher, cell)
        return
    failed = run(resolve(cfg), workdir)
    if failed:
        names = ", ".join(cell.name for cell in failed)
        raise JobError(f"{len(failed)} cell(s) failed: {names}; the same command tries them again")


def _interrupt(number, frame) -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(INTERRUPTED))  # cells notice, save and stop
    raise Interrupted("SIGTERM: running cells were asked to save; the same command goes on from there")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "the sweep's folder", required=True)
    define_flags()
    launch(main, config="file")
