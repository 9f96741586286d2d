"""Facts about averages of the weights: their closed forms, widths made of snapshots, and snapshots of a run that was stopped."""

import dataclasses
import json
import os
import shutil
import zipfile

import jax
import numpy as np
import pytest

from dit_jax import checkpoint
from dit_jax.checkpoint import average
from dit_jax.checkpoint.place import SNAPSHOTS, path_of
from dit_jax.config import Config, DiffusionConfig, ModelConfig, OptimConfig, TrainConfig
from dit_jax.devices.mesh import on_one_device
from dit_jax.error import JobError, UsageError
from dit_jax.evaluation import run as evaluation
from dit_jax.evaluation.in_run import check_in_run
from dit_jax.evaluation.width import best_widths, tell_best
from dit_jax.models import dit
from dit_jax.sampling import run as sampling
from dit_jax.sampling.run import Request
from dit_jax.training import loop
from dit_jax.workdir.folder import read_config
from dit_jax.workdir.records import read_records

pytestmark = pytest.mark.usefixtures("one_device")
MODEL = ModelConfig(depth=2, width=16, heads=2, input_size=8, channels=1, classes=10, learn_sigma=False)
OPTIM = OptimConfig(
    learning_rate=3e-3, ema="power", ema_width=0.08, ema_tracks=(0.05, 0.1), snapshot_every=8, warmup_steps=5
)
TRAIN = TrainConfig(steps=120, batch_size=16, log_every=20, checkpoint_every=60)


@pytest.fixture(scope="module")
def cfg():
    cfg = Config(model=MODEL, diffusion=DiffusionConfig(process="flow"), optim=OPTIM, train=TRAIN)
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, dataset="digits", image_size=8))


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_dir, cfg):
    """A run in one go, with a directly tracked EMA of width 0.08 beside the tracks 0.05 and 0.1. Not to be changed: copy it."""
    workdir = str(tmp_path_factory.mktemp("average") / "run")
    loop.run(cfg, workdir, quiet=True)
    return workdir


def profile(time, width, total):
    """Weights of the updates 1 to `total` in the average of `width` after `time` of them, by running its recursion."""
    gamma, found = average.power_exponent(width), np.zeros(total)
    for t in range(1, time + 1):
        decay = (1 - 1 / t) ** (gamma + 1)
        found *= decay
        found[t - 1] = 1 - decay
    return found


def distance(tree, other):
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    total = sum(np.square(np.asarray(a, np.float64) - np.asarray(b)).sum() for a, b in pairs)
    return np.sqrt(total / sum(np.square(np.asarray(b, np.float64)).sum() for b in jax.tree.leaves(other)))


def test_products_are_the_integrals():
    u = (np.arange(200_000) + 0.5) / 200_000 * 30
    cases = [(30, 16.97, 30, 6.94), (12, 16.97, 30, 6.94), (30, 2.0, 7, 40.0)]
    for t, g, s, h in cases:
        p, q = ((k + 1) * u**k / end ** (k + 1) * (u <= end) for end, k in ((t, g), (s, h)))
        assert average.products([t], [g], [s], [h])[0, 0] == pytest.approx((p * q).mean() * 30, rel=1e-3)


@pytest.mark.parametrize(("width", "most"), [(0.05, 1e-12), (0.03, 0.03), (0.08, 0.003), (0.15, 0.01)])
def test_coefficients_give_the_profile(width, most):
    """Against the recursions of 400 updates: the error that is told is that of the weights of the updates."""
    times, widths = np.repeat(np.arange(20, 401, 20), 2), np.tile([0.05, 0.1], 20)
    x, told = average.coefficients(times, widths, 400, width)
    wanted = profile(400, width, 400)
    found = x @ np.stack([profile(t, w, 400) for t, w in zip(times, widths, strict=True)])
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert x.sum() == pytest.approx(1, abs=1e-9) and told <= most
    assert error == pytest.approx(told, rel=0.2, abs=1e-6)


def test_a_reconstructed_width_is_the_tracked_one(run, cfg):
    """In the weights, to 1e-3, at both checkpoints; the tracks themselves come out as they are."""
    for step, most in ((60, 1e-3), (120, 1e-3)):
        tracked = checkpoint.load(run, step)[1]
        found, count = average.load_average(run, step, 0.08, MODEL, on_one_device)
        assert count == -(-step // 8) and distance(found, tracked) < most
        assert distance(checkpoint.load(run, step, "params")[1], tracked) > 0.03
    like = on_one_device(dict.fromkeys(("0.05", "0.1"), jax.eval_shape(lambda: found)))
    tracks = checkpoint.read_item(checkpoint.path_of(run, 120), "tracks", like)
    found, _ = average.load_average(run, 120, 0.1, MODEL, on_one_device)
    assert distance(found, tracks["0.1"]) < 1e-6 < 1e-3 < distance(found, tracks["0.05"])


def test_a_width_that_the_snapshots_do_not_hold(run):
    with pytest.raises(
        UsageError, match=r"^eval.ema: found 0.01, expected a width from 0.0\d+ to 0.\d+, as the 15 snapshots"
    ):
        average.load_average(run, 120, 0.01, MODEL, on_one_device, "eval.ema")
    low, high = average.find_snapshots(run, 120).held()
    assert 0.02 < low < 0.05 and 0.1 < high < 0.28


def test_a_run_without_tracks(uninterrupted):
    with pytest.raises(UsageError, match=r"eval.ema: found a width .*optim.ema_tracks"):
        average.find_snapshots(str(uninterrupted), 60)


def snapshots(workdir):
    """The arrays of every snapshot and the updates that it is of."""
    like = on_one_device(dict.fromkeys(("0.05", "0.1"), jax.eval_shape(lambda: dit.init(MODEL, jax.random.key(0)))))
    paths = {step: path_of(workdir, step, SNAPSHOTS) for step in checkpoint.steps(workdir, SNAPSHOTS)}
    return {
        step: (checkpoint.meta_of(at)["updates"], jax.device_get(checkpoint.read_item(at, "tracks", like)))
        for step, at in paths.items()
    }


def test_snapshots_after_a_resume_have_the_same_bits(run, cfg, tmp_path):
    """A run that was killed while it wrote one resumes; what is unfinished goes, what is there stays, and no checkpoint prunes one."""
    workdir = str(tmp_path / "run")
    shutil.copytree(run, workdir)
    shutil.rmtree(checkpoint.path_of(workdir, 120))
    for step in (72, 80, 96, 104, 112, 120):
        shutil.rmtree(path_of(workdir, step, SNAPSHOTS))
    os.makedirs(path_of(workdir, 72, SNAPSHOTS) + ".saving/tracks")
    loop.run(dataclasses.replace(cfg, train=dataclasses.replace(TRAIN, keep=1)), workdir, quiet=True)
    assert checkpoint.steps(workdir) == [120]
    assert sorted(os.listdir(os.path.join(workdir, SNAPSHOTS)), key=int) == [str(step) for step in range(8, 121, 8)]
    a, b = snapshots(run), snapshots(workdir)
    assert [updates for updates, _ in a.values()] == [*a]
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_images_and_scores_of_a_reconstructed_width(run, tmp_path, capfd):
    """The record, its protocol and the job name the width; training refuses it."""
    workdir, cfg = str(tmp_path / "run"), read_config(run)
    shutil.copytree(run, workdir)
    scored = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, ema=(0.05, 0.08), samples=0, max_images=32))
    records = evaluation.run(scored, workdir, [120])
    assert [r["protocol"]["weights"] for r in records] == [
        {"ema": "power", "width": width, "snapshots_of": [0.05, 0.1]} for width in (0.05, 0.08)
    ]
    assert [r["snapshots"] for r in records] == [15, 15]
    plain = evaluation.run(dataclasses.replace(scored, eval=dataclasses.replace(scored.eval, ema=())), workdir, [120])
    assert plain[0]["metrics"]["loss"] == pytest.approx(records[1]["metrics"]["loss"], rel=1e-3)
    assert plain[0]["protocol"]["weights"] == {"ema": "power", "width": 0.08} and "snapshots" not in plain[0]
    drawing = dataclasses.replace(cfg.sample, ema=0.07, sampler="euler", steps=2)
    request = Request(workdir, 4, 0, None, str(tmp_path / "out.npz"), "", "")
    sampling.run(dataclasses.replace(cfg, sample=drawing), request, [])
    with zipfile.ZipFile(tmp_path / "out.npz") as archive:
        assert json.loads(archive.comment)["sample.ema"] == 0.07
    assert "from step 120 (ema 0.07, of 15 snapshots), euler 2" in capfd.readouterr().err
    with pytest.raises(UsageError, match=r"eval.ema: found 0.07, expected none with train.evaluate_every"):
        check_in_run(dataclasses.replace(cfg, sample=drawing))


def test_a_width_that_an_early_step_does_not_hold_is_left_out_there(run, tmp_path, capfd):
    """The snapshots until step 120 hold 0.2, those until 60 do not: the other width and step are scored."""
    workdir, cfg = str(tmp_path / "run"), read_config(run)
    shutil.copytree(run, workdir)
    scored = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, ema=(0.2, 0.08), samples=0, max_images=16))
    with pytest.raises(JobError, match="step 60: not all evaluated"):
        evaluation.run(scored, workdir, [60, 120])
    found = [(r["step"], r["protocol"]["weights"]["width"]) for r in read_records(workdir).values()]
    assert sorted(found) == [(60, 0.08), (120, 0.08), (120, 0.2)]
    assert capfd.readouterr().err.count("eval.ema: found 0.2, expected a width from 0.034 to 0.15") == 1


def test_a_damaged_snapshot_is_named(run, tmp_path):
    workdir = str(tmp_path / "run")
    shutil.copytree(run, workdir)
    at = path_of(workdir, 16, SNAPSHOTS)
    with open(os.path.join(at, "meta", "metadata"), "a") as file:
        file.write(" ")
    with pytest.raises(JobError, match=r"snapshots/16: damaged .*remove it to go on without"):
        average.find_snapshots(workdir, 120)


def test_the_best_width_of_records(caplog):
    def record(width, loss, fid, **samples):
        protocol = {"weights": {"ema": "power", "width": width}} | ({"samples": samples} if samples else {})
        metrics, signs = (
            ({"fid": fid, "coverage": fid}, {"fid": -1, "coverage": 1}) if samples else ({"loss": loss}, {"loss": -1})
        )
        return {"step": 4, "protocol": protocol, "metrics": metrics, "metric_signs": signs}

    drawn = {"sampler": "ddim", "steps": 10, "guidance": 1.5}
    records = [record(w, 1 + (w - 0.1) ** 2, w, **s) for w in (0.05, 0.1, 0.15) for s in ({}, drawn)]
    raw = record(0.0, 0.1, 0.0)
    raw["protocol"]["weights"] = "params (raw)"
    found = {metric: (width, tried) for _, _, metric, width, _, tried in best_widths([*records, raw])}
    assert found == {"loss": (0.1, 3), "fid": (0.05, 3), "coverage": (0.15, 3)}
    for one in records:  # the end of an interval is no score of its own
        one["metrics"]["fid_low"], one["metric_signs"]["fid_low"] = 0.0, -1
    told: set[str] = set()
    tell_best(records, told)
    assert {line.split("best ")[1].split()[0] for line in told} == {"loss", "fid", "coverage"}
    caplog.clear()
    tell_best(records, told)
    assert not caplog.records
    tell_best([*records, record(0.2, 0.5, 1.0)], told)
    assert [one.message for one in caplog.records] == ["step 4, held-out images: best loss 0.5 at ema 0.2, of 4 widths"]
