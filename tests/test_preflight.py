"""Facts about preflight: what it says of a slice that is not there, and (marked `tpu`) what libtpu says of the shipped config."""

import json

import pytest
from job import run

from dit_jax import flops, preflight
from dit_jax.config import Config, MeshConfig, ModelConfig, TrainConfig, model_config
from dit_jax.mesh import abstract_mesh

XL = "--config=configs/imagenet256.py:DiT-XL/2"
DIGITS = "--config=configs/digits.py"


def ask(tmp_path, cache_dir, *arguments):
    """(report, standard error) of a preflight that exits 0."""
    out = tmp_path / "report.json"
    code, _, err = run("preflight", *arguments, f"--json={out}", cache_dir=cache_dir)
    assert code == 0, err
    return json.loads(out.read_text()), err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([XL, "--topology=v3-250"], "topology: found 'v3-250', expected a slice such as v3-256"),
        ([XL, "--topology=v3-256", "--config.mesh.fsdp=3"], "expected axes that multiply to 256 devices"),
        ([XL, "--topology=v3-256", "--config.train.batch_size=250"], "found 250, expected a multiple of 256"),
        ([XL, "--topology=v4-256", "--config.mesh.tensor=8"], "expected a divisor of the 4 devices of one host"),
        (
            [XL, "--topology=v3-8", "--json=nowhere/a.json"],
            "--json: found 'nowhere/a.json', whose folder does not exist",
        ),
        ([XL], "topology"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, message, cache_dir):
    code, out, err = run("preflight", *arguments, cache_dir=cache_dir)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ") and message in err


def test_the_real_step_is_compiled_for_virtual_devices(tmp_path, cache_dir):
    found, _ = ask(tmp_path, cache_dir, DIGITS, "--topology=cpux8", "--config.mesh.fsdp=2", "--config.model.depth=3")
    assert (found["mesh"], found["devices"]) == ({"data": 4, "fsdp": 2, "tensor": 1}, 8)
    assert found["fits"] and found["bytes"]["donated"] == found["bytes"]["state"] > 0
    assert found["bytes"]["temporaries"] > 0 and found["compile_seconds"] > 0
    assert found["collectives"]["all-gather"]["count"] > 3 and "all-to-all" not in found["collectives"]
    model = ModelConfig(depth=3, width=64, heads=4, patch=2, input_size=8, channels=1, classes=10, learn_sigma=False)
    assert found["flops_step"] == flops.train_flops(model, 64) and found["parameters"] == flops.parameters(model)
    assert found["estimated_step_seconds"] is None  # the CPU's compiler gives none


def test_gpus_get_what_needs_no_compiler(tmp_path, cache_dir):
    found, _ = ask(tmp_path, cache_dir, XL, "--topology=h100x8", "--config.mesh.fsdp=8")
    cfg = model_config("DiT-XL/2")
    assert found["message"].startswith("not compiled: ") and found["fits"] is None
    assert found["bytes"]["memory"] == 80e9
    state = 16 * flops.parameters(cfg) / 8  # float32 weights, EMA and two moments, over 8 devices; vectors are whole
    assert state <= found["bytes"]["state"] <= 1.02 * state
    assert found["flops_step"] == flops.train_flops(cfg, 256)


def test_hours_and_price_follow_from_the_step():
    report = {"estimated_step_seconds": 0.05, "collective_seconds": 0.01, "job": "train", "chips": 128}
    costs = preflight.run_costs(report, 7_000_000, 2.0)
    assert costs["hours"] == pytest.approx([7e6 * 0.05 / 3600, 7e6 * 0.06 / 3600])
    assert costs["chip_hours"] == pytest.approx([128 * h for h in costs["hours"]])
    assert costs["price"] == pytest.approx([2 * h for h in costs["chip_hours"]])
    assert preflight.run_costs(report, 10, None)["price"] is None


def test_candidates_are_configs_that_train():
    cfg = Config(model=model_config("DiT-XL/2"), train=TrainConfig(batch_size=512), mesh=MeshConfig(data=-1, fsdp=2))
    found = preflight.candidates(cfg, 8)
    assert found[0] == {"model.remat": "dots"} and {"mesh.data": 1, "mesh.fsdp": 8} in found
    assert max(change.get("optim.accumulate", 1) for change in found) == 64
    for change in found:
        other = preflight.changed(cfg, change)
        mesh = abstract_mesh(other.mesh, 8)
        assert other.train.batch_size % (mesh.shape["data"] * mesh.shape["fsdp"] * other.optim.accumulate) == 0
    full = Config(model=model_config("DiT-S/8", remat="full"), train=TrainConfig(batch_size=8), mesh=MeshConfig(1, 8))
    assert preflight.candidates(full, 8) == []
