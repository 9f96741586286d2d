"""Train an isoFLOP ladder, evaluate it, fit its scaling law and test the law on a larger model.

    python -m dit_jax.sweep --config=configs/digits_isoflop.py --workdir=runs/demo

Cells run side by side in `sweep.processes` processes, each an ordinary run in `W/cells/<name>`. Finished cells are skipped;
a cell that fails is reported, costs the others nothing, and makes the exit code 1.
"""

import concurrent.futures as futures
import dataclasses
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dit_jax import checkpoint, evaluate, flops, scores, train
from dit_jax.autoencoder import follow_latents
from dit_jax.command import ERROR, Interrupted, launch, read_config
from dit_jax.config import Config, MeshConfig, SampleConfig, SweepConfig, UsageError, resolve, to_dict
from dit_jax.data.pipeline import load_arrays
from dit_jax.heldout import loss_protocol
from dit_jax.log import METRICS, clock, read_lines, say
from dit_jax.mesh import make_mesh
from dit_jax.records import protocol_id as identify
from dit_jax.records import read_records
from dit_jax.sample import grid, sample_images
from dit_jax.scaling import fit, plan, predict, report, runs, table

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


def make_cell(cfg: Config, workdir: str, budget: float, size: tuple) -> Cell:
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
        train=dataclasses.replace(
            cfg.train, steps=steps, log_every=log_every, checkpoint_every=min(cfg.train.checkpoint_every, steps), keep=1
        ),
        sweep=SweepConfig(),
        eval=dataclasses.replace(cfg.eval, samples=0),
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
    names = [cell.name for cell in cells]
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"sweep.sizes, sweep.budgets: found {double} twice, expected every size once a budget")
    return sorted(cells, key=lambda cell: -cell.weight)


def run_cell(cell: Cell) -> dict:
    """Train and evaluate one cell; returns its record."""
    train.run(cell.cfg, cell.workdir, quiet=True)
    return evaluate.run(cell.cfg, cell.workdir, [cell.cfg.train.steps], quiet=True)[0]


def loss_protocol_id(cfg: Config) -> str:
    """The protocol that all cells are compared under; a cell may carry records of others."""
    images = len(load_arrays(cfg.data, cfg.data.held_out_split)[0])
    return identify(loss_protocol(cfg, min(images, cfg.eval.max_images or images)))


def finished(cell: Cell, protocol_id: str) -> bool:
    """Whether the cell's last step has its record."""
    return (cell.cfg.train.steps, protocol_id) in read_records(cell.workdir)


def _follow(parent: int) -> None:
    """Save and stop when the sweep itself is gone, so that the same command finds no cell half in other hands."""
    while os.getppid() == parent:
        time.sleep(1.0)
    while True:  # the first SIGTERM makes a training save and stop; the next one ends the idle worker
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5.0)


def _start_worker(cores: list[int], counter, cache: str) -> None:
    """A worker keeps to its own share of the cores: small models gain nothing from a second one."""
    with counter.get_lock():
        index, counter.value = counter.value, counter.value + 1
    if cores:
        os.sched_setaffinity(0, {cores[index % len(cores)]})
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    _use_cache(cache)


def _use_cache(folder: str) -> None:
    """Compiled programs are kept beside the runs: cells of one size share them."""
    import jax

    jax.config.update("jax_compilation_cache_dir", os.path.abspath(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _pool(processes: int, cache: str) -> futures.ProcessPoolExecutor:
    """Workers, each kept to a core of its own if there are several; virtual devices of one process need more than one."""
    virtual = "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    pin = processes > 1 and not virtual and hasattr(os, "sched_getaffinity")
    context = multiprocessing.get_context("spawn")
    arguments = (sorted(os.sched_getaffinity(0)) if pin else [], context.Value("i", 0), cache)
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


def run_ladder(cells: list[Cell], processes: int, cache: str, protocol_id: str) -> list[Cell]:
    """Run what is not finished, with one progress display; returns the cells that failed."""
    todo = [cell for cell in cells if not finished(cell, protocol_id)]
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
    """Make W with the sweep's config as sweep.json, or check that W holds this sweep."""
    train.open_data(cfg)
    evaluate.check_config(cfg)
    path = os.path.join(workdir, "sweep.json")
    if not os.path.isfile(path):
        train.make_folder(workdir, "sweep.json", cfg)
        return
    old, new = (train.flatten(to_dict(c)) for c in (read_config(workdir, "sweep.json"), cfg))
    free = ("sweep.processes", "sweep.grid", "data.data_dir")
    changed = [k for k in new if new[k] != old[k] and not k.startswith(free)]
    if changed:
        key = changed[0]
        raise UsageError(f"{workdir} holds another sweep: {key} is {old[key]!r} there, {new[key]!r} in the command")


def ladder_sizes(cfg: Config) -> list[tuple]:
    """Rows (name, active parameters, forward FLOPs of an image) that a plan may choose from: all sizes of the sweep."""
    rows = []
    for width, depth, heads in cfg.sweep.sizes:
        model = dataclasses.replace(cfg.model, width=width, depth=depth, heads=heads)
        rows.append((f"w{width}-d{depth}", flops.active_parameters(model), flops.forward_flops(model)))
    return rows


def recommended_cell(cfg: Config, workdir: str, law: fit.IsoflopFit) -> Cell:
    """The run that the law recommends at `sweep.extrapolate` times the largest budget."""
    budget = cfg.sweep.extrapolate * max(cfg.sweep.budgets)
    names = [row[0] for row in ladder_sizes(cfg)]
    chosen = plan.plan(law, budget, ladder_sizes(cfg))
    cell = make_cell(cfg, os.path.join(workdir, "extrapolation"), budget, cfg.sweep.sizes[names.index(chosen.name)])
    return dataclasses.replace(cell, cfg=dataclasses.replace(cell.cfg, eval=cfg.eval))


def check_law(cell: Cell, law: fit.IsoflopFit, protocol_id: str) -> predict.Extrapolation:
    """Say what the law predicts for a cell beyond the ladder, train it on all cores, and measure."""
    said = predict.predict(law, cell.budget, flops.active_parameters(cell.cfg.model))
    low, high = said["L_run_interval"]
    beyond, expected = f"{said['beyond']:.1f}x beyond the ladder", f"{said['L_run']:.4f} ({low:.4f} to {high:.4f})"
    say(f"the law recommends {cell.name}, {beyond}; predicted loss {expected}")
    train.run(cell.cfg, cell.workdir)
    evaluate.run(cell.cfg, cell.workdir, [cell.cfg.train.steps])
    return predict.extrapolate(law, runs.load_runs([cell.workdir], protocol_id=protocol_id)[0])


def grid_settings(cfg: Config) -> SampleConfig:
    """How the report's grid is sampled."""
    return dataclasses.replace(cfg.sample, labels="balanced", guidance=cfg.sweep.grid_guidance)


def draw_grid(cfg: Config, cell: Cell) -> str:
    """Guided samples of a run, one row a class: the PNG's path. Drawn once."""
    settings, classes = grid_settings(cfg), cfg.model.classes
    name = f"grid-{settings.sampler}{settings.steps}-guidance{settings.guidance:g}-{cfg.sweep.grid}.png"
    path = os.path.join(cell.workdir, "samples", name)
    if not os.path.isfile(path):
        _, params = checkpoint.load(cell.workdir, item=settings.weights)
        mesh = make_mesh(cell.cfg.mesh)
        parts = list(sample_images(cell.cfg, params, settings, classes * cfg.sweep.grid, cfg.eval.seed, mesh))
        images = np.concatenate([part[0] for part in parts])
        by_class = images.reshape(cfg.sweep.grid, classes, *images.shape[1:]).swapaxes(0, 1).reshape(images.shape)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        grid(by_class, columns=cfg.sweep.grid).save(path)
    return path


def notes(cfg: Config, cell: Cell) -> list[str]:
    """Sentences for the report: what the recommended model is, how its samples score and how the grid was drawn."""
    model, count, drawn = cell.cfg.model, cell.cfg.train.steps * cell.cfg.train.batch_size, grid_settings(cfg)
    found = [
        f"The recommended model: width {model.width}, depth {model.depth}, {flops.active_parameters(model):,} active of "
        f"{flops.parameters(model):,} trainable parameters, trained on {count:,} images ({count * model.tokens:,} tokens). "
        f"The grid shows its samples, one row a class: {drawn.sampler}, {drawn.steps} steps, guidance {drawn.guidance:g}, "
        f"seed {cfg.eval.seed}."
    ]
    real = scores.real_distance(cfg, scores.open_network(cfg, make_mesh(MeshConfig()))) if cfg.eval.samples else 0.0
    for record in read_records(cell.workdir).values():
        if "fd_digits" in record["metrics"]:
            how = record["protocol"]["samples"]
            found.append(
                f"fd_digits of {how['num']} samples ({how['sampler']}, {how['steps']} steps, guidance {how['guidance']:g}): "
                f"{record['metrics']['fd_digits']:.2f}. It is a Frechet distance in the features of this project's own digits "
                f"network and comparable to nothing else; the held-out digits themselves score {real:.2f}."
            )
    return found


def conclude(cfg: Config, workdir: str, protocol_id: str) -> tuple[str, list[Cell]]:
    """Fit the ladder, test the law if the config asks for it, print the tables; returns the report's path and what failed."""
    ladder = runs.load_runs([os.path.join(workdir, "cells")], protocol_id=protocol_id)
    law = fit.fit_isoflop(ladder)
    held = predict.holdout_largest(ladder)
    failed, tested, picture, said = [], None, None, []
    if cfg.sweep.extrapolate:
        cell = recommended_cell(cfg, workdir, law)
        try:
            tested = check_law(cell, law, protocol_id)
            picture, said = draw_grid(cfg, cell), notes(cfg, cell)
        except (UsageError, RuntimeError, OSError) as error:
            say(f"{cell.name}  FAILED: {type(error).__name__}: {error}")
            failed.append(cell)
    for warning in law.warnings:
        say(f"warning: {warning}")
    table.print_table("Budgets", table.BUDGET_HEAD, table.budget_rows(law))
    table.print_table(f"Laws of compute, {law.level:.0%} intervals", table.LAW_HEAD, table.law_rows(law))
    table.print_table("Predicted against measured", table.CHECK_HEAD, table.check_rows(law, held, tested))
    print(table.answer(law, tested))
    path, title = os.path.join(workdir, "report.html"), f"IsoFLOP scaling of {cfg.data.dataset}, {len(ladder)} runs"
    return report.write_report(
        path, law, ladder, held, title=title, extrapolation=tested, grid_png=picture, notes=said
    ), failed


def run(cfg: Config, workdir: str) -> list[Cell]:
    """The ladder, its law and the report; returns the cells that failed."""
    cfg = follow_latents(cfg)
    cells = make_cells(cfg, workdir)
    prepare(cfg, workdir)
    cache, protocol_id = os.path.join(workdir, "compiled"), loss_protocol_id(cfg)
    failed = run_ladder(cells, cfg.sweep.processes, cache, protocol_id)
    _use_cache(cache)
    try:
        path, untested = conclude(cfg, workdir, protocol_id)
    except UsageError as error:
        if not failed:
            raise
        say(f"no law: {error}")
        return failed
    print(path)
    return failed + untested


def main() -> None:
    signal.signal(signal.SIGTERM, _interrupt)
    failed = run(resolve(flags.FLAGS.config), flags.FLAGS.workdir)
    if failed:
        names = ", ".join(cell.name for cell in failed)
        say(f"error: {len(failed)} cell(s) failed: {names}; the same command tries them again")
        raise SystemExit(ERROR)


def _interrupt(number, frame) -> None:
    raise Interrupted("SIGTERM: running cells were asked to save; the same command goes on from there")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "the sweep's folder", required=True)
    launch(main, config="file")
