"""Denoisers of a bound model for samplers: plain, guided, with outputs of blocks that are reused from call to call, or measuring."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

from dit_jax.bind import Model
from dit_jax.config import SampleConfig
from dit_jax.diffusion import guidance
from dit_jax.diffusion.process import denoiser
from dit_jax.diffusion.reuse import Recurrent
from dit_jax.diffusion.task import Task
from dit_jax.flops import tokens
from dit_jax.models.quantize import nothing

NOTHING: Mapping = MappingProxyType({})


def make_denoiser(
    model: Model, task: Task, cfg: SampleConfig, params, cond, asked: Mapping = NOTHING, weaker: Callable | None = None
) -> Callable:
    """Denoiser (x, t) for a sampler, of a flow map (x, t, target time): plain at guidance 1, else guided within `cfg.interval`.

    Both halves are one batch.

    `asked`: see `prompt.Asked.rows`; its captions `negative` take the place of the null condition's. `weaker`: denoiser of another model,
    which takes the place of the unconditional half.
    """

    def apply(x, t, cond, *target):
        return denoiser(task.process, lambda x, t, *target: model.apply(params, x, t, cond, *target))(x, t, *target)

    kinds = _kinds(model, cfg, apply, cond, asked, weaker)
    if len(kinds) == 1:
        return next(iter(kinds.values()))
    return guidance.within(kinds["guided"], kinds["plain"], *cfg.interval)


def _kinds(
    model: Model, cfg: SampleConfig, apply: Callable, cond, asked: Mapping, weaker: Callable | None = None
) -> dict[str, Callable]:
    """The denoisers "plain" and "guided" of `apply(x, t, cond)`; those that the settings ever call."""
    plain = {"plain": lambda x, t, *target: apply(x, t, cond, *target)}
    if cfg.guidance == 1.0:
        return plain
    channels = model.cfg.channels if cfg.channels == "all" else min(3, model.cfg.channels)
    if weaker:
        pair = guidance.beside(plain["plain"], weaker)
    else:
        pair = guidance.paired(apply, cond, _null(model, cond, asked))
    guided = {"guided": guidance.guided(pair, cfg.guidance, channels, cfg.rescale)}
    return guided if cfg.interval == (0.0, 1.0) else plain | guided


def _null(model: Model, cond, asked: Mapping) -> dict:
    """Null condition, with the captions `negative` of the images that have one."""
    null = model.null(cond)
    if "negative" in asked:
        has = asked["has_negative"]
        instead = lambda new, old: jnp.where(has.reshape(-1, *[1] * (old.ndim - 1)), new, old)  # noqa: E731
        null["text"] = jax.tree.map(instead, asked["negative"], null["text"])
    return null


def make_reusing(
    model: Model,
    task: Task,
    cfg: SampleConfig,
    params,
    cond,
    asked: Mapping,
    shape: tuple,
    fresh: Mapping,
    measure: bool = False,
) -> Recurrent:
    """As `make_denoiser`, but in call i the part p of layer l computes only where `fresh[p][i, l]`; else it reuses its last output.

    Images are (b, h, w, c) = `shape`. Guided and plain calls keep outputs of their own. With `measure`, what it keeps has also `changes`,
    {p: (calls, l, 2)}: sums of squares of the difference of an output from the one kept, and of the output.
    """

    def branch(kind: str) -> Callable:
        def run(outputs, now, x, *times):
            made = []

            def apply(x, t, cond, *target):
                def network(x, t, *target):
                    out, new = model.apply_reusing(params, x, t, cond, outputs[kind], now, *target)
                    made.append(new)
                    return out

                return denoiser(task.process, network)(x, t, *target)

            out = _kinds(model, cfg, apply, cond, asked)[kind](x, *times)
            return out, {**outputs, kind: made[0]}, _changes(outputs[kind], made[0]) if measure else {}

        return run

    def call(kept, x, t, *target):
        now = {part: rows[kept["call"]] for part, rows in fresh.items()}
        if len(kinds) == 1:
            out, outputs, found = branch(kinds[0])(kept["outputs"], now, x, t, *target)
        else:
            low, high = cfg.interval
            inside = (t[0] >= low) & (t[0] <= high)
            kept_and_new = (kept["outputs"], now, x, t, *target)
            out, outputs, found = jax.lax.cond(inside, branch("guided"), branch("plain"), *kept_and_new)
        changes = {part: rows.at[kept["call"]].set(found[part]) for part, rows in kept["changes"].items()}
        return out, {"call": kept["call"] + 1, "outputs": outputs, "changes": changes}

    kinds = [*_kinds(model, cfg, model.apply, cond, asked)]
    count = tokens(model.cfg, shape[1:3])
    outputs = {kind: model.kept_outputs(shape[0] * (2 if kind == "guided" else 1), count) for kind in kinds}
    changes = {part: jnp.zeros((*rows.shape, 2)) for part, rows in fresh.items()} if measure else {}
    return Recurrent(call, {"call": jnp.int32(0), "outputs": outputs, "changes": changes})


def make_measuring(model: Model, task: Task, cfg: SampleConfig, params, cond, asked: Mapping) -> Recurrent:
    """As `make_denoiser`; it keeps the largest magnitude of the inputs of each product in the blocks, {product: (l,)}, of all calls."""

    def branch(kind: str) -> Callable:
        def run(ranges, x, *times):
            found = []

            def apply(x, t, cond, *target):
                def network(x, t, *target):
                    out, new = model.apply_measuring(params, x, t, cond, *target)
                    found.append(new)
                    return out

                return denoiser(task.process, network)(x, t, *target)

            out = _kinds(model, cfg, apply, cond, asked)[kind](x, *times)
            return out, jax.tree.map(jnp.maximum, ranges, found[0])

        return run

    def call(ranges, x, t, *target):
        if len(kinds) == 1:
            return branch(kinds[0])(ranges, x, t, *target)
        low, high = cfg.interval
        inside = (t[0] >= low) & (t[0] <= high)
        return jax.lax.cond(inside, branch("guided"), branch("plain"), ranges, x, t, *target)

    kinds = [*_kinds(model, cfg, model.apply, cond, asked)]
    return Recurrent(call, nothing(params, "int8"))


def _changes(before: Mapping, after: Mapping) -> dict:
    """{part: (l, 2)}: sums of squares of the differences, and of the outputs after, over all but the layers."""

    def squares(trees) -> jax.Array:
        leaves = [jnp.square(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(trees)]
        return sum(leaf.sum(axis=tuple(range(1, leaf.ndim))) for leaf in leaves)

    differences = jax.tree.map(lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32), after, before)
    return {part: jnp.stack([squares(differences[part]), squares(after[part])], axis=-1) for part in after}
