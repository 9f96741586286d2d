"""Runs the project's jobs as a user does, in processes of their own."""

import atexit
import functools
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
# In tests compiling is what takes the time: level 0 halves it, and without the emitters of fusions (MLIR) a third is left.
QUICK_XLA = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones, those of Python 3.12, end at an unknown flag
    QUICK_XLA += " --xla_cpu_use_fusion_emitters=false"
# For gc.set_threshold: tracing and lowering make many objects, and take 7 % longer with Python's own thresholds.
SELDOM = (50_000, 50, 100)
TINY = [  # overrides of configs/digits.py that train in seconds
    "--config.model.depth=2", "--config.model.width=16", "--config.model.heads=2", "--config.train.batch_size=16",
    "--config.train.log_every=1", "--config.train.checkpoint_every=10", "--config.eval.samples=0",
    "--config.optim.warmup_steps=5", "--config.sample.steps=4", "--config.sample.sampler=euler",
    "--config.eval.max_images=32",
]  # fmt: skip


def flags(devices):
    """XLA's flags for so many virtual devices."""
    return f"--xla_force_host_platform_device_count={devices} {QUICK_XLA}"


def environment(cache_dir, devices=2):
    """The tests' environment: virtual devices, and one cache of compiled programs."""
    return {
        **os.environ,
        "XLA_FLAGS": flags(devices),
        "NPROC": "32",
        "JAX_COMPILATION_CACHE_DIR": str(cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }


def start(job, *arguments, cache_dir, devices=2, folder=ROOT):
    """A running `python -m dit_jax.JOB ARGUMENTS` of a checkout."""
    command = [sys.executable, "-m", f"dit_jax.{job}", *map(str, arguments)]
    env = environment(cache_dir, devices)
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@functools.cache
def _zygote(cache_dir, inside=()):
    """The process that forks jobs; one per test process and host (tests/apart.py), whatever the number of devices."""
    env = {**environment(cache_dir), "PYTHONPATH": str(ROOT)}
    command = [*inside, sys.executable, str(ROOT / "tests" / "zygote.py")]
    found = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(found.kill)
    return found


class Job:
    """A running job, forked from a process that has the libraries loaded; used like a Popen object.

    `inside`: what precedes a command to run it on a host of its own (tests/apart.py).
    """

    def __init__(
        self, job, *arguments, cache_dir, devices=2, environment=None, file_size=0, plain_user=False, inside=()
    ):
        self._folder = Path(tempfile.mkdtemp(prefix="job-"))
        self.out, self.err = self._folder / "out", self._folder / "err"
        self._zygote, self.returncode = _zygote(str(cache_dir), inside), None
        request = {"job": job, "arguments": [str(a) for a in arguments], "out": str(self.out), "err": str(self.err)}
        noted = {"XLA_FLAGS": flags(devices), **(environment or {})}
        limits = {"environment": noted, "file_size": file_size, "plain_user": plain_user}
        self.pid = int(self._ask(request | limits))

    def _ask(self, request):
        self._zygote.stdin.write(json.dumps(request) + "\n")
        self._zygote.stdin.flush()
        return self._zygote.stdout.readline().strip()

    def poll(self):
        if self.returncode is None:
            found = self._ask({"poll": self.pid})
            self.returncode = None if found == "running" else int(found)
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def communicate(self, timeout=300):
        """(standard output, standard error) when the job has ended; kills it after `timeout` seconds."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.send_signal(signal.SIGABRT)
                raise AssertionError(f"the job did not end within {timeout} s: {self.err.read_text()[-2000:]}")
            time.sleep(0.02)  # a question takes two processes 0.2 ms: every 5 ms it would be 5 % of a core
        texts = tuple(
            path.read_text() if path.exists() else "" for path in (self.out, self.err)
        )  # killed before it began
        shutil.rmtree(self._folder)
        return texts


def run(job, *arguments, **how):
    """(exit code, standard output, standard error) of a job that ran to its end, in a process of its own."""
    process = Job(job, *arguments, **how)
    out, err = process.communicate()
    return process.returncode, out, err


def compilations(path):
    """(time, name) of every program that a job compiled which ran with `environment={"COMPILATIONS": path}`."""
    lines = [line.split(" ", 1) for line in Path(path).read_text().splitlines()]
    return [(float(when), name) for when, name in lines]


def steps_logged(workdir):
    """The last step that the run's scalars show; 0 before the first."""
    path = Path(workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def wait_for_step(process, workdir, step, timeout=120):
    """Returns when the run has logged `step`."""
    end = time.monotonic() + timeout
    while steps_logged(workdir) < step:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, f"no step {step} within {timeout} s"
        time.sleep(0.01)


def die(cell):
    """A sweep's job, for tests/jobs/test_sweep.py: the cell "dies" runs out of memory."""
    if cell == "dies":
        os._exit(9)
    return cell
