"""The sweep: a small ladder end to end, a cell that fails, a worker that dies, and a second run that finds all done."""

import dataclasses
import json
import os
import time

import pytest
from job import die, start

from dit_jax import flops
from dit_jax.config import SweepConfig, resolve
from dit_jax.config import template as config_template
from dit_jax.error import UsageError
from dit_jax.job.workers import run_cells
from dit_jax.scaling.runs import load_runs
from dit_jax.sweep import ladder


def ladder_config(**changes):
    c = small()
    c.eval.update(samples=0)
    c.sweep.update(changes)
    return resolve(c)


def small():
    """The config of a ladder of ten small models."""
    c = config_template()
    c.model.update(patch=2, input_size=8, channels=1, classes=10, learn_sigma=False)
    c.diffusion.process = "flow"
    c.optim.update(learning_rate=6e-3, warmup_steps=20, clip=1.0, ema="power", ema_width=0.1)
    c.train.update(batch_size=32)
    c.sample.update(sampler="euler", steps=4, labels="balanced", batch_size=40)
    c.sweep.update(
        budgets=(3e8, 6e8, 1.2e9),
        sizes=((4, 1, 1), (8, 2, 1), (12, 3, 1), (16, 4, 1)),
        windows=((0, 3), (0, 3), (0, 4)),
        width_power=0.5,
        extrapolate=3.0,
        processes=2,
        grid=2,
    )
    c.eval.update(times_per_image=8, samples=100, max_images=64)
    return c


def test_cells_spend_their_budget_with_one_aspect_ratio(tmp_path):
    cells = ladder.make_cells(ladder_config(budgets=(1.5e9, 3e9, 6e9)), str(tmp_path))
    assert len(cells) == 10
    for cell in cells:
        model, train = cell.cfg.model, cell.cfg.train
        spent = flops.train_flops(model, train.batch_size * train.steps)
        assert spent == pytest.approx(cell.budget, rel=0.01)
        assert model.width / model.depth == 4
        assert cell.cfg.optim.learning_rate == pytest.approx(6e-3 * (64 / model.width) ** 0.5)
    assert [cell.weight for cell in cells] == sorted((cell.weight for cell in cells), reverse=True)


def few():
    """The same with two budgets: seven cells, the largest width once."""
    c = small()
    c.sweep.update(budgets=(2e8, 6e8), windows=((0, 3), (0, 4)))
    return c


@pytest.fixture(scope="module")
def swept(tmp_path_factory, data_dir, cache_dir):
    """The ladder, run as a user does it on one device, with one cell whose folder belongs to somebody else."""
    workdir = tmp_path_factory.mktemp("sweep") / "demo"
    cfg = resolve(few())
    ladder.prepare(cfg, str(workdir))
    foreign = next(c for c in ladder.make_cells(cfg, str(workdir)) if c.cfg.model.width == 16)
    os.makedirs(foreign.workdir)
    (workdir / "compiled").symlink_to(cache_dir)  # the sweep's own cache: here what all tests compiled
    with open(os.path.join(foreign.workdir, "thesis.txt"), "w") as f:
        f.write("mine")
    config = workdir.parent / "ladder.py"
    config.write_text(
        f"import sys\nsys.path.append({os.path.dirname(__file__)!r})\nfrom test_sweep import few\nget_config = few\n"
    )
    process = start("sweep", f"--config={config}", f"--workdir={workdir}", cache_dir=cache_dir, devices=1)
    _, said = process.communicate()
    assert process.returncode == 1, said
    return cfg, workdir, said


def test_a_failed_cell_costs_the_others_nothing(swept):
    cfg, workdir, said = swept
    (failed,) = [cell for cell in ladder.make_cells(cfg, str(workdir)) if cell.cfg.model.width == 16]
    assert f"error: 1 cell(s) failed: {failed.name}; the same command tries them again" in said
    assert os.listdir(failed.workdir) == ["thesis.txt"]
    runs = load_runs([str(workdir)])
    assert len(runs) == 6
    for run in runs:
        assert 0 < run.loss < 3 and run.loss_se > 0


def test_the_loop_is_closed(swept):
    """The law recommended a model beyond the ladder; it was trained, measured, drawn and reported."""
    _cfg, workdir, _ = swept
    (name,) = os.listdir(workdir / "extrapolation")
    lines = (workdir / "extrapolation" / name / "eval" / "records.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert records[0]["flops_train"] == pytest.approx(3.6e9, rel=0.02)
    assert {key for r in records for key in r["metrics"]} >= {"loss", "fd_digits"}
    report = (workdir / "report.html").read_text()
    for part in ("IsoFLOP", "Predicted against measured", "data:image/png;base64", "fd_digits of 100 samples"):
        assert part in report
    assert "http:" not in report and "https:" not in report
    assert (workdir / "extrapolation" / name / "samples" / "grid-euler4-guidance2-2.png").stat().st_size > 1000


def test_a_second_run_finds_everything_done(swept, capsys):
    cfg, workdir, _ = swept
    before = {p: p.read_bytes() for p in workdir.rglob("records.jsonl")}
    metrics = {p: p.stat().st_mtime_ns for p in workdir.rglob("metrics.jsonl")}
    start = time.monotonic()
    failed = ladder.run(cfg, str(workdir))
    assert len(failed) == 1 and time.monotonic() - start < 60
    assert before == {p: p.read_bytes() for p in workdir.rglob("records.jsonl")}
    assert metrics == {p: p.stat().st_mtime_ns for p in workdir.rglob("metrics.jsonl")}
    said = capsys.readouterr()
    assert "6 of 7 cells are finished" in said.err
    assert "Laws of compute" in said.out and str(workdir / "report.html") in said.out


def test_another_sweep_for_a_folder_is_refused(swept):
    cfg, workdir, _ = swept
    other = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, batch_size=64))
    with pytest.raises(UsageError, match=r"holds another sweep: train.batch_size is 32 there, 64 in the command"):
        ladder.run(other, str(workdir))


def test_a_dying_worker_loses_its_own_cell_only(tmp_path):
    cells = ["ends", "dies", "waits"]
    outcomes = {cell: outcome for cell, outcome in run_cells(cells, 2, str(tmp_path), die) if cell}
    assert "its process died" in str(outcomes.pop("dies"))
    assert outcomes == {"ends": "ends", "waits": "waits"}


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"windows": ((0, 3),)}, "sweep.windows: found 1, expected one per budget, so 3"),
        (
            {"windows": ((0, 3), (0, 3), (0, 9))},
            r"sweep.windows: found \(0, 9\), expected \(first, end\) within 4 sizes",
        ),
        ({"processes": 0}, "sweep.processes: found 0, expected at least 1"),
    ],
)
def test_bad_ladders(changes, message):
    with pytest.raises(UsageError, match=message):
        ladder_config(**changes)


def test_no_budgets_and_too_small_budgets(tmp_path):
    with pytest.raises(UsageError, match=r"sweep.budgets: found none"):
        ladder.make_cells(dataclasses.replace(ladder_config(), sweep=SweepConfig()), str(tmp_path))
    with pytest.raises(UsageError, match=r"C3.00e08-w8-d2 twice"):
        ladder.make_cells(ladder_config(sizes=((4, 1, 1), (8, 2, 1), (8, 2, 2), (16, 4, 1))), str(tmp_path))
    with pytest.raises(UsageError, match="less than one step of the model of width 4"):
        ladder.make_cells(ladder_config(budgets=(1e3, 3e9, 6e9)), str(tmp_path))
