"""Evaluation protocols: every choice that a score depends on besides the checkpoint, and the record that states them."""

import dataclasses
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass

from dit_jax import flops
from dit_jax.config import Config, SampleConfig
from dit_jax.data.source import describe
from dit_jax.devices.mesh import describe_device
from dit_jax.diffusion import process as processes
from dit_jax.diffusion.process import make_process
from dit_jax.diffusion.samplers import sampling_times
from dit_jax.error import UsageError
from dit_jax.evaluation import scores
from dit_jax.networks.autoencoder import Autoencoder, image_shape, make_decoder, open_autoencoder
from dit_jax.sampling.draw import UINT8, image_flops
from dit_jax.workdir.goodput import totals
from dit_jax.workdir.records import protocol_id


def weights_protocol(cfg: Config) -> dict:
    """Which weights are scored: raw, or which EMA."""
    if cfg.sample.weights == "params":
        return {"weights": "params (raw)"}
    width = {"constant": {"decay": cfg.optim.ema_decay}, "power": {"width": cfg.optim.ema_width}}[cfg.optim.ema]
    return {"weights": {"ema": cfg.optim.ema, **width}}


def loss_protocol(cfg: Config, images: int) -> dict:
    """Everything that the held-out loss depends on besides the checkpoint."""
    process = make_process(cfg.diffusion, cfg.model.learn_sigma)
    return {
        "data": describe(cfg.data, cfg.data.held_out_split) | {"image_size": cfg.data.image_size},
        **weights_protocol(cfg),
        "held_out": {
            "images": images,
            "times_per_image": cfg.eval.times_per_image,
            "buckets": cfg.eval.buckets,
            "seed": cfg.eval.seed,
            "labels": "true",
            **({"latents": "mean of the posterior"} if cfg.data.latents else {}),
        },
        "process": processes.describe(process),
        **({} if cfg.data.latents else {"autoencoder": "none"}),  # that of latents is stated with the data
        "dtype": cfg.model.dtype,
        "flops": "exact, 2 x MACs, training = 3 x forward",
    }


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
    scores.warn_of_few(cfg, network, reference)
    network = scores.keeping(network, image_shape(cfg, autoencoder))
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
