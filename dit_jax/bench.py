"""How fast this machine trains and samples, in about five minutes on two cores.

    python -m dit_jax.bench --config=configs/digits_isoflop.py [--repeats=5] [--json=OUT]

    step    the training step at width 384, as a share of the machine's own matrix rate (target: at least 30 %)
    host    small models of the config's ladder: what the host takes of a run's wall time (target: at most 20 %)
    sample  the config's sampler with the largest of them

What is compared is measured in turn, again and again, in one process: a disturbance strikes both sides.
"""

import dataclasses
import functools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from dit_jax import flops, sweep, train
from dit_jax.command import launch, provenance, write_file
from dit_jax.config import Config, TrainConfig, UsageError, model_config, resolve
from dit_jax.data.pipeline import make_batches
from dit_jax.diffusion.process import make_process
from dit_jax.log import METRICS, open_scalars, read_lines, say
from dit_jax.mesh import batch_sharding, make_mesh
from dit_jax.models import dit
from dit_jax.sample import image_flops, make_sampler
from dit_jax.state import make_state
from dit_jax.step import make_train_step, on_device, train_step

STEP_TARGET, HOST_TARGET = 0.30, 0.20
HOST = ("call", "data", "log", "checkpoint")  # what the host does, by `step_parts`
MOST_STEPS = 1500  # of a run of the `host` part


def step_config(batch_size: int) -> Config:
    """DiT-S/4 at 256 pixels, cut to 4 layers: width 384, 64 tokens."""
    return Config(model_config("DiT-S/4", depth=4), train=TrainConfig(batch_size=batch_size))


def spread(values: list[float]) -> dict:
    """Median and range of the repeats."""
    return {"median": float(np.median(values)), "low": float(min(values)), "high": float(max(values))}


def seconds(job: Callable) -> float:
    """Wall seconds until what `job` returns is computed."""
    start = time.perf_counter()
    jax.block_until_ready(job())
    return time.perf_counter() - start


def alternate(jobs: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What each job returns, `repeats` times: every job once, then every job again. A first round is thrown away."""
    rounds = [{name: job() for name, job in jobs.items()} for _ in range(repeats + 1)][1:]
    return {name: [found[name] for found in rounds] for name in jobs}


def fixed_batch(cfg: Config, mesh) -> dict:
    """A batch of noise that lies on the devices."""
    side, rng = cfg.model.input_size, np.random.default_rng(0)
    images = rng.standard_normal((cfg.train.batch_size, side, side, cfg.model.channels), np.float32)
    labels = rng.integers(cfg.model.classes, size=cfg.train.batch_size, dtype=np.int32)
    return jax.device_put({"image": images, "label": labels}, batch_sharding(mesh))


def empty_step(state, batch: dict):
    """As many arrays in and out as a training step, and next to nothing computed: what a call itself costs."""
    scalar = batch["image"][0, 0, 0, 0]
    return jax.tree.map(lambda x: x + 1, state), {"loss": scalar, "grad_norm": scalar, "param_norm": scalar}


def make_stepper(cfg: Config, mesh, empty: bool = False) -> Callable[[int], float]:
    """A function of n: seconds a step of n calls of the compiled training step (or of `empty_step`), one after another.

    It waits for the device every `train.log_every` steps, as the training loop does.
    """
    state, batch = make_state(cfg, mesh), fixed_batch(cfg, mesh)
    step = jax.jit(empty_step, donate_argnums=0) if empty else make_train_step(cfg, mesh)

    def many(n: int):
        nonlocal state
        for i in range(1, n + 1):
            state, scalars = step(state, batch)
            if i % cfg.train.log_every == 0:
                jax.block_until_ready(scalars)
        return state, scalars

    return lambda n: seconds(lambda: many(n)) / n


def make_looped(cfg: Config, mesh) -> Callable[[int], float]:
    """The same, with n steps as one compiled program: what is left when there is no call a step."""
    state, batch = make_state(cfg, mesh), fixed_batch(cfg, mesh)
    shapes = jax.eval_shape(lambda: train_step(cfg, state, batch)[1])
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

    @functools.partial(jax.jit, donate_argnums=0)
    def program(state, n):
        return jax.lax.fori_loop(0, n, lambda _, carry: train_step(cfg, carry[0], batch), (state, zeros))

    def many(n: int):
        nonlocal state
        state, scalars = program(state, n)
        return state, scalars

    return lambda n: seconds(lambda: many(n)) / n


def make_products(size: int) -> dict[str, Callable[[], float]]:
    """Seconds of a float32 product of `size`^3: by XLA and, on CPU, by NumPy's BLAS."""
    a = np.random.default_rng(0).standard_normal((size, size), np.float32)
    b, product = jax.device_put(a), jax.jit(lambda b: b @ b)
    products = {"xla": lambda: seconds(lambda: product(b))}
    return products | ({"blas": lambda: seconds(lambda: a @ a)} if jax.default_backend() == "cpu" else {})


def measure_step(cfg: Config, repeats: int, size: int = 2048) -> dict:
    """The training step (forward, backward, AdamW, EMA), each time after matrix products; its share is of the faster one."""
    cfg, mesh = dataclasses.replace(cfg, model=on_device(cfg.model)), make_mesh(cfg.mesh)
    products, stepper = make_products(size), make_stepper(cfg, mesh)
    found = alternate({**products, "step": lambda: stepper(1)}, repeats)
    steps, work = found["step"], flops.train_flops(cfg.model, cfg.train.batch_size)
    rates = {name: [2 * size**3 / s for s in found[name]] for name in products}
    fastest = [max(row) for row in zip(*rates.values(), strict=True)]
    return {
        "model": {name: getattr(cfg.model, name) for name in ("width", "depth", "heads", "tokens", "dtype")},
        "parameters": flops.parameters(cfg.model),
        "batch_size": cfg.train.batch_size,
        "matrix": size,
        "matrix_gflops": {name: spread([rate / 1e9 for rate in row]) for name, row in rates.items()},
        "step_ms": spread([1e3 * s for s in steps]),
        "images_per_second": spread([cfg.train.batch_size / s for s in steps]),
        "model_gflops": spread([work / s / 1e9 for s in steps]),
        "share": spread([work / s / rate for s, rate in zip(steps, fastest, strict=True)]),
        "target": STEP_TARGET,
    }


def run_once(cfg: Config) -> dict[str, float]:
    """Seconds of a whole `train.run` in a new folder: before the first step's line, a step, and after the last line."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        train.run(cfg, os.path.join(folder, "run"), quiet=True)
        end = time.time()
        first, *_, last = read_lines(os.path.join(folder, "run", METRICS))
    steps = last["step"] - first["step"]
    return {"start": first["time"] - start, "loop": (last["time"] - first["time"]) / steps, "end": end - last["time"]}


def data_seconds(cfg: Config, steps: int) -> Callable[[], float]:
    """Seconds a batch, read as the training loop does."""
    batches = make_batches(cfg.data, batch_size=cfg.train.batch_size, seed=0)
    return lambda: seconds(lambda: [next(batches) for _ in range(steps)] and None) / steps


def log_seconds(lines: int = 50) -> float:
    """Seconds a line of scalars."""
    with tempfile.TemporaryDirectory() as folder:
        write, close = open_scalars(folder, 0, tensorboard=False)
        scalars = {name: jnp.float32(1.5) for name in ("loss", "grad_norm", "param_norm", "learning_rate")}

        def log():
            for i in range(lines):
                write(i, {name: float(value) for name, value in jax.device_get(scalars).items()})

        spent = seconds(log)
        close()
    return spent / lines


def measure_host(cell: sweep.Cell, repeats: int, steps: int = 300, most: int = MOST_STEPS) -> dict:
    """The host's share of a run's wall time, and where a step's time goes.

    wall      `train.run`: a step of its loop (over the first `most` steps) and the step's part of the checkpoint. Start-up
              (tracing, the compiled program from the cache) is told apart: it does not grow with the run.
    device    the compiled step, called again and again with one batch, less `call`, what a call of an empty step takes
    looped    for comparison, many steps as one program
    """
    cfg, mesh = dataclasses.replace(cell.cfg, model=on_device(cell.cfg.model)), make_mesh(cell.cfg.mesh)
    short = dataclasses.replace(cfg.train, steps=min(cfg.train.steps, most))
    steppers = {"step": make_stepper(cfg, mesh), "call": make_stepper(cfg, mesh, empty=True)}
    steppers |= {"looped": make_looped(cfg, mesh)}
    jobs = {name: functools.partial(job, steps) for name, job in steppers.items()}
    jobs |= {"run": lambda: run_once(dataclasses.replace(cfg, train=short))}
    jobs |= {"data": data_seconds(cfg, steps), "log": log_seconds}
    found = alternate(jobs, repeats)
    parts = step_parts(found, cfg.train)
    host = [sum(row) for row in zip(*(parts[name] for name in HOST), strict=True)]
    return {
        "size": [cfg.model.width, cfg.model.depth, cfg.model.heads],
        "parameters": flops.parameters(cfg.model),
        "batch_size": cfg.train.batch_size,
        "steps": cfg.train.steps,
        "step_us": {name: spread([1e6 * s for s in values]) for name, values in parts.items()},
        "start_seconds": spread([run["start"] for run in found["run"]]),
        "checkpoint_seconds": spread([run["end"] for run in found["run"]]),
        "host_share": spread([h / wall for h, wall in zip(host, parts["wall"], strict=True)]),
        "not_device_share": spread([1 - d / wall for d, wall in zip(parts["device"], parts["wall"], strict=True)]),
        "target": HOST_TARGET,
    }


def step_parts(found: dict, cfg: TrainConfig) -> dict[str, list[float]]:
    """Where the seconds of a step go, per repeat: wall = device + call + data + log + checkpoint + rest."""
    saves = -(-cfg.steps // cfg.checkpoint_every) / cfg.steps
    parts = {
        "device": [step - call for step, call in zip(found["step"], found["call"], strict=True)],
        "call": found["call"],
        "data": found["data"],
        "log": [line * (cfg.steps / cfg.log_every + 2) / cfg.steps for line in found["log"]],
        "checkpoint": [run["end"] * saves for run in found["run"]],
    }
    wall = [run["loop"] + run["end"] * saves for run in found["run"]]
    rest = [whole - sum(row) for whole, *row in zip(wall, *parts.values(), strict=True)]
    return {"wall": wall, **parts, "rest": rest, "looped": found["looped"]}


def ladder_cells(cfg: Config, folder: str) -> list[sweep.Cell]:
    """Runs of the ladder's middle budget, every other size of its window."""
    middle = len(cfg.sweep.budgets) // 2
    if not cfg.sweep.budgets:
        raise UsageError("sweep.budgets: found none, expected training FLOPs; start from configs/digits_isoflop.py")
    first, end = cfg.sweep.windows[middle]
    return [sweep.make_cell(cfg, folder, cfg.sweep.budgets[middle], size) for size in cfg.sweep.sizes[first:end:2]]


def measure_ladder(cfg: Config, repeats: int) -> list[dict]:
    """`measure_host` for each size; on CPU in a worker of the sweep, which keeps to one core and to a compilation cache."""
    job, found = functools.partial(measure_host, repeats=repeats), []
    with tempfile.TemporaryDirectory() as folder:
        for cell in ladder_cells(cfg, folder):
            say(f"host: width {cell.cfg.model.width}, {cell.cfg.train.steps} steps ...")
            if jax.default_backend() != "cpu":
                found.append(job(cell))
                continue
            outcomes = sweep.run_cells([cell], 2, os.path.join(folder, "compiled"), job)
            found += [outcome for done, outcome in outcomes if done is not None]
    for outcome in found:
        if isinstance(outcome, BaseException):
            raise outcome
    return found


def measure_sample(cfg: Config, repeats: int) -> dict:
    """Sampling as `cfg.sample` says; how long it takes does not depend on the weights."""
    mesh, process = make_mesh(cfg.mesh), make_process(cfg.diffusion, cfg.model.learn_sigma)
    draw, params = make_sampler(cfg.model, process, cfg.sample, mesh), dit.init(cfg.model, jax.random.key(0))
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    indices = np.arange(-(-cfg.sample.batch_size // split) * split, dtype=np.int32)
    found = alternate({"draw": lambda: seconds(lambda: draw(params, 0, indices)) / len(indices)}, repeats)["draw"]
    return {
        "size": [cfg.model.width, cfg.model.depth, cfg.model.heads],
        "batch_size": len(indices),
        **{name: getattr(cfg.sample, name) for name in ("sampler", "steps", "guidance")},
        "image_ms": spread([1e3 * s for s in found]),
        "model_gflops": spread([image_flops(cfg, cfg.sample) / s / 1e9 for s in found]),
    }


def machine() -> dict:
    """What was measured, and with which versions."""
    device, name = make_mesh(Config().mesh).devices.flat[0], ""
    if device.platform == "cpu" and os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            name = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": name or device.device_kind,
        "devices": jax.device_count(),
        "cores": cores,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        **provenance(),
    }


def shown(value: dict, digits: int = 0, percent: bool = False) -> str:
    """Median (lowest to highest), as text."""
    pattern = f"{{:.{digits}{'%' if percent else 'f'}}}"
    middle, low, high = (pattern.format(value[name]) for name in ("median", "low", "high"))
    return f"{middle} ({low} to {high})"


def verdict(met: bool) -> str:
    """The word for whether a target is met."""
    return "met" if met else "missed"


def show(found: dict, console: Console) -> None:
    """The tables: medians (ranges)."""
    about, step = found["machine"], found["step"]
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in ("jax", "jaxlib", "flax", "numpy"))
    console.print(f"{about['device']}, {about['cores']} cores, load {about['load']:.1f}; {about['date']}; {versions}")
    console.print("Medians (lowest to highest of the repeats).\n")
    table = Table("training step", "", title_justify="left")
    model = step["model"]
    table.add_row(
        "model", f"width {model['width']}, depth {model['depth']}, {model['tokens']} tokens, {model['dtype']}"
    )
    table.add_row("batch", str(step["batch_size"]))
    for name, rate in step["matrix_gflops"].items():
        table.add_row(f"{step['matrix']}^3 float32 product, {name}", f"{shown(rate, 1)} GFLOP/s")
    table.add_row("step", f"{shown(step['step_ms'])} ms")
    table.add_row("images/s", shown(step["images_per_second"], 1))
    table.add_row("model FLOPs", f"{shown(step['model_gflops'], 1)} GFLOP/s")
    reached = verdict(step["share"]["median"] >= step["target"])
    table.add_row(
        f"share of the faster (target >= {step['target']:.0%})", f"{shown(step['share'], 0, True)}: {reached}"
    )
    console.print(table)
    names = ("wall", "device", "call", "data", "log", "checkpoint", "rest", "looped")
    table = Table("width", "steps", *names, f"host (target <= {HOST_TARGET:.0%})", "not device", "start")
    for row in found["host"]:
        cells = [f"{row['step_us'][name]['median']:,.0f}" for name in names]
        shares = [shown(row[name], 0, True) for name in ("host_share", "not_device_share")]
        shares[0] += f": {verdict(row['host_share']['median'] <= row['target'])}"
        table.add_row(
            str(row["size"][0]), f"{row['steps']:,}", *cells, *shares, f"{row['start_seconds']['median']:.1f} s"
        )
    console.print(table)
    console.print(
        "Microseconds a step. host: (call + data + log + checkpoint) / wall; not device: 1 - device / wall, which holds the "
        "noise\nbetween two timings too; looped, for comparison: a step among many in one program."
    )
    drawn = found["sample"]
    console.print(
        f"sampling, width {drawn['size'][0]}, {drawn['sampler']} {drawn['steps']}, guidance {drawn['guidance']:g}, batch "
        f"{drawn['batch_size']}: {shown(drawn['image_ms'], 2)} ms an image, {shown(drawn['model_gflops'], 1)} GFLOP/s"
    )


def main() -> None:
    repeats, on_cpu = flags.FLAGS.repeats, jax.default_backend() == "cpu"
    cfg, found = resolve(flags.FLAGS.config), {"machine": machine()}
    largest = ladder_cells(cfg, "")[-1].cfg
    say("step: width 384 ...")
    found["step"] = measure_step(step_config(16 if on_cpu else 256), repeats, 2048 if on_cpu else 8192)
    found["host"] = measure_ladder(cfg, repeats)
    say("sample ...")
    found["sample"] = measure_sample(largest, repeats)
    if flags.FLAGS.json:
        write_file(flags.FLAGS.json, json.dumps(found, indent=1) + "\n")
    show(found, Console(width=150, highlight=False))


if __name__ == "__main__":
    flags.DEFINE_integer("repeats", 5, "repeats; medians and ranges are over them", lower_bound=1)
    flags.DEFINE_string("json", "", "write all figures here")
    launch(main, config="file")
