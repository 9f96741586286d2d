"""The training state, created already sharded."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax import flops
from dit_jax.bind import bind
from dit_jax.checkpoint.average import track_names
from dit_jax.config import Config
from dit_jax.devices.mesh import batch_sharding, state_sharding
from dit_jax.devices.numerics import random_key
from dit_jax.diffusion.objective import make_objective
from dit_jax.models import conditioning
from dit_jax.training.guard import Guard, init_guard
from dit_jax.training.optim import make_optimizer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that training carries from step to step."""

    step: Any  # int32 scalar, steps done
    params: Any  # raw weights
    ema: Any  # their moving average
    opt: Any  # of the optimizer
    guard: Guard
    extras: Any  # of the objective
    tracks: dict = dataclasses.field(default_factory=dict)  # power EMAs by `average.track_names`, for snapshots

    def items(self) -> dict:
        """Items of a checkpoint by name; `step` is not among them."""
        opt = {"optimizer": self.opt, "guard": dataclasses.asdict(self.guard)}
        extras = {"extras": self.extras} if jax.tree.leaves(self.extras) else {}
        tracks = {"tracks": self.tracks} if self.tracks else {}
        return {"params": self.params, "ema": self.ema, "opt": opt, **extras, **tracks}


@functools.lru_cache(maxsize=4)
def initial(cfg: Config) -> Callable[[], TrainState]:
    """`init_state` of this config, always the same function, so that jax traces it once."""
    return lambda: init_state(cfg)


def init_state(cfg: Config, change: Callable = lambda params: params) -> TrainState:
    """Initial state, a pure function of the config: weights from train.seed after `change`, EMA equal to them, zero moments."""
    params = change(bind(cfg.model).init(random_key(cfg.train.seed)))
    opt = make_optimizer(cfg.optim, cfg.train.steps).init(params)
    extras = make_objective(cfg).init_extras(params)
    ema, *tracks = (jax.tree.map(jnp.copy, params) for _ in ("", *cfg.optim.ema_tracks))
    tracks = dict(zip(track_names(cfg.optim), tracks, strict=True))
    return TrainState(jnp.zeros((), jnp.int32), params, ema, opt, init_guard(), extras, tracks)


def abstract_state(cfg: Config, mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without making it."""
    shapes = jax.eval_shape(initial(cfg))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_sharding(mesh, shapes),
    )


def abstract_batch(cfg: Config, mesh, shape: flops.Shape = None) -> dict:
    """Shapes, dtypes and shardings of a training batch of images of `shape` (h, w), by default model.input_size squared."""
    model, rows, sharding = cfg.model, cfg.train.batch_size, batch_sharding(mesh)
    images = (rows, *(shape or (model.input_size, model.input_size)), model.channels)
    batch = {"image": jax.ShapeDtypeStruct(images, jnp.float32), "cond": conditioning.example(model, rows)}
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), batch)


def make_state(cfg: Config, mesh, begin: Callable | None = None, *weights: dict) -> TrainState:
    """Initial state, each leaf created on the devices that keep it. `begin(fresh, *weights)`: the weights to start from, if not `fresh`."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(cfg, mesh))
    if begin is None:
        return jax.jit(initial(cfg), out_shardings=shardings)()

    def warm(*weights) -> TrainState:
        return init_state(cfg, lambda fresh: begin(fresh, *weights))

    return jax.jit(warm, out_shardings=shardings)(*weights)


def restored_state(step: int, items: dict, like: TrainState) -> TrainState:
    """State from a checkpoint's items. `step` is placed as in `like`, so that the step function compiles once."""
    opt, guard = items["opt"]["optimizer"], Guard(**items["opt"]["guard"])
    number, extras = jax.device_put(np.int32(step), like.step.sharding), items.get("extras", like.extras)
    return TrainState(number, items["params"], items["ema"], opt, guard, extras, items.get("tracks", {}))
