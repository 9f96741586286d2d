"""Throughput of sampling and evaluation on two hosts against one: processes on loopback, each pinned to one core; about ten minutes.

python benchmarks/hosts.py [--repeats=5] [--num=2000] [--json=OUT]

Both runs do the same work: `--num` images into parts and one npz; and an evaluation, held-out loss, `--num` images, their features and
their metrics, which process 0 computes alone. Programs are compiled before the clock starts.
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

from absl import flags

from dit_jax.config import MeshConfig
from dit_jax.job.launch import launch
from dit_jax.log import say, table

TARGET = 1.8


def worker(folder: str, num: int, count: int, index: int, address: str) -> None:
    """One host: prints the seconds of each job, if it is process 0."""
    os.sched_setaffinity(0, {index})
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
        start = time.perf_counter()
        job(num)
        found[name] = time.perf_counter() - start
    if leader():
        print(json.dumps(found))


def measure(folder: str, num: int, count: int) -> dict[str, float]:
    """Seconds of each job on `count` hosts."""
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
    ]
    hosts = [
        subprocess.Popen([*command, f"--index={index}"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for index in range(count)
    ]
    said = [host.communicate()[0] for host in hosts]
    return json.loads(said[0].strip().splitlines()[-1])


def main() -> None:
    values = flags.FLAGS
    if values.folder:
        return worker(values.folder, values.num, values.count, values.index, values.address)
    with tempfile.TemporaryDirectory() as folder:
        train = ["-m", "dit_jax.train", "--config=configs/digits.py", f"--workdir={folder}", "--config.train.steps=1"]
        subprocess.run([sys.executable, *train], check=True, stderr=subprocess.DEVNULL)
        found: dict = {1: [], 2: []}
        for i in range(values.repeats):
            for count in (1, 2) if i % 2 == 0 else (2, 1):
                found[count].append(measure(folder, values.num, count))
            say(f"[{i + 1}/{values.repeats}] {found[1][-1]} against {found[2][-1]}")
    rows, ratios = [], {}
    for name in found[1][0]:
        one, two = ([run[name] for run in found[count]] for count in (1, 2))
        ratios[name] = {"ratios": [a / b for a, b in zip(one, two, strict=True)], "one": one, "two": two}
        middle = statistics.median(ratios[name]["ratios"])
        low, high = min(ratios[name]["ratios"]), max(ratios[name]["ratios"])
        rows.append(
            [
                name,
                *(f"{values.num / statistics.median(x):.0f}" for x in (one, two)),
                f"{middle:.2f}",
                f"{low:.2f} to {high:.2f}",
            ]
        )
    table(
        ("job", "1 process, images/s", "2 processes", "ratio", "spread"),
        rows,
        f"target {TARGET}; load {os.getloadavg()[0]:.1f}",
    )
    if values.json:
        with open(values.json, "w") as f:
            json.dump(ratios, f, indent=1)


if __name__ == "__main__":
    flags.DEFINE_integer("repeats", 5, "alternating rounds")
    flags.DEFINE_integer("num", 2000, "images")
    flags.DEFINE_string("json", None, "file for the seconds of all rounds")
    for name in ("folder", "address"):
        flags.DEFINE_string(name, "", "of a worker")
    for name in ("count", "index"):
        flags.DEFINE_integer(name, 1 if name == "count" else 0, "of a worker")
    launch(main)
