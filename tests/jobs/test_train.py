"""Training as users run it: killed, resumed, stopped, repeated and misconfigured."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
from job import TINY, compilations, run
from runs import EVERY, STEPS, other_digits, saved, scalars, train

from dit_jax import checkpoint
from dit_jax.config import DataConfig
from dit_jax.data.pipeline import load_arrays
from dit_jax.error import UsageError
from dit_jax.flops import parameters


def test_the_same_command_again_finds_nothing_to_do(uninterrupted, cache_dir):
    before = {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*") if p.is_file()}
    code, _, err = run("train", *train(uninterrupted), cache_dir=cache_dir)
    assert code == 0 and "all 60 steps are done" in err
    assert before == {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*") if p.is_file()}


def test_the_loss_falls_and_the_run_folder_is_complete(uninterrupted):
    lines = scalars(uninterrupted)
    assert np.mean([line["loss"] for line in lines[-10:]]) < 0.8 * np.mean([line["loss"] for line in lines[:5]])
    config = json.loads((uninterrupted / "config.json").read_text())
    assert config["config"]["model"]["width"] == 16 and config["versions"]["jax"] == jax.__version__
    assert checkpoint.steps(str(uninterrupted)) == [40, 50, 60]  # train.keep = 3
    assert "blocks/attention/qkv/kernel" in (uninterrupted / "parameters.txt").read_text()
    meta = saved(uninterrupted, STEPS)["meta"]
    assert meta["step"] == STEPS and meta["model"]["depth"] == 2


def test_load_gives_the_config_and_the_weights(uninterrupted):
    cfg, ema = checkpoint.load(str(uninterrupted))
    assert cfg.width == 16
    assert sum(leaf.size for leaf in jax.tree.leaves(ema)) == parameters(cfg)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(ema), saved(uninterrupted, STEPS)["ema"])
    _, raw = checkpoint.load(str(uninterrupted), step=50, item="params")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(raw), saved(uninterrupted, 50)["params"])
    with pytest.raises(UsageError, match=r"no checkpoint of step 55, expected one of \[40, 50, 60\]"):
        checkpoint.load(str(uninterrupted), step=55)


def check_compilations(path, workdir, first):
    """That a run from step `first` on compiled its step once, and nothing after its first save."""
    lines = {
        line["step"]: line["time"] for line in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    }
    compiled = compilations(path)
    names = [name for _, name in compiled]
    assert names.count("jit(step)") == 1 and names.count("jit(all_finite)") == 1, names
    warm = lines[first + EVERY + 2]  # logged when the first save was under way, the next step too
    assert min(lines.values()) < warm < lines[STEPS]
    assert [name for when, name in compiled if when > warm] == []


def test_every_program_is_compiled_once(uninterrupted):
    """60 steps with their scalars, 6 saves."""
    check_compilations(uninterrupted.parent / "compilations", uninterrupted, 0)


@pytest.mark.slow
def test_a_run_can_be_extended_when_its_schedule_is_constant(uninterrupted, tmp_path, cache_dir):
    workdir = tmp_path / "extended"
    assert run("train", *train(workdir, steps=30), cache_dir=cache_dir)[0] == 0
    code, _, err = run("train", *train(workdir, steps=STEPS), cache_dir=cache_dir)
    assert code == 0, err
    jax.tree.map(np.testing.assert_array_equal, saved(workdir, STEPS)["ema"], saved(uninterrupted, STEPS)["ema"])


BAD = {
    "unknown key": (
        ["--config.train.stepz=5"],
        "--config.train.stepz: unknown config key 'stepz'; did you mean 'steps'?",
    ),
    "unknown group": (
        ["--config.trian.steps=5"],
        "--config.trian.steps: unknown config key 'trian'; did you mean 'train'?",
    ),
    "wrong type": (["--config.train.steps=many"], "--config.train.steps: found 'many', expected int"),
    "out of range": (
        ["--config.train.cond_dropout=1.5"],
        "train.cond_dropout: found 1.5, expected a value from 0 to 1",
    ),
    "bad choice": (
        ["--config.diffusion.process=flows"],
        "diffusion.process: found 'flows', expected one of ddpm, flow; did you",
    ),
    "mesh": (
        ["--config.mesh.data=3"],
        "mesh: found data=3, fsdp=1, tensor=1, expected axes that multiply to 2 devices",
    ),
    "batch": (["--config.train.batch_size=13"], "train.batch_size: found 13, expected a multiple of 2"),
    "heads": (["--config.model.heads=3"], "model.heads: found 3, expected a divisor of model.width = 16"),
    "classes": (["--config.model.classes=7"], "model.classes: found 7, expected 10, as the data (digits) has"),
    "split": (["--config.data.split=nope"], "dataset 'digits': found split 'nope', expected one of"),
    "dataset": (["--config.data.dataset=digitz"], "data.dataset: found 'digitz'"),
    "held out": (
        ["--config.data.held_out_split=train[:10%]"],
        "data.held_out_split: found 'train[:10%]', which shares images",
    ),
    "sampler": (["--config.sample.sampler=eular"], "sample.sampler: found 'eular'; did you mean 'euler'?"),
    "attention": (["--config.model.attention=cudnn"], "model.attention: found 'cudnn' on cpu"),
    "unknown flag": (["--workdri=x"], "--workdri: unknown flag; did you mean 'workdir'?"),
    "no config": (["--config=configs/nope.py"], "--config: no file 'configs/nope.py'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_exit_2_and_nothing_written(case, tmp_path, data_dir, cache_dir):
    arguments, message = BAD[case]
    first = [] if case == "no config" else ["--config=configs/digits.py", *TINY]
    workdir = tmp_path / "new"
    code, out, err = run("train", *first, f"--workdir={workdir}", *arguments, cache_dir=cache_dir)
    assert code == 2, err
    assert out == "" and err.startswith("error: ") and len(err.strip().splitlines()) == 1
    assert message in err
    assert not workdir.exists()


def test_another_config_for_a_folder_is_refused_and_nothing_is_lost(uninterrupted, cache_dir):
    before = (uninterrupted / "config.json").read_bytes()
    code, _, err = run("train", *train(uninterrupted, "--config.optim.learning_rate=0.5"), cache_dir=cache_dir)
    assert code == 2
    assert "holds a run of another config: optim.learning_rate: the folder has 0.003, the command 0.5" in err
    assert (uninterrupted / "config.json").read_bytes() == before
    assert checkpoint.steps(str(uninterrupted)) == [40, 50, 60]


def test_unreadable_data_is_named_and_nothing_is_written(tmp_path, data_dir, cache_dir):
    load_arrays(DataConfig(data_dir=data_dir), "train")  # builds it
    damaged = tmp_path / "tfds"
    shutil.copytree(data_dir, damaged)
    (file,) = damaged.rglob("*train*array_record*")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    workdir = tmp_path / "run"
    code, _, err = run("train", *train(workdir, f"--config.data.data_dir={damaged}"), cache_dir=cache_dir)
    assert code == 2 and len(err.strip().splitlines()) == 1, err
    assert file.name in err and not workdir.exists()


def test_a_run_does_not_go_on_with_other_records_of_the_same_name(uninterrupted, tmp_path, cache_dir):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    other = f"--config.data.data_dir={other_digits(tmp_path / 'tfds')}"
    code, _, err = run("train", *train(workdir, other, steps=STEPS + 1), cache_dir=cache_dir)
    expected = "data.dataset: records: found 721, expected 1442, as in the data that this run has been trained on; "
    assert code == 2 and expected in err, err
    assert err.endswith("; give it those, or start a new run from its weights (--init=RUN in another --workdir)\n")
    assert saved(workdir)["data"]["next_index"] == STEPS
    named = train(workdir, "--config.data.split=train[:50%]", steps=STEPS + 1)
    code, _, err = run("train", *named, cache_dir=cache_dir)
    changed = "data.split: the folder has 'train', the command 'train[:50%]'"
    advice = f"use another --workdir, with --init={workdir} to start from its weights"
    assert (code, err) == (2, f"error: {workdir} holds a run of another config: {changed}; {advice}\n")
    new = train(tmp_path / "new", other, f"--init={workdir}", steps=1)  # as it was told
    code, _, err = run("train", *new, cache_dir=cache_dir)
    assert code == 0 and saved(tmp_path / "new", 1)["data"]["source"]["records"] == 721, err


def check_a_second_start(workdir, flags, kept, cache_dir):
    """That it finds its compiled programs; what a kill at the start left in its folder makes the folder no foreign one."""
    before = programs(kept)
    workdir.mkdir()
    (workdir / "config.json.tmp123").write_text("{")
    code, _, err = run("train", *train(workdir, *flags, steps=20), cache_dir=cache_dir)
    assert code == 0, err
    assert programs(kept) == before and any(name.startswith("jit_step-") for name in before)


def programs(folder):
    return {path.name for path in folder.iterdir() if not path.name.endswith("-atime")}


def test_the_paper_s_process_trains_evaluates_and_samples(tmp_path, data_dir, cache_dir):
    """DDPM with learned variance, cosine decay, accumulation and guidance on three channels, through the jobs."""
    flags = ["--config.diffusion.process=ddpm", "--config.model.learn_sigma=True", "--config.optim.accumulate=2"]
    flags += ["--config.optim.schedule=cosine", "--config.sample.sampler=ddpm", "--config.sample.channels=first3"]
    workdir, kept = tmp_path / "ddpm", tmp_path / "kept"
    flags.append(f"--compilation_cache={kept}")
    noted = {job: {"COMPILATIONS": str(tmp_path / job)} for job in ("train", "evaluate", "sample")}
    code, _, err = run("train", *train(workdir, *flags, steps=20), cache_dir=cache_dir, environment=noted["train"])
    assert code == 0, err
    check_a_second_start(tmp_path / "again", flags, kept, cache_dir)
    lines = scalars(workdir)
    assert lines[-1]["loss"] == pytest.approx(lines[-1]["mse"] + lines[-1]["vb"], rel=1e-5)
    assert lines[-1]["learning_rate"] < 0.1 * lines[5]["learning_rate"]
    code, _, err = run("evaluate", f"--workdir={workdir}", cache_dir=cache_dir, environment=noted["evaluate"])
    assert code == 0, err
    out = tmp_path / "samples.npz"
    flags = [f"--workdir={workdir}", "--num=4", "--steps=5", f"--out={out}"]
    code, _, err = run("sample", *flags, cache_dir=cache_dir, environment=noted["sample"])
    assert code == 0 and out.exists(), err
    for job, program in (("train", "jit(step)"), ("evaluate", "jit(losses)"), ("sample", "jit(sample)")):
        assert [name for _, name in compilations(tmp_path / job)].count(program) == 1, job


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path, data_dir, cache_dir):
    (tmp_path / "thesis.txt").write_text("mine")
    code, _, err = run("train", *train(tmp_path), cache_dir=cache_dir)
    assert code == 2 and "is not empty and holds no config.json" in err
    assert os.listdir(tmp_path) == ["thesis.txt"]
