"""Draws images from a model. Image i depends on (seed, i) only, not on batch size or number of devices and hosts."""

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax import flops
from dit_jax.bind import bind_to_draw
from dit_jax.config import Config, ModelConfig, SampleConfig, to_dict
from dit_jax.devices.mesh import batch_sharding, hosts_of, put_batch, replicated
from dit_jax.devices.numerics import ambient, random_key
from dit_jax.devices.processes import agree, gather, leader
from dit_jax.devices.rows import own_mesh, own_rows, own_split
from dit_jax.diffusion.process import LATER, denoiser
from dit_jax.diffusion.samplers import draw_noise
from dit_jax.diffusion.task import Task, make_task
from dit_jax.error import NotFiniteError, UsageError
from dit_jax.files import base
from dit_jax.flops import Shape
from dit_jax.log import warn
from dit_jax.models import conditioning
from dit_jax.networks.autoencoder import Autoencoder, make_decoder, open_autoencoder
from dit_jax.sampling.denoise import make_denoiser, make_measuring, make_reusing
from dit_jax.sampling.guide import Guide, open_guide
from dit_jax.sampling.low import Low
from dit_jax.sampling.prompt import Asked, Prompts
from dit_jax.sampling.quantize import Scales
from dit_jax.sampling.reuse import Plan, passes

LATER_SETTINGS = {
    "guide": "",
    "rescale": 0.0,
    "reuse": 1.0,
    "quantize": "",
    "ema": 0.0,
}  # left out if so, as in older records
UINT8 = "clamp(127.5 x + 128, 0, 255), truncated"


def image_keys(seed, indices: jax.Array) -> jax.Array:
    """One key per image, from (seed, index) only. `seed`: one for all images, or one each (b,)."""
    if jnp.ndim(seed):
        return jax.vmap(lambda own, i: jax.random.fold_in(random_key(own), i))(seed, indices)
    return jax.vmap(lambda i: jax.random.fold_in(random_key(seed), i))(indices)


def rows_of(model: ModelConfig) -> int:
    """Images that a device computes at a time: 16, and of images of few tokens as many as have 256 tokens together, at most 64.

    It depends on the model alone, because a program of another batch rounds differently. Products of fewer rows use a core badly: of a
    model of 4 tokens an image takes a sixth less time than with 16 (docs/performance.md).
    """
    return min(max(256 // model.tokens, 16), 64)


@functools.lru_cache(maxsize=128)  # a grid of settings goes through all of them for each checkpoint
def make_sampler(
    model: ModelConfig,
    task: Task,
    cfg: SampleConfig,
    mesh,
    wanted: tuple = (),
    size: Shape = None,
    guide: Config | None = None,
    reuse: str = "",
) -> Callable:
    """Compiles the sampler: (params, seed, indices (b,), asked) -> images (b, h, w, c) float32 and labels (b,) int32.

    With `guide`, the config of a weaker run, it takes that run's weights as one more argument. With `reuse` = "plan" it takes the outputs
    of blocks that are computed, {part: bool (calls, layers)}, and with "measure" it returns the changes of outputs, see `make_reusing`;
    with "ranges" it returns those of the inputs of products, see `make_measuring`. Weights are quantised by `cfg.quantize`.

    `asked`: what prompts and low-resolution images give each image, see `prompt.Asked.rows` and `low.Low.rows`, or {}.
    `wanted`: pairs (field of cond, values that the images take in turn); other fields are drawn. `size`: (h, w), by default
    model.input_size squared. The weights lie on the mesh by `devices.mesh.spec`.
    """
    (bound, weights), side = bind_to_draw(model, mesh, cfg.quantize), model.input_size
    shape = (*(size or (side, side)), model.channels)
    other, places = bind_to_draw(guide.model, mesh) if guide else (None, None)

    def weaker(params, cond) -> Callable:
        process = make_task(guide).process
        return denoiser(process, lambda x, t, *target: other.apply(params, x, t, cond, *target))

    def sample(params, seed, indices, asked, *more):
        keys = image_keys(asked.get("seed", seed), indices)
        cond = bound.draw(cfg.labels, keys, indices, dict(wanted))
        cond |= {name: asked[name] for name in cond if name in asked}
        if reuse == "ranges":
            denoise = make_measuring(bound, task, cfg, params, cond, asked)
        elif reuse:
            all_images = (len(indices), *shape)
            denoise = make_reusing(bound, task, cfg, params, cond, asked, all_images, *more, reuse == "measure")
        else:
            denoise = make_denoiser(bound, task, cfg, params, cond, asked, weaker(*more, cond) if guide else None)
        images = task.walk(denoise, draw_noise(keys, 0, shape), keys)
        if reuse in ("measure", "ranges"):
            return denoise.kept if reuse == "ranges" else denoise.kept["changes"]
        return images, conditioning.labels(cond, len(indices))

    whole, rows = replicated(mesh), batch_sharding(mesh)
    own = (weights, whole, rows, rows, *([places] if guide else [whole] if reuse in ("plan", "measure") else []))
    return jax.jit(sample, in_shardings=own, out_shardings=whole if reuse in ("measure", "ranges") else (rows, rows))


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Maps [-1, 1] to 0..255 as the published DiT does: clamp(127.5 x + 128, 0, 255), truncated."""
    return np.clip(127.5 * images + 128.0, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Sampling:
    """Everything that drawing needs besides weights: config, devices, decoder of latents, the values of `cond` asked for, whether
    grey images get three equal channels, and (h, w) of the images in pixels, if they are no squares of data.image_size."""

    cfg: Config
    mesh: object
    autoencoder: Autoencoder | None
    decode: Callable[[np.ndarray], np.ndarray] = field(repr=False)
    wanted: Mapping[str, tuple] = field(default_factory=dict)
    rgb: bool = False
    size: Shape = None
    asked: Asked | None = None  # of a model of captions: the prompts
    low: Low | None = None  # of super-resolution: the low-resolution images
    plan: Plan | None = None  # of sample.reuse
    scales: Scales | None = None  # of sample.quantize = int8

    @functools.cached_property
    def task(self) -> Task:
        """Process, sampler and times. Raises UsageError if they do not fit together."""
        return make_task(self.cfg)

    @functools.cached_property
    def guide(self) -> Guide | None:
        """The weaker run of autoguidance. Raises UsageError if it does not fit."""
        return open_guide(self.cfg)

    @property
    def _guiding(self) -> Guide | None:
        """The same, if there is guidance."""
        return None if self.cfg.sample.guidance == 1.0 else self.guide

    @property
    def shape(self) -> tuple[int, int, int]:
        """(h, w, c) of an image."""
        size, channels = self.cfg.model.input_size, self.cfg.model.channels
        if self.autoencoder is not None:
            size, channels = self.cfg.data.image_size, self.autoencoder.cfg.channels
        return (*(self.size or (size, size)), 3 if self.rgb else channels)

    @property
    def inner(self) -> Shape:
        """(h, w) of the model's output for `size`."""
        return self.size and tuple(side // _pixels(self.cfg) for side in self.size)

    @property
    def flops(self) -> int:
        """FLOPs of one image, of guided steps those of both sides."""
        return image_flops(self.cfg, self.inner, self._guiding and self._guiding.cfg.model, self.plan)

    def images(
        self, params, seed: int, num: int, first: int = 0, stop: Sequence = ()
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields images `first` to num - 1 in batches, as `draw` does."""
        return self.draw(params, seed, np.arange(first, num), num - first, stop)

    def draw(
        self, params, seed: int, indices: np.ndarray, most: int, stop: Sequence = ()
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the images of `indices` in batches: (uint8 (b, h, w, c), labels (b,) int32, or numbers of prompts). Raises NotFiniteError.

        Once `stop` is not empty, the batch under way is the last and has the images that are drawn. The processes of the mesh all call it
        at once, each with indices of its own, of which none has more than `most`; they stop, and raise an error of one, together.

        A device always computes `rows_of(model)` images at a time and drops the surplus. On one kind of device the images are therefore the
        same, bit for bit, for every batch size and number of devices. (Programs compiled for the batch size differed by up to
        7e-7 in float32 and by one level in 1 of 15,360 pixels; in bfloat16 by up to 5 levels in a quarter of all pixels.)
        """
        draw, more = self._program(), ()
        if self.plan and not self.plan.everything:
            draw, more = self._program("plan"), (self.plan.fresh,)
        elif self._guiding:
            more = (self._guiding.weights(self.mesh),)
        rows, hosts = rows_of(self.cfg.model) * own_split(self.mesh), hosts_of(self.mesh)
        batch = rows * max(1, -(-min(self.cfg.sample.batch_size, most * hosts) // (rows * hosts)))
        count, every = 0, 1
        for start in range(0, most, batch):
            chunks, error = [], None
            for at in range(start, min(start + batch, most), rows):
                if count % every == 0 and (stopped := self._agreed(stop, error)):
                    break
                began = time.perf_counter()
                try:
                    chunks.append(self._rows(draw, params, seed, indices[at : at + rows], rows, more))
                except NotFiniteError as found:
                    error = error or found
                count += 1
                if count == 2:  # the first one compiles
                    every = self._every(time.perf_counter() - began)
            else:
                stopped = self._agreed(stop, error)
            if sum(len(labels) for _, labels in chunks):
                yield tuple(np.concatenate(parts) for parts in zip(*chunks, strict=True))
            if stopped:
                return

    def _program(self, reuse: str = "") -> Callable:
        changes = {"quantize": ""} if reuse == "ranges" else {}
        sample = dataclasses.replace(self.cfg.sample, reuse=1.0, **changes)
        settings = (self.cfg.model, self.task, sample, self.mesh, tuple(self.wanted.items()), self.inner)
        return make_sampler(*settings, self._guiding and self._guiding.cfg, reuse)

    def changes(self, params, num: int, seed: int) -> dict[str, np.ndarray]:
        """Relative changes {part: (calls, layers)} of the outputs of blocks since the call before, over at least `num` images.

        All processes of the mesh call it.
        """
        rows, total = rows_of(self.cfg.model) * own_split(self.mesh), None
        parts = flops.part_macs(self.cfg.model)
        everything = {part: np.ones((len(self.task.evaluations), self.cfg.model.depth), bool) for part in parts}
        first = rows * jax.process_index()
        for at in range(0, num, rows * hosts_of(self.mesh)):
            indices = np.arange(first + at, first + at + rows, dtype=np.int32)
            asked = self._given(indices, seed)
            found = self._program("measure")(params, seed, *put_batch(self.mesh, (indices, asked)), everything)
            found = {part: np.asarray(squares, np.float64) for part, squares in found.items()}
            total = found if total is None else {part: total[part] + found[part] for part in found}
        return {part: np.sqrt(squares[..., 0] / np.maximum(squares[..., 1], 1e-30)) for part, squares in total.items()}

    def ranges(self, params, num: int, seed: int) -> dict[str, np.ndarray]:
        """Largest magnitudes {product: (layers,)} of the inputs of products in the blocks, over images 0 to num - 1 and all calls.

        All processes of the mesh call it, with weights that are not quantised. The images are the same on any number of devices.
        """
        rows, total = rows_of(self.cfg.model) * own_split(self.mesh), {}
        first = rows * jax.process_index()
        for at in range(0, num, rows * hosts_of(self.mesh)):
            indices = (np.arange(first + at, first + at + rows) % num).astype(np.int32)
            asked = self._given(indices, seed)
            found = self._program("ranges")(params, seed, *put_batch(self.mesh, (indices, asked)))
            total = {name: np.maximum(np.asarray(most), total.get(name, 0)) for name, most in found.items()}
        return total

    def _given(self, indices: np.ndarray, seed: int) -> dict:
        """What the images `indices` are given, see `make_sampler`."""
        return (self.asked.rows(indices, seed) if self.asked else {}) | (self.low.rows(indices) if self.low else {})

    def _agreed(self, stop: Sequence, error: Exception | None) -> bool:
        """Whether to stop, the same answer on all processes of the mesh; raises an error of one of them."""
        if hosts_of(self.mesh) > 1:
            return agree(bool(stop), error)
        if error:
            raise error
        return bool(stop)

    def _every(self, seconds: float) -> int:
        """After how many calls of that many seconds the processes ask each other whether to stop: after half a second or 16 calls. One
        process alone looks after each call."""
        return int(np.clip(0.5 / max(gather(seconds)), 1, 16)) if hosts_of(self.mesh) > 1 else 1

    def _rows(
        self, draw: Callable, params, seed: int, indices: np.ndarray, rows: int, more: tuple
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images of up to `rows` indices, and their labels. The mesh also draws `rows` if there are fewer."""
        filled = (np.resize(indices, rows) if len(indices) else np.zeros(rows)).astype(np.int32)
        asked = self._given(filled, seed)
        drawn, labels = map(own_rows, draw(params, seed, *put_batch(self.mesh, (filled, asked)), *more))
        labels = filled % len(self.asked.prompts) if self.asked else labels
        images = self.decode(drawn[: len(indices)]) if len(indices) else np.zeros((0, *self.shape), np.float32)
        if not np.isfinite(images).all():
            which = f"samples {indices[0]} to {indices[-1]}"
            raise NotFiniteError(f"{which}: found values that are not finite; is the model trained?")
        return np.broadcast_to(to_uint8(images), (*images.shape[:-1], self.shape[-1])), labels[: len(indices)]

    def describe(self, sha256: str, step: int, seed: int) -> dict:
        """Everything that image i depends on besides the kind of device: a flat dict that JSON keeps. `sha256`: of the weights."""
        model, settings = to_dict(self.cfg.model), describe_sample(self.cfg.sample)
        del model["remat"], model["unroll"]
        later = {  # keys that older jobs lack
            "text": self.cfg.model.text, "text_length": self.cfg.model.text, "text_width": self.cfg.model.encoded,
            "text_sha256": self.cfg.model.encoded, "text_encoder": False, "null": self.cfg.model.null != "empty",
            "positions": self.cfg.model.positions != "sincos", "block": self.cfg.model.block != "dit",
            "target": self.cfg.model.target != "", "time_scale": self.cfg.model.time_scale != 1,
            "text_depth": self.cfg.model.text_depth > 0, "superres": self.cfg.model.superres,
        }  # fmt: skip
        model = {key: value for key, value in model.items() if later.get(key, True)}
        process = {
            key: value for key, value in to_dict(self.cfg.diffusion).items() if (key, value) not in LATER.items()
        }
        asked = tuple(self.wanted.get("label", ()))
        classes = asked if len(asked) <= 100 else hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        job = {"step": step, "weights_sha256": sha256, "seed": seed, "labels": classes}
        job |= self.asked.describe() if self.asked else {}
        job |= {f"low.{key}": value for key, value in self.low.about.items()} if self.low else {}
        job |= {"reuse.sha256": self.plan.sha256} if self.plan else {}
        job |= {"quantize.sha256": self.scales.sha256} if self.scales else {}
        job |= {f"guide.{key}": value for key, value in self.guide.describe(self.mesh).items()} if self.guide else {}
        for name, group in (("sample", settings), ("model", model), ("diffusion", process)):
            job |= {f"{name}.{key}": value for key, value in group.items()}
        if self.autoencoder:
            job |= {f"autoencoder.{key}": value for key, value in self.autoencoder.describe().items()}
        job |= ({"rgb": True} if self.rgb else {}) | ({"size": self.size} if self.size else {})
        return json.loads(json.dumps(job | {"uint8": UINT8, "rows": rows_of(self.cfg.model)} | ambient()))


def _pixels(cfg: Config) -> int:
    """Pixels along the side of one of the model's, 1 without an autoencoder."""
    return max(cfg.data.image_size // cfg.model.input_size, 1)


def _trained_size(cfg: Config, size: Shape) -> Shape:
    """Returns None for the usual square, else `size`; warns if the model was trained on no such images. Raises UsageError for sides
    that are no whole tokens."""
    square, token = (cfg.data.image_size,) * 2, cfg.model.patch * _pixels(cfg)
    if size and any(side < 1 or side % token for side in size):
        raise UsageError(f"--size: found {size[0]}x{size[1]}, expected multiples of {token} pixels, as a token has")
    known, asked = cfg.data.buckets or (square,), size or square
    if asked not in known and leader():
        trained = ", ".join(f"{h}x{w}" for h, w in known)
        warn(f"images of {asked[0]}x{asked[1]} pixels are drawn from a model trained on {trained}")
    return None if asked == square else asked


def open_sampling(
    cfg: Config,
    mesh,
    wanted: Mapping[str, tuple] | None = None,
    rgb: bool = False,
    size: Shape = None,
    prompts: Prompts | None = None,
    low: Low | None = None,
) -> Sampling:
    """Binds `cfg.sample`. Raises UsageError for settings that exclude each other, or networks that do not fit."""
    if cfg.model.superres and (low is None or size):
        found = "no low-resolution images" if low is None else f"--size {size[0]}x{size[1]}"
        expected = "expected such images" if low is None else "expected none"
        raise UsageError(
            f"model.superres: found {found}, {expected}: the model enlarges them {cfg.model.superres} times"
        )
    autoencoder = open_autoencoder(cfg)
    make_task(cfg)
    size = _trained_size(cfg, size)
    if prompts and any(prompts.negatives):
        if cfg.sample.guide and cfg.sample.guidance != 1.0:
            why = f"sample.guide = {cfg.sample.guide!r} takes the place of the null condition; leave out one of them"
            raise UsageError(f"negative_prompt: found some, expected none: {why}")
        if cfg.sample.guidance == 1.0 and leader():
            warn("negative_prompt: has no effect at guidance 1")
    asked, decode = Asked(cfg.model, prompts) if prompts else None, make_decoder(autoencoder, own_mesh(mesh))
    found = Sampling(cfg, mesh, autoencoder, decode, wanted or {}, size=size, asked=asked, low=low)
    found.guide  # noqa: B018, says now whether it fits
    if rgb and found.shape[-1] not in (1, 3):
        raise UsageError(f"--rgb: found images of {found.shape[-1]} channels, expected 1 or 3")
    return dataclasses.replace(found, rgb=rgb)


def describe_sample(cfg: SampleConfig) -> dict:
    """The settings that images depend on. `times`, if given, replaces `steps` and `spacing`, else it is left out."""
    settings = {name: value for name, value in dataclasses.asdict(cfg).items() if LATER_SETTINGS.get(name) != value}
    del settings["batch_size"]
    if cfg.guide:
        settings["guide"] = base(cfg.guide)  # the rest of the path is not what images depend on
    if cfg.times:
        return settings | {"steps": len(cfg.times) - 1, "spacing": "stated"}
    del settings["times"]
    return settings


def image_flops(cfg: Config, size: Shape = None, guide: ModelConfig | None = None, plan: Plan | None = None) -> int:
    """FLOPs of one image of `cfg.sample`, of guided steps those of both sides. `size`: (h, w) of the model's output.

    `guide`: a weaker model, by which guided steps cost its forward pass more. `plan`: what is computed of `sample.reuse`.
    """
    each = passes(cfg, make_task(cfg))
    second = int((each - 1).sum())
    total = flops.forward_flops(cfg.model, size) * len(each) + flops.forward_flops(guide or cfg.model, size) * second
    macs = flops.part_macs(cfg.model, size) if plan else {}
    return total - sum(2 * macs[part] * int(((~plan.fresh[part]).sum(axis=1) * each).sum()) for part in macs)
