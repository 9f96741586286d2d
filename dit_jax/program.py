"""A job's program on a mesh: the train step, or the sampler of one batch, with abstract arguments, to be compiled or timed."""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dit_jax import flops
from dit_jax.bind import weight_shapes
from dit_jax.config import Config, SampleConfig
from dit_jax.devices.mesh import batch_sharding, batch_split, replicated
from dit_jax.devices.rows import on_mesh
from dit_jax.diffusion.objective import make_objective
from dit_jax.diffusion.task import Task, make_task
from dit_jax.error import UsageError
from dit_jax.job.check import reachable
from dit_jax.log import notice
from dit_jax.models import conditioning, vae
from dit_jax.models.encoder import Sizes
from dit_jax.networks.autoencoder import StepEncoder, find_network, make_step_encoder, normalisation
from dit_jax.networks.caption import chained, in_step, make_text_encoder, sizes_of
from dit_jax.networks.text import PUBLISHED, SHAPES
from dit_jax.sampling.draw import image_flops, make_sampler, rows_of
from dit_jax.sampling.guide import open_guide
from dit_jax.sampling.reuse import Plan, even_plan
from dit_jax.training.state import abstract_batch, abstract_state
from dit_jax.training.step import make_train_step

_once = functools.cache(notice)  # several ask for the autoencoder


@dataclass(frozen=True)
class Program:
    """A job's program for a mesh. `arguments`: abstract arrays; `flops`, `images`: of one call on all devices together."""

    make: Callable  # () -> the jitted function
    arguments: tuple
    flops: int | None  # None: not counted
    images: int
    state: int = 0  # number of leading argument arrays that a call donates and returns
    plan: Plan | None = None  # of sample.reuse; its values are the last argument


def program(cfg: Config, job: str, mesh) -> Program:
    """The train step, or the sampler of one batch by `cfg.sample`."""
    if job == "train":
        largest = max(cfg.data.buckets, key=math.prod, default=None)
        state, batch, encoder = abstract_state(cfg, mesh), abstract_batch(cfg, mesh, largest), StepEncoder()
        if cfg.data.encode == "in_step":
            batch["image"], encoder = _encoded(cfg, mesh, batch["image"])
        if in_step(cfg):
            batch["cond"]["text"], of_text = _captions(cfg, mesh, batch["cond"]["text"]["mask"])
            encoder = chained(encoder, of_text)
        rows, held, arguments = cfg.train.batch_size, len(jax.tree.leaves(state)), (state, batch, *encoder.weights)
        work = make_objective(cfg).flops(largest) * rows
        return Program(lambda: make_train_step(cfg, mesh, encoder), arguments, work, rows, held)
    rows, batch = rows_of(cfg.model) * batch_split(mesh), batch_sharding(mesh)
    seed, indices = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    asked = {name: value for name, value in conditioning.example(cfg.model, rows).items() if name in ("text", "low")}
    asked = placed(asked, batch) if asked else {}
    arguments = (weights(cfg, mesh, cfg.sample.quantize), placed(seed, replicated(mesh)), placed(indices, batch), asked)
    guide, task = open_guide(cfg) if cfg.sample.guidance != 1.0 else None, make_task(cfg)
    arguments += (weights(guide.cfg, mesh),) if guide else ()
    plan, sample = _plan(cfg, task), dataclasses.replace(cfg.sample, reuse=1.0)
    arguments += (placed(plan.fresh, replicated(mesh)),) if plan else ()
    how = {"guide": guide and guide.cfg, "reuse": "plan" if plan else ""}
    work = image_flops(cfg, guide=guide and guide.cfg.model, plan=plan) * rows
    return Program(lambda: make_sampler(cfg.model, task, sample, mesh, **how), arguments, work, rows, plan=plan)


def _plan(cfg: Config, task: Task) -> Plan | None:
    """A plan that costs what `sample.reuse` asks for; None if every output is computed."""
    plan = even_plan(cfg, task) if cfg.sample.reuse < 1.0 else None
    return None if plan is None or plan.everything else plan


def _encoded(cfg: Config, mesh, latents) -> tuple[dict, StepEncoder]:
    """The images of a batch that the step encodes to `latents`, which have the shape of the noise, and the encoder."""
    network, size, rows = autoencoder(cfg), cfg.data.image_size, latents.shape[0]
    pixels = jax.ShapeDtypeStruct((rows, size, size, network.channels), jnp.float32, sharding=latents.sharding)
    encoder, by = placed(vae.shapes(network)["encoder"], replicated(mesh)), normalisation(cfg.autoencoder)
    return {"pixels": pixels, "noise": latents}, make_step_encoder(network, by, encoder, mesh)


def _captions(cfg: Config, mesh, mask) -> tuple[dict, StepEncoder]:
    """The tokens of a batch's captions, which are where `mask` is, and the encoder that makes states of them."""
    ids = jax.ShapeDtypeStruct(mask.shape, jnp.int32, sharding=mask.sharding)
    sizes, model = text_encoder(cfg), cfg.model
    empty = jax.ShapeDtypeStruct((1, conditioning.EMPTY[model.text], sizes.width), jnp.dtype(model.dtype))
    weights = placed({"text_encoder": SHAPES[type(sizes)](sizes), "empty": empty}, replicated(mesh))
    return {"ids": ids, "mask": mask}, make_text_encoder(model, sizes, weights)


def text_encoder(cfg: Config) -> Sizes:
    """The sizes of the config's encoder of captions; if it is not here, of the published one with such states."""
    model = cfg.model
    if model.text_encoder and reachable(model.text_encoder):
        return sizes_of(model)
    found = next((one for one in PUBLISHED[model.text] if model.text_width in (0, one.width)), None)
    if found is None:
        known = ", ".join(str(one.width) for one in PUBLISHED[model.text])
        raise UsageError(
            f"model.text_width: found {model.text_width}, expected one of {known}, or model.text_encoder here"
        )
    _once(
        f"model.text_encoder: {model.text_encoder!r} is not on this machine; the published {model.text} of width {found.width} is taken"
    )
    return dataclasses.replace(found, dtype=model.dtype)


def sized(cfg: Config) -> Config:
    """Return the config with the width of its captions' states."""
    if not cfg.model.encoded:
        return cfg
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, text_width=text_encoder(cfg).width))


def autoencoder(cfg: Config) -> vae.VAEConfig:
    """The sizes of the config's autoencoder, of Stable Diffusion's if it is not here. Raises UsageError if these do not fit the model."""
    folder, side, size = cfg.autoencoder.folder, cfg.model.input_size, cfg.data.image_size
    if folder and reachable(folder):
        return find_network(cfg)
    network = vae.VAEConfig(latent_channels=cfg.model.channels)
    if side * network.factor != size:
        found = f"no {folder!r} here" if folder else "none"
        raise UsageError(
            f"autoencoder.folder: found {found} for latents of side {side} of images of {size} pixels, expected one, because "
            f"Stable Diffusion's autoencoder makes a latent of {network.factor} pixels"
        )
    if folder:
        _once(f"autoencoder.folder: {folder!r} is not on this machine; Stable Diffusion's sizes are taken")
    return network


def placed(shapes, sharding):
    """Abstract arrays of a tree of shapes, all placed by one sharding."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def weights(cfg: Config, mesh, mode: str = ""):
    """A model's weights, as they lie on the mesh, quantised by `mode` of `sample.quantize`."""
    return on_mesh(mesh, weight_shapes(cfg.model, mode))


def encoder_flops(cfg: Config) -> int:
    """FLOPs of encoding an image and its caption in the step, which those of the step leave out; 0 if it does not."""
    size = cfg.data.image_size
    of_image = 2 * vae.encoder_macs(autoencoder(cfg), size, size) if cfg.data.encode == "in_step" else 0
    return of_image + (flops.encoder_flops(text_encoder(cfg), cfg.model.text_length) if in_step(cfg) else 0)


def reuse_notes(*samples: SampleConfig) -> list[str]:
    """The note that settings reuse outputs of blocks, and which only the run's weights tell; [] if none does."""
    what = (
        "sample.reuse: which outputs are reused is found with a run's weights; here they are spread evenly over calls and layers, "
        "at a cost of at most the same share. The program and its memory are those of every such plan"
    )
    return [what] * any(sample.reuse < 1.0 for sample in samples)
