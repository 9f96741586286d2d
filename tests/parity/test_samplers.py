"""Our samplers beside diffusers' schedulers: whole trajectories from the same noise, with the same toy network, in float32.

Each test says which settings correspond. What is compared is every input that the network gets, and the image at the end.
A chain's timestep k there is our time (k + 1) / T; a flow's timestep 1000 t there is our time t.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import guidance, schedule
from dit_jax.diffusion.process import DDPM, Flow
from dit_jax.diffusion.samplers import SAMPLERS, draw_noise

TOLERANCE = 1e-4
SHAPE = (4, 4, 3)
LINEAR = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
MIX = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32) / 2
CHAIN, LEARNED, FLOW = DDPM(learn_sigma=False), DDPM(), Flow()
SPACINGS = ("linspace", "leading", "trailing")


def network(x, t, tanh, mix):
    """x (b, h, w, 3), t in 0 to 1000 -> (b, h, w, columns of `mix`): bounded, not linear, the same in every framework."""
    return tanh(x @ mix + t / 1000 - 0.4)


def start(count=3):
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(5), i))(jnp.arange(count))
    return keys, np.array(draw_noise(keys, 0, SHAPE))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_rescaled_guidance(torch, share):
    """guidance_rescale of diffusers' pipelines, of the whole noise prediction."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    rng = np.random.default_rng(1)
    c, u = (rng.normal(size=(3, *SHAPE), scale=2.0).astype(np.float32) for _ in range(2))
    ours = guidance.guided(lambda x, t: (jnp.asarray(c), jnp.asarray(u)), 4.0, 3, share)(None, None)
    c, u = (torch.from_numpy(np.ascontiguousarray(a.transpose(0, 3, 1, 2))) for a in (c, u))
    theirs = rescale_noise_cfg(u + 4.0 * (c - u), c, guidance_rescale=share).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def columns(process):
    return MIX if isinstance(process, DDPM) and process.learn_sigma else MIX[:, :3]


def ours(sampler, process, times):
    """What the network saw, in order, and the image at the end."""
    seen, (keys, x), mix = [], start(), columns(process)

    def denoise(x, t):
        jax.debug.callback(lambda x: seen.append(np.array(x)), x, ordered=True)
        return network(x, process.model_time(t)[:, None, None, None], jnp.tanh, mix)

    end = jax.jit(lambda x: SAMPLERS[sampler](process, denoise, x, times, keys))(jnp.asarray(x))
    jax.effects_barrier()
    return [*seen, np.asarray(end)]


def theirs(torch, scheduler, process, scaled=False):
    """The same of a scheduler whose timesteps are set; `scaled` where it walks in x_t / alpha_t."""
    mix, seen = torch.from_numpy(columns(process).copy()), []
    x = torch.from_numpy(start()[1].transpose(0, 3, 1, 2).copy())
    x = x * (scheduler.sigmas[0] ** 2 + 1) ** 0.5 if scaled else x
    for t in scheduler.timesteps:
        # schedulers of flows have no such function: they scale nothing
        inputs = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        seen.append(inputs.permute(0, 2, 3, 1).numpy().copy())
        out = network(inputs.permute(0, 2, 3, 1), t, torch.tanh, mix).permute(0, 3, 1, 2)
        x = scheduler.step(out, t, x).prev_sample
    return [*seen, x.permute(0, 2, 3, 1).numpy()]


def assert_same(found, expected):
    assert len(found) == len(expected)
    errors = [np.abs(a - b).max() / max(1.0, np.abs(b).max()) for a, b in zip(found, expected, strict=True)]
    assert np.abs(expected[-1] - expected[0]).max() > 0.3  # it went somewhere
    print(f"{len(found)} images: {max(errors):.2e}")
    assert max(errors) <= TOLERANCE


@pytest.fixture
def same_noise(torch, monkeypatch, request):
    """diffusers' ancestral noise is ours: that of step i, in the order in which its steps ask for it; 0 in the step of the parameter."""
    from diffusers.schedulers import scheduling_ddpm

    keys, drawn, silent = start()[0], [], getattr(request, "param", 0)

    def draw(shape, **_):
        drawn.append(len(drawn) + 1)
        noise = np.array(draw_noise(keys, drawn[-1], SHAPE)).transpose(0, 3, 1, 2)
        assert noise.shape == tuple(shape)
        return torch.from_numpy(noise.copy()) * (len(drawn) != silent)

    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", draw)
    return drawn


@pytest.mark.parametrize("spacing", SPACINGS)
def test_respacings_are_those_of_the_same_name(diffusers, spacing):
    """DDPMScheduler's `timestep_spacing`, `steps_offset` 0. A single step of linspace is the noisiest here, the cleanest there."""
    peer = diffusers.DDPMScheduler(**LINEAR, timestep_spacing=spacing)
    compared = 0
    for count in range(2 if spacing == "linspace" else 1, 1001):
        peer.set_timesteps(count)
        theirs = peer.timesteps.numpy()
        if len(theirs) != count:  # one step too many, at -1: a sum of fractions that just misses 0
            assert spacing == "trailing" and theirs[-1] == -1
            theirs = theirs[:-1]
        np.testing.assert_array_equal(schedule.respace(1000, count, spacing), theirs, err_msg=str(count))
        compared += 1
    assert compared >= 999


@pytest.mark.parametrize("name,peer", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_schedules(diffusers, name, peer):
    """`beta_schedule`; diffusers' tables are float32."""
    bars = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule=peer)
    np.testing.assert_allclose(schedule.alpha_bars(name, 1000)[1:], bars.alphas_cumprod.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "spacing,steps,same_noise",
    [("linspace", 250, 0), ("linspace", 10, 0), ("leading", 25, 0), ("trailing", 25, 25)],
    indirect=["same_noise"],
)
@pytest.mark.parametrize("learned", [False, True], ids=["fixed_small", "learned_range"])
def test_ddpm(torch, diffusers, same_noise, spacing, steps, learned):
    """DDPMScheduler, `clip_sample=False`, `variance_type` fixed_small for a chain without learned variance, learned_range with.

    A difference: after `trailing`, whose last step is not 0, diffusers adds noise to the clean image too, of the variance 1e-20
    or, if learned, up to beta. Ours adds none to a clean image, and here that draw of its is 0.
    """
    kind = "learned_range" if learned else "fixed_small"
    peer = diffusers.DDPMScheduler(**LINEAR, variance_type=kind, clip_sample=False, timestep_spacing=spacing)
    peer.set_timesteps(steps)
    process = LEARNED if learned else CHAIN
    assert_same(ours("ddpm", process, process.times(steps, spacing)), theirs(torch, peer, process))
    assert len(same_noise) == steps - (spacing != "trailing")


def test_ddpm_on_the_cosine_schedule(torch, diffusers, same_noise):
    """DDPMScheduler, `beta_schedule="squaredcos_cap_v2"`."""
    peer = diffusers.DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2", clip_sample=False)
    peer.set_timesteps(40)
    process = DDPM("cosine", 1000, learn_sigma=False)
    assert_same(ours("ddpm", process, process.times(40, "leading")), theirs(torch, peer, process))


@pytest.mark.parametrize("spacing,steps", [("leading", 20), ("leading", 50), ("trailing", 20)])
def test_ddim(torch, diffusers, spacing, steps):
    """DDIMScheduler, eta 0, `clip_sample=False`, `set_alpha_to_one=True` (its defaults but for clipping).

    Its step leads from k to k - T // n whatever the spacing, so that with linspace it walks another grid than the one whose
    timesteps it hands out: there nothing corresponds.
    """
    peer = diffusers.DDIMScheduler(**LINEAR, clip_sample=False, set_alpha_to_one=True, timestep_spacing=spacing)
    peer.set_timesteps(steps)
    assert_same(ours("ddim", CHAIN, CHAIN.times(steps, spacing)), theirs(torch, peer, CHAIN))


@pytest.mark.parametrize("spacing,steps", [("linspace", 28), ("leading", 25), ("trailing", 25)])
@pytest.mark.parametrize("sampler,name", [("euler", "EulerDiscreteScheduler"), ("heun", "HeunDiscreteScheduler")])
def test_euler_and_heun_on_a_chain(torch, diffusers, sampler, name, spacing, steps):
    """EulerDiscreteScheduler and HeunDiscreteScheduler, walking in x_t / alpha_t from our noise / alpha_t.

    Their linspace does not round to steps of the chain: it is ours where (T - 1) / (n - 1) is whole.
    """
    peer = getattr(diffusers, name)(**LINEAR, timestep_spacing=spacing)
    peer.set_timesteps(steps)
    assert_same(ours(sampler, CHAIN, CHAIN.times(steps, spacing)), theirs(torch, peer, CHAIN, scaled=True))


@pytest.mark.parametrize("spacing,steps", [("trailing", 20), ("trailing", 10), ("linspace", 25), ("leading", 25)])
def test_dpmpp_2m_on_a_chain(torch, diffusers, spacing, steps):
    """DPMSolverMultistepScheduler with its defaults: dpmsolver++, order 2, midpoint, `final_sigmas_type="zero"`.

    Its trailing is ours; its linspace and leading are of n + 1 steps without the last, so ours are handed to it.
    """
    peer = diffusers.DPMSolverMultistepScheduler(**LINEAR, timestep_spacing=spacing)
    if spacing == "trailing":
        peer.set_timesteps(steps)
    else:
        peer.set_timesteps(timesteps=schedule.respace(1000, steps, spacing).tolist())
    assert_same(ours("dpmpp_2m", CHAIN, CHAIN.times(steps, spacing)), theirs(torch, peer, CHAIN))


@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_euler_and_ddim_on_a_flow(torch, diffusers, sampler):
    """FlowMatchEulerDiscreteScheduler with sigmas 1, 1 - 1/n, ..., 1/n, as its pipelines hand it; alone it ends at 0.001, then 0."""
    peer = diffusers.FlowMatchEulerDiscreteScheduler()
    peer.set_timesteps(sigmas=FLOW.times(30)[:-1].tolist())
    assert_same(ours(sampler, FLOW, FLOW.times(30)), theirs(torch, peer, FLOW))


def test_heun_on_a_flow(torch, diffusers):
    """FlowMatchHeunDiscreteScheduler, on its own grid: n equal steps from 1 to 0.001, then 0. It takes no other."""
    peer = diffusers.FlowMatchHeunDiscreteScheduler()
    peer.set_timesteps(20)
    times = np.append(np.linspace(1, 0.001, 20), 0.0)
    assert_same(ours("heun", FLOW, times), theirs(torch, peer, FLOW))


@pytest.mark.parametrize("own", [True, False], ids=["their grid", "our grid"])
def test_dpmpp_2m_on_a_flow(torch, diffusers, own):
    """DPMSolverMultistepScheduler, `use_flow_sigmas`, flow_prediction: its grid is ours times 0.999; ours begins at 1.

    A difference: the timesteps that it hands to the network are cut to whole numbers; here the network gets 1000 sigma.
    """
    peer = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    peer.set_timesteps(20)
    times = 0.999 * FLOW.times(20)
    if not own:
        times = FLOW.times(20)
        peer.sigmas = torch.tensor(times, dtype=torch.float32)
    peer.timesteps = 1000 * peer.sigmas[:-1]
    peer.set_begin_index(0)
    assert_same(ours("dpmpp_2m", FLOW, times), theirs(torch, peer, FLOW))


def in_numpy(step, times):
    """A walk in float64, with no code of the samplers'."""
    keys, x = start()
    x, seen = x.astype(np.float64), []
    for i, (t, s) in enumerate(itertools.pairwise(times), 1):
        seen.append(x)
        out = network(x, 1000 * t, np.tanh, MIX[:, :3].astype(np.float64))
        x = step(x, out, t, s, np.asarray(draw_noise(keys, i, SHAPE), np.float64))
    return [*seen, x]


def test_euler_maruyama_on_a_flow():
    """No scheduler corresponds. In NumPy: dx = (v - g^2 score / 2) dt + g dw back in time, g^2 = 2 t (Ma et al. 2024, eq. 4 and
    6), the score that of E[eps | x] = x + (1 - t) v; the last step without noise and score."""

    def step(x, v, t, s, noise):
        if s == 0:
            return x - t * v
        score = -(x + (1 - t) * v) / t
        return x + (s - t) * (v - t * score) + np.sqrt(2 * t * (t - s)) * noise

    assert_same(ours("euler_maruyama", FLOW, FLOW.times(30)), in_numpy(step, FLOW.times(30)))


def test_ddpm_on_a_flow():
    """No scheduler corresponds. In NumPy: x_s from the product of the Gaussians p(x_s | x_0) and p(x_t | x_s)."""

    def step(x, v, t, s, noise):
        x0 = x - t * v
        if s == 0:
            return x0
        ratio = (1 - t) / (1 - s)
        spread = t**2 - (ratio * s) ** 2
        precision = 1 / s**2 + ratio**2 / spread
        mean = ((1 - s) * x0 / s**2 + ratio * x / spread) / precision
        return mean + noise / np.sqrt(precision)

    assert_same(ours("ddpm", FLOW, FLOW.times(30)), in_numpy(step, FLOW.times(30)))
