"""The metrics of drawn images: feature networks, the reference, and every row of `metrics.table` that these allow.

A network maps an image to a row of float32: pooled features, logits and, if it has them, spatial features. FID, sFID, KID and
IS are measured with Inception; the name of a metric on another network ends with that network's name.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.config import Config, EvalConfig
from dit_jax.data.pipeline import load_arrays
from dit_jax.data.source import all_of, open_source
from dit_jax.devices.mesh import batch_sharding, batch_split, replicated
from dit_jax.devices.processes import leader
from dit_jax.error import UsageError
from dit_jax.job.check import reachable
from dit_jax.log import warn
from dit_jax.metrics import frechet
from dit_jax.metrics.features import check_room
from dit_jax.metrics.metric import Metric
from dit_jax.metrics.table import METRICS
from dit_jax.models import classifier, clip, inception
from dit_jax.networks.folder import DIGITS, load_network, read_meta
from dit_jax.networks.reference import read_reference
from dit_jax.networks.text import load_encoder
from dit_jax.networks.tokenizer import open_tokenizer

ROWS = 16  # images that a device computes at a time; fixed, because another batch shape rounds differently
REFERENCE = ("gaussian", "spatial_gaussian", "features")  # what a reference may have
INCEPTION = {"pool": 2048, "spatial": 2023, "logits": 1008}  # width of each part of its rows
BLOCK = 1024  # rows that enter the statistics at a time, so that the sizes of parts do not change the rounding


@dataclass(frozen=True)
class Network:
    """A feature network on the mesh. `parts`: name and width of each part of a row."""

    name: str
    sha256: str
    parts: dict
    rows: Callable = field(repr=False)  # uint8 (b, h, w, c) -> float32 (b, width)
    logits: str  # which ones, in words, for records
    shape: tuple | None = None  # (h, w, c) of its input; None: any
    rules: dict = field(default_factory=dict)  # for records
    texts: Callable | None = field(
        default=None, repr=False
    )  # captions, a list -> float32 (n, width of "pool"); None: not of texts
    images: tuple | None = None  # (h, w, c) of drawn images to be kept behind their features; None: not kept

    @property
    def width(self) -> int:
        return sum(self.parts.values())

    @property
    def size(self) -> int:
        """Bytes of an encoded image."""
        return 4 * self.width + math.prod(self.images or (0,))

    def split(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Splits rows (b, width) into the parts, by name."""
        ends = np.cumsum(list(self.parts.values()))[:-1]
        parts = np.split(rows, ends, axis=1)
        return {name: np.ascontiguousarray(part) for name, part in zip(self.parts, parts, strict=True)}

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Encodes images uint8 (b, h, w, c) as bytes (b, size): their rows and, if `images` is set, the images."""
        rows = self.rows(images).view(np.uint8)
        return np.concatenate([rows, images.reshape(len(images), -1)], axis=1) if self.images else rows

    def decode(self, coded: np.ndarray) -> dict[str, np.ndarray]:
        """Inverse of `encode`: the parts of the rows by name, and "images" if these were kept."""
        rows, images = np.split(coded, [4 * self.width], axis=1)
        parts = self.split(np.ascontiguousarray(rows).view("<f4"))
        return parts | ({"images": images.reshape(-1, *self.images)} if self.images else {})


def _on_mesh(apply: Callable, params, mesh) -> Callable[[np.ndarray], np.ndarray]:
    """Compiles `apply(params, images)` -> rows for a fixed number of images at a time on every device."""
    whole, batch = replicated(mesh), batch_sharding(mesh)
    program = jax.jit(apply, in_shardings=(whole, batch), out_shardings=batch)
    params, count = jax.device_put(params, whole), ROWS * batch_split(mesh)

    def rows(images: np.ndarray) -> np.ndarray:
        filled = np.concatenate([images, np.repeat(images[-1:], -len(images) % count, axis=0)])
        found = [jax.device_get(program(params, filled[i : i + count])) for i in range(0, len(filled), count)]
        return np.ascontiguousarray(np.concatenate(found)[: len(images)], np.dtype("<f4"))

    return rows


def classifier_rows(params, images: jax.Array) -> jax.Array:
    """Rows of images uint8 (b, h, w, c): the classifier's features and logits."""
    return jnp.concatenate(classifier.apply(params, images.astype(jnp.float32) / 127.5 - 1), axis=1)


def scene_rows(params, images: jax.Array) -> jax.Array:
    """Rows of scenes uint8 (b, 16, 16, 3): features and logits of the digits network for the brightest channel of each quarter."""
    grey = images.max(axis=-1).reshape(-1, 2, 8, 2, 8).transpose(0, 1, 3, 2, 4).reshape(-1, 8, 8, 1)
    features, logits = classifier.apply(params, grey.astype(jnp.float32) / 127.5 - 1)
    return jnp.concatenate([part.reshape(len(images), -1) for part in (features, logits)], axis=1)


def inception_rows(params, images: jax.Array) -> jax.Array:
    """Rows of images uint8 (b, h, w, 1 or 3): Inception's features, spatial features and logits without bias."""
    rgb = jnp.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
    found = inception.apply(params, rgb)
    return jnp.concatenate([found.pool, found.spatial, found.logits_unbiased], axis=1)


def clip_rows(cfg: clip.VisionConfig, params, images: jax.Array) -> jax.Array:
    """CLIP's projected embeddings (b, p) of images uint8 (b, h, w, 1 or 3), resized as a whole to CLIP's square."""
    rgb = jnp.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
    square = (len(rgb), cfg.size, cfg.size, 3)
    resized = jax.image.resize(rgb.astype(jnp.float32), square, "cubic", antialias=True)
    return clip.apply_vision(cfg, params, jnp.round(jnp.clip(resized, 0, 255))).pooled


def _clip(folder: str, mesh) -> Network:
    if not reachable(folder):
        raise UsageError(
            f"eval.clip: found no {folder!r}, expected the folder of CLIP's encoders, which `convert` wrote"
        )
    encoder = load_encoder(folder, "clip")
    widths = [encoder.cfgs[half].projection if half in encoder.cfgs else 0 for half in ("text", "vision")]
    if not widths[0] == widths[1] > 0:
        raise UsageError(
            f"eval.clip: {folder!r}: found projections of text and images to {widths} features, expected equal ones: convert a whole CLIP"
        )
    text, vision, tokenizer = encoder.cfgs["text"], encoder.cfgs["vision"], open_tokenizer(folder)
    embed = _on_mesh(lambda params, ids: clip.apply_text(text, params, ids).pooled, encoder.params["text"], mesh)

    def texts(captions: list[str]) -> np.ndarray:
        found = tokenizer.encode(captions, text.positions)
        if found.cut and leader():
            warn(
                f"eval.clip: {found.cut} of {len(captions)} captions are longer than {text.positions} tokens; they are cut"
            )
        return embed(found.ids)

    rules = {"resize": f"bicubic (a = -0.5), antialiased, {vision.size}, rounded", "tokenizer": tokenizer.sha256}
    rows = _on_mesh(functools.partial(clip_rows, vision), encoder.params["vision"], mesh)
    return Network("clip", encoder.about["sha256"], {"pool": widths[1]}, rows, "", rules=rules, texts=texts)


def _classifier(name: str, folder: str, mesh) -> Network:
    config, weights, meta = load_network(folder, "classifier")
    about, rules = meta["source"], {}
    if name != "digits":  # whose accuracy the checksum tells
        held_out = about["held_out"]
        rules = {name: f"accuracy {about['accuracy']:.4f} on {held_out['records']} images of {held_out['dataset']}"}
    parts, rows = {"pool": classifier.WIDTH, "logits": config["classes"]}, _on_mesh(classifier_rows, weights, mesh)
    return Network(name, meta["sha256"], parts, rows, "of the last layer", tuple(config["image_shape"]), rules)


def _inception(folder: str, mesh) -> Network:
    _, weights, meta = load_network(folder, "inception")
    logits, rules = "without the bias of the last layer", {"resize": "TensorFlow 1 bilinear, 299"}
    return Network("inception", meta["sha256"], INCEPTION, _on_mesh(inception_rows, weights, mesh), logits, rules=rules)


def keeping(network: Network, shape: tuple) -> Network:
    """The network, set to keep images of this shape (h, w, c) if any metric needs them. Raises UsageError for a shape it does not take."""
    if network.shape not in (None, shape):
        raise UsageError(f"eval.features: the network takes images of shape {network.shape}, found samples of {shape}")
    return replace(network, images=shape if any("images" in m.needs for m in METRICS.values()) else None)


def _measurable(network: Network, reference: dict) -> dict[str, Metric]:
    """Name in records -> metric, for all metrics whose needs the network and the parts of the reference meet."""
    parts = set(network.parts)
    offered = {"images", network.name, *parts, *reference}
    found = {}
    for metric in METRICS.values():
        own = network.name in {"inception", *metric.needs} or not parts & set(metric.needs)
        if set(metric.needs) <= offered:
            found[metric.name if own else f"{metric.plain or metric.name}_{network.name}"] = metric
    return found


def describe(network: Network) -> dict:
    """Rules and constants of the metrics, for records; the same for every reference."""
    found = dict(network.rules)
    for metric in _measurable(network, dict.fromkeys((*REFERENCE, "captions", "prompts"))).values():
        found |= {name: rule.format(logits=network.logits) for name, rule in metric.rules.items()}
    return found | {"rows": ROWS}


def check_config(cfg: Config, key: str) -> None:
    """Raises UsageError for sample metrics that are impossible. `key`: the config key of the number of samples, for the message."""
    if cfg.eval.features == "inception" and not cfg.eval.inception:
        raise UsageError(
            "eval.inception: empty, expected the folder of the Inception network; write it with `python -m dit_jax.convert "
            "--source=inception --weights=FILE --out=DIR` from torch-fidelity's weights-inception-2015-12-05-6726825d.pth; or set "
            "eval.features='classifier' (docs/evaluate.md)"
        )
    if cfg.eval.features == "classifier" and not cfg.eval.classifier:
        raise UsageError(
            "eval.classifier: empty, expected the folder of a feature network; train it with `python -m dit_jax.features "
            "--config=CONFIG --out=DIR`"
        )
    if cfg.eval.features == "clip" and not cfg.eval.clip:
        raise UsageError(
            "eval.clip: empty, expected the folder of CLIP's encoders; write it with `python -m dit_jax.convert --source=clip "
            "--weights=FOLDER --out=DIR` from a folder of transformers' openai/clip-vit-large-patch14"
        )
    if cfg.eval.features in ("digits", "scenes") and cfg.data.name != cfg.eval.features:
        expected = "'inception' or 'classifier'" if cfg.model.classes else "'inception', or 'clip' for captions"
        raise UsageError(
            f"eval.features: found {cfg.eval.features!r} for {cfg.data.title!r}, expected {expected}; or set "
            "eval.samples=0 for the held-out loss alone"
        )
    held = cfg.data.cache or cfg.data.name == "scenes"  # whose reference is the held-out split
    if not cfg.eval.reference and (cfg.data.mixture or cfg.data.latents or not held):
        raise UsageError(
            "eval.reference: empty, expected an npz of reference statistics or images: the data set is too large to be held "
            "in memory, or is of latents, or a mixture, whose splits do not hold the weights"
        )
    check_number(cfg, key)


def check_number(cfg: Config, key: str) -> None:
    """Raises UsageError if there are too few samples for a covariance or too many to keep."""
    num, name = cfg.eval.samples, cfg.eval.features
    width = {"inception": INCEPTION["pool"], "scenes": 4 * classifier.WIDTH}.get(name, classifier.WIDTH)
    if name == "clip":
        if not reachable(cfg.eval.clip):  # which --check says, and a job as it opens the network
            return
        width = read_meta(cfg.eval.clip, "clip")["config"].get("vision", {}).get("projection", 0)
    try:
        check_room(num, width)
    except ValueError as error:
        raise UsageError(f"{key}: found {num}: {error}") from None
    if num <= width:
        raise UsageError(
            f"{key}: found {num}, expected more than the {width} features of the network {name!r}: a "
            "covariance of fewer samples is singular"
        )


def warn_of_few(cfg: Config, network: Network, reference: "Reference") -> None:
    """Warns of each metric that misleads with so few samples."""
    num, width = cfg.eval.samples, network.parts["pool"]
    for name, metric in _measurable(network, reference.parts).items():
        least, why = metric.few
        if num < least * width:
            warn(f"eval.samples: {num} are few for {width} features: {name} {why}")


def open_network(cfg: Config, mesh) -> Network:
    """Opens the network named by `eval.features`. Raises UsageError if its folder holds another kind."""
    if cfg.eval.features == "inception":
        return _inception(cfg.eval.inception, mesh)
    if cfg.eval.features == "clip":
        return _clip(cfg.eval.clip, mesh)
    if cfg.eval.features == "scenes":
        _, weights, meta = load_network(DIGITS, "classifier")
        parts = {"pool": 4 * classifier.WIDTH, "cells": 40}
        return Network(
            "scenes", meta["sha256"], parts, _on_mesh(scene_rows, weights, mesh), "of the quarters", (16, 16, 3)
        )
    return _classifier(cfg.eval.features, DIGITS if cfg.eval.features == "digits" else cfg.eval.classifier, mesh)


@dataclass(frozen=True)
class Reference:
    """What samples are compared with. `source`: its description for records; `parts`: those among REFERENCE that it has.

    "gaussian" and "spatial_gaussian" are (mean (d,), covariance (d, d)); "features" are the pooled ones (m, d) of its images.
    """

    source: object
    parts: dict


def reference_split(cfg: Config) -> str:
    """The split whose images samples are compared with: `data.split`, but of scenes, which have no end there, the held-out one."""
    return cfg.data.held_out_split if cfg.data.name == "scenes" else cfg.data.split


def open_reference(cfg: Config, network: Network) -> Reference:
    """Reads the npz of `eval.reference`, else the images of `reference_split`. Raises UsageError if it does not fit the network."""
    if not cfg.eval.reference:
        name = reference_split(cfg)
        split = open_source(all_of(cfg.data), name)
        rows = network.rows(as_uint8(load_arrays(cfg.data, name, split)[0]))
        source = split.describe() | {"images": len(split)}
        return _of_rows([rows], network, source, f"{cfg.data.name} {name}")
    found = read_reference(cfg.eval.reference, network.parts["pool"], network.parts.get("spatial", 0))
    source = {"sha256": found.sha256}
    if found.images is not None and network.shape not in (None, found.images.shape[1:]):
        raise UsageError(
            f"{found.path}: arr_0: found images of shape {found.images.shape[1:]}, expected {network.shape}, as the network "
            f"{network.name!r} takes them"
        )
    if found.kind == "images":
        return _of_rows(_rows_of(network, found.images), network, source | {"images": len(found.images)}, found.path)
    parts = {"gaussian": (found.mean, found.cov)}
    if found.mean_spatial is not None:
        parts["spatial_gaussian"] = found.mean_spatial, found.cov_spatial
    if found.images is not None:
        parts["features"] = np.concatenate([network.split(x)["pool"] for x in _rows_of(network, found.images)])
    return Reference(source, parts)


def _rows_of(network: Network, images: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(images), BLOCK):
        yield network.rows(images[start : start + BLOCK])


def _of_rows(rows: Iterable[np.ndarray], network: Network, source: dict, where: str) -> Reference:
    """The reference of `source["images"]` images, from their rows. Raises UsageError if they are too few or too many."""
    try:
        check_room(source["images"], network.parts["pool"])
    except ValueError as error:
        raise UsageError(f"reference {where}: {error}") from None
    if source["images"] <= network.parts["pool"]:
        raise UsageError(
            f"reference {where}: found {source['images']} images, expected more than the {network.parts['pool']} features of "
            f"the network {network.name!r}: a covariance of fewer is singular"
        )
    gaussians = {"gaussian": "pool", "spatial_gaussian": "spatial"}
    stats = {key: frechet.empty(network.parts[of]) for key, of in gaussians.items() if of in network.parts}
    kept = []
    for block in _blocks(rows):
        parts = network.split(block)
        stats = {key: frechet.update(seen, parts[gaussians[key]]) for key, seen in stats.items()}
        kept.append(parts["pool"])
    found = {key: frechet.mean_cov(seen) for key, seen in stats.items()}
    return Reference(source, found | {"features": np.concatenate(kept)})


def as_uint8(images: np.ndarray) -> np.ndarray:
    """Inverse of the data pipeline's map from uint8 to [-1, 1], exact."""
    return np.rint((images + 1) * 127.5).astype(np.uint8)


def _blocks(rows: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yields the same rows, BLOCK at a time; the last block may have fewer."""
    waiting: list[np.ndarray] = []
    for part in rows:
        waiting.append(part)
        while sum(map(len, waiting)) >= BLOCK:
            joined = np.concatenate(waiting)
            yield joined[:BLOCK]
            waiting = [joined[BLOCK:]]
    if rest := [part for part in waiting if len(part)]:
        yield np.concatenate(rest)


def measure(
    coded: Iterable[np.ndarray], network: Network, reference: Reference, evaluation: EvalConfig
) -> tuple[dict[str, float], dict[str, int]]:
    """Every metric that the network and the reference allow, and the sign of each: +1 if higher is better, else -1.

    `coded`: `evaluation.samples` images, encoded by `network.encode`. Spreads (`_std`, `_se`) have no sign. Raises UsageError on
    bad numbers.
    """
    metrics, total = _measurable(network, reference.parts), evaluation.samples
    states, seen, found = dict.fromkeys(metrics), 0, {}
    try:
        for block in _blocks(coded):
            parts, seen = network.decode(block), seen + len(block)
            states = {name: metric.update(states[name], parts, total) for name, metric in metrics.items()}
        if seen != total:
            raise ValueError(f"found features of {seen} images, expected {total}")
        for name, metric in metrics.items():
            values = metric.finish(states.pop(name), reference.parts, evaluation)
            found |= {name + ending: (value, 2 * metric.higher_is_better - 1) for ending, value in values.items()}
    except ValueError as error:
        raise UsageError(f"samples: {error}; nothing is recorded") from None
    signs = {name: sign for name, (_, sign) in found.items() if not name.endswith(("_std", "_se"))}
    return {name: value for name, (value, _) in found.items()}, signs


def real_scores(cfg: Config, network: Network) -> dict[str, float]:
    """Metrics of the real held-out images, which a perfect sampler would reach."""
    images, _ = load_arrays(all_of(cfg.data), cfg.data.held_out_split)
    network, settings = keeping(network, images.shape[1:]), replace(cfg.eval, samples=len(images), bootstrap=0)
    return measure([network.encode(as_uint8(images))], network, open_reference(cfg, network), settings)[0]
