"""Processes, losses, guidance and samplers, mostly on a Gaussian whose best denoiser is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dit_jax.config import Config, DiffusionConfig, ModelConfig, SampleConfig, TrainConfig
from dit_jax.diffusion import guidance, schedule
from dit_jax.diffusion.objective import noise_prediction, velocity
from dit_jax.diffusion.process import DDPM, Flow, discretised_log_likelihood, make_process
from dit_jax.diffusion.samplers import SAMPLERS, draw_noise
from dit_jax.diffusion.task import make_task
from dit_jax.error import UsageError

MEAN, STD = 0.4, 0.5
FLOW, CHAIN = Flow(), DDPM(learn_sigma=False)
TRACED = {"flow": FLOW, "ddpm": CHAIN}


def keys(count, seed=0):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(count))


def gaussian_denoiser(process):
    """The optimal network for images of independent N(MEAN, STD^2) values: velocity for a flow, eps for a chain."""

    def denoise(x, t, *target):
        t = t[:, None, None, None]
        if isinstance(process, Flow):
            alpha, sigma = 1 - t, t
        else:
            bars = jnp.asarray(schedule.alpha_bars("linear", 1000), jnp.float32)[process.index(t)]
            alpha, sigma = jnp.sqrt(bars), jnp.sqrt(1 - bars)
        residual = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        eps = sigma * residual
        x0 = MEAN + alpha * STD**2 * residual
        return eps - x0 if isinstance(process, Flow) else eps

    return denoise


def exact_map(x, t, s):
    """Along the exact flow a Gaussian value keeps its quantile: images at time s from x at time t."""
    mean, std = lambda t: (1 - t) * MEAN, lambda t: jnp.sqrt(((1 - t) * STD) ** 2 + t**2)
    t, s = (time[:, None, None, None] for time in (t, s))
    return mean(s) + std(s) / std(t) * (x - mean(t))


def best(process, sampler):
    """The network that a sampler asks for: the velocity or eps, of `consistency` and `flow_map` the mean velocity of the exact flow."""

    def mean_velocity(x, t, s):
        return (x - exact_map(x, t, s)) / (t - s)[:, None, None, None]

    named = {"flow_map": mean_velocity, "consistency": lambda x, t: mean_velocity(x, t, jnp.zeros_like(t))}
    return named.get(sampler) or gaussian_denoiser(process)


def task(process="ddpm", dropout=0.1, **sample):
    """The task of a config with these sampling settings."""
    model = ModelConfig(learn_sigma=process == "ddpm")
    train = TrainConfig(cond_dropout=dropout)
    return make_task(Config(model, DiffusionConfig(process=process), sample=SampleConfig(**sample), train=train))


def draw(process, sampler, steps, count=512, seed=0):
    k = keys(count, seed)
    x = draw_noise(k, 0, (4, 4, 2))
    times = process.times(steps)
    return x, jax.jit(lambda x, k: SAMPLERS[sampler](process, best(process, sampler), x, times, k))(x, k)


@pytest.mark.parametrize(
    "sampler,process", [(s, p) for s in SAMPLERS for p in TRACED if type(TRACED[p]) in SAMPLERS[s].accepts]
)
def test_every_sampler_reaches_the_mean_and_covariance(process, sampler):
    _, x = draw(TRACED[process], sampler, 250)
    values = np.asarray(x, np.float64).reshape(512, -1)
    covariance = np.cov(values.T)
    assert values.mean() == pytest.approx(MEAN, abs=5 * STD / np.sqrt(values.size))
    # 2 % for the steps, and three standard errors of a variance over all 32 values
    assert np.diag(covariance).mean() == pytest.approx(STD**2, rel=0.02 + 3 * np.sqrt(2 / values.size))
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 6 * STD**2 / np.sqrt(512)


@pytest.mark.parametrize("sampler", ["flow_map", "consistency"])
def test_the_exact_map_needs_one_step(sampler):
    for steps in (1, 4):
        x, found = draw(FLOW, sampler, steps, count=16)
        error = np.abs(found - exact_map(x, jnp.ones(16), jnp.zeros(16))).max()
        assert (error < 1e-5) == (steps == 1 or sampler == "flow_map")  # consistency draws new noise


@pytest.mark.parametrize("sampler,order", [("euler", 1), ("ddim", 1), ("heun", 2)])
def test_order_of_convergence_on_a_flow(sampler, order):
    """Along the exact flow, a Gaussian value keeps its quantile: x_0 = MEAN + STD x_1."""
    errors = []
    for steps in (8, 16, 32):
        x, ended = draw(FLOW, sampler, steps, count=64)
        errors.append(np.abs(np.asarray(ended) - (MEAN + STD * np.asarray(x))).mean())
    ratios = np.array(errors[:-1]) / np.array(errors[1:])
    np.testing.assert_allclose(np.log2(ratios), order, atol=0.25)


def test_ddim_is_deterministic_and_ddpm_is_not():
    k = keys(8)
    x = draw_noise(k, 0, (4, 4, 2))
    for sampler, same in (("ddim", True), ("euler", True), ("heun", True), ("dpmpp_2m", True), ("ddpm", False)):
        a = SAMPLERS[sampler](CHAIN, gaussian_denoiser(CHAIN), x, CHAIN.times(10), keys(8, 1))
        b = SAMPLERS[sampler](CHAIN, gaussian_denoiser(CHAIN), x, CHAIN.times(10), keys(8, 2))
        assert np.array_equal(a, b) == same, sampler


@pytest.mark.parametrize("process", [FLOW, CHAIN], ids=["flow", "ddpm"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_step_is_one_euler_step_and_one_evaluation(process, sampler):
    if type(process) in SAMPLERS[sampler].accepts:
        k = keys(8)
        x, times = draw_noise(k, 0, (4, 4, 2)), process.times(1)
        euler, found = (SAMPLERS[s](process, gaussian_denoiser(process), x, times, k) for s in ("euler", sampler))
        np.testing.assert_allclose(found, euler, rtol=1e-4, atol=1e-4)
        assert SAMPLERS[sampler].evaluations(process.times(1)).tolist() == [1.0]


def test_euler_and_ddim_are_the_same_step():
    """In sigma / alpha, DDIM is Euler (Song et al. 2021, section 4.3)."""
    for process in (FLOW, CHAIN):
        _, ddim = draw(process, "ddim", 20, count=8)
        _, euler = draw(process, "euler", 20, count=8)
        np.testing.assert_allclose(ddim, euler, atol=2e-5)


@pytest.mark.parametrize("process", TRACED)
def test_dpmpp_2m_is_the_papers_algorithm(process):
    """Algorithm 2 of Lu et al. 2022 in its own terms, lambda = log(alpha / sigma), in float64 NumPy; the ends of first order."""
    process, x = TRACED[process], np.asarray(draw_noise(keys(3), 0, (2, 2, 1)), np.float64)
    times = process.times(12)[1:] if isinstance(process, Flow) else process.times(12)  # lambda is finite from here
    denoise = gaussian_denoiser(process)
    got = SAMPLERS["dpmpp_2m"](process, denoise, jnp.asarray(x, jnp.float32), times, keys(3))
    alpha, sigma = process.alpha(times), process.sigma(times)
    before = None
    for i in range(len(times) - 1):
        out = np.asarray(denoise(jnp.asarray(x, jnp.float32), jnp.full((3,), times[i], jnp.float32)), np.float64)
        x0 = x - sigma[i] * out if isinstance(process, Flow) else (x - sigma[i] * out) / alpha[i]
        if i == len(times) - 2:
            x = x0
            break
        lambdas = np.log(alpha[: i + 2] / sigma[: i + 2])
        h, mixed = lambdas[i + 1] - lambdas[i], x0
        if i:
            r = (lambdas[i] - lambdas[i - 1]) / h
            mixed = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before
        x, before = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * np.expm1(-h) * mixed, x0
    np.testing.assert_allclose(got, x, atol=2e-5)


def test_dpmpp_2m_is_of_second_order_between_two_noise_levels():
    """On equal steps of lambda, from t = 0.95 to 0.05, against the exact flow of a Gaussian; the first step alone is of order 1."""
    errors = []
    for steps in (20, 40, 80):
        odds = np.exp(np.linspace(np.log(0.05 / 0.95), np.log(0.95 / 0.05), steps + 1))  # alpha / sigma
        times = 1 / (1 + odds)
        z = np.asarray(draw_noise(keys(32), 0, (2, 2, 1)))
        path = [FLOW.alpha(t) * MEAN + np.sqrt((FLOW.alpha(t) * STD) ** 2 + t**2) * z for t in times[[0, -1]]]
        got = SAMPLERS["dpmpp_2m"](FLOW, gaussian_denoiser(FLOW), jnp.asarray(path[0], jnp.float32), times, keys(32))
        errors.append(np.abs(got - path[1]).mean())
    np.testing.assert_allclose(np.log2(np.array(errors[:-1]) / errors[1:]), 2, atol=0.3)


def test_dpmpp_2m_needs_fewer_steps_than_ddim():
    _, exact = draw(FLOW, "heun", 200, count=64)
    errors = {name: np.abs(draw(FLOW, name, 12, count=64)[1] - exact).mean() for name in ("ddim", "dpmpp_2m")}
    assert errors["dpmpp_2m"] < 0.3 * errors["ddim"]


def test_euler_maruyama_is_for_flows_and_differs_from_the_ode_by_its_noise():
    with pytest.raises(UsageError, match=r"sample.sampler: found 'euler_maruyama' for DDPM, expected a flow"):
        task(sampler="euler_maruyama", steps=10)
    _, a = draw(FLOW, "euler_maruyama", 20, count=8)
    _, b = draw(FLOW, "euler", 20, count=8)
    assert np.abs(a - b).max() > 0.05
    one = FLOW.times(1)
    x, k = draw_noise(keys(4), 0, (2, 2, 1)), keys(4)
    steps = [SAMPLERS[name](FLOW, gaussian_denoiser(FLOW), x, one, k) for name in ("euler", "euler_maruyama")]
    np.testing.assert_allclose(*steps, atol=1e-6)  # the last step is the ODE's


def test_a_sampled_image_depends_on_its_key_alone():
    k = keys(6)
    whole = SAMPLERS["ddpm"](CHAIN, gaussian_denoiser(CHAIN), draw_noise(k, 0, (4, 4, 2)), CHAIN.times(5), k)
    part = SAMPLERS["ddpm"](CHAIN, gaussian_denoiser(CHAIN), draw_noise(k[2:4], 0, (4, 4, 2)), CHAIN.times(5), k[2:4])
    np.testing.assert_allclose(whole[2:4], part, atol=1e-6)


def test_evaluation_times_are_the_calls_made():
    for sampler in SAMPLERS:
        times, seen = FLOW.times(7), []

        def denoise(x, t, *target, seen=seen, sampler=sampler):
            jax.debug.callback(lambda t: seen.append(float(t)), t[0])
            return best(FLOW, sampler)(x, t, *target)

        jax.block_until_ready(SAMPLERS[sampler](FLOW, denoise, jnp.zeros((1, 2, 2, 1)), times, keys(1)))
        jax.effects_barrier()
        np.testing.assert_allclose(sorted(seen), sorted(SAMPLERS[sampler].evaluations(times)), atol=1e-6)


def toy_model(x, t, labels):
    return x * (0.1 + labels[:, None, None, None] / 10) + t[:, None, None, None]


@pytest.mark.parametrize("channels", [4, 3])
def test_guidance_one_is_conditional(channels):
    labels, x, t = jnp.array([1, 3]), jax.random.normal(jax.random.key(0), (2, 4, 4, 8)), jnp.array([0.5, 0.5])
    pair = guidance.paired(toy_model, labels, jnp.full_like(labels, 9))
    np.testing.assert_allclose(guidance.guided(pair, 1.0, channels)(x, t), toy_model(x, t, labels), atol=1e-6)


def test_guidance_acts_on_its_channels_only():
    labels, x, t = jnp.array([1, 3]), jax.random.normal(jax.random.key(0), (2, 4, 4, 8)), jnp.array([0.5, 0.5])
    c, u = toy_model(x, t, labels), toy_model(x, t, jnp.array([9, 9]))
    out = guidance.guided(guidance.paired(toy_model, labels, jnp.array([9, 9])), 4.0, 3)(x, t)
    np.testing.assert_allclose(out[..., :3], (u + 4 * (c - u))[..., :3], rtol=1e-5)
    np.testing.assert_allclose(out[..., 3:], c[..., 3:], rtol=1e-6)


def test_another_model_as_guide():
    """Autoguidance: the weaker denoiser plus scale times the difference; both have the same condition."""
    x, t = jax.random.normal(jax.random.key(0), (2, 4, 4, 3)), jnp.array([0.5, 0.5])
    better, weaker = (lambda x, t, k=k: toy_model(x, t, jnp.array([1, 3]) + k) for k in (0, 4))
    out = guidance.guided(guidance.beside(better, weaker), 2.5, 3)(x, t)
    np.testing.assert_allclose(out, weaker(x, t) + 2.5 * (better(x, t) - weaker(x, t)), rtol=1e-5)


@pytest.mark.parametrize("share", [0.7, 1.0])
def test_rescaled_guidance_has_the_deviation_of_the_conditional_output(share):
    """Image by image over all pixels and guided channels; the rest is as without."""
    x, t = jax.random.normal(jax.random.key(0), (2, 4, 4, 8)), jnp.array([0.5, 0.5])
    pair = guidance.paired(toy_model, jnp.array([1, 3]), jnp.array([9, 9]))
    ways = (lambda *a: pair(*a)[0], guidance.guided(pair, 4.0, 3), guidance.guided(pair, 4.0, 3, share))
    c, plain, out = (np.asarray(way(x, t), np.float64) for way in ways)
    ratio = [c[i, ..., :3].std() / plain[i, ..., :3].std() for i in range(2)]
    for i in range(2):
        np.testing.assert_allclose(out[i, ..., :3], plain[i, ..., :3] * (share * ratio[i] + 1 - share), rtol=1e-4)
    np.testing.assert_array_equal(out[..., 3:], plain[..., 3:])
    assert abs(ratio[0] - 1) > 0.1


def test_guidance_interval_runs_one_branch():
    """Outside the interval the guided model is not run at all: its call count is the number of guided steps."""
    calls = []

    def guided(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return x

    denoise = guidance.within(guided, lambda x, t: 2 * x, 0.3, 0.6)
    SAMPLERS["euler"](FLOW, denoise, jnp.ones((1, 2, 2, 1)), FLOW.times(10), keys(1)).block_until_ready()
    jax.effects_barrier()
    assert len(calls) == 4  # 0.6, 0.5, 0.4, 0.3


@pytest.mark.parametrize("process", [DDPM(), DDPM("cosine", 50)])
def test_chain_times_are_step_numbers(process):
    t = process.times(process.timesteps)[:-1].astype(np.float32)
    np.testing.assert_array_equal(process.model_time(jnp.asarray(t)), np.arange(process.timesteps)[::-1])
    u = (jnp.arange(process.timesteps) + 0.5) / process.timesteps
    np.testing.assert_array_equal(process.model_time(process.time(u)), np.arange(process.timesteps))


def test_respacing_keeps_both_ends():
    assert schedule.respace(1000, 250)[0] == 999 and schedule.respace(1000, 250)[-1] == 0
    np.testing.assert_array_equal(schedule.respace(1000, 4), [999, 666, 333, 0])
    np.testing.assert_array_equal(schedule.respace(1000, 1), [999])
    with pytest.raises(ValueError, match="expected 1 to 1000"):
        schedule.respace(1000, 1001)


def test_named_respacings_are_those_of_table_2():
    """Lin et al. 2024 (arXiv 2305.08891), Table 2, with steps counted from 0: T = 1000 in 10 steps."""
    np.testing.assert_array_equal(schedule.respace(1000, 10, "linspace"), np.arange(9, -1, -1) * 111)
    np.testing.assert_array_equal(schedule.respace(1000, 10, "leading"), np.arange(9, -1, -1) * 100)
    np.testing.assert_array_equal(schedule.respace(1000, 10, "trailing"), np.arange(10, 0, -1) * 100 - 1)
    for spacing in schedule.SPACINGS:
        for count in (1, 3, 7, 333, 999, 1000):
            steps = schedule.respace(1000, count, spacing)
            assert len(steps) == count and steps[0] <= 999 and steps[-1] >= 0 and (np.diff(steps) < 0).all()
    with pytest.raises(ValueError, match="found 'karras', expected one of linspace, leading, trailing"):
        schedule.respace(1000, 10, "karras")


def test_spacing_is_for_chains():
    np.testing.assert_allclose(
        task(sampler="ddim", steps=4, spacing="leading").times, [0.751, 0.501, 0.251, 0.001, 0.0]
    )
    with pytest.raises(UsageError, match=r"sample.spacing: found 'trailing' for Flow, expected 'linspace'"):
        task("flow", sampler="euler", steps=4, spacing="trailing")
    with pytest.raises(UsageError, match=r"sample.spacing: found 'trailng'; did you mean 'trailing'"):
        task(sampler="ddim", steps=4, spacing="trailng")


def test_stated_times_are_walked_as_they_are():
    """Karras et al. 2022, eq. 5, in sigma / alpha of a flow, as a config file would compute them."""
    ramp = np.linspace(0, 1, 6)
    sigmas = (80 ** (1 / 7) + ramp * (0.01 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    times = (*(sigmas / (1 + sigmas)).tolist(), 0.0)
    found = task("flow", sampler="heun", times=times)
    assert found.times == times and len(found.evaluations) == 11
    k = keys(4)
    x = draw_noise(k, 0, (2, 2, 1))
    ours, theirs = (
        run(gaussian_denoiser(FLOW), x, k)
        for run in (found.walk, lambda d, x, k: SAMPLERS["heun"](FLOW, d, x, np.array(times), k))
    )
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "times,message",
    [
        ((1.0, 0.5, 0.5, 0.0), "sample.times: found .* expected at least 2 falling numbers from at most 1 to 0"),
        ((0.2, 0.5, 0.0), "sample.times: found .* falling"),
        ((1.5, 0.5, 0.0), "sample.times: found .* from at most 1 to 0"),
        ((0.5, -0.1), "sample.times: found .* to 0"),
        ((0.0,), "sample.times: found .* at least 2"),
        (("a", 0.0), "sample.times: found"),
        ((0.5, 0.5001, 0.0)[::-1], "sample.times: found"),
    ],
)
def test_times_that_cannot_be(times, message):
    with pytest.raises(UsageError, match=message):
        SampleConfig(times=times)


def test_stated_times_exclude_steps_and_spacing():
    for name, value in (("steps", 10), ("spacing", "leading")):
        with pytest.raises(UsageError, match=f"sample.{name}: found {value!r}, expected .* beside sample.times"):
            SampleConfig(times=(1.0, 0.0), **{name: value})
    assert SampleConfig(times=(1.0, 0.0), steps=1).times == (1.0, 0.0)
    with pytest.raises(UsageError, match="two of them are one step of the chain"):
        task(sampler="ddim", times=(1.0, 0.5001, 0.5, 0.0))


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "ddim"])
def test_one_step_is_one_euler_step(sampler):
    k = keys(4)
    x, one = draw_noise(k, 0, (2, 2, 1)), FLOW.times(1)
    found = SAMPLERS[sampler](FLOW, gaussian_denoiser(FLOW), x, one, k)
    np.testing.assert_allclose(found, SAMPLERS["euler"](FLOW, gaussian_denoiser(FLOW), x, one, k), atol=1e-6)
    assert len(SAMPLERS[sampler].evaluations(one)) == 1


def test_a_model_without_a_null_class_is_sampled_at_guidance_1():
    assert task(dropout=0.0, guidance=1.0).times[0] == 1.0
    with pytest.raises(UsageError, match=r"sample.guidance: found 2.0, expected 1: this model has no null class"):
        task(dropout=0.0, guidance=2.0)


def test_flow_noises_in_a_straight_line():
    x, eps = jax.random.normal(jax.random.key(0), (2, 3, 2, 2, 1))
    np.testing.assert_array_equal(FLOW.noise(x, jnp.zeros(3), eps), x)
    np.testing.assert_array_equal(FLOW.noise(x, jnp.ones(3), eps), eps)
    loss, _ = velocity(FLOW, lambda x_t, t: eps - x, x, jnp.full(3, 0.3), eps)
    np.testing.assert_array_equal(loss, np.zeros(3))


def test_logit_normal_times():
    u = (jnp.arange(4000) + 0.5) / 4000
    t = np.asarray(Flow("logit_normal", 0.5, 0.8).time(u), np.float64)
    logits = np.log(t / (1 - t))
    assert logits.mean() == pytest.approx(0.5, abs=2e-3) and logits.std() == pytest.approx(0.8, abs=2e-3)


def numpy_variational_term(x, eps, eps_hat, v, step):
    """An independent float64 derivation for the linear chain: KL(q(x_{k-1} | x_k, x_0) || p), or the decoder's NLL, in bits."""
    beta = np.linspace(1e-4, 2e-2, 1000)
    bar = np.cumprod(1 - beta)
    previous = bar[step - 1] if step else 1.0
    x_t = np.sqrt(bar[step]) * x + np.sqrt(1 - bar[step]) * eps
    x0_hat = (x_t - np.sqrt(1 - bar[step]) * eps_hat) / np.sqrt(bar[step])

    def posterior_mean(x0):
        return (np.sqrt(previous) * beta[step] * x0 + np.sqrt(1 - beta[step]) * (1 - previous) * x_t) / (1 - bar[step])

    def small(k):
        return beta[k] * (1 - bar[k - 1]) / (1 - bar[k])

    low = small(max(step, 1))
    variance = np.exp((v + 1) / 2 * np.log(beta[step]) + (1 - (v + 1) / 2) * np.log(low))
    mean, mean_hat = posterior_mean(x), posterior_mean(x0_hat)
    if step == 0:
        sd = np.sqrt(variance)
        upper = np.where(x > 0.999, 1.0, stats.norm.cdf((x + 1 / 255 - mean_hat) / sd))
        lower = np.where(x < -0.999, 0.0, stats.norm.cdf((x - 1 / 255 - mean_hat) / sd))
        return -np.log(np.maximum(upper - lower, 1e-12)).mean() / np.log(2)
    kl = 0.5 * (np.log(variance / low) + low / variance + (mean - mean_hat) ** 2 / variance - 1)
    return kl.mean() / np.log(2)


@pytest.mark.parametrize("step", [0, 1, 2, 100, 500, 999])
def test_hybrid_loss_against_a_numpy_derivation(step):
    rng = np.random.default_rng(step)
    x = np.clip(rng.normal(size=(2, 4, 4, 3)), -1, 1)
    eps, eps_hat, v = rng.normal(size=(3, 2, 4, 4, 3))
    eps_hat, v = eps + 0.3 * (eps_hat - eps), np.tanh(v)
    out = jnp.asarray(np.concatenate([eps_hat, v], axis=-1), jnp.float32)
    t = jnp.full(2, (step + 1) / 1000)
    loss, parts = noise_prediction(DDPM(), lambda x_t, t: out, *(jnp.asarray(a, jnp.float32) for a in (x, t, eps)))
    for i in range(2):
        expected = numpy_variational_term(x[i], eps[i], eps_hat[i], v[i], step)
        assert float(parts["vb"][i]) == pytest.approx(expected, rel=2e-3, abs=1e-5)
        assert float(parts["mse"][i]) == pytest.approx(np.square(eps_hat[i] - eps[i]).mean(), rel=1e-4)
    np.testing.assert_allclose(loss, parts["mse"] + parts["vb"], rtol=1e-6)


def test_variational_term_trains_the_variance_only():
    x, eps = jax.random.normal(jax.random.key(0), (2, 2, 4, 4, 3))

    def vb(out):
        return noise_prediction(DDPM(), lambda x_t, t: out, x, jnp.array([0.2, 0.7]), eps)[1]["vb"].sum()

    gradient = np.asarray(jax.grad(vb)(0.1 * jnp.ones((2, 4, 4, 6))))
    assert not np.any(gradient[..., :3]) and np.abs(gradient[..., 3:]).min() > 0


def test_discretised_likelihood_sums_to_one():
    levels = jnp.linspace(-1.0, 1.0, 256)
    log_p = discretised_log_likelihood(levels, jnp.full(256, 0.2), jnp.full(256, np.log(0.05)))
    assert np.exp(np.asarray(log_p, np.float64)).sum() == pytest.approx(1.0, abs=1e-4)


def test_learned_variance_lies_between_its_bounds():
    """Share 0 is the posterior's variance, share 1 is beta, and a share of one half gives noise in between."""
    process = DDPM()
    k = keys(4)
    x = draw_noise(k, 0, (2, 2, 1))
    times = process.times(1000)[:3]

    def walk(v):
        return np.asarray(
            SAMPLERS["ddpm"](process, lambda x, t: jnp.concatenate([x, v * jnp.ones_like(x)], -1), x, times, k)
        )

    small, large, half = walk(-1.0), walk(1.0), walk(0.0)
    assert np.abs(large - small).max() > 0
    assert np.all((np.minimum(small, large) - 1e-6 <= half) & (half <= np.maximum(small, large) + 1e-6))


def test_make_process_follows_the_config():
    assert make_process(DiffusionConfig(process="flow", time_law="logit_normal"), False) == Flow("logit_normal")
    assert make_process(DiffusionConfig(schedule="cosine", timesteps=100), True) == DDPM("cosine", 100, True)
