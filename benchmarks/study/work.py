"""The work of one cell: train it by the loop of `train`, score it by `evaluate`, and add its records to the study's."""

import dataclasses
import json
import os

from benchmarks.study.cells import Cell, config_of, folder_of, samplings_of
from benchmarks.study.records import append, read
from dit_jax import checkpoint, flops
from dit_jax.config import Config
from dit_jax.devices.mesh import make_mesh
from dit_jax.diffusion.objective import make_objective
from dit_jax.error import Interrupted
from dit_jax.evaluation.protocol import Shared, draws_protocol, samplings, weights_protocol
from dit_jax.evaluation.run import run as evaluate
from dit_jax.files import make_folder
from dit_jax.job.compiled import use_cache
from dit_jax.log import say
from dit_jax.training import loop

# Of one core: seconds that a training step costs beside its FLOPs, FLOP/s, seconds of a program.
STEP, RATE, COMPILE = 2e-3, 4e9, 2.0

_SHARED: dict = {}  # what evaluations of several cells have in common: held-out images, feature network, reference


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a study works: the folder of the runs and the file of the records."""

    workdir: str
    records: str


def train(cell: Cell, place: Place) -> str:
    """Train the cell, its teacher first, unless that is done; returns the run folder."""
    cfg, folder = config_of(cell), folder_of(cell, place.workdir)
    if cfg.train.steps in checkpoint.steps(folder):
        return folder
    init = ("", None)
    if cell.student:
        init = (train(cell.teacher, place), config_of(cell.teacher).train.steps)
    make_folder(os.path.dirname(folder))
    loop.run(cfg, folder, quiet=True, init=init)
    return folder


def grids(cell: Cell) -> list[Config]:
    """The cell's config with each of its grids of sampling settings."""
    cfg, found = config_of(cell), []
    for grid in samplings_of(cell):
        own = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, **grid))
        found.append(dataclasses.replace(own, sample=samplings(own)[0]))  # of a sampler that the model takes
    return found


def _drawn(protocol: dict) -> str:
    """What tells the records of one checkpoint apart: its weights and the settings of its samples."""
    return json.dumps([protocol.get("weights"), protocol.get("samples")], sort_keys=True)


def missing(cell: Cell, records: list[dict]) -> list[Config]:
    """The grids of which not all is recorded."""
    there = {_drawn(r["protocol"]) for r in records if r["study"]["cell"] == cell.name}
    return [cfg for cfg in grids(cell) if not wanted(cfg) <= there]


def wanted(cfg: Config) -> set[str]:
    """What tells each record of a grid apart."""
    if not cfg.eval.samples:
        return {_drawn(weights_protocol(cfg))}
    return {_drawn(draws_protocol(dataclasses.replace(cfg, sample=one))) for one in samplings(cfg)}


def score(cell: Cell, place: Place, todo: list[Config]) -> int:
    """Evaluate the grids `todo` of a trained cell and add their records; returns how many records these are."""
    count = 0
    for cfg in todo:
        kind = cfg.data, dataclasses.replace(cfg.eval, samplers=(), steps=(), guidance=(), reuse=(), ema=())
        shared = _SHARED.setdefault(str(kind), Shared(cfg, make_mesh(cfg.mesh)))
        made = evaluate(cfg, folder_of(cell, place.workdir), [cfg.train.steps], True, shared)
        append(place.records, (record | {"study": cell.note} for record in made))
        count += len(made)
    return count


def run_cell(cell: Cell, place: Place) -> str:
    """Train and score what is missing of a cell; returns a line about it. What fails is recorded, with its reason."""
    todo = missing(cell, read(place.records)[0])
    try:
        if todo:
            train(cell, place)
        return f"{score(cell, place, todo)} records"
    except (Interrupted, KeyboardInterrupt):
        raise
    except Exception as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        for folder in (os.path.abspath(place.workdir), place.workdir):  # records name no folder of this machine
            text = text.replace(folder, "W")
        append(place.records, [{"study": cell.note, "failed": text}])
        return f"FAILED: {text}"


def run_column(column: list[Cell], place: Place) -> str:
    """Run cells of one size one after another; returns a line about them."""
    use_cache(os.path.join(place.workdir, "compiled"))
    for cell in column:
        say(f"{cell.name}  {run_cell(cell, place)}")
    return f"{len(column)} cells"


def weight(cell: Cell, todo: list[Config]) -> float:
    """About how many seconds the grids `todo` of a cell take on one core: its training, its images, and what compiles."""
    cfg = config_of(cell)
    before = [budget for budget in cell.study.budgets if budget < cell.budget]
    share = (
        1.0 if cell.student or not before else 1.0 - before[-1] / cell.budget
    )  # a teacher goes on from its last budget
    share *= not (cell.rest or cell.chosen)
    trained = share * cfg.train.steps * (STEP + cfg.train.batch_size * make_objective(cfg).flops() / RATE)
    drawn = [one for grid in todo if grid.eval.samples for one in samplings(grid)]
    images = cell.study.decisive if cell.chosen else cell.study.samples
    calls = images * sum(one.steps * (1 + (one.guidance != 1.0)) for one in drawn)
    return trained + calls * flops.forward_flops(cfg.model) / RATE + COMPILE * (len(drawn) + 4)
