"""Jobs on several hosts: the flags that say where the others are, and the check that all were given the same command."""

from absl import flags

from dit_jax.config import Config, to_dict
from dit_jax.job import help
from dit_jax.job.check import PATHS
from dit_jax.workdir.folder import code_sha256, flatten, provenance


def define_flags() -> None:
    """Define `--coordinator`, `--num_processes` and `--process_id`."""
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if neither Cloud TPU nor SLURM gives it")
    flags.DEFINE_integer("num_processes", None, "how many processes do this job together, one a host")
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0")


def join(cfg: Config) -> int:
    """Join the other processes of the job, if there are any; returns their number. They must have the same command, code and libraries.

    Flags that name a path may differ, because each host may see a shared folder under a name of its own; see
    `devices.processes.check_folder`. Raises UsageError on all if another flag or key differs.
    """
    import jax

    from dit_jax.devices.processes import EXPLICIT, check_config, connect, together

    values = {name: flags.FLAGS[name].value for name in help.own_flags()}
    connect(cfg.mesh, {name: values[name] for name in EXPLICIT})
    own = {*EXPLICIT, *PATHS, "config"}
    with together():
        command = {f"--{name}": value for name, value in values.items() if name not in own}
        check_config(flatten(to_dict(cfg)) | command)
        check_config(flatten(provenance()) | {"code": code_sha256()}, "install the same commit and libraries on all")
    return jax.process_count()
