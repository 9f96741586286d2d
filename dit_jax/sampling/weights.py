"""The weights that images are drawn from: a checkpoint's EMA, its raw ones, or an average made of the run's snapshots."""

import functools
import hashlib

import jax
import numpy as np

from dit_jax import checkpoint
from dit_jax.checkpoint.average import load_average
from dit_jax.config import Config, SampleConfig
from dit_jax.devices.processes import host_copy
from dit_jax.devices.rows import on_mesh


def load_weights(cfg: Config, workdir: str, step: int, mesh) -> tuple[dict, dict]:
    """Load what `cfg.sample` names onto the mesh: (weights, what a record notes of them). Raises as `checkpoint.load` does."""
    place, sample = functools.partial(on_mesh, mesh), cfg.sample
    if not sample.ema:
        return checkpoint.load(workdir, step, sample.weights, cfg.model, place)[1], {}
    params, snapshots = load_average(workdir, step, sample.ema, cfg.model, place)
    return params, {"snapshots": snapshots}


def title(cfg: SampleConfig, notes: dict) -> str:
    """The weights in words, such as "ema 0.08, of 12 snapshots"."""
    return f"{cfg.weights} {cfg.ema:g}, of {notes['snapshots']} snapshots" if cfg.ema else cfg.weights


def weights_hash(params) -> str:
    """SHA-256 over the path, shape, dtype and bytes of every leaf, which are on the host one at a time."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(host_copy(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {np.shape(leaf)}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()
