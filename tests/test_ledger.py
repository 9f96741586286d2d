"""The goodput ledger: what it books sums to the wall time that others measure, also over a kill."""

import json
import os
import shutil
import signal
import time

import pytest
from job import Job, run, start, wait_for_step
from runs import train

from dit_jax.error import UsageError
from dit_jax.workdir import goodput

SHARE = 0.99  # of the wall time that must be accounted for


def entries(workdir):
    return [json.loads(line) for line in (workdir / goodput.GOODPUT).read_text().splitlines()]


def booked(entry):
    """Seconds of a start, without those it took over from the one before."""
    assert set(entry["seconds"]) == set(goodput.KINDS) and min(entry["seconds"].values()) >= 0
    return sum(entry["seconds"].values()) - entry["seconds"]["lost"]


@pytest.mark.slow
def test_a_run_accounts_for_its_time_and_says_so(tmp_path, data_dir, cache_dir):
    workdir, began = tmp_path / "run", time.time()
    job = start("train", *train(workdir, steps=20), cache_dir=cache_dir)  # a process of its own: its whole life counts
    _, err = job.communicate(timeout=300)
    ended = time.time()
    assert job.returncode == 0, err
    (entry,) = entries(workdir)
    seconds = entry["seconds"]
    assert booked(entry) == pytest.approx(entry["wall"], rel=1 - SHARE)
    times = [json.loads(line)["time"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert began - 0.1 <= entry["since"] < min(times)  # the kernel counts in hundredths of a second
    assert max(times) <= entry["since"] + entry["wall"] <= ended + 0.1
    written = (workdir / goodput.GOODPUT).stat().st_mtime  # a clock outside of the process
    assert SHARE * (written - began) - 2.0 <= booked(entry)  # seconds to start and to write on a busy machine
    assert min(seconds["set-up"], seconds["compile"], seconds["step"], seconds["save"], seconds["data"]) > 0
    assert seconds["lost"] == seconds["evaluation"] == seconds["wait"] == 0
    assert (entry["first"], entry["last"]) == (0, 20)
    (line,) = [line for line in err.splitlines() if line.startswith("goodput ")]
    assert f"set-up {seconds['set-up']:.1f}" in line and f"compile {seconds['compile']:.1f}" in line
    assert line == goodput.summary(entry)  # of what was written, not of a moment later


@pytest.mark.slow
def test_the_work_that_a_kill_undid_is_booked_as_lost(tmp_path, data_dir, cache_dir):
    workdir, began = tmp_path / "run", time.time()
    arguments = train(workdir, "--config.train.checkpoint_every=200", "--config.train.log_every=5", steps=400)
    job, saved = Job("train", *arguments, cache_dir=cache_dir), []
    while not saved:  # the line that is written when the checkpoint counts
        assert job.poll() is None, job.communicate()[1]
        path = workdir / goodput.GOODPUT
        saved = [entry for entry in (entries(workdir) if path.exists() else []) if entry["last"] == 200]
        time.sleep(0.01)
    wait_for_step(job, workdir, 210)
    os.kill(job.pid, signal.SIGKILL)
    job.communicate()
    killed = time.time() - began
    last = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines(True) if line[-1] == "\n"][
        -1
    ]
    code, _, err = run("train", *arguments, cache_dir=cache_dir)
    assert code == 0, err
    first, second = entries(workdir)
    assert (first["first"], first["last"]) == (0, 200)  # up to the checkpoint that counted
    assert (second["first"], second["last"], second["lost_steps"]) == (200, 400, last["step"] - 200)
    assert second["seconds"]["lost"] > 0 and "lost " in err.splitlines()[-1]
    both = booked(first) + second["seconds"]["lost"]  # the first start, up to its last line of scalars
    assert both == pytest.approx(last["time"] - first["since"], rel=1 - SHARE)
    assert both <= killed + 1.0
    assert booked(second) == pytest.approx(second["wall"], rel=1 - SHARE)


def test_an_evaluation_has_a_line_of_its_own(uninterrupted, tmp_path, cache_dir):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    trained = entries(workdir)
    code, _, err = run("evaluate", f"--workdir={workdir}", cache_dir=cache_dir)
    assert code == 0 and "goodput " in err, err
    *before, entry = entries(workdir)
    assert before == trained and entry["job"] == "evaluate"
    for line in (workdir / "eval" / "records.jsonl").read_text().splitlines():
        assert json.loads(line)["goodput"] == pytest.approx(trained[0]["seconds"])  # what the training's time went into
    assert entry["seconds"]["evaluation"] > 0
    assert booked(entry) == pytest.approx(entry["wall"], rel=1 - SHARE)
    code, _, err = run("evaluate", f"--workdir={workdir}", cache_dir=cache_dir)
    assert code == 0 and len(entries(workdir)) == len(trained) + 1  # nothing was left to measure


def test_a_stopwatch_is_always_in_one_kind():
    watch = goodput.Ledger("train", time.time() - 2.0)
    with watch.spend("step"):
        time.sleep(0.05)
        with watch.spend("save"):
            time.sleep(0.5)
        with pytest.raises(RuntimeError), watch.spend("data"):
            raise RuntimeError
    entry = watch.entry()
    seconds = entry["seconds"]
    assert seconds["set-up"] >= 2.0 and 0.05 <= seconds["step"] < 0.5 <= seconds["save"]
    assert sum(seconds.values()) == pytest.approx(entry["wall"], abs=0.01)


def test_a_damaged_ledger_is_named(tmp_path):
    (tmp_path / goodput.GOODPUT).write_text('{"job": "train"}\n')
    with pytest.raises(UsageError, match=r"goodput.jsonl:1: no 'since', expected float"):
        goodput.write_entry(goodput.Ledger("train", time.time()).entry(), str(tmp_path))


def test_a_clock_that_is_set_does_not_change_what_a_start_books(tmp_path, monkeypatch):
    """Back by 30 s, and forward by an hour: times of scalars and the wall time go on as the stopwatch says."""
    for moved in (-30.0, 3600.0):
        ledger, wall = goodput.Ledger("train", time.time() - 5.0), time.time
        first = goodput.note(ledger, str(tmp_path))
        monkeypatch.setattr(time, "time", lambda moved=moved, wall=wall: wall() + moved)
        with ledger.spend("step"):
            before = ledger.now()
            time.sleep(0.02)
            assert 0.02 <= ledger.now() - before < 5
        entry = goodput.note(ledger, str(tmp_path))
        monkeypatch.undo()
        assert first["wall"] + 0.02 <= entry["wall"] < 10 and entry["wall"] == pytest.approx(booked(entry), abs=0.01)
        assert entries(tmp_path)[-1] == json.loads(json.dumps(entry)), "the newest line of a start is kept"
        assert 0 <= float(goodput.summary(entry).split("%")[0].removeprefix("goodput ")) < 100
