"""Measures the host's share of a run's wall time for small models of a config's ladder; about four minutes on two cores.

python benchmarks/host_share.py --config=configs/digits_isoflop.py [--repeats=5] [--json=OUT]
"""

import dataclasses
import functools
import os
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import flags

from dit_jax import flops as model_flops
from dit_jax.bench import measure
from dit_jax.bench.measure import alternate, fixed_batch, make_stepper, seconds, shown, spread
from dit_jax.bind import bind
from dit_jax.config import Config, TrainConfig, resolve
from dit_jax.data.pipeline import make_batches
from dit_jax.devices.mesh import make_mesh
from dit_jax.error import UsageError
from dit_jax.files.out import check_json
from dit_jax.job.launch import launch
from dit_jax.log import say, table
from dit_jax.sweep import ladder
from dit_jax.training import loop
from dit_jax.training.state import make_state
from dit_jax.training.step import train_step
from dit_jax.workdir.scalars import METRICS, open_scalars, read_lines

HOST_TARGET = 0.20
HOST = ("call", "data", "log", "checkpoint")  # parts of `step_parts` that the host does
MOST_STEPS = 1500  # most steps of a measured run
STEP_PARTS = ("wall", "device", "call", "data", "log", "checkpoint", "rest", "looped")


def make_looped(cfg: Config, mesh) -> Callable[[int], float]:
    """As `make_stepper`, with n steps in one compiled program, hence without a call for each step."""
    state, batch, model = make_state(cfg, mesh), fixed_batch(cfg, mesh), bind(cfg.model, mesh)
    shapes = jax.eval_shape(lambda: train_step(cfg, model, state, batch)[1])
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

    @functools.partial(jax.jit, donate_argnums=0)
    def program(state, n):
        return jax.lax.fori_loop(0, n, lambda _, carry: train_step(cfg, model, carry[0], batch), (state, zeros))

    def many(n: int):
        nonlocal state
        state, scalars = program(state, n)
        return state, scalars

    return lambda n: seconds(lambda: many(n)) / n


def run_once(cfg: Config) -> dict[str, float]:
    """Seconds of a whole `loop.run` in a new folder: before the first logged step, a step, and after the last logged one."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        loop.run(cfg, os.path.join(folder, "run"), quiet=True)
        end = time.time()
        first, *_, last = read_lines(os.path.join(folder, "run", METRICS))
    steps = last["step"] - first["step"]
    return {"start": first["time"] - start, "loop": (last["time"] - first["time"]) / steps, "end": end - last["time"]}


def data_seconds(cfg: Config, steps: int) -> Callable[[], float]:
    """A function that measures seconds a batch, read as in the training loop."""
    batches = make_batches(cfg.data, batch_size=cfg.train.batch_size, seed=0)
    return lambda: seconds(lambda: [next(batches) for _ in range(steps)] and None) / steps


def log_seconds(lines: int = 50) -> float:
    """Seconds to fetch and write one line of scalars."""
    with tempfile.TemporaryDirectory() as folder:
        write, _, close = open_scalars(folder, 0, tensorboard=False)
        scalars = {name: jnp.float32(1.5) for name in ("loss", "grad_norm", "param_norm", "learning_rate")}

        def log():
            for i in range(lines):
                write(i, {name: float(value) for name, value in jax.device_get(scalars).items()})

        spent = seconds(log)
        close()
    return spent / lines


def measure_host(cell: ladder.Cell, repeats: int, steps: int = 300, most: int = MOST_STEPS) -> dict:
    """The host's share of a run's wall time, and the parts of a step's time.

    wall      a step of `loop.run` (over the first `most` steps) and its share of the checkpoint; without start-up (tracing,
              reading the compiled program from the cache), which does not grow with the run
    device    the compiled step, called repeatedly with one batch, less `call`, the time of a call of an empty step
    looped    for comparison, many steps as one program
    """
    cfg, mesh = cell.cfg, make_mesh(cell.cfg.mesh)
    short = dataclasses.replace(cfg.train, steps=min(cfg.train.steps, most))
    steppers = {
        "step": make_stepper(cfg, mesh),
        "call": make_stepper(cfg, mesh, empty=True),
        "looped": make_looped(cfg, mesh),
    }
    jobs = {name: functools.partial(job, steps) for name, job in steppers.items()}
    jobs |= {"run": lambda: run_once(dataclasses.replace(cfg, train=short))}
    jobs |= {"data": data_seconds(cfg, steps), "log": log_seconds}
    found = alternate(jobs, repeats)
    parts = step_parts(found, cfg.train)
    host = [sum(row) for row in zip(*(parts[name] for name in HOST), strict=True)]
    return {
        "size": [cfg.model.width, cfg.model.depth, cfg.model.heads],
        "parameters": model_flops.parameters(cfg.model),
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
    """Parts of a step's seconds, by repeat: wall = device + call + data + log + checkpoint + rest."""
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


def ladder_cells(cfg: Config, folder: str) -> list[ladder.Cell]:
    """Cells of the ladder's middle budget, every other size of its window."""
    middle = len(cfg.sweep.budgets) // 2
    if not cfg.sweep.budgets:
        raise UsageError("sweep.budgets: found none, expected training FLOPs; start from configs/digits_isoflop.py")
    first, end = cfg.sweep.windows[middle]
    return [ladder.make_cell(cfg, folder, cfg.sweep.budgets[middle], size) for size in cfg.sweep.sizes[first:end:2]]


def measure_ladder(cfg: Config, repeats: int) -> list[dict]:
    """`measure_host` for each size; on CPU in a worker of the sweep, which uses one core and a compilation cache."""
    job, found = functools.partial(measure_host, repeats=repeats), []
    with tempfile.TemporaryDirectory() as folder:
        for cell in ladder_cells(cfg, folder):
            say(f"host: width {cell.cfg.model.width}, {cell.cfg.train.steps} steps ...")
            if jax.default_backend() != "cpu":
                found.append(job(cell))
                continue
            outcomes = ladder.run_cells([cell], 2, os.path.join(folder, "compiled"), job)
            found += [outcome for done, outcome in outcomes if done is not None]
    for outcome in found:
        if isinstance(outcome, BaseException):
            raise outcome
    return found


def show(found: dict) -> None:
    """Prints the parts of a step's time, one row a model."""
    rows, lines = found["host"], []
    target = f"host (target <= {rows[0]['target']:.0%})"
    for row in rows:
        cells = [f"{row['step_us'][name]['median']:,.0f}" for name in STEP_PARTS]
        shares = [shown(row[name], 0, True) for name in ("host_share", "not_device_share")]
        shares[0] += f": {measure.verdict(row['host_share']['median'] <= row['target'])}"
        start = f"{row['start_seconds']['median']:.1f} s"
        lines.append((str(row["size"][0]), f"{row['steps']:,}", *cells, *shares, start))
    table(("width", "steps", *STEP_PARTS, target, "not device", "start"), lines)
    print(
        "Microseconds a step. host: (call + data + log + checkpoint) / wall; not device: 1 - device / wall, which holds the "
        "noise\nbetween two timings too; looped, for comparison: a step among many in one program."
    )


def main() -> None:
    check_json(flags.FLAGS.json)
    cfg = resolve(flags.FLAGS.config)
    found = {"machine": measure.machine(), "host": measure_ladder(cfg, flags.FLAGS.repeats)}
    measure.publish(found, show, flags.FLAGS.json, ("jax", "jaxlib", "flax", "numpy"))


if __name__ == "__main__":
    flags.DEFINE_integer("repeats", 5, "repeats; medians and ranges are over them", lower_bound=1)
    flags.DEFINE_string("json", "", "write all figures here")
    launch(main, config="file")
