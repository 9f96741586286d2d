"""The ladder of a sweep: its cells, run side by side, the law fitted to them and tested on a larger model."""

import dataclasses
import os
from dataclasses import dataclass

import numpy as np

from dit_jax import checkpoint, flops
from dit_jax.config import Config, MeshConfig, SampleConfig, SweepConfig, to_dict
from dit_jax.data.source import Source
from dit_jax.devices.mesh import make_mesh
from dit_jax.diffusion.task import check_guidance
from dit_jax.error import UsageError
from dit_jax.evaluation import scores
from dit_jax.evaluation.protocol import check_config, loss_protocol
from dit_jax.evaluation.run import run as evaluate
from dit_jax.job.compiled import use_cache
from dit_jax.job.launcher import check_launcher, find_cell, hand_over
from dit_jax.job.workers import run_cells
from dit_jax.log import bar, say, warn
from dit_jax.networks.autoencoder import follow_latents
from dit_jax.sampling.draw import open_sampling
from dit_jax.sampling.picture import grid
from dit_jax.scaling import fit, plan, predict, report, runs, table
from dit_jax.training import loop
from dit_jax.workdir.folder import flatten, make_folder, read_config
from dit_jax.workdir.records import protocol_id as identify
from dit_jax.workdir.records import read_records
from dit_jax.workdir.scalars import METRICS, read_lines

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


def run_cell(cell: Cell, quiet: bool = True) -> dict:
    """Train and evaluate one cell; returns its record."""
    loop.run(cell.cfg, cell.workdir, quiet)
    return evaluate(cell.cfg, cell.workdir, [cell.cfg.train.steps], quiet)[0]


def finished(cell: Cell, protocol_id: str) -> bool:
    """Whether the cell's last step has its record."""
    return (cell.cfg.train.steps, protocol_id) in read_records(cell.workdir)


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
    failed, done = [], 0.0
    total, count = sum(cell.weight for cell in todo), 0
    with bar("ladder", total) as move:
        for cell, outcome in run_cells(todo, processes, cache, run_cell):
            if cell is None:
                move(done + sum(c.weight * share_done(c) for c in outcome))
                continue
            count, done = count + 1, done + cell.weight
            if isinstance(outcome, BaseException):
                failed.append(cell)
                line = f"FAILED: {type(outcome).__name__}: {outcome}"
            else:
                line = score(outcome)
            say(f"[{count}/{len(todo)}] {cell.name}  {line}  {move(done)}")
    return failed


def score(record: dict) -> str:
    """A cell's held-out loss, for people."""
    return f"loss {record['metrics']['loss']:.4f} +- {record['metrics']['loss_se']:.4f}"


def prepare(cfg: Config, workdir: str) -> Source:
    """Make W with the sweep's config as sweep.json, or check that W holds this sweep; returns the held-out split."""
    _, held_out = loop.open_data(cfg)
    check_config(cfg)
    if cfg.sweep.extrapolate:
        check_guidance(cfg, "sweep.grid_guidance", cfg.sweep.grid_guidance)
    path = os.path.join(workdir, "sweep.json")
    if not os.path.isfile(path):
        make_folder(workdir, "sweep.json", cfg)
        return held_out
    old, new = (flatten(to_dict(c)) for c in (read_config(workdir, "sweep.json"), cfg))
    free = ("sweep.processes", "sweep.grid", "data.data_dir")
    changed = [k for k in new if new[k] != old[k] and not k.startswith(free)]
    if changed:
        key = changed[0]
        raise UsageError(f"{workdir} holds another sweep: {key} is {old[key]!r} there, {new[key]!r} in the command")
    return held_out


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
    loop.run(cell.cfg, cell.workdir)
    evaluate(cell.cfg, cell.workdir, [cell.cfg.train.steps])
    return predict.extrapolate(law, runs.load_runs([cell.workdir], protocol_id=protocol_id)[0])


def grid_settings(cfg: Config) -> SampleConfig:
    """How the report's grid is sampled."""
    return dataclasses.replace(cfg.sample, labels="balanced", guidance=cfg.sweep.grid_guidance)


def draw_grid(cfg: Config, cell: Cell) -> str:
    """Guided samples of a run, one row a class: the PNG's path. Drawn once."""
    settings, classes = grid_settings(cfg), max(cfg.model.classes, 1)
    name = f"grid-{settings.sampler}{settings.steps}-guidance{settings.guidance:g}-{cfg.sweep.grid}.png"
    path = os.path.join(cell.workdir, "samples", name)
    if not os.path.isfile(path):
        _, params = checkpoint.load(cell.workdir, item=settings.weights)
        sampling = open_sampling(dataclasses.replace(cell.cfg, sample=settings), make_mesh(cell.cfg.mesh))
        parts = list(sampling.images(params, cfg.eval.seed, classes * cfg.sweep.grid))
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
    drawn = [record for record in read_records(cell.workdir).values() if "fd_digits" in record["metrics"]]
    real = scores.real_scores(cfg, scores.open_network(cfg, make_mesh(MeshConfig())))["fd_digits"] if drawn else 0.0
    for record in drawn:
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
        warn(warning)
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
    cache, protocol_id = os.path.join(workdir, "compiled"), identify(loss_protocol(cfg, prepare(cfg, workdir)))
    failed = run_ladder(cells, cfg.sweep.processes, cache, protocol_id)
    use_cache(cache)
    try:
        path, untested = conclude(cfg, workdir, protocol_id)
    except UsageError as error:
        if not failed:
            raise
        say(f"no law: {error}")
        return failed
    print(path)
    return failed + untested


def run_apart(cfg: Config, workdir: str, launcher: str, asked: str | None) -> None:
    """One cell alone, here; or none: all that are not finished are handed to the launcher."""
    cfg = follow_latents(cfg)
    cells = make_cells(cfg, workdir)
    names = [cell.name for cell in cells]
    chosen = None if asked is None else cells[find_cell(names, asked)]
    if chosen is None:
        check_launcher(launcher, "sweep")
    held_out = prepare(cfg, workdir)
    if chosen is None:
        protocol_id = identify(loss_protocol(cfg, held_out))
        todo = [i for i, cell in enumerate(cells) if not finished(cell, protocol_id)]
        hand_over(launcher, "sweep", names, todo, conclude=True)
        return
    use_cache(os.path.join(workdir, "compiled"))
    say(f"{chosen.name}  {score(run_cell(chosen, quiet=False))}")
