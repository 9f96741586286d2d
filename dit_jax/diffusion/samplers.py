"""Samplers: functions of a denoiser and a grid of times from 1 (noise) to 0 (clean).

A sampler is `sampler(process, denoise, x, times, keys) -> images`: noise x (b, h, w, c), float64 `times` (steps + 1,), and one
random key per image, `keys` (b,), so that image i depends on its key only. The loop is one `reuse.scan` over coefficients computed
beforehand in float64. SAMPLERS has a row for each.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.process import DDPM, Denoiser, Flow, Process
from dit_jax.diffusion.reuse import scan


def draw_noise(keys: jax.Array, index, shape: tuple) -> jax.Array:
    """Standard normal noise (b, *shape); image i's depends on `keys[i]` and `index` only."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape))(keys)


def _grid(process: Process, times: np.ndarray, constants: Callable = lambda ends: {}) -> dict[str, np.ndarray]:
    """Coefficients per step from time t to time s, float32: alpha, sigma, scale and clock at both, and `constants` of these."""
    with np.errstate(divide="ignore", invalid="ignore"):
        at = {f"{name}_": getattr(process, name)(times) for name in ("alpha", "sigma", "scale", "clock")}
    at[""] = times
    ends = {f"{name}t": value[:-1] for name, value in at.items()}
    ends |= {f"{name}s": value[1:] for name, value in at.items()}
    ends["noisy"] = (ends["sigma_s"] > 0).astype(np.float64)  # the step to the clean image adds no noise
    found = {name: value.astype(np.float32) for name, value in (ends | constants(ends)).items()}
    return found | {"index": np.arange(len(times) - 1, dtype=np.int32) + 1}


def _at(t: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.full(x.shape[:1], t, jnp.float32)


def _posterior(ends: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Coefficients of the posterior mean, and the two bounds of its log variance (Ho et al. 2020, eq. 7)."""
    signal = ends["alpha_t"] / ends["alpha_s"]
    variance = ends["sigma_t"] ** 2 - (signal * ends["sigma_s"]) ** 2  # of x_t given x_s
    share = (ends["sigma_s"] / ends["sigma_t"]) ** 2
    return {
        "posterior_x0": ends["alpha_s"] * variance / ends["sigma_t"] ** 2,
        "posterior_xt": signal * share,
        "log_large": np.log(variance),
        "log_small": np.log(np.maximum(variance * share, 1e-20)),
    }


def ddpm(process: Process, denoise: Denoiser, x: jax.Array, times: np.ndarray, keys: jax.Array) -> jax.Array:
    """Ancestral sampling on a respaced chain (Ho et al. 2020, algorithm 2), with the learned variance if there is one."""

    def step(x, c):
        out = denoise(x, _at(c["t"], x))
        x0, _ = process.predict(out, x, c["alpha_t"], c["sigma_t"])
        share = process.variance_share(out)
        log_variance = c["log_small"] if share is None else share * c["log_large"] + (1 - share) * c["log_small"]
        noise = draw_noise(keys, c["index"], x.shape[1:])
        mean = c["posterior_x0"] * x0 + c["posterior_xt"] * x
        return mean + c["noisy"] * jnp.exp(0.5 * log_variance) * noise

    return scan(step, x, _grid(process, times, _posterior), denoise)


def ddim(process: Process, denoise: Denoiser, x: jax.Array, times: np.ndarray, keys: jax.Array) -> jax.Array:
    """Deterministic DDIM (Song et al. 2021, eq. 12 with eta = 0)."""

    def step(x, c):
        x0, eps = process.predict(denoise(x, _at(c["t"], x)), x, c["alpha_t"], c["sigma_t"])
        return c["alpha_s"] * x0 + c["sigma_s"] * eps

    return scan(step, x, _grid(process, times), denoise)


def _euler_step(process: Process, denoise: Denoiser, x: jax.Array, c: dict) -> tuple[jax.Array, jax.Array]:
    slope = process.slope(denoise(x, _at(c["t"], x)), x)
    return c["scale_s"] * (x / c["scale_t"] + (c["clock_s"] - c["clock_t"]) * slope), slope


def euler(process: Process, denoise: Denoiser, x: jax.Array, times: np.ndarray, keys: jax.Array) -> jax.Array:
    """Euler's method on the probability-flow ODE; for DDPM in sigma / alpha, as in Karras et al. 2022."""
    return scan(lambda x, c: _euler_step(process, denoise, x, c)[0], x, _grid(process, times), denoise)


def heun(process: Process, denoise: Denoiser, x: jax.Array, times: np.ndarray, keys: jax.Array) -> jax.Array:
    """Heun's second-order method (Karras et al. 2022, algorithm 1); the last step, to the clean image, is Euler's."""

    def step(x, c):
        ahead, slope = _euler_step(process, denoise, x, c)
        slope = (slope + process.slope(denoise(ahead, _at(c["s"], x)), ahead)) / 2
        return c["scale_s"] * (x / c["scale_t"] + (c["clock_s"] - c["clock_t"]) * slope)

    x = scan(step, x, _grid(process, times[:-1]), denoise)
    return euler(process, denoise, x, times[-2:], keys)


def _memory(ends: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weight h_i / (2 h_{i-1}) of the previous step's x_0 in a DPM-Solver++ step, with h in log(alpha / sigma).

    It is 0, giving a first-order step, for the first step, an infinite h (to the clean image) and after one (from pure noise).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        h = np.log(ends["alpha_s"] / ends["sigma_s"]) - np.log(ends["alpha_t"] / ends["sigma_t"])
        share = np.concatenate([[0.0], h[1:] / (2 * h[:-1])])
    return {"memory": np.where(np.isfinite(share), share, 0.0)}


def dpmpp_2m(process: Process, denoise: Denoiser, x: jax.Array, times: np.ndarray, keys: jax.Array) -> jax.Array:
    """DPM-Solver++, second-order multistep, x_0-prediction (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    The last step, to the clean image, is first-order (diffusers: `algorithm_type="dpmsolver++"`, `solver_order=2`,
    `solver_type="midpoint"`, `final_sigmas_type="zero"`).
    """

    def step(carry, c):
        x, before = carry
        x0, _ = process.predict(denoise(x, _at(c["t"], x)), x, c["alpha_t"], c["sigma_t"])
        mixed = x0 + c["memory"] * (x0 - before)
        share = c["sigma_s"] / c["sigma_t"]
        return share * x + (c["alpha_s"] - share * c["alpha_t"]) * mixed, x0

    return scan(step, (x, jnp.zeros_like(x)), _grid(process, times, _memory), denoise)[0]


def euler_maruyama(process: Process, denoise: Denoiser, x: jax.Array, times: np.ndarray, keys: jax.Array) -> jax.Array:
    """Euler-Maruyama on the reverse SDE of a flow, dx = (v + eps) dt + sqrt(2 t) dw.

    The SDE has the ODE's marginals (Ma et al. 2024, SiT, eq. 6, w_t = 2 sigma_t). The step to the clean image is Euler's on the ODE.
    """

    def step(x, c):
        out, size = denoise(x, _at(c["t"], x)), c["t"] - c["s"]
        _, eps = process.predict(out, x, c["alpha_t"], c["sigma_t"])
        noise = draw_noise(keys, c["index"], x.shape[1:])
        return x - size * (out + c["noisy"] * eps) + c["noisy"] * jnp.sqrt(2 * c["t"] * size) * noise

    return scan(step, x, _grid(process, times), denoise)


def consistency(process: Process, denoise: Denoiser, x: jax.Array, times: np.ndarray, keys: jax.Array) -> jax.Array:
    """Multistep consistency sampling: each evaluation gives a clean image, which is noised again (Song et al. 2023, algorithm 1)."""

    def step(x, c):
        x0, _ = process.predict(denoise(x, _at(c["t"], x)), x, c["alpha_t"], c["sigma_t"])
        return c["alpha_s"] * x0 + c["sigma_s"] * draw_noise(keys, c["index"], x.shape[1:])

    return scan(step, x, _grid(process, times), denoise)


def flow_map(process: Process, denoise: Denoiser, x: jax.Array, times: np.ndarray, keys: jax.Array) -> jax.Array:
    """Steps of a flow map, x_s = x_t - (t - s) u(x_t, s, t) with its mean velocity u (Geng et al. 2025, arXiv 2505.13447, eq. 12)."""

    def step(x, c):
        return x + (c["s"] - c["t"]) * denoise(x, _at(c["t"], x), _at(c["s"], x))

    return scan(step, x, _grid(process, times), denoise)


class Sampler(NamedTuple):
    """A row of SAMPLERS.

    walk         sampler function; calling the row calls it
    evaluations  grid of times -> times of the denoiser calls, in order, from which FLOPs are counted
    accepts      supported kinds of processes
    trained      values of objective.name whose models it draws from
    """

    walk: Callable
    evaluations: Callable[[np.ndarray], np.ndarray] = lambda times: times[:-1]
    accepts: tuple[type, ...] = (DDPM, Flow)
    trained: tuple[str, ...] = ("", "mean_flow")

    def __call__(self, process: Process, denoise: Denoiser, x: jax.Array, times: np.ndarray, keys: jax.Array):
        return self.walk(process, denoise, x, times, keys)


SAMPLERS = {
    "ddpm": Sampler(ddpm),
    "ddim": Sampler(ddim, trained=("", "mean_flow", "progressive")),
    "euler": Sampler(euler, trained=("", "mean_flow", "progressive")),
    "heun": Sampler(heun, lambda times: np.repeat(times, 2)[1:-2]),
    "dpmpp_2m": Sampler(dpmpp_2m),
    "euler_maruyama": Sampler(euler_maruyama, accepts=(Flow,)),
    "consistency": Sampler(consistency, accepts=(Flow,), trained=("consistency",)),
    "flow_map": Sampler(flow_map, accepts=(Flow,), trained=("mean_flow",)),
}
