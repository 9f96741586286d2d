"""`train --init`: what a new run takes from other weights, that it resumes without them, and what is refused."""

import dataclasses
import functools
import json
import os
import shutil
from pathlib import Path

import bucket
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from job import TINY, run
from test_hosts import two
from test_seams import SMALL

from dit_jax import checkpoint
from dit_jax.bind import bind
from dit_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from dit_jax.data.pipeline import make_batches
from dit_jax.devices.mesh import make_mesh
from dit_jax.devices.numerics import random_key
from dit_jax.diffusion.objective import make_objective
from dit_jax.error import JobError, UsageError
from dit_jax.evaluation.protocol import make_record
from dit_jax.models.warm_start import NEW, RESIZED, TAKEN, WarmStart, check_body
from dit_jax.networks import transfer
from dit_jax.sampling.weights import weights_hash
from dit_jax.scaling.__main__ import main
from dit_jax.scaling.frontier.points import load_points
from dit_jax.scaling.runs import load_runs
from dit_jax.training import loop
from dit_jax.training.init import _rows, open_init
from dit_jax.training.state import abstract_state, make_state
from dit_jax.training.step import make_train_step
from dit_jax.workdir.folder import check_same_init, read_init
from dit_jax.workdir.records import append_record
from dit_jax.workdir.scalars import read_lines

pytestmark = pytest.mark.usefixtures("one_device")
MODEL = ModelConfig(depth=1, width=16, heads=2, patch=2, input_size=8, channels=1, classes=3, learn_sigma=False)
TABLE, KERNEL, OUTPUT = "label_embedding/table/embedding", "patch_embedding/kernel", "output/linear/kernel"


@functools.cache
def shapes_of(cfg):
    return jax.eval_shape(lambda: bind(cfg).init(random_key(0)))


def weights_of(cfg, seed=7):
    """Weights without the zeros that a model begins with."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(draw.normal(0, 0.3, leaf.shape), jnp.float32), shapes_of(cfg))


def warm(rows=(0, 1, 2), null_trained=True, old=MODEL, **changes):
    """(what `MODEL` with `changes` begins with, fresh weights, weights of the source, kind of each array), the first three flat."""
    new = dataclasses.replace(old, **changes)
    weights, fresh = weights_of(old), weights_of(new, 8)
    found = WarmStart(old, new, tuple(rows), null_trained)
    begun, kinds = jax.jit(found.begin)(fresh, weights), found.kinds(fresh, weights)
    flat = [flatten_dict(tree, sep="/") for tree in (begun, fresh, weights)]
    for name, kind in kinds.items():
        if kind != RESIZED:
            np.testing.assert_array_equal(flat[0][name], flat[2 if kind == TAKEN else 1][name])
    return *flat, kinds


def kind(kinds, *wanted):
    return {name for name, found in kinds.items() if found in wanted}


def test_the_same_model_takes_every_array_bit_for_bit():
    assert set(warm()[3].values()) == {TAKEN}
    assert set(warm(input_size=16)[3].values()) == {TAKEN}  # positions are computed


def test_classes_take_rows_by_name_or_number_and_the_null_row_stays():
    begun, fresh, old, kinds = warm(rows=(2, None, 0, None), classes=4)
    assert kind(kinds, RESIZED) == {TABLE} and kind(kinds, NEW) == set()
    expected = [old[TABLE][2], fresh[TABLE][1], old[TABLE][0], fresh[TABLE][3], old[TABLE][3]]
    np.testing.assert_array_equal(begun[TABLE], np.stack(expected))
    begun, _, old, _ = warm(rows=(0, 1), classes=2)
    np.testing.assert_array_equal(begun[TABLE], old[TABLE][np.array([0, 1, 3])])
    sides = [Config(dataclasses.replace(MODEL, classes=count)) for count in (3, 4)]
    for names in ((), ("a", "b", "c")):
        assert _rows(*sides, names, ()) == {"rows_by": "number", "rows": [0, 1, 2, None]}
    found = _rows(*sides, ("crane", "b", "crane"), ("b", "crane", "d", "crane"))
    assert found == {"rows_by": "name", "rows": [1, 0, None, 2]}


def output(model, weights, x, label=None):
    """The model's output for 2 images at two times."""
    cond = {} if label is None else {"label": jnp.array(label, jnp.int32)}
    return jax.jit(bind(model).apply)(weights, x, jnp.array([10.0, 900.0]), cond)


def test_without_classes_a_model_begins_as_the_null_class_did():
    old, new = MODEL, dataclasses.replace(MODEL, classes=0)
    weights, x = weights_of(old), jax.random.normal(random_key(1), (2, 8, 8, 1))
    begun, untrained = (
        WarmStart(old, new, (), trained).begin(weights_of(new, 8), weights) for trained in (True, False)
    )
    expected = output(old, weights, x, [3, 3])
    np.testing.assert_allclose(output(new, begun, x), expected, atol=1e-5)
    assert not np.allclose(output(new, untrained, x), expected, atol=1e-2)
    assert kind(warm(rows=(), old=new, classes=3)[3], NEW) == {TABLE}


@pytest.mark.parametrize("to", ["adaln", "in_context", "cross_attention"])
def test_another_conditioning_takes_what_has_the_same_name_and_shape(to):
    kinds = warm(conditioning=to)[3]
    assert kind(kinds, RESIZED) == set()
    assert {name.split("/")[1] for name in kind(kinds, NEW) if name.startswith("blocks")} == {
        "adaln": {"modulation"},
        "in_context": {"norm1", "norm2"},
        "cross_attention": {"norm1", "norm2", "cross_norm", "cross_attention"},
    }[to]
    assert {"blocks/attention/qkv/kernel", "blocks/mlp/fc1/kernel", TABLE, KERNEL, OUTPUT} <= kind(kinds, TAKEN)
    assert ("output/modulation/linear/kernel" in kind(kinds, TAKEN)) == (to == "adaln")
    assert kind(warm(qk_norm=True)[3], NEW) == {f"blocks/attention/{side}_norm/scale" for side in "qk"}


def test_channels_in_common_are_kept_and_so_is_eps_beside_a_new_variance():
    begun, fresh, old, kinds = warm(channels=3, learn_sigma=True)
    assert kind(kinds, RESIZED) == {KERNEL, OUTPUT, "output/linear/bias"} and kind(kinds, NEW) == set()
    new = begun[KERNEL].reshape(4, 3, 16)
    np.testing.assert_array_equal(new[:, :1], old[KERNEL].reshape(4, 1, 16))
    np.testing.assert_array_equal(new[:, 1:], fresh[KERNEL].reshape(4, 3, 16)[:, 1:])
    eps, rest = np.split(begun[OUTPUT].reshape(16, 4, 6), [1], axis=2)
    np.testing.assert_array_equal(eps, old[OUTPUT].reshape(16, 4, 1))
    np.testing.assert_array_equal(rest, fresh[OUTPUT].reshape(16, 4, 6)[:, :, 1:])
    both = dataclasses.replace(MODEL, learn_sigma=True, channels=2)
    begun, _, old, _ = warm(old=both, channels=1)  # fewer: of eps and of the variance
    np.testing.assert_array_equal(
        begun["output/linear/bias"].reshape(4, 2), old["output/linear/bias"].reshape(4, 4)[:, ::2]
    )


def test_patches_of_another_size_see_and_make_resized_images():
    """A model of 4 x 4 patches on an image whose 2 x 2 patches are doubled: the old output, doubled in the same way."""
    new = dataclasses.replace(MODEL, patch=4, input_size=16)
    weights = weights_of(MODEL)
    begun = WarmStart(MODEL, new, (0, 1, 2)).begin(weights_of(new, 8), weights)
    by = jnp.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]], jnp.float32)  # bilinear, with half-pixel centres

    def doubled(x):
        patches = x.reshape(2, 4, 2, 4, 2, 1)
        return jnp.einsum("yi,xj,bminjc->bmynxc", by, by, patches, precision="highest").reshape(2, 16, 16, 1)

    x = jax.random.normal(random_key(1), (2, 8, 8, 1))
    expected = doubled(output(MODEL, weights, x, [0, 3]))
    np.testing.assert_allclose(output(new, begun, doubled(x), [0, 3]), expected, atol=1e-4)


def test_learned_positions_are_resized():
    """A table that rises linearly along a side keeps doing so, between the first and the last patch's centre."""
    old = dataclasses.replace(MODEL, positions="learned", input_size=8, patch=2)
    new = dataclasses.replace(old, input_size=16)
    start, width = WarmStart(old, new, (0, 1, 2)), MODEL.width
    weights, fresh = weights_of(old), weights_of(new, 8)
    columns = jnp.broadcast_to(jnp.arange(4.0)[None, :, None], (4, 4, width))
    begun = start.begin(fresh, {**weights, "positions": columns.reshape(16, width)})["positions"].reshape(8, 8, width)
    np.testing.assert_allclose(begun[3, :, 0], [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3], atol=1e-6)
    np.testing.assert_allclose(begun, jnp.broadcast_to(begun[:1], begun.shape), atol=1e-6)
    assert start.kinds(fresh, weights)["positions"] == RESIZED


def test_smaller_patches_take_the_least_squares_embedding():
    old = dataclasses.replace(MODEL, patch=4)
    begun, _, weights, kinds = warm(old=old, patch=2)
    by = np.kron(*[np.array([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])] * 2)  # bilinear at the centres of the new pixels
    np.testing.assert_allclose(begun[KERNEL], np.linalg.lstsq(by.T, weights[KERNEL])[0], atol=1e-5)
    np.testing.assert_allclose(begun[OUTPUT], weights[OUTPUT] @ by.T, atol=1e-5)
    assert kind(kinds, RESIZED) == {KERNEL, OUTPUT, "output/linear/bias"}
    same = warm(
        old=dataclasses.replace(MODEL, channels=4), patch=4, channels=1
    )  # arrays of the same shape and another meaning
    assert same[0][KERNEL].shape == same[2][KERNEL].shape and KERNEL in kind(same[3], RESIZED)


@pytest.mark.parametrize("key, value", [("width", 32), ("depth", 2), ("heads", 4), ("mlp_ratio", 2)])
def test_other_blocks_are_refused_by_key(key, value):
    with pytest.raises(UsageError, match=rf"^model.{key}: found {value}, expected \d+, as the weights of runs/a have$"):
        check_body(MODEL, dataclasses.replace(MODEL, **{key: value}), "runs/a")


@pytest.fixture(scope="module")
def cfg(data_dir):
    return dataclasses.replace(SMALL, data=DataConfig(data_dir=data_dir))


@pytest.fixture(scope="module", autouse=True)
def one_program():
    """Runs of one config in this file share the program of their step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_train_step", functools.cache(make_train_step))
        yield


@pytest.fixture(scope="module")
def source(cfg, tmp_path_factory):
    """A run of 2 steps."""
    folder = tmp_path_factory.mktemp("source") / "first"
    loop.run(dataclasses.replace(cfg, train=TrainConfig(steps=2, batch_size=16)), str(folder), quiet=True)
    return str(folder)


@pytest.fixture(scope="module")
def begun(cfg, source, tmp_path_factory):
    """A run of 4 steps, with checkpoints of 2 and 4, that began with the weights of `source`. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("begun") / "second"
    loop.run(cfg, str(folder), quiet=True, init=(source, None))
    return str(folder)


def items(cfg, workdir, step):
    found, position = checkpoint.restore(workdir, step, abstract_state(cfg, make_mesh(cfg.mesh)).items(), cfg.model)
    return jax.device_get(found), position


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshConfig(), marks=pytest.mark.slow, id="data"),
        pytest.param(MeshConfig(data=2, fsdp=4), id="fsdp"),
    ],
)
def test_the_state_begins_with_the_source_s_ema_where_the_mesh_keeps_it(mesh, cfg, source, tmp_path):
    cfg = dataclasses.replace(cfg, mesh=mesh)
    placed = make_mesh(mesh)
    start = open_init(cfg, str(tmp_path / "new"), placed, (source, None), tuple)
    state = make_state(cfg, placed, start.begin, start.weights.pop())
    _, ema = checkpoint.load(source)
    assert_same(jax.device_get(state.params), jax.device_get(ema))
    assert_same(jax.device_get(state.ema), jax.device_get(ema))
    fresh, like = make_state(cfg, placed), abstract_state(cfg, placed)
    assert_same(
        jax.device_get((state.opt, state.guard, state.step)), jax.device_get((fresh.opt, fresh.guard, fresh.step))
    )
    assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), state, like))
    assert start.record["weights_sha256"] == weights_hash(ema) and not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_first_step_is_one_from_the_source_s_weights_and_the_first_images(cfg, source, begun):
    mesh = make_mesh(cfg.mesh, jax.devices()[:1])
    _, ema = checkpoint.load(source)
    ema = jax.device_get(ema)
    state = dataclasses.replace(make_state(cfg, mesh), params=ema, ema=jax.tree.map(np.copy, ema))
    batch = next(make_batches(cfg.data, batch_size=16, seed=0, process_index=0, process_count=1))
    _, scalars = make_train_step(cfg, mesh)(state, batch)
    first = read_lines(os.path.join(begun, "metrics.jsonl"))[0]
    assert first["step"] == 1 and first["loss"] == float(scalars["loss"])


def test_a_run_notes_what_it_began_with(cfg, source, begun):
    found = read_init(begun)
    cost = make_objective(cfg).flops() * 2 * 16
    assert {key: found[key] for key in ("source", "run", "step", "flops_train", "rows", RESIZED, NEW)} == {
        "source": source, "run": "first", "step": 2, "flops_train": cost, "rows": [*range(10)], RESIZED: [], NEW: [],
    }  # fmt: skip
    assert found["weights_sha256"] == weights_hash(checkpoint.load(source)[1]) and len(found[TAKEN]) == 21
    assert read_init(source) == {}


def test_it_resumes_with_the_same_bits_and_without_its_source(cfg, source, begun, tmp_path):
    halves, gone = str(tmp_path / "halves"), str(tmp_path / "gone")
    shutil.copytree(begun, halves)
    shutil.rmtree(checkpoint.path_of(halves, 4))
    record = json.loads((tmp_path / "halves/init.json").read_text())
    (tmp_path / "halves/init.json").write_text(json.dumps(record | {"source": gone}))
    assert loop.run(cfg, halves, quiet=True, init=(gone, None)) == 2
    assert_same(items(cfg, halves, 4), items(cfg, begun, 4))
    assert loop.run(cfg, halves, quiet=True, init=(gone, 2)) == 0  # a step that says the same


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_begins_again_with_the_same_weights(
    cfg, source, begun, tmp_path, monkeypatch
):
    copy, killed = str(tmp_path / "copy"), str(tmp_path / "killed")
    shutil.copytree(source, copy)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_train", lambda *_: (_ for _ in ()).throw(JobError("killed")))
        with pytest.raises(JobError, match="killed"):
            loop.run(cfg, killed, quiet=True, init=(copy, None))
    os.remove(os.path.join(killed, "config.json"))  # as by a kill between the two files
    shutil.rmtree(os.path.join(killed, "checkpoints"))
    checkpoint.write_weights(copy, 3, cfg.model, weights_of(cfg.model), {})  # the source has trained on
    assert checkpoint.steps(copy) == [2, 3]
    loop.run(cfg, killed, quiet=True, init=(copy, None))
    assert read_init(killed)["step"] == 2
    assert_same(items(cfg, killed, 4), items(cfg, begun, 4))
    shutil.rmtree(os.path.join(killed, "checkpoints"))
    other = read_init(killed) | {"weights_sha256": "0" * 64}
    (tmp_path / "killed/init.json").write_text(json.dumps(other))
    with pytest.raises(
        UsageError, match=r"step 2: found weights with the SHA-256 .*, expected 000.*, as when .*killed began"
    ):
        loop.run(cfg, killed, quiet=True, init=(copy, None))


def test_a_run_goes_on_only_as_it_began(cfg, source, begun, tmp_path):
    for workdir, init, message in (
        (begun, ("", None), f"{begun}: found no --init, expected --init={source}, as the run began from it"),
        (begun, (begun, None), f"{begun}: found --init={begun}, expected {source}, as the run began from it"),
        (begun, (source, 1), f"{begun}: found --init_step=1, expected 2, as the run began from it"),
        (source, (begun, None), f"{source}: found --init={begun}, expected none: the run in this folder began without"),
    ):
        with pytest.raises(UsageError) as error:
            loop.run(cfg, workdir, quiet=True, init=init)
        assert str(error.value) == f"{message}; or use another --workdir"
    wide = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, width=32))
    for config, init, message in (
        (wide, (source, None), f"model.width: found 32, expected 16, as the weights of {source} have"),
        (
            cfg,
            (str(tmp_path), None),
            f"--init: '{tmp_path}' holds no config.json, expected a run made by dit_jax.train",
        ),
        (cfg, (source, 3), f"--init: {source}: found no checkpoint of step 3, expected --init_step among [2]"),
    ):
        with pytest.raises(UsageError) as error:
            loop.run(config, str(tmp_path / "new"), quiet=True, init=init)
        assert str(error.value) == message
        assert not (tmp_path / "new").exists()
    shutil.copytree(begun, tmp_path / "damaged")
    (tmp_path / "damaged/init.json").write_text('{"source": 3}')
    with pytest.raises(UsageError, match=r"damaged/init.json: source: found 3, expected str; restore the file"):
        loop.run(cfg, str(tmp_path / "damaged"), quiet=True, init=(source, None))


def test_a_converted_model_is_a_source_and_its_compute_may_be_unknown(cfg, source, tmp_path, capsys):
    file, folder = str(tmp_path / "mine.safetensors"), str(tmp_path / "converted")
    transfer.export_dit(source, file)
    transfer.import_dit("dit", file, folder, step=0)
    flow = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, classes=4, patch=4))
    found = open_init(flow, str(tmp_path / "new"), make_mesh(cfg.mesh), (folder, None), lambda: ("3", "0", "ten", "9"))
    assert found.record["rows"] == [3, 0, None, 9] and found.record["flops_train"] is None
    assert found.record["weights_sha256"] == weights_hash(checkpoint.load(source)[1])
    assert found.record[RESIZED] == [TABLE, "output/linear/bias", OUTPUT, KERNEL] and found.record[NEW] == []
    said = capsys.readouterr().err
    assert "parameters in 17 arrays: blocks, output/modulation, patch_embedding/bias, time_embedding" in said
    assert "labels:  3 of 4 classes take a row of the source's 10, by name" in said
    assert "model.classes: 10 there, 4 here" in said and "model.patch: 2 there, 4 here" in said


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # connections of Google's client
def test_source_and_run_may_be_in_a_bucket(cfg, source, begun, tmp_path):
    with bucket.leading_here(page=50) as server:
        server.load(Path(source).parent)
        start = open_init(cfg, "gs://test/new", make_mesh(cfg.mesh), ("gs://test/first", 2), tuple, quiet=True)
        assert start.record == read_init(begun) | {"source": "gs://test/first", "rows_by": "number"}
        assert_same(start.weights[0], checkpoint.load(source)[1])
        loop.prepare_workdir(cfg, "gs://test/new", start.record)
        assert read_init("gs://test/new") == check_same_init("gs://test/new", "gs://test/first/", None) == start.record


def record_of(cfg, workdir, step=4):
    return make_record(cfg, workdir, step, "0" * 64, {"loss": 0.5, "fid": 3.0}, {"data": "digits"}, {"records": 9}, {})


def test_a_record_says_what_its_run_began_with_and_chains_add_up(cfg, source, begun, tmp_path):
    cost = make_objective(cfg).flops() * 16
    assert "init" not in record_of(cfg, source)
    record = record_of(cfg, begun)
    assert record["init"] == {"run": "first", "step": 2, "flops_train": 2 * cost} and record["flops_train"] == 4 * cost
    third = open_init(cfg, str(tmp_path / "third"), make_mesh(cfg.mesh), (begun, 4), tuple, quiet=True)
    assert third.record["flops_train"] == 6 * cost and third.record["run"] == "second"


def test_the_wing_says_that_compute_lies_elsewhere_and_mixes_no_such_runs(cfg, source, begun, tmp_path, capsys):
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, workdir in zip(folders, (begun, begun, source), strict=True):
        append_record(str(folder), record_of(cfg, workdir) | {"run": folder.name})
    runs = load_runs(folders[:2])
    assert [run.init["flops_train"] for run in runs] == [make_objective(cfg).flops() * 32] * 2
    said = capsys.readouterr().err
    assert said.count("notice") == 1 and "init: 2 of 2 runs began with other weights (first at step 2)" in said
    with pytest.raises(
        UsageError, match=r"c/eval/records.jsonl:1: init is \(absent\), but .*'first'.* in .*a/eval/records"
    ):
        load_runs(folders)
    assert load_runs(folders[2:])[0].init == {} and capsys.readouterr().err == ""
    assert [bool(point.init) for point in load_points(folders)] == [True, True, False]
    assert main(["metric", *map(str, folders)]) == 2 and "init is (absent)" in capsys.readouterr().err
    (folders[0] / "eval/records.jsonl").write_text(json.dumps(record_of(cfg, begun) | {"init": "first"}) + "\n")
    with pytest.raises(UsageError, match=r"a/eval/records.jsonl:1: init is 'first', expected an object with run, step"):
        load_runs(folders[:1])


def test_the_command_line(source, begun, tmp_path, cache_dir):
    new = ["--config=configs/digits.py", *TINY, f"--workdir={tmp_path / 'new'}"]
    same = ["--config.model.depth=1"]
    for more, code, said in (
        (["--init_step=2", "--check"], 2, "--init_step: found 2 without --init, expected both, or neither"),
        ([f"--init={source}", "--check"], 2, "model.depth: found 2, expected 1"),
        (["--init=/mnt/away/run", "--check"], 0, "--init=/mnt/away/run"),
        ([f"--init={source}", *same, "--config.train.steps=1"], 0, "taken:"),
    ):
        found, _, err = run("train", *new, *more, cache_dir=cache_dir)
        assert found == code and said in err, err
        assert (tmp_path / "new").exists() == ("taken:" in err)
    code, _, err = run(
        "train", *new, *same, "--config.train.steps=1", f"--init={begun}", "--check", cache_dir=cache_dir
    )
    assert code == 2 and f"found --init={begun}, expected {source}" in err


def test_hosts_that_read_other_weights_are_refused_by_all(source, begun, tmp_path, data_dir, cache_dir):
    """Though each finds what it was told to read."""
    new = ["--config=configs/digits.py", *TINY, "--config.model.depth=1", f"--workdir={tmp_path / 'new'}"]
    codes, said = two(cache_dir, [*new, f"--init={source}"], [*new, f"--init={begun}"])
    assert codes == [2, 2], said
    assert "--init: weights, SHA-256: found" in said[1] and "give every host the same weights" in said[1]
    assert not (tmp_path / "new").exists()
