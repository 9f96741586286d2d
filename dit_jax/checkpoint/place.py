"""Folders of a run's checkpoints and snapshots, by step, and the names that unfinished, removed and damaged ones have."""

import os

from dit_jax.files import absolute, exists, is_file, names
from dit_jax.workdir import manifest

CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"  # folders of a run
SAVING, REMOVING, DAMAGED = ".saving", ".removing", ".damaged"


def folder(workdir: str, kind: str = CHECKPOINTS) -> str:
    """Return the folder of a run's checkpoints, or of its snapshots."""
    return os.path.join(absolute(workdir), kind)


def path_of(workdir: str, step: int, kind: str = CHECKPOINTS) -> str:
    return os.path.join(folder(workdir, kind), str(step))


def steps(workdir: str, kind: str = CHECKPOINTS) -> list[int]:
    """List the steps of the checkpoints on disk (folders with a manifest), ascending; contents are verified when read."""
    root = folder(workdir, kind)
    found = [name for name in names(root) if name.isdecimal()]
    return sorted(int(name) for name in found if is_file(os.path.join(root, name, manifest.NAME)))


def free_name(path: str) -> str:
    """Return `path`, or if it exists the first of path-2, path-3, ... that does not."""
    count, name = 1, path
    while exists(name):
        count, name = count + 1, f"{path}-{count + 1}"
    return name
