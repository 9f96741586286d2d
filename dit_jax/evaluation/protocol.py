"""Evaluation protocols: every choice that a score depends on besides the checkpoint; and the record that states them."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dit_jax import flops
from dit_jax.config import Config, ModelConfig, SampleConfig
from dit_jax.config.evaluation import AXES
from dit_jax.data import aspect
from dit_jax.data.degrade import enlarged, make_degrade, resized, to_levels
from dit_jax.data.pipeline import load_arrays
from dit_jax.data.scenes import asked
from dit_jax.data.source import Source, all_of, open_source
from dit_jax.data.words import prompts
from dit_jax.devices.mesh import describe_device
from dit_jax.devices.numerics import ambient
from dit_jax.devices.processes import leader
from dit_jax.diffusion import process as processes
from dit_jax.diffusion.likelihood import find_solver
from dit_jax.diffusion.objective import make_objective
from dit_jax.diffusion.task import make_task
from dit_jax.error import UsageError
from dit_jax.evaluation import likelihood, loss, scores
from dit_jax.evaluation.captions import Captions, read_captions
from dit_jax.files import base
from dit_jax.metrics.psnr import Originals
from dit_jax.networks.caption import describe_text, open_text, text_flops
from dit_jax.networks.in_step import encoder_flops, open_splits
from dit_jax.sampling import quantize, reuse
from dit_jax.sampling.draw import UINT8, Sampling, describe_sample
from dit_jax.sampling.low import Low, open_low
from dit_jax.workdir.folder import read_init
from dit_jax.workdir.records import protocol_id


def weights_protocol(cfg: Config) -> dict:
    """The weights that are scored: raw, or an EMA with its decay or width."""
    if cfg.sample.weights == "params":
        return {"weights": "params (raw)"}
    if cfg.sample.ema:
        return {"weights": {"ema": "power", "width": cfg.sample.ema, "snapshots_of": list(cfg.optim.ema_tracks)}}
    width = {"constant": {"decay": cfg.optim.ema_decay}, "power": {"width": cfg.optim.ema_width}}[cfg.optim.ema]
    return {"weights": {"ema": cfg.optim.ema, **width}}


TARGETS = {  # what is computed of the held-out images: name -> (config -> whether it is asked for, metrics, what it depends on)
    "loss": (
        lambda cfg: cfg.eval.loss,
        loss.held_out_loss,
        lambda cfg: {"times_per_image": cfg.eval.times_per_image, "buckets": cfg.eval.buckets},
    ),
    "fixed": (
        lambda cfg: cfg.eval.loss and cfg.eval.fixed_times,
        loss.fixed_time_loss,
        lambda cfg: {"times": f"{cfg.eval.fixed_times} equidistant"},
    ),
    "vlb": (lambda cfg: cfg.eval.vlb, likelihood.held_out_bound, likelihood.describe_bound),
    "likelihood": (
        lambda cfg: cfg.eval.likelihood,
        likelihood.held_out_likelihood,
        likelihood.describe_likelihood,
    ),
}


def targets(cfg: Config) -> list[str]:
    """Names in TARGETS of what is asked for of the held-out images."""
    return [name for name, (asked, *_) in TARGETS.items() if asked(cfg)]


def loss_protocol(cfg: Config, held_out: Source, target: str = "loss") -> dict:
    """Everything that a target of the held-out images depends on besides the checkpoint. The law of t acts on the loss only."""
    process, data, buckets = make_objective(cfg).process, held_out.describe(), cfg.data.buckets
    most = cfg.eval.max_images or len(held_out)
    if target == "likelihood":
        most = min(most, cfg.eval.likelihood_images or most)
    return {
        "data": data | {"image_size": cfg.data.image_size} | ({"buckets": list(buckets)} if buckets else {}),
        **weights_protocol(cfg),
        "held_out": {
            "images": min(len(held_out), most),
            **TARGETS[target][2](cfg),
            "seed": cfg.eval.seed,
            "labels": "true" if held_out.classes and cfg.model.classes else "none",
            **({"captions": "one an image, by its number"} if cfg.model.text else {}),
            **({"superres": degrade.describe()} if (degrade := make_degrade(cfg)) else {}),
            **describe_text(cfg.model),
            **({"latents": "mean of the posterior"} if "autoencoder" in data else {}),
        },
        "process": processes.describe(process, law=target == "loss"),
        **({} if "autoencoder" in data else {"autoencoder": "none"}),  # for latents, the data name it
        "dtype": cfg.model.dtype,
        **ambient(),
        "flops": "exact, 2 x MACs, training = 3 x forward",
    }


SETTINGS = {name: {"samplers": "sampler"}.get(name, name) for name in AXES}  # field of SampleConfig, by axis


@contextlib.contextmanager
def naming_axes(cfg: Config) -> Iterator[None]:
    """Makes a UsageError of a sampling name the keys that its values are from: `eval.AXIS` where that has values."""
    try:
        yield
    except UsageError as error:
        keys = {f"sample.{field}": f"eval.{axis}" for axis, field in SETTINGS.items() if getattr(cfg.eval, axis)}
        error.args = (re.sub(r"\bsample\.\w+", lambda key: keys.get(key[0], key[0]), str(error)),)
        raise


def samplings(cfg: Config) -> list[SampleConfig]:
    """Every combination of the fields AXES of `eval`; an empty one is taken from `sample`.

    What changes nothing is not varied: the width of raw weights, and how guidance acts at guidance 1.
    """
    if cfg.sample.times and cfg.eval.steps:
        beside = "beside sample.times, which says all times; leave out one of them"
        raise UsageError(f"eval.steps: found {cfg.eval.steps} {beside}")
    choices = [getattr(cfg.eval, name) or (getattr(cfg.sample, field),) for name, field in SETTINGS.items()]
    found = []
    for values in itertools.product(*choices):
        typed = (kind(value) for kind, value in zip(AXES.values(), values, strict=True))
        changes = dict(zip(SETTINGS.values(), typed, strict=True))
        if changes["weights"] == "params":
            changes["ema"] = 0.0
        if changes["guidance"] == 1.0:
            changes |= {name: getattr(cfg.sample, name) for name in ("interval", "guide", "rescale")}
        with naming_axes(cfg):
            found.append(dataclasses.replace(cfg.sample, **changes))
    return list(dict.fromkeys(found))


def cells(cfg: Config) -> dict[str, Config]:
    """Parts of an evaluation that can run separately, by name: the held-out targets together, and each sampling."""
    found = {"loss": dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, samples=0))} if targets(cfg) else {}
    if cfg.eval.samples:
        none = dict.fromkeys(("loss", "vlb", "likelihood"), False)
        alone = dataclasses.replace(cfg.eval, **none, **dict.fromkeys(AXES, ()))
        for sample in samplings(cfg):
            name = f"{sample.weights}-{sample.sampler}-{sample.steps}-guidance-{sample.guidance}"
            more = {axis: getattr(sample, axis) for axis in [*AXES][4:] if getattr(cfg.eval, axis)}
            name += "".join(re.sub(r"[^\w.@]+", "-", f"-{axis}-{value}").rstrip("-") for axis, value in more.items())
            found[name] = dataclasses.replace(cfg, sample=sample, eval=alone)
    return found


@dataclass(frozen=True)
class Shared:
    """What evaluations of several runs may share: the held-out split, the feature network, the reference. Opened when first used."""

    cfg: Config
    mesh: object

    @functools.cached_property
    def held_out(self) -> tuple[Source, tuple]:
        """The held-out split and its arrays (images, cond)."""
        data, most = all_of(self.cfg.data), self.cfg.eval.max_images
        (source,) = open_splits(dataclasses.replace(self.cfg, data=data), data.held_out_split)
        text = open_text(self.cfg.model)
        ways = (data.buckets, text and text.tokens, make_degrade(self.cfg))
        images, cond = load_arrays(data, data.held_out_split, source, most, *ways)
        return source, (images, cond | ({"text": text.encode(cond["text"])} if text else {}))

    @functools.cached_property
    def captions(self) -> Captions:
        """The captions of `eval.captions`, as many as images at most."""
        return read_captions(self.cfg.eval.captions, self.cfg.eval.samples, self.cfg.eval.seed)

    @functools.cached_property
    def prompts(self) -> tuple[str, ...]:
        """Captions that images are drawn from: those of a file, or one of each held-out record, as many as images at most.

        () for a model without captions.
        """
        if not self.cfg.model.text:
            return ()
        if self.cfg.eval.captions:
            return self.captions.texts
        source = open_source(all_of(self.cfg.data), self.cfg.data.held_out_split)
        return tuple(prompts(source, self.cfg.eval.samples))

    @functools.cached_property
    def low(self) -> Low | None:
        """The low-resolution images that super-resolution begins with, of the held-out images."""
        return open_low(self.cfg)

    @functools.cached_property
    def network(self) -> scores.Network:
        return scores.open_network(self.cfg, self.mesh)

    @functools.cached_property
    def reference(self) -> scores.Reference:
        reference = scores.open_reference(self.cfg, self.network)
        if self.cfg.eval.features == "scenes" and self.prompts:
            reference.parts["prompts"] = asked(self.prompts)
        if self.network.texts and self.prompts:
            reference.parts["captions"] = self.network.texts(list(self.prompts))
        if self.low:
            reference.parts["originals"] = originals(self.low)
        if leader():
            scores.warn_of_few(self.cfg, self.network, reference)
        return reference


def draws_protocol(cfg: Config) -> dict:
    """The part of `sample_protocol` that can be told from the config: which images are drawn, and from which weights."""
    sample = describe_sample(cfg.sample)
    del sample["weights"]
    sample.pop("ema", None)
    return {**weights_protocol(cfg), "samples": sample | {"num": cfg.eval.samples, "seed": cfg.eval.seed}}


def sample_protocol(cfg: Config, sampling: Sampling, shared: Shared) -> dict:
    """Everything that the sample metrics depend on besides the checkpoint."""
    network, autoencoder = shared.network, sampling.autoencoder
    return {
        "data": {"dataset": cfg.data.name, "image_size": cfg.data.image_size},
        **draws_protocol(cfg),
        "process": processes.describe(sampling.task.process),
        "uint8": UINT8,
        **({"reuse": reuse.RULE} if cfg.sample.reuse != 1.0 else {}),
        **({"quantize": quantize.rule(cfg.sample)} if cfg.sample.quantize else {}),
        **({"guide": sampling.guide.describe(sampling.mesh)} if sampling.guide else {}),
        **describe_prompts(cfg, shared),
        **({"superres": sampling.low.about} if sampling.low else {}),
        **describe_text(cfg.model),
        "autoencoder": autoencoder.describe() if autoencoder else "none",
        "features": f"{network.name} {network.sha256}",
        "reference": shared.reference.source,
        "metrics": scores.describe(network) | {"bootstrap": cfg.eval.bootstrap},
        "dtype": cfg.model.dtype,
        **ambient(),
        "attention": cfg.model.attention,
        "flops": "exact, 2 x MACs, training = 3 x forward, of the diffusion model alone",
    }


def describe_prompts(cfg: Config, shared: Shared) -> dict:
    """The captions that images are drawn from, for records; {} for a model without captions."""
    if not (texts := shared.prompts):
        return {}
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    of = {"captions_of": cfg.data.held_out_split}
    if cfg.eval.captions:
        of = {"captions_of": "file", **shared.captions.about}
    return {"prompts": of | {"number": len(texts), "sha256": digest}}


def make_record(
    cfg: Config, workdir: str, step: int, weights: str, metrics: dict, protocol: dict, data: dict, spent: dict
) -> dict:
    """The record, one JSON object: the contract between training, evaluation and `dit_jax.scaling`. `weights`: their SHA-256.

    Metrics depend on the protocol, the weights and the kind of device, which the record therefore states. `data`: identity of
    the training data, {} if unknown; `spent`: see `goodput.totals`. `init`, if the run began with other weights, is what these cost.
    """
    seen, cost, begun = aspect.seen(data, cfg.train, step), make_objective(cfg).flops, read_init(workdir)
    return {
        "run": base(workdir),
        "task": task_of(cfg.model),
        "step": step,
        "images_seen": sum(seen.values()),
        "tokens_seen": sum(images * flops.tokens(cfg.model, shape) for shape, images in seen.items()),
        **({"unique_images": data["records"]} if "records" in data else {}),
        **({"mixture": cfg.data.recipe} if cfg.data.mixture else {}),
        "params": flops.parameters(cfg.model),
        "params_active": flops.active_parameters(cfg.model),
        "flops_train": sum(images * cost(shape) for shape, images in seen.items()),
        **({"init": {key: begun[key] for key in ("run", "step", "flops_train")}} if begun else {}),
        "flops_image": flops.forward_flops(cfg.model),
        **({"flops_encoder": of * sum(seen.values())} if (of := encoder_flops(cfg)) else {}),
        **({"flops_text_encoder": of * sum(seen.values())} if (of := text_flops(cfg)) else {}),
        "metrics": {key: float(value) for key, value in metrics.items()},
        "protocol": protocol,
        "protocol_id": protocol_id(protocol),
        "weights_sha256": weights,
        "device": describe_device(),
        "goodput": spent,
    }


def task_of(model: ModelConfig) -> str:
    """What a model draws from: "text", "labels" or "unconditional"; of super-resolution followed by its factor."""
    found = "text" if model.text else "labels" if model.classes else "unconditional"
    return f"{found}, superres {model.superres}" if model.superres else found


def originals(low: Low) -> Originals:
    """The images that low-resolution ones were made of, and these enlarged without a model, for `metrics.psnr`."""

    def floors(numbers: np.ndarray) -> dict[str, np.ndarray]:
        small = to_levels(low.read(numbers)["low"])
        big = enlarged(small, low.factor)
        return {"nearest": big, "bicubic": resized(small, big.shape[1:3])}

    return Originals(low.count, low.originals, floors)


def check_config(cfg: Config, key: str = "eval.samples") -> None:
    """Raises UsageError for a protocol that is impossible or measures nothing."""
    for sample in samplings(cfg):
        with naming_axes(cfg):
            make_task(dataclasses.replace(cfg, sample=sample))
    if not targets(cfg) and not cfg.eval.samples:
        expected = "expected at least one of them: nothing would be measured"
        raise UsageError(f"eval.loss, eval.samples: found False and 0, {expected}")
    student = cfg.objective.name == "consistency" or (cfg.objective.name == "progressive" and cfg.objective.rounds)
    for name in ("likelihood", "vlb"):
        if student and getattr(cfg.eval, name):
            why = f"a model of objective.name = {cfg.objective.name!r} has no velocity of a flow"
            raise UsageError(f"eval.{name}: found True, expected False: {why}")
    if cfg.eval.likelihood:
        find_solver(make_objective(cfg).process, cfg.eval.likelihood_solver, cfg.eval.likelihood_steps)
    if cfg.eval.captions and not cfg.model.text:
        raise UsageError(
            f"eval.captions: found {cfg.eval.captions!r}, expected none: this model has no captions (model.text)"
        )
    if cfg.eval.samples:
        scores.check_config(cfg, key)
