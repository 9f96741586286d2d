"""Evaluate a run's checkpoints: `python -m dit_jax.evaluate --workdir=W [--config.eval.samples=1000 ...] [--watch]`.

Held-out loss of the EMA weights on a fixed set of (image, noise, t), and a Frechet distance of samples. One record per
checkpoint and protocol goes to `W/eval/records.jsonl`; what is recorded already is not computed again. A sample metric that
was stopped in the middle goes on from `W/eval/partial/`, also with other batches or devices. SIGTERM keeps it and exits 75.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dit_jax import checkpoint, flops
from dit_jax.command import Interrupted, launch, read_config, stop_flag
from dit_jax.config import Config, DataConfig, EvalConfig, JobError, UsageError, resolve
from dit_jax.data.pipeline import load_arrays
from dit_jax.data.source import describe
from dit_jax.diffusion import process as processes
from dit_jax.diffusion.process import make_process
from dit_jax.diffusion.samplers import sampling_times
from dit_jax.ledger import Ledger, close, process_start, totals
from dit_jax.log import RECORD, read_lines, say
from dit_jax.mesh import batch_sharding, make_mesh, replicated
from dit_jax.metrics import frechet
from dit_jax.models import digit_features
from dit_jax.records import RECORDS, Partial, append_record, drop_partials, load_partial, save_partial
from dit_jax.sample import UINT8, describe_job, image_flops, sample_images
from dit_jax.samples import pause, progress
from dit_jax.step import image_losses, on_device

def digits_distance(
    cfg: Config,
    params,
    mesh,
    reference: frechet.Statistics,
    stats: frechet.Statistics | None = None,
    keep: Callable[[frechet.Statistics], None] = lambda stats: None,
) -> float:
    """`fd_digits`: Frechet distance between samples and the training split, in the features of our own digits network.

    `stats` are those of the first images, where they are known; `keep(stats)` is called per batch, but for the last one.
    """
    weights, _ = digit_features.load()
    features, num = jax.jit(digit_features.apply), cfg.eval.samples
    stats = stats or frechet.empty(digit_features.WIDTH)
    for images, _ in sample_images(cfg, params, cfg.sample, num, cfg.eval.seed, mesh, first=stats.count):
        stats = frechet.update(stats, np.asarray(features(weights, images / np.float32(127.5) - 1)[0]))
        if stats.count < num:
            keep(stats)
    return frechet.frechet_distance(*frechet.mean_cov(stats), *frechet.mean_cov(reference))


def reference_statistics(cfg: Config) -> frechet.Statistics:
    """Feature statistics of the whole of `data.split`, the training split."""
    images, _ = load_arrays(_all_of(cfg.data), cfg.data.split)
    weights, _ = digit_features.load()
    return frechet.update(
        frechet.empty(digit_features.WIDTH), np.asarray(jax.jit(digit_features.apply)(weights, images)[0])
    )


def held_out_distance(cfg: Config) -> float:
    """`fd_digits` of the real held-out images: what a perfect sampler would score."""
    held_out = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, split=cfg.data.held_out_split))
    both = [frechet.mean_cov(reference_statistics(c)) for c in (held_out, cfg)]
    return frechet.frechet_distance(*both[0], *both[1])


def sample_protocol(cfg: Config, reference: frechet.Statistics) -> dict:
    """Everything that the sample metrics depend on besides the checkpoint."""
    sample = dataclasses.asdict(cfg.sample)
    del sample["batch_size"], sample["weights"]
    return {
        "data": describe(cfg.data, cfg.data.split) | {"image_size": cfg.data.image_size},
        **weights_protocol(cfg),
        "samples": sample | {"num": cfg.eval.samples, "seed": cfg.eval.seed},
        "process": processes.describe(make_process(cfg.diffusion, cfg.model.learn_sigma)),
        "uint8": UINT8,
        "autoencoder": "none",
        "features": f"digits {digit_features.load()[1]['sha256']}",
        "reference": f"{cfg.data.dataset} {cfg.data.split}, {reference.count} images",
        "dtype": cfg.model.dtype,
        "flops": "exact, 2 x MACs, training = 3 x forward",
    }


def make_record(cfg: Config, name: str, step: int, metrics: dict, protocol: dict) -> dict:
    """The contract between training, evaluation and the scaling wing (one JSON line)."""
    images = step * cfg.train.batch_size
    return {
        "run": name,
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
    }


def check_config(cfg: Config) -> None:
    """Raises UsageError for a protocol that cannot be."""
    if cfg.eval.samples and cfg.data.latents:
        raise UsageError(
            f"eval.samples: found {cfg.eval.samples} for a model of latents, which this version cannot decode; set "
            "eval.samples=0 for the held-out loss alone"
        )
    sampling_times(make_process(cfg.diffusion, cfg.model.learn_sigma), cfg.sample.sampler, cfg.sample.steps)
    if cfg.eval.samples and (cfg.eval.features != "digits" or cfg.data.dataset != "digits"):
        raise UsageError(
            f"eval.features: found {cfg.eval.features!r} for {cfg.data.dataset!r}; this version has the digits' network only; "
            "set eval.samples=0 for the held-out loss alone"
        )


def _check_stop(stop: list, what: str) -> None:
    if stop:
        raise Interrupted(f"{what}; the same command goes on from there")


def _measure_distance(cfg: Config, params, mesh, reference, partial: Partial, stop: list, quiet: bool) -> dict:
    """`fd_digits`, going on from what a stopped evaluation kept, and keeping what this one has every now and then."""
    stats, num = load_partial(partial), cfg.eval.samples
    report = (lambda count: None) if quiet else progress(stats.count if stats else 0, num)
    began = last = time.monotonic()

    def keep(stats: frechet.Statistics) -> None:
        nonlocal last
        report(stats.count)
        now = time.monotonic()
        if stop or now - last > pause(now - began):
            save_partial(partial, stats)
            last = time.monotonic()
        _check_stop(stop, f"{stats.count} of {num} images of step {partial.step} are kept in {partial.path}")

    return {"fd_digits": digits_distance(cfg, params, mesh, reference, stats, keep)}


def protocols(cfg: Config, mesh, workdir: str, stop: list, quiet: bool) -> list[tuple[dict, Callable]]:
    """The protocols of a config, each with its function from (step, weights) to metrics."""
    images, labels = load_arrays(_all_of(cfg.data), cfg.data.held_out_split)
    if cfg.eval.max_images:
        images, labels = images[: cfg.eval.max_images], labels[: cfg.eval.max_images]

    def loss(step: int, params) -> dict:
        return held_out_loss(
            cfg, params, images, labels, mesh, lambda: _check_stop(stop, f"{workdir}: what is recorded stays")
        )

    found = [(loss_protocol(cfg, len(images)), loss)]
    if cfg.eval.samples:
        reference = reference_statistics(cfg)
        protocol = sample_protocol(cfg, reference)

        def distance(step: int, params) -> dict:
            job = describe_job(cfg, params, cfg.sample, step, cfg.eval.seed)
            partial = Partial(workdir, step, protocol_id(protocol), job)
            return _measure_distance(cfg, params, mesh, reference, partial, stop, quiet)

        found.append((protocol, distance))
    return found


def run(cfg: Config, workdir: str, steps: list[int] | None = None, quiet: bool = False) -> list[dict]:
    """Evaluate checkpoints (default: all on disk), each under each protocol, unless recorded already. Returns the records.

    Raises JobError at the end if checkpoints are damaged; nothing is recorded for them.
    """
    damaged: dict[int, str] = {}
    with _ledger(workdir, quiet, time.time()) as ledger:
        records = _run(cfg, workdir, steps, quiet, [], damaged, ledger)
    _report_damaged(damaged)
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
    cfg: Config, workdir: str, steps: list[int] | None, quiet: bool, stop: list, damaged: dict, ledger: Ledger
) -> list[dict]:
    """`run`, until `stop` fills; checkpoints that cannot be read are put into `damaged`, and the others are evaluated."""
    check_config(cfg)
    mesh = make_mesh(cfg.mesh)
    wanted = protocols(cfg, mesh, workdir, stop, quiet)
    done = {(r["step"], r["protocol_id"]): r for r in read_lines(os.path.join(workdir, RECORDS), RECORD)}
    drop_partials(workdir, set(done), checkpoint.steps(workdir))
    name, records = os.path.basename(os.path.abspath(workdir)), []
    for step in checkpoint.steps(workdir) if steps is None else steps:
        missing = [(p, measure) for p, measure in wanted if (step, protocol_id(p)) not in done]
        params = _weights(cfg, workdir, step, damaged) if missing else None
        for protocol, measure in missing if params is not None else []:
            _check_stop(stop, f"{workdir}: what is recorded stays")
            with ledger.spend("evaluation"):
                metrics = measure(step, params)
            record = make_record(cfg, name, step, metrics, protocol) | {"goodput": totals(workdir)}
            with ledger.spend("save"):
                append_record(workdir, record)
            done[step, record["protocol_id"]] = record
            drop_partials(workdir, set(done), checkpoint.steps(workdir))
            if not quiet:
                shown = "  ".join(f"{k} {v:.4g}" for k, v in record["metrics"].items() if not k.startswith("loss_t"))
                say(f"step {step}  {shown}")
        records += [done[step, protocol_id(p)] for p, _ in wanted if (step, protocol_id(p)) in done]
    return records


def _weights(cfg: Config, workdir: str, step: int, damaged: dict[int, str]):
    """The weights of a checkpoint; None if the training that goes on has pruned it meanwhile, or if it is damaged."""
    try:
        params = checkpoint.load(workdir, step, cfg.sample.weights)[1]
    except Exception as error:
        if step not in checkpoint.steps(workdir):
            return None
        if not isinstance(error, JobError):
            raise
        if step not in damaged:
            say(f"error: {error}; nothing is recorded for step {step}, the other checkpoints are evaluated")
        damaged[step] = str(error)
        return None
    damaged.pop(step, None)  # another evaluation of a live run may find it written anew
    return params


def _report_damaged(damaged: dict[int, str]) -> None:
    if damaged:
        steps = ", ".join(map(str, sorted(damaged)))
        raise JobError(f"step {steps}: damaged and not evaluated, the others are; restore the folder from a copy")


def main() -> None:
    values = flags.FLAGS
    cfg = resolve(values.config)
    if not values.watch and not checkpoint.steps(values.workdir):
        checkpoint.find_step(values.workdir)  # says what is missing
    damaged: dict[int, str] = {}
    with stop_flag() as stop, _ledger(values.workdir, False, process_start()) as ledger:
        while True:
            records = _run(cfg, values.workdir, None, False, stop, damaged, ledger)
            newest = max([*(record["step"] for record in records), *damaged], default=0)
            if not values.watch or newest >= read_config(values.workdir).train.steps:
                break
            with ledger.spend("wait"):
                _wait(cfg.eval.poll_seconds, stop)
    print(os.path.join(values.workdir, RECORDS))
    _report_damaged(damaged)


def _wait(seconds: float, stop: list) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        _check_stop(stop, "what is recorded stays")
        time.sleep(min(left, 0.2))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "the run's folder", required=True)
    flags.DEFINE_bool("watch", False, "follow a live run until its last step")
    launch(main, config="workdir")
