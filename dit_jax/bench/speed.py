"""Times training and sampling: rates, share of the peak, memory, compilations; a peer is timed in turn.

Timed is the jobs' own compiled program, called with one batch that lies on the devices; no data is read.
"""

import dataclasses
import time
from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax import flops, hardware
from dit_jax.bench.measure import alternate, compilations, cores, fixed_batch, make_products, spread, step_config
from dit_jax.bench.peer import Side
from dit_jax.bind import bind
from dit_jax.config import Config, MeshConfig, SampleConfig, TrainConfig, model_config
from dit_jax.devices.mesh import make_mesh, replicated
from dit_jax.devices.numerics import random_key
from dit_jax.log import notice
from dit_jax.networks.caption import in_step
from dit_jax.program import Program, encoder_flops, program, reuse_notes, sized
from dit_jax.training.state import make_state

TARGETS = {"cpu": 0.30}  # share of the peak that training the default model should reach; elsewhere OTHER_TARGET
OTHER_TARGET = 0.45
MATRIX = {"cpu": 2048}  # side of the product that measures the peak of a device that is not in `hardware.py`
OTHER_MATRIX = 8192


def default_config(platform: str) -> Config:
    """DiT-XL/2 at 256 px as in the paper, batch 256, bfloat16, 250 guided sampling steps; on a CPU a small model and 10 steps."""
    sample = SampleConfig(sampler="ddpm", steps=250, guidance=1.5, channels="first3")
    if platform == "cpu":
        return dataclasses.replace(step_config(16), sample=dataclasses.replace(sample, steps=10))
    model = model_config("DiT-XL/2", image_size=256, dtype="bfloat16", remat="dots")
    return Config(model, train=TrainConfig(batch_size=256), sample=sample, mesh=MeshConfig(data=1, fsdp=-1))


def prepared(cfg: Config, job: str) -> Config:
    """The config as the job uses it: with the width of its captions' states, attention chosen for the devices, and, to sample, a batch
    that all of them share."""
    cfg = sized(cfg)
    cfg = dataclasses.replace(cfg, model=bind(cfg.model).cfg)
    return cfg if job == "train" else dataclasses.replace(cfg, mesh=MeshConfig())


def make_arguments(cfg: Config, job: str, mesh, found: Program) -> tuple:
    """Arguments of the job's program. The values of weights and images do not affect the time."""
    if job == "train":
        _, batch, *weights = found.arguments
        drawn = fixed_batch(cfg, mesh)
        if cfg.data.encode == "in_step":
            drawn["image"] = _values(batch["image"])
        if in_step(cfg):
            drawn["cond"]["text"] = _values(batch["cond"]["text"])
        return make_state(cfg, mesh), drawn, *_values(weights)
    params = jax.device_put(bind(cfg.model).init(random_key(0)), replicated(mesh))
    asked = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), found.arguments[3:])
    asked = (*asked[:-1], found.plan.fresh) if found.plan else asked
    return params, 0, np.arange(found.images, dtype=np.int32), *asked


def _values(shapes):
    """Arrays of a tree of shapes, where these lie: floats are noise, integers 0, masks full."""
    rng = np.random.default_rng(0)

    def make(leaf):
        noise = jnp.issubdtype(leaf.dtype, jnp.floating)
        value = rng.normal(size=leaf.shape, scale=0.1) if noise else np.full(leaf.shape, leaf.dtype == bool)
        return jax.device_put(value.astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(make, shapes)


def make_ours(found: Program, job: str, arguments: tuple, names: list[str]) -> Side:
    """Our side. `names`: the list that `compilations` fills."""
    call, before = found.make(), peak_bytes()

    def run(n: int) -> None:
        nonlocal arguments
        for _ in range(n):
            out = call(*arguments)
            if job == "train":  # the old state was donated
                arguments = (out[0], *arguments[1:])
        jax.block_until_ready(out)

    def memory() -> tuple[int, str]:
        if peak_bytes() > before:
            return peak_bytes(), "memory_stats of the device: peak_bytes_in_use"
        sizes = call.lower(*arguments).compile().memory_analysis()
        used = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + sizes.output_size_in_bytes
        return used - sizes.alias_size_in_bytes, "memory_analysis of the program: arguments, temporaries, new outputs"

    return Side(run, timed(run), memory, lambda: len(names), {"name": "jax", "version": jax.__version__})


def peak_bytes() -> int:
    """Peak bytes in use on the first device so far; 0 if its backend does not count them."""
    device = make_mesh(MeshConfig()).devices.flat[0]
    return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)


def timed(run: Callable[[int], None], calls: int = 1) -> float:
    """Mean seconds a call."""
    start = time.perf_counter()
    run(calls)
    return (time.perf_counter() - start) / calls


def make_theirs(peer: ModuleType, cfg: Config, job: str, arguments: tuple, rows: int) -> Side:
    """The peer's side, with our weights and our batch."""
    weights, platform = arguments[0].params if job == "train" else arguments[0], jax.default_backend()
    params = jax.tree.map(np.asarray, weights)
    if job == "train":
        return peer.make_trainer(cfg, params, jax.tree.map(np.asarray, arguments[1]), platform, cores())
    return peer.make_sampler(cfg, params, rows, platform, cores())


def measure(
    cfg: Config, job: str, repeats: int, seconds: float, peer: ModuleType | None = None, size: int | None = None
) -> dict:
    """Times job `train` or `sample` of a config, in turn with the peer, if given, and with products if the peak is unknown.

    A round of the slowest side takes about `seconds`, at least one call. `size`: side of the matrix products.
    """
    cfg = prepared(cfg, job)
    mesh = make_mesh(cfg.mesh)
    for note in reuse_notes(cfg.sample) if job == "sample" else ():
        notice(note)
    found = program(cfg, job, mesh)
    arguments = make_arguments(cfg, job, mesh, found)
    size = size or MATRIX.get(jax.default_backend(), OTHER_MATRIX)
    with compilations() as names:
        sides = {"torch": make_theirs(peer, cfg, job, arguments, found.images)} if peer else {}
        sides = {"jax": make_ours(found, job, arguments, names)} | sides
        calls = max(round(seconds / max(timed(side.run) for side in sides.values())), 1)
        known = hardware.find(mesh.devices.flat[0].device_kind)
        products = {} if known else make_products(size)
        jobs = {"compiled": lambda: {name: side.compiled() for name, side in sides.items()}} | products
        jobs |= {name: lambda side=side: timed(side.run, calls) for name, side in sides.items()}
        rounds = alternate(jobs, repeats)
        compiled = {name: side.compiled() - rounds["compiled"][0][name] for name, side in sides.items()}
    peaks = [max(row) for row in zip(*(rounds[name] for name in products), strict=True)]
    peaks = peaks or [known.peak_flops * mesh.size] * repeats
    source = f"{known.kind} datasheet, 16-bit" if known else f"the faster {size}^3 float32 product of a round"
    return describe(cfg, job, found) | {
        "calls": calls,
        "peak_tflops": spread([peak / 1e12 for peak in peaks]),
        "peak_source": source,
        "sides": {name: report(side, found, rounds[name], peaks, compiled[name]) for name, side in sides.items()},
        "ratio": spread([b / a for a, b in zip(rounds["jax"], rounds["torch"], strict=True)]) if peer else None,
    }


def describe(cfg: Config, job: str, found: Program) -> dict:
    """The workload, for the report; `flops`, `flops_encoder` and `images` are of one call."""
    names = ("width", "depth", "heads", "patch", "tokens", "dtype", "attention", "remat")
    sampling = {name: getattr(cfg.sample, name) for name in ("sampler", "steps", "guidance")}
    return {
        "model": {name: getattr(cfg.model, name) for name in names},
        "parameters": flops.parameters(cfg.model),
        "sampling": sampling if job == "sample" else None,
        "images": found.images,
        "flops": found.flops,
        "flops_encoder": encoder_flops(cfg) * found.images if job == "train" else 0,
    }


def report(side: Side, found: Program, times: list[float], peaks: list[float], compiled: int) -> dict:
    """A side's figures. `times`: seconds a call; `peaks`: FLOP/s; both by round."""
    size, source = side.memory()
    return {
        **side.about,
        "step_ms": spread([1e3 * s for s in times]),
        "images_per_second": spread([found.images / s for s in times]),
        "tflops": spread([found.flops / s / 1e12 for s in times]),
        "mfu": spread([found.flops / s / peak for s, peak in zip(times, peaks, strict=True)]),
        "memory_bytes": size,
        "memory_source": source,
        "first_call_seconds": side.first,
        "compile_seconds": max(side.first - float(np.median(times)), 0.0),
        "recompiles": compiled,
    }
