"""Evaluates checkpoints: measures and records each protocol once, even after a kill or beside another evaluation."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from dit_jax import checkpoint, flops
from dit_jax.checkpoint.average import WidthError
from dit_jax.config import Config
from dit_jax.data.source import introduce
from dit_jax.devices.processes import agree, by_leader, common, compare, is_common, leader, of_all
from dit_jax.devices.rows import drawing_mesh, own_mesh
from dit_jax.error import Interrupted, JobError, NotFiniteError, StorageError
from dit_jax.evaluation import scores
from dit_jax.evaluation.partial import drop_partials, partial_folder
from dit_jax.evaluation.protocol import (
    TARGETS,
    Shared,
    check_config,
    loss_protocol,
    make_record,
    naming_axes,
    sample_protocol,
    samplings,
    targets,
)
from dit_jax.evaluation.width import tell_best
from dit_jax.files import remote
from dit_jax.job.launch import PATIENCE, stop_flag
from dit_jax.log import complain, say
from dit_jax.networks.caption import tell_cut
from dit_jax.sampling import parts
from dit_jax.sampling.draw import Sampling, open_sampling
from dit_jax.sampling.prompt import Prompts
from dit_jax.sampling.quantize import with_quantize
from dit_jax.sampling.reuse import with_reuse
from dit_jax.sampling.round import tell_rounds
from dit_jax.sampling.weights import load_weights, weights_hash
from dit_jax.workdir.folder import read_config
from dit_jax.workdir.goodput import Ledger, close, totals
from dit_jax.workdir.records import append_record, protocol_id, read_records

Failed = dict[tuple[int, str], str]  # (step, weights in words or id of a protocol) -> why it is not recorded
SAME = "give every host the same data and networks"


@dataclass(frozen=True)
class Task:
    """A protocol, its config (`sample.weights`, `ema`: which weights), and a function from (step, `Weights`) to metrics.

    All processes of the job call the function, which returns (metrics, further fields of the record), or None if another evaluation has
    recorded them meanwhile.
    """

    cfg: Config
    protocol: dict
    measure: Callable

    @property
    def weights(self) -> str:
        """Kind of weights, in words: ema | params | ema 0.08 (of snapshots)."""
        sample = self.cfg.sample
        return f"{sample.weights} {sample.ema:g}" if sample.ema else sample.weights

    @property
    def id(self) -> str:
        return protocol_id(self.protocol)


class Weights(NamedTuple):
    """Weights on the mesh, their SHA-256, the identity of the data that they were trained on ({}: converted), and what records note of
    them."""

    params: dict
    sha256: str
    data: dict = {}  # noqa: RUF012, never changed
    notes: dict = {}  # noqa: RUF012


def _check_stop(stop: list, what: str) -> None:
    if agree(bool(stop)):
        raise Interrupted(f"{what}; the same command goes on from there")


def _loss_tasks(cfg: Config, mesh, workdir: str, stop: list, shared: Shared) -> list[Task]:
    """Tasks for each target of the held-out images that is asked for, of each kind of weights."""
    held_out, arrays = shared.held_out
    images, cond = jax.tree.map(lambda x: x[: cfg.eval.max_images or len(x)], arrays)

    def look() -> None:
        _check_stop(stop, f"{workdir}: what is recorded stays")

    def measure(target: str, step: int, weights: Weights) -> tuple[dict, dict]:
        found = TARGETS[target][1](cfg, weights.params, images, cond, mesh, look)
        return found, {"metric_signs": {name: -1 for name in found if not name.endswith("_se")}}

    found = []
    for weights, ema in dict.fromkeys((sample.weights, sample.ema) for sample in samplings(cfg)):
        chosen = dataclasses.replace(cfg, sample=dataclasses.replace(cfg.sample, weights=weights, ema=ema))
        for target in targets(cfg):
            protocol = loss_protocol(chosen, held_out, target)
            found.append(Task(chosen, protocol, functools.partial(measure, target)))
    return found


def _sample_task(cfg: Config, sampling: Sampling, workdir: str, stop: list, quiet: bool, shared: Shared) -> Task:
    """The task for the metrics of images drawn by `cfg.sample`."""
    sampling = dataclasses.replace(sampling, cfg=cfg)
    protocol, network = sample_protocol(cfg, sampling, shared), scores.keeping(shared.network, sampling.shape)

    def draw(sampling, params, times: list, indices: np.ndarray, most: int) -> Iterator[parts.Batch]:
        for images, labels in _timed(sampling.draw(params, cfg.eval.seed, indices, most, stop), times):
            yield network.encode(images), labels

    def recorded(step: int) -> bool:
        return (step, protocol_id(protocol)) in read_records(workdir)

    def score(sampling, coded: Iterator, times: list) -> tuple[dict, dict]:
        metrics, signs = scores.measure((part for part, _ in coded), network, shared.reference, cfg.eval)
        cost = {"flops_sample": sampling.flops} | ({"seconds_sample": float(np.median(times))} if times else {})
        more = {"reuse": sampling.plan.describe()} if sampling.plan else {}
        more |= {"quantize": {"sha256": sampling.scales.sha256}} if sampling.scales else {}
        return metrics, {"metric_signs": signs} | cost | more

    def measure(step: int, weights: Weights) -> tuple[dict, dict] | None:
        drawing, params = with_quantize(sampling, weights.params, weights.sha256, workdir, step)
        drawing = with_reuse(drawing, params, weights.sha256, workdir, step)
        job = drawing.describe(weights.sha256, step, cfg.eval.seed)
        folder = partial_folder(workdir, step, protocol_id(protocol))
        with _alone_in(folder, stop) as check:
            store = parts.Store(folder, job | {"features": network.sha256}, (network.size,), check)
            if by_leader(lambda: recorded(step)):
                return None
            times: list[float] = []
            coded = parts.gather(store, cfg.eval.samples, functools.partial(draw, drawing, params, times), stop, quiet)
            return by_leader(lambda: score(drawing, coded, times))

    return Task(cfg, protocol, measure)


def _timed(batches: Iterator[parts.Batch], times: list[float]) -> Iterator[parts.Batch]:
    """Yields the same batches and adds to `times` each one's seconds an image of all hosts, without the first, which compiles."""
    began = None
    for batch in batches:
        if began is not None:
            times.append((time.perf_counter() - began) / (len(batch[1]) * jax.process_count()))
        yield batch
        began = time.perf_counter()


@contextlib.contextmanager
def _alone_in(folder: str, stop: list) -> Iterator[Callable[[], None]]:
    """Locks the folder of an unfinished metric; waits while another evaluation holds the lock. Yields `check()`, see `files.lock`."""
    told = False
    with contextlib.ExitStack() as stack:
        while True:
            try:
                check = stack.enter_context(parts.locked_together(folder))
                break
            except StorageError:
                raise
            except JobError:
                if not told:
                    told = say(f"{folder}: another evaluation draws these images; waiting for it") is None
                _check_stop(stop, f"{folder}: another evaluation draws these images")
                _wait(5.0 if remote(folder) else 0.1, stop)
        yield check


def tasks(cfg: Config, workdir: str, mesh, stop: list, quiet: bool, shared: Shared | None = None) -> list[Task]:
    """The tasks of a config for every checkpoint. Raises UsageError for a protocol that is impossible."""
    check_config(cfg)
    shared = shared or Shared(cfg, own_mesh(mesh))
    found = _loss_tasks(cfg, mesh, workdir, stop, shared) if targets(cfg) else []
    if cfg.eval.samples:
        sampling = open_sampling(cfg, mesh, prompts=Prompts(shared.prompts), low=shared.low)
        for sample in samplings(cfg):
            drawn = dataclasses.replace(cfg, sample=sample)
            with naming_axes(cfg):
                found.append(_sample_task(drawn, sampling, workdir, stop, quiet, shared))
    compare(of_all({f"{i}, {k}": v for i, task in enumerate(found) for k, v in task.protocol.items()}), SAME)
    if not quiet:
        introduce(*([shared.held_out[0]] if targets(cfg) else []))
        if targets(cfg) and leader():
            tell_cut(cfg.model, shared.held_out[0], len(shared.held_out[1][0]))
        images = f"the images of {cfg.data.folder or cfg.data.dataset}, {scores.reference_split(cfg)}"
        where = cfg.eval.reference or images
        say(f"samples are compared with {where}") if cfg.eval.samples else None
    return found


def run(
    cfg: Config, workdir: str, steps: Sequence[int] | None = None, quiet: bool = False, shared: Shared | None = None
) -> list[dict]:
    """Evaluates checkpoints (default: all on disk) under each protocol, unless recorded already. Returns the records.

    `shared`: what was opened for another run with the same `data` and `eval`. Raises JobError at the end if checkpoints are damaged
    or have numbers that are not finite, or snapshots do not hold a width; nothing is recorded for these.
    """
    failed: Failed = {}
    with _ledger(workdir, quiet, time.time()) as ledger:
        mesh = drawing_mesh(4 * flops.parameters(cfg.model))
        wanted = tasks(cfg, workdir, mesh, [], quiet, shared)
        records = _run(wanted, workdir, mesh, steps, quiet, [], failed, ledger)
    report_failed(failed)
    return records


def follow(cfg: Config, workdir: str, watch: bool, since: float, steps: Sequence[int] | None = None) -> Failed:
    """Evaluate `steps`, or all checkpoints on disk; with `watch` also later ones, until the last training step is evaluated.

    SIGTERM keeps what is recorded and raises Interrupted. `since`: when the job began. Returns what failed.
    """
    failed, told = {}, set()
    with stop_flag(PATIENCE if jax.process_count() == 1 else None) as stop, _ledger(workdir, False, since) as ledger:
        mesh = drawing_mesh(4 * flops.parameters(cfg.model))
        wanted = tasks(cfg, workdir, mesh, stop, False)
        while True:
            records = _run(wanted, workdir, mesh, steps, False, stop, failed, ledger)
            if len(cfg.eval.ema) > 1 and leader():
                tell_best(records, told)
            newest = max([*(record["step"] for record in records), *(step for step, _ in failed)], default=0)
            if not watch or newest >= by_leader(lambda: read_config(workdir).train.steps):
                break
            with ledger.spend("wait"):
                _wait(cfg.eval.poll_seconds, stop)
    return failed


def _wait(seconds: float, stop: list) -> None:
    looks = math.ceil(seconds / 0.2)
    for _ in range(looks):
        _check_stop(stop, "what is recorded stays")
        time.sleep(seconds / looks)


@contextlib.contextmanager
def _ledger(workdir: str, quiet: bool, since: float) -> Iterator[Ledger]:
    """Yields a ledger, and writes its line at the end if anything was measured."""
    ledger = Ledger("evaluate", since)
    try:
        yield ledger
    finally:
        if ledger.seconds["evaluation"] and leader():
            close(ledger, workdir, quiet)


def _run(
    wanted: list[Task],
    workdir: str,
    mesh,
    steps: Sequence[int] | None,
    quiet: bool,
    stop: list,
    failed: Failed,
    ledger: Ledger,
) -> list[dict]:
    """As `run`, until `stop` is not empty. Checkpoints that cannot be scored are put into `failed`; the others are evaluated."""
    there, done = _tidied(workdir)
    for step in there if steps is None else steps:
        drawn = [task.cfg for task in wanted if "samples" in task.protocol and (step, task.id) not in done]
        tell_rounds(drawn, step, "eval.steps" if drawn and drawn[0].eval.steps else "sample.steps")
        for weights in dict.fromkeys(task.weights for task in wanted):
            missing = [task for task in wanted if task.weights == weights and (step, task.id) not in done]
            found = _weights(missing[0], workdir, step, mesh, failed) if missing else None
            for task in missing if found else []:
                _check_stop(stop, f"{workdir}: what is recorded stays")
                try:
                    done = record(workdir, step, task, found, ledger, quiet)
                    failed.pop((step, task.id), None)
                except Interrupted:
                    raise
                except Exception as error:
                    lone = len(wanted) == 1 and not isinstance(error, NotFiniteError)
                    if lone or (jax.process_count() > 1 and not is_common(error)):
                        raise
                    text = str(error).strip() or type(error).__name__  # XLA's are of many lines
                    where = f"{checkpoint.path_of(workdir, step)}: {describe(task, {}).strip()}"
                    _fail(failed, step, task.id, f"{where} {text.splitlines()[0]}")
    return by_leader(lambda: _records_of(wanted, workdir, there if steps is None else steps))


def _records_of(wanted: list[Task], workdir: str, steps: Sequence[int]) -> list[dict]:
    done = read_records(workdir)
    return [done[step, task.id] for step in steps for task in wanted if (step, task.id) in done]


def _tidied(workdir: str, *under_way: int) -> tuple[list[int], set[tuple[int, str]]]:
    """Drops what finished evaluations left, and what others left of a step without a checkpoint that is not `under_way`.

    Returns the steps of the checkpoints, and (step, protocol id) of the records.
    """

    def tidy() -> tuple[list, list]:
        steps, done = checkpoint.steps(workdir), list(read_records(workdir))
        drop_partials(workdir, set(done), [*steps, *under_way])
        return steps, done

    steps, done = by_leader(tidy)
    return steps, {(step, identity) for step, identity in done}


def record(workdir: str, step: int, task: Task, weights: Weights, ledger: Ledger, quiet: bool) -> set[tuple[int, str]]:
    """Measures and records one protocol of the weights of a step; returns (step, protocol id) of all records."""
    with ledger.spend("evaluation"):
        found = task.measure(step, weights)
    if found is not None and leader():
        spent = totals(workdir, ledger.entry())
        made = make_record(task.cfg, workdir, step, weights.sha256, found[0], task.protocol, weights.data, spent)
        with ledger.spend("save"):
            append_record(workdir, made | found[1] | weights.notes)
        if not quiet:
            say(f"step {step}  {describe(task, made['metrics'])}")
    return _tidied(workdir, step)[1]


def describe(task: Task, metrics: dict) -> str:
    """A record as one line: the sampling, if any, and the scores."""
    of = task.protocol.get("samples")
    sampling = f", {of['sampler']} {of['steps']}, guidance {of['guidance']:g}" if of else ""
    more = {name: of[name] for name in ("interval", "guide", "rescale", "reuse", "quantize") if name in (of or {})}
    sampling += "".join(f", {name} {value}" for name, value in more.items() if value != (0.0, 1.0))
    return f"{task.weights}{sampling}: " + "  ".join(
        f"{k} {v:.4g}"
        for k, v in metrics.items()
        if not k.startswith(("loss_t", "loss_fixed_t")) and not ("composition" in k and k.endswith(("_low", "_high")))
    )


def _fail(failed: Failed, step: int, what: str, error: str) -> None:
    if error not in (said for (at, _), said in failed.items() if at == step):
        complain(f"{error}; it is not recorded for step {step}, the others are evaluated")
    failed[step, what] = error


def _weights(task: Task, workdir: str, step: int, mesh, failed: Failed) -> Weights | None:
    """The weights of a task, on the mesh; None if a running training has pruned their checkpoint meanwhile, if it is damaged, or if the
    snapshots until then do not hold the width."""
    try:
        params, notes = load_weights(task.cfg, workdir, step, mesh)
        data = by_leader(lambda: checkpoint.trained_on(workdir, step))
    except Exception as error:
        alike = is_common(error) or isinstance(error, WidthError)  # of what process 0 has found, so all raise it
        if jax.process_count() > 1 and not alike:
            raise
        if step not in by_leader(lambda: checkpoint.steps(workdir)):
            return None
        if not isinstance(error, JobError | WidthError):
            raise
        _fail(failed, step, task.weights, str(error))
        return None
    failed.pop((step, task.weights), None)  # a training that restarted may have written the step anew
    return Weights(params, weights_hash(params), data, notes)


def report_failed(failed: Failed) -> None:
    """Raises JobError if a checkpoint failed."""
    if failed:
        steps = ", ".join(map(str, sorted({step for step, _ in failed})))
        raise common(JobError(f"step {steps}: not all evaluated, as said above; the others are"))
