"""AdamW, its learning-rate schedule, and the exponential moving average (EMA) of the weights."""

import jax
import jax.numpy as jnp
import optax

from dit_jax.checkpoint.average import power_exponent
from dit_jax.config import OptimConfig


def learning_rate(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then constant or a cosine to zero at `steps`."""
    after = optax.constant_schedule(cfg.learning_rate)
    if cfg.schedule == "cosine":
        after = optax.cosine_decay_schedule(cfg.learning_rate, max(steps - cfg.warmup_steps, 1))
    if not cfg.warmup_steps:
        return after
    # Warm-up starts at rate / warmup_steps, not at 0, because a step at rate 0 would be wasted.
    warm = optax.linear_schedule(cfg.learning_rate / cfg.warmup_steps, cfg.learning_rate, max(cfg.warmup_steps - 1, 1))
    return optax.join_schedules([warm, after], [cfg.warmup_steps])


def make_optimizer(cfg: OptimConfig, steps: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) with float32 moments, after clipping by global norm if `clip` is above 0."""
    adamw = optax.adamw(learning_rate(cfg, steps), b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay)
    return optax.chain(optax.clip_by_global_norm(cfg.clip), adamw) if cfg.clip else optax.chain(adamw)


def ema_decay(cfg: OptimConfig, step: jax.Array) -> jax.Array:
    """Weight of the old average at update `step`, from 0: constant, or (1 - 1/t)^(gamma + 1) with t = step + 1."""
    if cfg.ema == "constant":
        return jnp.float32(cfg.ema_decay)
    return power_decay(cfg.ema_width, step)


def power_decay(width: float, step: jax.Array) -> jax.Array:
    """Weight of the old average at update `step`, from 0, in a power EMA (Karras et al. 2024, eq. 127)."""
    t = step.astype(jnp.float32) + 1
    return (1 - 1 / t) ** (power_exponent(width) + 1)


def update_ema(ema, params, decay):
    """New average: decay x ema + (1 - decay) x params."""
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)
