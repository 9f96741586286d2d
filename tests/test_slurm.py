"""A real SLURM on this machine (tests/slurm.sh): two tasks train together, and a sweep and an evaluation grid run as arrays.

Run by `make slurm`; it installs Debian's packages where they are missing, and fails where it cannot.
"""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from job import ROOT, environment, steps_logged
from runs import STEPS, assert_same_run, train

from dit_jax.config import resolve
from dit_jax.evaluation import protocol
from dit_jax.job.launch import load_config
from dit_jax.sweep import ladder
from dit_jax.workdir.folder import read_config
from dit_jax.workdir.records import read_records

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory, data_dir, cache_dir):
    """The environment of a user of this SLURM, and of its jobs."""
    folder = tmp_path_factory.mktemp("slurm")
    try:
        started = subprocess.run(["bash", "tests/slurm.sh", "start", folder], cwd=ROOT, capture_output=True, text=True)
        assert started.returncode == 0, started.stderr
        where = {"SLURM_CONF": started.stdout.strip(), "LOGS": str(folder / "logs"), "TIME": "20", "CPUS": "1"}
        yield environment(cache_dir, devices=1) | where | {"PYTHON": sys.executable}
    finally:
        subprocess.run(["bash", "tests/slurm.sh", "stop", folder], cwd=ROOT, check=True)


def call(env, *command):
    found = subprocess.run([str(part) for part in command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout


def state(env, job):
    """SLURM's word for a job, for each task of an array."""
    return set(re.findall(r"JobState=(\w+)", call(env, "scontrol", "show", "job", job)))


def logs(env):
    return "\n".join(path.read_text()[-3000:] for path in sorted(Path(env["LOGS"]).glob("*.out")))


def wait(env, job, timeout=900):
    """Returns when the job, or every task of the array, has succeeded."""
    end = time.monotonic() + timeout
    while (found := state(env, job)) != {"COMPLETED"}:
        assert found <= {"COMPLETED", "PENDING", "RUNNING", "CONFIGURING", "COMPLETING"}, f"{found}\n{logs(env)}"
        assert time.monotonic() < end, f"{found}\n{logs(env)}"
        time.sleep(0.5)


def test_two_tasks_train_together_and_a_job_told_to_stop_is_queued_again(slurm, uninterrupted, tmp_path):
    """The run ends in the bits of one process with as many devices, although it was stopped and begun again on the way."""
    workdir = tmp_path / "run"
    env = slurm | {"NODES": "1", "TASKS": "2"}
    job = call(env, "launch/slurm.sbatch", *["train", *train(workdir)]).strip()
    end = time.monotonic() + 300
    while steps_logged(workdir) < 5:
        assert time.monotonic() < end, f"{state(env, job)}\n{logs(env)}"
        time.sleep(0.01)
    call(env, "scancel", "--signal=TERM", job)  # to its steps, as before the time limit
    while "Restarts=1" not in call(env, "scontrol", "show", "job", job):
        assert time.monotonic() < end, logs(env)
        time.sleep(0.2)
    assert steps_logged(workdir) < STEPS
    call(env, "scontrol", "update", f"JobId={job}", "StartTime=now")  # SLURM would wait for two minutes
    wait(env, job)
    assert_same_run(uninterrupted, workdir)
    said = "".join(path.read_text() for path in Path(env["LOGS"]).glob("*.out"))
    assert said.count("the same command goes on from there") == 2  # both tasks, each once


def test_a_sweep_runs_as_an_array_and_ends_in_a_report(slurm, tmp_path):
    workdir, config = tmp_path / "demo", tmp_path / "ladder.py"
    config.write_text(
        f"import sys\nsys.path += {[str(ROOT / 'tests'), str(ROOT / 'tests' / 'jobs')]!r}\nfrom test_sweep import small\n\n\n"
        "def get_config():\n    c = small()\n    c.sweep.update(budgets=(3e8, 6e8, 1.2e9), windows=((0, 3),) * 3, extrapolate=0.0)\n"
        "    c.eval.samples = 0\n    return c\n"
    )
    command = [sys.executable, "-m", "dit_jax.sweep", f"--config={config}", f"--workdir={workdir}"]
    array, last = call(slurm, *command, "--launcher=slurm").split()
    assert not (workdir / "report.html").exists()
    wait(slurm, array)
    cfg = resolve(load_config(str(config)))
    cells = ladder.make_cells(cfg, str(workdir))
    assert len(cells) == 9
    for cell in cells:
        ((step, _),) = read_records(cell.workdir)
        assert step == cell.cfg.train.steps
    wait(slurm, last)
    assert "IsoFLOP" in (workdir / "report.html").read_text()
    rerun = call(slurm, *command, "--launcher=print")
    assert rerun == ""  # nothing is left to do


def test_an_evaluation_grid_runs_as_an_array(slurm, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    grid = ["--config.eval.samples=100", "--config.eval.guidance=(1.0,2.0)", "--config.sample.steps=4"]
    command = [sys.executable, "-m", "dit_jax.evaluate", f"--workdir={workdir}", *grid]
    wait(slurm, call(slurm, *command, "--at=all", "--launcher=slurm").strip())
    found = read_records(str(workdir)).values()
    steps = {record["step"] for record in found}
    scales = [record["protocol"]["samples"]["guidance"] for record in found if "samples" in record["protocol"]]
    assert sorted(scales) == [1.0] * len(steps) + [2.0] * len(steps)
    assert len(found) == 3 * len(steps) and steps
    assert set(protocol.cells(read_config(str(workdir)))) == {"loss"}  # the grid was the command's, not the run's
