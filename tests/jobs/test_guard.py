"""Bad numbers and flipped bits: the state stays as it was, bit for bit, and the run says what happened."""

import dataclasses
import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from job import run
from runs import scalars, train

from dit_jax import checkpoint
from dit_jax.bind import bind
from dit_jax.config import MeshConfig, TrainConfig
from dit_jax.devices.mesh import make_mesh, replicated
from dit_jax.error import JobError
from dit_jax.training import guard, step
from dit_jax.training.diagnose import find_layer
from dit_jax.training.save import save_state
from dit_jax.training.state import make_state
from dit_jax.workdir.folder import read_config

WINDOW = 5


@pytest.fixture(scope="module")
def cfg(uninterrupted):
    found = read_config(str(uninterrupted))
    settings = dataclasses.replace(found.train, spike=6.0, spike_window=WINDOW, replay_every=2)
    return dataclasses.replace(found, mesh=MeshConfig(), train=settings)


@pytest.fixture(scope="module")
def mesh(cfg):
    return make_mesh(cfg.mesh, jax.devices()[:1])


@pytest.fixture(scope="module")
def compiled(cfg, mesh):
    return step.make_train_step(cfg, mesh)


def batch(number=0, scale=1.0):
    rng = np.random.default_rng(number)
    images = (scale * rng.uniform(-1, 1, (16, 8, 8, 1))).astype(np.float32)
    return {"image": images, "cond": {"label": rng.integers(10, size=16, dtype=np.int32)}}


def kept(state):
    return jax.device_get((state.params, state.ema, state.opt))


@pytest.fixture(scope="module")
def tenth(cfg, mesh, compiled):
    """A state after ten good steps, with its shardings."""
    state = make_state(cfg, mesh)
    for i in range(10):
        state, _ = compiled(state, batch(i))
    return jax.device_get(state), jax.tree.map(lambda leaf: leaf.sharding, state)


@pytest.fixture
def seen(tenth):
    """Its own copy for each test: a step gives up the memory of the state that it is called with."""
    return jax.device_put(*tenth)


def poisoned(kind):
    bad = batch(99, scale=1e4 if kind == "spike" else 1.0)
    if kind != "spike":
        bad["image"][3, 2, 1] = {"nan": np.nan, "inf": np.inf}[kind]
    return bad


@pytest.mark.parametrize("kind", ["nan", "inf", "spike"])
def test_a_bad_batch_leaves_the_state_bit_identical_and_is_counted(kind, seen, compiled):
    before, good = kept(seen), jax.device_get(seen.guard)
    state, values = compiled(seen, poisoned(kind))
    jax.tree.map(np.testing.assert_array_equal, before, kept(state))
    assert int(state.step) == 11 and int(state.guard.skipped) == int(state.guard.streak) == int(values["skipped"]) == 1
    widened = np.asarray(state.guard.variance) > good.variance
    assert widened.any() == (kind == "spike") and int(state.guard.count) == 10 + (kind == "spike")
    state, _ = compiled(state, batch(11))
    assert int(state.guard.streak) == 0 and int(state.guard.skipped) == 1
    assert guard.all_finite(state)
    with pytest.raises(AssertionError):
        jax.tree.map(np.testing.assert_array_equal, before, kept(state))


def test_a_good_run_skips_nothing(uninterrupted):
    assert {line["skipped"] for line in scalars(uninterrupted)} == {0.0}


def test_a_spike_is_judged_by_the_rolling_mean_and_deviation():
    """Against a plain loop over NumPy numbers."""
    cfg, rng = TrainConfig(spike=3.0, spike_window=8), np.random.default_rng(0)
    losses = rng.normal(1.0, 0.1, 60)
    losses[[3, 30, 45]] = 9.0
    state, mean, variance, refused = guard.init_guard(), 0.0, 0.0, []
    judge = jax.jit(lambda state, loss: guard.judge(cfg, state, loss, jnp.float32(1), jnp.float32(1)))
    for i, loss in enumerate(losses):
        accepted, state = judge(state, jnp.float32(loss))
        expected = i < 8 or loss <= mean + 3.0 * np.sqrt(variance)
        assert bool(accepted) == expected, i
        if not expected:
            refused.append(i)
            loss = mean + 3.0 * np.sqrt(variance)
        rate = 1 / min(i + 1, 8)
        delta = loss - mean
        mean, variance = mean + rate * delta, (1 - rate) * (variance + rate * delta**2)
    assert 3 not in refused and {30, 45} <= set(refused) and len(refused) < 10
    assert float(state.mean[0]) == pytest.approx(mean, rel=1e-4)
    assert float(state.variance[0]) == pytest.approx(variance, rel=1e-3)


@pytest.mark.parametrize("growth, stops", [(1.0, False), (3.0, True)])
def test_a_loss_that_moved_for_good_is_accepted_and_one_that_runs_away_is_not(growth, stops):
    """With the defaults: the loss stays at 0.4, then is 4 for ever, or three times as much at every step."""
    cfg, rng, state = TrainConfig(), np.random.default_rng(0), guard.init_guard()
    judge = jax.jit(lambda state, loss: guard.judge(cfg, state, loss, loss, jnp.float32(1)))
    for loss in rng.normal(0.4, 0.01, 500):
        accepted, state = judge(state, jnp.float32(loss))
        assert accepted
    streaks = []
    for k in range(30):
        accepted, state = judge(state, jnp.float32(4.0 * growth**k))
        streaks.append(int(state.streak))
    assert streaks[0] == 1 and (max(streaks) >= cfg.skips_in_a_row) == stops
    if not stops:
        assert streaks[-1] == 0 and int(state.skipped) <= 5


@pytest.mark.parametrize(
    "path,layer,clause",
    [
        (("blocks", "attention", "qkv", "kernel"), 1, "the first output that is not finite is that of blocks[1]/attention/qkv"),
        pytest.param(("blocks", "mlp", "fc2", "bias"), 0,
                     "the first output that is not finite is that of blocks[0]/mlp/fc2", marks=pytest.mark.slow),
        pytest.param(("patch_embedding", "bias"), None,
                     "the first output that is not finite is that of patch_embedding", marks=pytest.mark.slow),
        (("output", "linear", "kernel"), None, "the first output that is not finite is that of output"),
    ],
)  # fmt: skip
def test_the_layer_that_turns_bad_is_named(path, layer, clause, seen, cfg, compiled):
    """A weight that turns into NaN, as a broken memory would make it."""
    params = jax.device_get(seen.params)
    broken = jax.tree_util.tree_map_with_path(
        lambda p, x: _broken(x, layer) if tuple(k.key for k in p) == path else x, params
    )
    state = dataclasses.replace(seen, params=broken)
    state, values = compiled(state, batch(5))
    assert int(values["skipped"]) == 1
    assert find_layer(cfg, state, batch(5)) == clause
    assert not guard.all_finite(state)


def _broken(x, layer):
    x = np.array(x)
    (x if layer is None else x[layer]).flat[0] = np.nan
    return x


def test_a_run_of_bad_steps_stops_with_the_reason_and_no_bad_state_is_saved(tmp_path, data_dir, cache_dir):
    """A learning rate of 1e30: every update would overflow the parameters."""
    flags = ["--config.optim.learning_rate=1e30", "--config.optim.clip=0", "--config.train.checkpoint_every=6"]
    code, _, err = run("train", *train(tmp_path / "run", *flags), cache_dir=cache_dir)
    assert code == 1
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "step 10: 10 steps in a row were skipped, as the update would make parameters that are not finite" in line
    assert "the largest gradient is that of output/linear/kernel" in line
    assert [int(s["skipped"]) for s in scalars(tmp_path / "run")] == list(
        range(1, 13)
    )  # looked at before the save of step 12
    for saved in checkpoint.steps(str(tmp_path / "run")):
        for item in ("params", "ema"):
            _, weights = checkpoint.load(str(tmp_path / "run"), saved, item)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(weights)))


@pytest.fixture(scope="module")
def faulty(cfg, mesh):
    """The training step on a machine that flips one bit of one gradient when the batch says so: same program, same input."""
    real = step.gradients

    def flipped(cfg, params, *rest, **how):
        *rest, fault = rest
        (loss, parts), grads = real(cfg, params, *rest, **how)
        leaves, tree = jax.tree.flatten(grads)
        for i, leaf in enumerate(leaves):
            bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
            index = jnp.minimum(fault["index"], leaf.size - 1)
            mask = jnp.where(fault["leaf"] == i, jnp.uint32(1) << fault["bit"], jnp.uint32(0))
            bits = bits.ravel().at[index].set(bits.ravel()[index] ^ mask).reshape(leaf.shape)
            leaves[i] = jax.lax.bitcast_convert_type(bits, jnp.float32)
        return (loss, parts), jax.tree.unflatten(tree, leaves)

    def faulty_step(state, data, fault):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                step, "gradients", lambda cfg, params, *rest, **how: flipped(cfg, params, *rest, fault, **how)
            )
            return step.train_step(cfg, bind(cfg.model), state, data)

    return jax.jit(faulty_step)


def test_any_flipped_gradient_bit_is_caught_before_the_state_advances(seen, faulty):
    """All 32 bits, of gradients all over the model; without a fault the two runs agree."""
    seed = random.SystemRandom().randrange(10**6)
    rng, leaves = random.Random(seed), jax.tree.leaves(seen.params)

    def twice(faults):
        queue = iter(faults)
        return guard.run_twice(lambda state, data: faulty(state, data, next(queue)), seen, batch(10), 11)

    none = {"leaf": jnp.int32(-1), "index": jnp.int32(0), "bit": jnp.uint32(0)}
    assert int(twice([none, none])[0].step) == 11
    for bit in range(32):
        leaf = rng.randrange(len(leaves))
        index = jnp.int32(rng.randrange(leaves[leaf].size))
        fault = {"leaf": jnp.int32(leaf), "index": index, "bit": jnp.uint32(bit)}
        order = [fault, none] if rng.random() < 0.5 else [none, fault]
        with pytest.raises(JobError, match=r"step 11, computed twice .* gave other bits"):
            twice(order)


def test_a_wrong_replica_on_any_device_is_caught(seen):
    """What the first device holds is right in both runs; one other device, every one in turn, computed something else."""
    state = jax.device_get(seen)
    where = replicated(make_mesh(MeshConfig()))
    devices = list(where.mesh.devices.flat)
    assert len(devices) == 8

    def computed(wrong):
        """The bias on all devices, one bit flipped on the device of number `wrong`."""
        shards = [state.params["output"]["linear"]["bias"].copy() for _ in devices]
        if wrong is not None:
            shards[wrong].view(np.uint32)[2] ^= 1 << 9
        placed = [jax.device_put(x, device) for x, device in zip(shards, devices, strict=True)]
        return {"bias": jax.make_array_from_single_device_arrays(shards[0].shape, where, placed)}, {}

    for number in (None, *range(8)):
        results = iter([computed(None), computed(number)])
        again = functools.partial(guard.run_twice, lambda state, data, results=results: next(results))
        if number is None:
            again({}, {}, 11)
            continue
        with pytest.raises(JobError, match=r"step 11, .* other bits in 1 of 1 arrays \(first: \[0\]\['bias'\]\)"):
            again({}, {}, 11)


def test_finite_numbers_too_large_to_square_are_refused(seen, compiled):
    """Their variance would be infinite, and stay so."""
    for start in (guard.init_guard(), jax.device_get(seen.guard)):
        accepted, after = guard.judge(TrainConfig(spike=0.0), start, jnp.float32(1e30), jnp.float32(1), jnp.float32(1))
        assert not accepted and guard.all_finite(after) and int(after.skipped) == 1


@pytest.mark.slow
def test_a_streak_between_two_logged_steps_stops_the_run(tmp_path, data_dir, cache_dir):
    """Steps are logged every 50, and ten bad ones in a row are too many: the run ends at the next multiple of ten."""
    flags = ["--config.optim.learning_rate=1e30", "--config.optim.clip=0", "--config.train.log_every=50"]
    code, _, err = run("train", *train(tmp_path / "run", *flags, steps=45), cache_dir=cache_dir)
    assert code == 1 and "error: step 10: 10 steps in a row were skipped" in err
    assert [s["step"] for s in scalars(tmp_path / "run")] == [1]


def test_a_state_that_is_not_finite_is_never_saved(seen, cfg):
    """Though every step was accepted: a memory that failed."""
    broken = jax.tree_util.tree_map_with_path(
        lambda p, x: _broken(x, None) if p[-1].key == "bias" and p[0].key == "output" else x, jax.device_get(seen.ema)
    )
    with pytest.raises(JobError, match=r"step 10: the state holds numbers that are not finite"):
        save_state(None, dataclasses.replace(seen, ema=broken), {}, {}, None, "")


@pytest.mark.slow
def test_replays_change_nothing_and_cost_one_step_in_n(uninterrupted, tmp_path, cache_dir):
    """The same scalars, but for the gradients' fingerprint, which is there because of the replays."""
    code, _, err = run("train", *train(tmp_path / "run", "--config.train.replay_every=4"), cache_dir=cache_dir)
    assert code == 0, err
    lines = scalars(tmp_path / "run")
    assert all(0 <= line.pop("gradient_bits") < 2**32 for line in lines)
    assert lines == scalars(uninterrupted)


def test_run_twice_calls_the_step_twice_and_keeps_the_first(seen, compiled):
    calls = []

    def counted(state, data):
        calls.append(int(state.step))
        return compiled(state, data)

    spare = jax.tree.map(jnp.copy, seen)
    once, _ = compiled(spare, batch(10))
    state, _ = guard.run_twice(counted, seen, batch(10), 11)
    assert calls == [10, 10]
    jax.tree.map(np.testing.assert_array_equal, kept(once), kept(state))
