"""Sweeps with one run per size (sweep.curves), and cells that are scored by their samples (sweep.samples)."""

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import pytest
from job import run
from test_sweep import small

from dit_jax.config import resolve
from dit_jax.error import JobError, UsageError
from dit_jax.evaluation.protocol import loss_protocol
from dit_jax.scaling.runs import load_runs
from dit_jax.sweep import ladder
from dit_jax.workdir.records import protocol_id, read_records

BUDGETS, SIZES = (1.05e8, 2.1e8), ((4, 1, 1), (8, 2, 1), (12, 3, 1))


def config(sweep=None, **groups):
    """A ladder of three sizes at two budgets."""
    c = small()
    c.eval.update(samples=0, max_images=32, guidance=(1.0, 2.0), bootstrap=0)
    c.train.update(batch_size=16)
    c.sweep.update(budgets=BUDGETS, sizes=SIZES, windows=((0, 3), (0, 3)), extrapolate=0.0, **(sweep or {}))
    for group, changes in groups.items():
        c[group].update(changes)
    return resolve(c)


def records_of(cells):
    """(size, step) -> the record of the loss."""
    found = [(c.cfg.model.width, record) for c in cells for record in read_records(c.workdir).values()]
    return {(width, record["step"]): record for width, record in found if "loss" in record["metrics"]}


@pytest.fixture(scope="module")
def curves(tmp_path_factory, data_dir):
    """The ladder with one run per size, trained in this process."""
    workdir, cfg = tmp_path_factory.mktemp("curves"), config({"curves": True})
    ladder.prepare(cfg, str(workdir))
    cells = ladder.make_cells(cfg, str(workdir))
    for cell in cells:
        ladder.run_cell(cell)
    return cfg, workdir, cells


def test_a_size_is_trained_once_as_far_as_its_largest_budget(curves):
    _, _, cells = curves
    apart = ladder.make_cells(config(), "apart")
    assert sorted(cell.name for cell in cells) == ["w12-d3", "w4-d1", "w8-d2"]
    longest = {c.cfg.model.width: max(a.cfg.train.steps for a in apart if a.cfg.model == c.cfg.model) for c in cells}
    assert {cell.cfg.model.width: cell.cfg.train.steps for cell in cells} == longest
    assert sum(cell.budget for cell in cells) == 3 * BUDGETS[1]
    assert sum(cell.budget for cell in apart) == 3 * sum(BUDGETS)


def test_the_loss_at_a_budget_is_that_of_a_separate_run(curves, tmp_path):
    """Bit for bit, for all six pairs of size and budget: same weights, same loss, same FLOPs."""
    apart = ladder.make_cells(config(), str(tmp_path))
    for cell in apart:
        ladder.run_cell(cell)
    one, other = records_of(apart), records_of(curves[2])
    assert len(one) == 6 and one.keys() == other.keys()
    for at, record in one.items():
        for field in ("metrics", "weights_sha256", "flops_train", "images_seen", "protocol_id"):
            assert record[field] == other[at][field], at


def test_the_wing_reads_a_run_per_budget(curves):
    _, workdir, _ = curves
    found = load_runs([str(workdir / "cells")], curves=True)
    assert len(found) == 6 and len({run.name for run in found}) == 3
    assert len({run.protocol_id for run in found}) == 1


def planted(record):
    """The record with the loss of a law whose best size is within the ladder, because models so small tell none."""
    n, d = record["params_active"], record["tokens_seen"]
    best = 1100 * (record["flops_train"] / BUDGETS[0]) ** 0.5
    record["metrics"]["loss"] = 1 + 20 * d**-0.1 + 0.1 * math.log(n / best) ** 2
    return record


def test_a_sweep_concludes_and_goes_on_to_a_further_budget(curves, tmp_path, capsys):
    """Finished cells do not run again; with a budget more, each run goes on from its last step."""
    cfg, workdir, _ = curves
    workdir = str(shutil.copytree(workdir, tmp_path / "sweep"))
    for path in Path(workdir).rglob("records.jsonl"):
        path.write_text("".join(json.dumps(planted(json.loads(line))) + "\n" for line in path.read_text().splitlines()))
    assert ladder.run(cfg, workdir) == []
    said = capsys.readouterr()
    assert "3 of 3 cells are finished" in said.err and "Laws of compute" in said.out
    sweep = dataclasses.replace(cfg.sweep, budgets=(*BUDGETS, 3.15e8), windows=(*cfg.sweep.windows, (2, 3)))
    more = dataclasses.replace(cfg, sweep=sweep)
    identity = protocol_id(loss_protocol(more, ladder.prepare(more, workdir)))
    todo = [cell for cell in ladder.make_cells(more, workdir) if not ladder.finished(cell, identity)]
    assert [cell.name for cell in todo] == ["w12-d3"]
    scalars = Path(todo[0].workdir) / "metrics.jsonl"
    before = scalars.read_text()
    ladder.run_cell(todo[0])
    assert ladder.finished(todo[0], identity)
    assert scalars.read_text().startswith(before) and len(before) > 100
    steps = sorted(step for step, _ in read_records(todo[0].workdir))
    assert steps == list(todo[0].steps) and len(steps) == 3
    with pytest.raises(UsageError, match=r"holds another sweep: sweep.budgets is"):
        ladder.prepare(cfg, workdir)


def test_a_budget_that_a_run_has_passed_is_an_error(curves, tmp_path):
    cfg, workdir, _ = curves
    workdir = str(shutil.copytree(workdir, tmp_path / "sweep"))
    sweep = dataclasses.replace(cfg.sweep, budgets=(*BUDGETS, 1.6e8), windows=(*cfg.sweep.windows, (0, 1)))
    more = dataclasses.replace(cfg, sweep=sweep)
    (cell,) = [cell for cell in ladder.make_cells(more, workdir) if cell.name == "w4-d1"]
    with pytest.raises(JobError, match=rf"w4-d1: found no checkpoint of steps \[{cell.steps[1]}\], which the run has"):
        ladder.run_cell(cell)


@pytest.mark.parametrize("optim,message", [
    ({"schedule": "cosine"}, r"optim.schedule: found 'cosine', expected 'constant' with sweep.curves: else a run stopped"),
    ({"ema": "constant"}, r"optim.ema: found 'constant', expected 'power' with sweep.curves"),
])  # fmt: skip
def test_curves_are_refused_where_a_stopped_run_is_another(optim, message):
    config(optim=optim)
    with pytest.raises(UsageError, match=message):
        config({"curves": True}, optim=optim)


def test_two_sizes_of_one_name_are_refused(tmp_path):
    sweep = {"curves": True, "sizes": ((4, 1, 1), (8, 2, 1), (8, 2, 2))}
    c = small()
    c.sweep.update(budgets=(4e7, 8e7), windows=((0, 2), (2, 3)), **sweep)
    with pytest.raises(UsageError, match=r"found w8-d2 twice"):
        ladder.make_cells(resolve(c), str(tmp_path))


def test_cells_are_scored_by_samples_at_every_guidance(curves, tmp_path, cache_dir):
    """Asked for later, too: finished cells are not trained again, and `scaling metric` and `frontier` read the ladder's folder."""
    _, workdir, _ = curves
    workdir = str(shutil.copytree(workdir, tmp_path / "sweep"))
    scored = config({"curves": True, "samples": 70})
    identity = protocol_id(loss_protocol(scored, ladder.prepare(scored, workdir)))
    for cell in ladder.make_cells(scored, workdir):
        assert not ladder.finished(cell, identity)
        trained = os.stat(os.path.join(cell.workdir, "metrics.jsonl")).st_mtime_ns
        assert "loss" in ladder.run_cell(cell)["metrics"]
        assert ladder.finished(cell, identity)
        assert os.stat(os.path.join(cell.workdir, "metrics.jsonl")).st_mtime_ns == trained
        records = read_records(cell.workdir)
        drawn = [r for r in records.values() if "samples" in r["protocol"]]
        assert len(records) == 3 * len(cell.steps) and len(drawn) == 2 * len(cell.steps)
        assert all(r["protocol"]["samples"]["num"] == 70 and "fd_digits" in r["metrics"] for r in drawn)
    for job in (("metric", "--each"), ("frontier",)):
        out = tmp_path / f"{job[0]}.json"
        code, _, said = run("scaling", *job, workdir, "--metric=fd_digits", f"--json={out}", cache_dir=cache_dir)
        assert code == 0, said
        assert json.loads(out.read_text())


def test_too_few_samples_are_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(UsageError, match=r"sweep.samples: found 10, expected more than the 64 features"):
        ladder.prepare(config({"samples": 10}), str(tmp_path / "sweep"))
    assert not (tmp_path / "sweep").exists()
