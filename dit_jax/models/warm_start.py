"""Weights of one DiT as the start of another, whose labels, conditioning, input size, channels or patches may differ.

The patch embedding w of p x p patches becomes that of q x q by the pseudo-inverse of bilinear resizing B (Beyer et al. 2023, FlexiViT,
arXiv 2212.08013, "Resizing patch embeddings"): <B x, w'> = <x, w> for all patches x if q > p, in least squares if q < p. The output
layer's patches y become B y.

With another `time_scale` the first layer of a time's embedding is fitted to its old outputs at t from 0 to 1000, by ridge regression.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dit_jax import flops
from dit_jax.config import ModelConfig
from dit_jax.error import UsageError
from dit_jax.models.conditioning import timestep_frequencies

BODY = ("width", "depth", "heads", "mlp_ratio")  # sizes of the blocks, which have to agree
TABLE, TIME_BIAS = "label_embedding/table/embedding", "time_embedding/fc2/bias"
PLACES, EMBEDDING, LOW = "positions", "patch_embedding/kernel", "low_embedding/kernel"
OUTPUT = ("output/linear/kernel", "output/linear/bias")
SINUSOIDS = ("time_embedding/fc1/kernel", "target_embedding/fc1/kernel")
TAKEN, RESIZED, NEW = "taken", "resized", "new"


def check_body(old: ModelConfig, new: ModelConfig, where: str) -> None:
    """Raises UsageError naming the first of BODY in which `new` differs from `old`, the model of `where`."""
    for name in BODY:
        if (found := getattr(new, name)) != (expected := getattr(old, name)):
            raise UsageError(f"model.{name}: found {found}, expected {expected}, as the weights of {where} have")


@dataclass(frozen=True)
class WarmStart:
    """How weights of the model `old` start one of the model `new`.

    rows           for each class of `new` the class of `old` whose row of the label table it takes; None = a new row
    null_trained   whether the null row of `old` was trained
    """

    old: ModelConfig
    new: ModelConfig
    rows: tuple = ()
    null_trained: bool = True

    def kinds(self, fresh: Mapping, weights: Mapping) -> dict[str, str]:
        """Map the name of each array in `fresh`, with slashes, to TAKEN (bit for bit), RESIZED (in part or by a formula) or NEW.

        `fresh`: parameters of `new`; `weights`: those of `old`; arrays or their shapes.
        """
        stored, begun, changed = flatten_dict(weights, sep="/"), flatten_dict(fresh, sep="/"), self._changed()
        same = {name for name, leaf in begun.items() if name in stored and stored[name].shape == leaf.shape}
        return {name: RESIZED if name in changed else TAKEN if name in same else NEW for name in begun}

    def begin(self, fresh: dict, weights: dict) -> dict:
        """Initial weights of `new`, from `fresh` ones and from `weights` of `old`."""
        changed = self._changed()
        stored, begun = flatten_dict(weights, sep="/"), flatten_dict(fresh, sep="/")
        for name, kind in self.kinds(fresh, weights).items():
            if kind != NEW:
                begun[name] = stored[name] if kind == TAKEN else changed[name](stored, begun[name])
        return unflatten_dict(begun, sep="/")

    def _changed(self) -> dict[str, Callable]:
        """Map the name of an array to a function (arrays of `old`, fresh array) -> array."""
        old, new, found = self.old, self.new, {}
        labels = ["label" in flops.fields(cfg) for cfg in (old, new)]
        if all(labels) and self.rows != tuple(range(old.classes)):
            found[TABLE] = functools.partial(_take_rows, self.rows)
        if labels == [True, False] and old.adaptive and new.adaptive and self.null_trained:  # as without a label before
            found[TIME_BIAS] = lambda stored, fresh: stored[TIME_BIAS] + stored[TABLE][-1]
        if old.time_scale != new.time_scale:
            both = SINUSOIDS[: 2 if old.target == new.target == "all" else 1]
            found |= {
                name: functools.partial(_sinusoids, _refit(old.time_scale, new.time_scale), name) for name in both
            }
        sides = [cfg.input_size // cfg.patch for cfg in (old, new)]
        if old.positions == new.positions == "learned" and sides[0] != sides[1]:
            found[PLACES] = functools.partial(_places, *sides)
        parts = [cfg.out_channels // cfg.channels for cfg in (old, new)]
        by = _bilinear(old.patch, new.patch)
        if (old.patch, old.channels) != (new.patch, new.channels):
            for name in (EMBEDDING, LOW) if old.superres and new.superres else (EMBEDDING,):
                found[name] = functools.partial(_embedding, old, new, np.linalg.pinv(by.T), name)
        if EMBEDDING in found or parts[0] != parts[1]:
            ends = [(cfg.patch, part, cfg.channels) for cfg, part in zip((old, new), parts, strict=True)]
            found |= {name: functools.partial(_output, *ends, by, name) for name in OUTPUT}
        return found


def _take_rows(rows: Sequence, stored: Mapping, fresh):
    """Rows of the label table, with the null row last."""
    known = np.array([row is not None for row in rows] + [True])
    from_old = stored[TABLE][np.array([row or 0 for row in rows] + [len(stored[TABLE]) - 1])]
    return jnp.where(known[:, None], from_old, fresh)


def _refit(old: float, new: float) -> np.ndarray:
    """Matrix (f, f) from weights of sinusoids of `old` t to weights of sinusoids of `new` t that give about the same sums."""
    t, frequencies = np.linspace(0.0, 1000.0, 20_001)[:, None], timestep_frequencies(flops.TIME_FREQUENCIES)[None]
    before, after = (
        np.concatenate([np.cos(scale * t * frequencies), np.sin(scale * t * frequencies)], axis=1)
        for scale in (old, new)
    )
    return np.linalg.solve(after.T @ after + np.eye(after.shape[1]), after.T @ before)


def _sinusoids(by: np.ndarray, name: str, stored: Mapping, fresh):
    return jnp.dot(by.astype(np.float32), stored[name], precision=jax.lax.Precision.HIGHEST)


def _bilinear(p: int, q: int) -> np.ndarray:
    """Matrix (q, p) of bilinear resizing along one axis, with pixel centres at (i + 1/2) / p and edges repeated."""
    old, new = (np.arange(p) + 0.5) / p, (np.arange(q) + 0.5) / q
    return np.stack([np.interp(new, old, row) for row in np.eye(p)], axis=1)


def _places(p: int, q: int, stored: Mapping, fresh):
    """The table of learned positions of q x q patches from that of p x p, by bilinear resizing."""
    by = _bilinear(p, q).astype(np.float32)
    table = stored[PLACES].reshape(p, p, -1)
    return jnp.einsum("yi,xj,ijd->yxd", by, by, table, precision=jax.lax.Precision.HIGHEST).reshape(fresh.shape)


def _embedding(old: ModelConfig, new: ModelConfig, by: np.ndarray, name: str, stored: Mapping, fresh):
    ends = (old.patch, 1, old.channels), (new.patch, 1, new.channels)
    return _patches(*ends, by, stored[name].T, fresh.T).T


def _output(old: tuple, new: tuple, by: np.ndarray, name: str, stored: Mapping, fresh):
    return _patches(old, new, by, stored[name], fresh)


def _patches(old: tuple, new: tuple, by: np.ndarray, stored, fresh):
    """Arrays of patches (..., p p s c) in the shape of `fresh`: the parts s and channels c that both have are resized, others stay fresh.

    `old`, `new`: (p, s, c). Parts of the output are eps and the variance.
    """
    (p, a, b), (q, s, c) = old, new
    kept = stored.reshape(-1, p, p, a, b)[:, :, :, :s, :c]
    if p != q:
        by = by.astype(np.float32)
        kept = jnp.einsum("yi,xj,nijsc->nyxsc", by, by, kept, precision=jax.lax.Precision.HIGHEST)
    return jnp.asarray(fresh).reshape(-1, q, q, s, c).at[:, :, :, :a, :b].set(kept).reshape(fresh.shape)
