"""The processes of a job on several hosts: how they find each other, wait, stop together and end when one is gone."""

import contextlib
import glob
import importlib.util
import os
import re
import threading
from collections.abc import Iterator, Mapping

import jax
from jax.experimental import multihost_utils

from dit_jax.command import Interrupted, report
from dit_jax.config import JobError, MeshConfig, UsageError

# What the command line may say about the other processes, and the variables that say the same.
EXPLICIT = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}


def connect(cfg: MeshConfig, given: Mapping[str, object] | None = None) -> None:
    """Join the other processes of this job, where there are some; alone, do nothing. Before anything wakes the backend.

    They are found by `given` (flags: `coordinator`, `num_processes`, `process_id`), by the variables of the same meaning,
    under SLURM and on Cloud TPU. Those that have not all come within `mesh.initialization` seconds give up, each in one line
    and with exit code 1; a process that gives no sign of life for `mesh.heartbeat` seconds ends all of them.
    """
    chips = bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))
    where = cluster(os.environ, chips, given or {})
    if where is not None:
        with _given_up_after(cfg.initialization, where):
            jax.distributed.initialize(
                **where, initialization_timeout=cfg.initialization + 60, heartbeat_timeout_seconds=cfg.heartbeat
            )
    if jax.process_count() > 1 and where is None:
        raise UsageError(
            f"found {jax.process_count()} processes that are not joined; give each --coordinator, --num_processes and "
            "--process_id"
        )


@contextlib.contextmanager
def _given_up_after(seconds: int, where: dict) -> Iterator[None]:
    """What fails inside is one line; so is what takes longer than `seconds`, where JAX would abort with a stack trace."""
    address = where.get("coordinator_address", "the address that the scheduler gives")
    hint = "start the same command on every host, or raise mesh.initialization"
    if where.get("process_id") == 0:
        problem = (
            f"of {where['num_processes']} processes not all came to the coordinator, {address}, within {seconds} s"
        )
    else:
        problem = f"no coordinator at {address} that all processes reached within {seconds} s"

    def give_up() -> None:
        os._exit(report(JobError(f"{problem}; {hint}")))

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise JobError(f"joining the other processes at {address}: {str(error).splitlines()[0]}") from None
    finally:
        timer.cancel()


def cluster(env: Mapping[str, str], chips: bool, given: Mapping[str, object]) -> dict | None:
    """What `jax.distributed.initialize` is told: {} where JAX finds the others itself, None for a process alone.

    `chips`: whether the machine has TPU chips or the like as devices. `given`: see `connect`.
    """
    asked = {name: value for name, value in given.items() if value is not None}
    if asked or EXPLICIT["coordinator"] in env:
        return _explicit({name: asked.get(name, env.get(variable)) for name, variable in EXPLICIT.items()})
    on_tpu = chips and importlib.util.find_spec("libtpu") is not None and "cpu" not in env.get("JAX_PLATFORMS", "")
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and not on_tpu:
        return _slurm(env)
    return {} if on_tpu else None


def _explicit(found: dict) -> dict:
    """The three values that say who the others are. Raises UsageError naming the one that is missing or wrong."""
    for name, value in found.items():
        expected = "HOST:PORT of process 0" if name == "coordinator" else "a whole number"
        fits = re.fullmatch(r".+:\d{1,5}" if name == "coordinator" else r"\d{1,9}", str(value))
        if value is None or not fits:
            what = "not given" if value is None else f"found {str(value)!r}"
            raise UsageError(f"--{name} (or {EXPLICIT[name]}): {what}, expected {expected}")
    count, index = int(found["num_processes"]), int(found["process_id"])
    if not index < count:
        raise UsageError(f"--process_id: found {index}, expected 0 to {count - 1} for --num_processes={count}")
    return {"coordinator_address": str(found["coordinator"]), "num_processes": count, "process_id": index}


def _slurm(env: Mapping[str, str]) -> dict:
    """One task a node drives all its GPUs; JAX alone would give every task a single one."""
    alone = env.get("SLURM_STEP_NUM_NODES") == env["SLURM_STEP_NUM_TASKS"]
    gpus = env.get("SLURM_GPUS_ON_NODE", "0")
    return {"local_device_ids": list(range(int(gpus)))} if alone and gpus.isdigit() and int(gpus) else {}


def leader() -> bool:
    """Whether this process writes the run's files and talks to people."""
    return jax.process_index() == 0


def everyone_is_here(what: str) -> None:
    """Wait for the other processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Of several processes: whatever ends this one in what runs inside, but for Interrupted, ends it here and at once.

    The others notice, and end too. JAX and Orbax would make them all wait for each other before they let one go.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1 or isinstance(error, Interrupted):
            raise
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            error = JobError(
                "computing with the other processes failed, most likely as one is gone "
                f"({str(error).splitlines()[0][:200]}); the checkpoints are intact, and the same command on all hosts goes on "
                "from the newest"
            )
        os._exit(report(error))


def asked_to_stop(step: int) -> bool:
    """Whether some process got SIGTERM: the same answer on all of them, at the same step."""
    return multihost_utils.reached_preemption_sync_point(step)
