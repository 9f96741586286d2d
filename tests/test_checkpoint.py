"""Checkpoints that were damaged, cut short, mixed up or could not be written: never restored as wrong numbers, never lost."""

import dataclasses
import json
import os
import random
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from job import Job, run, wait_for_step
from runs import STEPS, assert_same_run, train
from test_train import check_compilations

from dit_jax import checkpoint
from dit_jax.config import MeshConfig, to_dict
from dit_jax.devices.mesh import make_mesh
from dit_jax.error import JobError, UsageError
from dit_jax.training.state import abstract_state, make_state
from dit_jax.workdir import manifest
from dit_jax.workdir.folder import read_config


@pytest.fixture
def workdir(uninterrupted, tmp_path):
    """A copy of the small run, with checkpoints of steps 40, 50 and 60."""
    return Path(shutil.copytree(uninterrupted, tmp_path / "run"))


@pytest.fixture(scope="module")
def made(uninterrupted):
    """(config, mesh, state) of the small model before its first step, on one device. Not to be changed: its parts are replaced."""
    cfg = dataclasses.replace(read_config(str(uninterrupted)), mesh=MeshConfig())
    mesh = make_mesh(cfg.mesh, jax.devices()[:1])
    return cfg, mesh, make_state(cfg, mesh)


def at(workdir, step):
    return Path(checkpoint.path_of(str(workdir), step))


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def test_sixty_of_sixty_flipped_bits_are_found(workdir):
    """In any file, the manifest's own included, weighted by size as a real flip is; and the file is named."""
    seed = random.SystemRandom().randrange(10**6)
    rng, found = random.Random(seed), 0
    everything = files(at(workdir, 60))
    for i in range(60):
        if i % 2:
            path = rng.choice(everything)
        else:
            path = rng.choices(everything, [p.stat().st_size for p in everything])[0]
        whole = path.read_bytes()
        flip(path, rng)
        wrong = manifest.problems(str(at(workdir, 60)))
        assert wrong, f"seed {seed}: {path}"
        assert path.name in wrong[0] or path.name == manifest.NAME, f"seed {seed}: {path}: {wrong}"
        found += 1
        path.write_bytes(whole)
    assert found == 60 and manifest.problems(str(at(workdir, 60))) == []


def zero_page(folder):
    path = max(files(folder / "ema"), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[4096:8192] = bytes(4096)
    path.write_bytes(data)


def truncate(folder):
    path = max(files(folder), key=lambda p: p.stat().st_size)
    os.truncate(path, path.stat().st_size - 1)


def flip_a_bit_of_the_ema(folder):
    flip(max(files(folder / "ema"), key=lambda p: p.stat().st_size), random.Random(0))


DAMAGE = {
    "a flipped bit": (flip_a_bit_of_the_ema, "its bytes changed (SHA-256)"),
    "a zeroed page": (zero_page, "its bytes changed (SHA-256)"),
    "truncation": (truncate, "bytes, expected"),
    "a missing file": (lambda f: next((f / "ema" / "d").iterdir()).unlink(), "missing"),
    "an added file": (lambda f: (f / "ema" / "notes.txt").write_text("x"), "ema/notes.txt: not in manifest.json"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json: No such file"),
    "an empty manifest": (lambda f: (f / "manifest.json").write_text(""), "manifest.json: damaged"),
    "a manifest of nothing": (lambda f: (f / "manifest.json").write_text("{}"), "manifest.json: damaged"),
    "the EMA is gone": (lambda f: shutil.rmtree(f / "ema"), "missing"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_and_the_newest_that_verifies_is_taken(case, workdir, capsys):
    damage, message = DAMAGE[case]
    damage(at(workdir, 60))
    assert any(message in line for line in manifest.problems(str(at(workdir, 60))))
    _, weights = checkpoint.load(str(workdir))
    _, older = checkpoint.load(str(workdir), 50)
    jax.tree.map(np.testing.assert_array_equal, weights, older)
    if case != "no manifest":  # without one it does not count
        assert "60 is damaged" in capsys.readouterr().err
        with pytest.raises(JobError, match="60: damaged"):
            checkpoint.load(str(workdir), 60)


def test_training_falls_back_says_so_and_ends_the_same(workdir, uninterrupted, tmp_path, cache_dir):
    """And a run that goes on compiles every program once."""
    zero_page(at(workdir, 60))
    flip_a_bit_of_the_ema(at(workdir, 50))
    noted = tmp_path / "compilations"
    code, _, err = run("train", *train(workdir), cache_dir=cache_dir, environment={"COMPILATIONS": str(noted)})
    assert code == 0, err
    check_compilations(noted, workdir, 40)
    assert "60 is damaged" in err and "50 is damaged" in err and "set aside as 50.damaged" in err
    assert_same_run(uninterrupted, workdir)
    assert sorted(os.listdir(workdir / "checkpoints")) == ["40", "50", "50.damaged", "60", "60.damaged", "lock"]


def test_when_none_verifies_training_stops_and_keeps_everything(workdir, cache_dir):
    for step in (40, 50, 60):
        truncate(at(workdir, step))
    before = {path: path.read_bytes() for path in files(workdir)}
    for _ in range(2):  # a job that is queued again must not take the folder for a new one
        code, _, err = run("train", *train(workdir), cache_dir=cache_dir)
        assert code == 1 and "none of the checkpoints 40, 50, 60 verifies (60: " in err
    for step in (40, 50, 60):
        at(workdir, step).rename(str(at(workdir, step)) + checkpoint.DAMAGED)
    code, _, err = run("train", *train(workdir), cache_dir=cache_dir)
    assert code == 1 and "none of the checkpoints 40.damaged, 50.damaged, 60.damaged verifies" in err
    for step in (40, 50, 60):
        Path(str(at(workdir, step)) + checkpoint.DAMAGED).rename(at(workdir, step))
    assert before == {path: path.read_bytes() for path in files(workdir)}


def test_what_cannot_be_read_now_is_not_taken_for_damaged(workdir, cache_dir):
    """A link that leads to itself, for a file system that fails: nothing is set aside, and later all is well."""
    path = next(p for p in files(at(workdir, 60) / "ema"))
    whole = path.read_bytes()
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(OSError, match="Too many levels"):
        checkpoint.newest_verified(str(workdir))
    code, _, err = run("train", *train(workdir), cache_dir=cache_dir)
    assert code == 1 and "Too many levels of symbolic links" in err
    path.unlink()
    path.write_bytes(whole)
    assert checkpoint.newest_verified(str(workdir)) == 60


def test_a_checkpoint_under_another_name_is_refused(workdir):
    at(workdir, 60).rename(at(workdir, 70))
    with pytest.raises(JobError, match="70: the checkpoint is of step 60; give the folder its name back"):
        checkpoint.load(str(workdir))


def test_two_trainings_never_share_a_folder(workdir, cache_dir):
    saver = checkpoint.Saver(str(workdir), 3)
    code, _, err = run("train", *train(workdir), cache_dir=cache_dir)
    assert code == 1 and "another process trains this run" in err
    saver.close()
    code, _, err = run("train", *train(workdir), cache_dir=cache_dir)
    assert code == 0, err


def test_the_last_one_that_verifies_is_never_pruned(workdir):
    truncate(at(workdir, 60))
    checkpoint.prune(str(workdir), keep=1)
    assert checkpoint.steps(str(workdir)) == [40, 50, 60]
    shutil.rmtree(at(workdir, 60))
    checkpoint.prune(str(workdir), keep=1)
    assert checkpoint.steps(str(workdir)) == [50] and sorted(os.listdir(workdir / "checkpoints")) == ["50", "lock"]


def test_steps_are_what_is_on_the_disk(workdir):
    shutil.copytree(at(workdir, 60), str(at(workdir, 70)) + checkpoint.SAVING)
    shutil.copytree(at(workdir, 60), str(at(workdir, 80)) + ".saving.orbax-checkpoint-tmp")
    shutil.rmtree(at(workdir, 50))
    assert checkpoint.steps(str(workdir)) == [40, 60]


def edit_params(params, change):
    """A checkpoint's parameters with another leaf."""
    params = jax.tree.map(lambda x: x, params)
    bias = params["patch_embedding"]["bias"]
    if change == "missing":
        del params["patch_embedding"]["bias"]
    else:
        new = {"extra": bias, "reshaped": bias[:-1], "retyped": bias.astype(jnp.bfloat16)}[change]
        params["patch_embedding"]["bias_2" if change == "extra" else "bias"] = new
    return params


STRICT = {
    "missing": "patch_embedding/bias: found nothing, expected float32 (16,)",
    "extra": "patch_embedding/bias_2: found float32 (16,), expected nothing",
    "reshaped": "patch_embedding/bias: found float32 (15,), expected float32 (16,)",
    "retyped": "patch_embedding/bias: found bfloat16 (16,), expected float32 (16,)",
}


@pytest.mark.parametrize("change", STRICT)
def test_other_leaves_are_named_with_what_was_found_and_expected(change, made, uninterrupted, tmp_path):
    """A real save of a state that is not quite this model's, manifest and all."""
    cfg, mesh, state = made
    wrong = dataclasses.replace(
        state, step=jnp.int32(7), params=edit_params(state.params, change), ema=edit_params(state.ema, change)
    )
    saver = checkpoint.Saver(str(tmp_path), 3)
    meta = {"model": json.loads((uninterrupted / "config.json").read_text())["config"]["model"]}
    saver.save(7, wrong.items(), {"next_index": 7}, meta)
    saver.close()
    shutil.copy(uninterrupted / "config.json", tmp_path)
    for item in ("params", "ema"):
        with pytest.raises(UsageError) as error:
            checkpoint.load(str(tmp_path), item=item)
        assert STRICT[change] in str(error.value) and str(at(tmp_path, 7) / item) in str(error.value)
    with pytest.raises(UsageError) as error:
        checkpoint.restore(str(tmp_path), 7, abstract_state(cfg, mesh).items(), cfg.model)
    assert STRICT[change] in str(error.value)


@pytest.mark.parametrize("where", ["optimizer", "guard"])
def test_another_leaf_of_the_optimizer_or_the_guard_is_named(where, made, tmp_path):
    cfg, mesh, state = made
    state = dataclasses.replace(state, step=jnp.int32(7))
    if where == "guard":
        wrong = dataclasses.replace(state, guard=dataclasses.replace(state.guard, mean=jnp.zeros(3)))
    else:
        moments = [leaf for leaf in jax.tree.leaves(state.opt) if leaf.ndim]
        wrong = dataclasses.replace(state, opt=jax.tree.map(lambda x: x[:1] if x is moments[0] else x, state.opt))
    saver = checkpoint.Saver(str(tmp_path), 3)
    saver.save(7, wrong.items(), {"next_index": 7}, {"model": to_dict(cfg.model)})
    saver.close()
    with pytest.raises(
        UsageError, match=rf"7/opt: other leaves than .*: {where}/.*found float32 \(.*expected float32 \("
    ):
        checkpoint.restore(str(tmp_path), 7, abstract_state(cfg, mesh).items(), cfg.model)


def test_without_an_ema_or_of_another_model_is_an_error(workdir):
    shutil.rmtree(at(workdir, 60) / "ema")
    (at(workdir, 60) / "manifest.json").unlink()
    manifest.write_manifest(str(at(workdir, 60)))
    with pytest.raises(UsageError, match=r"60/ema: missing, expected the item 'ema'"):
        checkpoint.load(str(workdir), 60)
    checkpoint.load(str(workdir), 60, "params")
    config = json.loads((workdir / "config.json").read_text())
    config["config"]["model"].update(width=32, qk_norm=True)
    (workdir / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError) as error:
        checkpoint.load(str(workdir), 50)
    for part in ("another model than the config", "model.width: found 16, expected 32", "model.qk_norm: found False"):
        assert part in str(error.value)


def test_a_full_disk_surfaces_and_older_checkpoints_stay(workdir, uninterrupted, cache_dir):
    """No file may grow beyond 30 kB, which the kernel enforces as it does a full disk; the run goes on from step 40."""
    for step in (50, 60):
        shutil.rmtree(at(workdir, step))
    code, _, err = run("train", *train(workdir), cache_dir=cache_dir, file_size=30_000)
    assert code == 1, err
    (last,) = [line for line in err.splitlines() if line.startswith("error: ")] or [err]
    assert "the checkpoint could not be written (File too large)" in last and "are intact" in last
    assert "Traceback" not in err
    assert checkpoint.steps(str(workdir)) == [40] and "the checkpoints of steps [40] are intact" in last
    assert not [name for name in os.listdir(workdir / "checkpoints") if not name.isdecimal() and name != "lock"]
    assert manifest.problems(str(at(workdir, 40))) == []
    code, _, err = run("train", *train(workdir), cache_dir=cache_dir)
    assert code == 0, err
    assert_same_run(uninterrupted, workdir)


def test_without_permission_to_write_the_error_surfaces_at_the_next_step(uninterrupted, tmp_path, cache_dir):
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    process = Job("train", *train(workdir, steps=100_000), cache_dir=cache_dir, plain_user=True)
    wait_for_step(process, workdir, STEPS + 1)
    (workdir / "checkpoints").chmod(0o500)
    _, err = process.communicate(timeout=60)
    (workdir / "checkpoints").chmod(0o700)
    assert process.returncode == 1, err
    (last,) = [line for line in err.splitlines() if line.startswith("error: ")] or [err]
    assert "the checkpoint could not be written (Permission denied)" in last and "are intact" in last
    left = checkpoint.steps(str(workdir))
    assert left and all(manifest.problems(checkpoint.path_of(str(workdir), step)) == [] for step in left)


@pytest.mark.slow
def test_a_folder_that_turned_unwritable_surfaces_at_the_next_step(uninterrupted, tmp_path, cache_dir):
    workdir = tmp_path / "run"
    process = Job("train", *train(workdir, steps=100_000), cache_dir=cache_dir)
    wait_for_step(process, workdir, 25)
    root, aside = workdir / "checkpoints", workdir / "aside"
    root.rename(aside)
    root.write_text("a file where the folder was")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    (last,) = [line for line in err.splitlines() if line.startswith("error: ")] or [err]
    assert "the checkpoint could not be written (" in last
    root.unlink()
    aside.rename(root)
    assert manifest.problems(checkpoint.path_of(str(workdir), checkpoint.steps(str(workdir))[-1])) == []


@pytest.mark.slow
def test_a_slow_disk_delays_the_next_save_only_and_errors_come_at_a_check(uninterrupted, tmp_path, monkeypatch):
    """Hashing takes seconds here: `save` returns at once, `check` is silent meanwhile, the next save waits; then the disk
    breaks, and `check` says so."""
    cfg = dataclasses.replace(read_config(str(uninterrupted)), mesh=MeshConfig())
    state = make_state(cfg, make_mesh(cfg.mesh))
    real = manifest.write_manifest

    def slow(folder):
        time.sleep(2.0)
        real(folder)

    monkeypatch.setattr(manifest, "write_manifest", slow)
    saver = checkpoint.Saver(str(tmp_path), 3)
    saver.save(1, state.items(), {}, {})
    saver.check()
    assert checkpoint.steps(str(tmp_path)) == []
    saver.save(2, state.items(), {}, {})
    assert checkpoint.steps(str(tmp_path)) == [1]
    saver.wait()
    assert checkpoint.steps(str(tmp_path)) == [1, 2]

    def broken(folder):
        raise OSError(5, "Input/output error", folder)

    monkeypatch.setattr(manifest, "write_manifest", broken)
    saver.save(3, state.items(), {}, {})
    with pytest.raises(JobError, match=r"3: .*Input/output error.*steps \[1, 2\] are intact"):
        for _ in range(1000):
            saver.check()
            time.sleep(0.01)
    saver.close()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2", "lock"]


def test_a_save_never_replaces_a_checkpoint(made, tmp_path):
    state = dataclasses.replace(made[2], step=jnp.int32(1))
    saver = checkpoint.Saver(str(tmp_path), 3)
    saver.save(int(state.step), state.items(), {}, {})
    saver.save(int(state.step), state.items(), {}, {})
    with pytest.raises(JobError, match="exists already"):
        saver.close()
    assert checkpoint.steps(str(tmp_path)) == [1]
