"""Evaluate a run's checkpoints: `python -m dit_jax.evaluate --workdir=W [--config.eval.samples=1000 ...] [--watch]`.

Held-out loss on a fixed set of (image, noise, t), and metrics of samples (FID, or the Frechet distance of another network,
and what goes with it) for every combination of `eval.weights`, `samplers`, `steps` and `guidance`. One record per checkpoint
and protocol goes to `W/eval/records.jsonl`; what is recorded already is not computed again. Sample i depends on (seed, i)
only: a sample metric that was stopped in the middle goes on from `W/eval/partial/`, also with other batches or devices, and
ends in the same record. SIGTERM keeps what there is and exits 75. `--launcher=slurm|print` hands the combinations to a
scheduler (dit_jax.launcher), and `--cell` evaluates one alone.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from absl import flags

from dit_jax import checkpoint, flops, samples, scores
from dit_jax.autoencoder import Autoencoder, make_decoder, open_autoencoder
from dit_jax.command import Interrupted, launch, read_config, stop_flag
from dit_jax.config import Config, JobError, MeshConfig, SampleConfig, UsageError, resolve, to_dict
from dit_jax.data.pipeline import load_arrays
from dit_jax.diffusion import process as processes
from dit_jax.diffusion.process import make_process
from dit_jax.diffusion.samplers import sampling_times
from dit_jax.error import NotFiniteError
from dit_jax.heldout import all_of, held_out_loss, loss_protocol, weights_protocol
from dit_jax.launcher import define_flags, find_cell, hand_over
from dit_jax.ledger import Ledger, close, process_start, totals
from dit_jax.log import say
from dit_jax.mesh import describe_device, make_mesh
from dit_jax.records import RECORDS, append_record, drop_partials, partial_folder, protocol_id, read_records
from dit_jax.sample import UINT8, describe_job, image_flops, sample_images, weights_hash


@dataclass(frozen=True)
class Task:
    """A protocol, the config with its sampling (also which weights: ema | params), and a function from (step, weights) to metrics.

    The function returns (metrics, what else the record shall say), or None when another evaluation recorded it meanwhile.
    """

    cfg: Config
    protocol: dict
    measure: Callable

    @property
    def weights(self) -> str:
        return self.cfg.sample.weights

    @property
    def id(self) -> str:
        return protocol_id(self.protocol)


def samplings(cfg: Config) -> list[SampleConfig]:
    """Every combination of `eval.weights`, `samplers`, `steps` and `guidance`; an empty one is that of `sample`."""
    names = {"weights": "weights", "samplers": "sampler", "steps": "steps", "guidance": "guidance"}
    choices = [getattr(cfg.eval, name) or (getattr(cfg.sample, field),) for name, field in names.items()]
    found = []
    for values in itertools.product(*choices):
        changes = dict(zip(names.values(), values, strict=True))
        found.append(dataclasses.replace(cfg.sample, **changes | {"guidance": float(changes["guidance"])}))
    return list(dict.fromkeys(found))


def cells(cfg: Config) -> dict[str, Config]:
    """The parts of an evaluation that may run apart, by name: the held-out loss, and each sampling."""
    found = {"loss": dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, samples=0))} if cfg.eval.loss else {}
    if cfg.eval.samples:
        alone = dataclasses.replace(cfg.eval, loss=False, weights=(), samplers=(), steps=(), guidance=())
        for sample in samplings(cfg):
            name = f"{sample.weights}-{sample.sampler}-{sample.steps}-guidance-{sample.guidance}"
            found[name] = dataclasses.replace(cfg, sample=sample, eval=alone)
    return found


@dataclass(frozen=True)
class Tools:
    """What sample metrics need besides the model; opened once for all checkpoints and samplings."""

    mesh: object
    autoencoder: Autoencoder | None
    decode: Callable
    network: scores.Network
    reference: scores.Reference


def open_tools(cfg: Config, mesh) -> Tools:
    """Raises UsageError where the autoencoder, the feature network or the reference does not fit."""
    autoencoder = open_autoencoder(cfg)
    network = scores.open_network(cfg, mesh)
    scores.check_number(cfg, network)
    reference = scores.open_reference(cfg, network)
    scores.warn_of_few(cfg, network)
    return Tools(mesh, autoencoder, make_decoder(autoencoder, mesh), network, reference)


def sample_protocol(cfg: Config, tools: Tools) -> dict:
    """Everything that the sample metrics depend on besides the checkpoint."""
    sample = dataclasses.asdict(cfg.sample)
    del sample["batch_size"], sample["weights"]
    return {
        "data": {"dataset": cfg.data.dataset, "image_size": cfg.data.image_size},
        **weights_protocol(cfg),
        "samples": sample | {"num": cfg.eval.samples, "seed": cfg.eval.seed},
        "process": processes.describe(make_process(cfg.diffusion, cfg.model.learn_sigma)),
        "uint8": UINT8,
        "autoencoder": tools.autoencoder.describe() if tools.autoencoder else "none",
        "features": f"{tools.network.name} {tools.network.sha256}",
        "reference": tools.reference.source,
        "metrics": scores.describe(tools.network) | {"bootstrap": cfg.eval.bootstrap},
        "dtype": cfg.model.dtype,
        "attention": cfg.model.attention,
        "flops": "exact, 2 x MACs, training = 3 x forward, of the diffusion model alone",
    }


def make_record(cfg: Config, workdir: str, step: int, weights: str, metrics: dict, protocol: dict) -> dict:
    """The contract between training, evaluation and the scaling wing (one JSON line). `weights`: their SHA-256.

    What the numbers depend on besides the protocol and the weights, the kind of device, stands beside them.
    """
    images = step * cfg.train.batch_size
    return {
        "run": os.path.basename(os.path.abspath(workdir)),
        "step": step,
        "images_seen": images,
        "tokens_seen": images * cfg.model.tokens,
        "params": flops.parameters(cfg.model),
        "params_active": flops.active_parameters(cfg.model),
        "flops_train": flops.train_flops(cfg.model, images),
        "flops_image": flops.forward_flops(cfg.model),
        **({"flops_sample": image_flops(cfg, cfg.sample)} if "samples" in protocol else {}),
        "metrics": {key: float(value) for key, value in metrics.items()},
        "protocol": protocol,
        "protocol_id": protocol_id(protocol),
        "weights_sha256": weights,
        "device": describe_device(),
        "goodput": totals(workdir),
    }


def _check_stop(stop: list, what: str) -> None:
    if stop:
        raise Interrupted(f"{what}; the same command goes on from there")


def check_config(cfg: Config) -> None:
    """Raises UsageError for a protocol that cannot be."""
    for sample in samplings(cfg):
        sampling_times(make_process(cfg.diffusion, cfg.model.learn_sigma), sample.sampler, sample.steps, sample.spacing)
    if not cfg.eval.loss and not cfg.eval.samples:
        raise UsageError(
            "eval.loss, eval.samples: found False and 0, expected at least one of them: nothing would be measured"
        )
    if cfg.eval.samples:
        scores.check_config(cfg)


def _loss_tasks(cfg: Config, mesh, workdir: str, stop: list) -> list[Task]:
    """The held-out loss of each kind of weights."""
    images, labels = load_arrays(all_of(cfg.data), cfg.data.held_out_split)
    if cfg.eval.max_images:
        images, labels = images[: cfg.eval.max_images], labels[: cfg.eval.max_images]

    def look() -> None:
        _check_stop(stop, f"{workdir}: what is recorded stays")

    def loss(step: int, params) -> tuple[dict, dict]:
        return held_out_loss(cfg, params, images, labels, mesh, look), {}

    found = []
    for weights in dict.fromkeys(sample.weights for sample in samplings(cfg)):
        chosen = dataclasses.replace(cfg, sample=dataclasses.replace(cfg.sample, weights=weights))
        found.append(Task(chosen, loss_protocol(chosen, len(images)), loss))
    return found


def _sample_task(cfg: Config, tools: Tools, workdir: str, stop: list, quiet: bool) -> Task:
    """The sample metrics of one sampling, that of `cfg.sample`."""
    protocol, network = sample_protocol(cfg, tools), tools.network

    def draw(params, times: list, first: int, end: int) -> Iterator[samples.Batch]:
        drawn = sample_images(cfg, params, cfg.sample, end, cfg.eval.seed, tools.mesh, (), first, tools.decode)
        for images, labels in _timed(drawn, times):
            yield network.rows(images).view(np.uint8), labels

    def measure(step: int, params) -> tuple[dict, dict] | None:
        job = describe_job(cfg, params, cfg.sample, step, cfg.eval.seed, (), tools.autoencoder)
        folder = partial_folder(workdir, step, protocol_id(protocol))
        store = samples.Store(folder, job | {"features": network.sha256}, (4 * network.width,))
        with _alone_in(folder, stop):
            if (step, protocol_id(protocol)) in read_records(workdir):
                return None
            times: list[float] = []
            parts = samples.gather(store, cfg.eval.samples, functools.partial(draw, params, times), stop, quiet)
            rows = (part.view("<f4") for part, _ in parts)
            metrics = scores.measure(rows, network, tools.reference, cfg.eval)
            return metrics, {"seconds_sample": float(np.median(times))} if times else {}

    return Task(cfg, protocol, measure)


def _timed(batches: Iterator[samples.Batch], times: list[float]) -> Iterator[samples.Batch]:
    """The same batches; `times` gets the seconds an image of each took, but for the first, which compiles."""
    began = None
    for batch in batches:
        if began is not None:
            times.append((time.perf_counter() - began) / len(batch[1]))
        yield batch
        began = time.perf_counter()


@contextlib.contextmanager
def _alone_in(folder: str, stop: list) -> Iterator[None]:
    """Holds the folder of a partial; waits while another evaluation does the same."""
    told = False
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(samples.locked(folder))
                break
            except JobError:
                if not told:
                    told = say(f"{folder}: another evaluation draws these images; waiting for it") is None
                _check_stop(stop, f"{folder}: another evaluation draws these images")
                time.sleep(0.1)
        yield


def tasks(cfg: Config, mesh, workdir: str, stop: list, quiet: bool) -> list[Task]:
    """What a config asks of every checkpoint. Raises UsageError for a protocol that cannot be."""
    check_config(cfg)
    found = _loss_tasks(cfg, mesh, workdir, stop) if cfg.eval.loss else []
    if cfg.eval.samples:
        tools = open_tools(cfg, mesh)
        for sample in samplings(cfg):
            found.append(_sample_task(dataclasses.replace(cfg, sample=sample), tools, workdir, stop, quiet))
    return found


def run(cfg: Config, workdir: str, steps: list[int] | None = None, quiet: bool = False) -> list[dict]:
    """Evaluate checkpoints (default: all on disk), each under each protocol, unless recorded already. Returns the records.

    Raises JobError at the end if checkpoints are damaged or their numbers not finite; nothing is recorded for them.
    """
    failed: dict[int, str] = {}
    with _ledger(workdir, quiet, time.time()) as ledger:
        wanted = tasks(cfg, make_mesh(MeshConfig()), workdir, [], quiet)
        records = _run(wanted, workdir, steps, quiet, [], failed, ledger)
    _report_failed(failed)
    return records


@contextlib.contextmanager
def _ledger(workdir: str, quiet: bool, since: float) -> Iterator[Ledger]:
    """A ledger whose line is written at the end, if anything was measured."""
    ledger = Ledger("evaluate", since)
    try:
        yield ledger
    finally:
        if ledger.seconds["evaluation"]:
            close(ledger, workdir, quiet)


def _run(
    wanted: list[Task],
    workdir: str,
    steps: list[int] | None,
    quiet: bool,
    stop: list,
    failed: dict[int, str],
    ledger: Ledger,
) -> list[dict]:
    """`run`, until `stop` fills; checkpoints that cannot be scored are put into `failed`, and the others are evaluated."""
    done = read_records(workdir)
    drop_partials(workdir, set(done), checkpoint.steps(workdir))
    records = []
    for step in checkpoint.steps(workdir) if steps is None else steps:
        for weights in dict.fromkeys(task.weights for task in wanted):
            missing = [task for task in wanted if task.weights == weights and (step, task.id) not in done]
            params = _weights(missing[0].cfg, workdir, step, failed) if missing else None
            for task in missing if params is not None else []:
                _check_stop(stop, f"{workdir}: what is recorded stays")
                try:
                    done = _record(workdir, step, task, params, ledger, quiet)
                except NotFiniteError as error:
                    _fail(failed, step, f"{checkpoint.path_of(workdir, step)}: {error}")
        records += [done[step, task.id] for task in wanted if (step, task.id) in done]
    return records


def _record(workdir: str, step: int, task: Task, params, ledger: Ledger, quiet: bool) -> dict:
    """Measure and record one protocol of one checkpoint; returns all records, by step and protocol."""
    with ledger.spend("evaluation"):
        found = task.measure(step, params)
    if found is not None:
        record = make_record(task.cfg, workdir, step, weights_hash(params), found[0], task.protocol) | found[1]
        with ledger.spend("save"):
            append_record(workdir, record)
        if not quiet:
            say(f"step {step}  {describe(task, record['metrics'])}")
    done = read_records(workdir)
    drop_partials(workdir, set(done), checkpoint.steps(workdir))
    return done


def describe(task: Task, metrics: dict) -> str:
    """A record in a line: which sampling, if one, and its scores."""
    of = task.protocol.get("samples")
    sampling = (
        f"{task.weights}, {of['sampler']} {of['steps']}, guidance {of['guidance']:g}: " if of else f"{task.weights}: "
    )
    return sampling + "  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if not k.startswith("loss_t"))


def _fail(failed: dict[int, str], step: int, error: str) -> None:
    if failed.get(step) != error:
        say(f"error: {error}; nothing is recorded for step {step}, the other checkpoints are evaluated")
    failed[step] = error


def _weights(cfg: Config, workdir: str, step: int, failed: dict[int, str]):
    """The weights of a checkpoint; None if the training that goes on has pruned it meanwhile, or if it is damaged."""
    try:
        params = checkpoint.load(workdir, step, cfg.sample.weights, cfg.model)[1]
    except Exception as error:
        if step not in checkpoint.steps(workdir):
            return None
        if not isinstance(error, JobError):
            raise
        _fail(failed, step, str(error))
        return None
    failed.pop(step, None)  # another evaluation of a live run may find it written anew
    return params


def _report_failed(failed: dict[int, str]) -> None:
    if failed:
        steps = ", ".join(map(str, sorted(failed)))
        raise JobError(f"step {steps}: damaged or diverged and not evaluated, as said above; the others are")


def main() -> None:
    values = flags.FLAGS
    cfg = resolve(values.config)
    if not values.watch and not checkpoint.steps(values.workdir):
        checkpoint.find_step(values.workdir)  # says what is missing
    _check_model(cfg, values.workdir)
    parts = cells(cfg)
    if values.cell is not None:
        cfg = list(parts.values())[find_cell(list(parts), values.cell)]
    elif values.launcher != "local":
        check_config(cfg)
        hand_over(values.launcher, "evaluate", list(parts), range(len(parts)), conclude=False)
        return
    failed: dict[int, str] = {}
    with stop_flag() as stop, _ledger(values.workdir, False, process_start()) as ledger:
        wanted = tasks(cfg, make_mesh(MeshConfig()), values.workdir, stop, False)
        while True:
            records = _run(wanted, values.workdir, None, False, stop, failed, ledger)
            newest = max([*(record["step"] for record in records), *failed], default=0)
            if not values.watch or newest >= read_config(values.workdir).train.steps:
                break
            with ledger.spend("wait"):
                _wait(cfg.eval.poll_seconds, stop)
    print(os.path.join(values.workdir, RECORDS))
    _report_failed(failed)


def _check_model(cfg: Config, workdir: str) -> None:
    """Raises UsageError where the command changes the run's model: protocols and records do not name it."""
    asked, found = to_dict(cfg.model), to_dict(read_config(workdir).model)
    for key in found:
        if key not in checkpoint.FREE and asked[key] != found[key]:
            raise UsageError(f"model.{key}: found {asked[key]!r}, expected {found[key]!r}, as the run {workdir} has")


def _wait(seconds: float, stop: list) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        _check_stop(stop, "what is recorded stays")
        time.sleep(min(left, 0.2))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "the run's folder", required=True)
    flags.DEFINE_bool("watch", False, "follow a live run until its last step")
    define_flags()
    launch(main, config="workdir")
