"""The variational bound and the exact likelihood against closed forms in float64 NumPy, with the exact denoiser as the model.

Nothing here uses a formula of the code's. Images have independent dimensions, each of a mixture of two Gaussians at -m and m (of one
Gaussian if m is 0), so that every expectation is an integral over one variable. Sohl-Dickstein et al. 2015, Ho et al. 2020 (arXiv
2006.11239), Kingma et al. 2021 (arXiv 2107.00630), Song et al. 2021 (arXiv 2011.13456).
"""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats
from scipy.special import logsumexp, ndtri

from dit_jax.config import Config, DataConfig, DiffusionConfig, EvalConfig, MeshConfig, ModelConfig
from dit_jax.devices.mesh import make_mesh, replicated
from dit_jax.error import NotFiniteError, UsageError
from dit_jax.evaluation import likelihood
from dit_jax.evaluation.protocol import check_config

SHAPE, COUNT = (8, 16, 4), 5  # 512 dimensions
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(160)  # of exp(-z^2 / 2)
WEIGHTS = WEIGHTS / WEIGHTS.sum()
V = 0.3  # of the model's variance in [-1, 1]


def bars(schedule, steps):
    """alpha-bar at steps 0 (clean) to T."""
    if schedule == "linear":
        betas = np.linspace(1e-4, 0.02, steps) * (1000 / steps)
    else:
        f = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    return np.concatenate([[1.0], np.cumprod(1 - betas)])


def clean(x_t, alpha, sigma, m, s, numpy=np):
    """E[x_0 | x_t]: each component's conditional mean, weighted by how probable the component is."""
    variance = (alpha * s) ** 2 + sigma**2
    tilt = numpy.tanh(alpha * m * x_t / variance)  # probability of +m less that of -m
    return m * tilt + alpha * s**2 / variance * (x_t - alpha * m * tilt)


def log_density(x, m, s):
    return logsumexp([stats.norm.logpdf(x, m, s), stats.norm.logpdf(x, -m, s)], axis=0) - np.log(2)


class Exact:
    """Stands for a model that knows the data: outputs the velocity of a flow, or eps (and V) of a chain."""

    def __init__(self, cfg, m, s):
        self.cfg, self.m, self.s = cfg, m, s

    def apply(self, params, x, t, cond):
        if self.cfg.diffusion.process == "flow":
            sigma = jnp.maximum(t / 1000, 1e-4)[:, None, None, None]
            alpha = 1 - sigma
        else:
            table = bars(self.cfg.diffusion.schedule, self.cfg.diffusion.timesteps)
            index = jnp.round(t).astype(int) + 1
            alpha, sigma = (
                jnp.asarray(np.sqrt(v), jnp.float32)[index][:, None, None, None] for v in (table, 1 - table)
            )
        x_0 = clean(x, alpha, sigma, self.m, self.s, jnp)
        eps = (x - alpha * x_0) / jnp.maximum(sigma, 1e-6)
        if self.cfg.diffusion.process == "flow":
            return params["scale"] * (eps - x_0)
        return jnp.concatenate([eps, V + 0 * eps], axis=-1) if self.cfg.model.learn_sigma else eps


def config(process="flow", schedule="linear", timesteps=1000, learn_sigma=False, latents="", **evaluation):
    model = ModelConfig(depth=1, width=16, heads=2, input_size=8, channels=4, classes=3, learn_sigma=learn_sigma)
    diffusion = DiffusionConfig(process=process, schedule=schedule, timesteps=timesteps)
    return Config(model=model, diffusion=diffusion, data=DataConfig(latents=latents), eval=EvalConfig(**evaluation))


def images(m, s, levels):
    """Images of one value each: quantiles of the mixture, on the 8-bit levels if they are pixels."""
    x = np.sign(np.arange(COUNT) % 2 - 0.5) * m + s * ndtri((np.arange(COUNT) + 0.5) / COUNT)
    x = np.rint((x + 1) * 127.5) / 127.5 - 1 if levels else x
    return x, np.broadcast_to(x[:, None, None, None], (COUNT, *SHAPE)).astype(np.float32)


def quantiles(seed, indices, times, shape):
    """Noise whose mean over the dimensions of an image is an integral over the normal law."""
    z = ndtri((np.arange(np.prod(shape)) + 0.5) / np.prod(shape))
    z = jnp.asarray(z / z.std(), jnp.float32).reshape(shape)
    return jnp.broadcast_to(z, (len(indices), times, *shape))


def spread(seed, indices, shape):
    """The same for the noise of dequantisation and the uniform law, beside the code's own probe."""
    u = jnp.asarray((np.arange(np.prod(shape)) + 0.5) / np.prod(shape), jnp.float32).reshape(shape)
    return jnp.broadcast_to(u, (len(indices), *shape)), DRAWS(seed, indices, shape)[1]


DRAWS = likelihood._draws


def measure(target, cfg, m, s, pixels, devices=1, scale=1.0, noise=spread):
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    cond = {"label": np.arange(len(pixels), dtype=np.int32) % 3}
    made = (likelihood.make_bounds, likelihood.make_likelihoods)
    with (
        mock.patch.object(likelihood, "bind_to_draw", lambda model, mesh: (Exact(cfg, m, s), replicated(mesh))),
        mock.patch.object(likelihood, "fixed_noise", quantiles),
        mock.patch.object(likelihood, "_draws", noise),
    ):
        [each.cache_clear() for each in made]
        found = target(cfg, {"scale": np.float32(scale)}, pixels, cond, mesh)
        [each.cache_clear() for each in made]
    return found


def squared_error(x, alpha, sigma, m, s):
    """E |x - x_hat(x_t)|^2 over the noise, for values x (n, 1) and levels alpha, sigma (k,): (n, k)."""
    x_t = alpha * x[..., None] + sigma * NODES[:, None, None]
    return np.tensordot(WEIGHTS, (x[..., None] - clean(x_t, alpha, sigma, m, s)) ** 2, axes=1)


def mass(x, mean, deviation):
    """-log of a Gaussian's probability of an 8-bit level, whose outer ones are open."""
    high = np.where(x > 0.999, 1, stats.norm.cdf(x + 1 / 255, mean, deviation))
    low = np.where(x < -0.999, 0, stats.norm.cdf(x - 1 / 255, mean, deviation))
    return -np.log(np.maximum(high - low, 1e-300))  # beyond: of nodes that have no weight


@pytest.mark.parametrize("m,s", [(0.0, 0.5), (0.5, 0.1)])
@pytest.mark.parametrize("latents", ["", "folder"])
def test_the_bound_of_a_flow(m, s, latents):
    """Reconstruction at t = 0.001, 1/2 the integral of |x - x_hat|^2 d SNR, and the divergence from the prior at t = 0.99."""
    x, pixels = images(m, s, not latents)
    first, last = 1e-3, 0.99
    width = first / (1 - first)
    if latents:
        reconstruction = 0.5 * np.log(2 * np.pi * np.e * width**2) + 0 * x
    else:
        reconstruction = WEIGHTS @ mass(x, x + width * NODES[:, None], width)
    log_snr = np.linspace(2 * np.log(last / (1 - last)), 2 * np.log(first / (1 - first)), 2001) * -1
    alpha = 1 / (1 + np.exp(-log_snr / 2))
    error = squared_error(x, alpha, 1 - alpha, m, s)
    diffusion = 0.5 * integrate.simpson(error * np.exp(log_snr), x=log_snr)
    prior = 0.5 * (last**2 + (1 - last) ** 2 * x**2 - 1 - np.log(last**2))
    expected = (reconstruction + diffusion + prior) / np.log(2)
    found = measure(likelihood.held_out_bound, config(latents=latents, vlb_times=1024), m, s, pixels)
    assert found["vlb_bits_per_dim"] == pytest.approx(expected.mean(), abs=1e-3)
    assert found["vlb_bits_per_dim_se"] == pytest.approx(expected.std(ddof=1) / COUNT**0.5, abs=1e-3)
    assert found["vlb_prior_bits_per_dim"] == pytest.approx(prior.mean() / np.log(2), abs=1e-5)
    assert found["vlb_reconstruction_bits_per_dim"] == pytest.approx(reconstruction.mean() / np.log(2), abs=1e-3)
    if latents:  # the bound of an exact model is its entropy, up to the noise of the decoder
        assert found["vlb_bits_per_dim"] == pytest.approx(-log_density(x, m, s).mean() / np.log(2), abs=2e-2)


@pytest.mark.parametrize("m,s", [(0.0, 0.5), (0.5, 0.1)])
@pytest.mark.parametrize("learn_sigma,schedule,steps", [(True, "linear", 1000), (False, "cosine", 400)])
def test_the_bound_of_a_chain(m, s, learn_sigma, schedule, steps):
    """All its steps, each a divergence of two Gaussians; the decoder at the first; the divergence from the prior after the last."""
    x, pixels = images(m, s, True)
    bar = bars(schedule, steps)
    beta, before = 1 - bar[1:] / bar[:-1], bar[:-1]
    small = beta * (1 - before) / (1 - bar[1:])
    small[0] = small[1]
    share = (V + 1) / 2 if learn_sigma else 0.0
    variance = beta**share * small ** (1 - share)
    error = squared_error(x, np.sqrt(bar[1:]), np.sqrt(1 - bar[1:]), m, s)
    shift = (np.sqrt(before) * beta / (1 - bar[1:])) ** 2 * error  # of the two means
    terms = 0.5 * (np.log(variance / small) + small / variance - 1 + shift / variance)
    x_1 = np.sqrt(bar[1]) * x + np.sqrt(1 - bar[1]) * NODES[:, None]
    mean = clean(x_1, np.sqrt(bar[1]), np.sqrt(1 - bar[1]), m, s)
    decoder = WEIGHTS @ mass(x, mean, np.sqrt(variance[0]))
    prior = 0.5 * (1 - bar[-1] + bar[-1] * x**2 - 1 - np.log(1 - bar[-1]))
    expected = (decoder + terms[:, 1:].sum(axis=1) + prior) / np.log(2)
    cfg = config("ddpm", schedule, steps, learn_sigma, vlb_times=1024)
    found = measure(likelihood.held_out_bound, cfg, m, s, pixels)
    assert found["vlb_reconstruction_bits_per_dim"] == pytest.approx(decoder.mean() / np.log(2), abs=1e-3)
    assert found["vlb_bits_per_dim"] == pytest.approx(expected.mean(), abs=1e-3)


CHAIN = dict(process="ddpm", likelihood_steps=400)


@pytest.mark.parametrize("m,s", [(0.0, 0.5), (0.5, 0.1)])
@pytest.mark.parametrize(
    "settings", [{}, dict(likelihood_solver="heun", likelihood_steps=128), CHAIN, CHAIN | dict(schedule="cosine")]
)
def test_the_likelihood_of_pixels(m, s, settings):
    """The mean of -log2(density x width of a level) over the level."""
    x, pixels = images(m, s, True)
    places, weights = np.polynomial.legendre.leggauss(9)
    of_level = weights @ -log_density(x + places[:, None] / 255, m, s) / 2 - np.log(2 / 255)
    found = measure(likelihood.held_out_likelihood, config(**settings), m, s, pixels)
    assert found["likelihood_bits_per_dim"] == pytest.approx(of_level.mean() / np.log(2), abs=1e-3)
    assert found["likelihood_bits_per_dim_se"] == pytest.approx(of_level.std(ddof=1) / COUNT**0.5 / np.log(2), abs=1e-3)


@pytest.mark.parametrize("m,s", [(0.0, 0.5), (0.5, 0.1)])
def test_the_likelihood_of_latents_is_of_a_density(m, s):
    x, latents = images(m, s, False)
    found = measure(likelihood.held_out_likelihood, config(latents="folder"), m, s, latents)
    assert found["likelihood_bits_per_dim"] == pytest.approx(-log_density(x, m, s).mean() / np.log(2), abs=1e-3)


class TwoPictures(Exact):
    """Knows images that are near one of two pictures, -m and m, each of as much in every dimension: its divergence is no diagonal's."""

    def apply(self, params, x, t, cond):
        sigma = jnp.maximum(t / 1000, 1e-4)[:, None, None, None]
        alpha, m = 1 - sigma, self.m * (-1.0) ** jnp.arange(x[0].size).reshape(1, *x.shape[1:])
        variance = (alpha * self.s) ** 2 + sigma**2
        tilt = jnp.tanh(alpha * (m * x).sum(axis=(1, 2, 3), keepdims=True) / variance)
        x_0 = m * tilt + alpha * self.s**2 / variance * (x - alpha * m * tilt)
        return (x - alpha * x_0) / sigma - x_0


def test_the_probe_of_the_divergence_is_unbiased():
    rng, m, s, shape = np.random.default_rng(5), 0.15, 0.3, (2, 2, 2)
    mean = m * (-1.0) ** np.arange(8).reshape(shape)
    x = rng.choice([-1, 1], (1024, 1, 1, 1)) * mean + s * rng.normal(size=(1024, *shape))
    both = [stats.norm.logpdf(x, sign * mean, s).sum(axis=(1, 2, 3)) for sign in (-1, 1)]
    expected = -(logsumexp(both, axis=0) - np.log(2)) / np.log(2) / 8
    with mock.patch(f"{__name__}.Exact", TwoPictures):
        cfg = config(latents="folder", likelihood_images=0, likelihood_steps=16)
        found = measure(likelihood.held_out_likelihood, cfg, m, s, x.astype(np.float32))
        fewer = measure(likelihood.held_out_likelihood, config(latents="folder", likelihood_steps=16), m, s, x[:300])
    error = found["likelihood_bits_per_dim"] - expected.mean()
    assert 0 < abs(error) < 4 * found["likelihood_bits_per_dim_se"] and abs(error) < 5e-3
    assert fewer["likelihood_bits_per_dim_se"] > 1.7 * found["likelihood_bits_per_dim_se"]  # of 256 of the 300


def test_draws_depend_on_seed_and_image_only():
    u, probe = (np.asarray(part) for part in DRAWS(3, jnp.arange(64), SHAPE))
    assert 0 <= u.min() < 0.001 and 0.999 < u.max() < 1 and stats.kstest(u.ravel(), "uniform").pvalue > 0.01
    assert set(np.unique(probe)) == {-1, 1} and abs(probe.mean()) < 0.02
    assert (np.asarray(DRAWS(3, jnp.arange(5, 6), SHAPE)[1]) == probe[5]).all()
    assert (np.asarray(DRAWS(4, jnp.arange(5, 6), SHAPE)[0]) != u[5]).any()


@pytest.mark.parametrize("target", [likelihood.held_out_bound, likelihood.held_out_likelihood])
def test_devices_and_batches_change_no_bit_and_a_diverged_model_is_refused(target):
    _, pixels = images(0.5, 0.1, True)
    cfg = config(likelihood_steps=4, vlb_times=4)
    found = measure(target, cfg, 0.5, 0.1, pixels, noise=DRAWS)
    small = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, batch_size=2))
    assert found == measure(target, cfg, 0.5, 0.1, pixels, devices=8, noise=DRAWS)
    assert found == measure(target, small, 0.5, 0.1, pixels, noise=DRAWS)
    with pytest.raises(NotFiniteError, match="not finite"):
        measure(target, cfg, 0.5, 0.1, pixels, scale=np.nan)


@pytest.mark.parametrize(
    "changes,match",
    [
        (
            dict(process="ddpm", likelihood_solver="rk4"),
            r"likelihood_solver: found 'rk4', expected 'heun' \(or 'auto'\)",
        ),
        (dict(process="ddpm", likelihood_steps=1001), r"eval\.likelihood_steps: found 1001, expected at most 1000"),
        (dict(likelihood_solver="euler"), r"eval\.likelihood_solver: found 'euler'"),
        (dict(vlb_times=0), r"eval\.vlb_times: found 0"),
    ],
)
def test_what_cannot_be_is_refused(changes, match):
    with pytest.raises(UsageError, match=match):
        check_config(config(likelihood=True, **changes))
