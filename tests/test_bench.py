"""The benchmark in a tiny setting: its structure and its arithmetic, never its timings."""

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console

from dit_jax import bench, flops, sweep
from dit_jax.command import load_config
from dit_jax.config import Config, SampleConfig, TrainConfig, UsageError, resolve

SPREAD = {"median", "low", "high"}


def ladder():
    """The config of configs/digits_isoflop.py."""
    return resolve(load_config(str(Path(__file__).parent.parent / "configs" / "digits_isoflop.py")))


CFG = ladder()
STEP_FLOPS = flops.train_flops(dataclasses.replace(CFG.model, width=8, depth=1, heads=2), 32)


@pytest.fixture(scope="module")
def step():
    cfg = bench.step_config(8)
    model = dataclasses.replace(cfg.model, width=16, depth=1, heads=2, input_size=8)
    return bench.measure_step(dataclasses.replace(cfg, model=model), repeats=2, size=64)


@pytest.fixture(scope="module")
def host(data_dir):
    return bench.measure_host(sweep.make_cell(CFG, "", 40 * STEP_FLOPS, (8, 1, 2)), repeats=1, steps=3)


@pytest.fixture(scope="module")
def sample():
    settings = SampleConfig(sampler="heun", steps=2, guidance=2.0, labels="balanced", batch_size=8)
    model = dataclasses.replace(CFG.model, width=8, depth=1, heads=2)
    return bench.measure_sample(dataclasses.replace(CFG, model=model, sample=settings), repeats=2)


def ordered(spread):
    assert set(spread) == SPREAD
    return spread["low"] <= spread["median"] <= spread["high"]


def test_spread_is_median_and_range():
    assert bench.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}


def test_jobs_alternate_and_the_first_round_is_dropped():
    calls = []
    jobs = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    assert bench.alternate(jobs, 2) == {"a": [3, 5], "b": [4, 6]}
    assert "".join(calls) == "ababab"


def test_step_shape_is_width_384():
    cfg = bench.step_config(16)
    assert (cfg.model.width, cfg.model.tokens, cfg.train.batch_size) == (384, 64, 16)
    assert flops.train_flops(cfg.model, 16) == 3 * 2 * 16 * flops.forward_macs(cfg.model)


def test_ladder_cells_are_runs_of_the_sweep():
    cells = bench.ladder_cells(CFG, "")
    middle = CFG.sweep.budgets[len(CFG.sweep.budgets) // 2]
    assert len(cells) >= 3 and {cell.budget for cell in cells} == {middle}
    for cell in cells:
        model = cell.cfg.model
        assert (model.width, model.depth, model.heads) in CFG.sweep.sizes
    with pytest.raises(UsageError, match="budgets"):
        bench.ladder_cells(Config(), "")


@pytest.mark.slow
def test_step_measurement(step):
    assert step["model"]["width"] == 16 and step["batch_size"] == 8 and step["target"] == 0.3
    assert set(step["matrix_gflops"]) == {"xla", "blas"}
    for spread in (*step["matrix_gflops"].values(), *(step[k] for k in ("step_ms", "images_per_second", "share"))):
        assert ordered(spread) and spread["low"] > 0


@pytest.mark.slow
def test_host_measurement(host):
    assert (host["size"], host["steps"], host["batch_size"], host["target"]) == ([8, 1, 2], 40, 32, 0.2)
    names = {"wall", "device", "call", "data", "log", "checkpoint", "rest", "looped"}
    assert set(host["step_us"]) == names and all(map(ordered, host["step_us"].values()))
    assert host["step_us"]["wall"]["low"] > 0 and host["start_seconds"]["low"] > 0
    assert ordered(host["host_share"]) and host["host_share"]["low"] > 0
    assert ordered(host["not_device_share"]) and host["not_device_share"]["high"] <= 1


def test_parts_of_a_step_sum_to_the_wall():
    found = {"step": [5.0], "call": [1.0], "looped": [3.0], "data": [0.5], "log": [0.2]}
    found["run"] = [{"start": 9.0, "loop": 6.0, "end": 10.0}]
    parts = bench.step_parts(found, TrainConfig(steps=10, log_every=5, checkpoint_every=10))
    assert parts["device"] == [4.0] and parts["wall"] == [7.0]
    assert sum(parts[name][0] for name in ("device", *bench.HOST, "rest")) == pytest.approx(7.0)
    assert parts["rest"] == [pytest.approx(7 - 4 - 1 - 0.5 - 0.08 - 1)]
    assert bench.step_parts(found, TrainConfig(steps=10, log_every=5, checkpoint_every=4))["checkpoint"] == [3.0]


@pytest.mark.slow
def test_sample_measurement(sample):
    assert (sample["sampler"], sample["steps"], sample["batch_size"]) == ("heun", 2, 8)
    assert ordered(sample["image_ms"]) and ordered(sample["model_gflops"])


def table(found):
    out = io.StringIO()
    bench.show({"machine": bench.machine(), "host": [], **found}, Console(file=out, width=140))
    return out.getvalue()


@pytest.mark.slow
def test_tables_show_targets_and_medians(step, sample):
    text = table({"step": step, "sample": sample})
    assert "target >= 30%" in text and "heun 2, guidance 2" in text
    assert text.count("met") + text.count("missed") == 1


@pytest.mark.slow
def test_the_table_of_the_host_shows_its_target(step, host, sample):
    text = table({"step": step, "host": [host], "sample": sample})
    assert "target <= 20%" in text and text.count("met") + text.count("missed") == 2
