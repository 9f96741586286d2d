"""benchmarks/safeguards.py on small sizes: every figure is measured, its parts fit together, and the tables say what was found."""

import dataclasses
import os

import pytest
import safeguards

from dit_jax.bench import measure
from dit_jax.config import Config, DataConfig, ModelConfig, TrainConfig

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cfg(data_dir):
    model = ModelConfig(depth=2, width=16, heads=2, patch=2, input_size=8, channels=1, classes=10, learn_sigma=False)
    data = DataConfig(data_dir=data_dir)
    return Config(model, data=data, train=TrainConfig(steps=12, batch_size=16, log_every=4, checkpoint_every=12))


@pytest.fixture(scope="module")
def store():
    with safeguards.latent_store(records=64) as folder:
        yield folder
    assert not os.path.exists(folder)


@pytest.fixture(scope="module")
def found(cfg, store):
    return {
        "machine": measure.machine(),
        "checkpoint": [safeguards.measure_checkpoint(cfg, 2, 2)],
        "replay": safeguards.measure_replay(cfg, 2, rounds=3),
        "data": {"digits": safeguards.measure_wait(cfg, 2)},
        "latents": safeguards.measure_latents(store, 2, batches=2, batch_size=32),
    }


def test_the_share_of_checksums_is_what_its_parts_give(found):
    (row,) = found["checkpoint"]
    assert row["bytes"] > 4 * 4 * row["parameters"]  # parameters, EMA and two moments in float32
    low = (row["write_ms"]["low"] + row["verify_ms"]["low"]) / (row["every"] * row["step_ms"]["high"])
    high = (row["write_ms"]["high"] + row["verify_ms"]["high"]) / (row["every"] * row["step_ms"]["low"])
    assert 0 < low <= row["share"]["median"] <= high


def test_replays_are_told_with_their_spread(found):
    added, (low, high) = found["replay"]["added_steps"], found["replay"]["quartiles"]
    assert added["low"] <= low <= added["median"] <= high <= added["high"]


def test_waits_are_shares_and_latents_are_counted(found):
    wait = found["data"]["digits"]
    assert 0 < wait["share"]["low"] <= wait["share"]["high"] < 1
    assert found["latents"]["latents_per_core_second"]["low"] > 0


def test_the_latents_of_the_benchmark_train(store, tmp_path):
    cfg = safeguards.latent_config(store)
    small = dataclasses.replace(cfg.model, depth=1, width=32, heads=2)
    cfg = dataclasses.replace(cfg, model=small, train=dataclasses.replace(cfg.train, steps=4, batch_size=8))
    assert 0 < safeguards.measure_wait(cfg, 1)["share"]["median"] < 1


def test_the_tables_show_what_was_found(found, capsys):
    safeguards.show(found)
    text = capsys.readouterr().out
    for part in ("checkpoint", "replay", "N = 100", "digits", "latents a second and core"):
        assert part in text
