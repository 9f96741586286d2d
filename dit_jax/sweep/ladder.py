"""The ladder of a sweep: runs its cells side by side, fits the law and tests it on a larger model."""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dit_jax import checkpoint, flops
from dit_jax.config import Config, DataConfig, EvalConfig, MeshConfig, ModelConfig, SampleConfig, SweepConfig, to_dict
from dit_jax.config.evaluation import AXES
from dit_jax.data.source import Source, introduce
from dit_jax.data.words import prompts
from dit_jax.devices.mesh import make_mesh
from dit_jax.diffusion.objective import make_objective
from dit_jax.diffusion.task import check_guidance, make_task
from dit_jax.error import JobError, StorageError, UsageError
from dit_jax.evaluation import scores
from dit_jax.evaluation.in_run import make_scores
from dit_jax.evaluation.protocol import Shared, check_config, draws_protocol, loss_protocol, samplings, targets
from dit_jax.evaluation.run import run as evaluate
from dit_jax.files import LARGEST, is_file, json_text, read, remote, whole, write_file
from dit_jax.files import make_folder as make
from dit_jax.job.compiled import use_cache
from dit_jax.job.launcher import check_launcher, find_cell, hand_over
from dit_jax.job.workers import run_cells
from dit_jax.log import bar, say
from dit_jax.networks.autoencoder import follow_latents
from dit_jax.networks.caption import follow
from dit_jax.sampling.draw import open_sampling
from dit_jax.sampling.label import names_of
from dit_jax.sampling.low import open_low
from dit_jax.sampling.picture import grid, prompt_grid
from dit_jax.sampling.prompt import Prompts
from dit_jax.scaling import report, runs
from dit_jax.scaling.fits.fit import Fit, predict
from dit_jax.scaling.plans.plan import plan
from dit_jax.scaling.report import text
from dit_jax.scaling.verdicts.beyond import Extrapolation
from dit_jax.scaling.verdicts.methods import fit_methods
from dit_jax.scaling.verdicts.verdict import ANSWER, Verdict, foretold, judge, lines
from dit_jax.training import loop
from dit_jax.workdir.folder import flatten, make_folder, read_config
from dit_jax.workdir.records import protocol_id as identify
from dit_jax.workdir.records import read_records
from dit_jax.workdir.scalars import METRICS, read_lines

LOOK = 10.0  # seconds between two looks at the scalars of cells in a bucket
PROMPTS = 8  # held-out captions of the report's grid
STEP_SECONDS, FLOP_RATE = 1.5e-3, 5e9  # a step's fixed cost and FLOP/s, to weigh cells before anything was measured


@dataclass(frozen=True)
class Cell:
    """One run of the ladder: a size at a budget; with `sweep.curves` at its largest one, the others on its way."""

    name: str
    workdir: str
    budget: float
    cfg: Config

    @property
    def steps(self) -> tuple:
        """The steps that are evaluated, one for each budget."""
        return self.cfg.train.keep_at or (self.cfg.train.steps,)

    @property
    def weight(self) -> float:
        """Expected seconds, up to a factor that is common to all cells of a machine."""
        step_flops = make_objective(self.cfg).flops() * self.cfg.train.batch_size
        return self.cfg.train.steps * (STEP_SECONDS + step_flops / FLOP_RATE) + 2.0


def make_cell(cfg: Config, workdir: str, budget: float, size: tuple) -> Cell:
    """The run of `size` = (width, depth, heads) for `budget` training FLOPs. Its learning rate scales with a power of width."""
    width, depth, heads = size
    unroll = depth if cfg.model.unrolled else cfg.model.unroll  # all layers of any size, if all
    model = dataclasses.replace(cfg.model, width=width, depth=depth, heads=heads, unroll=unroll)
    rate = cfg.optim.learning_rate * (cfg.sweep.base_width / width) ** cfg.sweep.width_power
    steps = round(budget / cfg.train.batch_size / make_objective(dataclasses.replace(cfg, model=model)).flops())
    if steps < 1:
        raise UsageError(f"sweep.budgets: found {budget:g} FLOPs, less than one step of the model of width {width}")
    every = {"log_every": max(steps // 20, 1), "checkpoint_every": min(cfg.train.checkpoint_every, steps)}
    cell = dataclasses.replace(
        cfg,
        model=model,
        optim=dataclasses.replace(cfg.optim, learning_rate=rate),
        train=dataclasses.replace(cfg.train, steps=steps, keep=1, keep_at=(), keep_every=0, **every),
        sweep=SweepConfig(),
        eval=dataclasses.replace(cfg.eval, samples=cfg.sweep.samples, loss=True),
    )
    name = f"C{budget:.2e}-w{width}-d{depth}".replace("+", "")
    return Cell(name, os.path.join(workdir, name), budget, cell)


def make_cells(cfg: Config, workdir: str) -> list[Cell]:
    """All cells of the ladder, in W/cells; the slowest come first, so that processes end at about the same time."""
    if not cfg.sweep.budgets:
        raise UsageError("sweep.budgets: found none, expected training FLOPs; start from configs/digits_isoflop.py")
    cells = [
        make_cell(cfg, os.path.join(workdir, "cells"), budget, size)
        for budget, window in zip(cfg.sweep.budgets, cfg.sweep.windows, strict=True)
        for size in cfg.sweep.sizes[window[0] : window[1]]
    ]
    cells = join_budgets(cells) if cfg.sweep.curves else cells
    names = [cell.name for cell in cells]
    if double := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"sweep.sizes, sweep.budgets: found {double[0]} twice, expected every size once a budget")
    return sorted(cells, key=lambda cell: -cell.weight)


def join_budgets(cells: list[Cell]) -> list[Cell]:
    """One cell per size: the run of its largest budget, which keeps and evaluates the steps of the others on its way."""
    found: dict[ModelConfig, Cell] = {}
    for cell in sorted(cells, key=lambda cell: cell.budget):
        model, train, name = cell.cfg.model, cell.cfg.train, cell.name.partition("-")[2]
        marks = {*found[model].steps, train.steps} if model in found else {train.steps}
        cfg = dataclasses.replace(cell.cfg, train=dataclasses.replace(train, keep_at=tuple(sorted(marks))))
        found[model] = Cell(name, os.path.join(os.path.dirname(cell.workdir), name), cell.budget, cfg)
    return list(found.values())


@functools.lru_cache(maxsize=1)  # so that a worker opens them once for all its cells
def open_shared(data: DataConfig, evaluation: EvalConfig, model: ModelConfig) -> Shared:
    return Shared(Config(data=data, eval=evaluation, model=model), make_mesh(MeshConfig()))


def shared_by(cfg: Config) -> Shared:
    """What evaluations of all sizes share: they read data and captions alike."""
    return open_shared(cfg.data, cfg.eval, dataclasses.replace(cfg.model, width=4, depth=1, heads=1, unroll=1))


def run_cell(cell: Cell, quiet: bool = True) -> dict:
    """Trains and evaluates one cell; returns the record of the loss at its last step."""
    loop.run(cell.cfg, cell.workdir, quiet, scoring=make_scores)
    losses = [
        r for r in evaluate(cell.cfg, cell.workdir, cell.steps, quiet, shared_by(cell.cfg)) if "loss" in r["metrics"]
    ]
    if gone := sorted({*cell.steps} - {record["step"] for record in losses}):
        done = f"{cell.workdir}: found no checkpoint of steps {gone}, which the run has passed, expected one for each budget"
        raise JobError(f"{done}; remove this folder, and the same command trains it anew")
    return losses[-1]


def targets_of(cfg: Config, held_out: Source) -> list[str]:
    """Protocols of what a cell's records have of the held-out images; the loss is the first."""
    cfg = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, loss=True))
    return [identify(loss_protocol(cfg, held_out, target)) for target in targets(cfg)]


def finished(cell: Cell, protocols: list[str]) -> bool:
    """Whether every step of the cell has a record of each of `protocols`, and of each sampling if there are samples."""
    records, asked = read_records(cell.workdir), samplings(cell.cfg) if cell.cfg.eval.samples else []
    wanted = [*protocols, *(identify(draws_protocol(dataclasses.replace(cell.cfg, sample=one))) for one in asked)]
    parts = {at: {key: record["protocol"].get(key) for key in ("weights", "samples")} for at, record in records.items()}
    done = {*records, *((step, identify(part)) for (step, _), part in parts.items())}
    return {(step, one) for step in cell.steps for one in wanted} <= done


def share_done(cell: Cell) -> float:
    """Share of its steps that a running cell has logged."""
    lines = read_lines(os.path.join(cell.workdir, METRICS))
    return lines[-1]["step"] / cell.cfg.train.steps if lines else 0.0


def watch() -> Callable[[Sequence[Cell]], float]:
    """Return a function from the running cells to the weight of what they have logged, which asks a bucket every LOOK seconds only."""
    seen: dict[str, float] = {}
    last = -LOOK

    def logged(running: Sequence[Cell]) -> float:
        nonlocal last
        if not any(remote(cell.workdir) for cell in running) or time.monotonic() - last > LOOK:
            with contextlib.suppress(StorageError):  # the cells themselves try again, and say so
                seen.update({cell.name: share_done(cell) for cell in running})
            last = time.monotonic()
        return sum(cell.weight * seen.get(cell.name, 0.0) for cell in running)

    return logged


def run_ladder(cells: list[Cell], processes: int, cache: str, protocols: list[str]) -> list[Cell]:
    """Runs the cells that are not finished, with one progress display; returns those that failed."""
    todo = [cell for cell in cells if not finished(cell, protocols)]
    if len(todo) < len(cells):
        say(f"{len(cells) - len(todo)} of {len(cells)} cells are finished")
    if not todo:
        return []
    say(f"{len(todo)} cells to train, {sum(c.budget for c in todo):.2g} FLOPs, in {processes} process(es)")
    failed, done, count, logged = [], 0.0, 0, watch()
    with bar("ladder", sum(cell.weight for cell in todo)) as move:
        for cell, outcome in run_cells(todo, processes, cache, run_cell):
            if cell is None:
                move(done + logged(outcome))
                continue
            count, done = count + 1, done + cell.weight
            bad = isinstance(outcome, BaseException)
            failed += [cell] * bad
            line = f"FAILED: {type(outcome).__name__}: {outcome}" if bad else score(outcome)
            say(f"[{count}/{len(todo)}] {cell.name}  {line}  {move(done)}")
    return failed


def score(record: dict) -> str:
    """A cell's held-out loss and its standard error, if it has one, as text."""
    loss, error = (record["metrics"].get(name) for name in ("loss", "loss_se"))
    return f"loss {loss:.4f}" + (f" +- {error:.4f}" if error is not None else "")


def prepare(cfg: Config, workdir: str) -> Source:
    """Makes W with the sweep's config as sweep.json, or checks that W holds this sweep; returns the held-out split."""
    opened = loop.open_data(cfg)
    check_config(cfg)
    sampled = dataclasses.replace(cfg.eval, samples=cfg.sweep.samples)
    check_config(dataclasses.replace(cfg, eval=sampled), "sweep.samples")
    if cfg.sweep.extrapolate:
        check_guidance(cfg, "sweep.grid_guidance", cfg.sweep.grid_guidance)
        make_task(dataclasses.replace(cfg, sample=grid_settings(cfg)))
    old = read_config(workdir, "sweep.json") if is_file(os.path.join(workdir, "sweep.json")) else cfg
    free = ["sweep.processes", "sweep.grid", "sweep.samples", "data.data_dir", "data.folder", "data.mixture"]
    free += [f"eval.{axis}" for axis in AXES if axis not in ("weights", "ema")]  # those two are of the loss too
    rungs, known = ({*zip(c.sweep.budgets, c.sweep.windows, strict=True)} for c in (cfg, old))
    free += ["sweep.budgets", "sweep.windows"] * (cfg.sweep.curves and rungs >= known)  # runs go on to further budgets
    before, now = flatten(to_dict(old)), flatten(to_dict(cfg))
    if changed := [k for k in now if now[k] != before[k] and not k.startswith(tuple(free))]:
        key = changed[0]
        raise UsageError(f"{workdir} holds another sweep: {key} is {before[key]!r} there, {now[key]!r} in the command")
    path, data = os.path.join(workdir, "data.json"), json_text({one.identity["split"]: one.identity for one in opened})
    if is_file(path) and read(path, LARGEST).decode() != data:
        raise UsageError(f"{workdir}: found other data than the sweep began with (data.json); use a new folder")
    if old is cfg or rungs > known:
        make_folder(workdir, "sweep.json", cfg)
        write_file(path, data)
    introduce(*opened)
    return opened[1]


def ladder_sizes(cfg: Config) -> list[tuple]:
    """Rows (name, active parameters, forward FLOPs of an image) of all sizes of the sweep, for a plan to choose from."""
    rows = []
    for width, depth, heads in cfg.sweep.sizes:
        model = dataclasses.replace(cfg.model, width=width, depth=depth, heads=heads)
        rows.append((f"w{width}-d{depth}", flops.active_parameters(model), flops.forward_flops(model)))
    return rows


def recommended_cell(cfg: Config, workdir: str, law: Fit) -> Cell:
    """The run that the law recommends at `sweep.extrapolate` times the largest budget."""
    budget = cfg.sweep.extrapolate * max(cfg.sweep.budgets)
    names = [row[0] for row in ladder_sizes(cfg)]
    chosen = plan(law, budget, ladder_sizes(cfg))
    cell = make_cell(cfg, os.path.join(workdir, "extrapolation"), budget, cfg.sweep.sizes[names.index(chosen.name)])
    return dataclasses.replace(cell, cfg=dataclasses.replace(cell.cfg, eval=cfg.eval))


def check_law(cell: Cell, made: Verdict, fits: dict, protocol_id: str) -> Extrapolation:
    """Prints the verdict's prediction for a cell beyond the ladder, trains it on all cores and evaluates it."""
    said = predict(fits[made.method], cell.budget, flops.active_parameters(cell.cfg.model))
    say(
        f"{made.method} recommends {cell.name}, {said['beyond']:.1f}x beyond the ladder; predicted loss {said['L_run']:.4f}"
    )
    loop.run(cell.cfg, cell.workdir)
    evaluate(cell.cfg, cell.workdir, [cell.cfg.train.steps])
    return foretold(made, fits, runs.load_runs([cell.workdir], protocol_id=protocol_id)[0])


def grid_settings(cfg: Config) -> SampleConfig:
    """Settings that sample the report's grid."""
    return dataclasses.replace(cfg.sample, labels="balanced", guidance=cfg.sweep.grid_guidance)


def draw_grid(cfg: Config, cell: Cell) -> str:
    """Draws guided samples of a run, a row for each class or for each of a few captions, unless they exist; returns the path of the PNG."""
    settings, classes = grid_settings(cfg), max(cfg.model.classes, 1)
    name = f"grid-{settings.sampler}{settings.steps}-guidance{settings.guidance:g}-{cfg.sweep.grid}.png"
    path = os.path.join(cell.workdir, "samples", name)
    if not is_file(path):
        _, params = checkpoint.load(cell.workdir, item=settings.weights)
        asked = Prompts(tuple(prompts(shared_by(cell.cfg).held_out[0], PROMPTS))) if cfg.model.text else None
        own, low = dataclasses.replace(cell.cfg, sample=settings), open_low(cell.cfg)
        sampling = open_sampling(own, make_mesh(cell.cfg.mesh), prompts=asked, low=low)
        drawn = list(sampling.images(params, cfg.eval.seed, len(asked or range(classes)) * cfg.sweep.grid))
        images, labels = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
        make(os.path.dirname(path))
        names, arrange = (asked.texts, prompt_grid) if asked else (names_of(cell.cfg, cell.workdir), grid)
        with whole(path) as unfinished:
            (low.grid(arrange) if low else arrange)(images, labels, names).save(unfinished, "PNG")
    return path


def notes(cfg: Config, cell: Cell) -> list[str]:
    """Sentences for the report on the recommended model, its samples' scores and how the grid was drawn."""
    model, count, drawn = cell.cfg.model, cell.cfg.train.steps * cell.cfg.train.batch_size, grid_settings(cfg)
    row = "a prompt" if model.text else "a class"
    found = [
        f"The recommended model: width {model.width}, depth {model.depth}, {flops.active_parameters(model):,} active of "
        f"{flops.parameters(model):,} trainable parameters, trained on {count:,} images ({count * model.tokens:,} tokens). "
        f"The grid shows its samples, one row {row}: {drawn.sampler}, {drawn.steps} steps, guidance {drawn.guidance:g}, "
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
    """Fits the ladder, tests the law if `sweep.extrapolate` is set, prints tables; returns the report's path and failed cells."""
    ladder = runs.load_runs([os.path.join(workdir, "cells")], protocol_id=protocol_id, curves=cfg.sweep.curves)
    target = cfg.sweep.extrapolate * max(cfg.sweep.budgets)
    found = fit_methods(ladder, target, ANSWER)
    made = judge(ladder, found.fits, found.refits.__getitem__, target)
    law, failed, tested, picture, said = found.fits[made.method], [], None, None, []
    for line in lines(made):
        say(line)
    if cfg.sweep.extrapolate:
        cell = Cell("extrapolation", "", target, cfg)
        try:
            cell = recommended_cell(cfg, workdir, law)
            tested = check_law(cell, made, found.fits, protocol_id)
            said = notes(cfg, cell)
            picture = read(draw_grid(cfg, cell), LARGEST)
        except (UsageError, RuntimeError, OSError) as error:
            say(f"{cell.name}  FAILED: {type(error).__name__}: {error}")
            failed.append(cell)
    tables = [*law.tables, (f"Laws of compute, {law.level:.0%} intervals", text.LAW_HEAD, text.law_rows(law))]
    tables += [("Predicted against measured", text.TESTED_HEAD, text.tested_rows(tested))] if tested else []
    for table in tables:
        text.print_table(*table)
    how = {"refused": found.refused, "disagreements": found.disagreements, "test": tested, "grid": picture}
    how |= {"notes": tuple(said), "flops": (target,) * bool(target), "verdict": made}
    title = f"IsoFLOP scaling of {cfg.data.title}, {len(ladder)} runs"
    page = report.Report(title, found.fits, law.method, tuple(ladder), **how)
    print(report.opening(page))
    return report.save(os.path.join(workdir, "report.html"), page), failed


def run(cfg: Config, workdir: str) -> list[Cell]:
    """Runs the ladder, fits its law and writes the report; returns the cells that failed."""
    cfg = follow(follow_latents(cfg))
    cells = make_cells(cfg, workdir)
    cache, protocols = os.path.join(workdir, "compiled"), targets_of(cfg, prepare(cfg, workdir))
    failed = run_ladder(cells, cfg.sweep.processes, cache, protocols)
    use_cache(cache)
    try:
        path, untested = conclude(cfg, workdir, protocols[0])
    except UsageError as error:
        if not failed:
            raise
        say(f"no law: {error}")
        return failed
    print(path)
    return failed + untested


def run_apart(cfg: Config, workdir: str, launcher: str, asked: str | None) -> None:
    """Runs the cell `asked` here; or, if None, hands all cells that are not finished to the launcher."""
    cfg = follow(follow_latents(cfg))
    cells = make_cells(cfg, workdir)
    names = [cell.name for cell in cells]
    chosen = None if asked is None else cells[find_cell(names, asked)]
    if chosen is None:
        check_launcher(launcher, "sweep")
    held_out = prepare(cfg, workdir)
    if chosen is None:
        protocols = targets_of(cfg, held_out)
        todo = [i for i, cell in enumerate(cells) if not finished(cell, protocols)]
        hand_over(launcher, "sweep", names, todo, conclude=True)
        return
    use_cache(os.path.join(workdir, "compiled"))
    say(f"{chosen.name}  {score(run_cell(chosen, quiet=False))}")
