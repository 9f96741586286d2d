"""`sample.reuse`: the plan of which outputs of blocks are computed in which call of the model, from a calibration of the checkpoint.

The calibration draws a few images, all outputs computed, and measures by how much each output changes from call to call. It is saved as
`W/reuse/<step>-<id>.json`, the id being that of all that it depends on, so that every share of the same sampling has the same plan later.
"""

import dataclasses
import hashlib
import os
from dataclasses import dataclass

import numpy as np

from dit_jax.config import Config
from dit_jax.devices.processes import by_leader
from dit_jax.diffusion.reuse import plan
from dit_jax.diffusion.task import Task
from dit_jax.error import UsageError
from dit_jax.files import is_file, json_text, make_folder, read_json, write_file
from dit_jax.flops import part_macs
from dit_jax.log import say
from dit_jax.workdir.records import protocol_id

FOLDER = "reuse"  # in a run's folder
IMAGES, SEED = 32, 0  # of a calibration
RULE = f"summed changes, {IMAGES} images, seed {SEED}"


@dataclass(frozen=True)
class Plan:
    """Which outputs are computed: {part: bool (calls, layers)}."""

    fresh: dict

    @property
    def everything(self) -> bool:
        return all(rows.all() for rows in self.fresh.values())

    @property
    def share(self) -> float:
        """Share of the outputs that is computed."""
        return float(np.mean([rows.mean() for rows in self.fresh.values()]))

    @property
    def sha256(self) -> str:
        rows = [np.packbits(self.fresh[part]).tobytes() for part in sorted(self.fresh)]
        return hashlib.sha256(b"".join(rows)).hexdigest()

    def describe(self) -> dict:
        """What a record notes: the share of outputs computed, by part, and the plan's SHA-256."""
        shares = {part: round(float(rows.mean()), 4) for part, rows in self.fresh.items()}
        return {"computed": shares, "sha256": self.sha256}


def passes(cfg: Config, task: Task) -> np.ndarray:
    """Forward passes of an image in each call of the denoiser (calls,): 2 with guidance, else 1."""
    calls = task.evaluations.astype(np.float32)  # as the program compares them
    low, high = np.float32(cfg.sample.interval)
    return np.where((cfg.sample.guidance != 1.0) & (calls >= low) & (calls <= high), 2, 1)


def make_plan(cfg: Config, task: Task, changes: dict, size) -> Plan:
    """Plan for `sample.reuse` from relative changes {part: (calls, layers)}. `size`: (h, w) of the output.

    The first call computes all outputs, and so does one with other guidance than the call before, since it has other outputs.
    """
    macs, each = part_macs(cfg.model, size), passes(cfg, task)
    forced = np.append(True, np.diff(each) != 0)
    stacked = np.stack([np.asarray(changes[part], np.float64) for part in macs], axis=-1)
    found = plan(stacked, forced, np.outer(each, [*macs.values()]), cfg.sample.reuse)
    return Plan({part: found[..., i] for i, part in enumerate(macs)})


def even_plan(cfg: Config, task: Task, size=None) -> Plan:
    """Plan for `sample.reuse` without a calibration, as if every layer changed at a steady rate of its own.

    The sampler's program is the same for every plan, and this one costs about as much as a calibrated one: at most the share asked for.
    """
    steady = np.tile(np.linspace(0.5, 1.5, cfg.model.depth), (len(task.evaluations), 1))
    return make_plan(cfg, task, dict.fromkeys(part_macs(cfg.model, size), steady), size)


def saved(workdir: str, step: int, identity: str, shape: tuple) -> dict | None:
    """Read the changes of a calibration, {part: (calls, layers)} of `shape`; None if there is none. Raises UsageError if it is damaged."""
    path = _path(workdir, step, identity)
    if not is_file(path):
        return None
    found = read_json(path).get("changes")
    sound = isinstance(found, dict) and all(np.shape(rows) == shape for rows in found.values())
    if not sound or not all(isinstance(v, float) and v >= 0 for rows in found.values() for row in rows for v in row):
        raise UsageError(
            f"{path}: damaged, expected changes of {shape[0]} calls and {shape[1]} layers; remove it to calibrate anew"
        )
    return found


def save(workdir: str, step: int, identity: str, job: dict, changes: dict) -> None:
    """Write a calibration whole."""
    make_folder(os.path.join(workdir, FOLDER))
    write_file(
        _path(workdir, step, identity), json_text({"job": job, "rule": RULE, "changes": changes}, indent=1) + "\n"
    )


def _path(workdir: str, step: int, identity: str) -> str:
    return os.path.join(workdir, FOLDER, f"{step}-{identity}.json")


def with_reuse(sampling, params, sha256: str, workdir: str, step: int):
    """Return the `Sampling` with the plan for the weights of a run's step, calibrated now unless that is saved; unchanged without reuse.

    All processes of the mesh call it.
    """
    if sampling.cfg.sample.reuse == 1.0:
        return sampling
    job = dataclasses.replace(sampling, plan=None).describe(sha256, step, SEED)
    del job["sample.reuse"]
    identity, shape = protocol_id(job), (len(sampling.task.evaluations), sampling.cfg.model.depth)
    changes = by_leader(lambda: saved(workdir, step, identity, shape))
    if changes is None:
        say(f"reuse: calibrating with {IMAGES} images of step {step}")
        changes = {part: rows.tolist() for part, rows in sampling.changes(params, IMAGES, SEED).items()}
        by_leader(lambda: save(workdir, step, identity, job, changes))
    return dataclasses.replace(sampling, plan=make_plan(sampling.cfg, sampling.task, changes, sampling.inner))
