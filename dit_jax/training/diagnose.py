"""Finds the layer that a bad step comes from, once, when a run stops because of its numbers."""

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.bind import bind
from dit_jax.config import Config
from dit_jax.diffusion.objective import make_objective
from dit_jax.models import dit
from dit_jax.networks.autoencoder import StepEncoder
from dit_jax.training.state import TrainState
from dit_jax.training.step import gradients, step_key


def find_layer(cfg: Config, state: TrainState, batch: dict, encoder: StepEncoder = StepEncoder()) -> str:
    """Returns a clause that names the layer at fault in the last, skipped step. `state`: after that step; `batch`: its batch.

    It names the first layer whose output is not finite; else the last whose gradient is not finite, because the backward pass
    reaches it first; else the layer with the largest gradient.
    """
    names: list[str] = []

    model, objective = bind(cfg.model), make_objective(cfg)
    process, encoded = objective.process, {name for weights in encoder.weights for name in weights}

    def known(points: dict) -> dict:
        """Outputs of the encoders that a step may have, by the name of their weights."""
        states = points["cond"]["text"]["states"] if model.cfg.encoded else None
        return {"encoder": ("the encoder", points["x"]), "text_encoder": ("the text encoder", states)}

    def examine(params, extras, batch, *weights):
        points = objective.draw(model, step_key(cfg, state.step - 1), encoder.apply(batch, *weights))
        noisy, t = process.noise(points["x"], points["t"], points["eps"]), process.model_time(points["t"])
        outputs = dit.activations(model.cfg, params, noisy, t, points["cond"])
        outputs = [found for name, found in known(points).items() if name in encoded] + outputs
        names.extend(name for name, _ in outputs)
        _, grads = gradients(objective, model, params, extras, points, cfg.optim.accumulate)
        return [jnp.isfinite(x).all() for _, x in outputs], jax.tree_util.tree_map_with_path(_norms, grads)

    try:
        finite, norms = jax.device_get(jax.jit(examine)(state.params, state.extras, batch, *encoder.weights))
    except jax.errors.JaxRuntimeError as error:  # it keeps every layer's output and may run out of memory
        return f"which layer it is could not be found ({str(error).splitlines()[0][:100]})"
    for name, good in zip(names, finite, strict=True):
        if not good:
            return f"the first output that is not finite is that of {name}"
    return _gradient_clause(norms)


def _norms(path: tuple, grad: jax.Array) -> jax.Array:
    """Norm of a leaf; one per layer if the leaf stacks the blocks."""
    axes = tuple(range(1 if _blocks(path) else 0, grad.ndim))
    return jnp.sqrt(jnp.square(grad).sum(axes))


def _blocks(path: tuple) -> bool:
    return getattr(path[0], "key", "") == "blocks"


def _gradient_clause(norms) -> str:
    rows = []
    for path, values in jax.tree_util.tree_flatten_with_path(norms)[0]:
        keys = [part.key for part in path]
        for layer, value in enumerate(np.atleast_1d(values)):
            name = f"{keys[0]}[{layer}]" if _blocks(path) else keys[0]
            depth = {"output": 10**6}.get(keys[0], layer if _blocks(path) else -1)
            rows.append((depth, "/".join([name, *keys[1:]]), float(value)))
    bad = [row for row in rows if not np.isfinite(row[2])]
    if bad:
        return f"the outputs are finite, the gradients are not, from {max(bad)[1]} backwards"
    largest = max(rows, key=lambda row: row[2])
    return f"all numbers are finite now; the largest gradient is that of {largest[1]} (norm {largest[2]:.3g})"
