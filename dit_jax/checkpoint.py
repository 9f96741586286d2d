"""Checkpoints in `W/checkpoints/<step>/`: one atomic Orbax commit of params, ema, opt, data (position) and meta.

params, ema   nested dicts of float32 arrays       data   JSON, the position of the data iterator
opt           the optimizer's state                meta   JSON, what the run was: step, versions, model config
"""

import os

import jax
import orbax.checkpoint as ocp

from dit_jax.command import read_config
from dit_jax.config import ModelConfig, UsageError
from dit_jax.mesh import on_one_device
from dit_jax.models import dit
from dit_jax.state import TrainState, restored_state

ITEMS = ("params", "ema", "opt", "data", "meta")


def folder(workdir: str) -> str:
    """Where a run keeps its checkpoints."""
    return os.path.join(os.path.abspath(workdir), "checkpoints")


def open_manager(workdir: str, keep: int | None = None) -> ocp.CheckpointManager:
    """The checkpoints of one's own run, saved in the background; `keep` newest ones stay (None: all). Close it when done.

    It removes what an earlier process left half-written, so only the process that trains may open it.
    """
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True, create=True
    )
    return ocp.CheckpointManager(folder(workdir), item_names=ITEMS, options=options)


def save(manager: ocp.CheckpointManager, state: TrainState, position: dict, meta: dict) -> None:
    """Start an asynchronous save of everything that a resumed run needs."""
    step = int(state.step)
    arrays = {name: ocp.args.StandardSave(tree) for name, tree in state.items().items()}
    values = {"data": ocp.args.JsonSave(position), "meta": ocp.args.JsonSave({**meta, "step": step})}
    manager.save(step, args=ocp.args.Composite(**arrays, **values))


def restore(manager: ocp.CheckpointManager, step: int, like: TrainState) -> tuple[TrainState, dict]:
    """The state, laid out as the abstract state `like` says, and the position of the data iterator."""
    arrays = {name: ocp.args.StandardRestore(tree) for name, tree in like.items().items()}
    found = manager.restore(step, args=ocp.args.Composite(**arrays, data=ocp.args.JsonRestore()))
    state = restored_state(step, {name: found[name] for name in arrays})
    return state, found["data"]


def steps(workdir: str) -> list[int]:
    """Steps of the complete checkpoints on disk, ascending."""
    root = folder(workdir)
    return sorted(ocp.utils.checkpoint_steps(root)) if os.path.isdir(root) else []


def load(workdir: str, step: int | None = None, item: str = "ema") -> tuple[ModelConfig, dict]:
    """(model config, weights) of a run: `item` is "ema" or "params" (raw); `step` None takes the newest checkpoint.

    Raises UsageError when the run or the checkpoint is missing.
    """
    cfg = read_config(workdir)
    step = find_step(workdir, step)
    if item not in ("ema", "params"):
        raise UsageError(f"item: found {item!r}, expected 'ema' or 'params'")
    like = on_one_device(jax.eval_shape(lambda: dit.init(cfg.model, jax.random.key(0))))
    with ocp.StandardCheckpointer() as reader:  # not a manager: the run may be training, so nothing is touched
        return cfg.model, reader.restore(os.path.join(folder(workdir), str(step), item), like)


def find_step(workdir: str, step: int | None = None) -> int:
    """`step`, or the newest one; UsageError when it is not there."""
    found = steps(workdir)
    if not found:
        raise UsageError(f"{folder(workdir)}: found no checkpoint, expected one; train the run first")
    if step is None:
        return found[-1]
    if step not in found:
        raise UsageError(f"{folder(workdir)}: found no checkpoint of step {step}, expected one of {found}")
    return step
