"""The variational bound and the respaced chain against float64 NumPy derivations from the papers' definitions.

Nothing here uses a closed form of the code's: posteriors come from the product of the two Gaussians that define them, KL
divergences from their integral by Gauss-Hermite quadrature, the decoder's probability from the integral of a density.
Ho et al. 2020 (arXiv 2006.11239), Nichol & Dhariwal 2021 (arXiv 2102.09672).
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from dit_jax.diffusion.objective import noise_prediction
from dit_jax.diffusion.process import DDPM
from dit_jax.diffusion.samplers import SAMPLERS, draw_noise

SHAPE = (4, 4, 3)
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(40)  # of exp(-z^2 / 2)


def betas(schedule, steps):
    """Ho et al., section 4 (1e-4 to 0.02 over 1000 steps, scaled for others); Nichol & Dhariwal, eq. 17, s = 0.008."""
    if schedule == "linear":
        return np.linspace(1e-4, 0.02, steps) * (1000 / steps)
    f = [np.cos((t / steps + 0.008) / 1.008 * np.pi / 2) ** 2 for t in range(steps + 1)]
    return np.array([min(1 - later / earlier, 0.999) for earlier, later in itertools.pairwise(f)])


def bars(schedule, steps):
    """alpha-bar of step 0..T-1, as Python's own products."""
    found, product = [], 1.0
    for beta in betas(schedule, steps):
        product *= 1 - beta
        found.append(product)
    return np.array(found)


def posterior(x0, x_t, bar, before):
    """Mean and variance of q(x_s | x_t, x_0): density of x_s given x_0 times that of x_t given x_s, for s < t."""
    ratio = np.sqrt(bar / before)
    spread = 1 - bar / before  # of x_t given x_s
    precision = 1 / (1 - before) + ratio**2 / spread
    return (np.sqrt(before) * x0 / (1 - before) + ratio * x_t / spread) / precision, 1 / precision


def kl(mean1, variance1, mean2, variance2):
    """E_1[log p_1 - log p_2] in nats, elementwise: the integral itself; exact, as the integrand is quadratic."""
    z = NODES.reshape(-1, *[1] * np.ndim(mean1))
    x = mean1 + np.sqrt(variance1) * z
    difference = stats.norm.logpdf(x, mean1, np.sqrt(variance1)) - stats.norm.logpdf(x, mean2, np.sqrt(variance2))
    return np.tensordot(WEIGHTS / WEIGHTS.sum(), difference, axes=1)


def images(seed, levels=False):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, size=(2, *SHAPE)) / 127.5 - 1 if levels else np.clip(rng.normal(size=(2, *SHAPE)), -1, 1)
    eps, error = rng.normal(size=(2, 2, *SHAPE))
    return x, eps, eps + 0.2 * error, rng.uniform(-1, 1, size=(2, *SHAPE))


def found_term(process, step, x, eps, eps_hat, v):
    """The code's term (2,), in bits per dimension."""
    out = jnp.asarray(np.concatenate([eps_hat, v], axis=-1), jnp.float32)
    t = jnp.full(2, (step + 1) / process.timesteps)
    _, parts = noise_prediction(process, lambda x_t, t: out, *(jnp.asarray(a, jnp.float32) for a in (x, t, eps)))
    return np.asarray(parts["vb"])


def learned_variance(v, beta, small):
    """Nichol & Dhariwal, eq. 15, with the network's v in [-1, 1] for the share in [0, 1]."""
    share = (v + 1) / 2
    return beta**share * small ** (1 - share)


@pytest.mark.parametrize("schedule,steps", [("cosine", 1000), ("cosine", 40), ("linear", 100)])
@pytest.mark.parametrize("share_of_chain", [0.03, 0.4, 0.95])
def test_a_term_of_the_bound_is_the_divergence_of_the_two_posteriors(schedule, steps, share_of_chain):
    """Ho et al., eq. 5, L_{t-1}, in bits, with eq. 15's variance; the network's x_0 in place of the true one."""
    step = int(share_of_chain * steps) + 1
    x, eps, eps_hat, v = images(step)
    bar, before = bars(schedule, steps)[[step, step - 1]]
    x_t = np.sqrt(bar) * x + np.sqrt(1 - bar) * eps
    mean, small = posterior(x, x_t, bar, before)
    mean_hat, _ = posterior((x_t - np.sqrt(1 - bar) * eps_hat) / np.sqrt(bar), x_t, bar, before)
    variance = learned_variance(v, betas(schedule, steps)[step], small)
    expected = kl(mean, small, mean_hat, variance).mean(axis=(1, 2, 3)) / np.log(2)
    np.testing.assert_allclose(
        found_term(DDPM(schedule, steps), step, x, eps, eps_hat, v), expected, rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("schedule,steps", [("cosine", 1000), ("linear", 50)])
def test_the_first_term_is_the_probability_of_the_pixel_levels(schedule, steps):
    """Ho et al., eq. 13: the Gaussian's mass over each level's interval, the outer ones open; all 256 levels occur.

    The variance at the first step lies between that step's beta and the second step's posterior variance (Nichol & Dhariwal's
    code and section 3.1: the posterior's own is 0).
    """
    x, eps, eps_hat, v = images(3, levels=True)
    x.reshape(-1)[:4] = -1, 1, 1 - 2 / 255, -1 + 2 / 255
    table, beta = bars(schedule, steps), betas(schedule, steps)[0]
    x_1 = np.sqrt(table[0]) * x + np.sqrt(1 - table[0]) * eps
    mean = (x_1 - np.sqrt(1 - table[0]) * eps_hat) / np.sqrt(table[0])
    deviation = np.sqrt(learned_variance(v, beta, posterior(0.0, 0.0, table[1], table[0])[1]))

    def mass(level, mean, deviation):
        low = -np.inf if level < -0.999 else level - 1 / 255
        high = np.inf if level > 0.999 else level + 1 / 255
        ends = np.clip([low, high], mean - 12 * deviation, mean + 12 * deviation)  # outside: nothing
        return integrate.fixed_quad(lambda y: stats.norm.pdf(y, mean, deviation), *ends, n=200)[0]

    bits = -np.log2([mass(*at) for at in zip(x.ravel(), mean.ravel(), deviation.ravel(), strict=True)])
    assert bits.max() < 30  # the code's floor of 1e-12, 40 bits, is not what is compared
    expected = bits.reshape(2, -1).mean(axis=1)
    np.testing.assert_allclose(found_term(DDPM(schedule, steps), 0, x, eps, eps_hat, v), expected, rtol=1e-3)


def test_the_bound_is_tight_for_a_network_that_knows_the_image():
    """Exact eps and the smallest variance: every term but the first is 0. Each of the two, wrong alone, costs bits."""
    for step in (1, 7, 49):
        x, eps, _, _ = images(step)
        exact, low = found_term(DDPM("linear", 50), step, x, eps, eps, -np.ones_like(x)), -np.ones_like(x)
        np.testing.assert_allclose(exact, 0, atol=1e-5)
        bar, before = bars("linear", 50)[[step, step - 1]]
        beta, small = betas("linear", 50)[step], posterior(0.0, 0.0, bar, before)[1]
        wide = kl(np.zeros(1), small, np.zeros(1), beta)[0] / np.log(2)
        np.testing.assert_allclose(found_term(DDPM("linear", 50), step, x, eps, eps, -low), wide, rtol=1e-3, atol=1e-5)
        assert (found_term(DDPM("linear", 50), step, x, eps, eps + 0.5, low) > 1e-4).all()


@pytest.mark.parametrize(
    "schedule,spacing,count", [("linear", "linspace", 7), ("cosine", "trailing", 9), ("linear", "leading", 250)]
)
def test_every_step_of_a_respaced_chain(schedule, spacing, count):
    """Nichol & Dhariwal, section 4: a chain of the kept steps, beta' = 1 - bar_t / bar_s, with its own posterior and eq. 15.

    From each image that the network saw to the next: the draws are known, so mean and deviation are seen in every value.
    """
    process, rng = DDPM(schedule), np.random.default_rng(count)
    times, keys, seen = process.times(count, spacing), jax.vmap(jax.random.key)(jnp.arange(2)), []
    eps_hat, v = rng.normal(size=(2, *SHAPE)), rng.uniform(-1, 1, size=(2, *SHAPE))
    out = jnp.asarray(np.concatenate([eps_hat, v], axis=-1), jnp.float32)

    def network(x, t):
        jax.debug.callback(lambda x, t: seen.append((np.array(x, np.float64), float(t[0]))), x, t, ordered=True)
        return out

    end = jax.jit(lambda x: SAMPLERS["ddpm"](process, network, x, times, keys))(draw_noise(keys, 0, SHAPE))
    jax.effects_barrier()
    assert len(seen) == count
    table = np.append(bars(schedule, 1000), 1.0)  # the last: the clean image, step -1
    kept = [*(round(1000 * t) - 1 for _, t in seen), -1]
    path = [*(x for x, _ in seen), np.asarray(end, np.float64)]
    for i in range(count):
        x_t, bar, before = path[i], table[kept[i]], table[kept[i + 1]]
        x0 = (x_t - np.sqrt(1 - bar) * eps_hat) / np.sqrt(bar)
        expected = x0
        if before < 1:
            mean, small = posterior(x0, x_t, bar, before)
            noise = np.asarray(draw_noise(keys, i + 1, SHAPE), np.float64)
            expected = mean + np.sqrt(learned_variance(v, 1 - bar / before, small)) * noise
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(path[i + 1] / scale, expected / scale, atol=2e-5, err_msg=f"step {i}")
