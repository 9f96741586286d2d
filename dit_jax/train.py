"""Train a DiT: `python -m dit_jax.train --config=configs/digits.py --workdir=runs/digits [--config.train.steps=2000 ...]`.

The same command again resumes from the newest checkpoint, bit for bit, or finds nothing to do. SIGTERM saves and exits 75.
`--init=OTHER` begins a new run with the weights of another run or of a converted model, as far as they fit.
"""

from absl import flags

from dit_jax.config import Config, resolve
from dit_jax.error import UsageError
from dit_jax.job import compiled, hosts
from dit_jax.job.check import Slice, reachable
from dit_jax.job.launch import launch
from dit_jax.workdir.goodput import process_start


def _init() -> tuple[str, int | None]:
    """Return the run whose weights a new one begins with, and its step. Raises UsageError for a step of no run."""
    source, step = flags.FLAGS.init, flags.FLAGS.init_step
    if step is not None and not source:
        raise UsageError(f"--init_step: found {step} without --init, expected both, or neither")
    return source, step


def _is_here() -> bool:
    """Whether the run's folder can be looked at from this machine."""
    return reachable(flags.FLAGS.workdir)


def check(cfg: Config, slice_: Slice | None) -> None:
    """Raises UsageError if training would refuse the config, its mesh and batch on the slice, or the weights to begin with."""
    from dit_jax.devices.mesh import abstract_mesh, check_batch
    from dit_jax.diffusion.task import make_task

    make_task(cfg)
    source, step = _init()
    if (source and reachable(source)) or not (source or _is_here()):
        from dit_jax.training.init import check_source, check_taught

        check_source(cfg, source, step, typed=True) if source else check_taught(cfg)
    if cfg.data.encode == "in_step" and (not cfg.autoencoder.folder or reachable(cfg.autoencoder.folder)):
        from dit_jax.networks.autoencoder import follow_latents

        follow_latents(cfg)
    if cfg.model.encoded and reachable(cfg.model.text_encoder):
        from dit_jax.networks.caption import open_text

        open_text(cfg.model)
    if cfg.train.evaluate_every:
        from dit_jax.evaluation.in_run import check_in_run
        from dit_jax.evaluation.protocol import check_config

        check_config(cfg)
        check_in_run(cfg)
    if slice_:
        mesh = abstract_mesh(cfg.mesh, slice_.devices, slice_.slices)
        check_batch(mesh, cfg.train.batch_size, cfg.optim.accumulate, slice_.devices // slice_.hosts)


def main() -> None:
    from dit_jax.evaluation.in_run import make_scores
    from dit_jax.training.loop import run

    cfg = resolve(flags.FLAGS.config)
    hosts.join(cfg)
    run(cfg, flags.FLAGS.workdir, since=process_start(), scoring=make_scores, init=_init())


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "the run's folder", required=True)
    flags.DEFINE_string("init", "", "run folder, or one that `convert` wrote, whose EMA weights a new run begins with")
    flags.DEFINE_integer("init_step", None, "checkpoint of --init; default: the newest", lower_bound=0)
    hosts.define_flags()
    compiled.define_flag()
    launch(main, config="file", check=check)
