"""Kills at any time, also in the middle of a save: always restorable, and the same bits in the end."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from job import Job, run, steps_logged
from runs import EVERY, STEPS, assert_same_run, assert_same_tracks, train

from dit_jax import checkpoint
from dit_jax.workdir import manifest


def saving(workdir):
    """Whether a checkpoint or a snapshot is being written right now."""
    roots = [Path(checkpoint.folder(str(workdir), kind)) for kind in ("checkpoints", "snapshots")]
    return any(checkpoint.SAVING in name for root in roots if root.is_dir() for name in os.listdir(root))


KINDS = ("any time", "between saves", "in a save")


def wait_to_kill(process, workdir, rng, kinds=KINDS):
    """Wait for a random moment of one of these kinds; returns its name, or None if the run ended before."""
    kind = rng.choice(kinds)
    delay = rng.uniform(0, 4.0) if kind == "any time" else rng.uniform(0, 0.15)
    reached = steps_logged(workdir)
    goal = {"any time": lambda: True, "between saves": lambda: steps_logged(workdir) > reached}
    goal["in a save"] = lambda: saving(workdir)
    end = time.monotonic() + 120
    while not goal[kind]():
        if process.poll() is not None:
            return None
        assert time.monotonic() < end, process.err.read_text()
        time.sleep(0.001)
    time.sleep(delay)
    return None if process.poll() is not None else kind


def written(workdir):
    """When the run last wrote scalars."""
    path = workdir / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.exists() else 0


def check_disk(workdir, kind, progress):
    """All that is listed verifies; at most a save interval is lost, or what was done besides while the next save was written."""
    found = checkpoint.steps(str(workdir))
    for step in found:
        assert manifest.problems(checkpoint.path_of(str(workdir), step)) == [], kind
    lost = steps_logged(workdir) - (found or [0])[-1] if progress else 0  # a start that did no step lost none
    assert lost <= (2 * EVERY if saving(workdir) else EVERY), (kind, found, lost)
    return lost


def torture(kills, uninterrupted, folder, cache_dir, more=(), assert_same=assert_same_run):
    """Kill runs at least `kills` times, one of them twice, one in a save; each run that reaches its end must be the uninterrupted one.

    Returns what was counted.
    """
    seed = random.SystemRandom().randrange(10**6)
    rng, counts, lost, ended, in_a_row, most, unfinished = random.Random(seed), {}, [], 0, 0, 0, 0
    workdir = folder / "run-0"
    while sum(counts.values()) < kills or most < 2 or unfinished < 1:
        before = written(workdir)
        process = Job("train", *train(workdir, *more), cache_dir=cache_dir)
        kind = wait_to_kill(process, workdir, rng, KINDS if sum(counts.values()) < kills else KINDS[2:])
        if kind:
            process.send_signal(signal.SIGKILL)
            while process.poll() is None:
                time.sleep(0.001)
        if kind and process.returncode == -signal.SIGKILL:
            counts[kind] = counts.get(kind, 0) + 1
            progress = written(workdir) != before
            lost.append(check_disk(workdir, f"seed {seed}, {kind}", progress))
            unfinished += saving(workdir)
            in_a_row += 1
            most = max(most, in_a_row)
            continue
        _, err = process.communicate()
        assert process.returncode == 0, err
        assert_same(uninterrupted, workdir)
        ended, in_a_row = ended + 1, 0
        workdir = folder / f"run-{ended}"
    code, _, err = run("train", *train(workdir, *more), cache_dir=cache_dir)
    assert code == 0, err
    assert_same(uninterrupted, workdir)
    return {
        "seed": seed,
        "kills": counts,
        "saves left unfinished": unfinished,
        "steps lost, most": max(lost),
        "runs": ended + 1,
        "most kills of one run": most,
    }


def test_five_kills_at_random_times(uninterrupted, tmp_path, cache_dir):
    torture(5, uninterrupted, tmp_path, cache_dir)


TRACKS = ("--config.optim.ema_tracks=(0.05,0.1)", "--config.optim.snapshot_every=4")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kills_of_a_run_with_tracks_change_no_average(data_dir, cache_dir, tmp_path, capsys):
    """Power EMAs, their snapshots, of which the most are between two checkpoints, and images of a width that they give."""
    whole = tmp_path / "whole"
    code, _, err = run("train", *train(whole, *TRACKS), cache_dir=cache_dir)
    assert code == 0, err
    drawn = []

    def assert_same(one, other):
        assert_same_run(one, other)
        assert_same_tracks(one, other)
        out, wanted = other / "out.npz", ("--num=4", "--ema=0.07", "--sampler=euler", "--steps=2")
        code, _, err = run("sample", f"--workdir={other}", *wanted, f"--out={out}", cache_dir=cache_dir)
        assert code == 0 and "ema 0.07, of 15 snapshots" in err, err
        drawn.append(out.read_bytes())

    assert_same(whole, whole)
    found = torture(10, whole, tmp_path, cache_dir, TRACKS, assert_same)
    with capsys.disabled():
        print(f"\n{found}")
    assert len(drawn) == found["runs"] + 1 and len(set(drawn)) == 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_kills(uninterrupted, tmp_path, cache_dir, capsys):
    found = torture(200, uninterrupted, tmp_path, cache_dir)
    with capsys.disabled():
        print(f"\n{found}")
    assert min(found["kills"].values()) >= 20


def catches_sigterm(pid):
    """Whether the process has a handler for SIGTERM: proc(5), SigCgt."""
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("count", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_sigterms_save_exit_75_and_resume_bitwise(count, uninterrupted, tmp_path, cache_dir):
    """At random times from the set-up on; within 30 s each, and no step is lost."""
    seed = random.SystemRandom().randrange(10**6)
    rng, stopped, run_number = random.Random(seed), 0, 0
    while stopped < count:
        workdir = tmp_path / f"run-{run_number}"
        process = Job("train", *train(workdir), cache_dir=cache_dir)
        goal = rng.choice([0, 1, 7])  # the set-up or the compilation; the first steps; steps and saves
        reached = steps_logged(workdir)
        while not (workdir / "config.json").exists() or steps_logged(workdir) < min(reached + goal, STEPS):
            assert process.poll() is None, process.err.read_text()
            time.sleep(0.001)
        while not catches_sigterm(process.pid):  # before that, while modules are imported, the system ends it
            assert process.poll() is None, process.err.read_text()
        time.sleep(rng.uniform(0, 0.2))
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert time.monotonic() - asked < 30
        if process.returncode == 0:  # it came after the last step
            assert_same_run(uninterrupted, workdir)
            run_number += 1
            continue
        assert process.returncode == 75 and "interrupted: " in err, (seed, err)
        last = steps_logged(workdir)
        assert checkpoint.steps(str(workdir))[-1:] == ([last] if last else []), (seed, err)
        stopped += 1
    code, _, err = run("train", *train(workdir), cache_dir=cache_dir)
    assert code == 0, err
    assert_same_run(uninterrupted, workdir)
