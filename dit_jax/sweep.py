"""Train an isoFLOP ladder, evaluate it, fit its scaling law and test the law on a larger model.

    python -m dit_jax.sweep --config=configs/digits_isoflop.py --workdir=runs/demo

Cells run side by side in `sweep.processes` processes, each an ordinary run in `W/cells/<name>`. Finished cells are skipped;
a cell that fails is reported, costs the others nothing, and makes the exit code 1.
"""

import concurrent.futures as futures
import dataclasses
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from absl import flags
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dit_jax import evaluate, flops, train
from dit_jax.command import ERROR, Interrupted, launch, write_file
from dit_jax.config import Config, SweepConfig, UsageError, resolve, to_dict
from dit_jax.log import METRICS, clock, read_lines, say

STEP_SECONDS = 1.5e-3  # a step's fixed cost, for the ETA before anything was measured
FLOP_RATE = 5e9


@dataclass(frozen=True)
class Cell:
    """One run of the ladder: a size at a budget."""

    name: str
    workdir: str
    budget: float
    cfg: Config

    @property
    def weight(self) -> float:
        """Expected seconds, up to a factor that the run itself reveals."""
        return self.cfg.train.steps * (STEP_SECONDS + self.step_flops / FLOP_RATE) + 2.0

    @property
    def step_flops(self) -> int:
        return flops.train_flops(self.cfg.model, self.cfg.train.batch_size)


def make_cell(cfg: Config, workdir: str, budget: float, size: tuple, **changes) -> Cell:
    """The run of `size` = (width, depth, heads) that spends `budget` training FLOPs; the learning rate scales with width."""
    width, depth, heads = size
    model = dataclasses.replace(cfg.model, width=width, depth=depth, heads=heads)
    rate = cfg.optim.learning_rate * (cfg.sweep.base_width / width) ** cfg.sweep.width_power
    steps = round(budget / flops.train_flops(model, cfg.train.batch_size))
    if steps < 1:
        raise UsageError(f"sweep.budgets: found {budget:g} FLOPs, less than one step of the model of width {width}")
    log_every = max(steps // 20, 1)
    cell = dataclasses.replace(
        cfg,
        model=model,
        optim=dataclasses.replace(cfg.optim, learning_rate=rate),
        train=dataclasses.replace(cfg.train, steps=steps, log_every=log_every, checkpoint_every=steps, keep=1),
        sweep=SweepConfig(),
        **changes,
    )
    name = f"C{budget:.2e}-w{width}-d{depth}".replace("+", "")
    return Cell(name, os.path.join(workdir, name), budget, cell)


def make_cells(cfg: Config, workdir: str) -> list[Cell]:
    """All cells of the ladder, in W/cells; they cost time in proportion to their FLOPs, so the largest come first."""
    if not cfg.sweep.budgets:
        raise UsageError("sweep.budgets: found none, expected training FLOPs; start from configs/digits_isoflop.py")
    cells = [
        make_cell(cfg, os.path.join(workdir, "cells"), budget, size)
        for budget, window in zip(cfg.sweep.budgets, cfg.sweep.windows, strict=True)
        for size in cfg.sweep.sizes[window[0] : window[1]]
    ]
    return sorted(cells, key=lambda cell: -cell.weight)


def run_cell(cell: Cell) -> dict:
    """Train and evaluate one cell; returns its record."""
    train.run(cell.cfg, cell.workdir, quiet=True)
    return evaluate.run(cell.cfg, cell.workdir, [cell.cfg.train.steps], quiet=True)[0]


def finished(cell: Cell) -> bool:
    """Whether the cell's last step has a record."""
    records = read_lines(os.path.join(cell.workdir, evaluate.RECORDS))
    return any(record["step"] == cell.cfg.train.steps for record in records)


def _start_worker(cores: list[int], counter, cache: str) -> None:
    """A worker keeps to its own share of the cores: small models gain nothing from a second one."""
    with counter.get_lock():
        index, counter.value = counter.value, counter.value + 1
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores[index % len(cores)]})
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _use_cache(cache)


def _use_cache(folder: str) -> None:
    """Compiled programs are kept beside the runs: cells of one size share them."""
    import jax

    jax.config.update("jax_compilation_cache_dir", os.path.abspath(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _pool(processes: int, cache: str) -> futures.ProcessPoolExecutor:
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") and processes > 1 else []
    context = multiprocessing.get_context("spawn")
    arguments = (cores, context.Value("i", 0), cache)
    return futures.ProcessPoolExecutor(processes, context, _start_worker, arguments)


def run_cells(cells: list[Cell], processes: int, cache: str, job: Callable = run_cell) -> Iterator[tuple[Cell, object]]:
    """Yields (cell, record or exception) as cells end, and (None, running cells) about once a second in between.

    A worker that dies (out of memory, say) takes the pool with it: the cells it may have been are run again, one at a
    time, so that only the one that kills its process is lost.
    """
    waiting, suspects = list(cells), []
    while waiting or suspects:
        alone = not waiting
        queue, width = (suspects, 1) if alone else (waiting, processes)
        broken = yield from _drain(queue, width, cache, job, alone)
        if not alone:
            suspects += broken


def _drain(queue: list[Cell], width: int, cache: str, job: Callable, alone: bool):
    """Run cells of `queue` until it is empty or the pool breaks; returns the cells that ran when it broke."""
    running: dict[futures.Future, Cell] = {}
    with _pool(width, cache) as pool:
        try:
            while queue or running:
                while queue and len(running) < width:
                    cell = queue.pop(0)
                    running[pool.submit(job, cell)] = cell
                done, _ = futures.wait(running, timeout=1.0, return_when=futures.FIRST_COMPLETED)
                if any(isinstance(future.exception(), futures.process.BrokenProcessPool) for future in done):
                    lost = list(running.values())
                    if alone:
                        yield lost[0], RuntimeError("its process died (out of memory?)")
                    return lost
                for future in done:
                    yield running.pop(future), future.exception() or future.result()
                yield None, list(running.values())
        except BaseException:
            _stop(pool)
            raise
    return []


def _stop(pool: futures.ProcessPoolExecutor) -> None:
    """Ask the workers to save and stop."""
    for process in list((pool._processes or {}).values()):
        process.terminate()
    pool.shutdown(wait=True, cancel_futures=True)


def share_done(cell: Cell) -> float:
    """The share of a running cell's steps that its scalars show."""
    lines = read_lines(os.path.join(cell.workdir, METRICS))
    return lines[-1]["step"] / cell.cfg.train.steps if lines else 0.0


def run_ladder(cells: list[Cell], processes: int, cache: str) -> list[Cell]:
    """Run what is not finished, with one progress display; returns the cells that failed."""
    todo = [cell for cell in cells if not finished(cell)]
    if len(todo) < len(cells):
        say(f"{len(cells) - len(todo)} of {len(cells)} cells are finished")
    if not todo:
        return []
    say(f"{len(todo)} cells to train, {sum(c.budget for c in todo):.2g} FLOPs, in {processes} process(es)")
    failed, done, start = [], 0.0, time.monotonic()
    total, count = sum(cell.weight for cell in todo), 0
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[eta]}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("ladder", total=total, eta="")
        for cell, outcome in run_cells(todo, processes, cache):
            if cell is None:
                current = done + sum(c.weight * share_done(c) for c in outcome)
                bar.update(task, completed=current, eta=f"ETA {_eta(current, total, start)}")
                continue
            count, done = count + 1, done + cell.weight
            if isinstance(outcome, BaseException):
                failed.append(cell)
                line = f"FAILED: {type(outcome).__name__}: {outcome}"
            else:
                line = f"loss {outcome['metrics']['loss']:.4f} +- {outcome['metrics']['loss_se']:.4f}"
            bar.console.print(
                f"[{count}/{len(todo)}] {cell.name}  {line}  ETA {_eta(done, total, start)}",
                highlight=False,
                markup=False,
            )
    return failed


def _eta(done: float, total: float, start: float) -> str:
    return clock((total - done) * (time.monotonic() - start) / done) if done else "?"


def prepare(cfg: Config, workdir: str) -> None:
    """Make W with the sweep's config.json, or check that W holds this sweep."""
    train.check_data(cfg)
    path = os.path.join(workdir, "sweep.json")
    if os.path.isfile(path):
        with open(path) as f:
            old = train.flatten(json.load(f)["config"])
        new = json.loads(json.dumps(train.flatten(to_dict(cfg))))
        changed = [
            k
            for k in new
            if new[k] != old.get(k) and not k.startswith(("sweep.processes", "sweep.grid", "data.data_dir"))
        ]
        if changed:
            key = changed[0]
            raise UsageError(
                f"{workdir} holds another sweep: {key} is {old.get(key)!r} there, {new[key]!r} in the command"
            )
        return
    if os.path.isdir(workdir) and os.listdir(workdir):
        raise UsageError(
            f"--workdir: {workdir!r} is not empty and holds no sweep.json; expected a new folder or a sweep's"
        )
    try:
        os.makedirs(workdir, exist_ok=True)
        write_file(path, json.dumps({"config": to_dict(cfg), **train.provenance()}, indent=1) + "\n")
    except OSError as error:
        raise UsageError(f"--workdir: cannot write to {workdir!r} ({error.strerror})") from None


def run(cfg: Config, workdir: str) -> list[Cell]:
    """The ladder; returns the cells that failed."""
    cells = make_cells(cfg, workdir)
    prepare(cfg, workdir)
    cache = os.path.join(workdir, "compiled")
    return run_ladder(cells, cfg.sweep.processes, cache)


def main() -> None:
    signal.signal(signal.SIGTERM, _interrupt)
    failed = run(resolve(flags.FLAGS.config), flags.FLAGS.workdir)
    if failed:
        say(
            f"{len(failed)} cell(s) failed: {', '.join(cell.name for cell in failed)}; the same command tries them again"
        )
        raise SystemExit(ERROR)


def _interrupt(number, frame) -> None:
    raise Interrupted("SIGTERM: running cells were asked to save; the same command goes on from there")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "the sweep's folder", required=True)
    launch(main, config="file")
