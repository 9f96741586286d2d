"""Counts the requests and bytes of a bucket as a run folder, on the tests' strict server: a save of a large state, an hour of training.

python benchmarks/bucket_cost.py [--model=DiT-XL/2] [--devices=8] [--step_seconds=0.2] [--rate=1e9] [--latency=0.05]

The leaves of the state (random float32, split over the devices by the config's mesh rule) are saved a part at a time, because this
machine may not hold them all: params, EMA, and the two moments. Large objects go to files. From the counts follows how long the
storage works at a stated rate (bytes a second of one host) and latency (seconds a request), and what of it a training waits for.
"""

import argparse
import contextlib
import mmap
import os
import sys
import tempfile
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", default="DiT-XL/2")
parser.add_argument("--devices", type=int, default=8)
parser.add_argument("--step_seconds", type=float, default=0.2)
parser.add_argument("--rate", type=float, default=1e9, help="bytes a second")
parser.add_argument("--latency", type=float, default=0.05, help="seconds a request")
parser.add_argument("--every", type=int, default=5000, help="steps between checkpoints")
args = parser.parse_args()
ROOT = Path(__file__).resolve().parent.parent
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices}"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bucket as server_module  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402

from dit_jax import checkpoint  # noqa: E402
from dit_jax.config import resolve, to_dict  # noqa: E402
from dit_jax.devices.mesh import make_mesh  # noqa: E402
from dit_jax.job.launch import load_config  # noqa: E402
from dit_jax.log import say, table  # noqa: E402
from dit_jax.training import loop  # noqa: E402
from dit_jax.training.state import abstract_state  # noqa: E402
from dit_jax.workdir import scalars  # noqa: E402

HOUR = 3600.0
LARGE = 1 << 20  # bytes of an object that goes to a file


class OnDisk(server_module.Server):
    """The strict server, with large objects in files."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def store(self, bucket, name, data, given, query, **extra):
        entry = super().store(bucket, name, data, given, query, **extra)
        if len(data) > LARGE:
            path = os.path.join(self.folder, entry["generation"])
            Path(path).write_bytes(data)
            with open(path, "rb") as file:
                self.buckets[bucket][name] = (entry, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return entry


@contextlib.contextmanager
def serving(folder):
    """The server in a thread, with this process led to it."""
    made = server_module.Server
    server_module.Server = lambda buckets, page: OnDisk(folder)
    try:
        with server_module.serve() as server:
            os.environ.update(server_module.environment(server.address))
            yield server
    finally:
        server_module.Server = made


def random_leaf(leaf, rng):
    """An array of random numbers, each shard made where it lies."""

    def shard(index):
        shape = [len(range(*part.indices(size))) for part, size in zip(index, leaf.shape, strict=True)]
        return rng.random(shape, np.float32) if shape else np.float32(1)

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, shard)


def count(server, since: int = 0) -> tuple[int, int, int]:
    """(requests, bytes up, bytes down) since a number of requests."""
    found = list(server.requests)[since:]
    return len(found), sum(one.received for one in found), sum(one.sent for one in found)


def save_cost(server, folder: str) -> list[list]:
    """Rows of the save of each part of the state: name, bytes, requests, bytes up and down, requests before training goes on."""
    cfg = resolve(load_config(f"{ROOT}/configs/imagenet256.py:{args.model}"))
    state, rng, rows = abstract_state(cfg, make_mesh(cfg.mesh)), np.random.default_rng(0), []
    moments = {
        "first moment": state.params,
        "second moment": state.params,
    }  # Adam's have the shapes and places of the weights
    for step, (name, tree) in enumerate({"params": state.params, "EMA": state.ema, **moments}.items(), 1):
        arrays = jax.tree.map(lambda leaf: random_leaf(leaf, rng), tree)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        with contextlib.closing(checkpoint.Saver("gs://test/large", 100)) as saver:
            before = len(server.requests)
            saver.save(step, {"params": arrays}, {}, {"model": to_dict(cfg.model)})
            waited = len(server.requests) - before
            saver.wait()
            rows.append([f"save: {name}", size, *count(server, before), waited])
        del arrays
        server.buckets["test"].clear()
        for file in Path(folder).iterdir():
            file.unlink()
        say(" ".join(map(str, rows[-1])))
    return rows


def hour_cost(server) -> list:
    """A row of an hour's steps of a real training, a small one, whose scalars are written at each logged line: more often than they are."""
    steps, waited = round(3600 / args.step_seconds), []
    values = load_config(f"{ROOT}/configs/digits.py")
    values.model.update({"depth": 1, "width": 16, "heads": 2})
    values.train.update({"steps": steps, "batch_size": 8, "log_every": 100, "checkpoint_every": args.every})
    save = loop._save
    scalars.WAIT = 0.0

    def counted(*given):
        before = len(server.requests)
        save(*given)
        waited.append(len(server.requests) - before)

    loop._save, before = counted, len(server.requests)
    loop.run(resolve(values), "gs://test/hour")
    return [f"{steps:,} steps of training, {len(waited)} saves", 0, *count(server, before), sum(waited)]


with tempfile.TemporaryDirectory() as folder, serving(folder) as server:
    rows = save_cost(server, folder)
    rows.append(["save, whole", *(sum(row[i] for row in rows) for i in range(1, 6))])
    hour = hour_cost(server)
    head = ["", "bytes of arrays", "requests", "bytes up", "bytes down", "requests that training waits for"]
    lines = [[row[0], *(f"{value:,}" for value in row[1:])] for row in [*rows, hour]]
    table(head, lines, "Cost of a bucket")
    saves = 3600 / args.step_seconds / args.every
    background = rows[-1][3] / args.rate + rows[-1][2] * args.latency
    wait = args.latency * (hour[5] + saves * rows[-1][5])
    print(f"{args.model}: a save works for {background:.0f} s at {args.rate / 1e9:g} GB/s and {args.latency:g} s a request, one after the "
          f"other, while training goes on ({args.every * args.step_seconds:.0f} s to the next); training waits for {wait:.1f} s an hour, "
          f"{wait / 36:.3f} % of steps of {args.step_seconds:g} s")  # fmt: skip
