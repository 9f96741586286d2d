"""Train a DiT: `python -m dit_jax.train --config=configs/digits.py --workdir=runs/digits [--config.train.steps=2000 ...]`.

The same command again resumes from the newest checkpoint, bit for bit, or finds nothing to do. SIGTERM saves and exits 75.
"""

from absl import flags

from dit_jax.config import Config, resolve, to_dict
from dit_jax.job import compiled
from dit_jax.job.check import Slice
from dit_jax.job.launch import launch
from dit_jax.workdir.folder import flatten
from dit_jax.workdir.goodput import process_start


def check(cfg: Config, slice_: Slice | None) -> None:
    """Raises UsageError if training would refuse the config, or its mesh and batch on the slice."""
    from dit_jax.devices.mesh import abstract_mesh, check_batch
    from dit_jax.diffusion.task import make_task

    make_task(cfg)
    if slice_:
        mesh = abstract_mesh(cfg.mesh, slice_.devices, slice_.slices)
        check_batch(mesh, cfg.train.batch_size, cfg.optim.accumulate, slice_.devices // slice_.hosts)


def main() -> None:
    from dit_jax.devices.processes import EXPLICIT, check_config, connect, together
    from dit_jax.training.loop import run

    cfg = resolve(flags.FLAGS.config)
    connect(cfg.mesh, {name: getattr(flags.FLAGS, name) for name in EXPLICIT})
    with together():
        check_config(flatten(to_dict(cfg)))
    run(cfg, flags.FLAGS.workdir, since=process_start())


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "the run's folder", required=True)
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if neither Cloud TPU nor SLURM gives it")
    flags.DEFINE_integer("num_processes", None, "how many processes train together")
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0")
    compiled.define_flag()
    launch(main, config="file", check=check)
