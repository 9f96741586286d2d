"""Throughput of sampling and evaluation on two hosts against one: processes on loopback, each pinned to one core; about ten minutes.

python benchmarks/hosts.py [--repeats=5] [--num=2000] [--json=OUT]

Both runs do the same work: `--num` images into parts and one npz; and an evaluation, held-out loss, `--num` images, their features and
their metrics, which process 0 computes alone. Programs are compiled before the clock starts.

Cores share memory and caches, so two of them may do less than twice the work of one. What they do at most is measured beside it: two
runs of one process at the same time that know nothing of each other, each with the whole work. `of most` is the ratio over theirs.
"""

import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from absl import flags

from dit_jax.config import MeshConfig
from dit_jax.job.launch import launch
from dit_jax.log import say, table

TARGET = 1.8


def worker(folder: str, num: int, count: int, index: int, address: str, core: int) -> None:
    """One host: prints the seconds of each job, if it is process 0."""
    os.sched_setaffinity(0, {core + index})
    from dit_jax import checkpoint, flops
    from dit_jax.devices.processes import connect, everyone_is_here, leader
    from dit_jax.devices.rows import drawing_mesh, on_mesh
    from dit_jax.evaluation.run import run
    from dit_jax.sampling import parts
    from dit_jax.sampling.draw import open_sampling
    from dit_jax.sampling.weights import weights_hash
    from dit_jax.workdir.folder import read_config

    cfg = read_config(folder)
    where = {"coordinator": address, "num_processes": count, "process_id": index}
    connect(MeshConfig(), where if count > 1 else None)
    mesh, out = drawing_mesh(4 * flops.parameters(cfg.model)), os.path.join(folder, f"a-{count}.npz")
    _, params = checkpoint.load(folder, place=lambda shapes: on_mesh(mesh, shapes))
    sampling = open_sampling(cfg, mesh)

    def sample(images: int) -> None:
        job = sampling.describe(weights_hash(params), 1, 0)
        parts.complete(
            out, job, sampling.shape, images, lambda indices, most: sampling.draw(params, 0, indices, most), []
        )
        if leader():
            os.remove(out)
        everyone_is_here("removed")

    def evaluate(images: int) -> None:
        run(dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, samples=images)), folder, quiet=True)
        if leader():
            os.remove(os.path.join(folder, "eval", "records.jsonl"))  # so that the next evaluation finds nothing done
        everyone_is_here("removed")

    found = {}
    for name, job in (("sample", sample), ("evaluate", evaluate)):
        job(256)
        everyone_is_here("ready")
        began = time.perf_counter()
        job(num)
        found[name] = time.perf_counter() - began
    if leader():
        print(json.dumps(found))


def start(folder: str, num: int, count: int, first: int = 0) -> list[subprocess.Popen]:
    """Starts a run of `count` hosts on the cores from `first` on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        sys.executable,
        __file__,
        f"--num={num}",
        f"--folder={folder}",
        f"--count={count}",
        f"--address={address}",
        f"--core={first}",
    ]
    return [
        subprocess.Popen([*command, f"--index={index}"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for index in range(count)
    ]


def seconds(hosts: list[subprocess.Popen]) -> dict[str, float]:
    """Seconds of each job of a run that was started."""
    said = [host.communicate()[0] for host in hosts]
    return json.loads(said[0].strip().splitlines()[-1])


def measure(folders: tuple[str, str], num: int, kind: str) -> dict[str, float]:
    """Seconds of each job: of one host, of two, or of two runs of one host at the same time, their mean."""
    if kind != "apart":
        return seconds(start(folders[0], num, {"one": 1, "two": 2}[kind]))
    both = [seconds(run) for run in [start(folder, num, 1, core) for core, folder in enumerate(folders)]]
    return {name: statistics.mean(run[name] for run in both) for name in both[0]}


def main() -> None:
    values = flags.FLAGS
    if values.folder:
        return worker(values.folder, values.num, values.count, values.index, values.address, values.core)
    with tempfile.TemporaryDirectory() as parent:
        folders = tuple(os.path.join(parent, name) for name in ("a", "b"))
        train = ["-m", "dit_jax.train", "--config=configs/digits.py", "--config.train.steps=1"]
        for folder in folders:
            subprocess.run(
                [sys.executable, *train, f"--workdir={folder}"],
                check=True,
                stderr=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        found: dict = {"one": [], "two": [], "apart": []}
        for i in range(values.repeats):
            for kind in list(found) if i % 2 == 0 else list(found)[::-1]:
                found[kind].append(measure(folders, values.num, kind))
            say(f"[{i + 1}/{values.repeats}] {', '.join(f'{kind}: {runs[-1]}' for kind, runs in found.items())}")
    rows, ratios = [], {}
    for name in found["one"][0]:
        one, two, apart = (np.array([run[name] for run in found[kind]]) for kind in ("one", "two", "apart"))
        ratio, most = one / two, 2 * one / apart
        ratios[name] = {"ratios": ratio, "most": most, "one": one, "two": two, "apart": apart}
        rates = (f"{values.num / np.median(x):.0f}" for x in (one, two))
        shown = (f"{np.median(x):.2f} ({x.min():.2f} to {x.max():.2f})" for x in (ratio, most, ratio / most))
        rows.append([name, *rates, *shown])
    table(
        ("job", "1 process, images/s", "2 processes", "ratio", "most", "of most"),
        rows,
        f"target {TARGET}; {values.num} images, {values.repeats} rounds; load {os.getloadavg()[0]:.1f}",
    )
    if values.json:
        with open(values.json, "w") as f:
            json.dump(jax.tree.map(lambda x: x.tolist(), ratios), f, indent=1)


if __name__ == "__main__":
    flags.DEFINE_integer("repeats", 5, "alternating rounds")
    flags.DEFINE_integer("core", 0, "of a worker")
    flags.DEFINE_integer("num", 2000, "images")
    flags.DEFINE_string("json", None, "file for the seconds of all rounds")
    for name in ("folder", "address"):
        flags.DEFINE_string(name, "", "of a worker")
    for name in ("count", "index"):
        flags.DEFINE_integer(name, 1 if name == "count" else 0, "of a worker")
    launch(main)
