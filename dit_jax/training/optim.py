"""AdamW with its schedule, and the exponential moving average (EMA) of the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dit_jax.config import OptimConfig


def learning_rate(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then constant, or a cosine to zero at `steps`."""
    after = optax.constant_schedule(cfg.learning_rate)
    if cfg.schedule == "cosine":
        after = optax.cosine_decay_schedule(cfg.learning_rate, max(steps - cfg.warmup_steps, 1))
    if not cfg.warmup_steps:
        return after
    # The first step already moves: step 0 has 1/warm-up of the rate.
    warm = optax.linear_schedule(cfg.learning_rate / cfg.warmup_steps, cfg.learning_rate, max(cfg.warmup_steps - 1, 1))
    return optax.join_schedules([warm, after], [cfg.warmup_steps])


def make_optimizer(cfg: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm (if any), then AdamW (Loshchilov & Hutter 2019); moments are float32."""
    adamw = optax.adamw(learning_rate(cfg, steps), b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay)
    return optax.chain(optax.clip_by_global_norm(cfg.clip), adamw) if cfg.clip else optax.chain(adamw)


def power_exponent(width: float) -> float:
    """The gamma whose power-law averaging profile has this relative standard deviation (Karras et al. 2024, section 3.1).

    width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), solved for its largest root.
    """
    inverse = width**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots[np.isreal(roots)].real.max())


def ema_decay(cfg: OptimConfig, step: jax.Array) -> jax.Array:
    """Weight of the old average at `step` (0 for the first): constant, or (1 - 1/t)^(gamma + 1), which needs no run length."""
    if cfg.ema == "constant":
        return jnp.float32(cfg.ema_decay)
    t = step.astype(jnp.float32) + 1
    return (1 - 1 / t) ** (power_exponent(cfg.ema_width) + 1)


def update_ema(ema, params, decay):
    """decay x ema + (1 - decay) x params."""
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)
