"""The PyTorch peer of the benchmark computes what we compute: loss, gradients, a whole update, a guided sampling; and its runs."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from job import ROOT, environment

from dit_jax.bench import peer as peers
from dit_jax.bind import bind
from dit_jax.config import Config, MeshConfig, ModelConfig, OptimConfig, SampleConfig, TrainConfig
from dit_jax.diffusion.objective import make_objective
from dit_jax.diffusion.process import make_process
from dit_jax.diffusion.samplers import draw_noise
from dit_jax.diffusion.task import make_task
from dit_jax.error import UsageError
from dit_jax.models import dit
from dit_jax.sampling.draw import image_keys, make_denoiser
from dit_jax.training.state import init_state
from dit_jax.training.step import mean_loss, step_key, train_step

TOLERANCE = 1e-4
FILE = str(ROOT / "tests" / "peers" / "torch_dit.py")
# An eps that keeps AdamW smooth where a gradient is zero but for rounding, an EMA that moves.
CFG = Config(
    ModelConfig(depth=2, width=48, heads=3, patch=2, input_size=8, channels=4, classes=10),
    optim=OptimConfig(learning_rate=1e-2, eps=1e-3, weight_decay=0.1, ema_decay=0.9),
    train=TrainConfig(batch_size=6, cond_dropout=0.5),
    sample=SampleConfig(steps=5, guidance=3.0, channels="first3"),
)
MODEL, OBJECTIVE = bind(CFG.model), make_objective(CFG)


@pytest.fixture(scope="module")
def peer(torch):
    return peers.load(FILE)


@pytest.fixture(scope="module")
def params():
    """As after initialisation, plus noise on every value: no gate is closed."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: dit.init(CFG.model, jax.random.key(0)))

    def random(leaf):
        return (rng.standard_normal(leaf.shape) * 0.5 / np.sqrt(leaf.shape[-2] if leaf.ndim > 1 else 1)).astype(
            np.float32
        )

    return jax.tree.map(random, shapes)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    images = np.clip(rng.standard_normal((6, 8, 8, 4), np.float32), -1, 1)  # some at the ends of the 256 levels
    return {"image": jnp.asarray(images), "cond": {"label": jnp.asarray(rng.integers(10, size=6, dtype=np.int32))}}


def relative(found, expected):
    """The largest error relative to the largest value."""
    found, expected = np.asarray(found), np.asarray(expected)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def tensors(torch, *arrays):
    return [torch.from_numpy(np.array(a)) for a in arrays]


def noised(params, batch, steps=(0, 0, 1, 500, 998, 999)):
    """(times, noise) that hit the ends of the chain.

    At the first step the noise is near what the model predicts: elsewhere a level's probability is a difference of two numbers
    near 1, of which float32 keeps no four digits.
    """
    eps = np.random.default_rng(2).standard_normal(batch["image"].shape, np.float32)
    t, first = (np.array(steps, np.float32) + 1) / 1000, np.array(steps) == 0
    if first.any():
        noisy = make_process(CFG.diffusion, True).noise(batch["image"], jnp.asarray(t), jnp.asarray(eps))
        predicted = dit.apply(CFG.model, params, noisy, jnp.array(steps, jnp.float32), batch["cond"]["label"])[..., :4]
        eps[first] = np.asarray(predicted)[first] + 0.3 * eps[first]
    return jnp.asarray(t), jnp.asarray(eps)


def losses_of(torch, peer, model, batch, t, eps, labels):
    """Per-image losses of the peer; our time t is its step 1000 t - 1."""
    x, eps, labels = tensors(torch, batch["image"], eps, labels)
    k = torch.from_numpy(np.round(np.asarray(t) * 1000).astype(np.int64) - 1)
    return peer.Chain().losses(model, x, labels.long(), k, eps)


def test_losses_at_every_kind_of_step(torch, peer, params, batch):
    t, eps = noised(params, batch)
    points = {"x": batch["image"], "cond": batch["cond"], "t": t, "eps": eps}
    ours, _ = jax.jit(lambda p: OBJECTIVE.losses(MODEL, p, {}, points))(params)
    model = peer.make_model(CFG.model, params, "cpu")
    theirs = losses_of(torch, peer, model, batch, t, eps, batch["cond"]["label"]).detach().numpy()
    print(f"losses: {np.abs(theirs / np.asarray(ours) - 1).max():.2e}")
    np.testing.assert_allclose(theirs, ours, rtol=TOLERANCE)


def test_gradients_of_the_loss(torch, peer, params, batch):
    t, eps = noised(params, batch)
    points = {"x": batch["image"], "cond": batch["cond"], "t": t, "eps": eps}
    grads = jax.jit(jax.grad(lambda p: mean_loss(OBJECTIVE, MODEL, p, {}, points)[0]))(params)
    model = peer.make_model(CFG.model, params, "cpu")
    losses_of(torch, peer, model, batch, t, eps, batch["cond"]["label"]).mean().backward()
    errors = {name: relative(theirs.grad, ours) for name, ours, theirs in peer.matched(model, grads)}
    assert len(errors) == sum(1 for _ in model.parameters()) and sum(p.numel() for p in model.parameters()) == sum(
        leaf.size for leaf in jax.tree.leaves(params)
    )
    worst = max(errors, key=errors.get)
    print(f"gradients of {len(errors)} tensors: {errors[worst]:.2e} ({worst})")
    assert errors[worst] <= TOLERANCE


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_three_whole_updates(torch, peer, params, batch, recompute):
    """Times, noise and dropped labels as our step draws them; then weights and EMA, relative to how far they moved."""
    state = dataclasses.replace(init_state(CFG), params=params, ema=jax.tree.map(jnp.copy, params))
    model, step = peer.make_model(CFG.model, params, "cpu").train(), jax.jit(lambda s, b: train_step(CFG, MODEL, s, b))
    model.recompute = recompute
    ema = peer.make_model(CFG.model, params, "cpu").requires_grad_(False)
    optimizer = peer.adamw(CFG, model)
    for _ in range(3):
        points = OBJECTIVE.draw(MODEL, step_key(CFG, state.step), batch)
        t, eps, labels = points["t"], points["eps"], points["cond"]["label"]
        loss = losses_of(torch, peer, model, batch, t, eps, labels).mean()
        peer.update(CFG, model, ema, optimizer, loss)
        state, scalars = step(state, batch)
        assert loss.item() == pytest.approx(float(scalars["loss"]), rel=TOLERANCE)
        assert (np.asarray(labels) == 10).any() and (np.asarray(labels) != 10).any()
    for name, theirs, ours in (("weights", model, state.params), ("EMA", ema, state.ema)):
        moved = jax.tree.map(lambda a, b: np.asarray(a) - b, ours, params)
        before = {key: value for key, value, _ in peer.matched(theirs, params)}
        errors = {
            key: relative(tensor.detach().numpy() - before[key], expected)
            for key, expected, tensor in peer.matched(theirs, moved)
        }
        worst = max(errors, key=errors.get)
        print(f"{name} of 3 updates: {errors[worst]:.2e} ({worst})")
        assert errors[worst] <= 10 * TOLERANCE  # of differences of numbers that are 1e2 times larger


def test_a_guided_sampling(torch, peer, params):
    """The same noise at every step, all images at the end."""
    keys, shape, labels = image_keys(0, jnp.arange(4)), (8, 8, 4), jnp.array([3, 1, 4, 1])
    task = make_task(CFG)
    noises = [draw_noise(keys, i, shape) for i in range(CFG.sample.steps + 1)]

    def sample(params):
        return task.walk(make_denoiser(MODEL, task, CFG.sample, params, {"label": labels}), noises[0], keys)

    ours = jax.jit(sample)(params)
    model = peer.make_model(CFG.model, params, "cpu").eval()
    step, numbers, constants = peer.make_step(CFG, model, "cpu")
    start, classes = tensors(torch, noises[0], labels)
    with torch.no_grad():
        theirs = peer.walk(step, start, classes.long(), numbers, constants, lambda i: tensors(torch, noises[i + 1])[0])
    print(f"{CFG.sample.steps} guided steps: {relative(theirs, ours):.2e}")
    assert relative(theirs, ours) <= TOLERANCE


def test_bfloat16_is_of_the_compute_only(torch, peer, params, batch):
    """Weights, gradients and moments stay float32; the loss is near float32's, and not equal to it."""
    cfg = dataclasses.replace(CFG, model=dataclasses.replace(CFG.model, dtype="bfloat16"))
    t, eps = noised(params, batch, steps=(100, 200, 300, 400, 500, 600))
    exact = losses_of(torch, peer, peer.make_model(CFG.model, params, "cpu"), batch, t, eps, batch["cond"]["label"])
    model = peer.make_model(cfg.model, params, "cpu")
    loss = losses_of(torch, peer, model, batch, t, eps, batch["cond"]["label"])
    optimizer = peer.adamw(cfg, model)
    loss.mean().backward()
    optimizer.step()
    state = [value for moments in optimizer.state.values() for value in moments.values()]
    assert {p.dtype for p in model.parameters()} | {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert {value.dtype for value in state} == {torch.float32}
    assert 1e-5 < relative(loss.detach(), exact.detach()) < 0.05


def test_what_it_does_not_know_is_refused(peer):
    cfg = dataclasses.replace(CFG, optim=dataclasses.replace(CFG.optim, clip=1.0))
    with pytest.raises(UsageError, match=r"optim.clip: found 1.0, expected 0.0: the PyTorch peer knows nothing else"):
        peer.check(cfg, "cpu")
    with pytest.raises(UsageError, match="found tpu, expected cpu or gpu"):
        peer.check(CFG, "tpu")
    assert peer.check(CFG, "cpu") == "cpu"


def test_compiled_it_gives_the_same_loss_and_compiles_once(torch, peer, params, batch):
    t, eps = noised(params, batch)
    side = peer.make_trainer(CFG, params, batch, "cpu", 2)
    assert side.about["way"] == "torch.compile", side.about
    before = side.compiled()
    side.run(3)
    assert side.compiled() == before
    model = peer.make_model(CFG.model, params, "cpu")
    eager = losses_of(torch, peer, model, batch, t, eps, batch["cond"]["label"])
    compiled = losses_of(torch, peer, torch.compile(model), batch, t, eps, batch["cond"]["label"])
    assert relative(compiled.detach(), eager.detach()) <= TOLERANCE


TINY = """
from dataclasses import asdict
from dit_jax.config import template
def get_config():
    c = template()
    c.model.update(depth=1, width=16, heads=2, patch=2, input_size=4, channels=4, classes=10)
    c.train.batch_size = 8
    c.sample.update(steps=2, guidance=1.5, channels="first3")
    return c
"""


def test_the_benchmark_beside_it_end_to_end(tmp_path, cache_dir):
    """Where there is no C++ compiler for torch.compile: it falls back, says why, and all figures fit together."""
    (tmp_path / "tiny.py").write_text(TINY)
    out = tmp_path / "bench.json"
    flags = [f"--config={tmp_path / 'tiny.py'}", f"--peer={FILE}", f"--json={out}", "--repeats=3", "--seconds=0.1"]
    env = environment(cache_dir, devices=1) | {
        "CXX": "/nowhere/c++",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
    }
    command = [sys.executable, "-m", "dit_jax.bench", *flags]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert set(found) == {"generator", "machine", "sample", "train"} and found["machine"]["date"]
    for part, images in (("train", 8), ("sample", 64)):
        sides = found[part]["sides"]
        assert set(sides) == {"jax", "torch"} and found[part]["images"] == images
        assert sides["torch"]["way"] == "eager" and sides["torch"]["did_not_work"]["torch.compile"]
        for side in sides.values():
            assert side["recompiles"] == 0 and side["first_call_seconds"] > 0 and side["memory_source"]
            for low, high in (("low", "high"), ("median", "median"), ("high", "low")):
                seconds = side["step_ms"][high] / 1e3
                assert side["images_per_second"][low] == pytest.approx(images / seconds)
                assert side["tflops"][low] == pytest.approx(found[part]["flops"] / seconds / 1e12)
        assert sides["jax"]["memory_bytes"] > 4 * 4 * found[part]["parameters"] * (part == "train")
        assert found[part]["ratio"]["low"] <= found[part]["ratio"]["median"] <= found[part]["ratio"]["high"]
    text = done.stdout
    assert "did not work" in text and "times as long as jax" in text and "float32 product of a round" in text
    assert os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE") is None


def test_a_mesh_of_several_devices_is_refused(cache_dir):
    env = environment(cache_dir, devices=2)
    done = subprocess.run(
        [sys.executable, "-m", "dit_jax.bench", f"--peer={FILE}"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 2 and "--peer: found 2 devices, expected one" in done.stderr
    assert MeshConfig().data == -1
