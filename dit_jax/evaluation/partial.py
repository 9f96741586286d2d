"""Folders of unfinished sample metrics, `W/eval/partial/ID-STEP`: features of the images drawn so far (`sampling.parts.Store`)."""

import contextlib
import os
import re

from dit_jax.error import JobError
from dit_jax.files import delete_empty, names
from dit_jax.sampling import parts
from dit_jax.workdir.records import PARTIAL


def partial_folder(workdir: str, step: int, identity: str) -> str:
    """Folder for the features of an unfinished sample metric; `identity`: the protocol's id."""
    return os.path.join(workdir, PARTIAL, f"{identity}-{step}")


def drop_partials(workdir: str, done: set[tuple[int, str]], there: list[int]) -> None:
    """Removes the folders of recorded pairs (step, protocol id), `done`, and of steps that are not in `there`."""
    root = os.path.join(workdir, PARTIAL)
    for name in names(root):
        match = re.fullmatch(r"([0-9a-f]{16})-(\d+)", name)
        if match and ((int(match[2]), match[1]) in done or int(match[2]) not in there):
            with contextlib.suppress(JobError), parts.locked(os.path.join(root, name)):  # if used, its owner removes it
                parts.remove(os.path.join(root, name))
    delete_empty(root)  # unless others are unfinished
