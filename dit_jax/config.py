"""Typed configs: frozen dataclasses of all settings with their defaults, built from ml_collections config files.

A config file in `configs/` changes the `ConfigDict` of all defaults from `template()` and returns it. `resolve` turns that into a
`Config` and raises UsageError naming a key that is unknown, mistyped or out of range. `--help` prints the comment beside each field.
"""

import dataclasses
import itertools
import re
from dataclasses import dataclass, field

import ml_collections

from dit_jax.error import LARGEST, UsageError, build, choice, in_range, number, shown, typed

# name -> (depth, width, heads): Peebles & Xie 2023, Table 1.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
DATASET = re.compile(r"[A-Za-z]\w*(/\w[\w+-]*(\.[\w+-]+)*)?(:(\d+|\*)(\.(\d+|\*)){2})?", re.ASCII)


def _at_least(low: int | float, config, *names: str) -> None:
    """Raises UsageError if one of the fields `names` is below `low`."""
    group = type(config).__name__.removesuffix("Config").lower()
    for name in names:
        in_range(f"{group}.{name}", getattr(config, name), low)


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a DiT."""

    depth: int = 12  # transformer blocks
    width: int = 384  # features of a token; a multiple of 4 and of `heads`
    heads: int = 6  # attention heads
    patch: int = 2  # side of the square of one token
    input_size: int = 32  # side of the input, in latent pixels for latent diffusion, else pixels; a multiple of `patch`
    channels: int = 4  # of the input: 4 for SD-VAE latents, else as in the images
    classes: int = 1000  # labels without the null class; 0 = images without labels
    mlp_ratio: int = 4  # hidden features of the MLP, in multiples of `width`
    learn_sigma: bool = True  # two outputs per channel: eps and the learned-range variance
    conditioning: str = "adaln_zero"  # adaln_zero | adaln | in_context | cross_attention
    qk_norm: bool = False  # normalise queries and keys
    dtype: str = "float32"  # float32 | bfloat16, of the compute; parameters are always float32
    attention: str = "auto"  # auto | xla | cudnn
    remat: str = "none"  # recomputed in the backward pass: none | dots (all but matrix products) | full
    unroll: int = 1  # blocks per iteration of the layer scan; `depth` = fully unrolled

    def __post_init__(self):
        _at_least(1, self, "depth", "width", "heads", "patch", "input_size", "channels", "mlp_ratio", "unroll")
        _at_least(0, self, "classes")
        choice("model.conditioning", self.conditioning, ("in_context", "cross_attention", "adaln", "adaln_zero"))
        choice("model.dtype", self.dtype, ("float32", "bfloat16"))
        choice("model.attention", self.attention, ("auto", "xla", "cudnn"))
        choice("model.remat", self.remat, ("none", "dots", "full"))
        for name, of in (("heads", "width"), ("patch", "input_size"), ("unroll", "depth")):
            if getattr(self, of) % (found := getattr(self, name)):
                raise UsageError(f"model.{name}: found {found}, expected a divisor of model.{of} = {getattr(self, of)}")
        if self.width % 4:
            raise UsageError(
                f"model.width: found {self.width}, expected a multiple of 4 (two sines and two cosines a position)"
            )

    @property
    def tokens(self) -> int:
        """Tokens per image."""
        return (self.input_size // self.patch) ** 2

    @property
    def adaptive(self) -> bool:
        """Whether the condition gives the norms' shift and scale (adaLN); else it is a sequence of tokens."""
        return self.conditioning in ("adaln", "adaln_zero")

    @property
    def out_channels(self) -> int:
        return self.channels * (2 if self.learn_sigma else 1)


@dataclass(frozen=True)
class DiffusionConfig:
    """Noising process and loss. `ddpm`: discrete, eps-prediction; `flow`: rectified flow, velocity-prediction."""

    process: str = "ddpm"  # ddpm | flow
    schedule: str = "linear"  # ddpm: linear | cosine
    timesteps: int = 1000  # ddpm: length of the discrete chain
    time_law: str = "uniform"  # flow: distribution of t in training: uniform | logit_normal
    logit_mean: float = 0.0  # flow, logit_normal: mean of logit(t)
    logit_std: float = 1.0  # flow, logit_normal: standard deviation of logit(t)

    def __post_init__(self):
        choice("diffusion.process", self.process, ("ddpm", "flow"))
        choice("diffusion.schedule", self.schedule, ("linear", "cosine"))
        choice("diffusion.time_law", self.time_law, ("uniform", "logit_normal"))
        in_range("diffusion.timesteps", self.timesteps, 2)
        in_range("diffusion.logit_std", self.logit_std, 1e-3)


@dataclass(frozen=True)
class DataConfig:
    """Training and held-out images."""

    dataset: str = "digits"  # a TFDS name; `digits` is built here from scikit-learn
    split: str = "train"  # trained on
    held_out_split: str = "test"  # never trained on
    folder: str = ""  # of pictures, .tar or .parquet files that are read in place of `dataset`; "" = none
    data_dir: str = ""  # "" = $TFDS_DATA_DIR, else ~/tensorflow_datasets
    image_size: int = 8  # pixels; other sizes are centre-cropped and resized to it (ADM's rule)
    flip: bool = False  # random horizontal flips, determined by (seed, position)
    cache: bool = True  # keep the decoded split in memory (for small datasets)
    workers: int = 2  # reading threads
    prefetch: int = 8  # batches read ahead
    latents: str = ""  # folder written by `encode`, with one folder of latents per split; "" = images
    skip_bad: int = 0  # malformed records that may be skipped; 0 = the first is an error

    def __post_init__(self):
        # TFDS would import or download a namespace or an argument in the name.
        if len(self.dataset) > 200 or not DATASET.fullmatch(self.dataset):
            expected = "a TFDS name: letters, digits and _, then /config and :1.2.3 where it has them"
            raise UsageError(f"data.dataset: found {self.dataset!r}, expected {expected}")
        _at_least(1, self, "image_size")
        _at_least(0, self, "workers", "prefetch", "skip_bad")

    @property
    def name(self) -> str:  # in records, the same wherever a folder lies
        return "folder" if self.folder else self.dataset


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and the EMA of the weights."""

    learning_rate: float = 1e-4  # after the warm-up
    schedule: str = "constant"  # constant | cosine (to zero at train.steps), after the warm-up
    warmup_steps: int = 0  # steps over which the learning rate rises from 0
    weight_decay: float = 0.0  # decoupled, times the learning rate
    b1: float = 0.9  # decay of the mean gradient
    b2: float = 0.999  # decay of the mean squared gradient
    eps: float = 1e-8  # added to the root of the mean squared gradient
    clip: float = 0.0  # largest global norm of the gradient; 0 = no clipping
    accumulate: int = 1  # microbatches per step
    ema: str = "constant"  # constant: decay `ema_decay` | power: decay (1 - 1/t)^(gamma + 1)
    ema_decay: float = 0.9999  # constant: weight of the old average per step
    ema_width: float = 0.05  # power: standard deviation of the averaging profile, relative to the steps so far

    def __post_init__(self):
        choice("optim.schedule", self.schedule, ("constant", "cosine"))
        choice("optim.ema", self.ema, ("constant", "power"))
        _at_least(0, self, "learning_rate", "warmup_steps", "weight_decay", "clip", "eps")
        for name in ("b1", "b2", "ema_decay"):
            in_range(f"optim.{name}", getattr(self, name), 0.0, 1.0)
        _at_least(1, self, "accumulate")
        in_range("optim.ema_width", self.ema_width, 1e-3, 0.28)


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and random draws of a training run, its logging, checkpoints and safeguards."""

    steps: int = 400_000  # of the optimizer
    batch_size: int = 256  # images per step, over all devices and processes
    seed: int = 0  # of initial weights, data order, noise and dropout
    label_dropout: float = 0.1  # share of labels replaced by the null class
    log_every: int = 100  # steps
    checkpoint_every: int = 10_000  # steps
    keep: int = 3  # checkpoints kept, the newest ones
    keep_at: tuple = ()  # rising steps whose checkpoints are saved and never pruned
    keep_every: int = 0  # steps between two checkpoints that are saved and never pruned, beside keep_at; 0 = none
    spike: float = 20.0  # standard deviations above the mean loss or gradient norm that skip a step; 0 = off
    spike_window: int = 100  # steps of the rolling mean and deviation, and steps before the first skipped spike
    skips_in_a_row: int = 10  # consecutive skipped steps (not finite, or spikes) that stop the run
    replay_every: int = 0  # steps between two that are computed twice and compared bit for bit; 0 = never
    profile: tuple = ()  # (first, last): steps of which each process writes a trace for xprof into W/profile
    evaluate_every: int = 0  # steps between two evaluations in training, as by `evaluate`, one at the end; 0 = never
    grid_every: int = 0  # steps between two grids of samples in W/samples, of the EMA weights; 0 = never
    wandb: str = ""  # project of Weights & Biases that scalars and grids go to as well; "" = none

    def __post_init__(self):
        typed(self.steps, int, "train.steps")
        _at_least(1, self, "steps", "batch_size", "log_every", "checkpoint_every", "keep")
        _at_least(1, self, "spike_window", "skips_in_a_row")
        in_range("train.seed", self.seed, 0, LARGEST)
        _at_least(0, self, "spike", "replay_every", "keep_every", "evaluate_every", "grid_every")
        in_range("train.label_dropout", self.label_dropout, 0.0, 1.0)
        if [*self.keep_at] != sorted({step for step in self.keep_at if type(step) is int and 0 < step <= self.steps}):
            expected = f"strictly rising whole numbers from 1 to train.steps = {self.steps}"
            raise UsageError(f"train.keep_at: found {shown(self.keep_at)}, expected {expected}")
        ends = self.profile
        if ends and not (len(ends) == 2 and all(type(step) is int for step in ends) and 0 < ends[0] <= ends[1]):
            raise UsageError(
                f"train.profile: found {shown(ends)}, expected a first and a last step, such as (100, 110)"
            )


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis (one axis may be -1, "the rest"), and timeouts of a job on several hosts."""

    data: int = -1  # copies of the weights, each with its share of the batch
    fsdp: int = 1  # devices that weights and batch are split over
    tensor: int = 1  # devices that the work on an image is split over
    heartbeat: int = 30  # seconds without a heartbeat after which a process counts as lost and the others stop
    initialization: int = 300  # seconds within which all processes must join

    def __post_init__(self):
        _at_least(1, self, "heartbeat", "initialization")
        sizes = {name: getattr(self, name) for name in ("data", "fsdp", "tensor")}
        for name, size in sizes.items():
            if size != -1 and size < 1:
                raise UsageError(f"mesh.{name}: found {size}, expected a number of devices, or -1 for the rest")
        if list(sizes.values()).count(-1) > 1:
            raise UsageError(f"mesh: found {sizes}, expected at most one -1")


@dataclass(frozen=True)
class SampleConfig:
    """Sampling of images, for `sample` and `evaluate`."""

    sampler: str = "ddpm"  # ddpm | ddim | euler | heun | dpmpp_2m | euler_maruyama
    steps: int = 250  # of the sampler
    spacing: str = "linspace"  # steps of the chain to use: linspace (as the published DiT) | leading | trailing
    times: tuple = ()  # explicit grid, falling from at most 1 (noise) to 0, instead of steps and spacing
    guidance: float = 1.0  # classifier-free guidance scale; 1 = plainly conditional
    interval: tuple = (0.0, 1.0)  # times in [0, 1] (1 = noise) at which guidance acts; the rest runs at half the cost
    channels: str = "all"  # guided channels: all | first3 (as the published DiT)
    batch_size: int = 64  # images that are drawn before they are kept or scored; changes no image
    labels: str = "uniform"  # uniform (random) | balanced (sample i has class i modulo K)
    weights: str = "ema"  # ema | params (raw)

    def __post_init__(self):
        _at_least(1, self, "steps", "batch_size")
        in_range("sample.guidance", self.guidance, 0.0, 1000.0)
        if self.times:
            self._check_times()
        choice("sample.channels", self.channels, ("all", "first3"))
        choice("sample.labels", self.labels, ("uniform", "balanced"))
        choice("sample.weights", self.weights, ("ema", "params"))
        if len(ends := self.interval) != 2 or not all(map(number, ends)) or not 0.0 <= ends[0] <= ends[1] <= 1.0:
            raise UsageError(f"sample.interval: found {shown(ends)}, expected (low, high) with 0 <= low <= high <= 1")

    def _check_times(self) -> None:
        times = self.times
        falling = all(map(number, times)) and all(a > b for a, b in itertools.pairwise(times))
        if not falling or len(times) < 2 or times[0] > 1 or times[-1] != 0:
            raise UsageError(
                f"sample.times: found {shown(times)}, expected at least 2 falling numbers from at most 1 to 0"
            )
        for name, fitting in (("steps", len(times) - 1), ("spacing", "linspace")):
            if getattr(self, name) not in (fitting, SampleConfig.__dataclass_fields__[name].default):
                raise UsageError(
                    f"sample.{name}: found {getattr(self, name)!r}, expected {fitting!r} (or no value) beside sample.times"
                )


@dataclass(frozen=True)
class AutoencoderConfig:
    """Autoencoder of latent diffusion. The model's input is (z - shift) scale for a latent z."""

    folder: str = ""  # written by `convert --source=sd-vae`; "" = the model's output is the image
    scale: tuple = (0.18215,)  # one number, or one per channel (whitening)
    shift: tuple = (0.0,)  # one number, or one per channel

    def __post_init__(self):
        for name in ("scale", "shift"):
            found = getattr(self, name)
            if not found or not all(map(number, found)) or (name == "scale" and min(found) <= 0):
                raise UsageError(
                    f"autoencoder.{name}: found {shown(found)}, expected a tuple of numbers, one or one per channel"
                )


@dataclass(frozen=True)
class EvalConfig:
    """Protocol of the held-out loss and of the sample metrics, and the grid of sampling settings to score."""

    times_per_image: int = 16  # noise levels per held-out image, stratified over the training distribution of t
    fixed_times: int = 0  # equidistant t at which another held-out loss is taken, whatever the law of t; 0 = none
    max_images: int = 0  # held-out images used; 0 = all of them
    buckets: int = 8  # of t, with equal probability under its training distribution
    batch_size: int = 128  # held-out images per batch
    samples: int = 0  # images drawn for the sample metrics; 0 = none
    features: str = "digits"  # feature network of the sample metrics: digits | inception | classifier
    classifier: str = ""  # folder of a network of your own images, written by `features`
    inception: str = ""  # folder of the Inception network, written by `convert --source=inception`
    reference: str = ""  # npz of reference statistics or images; "" = the images of data.split
    loss: bool = True  # whether to compute the held-out loss; False if there are no held-out images here
    bootstrap: int = 20  # resamples of the drawn images for the interval of the distance; 0 = no interval
    samplers: tuple = ()  # scored in every combination with the next three; () = as in `sample`
    steps: tuple = ()  # () = as in `sample`
    guidance: tuple = ()  # () = as in `sample`
    weights: tuple = ()  # () = as in `sample`
    seed: int = 1234  # of noise levels, noise and samples
    poll_seconds: float = 30.0  # --watch: seconds between two checks for a new checkpoint

    def __post_init__(self):
        _at_least(1, self, "times_per_image", "buckets", "batch_size")
        _at_least(0, self, "samples", "max_images", "fixed_times")
        in_range("eval.bootstrap", self.bootstrap, 0, 10_000)
        if self.bootstrap == 1:
            raise UsageError("eval.bootstrap: found 1, expected 0 for no interval, or at least 2 resamplings")
        choice("eval.features", self.features, ("digits", "inception", "classifier"))
        for name, kind in (("samplers", str), ("steps", int), ("guidance", float), ("weights", str)):
            for value in getattr(self, name):
                if not (number(value) if kind is float else type(value) is kind):
                    raise UsageError(f"eval.{name}: found {shown(value)}, expected a tuple of {kind.__name__}s")
        _at_least(0.01, self, "poll_seconds")
        in_range("eval.seed", self.seed, 0, LARGEST)
        if self.times_per_image % self.buckets:
            raise UsageError(
                f"eval.times_per_image: found {self.times_per_image}, expected a multiple of eval.buckets = {self.buckets}"
            )


@dataclass(frozen=True)
class SweepConfig:
    """An isoFLOP ladder: each budget with the sizes in its window. A size is (width, depth, heads)."""

    budgets: tuple = ()  # training FLOPs per run
    sizes: tuple = ()  # all (width, depth, heads) of the ladder, smallest first
    windows: tuple = ()  # per budget, (first, last + 1) of its indices into `sizes`
    curves: bool = False  # one run per size, evaluated at each budget's step; for a constant rate and a power EMA
    samples: int = 0  # images drawn from each evaluated checkpoint and scored as by `evaluate`; 0 = none
    base_width: int = 64  # width for which optim.learning_rate is meant
    width_power: float = 1.0  # the learning rate scales as (base_width / width) ** width_power
    extrapolate: float = 0.0  # train the recommended model at this multiple of the largest budget; 0 = no
    processes: int = 1  # cells that run in parallel
    grid: int = 8  # samples per class in the report's grid
    grid_guidance: float = 2.0  # guidance scale of that grid

    def __post_init__(self):
        budgets, sizes, windows = len(self.budgets), len(self.sizes), len(self.windows)
        for budget in self.budgets:
            if not number(budget) or budget <= 0:
                raise UsageError(f"sweep.budgets: found {shown(budget)}, expected training FLOPs above 0")
        for name, count, form in (("sizes", 3, "(width, depth, heads)"), ("windows", 2, "(first, end)")):
            for row in getattr(self, name):
                whole = isinstance(row, tuple) and len(row) == count and all(type(n) is int and n < 2**63 for n in row)
                if not whole or (name == "sizes" and min(row) < 1):
                    raise UsageError(f"sweep.{name}: found {shown(row)}, expected {form} in whole numbers")
        for window in self.windows:
            if not 0 <= window[0] < window[1] <= sizes:
                raise UsageError(f"sweep.windows: found {shown(window)}, expected (first, end) within {sizes} sizes")
        if windows != budgets:
            raise UsageError(f"sweep.windows: found {windows}, expected one per budget, so {budgets}")
        _at_least(1, self, "processes", "base_width", "grid")
        _at_least(0, self, "extrapolate", "samples")
        in_range("sweep.grid_guidance", self.grid_guidance, 0.0, 1000.0)


@dataclass(frozen=True)
class Config:
    """All settings of a run, in groups."""

    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)

    def __post_init__(self):
        if self.diffusion.process == "flow" and self.model.learn_sigma:
            raise UsageError("model.learn_sigma: found True, expected False with diffusion.process = 'flow'")
        batch, parts = self.train.batch_size, self.optim.accumulate
        if batch % parts:
            raise UsageError(f"train.batch_size: found {batch}, expected a multiple of optim.accumulate = {parts}")
        for name, needed in (("schedule", "constant"), ("ema", "power")):
            if self.sweep.curves and (found := getattr(self.optim, name)) != needed:
                why = "else a run stopped at a budget's step is not the run of that budget"
                raise UsageError(f"optim.{name}: found {found!r}, expected {needed!r} with sweep.curves: {why}")


def model_config(name: str, image_size: int = 256, **changes) -> ModelConfig:
    """Model config of a published name such as "DiT-XL/2", on SD-VAE latents of `image_size` pixels. Raises UsageError for another name."""
    allowed = [f"DiT-{size}/{patch}" for size in SIZES for patch in (2, 4, 8)]
    choice("model name", name, allowed)
    if image_size % 8:
        raise UsageError(f"image_size: found {image_size}, expected a multiple of 8 pixels")
    size, patch = name.removeprefix("DiT-").split("/")
    found = dict(zip(("depth", "width", "heads"), SIZES[size], strict=True))
    return ModelConfig(**found | dict(patch=int(patch), input_size=image_size // 8) | changes)


def to_dict(config) -> dict:
    """Nested dict of a config, as in `config.json`."""
    return dataclasses.asdict(config)


def template() -> ml_collections.ConfigDict:
    """ConfigDict of all defaults, the starting point of a config file. It is locked: a new key is an error."""
    return ml_collections.ConfigDict(to_dict(Config()), type_safe=False).lock()


def resolve(values: object) -> Config:
    """Builds a Config from a nested mapping (ConfigDict or JSON). Raises UsageError with the key, the value found and the expected."""
    return build(Config, values.to_dict() if isinstance(values, ml_collections.ConfigDict) else values, "")
