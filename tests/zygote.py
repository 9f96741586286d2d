"""A process that has imported the heavy libraries and forks once per job: a job then starts in milliseconds, not seconds.

Reads one JSON request a line: {"job", "arguments", "out", "err"} starts a job and is answered with its process id, {"wait": pid}
with its exit code, {"poll": pid} with the same, or "running". Each job runs its module as `__main__` in a fresh child, just as
`python -m dit_jax.JOB` does.
"""

import json
import os
import resource
import runpy
import sys
import traceback
import warnings

import dit_jax.checkpoint
import dit_jax.data.pipeline
import dit_jax.step  # noqa: F401


def job(request: dict) -> int:
    """In the child: run the module, return its exit code."""
    for number, path in ((1, request["out"]), (2, request["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(request["environment"])
    if request["file_size"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"],) * 2)
    sys.argv = [f"dit_jax/{request['job']}.py", *request["arguments"]]
    try:
        runpy.run_module(f"dit_jax.{request['job']}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


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
    if "wait" in request:
        return os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
    child, status = os.waitpid(request["poll"], os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if child else "running"


def main() -> None:
    warnings.filterwarnings("ignore", message=".*fork.*")
    for line in sys.stdin:
        print(answer(json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
