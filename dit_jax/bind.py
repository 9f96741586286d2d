"""Model bound to a mesh: turns a config into functions of parameters and arrays."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax

from dit_jax import flops
from dit_jax.config import ModelConfig
from dit_jax.devices.mesh import attention_implementation, gatherer, placer, splits_weights, state_sharding
from dit_jax.devices.numerics import random_key
from dit_jax.models import conditioning, dit, quantize
from dit_jax.models.layers import as_it_is


@dataclass(frozen=True)
class Model:
    """Bound model. `cfg.attention` is resolved for the devices; `place` lays out arrays, see `models.dit.apply`."""

    cfg: ModelConfig
    place: Callable = as_it_is

    def init(self, key: jax.Array) -> dict:
        """Initial parameters, a nested dict of float32 arrays."""
        return dit.init(self.cfg, key)

    def apply(self, params: Mapping, x: jax.Array, t: jax.Array, cond, target: jax.Array | None = None) -> jax.Array:
        """Runs the model: x (b, h, w, c), t (b,) in 0 to 1000, cond -> (b, h, w, c_out) float32. `target` (b,): time that a flow map goes
        to; None: t, which gives the velocity."""
        cond = cond if target is None else conditioning.aim(cond, target)
        return dit.apply(self.cfg, params, x, t, cond, self.place)

    def apply_reusing(
        self,
        params: Mapping,
        x: jax.Array,
        t: jax.Array,
        cond,
        kept: dict,
        fresh: dict,
        target: jax.Array | None = None,
    ) -> tuple:
        """Runs the model but for outputs that are kept; see `models.dit.apply_reusing`."""
        cond = cond if target is None else conditioning.aim(cond, target)
        return dit.apply_reusing(self.cfg, params, x, t, cond, kept, fresh, self.place)

    def apply_measuring(
        self, params: Mapping, x: jax.Array, t: jax.Array, cond, target: jax.Array | None = None
    ) -> tuple:
        """Runs the model and measures the inputs of its products; see `models.dit.apply_measuring`."""
        cond = cond if target is None else conditioning.aim(cond, target)
        return dit.apply_measuring(self.cfg, params, x, t, cond, self.place)

    def kept_outputs(self, images: int, tokens: int) -> dict:
        """Zeros in the shapes of what `apply_reusing` keeps."""
        return dit.kept_outputs(self.cfg, images, tokens)

    @property
    def forward_mode(self) -> "Model":
        """The same model by operations that have forward-mode derivatives: cuDNN's attention has none."""
        return dataclasses.replace(self, cfg=dataclasses.replace(self.cfg, attention="xla"))

    def null(self, cond) -> dict:
        """Null condition in the shapes of `cond`."""
        return conditioning.null(self.cfg, cond)

    def drop(self, key: jax.Array, cond, rate: float) -> dict:
        """Replaces each image's condition by the null condition with probability `rate`."""
        return conditioning.drop(self.cfg, key, cond, rate)

    def draw(self, rule: str, keys: jax.Array, indices: jax.Array, wanted: Mapping) -> dict:
        """Draws `cond` for samples `indices` (b,); see `conditioning.draw`."""
        return conditioning.draw(self.cfg, rule, keys, indices, wanted)

    @property
    def flops(self) -> int:
        """FLOPs of one forward pass of one image."""
        return flops.forward_flops(self.cfg)


def bind(cfg: ModelConfig, mesh=None, place: Callable = placer) -> Model:
    """Binds a model config to a mesh, with weights as `devices.mesh.spec` places them; None = whole on every device.

    `place`: (mesh, dtype) -> the function that lays out arrays in the model.
    """
    attention = attention_implementation(cfg.attention, cfg.dtype)
    return Model(
        dataclasses.replace(cfg, attention=attention), place(mesh, cfg.dtype) if mesh is not None else as_it_is
    )


def bind_to_draw(cfg: ModelConfig, mesh, mode: str = "") -> tuple[Model, dict]:
    """Model for drawing and scoring, and the places of its weights on the mesh, on which results do not depend.

    `mode`: of `sample.quantize`, by which the weights are quantised.
    """
    found = bind(cfg, mesh if splits_weights(mesh) else None, gatherer)
    return found, state_sharding(mesh, weight_shapes(cfg, mode))


def weight_shapes(cfg: ModelConfig, mode: str = "") -> dict:
    """Abstract weights of a model, quantised by `mode` of `sample.quantize`."""
    params = jax.eval_shape(lambda: dit.init(cfg, random_key(0)))
    return (
        jax.eval_shape(functools.partial(quantize.quantize, ranges=quantize.nothing(params, mode)), params)
        if mode
        else params
    )
