"""One training step: a pure function, and its compiled, sharded form."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from dit_jax.bind import Model, bind
from dit_jax.checkpoint.average import track_names
from dit_jax.config import Config
from dit_jax.devices.mesh import batch_sharding, compiler_options, replicated
from dit_jax.devices.numerics import random_key
from dit_jax.diffusion.objective import Objective, make_objective
from dit_jax.networks.autoencoder import StepEncoder
from dit_jax.training.guard import choose, fingerprint, judge
from dit_jax.training.optim import ema_decay, learning_rate, make_optimizer, power_decay, update_ema
from dit_jax.training.state import TrainState, abstract_state


def mean_loss(objective: Objective, model: Model, params, extras, points: dict):
    """Mean loss over a batch of points, and the mean of each of its parts."""
    with jax.named_scope("loss"):
        losses, parts = objective.losses(model, params, extras, points)
        return losses.mean(), {name: part.mean() for name, part in parts.items()}


def gradients(objective: Objective, model: Model, params, extras, points: dict, accumulate: int = 1):
    """((loss, parts), gradients) of the whole batch, or their mean over `accumulate` microbatches, computed in sequence."""
    loss = jax.value_and_grad(lambda p, points: mean_loss(objective, model, p, extras, points), has_aux=True)
    if accumulate == 1:
        return loss(params, points)

    # Image i goes to microbatch i mod accumulate, so that every device keeps its own images.
    def split(x):
        return jnp.moveaxis(x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]), 1, 0)

    def add(total, part):
        return jax.tree.map(jnp.add, total, loss(params, part)), None

    micro = jax.tree.map(split, points)
    shapes = jax.eval_shape(loss, params, jax.tree.map(lambda x: x[0], micro))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, micro)
    return jax.tree.map(lambda x: x / accumulate, total)


def train_step(cfg: Config, model: Model, state: TrainState, batch: dict) -> tuple[TrainState, dict]:
    """One update: (new state, scalars). `batch`: `image` (b, h, w, c) in [-1, 1] and `cond`.

    Randomness depends on (train.seed, step) only. A step that the guard refuses still counts as a step, but leaves parameters,
    EMA, optimizer state and extras unchanged, bit for bit.
    """
    objective = make_objective(cfg)
    points = objective.draw(model, step_key(cfg, state.step), batch)
    (loss, parts), grads = gradients(objective, model, state.params, state.extras, points, cfg.optim.accumulate)
    done = state.step - state.guard.skipped  # updates so far
    with jax.named_scope("optimizer"):
        fence = functools.partial(model.place, "fence")
        updates, opt = fence(make_optimizer(cfg.optim, cfg.train.steps).update(fence(grads), state.opt, state.params))
        params = fence(optax.apply_updates(state.params, updates))
        ema = update_ema(state.ema, params, ema_decay(cfg.optim, done))
        widths = dict(zip(track_names(cfg.optim), cfg.optim.ema_tracks, strict=True))
        tracks = {name: update_ema(state.tracks[name], params, power_decay(widths[name], done)) for name in widths}
    extras = objective.update_extras(state.extras, params, done)
    grad_norm, param_norm = optax.tree.norm(grads), optax.tree.norm(params)
    accepted, guard = judge(cfg.train, state.guard, loss, grad_norm, param_norm)
    scalars = {
        "loss": loss,
        **(parts if len(parts) > 1 else {}),
        "grad_norm": grad_norm,
        "param_norm": param_norm,
        "learning_rate": jnp.asarray(learning_rate(cfg.optim, cfg.train.steps)(done), jnp.float32),
        "skipped": guard.skipped,
        "streak": guard.streak,
        **({"gradient_bits": fingerprint(grads)} if cfg.train.replay_every else {}),
    }
    new, old = (params, ema, opt, extras, tracks), (state.params, state.ema, state.opt, state.extras, state.tracks)
    params, ema, opt, extras, tracks = choose(accepted, new, old)
    return TrainState(state.step + 1, params, ema, opt, guard, extras, tracks), scalars


def step_key(cfg: Config, step: jax.Array) -> jax.Array:
    """Random key of the step that follows `step` others."""
    return jax.random.fold_in(random_key(cfg.train.seed), step)


def make_train_step(cfg: Config, mesh, encoder: StepEncoder = StepEncoder()) -> Callable:
    """Compiles `train_step` for a mesh: (state, batch, *encoder.weights) -> (state, scalars). The old state is donated."""
    model, places = bind(cfg.model, mesh), jax.tree.map(lambda leaf: leaf.sharding, encoder.weights)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(cfg, mesh))

    def step(state, batch, *weights):
        return train_step(cfg, model, state, encoder.apply(batch, *weights))

    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh), *places),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(mesh),
    )
