"""Evaluation and sampling: a fixed, stratified held-out loss, records written once, images that depend on (seed, i) only."""

import dataclasses
import json
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from job import TINY, Job, run, wait_for_step
from PIL import Image

from dit_jax import checkpoint, flops
from dit_jax.bind import bind
from dit_jax.config import Config, MeshConfig, SampleConfig
from dit_jax.data.pipeline import load_arrays
from dit_jax.data.source import open_source
from dit_jax.devices.mesh import make_mesh
from dit_jax.diffusion.objective import make_objective
from dit_jax.diffusion.process import make_process
from dit_jax.error import Interrupted, JobError, UsageError
from dit_jax.evaluation import loss, protocol
from dit_jax.evaluation import run as evaluation
from dit_jax.evaluation.partial import drop_partials
from dit_jax.evaluation.run import run as evaluate_run
from dit_jax.sampling import draw, parts
from dit_jax.workdir.folder import read_config
from dit_jax.workdir.goodput import Ledger
from dit_jax.workdir.records import protocol_id


@pytest.fixture(scope="module")
def workdir(uninterrupted, tmp_path_factory):
    return shutil.copytree(uninterrupted, tmp_path_factory.mktemp("evaluated") / "run")


def records(workdir):
    return [json.loads(line) for line in (workdir / "eval" / "records.jsonl").read_text().splitlines()]


def test_one_record_per_checkpoint_and_protocol(workdir, cache_dir):
    command = [f"--workdir={workdir}", "--config.eval.samples=70", "--at=50,60"]
    code, _, err = run("evaluate", *command, cache_dir=cache_dir)
    assert code == 0, err
    first = records(workdir)
    assert sorted(r["step"] for r in first) == [50, 50, 60, 60]
    assert len({(r["step"], r["protocol_id"]) for r in first}) == 4
    code, _, err = run("evaluate", *command, cache_dir=cache_dir)
    assert code == 0 and records(workdir) == first


def test_a_record_says_everything(workdir):
    cfg = read_config(str(workdir))
    record = next(r for r in records(workdir) if "loss" in r["metrics"])
    assert set(record) == {
        "run", "task", "step", "images_seen", "tokens_seen", "params", "params_active", "flops_train", "flops_image", "metrics",
        "metric_signs", "goodput", "protocol", "unique_images",
        "protocol_id", "weights_sha256", "device",
    }  # fmt: skip
    assert record["task"] == "labels"
    assert record["images_seen"] == record["step"] * 16 and record["tokens_seen"] == record["images_seen"] * 16
    assert record["flops_train"] == flops.train_flops(cfg.model, record["images_seen"])
    assert record["params"] == flops.parameters(cfg.model)
    assert len([m for m in record["metrics"] if m.startswith("loss_t")]) == cfg.eval.buckets
    assert set(record["metric_signs"]) == set(record["metrics"]) - {"loss_se"}
    assert set(record["metric_signs"].values()) == {-1}
    drawn = next(r for r in records(workdir) if "fd_digits" in r["metrics"])
    signs = {
        "fd_digits": -1,
        "fd_digits_low": -1,
        "is_digits": 1,
        "kd_digits": -1,
        "precision_digits": 1,
        "recall_digits": 1,
    }
    assert signs.items() <= drawn["metric_signs"].items() and "is_digits_std" not in drawn["metric_signs"]
    for key in ("sampler", "steps", "guidance", "interval", "channels", "labels", "num", "seed"):
        assert key in drawn["protocol"]["samples"]
    for key in ("weights", "uint8", "features", "reference", "autoencoder", "dtype", "data", "process"):
        assert drawn["protocol"][key]


def test_the_loss_is_the_mean_over_a_fixed_stratified_set(workdir):
    """Recomputed here one image at a time, without batches, meshes or padding."""
    cfg = read_config(str(workdir))
    _, params = checkpoint.load(str(workdir), 60)
    images, cond = jax.tree.map(lambda x: x[:21], load_arrays(cfg.data, "test"))
    found = loss.held_out_loss(cfg, params, images, cond, make_mesh(MeshConfig()))
    alone = loss.held_out_loss(cfg, params, *jax.tree.map(lambda x: x[:1], (images, cond)), make_mesh(MeshConfig()))
    assert "loss_se" not in alone and all(map(np.isfinite, alone.values())), "one image has no standard error"
    process = make_process(cfg.diffusion, False)
    objective, model = make_objective(cfg), bind(cfg.model)
    of_one = jax.jit(lambda points: objective.losses(model, params, {}, points)[0])
    table = []
    for i in range(21):
        u = loss.stratified(cfg.eval.seed, np.array([i]), 16)
        assert np.all(np.floor(np.asarray(u)[0] * 16) == np.arange(16))
        eps = loss.fixed_noise(cfg.eval.seed, np.array([i]), 16, images.shape[1:])[0]
        x, y = jax.numpy.repeat(images[i : i + 1], 16, axis=0), jax.numpy.repeat(cond["label"][i : i + 1], 16)
        points = {"x": x, "cond": {"label": y}, "t": process.time(u[0]), "eps": eps}
        table.append(np.asarray(of_one(points)))
    per_image = np.mean(table, axis=1)
    assert found["loss"] == pytest.approx(per_image.mean(), rel=1e-5)
    assert found["loss_se"] == pytest.approx(per_image.std(ddof=1) / np.sqrt(21), rel=1e-4)
    assert np.mean([found[f"loss_t{b}"] for b in range(8)]) == pytest.approx(found["loss"], rel=1e-6)
    assert found["loss_t0"] == pytest.approx(np.mean(np.array(table)[:, :2]), rel=1e-5)


def test_a_diverged_model_is_not_recorded(workdir):
    cfg = read_config(str(workdir))
    _, params = checkpoint.load(str(workdir), 60)
    broken = jax.tree.map(lambda leaf: leaf * np.nan, params)
    with pytest.raises(UsageError, match="not finite; the run diverged, and nothing is recorded"):
        loss.held_out_loss(cfg, broken, *load_arrays(cfg.data, "test"), make_mesh(MeshConfig()))


def test_protocols_differ_by_ema_buckets_and_seed(workdir):
    cfg = read_config(str(workdir))
    others = [
        dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, ema_width=0.2)),
        dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, buckets=4)),
        dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, seed=5)),
        dataclasses.replace(cfg, sample=dataclasses.replace(cfg.sample, weights="params")),
    ]
    held_out = open_source(cfg.data, "test")
    ids = {protocol_id(protocol.loss_protocol(c, held_out)) for c in [cfg, *others]}
    assert len(ids) == 5


def drawn(workdir, sampler="ddpm", batch_size=16, num=20, devices=8, **changes):
    cfg = read_config(str(workdir))
    _, params = checkpoint.load(str(workdir), 60)
    settings = SampleConfig(sampler=sampler, steps=4, guidance=2.0, batch_size=batch_size, **changes)
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    batches = list(draw.open_sampling(dataclasses.replace(cfg, sample=settings), mesh).images(params, 7, num))
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]


def test_image_i_does_not_depend_on_batches_or_devices(workdir):
    images, labels = drawn(workdir)
    assert images.shape == (20, 8, 8, 1) and images.dtype == np.uint8
    for batch_size, devices, num in ((24, 2, 20), (5, 1, 11)):
        other, other_labels = drawn(workdir, batch_size=batch_size, devices=devices, num=num)
        np.testing.assert_array_equal(labels[:num], other_labels)
        np.testing.assert_array_equal(images[:num], other)


def test_label_policies(workdir):
    _, balanced = drawn(workdir, labels="balanced", num=24)
    np.testing.assert_array_equal(balanced, np.arange(24) % 10)
    _, uniform = drawn(workdir, num=24)
    assert len(set(uniform.tolist())) > 4 and not np.array_equal(uniform, balanced)


def test_uint8_rule():
    values = np.array([-1.5, -1.0, -0.999, 0.0, 0.9999, 1.0, 2.0])
    np.testing.assert_array_equal(draw.to_uint8(values), [0, 0, 0, 128, 255, 255, 255])
    assert draw.to_uint8(np.array([127.9 / 127.5 - 128 / 127.5 + 0.001]))[0] == 128 - 1 + 1


def test_cost_of_an_image_counts_guided_steps_twice(workdir):
    cfg = read_config(str(workdir))
    forward = flops.forward_flops(cfg.model)

    def cost(**settings):
        return draw.image_flops(dataclasses.replace(cfg, sample=SampleConfig(**settings))) / forward

    assert cost(sampler="euler", steps=10) == 10
    assert cost(sampler="euler", steps=10, guidance=2.0) == 20
    assert cost(sampler="euler", steps=10, guidance=2.0, interval=(0.1, 0.2)) == 12
    assert cost(sampler="euler", steps=10, guidance=2.0, interval=(0.35, 0.65)) == 13
    assert cost(sampler="heun", steps=10) == 19


def test_sample_job_writes_npz_and_grid(workdir, tmp_path, cache_dir):
    out, grid = tmp_path / "samples.npz", tmp_path / "grid.png"
    flags = [f"--workdir={workdir}", "--num=12", "--steps=3", f"--out={out}", f"--grid={grid}", "--labels=3,7"]
    code, said, err = run("sample", *flags, cache_dir=cache_dir)
    assert code == 0, err
    assert said.split() == [str(out), str(grid)]
    with np.load(out, allow_pickle=False) as archive:
        assert archive["arr_0"].shape == (12, 8, 8, 1) and archive["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(archive["arr_1"], [3, 7] * 6)
    with Image.open(grid) as picture:
        assert picture.size[0] > 100
    first = out.read_bytes()
    assert run("sample", *flags, cache_dir=cache_dir)[0] == 0 and out.read_bytes() == first


BAD = {
    "sampler": ("sample", ["--sampler=eular"], "sample.sampler: found 'eular'; did you mean 'euler'?"),
    "guidance": ("sample", ["--guidance=-1"], "sample.guidance: found -1.0, expected a value from 0 to 1000"),
    "steps": ("sample", ["--steps=0"], "sample.steps: found 0, expected at least 1"),
    "labels": ("sample", ["--labels=3,12"], "--labels: found '12', expected class numbers from 0 to 9"),
    "step": ("sample", ["--step=55"], "found no checkpoint of step 55, expected one of [40, 50, 60]"),
    "ending": ("sample", ["--out=grid.png"], "--out: found 'grid.png', expected a name that ends in .npz"),
    "slice": ("sample", ["--slice=v4-8"], "--slice: found it without --check, expected both"),
    "hosts": (
        "sample",
        ["--check", "--slice=2x8", "--out=", "--grid=grid.png"],
        "--out: empty, expected an npz, which the hosts draw into together",
    ),
    "check": ("sample", ["--check", "--labels=12"], "--labels: found '12', expected class numbers from 0 to 9"),
    "folder": (
        "sample",
        ["--out=/nowhere/at/all.npz"],
        "--out: found '/nowhere/at/all.npz', whose folder does not exist",
    ),
    "override": (
        "evaluate",
        ["--config.eval.sample=3"],
        "--config.eval.sample: unknown config key 'sample'; did you mean 'samples'?",
    ),
    "buckets": (
        "evaluate",
        ["--config.eval.buckets=5"],
        "eval.times_per_image: found 16, expected a multiple of eval.buckets = 5",
    ),
    "features": (
        "evaluate",
        ["--config.eval.features=inception", "--config.eval.samples=9"],
        "eval.inception: empty, expected the folder of the Inception network",
    ),
    "few samples": (
        "evaluate",
        ["--config.eval.samples=64"],
        "eval.samples: found 64, expected more than the 64 features of the network 'digits'",
    ),
    "another model": (
        "evaluate",
        ["--config.model.heads=4", "--config.eval.samples=70", "--config.eval.loss=False"],
        "model.heads: found 4, expected 2, as the run ",
    ),
    "another model to sample": ("sample", ["--config.model.heads=4"], "model.heads: found 2, expected 4"),
    "bootstrap": ("evaluate", ["--config.eval.bootstrap=1"], "eval.bootstrap: found 1, expected 0 for no interval"),
    "nothing": ("evaluate", ["--config.eval.loss=False"], "found False and 0, expected at least one of them"),
    "reference": (
        "evaluate",
        ["--config.eval.reference=/nowhere.npz", "--config.eval.samples=400"],
        "/nowhere.npz: no such file",
    ),
    "grid": ("evaluate", ["--config.eval.samplers=('eular',)"], "eval.samplers: found 'eular'; did you mean 'euler'?"),
    "grid of other things": (
        "evaluate",
        ["--config.eval.steps=('a',)"],
        "eval.steps: found 'a', expected a tuple of ints",
    ),
    "autoencoder": (
        "sample",
        ["--autoencoder=/nowhere"],
        "/nowhere/meta.json: cannot be read (No such file or directory); expected a folder made by dit_jax.convert",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_exit_2_and_nothing_written(case, workdir, cache_dir):
    job, arguments, message = BAD[case]
    before = sorted(p for p in workdir.rglob("*"))
    code, out, err = run(job, f"--workdir={workdir}", *arguments, cache_dir=cache_dir)
    assert code == 2 and out == "", err
    assert err.startswith("error: ") and message in err and len(err.strip().splitlines()) == 1
    assert sorted(p for p in workdir.rglob("*")) == before


@pytest.mark.parametrize("job", ["sample", "evaluate"])
def test_missing_and_foreign_folders(job, tmp_path, cache_dir):
    code, _, err = run(job, f"--workdir={tmp_path / 'nope'}", cache_dir=cache_dir)
    assert code == 2 and "no folder" in err
    code, _, err = run(job, f"--workdir={tmp_path}", cache_dir=cache_dir)
    assert code == 2 and "holds no config.json" in err
    code, _, err = run(job, cache_dir=cache_dir)
    assert code == 2 and "--workdir" in err


def test_watch_follows_a_run_that_is_still_training(tmp_path, cache_dir):
    """Two processes on one folder: the watcher records the last step and ends; the training is not disturbed."""
    workdir = tmp_path / "live"
    flags = ["--config=configs/digits.py", f"--workdir={workdir}", *TINY, "--config.train.steps=30"]
    training = Job("train", *flags, cache_dir=cache_dir)
    wait_for_step(training, workdir, 1)
    code, _, err = run(
        "evaluate", f"--workdir={workdir}", "--watch", "--config.eval.poll_seconds=0.2", cache_dir=cache_dir
    )
    assert code == 0, err
    _, training_err = training.communicate(timeout=60)
    assert training.returncode == 0, training_err
    steps = [record["step"] for record in records(workdir)]
    assert steps[-1] == 30 and steps == sorted(set(steps))


def test_a_run_without_checkpoints(workdir, tmp_path, cache_dir):
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    code, _, err = run("evaluate", f"--workdir={tmp_path}", cache_dir=cache_dir)
    assert code == 2 and "found no checkpoint, expected one; train the run first" in err


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_the_loss_does_not_depend_on_batches_or_devices(workdir, dtype):
    cfg = read_config(str(workdir))
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, dtype=dtype))
    _, params = checkpoint.load(str(workdir), 60)
    images, cond = jax.tree.map(lambda x: x[:41], load_arrays(cfg.data, "test"))
    found = []
    for batch_size, devices in ((128, 1), (1, 1), (20, 8)):
        other = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, batch_size=batch_size))
        mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
        found.append(loss.held_out_loss(other, params, images, cond, mesh))
    assert all(other == found[0] for other in found)


def copy_of(workdir, folder):
    """The run without its records."""
    shutil.copytree(workdir, folder / "run", ignore=shutil.ignore_patterns("eval", "40", "50"))
    return folder / "run"


LONG = ["--config.eval.samples=300", "--config.sample.sampler=ddpm", "--config.sample.steps=40"]


def wait_for_partial(process, workdir, before=(), timeout=120):
    """Returns the names of the parts, once there are more than `before`."""
    end = time.monotonic() + timeout
    while True:
        found = {path.name for path in (workdir / "eval" / "partial").glob("*/*.part")}
        if found > set(before):
            return found
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, f"no partial within {timeout} s"
        time.sleep(0.01)


def images_in(workdir):
    """How many images the parts hold."""
    ranges = [path.stem.split("-") for path in (workdir / "eval" / "partial").glob("*/*.part")]
    return sum(int(last) - int(first) for first, last in ranges)


@pytest.mark.slow
def test_evaluate_killed_and_stopped_while_it_samples_goes_on_in_the_middle(workdir, tmp_path, cache_dir):
    """On one device, on two, and in this process on eight, in one go: the same record, to the last bit."""
    workdir = copy_of(workdir, tmp_path)
    command = [f"--workdir={workdir}", *LONG]
    killed = Job("evaluate", *command, "--config.sample.batch_size=16", cache_dir=cache_dir, devices=1)
    before = wait_for_partial(killed, workdir)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert [next(iter(r["metrics"])) for r in records(workdir)] == ["loss"]
    stopped = Job("evaluate", *command, "--config.sample.batch_size=40", cache_dir=cache_dir, devices=2)
    wait_for_partial(stopped, workdir, before)
    stopped.send_signal(signal.SIGTERM)
    _, err = stopped.communicate(timeout=60)
    assert stopped.returncode == 75 and "/300 were drawn before" in err, err
    kept, (folder,) = images_in(workdir), (workdir / "eval" / "partial").iterdir()
    assert f"interrupted: {kept} of 300 images are kept in {folder}; the same command goes on" in err
    (workdir / "eval" / "records.jsonl.tmp77").write_text("cut short")
    code, _, err = run("evaluate", *command, cache_dir=cache_dir, devices=2)
    assert code == 0 and f"{kept}/300 were drawn before" in err, err
    assert [next(iter(r["metrics"])) for r in records(workdir)] == ["loss", "fd_digits"]
    assert sorted(p.name for p in (workdir / "eval").iterdir()) == ["records.jsonl", "records.jsonl.lock"]
    whole = copy_of(workdir, tmp_path / "whole")
    cfg = read_config(str(whole))
    cfg = dataclasses.replace(
        cfg,
        eval=dataclasses.replace(cfg.eval, samples=300, loss=False),
        sample=dataclasses.replace(cfg.sample, sampler="ddpm", steps=40, batch_size=512),
    )
    (record,) = evaluate_run(cfg, str(whole), quiet=True)
    for key in ("protocol", "metrics"):
        assert json.loads(json.dumps(record[key])) == records(workdir)[1][key]


def test_a_grid_of_samplings_is_scored_once_each(workdir, tmp_path, cache_dir):
    workdir = copy_of(workdir, tmp_path)
    grid = ["--config.eval.samplers=('euler','heun')", "--config.eval.steps=(3,)"]
    grid.append("--config.sample.batch_size=16")  # several batches: the first does not count in seconds_sample
    command = [f"--workdir={workdir}", *grid, "--config.eval.weights=('ema','params')", "--config.eval.samples=70"]
    code, _, err = run("evaluate", *command, "--config.eval.loss=False", cache_dir=cache_dir, devices=1)
    assert code == 0, err
    found = {
        (str(p["weights"]), p["samples"]["sampler"], p["samples"]["steps"], p["samples"]["guidance"]): r
        for r in records(workdir)
        for p in [r["protocol"]]
    }
    assert len(found) == len(records(workdir)) == 4
    assert "warning: eval.samples: 70 are few for 64 features: fd_digits is biased upwards" in err
    cost = flops.forward_flops(read_config(str(workdir)).model)
    for (_, sampler, steps, guidance), record in found.items():
        calls = {"euler": steps, "heun": 2 * steps - 1}[sampler]
        assert guidance == 2 and record["flops_sample"] == 2 * calls * cost
    assert all(0 < record["seconds_sample"] < 10 for record in found.values())
    assert len({record["metrics"]["fd_digits"] for record in records(workdir)}) == 4


def test_partials_of_what_is_recorded_or_gone_are_dropped(tmp_path):
    names = {"0123456789abcdef-40": False, "0123456789abcdef-30": True, "fedcba9876543210-40": True, "thesis": True}
    for name in names:
        folder = tmp_path / "eval" / "partial" / name
        folder.mkdir(parents=True)
        (folder / "job.json").write_text("{}")
    in_use = tmp_path / "eval" / "partial" / "0123456789abcdef-20"
    with parts.locked(str(in_use)):
        drop_partials(str(tmp_path), {(40, "0123456789abcdef")}, [30, 40])
        assert in_use.exists()
    for name, stays in names.items():
        assert (tmp_path / "eval" / "partial" / name).exists() == stays


@pytest.mark.slow
def test_two_evaluations_at_once_write_each_record_once(workdir, tmp_path, cache_dir):
    workdir = copy_of(workdir, tmp_path)
    command = [f"--workdir={workdir}", "--config.eval.samples=500"]
    both = [Job("evaluate", *command, cache_dir=cache_dir, devices=devices) for devices in (1, 2)]
    for process in both:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert sorted(next(iter(r["metrics"])) for r in records(workdir)) == ["fd_digits", "loss"]
    assert not (workdir / "eval" / "partial").exists()


def test_a_damaged_checkpoint_is_named_and_the_others_are_evaluated(workdir, tmp_path, cache_dir):
    shutil.copytree(workdir, tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    workdir = tmp_path / "run"
    biggest = max(
        (p for p in (workdir / "checkpoints" / "50" / "ema").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    data = bytearray(biggest.read_bytes())
    data[len(data) // 2] ^= 1
    biggest.write_bytes(data)
    for arguments in ([], ["--watch"]):
        code, _, err = run("evaluate", f"--workdir={workdir}", *arguments, cache_dir=cache_dir)
        assert code == 1 and "checkpoints/50" in err and "it is not recorded for step 50" in err, err
        assert err.strip().splitlines()[-1].startswith("error: step 50: not all evaluated")
        assert [r["step"] for r in records(workdir)] == [40, 60]


def test_a_diverged_checkpoint_is_named_and_the_others_are_scored(workdir, tmp_path, cache_dir, monkeypatch, capsys):
    """The weights of step 50 are made NaN as they are loaded."""
    shutil.copytree(workdir, tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    load = checkpoint.load

    def broken(path, step, *rest):
        model, params = load(path, step, *rest)
        return model, jax.tree.map(lambda leaf: leaf * np.nan, params) if step == 50 else params

    monkeypatch.setattr(checkpoint, "load", broken)
    cfg = read_config(str(tmp_path / "run"))
    cfg = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, samples=70, loss=False, bootstrap=0))
    with pytest.raises(JobError, match="step 50: not all evaluated"):
        evaluate_run(cfg, str(tmp_path / "run"), quiet=True)
    assert [r["step"] for r in records(tmp_path / "run")] == [40, 60]
    said = capsys.readouterr().err
    assert "checkpoints/50: ema, euler 4, guidance 2: samples 0 to" in said and "it is not recorded for step 50" in said


def test_a_cell_of_a_grid_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    """Whatever it fails by; a command of one cell ends with that cell's own error."""
    monkeypatch.setattr(checkpoint, "steps", lambda workdir: [7])
    monkeypatch.setattr(evaluation, "_weights", lambda *rest: evaluation.Weights({}, ""))
    monkeypatch.setattr(evaluation, "make_record", lambda cfg, workdir, step, weights, metrics, protocol, *rest: {
        "step": step, "metrics": metrics, "protocol": protocol, "protocol_id": protocol_id(protocol)
    })  # fmt: skip

    def task(steps, error=None):
        def measure(step, params):
            if error:
                raise error
            return {"fd": 1.0}, {}

        return evaluation.Task(Config(), {"samples": {"sampler": "heun", "steps": steps, "guidance": 2.0}}, measure)

    wanted = [task(1, TypeError("out of\nmemory")), task(2), task(3, UsageError("too few")), task(4)]
    failed, ledger = {}, Ledger("evaluate", 0.0)
    evaluation._run(wanted, str(tmp_path), None, None, True, [], failed, ledger)
    assert [r["protocol"]["samples"]["steps"] for r in records(tmp_path)] == [2, 4]
    said = capsys.readouterr().err
    assert "checkpoints/7: ema, heun 1, guidance 2: out of; it is not recorded for step 7" in said
    assert "checkpoints/7: ema, heun 3, guidance 2: too few; " in said
    evaluation._run(wanted, str(tmp_path), None, None, True, [], failed, ledger)
    assert "not recorded" not in capsys.readouterr().err  # a poll of --watch says what is known no second time
    with pytest.raises(JobError, match="step 7: not all evaluated"):
        evaluation.report_failed(failed)
    with pytest.raises(UsageError, match="too few"):
        evaluation._run([wanted[2]], str(tmp_path), None, None, True, [], {}, ledger)
    with pytest.raises(Interrupted):
        evaluation._run([task(5, Interrupted()), task(6)], str(tmp_path), None, None, True, [], {}, ledger)
