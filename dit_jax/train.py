"""Train a DiT: `python -m dit_jax.train --config=configs/digits.py --workdir=runs/digits [--config.train.steps=2000 ...]`.

The same command again resumes from the newest checkpoint, bit for bit, or finds nothing to do. SIGTERM saves and exits 75.
"""

from absl import flags

from dit_jax.config import Config, resolve
from dit_jax.job import compiled, hosts
from dit_jax.job.check import Slice, reachable
from dit_jax.job.launch import launch
from dit_jax.workdir.goodput import process_start


def check(cfg: Config, slice_: Slice | None) -> None:
    """Raises UsageError if training would refuse the config, or its mesh and batch on the slice."""
    from dit_jax.devices.mesh import abstract_mesh, check_batch
    from dit_jax.diffusion.task import make_task

    make_task(cfg)
    if cfg.data.encode == "in_step" and (not cfg.autoencoder.folder or reachable(cfg.autoencoder.folder)):
        from dit_jax.networks.autoencoder import follow_latents

        follow_latents(cfg)
    if cfg.train.evaluate_every:
        from dit_jax.evaluation.protocol import check_config

        check_config(cfg)
    if slice_:
        mesh = abstract_mesh(cfg.mesh, slice_.devices, slice_.slices)
        check_batch(mesh, cfg.train.batch_size, cfg.optim.accumulate, slice_.devices // slice_.hosts)


def main() -> None:
    from dit_jax.evaluation.in_run import make_scores
    from dit_jax.training.loop import run

    cfg = resolve(flags.FLAGS.config)
    hosts.join(cfg)
    run(cfg, flags.FLAGS.workdir, since=process_start(), scoring=make_scores)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "the run's folder", required=True)
    hosts.define_flags()
    compiled.define_flag()
    launch(main, config="file", check=check)
