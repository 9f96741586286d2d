"""Schedules, AdamW, the EMA and the random part of a step."""

from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dit_jax.bind import bind
from dit_jax.config import Config, ModelConfig, OptimConfig, TrainConfig
from dit_jax.diffusion.objective import make_objective
from dit_jax.training.optim import ema_decay, learning_rate, make_optimizer, power_exponent, update_ema
from dit_jax.training.state import init_state


def rates(cfg, steps):
    schedule = learning_rate(cfg, steps)
    return np.array([float(schedule(i)) for i in range(steps + 1)])


def test_warmup_then_constant():
    found = rates(OptimConfig(learning_rate=1.0, warmup_steps=4), 8)
    np.testing.assert_allclose(found, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1])


def test_cosine_ends_at_zero():
    found = rates(OptimConfig(learning_rate=1.0, schedule="cosine", warmup_steps=2), 10)
    np.testing.assert_allclose(found[2:], (1 + np.cos(np.pi * np.arange(9) / 8)) / 2, atol=1e-6)


def test_adamw_by_hand():
    cfg = OptimConfig(learning_rate=0.1, weight_decay=0.5, b1=0.9, b2=0.99)
    optimizer, w, g = make_optimizer(cfg, 10), jnp.array([2.0]), jnp.array([4.0])
    updates, _ = optimizer.update(g, optimizer.init(w), w)
    assert float(optax.apply_updates(w, updates)[0]) == pytest.approx(2.0 - 0.1 * (1.0 + 0.5 * 2.0), rel=1e-6)


def test_clipping_by_global_norm():
    optimizer = make_optimizer(OptimConfig(learning_rate=1.0, clip=1.0), 10)
    g = {"a": jnp.array([30.0]), "b": jnp.array([40.0])}
    _, state = optimizer.update(g, optimizer.init(g), g)
    moments = next(s for s in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(s, "mu"))
    assert float(moments.mu["a"][0]) == pytest.approx(0.1 * 0.6, rel=1e-5)


def test_the_ema_starts_at_the_weights():
    cfg = Config(model=ModelConfig(depth=1, width=16, heads=2, input_size=8, classes=3))
    state = init_state(cfg)
    jax.tree.map(np.testing.assert_array_equal, state.params, state.ema)
    assert int(state.step) == 0


def test_constant_ema_by_hand():
    ema = update_ema(
        {"w": jnp.array([1.0])}, {"w": jnp.array([3.0])}, ema_decay(OptimConfig(ema_decay=0.75), jnp.int32(0))
    )
    assert float(ema["w"][0]) == pytest.approx(1.5)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_the_power_emas_profile_has_the_width_asked_for(width):
    """Follow one unit impulse per step: the weights of past steps have mean (g+1)/(g+2) and deviation `width` of the run."""
    cfg, steps = OptimConfig(ema="power", ema_width=width), 4000
    decays = np.array([float(d) for d in jax.vmap(lambda i: ema_decay(cfg, i))(jnp.arange(steps))], np.float64)
    after = np.append(np.cumprod(decays[::-1])[::-1][1:], 1.0)
    weights = (1 - decays) * after
    assert weights.sum() == pytest.approx(1.0, abs=1e-6)  # the first step's decay is 0: nothing of the start remains
    t = np.arange(1, steps + 1) / steps
    mean = (weights * t).sum()
    gamma = power_exponent(width)
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), abs=2e-3)
    assert np.sqrt((weights * (t - mean) ** 2).sum()) == pytest.approx(width, rel=0.02)


def test_the_draws_of_a_step():
    cfg = Config(train=TrainConfig(cond_dropout=0.25))
    objective, model = make_objective(cfg), bind(cfg.model)
    batch = {"image": jnp.zeros((4096, 2, 2, 1)), "cond": {"label": jnp.zeros(4096, jnp.int32)}}
    t, eps, cond = itemgetter("t", "eps", "cond")(objective.draw(model, jax.random.key(0), batch))
    assert float((cond["label"] == cfg.model.classes).mean()) == pytest.approx(0.25, abs=0.03)
    assert float(eps.std()) == pytest.approx(1.0, abs=0.02)
    assert float(t.min()) >= 1e-3 and float(t.max()) <= 1.0
    assert len(np.unique(np.asarray(eps))) > 16_000 and len(np.unique(np.asarray(t))) > 900  # no two images share noise
    other = objective.draw(model, jax.random.key(1), batch)
    assert not np.array_equal(eps, other["eps"]) and not np.array_equal(t, other["t"])
