"""Loss and gradients of the objectives of few steps, against PyTorch written from the papers, on the same weights and draws.

Sun et al. 2025 (arXiv 2505.07447), Geng et al. 2025 (2505.13447) and its decoupled form (2510.24474), Salimans & Ho 2022 (2202.00512),
Meng et al. 2023 (2210.03142). The derivative of a flow map is the vector-Jacobian product of a vector-Jacobian product there.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.bench import peer as peers
from dit_jax.bind import bind
from dit_jax.config import Config, DiffusionConfig, ModelConfig, ObjectiveConfig, TrainConfig
from dit_jax.devices.numerics import random_key
from dit_jax.diffusion.objective import make_objective
from dit_jax.models import dit
from dit_jax.training.step import gradients

from .test_torch_dit import FILE, TOLERANCE, relative

SCALE = 0.03
MODEL = dict(
    depth=3, width=48, heads=3, patch=2, input_size=8, channels=3, classes=10, learn_sigma=False, time_scale=SCALE
)
CASES = {
    "consistency": ("", ObjectiveConfig("consistency")),
    "consistency of a guided teacher": ("", ObjectiveConfig("consistency", guidance=2.5, adaptive=0.0)),
    "flow map": ("later", ObjectiveConfig("mean_flow", ratio=0.7)),
    "flow map of two times in every block": ("all", ObjectiveConfig("mean_flow", ratio=0.7)),
    "guided flow map of two times": ("all", ObjectiveConfig("mean_flow", ratio=0.7, guidance=1.5, adaptive=0.5)),
    "guided flow map": ("later", ObjectiveConfig("mean_flow", ratio=0.7, guidance=1.5, adaptive=0.5)),
    "halving": ("", ObjectiveConfig("progressive", steps=2, rounds=2, round_steps=2)),
    "guidance": ("", ObjectiveConfig("progressive", guidance=3.0, rounds=0)),
}


def random_weights(cfg, seed):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: dit.init(cfg, random_key(0)))
    size = lambda leaf: 0.5 / np.sqrt(leaf.shape[-2] if leaf.ndim > 1 else 1)  # noqa: E731
    return jax.tree.map(lambda leaf: (rng.standard_normal(leaf.shape) * size(leaf)).astype(np.float32), shapes)


def target_embedding(torch, peer, cfg, params):
    """The two layers that embed r where every block is given t and r (Geng et al. 2025, section 4.3), with our weights."""
    layers = [peer.Linear(256, cfg.width), peer.Linear(cfg.width, cfg.width)]
    with torch.no_grad():
        for layer, name in zip(layers, ("fc1", "fc2"), strict=True):
            found = params["target_embedding"][name]
            layer.weight.copy_(torch.from_numpy(np.array(found["kernel"]).T))
            layer.bias.copy_(torch.from_numpy(np.array(found["bias"])))
    return layers


def network(torch, peer, cfg, model, embedding=()):
    """(x, t, r, labels) -> velocity: the peer's blocks, of which those after two thirds are given r; all, with an `embedding` of r."""
    side, p = cfg.input_size // cfg.patch, cfg.patch

    def conditions(t, r, labels):
        early, late = (model.condition(1000 * SCALE * time, labels) for time in (t, r))
        if not embedding:
            return early, late
        angles = (1000 * SCALE * r)[:, None] * model.frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        both = early + embedding[1](torch.nn.functional.silu(embedding[0](waves)))
        return both, both

    def forward(x, t, r, labels):
        b, channels = len(x), cfg.channels
        h = x.view(b, side, p, side, p, channels).transpose(2, 3).reshape(b, side * side, p * p * channels)
        early, late = conditions(t, r, labels)
        h = model.patches(h) + model.positions
        for i, block in enumerate(model.blocks):
            h = block(h, early if i < 2 * cfg.depth // 3 else late)
        shift, scale = model.modulation(torch.nn.functional.silu(late)).chunk(2, dim=-1)
        h = model.out(peer.modulated(h, shift, scale))
        return h.view(b, side, side, p, p, channels).transpose(2, 3).reshape(x.shape)

    return forward


def derivative(torch, f, x, t, v):
    """Derivative of f(x, t) along (v, 1), by two reverse passes."""
    x, t = (a.detach().requires_grad_() for a in (x, t))
    out = f(x, t)
    dummy = torch.zeros_like(out, requires_grad=True)
    pulled = torch.autograd.grad(out, (x, t), dummy, create_graph=True)
    product = (pulled[0] * v).sum() + pulled[1].sum()
    return torch.autograd.grad(product, dummy)[0].detach()


def expected_losses(torch, name, how, student, teacher, points):
    """Losses (b,), as the papers define them."""
    x, eps, labels, t = (points[key] for key in ("x", "eps", "label", "t"))
    null, wide = torch.full_like(labels, 10), lambda t: t[:, None, None, None]

    def mean(squares):
        return squares.mean(dim=(1, 2, 3))

    def weighted(error):
        return error * (error + 1e-3).detach() ** -how.adaptive

    def guided(z, t):
        plain, free = teacher(z, t, t, labels), teacher(z, t, t, null)
        return (how.guidance * plain + (1 - how.guidance) * free).detach()

    if name == "progressive" and how.rounds:
        count = how.steps * 2 ** (how.rounds - 1)
        t = (torch.floor(points["u"] * count) + 1) / count
        z = (1 - wide(t)) * x + wide(t) * eps
        half = 0.5 / count
        with torch.no_grad():
            middle = z - half * teacher(z, t, t, labels)
            end = middle - half * teacher(middle, t - half, t - half, labels)
        return mean((student(z, t, t, labels) - (z - end) * count) ** 2)
    z = (1 - wide(t)) * x + wide(t) * eps
    if name == "progressive":
        return mean((student(z, t, t, labels) - guided(z, t)) ** 2)
    v = eps - x
    if name == "consistency":
        v = guided(z, t) if how.guidance != 1 else v
        ends = []
        for time in (torch.clamp(t + 0.005, max=1.0), torch.clamp(t - 0.005, min=0.0)):
            at = z + wide(time - t) * v
            ends.append((time, at - wide(time) * student(at, time, time, labels).detach()))
        (a, ahead), (b, behind) = ends
        out, slope = student(z, t, t, labels), (ahead - behind) / wide(a - b)
        slope = torch.clamp(slope, -1, 1) if how.guidance != 1 else slope
        return weighted(mean((out - (out + slope).detach()) ** 2))
    r = points["r"]
    if how.guidance != 1:
        v = how.guidance * v + (1 - how.guidance) * student(z, t, t, null).detach()
    slope = derivative(torch, lambda z, t: student(z, t, r, labels), z, t, v)
    return weighted(mean((student(z, t, r, labels) - (v - wide(t - r) * slope)) ** 2))


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_the_papers(torch, case):
    target, how = CASES[case]
    cfg = Config(
        ModelConfig(**MODEL, target=target),
        DiffusionConfig(process="flow"),
        train=TrainConfig(cond_dropout=0.3),
        objective=how,
    )
    peer, model, objective = peers.load(FILE), bind(cfg.model), make_objective(cfg)
    params, taught = (random_weights(cfg.model, seed) for seed in (0, 1))
    rng = np.random.default_rng(2)
    images = np.clip(rng.standard_normal((6, 8, 8, 3)), -1, 1).astype(np.float32)
    data = {"image": jnp.asarray(images), "cond": {"label": jnp.asarray(rng.integers(10, size=6), jnp.int32)}}
    points = objective.draw(model, random_key(3), data)
    extras = objective.init_extras(taught)
    (loss, _), grads = jax.jit(lambda p, e, x: gradients(objective, model, p, e, x))(params, extras, points)

    flat = {**{key: value for key, value in points.items() if key != "cond"}, "label": points["cond"]["label"]}
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in flat.items()}
    tensors["label"] = tensors["label"].long()
    theirs = peer.make_model(cfg.model, params, "cpu")
    embedding = target_embedding(torch, peer, cfg.model, params) if target == "all" else ()
    student = network(torch, peer, cfg.model, theirs, embedding)
    teacher = network(torch, peer, cfg.model, peer.make_model(cfg.model, taught, "cpu"))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = expected_losses(torch, how.name, how, student, teacher, tensors).mean()
        expected.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=TOLERANCE)
    for name, ours, weight in peer.matched(theirs, grads):
        assert relative(ours, weight.grad.numpy()) < TOLERANCE, name
    for name, layer in zip(("fc1", "fc2"), embedding, strict=False):
        ours = grads["target_embedding"][name]
        assert np.abs(ours["kernel"]).max() > 0
        assert relative(ours["kernel"], layer.weight.grad.numpy().T) < TOLERANCE, name
        assert relative(ours["bias"], layer.bias.grad.numpy()) < TOLERANCE, name
