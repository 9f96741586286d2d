"""The cells of the study: a table of teachers and students, and the config of each.

A teacher is a size at a training budget. The learning rate is constant and the EMA a power EMA, so one run a size passes all budgets and is
kept at each of them. A student begins with a teacher's weights and is trained for a share of its teacher's training FLOPs.
"""

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from dit_jax.config import Config, ObjectiveConfig, SweepConfig, resolve
from dit_jax.diffusion.objective import make_objective
from dit_jax.job.launch import load_config
from dit_jax.sweep.ladder import make_cell

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
VERSION = 1  # of the table below: records of another are refused
SNAPSHOTS = 4  # of the EMA tracks until the smallest budget


@dataclass(frozen=True)
class Student:
    """How a teacher is distilled, and how the student is sampled."""

    objective: dict  # keys of ObjectiveConfig
    rate: float  # learning rate at the width of `sweep.base_width`
    shares: tuple  # of the teacher's training FLOPs
    samplings: tuple  # grids of settings to score, keys of EvalConfig
    model: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """One kind of data with its ladder of teachers, its students and the settings that samples are scored at."""

    name: str
    config: str  # file that the cells' configs begin with
    changes: dict  # group -> keys, over that config
    sizes: tuple  # (width, depth, heads), smallest first
    budgets: tuple  # training FLOPs of a teacher
    samplings: tuple  # of the teachers, grids as of students
    students: dict  # name -> Student
    metric: str
    main: float = 0.05  # the share that is studied first
    samples: int = 500  # images of a score
    decisive: int = 5000  # images of a score at the points that decide
    later: tuple = ()  # students that are studied after the others
    batch: int = 16  # of students, whose shares are few steps
    core: int = 1  # of the teachers' grids, the first are scored before anything else
    seeds: int = 2  # at the corners: the smallest and the largest size


@dataclass(frozen=True)
class Cell:
    """One checkpoint of the study: a teacher at a budget, or a student of it."""

    study: Study
    size: tuple
    budget: float
    seed: int = 0
    student: str = ""  # "" = the teacher
    share: float = 0.0
    rest: bool = False  # of a teacher: its other samplings, scored later
    chosen: tuple = ()  # (sampler, steps, guidance) that are scored again with more images

    @property
    def teacher(self) -> "Cell":
        return dataclasses.replace(self, student="", share=0.0, rest=False, chosen=())

    @property
    def run(self) -> str:
        """Name of the run folder: teachers of one size share a run."""
        name = f"{self.study.name}-w{self.size[0]}" + f"-s{self.seed}" * (self.seed > 0)
        return f"{name}-{_budget(self.budget)}-{self.student}-{self.share:.0%}" if self.student else name

    @property
    def name(self) -> str:
        return self.run if self.student else f"{self.run}-{_budget(self.budget)}"

    @property
    def note(self) -> dict:
        """What records say of the cell, as the key `study`."""
        width, depth, _ = self.size
        said = {"version": VERSION, "cell": self.name, "data": self.study.name, "width": width, "depth": depth}
        return said | {"budget": self.budget, "seed": self.seed, "objective": self.student, "share": self.share}

    @property
    def rank(self) -> tuple:
        """Order of work: cheap budgets and the main share first, so that a part of the study is a whole smaller one."""
        late = max(self.study.budgets.index(self.budget) - 1, 0)
        side = self.rest or self.seed > 0 or (self.student != "" and self.share != self.study.main)
        side |= self.student in self.study.later
        return late, side, self.budget, self.seed, self.size, self.student != "", self.share


def _budget(flops: float) -> str:
    return f"C{flops:.3g}".replace("+", "")


def make_cells(studies: Iterable[Study]) -> list[Cell]:
    """All cells in the order in which they are worked on, the studies one after another."""
    found = []
    for study in studies:
        teachers = [Cell(study, size, budget) for budget in study.budgets for size in study.sizes]
        corners = [c for c in teachers if c.size in study.sizes[:: len(study.sizes) - 1]]
        teachers += [dataclasses.replace(c, seed=seed) for seed in range(1, study.seeds) for c in corners]
        own = [*teachers, *(dataclasses.replace(cell, rest=True) for cell in teachers)]
        for teacher in teachers:
            for name, student in study.students.items():
                shares = student.shares if teacher.seed == 0 else [s for s in student.shares if s == study.main]
                own += [dataclasses.replace(teacher, student=name, share=share) for share in shares]
        found += sorted(own, key=lambda cell: cell.rank)
    return found


_BASES: dict = {}  # configs of studies, read once


def _base(study: Study) -> Config:
    """The config that the cells of a study begin with."""
    key = study.config, repr(study.changes)
    if key not in _BASES:
        values = load_config(os.path.join(ROOT, study.config))  # a notebook runs in another folder
        for group, changes in study.changes.items():
            values[group].update(changes)
        _BASES[key] = resolve(values)
    return _BASES[key]


def config_of(cell: Cell) -> Config:
    """The config that the cell is trained with."""
    study, base = cell.study, _base(cell.study)
    ladder = [make_cell(base, "", budget, cell.size).cfg for budget in study.budgets if budget <= cell.budget]
    made = ladder[-1]
    marks = tuple(one.train.steps for one in ladder)
    every = {"log_every": max(marks[-1] // 20, 1), "checkpoint_every": min(base.train.checkpoint_every, marks[-1])}
    train = dataclasses.replace(made.train, seed=cell.seed, keep_at=marks, **every)
    optim = dataclasses.replace(made.optim, snapshot_every=max(marks[0] // SNAPSHOTS, 1))
    made = dataclasses.replace(made, train=train, optim=optim)
    return _student(cell, made, base.sweep) if cell.student else made


def _student(cell: Cell, teacher: Config, sweep: SweepConfig) -> Config:
    """The student's config: the steps that its share pays for, and a rate that scales as its teacher's."""
    how, batch = cell.study.students[cell.student], cell.study.batch
    model = dataclasses.replace(teacher.model, **how.model)
    made = dataclasses.replace(teacher, model=model, objective=ObjectiveConfig(**how.objective))
    steps = max(round(cell.share * cell.budget / (make_objective(made).flops() * batch)), 1)
    rate = how.rate * (sweep.base_width / model.width) ** sweep.width_power
    optim = dataclasses.replace(teacher.optim, learning_rate=rate, warmup_steps=min(50, steps // 4), ema_tracks=())
    fields = dict(steps=steps, batch_size=batch, keep_at=(), log_every=max(steps // 10, 1), checkpoint_every=steps)
    first = how.samplings[0]
    sampler = dict(sampler=first["samplers"][0], steps=first["steps"][0], guidance=first["guidance"][0])
    made = dataclasses.replace(made, sample=dataclasses.replace(teacher.sample, **sampler))
    return dataclasses.replace(made, optim=optim, train=dataclasses.replace(teacher.train, **fields))


def samplings_of(cell: Cell) -> list[dict]:
    """The grids of settings that the cell is scored at, as changes of EvalConfig; the first of a teacher is its held-out loss."""
    study = cell.study
    if cell.chosen:
        more = dict(loss=False, samples=study.decisive)
        return [more | dict(samplers=(s,), steps=(n,), guidance=(g,)) for s, n, g in cell.chosen]
    grids = study.samplings[study.core :] if cell.rest else study.samplings[: study.core]
    grids = study.students[cell.student].samplings if cell.student else grids
    loss = [] if cell.student or cell.rest else [dict(loss=True, samples=0)]
    return [*loss, *(dict(loss=False, samples=study.samples) | grid for grid in grids)]


def folder_of(cell: Cell, workdir: str) -> str:
    return os.path.join(workdir, cell.run)
