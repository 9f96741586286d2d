"""Samplers: one function each, over a denoiser and a grid of times from 1 (noise) to 0 (clean).

A sampler is `sampler(process, denoise, x, times, keys) -> images`: x (b, h, w, c) is noise, `times` a float64 array of
steps + 1 values, `keys` (b,) one random key per image, so that image i depends on its key alone. The loop is one
`lax.scan`; the coefficients of its steps are worked out beforehand in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.process import Denoiser, Flow, Process
from dit_jax.diffusion.schedule import SPACINGS
from dit_jax.error import UsageError, nearest


def draw_noise(keys: jax.Array, index, shape: tuple) -> jax.Array:
    """Standard normal (b, *shape): image i's draw number `index` depends on `keys[i]` and `index` alone."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape))(keys)


def _grid(process: Process, times: np.ndarray) -> dict[str, np.ndarray]:
    """Per step, from time t to time s: everything a step needs, float32."""
    with np.errstate(divide="ignore", invalid="ignore"):
        at = {
            "": times,
            "alpha_": process.alpha(times),
            "sigma_": process.sigma(times),
            "scale_": process.scale(times),
            "clock_": process.clock(times),
        }
    ends = {name + "t": value[:-1] for name, value in at.items()} | {
        name + "s": value[1:] for name, value in at.items()
    }
    signal = ends["alpha_t"] / ends["alpha_s"]
    variance = ends["sigma_t"] ** 2 - (signal * ends["sigma_s"]) ** 2  # of x_t given x_s
    share = (ends["sigma_s"] / ends["sigma_t"]) ** 2
    ends |= {
        "posterior_x0": ends["alpha_s"] * variance / ends["sigma_t"] ** 2,
        "posterior_xt": signal * share,
        "log_large": np.log(variance),
        "log_small": np.log(np.maximum(variance * share, 1e-20)),
        "noisy": (ends["sigma_s"] > 0).astype(np.float64),  # the step to the clean image adds no noise
        "memory": _memory(ends),
        "index": np.arange(len(times) - 1) + 1,
    }
    return {name: value.astype(np.int32 if name == "index" else np.float32) for name, value in ends.items()}


def _memory(ends: dict[str, np.ndarray]) -> np.ndarray:
    """How much of the x_0 predicted one step before enters that of a DPM-Solver++ step: h_i / (2 h_{i-1}) in log(alpha / sigma).

    None in the first step, nor in an infinite one (to the clean image) or after one (from pure noise): those are of first order.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        h = np.log(ends["alpha_s"] / ends["sigma_s"]) - np.log(ends["alpha_t"] / ends["sigma_t"])
        share = np.concatenate([[0.0], h[1:] / (2 * h[:-1])])
    return np.where(np.isfinite(share), share, 0.0)


def _walk(step, process: Process, x: jax.Array, times: np.ndarray) -> jax.Array:
    """One `lax.scan` of `step(x, constants)` over the grid."""
    return jax.lax.scan(lambda x, c: (step(x, c), None), x, _grid(process, times))[0]


def _at(t: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.full(x.shape[:1], t, jnp.float32)


def ddpm(process: Process, denoise: Denoiser, x: jax.Array, times: np.ndarray, keys: jax.Array) -> jax.Array:
    """Ancestral sampling on a respaced chain (Ho et al. 2020, algorithm 2), with the learned variance where there is one."""

    def step(x, c):
        out = denoise(x, _at(c["t"], x))
        x0, _ = process.predict(out, x, c["alpha_t"], c["sigma_t"])
        share = process.variance_share(out)
        log_variance = c["log_small"] if share is None else share * c["log_large"] + (1 - share) * c["log_small"]
        noise = draw_noise(keys, c["index"], x.shape[1:])
        mean = c["posterior_x0"] * x0 + c["posterior_xt"] * x
        return mean + c["noisy"] * jnp.exp(0.5 * log_variance) * noise

    return _walk(step, process, x, times)


def ddim(process: Process, denoise: Denoiser, x: jax.Array, times: np.ndarray, keys: jax.Array) -> jax.Array:
    """Deterministic DDIM (Song et al. 2021, eq. 12 with eta = 0)."""

    def step(x, c):
        x0, eps = process.predict(denoise(x, _at(c["t"], x)), x, c["alpha_t"], c["sigma_t"])
        return c["alpha_s"] * x0 + c["sigma_s"] * eps

    return _walk(step, process, x, times)


def _euler_step(process: Process, denoise: Denoiser, x: jax.Array, c: dict) -> tuple[jax.Array, jax.Array]:
    slope = process.slope(denoise(x, _at(c["t"], x)), x)
    return c["scale_s"] * (x / c["scale_t"] + (c["clock_s"] - c["clock_t"]) * slope), slope


def euler(process: Process, denoise: Denoiser, x: jax.Array, times: np.ndarray, keys: jax.Array) -> jax.Array:
    """Euler's method on the probability-flow ODE; for DDPM in sigma / alpha, as in Karras et al. 2022."""
    return _walk(lambda x, c: _euler_step(process, denoise, x, c)[0], process, x, times)


def heun(process: Process, denoise: Denoiser, x: jax.Array, times: np.ndarray, keys: jax.Array) -> jax.Array:
    """Heun's second-order method (Karras et al. 2022, algorithm 1); its last step, to the clean image, is Euler's."""

    def step(x, c):
        ahead, slope = _euler_step(process, denoise, x, c)
        slope = (slope + process.slope(denoise(ahead, _at(c["s"], x)), ahead)) / 2
        return c["scale_s"] * (x / c["scale_t"] + (c["clock_s"] - c["clock_t"]) * slope)

    x = _walk(step, process, x, times[:-1])
    return euler(process, denoise, x, times[-2:], keys)


def dpmpp_2m(process: Process, denoise: Denoiser, x: jax.Array, times: np.ndarray, keys: jax.Array) -> jax.Array:
    """DPM-Solver++, second-order multistep, x_0-prediction (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    Its last step, to the clean image, is of first order (diffusers: `algorithm_type="dpmsolver++"`, `solver_order=2`,
    `solver_type="midpoint"`, `final_sigmas_type="zero"`).
    """

    def step(carry, c):
        x, before = carry
        x0, _ = process.predict(denoise(x, _at(c["t"], x)), x, c["alpha_t"], c["sigma_t"])
        mixed = x0 + c["memory"] * (x0 - before)
        share = c["sigma_s"] / c["sigma_t"]
        return (share * x + (c["alpha_s"] - share * c["alpha_t"]) * mixed, x0), None

    return jax.lax.scan(step, (x, jnp.zeros_like(x)), _grid(process, times))[0][0]


def euler_maruyama(process: Process, denoise: Denoiser, x: jax.Array, times: np.ndarray, keys: jax.Array) -> jax.Array:
    """Euler-Maruyama on the reverse SDE of a flow whose noise has variance 2 t dt, dx = (v + eps) dt + sqrt(2 t) dw.

    It has the marginals of the ODE (Ma et al. 2024, SiT, eq. 6, w_t = 2 sigma_t); the step to the clean image is Euler's on
    the ODE, without noise.
    """

    def step(x, c):
        out, size = denoise(x, _at(c["t"], x)), c["t"] - c["s"]
        _, eps = process.predict(out, x, c["alpha_t"], c["sigma_t"])
        noise = draw_noise(keys, c["index"], x.shape[1:])
        return x - size * (out + c["noisy"] * eps) + c["noisy"] * jnp.sqrt(2 * c["t"] * size) * noise

    return _walk(step, process, x, times)


SAMPLERS = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "euler_maruyama": euler_maruyama,
}
FLOWS_ONLY = ("euler_maruyama",)


def sampling_times(process: Process, sampler: str, steps: int, spacing: str = "linspace") -> np.ndarray:
    """The grid of times, (steps + 1,). Raises UsageError if there is no such sampler, or the process has fewer steps.

    `spacing` chooses among a chain's steps (`schedule.respace`); a flow has equal steps, "linspace".
    """
    if sampler not in SAMPLERS:
        raise UsageError(f"sample.sampler: found {sampler!r}{nearest(sampler, SAMPLERS)}")
    if sampler in FLOWS_ONLY and not isinstance(process, Flow):
        raise UsageError(
            f"sample.sampler: found {sampler!r} for {type(process).__name__}, expected a flow; 'ddpm' is its like there"
        )
    if spacing not in SPACINGS:
        raise UsageError(f"sample.spacing: found {spacing!r}{nearest(spacing, SPACINGS)}")
    if isinstance(process, Flow):
        if spacing != "linspace":
            raise UsageError(f"sample.spacing: found {spacing!r} for Flow, expected 'linspace': its steps are equal")
        return process.times(steps)
    try:
        return process.times(steps, spacing)
    except ValueError as error:
        raise UsageError(f"sample.steps: {error}") from None


def evaluation_times(sampler: str, times: np.ndarray) -> np.ndarray:
    """The times at which a sampler calls the denoiser, for the count of FLOPs."""
    return np.concatenate([times[:-1], times[1:-1]]) if sampler == "heun" else times[:-1]
