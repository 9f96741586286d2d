"""The processes of a job on several hosts: how they find each other, wait, stop together and end when one is gone."""

import contextlib
import glob
import importlib.util
import json
import os
import re
import secrets
import select
import signal
import threading
import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from dit_jax.config import MeshConfig
from dit_jax.devices.mesh import devices_of_processes
from dit_jax.error import IDLE, Interrupted, JobError, UsageError, report, shown
from dit_jax.log import name_process

# What the command line may say about the other processes, and the variables that say the same.
EXPLICIT = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
# Config keys that may differ from host to host: where its data lie and how it reads them.
OWN = ("data.data_dir", "data.latents", "data.cache", "data.workers", "data.prefetch")
PATIENCE = 5.0  # seconds until a new file must be seen on all hosts


class CommonError(UsageError):
    """What all processes found at the same point: each says it, and they end in order."""


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
    if jax.process_count() > 1:
        name_process(jax.process_index())
        check_devices(devices_of_processes())


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
    try:
        with _watched(seconds, JobError(f"{problem}; {hint}")):
            yield
    except (RuntimeError, ValueError) as error:
        raise JobError(f"joining the other processes at {address}: {str(error).splitlines()[0]}") from None


@contextlib.contextmanager
def _watched(seconds: float, late: Exception) -> Iterator[None]:
    """Ends the process with `late` when what runs inside takes longer, and at SIGTERM or the keyboard's interrupt.

    For calls that do not come back to Python, where no handler of a signal would run: its number comes through a pipe.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    ends = {signal.SIGTERM: Interrupted(IDLE), signal.SIGINT: KeyboardInterrupt()}

    def watch() -> None:
        end = time.monotonic() + seconds
        while select.select([reader], [], [], max(0.0, end - time.monotonic()))[0]:
            number = os.read(reader, 1)[0]
            if number == 0:  # all went well
                return
            if number in ends:
                os._exit(report(ends[number]))
        os._exit(report(late))

    thread = threading.Thread(target=watch, daemon=True)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(writer, bytes(1))
        thread.join()
        os.close(reader)
        os.close(writer)


def cluster(env: Mapping[str, str], chips: bool, given: Mapping[str, object]) -> dict | None:
    """What `jax.distributed.initialize` is told: {} where JAX finds the others itself, None for a process alone.

    `chips`: whether the machine has TPU chips or the like as devices. `given`: see `connect`.
    """
    asked = {name: value for name, value in given.items() if value is not None}
    if asked or any(variable in env for variable in EXPLICIT.values()):
        return _explicit({name: asked.get(name, env.get(variable)) for name, variable in EXPLICIT.items()})
    on_tpu = chips and importlib.util.find_spec("libtpu") is not None and "cpu" not in env.get("JAX_PLATFORMS", "")
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and not on_tpu:
        return _slurm(env)
    return {} if on_tpu else None


def _explicit(found: dict) -> dict:
    """The three values that say who the others are. Raises UsageError naming the one that is missing or wrong."""
    for name, value in found.items():
        if name == "coordinator":
            expected, port = "HOST:PORT of process 0", re.fullmatch(r".+:([0-9]{1,5})", str(value))
            fits = port and 1 <= int(port[1]) <= 65535
            expected += " with a port from 1 to 65535" if port and not fits else ""
        else:
            least = 1 if name == "num_processes" else 0
            expected = f"a whole number from {least}"
            fits = re.fullmatch(r"[0-9]{1,9}", str(value)) and int(value) >= least
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


def check_devices(counts: list[int]) -> None:
    """Raises UsageError unless all processes have as many devices. `counts`: those of process 0, 1, ..."""
    uneven = [index for index, count in enumerate(counts) if count != counts[0]]
    if uneven:
        raise CommonError(
            f"found {counts[0]} devices on process 0 and {counts[uneven[0]]} on process {uneven[0]}, expected as many on each; "
            "start one process of the same kind on every host"
        )


def check_config(config: Mapping[str, object]) -> None:
    """Raises UsageError on all processes unless each was given the same config, up to the keys in OWN. `config`: {"a.b": value}."""
    if jax.process_count() > 1:
        compare(gather({key: value for key, value in config.items() if key not in OWN}))


def compare(configs: list[dict], advice: str = "start the same command on every host") -> None:
    """Raises UsageError naming the first key that differs among the configs of process 0, 1, ..., and the advice."""
    first = configs[0]
    for index, other in enumerate(configs[1:], 1):
        for key in {**first, **other}:
            if (key in first, first.get(key)) != (key in other, other.get(key)):
                has, found = (shown(c[key]) if key in c else "no such key" for c in (first, other))
                raise CommonError(f"{key}: found {found} on process {index}, expected {has} as on process 0; {advice}")


def check_folder(workdir: str) -> None:
    """Raises UsageError on all processes unless `workdir` is one folder for all. It is made where it is missing."""
    if jax.process_count() == 1:
        return
    with _token(workdir) if leader() else contextlib.nullcontext("") as mine:
        name = gather(mine)[0]
        seen = gather({"workdir": os.path.abspath(workdir), "sees": not name or _sees(workdir, name)})
        for index, found in enumerate(seen):
            if not found["sees"]:
                raise CommonError(
                    f"--workdir: {found['workdir']!r} on process {index} is not the folder that process 0 sees, "
                    f"{seen[0]['workdir']!r}; it must be on a disk that all hosts share"
                )


@contextlib.contextmanager
def _token(workdir: str) -> Iterator[str]:
    """The name of an empty file in the folder, for as long as this lasts; "" where none can be written: the run says why.

    After a CommonError, a folder that was made for it is gone too.
    """
    new, name = not os.path.exists(workdir), f"shared.tmp{secrets.token_hex(8)}"
    path = os.path.join(workdir, name)
    try:
        os.makedirs(workdir, exist_ok=True)
        with open(path, "x"):
            pass
    except OSError:
        name = ""
    try:
        try:
            yield name
        finally:
            if name:
                os.remove(path)
    except CommonError:
        if new:
            os.rmdir(workdir)
        raise


def _sees(workdir: str, name: str) -> bool:
    """Whether the file is there, or comes soon; looking at the folders makes NFS ask its server anew."""
    end = time.monotonic() + PATIENCE
    while not os.path.exists(os.path.join(workdir, name)):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
        for folder in (os.path.dirname(os.path.abspath(workdir)), workdir):
            with contextlib.suppress(OSError):
                os.listdir(folder)
    return True


def gather(value: object) -> list:
    """Of each process, in their order, the value that it gives (JSON)."""
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    rows = multihost_utils.process_allgather(np.pad(data, (0, int(sizes.max()) - data.size)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def leader() -> bool:
    """Whether this process writes the run's files and talks to people."""
    return jax.process_index() == 0


def everyone_is_here(what: str) -> None:
    """Wait for the other processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Of several processes: whatever ends this one in what runs inside, but for Interrupted and CommonError, ends it here and at once.

    The others notice, and end too. JAX and Orbax would make them all wait for each other before they let one go.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1 or isinstance(error, (Interrupted, CommonError)):
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
