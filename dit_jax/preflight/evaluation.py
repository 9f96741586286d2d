"""What an evaluation costs on a slice: its programs, each compiled as the job would, and the images that go through each."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dit_jax import flops, hardware
from dit_jax.config import Config, MeshConfig
from dit_jax.devices import mesh as meshes
from dit_jax.devices.mesh import batch_sharding, batch_split, replicated
from dit_jax.devices.numerics import random_key
from dit_jax.devices.rows import drawing_mesh
from dit_jax.error import UsageError
from dit_jax.evaluation.loss import PAIRS, alone, make_losses
from dit_jax.evaluation.protocol import samplings
from dit_jax.evaluation.scores import ROWS, classifier_rows, clip_rows, inception_rows, scene_rows
from dit_jax.log import say
from dit_jax.models import classifier, clip, inception, vae
from dit_jax.networks.autoencoder import images_at_once, normalisation
from dit_jax.preflight.compilation import analysis, measured, missing_time, run_costs
from dit_jax.program import Program, autoencoder, placed, program, reuse_notes, weights
from dit_jax.sampling.draw import image_flops
from dit_jax.training.state import abstract_batch

PASSES = 6  # bfloat16 products that a TPU makes of one float32 product at the highest precision, Inception's


@dataclass(frozen=True)
class Part:
    """A program of an evaluation, and the images that go through it under all settings together; 0: not known."""

    name: str
    about: str
    program: Program
    images: int
    slow: bool = False  # to compile for a TPU


def check(cfg: Config, num: int) -> None:
    """Raises UsageError if there is nothing to measure, or the autoencoder does not fit the model."""
    if not num and not cfg.eval.loss:
        raise UsageError(
            "eval.loss, --num: found False and 0, expected at least one of them: nothing would be measured"
        )
    samplings(cfg)
    if num and cfg.model.input_size != cfg.data.image_size:
        autoencoder(cfg)


def parts(cfg: Config, mesh, whole, num: int) -> Iterator[Part]:
    """The programs that score one checkpoint: `num` images of each setting, and the held-out loss.

    `mesh`: of the model; `whole`: of the same devices, for networks that are whole on each.
    """
    settings = samplings(cfg)
    if num:
        yield from _draws([dataclasses.replace(cfg, sample=sample) for sample in settings], mesh, num)
        channels = cfg.model.channels
        if cfg.model.input_size != cfg.data.image_size:
            network = autoencoder(cfg)
            channels, decoder = network.channels, _decoder(cfg, network, whole)
            yield Part("decode", "latents to images, in float32", decoder, num * len(settings))
        yield _features(cfg, whole, channels, num * len(settings))
    if cfg.eval.loss:
        kinds = len({(sample.weights, sample.ema) for sample in settings})
        about = f"held-out loss, {cfg.eval.times_per_image} noise levels an image"
        yield Part("loss", about, _loss(alone(cfg, 0), cfg, mesh), kinds * cfg.eval.max_images)
        if fixed := cfg.eval.fixed_times:
            loss = _loss(alone(cfg, fixed), cfg, mesh)
            yield Part("loss", f"held-out loss at {fixed} fixed times", loss, kinds * cfg.eval.max_images)


def _draws(cells: list[Config], mesh, num: int) -> Iterator[Part]:
    """The samplers. Settings that differ in the guidance or the kind of weights only cost the same, and are compiled once."""
    alike: dict[tuple, list[Config]] = {}
    for cell in cells:
        sample = cell.sample
        kind = (sample.sampler, sample.steps, sample.guide, sample.reuse, sample.quantize, image_flops(cell))
        alike.setdefault(kind, []).append(cell)
    for (sampler, steps, _, reuse, quantize, _), same in alike.items():
        guidance = ", ".join(dict.fromkeys(f"{cell.sample.guidance:g}" for cell in same))
        about = f"{sampler} {steps}, guidance {guidance}" + (f", reuse {reuse:g}" if reuse < 1 else "")
        about += f", {quantize}" * bool(quantize)
        yield Part("draw", about, program(same[0], "sample", mesh), num * len(same))


def _compiler(apply: Callable, mesh) -> Callable:
    """() -> the jitted `apply(params, rows)`, params whole on every device."""
    whole, batch = replicated(mesh), batch_sharding(mesh)
    return lambda: jax.jit(apply, in_shardings=(whole, batch), out_shardings=batch)


def _arguments(mesh, params, shape: tuple, dtype) -> tuple:
    rows = placed(jax.ShapeDtypeStruct(shape, dtype), batch_sharding(mesh))
    return placed(params, replicated(mesh)), rows


def _decoder(cfg: Config, network: vae.VAEConfig, mesh) -> Program:
    by, side, count = normalisation(cfg.autoencoder), cfg.model.input_size, images_at_once(mesh)
    arguments = _arguments(mesh, vae.shapes(network), (count, side, side, cfg.model.channels), jnp.float32)
    apply = _compiler(lambda params, rows: vae.decode(network, params, vae.denormalise(by, rows)), mesh)
    return Program(apply, arguments, None, count)


def _features(cfg: Config, mesh, channels: int, images: int) -> Part:
    """The feature network. `digits`, the default, and `scenes` take such images only: other data are scored with Inception."""
    count, side = ROWS * batch_split(mesh), cfg.data.image_size
    shape = (side, side, channels)
    name = cfg.eval.features
    slow = name == "inception" or (name in ("digits", "scenes") and cfg.data.name != name)
    if name == "clip":
        vision = clip.VisionConfig()
        about, params, apply = "CLIP ViT-L/14", clip.shapes(vision), functools.partial(clip_rows, vision)
    elif slow:
        about, params, apply = "Inception", inception.shapes(), inception_rows
    elif name == "scenes":
        about, apply = "a classifier of digits, in each quarter", scene_rows
        params = jax.eval_shape(lambda: classifier.init(random_key(0), (8, 8, 1), 10))
    else:
        about, apply = "a classifier", classifier_rows
        params = jax.eval_shape(lambda: classifier.init(random_key(0), shape, cfg.model.classes))
    arguments = _arguments(mesh, params, (count, *shape), jnp.uint8)
    one = jax.jit(apply).lower(params, jax.ShapeDtypeStruct((1, *shape), jnp.uint8)).cost_analysis()
    return Part(
        "features", about, Program(_compiler(apply, mesh), arguments, int(count * one["flops"]), count), images, slow
    )


def _loss(points: Config, cfg: Config, mesh) -> Program:
    k = points.eval.fixed_times or points.eval.times_per_image
    rows = batch_split(mesh) * max(1, PAIRS // k)
    shape = max(cfg.data.buckets, key=math.prod, default=None)
    batch = abstract_batch(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, batch_size=rows)), mesh, shape)
    indices = placed(jax.ShapeDtypeStruct((rows,), jnp.int32), batch_sharding(mesh))
    arguments = (weights(cfg, mesh), batch["image"], batch["cond"], indices)
    return Program(lambda: make_losses(points, mesh), arguments, flops.forward_flops(cfg.model, shape) * k * rows, rows)


def examine(cfg: Config, topology: hardware.Topology, num: int, price: float | None) -> dict:
    """The report of an evaluation of one checkpoint: of each program as `compilation.measured`, and what all of them cost."""
    missing = meshes.why_not_compiled(topology)
    if missing:
        mesh = whole = meshes.abstract_mesh(MeshConfig(), topology.devices, topology.slices)
    else:
        devices = meshes.devices_ahead(topology)
        mesh, whole = drawing_mesh(4 * flops.parameters(cfg.model), devices), meshes.make_mesh(MeshConfig(), devices)
    found = []
    for part in parts(cfg, mesh, whole, num):
        report = analysis(cfg, "evaluate", topology, mesh, part.program)
        if not missing and part.slow and topology.platform == "tpu":
            report["estimated_step_seconds"] = PASSES * part.program.flops / (topology.peak() * topology.devices)
        elif not missing:
            say(f"compiling: {part.name}, {part.about} ...")
            report = measured(report, topology, part.program)
        report["run"] = run_costs(report, part.images, price)
        found.append({"part": part.name, "about": part.about, "wanted": part.images} | report)
    if not found:
        raise UsageError(
            "eval.loss, --num: found False and 0, expected at least one of them: nothing would be measured"
        )
    shared = ("topology", "job", "devices", "chips", "hosts", "mesh", "parameters")
    return {name: found[0][name] for name in shared} | {
        "images": num,
        "settings": len(samplings(cfg)) if num else 0,
        "parts": found,
        "fits": None if missing else all(part["fits"] is not False for part in found),
        "run": _total(found, num),
        "message": f"not compiled: {missing}" if missing else _messages(found),
        "notes": _notes(found, topology, num, missing)
        + reuse_notes(*(samplings(cfg) if num else ()))
        + ["not counted: the bound and the likelihood (eval.vlb, eval.likelihood)"]
        * (cfg.eval.vlb or cfg.eval.likelihood),
    }


def _messages(found: list[dict]) -> str:
    return "; ".join(f"{part['part']}: {part['message']}" for part in found if part["message"])


def _total(found: list[dict], num: int) -> dict | None:
    """The sum of what the parts cost, but for those of an unknown number of images; None if a cost is not known."""
    runs = [part["run"] for part in found if part["wanted"]]
    if not runs or None in runs:
        return None
    sums = {
        name: [sum(ends) for ends in zip(*(run[name] for run in runs), strict=True)] for name in ("hours", "chip_hours")
    }
    priced = runs[0]["price"] is not None
    price = [sum(ends) for ends in zip(*(run["price"] for run in runs), strict=True)] if priced else None
    return {"images": num, **sums, "price": price}


def _notes(found: list[dict], topology: hardware.Topology, num: int, missing: str) -> list[str]:
    """What the report omits, and why."""
    notes = []
    if not missing and not all(part["estimated_step_seconds"] for part in found if part["fits"]):
        notes.append(missing_time(topology))
    if not missing and any(part["fits"] is None for part in found):
        notes.append(
            "features: not compiled, because that takes many minutes; the time is a lower bound, six bfloat16 passes at the peak"
        )
    if not num:
        notes.append("no images are drawn: eval.samples is 0; say how many, such as --num=50000")
    if any(not part["wanted"] for part in found):
        notes.append(
            "not counted: the held-out loss, because eval.max_images is 0, all images of a split that is not read here"
        )
    return notes
