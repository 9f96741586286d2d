"""`sample.quantize`: int8 weights for a sampling and, of `int8`, the ranges of the products' inputs, from a calibration of the checkpoint.

The calibration draws a few images by the same settings without quantisation, and notes the largest input of each product in each layer
over all calls. It is saved as `W/quantize/<step>-<id>.json`, the id being that of all that it depends on, the weights' SHA-256 among it, so
that every share of the same sampling has the same scales, and another model's are never found.
"""

import dataclasses
import functools
import hashlib
import os
from dataclasses import dataclass

import jax
import numpy as np

from dit_jax import flops
from dit_jax.bind import bind_to_draw
from dit_jax.config import ModelConfig, SampleConfig
from dit_jax.devices.mesh import describe_device, replicated
from dit_jax.devices.processes import by_leader, leader
from dit_jax.error import UsageError
from dit_jax.files import is_file, json_text, make_folder, read_json, write_file
from dit_jax.hardware import int8_speed
from dit_jax.log import notice, say
from dit_jax.models.quantize import products, quantize
from dit_jax.workdir.records import protocol_id

FOLDER = "quantize"  # in a run's folder
IMAGES, SEED = 32, 0  # of a calibration
RULES = {
    "int8": f"weights by channel; inputs of the MLP by their largest, {IMAGES} images, seed {SEED}",
    "int8_weights": "weights by channel",
}


@dataclass(frozen=True)
class Scales:
    """Largest magnitudes of the products' inputs, {product: (layers,)}."""

    ranges: dict

    @property
    def sha256(self) -> str:
        text = json_text({name: [float(most) for most in rows] for name, rows in sorted(self.ranges.items())})
        return hashlib.sha256(text.encode()).hexdigest()


def rule(cfg: SampleConfig) -> str:
    """How `cfg.quantize` finds its scales, for protocols."""
    return RULES[cfg.quantize]


def saved(path: str, job: dict, names: list[str], depth: int) -> dict | None:
    """Read the ranges of a calibration; None if there is none. Raises UsageError if the file is damaged or another model's."""
    if not is_file(path):
        return None
    again = "remove it to calibrate anew"
    found = read_json(path)
    differ = [key for key in job if found.get("job", {}).get(key) != job[key]]
    if differ:
        raise UsageError(
            f"{path}: found scales of another model or sampling (its {differ[0]} differs), expected this one's; {again}"
        )
    ranges = found.get("ranges")
    sound = isinstance(ranges, dict) and sorted(ranges) == sorted(names)
    if not sound or not all(
        np.shape(rows) == (depth,) and all(isinstance(most, float) and 0 <= most < np.inf for most in rows)
        for rows in ranges.values()
    ):
        raise UsageError(f"{path}: damaged, expected ranges of {', '.join(names)} for {depth} layers; {again}")
    return ranges


def _calibrated(sampling, params, sha256: str, workdir: str, step: int) -> Scales:
    """The scales for the weights of a run's step, from its folder or measured now and saved there."""
    plain = dataclasses.replace(sampling.cfg.sample, quantize="", reuse=1.0)
    plain = dataclasses.replace(sampling, cfg=dataclasses.replace(sampling.cfg, sample=plain), plan=None, scales=None)
    job, names = plain.describe(sha256, step, SEED), products(params)
    path = os.path.join(workdir, FOLDER, f"{step}-{protocol_id(job)}.json")
    ranges = by_leader(lambda: saved(path, job, names, sampling.cfg.model.depth))
    if ranges is None:
        say(f"quantize: calibrating with {IMAGES} images of step {step}")
        ranges = {name: [float(most) for most in rows] for name, rows in plain.ranges(params, IMAGES, SEED).items()}

        def save() -> None:
            make_folder(os.path.join(workdir, FOLDER))
            write_file(path, json_text({"job": job, "rule": RULES["int8"], "ranges": ranges}, indent=1) + "\n")

        by_leader(save)
    return Scales(ranges)


@functools.lru_cache(maxsize=32)
def _quantizer(model: ModelConfig, mesh, mode: str):
    before, after = (bind_to_draw(model, mesh, m)[1] for m in ("", mode))
    if mode == "int8":
        return jax.jit(quantize, in_shardings=(before, replicated(mesh)), out_shardings=after)
    return jax.jit(lambda params: quantize(params, None), in_shardings=(before,), out_shardings=after)


@functools.cache
def tell_speed(model: ModelConfig, mode: str, kind: str) -> None:
    """Says what int8 costs on a kind of device without faster int8 products, by the makers' rates; nothing on others."""
    speed = int8_speed(kind)
    if mode == "int8_weights":
        return
    share = quantized_share(model)
    if speed is None:
        notice(
            f"sample.quantize: no rate of int8 products is known of {kind}: {share:.0%} of the model's FLOPs may take several "
            "times as long as without"
        )
    elif speed <= 1:
        notice(
            f"sample.quantize: {kind} computes int8 products at {speed:.2g} of the rate of 16-bit ones: an image takes at least "
            f"{1 - share + share / speed:.2f} of its time without; int8_weights saves the same memory"
        )


def quantized_share(cfg: ModelConfig) -> float:
    """Share of a forward pass's FLOPs in products with int8 inputs."""
    macs = flops.component_macs(cfg)
    return macs["mlp"] / sum(macs.values())


def with_quantize(sampling, params, sha256: str, workdir: str, step: int) -> tuple:
    """Return the `Sampling` and the weights of a run's step, quantised by `sample.quantize`; unchanged without it.

    The ranges of inputs are measured now unless they are saved. All processes of the mesh call it.
    """
    mode = sampling.cfg.sample.quantize
    if not mode:
        return sampling, params
    if leader():
        tell_speed(sampling.cfg.model, mode, describe_device()["kind"])
    make = _quantizer(sampling.cfg.model, sampling.mesh, mode)
    if mode == "int8_weights":
        return sampling, make(params)
    scales = _calibrated(sampling, params, sha256, workdir, step)
    ranges = {name: np.asarray(rows, np.float32) for name, rows in scales.ranges.items()}
    return dataclasses.replace(sampling, scales=scales), make(params, ranges)
