"""The metrics of samples: feature networks, the reference they are compared with, and the numbers from their features.

A network makes one row of float32 of an image: its pooled features, where it has them spatial features, and its logits. A
score is named after its network: FID, sFID, KID and IS are those of the Inception network only, the others say which.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.config import Config, EvalConfig
from dit_jax.data.pipeline import load_arrays
from dit_jax.data.source import all_of, open_source
from dit_jax.devices.mesh import batch_sharding, batch_split, replicated
from dit_jax.error import UsageError
from dit_jax.log import warn
from dit_jax.metrics import extrapolate, frechet, inception_score, kernel, precision_recall, statistics
from dit_jax.metrics.features import check_room
from dit_jax.models import digit_features, inception
from dit_jax.networks.folder import load_network
from dit_jax.networks.reference import read_reference

ROWS = 16  # images that a device looks at at a time: another number would round otherwise
SPLITS = 10  # of the Inception Score
POINTS = 8  # numbers of samples at which the distance is taken, evenly in 1 / N, from a quarter of them, but not below
LEAST = 2.5  # samples for each feature: with fewer the distance is no line in 1 / N
KERNEL_SUBSET = 1000  # samples of each of the 100 subsets, or all where they are fewer
FEW = 5  # samples for each feature below which there is a warning and no limit: about 10,000 for Inception's
BLOCK = 1024  # rows that enter the statistics at a time, whatever the parts were that they came in
NAMES = {
    "inception": {"distance": "fid", "spatial": "sfid", "kernel": "kid", "score": "is", "precision": "precision", "recall": "recall"},
    "digits": {
        "distance": "fd_digits", "kernel": "kd_digits", "score": "is_digits", "precision": "precision_digits", "recall": "recall_digits",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Network:
    """A feature network on the mesh. `parts`: the name and width of what makes up a row."""

    name: str
    sha256: str
    parts: dict
    rows: Callable = field(repr=False)  # uint8 (b, h, w, c) -> float32 (b, width)
    shape: tuple | None = None  # (h, w, c) of the images that it takes; None: any

    @property
    def width(self) -> int:
        return sum(self.parts.values())

    def split(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The parts of rows (b, width)."""
        ends = np.cumsum(list(self.parts.values()))[:-1]
        return dict(zip(self.parts, np.split(rows, ends, axis=1), strict=True))


def _on_mesh(apply: Callable, params, mesh) -> Callable[[np.ndarray], np.ndarray]:
    """`apply(params, images)` -> rows, a fixed number of images at a time on every device."""
    whole, batch = replicated(mesh), batch_sharding(mesh)
    program = jax.jit(apply, in_shardings=(whole, batch), out_shardings=batch)
    params = jax.device_put(params, whole)
    count = ROWS * batch_split(mesh)

    def rows(images: np.ndarray) -> np.ndarray:
        filled = np.concatenate([images, np.repeat(images[-1:], -len(images) % count, axis=0)])
        found = [jax.device_get(program(params, filled[i : i + count])) for i in range(0, len(filled), count)]
        return np.ascontiguousarray(np.concatenate(found)[: len(images)], np.dtype("<f4"))

    return rows


def _digits(mesh) -> Network:
    weights, meta = digit_features.load()

    def apply(params, images):
        return jnp.concatenate(digit_features.apply(params, images.astype(jnp.float32) / 127.5 - 1), axis=1)

    parts = {"pool": digit_features.WIDTH, "logits": 10}
    return Network("digits", meta["sha256"], parts, _on_mesh(apply, weights, mesh), (8, 8, 1))


def _inception(folder: str, mesh) -> Network:
    _, weights, meta = load_network(folder, "inception")

    def apply(params, images):
        rgb = jnp.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
        found = inception.apply(params, rgb)
        return jnp.concatenate([found.pool, found.spatial, found.logits_unbiased], axis=1)

    parts = {"pool": 2048, "spatial": 2023, "logits": 1008}
    return Network("inception", meta["sha256"], parts, _on_mesh(apply, weights, mesh))


def describe(network: Network) -> dict:
    """The rules and constants that the metrics depend on, for records."""
    logits = "without the bias of the last layer" if network.name == "inception" else "of the last layer"
    return {
        "score": f"{SPLITS} consecutive splits, logits {logits}",
        "kernel": f"100 subsets of {KERNEL_SUBSET}, seed 2020, float64",
        "precision_recall": "k = 3, float64",
        "limit": f"{POINTS} numbers of samples, at least {LEAST:g} a feature",
        **(
            {"spatial": "first 7 channels of mixed_6/conv", "resize": "TensorFlow 1 bilinear, 299"}
            if network.shape is None
            else {}
        ),
        "rows": ROWS,
    }


def check_config(cfg: Config) -> None:
    """Raises UsageError for sample metrics that cannot be."""
    if cfg.eval.features == "inception" and not cfg.eval.inception:
        raise UsageError(
            "eval.inception: empty, expected the folder of the Inception network; write it with `python -m dit_jax.convert "
            "--source=inception --weights=FILE --out=DIR`"
        )
    if cfg.eval.features == "digits" and cfg.data.dataset != "digits":
        raise UsageError(
            f"eval.features: found 'digits' for {cfg.data.dataset!r}, expected 'inception'; or set eval.samples=0 for the "
            "held-out loss alone"
        )
    if not cfg.eval.reference and (cfg.data.latents or not cfg.data.cache):
        raise UsageError(
            "eval.reference: empty, expected an npz of reference statistics or images: the data set is too large to be held "
            "in memory, or is of latents"
        )


def check_number(cfg: Config, network: Network) -> None:
    """Raises UsageError for too few samples, and for more than are kept."""
    num, width = cfg.eval.samples, network.parts["pool"]
    try:
        check_room(num, width)
    except ValueError as error:
        raise UsageError(f"eval.samples: found {num}: {error}") from None
    if num <= width:
        raise UsageError(
            f"eval.samples: found {num}, expected more than the {width} features of the network {network.name!r}: a "
            "covariance of fewer samples is singular"
        )


def warn_of_few(cfg: Config, network: Network) -> None:
    """Says so where a distance of so few samples misleads."""
    num, width = cfg.eval.samples, network.parts["pool"]
    if num < FEW * width:
        name = NAMES[network.name]["distance"]
        warn(
            f"eval.samples: {num} are few for {width} features: {name} is biased upwards, by how much depends on the "
            f"model; compare {NAMES[network.name]['kernel']}"
        )


def open_network(cfg: Config, mesh) -> Network:
    """The network that `eval.features` names. Raises UsageError when its folder is not what it should be."""
    return _digits(mesh) if cfg.eval.features == "digits" else _inception(cfg.eval.inception, mesh)


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: `source` says what, for records; the Gaussians of its pooled and, where there are
    some, its spatial features; and the pooled features of its images, where it has images, for KID, precision and recall."""

    source: object
    pool: tuple  # mean (d,), covariance (d, d)
    spatial: tuple | None
    features: np.ndarray | None


def open_reference(cfg: Config, network: Network) -> Reference:
    """The npz of `eval.reference`, else the images of `data.split`. Raises UsageError when it is another network's."""
    if not cfg.eval.reference:
        split = open_source(all_of(cfg.data), cfg.data.split)
        rows = network.rows(as_uint8(load_arrays(cfg.data, cfg.data.split, split)[0]))
        source = split.describe() | {"images": len(split)}
        return _of_rows([rows], network, source, f"{cfg.data.dataset} {cfg.data.split}")
    found = read_reference(cfg.eval.reference, network.parts["pool"], network.parts.get("spatial", 0))
    source = {"sha256": found.sha256}
    if found.images is not None and network.shape not in (None, found.images.shape[1:]):
        raise UsageError(
            f"{found.path}: arr_0: found images of shape {found.images.shape[1:]}, expected {network.shape}, as the network "
            f"{network.name!r} takes them"
        )
    if found.kind == "images":
        return _of_rows(_rows_of(network, found.images), network, source | {"images": len(found.images)}, found.path)
    features = None
    if found.images is not None:
        features = np.concatenate([network.split(rows)["pool"] for rows in _rows_of(network, found.images)])
    spatial = None if found.mean_spatial is None else (found.mean_spatial, found.cov_spatial)
    return Reference(source, (found.mean, found.cov), spatial, features)


def _rows_of(network: Network, images: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(images), BLOCK):
        yield network.rows(images[start : start + BLOCK])


def _of_rows(rows: Iterable[np.ndarray], network: Network, source: dict, where: str) -> Reference:
    """Of `source["images"]` images."""
    try:
        check_room(source["images"], network.parts["pool"])
    except ValueError as error:
        raise UsageError(f"reference {where}: {error}") from None
    if source["images"] <= network.parts["pool"]:
        raise UsageError(
            f"reference {where}: found {source['images']} images, expected more than the {network.parts['pool']} features of "
            f"the network {network.name!r}: a covariance of fewer is singular"
        )
    seen = gather(rows, network, source["images"])
    spatial = frechet.mean_cov(seen.spatial) if "spatial" in network.parts else None
    return Reference(source, frechet.mean_cov(seen.pool), spatial, statistics.features(seen))


def as_uint8(images: np.ndarray) -> np.ndarray:
    """Images in [-1, 1] as the data pipeline makes them of uint8, back to uint8 exactly."""
    return np.rint((images + 1) * 127.5).astype(np.uint8)


def gather(rows: Iterable[np.ndarray], network: Network, total: int) -> statistics.Statistics:
    """The statistics of `total` rows (b, width), taken in blocks of BLOCK: the parts in which they come change no bit."""
    widths = (network.parts.get(name, 0) for name in ("pool", "spatial", "logits"))
    seen = statistics.empty(statistics.Plan(total, min(SPLITS, total), keep=True), *widths)
    start = 0
    for block in _blocks(rows):
        parts = network.split(block)
        spatial = parts.get("spatial", np.zeros((len(block), 0)))
        seen, start = statistics.update(seen, start, parts["pool"], spatial, parts["logits"]), start + len(block)
    if start != total:
        raise ValueError(f"found features of {start} images, expected {total}")
    return seen


def _blocks(rows: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The same rows, BLOCK at a time, the last ones fewer."""
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
    rows: Iterable[np.ndarray], network: Network, reference: Reference, evaluation: EvalConfig
) -> dict[str, float]:
    """Every metric that the features of the drawn images and the reference allow; raises UsageError on bad numbers.

    The distance comes with its 95 % interval at this number of samples (`_low`, `_high`, by bootstrap), with its values at
    smaller numbers of samples (`_n1000`) and their limit for infinitely many (`_inf`), where there are samples enough for
    those.
    """
    try:
        return _measure(gather(rows, network, evaluation.samples), network, reference, evaluation)
    except ValueError as error:
        raise UsageError(f"samples: {error}; nothing is recorded") from None


def _measure(
    seen: statistics.Statistics, network: Network, reference: Reference, evaluation: EvalConfig
) -> dict[str, float]:
    names, seed, features = NAMES[network.name], evaluation.seed, statistics.features(seen)
    seen = replace(seen, kept=())  # they are in `features` now
    distance, (count, width) = names["distance"], features.shape
    found = {distance: frechet.frechet_distance(*frechet.mean_cov(seen.pool), *reference.pool)}
    if evaluation.bootstrap:
        interval = extrapolate.bootstrap(features, *reference.pool, evaluation.bootstrap, seed=seed)
        found |= {f"{distance}_low": interval.low, f"{distance}_high": interval.high}
    if count >= FEW * width:
        most = min(4.0, count / (LEAST * width))
        counts = [round(count / x) for x in np.linspace(most, 1, POINTS)]
        line = extrapolate.infinite(features, *reference.pool, counts, seed)
        found |= {f"{distance}_n{n}": value for n, value in zip(counts, line.values, strict=True)}
        found |= {f"{distance}_inf": line.limit, f"{distance}_inf_se": line.limit_se}
    if reference.spatial:
        found[names["spatial"]] = frechet.frechet_distance(*frechet.mean_cov(seen.spatial), *reference.spatial)
    found[names["score"]], found[f"{names['score']}_std"] = inception_score.score(seen.scores)
    if reference.features is not None:
        size = min(KERNEL_SUBSET, count, len(reference.features))
        estimate = kernel.distance(features, reference.features, size=size)
        found[names["kernel"]] = estimate.mean
        if size < min(count, len(reference.features)):  # else the subsets are all of a set, and spread too little
            found[f"{names['kernel']}_std"] = estimate.std
        both = precision_recall.precision_recall(features, reference.features)
        found |= dict(zip((names["precision"], names["recall"]), both, strict=True))
    return found


def real_distance(cfg: Config, network: Network) -> float:
    """The distance of the real held-out images: what a perfect sampler would score."""
    images, _ = load_arrays(all_of(cfg.data), cfg.data.held_out_split)
    seen = gather([network.rows(as_uint8(images))], network, len(images))
    return frechet.frechet_distance(*frechet.mean_cov(seen.pool), *open_reference(cfg, network).pool)
