"""Checkpoints in `W/checkpoints/<step>/`: Orbax items params, ema, opt, extras, tracks, data, meta, and a manifest of checksums.

params, ema   nested dicts of float32 arrays           data   JSON, the position of the data iterator
opt           the optimizer's state and the guard's    meta   JSON, what the run was: step, versions, model config

A save goes to `<step>.saving/`. Once all of it is on the disk, its files are read back and hashed, and the folder is
renamed; only then is it a checkpoint. Older ones are pruned after that, and only if the newest verifies. A folder that
does not verify is never restored; training sets it aside as `<step>.damaged`. In a bucket, which renames nothing, a save goes to
`<step>/` itself and the manifest, written last, makes it a checkpoint.
"""

import os
import shutil
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dit_jax.checkpoint.arrays import check_tree, few, frugal, in_chunks, leaves, told_to_others
from dit_jax.checkpoint.place import DAMAGED, SAVING, folder, free_name, path_of, steps
from dit_jax.checkpoint.saver import Saver, cause, prune, publish, stays
from dit_jax.config import ModelConfig, to_dict
from dit_jax.devices.memory import freed_at_once
from dit_jax.devices.mesh import on_one_device
from dit_jax.devices.numerics import check_numerics, random_key
from dit_jax.devices.processes import agreed, by_leader
from dit_jax.error import JobError, StorageError, UsageError
from dit_jax.files import LARGEST, is_folder, make_folder, names, parse_json, read, rename, slow
from dit_jax.log import warn
from dit_jax.models import dit
from dit_jax.workdir import manifest
from dit_jax.workdir.folder import read_config

__all__ = ("Saver", "folder", "path_of", "prune", "publish", "stays", "steps")  # of the files below
# Keys of the model config that change how it is computed, not what.
FREE = ("remat", "unroll", "attention", "text_encoder")


def newest_verified(workdir: str) -> int:
    """Return the newest step whose checkpoint verifies, the same on all processes; 0 for a new run.

    Newer checkpoints that do not verify are logged and set aside. Raises JobError, and moves nothing, if there are
    checkpoints but none verifies; OSError if they cannot be read now.
    """
    step = _newest_verified(workdir) if jax.process_index() == 0 else 0
    if jax.process_count() > 1:
        step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
    return step


def restore(workdir: str, step: int, like: dict, model: ModelConfig) -> tuple[dict, dict]:
    """Read a checkpoint: (items laid out as the abstract arrays in `like`, position of the data iterator).

    Each process reads the parts that its devices keep, a few at a time: its peak of host memory is at most 1.2 times those
    parts on CPU devices, whose memory is the host's, and 0.2 times on others. Raises UsageError naming keys or leaves if the
    checkpoint is another model's.
    """
    at = path_of(workdir, step)
    check_model(at, model)
    with slow(at, "restoring"), freed_at_once():
        stored = {name: check_tree(at, name, tree) for name, tree in like.items()}
        arguments = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
        with _reader(ocp.CompositeCheckpointHandler(**dict.fromkeys(like, frugal(stored, like)))) as reader:
            found = reader.restore(at, args=ocp.args.Composite(**arguments))
    return {name: found[name] for name in like}, _read_values(at, "data")


def load(
    workdir: str,
    step: int | None = None,
    item: str = "ema",
    model: ModelConfig | None = None,
    place: Callable = on_one_device,
) -> tuple[ModelConfig, dict]:
    """Load (model config, weights) of a run. `item`: "ema" or "params" (raw). `step` None: the newest that verifies.

    `model`: the expected model config, by default the run's own. `place`: shapes -> the same with shardings. Damaged checkpoints
    that are skipped are logged. All processes of a job call it; one verifies. Raises UsageError if the run or the checkpoint is
    missing or another model's, JobError if it is damaged.
    """
    if item not in ("ema", "params"):
        raise UsageError(f"item: found {item!r}, expected 'ema' or 'params'")
    check_numerics()
    model = model or read_config(workdir).model
    at = path_of(workdir, by_leader(lambda: find_step(workdir, step, item)))
    check_model(at, model)
    like = place(abstract_weights(model))
    return model, read_item(at, item, like)


def abstract_weights(model: ModelConfig) -> dict:
    """Return the shapes of a model's weights."""
    return jax.eval_shape(lambda: dit.init(model, random_key(0)))


def read_item(at: str, item: str, like: dict) -> dict:
    """Read an item of the folder `at`, laid out as the abstract arrays `like`; all processes call it. Raises as `load` does."""
    with agreed(), slow(at, "reading"), freed_at_once(), told_to_others(at):
        stored = check_tree(at, item, like)
        with _reader(frugal({item: stored}, {item: like})) as reader:
            return reader.restore(os.path.join(at, item), like)


def find_step(workdir: str, step: int | None = None, item: str = "") -> int:
    """Return `step`, by default the newest whose `item` ("" = all) verifies. UsageError if missing, JobError if damaged."""
    found = steps(workdir)
    if not found:
        raise UsageError(f"{folder(workdir)}: found no checkpoint, expected one; train the run first")
    if step is not None and step not in found:
        raise UsageError(f"{folder(workdir)}: found no checkpoint of step {step}, expected one of {found}")
    for candidate in reversed(found if step is None else [step]):
        wrong = manifest.problems(path_of(workdir, candidate), (f"{item}/", "meta/") if item else ("",))
        if not wrong:
            return candidate
        if step is not None:
            raise JobError(f"{path_of(workdir, step)}: damaged ({few(wrong)}); verified ones may be among {found}")
        warn(f"{path_of(workdir, candidate)} is damaged ({few(wrong)}); falling back to an older checkpoint")
    raise JobError(f"{folder(workdir)}: none of the checkpoints {found} verifies; restore the folder from a copy")


def write_weights(workdir: str, step: int, model: ModelConfig, params: dict, meta: dict) -> None:
    """Write a checkpoint of weights only, `params` equal to `ema`: it can be sampled and evaluated, not trained on.

    `params`: NumPy or JAX arrays. Raises UsageError if their shapes are not those of `model`, JobError if writing fails.
    """
    wanted = leaves(abstract_weights(model))
    if leaves(params) != wanted:
        raise UsageError(f"{workdir}: the parameters' names or shapes are not those of the model")
    at = path_of(workdir, step)
    make_folder(folder(workdir))
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler("params", "meta")) as writer:
            notes = {"model": to_dict(model), **meta, "step": step}
            items = {"params": in_chunks(params), "meta": ocp.args.JsonSave(notes)}
            writer.save(at + SAVING, args=ocp.args.Composite(**items))
        shutil.copytree(os.path.join(at + SAVING, "params"), os.path.join(at + SAVING, "ema"))  # needs no memory
        publish(at + SAVING, at, ("params", "ema", "meta"))
    except Exception as error:
        raise JobError(f"{at}: the checkpoint could not be written ({cause(error)})") from error


def read_meta(workdir: str, step: int, item: str = "meta") -> dict:
    """Read a checkpoint's item of JSON values, "meta" or "data". Raises JobError if it is damaged."""
    return meta_of(path_of(workdir, step), item)


def meta_of(at: str, item: str = "meta") -> dict:
    """As `read_meta`, for the folder of a checkpoint or snapshot."""
    try:
        return _read_values(at, item)
    except StorageError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise JobError(f"{at}: its {item} cannot be read ({cause(error)}); restore the folder from a copy") from None


def _read_values(at: str, item: str) -> dict:
    """Read an item that Orbax wrote as JSON. Raises OSError or ValueError."""
    return dict(parse_json(read(os.path.join(at, item, "metadata"), LARGEST), LARGEST))


def trained_on(workdir: str, step: int) -> dict:
    """Return the identity of the data that a checkpoint was trained on; {} if only weights were converted."""
    trained = is_folder(os.path.join(path_of(workdir, step), "data"))
    return read_meta(workdir, step, "data").get("source", {}) if trained else {}


def check_trained(workdir: str) -> None:
    """Raises UsageError if the newest checkpoint holds weights only, so that training cannot resume."""
    found = steps(workdir)
    if found and not is_folder(os.path.join(path_of(workdir, found[-1]), "opt")):
        source = read_meta(workdir, found[-1]).get("source") or {}
        raise UsageError(
            f"{path_of(workdir, found[-1])}: holds weights only, converted from {source.get('file', 'a file')}, and no "
            f"state of an optimizer: this run can be sampled and evaluated, not trained on; begin a new one with --init={workdir}"
        )


def check_model(at: str, model: ModelConfig) -> None:
    """Raises UsageError naming the keys in which the checkpoint's model differs from `model`, JobError if its step is wrong."""
    meta = _read_values(at, "meta")
    if str(meta["step"]) != os.path.basename(at):
        raise JobError(f"{at}: the checkpoint is of step {meta['step']}; give the folder its name back")
    wanted, found = to_dict(model), to_dict(ModelConfig()) | meta["model"]  # older ones lack later keys
    keys = [key for key in {**wanted, **found} if key not in FREE and found.get(key) != wanted.get(key)]
    if keys:
        shown = "; ".join(f"model.{k}: found {found.get(k)!r}, expected {wanted.get(k)!r}" for k in keys[:4])
        raise UsageError(f"{at}: the checkpoint is of another model than the config: {shown}")


def _reader(handler: ocp.CheckpointHandler) -> ocp.Checkpointer:
    """Return Orbax's reader, without its own mark of a whole checkpoint in a bucket: copies from a disk lack it, and have a manifest."""
    return ocp.Checkpointer(handler, temporary_path_class=ocp.path.atomicity.AtomicRenameTemporaryPath)


def _newest_verified(workdir: str) -> int:
    root = folder(workdir)
    found = sorted((int(name) for name in names(root) if name.isdecimal()), reverse=True)
    problems: dict[int, list[str]] = {}
    for step in found:
        problems[step] = manifest.problems(path_of(workdir, step))
        if not problems[step]:
            break
    else:
        there = sorted(name for name in names(root) if name.isdecimal() or DAMAGED in name)
        if there:
            first = f" ({found[0]}: {few(problems[found[0]])})" if found else ""
            raise JobError(
                f"{root}: none of the checkpoints {', '.join(there)} verifies{first}; restore them from a copy, or use another "
                "--workdir to start from the first step"
            )
        return 0
    for damaged in found[: found.index(step)]:
        aside = free_name(path_of(workdir, damaged) + DAMAGED)
        at = path_of(workdir, damaged)
        warn(f"{at} is damaged ({few(problems[damaged])}); set aside as {os.path.basename(aside)}")
        rename(at, aside)
    return step
