"""How probable a model makes an image, in bits per dimension: its variational bound, and the exact value of its probability-flow ODE.

Both start from x in [-1, 1] (or a latent) and end at the normal prior. They see the network through `Process.predict`, so they do
not depend on what it predicts. Times are those of the process, in [0, 1], 1 = noise.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.process import DDPM, Denoiser, Flow, Images, Process, continuous_log_density
from dit_jax.diffusion.process import discretised_log_likelihood as discretised
from dit_jax.error import UsageError

FLOW_ENDS = 1e-3, 0.99  # a flow's bound has a decoder at the first time and the prior at the last; log SNR 13.8 to -9.2
LEAST_ALPHA = 5e-3  # of the last step of a chain's ODE, which divides by alpha: 5e-5 at the end of the cosine schedule
BITS = 1 / math.log(2.0)


def _each(values: jax.Array) -> jax.Array:
    """Means (b,) over the dimensions of each image."""
    return values.mean(axis=tuple(range(1, values.ndim)))


def bound(process: Process, denoise: Denoiser, x: Images, u: jax.Array, eps: jax.Array, levels: bool) -> jax.Array:
    """Variational bound of -log p(x) in bits per dimension, as (b, 3): diffusion, reconstruction and prior term, to be added.

    `u` (b, k) in [0, 1), stratified, chooses k noise levels at equal shares of the log signal-to-noise ratio, `eps` (b, k + 1, h, w, c)
    is their noise, and eps[:, 0] that of the reconstruction. `levels`: x are 8-bit images in [-1, 1], and the bound is of their
    probability (decoder of Ho et al. 2020, eq. 13); otherwise x is continuous, the decoder a Gaussian and the bound is of a density.
    `denoise` takes the rows image by image: k + 1 of each image for a chain, k for a flow.

    A chain has the bound of Ho et al. 2020 (eq. 5) over all its steps, with the learned variance if there is one, else the
    sampler's. A flow has the bound of Kingma et al. 2021 (arXiv 2107.00630, section 4) between the times FLOW_ENDS: 1/2 the integral over
    the log signal-to-noise ratio of |eps - eps_hat|^2, with the decoder N(x; x_t / alpha, sigma^2 / alpha^2) at the first time.
    """
    return (_bound_of_chain if isinstance(process, DDPM) else _bound_of_flow)(process, denoise, x, u, eps, levels)


def _flat(rows: jax.Array) -> jax.Array:
    return rows.reshape(-1, *rows.shape[2:])


def _prior(x: Images, alpha: float, sigma: float) -> jax.Array:
    """KL divergence of N(alpha x, sigma^2) from N(0, 1) in nats per dimension (b,)."""
    return 0.5 * (alpha**2 * _each(jnp.square(x)) + sigma**2 - 1 - 2 * math.log(sigma))


def _bound_of_chain(process: DDPM, denoise: Denoiser, x, u, eps, levels) -> jax.Array:
    """Step 1 with its decoder is always among the steps; the others are drawn by their share of the log signal-to-noise ratio."""
    at, (b, k) = np.arange(1, process.timesteps + 1) / process.timesteps, u.shape
    share = -np.diff(np.log(process.alpha(at) / process.sigma(at)))
    share = share / share.sum()
    drawn = jnp.searchsorted(jnp.asarray(np.cumsum(share)[:-1], jnp.float32), u, side="right")
    steps = jnp.concatenate([jnp.zeros((b, 1), drawn.dtype), drawn + 1], axis=1)
    t = jnp.asarray(at, jnp.float32)[steps].reshape(-1)
    x_t = process.noise(clean := jnp.repeat(x, k + 1, axis=0), t, _flat(eps))
    out = denoise(x_t, t)
    eps_hat, share_hat = out[..., : x.shape[-1]], process.variance_share(out)
    terms = process.variational_term(eps_hat, 0.0 if share_hat is None else share_hat, clean, x_t, t, levels)
    terms = terms.reshape(b, k + 1)
    drawn_terms = (terms[:, 1:] / jnp.asarray(share, jnp.float32)[drawn]).mean(axis=1)
    prior = _prior(x, float(process.alpha(1.0)), float(process.sigma(1.0)))
    return jnp.stack([drawn_terms, terms[:, 0], prior * BITS], axis=1)


def _bound_of_flow(process: Flow, denoise: Denoiser, x, u, eps, levels) -> jax.Array:
    first, last = FLOW_ENDS
    high, low = (2 * math.log((1 - t) / t) for t in FLOW_ENDS)
    k = u.shape[1]
    t = jax.nn.sigmoid(((high - low) * u - high) / 2).reshape(-1)
    alpha, sigma = (1 - t)[:, None, None, None], t[:, None, None, None]
    noise = _flat(eps[:, 1:])
    x_t = process.noise(jnp.repeat(x, k, axis=0), t, noise)
    _, eps_hat = process.predict(denoise(x_t, t), x_t, alpha, sigma)
    drawn_terms = 0.5 * (high - low) * _each(jnp.square(noise - eps_hat)).reshape(-1, k).mean(axis=1)
    spread = first / (1 - first)
    decoder = discretised if levels else continuous_log_density
    reconstruction = -_each(decoder(x, x + spread * eps[:, 0], 2 * math.log(spread)))
    return BITS * jnp.stack([drawn_terms, reconstruction, _prior(x, 1 - last, last)], axis=1)


class Solver(NamedTuple):
    """An explicit Runge-Kutta method each of whose stages starts from the one before."""

    nodes: tuple  # of the stages, in shares of a step
    weights: tuple  # of their slopes
    before: tuple  # share of a step along the slope before


SOLVERS = {
    "heun": Solver((0.0, 1.0), (1 / 2, 1 / 2), (0.0, 1.0)),
    "rk4": Solver((0.0, 0.5, 0.5, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6), (0.0, 0.5, 0.5, 1.0)),
}


def find_solver(process: Process, name: str, steps: int) -> str:
    """Name of the solver; "auto" is rk4 for a flow and heun for a chain. Raises UsageError for what a chain does not have.

    A chain's network knows its steps only, so the solver has to evaluate it at the ends of steps alone, as Heun's method does.
    """
    if isinstance(process, Flow):
        return "rk4" if name == "auto" else name
    if name not in ("auto", "heun"):
        expected = "expected 'heun' (or 'auto') for a chain, which has no times between its steps"
        raise UsageError(f"eval.likelihood_solver: found {name!r}, {expected}")
    if steps > (most := _last(process)):
        raise UsageError(f"eval.likelihood_steps: found {steps}, expected at most {most}, the steps of the chain's ODE")
    return "heun"


def _last(process: DDPM) -> int:
    """The last step of a chain, counted from 1, with at least LEAST_ALPHA of the image."""
    at = np.arange(1, process.timesteps + 1) / process.timesteps
    return int((process.alpha(at) >= LEAST_ALPHA).sum())


def _grid(process: Process, steps: int, solver: Solver) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Size of each step (steps,), and of its stages (steps, stages) the time, alpha, sigma and the weights of x_0 and eps in the velocity.

    A flow's clock is t, and its ends of steps are squares of equal steps, so that they are dense at little noise, where the
    divergence changes fast. A chain's clock is the angle arctan(sigma / alpha), in which x = cos x_0 + sin eps; at t = 0, where its
    network was not trained, the expected noise is 0.
    """
    if isinstance(process, Flow):
        ends = np.linspace(0.0, 1.0, steps + 1) ** 2
        size = np.diff(ends)
        t = ends[:-1, None] + size[:, None] * np.array(solver.nodes)
        sigma = np.maximum(t, FLOW_ENDS[0])  # what the network predicts is not divided by less
        return size, {"t": t, "alpha": 1 - sigma, "sigma": sigma, "of_x0": 0 * t - 1, "of_eps": 0 * t + 1}
    ends = np.round(np.linspace(0, _last(process), steps + 1)) / process.timesteps
    t = np.stack([ends[:-1], ends[1:]], axis=1)
    alpha, sigma = process.alpha(t), process.sigma(t)
    size = np.diff(np.arctan2(process.sigma(ends), process.alpha(ends)))
    return size, {"t": t, "alpha": alpha, "sigma": sigma, "of_x0": -sigma, "of_eps": alpha * (t > 0)}


def negative_log_likelihood(
    process: Process, denoise: Denoiser, x: Images, probe: Images, steps: int, solver: str
) -> jax.Array:
    """-log p(x) in bits per dimension (b,), of the density that the probability-flow ODE makes of the normal prior.

    Integrates dx/dt = v and d log p / dt = -div v from the image to the prior (Song et al. 2021, arXiv 2011.13456, section 4.3), with
    `steps` steps of `solver`. div v is estimated as probe . (dv/dx) probe (Hutchinson 1990), with `probe` (b, h, w, c) of -1 and 1, the
    same at all times: unbiased, and exact if dv/dx is diagonal. Each evaluation costs a forward pass and the gradient of its input.
    """
    method = SOLVERS[find_solver(process, solver, steps)]

    def velocity(x, c):
        def field(x):
            x_0, eps = process.predict(denoise(x, jnp.full(x.shape[:1], c["t"])), x, c["alpha"], c["sigma"])
            return c["of_x0"] * x_0 + c["of_eps"] * eps

        v, pull = jax.vjp(field, x)
        return v, _each(pull(probe)[0] * probe)

    def step(state, c):
        x, divergence = state
        size, stages = c
        v, total_v, total = jnp.zeros_like(x), 0.0, 0.0
        for i, (weight, share) in enumerate(zip(method.weights, method.before, strict=True)):
            v, div = velocity(x + share * size * v, {name: values[i] for name, values in stages.items()})
            total_v, total = total_v + weight * v, total + weight * div
        return (x + size * total_v, divergence + size * total), None

    grid = jax.tree.map(lambda values: values.astype(np.float32), _grid(process, steps, method))
    (x, divergence), _ = jax.lax.scan(step, (x, jnp.zeros(x.shape[:1])), grid)
    return BITS * (0.5 * (_each(jnp.square(x)) + math.log(2 * math.pi)) - divergence)
