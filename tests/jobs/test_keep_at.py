"""Checkpoints at stated steps (train.keep_at, train.keep_every): never pruned, the same bits after kills; and how many images a run had."""

import json
import shutil
import signal

import jax
import numpy as np
import pytest
from job import Job, run, wait_for_step
from runs import STEPS, assert_same_run, saved, train

from dit_jax import checkpoint
from dit_jax.config import TrainConfig, resolve
from dit_jax.error import UsageError

KEPT, EVERY = (7, 20, 33), 25
ALL = sorted({*KEPT, EVERY, 2 * EVERY, STEPS})


@pytest.fixture(scope="module")
def kept(tmp_path_factory, data_dir, cache_dir):
    """The small run with `keep_at`, killed between its second step of these and its last."""
    workdir = tmp_path_factory.mktemp("keep_at") / "run"
    command = train(
        workdir, f"--config.train.keep_at={KEPT}", f"--config.train.keep_every={EVERY}", "--config.train.keep=1"
    )
    process = Job("train", *command, cache_dir=cache_dir)
    wait_for_step(process, workdir, 26)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    code, _, said = run("train", *command, cache_dir=cache_dir)
    assert code == 0, said
    return workdir


def test_stated_steps_are_saved_and_never_pruned(kept, uninterrupted):
    assert checkpoint.steps(str(kept)) == ALL
    assert_same_run(uninterrupted, kept)


def test_a_step_that_keep_every_kept_holds_the_bits_of_that_save(kept, uninterrupted):
    one, other = saved(uninterrupted, 2 * EVERY), saved(kept, 2 * EVERY)
    for name in ("params", "ema", "opt"):
        jax.tree.map(np.testing.assert_array_equal, one[name], other[name])
    assert one["data"] == other["data"]


@pytest.mark.slow
@pytest.mark.parametrize("step", KEPT[:2])
def test_a_stated_step_holds_the_bits_of_a_run_of_that_many_steps(kept, step, tmp_path, cache_dir):
    code, _, said = run("train", *train(tmp_path / "run", steps=step), cache_dir=cache_dir)
    assert code == 0, said
    alone, on_the_way = saved(tmp_path / "run", step), saved(kept, step)
    for name in ("params", "ema", "opt"):
        jax.tree.map(np.testing.assert_array_equal, alone[name], on_the_way[name])
    assert alone["data"] == on_the_way["data"]


@pytest.mark.slow
def test_a_run_may_be_given_steps_later_and_says_which_are_gone(uninterrupted, tmp_path, cache_dir):
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    stated = ("--config.train.keep_at=(33,50,64)", "--config.train.keep_every=6", "--config.train.keep=1")
    command = train(workdir, *stated, steps=70)
    code, _, said = run("train", *command, cache_dir=cache_dir)
    assert code == 0, said
    assert f"train.keep_at: {workdir} is at step 60, past the steps [33], and has no checkpoint of them" in said
    assert f"train.keep_every: {workdir} is at step 60, past the steps [6, ..., 54], and has no checkpoint" in said
    assert checkpoint.steps(str(workdir)) == [50, 60, 64, 66, 70]


@pytest.mark.parametrize("found", [(0, 5), (5, 5), (9, 3), (5, 101), (2.5,), (True,), ("7",)])
def test_stated_steps_rise_within_the_run(found):
    with pytest.raises(UsageError) as error:
        resolve({"train": {"steps": 100, "keep_at": found}})
    expected = "expected strictly rising whole numbers from 1 to train.steps = 100"
    assert str(error.value) == f"train.keep_at: found {found!r}, {expected}"
    assert TrainConfig(steps=100, keep_at=(1, 100)).keep_at == (1, 100)


@pytest.mark.slow
def test_a_record_counts_the_images_that_the_run_had(kept, tmp_path, cache_dir):
    """Read from the checkpoint, so that a machine without the training split can tell it too. Flips make no image."""
    few = tmp_path / "few"
    split = ("--config.data.split=train[:25%]", "--config.data.flip=True")
    code, _, said = run("train", *train(few, *split, steps=10), cache_dir=cache_dir)
    assert code == 0, said
    for workdir, images, steps in ((kept, 1442, len(ALL)), (few, 360, 1)):
        code, _, said = run("evaluate", f"--workdir={workdir}", "--config.eval.max_images=16", cache_dir=cache_dir)
        assert code == 0, said
        lines = [json.loads(line) for line in (workdir / "eval" / "records.jsonl").read_text().splitlines()]
        assert [line["unique_images"] for line in lines] == [images] * steps
    shutil.rmtree(few / "checkpoints" / "10" / "data")  # as in weights that were converted
    assert checkpoint.trained_on(str(few), 10) == {}
