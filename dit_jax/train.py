"""Train a DiT: `python -m dit_jax.train --config=configs/digits.py --workdir=runs/digits [--config.train.steps=2000 ...]`.

The same command again resumes from the newest checkpoint, bit for bit, or finds nothing to do. SIGTERM saves and exits 75.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import signal
import subprocess
import time

import jax
from absl import flags

from dit_jax import checkpoint, flops
from dit_jax.command import Interrupted, launch, read_config, write_file
from dit_jax.config import Config, UsageError, resolve, to_dict
from dit_jax.data.datasets import load_source, overlap
from dit_jax.data.pipeline import make_batches
from dit_jax.diffusion.process import make_process
from dit_jax.diffusion.samplers import sampling_times
from dit_jax.log import open_scalars, progress, say
from dit_jax.mesh import check_batch, make_mesh, peak_flops, put_batch
from dit_jax.state import abstract_state, make_state
from dit_jax.step import make_train_step, on_device

# What a resumed run may change: where and how it runs and is looked at, never what it computes.
FREE = (
    "mesh.", "eval.", "sample.", "sweep.", "data.data_dir", "data.cache", "data.workers", "data.prefetch", "train.log_every",
    "train.checkpoint_every", "train.keep", "model.remat", "model.unroll", "model.attention",
)  # fmt: skip


def flatten(values: dict, prefix: str = "") -> dict:
    """Nested config values -> {"a.b": value}."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def check_same_run(cfg: Config, workdir: str) -> None:
    """Raises UsageError if the folder holds another run: a config that differs in what is computed."""
    old, new = flatten(to_dict(read_config(workdir))), flatten(to_dict(cfg))
    free = [*FREE, "train.steps"] if cfg.optim.schedule == "constant" else list(FREE)
    changed = [key for key in new if new[key] != old[key] and not key.startswith(tuple(free))]
    if changed:
        shown = "; ".join(f"{key}: the folder has {old[key]!r}, the command {new[key]!r}" for key in changed[:4])
        more = f" (and {len(changed) - 4} more)" if len(changed) > 4 else ""
        raise UsageError(f"{workdir} holds a run of another config: {shown}{more}; use another --workdir")


def prepare_workdir(cfg: Config, workdir: str) -> None:
    """Make the run's folder and write config.json, or check that the folder is this run's; more steps are written down."""
    path = os.path.join(workdir, "config.json")
    if os.path.isfile(path):
        check_same_run(cfg, workdir)
        if read_config(workdir).train.steps >= cfg.train.steps:
            return
    make_folder(workdir, "config.json", cfg)


def make_folder(workdir: str, name: str, cfg: Config) -> None:
    """Write the config as `workdir`/`name`; the folder must be new, empty or already hold `name`. Raises UsageError."""
    if os.path.exists(workdir) and not os.path.isdir(workdir):
        raise UsageError(f"--workdir: {workdir!r} is a file, expected a folder")
    held = [file for file in os.listdir(workdir) if ".tmp" not in file] if os.path.isdir(workdir) else []
    if held and name not in held:
        raise UsageError(
            f"--workdir: {workdir!r} is not empty and holds no {name}; expected a new folder or one made before"
        )
    text = json.dumps({"config": to_dict(cfg), **provenance()}, indent=1) + "\n"
    try:
        os.makedirs(workdir, exist_ok=True)
        write_file(os.path.join(workdir, name), text)
    except OSError as error:
        raise UsageError(f"--workdir: cannot write to {workdir!r} ({error.strerror})") from None


def provenance() -> dict:
    """Versions and commit of what computes."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    here = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", here, "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {"versions": {name: importlib.metadata.version(name) for name in names}, "commit": commit}


def check(cfg: Config) -> None:
    """Raises UsageError unless the data fit the model, the held-out split is another one, and the run can be sampled."""
    data, model = cfg.data, cfg.model
    if data.image_size == 8 * model.input_size:
        raise UsageError(
            f"data.image_size: found {data.image_size} pixels for a model of {model.input_size} x {model.input_size} "
            "latents; this version trains in pixel space only, expected data.image_size = model.input_size"
        )
    source = load_source(data.dataset, data.split, data.data_dir)
    if data.split == data.held_out_split or overlap(
        source, load_source(data.dataset, data.held_out_split, data.data_dir)
    ):
        raise UsageError(
            f"data.held_out_split: found {data.held_out_split!r}, which shares images with data.split = {data.split!r}"
        )
    for key, found, expected in (
        ("model.classes", model.classes, source.classes),
        ("model.channels", model.channels, source.image_shape[-1]),
        ("model.input_size", model.input_size, data.image_size),
    ):
        if found != expected:
            raise UsageError(f"{key}: found {found}, expected {expected}, as the data ({data.dataset}) has")
    sampling_times(make_process(cfg.diffusion, model.learn_sigma), cfg.sample.sampler, cfg.sample.steps)


def run(cfg: Config, workdir: str, quiet: bool = False) -> int:
    """Train to `train.steps`, resuming what the folder holds. Returns the steps done now (0: nothing was left to do)."""
    check(cfg)
    mesh = make_mesh(cfg.mesh)
    check_batch(mesh, cfg.train.batch_size, cfg.optim.accumulate)
    on_these_devices = dataclasses.replace(cfg, model=on_device(cfg.model))
    batches = make_batches(
        cfg.data,
        batch_size=cfg.train.batch_size,
        seed=cfg.train.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    prepare_workdir(cfg, workdir)
    manager = checkpoint.open_manager(workdir, cfg.train.keep)
    try:
        first = manager.latest_step() or 0
        if first >= cfg.train.steps:
            say(f"{workdir}: all {cfg.train.steps} steps are done") if not quiet else None
            return 0
        with _stop_flag() as stop:
            return _train(on_these_devices, workdir, mesh, manager, batches, first, stop, quiet)
    finally:
        manager.close()


def _train(cfg: Config, workdir: str, mesh, manager, batches, first: int, stop: list, quiet: bool) -> int:
    """The loop. Scalars of a step are read after the next one is under way, so that the device never waits for the host."""
    if first:
        state, position = checkpoint.restore(manager, first, abstract_state(cfg, mesh))
        batches.set_state(position)
    else:
        state = make_state(cfg, mesh)
    step = make_train_step(cfg, mesh)
    write, close = open_scalars(workdir, first, tensorboard=not quiet)
    report = _reporter(cfg, first, quiet)
    meta = {"model": to_dict(cfg.model), **provenance()}
    pending = None
    for i in range(first + 1, cfg.train.steps + 1):
        state, scalars = step(state, put_batch(mesh, next(batches)))
        if pending:
            _log(write, report, *pending)
            pending = None
        if i % cfg.train.log_every == 0 or i in (1, cfg.train.steps):
            pending = (i, scalars)
        stopping = bool(stop)
        if i % cfg.train.checkpoint_every == 0 or i == cfg.train.steps or stopping:
            if pending:
                _log(write, report, *pending)
                pending = None
            checkpoint.save(manager, state, batches.get_state(), meta)
        if stopping:
            break
    manager.wait_until_finished()
    close()
    if stopping and i < cfg.train.steps:
        raise Interrupted(f"saved step {i} of {cfg.train.steps} in {workdir}; the same command goes on from there")
    return i - first


def _reporter(cfg: Config, first: int, quiet: bool):
    """What to do with the scalars of a logged step besides writing them."""
    if quiet:
        return lambda step, scalars: {}
    peak, source = peak_flops()
    say(
        f"{flops.parameters(cfg.model):,} parameters; MFU is against {peak / 1e12:.3g} TFLOP/s ({source}); compiling ..."
    )
    step_flops = flops.train_flops(cfg.model, cfg.train.batch_size)
    return progress(first, cfg.train.steps, cfg.train.batch_size, step_flops, peak)


def _log(write, report, step: int, scalars: dict) -> None:
    values = {name: float(value) for name, value in jax.device_get(scalars).items()}
    write(step, {**values, **report(step, values), "time": time.time()})


@contextlib.contextmanager
def _stop_flag():
    """A list that the first SIGTERM fills; the loop then saves and stops. The old handler comes back at the end."""
    stop = []
    old = signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, old)


def main() -> None:
    run(resolve(flags.FLAGS.config), flags.FLAGS.workdir)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "the run's folder", required=True)
    launch(main, config="file")
