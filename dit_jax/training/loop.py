"""The training loop: open the data, restore or initialise the state, step, log, save."""

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
from clu.parameter_overview import get_parameter_overview

from dit_jax import checkpoint, flops
from dit_jax.bind import bind
from dit_jax.config import Config, to_dict
from dit_jax.data import source as sources
from dit_jax.data.aspect import seen
from dit_jax.data.degrade import make_degrade
from dit_jax.data.pipeline import Batches, make_batches
from dit_jax.devices.mesh import check_batch, make_mesh, peak_flops, put_batch
from dit_jax.devices.numerics import ambient
from dit_jax.devices.processes import asked_to_stop, check_folder, compare, everyone_is_here, gather, leader, together
from dit_jax.diffusion.objective import make_objective
from dit_jax.diffusion.task import make_task
from dit_jax.error import Interrupted, JobError, UsageError
from dit_jax.files import is_file, write_file
from dit_jax.job.launch import stop_flag
from dit_jax.log import progress, say, warn
from dit_jax.networks.autoencoder import StepEncoder, follow_latents
from dit_jax.networks.caption import chained, follow, step_encoder, tell_cut, text_flops
from dit_jax.networks.caption_states import tokens_of
from dit_jax.networks.in_step import encoder_flops, encoder_of, open_splits
from dit_jax.sampling.label import keep_names
from dit_jax.training.diagnose import find_layer
from dit_jax.training.grid import make_grid
from dit_jax.training.guard import run_twice
from dit_jax.training.init import Start, open_init
from dit_jax.training.save import make_snapshots, save_state
from dit_jax.training.state import abstract_state, make_state, restored_state
from dit_jax.training.step import make_train_step
from dit_jax.training.trace import step_annotation, tracing
from dit_jax.workdir.folder import check_same_run, make_folder, provenance, read_config
from dit_jax.workdir.goodput import Ledger, close, lose, note
from dit_jax.workdir.scalars import Scalars, import_wandb, open_scalars


class Outputs(NamedTuple):
    """What a training shows."""

    write: Callable  # (step, scalars, picture=path of a PNG), into files
    flush: Callable  # (), what was written is safe when it returns
    report: Callable  # (step, scalars) -> rates, on standard error
    now: Callable  # () -> seconds of the job so far
    trace: Callable  # (step, state), before each step
    grid: Callable | None  # (step, EMA weights, stop) -> path of a picture or ""
    score: Callable | None  # (step, state, restored=False) -> scalars of the evaluation

    def log(self, pending: tuple[int, dict] | None) -> None:
        """Write and report a step and its scalars, if there are any."""
        if not pending:
            return
        step, scalars = pending
        values = {name: float(value) for name, value in jax.device_get(scalars).items() if name != "streak"}
        self.write(step, {**values, **self.report(step, values), "time": self.now()})

    def evaluate(self, step: int, state, restored: bool = False) -> None:
        """Score a state and write the scalars, if there are any."""
        if scores := self.score(step, state, restored):
            self.write(step, {**scores, "time": self.now()})


def prepare_workdir(cfg: Config, workdir: str, init: Mapping | None = None) -> None:
    """Makes the run's folder with config.json, and with `init` as init.json, or checks that it belongs to this run.

    A larger train.steps is written there.
    """
    path = os.path.join(workdir, "config.json")
    if is_file(path):
        checkpoint.check_trained(workdir)
        check_same_run(cfg, workdir)
        if read_config(workdir).train.steps >= cfg.train.steps:
            return
    make_folder(workdir, "config.json", cfg, init)


def open_data(cfg: Config) -> tuple[sources.Source, sources.Source]:
    """Opens the training split and the held-out split.

    Raises UsageError unless they fit the model and share no images, and unless the sampler fits the process.
    """
    data, model = cfg.data, cfg.model
    source, held_out = open_splits(cfg, data.split, data.held_out_split)
    if source.image_shape[0] == data.image_size == 8 * model.input_size:
        raise UsageError(
            f"data.latents: found none for a model of {model.input_size} x {model.input_size} latents and images of "
            f"{data.image_size} pixels, expected a folder of latents, or data.encode = in_step to encode while training, or "
            "data.image_size = model.input_size to train on pixels"
        )
    if data.split == data.held_out_split or source.overlaps(held_out):
        raise UsageError(
            f"data.held_out_split: found {data.held_out_split!r}, which shares images with data.split = {data.split!r}"
        )
    where = source.key.removeprefix("data.")
    classes = source.classes if model.classes or not model.text else 0  # of words a model may leave labels alone
    for key, found, expected in (
        ("model.classes", model.classes, classes),
        ("model.channels", model.channels, source.image_shape[-1]),
        ("model.input_size", model.input_size, source.image_shape[0]),
    ):
        if found != expected:
            none = " (0: no labels)" if key == "model.classes" and 0 in (found, expected) else ""
            raise UsageError(
                f"{key}: found {found}, expected {expected}{none}, as the data ({getattr(data, where)}) has; set --config.{key}={expected}"
            )
    if model.text and None in (source.captions, held_out.captions):
        expected = "expected data with captions; set --config.model.text='' to train without"
        raise UsageError(f"model.text: found {model.text!r} and no captions in {source.where}, {expected}")
    make_task(cfg)
    return source, held_out


def _check_same_data(batches: Batches, cfg: Config) -> None:
    """Raises CommonError on all processes unless all opened the same records and encoder of captions, wherever these are stored."""
    if jax.process_count() > 1:
        sums = {"model.text_sha256": cfg.model.text_sha256}
        found = gather({f"{batches.source.key}: {name}": value for name, value in batches.identity.items()} | sums)
        compare(found, "give every host the same data")


def run(
    cfg: Config,
    workdir: str,
    quiet: bool = False,
    since: float | None = None,
    scoring: Callable | None = None,
    init: tuple[str, int | None] = ("", None),
) -> int:
    """Trains to `train.steps` from the folder's newest checkpoint, if any. Returns the steps done now (0: none was left).

    `since`: start of the job, in seconds since the epoch (None: now). `scoring`: `evaluation.in_run.make_scores`, if there is
    train.evaluate_every. `init`: run folder, and step or None, whose weights a new run begins with. Raises UsageError, JobError, and
    Interrupted after SIGTERM made it save and stop.
    """
    ledger = Ledger("train", since or time.time())
    with _stop_flag() as stop, together():
        (source, held_out), cfg = open_data(cfg), follow(follow_latents(cfg))
        mesh = make_mesh(cfg.mesh)
        check_batch(mesh, cfg.train.batch_size, cfg.optim.accumulate)
        bind(cfg.model, mesh)  # says now if these devices lack its attention
        batches = make_batches(
            cfg.data,
            batch_size=cfg.train.batch_size,
            seed=cfg.train.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            source=source,
            tokens=tokens_of(cfg),
            degrade=make_degrade(cfg),
        )
        _check_same_data(batches, cfg)
        grid = make_grid(cfg, workdir) if cfg.train.grid_every else None
        score = None
        if every := cfg.train.evaluate_every:
            if not scoring:
                raise UsageError(f"train.evaluate_every: found {every}, expected 0 for a training without `scoring`")
            score = scoring(cfg, workdir, mesh, batches.identity, stop, ledger, quiet)
        if cfg.train.wandb and leader():
            import_wandb()
        names = functools.cache(lambda: getattr(source, "class_names", ()) or sources.class_names(cfg.data))
        start = open_init(cfg, workdir, mesh, init, names, quiet)
        check_folder(workdir)
        if leader():
            prepare_workdir(cfg, workdir, start and start.record)
            if any(part.folder for part in cfg.data.parts) and not checkpoint.steps(workdir):
                keep_names(workdir, names())
            if not quiet:
                _introduce(cfg, batches, held_out)
        everyone_is_here("workdir")
        try:
            kept = (cfg.train.keep, cfg.train.keep_at, cfg.train.keep_every)
            with contextlib.closing(checkpoint.Saver(workdir, *kept)) as saver, together():
                return _train(
                    cfg, workdir, mesh, saver, batches, stop, ledger, (grid, score), start, quiet or not leader()
                )
        finally:
            for index, problem in sources.bad_records(source).items():
                warn(f"record {index} was left out: {problem}")


def _introduce(cfg: Config, batches: Batches, held_out: sources.Source) -> None:
    """Logs what the run is trained on."""
    sources.introduce(batches.source, held_out)
    tell_cut(cfg.model, batches.source, 1000)
    if batches.buckets:
        batches.buckets.introduce(cfg.train.batch_size)


def _train(
    cfg: Config, workdir: str, mesh, saver, batches, stop: list, ledger: Ledger, watch, start: Start | None, quiet: bool
) -> int:
    """Restores or initialises the state, then trains. `watch`: the last fields of Outputs; `start`: what a new run begins with."""
    first = checkpoint.newest_verified(workdir)
    every = cfg.train.keep_every
    stated = {"keep_at": cfg.train.keep_at, "keep_every": range(every, first + 1, every) if every else ()}
    for name, steps in stated.items():
        missing = sorted({step for step in steps if step <= first} - {*checkpoint.steps(workdir)})
        if missing and not quiet:
            shown = f"[{missing[0]}, ..., {missing[-1]}]" if len(missing) > 8 else missing
            warn(f"train.{name}: {workdir} is at step {first}, past the steps {shown}, and has no checkpoint of them")
    if first >= cfg.train.steps:
        say(f"{workdir}: all {cfg.train.steps} steps are done") if not quiet else None
        return 0
    if first:
        like = abstract_state(cfg, mesh)
        items, position = checkpoint.restore(workdir, first, like.items(), cfg.model)
        state = restored_state(first, items, like)
        batches.set_state(position)
    else:
        state = make_state(cfg, mesh, start.begin, start.weights.pop()) if start else make_state(cfg, mesh)
        if leader():
            write_file(
                os.path.join(workdir, "parameters.txt"), get_parameter_overview(state.params, include_stats=False)
            )
    if leader():
        lose(ledger, workdir, first)
        note(ledger, workdir)
        scalars = open_scalars(workdir, first, not quiet, cfg.train.wandb)
    else:
        scalars = Scalars(lambda step, values, picture="": None, lambda: None, lambda: None)
    try:
        with ledger.spend("step"), tracing(cfg.train.profile, workdir) as trace:
            outputs = Outputs(
                scalars.write, scalars.flush, _reporter(cfg, ledger, batches.identity, quiet), ledger.now, trace, *watch
            )
            if first and _due(first, cfg.train.evaluate_every):
                with ledger.spend("evaluation"):
                    outputs.evaluate(first, state, restored=True)
            last = first
            if not (first and stop):
                last = _loop(cfg, workdir, mesh, saver, batches, stop, ledger, state, outputs)
                with ledger.spend("save"):
                    saver.wait()
                    everyone_is_here("saved")
    finally:
        scalars.close()
        if leader():
            close(ledger, workdir, quiet)
    if last < cfg.train.steps:
        raise Interrupted(f"saved step {last} of {cfg.train.steps} in {workdir}; the same command goes on from there")
    return last - first


def _loop(cfg: Config, workdir: str, mesh, saver, batches, stop: list, ledger: Ledger, state, outputs) -> int:
    """Trains and saves; returns the last step. Scalars are read one step late, so that the device never waits for the host."""
    encoder = chained(encoder_of(batches.source, mesh), step_encoder(cfg, mesh))
    program, meta = make_train_step(cfg, mesh, encoder), {"model": to_dict(cfg.model), **provenance(), **ambient()}
    first, every, pending, known, recent = int(state.step), cfg.train.replay_every, None, set(), []
    step = lambda state, batch: program(state, batch, *encoder.weights)  # noqa: E731
    snapshot = make_snapshots(cfg, workdir, saver, meta, ledger)

    def save() -> None:
        nonlocal pending, recent
        outputs.log(pending)
        _check_streaks(cfg, recent, state, batch, encoder)
        pending, recent = None, []
        with ledger.spend("save"):
            outputs.flush()
            save_state(saver, state, batches.get_state(), meta, ledger, workdir)

    for i in range(first + 1, cfg.train.steps + 1):
        saver.check()
        outputs.trace(i, state)
        with ledger.spend("data"):
            batch = put_batch(mesh, next(batches))
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        kind = "step" if shapes in known else "compile"  # a program for each bucket
        with ledger.spend(kind), step_annotation(i):
            twice = every and i % every == 0
            state, scalars = run_twice(step, state, batch, i) if twice else step(state, batch)
        ledger.last = i
        if kind == "compile" and leader():
            note(ledger, workdir)
        known.add(shapes)
        outputs.log(pending)
        pending = (i, scalars) if i % cfg.train.log_every == 0 or i in (1, cfg.train.steps) else None
        recent.append((i, scalars))
        stopping = asked_to_stop(i) if jax.process_count() > 1 else bool(stop)
        if i % cfg.train.skips_in_a_row == 0:
            _check_streaks(cfg, recent[:-1], state, batch, encoder)
            recent = recent[-1:]
        snapshot(i, state)
        due = i % cfg.train.checkpoint_every == 0 or i == cfg.train.steps or stopping
        due = due or checkpoint.stays(i, cfg.train.keep_at, cfg.train.keep_every)
        if due:
            save()
        if stopping:
            break
        drawn, scored = _due(i, cfg.train.grid_every), _due(i, cfg.train.evaluate_every, cfg.train.steps)
        if drawn or scored:
            outputs.log(pending)
            pending = None
            with ledger.spend("evaluation"):
                if drawn and (picture := outputs.grid(i, state.ema, stop)):
                    outputs.write(i, {}, picture)
                if scored:
                    outputs.evaluate(i, state)
            if stop:  # since then: the same command scores this step
                if not due:
                    save()
                break
    return i


def _due(step: int, every: int, last: int = 0) -> bool:
    return every > 0 and (step % every == 0 or step == last)


def _reporter(cfg: Config, ledger: Ledger, data: dict, quiet: bool):
    """A function (step, scalars) -> more scalars that prints progress; if `quiet`, it does nothing."""
    if quiet:
        return lambda step, scalars: {}
    peak, source = peak_flops()
    count, against = flops.parameters(cfg.model), f"{peak / 1e12:.3g} TFLOP/s ({source})"
    beside, of_text, cost = encoder_flops(cfg), text_flops(cfg), make_objective(cfg).flops
    without = f" and leaves out the encoder's {beside:.3g} FLOPs an image" if beside else ""
    without += f" and leaves out the text encoder's {of_text:.3g} FLOPs a caption" if of_text else ""
    say(f"{count:,} parameters; MFU is against {against}{without}; compiling ...")

    def flops_until(step: int) -> float:
        return float(sum(images * cost(shape) for shape, images in seen(data, cfg.train, step).items()))

    def apart() -> float:
        return ledger.seconds["evaluation"] + ledger.seconds["compile"]  # a bucket is compiled when it is first met

    return progress(cfg.train.steps, cfg.train.batch_size, flops_until, peak, apart)


def _check_streaks(cfg: Config, recent: list[tuple[int, dict]], state, batch: dict, encoder: StepEncoder) -> None:
    """Raises JobError if too many steps in a row were skipped. `recent`: (step, scalars); `state`, `batch`: of the newest step."""
    streaks = jax.device_get([scalars["streak"] for _, scalars in recent])
    for (step, scalars), streak in zip(recent, streaks, strict=True):
        if streak >= cfg.train.skips_in_a_row:
            values = {name: float(value) for name, value in jax.device_get(scalars).items()}
            layer = find_layer(cfg, state, batch, encoder)
            raise JobError(
                f"step {step}: {streak} steps in a row were skipped, as {_reason(values)}; {layer}. "
                "The state is that of the last good step, and its checkpoints are kept. Look at the data; or train in "
                "another --workdir with a lower optim.learning_rate, with optim.clip or model.qk_norm; a larger "
                "train.skips_in_a_row lets this run go on"
            )


def _reason(values: dict) -> str:
    """Why the guard refused a step."""
    for name, what in (
        ("loss", "the loss is not finite"),
        ("grad_norm", "the gradients are not finite"),
        ("param_norm", "the update would make parameters that are not finite"),
    ):
        if not math.isfinite(values[name]):
            return what
    return f"loss ({values['loss']:.4g}) or gradient norm ({values['grad_norm']:.4g}) spike"


def _stop_flag():
    """`stop_flag` if there is one process. Several must stop at the same step: `asked_to_stop` installs its own handler."""
    return stop_flag() if jax.process_count() == 1 else contextlib.nullcontext([])
