"""Two processes, as on two hosts: one is killed, hangs or gets SIGTERM, and the same command on both goes on, bit for bit."""

import os
import shutil
import signal
import socket
import time

import pytest
from job import Job, steps_logged
from runs import STEPS, assert_same_run, saved, train

from dit_jax import checkpoint

HEARTBEAT, GRACE = 5, 5  # seconds


def start(workdir, cache_dir, *more, leader=None):
    """Process 0, which coordinates and writes, and process 1. `leader`: what is different for process 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    arguments = train(workdir, f"--config.mesh.heartbeat={HEARTBEAT}", *more)
    jobs = []
    for index in range(2):
        where = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index)}
        how = leader or {} if index == 0 else {}
        jobs.append(Job("train", *arguments, cache_dir=cache_dir, devices=1, environment=where, **how))
    return jobs


def wait_for_steps(jobs, workdir, count):
    """Returns when the run has logged `count` steps more."""
    goal, end = steps_logged(workdir) + count, time.monotonic() + 120
    while steps_logged(workdir) < goal:
        for job in jobs:
            assert job.poll() is None, job.err.read_text()[-2000:]
        assert time.monotonic() < end
        time.sleep(0.01)


def finish(jobs):
    """Exit codes and what the processes said."""
    said = [job.communicate()[1] for job in jobs]
    return [job.returncode for job in jobs], said


def lose(jobs, victim, number):
    """Send the signal to one process; returns seconds until the other ended, its exit code and what it said."""
    os.kill(jobs[victim].pid, number)
    asked, other = time.monotonic(), jobs[1 - victim]
    _, said = other.communicate(timeout=60)
    seconds = time.monotonic() - asked
    if number == signal.SIGSTOP:
        os.kill(jobs[victim].pid, signal.SIGKILL)
    jobs[victim].communicate(timeout=60)
    return seconds, other.returncode, said


ONE = ((0, signal.SIGKILL),)  # the one that coordinates and writes; in a run that goes on from step 40
ALL = tuple((victim, number) for number in (signal.SIGSTOP, signal.SIGKILL) for victim in (1, 0))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("losses", [ONE, pytest.param(ALL * 2, marks=pytest.mark.slow)])
def test_a_lost_peer_ends_all_and_the_rerun_gives_the_same_bits(losses, uninterrupted, tmp_path, cache_dir):
    workdir = tmp_path / "run"
    if losses is ONE:
        shutil.copytree(uninterrupted, workdir)
        for step in (50, 60):
            shutil.rmtree(checkpoint.path_of(str(workdir), step))
        lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
        (workdir / "metrics.jsonl").write_text("".join(lines[:40]))
    for victim, number in losses:
        jobs = start(workdir, cache_dir)
        wait_for_steps(jobs, workdir, 4)
        seconds, code, said = lose(jobs, victim, number)
        aborted = (
            code == -signal.SIGABRT and (victim, number) == ONE[0]
        )  # the runtime noticed first that its coordinator is gone
        assert code == 200 or aborted, said  # PEER_LOST
        assert seconds <= HEARTBEAT + GRACE, (victim, number, seconds)
        if code == 200:
            why = (
                f"process {victim} gave no sign"
                if number == signal.SIGSTOP
                else "computing with the other processes failed"
            )
            assert [why in line for line in said.splitlines() if "error: " in line] == [True]
    codes, said = finish(start(workdir, cache_dir))
    assert codes == [0, 0], said
    assert_same_run(uninterrupted, workdir)  # one process with as many devices


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sigterm_to_one_process_stops_both_at_one_step(uninterrupted, tmp_path, cache_dir):
    workdir = tmp_path / "run"
    jobs = start(workdir, cache_dir)
    wait_for_steps(jobs, workdir, 4)
    os.kill(jobs[1].pid, signal.SIGTERM)
    codes, said = finish(jobs)
    assert codes == [75, 75], said
    newest = checkpoint.steps(str(workdir))[-1]
    assert newest == steps_logged(workdir) == saved(workdir, newest)["meta"]["step"] < STEPS
    codes, said = finish(start(workdir, cache_dir))
    assert codes == [0, 0], said
    assert_same_run(uninterrupted, workdir)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_error_of_one_process_ends_both(uninterrupted, tmp_path, cache_dir):
    """Only process 0 looks at the folder, and only it writes manifests: its errors must not leave the other waiting."""
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    began = time.monotonic()
    codes, said = finish(start(workdir, cache_dir, "--config.optim.learning_rate=1.0"))
    assert codes[0] == 2 and "holds a run of another config: optim.learning_rate" in said[0]
    assert codes[1] in (200, -signal.SIGABRT), said
    codes, said = finish(start(tmp_path / "full", cache_dir, leader={"file_size": 30_000}))
    assert codes[0] == 1 and "the checkpoint could not be written (File too large)" in said[0]
    assert codes[1] not in (0, 75), said
    assert time.monotonic() - began < 120
