"""Times the start of command lines against another revision, both in turn and with the same interpreter.

    python benchmarks/startup.py --against=f941e80 [--repeats=5] [--json=OUT]

Timed are `--help` of train and scaling, and `train` on digits from its start to the line of its first step. A first start, which
builds the data, is not counted. A revision that has --compilation_cache=DIR is run with it.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from dit_jax.error import UsageError, exit_code
from dit_jax.files import write_file
from dit_jax.files.out import check_json
from dit_jax.log import say

ROOT = Path(__file__).parent.parent
HELP = {
    "train --help": 1 / 4,
    "scaling --help": 1 / 3,
    "scaling fit --help": 1 / 3,
}  # command -> most of the other's time
FIRST_STEP, MOST = "train, first step", 1 / 2


def export(revision: str, folder: str) -> Path:
    """Writes the files of a revision to `folder`. Raises UsageError if there is no such revision."""
    archive = os.path.join(folder, "archive.tar")
    command = ["git", "-C", ROOT, "archive", f"--output={archive}", revision]
    if subprocess.run(command, capture_output=True).returncode:
        raise UsageError(f"--against: found {revision!r}, expected a commit of this repository")
    subprocess.run(["tar", "-xf", archive, "-C", folder], check=True)
    return Path(folder)


def start(tree: Path, arguments: list[str], stdout: int = subprocess.DEVNULL) -> subprocess.Popen:
    """Starts a command of dit_jax in `tree`, with its standard error as a pipe."""
    env = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", *arguments]
    return subprocess.Popen(command, cwd=tree, env=env, stdout=stdout, stderr=subprocess.PIPE, text=True)


def seconds_of_help(tree: Path, command: str) -> float:
    """Wall time of a command such as "train --help"."""
    then = time.perf_counter()
    job, *rest = command.split()
    _, error = (process := start(tree, [f"dit_jax.{job}", *rest])).communicate()
    if process.returncode:
        raise RuntimeError(f"{command}: {error}")
    return time.perf_counter() - then


def seconds_to_first_step(tree: Path, cache: str) -> float:
    """Seconds from the start of `train` on digits, in a new folder, to the line of its first step."""
    known = "compilation_cache" in start(tree, ["dit_jax.train", "--help"], stdout=subprocess.PIPE).communicate()[0]
    flags = ["--config=configs/digits.py", "--config.train.log_every=1"] + [f"--compilation_cache={cache}"] * known
    with tempfile.TemporaryDirectory() as workdir:
        then = time.perf_counter()
        process = start(tree, ["dit_jax.train", *flags, f"--workdir={workdir}"])
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("step "):
                break
        seconds = time.perf_counter() - then
        process.kill()
        process.wait()
    if not lines or not lines[-1].startswith("step "):
        raise RuntimeError("".join(lines))
    return seconds


def compare(trees: dict[str, Path], measure: Callable[[Path], float], repeats: int) -> dict:
    """Seconds of each tree, measured in turn after a start that is not counted; their medians, and the ratio of the medians."""
    for tree in trees.values():
        measure(tree)
    times: dict[str, list[float]] = {name: [] for name in trees}
    for _ in range(repeats):
        for name, tree in trees.items():
            times[name].append(measure(tree))
    now, then = (statistics.median(found) for found in times.values())
    return {"seconds": times, "now": now, "then": then, "ratio": now / then}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--against", default="f941e80", metavar="REVISION")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", default="", metavar="OUT")
    args = parser.parse_args()
    check_json(args.json)
    found = {}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        trees = {"now": ROOT, "then": export(args.against, folder)}
        measures = {name: (functools.partial(seconds_of_help, command=name), most) for name, most in HELP.items()}
        measures[FIRST_STEP] = functools.partial(seconds_to_first_step, cache=cache), MOST
        for name, (measure, most) in measures.items():
            one = found[name] = compare(trees, measure, args.repeats) | {"most": most}
            verdict = "met" if one["ratio"] <= most else "not met"
            times = f"{one['now']:6.2f} s  {one['then']:6.2f} s at {args.against}"
            say(f"{name:<20}{times}  ratio {one['ratio']:.2f}, {most:.2f}: {verdict}")
    if args.json:
        write_file(args.json, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(exit_code(main))
