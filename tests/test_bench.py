"""The benchmark in a tiny setting: its structure and its arithmetic, never its timings. Beside its peer: tests/parity/test_torch_dit.py."""

import contextlib
import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import host_share
import jax
import jax.numpy as jnp
import pytest
from job import ROOT, environment, run
from runs import train

from dit_jax import flops
from dit_jax.bench import measure, peer, speed, table
from dit_jax.config import Config, SampleConfig, TrainConfig, resolve
from dit_jax.devices.mesh import make_mesh
from dit_jax.error import UsageError
from dit_jax.files import out, write_file
from dit_jax.job.launch import load_config
from dit_jax.program import program
from dit_jax.sweep import ladder
from dit_jax.workdir.folder import read_config

SPREAD = {"median", "low", "high"}
CFG = resolve(load_config(str(Path(__file__).parent.parent / "configs" / "digits_isoflop.py")))
TINY = dataclasses.replace(CFG.model, width=8, depth=1, heads=2)


@pytest.fixture(scope="module")
def host(data_dir):
    step_flops = flops.train_flops(TINY, 32)
    return host_share.measure_host(ladder.make_cell(CFG, "", 40 * step_flops, (8, 1, 2)), repeats=1, steps=3)


@pytest.fixture(scope="module")
def sample():
    settings = SampleConfig(sampler="heun", steps=2, guidance=2.0, labels="balanced")
    return speed.measure(
        dataclasses.replace(CFG, model=TINY, sample=settings), "sample", repeats=1, seconds=0.0, size=64
    )


def ordered(spread):
    assert set(spread) == SPREAD
    return spread["low"] <= spread["median"] <= spread["high"]


def test_spread_is_median_and_range():
    assert measure.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}


def test_jobs_alternate_and_the_first_round_is_dropped():
    calls = []
    jobs = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    assert measure.alternate(jobs, 2) == {"a": [3, 5], "b": [4, 6]}
    assert "".join(calls) == "ababab"


def test_programs_are_counted_when_they_are_compiled_and_only_then():
    double, x = jax.jit(lambda x: 2 * x), jnp.ones(3)
    with measure.compilations() as names:
        double(x)
        double(x)
        assert len(names) == 1 and "lambda" in names[0]
        double(x[None])
        assert len(names) > 1
    count = len(names)
    double(x[None, None])
    assert len(names) == count


def test_the_default_model_is_that_of_the_device():
    cfg = speed.default_config("cpu")
    assert (cfg.model.width, cfg.model.tokens, cfg.train.batch_size) == (384, 64, 16)
    assert flops.train_flops(cfg.model, 16) == 3 * 2 * 16 * flops.forward_macs(cfg.model)
    large = speed.default_config("gpu")
    assert flops.parameters(large.model) == 674834720 and large.model.dtype == "bfloat16"
    assert (large.train.batch_size, large.sample.steps, large.sample.guidance) == (256, 250, 1.5)


def test_ladder_cells_are_runs_of_the_sweep():
    cells = host_share.ladder_cells(CFG, "")
    middle = CFG.sweep.budgets[len(CFG.sweep.budgets) // 2]
    assert len(cells) >= 3 and {cell.budget for cell in cells} == {middle}
    for cell in cells:
        model = cell.cfg.model
        assert (model.width, model.depth, model.heads) in CFG.sweep.sizes
    with pytest.raises(UsageError, match="budgets"):
        host_share.ladder_cells(Config(), "")


def check_figures(found, size):
    """The relations between a side's figures."""
    (side,) = found["sides"].values()
    assert side["name"] == "jax" and side["recompiles"] == 0 and found["ratio"] is None
    assert side["first_call_seconds"] > side["compile_seconds"] > 0
    assert side["memory_source"].startswith("memory_analysis")
    for name in ("step_ms", "images_per_second", "tflops", "mfu"):
        assert ordered(side[name]) and side[name]["low"] > 0
    for low, high in (("low", "high"), ("high", "low")):
        seconds = side["step_ms"][high] / 1e3
        assert side["images_per_second"][low] == pytest.approx(found["images"] / seconds)
        assert side["tflops"][low] == pytest.approx(found["flops"] / seconds / 1e12)
    assert side["mfu"]["high"] <= side["tflops"]["high"] / found["peak_tflops"]["low"] * (1 + 1e-9)
    assert f"{size}^3 float32 product" in found["peak_source"]


def test_the_training_step_is_measured(uninterrupted, tmp_path, cache_dir):
    """The whole job, with the config of a run whose program is in the compilation cache."""
    out, config = tmp_path / "bench.json", train(uninterrupted)
    flags = [*config[:1], *config[2:], "--parts=train", "--repeats=1", "--seconds=0", f"--json={out}"]
    code, said, err = run("bench", *flags, cache_dir=cache_dir)
    assert code == 0, err
    found = json.loads(out.read_text())
    assert set(found) == {"generator", "machine", "train"}
    assert found["machine"]["devices"] == 2 and found["machine"]["versions"]["jax"] == jax.__version__
    step, cfg = found["train"], read_config(str(uninterrupted))
    assert step["model"]["width"] == 16 and step["images"] == 16 and step["sampling"] is None
    assert step["flops"] == flops.train_flops(cfg.model, 16) and step["parameters"] == flops.parameters(cfg.model)
    check_figures(step, speed.MATRIX["cpu"])
    # at least weights, EMA and two moments, each device holding all of them
    assert step["sides"]["jax"]["memory_bytes"] >= 4 * 4 * step["parameters"]
    assert "recompilations" in said and "memory_analysis" in said and "target" not in said
    text = tables({"train": step | {"target": 0.3}})
    assert "target >= 30%" in text and text.count("met") + text.count("missed") == 1


@pytest.mark.slow
def test_sampling_is_measured(sample):
    assert sample["sampling"] == {"sampler": "heun", "steps": 2, "guidance": 2.0}
    assert sample["images"] == 16 * jax.device_count()
    assert sample["flops"] == sample["images"] * 2 * 3 * flops.forward_flops(TINY)  # three evaluations, all guided
    check_figures(sample, 64)
    assert "heun 2, guidance 2" in tables({"sample": sample})


def test_a_sampler_that_reuses_outputs_is_given_a_plan():
    """Not the zeros that prompts are given, with which no output would ever be computed."""
    cfg = dataclasses.replace(CFG, model=TINY, sample=SampleConfig(sampler="euler", steps=4, reuse=0.5))
    mesh = make_mesh(cfg.mesh)
    found = program(cfg, "sample", mesh)
    fresh = speed.make_arguments(cfg, "sample", mesh, found)[-1]
    assert all(rows.shape == (4, 1) and rows[0].all() and not rows.all() for rows in fresh.values())


@pytest.mark.slow
def test_host_measurement(host):
    assert (host["size"], host["steps"], host["batch_size"], host["target"]) == ([8, 1, 2], 40, 32, 0.2)
    names = {"wall", "device", "call", "data", "log", "checkpoint", "rest", "looped"}
    assert set(host["step_us"]) == names == set(host_share.STEP_PARTS) and all(map(ordered, host["step_us"].values()))
    assert host["step_us"]["wall"]["low"] > 0 and host["start_seconds"]["low"] > 0
    assert ordered(host["host_share"]) and host["host_share"]["low"] > 0
    assert ordered(host["not_device_share"]) and host["not_device_share"]["high"] <= 1
    text = tables({"host": [host]}, host_share.show)
    assert "target <= 20%" in text and text.count("met") + text.count("missed") == 1


def test_parts_of_a_step_sum_to_the_wall():
    found = {"step": [5.0], "call": [1.0], "looped": [3.0], "data": [0.5], "log": [0.2]}
    found["run"] = [{"start": 9.0, "loop": 6.0, "end": 10.0}]
    parts = host_share.step_parts(found, TrainConfig(steps=10, log_every=5, checkpoint_every=10))
    assert parts["device"] == [4.0] and parts["wall"] == [7.0]
    assert sum(parts[name][0] for name in ("device", *host_share.HOST, "rest")) == pytest.approx(7.0)
    assert parts["rest"] == [pytest.approx(7 - 4 - 1 - 0.5 - 0.08 - 1)]
    assert host_share.step_parts(found, TrainConfig(steps=10, log_every=5, checkpoint_every=4))["checkpoint"] == [3.0]


def tables(found, show=table.show):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        show(found)
    return out.getvalue()


BAD = {
    "part": (["--parts=train,speed"], "--parts: found speed, expected some of sample, train"),
    "no peer": (["--peer=nowhere.py"], "--peer: no file 'nowhere.py', expected one such as tests/peers/torch_dit.py"),
    "no folder": (["--json=/nowhere/b.json"], "--json: found '/nowhere/b.json', whose folder does not exist"),
    "seconds": (["--seconds=nan"], "--seconds: found nan, expected a finite number"),
    "no config": (["--config=configs/nope.py"], "--config: no file 'configs/nope.py'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_2_before_anything_is_measured(case, cache_dir):
    arguments, message = BAD[case]
    code, out, err = run("bench", *arguments, cache_dir=cache_dir)
    assert code == 2 and out == "" and message in err and len(err.strip().splitlines()) == 1, err


def test_a_report_goes_to_a_file_whole_or_not_at_all(tmp_path):
    inside = tmp_path / "report.json"
    out.check_json("")
    out.check_json(str(inside))
    for path in (tmp_path, f"{tmp_path / 'new'}/"):
        with pytest.raises(UsageError, match=r"--json: found the folder .* expected a file, such as .*report\.json'"):
            out.check_json(str(path))
    write_file(str(inside), "{}")
    with pytest.raises(UsageError, match=r"--json: found .*, where '.*/report.json' is no folder"):
        out.check_json(str(inside / "a.json"))
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError):
        write_file(str(tmp_path / "taken"), "{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "taken"]


def test_a_batch_that_the_devices_do_not_divide_is_refused(cache_dir):
    code, out, err = run("bench", "--parts=train", cache_dir=cache_dir, devices=3)
    assert (code, out) == (2, "") and err.startswith("error: train.batch_size: found 16, expected a multiple of 3"), err


def test_a_file_that_is_no_peer_is_refused(tmp_path):
    path = tmp_path / "other_dit.py"
    for text, message in [
        ("def check(:", "cannot be read: SyntaxError: invalid syntax"),
        ("1 / 0", "cannot be read: ZeroDivisionError"),
        ("def check(cfg, platform): ...", "has no make_trainer, make_sampler, expected the functions check, make_tr"),
    ]:
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            peer.load(str(path))


def test_a_peer_without_pytorch_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # wherever it is installed
    with pytest.raises(UsageError, match=r"torch_dit.py needs torch, which is not installed: `make parity` installs"):
        peer.load(str(ROOT / "tests" / "peers" / "torch_dit.py"))


@pytest.mark.slow
def test_speed_needs_no_data_libraries(tmp_path, cache_dir):
    """Machines with an accelerator may lack what reads data: the job runs where those cannot be imported."""
    lacking = ("tensorflow_datasets", "grain", "tensorboardX", "sklearn")
    code = f"import sys; sys.modules.update(dict.fromkeys({lacking}))\n"
    code += "import runpy; runpy.run_module('dit_jax.bench', run_name='__main__', alter_sys=True)"
    changes = ["depth=1", "width=16", "heads=2", "classes=10", "input_size=8", "channels=1", "patch=2"]
    flags = ["--config=configs/digits.py", *(f"--config.model.{change}" for change in changes), "--repeats=1"]
    flags += ["--seconds=0", f"--json={tmp_path / 'b.json'}", "--parts=train"]
    env = environment(cache_dir, devices=1)
    done = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "b.json").read_text())["train"]["sides"]["jax"]["recompiles"] == 0
