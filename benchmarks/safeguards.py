"""Measures the cost of the safeguards on this machine; about five minutes on two cores.

python benchmarks/safeguards.py --config=configs/digits.py [--repeats=3] [--json=OUT]

checkpoint  checksums and manifests, as a share of the steps between two saves (target: at most 2 % at the default interval)
replay      steps computed twice every N steps (expected: 1/N)
data        waiting for batches, as a share of a step, for digits and for latents (target: under 1 %)
latents     latents read, verified and sampled a second on one core (target: at least 5,000)
"""

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator

import numpy as np
from absl import flags

from dit_jax import checkpoint, flops
from dit_jax.bench import measure
from dit_jax.config import Config, DataConfig, TrainConfig, model_config, resolve
from dit_jax.data.latent_notes import LatentInfo
from dit_jax.data.latent_writer import write_latents
from dit_jax.data.pipeline import make_batches
from dit_jax.devices.mesh import make_mesh
from dit_jax.files.out import check_json
from dit_jax.job.launch import launch
from dit_jax.log import say, table
from dit_jax.training import loop
from dit_jax.training.guard import run_twice
from dit_jax.training.state import make_state
from dit_jax.training.step import make_train_step
from dit_jax.workdir import goodput, manifest
from dit_jax.workdir.scalars import read_lines

CHECKPOINT_TARGET, DATA_TARGET, LATENTS_TARGET = 0.02, 0.01, 5000
REPLAYS = (10, 100)
RECORDS = 2000  # latents in the store
EVERY = TrainConfig().checkpoint_every


def latent_config(folder: str) -> Config:
    """DiT-S/8 cut to 4 layers, on latents of 256 px images."""
    data = DataConfig(dataset="noise", latents=folder, image_size=256, held_out_split="test", cache=False)
    model = model_config("DiT-S/8", image_size=256, depth=4)
    return Config(model, data=data, train=TrainConfig(steps=60, batch_size=32, log_every=20))


@contextlib.contextmanager
def latent_store(records: int = RECORDS) -> Iterator[str]:
    """Makes a folder of noise with splits train and test: mean and log-variance, 32 x 32 x 4 float16, 16 KiB a record."""
    rng, sha = np.random.default_rng(0), "0" * 64
    kinds = dict(shape=(32, 32, 4), dtype="float16", moments=True, mirrored=False)
    kinds |= dict(scale=0.18215, shift=0.0, classes=1000)
    about = dict(autoencoder="noise", autoencoder_sha256=sha, dataset="noise", source_sha256=sha, image_size=256)
    with tempfile.TemporaryDirectory() as folder:
        for split, count in (("train", records), ("test", 10)):
            info = LatentInfo(**kinds, **about, split=split)
            values = (rng.standard_normal(info.record_shape, np.float32) for _ in range(count))
            examples = ((i % 1000, v) for i, v in enumerate(values))
            write_latents(os.path.join(folder, split), info, count, lambda _, given=examples: given)
        yield folder


def measure_checkpoint(cfg: Config, repeats: int, steps: int) -> dict:
    """Time to hash a checkpoint once written and again before older ones are pruned, as a share of `EVERY` steps.

    An upper bound, because both run in the background while the device computes.
    """
    mesh = make_mesh(cfg.mesh)
    stepper = measure.make_stepper(cfg, mesh)
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.closing(checkpoint.Saver(folder, 1)) as saver:
            saver.save(0, make_state(cfg, mesh).items(), {"next_index": 0}, {"model": {}})
        at = checkpoint.path_of(folder, 0)
        size = sum(os.path.getsize(os.path.join(root, name)) for root, _, names in os.walk(at) for name in names)
        jobs = {
            "write": lambda: measure.seconds(lambda: manifest.write_manifest(at)),
            "verify": lambda: measure.seconds(lambda: manifest.problems(at) and None),
            "step": lambda: stepper(steps),
        }
        found = measure.alternate(jobs, repeats)
    share = [(w + v) / (EVERY * s) for w, v, s in zip(found["write"], found["verify"], found["step"], strict=True)]
    return {
        "size": [cfg.model.width, cfg.model.depth, cfg.model.heads],
        "parameters": flops.parameters(cfg.model),
        "batch_size": cfg.train.batch_size,
        "bytes": size,
        "every": EVERY,
        **{f"{name}_ms": measure.spread([1e3 * s for s in found[name]]) for name in jobs},
        "share": measure.spread(share),
        "target": CHECKPOINT_TARGET,
    }


def measure_replay(cfg: Config, repeats: int, rounds: int = 10) -> dict:
    """Time added by computing a step twice and comparing, in steps; done every N steps, it costs 1/N of that."""
    mesh = make_mesh(cfg.mesh)
    state, batch, step = make_state(cfg, mesh), measure.fixed_batch(cfg, mesh), make_train_step(cfg, mesh)

    def once():
        nonlocal state
        state, scalars = step(state, batch)
        return state, scalars

    def twice():
        nonlocal state
        state, scalars = run_twice(step, state, batch, 0)
        return state, scalars

    jobs = {"once": lambda: measure.seconds(once), "twice": lambda: measure.seconds(twice)}
    found = measure.alternate(jobs, repeats * rounds)
    added = [b / a - 1 for a, b in zip(found["once"], found["twice"], strict=True)]
    return {"added_steps": measure.spread(added), "quartiles": np.quantile(added, (0.25, 0.75)).tolist()}


def measure_wait(cfg: Config, repeats: int) -> dict:
    """Share of the loop's time, without compiling and saving, that the goodput ledger books as waiting for data."""
    waits, steps = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            run = os.path.join(folder, "run")
            loop.run(cfg, run, quiet=True)
            (entry,) = read_lines(os.path.join(run, goodput.GOODPUT), goodput.LINE)
        total = entry["seconds"]["data"] + entry["seconds"]["step"]
        waits.append(entry["seconds"]["data"] / total)
        steps.append(1e3 * total / entry["last"])
    size, batch = [cfg.model.width, cfg.model.depth, cfg.model.heads], cfg.train.batch_size
    return {"size": size, "batch_size": batch, "step_ms": measure.spread(steps), "share": measure.spread(waits)}


def measure_latents(folder: str, repeats: int, batches: int = 40, batch_size: int = 256) -> dict:
    """Latents a core-second, read from the disk (its cache), verified and sampled, with the default number of threads."""
    data = latent_config(folder).data
    rates = []
    for _ in range(repeats + 1):
        iterator = make_batches(data, batch_size=batch_size, seed=0)
        next(iterator)
        before = time.process_time()
        for _ in range(batches):
            next(iterator)
        rates.append(batches * batch_size / (time.process_time() - before))
        iterator.close()
    return {"batch_size": batch_size, "latents_per_core_second": measure.spread(rates[1:]), "target": LATENTS_TARGET}


def show(found: dict) -> None:
    """Prints the tables: medians (ranges)."""
    share = f"share of {EVERY:,} steps (target <= {CHECKPOINT_TARGET:.0%})"
    rows = []
    for row in found["checkpoint"]:
        times = [measure.shown(row[f"{name}_ms"], 1) for name in ("write", "verify", "step")]
        reached = measure.verdict(row["share"]["median"] <= row["target"])
        cells = [str(row["size"][0]), f"{row['bytes'] / 1e6:.1f}", *times]
        rows.append((*cells, f"{measure.shown(row['share'], 3, True)}: {reached}"))
    table(("checkpoint: width", "MB", "hash, ms", "verify, ms", "step, ms", share), rows)
    added, quartiles = found["replay"]["added_steps"]["median"], found["replay"]["quartiles"]
    costs = ", ".join(f"N = {every}: {added / every:.1%} (1/N = {1 / every:.0%})" for every in REPLAYS)
    low_high = "quartiles {:.2f} to {:.2f}".format(*quartiles)
    print(f"replay: a step that is computed twice takes {added:.2f} steps more ({low_high}); {costs}")
    rows = []
    for name, row in found["data"].items():
        reached = measure.verdict(row["share"]["median"] < DATA_TARGET)
        cells = [name, str(row["size"][0]), str(row["batch_size"]), measure.shown(row["step_ms"], 1)]
        rows.append((*cells, f"{measure.shown(row['share'], 2, True)}: {reached}"))
    table(("data", "width", "batch", "step, ms", f"wait (target < {DATA_TARGET:.0%})"), rows)
    rate = found["latents"]["latents_per_core_second"]
    reached = measure.verdict(rate["median"] >= LATENTS_TARGET)
    print(f"latents a second and core (target >= {LATENTS_TARGET:,}): {measure.shown(rate)}: {reached}")


def main() -> None:
    check_json(flags.FLAGS.json)
    repeats, cfg, found = flags.FLAGS.repeats, resolve(flags.FLAGS.config), {"machine": measure.machine()}
    say("checkpoint ...")
    wide = measure.step_config(16)
    found["checkpoint"] = [measure_checkpoint(cfg, repeats, 50), measure_checkpoint(wide, repeats, 1)]
    say("replay ...")
    found["replay"] = measure_replay(cfg, repeats)
    say("data ...")
    short = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=400, checkpoint_every=400))
    with latent_store() as folder:
        kinds = {"digits": short, "latents": latent_config(folder)}
        found["data"] = {name: measure_wait(chosen, repeats) for name, chosen in kinds.items()}
        found["latents"] = measure_latents(folder, repeats)
    measure.publish(found, show, flags.FLAGS.json, ("jax", "jaxlib", "grain", "orbax-checkpoint"))


if __name__ == "__main__":
    flags.DEFINE_integer("repeats", 3, "repeats; medians and ranges are over them", lower_bound=1)
    flags.DEFINE_string("json", "", "write all figures here")
    launch(main, config="file")
