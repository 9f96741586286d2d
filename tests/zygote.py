"""A process that has imported the heavy libraries and forks once per job: a job then starts in milliseconds, not seconds.

Reads one JSON request a line: {"job", "arguments", "out", "err", ...} starts a job and is answered with its process id,
{"poll": pid} with its exit code, or "running". Each job runs its module as `__main__` in a fresh child, just as
`python -m dit_jax.JOB` does.
"""

import ctypes
import gc
import json
import math
import os
import resource
import runpy
import sys
import time
import traceback
import warnings

import filelock  # noqa: F401
import jax
import tensorboardX.event_file_writer
import tensorboardX.summary  # noqa: F401
from job import SELDOM

import dit_jax.bench.measure
import dit_jax.checkpoint
import dit_jax.data.pipeline
import dit_jax.evaluation.in_run
import dit_jax.evaluation.scores
import dit_jax.job.hosts
import dit_jax.job.launch
import dit_jax.job.launcher
import dit_jax.networks.caption_states
import dit_jax.networks.encoding
import dit_jax.networks.transfer
import dit_jax.sampling.run
import dit_jax.training.loop
import dit_jax.training.step
from dit_jax import hardware


def job(request: dict) -> int:
    """In the child: run the module, return its exit code."""
    for number, path in ((1, request["out"]), (2, request["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(request["environment"])
    if request["file_size"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"],) * 2)
    if request["plain_user"]:
        obey_permissions()
    if "COMPILATIONS" in request["environment"]:
        note_compilations(request["environment"]["COMPILATIONS"])
    if "DEVICE_MEMORY" in request["environment"]:  # bytes: a CPU is not in the table, so it holds any weights whole
        hardware.DEVICES["cpu"] = hardware.Device("cpu", math.nan, int(request["environment"]["DEVICE_MEMORY"]))
    sys.argv = [f"dit_jax/{request['job']}.py", *request["arguments"]]
    try:
        runpy.run_module(f"dit_jax.{request['job']}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def note_compilations(path: str) -> None:
    """Append a line, time and name, to a file for every program that JAX compiles, or reads from its compilation cache."""
    file = open(path, "a", buffering=1)  # noqa: SIM115

    def listen(event: str, seconds: float, **about) -> None:
        if event == dit_jax.bench.measure.COMPILED:
            file.write(f"{time.time()} {about['fun_name']}\n")

    jax.monitoring.register_event_duration_secs_listener(listen)


def obey_permissions() -> None:
    """Give up what lets root write where the mode of a folder forbids it (capset(2): CAP_DAC_OVERRIDE, _READ_SEARCH)."""
    libc, version = ctypes.CDLL(None, use_errno=True), 0x20080522
    header, data = (ctypes.c_uint32 * 2)(version, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, data) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    for i in range(3):  # effective, permitted, inheritable
        data[i] &= ~0b110
    if libc.capset(header, data) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def start(request: dict) -> int:
    child = os.fork()
    if child == 0:
        code = job(request)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return child


def answer(request: dict) -> object:
    if "job" in request:
        return start(request)
    child, status = os.waitpid(request["poll"], os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if child else "running"


def main() -> None:
    warnings.filterwarnings("ignore", message=".*fork.*")
    assert not jax._src.xla_bridge.backends_are_initialized()  # each child has its own devices
    gc.set_threshold(*SELDOM)
    gc.freeze()  # children neither look through what is imported here nor copy its pages
    for line in sys.stdin:
        print(answer(json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
