"""The sweep: a small ladder with one run per size (sweep.curves) end to end, a cell that fails, a worker that dies, and a second
run that finds all done. And one run per size and budget, and cells that are scored by their samples (sweep.samples).
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import pytest
from job import die, run

from dit_jax import flops
from dit_jax.config import SweepConfig, resolve
from dit_jax.config import template as config_template
from dit_jax.diffusion.objective import make_objective
from dit_jax.error import JobError, UsageError
from dit_jax.job.launch import load_config
from dit_jax.job.workers import run_cells
from dit_jax.scaling.runs import load_runs
from dit_jax.sweep import ladder
from dit_jax.workdir.folder import read_init
from dit_jax.workdir.records import read_records

BUDGETS = (2e8, 6e8)


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
    """The same with two budgets and one run per size: four cells, the largest width for one budget only."""
    c = small()
    c.eval.update(guidance=(1.0, 2.0), bootstrap=0)
    c.sweep.update(budgets=BUDGETS, windows=((0, 3), (0, 4)), curves=True)
    return c


def file(folder, config):
    """The flag of a config file that is a function of this module."""
    path = folder / f"{config.__name__}.py"
    here = os.path.dirname(__file__)
    paths = [here, os.path.dirname(here)]
    path.write_text(f"import sys\nsys.path += {paths!r}\nfrom test_sweep import {config.__name__} as get_config\n")
    return f"--config={path}"


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
    code, _, said = run("sweep", file(workdir.parent, few), f"--workdir={workdir}", cache_dir=cache_dir, devices=1)
    assert code == 1, said
    return cfg, workdir, said


@pytest.mark.parametrize(
    ("unroll", "depths", "expected"), [(4, [2, 5], [2, 5]), (2, [2, 6], [2, 2]), (1, [2, 5], [1, 1])]
)
def test_all_layers_of_every_size_are_unrolled_if_those_of_the_config_are(unroll, depths, expected):
    cfg = resolve(load_config("configs/scenes.py"))
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, unroll=unroll))
    cells = [ladder.make_cell(cfg, "", 1e13, (16, depth, 2)) for depth in depths]
    assert cfg.model.depth == 4 and [cell.cfg.model.unroll for cell in cells] == expected


def test_a_failed_cell_costs_the_others_nothing(swept):
    cfg, workdir, said = swept
    (failed,) = [cell for cell in ladder.make_cells(cfg, str(workdir)) if cell.cfg.model.width == 16]
    assert f"error: 1 cell(s) failed: {failed.name}; the same command tries them again" in said
    assert os.listdir(failed.workdir) == ["thesis.txt"]
    runs = load_runs([str(workdir / "cells")], curves=True)
    assert len(runs) == 6 and len({run.name for run in runs}) == 3
    for found in runs:
        assert 0 < found.loss < 3 and found.loss_se > 0


def test_the_loop_is_closed(swept):
    """The law recommended a model beyond the ladder; it was trained, measured, drawn and reported."""
    _cfg, workdir, _ = swept
    (name,) = os.listdir(workdir / "extrapolation")
    lines = (workdir / "extrapolation" / name / "eval" / "records.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert records[0]["flops_train"] == pytest.approx(1.8e9, rel=0.02)
    assert {key for r in records for key in r["metrics"]} >= {"loss", "fd_digits"}
    report = (workdir / "report.html").read_text()
    for part in ("IsoFLOP", "Predicted against measured", "data:image/png;base64", "fd_digits of 100 samples"):
        assert part in report
    assert "http:" not in report and "https:" not in report
    assert (workdir / "extrapolation" / name / "samples" / "grid-euler4-guidance2-2.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_second_run_finds_everything_done(swept, capsys):
    cfg, workdir, _ = swept
    before = {p: p.read_bytes() for p in workdir.rglob("records.jsonl")}
    metrics = {p: p.stat().st_mtime_ns for p in workdir.rglob("metrics.jsonl")}
    assert len(ladder.run(cfg, str(workdir))) == 1
    assert before == {p: p.read_bytes() for p in workdir.rglob("records.jsonl")}
    assert metrics == {p: p.stat().st_mtime_ns for p in workdir.rglob("metrics.jsonl")}
    said = capsys.readouterr()
    assert "3 of 4 cells are finished" in said.err
    assert "Laws of compute" in said.out and str(workdir / "report.html") in said.out


def test_another_sweep_for_a_folder_is_refused(swept):
    cfg, workdir, _ = swept
    other = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, batch_size=64))
    with pytest.raises(UsageError, match=r"holds another sweep: train.batch_size is 32 there, 64 in the command"):
        ladder.run(other, str(workdir))


@pytest.mark.slow
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


def by_curves(curves=True, **changes):
    """The ladder's first three sizes alone."""
    c = few()
    c.sweep.update(windows=((0, 3), (0, 3)), extrapolate=0.0, curves=curves)
    c.sweep.update(changes)
    return c


def records_of(cells):
    """(size, step) -> the record of the loss."""
    found = [(c.cfg.model.width, record) for c in cells for record in read_records(c.workdir).values()]
    return {(width, record["step"]): record for width, record in found if "loss" in record["metrics"]}


def train_cell(name, workdir, folder, cache_dir, *more):
    """One cell alone, on one device, as the cells of `swept` are."""
    flags = [file(folder, by_curves), f"--workdir={workdir}", f"--cell={name}", *more]
    code, _, said = run("sweep", *flags, cache_dir=cache_dir, devices=1)
    assert code == 0, said


@pytest.fixture(scope="module")
def curves(swept, tmp_path_factory, cache_dir):
    """The ladder without what failed and what lies beyond it, as a sweep of its own."""
    cfg, workdir = resolve(by_curves()), tmp_path_factory.mktemp("curves") / "sweep"
    ladder.prepare(cfg, str(workdir))
    shutil.copytree(swept[1] / "cells", workdir / "cells", ignore=shutil.ignore_patterns("w16-d4"))
    (workdir / "compiled").symlink_to(cache_dir)
    return cfg, workdir, ladder.make_cells(cfg, str(workdir))


def test_a_size_is_trained_once_as_far_as_its_largest_budget(curves):
    _, _, cells = curves
    apart = ladder.make_cells(resolve(by_curves(curves=False)), "apart")
    assert sorted(cell.name for cell in cells) == ["w12-d3", "w4-d1", "w8-d2"]
    longest = {c.cfg.model.width: max(a.cfg.train.steps for a in apart if a.cfg.model == c.cfg.model) for c in cells}
    assert {cell.cfg.model.width: cell.cfg.train.steps for cell in cells} == longest
    assert sum(cell.budget for cell in cells) == 3 * BUDGETS[1]
    assert sum(cell.budget for cell in apart) == 3 * sum(BUDGETS)


@pytest.mark.slow
@pytest.mark.parametrize("names", [("C2.00e08-w12-d3",), pytest.param(None, marks=pytest.mark.slow)])
def test_the_loss_at_a_budget_is_that_of_a_separate_run(names, curves, tmp_path, cache_dir):
    """Bit for bit: same weights, same loss, same FLOPs. One pair of size and budget; all six in the slow case."""
    cfg, workdir = resolve(by_curves(curves=False)), tmp_path / "apart"
    ladder.prepare(cfg, str(workdir))
    (workdir / "compiled").symlink_to(cache_dir)
    cells = [cell for cell in ladder.make_cells(cfg, str(workdir)) if names is None or cell.name in names]
    for cell in cells:
        train_cell(cell.name, workdir, tmp_path, cache_dir, "--config.sweep.curves=False")
    one, other = records_of(cells), records_of(curves[2])
    assert len(one) == len(names or range(6)) and one.keys() <= other.keys() and len(other) == 6
    for at, record in one.items():
        for field in ("metrics", "weights_sha256", "flops_train", "images_seen", "protocol_id"):
            assert record[field] == other[at][field], at


def test_the_wing_reads_a_run_per_budget(curves):
    _, workdir, _ = curves
    found = load_runs([str(workdir / "cells")], curves=True)
    assert len(found) == 6 and len({run.name for run in found}) == 3
    assert len({run.protocol_id for run in found}) == 1


@pytest.mark.parametrize("config", ["configs/digits_sr.py", "configs/digits_few.py:consistency"])
def test_super_resolution_and_students_begin_from_a_cell(config, curves, tmp_path, cache_dir):
    """By --init=LADDER/cells/CELL and the size of the cell: docs/superres.md, docs/few_steps.md."""
    cell = next(cell for cell in curves[2] if cell.name == "w8-d2")
    path, model = curves[1] / "cells" / cell.name, cell.cfg.model
    assert os.path.samefile(path, cell.workdir)
    size = [f"--config.model.{key}={getattr(model, key)}" for key in ("depth", "width", "heads")]
    more = [f"--init={path}", "--config.train.steps=1", "--config.train.batch_size=16"]
    workdir = tmp_path / "new"
    code, _, err = run("train", f"--config={config}", f"--workdir={workdir}", *size, *more, cache_dir=cache_dir)
    assert code == 0, err
    begun, trained = read_init(str(workdir)), cell.cfg.train
    assert (begun["run"], begun["step"]) == (cell.name, trained.steps)
    assert begun["flops_train"] == flops.train_flops(model, trained.batch_size * trained.steps)


def planted(record):
    """The record with the loss of a law whose best size is within the ladder, because models so small tell none."""
    n, d = record["params_active"], record["tokens_seen"]
    best = 1100 * (record["flops_train"] / BUDGETS[0]) ** 0.5
    record["metrics"]["loss"] = 1 + 20 * d**-0.1 + 0.1 * math.log(n / best) ** 2
    return record


def test_a_sweep_concludes_and_goes_on_to_a_further_budget(curves, tmp_path, cache_dir, capsys, monkeypatch):
    """Finished cells do not run again; with a budget more, each run goes on from its last step. The page is looked at above."""
    monkeypatch.setattr(ladder.report, "save", lambda path, page: path)
    cfg, workdir, _ = curves
    workdir = str(shutil.copytree(workdir, tmp_path / "sweep", symlinks=True))
    for path in Path(workdir).rglob("records.jsonl"):
        path.write_text("".join(json.dumps(planted(json.loads(line))) + "\n" for line in path.read_text().splitlines()))
    before = {p: p.read_bytes() for name in ("records.jsonl", "metrics.jsonl") for p in Path(workdir).rglob(name)}
    assert ladder.run(cfg, workdir) == []
    assert len(before) == 6 and all(p.read_bytes() == found for p, found in before.items())
    said = capsys.readouterr()
    assert "3 of 3 cells are finished" in said.err and "Laws of compute" in said.out
    further = {"budgets": (*BUDGETS, 9e8), "windows": ((0, 3), (0, 3), (2, 3))}
    more = resolve(by_curves(**further))
    protocols = ladder.targets_of(more, ladder.prepare(more, workdir))
    todo = [cell for cell in ladder.make_cells(more, workdir) if not ladder.finished(cell, protocols)]
    assert [cell.name for cell in todo] == ["w12-d3"]
    scalars = Path(todo[0].workdir) / "metrics.jsonl"
    before = scalars.read_text()
    flags = [f"--config.sweep.{key}={value}" for key, value in further.items()]
    train_cell("w12-d3", workdir, tmp_path, cache_dir, *flags)
    assert ladder.finished(todo[0], protocols)
    assert scalars.read_text().startswith(before) and len(before) > 100
    steps = sorted(step for step, _ in read_records(todo[0].workdir))
    assert steps == list(todo[0].steps) and len(steps) == 3
    with pytest.raises(UsageError, match=r"holds another sweep: sweep.budgets is"):
        ladder.prepare(cfg, workdir)


def test_a_budget_that_a_run_has_passed_is_an_error(curves, tmp_path):
    cfg, workdir, _ = curves
    workdir = str(shutil.copytree(workdir, tmp_path / "sweep", symlinks=True))
    sweep = dataclasses.replace(cfg.sweep, budgets=(*BUDGETS, 4e8), windows=(*cfg.sweep.windows, (0, 1)))
    more = dataclasses.replace(cfg, sweep=sweep)
    (cell,) = [cell for cell in ladder.make_cells(more, workdir) if cell.name == "w4-d1"]
    with pytest.raises(JobError, match=rf"w4-d1: found no checkpoint of steps \[{cell.steps[1]}\], which the run has"):
        ladder.run_cell(cell)


@pytest.mark.parametrize("optim,message", [
    ({"schedule": "cosine"}, r"optim.schedule: found 'cosine', expected 'constant' with sweep.curves: else a run stopped"),
    ({"ema": "constant"}, r"optim.ema: found 'constant', expected 'power' with sweep.curves"),
])  # fmt: skip
def test_curves_are_refused_where_a_stopped_run_is_another(optim, message):
    for curves in (False, True):
        c = by_curves(curves=curves)
        c.optim.update(optim)
        with pytest.raises(UsageError, match=message) if curves else contextlib.nullcontext():
            resolve(c)


def test_two_sizes_of_one_name_are_refused(tmp_path):
    sweep = {"curves": True, "sizes": ((4, 1, 1), (8, 2, 1), (8, 2, 2))}
    c = small()
    c.sweep.update(budgets=(4e7, 8e7), windows=((0, 2), (2, 3)), **sweep)
    with pytest.raises(UsageError, match=r"found w8-d2 twice"):
        ladder.make_cells(resolve(c), str(tmp_path))


def as_scored(loss, drawn):
    """The record of the loss with the metrics and the protocol of samples."""
    return loss | {key: drawn[key] for key in ("metrics", "metric_signs", "protocol", "protocol_id", "flops_sample")}


def test_cells_are_scored_by_samples_at_every_guidance(curves, tmp_path, cache_dir):
    """Asked for later, at other guidances: a finished cell is not trained again. `scaling metric` and `frontier` read the ladder's folder.

    The smallest cell is scored; the others get the scores of its last step.
    """
    _, workdir, _ = curves
    workdir = str(shutil.copytree(workdir, tmp_path / "sweep", symlinks=True))
    scored = resolve(by_curves(samples=70))
    scored = dataclasses.replace(scored, eval=dataclasses.replace(scored.eval, guidance=(1.0, 3.0)))
    protocols = ladder.targets_of(scored, ladder.prepare(scored, workdir))
    cells = sorted(ladder.make_cells(scored, workdir), key=lambda cell: cell.cfg.model.width)
    assert not any(ladder.finished(cell, protocols) for cell in cells)
    trained = os.stat(os.path.join(cells[0].workdir, "metrics.jsonl")).st_mtime_ns
    assert "loss" in ladder.run_cell(cells[0])["metrics"]
    assert ladder.finished(cells[0], protocols) and not ladder.finished(cells[1], protocols)
    assert os.stat(os.path.join(cells[0].workdir, "metrics.jsonl")).st_mtime_ns == trained
    records = read_records(cells[0].workdir)
    drawn = {at: r for at, r in records.items() if "samples" in r["protocol"]}
    assert len(records) == 3 * len(cells[0].steps) and len(drawn) == 2 * len(cells[0].steps)
    assert {r["protocol"]["samples"]["guidance"] for r in drawn.values()} == {1.0, 3.0}
    assert all(r["protocol"]["samples"]["num"] == 70 and "fd_digits" in r["metrics"] for r in drawn.values())
    last = [record for (step, _), record in drawn.items() if step == cells[0].steps[-1]]
    for cell in cells[1:]:
        path = Path(cell.workdir) / "eval" / "records.jsonl"
        losses = [json.loads(line) for line in path.read_text().splitlines()]
        more = [as_scored(loss, record) for loss in losses for record in last]
        path.write_text("".join(json.dumps(record) + "\n" for record in [*losses, *more]))
        assert ladder.finished(cell, protocols)
    more = dataclasses.replace(scored, eval=dataclasses.replace(scored.eval, vlb=True))
    assert len(ladder.targets_of(more, ladder.prepare(scored, workdir))) == 2
    assert not ladder.finished(cells[0], ladder.targets_of(more, ladder.prepare(scored, workdir)))
    for job in (("metric", "--each"), ("frontier",)):
        out = tmp_path / f"{job[0]}.json"
        code, _, said = run("scaling", *job, workdir, "--metric=fd_digits", f"--json={out}", cache_dir=cache_dir)
        assert code == 0, said
        assert json.loads(out.read_text())


def test_too_few_samples_are_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(UsageError, match=r"sweep.samples: found 10, expected more than the 64 features"):
        ladder.prepare(resolve(by_curves(samples=10)), str(tmp_path / "sweep"))
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("kind", ["in_context", pytest.param("cross_attention", marks=pytest.mark.slow)])
def test_cells_of_captions_are_evaluated_with_them(kind, tmp_path):
    """Sizes share the held-out captions, and each cell has the loss of its captions at every step that is asked."""
    c = load_config(f"configs/scenes_isoflop.py:{kind}")
    c.sweep.update(budgets=(2e9, 4e9), sizes=((8, 1, 1), (12, 1, 1)), windows=((0, 2), (0, 2)), samples=0)
    c.eval.update(max_images=32, samples=0, vlb=False, likelihood=False)
    cells = ladder.make_cells(resolve(c), str(tmp_path))
    shared = {id(ladder.shared_by(cell.cfg)) for cell in cells}
    (_, (images, cond)) = ladder.shared_by(cells[0].cfg).held_out
    assert len(cells) == 2 and len(shared) == 1 and cond["text"].shape == (32, 17) and len(images) == 32
    cell = dataclasses.replace(cells[1], cfg=dataclasses.replace(cells[1].cfg, train=steps_of(cells[1], (1, 2))))
    record = ladder.run_cell(cell)
    assert record["step"] == 2 and record["task"] == "text" and record["metrics"]["loss"] > 0


def steps_of(cell, steps):
    """The training of a cell that evaluates these steps."""
    return dataclasses.replace(cell.cfg.train, keep_at=steps, steps=steps[-1])


def test_a_ladder_of_flow_maps_counts_their_tangents(tmp_path):
    """The steps of a budget are those whose FLOPs a record has."""
    plain = maps = ladder_config()
    maps = dataclasses.replace(
        maps,
        model=dataclasses.replace(maps.model, target="later"),
        objective=dataclasses.replace(maps.objective, name="mean_flow"),
    )
    found, fewer = (ladder.make_cell(cfg, str(tmp_path), 1.2e9, (16, 4, 1)).cfg for cfg in (plain, maps))
    assert fewer.train.steps < found.train.steps
    step = make_objective(fewer).flops() * fewer.train.batch_size
    assert step * fewer.train.steps == pytest.approx(1.2e9, abs=step / 2)
    with pytest.raises(
        UsageError, match=r"objective.name: found 'consistency', expected '' or 'mean_flow' with sweep.budgets"
    ):
        dataclasses.replace(plain, objective=dataclasses.replace(maps.objective, name="consistency", guidance=2.0))
