"""Evaluation while a run trains: the record that `evaluate` would make, of weights that are not copied, and training's own bits."""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest
from job import run
from runs import saved, scalars
from test_hosts import train_on

from dit_jax import checkpoint
from dit_jax import train as job
from dit_jax.bind import bind_to_draw
from dit_jax.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    SampleConfig,
    TrainConfig,
    to_dict,
)
from dit_jax.devices.mesh import make_mesh, state_sharding
from dit_jax.error import Interrupted, UsageError
from dit_jax.evaluation import loss
from dit_jax.evaluation.in_run import make_scores
from dit_jax.evaluation.run import run as evaluate
from dit_jax.sampling import draw
from dit_jax.training import loop
from dit_jax.training.state import abstract_state
from dit_jax.workdir.goodput import Ledger, note, totals
from dit_jax.workdir.records import read_records
from dit_jax.workdir.scalars import read_lines

MODEL = ModelConfig(depth=1, width=16, heads=2, input_size=8, channels=1, classes=10, learn_sigma=False)
CFG = Config(
    model=MODEL,
    diffusion=DiffusionConfig(process="flow"),
    data=DataConfig(),
    train=TrainConfig(steps=8, batch_size=16, log_every=1, checkpoint_every=8, evaluate_every=4),
    sample=SampleConfig(sampler="euler", steps=2),
    eval=EvalConfig(max_images=20, fixed_times=8, samples=70, bootstrap=0),
)
LAYOUTS = {"data 1": (1, 1, 1), "data 2": (2, 1, 1), "data 8": (8, 1, 1), "fsdp 4": (1, 4, 1), "tensor 2": (1, 1, 2)}


def mesh_of(layout):
    axes = LAYOUTS[layout]
    return make_mesh(MeshConfig(*axes), jax.devices()[: np.prod(axes)])


def state_on(mesh, cfg=CFG):
    """Weights with random bits that make finite numbers, as a training state has them."""
    draw = np.random.default_rng(0)

    def fill(leaf):
        return jax.device_put(draw.normal(0, 0.1, leaf.shape).astype(leaf.dtype), leaf.sharding)

    return types.SimpleNamespace(ema=jax.tree.map(fill, abstract_state(cfg, mesh).ema), params=None)


def score_on(mesh, workdir, state, stop=(), cfg=CFG, **options):
    return make_scores(cfg, str(workdir), mesh, {"records": 1442}, list(stop), Ledger("train", 0.0), quiet=True)(
        4, state, **options
    )


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, data_dir):
    """What `evaluate` records of a checkpoint of these weights, on 8 devices."""
    workdir = str(tmp_path_factory.mktemp("inrun") / "run")
    saver, state = checkpoint.Saver(workdir, 1), state_on(mesh_of("data 1"))
    items = {"params": state.ema, "ema": state.ema, "opt": {"none": np.zeros(1)}}
    position = {"next_index": 0, "source": {"records": 1442}}
    saver.save(4, items, position, {"model": to_dict(MODEL)})
    saver.close()
    return {record["protocol_id"]: record for record in evaluate(CFG, workdir, quiet=True)}


SLOW = [pytest.param(layout, marks=pytest.mark.slow) for layout in ("data 1", "data 2", "tensor 2")]


@pytest.mark.parametrize("layout", ["data 8", "fsdp 4", *SLOW])
def test_its_record_is_that_of_evaluate_bit_for_bit(layout, evaluated, tmp_path):
    mesh = mesh_of(layout)
    values = score_on(mesh, tmp_path / "run", state_on(mesh))
    found = {identity: record for (_, identity), record in read_records(str(tmp_path / "run")).items()}
    assert set(found) == set(evaluated) and len(found) == 3
    for identity, record in found.items():
        expected, metrics = evaluated[identity], record["metrics"]
        assert {f"eval/{name}": value for name, value in metrics.items()}.items() <= values.items()
        timings = ("goodput", "seconds_sample")
        one, other = ({k: v for k, v in r.items() if k not in timings} for r in (record, expected))
        assert one == other


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_scored_where_they_lie(layout):
    """Their places are those that the programs of loss and sampler ask for, so that nothing is moved or copied."""
    mesh = mesh_of(layout)
    wanted, there = bind_to_draw(MODEL, mesh)[1], abstract_state(CFG, mesh).ema
    assert jax.tree.map(lambda leaf: leaf.sharding, there) == wanted == state_sharding(mesh, there)


def held():
    """Bytes of all buffers on the devices; arrays may share them."""
    shards = [shard.data for array in jax.live_arrays() for shard in array.addressable_shards]
    return sum({shard.unsafe_buffer_pointer(): shard.nbytes for shard in shards}.values())


def test_what_is_scored_is_the_state_itself(data_dir, tmp_path, monkeypatch):
    """By the held-out losses and by a FID. While their programs run, less than a tenth of the weights' bytes lies beside it on the
    devices, so no second copy."""
    model = dataclasses.replace(MODEL, depth=2, width=64)  # beside which images and the network of features are small
    cfg, mesh, seen, peak = dataclasses.replace(CFG, model=model), mesh_of("fsdp 4"), [], []

    def spied(make):
        def made(*settings):
            program = make(*settings)

            def called(params, *rest):
                found = program(params, *rest)
                seen.append((make.__name__, params))
                peak.append(held())
                return found

            return called

        return made

    for module, name in ((loss, "make_losses"), (draw, "make_sampler")):
        monkeypatch.setattr(module, name, spied(getattr(module, name)))
    state = state_on(mesh, cfg)
    score = make_scores(cfg, str(tmp_path), mesh, {"records": 1442}, [], Ledger("train", 0.0), quiet=True)
    before = held()
    score(4, state)
    assert {name for name, _ in seen} == {"make_losses", "make_sampler"}
    assert all(params is state.ema for _, params in seen)
    assert max(peak) - before < sum(leaf.nbytes for leaf in jax.tree.leaves(state.ema)) / 10


def test_what_is_recorded_is_not_measured_again(evaluated, tmp_path, monkeypatch):
    """A state that comes by again gives its scalars to the curves; a restored one has them there."""
    mesh = mesh_of("data 8")
    state, workdir = state_on(mesh), tmp_path / "run"
    values = score_on(mesh, workdir, state)
    kept = read_records(str(workdir))
    monkeypatch.setattr(loss, "make_losses", None)
    assert score_on(mesh, workdir, state) == values and score_on(mesh, workdir, state, restored=True) == {}
    assert read_records(str(workdir)) == kept


def test_a_model_that_is_not_finite_is_a_warning(evaluated, tmp_path, capsys):
    mesh = mesh_of("data 8")
    broken = types.SimpleNamespace(ema=jax.tree.map(lambda leaf: leaf * np.nan, state_on(mesh).ema), params=None)
    assert score_on(mesh, tmp_path / "run", broken) == {}
    said = capsys.readouterr().err
    assert said.count("it is not recorded, and the training goes on") == 3
    assert "warning: step 4, ema: held-out loss: found values that are not finite" in said
    assert read_records(str(tmp_path / "run")) == {}


def test_a_stop_gives_it_up(evaluated, tmp_path):
    mesh = mesh_of("data 8")
    assert score_on(mesh, tmp_path / "run", state_on(mesh), stop=[15]) == {}
    assert read_records(str(tmp_path / "run")) == {}


def test_a_record_has_the_time_of_its_training_so_far_once(tmp_path):
    ledger = Ledger("train", 0.0)
    ledger.seconds |= {"step": 5.0}
    note(ledger, str(tmp_path))
    ledger.seconds |= {"step": 7.0, "evaluation": 2.0}
    assert {k: v for k, v in totals(str(tmp_path), ledger.entry()).items() if k in ("step", "evaluation")} == {
        "step": 7.0,
        "evaluation": 2.0,
    }
    assert totals(str(tmp_path), Ledger("evaluate", 0.0).entry())["step"] == 5.0


def scoring(calls, stop_at=None):
    """Stands for `make_scores`: notes the calls, and is told to stop at a step."""

    def make(cfg, workdir, mesh, data, stop, ledger, quiet):
        def score(step, state, restored=False):
            calls.append((step, restored, data["records"]))
            if step == stop_at:
                stop.append(15)
                return {}
            return {"eval/loss": float(step)}

        return score

    return make


def test_the_loop_scores_every_so_many_steps_and_the_last(data_dir, tmp_path, monkeypatch):
    """A stop meanwhile saves that very step, which the same command scores when it goes on. The training is the same, bit for bit."""
    monkeypatch.setattr(loop, "make_train_step", functools.cache(loop.make_train_step))  # four runs, two programs
    cfg = dataclasses.replace(CFG, train=dataclasses.replace(CFG.train, steps=6))
    plain = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, evaluate_every=0))
    assert loop.run(plain, str(tmp_path / "plain"), quiet=True) == 6
    calls, workdir = [], str(tmp_path / "run")
    with pytest.raises(Interrupted, match="saved step 4 of 6"):
        loop.run(cfg, workdir, quiet=True, scoring=scoring(calls, stop_at=4))
    assert checkpoint.steps(workdir) == [4]
    with pytest.raises(Interrupted, match="saved step 4 of 6"):
        loop.run(cfg, workdir, quiet=True, scoring=scoring(calls, stop_at=4))
    assert loop.run(cfg, workdir, quiet=True, scoring=scoring(calls)) == 2
    assert calls == [(4, False, 1442), (4, True, 1442), (4, True, 1442), (6, False, 1442)]
    one, other = saved(tmp_path / "plain", 6), saved(workdir, 6)
    for name in ("params", "ema", "opt"):
        jax.tree.map(np.testing.assert_array_equal, one[name], other[name])
    lines = scalars(workdir)
    assert [line for line in lines if "grad_norm" in line] == scalars(tmp_path / "plain")
    assert [line for line in lines if "eval/loss" in line] == [
        {"step": 4, "eval/loss": 4.0},
        {"step": 6, "eval/loss": 6.0},
    ]
    assert all("time" in line for line in read_lines(f"{workdir}/metrics.jsonl"))


def test_check_refuses_what_evaluation_would(monkeypatch):
    monkeypatch.setattr(job, "_init", lambda: ("", None))  # of flags, which are the command's
    monkeypatch.setattr(job, "_is_here", lambda: False)
    asked = EvalConfig(samples=3000, features="inception")
    cfg = dataclasses.replace(CFG, eval=asked, train=dataclasses.replace(CFG.train, evaluate_every=0))
    job.check(cfg, None)
    with pytest.raises(UsageError, match=r"eval\.inception: empty, expected the folder of the Inception network"):
        job.check(dataclasses.replace(CFG, eval=asked), None)
    with pytest.raises(
        UsageError, match=r"train\.evaluate_every: found 4, expected 0 for a training without `scoring`"
    ):
        loop.run(CFG, "never", quiet=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_score_as_one_evaluates(data_dir, cache_dir, tmp_path):
    """One record for each step and protocol, by process 0; what `evaluate` finds of the same checkpoint is the same, bit for bit."""
    asked = ["--config.eval.samples=150", "--config.eval.fixed_times=8"]
    train_on(2, tmp_path / "run", cache_dir, *asked, "--config.train.evaluate_every=20")
    found = read_records(str(tmp_path / "run"))
    assert sorted(step for step, _ in found) == [20] * 3 + [30] * 3
    (tmp_path / "other").mkdir()
    for name in ("config.json", "checkpoints"):
        (tmp_path / "other" / name).symlink_to(tmp_path / "run" / name)
    code, _, err = run("evaluate", f"--workdir={tmp_path / 'other'}", "--at=20,30", *asked, cache_dir=cache_dir)
    assert code == 0, err
    for at, record in read_records(str(tmp_path / "other")).items():
        for name in ("metrics", "weights_sha256", "unique_images", "metric_signs", "flops_train"):
            assert record.get(name) == found[at].get(name), (at, name)
