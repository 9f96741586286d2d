"""Folders of sample metrics under way, `W/eval/partial/ID-STEP`: features of the images drawn so far (`sampling.parts.Store`)."""

import contextlib
import os
import re

from dit_jax.error import JobError
from dit_jax.sampling import parts
from dit_jax.workdir.records import PARTIAL


def partial_folder(workdir: str, step: int, identity: str) -> str:
    """Where the features of an unfinished sample metric lie."""
    return os.path.join(workdir, PARTIAL, f"{identity}-{step}")


def drop_partials(workdir: str, done: set[tuple[int, str]], there: list[int]) -> None:
    """Remove the partials of the (step, protocol id) that are recorded, and of steps that are not among `there`."""
    root = os.path.join(workdir, PARTIAL)
    for name in os.listdir(root) if os.path.isdir(root) else []:
        match = re.fullmatch(r"([0-9a-f]{16})-(\d+)", name)
        if match and ((int(match[2]), match[1]) in done or int(match[2]) not in there):
            with (
                contextlib.suppress(JobError),
                parts.locked(os.path.join(root, name)),
            ):  # in use: its owner removes it
                parts.remove(os.path.join(root, name))
    with contextlib.suppress(OSError):  # not there, or others are under way
        os.rmdir(root)
