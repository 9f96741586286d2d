"""What it costs to add something: each is registered here, outside the package, and works without another line."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax import checkpoint, flops
from dit_jax.bind import bind
from dit_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, OptimConfig, SampleConfig, TrainConfig
from dit_jax.devices.mesh import make_mesh
from dit_jax.diffusion import objective, samplers
from dit_jax.diffusion.process import Flow
from dit_jax.error import UsageError
from dit_jax.models import conditioning
from dit_jax.sampling.draw import open_sampling
from dit_jax.sampling.weights import weights_hash
from dit_jax.training import loop
from dit_jax.training.state import abstract_state, make_state
from dit_jax.training.step import make_train_step

SMALL = Config(
    ModelConfig(depth=1, width=16, heads=2, patch=2, input_size=8, channels=1, classes=10, learn_sigma=False),
    DiffusionConfig(process="flow"),
    DataConfig(),
    OptimConfig(learning_rate=1e-2),
    TrainConfig(steps=4, batch_size=16, log_every=2, checkpoint_every=2),
    sample=SampleConfig(sampler="euler", steps=3),
)


@pytest.fixture(scope="module")
def cfg(data_dir):
    return dataclasses.replace(SMALL, data=DataConfig(data_dir=data_dir))


def batch(cfg, **cond):
    rng = np.random.default_rng(0)
    images = rng.standard_normal((cfg.train.batch_size, 8, 8, 1), np.float32)
    rows = {name: rng.integers(high, size=len(images), dtype=np.int32) for name, high in cond.items()}
    return {"image": images, "cond": rows}


def test_a_sampler_is_one_function_and_one_row(cfg, monkeypatch):
    def midpoint(process, denoise, x, times, keys):
        def step(x, ends):
            t, s = ends
            half = x + (s - t) / 2 * denoise(x, jnp.full(x.shape[:1], t))
            return x + (s - t) * denoise(half, jnp.full(x.shape[:1], (s + t) / 2)), None

        return jax.lax.scan(step, x, (times[:-1].astype(np.float32), times[1:].astype(np.float32)))[0]

    def evaluations(times):
        return np.concatenate([times[:-1], (times[:-1] + times[1:]) / 2])

    monkeypatch.setitem(samplers.SAMPLERS, "midpoint", samplers.Sampler(midpoint, evaluations, accepts=(Flow,)))
    chosen = dataclasses.replace(cfg, sample=SampleConfig(sampler="midpoint", steps=3, guidance=2.0))
    mesh = make_mesh(chosen.mesh, jax.devices()[:1])
    sampling, params = open_sampling(chosen, mesh), make_state(chosen, mesh).params
    ((images, labels),) = sampling.images(params, 0, 20)
    assert images.shape == (20, 8, 8, 1) and labels.max() < 10
    assert sampling.flops == 12 * flops.forward_flops(chosen.model)  # 3 steps, 2 evaluations, guided
    assert sampling.describe(weights_hash(params), 0, 0)["sample.sampler"] == "midpoint"
    chain = dataclasses.replace(chosen, diffusion=DiffusionConfig())
    with pytest.raises(UsageError, match=r"sample.sampler: found .midpoint. for DDPM, expected a flow"):
        open_sampling(chain, mesh)


@pytest.mark.parametrize(
    "kind", ["in_context", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("adaln_zero", "cross_attention"))]
)
def test_a_field_of_cond_is_one_row_and_its_arithmetic(cfg, kind, monkeypatch):
    """A second label with 3 values: the model learns from it, drops it, draws it and is asked for it."""
    styles = 3

    def draw(cfg, rule, keys, indices, wanted):
        return jnp.asarray(wanted or range(styles), jnp.int32)[indices % (len(wanted) or styles)]

    row = conditioning.Field(
        embed=lambda cfg, name: conditioning.LabelEmbedding(styles, cfg.width, jnp.dtype(cfg.dtype), name=name),
        example=lambda cfg: ((), jnp.int32),
        null=lambda cfg, values: jnp.full_like(values, styles),
        draw=draw,
    )
    monkeypatch.setitem(flops.FIELDS, "style", flops.Field(lambda cfg: True, lambda cfg: (styles + 1) * cfg.width))
    monkeypatch.setitem(conditioning.FIELDS, "style", row)
    jax.clear_caches()  # `init` of this config was compiled without the field
    chosen = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, conditioning=kind, depth=2))
    mesh = make_mesh(chosen.mesh, jax.devices()[:1])
    state = make_state(chosen, mesh)
    assert state.params["style_embedding"]["table"]["embedding"].shape == (4, 16)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == flops.parameters(chosen.model)
    before = np.asarray(state.params["style_embedding"]["table"]["embedding"])
    step = make_train_step(chosen, mesh)
    for _ in range(4):
        state, scalars = step(state, batch(chosen, label=10, style=styles))
    assert np.isfinite(scalars["loss"])
    moved = np.abs(np.asarray(state.params["style_embedding"]["table"]["embedding"]) - before).max(axis=1)
    assert (moved[:styles] > 0).all()
    guided = dataclasses.replace(chosen, sample=SampleConfig(sampler="euler", steps=2, guidance=3.0))
    images = [
        next(open_sampling(guided, mesh, {"style": (value,)}).images(state.params, 0, 16))[0].astype(int)
        for value in (0, 1)
    ]
    assert np.abs(images[0] - images[1]).max() > 0
    with pytest.raises(UsageError, match="cond: found label, expected style, as the model has"):
        bind(chosen.model).apply(
            state.params, jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), {"label": jnp.zeros(1, jnp.int32)}
        )


def slow_copy(cfg):
    """The flow's loss beside a second, slower EMA of the weights, which it keeps in the state."""

    def update(extras, params, step):
        return jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, extras, params)

    found = objective.denoising(cfg, objective.velocity)
    return found._replace(init_extras=lambda params: jax.tree.map(jnp.copy, params), update_extras=update)


def test_an_objective_is_one_row_and_what_it_keeps_is_saved_sharded_and_verified(cfg, tmp_path, monkeypatch):
    monkeypatch.setitem(objective.OBJECTIVES, "flow", slow_copy)
    monkeypatch.setattr(loop, "make_train_step", functools.cache(make_train_step))  # the second run has the first one's
    chosen = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, data=4, fsdp=2))
    state = abstract_state(chosen, make_mesh(chosen.mesh))
    kernel = state.extras["blocks"]["mlp"]["fc1"]["kernel"]
    assert kernel.sharding == state.ema["blocks"]["mlp"]["fc1"]["kernel"].sharding and "fsdp" in str(
        kernel.sharding.spec
    )
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    loop.run(chosen, str(whole), quiet=True)
    shutil.copytree(whole, halves)
    shutil.rmtree(checkpoint.path_of(str(halves), 4))
    loop.run(chosen, str(halves), quiet=True)  # goes on from step 2
    like = state.items()
    found = [checkpoint.restore(str(folder), 4, like, chosen.model)[0] for folder in (whole, halves)]
    jax.tree.map(np.testing.assert_array_equal, *found)
    averages = found[0]["extras"]["patch_embedding"]["kernel"], found[0]["ema"]["patch_embedding"]["kernel"]
    assert np.abs(averages[0] - averages[1]).max() > 1e-6
    damaged = next(path for path in (whole / "checkpoints" / "4" / "extras").rglob("*") if path.stat().st_size > 500)
    damaged.write_bytes(bytes([damaged.read_bytes()[0] ^ 1]) + damaged.read_bytes()[1:])
    assert checkpoint.newest_verified(str(whole)) == 2


@pytest.mark.parametrize("kind", [pytest.param("adaln_zero", marks=pytest.mark.slow), "in_context"])
def test_a_model_without_labels_trains_and_is_sampled(cfg, kind):
    """cond is {}: no table, no null class, guidance 1 only."""
    model = dataclasses.replace(cfg.model, classes=0, conditioning=kind)
    chosen = dataclasses.replace(cfg, model=model)
    mesh = make_mesh(chosen.mesh, jax.devices()[:1])
    state = make_state(chosen, mesh)
    assert "label_embedding" not in state.params
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == flops.parameters(model)
    state, scalars = make_train_step(chosen, mesh)(state, batch(chosen))
    assert np.isfinite(scalars["loss"])
    ((images, labels),) = open_sampling(chosen, mesh).images(state.params, 0, 16)
    assert images.shape == (16, 8, 8, 1) and not labels.any()
    with pytest.raises(UsageError, match=r"sample.guidance: found 2.0, expected 1: this model has no null class"):
        open_sampling(dataclasses.replace(chosen, sample=SampleConfig(guidance=2.0, sampler="euler")), mesh)
