"""`train --init`: a new run begins with the EMA weights of another run or of a converted model, as far as they fit.

`W/init.json` records where they came from, what was taken, resized and new, and the compute that they cost. A resumed run reads its own
checkpoints only. A run killed before its first checkpoint reads the same weights again, and begins with the same bits.
"""

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from dit_jax import checkpoint
from dit_jax.config import Config, to_dict
from dit_jax.data import aspect
from dit_jax.devices.processes import agreed, by_leader, compare, leader, of_all
from dit_jax.devices.rows import on_mesh
from dit_jax.diffusion.objective import make_objective
from dit_jax.error import UsageError
from dit_jax.files import base, read
from dit_jax.log import say
from dit_jax.models.warm_start import NEW, RESIZED, TAKEN, WarmStart, check_body
from dit_jax.networks.notes import space
from dit_jax.sampling.guide import alike
from dit_jax.sampling.label import known_names
from dit_jax.sampling.weights import weights_hash
from dit_jax.training.state import abstract_state
from dit_jax.workdir import manifest
from dit_jax.workdir.folder import check_same_init, flatten, read_config, read_init

REMARKS = {
    "diffusion.process": "the output means something else, so the model has to learn it anew",
    "diffusion.prediction": "the output means something else, so the model has to learn it anew",
    "data": "the model saw other inputs",
}
SPACE = "give data.image_size and autoencoder.folder, which decide this, as there"


class Start(NamedTuple):
    """What a new run begins with."""

    begin: Callable  # (fresh parameters, weights) -> parameters
    weights: list  # of the source, on the mesh: one tree, which who makes the state takes out, so that it does not stay there
    record: dict  # for W/init.json


def check_source(cfg: Config, source: str, step: int | None, typed: bool = False) -> Config:
    """Return the config of the run `source`. Raises UsageError unless it has a checkpoint (of `step`) whose blocks fit the config, and, for
    an objective of few steps, whose model, process and input do. `typed`: see `check_teacher`."""
    found = read_config(source, flag="--init")
    check_body(found.model, cfg.model, source)
    check_teacher(cfg, found, source, typed)
    if not (steps := checkpoint.steps(source)) or (step is not None and step not in steps):
        expected = f"--init_step among {steps}" if steps else "at least one"
        raise UsageError(
            f"--init: {source}: found no checkpoint{'' if step is None else f' of step {step}'}, expected {expected}"
        )
    return found


def check_teacher(cfg: Config, old: Config, source: str, typed: bool = False) -> None:
    """Raises UsageError naming the key in which a student of few steps differs from `old`, the run `source`, or `old` cannot teach it.

    `typed`: of a command, the normalisation of latents is not compared: a run that begins takes it from its data.
    """
    if not (name := cfg.objective.name):
        return
    if (process := old.diffusion.process) != "flow":
        why = f"objective.name = {name!r} learns paths of a flow; begin with a run of diffusion.process = 'flow', trained or converted"
        raise UsageError(f"--init: {source}: diffusion.process: found {process!r}, expected 'flow': {why}")
    own = {*checkpoint.FREE, "dtype", "target", "time_scale"}
    sides = [{f"model.{key}": value for key, value in to_dict(c.model).items()} | alike(c) for c in (cfg, old)]
    found, expected = (
        side | {"diffusion.prediction": c.diffusion.prediction} for side, c in zip(sides, (cfg, old), strict=True)
    )
    for key in found:
        group, _, last = key.partition(".")
        unset = last in ("text_width", "text_sha256") and not found[key]  # in a command: a run that begins sets them
        if last in own or unset or (typed and group == "autoencoder") or found[key] == expected[key]:
            continue
        give = f"give --config.{key}={expected[key]}" if group != "input" else SPACE
        why = f"as {source} has, which objective.name = {name!r} begins with; {give}"
        raise UsageError(f"{key}: found {found[key]!r}, expected {expected[key]!r}, {why}")
    if not cfg.objective.taught:
        return
    begun, scale = old.objective, cfg.objective.guidance
    if begun.name == "consistency" or (begun.name == "progressive" and begun.rounds):
        expected = "expected a run whose velocity holds at all times, so one before it was distilled"
        raise UsageError(f"--init: {source}: found objective.name = {begun.name!r}, {expected}")
    if scale != 1.0 and begun.name and begun.guidance != 1.0:
        raise UsageError(f"objective.guidance: found {scale:g}, expected 1: guidance is inside {source} already")
    if scale != 1.0 and not (old.train.cond_dropout and (old.model.classes or old.model.text)):
        raise UsageError(
            f"objective.guidance: found {scale:g}, expected 1: {source} has no trained null class to guide with"
        )


def check_taught(cfg: Config) -> None:
    """Raises UsageError if the objective needs a teacher: called for a run that begins without --init."""
    if cfg.objective.taught:
        expected = "expected the run whose weights teach, --init=WORKDIR"
        raise UsageError(f"--init: found none, {expected}, with objective.name = {cfg.objective.name!r}")


def open_init(
    cfg: Config, workdir: str, mesh, init: tuple[str, int | None], names: Callable[[], Sequence], quiet: bool = False
) -> Start | None:
    """Load the weights that `init`, a run folder and a step or None, names; None for a run without, and for one that has checkpoints.

    `names()`: names of the new run's classes, () if unknown. All processes call it. Raises UsageError if the source does not fit, is
    not the same on all hosts, or is not the one that the run in `workdir` began with.
    """
    source, step = init
    begun, resumes = by_leader(lambda: (check_same_init(workdir, source, step), bool(checkpoint.steps(workdir))))
    if not source and not resumes:
        check_taught(cfg)
    if not source or resumes:
        return None
    step = begun.get("step", step)
    step = by_leader(lambda: _find_step(cfg, source, step))
    with agreed():
        old = check_source(cfg, source, step)
        if not leader():  # where the source may be another copy
            checkpoint.find_step(source, step, "ema")
    labels = begun or by_leader(lambda: _rows(old, cfg, known_names(old, source), names()))
    weights = checkpoint.load(source, step, "ema", old.model, functools.partial(on_mesh, mesh))[1]
    digest = weights_hash(weights)
    _check_same_weights(source, step, digest)
    if begun and begun["weights_sha256"] != digest:
        where = f"--init: {source}, step {step}: found weights with the SHA-256 {digest}"
        raise UsageError(f"{where}, expected {begun['weights_sha256']}, as when {workdir} began; use another --workdir")
    warm = WarmStart(old.model, cfg.model, tuple(labels["rows"]), old.train.cond_dropout > 0)
    fresh = abstract_state(cfg, mesh).params
    kinds = warm.kinds(fresh, weights)
    begun = begun or {
        "source": source,
        "run": base(source),
        "step": step,
        "flops_train": by_leader(lambda: _flops(old, source, step)),
        "weights_sha256": digest,
        **labels,
        **{kind: [name for name in kinds if kinds[name] == kind] for kind in (TAKEN, RESIZED, NEW)},
    }
    if not quiet:
        _introduce(begun, old, cfg, fresh)
    return Start(warm.begin, [weights], begun)


def _find_step(cfg: Config, source: str, step: int | None) -> int:
    check_source(cfg, source, step)
    return checkpoint.find_step(source, step, "ema")


def _check_same_weights(source: str, step: int, digest: str) -> None:
    """Raises CommonError unless all processes read the same weights: they may be split, so that of each only a part was used."""
    files = hashlib.sha256(read(os.path.join(checkpoint.path_of(source, step), manifest.NAME), manifest.LARGEST))
    found = {"weights, SHA-256": digest, "files, SHA-256 of their manifest": files.hexdigest()}
    compare(of_all({f"--init: {name}": value for name, value in found.items()}), "give every host the same weights")


def _rows(old: Config, new: Config, old_names: Sequence, new_names: Sequence) -> dict:
    """Rows: for each new class the old class with its name if both sides know names, else with its number; None if there is none."""
    if not (old_names and new_names):
        numbers = range(new.model.classes)
        return {"rows_by": "number", "rows": [number if number < old.model.classes else None for number in numbers]}
    found = {name: number for number, name in enumerate(_distinct(old_names))}
    return {"rows_by": "name", "rows": [found.get(name) for name in _distinct(new_names)]}


def _distinct(names: Sequence) -> list[tuple]:
    """Names with the count of the same name before, as some data sets have two classes of one name."""
    seen, found = Counter(), []
    for name in names:
        found.append((name, seen[name]))
        seen[name] += 1
    return found


def _flops(cfg: Config, source: str, step: int) -> float | int | None:
    """Training FLOPs of a checkpoint with all that it began from; None for converted weights that do not say how long they were trained."""
    before = read_init(source).get("flops_train", 0)
    if step == 0 or before is None:
        return None
    cost, images = make_objective(cfg).flops, aspect.seen(checkpoint.trained_on(source, step), cfg.train, step)
    return before + sum(count * cost(shape) for shape, count in images.items())


def _introduce(record: Mapping, old: Config, new: Config, fresh) -> None:
    """Log what is taken, resized and new, and in what the two runs differ."""
    sizes = {name: leaf.size for name, leaf in flatten(fresh, "/").items()}
    say(f"--init: {record['source']}, step {record['step']}, EMA weights")
    for kind in (TAKEN, RESIZED, NEW):
        if names := record[kind]:
            count = sum(sizes[name] for name in names)
            say(f"  {kind + ':':8} {count:,} parameters in {len(names)} arrays: {', '.join(_grouped(names, sizes))}")
    if record["rows"] and old.model.classes:
        kept, by = sum(row is not None for row in record["rows"]), record.get("rows_by", "name")
        why = "" if by == "name" else ", as the names of one side are unknown"
        say(
            f"  labels:  {kept} of {new.model.classes} classes take a row of the source's {old.model.classes}, by {by}{why}"
        )
    before, after = (
        flatten({k: to_dict(cfg)[k] for k in ("model", "diffusion")}) | {"data": space(cfg)} for cfg in (old, new)
    )
    for key in before:
        if before[key] != after[key] and key.removeprefix("model.") not in (*checkpoint.FREE, "dtype"):
            remark = f" ({REMARKS[key]})" if key in REMARKS else ""
            if key == "model.input_size" and "learned" not in (old.model.positions, new.model.positions):
                remark = " (positions are computed from the size, so nothing is resized)"
            say(f"  {key}: {before[key]} there, {after[key]} here{remark}")


def _grouped(names: Sequence, every: Mapping) -> list[str]:
    """Names, with those of a group given by the group's name if all of it is among them."""
    others = [name for name in every if name not in names]
    found = {}
    for name in names:
        parts = name.split("/")
        groups = ["/".join(parts[:end]) for end in range(1, len(parts))]
        found[next((group for group in groups if not any(o.startswith(f"{group}/") for o in others)), name)] = None
    return list(found)
