"""Timing: compared jobs take turns, repeatedly, in one process, so that a disturbance affects all of them."""

import contextlib
import os
import platform
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.bind import bind
from dit_jax.config import Config, TrainConfig, model_config
from dit_jax.devices.mesh import batch_sharding, make_mesh
from dit_jax.devices.numerics import random_key
from dit_jax.files.out import write_report
from dit_jax.training.state import make_state
from dit_jax.training.step import make_train_step
from dit_jax.workdir.folder import provenance

# JAX reports this event for every program that it compiles or reads from its compilation cache, not for one in memory.
COMPILED = "/jax/core/compile/backend_compile_duration"


def step_config(batch_size: int) -> Config:
    """DiT-S/4 at 256 pixels, cut to 4 layers, unrolled: width 384, 64 tokens."""
    return Config(model_config("DiT-S/4", depth=4, unroll=4), train=TrainConfig(batch_size=batch_size))


def spread(values: list[float]) -> dict:
    """Median and range of the repeats."""
    return {"median": float(np.median(values)), "low": float(min(values)), "high": float(max(values))}


def seconds(job: Callable) -> float:
    """Wall seconds until the result of `job` is computed."""
    start = time.perf_counter()
    jax.block_until_ready(job())
    return time.perf_counter() - start


def alternate(jobs: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Results of each job over `repeats` rounds; in a round every job runs once. A first round is discarded."""
    rounds = [{name: job() for name, job in jobs.items()} for _ in range(repeats + 1)][1:]
    return {name: [found[name] for found in rounds] for name in jobs}


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Yields a list that gets the name of each program that JAX compiles inside the context."""
    names: list[str] = []

    def listen(event: str, duration: float, **about) -> None:
        if event == COMPILED:
            names.append(str(about.get("fun_name", "a program")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def fixed_batch(cfg: Config, mesh) -> dict:
    """A training batch of noise, placed on the devices."""
    side, rows, key = cfg.model.input_size, cfg.train.batch_size, random_key(0)
    images = np.random.default_rng(0).standard_normal((rows, side, side, cfg.model.channels), np.float32)
    cond = bind(cfg.model).draw("uniform", jax.random.split(key, rows), jnp.arange(rows), {})
    return jax.device_put({"image": images, "cond": cond}, batch_sharding(mesh))


def empty_step(state, batch: dict):
    """As many arrays in and out as a training step with hardly any compute, to time the call itself."""
    scalar = batch["image"][0, 0, 0, 0]
    return jax.tree.map(lambda x: x + 1, state), {"loss": scalar, "grad_norm": scalar, "param_norm": scalar}


def make_stepper(cfg: Config, mesh, empty: bool = False) -> Callable[[int], float]:
    """A function n -> mean seconds a step over n calls of the compiled training step (or of `empty_step`).

    It waits for the device every `train.log_every` steps, as the training loop does.
    """
    state, batch = make_state(cfg, mesh), fixed_batch(cfg, mesh)
    step = jax.jit(empty_step, donate_argnums=0) if empty else make_train_step(cfg, mesh)

    def many(n: int):
        nonlocal state
        for i in range(1, n + 1):
            state, scalars = step(state, batch)
            if i % cfg.train.log_every == 0:
                jax.block_until_ready(scalars)
        return state, scalars

    return lambda n: seconds(lambda: many(n)) / n


def make_products(size: int) -> dict[str, Callable[[], float]]:
    """Functions that measure FLOP/s of a float32 matrix product of side `size`: by XLA and, on CPU, by NumPy's BLAS."""
    a = np.random.default_rng(0).standard_normal((size, size), np.float32)
    b, product = jax.device_put(a), jax.jit(lambda b: b @ b)
    products = {"xla": lambda: 2 * size**3 / seconds(lambda: product(b))}
    return products | ({"blas": lambda: 2 * size**3 / seconds(lambda: a @ a)} if jax.default_backend() == "cpu" else {})


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def machine() -> dict:
    """The machine, its load, the date and all versions, for the report."""
    device, name = make_mesh(Config().mesh).devices.flat[0], ""
    if device.platform == "cpu" and os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            name = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), "")
    return {
        "device": name or device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "cores": cores(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        **provenance(),
    }


def shown(value: dict, digits: int = 0, percent: bool = False) -> str:
    """A result of `spread` as text: median (lowest to highest)."""
    pattern = f"{{:.{digits}{'%' if percent else 'f'}}}"
    middle, low, high = (pattern.format(value[name]) for name in ("median", "low", "high"))
    return f"{middle} ({low} to {high})"


def verdict(met: bool) -> str:
    """The word for whether a target is met."""
    return "met" if met else "missed"


def publish(found: dict, show: Callable[[dict], None], path: str, names: tuple[str, ...]) -> None:
    """Prints the machine, the versions of `names` and the tables of `show`; writes all figures to the file `path`, if given."""
    about = found["machine"]
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in names)
    load = "" if about["load"] is None else f", load {about['load']:.1f}"
    print(f"{about['device']}, {about['cores']} core{'s'[: about['cores'] > 1]}{load}; {about['date']}; {versions}")
    print("Medians (lowest to highest of the repeats).\n")
    show(found)
    if path:
        write_report(path, found)
