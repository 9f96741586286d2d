"""Checkpoints as an axis: an evaluation of steps x guidances x samplers, handed over as commands, ends in one figure."""

import json
import shlex
import shutil

import pytest
from job import run
from PIL import Image
from runs import train

from dit_jax import checkpoint
from dit_jax.error import UsageError
from dit_jax.job.launcher import own_arguments
from dit_jax.scaling import options

GRID = ["--config.eval.samples=70", "--config.eval.bootstrap=2", "--config.eval.loss=False", "--config.sample.steps=2"]
SAMPLERS, GUIDANCES = ("euler", "ddim", "dpmpp_2m"), (1.0, 1.5, 2.0, 3.0, 4.0)


@pytest.fixture(scope="module")
def kept(tmp_path_factory, data_dir, cache_dir):
    """A run of 4 checkpoints, of which `train.keep_every` keeps 2 beside the newest."""
    workdir = tmp_path_factory.mktemp("axis") / "run"
    flags = ["--config.train.keep_every=4", "--config.train.keep=1", "--config.train.checkpoint_every=100"]
    code, _, said = run("train", *train(workdir, *flags, steps=9), cache_dir=cache_dir)
    assert code == 0, said
    assert checkpoint.steps(str(workdir)) == [4, 8, 9]
    return workdir


def handed_over(workdir, grid, at, cache_dir):
    """Runs every command that `--launcher=print` writes; returns the records."""
    code, out, said = run("evaluate", f"--workdir={workdir}", *grid, at, "--launcher=print", cache_dir=cache_dir)
    assert code == 0, said
    commands = [shlex.split(line)[3:] for line in out.splitlines()]
    for command in commands:
        code, _, said = run("evaluate", *command, cache_dir=cache_dir)
        assert code == 0, said
    records = [json.loads(line) for line in (workdir / "eval" / "records.jsonl").read_text().splitlines()]
    assert len(records) == len(commands)
    return commands, records


def drawn(workdir, out, cache_dir):
    command = [str(workdir), "--metric=fd_digits", f"--out={out}"]
    code, said, err = run("scaling", "table", *command, cache_dir=cache_dir)
    assert code == 0 and said.splitlines()[-1] == str(out), err
    with Image.open(out) as picture:
        return picture.size


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("steps", "guidances", "samplers"), [(2, 2, 2), (20, 5, 3)])
def test_checkpoints_by_guidances_by_samplers_end_in_one_figure(
    steps, guidances, samplers, kept, tmp_path, cache_dir, data_dir
):
    workdir, at = tmp_path / "run", "--at=4,8"
    if steps == 2:
        shutil.copytree(kept, workdir)
    else:
        flags = ["--config.train.keep_every=5", "--config.train.checkpoint_every=1000"]
        code, _, said = run("train", *train(workdir, *flags, steps=5 * steps), cache_dir=cache_dir)
        assert code == 0, said
        at = "--at=all"
    grid = [f"--config.eval.guidance={GUIDANCES[:guidances]}", f"--config.eval.samplers={SAMPLERS[:samplers]}", *GRID]
    commands, records = handed_over(workdir, grid, at, cache_dir)
    assert len(commands) == steps * guidances * samplers and all("--at=all" not in command for command in commands)
    keys = {(r["step"], *(r["protocol"]["samples"][n] for n in ("sampler", "guidance"))) for r in records}
    assert len(keys) == len(commands) and {r["step"] for r in records} == {*checkpoint.steps(str(workdir))} - {9}
    wide, high = drawn(workdir, tmp_path / "curves.png", cache_dir)
    assert wide > 2000 and high / wide == pytest.approx(0.27 * samplers, rel=0.3)


def test_checkpoints_that_are_not_there_are_refused_before_anything_is_written(kept, cache_dir):
    before = sorted(kept.rglob("*"))
    for arguments, message in (
        (["--at=4,7"], "error: --at: found 7, expected steps among [4, 8, 9], the checkpoints of"),
        (["--at=four"], "error: --at: found 'four', expected steps with commas, or all"),
        (["--at=all", "--watch"], "error: --at, --watch: found both, expected one of them"),
        (["--at=4", "--cell=8-loss"], "error: --cell: found '8-loss'; did you mean '4-loss'?"),
    ):
        code, out, said = run("evaluate", f"--workdir={kept}", *arguments, cache_dir=cache_dir)
        assert (code, out) == (2, "") and said.splitlines()[-1].startswith(message), said
    assert sorted(kept.rglob("*")) == before


def test_a_figure_is_named_by_its_ending_and_a_metric_by_its_figure():
    for arguments, message in (
        (["--out=curves.txt"], "expected a file that ends in .png, .svg, .pdf"),
        (["--metric=fid"], "--metric: found it without --out"),
    ):
        with pytest.raises(UsageError, match=message):
            options.parse(["table", "runs", *arguments], "")


def test_a_command_of_a_cell_names_the_steps():
    assert own_arguments(["--at", "all", "--cell=1", "--workdir=w"], ["at"]) == ["--workdir=w"]
