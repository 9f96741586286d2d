"""launch/slurm.sbatch: its exact commands, what it starts again, and what it needs."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from job import ROOT, run
from launched import JOB, TYPED, dry, fakes_in

from dit_jax.config import resolve
from dit_jax.error import UsageError
from dit_jax.job.launch import load_config
from dit_jax.sweep import ladder

PYTHON = {"PYTHON": "/venv/bin/python"}


@pytest.fixture
def fakes(tmp_path):
    return fakes_in(tmp_path)


def test_slurm_training_on_four_nodes():
    assert dry("slurm.sbatch", *JOB, **PYTHON, NODES="4", GPUS="8", CPUS="64", TIME="24:00:00", PARTITION="a100") == [
        "mkdir -p logs",
        "env PYTHON=/venv/bin/python sbatch --parsable --nodes=4 --ntasks-per-node=1 --cpus-per-task=64 --time=24:00:00 "
        f"--output=logs/%x-%j.out --gpus-per-node=8 --partition=a100 launch/slurm.sbatch train {TYPED}",
        f"# in the job: srun --kill-on-bad-exit=0 --cpus-per-task=64 /venv/bin/python -m dit_jax.train {TYPED}",
    ]


def test_slurm_array_after_another_job():
    job = ["evaluate", "--workdir=w", "--config.eval.guidance=(1.0,2.0)"]
    found = dry("slurm.sbatch", *job, **PYTHON, ARRAY="0-24", LIMIT="8", AFTER="12", CPUS="8", TIME="60", LOGS="/l")
    assert found == [
        "mkdir -p /l",
        "env PYTHON=/venv/bin/python sbatch --parsable --array=0-24%8 --nodes=1 --ntasks-per-node=1 --cpus-per-task=8 --time=60 "
        "--output=/l/%x-%A_%a.out --dependency=afterok:12 --kill-on-invalid-dep=yes launch/slurm.sbatch evaluate --workdir=w "
        "'--config.eval.guidance=(1.0,2.0)'",
        "# in the job: srun --kill-on-bad-exit=0 --cpus-per-task=8 /venv/bin/python -m dit_jax.evaluate --workdir=w "
        "'--config.eval.guidance=(1.0,2.0)' --cell=$SLURM_ARRAY_TASK_ID",
    ]


SRUN = """#!/bin/bash
worst=0
for code in $CODES; do CODE=$code "${@:3}"; found=$?; ((found <= worst)) || worst=$found; done
exit $worst
"""


@pytest.mark.parametrize(
    "codes,code,again",
    [
        ("0 0", 0, False), ("75 75", 75, True), ("75", 75, True), ("200 200", 200, True), ("137 200", 200, True), ("134 137", 137, True),
        ("1 200", 1, False), ("200 2", 2, False), ("1 137", 1, False), ("137", 137, False), ("1", 1, False), ("2 2", 2, False),
    ],
)  # fmt: skip
def test_slurm_starts_again_what_lost_a_task_and_not_what_failed(tmp_path, codes, code, again):
    """srun gives the largest code of its tasks; an error of one of them counts, whatever the others say of their lost peer."""
    fakes = {
        "srun": SRUN,
        "scontrol": f'#!/bin/bash\necho "$*" >>{tmp_path}/calls\n',
        "python": "#!/bin/bash\nexit $CODE\n",
    }
    for name, text in fakes.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    shutil.copy(ROOT / "launch" / "slurm.sbatch", tmp_path / "slurm_script")
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": str(len(codes.split())),
        "CODES": codes,
    }
    for restarts in ("3", "100"):
        found = subprocess.run(["bash", tmp_path / "slurm_script", *JOB], env=env | {"SLURM_RESTART_COUNT": restarts})
        assert found.returncode == code
    calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    assert calls == ["requeue 7"] * again  # and not after 100 restarts


def test_a_task_of_slurm_that_is_told_to_stop_keeps_its_own_code():
    """SIGTERM goes to the shell of a task as well as to the program, which saves and exits with 75."""
    wrapper = re.search(r"bash -c '(.*)' task", (ROOT / "launch" / "slurm.sbatch").read_text())[1]
    program = "import signal, sys, time\nsignal.signal(15, lambda *_: (time.sleep(0.3), sys.exit(75)))\n"
    program += "print(1, flush=True)\ntime.sleep(60)"
    command = ["bash", "-c", wrapper, "task", sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as task:
        task.stdout.readline()
        os.killpg(task.pid, signal.SIGTERM)
        assert task.wait(20) == 75


def test_slurm_runs_a_copy_of_the_script_alone(tmp_path):
    """As it lies on the node: `slurm_script` in a folder without the functions, which only its submission needs."""
    script, srun = tmp_path / "slurm_script", tmp_path / "srun"
    shutil.copy(ROOT / "launch" / "slurm.sbatch", script)
    srun.write_text('#!/bin/bash\necho "$*"\n')
    srun.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    for nodes, job, code, out, err in (
        (
            "1",
            "evaluate",
            0,
            "--kill-on-bad-exit=0 --cpus-per-task=1 python -m dit_jax.evaluate --workdir=w --cell=3\n",
            "",
        ),
        ("2", "sweep", 2, "", "error: NODES, TASKS: found 2, 1; expected 1: sweep is one process\n"),
    ):
        command = ["bash", script, job, "--workdir=w"]
        found = subprocess.run(command, env=env | {"SLURM_JOB_NUM_NODES": nodes}, capture_output=True, text=True)
        assert (found.returncode, found.stdout, found.stderr) == (code, out, err)


def test_a_sweep_that_slurm_would_not_take_writes_nothing(monkeypatch, tmp_path):
    """Neither without the script's variables, nor where there is no SLURM."""
    for name in ("TIME", "CPUS"):
        monkeypatch.delenv(name, raising=False)
    cfg = load_config(str(ROOT / "configs" / "digits_isoflop.py"))
    workdir = tmp_path / "demo"
    with pytest.raises(UsageError, match="--launcher=slurm: TIME CPUS: not set"):
        ladder.run_apart(resolve(cfg), str(workdir), "slurm", None)
    for name, value in {"TIME": "60", "CPUS": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="sbatch: not found"):
        ladder.run_apart(resolve(cfg), str(workdir), "slurm", None)
    assert not workdir.exists()


def test_slurm_needs_its_variables(uninterrupted, cache_dir):
    grid = [f"--workdir={uninterrupted}", "--config.eval.guidance=(1.0,2.0)", "--launcher=slurm"]
    code, out, err = run("evaluate", *grid, cache_dir=cache_dir, devices=1, environment={"TIME": "", "CPUS": ""})
    message = "error: --launcher=slurm: TIME CPUS: not set; the head of launch/slurm.sbatch says what they are\n"
    assert (code, out, err) == (2, "", message)
