"""One training step and one evaluation of the held-out loss, as pure functions, and their compiled, sharded forms."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from dit_jax.config import Config, DiffusionConfig, ModelConfig
from dit_jax.devices.mesh import attention_implementation, batch_sharding, gather_weights, replicated, share_rows
from dit_jax.diffusion.process import make_process
from dit_jax.models import dit
from dit_jax.models.layers import Placement
from dit_jax.training.guard import choose, fingerprint, judge
from dit_jax.training.optim import ema_decay, learning_rate, make_optimizer, update_ema
from dit_jax.training.state import TrainState, abstract_state


def image_losses(
    model: ModelConfig, diffusion: DiffusionConfig, params, images, labels, t, eps, placement: Placement = Placement()
):
    """Losses (b,) of images (b, h, w, c) in [-1, 1], noised by eps at times t (b,); and their parts. `placement`: see `dit.apply`."""
    process = make_process(diffusion, model.learn_sigma)

    def denoise(x, t):
        return dit.apply(model, params, x, process.model_time(t), labels, placement)

    return process.loss(denoise, images, t, eps)


def draw(cfg: Config, key: jax.Array, images: jax.Array, labels: jax.Array):
    """A step's random part: times (b,), noise like images, and labels of which some became the null class."""
    time_key, noise_key, label_key = jax.random.split(key, 3)
    process = make_process(cfg.diffusion, cfg.model.learn_sigma)
    t = process.time(jax.random.uniform(time_key, labels.shape))
    eps = jax.random.normal(noise_key, images.shape)
    dropped = jax.random.bernoulli(label_key, cfg.train.label_dropout, labels.shape)
    return t, eps, jnp.where(dropped, cfg.model.null_class, labels)


def batch_loss(cfg: Config, params, images, labels, t, eps, placement: Placement = Placement()):
    """Mean loss of a batch, and the means of its parts."""
    losses, parts = image_losses(cfg.model, cfg.diffusion, params, images, labels, t, eps, placement)
    return losses.mean(), {name: part.mean() for name, part in parts.items()}


def gradients(cfg: Config, params, *batch, placement: Placement = Placement()):
    """(loss, parts), gradients: over the whole batch, or the mean over `optim.accumulate` microbatches, one after another."""
    loss_and_gradients = jax.value_and_grad(lambda p, *b: batch_loss(cfg, p, *b, placement), has_aux=True)
    count = cfg.optim.accumulate
    if count == 1:
        return loss_and_gradients(params, *batch)
    # Image i goes to microbatch i mod count: every device keeps its own images.
    micro = [jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0) for x in batch]

    def add(total, part):
        return jax.tree.map(jnp.add, total, loss_and_gradients(params, *part)), None

    shapes = jax.eval_shape(loss_and_gradients, params, *[x[0] for x in micro])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, micro)
    return jax.tree.map(lambda x: x / count, total)


def train_step(
    cfg: Config, state: TrainState, batch: dict, placement: Placement = Placement()
) -> tuple[TrainState, dict]:
    """One update. batch: `image` (b, h, w, c) in [-1, 1], `label` (b,). The randomness depends on (train.seed, step) only.

    A step that the guard refuses counts as a step and leaves parameters, EMA and optimizer as they were, bit for bit.
    """
    t, eps, labels = draw(cfg, step_key(cfg, state.step), batch["image"], batch["label"])
    (loss, parts), grads = gradients(cfg, state.params, batch["image"], labels, t, eps, placement=placement)
    updates, opt = make_optimizer(cfg.optim, cfg.train.steps).update(grads, state.opt, state.params)
    params = optax.apply_updates(state.params, updates)
    done = state.step - state.guard.skipped  # updates so far
    ema = update_ema(state.ema, params, ema_decay(cfg.optim, done))
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
    kept = choose(accepted, (params, ema, opt), (state.params, state.ema, state.opt))
    return TrainState(state.step + 1, *kept, guard), scalars


def step_key(cfg: Config, step: jax.Array) -> jax.Array:
    """The key of all random numbers of the step that follows `step` others."""
    return jax.random.fold_in(jax.random.key(cfg.train.seed), step)


def on_device(model: ModelConfig) -> ModelConfig:
    """The model config with its attention chosen for the devices at hand."""
    return dataclasses.replace(model, attention=attention_implementation(model.attention, model.dtype))


def placement_on(cfg: Config, mesh) -> Placement:
    """How the model's weights and conditions move over a mesh."""
    return Placement(gather_weights(mesh, cfg.model.dtype), share_rows(mesh))


def make_train_step(cfg: Config, mesh) -> Callable:
    """`train_step` compiled for a mesh: (state, batch) -> (state, scalars); the old state's memory is reused."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(cfg, mesh))

    def step(state, batch):
        return train_step(cfg, state, batch, placement_on(cfg, mesh))

    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
