"""Hands the cells of a sweep or of an evaluation grid to a scheduler; a cell is the job's own command with `--cell`.

`local` runs them here; `print` writes a command per cell to standard output, for any scheduler; `slurm` submits an array
through launch/slurm.sbatch, whose head lists its variables (TIME, CPUS and others).
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags

from dit_jax.error import USAGE, JobError, UsageError, nearest
from dit_jax.log import say

LAUNCHERS = ("local", "slurm", "print")
SCRIPT = str(Path(__file__).absolute().parents[2] / "launch" / "slurm.sbatch")


def define_flags() -> None:
    """Define `--launcher` and `--cell`."""
    runs = "who runs the cells: this process, a SLURM array, or who reads them"
    flags.DEFINE_enum("launcher", "local", LAUNCHERS, runs)
    flags.DEFINE_string("cell", None, "run this cell alone: its name, or its number from 0")


def find_cell(names: Sequence[str], asked: str) -> int:
    """Return the number of the cell that `--cell` names. Raises UsageError if there is none."""
    if asked in names:
        return list(names).index(asked)
    if not asked.isdecimal():
        raise UsageError(f"--cell: found {asked!r}{nearest(asked, names)}")
    if not int(asked) < len(names):
        raise UsageError(f"--cell: found {asked}, expected 0 to {len(names) - 1}, or a name")
    return int(asked)


def own_arguments(arguments: Sequence[str], others: Sequence[str] = ()) -> list[str]:
    """Remove `--launcher`, `--cell` and the flags `others` from a command's arguments."""
    kept, skip = [], False
    for argument in arguments:
        name, equals, _ = argument.lstrip("-").partition("=")
        if skip:
            skip = False
        elif argument.startswith("-") and name in ("launcher", "cell", *others):
            skip = not equals
        else:
            kept.append(argument)
    return kept


def spans(numbers: Sequence[int]) -> str:
    """Format ascending numbers as SLURM does: 0-2,5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def hand_over(
    launcher: str, job: str, names: Sequence[str], todo: Sequence[int], conclude: bool, changes: Mapping | None = None
) -> None:
    """Give the cells `todo` (numbers into `names`) to the scheduler. `conclude`: run the job's own command after them.

    `changes`: flags of the cells that differ from the command's.

    Raises UsageError if launch/slurm.sbatch lacks a variable, JobError if SLURM refuses the cells.
    """
    arguments = own_arguments(sys.argv[1:], list(changes or ()))
    arguments += [f"--{name}={value}" for name, value in (changes or {}).items()]
    if launcher == "print":
        command = [sys.executable, "-m", f"dit_jax.{job}", *arguments]
        for number in todo:
            print(shlex.join([*command, f"--cell={names[number]}"]))
        if conclude:
            say(f"after them: {shlex.join(command)}")
        return
    if todo:
        array = _submit(job, arguments, {"ARRAY": spans(todo)})
        print(array)
        say(f"{len(todo)} cells are job {array}")
    if conclude:
        last = _submit(job, arguments, {"ARRAY": "", "NODES": "1", "TASKS": "1"} | ({"AFTER": array} if todo else {}))
        print(last)
        say(f"what follows from them is job {last}")


def check_launcher(launcher: str, job: str) -> None:
    """Raises UsageError if cells could not be handed over, by a dry run of launch/slurm.sbatch, before anything is written."""
    if launcher == "slurm":
        _submit("--dry-run", [job], {"ARRAY": "0"})
        if not shutil.which("sbatch"):
            raise UsageError("--launcher=slurm: sbatch: not found; run this where SLURM is, or --launcher=print")


def _submit(job: str, arguments: list[str], changes: dict[str, str]) -> str:
    """Submit through launch/slurm.sbatch; returns the id of the job."""
    if not os.path.isfile(SCRIPT):
        raise UsageError(
            f"--launcher=slurm: no file {SCRIPT!r}, expected a checkout of the repository; or --launcher=print"
        )
    env = {"PYTHON": sys.executable, **os.environ, "CHECKED": "1", **changes}
    found = subprocess.run(["bash", SCRIPT, job, *arguments], env=env, capture_output=True, text=True)
    lines = found.stderr.strip().splitlines() or ["no message"]
    if found.returncode == USAGE:
        raise UsageError(f"--launcher=slurm: {lines[-1].removeprefix('error: ')}")
    if found.returncode:
        raise JobError(f"SLURM took no job: {lines[-1]}")
    return found.stdout.strip().split(";")[0]
