"""Processes of a job on several hosts: joining, waiting, stopping together, and ending when one is lost."""

import atexit
import contextlib
import glob
import importlib.util
import json
import os
import re
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from dit_jax.config import MeshConfig
from dit_jax.devices.alive import end, watch
from dit_jax.devices.mesh import devices_of_processes
from dit_jax.error import (
    IDLE,
    Interrupted,
    JobError,
    NotFiniteError,
    PeerLost,
    StorageError,
    UsageError,
    report,
    shown,
    watching,
)
from dit_jax.files import absolute, create, delete, delete_empty, exists, is_file, make_folder, names
from dit_jax.log import name_process

# Flags that describe the other processes, and the environment variables of the same meaning.
EXPLICIT = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
# Config keys that may differ between hosts: the place of the data and the way of reading them.
OWN = ("data.data_dir", "data.folder", "data.mixture", "data.latents", "data.cache", "data.workers", "data.prefetch")
KINDS = (NotFiniteError, UsageError, StorageError, JobError, Interrupted)  # errors that processes tell each other of
PATIENCE = 5.0  # seconds until a new file must be visible on all hosts


class CommonError(UsageError):
    """Error that all processes find at the same point: each reports it and ends normally."""

    common = True


def connect(cfg: MeshConfig, given: Mapping[str, object] | None = None) -> None:
    """Joins the other processes of this job, if there are any. Call it before anything initialises JAX's backend.

    The processes are found by `given` (flags `coordinator`, `num_processes`, `process_id`), by the environment variables of the same
    meaning, under SLURM and on Cloud TPU. If not all join within `mesh.initialization` seconds, each ends with a line and PEER_LOST.
    A process without a heartbeat for `mesh.heartbeat` seconds ends all. Raises UsageError on invalid `given`, PeerLost if joining fails.
    """
    chips = bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))
    where = cluster(os.environ, chips, given or {})
    if where is not None:
        with _given_up_after(cfg.initialization, where):
            leaving = threading.Event()
            atexit.register(
                leaving.set
            )  # before JAX's: while it waits for the others at exit, this one gives signs of life
            jax.distributed.initialize(
                **where,
                initialization_timeout=cfg.initialization + 60,
                heartbeat_timeout_seconds=2 * cfg.heartbeat + 5,  # later than `watch`
            )
            state = distributed.global_state
            watch(state.client, state.process_id, cfg.heartbeat, leaving)
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
    """Turns a failure inside, or more than `seconds`, into an error of one line; JAX alone would abort with a stack trace."""
    address = where.get("coordinator_address", "the address that the scheduler gives")
    hint = "start the same command on every host, or raise mesh.initialization"
    if where.get("process_id") == 0:
        problem = (
            f"of {where['num_processes']} processes not all came to the coordinator, {address}, within {seconds} s"
        )
    else:
        problem = f"no coordinator at {address} that all processes reached within {seconds} s"
    try:
        with _watched(seconds, PeerLost(f"{problem}; {hint}")):
            yield
    except (RuntimeError, ValueError) as error:
        kind = JobError if isinstance(error, ValueError) else PeerLost
        raise kind(f"joining the other processes at {address}: {str(error).splitlines()[0]}") from None


@contextlib.contextmanager
def _watched(seconds: float, late: Exception) -> Iterator[None]:
    """Ends the process with error `late` after `seconds` inside, and at SIGTERM or the keyboard's interrupt."""
    end, ends = time.monotonic() + seconds, {signal.SIGTERM: Interrupted(IDLE), signal.SIGINT: KeyboardInterrupt()}

    def react(number: int | None) -> float:
        if number is None or number in ends:
            os._exit(report(ends.get(number, late)))
        return max(0.0, end - time.monotonic())

    with watching(react, seconds):
        yield


def cluster(env: Mapping[str, str], chips: bool, given: Mapping[str, object]) -> dict | None:
    """Arguments of `jax.distributed.initialize`: {} if JAX finds the others itself, None for a single process.

    `chips`: whether the machine has accelerator device files, such as TPU chips. `given`: see `connect`, as are errors.
    """
    asked = {name: value for name, value in given.items() if value is not None}
    if asked or any(variable in env for variable in EXPLICIT.values()):
        return _explicit({name: asked.get(name, env.get(variable)) for name, variable in EXPLICIT.items()})
    on_tpu = chips and importlib.util.find_spec("libtpu") is not None and "cpu" not in env.get("JAX_PLATFORMS", "")
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and not on_tpu:
        return _slurm(env)
    return {} if on_tpu else None


def _explicit(found: dict) -> dict:
    """Arguments from flags and variables. Raises UsageError naming one that is missing or wrong."""
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
    """Arguments under SLURM: with one task per node all its GPUs, because JAX would take one GPU per task."""
    alone = env.get("SLURM_STEP_NUM_NODES") == env["SLURM_STEP_NUM_TASKS"]
    gpus = env.get("SLURM_GPUS_ON_NODE", "0")
    return {"local_device_ids": list(range(int(gpus)))} if alone and gpus.isdigit() and int(gpus) else {}


def common(error: Exception) -> Exception:
    """Marks an error that all processes raise at the same point, so that they stay together."""
    error.common = True
    return error


def is_common(error: BaseException) -> bool:
    """Whether all processes raised this error at the same point, so that they are still together."""
    return getattr(error, "common", False)


def check_devices(counts: list[int]) -> None:
    """Raises CommonError unless all processes have equally many devices. `counts`: devices of process 0, 1, ..."""
    uneven = [index for index, count in enumerate(counts) if count != counts[0]]
    if uneven:
        raise CommonError(
            f"found {counts[0]} devices on process 0 and {counts[uneven[0]]} on process {uneven[0]}, expected as many on each; "
            "start one process of the same kind on every host"
        )


def check_config(config: Mapping[str, object], *advice: str) -> None:
    """Raises CommonError, with the advice, on all processes unless their configs {"a.b": value} agree, except for the keys in OWN."""
    if jax.process_count() > 1:
        compare(gather({key: value for key, value in config.items() if key not in OWN}), *advice)


def compare(configs: list[dict], advice: str = "start the same command on every host") -> None:
    """Raises CommonError with the first key that differs among the configs of process 0, 1, ..., and the advice."""
    first = configs[0]
    for index, other in enumerate(configs[1:], 1):
        for key in {**first, **other}:
            if (key in first, first.get(key)) != (key in other, other.get(key)):
                has, found = (shown(c[key]) if key in c else "no such key" for c in (first, other))
                raise CommonError(f"{key}: found {found} on process {index}, expected {has} as on process 0; {advice}")


def check_folder(workdir: str, flag: str = "--workdir") -> None:
    """Raises CommonError on all processes unless `workdir` is one shared folder. Makes it if it is missing."""
    if jax.process_count() == 1:
        return
    with _token(workdir) if leader() else contextlib.nullcontext("") as mine:
        name = gather(mine)[0]
        seen = gather({"workdir": absolute(workdir), "sees": not name or _sees(workdir, name)})
        for index, found in enumerate(seen):
            if not found["sees"]:
                raise CommonError(
                    f"{flag}: {found['workdir']!r} on process {index} is not the folder that process 0 sees, "
                    f"{seen[0]['workdir']!r}; it must be on a disk that all hosts share, or in a bucket"
                )


@contextlib.contextmanager
def _token(workdir: str) -> Iterator[str]:
    """Temporary empty file in the folder: yields its name, or "" if it cannot be written (the run will report why).

    After a CommonError, a folder that was made for it is removed too.
    """
    new, name = not exists(workdir), f"shared.tmp{secrets.token_hex(8)}"
    path = os.path.join(workdir, name)
    try:
        make_folder(workdir)
        create(path, "")
    except OSError:
        name = ""
    try:
        try:
            yield name
        finally:
            if name:
                delete(path)
    except CommonError:
        if new:
            delete_empty(workdir)
        raise


def _sees(workdir: str, name: str) -> bool:
    """Whether the file appears within PATIENCE; listing the folders refreshes the NFS cache."""
    end = time.monotonic() + PATIENCE
    while not is_file(os.path.join(workdir, name)):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
        for folder in (os.path.dirname(absolute(workdir)), workdir):
            with contextlib.suppress(OSError):
                names(folder)
    return True


def gather(value: object) -> list:
    """Collects a JSON value from each process, in process order."""
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    length = 1 << int(sizes.max() - 1).bit_length()  # few lengths, because each is a program
    rows = multihost_utils.process_allgather(np.pad(data, (0, length - data.size)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def of_all(value: object) -> list:
    """The JSON value of each process, in their order."""
    return [value] if jax.process_count() == 1 else gather(value)


def by_leader(work: Callable):
    """Runs `work` on process 0 and returns its value, of JSON, on all; all raise its UsageError, JobError or Interrupted."""
    if jax.process_count() == 1:
        return work()
    found: list = []
    if leader():
        try:
            found = [work()]
        except KINDS as error:
            found = [None, _told(error)]
    value, *error = gather(found)[0]
    if error:
        raise _heard(error[0])
    return value


def agree(stopping: bool = False, error: Exception | None = None) -> bool:
    """Whether any process is `stopping`, the same answer on all; all raise the `error` that one has met. All call it at once."""
    if jax.process_count() == 1:
        if error:
            raise error
        return stopping
    codes = multihost_utils.process_allgather(np.int32(2 if error else stopping))
    if codes.max() == 2:
        raise _heard(next(found for found in gather(error and _told(error)) if found))
    return bool(codes.max())


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """A block that each process goes through at its own pace, with equally many calls of `agree`; waits for all at its end. All raise the
    error that one has met inside, as soon as they call `agree`."""
    try:
        yield
    except KINDS as error:
        if is_common(error) or isinstance(error, Interrupted):
            raise
        agree(error=error)
        raise
    else:
        agree()


def _told(error: Exception) -> list[str]:
    return [next(kind.__name__ for kind in KINDS if isinstance(error, kind)), str(error)]


def _heard(told: list[str]) -> Exception:
    return common(next(kind for kind in KINDS if kind.__name__ == told[0])(told[1]))


def whole(tree):
    """Copies arrays to the host, whole wherever their parts are. All processes call it."""
    return jax.device_get(tree) if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


def host_copy(array) -> np.ndarray:
    """Copies an array to the host, wherever its parts are. All processes call it."""
    alone = not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated
    return np.asarray(array if alone else whole(array))


def leader() -> bool:
    """Whether this process writes the run's files and reports progress."""
    return jax.process_index() == 0


def everyone_is_here(what: str) -> None:
    """Waits for the other processes at the barrier `what`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """In a multi-process job, exits immediately on any exception except Interrupted and those that `is_common`.

    The other processes notice and end too. Otherwise JAX and Orbax would make all wait for each other at exit.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1 or isinstance(error, Interrupted) or is_common(error):
            raise
        if _of_the_runtime(error):
            error = PeerLost(
                "computing with the other processes failed, most likely as one is gone "
                f"({str(error).splitlines()[0][:200]}); what is saved is intact, and the same command on all hosts goes on from it"
            )
        end(error)


def _of_the_runtime(error: BaseException) -> bool:
    """Whether it is an error of XLA's runtime other than a lack of memory; from a program that ran before JAX raises a ValueError."""
    bare = type(error) is ValueError and re.match(r"[A-Z_]+: ", str(error))
    return bool(isinstance(error, jax.errors.JaxRuntimeError) or bare) and "RESOURCE_EXHAUSTED" not in str(error)


def asked_to_stop(step: int) -> bool:
    """Whether a process got SIGTERM; all processes get the same answer at the same step."""
    return multihost_utils.reached_preemption_sync_point(step)
