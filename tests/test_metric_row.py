"""What a metric costs: one file, which is this one, and one row; `evaluate` measures and records it."""

import dataclasses
import shutil

import numpy as np
import pytest

from dit_jax import checkpoint
from dit_jax.config import MeshConfig
from dit_jax.devices.mesh import make_mesh
from dit_jax.evaluation.run import run
from dit_jax.metrics.metric import Metric
from dit_jax.metrics.table import METRICS
from dit_jax.sampling.draw import open_sampling
from dit_jax.workdir.folder import read_config


def add(state, batch, total):
    return [*(state or []), batch["images"].mean(axis=(1, 2, 3), dtype=np.float64)]


def finish(state, reference, settings):
    means = np.concatenate(state)
    return {"": means.mean(), "_std": means.std()}


LIGHT = Metric("light", ("images",), add, finish, higher_is_better=True, rules={"light": "mean of the pixels"})
SURE = Metric(
    "sure",
    ("logits",),
    update=lambda state, batch, total: max(state or -np.inf, float(batch["logits"].max())),
    finish=lambda state, reference, settings: {"": state},
    higher_is_better=True,
)
ELSEWHERE = Metric("of_inception", ("inception", "pool"), add, finish, higher_is_better=False)


def evaluated(folder, uninterrupted, cfg):
    shutil.copytree(uninterrupted, folder, ignore=shutil.ignore_patterns("eval"))
    (record,) = run(cfg, str(folder), [60], quiet=True)
    return record


def test_a_metric_from_outside_is_measured_and_recorded(uninterrupted, tmp_path, monkeypatch):
    cfg = read_config(str(uninterrupted))
    cfg = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, samples=70, loss=False, bootstrap=0))
    plain = evaluated(tmp_path / "plain", uninterrupted, cfg)
    for row in (LIGHT, SURE, ELSEWHERE):
        monkeypatch.setitem(METRICS, row.name, row)
    record = evaluated(tmp_path / "more", uninterrupted, cfg)

    new = {name: record["metrics"].pop(name) for name in ("light", "light_std", "sure_digits")}
    assert record["metrics"] == plain["metrics"]  # and none for another network
    assert {name: record["metric_signs"][name] for name in ("light", "sure_digits")} == {"light": 1, "sure_digits": 1}
    assert record["protocol"]["metrics"] == plain["protocol"]["metrics"] | {"light": "mean of the pixels"}
    assert record["protocol_id"] != plain["protocol_id"]

    _, params = checkpoint.load(str(uninterrupted), 60)
    drawn = open_sampling(cfg, make_mesh(MeshConfig())).images(params, cfg.eval.seed, 70)
    images = np.concatenate([batch for batch, _ in drawn])
    assert new["light"] == pytest.approx(images.mean(), rel=1e-12) and new["light_std"] > 0
