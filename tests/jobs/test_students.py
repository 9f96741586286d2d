"""Students of few steps as jobs: begun from a run, killed and resumed, drawn from and scored; and teachers that are refused."""

import dataclasses
import json
import re
import signal
import time

import jax
import numpy as np
import pytest
from job import TINY, Job, run, wait_for_step
from runs import STEPS, assert_same_run, saved, train
from test_kills import torture

from dit_jax import checkpoint, flops
from dit_jax.config import Config, ObjectiveConfig
from dit_jax.diffusion.objective import make_objective
from dit_jax.sampling.round import tell_rounds
from dit_jax.workdir.folder import make_folder, read_config


def assert_same_student(one, other, steps=STEPS):
    """As for any run, and the teacher with the number of steps of the round, which an objective keeps."""
    assert_same_run(one, other, steps)
    if read_config(str(one)).objective.taught:
        a, b = (saved(workdir, steps, ("extras",))["extras"] for workdir in (one, other))
        assert len(jax.tree.leaves(a)) >= 18
        jax.tree.map(np.testing.assert_array_equal, a, b)


ROUNDS = dict(name="progressive", rounds=3, steps=2, round_steps=50)  # 8 steps, 4, then 2


def student(workdir, source, *more):
    """The command that trains a progressive student of three rounds."""
    given = {f"objective.{key}": value for key, value in ROUNDS.items()}
    given |= {"train.steps": 150, "train.checkpoint_every": 50, "sample.steps": 2}
    flags = [f"--config.{key}={value}" for key, value in given.items()]
    return [
        "--config=configs/digits_few.py:progressive",
        f"--workdir={workdir}",
        *TINY,
        *flags,
        f"--init={source}",
        *more,
    ]


def killed_after_a_round(folder, source, cache_dir):
    """The folder of a student that was killed once the checkpoint of its first round was there; another one if it ended before."""
    for i in range(5):
        workdir = folder / f"killed-{i}"
        process = Job("train", *student(workdir, source), cache_dir=cache_dir)
        wait_for_step(process, workdir, 55)
        while not checkpoint.steps(str(workdir)) and process.poll() is None:
            time.sleep(0.005)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == -signal.SIGKILL and 150 not in checkpoint.steps(str(workdir)):
            return workdir
    raise AssertionError("no run was killed in time")


def test_a_student_killed_after_a_round_ends_in_the_same_bits_and_is_drawn_from(uninterrupted, tmp_path, cache_dir):
    """And where it is drawn from by other steps than those of the checkpoint's round, one line says so."""
    whole, killed = tmp_path / "whole", killed_after_a_round(tmp_path, uninterrupted, cache_dir)
    assert 50 in checkpoint.steps(str(killed))
    for workdir in (whole, killed):
        code, _, err = run("train", *student(workdir, uninterrupted), cache_dir=cache_dir)
        assert code == 0, err
    assert_same_student(whole, killed, 150)
    counts = [int(saved(killed, step, ("extras",))["extras"]["steps"]) for step in (50, 100, 150)]
    assert counts == [4, 2, 2]  # of the step that comes next

    out = tmp_path / "out.npz"
    drawing = (f"--workdir={killed}", "--num=4", "--step=100", f"--out={out}")
    code, _, err = run("sample", *drawing, cache_dir=cache_dir)
    assert code == 0 and np.load(out)["arr_0"].std() > 1, err
    assert err.count("notice: ") == 1 and "sample.steps: found 2; at step 100 this progressive student is of 4" in err
    scoring = ("--at=150", "--config.eval.samples=70", "--config.eval.bootstrap=0", "--config.eval.steps=(2,3)")
    code, _, err = run("evaluate", f"--workdir={killed}", *scoring, cache_dir=cache_dir)
    assert code == 0, err
    assert err.count("notice: eval") == 1 and "eval.steps: found 3; at step 150 this progressive student is of 2" in err
    records = [json.loads(line) for line in (killed / "eval" / "records.jsonl").read_text().splitlines()]
    cfg = read_config(str(killed))
    assert [record["protocol"]["samples"]["steps"] for record in records] == [2, 3]
    assert [record["flops_sample"] for record in records] == [n * flops.forward_flops(cfg.model) for n in (2, 3)]
    for record in records:
        assert record["metrics"]["fd_digits"] > 0 and record["init"]["run"] == uninterrupted.name
        assert record["flops_train"] == 150 * 16 * make_objective(cfg).flops()


@pytest.mark.parametrize(
    ("step", "sample", "said"),
    [
        (150, {"steps": 8}, ""),
        (151, {"steps": 8}, "sample.steps: found 8; at step 151 .* of 4 equal"),
        (300, {"steps": 4}, ""),
        (999, {"steps": 2}, ""),
        (300, {"times": (1.0, 0.75, 0.5, 0.25, 0.0)}, ""),
        (300, {"times": (1.0, 0.7, 0.5, 0.25, 0.0)}, r"sample.times: found \(1.0, 0.7.*; at step 300 .* of 4 equal"),
    ],
)
def test_a_notice_of_times_that_are_not_the_rounds(step, sample, said, capsys):
    """Guidance distillation, whose student takes any number, has none."""
    cfg = Config()
    changes = {
        "model": dataclasses.replace(cfg.model, learn_sigma=False),
        "diffusion": dataclasses.replace(cfg.diffusion, process="flow"),
        "sample": dataclasses.replace(cfg.sample, sampler="euler", **sample),
    }
    rounds = ObjectiveConfig(**ROUNDS | {"round_steps": 150})
    guidance = ObjectiveConfig("progressive", rounds=0, guidance=2.0)
    for objective in (rounds, guidance):
        chosen = dataclasses.replace(cfg, objective=objective, **changes)
        tell_rounds([chosen, chosen], step)
        err = capsys.readouterr().err
        assert err.count("\n") == bool(said and objective is rounds)
        if err:
            assert re.search(said, err), err


def test_teachers_that_do_not_fit_end_the_job_with_2(uninterrupted, tmp_path, cache_dir):
    """A chain; a run of other inputs, once the run's own data have said what it sees."""
    cfg, new = read_config(str(uninterrupted)), tmp_path / "new"
    chain = dataclasses.replace(cfg, diffusion=dataclasses.replace(cfg.diffusion, process="ddpm"))
    scaled = dataclasses.replace(cfg, autoencoder=dataclasses.replace(cfg.autoencoder, scale=(0.5,)))
    for name, found in (("chain", chain), ("scaled", scaled)):
        make_folder(str(tmp_path / name), "config.json", found)
    for name, message, more in (
        ("chain", "diffusion.process: found 'ddpm', expected 'flow'", ["--check"]),
        ("scaled", "autoencoder.scale: found (0.18215,), expected (0.5,), as ", []),
    ):
        code, _, err = run("train", *student(new, tmp_path / name, *more), cache_dir=cache_dir)
        assert code == 2 and message in err and err.count("error: ") == 1, err
    assert not new.exists()


KINDS = {
    "progressive": dict(name="progressive", rounds=3, steps=1, round_steps=20),  # crosses two ends of rounds
    "consistency": dict(name="consistency", guidance=1.5),
    "mean_flow": dict(name="mean_flow", guidance=1.5, ratio=0.5),
}
SAMPLERS = {"consistency": "consistency", "mean_flow": "flow_map", "progressive": "euler"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_students_killed_at_random_moments_end_in_the_same_bits(kind, uninterrupted, tmp_path, cache_dir, capsys):
    more = [f"--config.objective.{key}={value}" for key, value in KINDS[kind].items()]
    more += [f"--config.sample.sampler={SAMPLERS[kind]}", "--config.sample.guidance=1.0", f"--init={uninterrupted}"]
    more += ["--config.model.target=later"] if kind == "mean_flow" else []
    whole = tmp_path / "whole"
    code, _, err = run("train", *train(whole, *more), cache_dir=cache_dir)
    assert code == 0, err
    found = torture(10, whole, tmp_path, cache_dir, more, assert_same_student)
    with capsys.disabled():
        print(f"\n{kind}: {found}")
    assert sum(found["kills"].values()) >= 10
