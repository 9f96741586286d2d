"""Settings of sampling and of evaluation."""

import itertools
from dataclasses import dataclass

from dit_jax.config.training import EMA_WIDTHS
from dit_jax.error import LARGEST, UsageError, at_least, choice, in_range, number, shown

AXES = {  # fields of EvalConfig with values of a field of SampleConfig to score, and the kind of these
    "weights": str,
    "samplers": str,
    "steps": int,
    "guidance": float,
    "ema": float,
    "interval": tuple,
    "guide": str,
    "rescale": float,
    "reuse": float,
    "quantize": str,
}


@dataclass(frozen=True)
class SampleConfig:
    """Sampling of images, for `sample` and `evaluate`."""

    sampler: str = "ddpm"  # ddpm | ddim | euler | heun | dpmpp_2m | euler_maruyama | consistency | flow_map
    steps: int = 250  # of the sampler
    spacing: str = "linspace"  # steps of the chain to use: linspace (as the published DiT) | leading | trailing
    times: tuple = ()  # explicit grid, falling from at most 1 (noise) to 0, instead of steps and spacing
    guidance: float = 1.0  # classifier-free guidance scale; 1 = plainly conditional
    interval: tuple = (0.0, 1.0)  # times in [0, 1] (1 = noise) at which guidance acts; the rest runs at half the cost
    channels: str = "all"  # guided channels: all | first3 (as the published DiT)
    guide: str = ""  # WORKDIR or WORKDIR@STEP of a weaker run, the other side of guidance instead of the null condition
    rescale: float = 0.0  # share of the guided output that is rescaled to the deviation of the conditional one
    reuse: float = 1.0  # share of the blocks' FLOPs that is computed; other outputs are the last call's, by calibration
    quantize: str = ""  # the blocks: "" (not) | int8 (weights, and inputs of the MLP, calibrated) | int8_weights
    batch_size: int = 64  # images that are drawn before they are kept or scored; changes no image
    labels: str = "uniform"  # uniform (random) | balanced (sample i has class i modulo K)
    weights: str = "ema"  # ema | params (raw)
    ema: float = 0.0  # width of a power EMA made of the run's snapshots, instead of the EMA kept; 0 = the latter

    def __post_init__(self):
        at_least(1, self, "steps", "batch_size")
        in_range("sample.guidance", self.guidance, 0.0, 1000.0)
        if self.times:
            self._check_times()
        choice("sample.channels", self.channels, ("all", "first3"))
        choice("sample.labels", self.labels, ("uniform", "balanced"))
        choice("sample.weights", self.weights, ("ema", "params"))
        in_range("sample.rescale", self.rescale, 0.0, 1.0)
        in_range("sample.reuse", self.reuse, 0.0, 1.0)
        if self.ema:
            in_range("sample.ema", self.ema, *EMA_WIDTHS)
            choice("sample.weights, with sample.ema", self.weights, ("ema",))
        choice("sample.quantize", self.quantize, ("", "int8", "int8_weights"))
        if self.guide and self.quantize:
            raise UsageError(
                f"sample.quantize: found {self.quantize!r}, expected '' with sample.guide = {self.guide!r}"
            )
        if self.guide and self.reuse != 1.0:
            raise UsageError(f"sample.reuse: found {self.reuse:g}, expected 1 with sample.guide = {self.guide!r}")
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
class EvalConfig:
    """Protocol of the held-out targets and of the sample metrics, and the grid of sampling settings to score."""

    times_per_image: int = 16  # noise levels per held-out image, stratified over the training distribution of t
    fixed_times: int = 0  # equidistant t at which another held-out loss is taken, whatever the law of t; 0 = none
    vlb: bool = False  # whether to compute the variational bound of the held-out images, in bits per dimension
    vlb_times: int = 16  # noise levels per image of the bound, at equal shares of the log signal-to-noise ratio
    likelihood: bool = False  # whether to compute their exact likelihood, by the probability-flow ODE
    likelihood_images: int = 256  # held-out images used for it, as it is costly; 0 = as for the loss
    likelihood_steps: int = 64  # of the ODE solver
    likelihood_solver: str = "auto"  # auto | rk4 | heun; auto = rk4 for a flow, heun for a chain
    max_images: int = 0  # held-out images used; 0 = all of them
    buckets: int = 8  # of t, with equal probability under its training distribution
    batch_size: int = 128  # held-out images per batch
    samples: int = 0  # images drawn for the sample metrics; 0 = none
    features: str = "digits"  # feature network of the sample metrics: digits | scenes | inception | classifier | clip
    classifier: str = ""  # folder of a network of your own images, written by `features`
    inception: str = ""  # folder of the Inception network, written by `convert --source=inception`
    clip: str = ""  # folder of CLIP's encoders of texts and images, written by `convert --source=clip`
    captions: str = ""  # file of captions that images are drawn from: COCO's .json, or .txt; "" = of the held-out split
    reference: str = ""  # npz of reference statistics or images; "" = the images of data.split
    loss: bool = True  # whether to compute the held-out loss; False if there are no held-out images here
    bootstrap: int = 20  # resamples of the drawn images for the interval of the distance; 0 = no interval
    samplers: tuple = ()  # scored in every combination with the next nine; () = as in `sample`
    steps: tuple = ()  # () = as in `sample`
    guidance: tuple = ()  # () = as in `sample`
    interval: tuple = ()  # pairs such as ((0.0, 1.0), (0.2, 0.8)); () = as in `sample`
    guide: tuple = ()  # runs, "" = the null condition; () = as in `sample`
    rescale: tuple = ()  # () = as in `sample`
    reuse: tuple = ()  # () = as in `sample`
    quantize: tuple = ()  # such as ("", "int8"); () = as in `sample`
    weights: tuple = ()  # () = as in `sample`
    ema: tuple = ()  # widths of EMAs made of snapshots, of weights ema; 0 = the EMA kept; () = as in `sample`
    seed: int = 1234  # of noise levels, noise and samples
    poll_seconds: float = 30.0  # --watch: seconds between two checks for a new checkpoint

    def __post_init__(self):
        at_least(1, self, "times_per_image", "buckets", "batch_size", "vlb_times", "likelihood_steps")
        at_least(0, self, "samples", "max_images", "fixed_times", "likelihood_images")
        choice("eval.likelihood_solver", self.likelihood_solver, ("auto", "rk4", "heun"))
        in_range("eval.bootstrap", self.bootstrap, 0, 10_000)
        if self.bootstrap == 1:
            raise UsageError("eval.bootstrap: found 1, expected 0 for no interval, or at least 2 resamplings")
        choice("eval.features", self.features, ("digits", "scenes", "inception", "classifier", "clip"))
        for name, kind in AXES.items():
            for value in getattr(self, name):
                if not (number(value) if kind is float else type(value) is kind):
                    raise UsageError(f"eval.{name}: found {shown(value)}, expected a tuple of {kind.__name__}s")
        at_least(0.01, self, "poll_seconds")
        in_range("eval.seed", self.seed, 0, LARGEST)
        if self.times_per_image % self.buckets:
            raise UsageError(
                f"eval.times_per_image: found {self.times_per_image}, expected a multiple of eval.buckets = {self.buckets}"
            )
