"""Noising processes and network targets: DDPM and rectified flow behind one interface.

Both are Gaussian paths x_t = alpha(t) x_0 + sigma(t) eps. The methods of a process are

    time(u)                          quantile function of the training times: u uniform in [0, 1) -> t
    equidistant(count)               float64 times a count-th of the process apart, from the least noise, whatever the law
    model_time(t)                    t in the published models' units, 0 to 1000
    noise(x, t, eps)                 x_t
    times(steps, spacing)            float64 sampling grid, from 1 (noise) to 0 (clean)
    read(out, x_t, t)                network output -> output of a Denoiser: eps (and the variance), or the velocity
    alpha(t), sigma(t)               float64 NumPy, for grids
    predict(out, x_t, alpha, sigma)  output of a Denoiser -> (x_0, eps)
    slope, scale, clock              probability-flow ODE: x_t = scale(t) z and dz/dclock = slope
    variance_share(out)              share of the larger log variance (b, h, w, c), or None if not learned
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Array, Float

from dit_jax.config import DiffusionConfig
from dit_jax.diffusion import schedule
from dit_jax.error import UsageError

Images = Float[Array, "b h w c"]
Output = Float[Array, "b h w c_out"]
Times = Float[Array, " b"]
Denoiser = Callable[
    ..., Array
]  # denoise(x (b, h, w, c), t (b,)) -> (b, h, w, c_out); of a flow map with a target time (b,)
LEAST_TIME = 0.05  # that a velocity is divided by: JiT's clip of 1 - t, where t = 1 is clean


def _column(t: jax.Array) -> jax.Array:
    return t[:, None, None, None]


@dataclass(frozen=True)
class Flow:
    """Rectified flow (Liu et al. 2022): x_t = (1 - t) x_0 + t eps, with the velocity eps - x_0.

    `time_law` is uniform or logit_normal (Esser et al. 2024, section 3.1). `shift` s moves the times of training and the sampling grid to
    s t / (1 + (s - 1) t) (section 5.3.2). `prediction` is what the network puts out: the velocity, or x_0, which gives the velocity
    (x_t - x_0) / max(t, 0.05) (Li & He 2025, arXiv 2511.13720, JiT).
    """

    time_law: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    prediction: str = "velocity"
    shift: float = 1.0

    def time(self, u: Times) -> Times:
        if self.time_law == "uniform":
            return self.shifted(u)
        return self.shifted(jax.nn.sigmoid(self.logit_mean + self.logit_std * ndtri(u)))

    def shifted(self, t):
        return t if self.shift == 1 else self.shift * t / (1 + (self.shift - 1) * t)

    def equidistant(self, count: int) -> np.ndarray:
        return np.arange(count) / count

    def model_time(self, t: Times) -> Times:
        return 1000.0 * t

    def alpha(self, t):
        return 1.0 - np.asarray(t, np.float64)

    def sigma(self, t):
        return np.asarray(t, np.float64)

    scale = staticmethod(np.ones_like)
    clock = sigma

    def times(self, steps: int, spacing: str = "linspace") -> np.ndarray:
        """Equal steps from 1 to 0, then shifted, (steps + 1,). Raises UsageError if `spacing` is not "linspace"."""
        if spacing != "linspace":
            raise UsageError(f"sample.spacing: found {spacing!r} for Flow, expected 'linspace': its steps are equal")
        return self.shifted(np.linspace(1.0, 0.0, steps + 1))

    def noise(self, x: Images, t: Times, eps: Images) -> Images:
        return (1 - _column(t)) * x + _column(t) * eps

    def target(self, x: Images, eps: Images, x_t: Images, t: Times) -> Images:
        """Velocity that the loss compares with, by `read` for a network that puts out x_0, as in JiT: below t = 0.05 it is smaller."""
        return eps - x if self.prediction == "velocity" else self.read(x, x_t, t)

    def read(self, out: Output, x_t: Images, t: Times) -> Images:
        return out if self.prediction == "velocity" else (x_t - out) / jnp.maximum(_column(t), LEAST_TIME)

    def predict(self, out: Output, x_t: Images, alpha, sigma) -> tuple[Images, Images]:
        return x_t - sigma * out, x_t + alpha * out

    def slope(self, out: Output, x_t: Images) -> Images:
        return out

    def variance_share(self, out: Output) -> None:
        """None: no learned variance."""


@dataclass(frozen=True)
class DDPM:
    """Discrete chain of Ho et al. 2020 with eps-prediction; `learn_sigma` adds the learned variance of Nichol & Dhariwal 2021."""

    schedule: str = "linear"
    timesteps: int = 1000
    learn_sigma: bool = True

    def time(self, u: Times) -> Times:
        """Uniform over the steps 0..T-1: step k is time (k + 1) / T."""
        return (jnp.floor(u * self.timesteps) + 1) / self.timesteps

    def equidistant(self, count: int) -> np.ndarray:
        """Times of the steps floor(k T / count), k = 0 to count - 1."""
        return (np.arange(count) * self.timesteps // count + 1) / self.timesteps

    def index(self, t):
        """Entries of the (T + 1)-long tables at times t."""
        numpy = jnp if isinstance(t, jax.Array) else np
        return numpy.round(t * self.timesteps).astype(np.int32)

    def model_time(self, t: Times) -> Times:
        """Step number k, exact."""
        return self.index(t).astype(jnp.float32) - 1

    @property
    def _alpha_bars(self) -> np.ndarray:
        return schedule.alpha_bars(self.schedule, self.timesteps)

    def alpha(self, t):
        return np.sqrt(self._alpha_bars[self.index(np.asarray(t))])

    def sigma(self, t):
        return np.sqrt(1 - self._alpha_bars[self.index(np.asarray(t))])

    scale = alpha

    def clock(self, t):
        return self.sigma(t) / self.alpha(t)

    def times(self, steps: int, spacing: str = "linspace") -> np.ndarray:
        """Times of the respaced chain, then 0, (steps + 1,). `spacing`, errors: see `schedule.respace`."""
        kept = schedule.respace(self.timesteps, steps, spacing)
        return np.append((kept + 1) / self.timesteps, 0.0)

    def _table(self, values: np.ndarray, t: Times) -> jax.Array:
        return _column(jnp.asarray(values, jnp.float32)[self.index(t)])

    def noise(self, x: Images, t: Times, eps: Images) -> Images:
        alpha_bars = self._alpha_bars
        return self._table(np.sqrt(alpha_bars), t) * x + self._table(np.sqrt(1 - alpha_bars), t) * eps

    def variational_term(self, eps_hat: Images, share, x: Images, x_t: Images, t: Times, levels: bool = True) -> Times:
        """Term of the variational bound at t, bits per dimension (b,): a KL, or the decoder's NLL at step 0 (Ho et al. 2020, eq. 5).

        `levels`: x are 256-level images; otherwise the NLL is of a density.
        """
        bars = self._alpha_bars
        before = np.append(1.0, bars[:-1])  # entry 0 is never used
        beta = np.append(np.nan, 1 - bars[1:] / bars[:-1])
        small = beta * (1 - before) / (1 - bars + (bars == 1))
        small[1] = small[2]  # the posterior variance is 0 at the first step; the second's replaces it
        to_clean = np.sqrt(before) * beta / (1 - bars + (bars == 1))
        to_noisy = np.sqrt(bars / before) * (1 - before) / (1 - bars + (bars == 1))
        x0_hat = (x_t - self._table(np.sqrt(1 - bars), t) * eps_hat) / self._table(np.sqrt(bars), t)
        log_small, log_large = self._table(np.log(small), t), self._table(np.log(beta), t)
        mean = self._table(to_clean, t) * x + self._table(to_noisy, t) * x_t
        mean_hat = self._table(to_clean, t) * x0_hat + self._table(to_noisy, t) * x_t
        log_variance = share * log_large + (1 - share) * log_small
        kl = gaussian_kl(mean, log_small, mean_hat, log_variance)
        nll = -(discretised_log_likelihood if levels else continuous_log_density)(x, mean_hat, log_variance)
        return jnp.where(_column(self.index(t) == 1), nll, kl).mean(axis=(1, 2, 3)) / np.log(2.0)

    def read(self, out: Output, x_t: Images, t: Times) -> Output:
        return out

    def predict(self, out: Output, x_t: Images, alpha, sigma) -> tuple[Images, Images]:
        eps = out[..., : x_t.shape[-1]]
        return (x_t - sigma * eps) / alpha, eps

    def slope(self, out: Output, x_t: Images) -> Images:
        return out[..., : x_t.shape[-1]]

    def variance_share(self, out: Output):
        """Share of log beta in the log variance (b, h, w, c), from the last half of the channels; None if not learned."""
        if not self.learn_sigma:
            return None
        return (out[..., out.shape[-1] // 2 :] + 1) / 2


def gaussian_kl(mean1, log_variance1, mean2, log_variance2):
    """KL divergence of two diagonal Gaussians, elementwise, in nats."""
    ratio = jnp.exp(log_variance1 - log_variance2)
    distance = jnp.square(mean1 - mean2) * jnp.exp(-log_variance2)
    return 0.5 * (log_variance2 - log_variance1 + ratio + distance - 1)


def discretised_log_likelihood(x, mean, log_variance):
    """Log-probability of 256-level images in [-1, 1] under a Gaussian, elementwise, in nats (Ho et al. 2020, eq. 13)."""
    inverse = jnp.exp(-0.5 * log_variance)
    upper = ndtr((x - mean + 1 / 255) * inverse)
    lower = ndtr((x - mean - 1 / 255) * inverse)
    upper, lower = jnp.where(x > 0.999, 1.0, upper), jnp.where(x < -0.999, 0.0, lower)
    return jnp.log(jnp.maximum(upper - lower, 1e-12))


def continuous_log_density(x, mean, log_variance):
    """Log density of x under a Gaussian, elementwise, in nats."""
    return -0.5 * (jnp.square(x - mean) * jnp.exp(-log_variance) + log_variance + np.log(2 * np.pi))


Process = Flow | DDPM
LAW = ("time_law", "logit_mean", "logit_std", "shift")  # fields that give the law of t in training
LATER = {"prediction": "velocity", "shift": 1.0}  # left out of records if so, as in older records


def denoiser(process: Process, network: Callable) -> Denoiser:
    """Denoiser (x, t) of a network (x, t in 0 to 1000) -> output; of a flow map (x, t, target time) in the same units."""
    return lambda x, t, *target: process.read(network(x, *map(process.model_time, (t, *target))), x, t)


def make_process(cfg: DiffusionConfig, learn_sigma: bool) -> Process:
    """Process of a config; `learn_sigma` as in the model config."""
    if cfg.process == "flow":
        return Flow(cfg.time_law, cfg.logit_mean, cfg.logit_std, cfg.prediction, cfg.shift)
    return DDPM(cfg.schedule, cfg.timesteps, learn_sigma)


def describe(process: Process, law: bool = True) -> dict:
    """Plain values of a process, for records; without the law of t, which some losses do not depend on, unless `law`."""
    found = {"process": type(process).__name__.lower(), **dataclasses.asdict(process)}
    found = {name: value for name, value in found.items() if name not in LATER or value != LATER[name]}
    return {name: value for name, value in found.items() if law or name not in LAW}
