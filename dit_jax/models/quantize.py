"""int8 weights in the blocks, with a scale for each output channel, and int8 inputs of the MLP, with one for each product and layer.

    y_j = (sum_i round(x_i / a) round(W_ij / s_j)) (a s_j) + b_j,   a = max |x| / 127,   s_j = max_i |W_ij| / 127

(Jacob et al. 2018, arXiv 1712.05877, sections 2.1 and 2.2, with zero points of 0.) Sums are exact, in int32. Quantised weights are a tree
like the model's, in which a product has an int8 `kernel` (l, *in, *out), its `scale` and, if its inputs are quantised too, `input`; the
model takes either tree. Norms, attention, modulation's arithmetic, embeddings and the output layer stay in the model's dtype.
"""

import contextlib
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.models.kernels import keep
from dit_jax.models.layers import Parts

LEVELS = 127  # -128 is not used, so that the levels are symmetric
INPUTS = {
    "qkv": 1,
    "q": 1,
    "kv": 1,
    "proj": 2,
    "fc1": 1,
    "fc2": 1,
    "linear": 1,
}  # product of a block -> input axes of its kernel
LEVELLED = (
    "fc1",
    "fc2",
)  # products of int8 inputs: the MLP's; of others the TPU compiler gains nothing, see docs/performance.md
Dense = (nn.Dense, nn.DenseGeneral, Parts)


def quantize_kernel(kernel: jax.Array, inputs: int) -> tuple[jax.Array, jax.Array]:
    """int8 kernel (l, *in, *out) and float32 scales (l, *out), with kernel close to their product. `inputs`: number of axes `in`.

    Each weight is off by at most half a scale. A channel of zeros has scale 1.
    """
    axes = tuple(range(1, 1 + inputs))
    most = jnp.abs(kernel).max(axis=axes, keepdims=True)
    scale = jnp.where(most > 0, most / LEVELS, 1.0)
    return jnp.round(kernel / scale).astype(jnp.int8), scale.squeeze(axes)


def quantize(params: Mapping, ranges: Mapping | None) -> dict:
    """Weights with int8 kernels in the blocks. `ranges`: {product: largest magnitude of its inputs (l,)}, see `ranges_of`; None: inputs
    are not quantised. All other weights are the same arrays."""

    def walk(tree: Mapping, path: tuple) -> dict:
        name = path[-1] if path else ""
        if name not in INPUTS or "kernel" not in tree:
            return {k: walk(v, (*path, k)) if isinstance(v, Mapping) else v for k, v in tree.items()}
        kernel, scale = quantize_kernel(tree["kernel"], INPUTS[name])
        if ranges is None or name not in LEVELLED:
            return {**tree, "kernel": kernel, "scale": scale}
        most = jnp.asarray(ranges["/".join(path)], jnp.float32)
        step = jnp.where(most > 0, most / LEVELS, 1.0)
        scale = scale * step.reshape(-1, *[1] * (scale.ndim - 1))
        return {**tree, "kernel": kernel, "scale": scale, "input": 1 / step}

    return {**params, "blocks": walk(params["blocks"], ())}


def is_quantized(params: Mapping) -> bool:
    """Whether a tree of weights has int8 kernels."""
    return any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(params["blocks"]))


def enter(weights: Mapping, x: jax.Array, dtype) -> jax.Array:
    """Inputs as a product takes them: in int8 levels, if it has a scale for them, else in `dtype`.

    They are computed once, before the product, so that the TPU compiler does not make one operation of both products of an MLP.
    """
    if "input" not in weights:
        return x.astype(dtype)
    x = jnp.clip(jnp.round(x.astype(jnp.float32) * weights["input"]), -LEVELS, LEVELS).astype(jnp.int8)
    return jax.lax.optimization_barrier(x)


def product(weights: Mapping, x: jax.Array, dtype) -> jax.Array:
    """Linear map of x (b, ..., *in), as by `enter`, by the quantised weights of one layer, `kernel` (*in, *out) -> (b, ..., *out)."""
    kernel, scale = weights["kernel"], weights["scale"]
    inputs = kernel.ndim - scale.ndim
    axes = (tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs)))
    if "input" in weights:
        out = jax.lax.dot_general(x, kernel, (axes, ((), ())), preferred_element_type=jnp.int32)
    else:
        out = jax.lax.dot_general(x, kernel.astype(dtype), (axes, ((), ())), preferred_element_type=jnp.float32)
    lead = (None,) * (out.ndim - scale.ndim)
    return (out.astype(jnp.float32) * scale[lead] + weights["bias"].astype(jnp.float32)[lead]).astype(dtype)


def _parts(weights: Mapping, x: jax.Array, dtype) -> tuple:
    """The product of a `Parts`: one for each part."""

    def part(i: int) -> dict:
        return {**weights, "kernel": weights["kernel"][:, i], **{k: weights[k][i] for k in ("scale", "bias")}}

    return tuple(keep(product(part(i), x, dtype)) for i in range(weights["bias"].shape[0]))


def _instead(call, arguments, keywords, context):
    """Takes the place of the call of a product whose weights are quantised."""
    module = context.module
    if context.method_name != "__call__" or not isinstance(module, Dense) or not module.has_variable("params", "scale"):
        return call(*arguments, **keywords)
    names = [name for name in ("kernel", "scale", "bias", "input") if module.has_variable("params", name)]
    weights = {name: module.get_variable("params", name) for name in names}
    x = enter(weights, *arguments, module.dtype)
    return (_parts if isinstance(module, Parts) else product)(weights, x, module.dtype)


def by_kernels(params: Mapping):
    """Context in which a model computes with its int8 kernels, if the weights have them."""
    return nn.intercept_methods(_instead) if is_quantized(params) else contextlib.nullcontext()


def _measured(call, arguments, keywords, context):
    """Takes the place of the call of a product in a block: notes the largest magnitude of its inputs, if these can be int8."""
    module = context.module
    if context.method_name == "__call__" and module.name in LEVELLED and module.path[0] == "blocks":
        module.sow("intermediates", "range", jnp.abs(arguments[0].astype(jnp.float32)).max())
    return call(*arguments, **keywords)


def measuring():
    """Context in which a model notes the ranges of its products' inputs, for `ranges_of`."""
    return nn.intercept_methods(_measured)


def products(params: Mapping) -> list[str]:
    """Paths in a block of the products whose inputs can be quantised, such as "attention/qkv"."""
    paths = jax.tree_util.tree_flatten_with_path(params["blocks"])[0]
    names = [tuple(part.key for part in path) for path, _ in paths]
    return ["/".join(n[:-1]) for n in names if n[-1] == "kernel" and n[-2] in LEVELLED]


def ranges_of(noted: Mapping, params: Mapping) -> dict:
    """{product: largest magnitude of its inputs (l,)} from what a call noted in "intermediates" of the blocks."""

    def at(path: str):
        found = noted
        for name in path.split("/"):
            found = found[name]
        return found["range"][0]

    return {path: at(path) for path in products(params)}


def nothing(params: Mapping, mode: str) -> dict | None:
    """Ranges of zeros for the weights of a model, abstract or not; None for a mode that quantises weights only."""
    layers = jax.tree.leaves(params["blocks"])[0].shape[0]
    return {path: jnp.zeros(layers) for path in products(params)} if mode == "int8" else None
