"""Objectives for sampling in few steps: what they converge to, what they keep, what they cost, and what is refused."""

import contextlib
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import trained_on_meshes
from test_diffusion import MEAN, STD, exact_map
from test_init import weights_of
from test_seams import SMALL, batch

from dit_jax import checkpoint, flops
from dit_jax.bind import bind
from dit_jax.config import Config, DiffusionConfig, ModelConfig, ObjectiveConfig, OptimConfig, SampleConfig, TrainConfig
from dit_jax.devices.mesh import make_mesh
from dit_jax.devices.numerics import random_key
from dit_jax.diffusion.objective import make_objective
from dit_jax.diffusion.process import Flow, denoiser
from dit_jax.diffusion.samplers import SAMPLERS, draw_noise
from dit_jax.diffusion.task import make_task
from dit_jax.error import UsageError
from dit_jax.evaluation.protocol import check_config, make_record
from dit_jax.models.kernels import gelu, softmax_attention
from dit_jax.models.warm_start import NEW, WarmStart
from dit_jax.sampling.draw import image_flops, open_sampling
from dit_jax.training import loop
from dit_jax.training.init import check_taught, check_teacher
from dit_jax.training.state import make_state
from dit_jax.training.step import gradients, make_train_step, train_step

OBJECTIVES = {
    "consistency": ("", ObjectiveConfig("consistency", guidance=2.0), "consistency"),
    "mean_flow": ("later", ObjectiveConfig("mean_flow", guidance=2.0, ratio=0.5), "flow_map"),
    "mean_flow_all": ("all", ObjectiveConfig("mean_flow", guidance=2.0, ratio=0.5), "flow_map"),
    "progressive": ("", ObjectiveConfig("progressive", rounds=2, steps=1, round_steps=2), "euler"),
    "guidance": ("", ObjectiveConfig("progressive", rounds=0, guidance=2.0), "euler"),
}


def student(kind, cfg=SMALL, **model):
    """A config with one of OBJECTIVES and its sampler."""
    target, objective, sampler = OBJECTIVES[kind]
    changes = dict(objective=objective, sample=SampleConfig(sampler=sampler, steps=2))
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, target=target, **model), **changes)


def with_(cfg, **groups):
    return dataclasses.replace(
        cfg, **{name: dataclasses.replace(getattr(cfg, name), **changes) for name, changes in groups.items()}
    )


def test_forward_mode_passes_the_kernels():
    """As of JAX's own operations; attention with a mask, and with fewer keys than queries."""
    h, dh = jax.random.normal(jax.random.key(0), (2, 64)) * 3
    ours, theirs = (jax.jvp(f, (h,), (dh,))[1] for f in (gelu, lambda x: jax.nn.gelu(x, approximate=True)))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    shapes = [(2, 9, 4, 16), (2, 5, 4, 16), (2, 5, 4, 16)] * 2
    q, k, v, *tangents = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    mask = jnp.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]], bool)
    for there in (None, mask):
        plain = functools.partial(jax.nn.dot_product_attention, mask=None if there is None else there[:, None, None])
        ours = jax.jvp(lambda q, k, v, m=there: softmax_attention(q, k, v, m), (q, k, v), tuple(tangents))
        for found, expected in zip(ours, jax.jvp(plain, (q, k, v), tuple(tangents)), strict=True):
            np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("target", [pytest.param("all", marks=pytest.mark.slow), "later"])
def test_forward_mode_passes_scan_and_remat(target):
    """The derivative along (x, t) is the same with and without remat, and that of a difference in x and small t."""
    cfg = dataclasses.replace(SMALL.model, depth=3, target=target)
    params, r = weights_of(cfg), jnp.array([100.0, 5.0])
    x, v = jax.random.normal(random_key(0), (2, 2, 8, 8, 1))
    t, cond = jnp.array([800.0, 10.0]), {"label": jnp.array([1, 10])}

    def derivative(remat):
        model = bind(dataclasses.replace(cfg, remat=remat))
        f = lambda x, t: model.apply(params, x, t, cond, r)  # noqa: E731
        return f, jax.jit(lambda: jax.jvp(f, (x, t), (v, jnp.full(2, 1000.0))))()[1]

    f, expected = derivative("none")
    for remat in ("dots", "full"):
        np.testing.assert_allclose(derivative(remat)[1], expected, rtol=1e-4, atol=1e-3)
    ahead, behind = (jax.jit(f)(x + h * v, t + 1000 * h) for h in (2e-5, -2e-5))
    np.testing.assert_allclose((ahead - behind) / 4e-5, expected, rtol=0, atol=0.02 * np.abs(expected).max())


def test_mean_flow_with_r_equal_t_is_the_flow_loss_bit_for_bit():
    """Also the draws of a step of training: of the model whose later blocks read r, from the same weights."""
    plain = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, depth=3))
    few = ObjectiveConfig("mean_flow", ratio=0.0, adaptive=0.0)
    mapped = dataclasses.replace(plain, model=dataclasses.replace(plain.model, target="later"), objective=few)
    params, data, found = weights_of(plain.model), jax.tree.map(jnp.asarray, batch(plain, label=10)), []
    state = dataclasses.replace(make_state(plain, make_mesh(plain.mesh, jax.devices()[:1])), params=params)
    for cfg in (plain, mapped):
        found.append(jax.jit(lambda state, data, cfg=cfg: train_step(cfg, bind(cfg.model), state, data))(state, data))
    assert found[0][1]["loss"] == found[1][1]["loss"]
    assert float(found[1][1]["grad_norm"]) == pytest.approx(
        float(found[0][1]["grad_norm"]), rel=1e-6
    )  # of two paths' sum
    objective = make_objective(dataclasses.replace(mapped, objective=dataclasses.replace(few, ratio=1.0)))
    points = jax.jit(lambda: objective.draw(bind(mapped.model), random_key(0), data))()
    assert (points["r"] < points["t"]).all()
    points = {**points, "r": points["t"]}
    same, expected = (
        jax.jit(lambda points, o=o, model=bind(cfg.model): o.losses(model, params, {}, points)[0])(points)
        for o, cfg in ((objective, mapped), (make_objective(plain), plain))
    )
    np.testing.assert_array_equal(same, expected)


def test_an_embedding_of_the_target_time_begins_without_effect():
    old, new = SMALL.model, dataclasses.replace(SMALL.model, target="all")
    weights, fresh = weights_of(old), bind(new).init(random_key(0))
    start = WarmStart(old, new, tuple(range(10)))
    kinds = start.kinds(fresh, weights)
    assert {name.split("/")[0] for name, kind in kinds.items() if kind == NEW} == {"target_embedding"}
    x, t, cond = jax.random.normal(random_key(0), (2, 8, 8, 1)), jnp.array([900.0, 20.0]), {"label": jnp.arange(2)}
    begun = bind(new).apply(start.begin(fresh, weights), x, t, cond, jnp.zeros(2))
    np.testing.assert_allclose(begun, bind(old).apply(weights, x, t, cond), atol=1e-6)


# One pixel of two channels is a point of the plane: the model is an MLP.
POINT = ModelConfig(2, 32, 2, 1, 1, channels=2, classes=0, learn_sigma=False, time_scale=0.003)


def trained(kind, images, steps, width=32):
    """(EMA, config) of a student of points `images(key) -> (b, 1, 1, 2)`, without a teacher.

    The adaptive weight is off: of two numbers, it would turn the mean velocity into a kind of median.
    """
    target, objective, sampler = OBJECTIVES[kind]
    objective = dataclasses.replace(objective, guidance=1.0, adaptive=0.0)
    cfg = Config(
        dataclasses.replace(POINT, target=target, width=width),
        DiffusionConfig(process="flow"),
        optim=OptimConfig(2e-3, "cosine", clip=1.0, ema="power", ema_width=0.1),
        train=TrainConfig(steps=steps, batch_size=256),
        sample=SampleConfig(sampler=sampler, steps=1),
        objective=objective,
    )
    mesh = make_mesh(cfg.mesh, jax.devices()[:1])

    @jax.jit
    def run(state):
        def step(state, i):
            data = {"image": images(jax.random.fold_in(random_key(5), i)), "cond": {}}
            return train_step(cfg, bind(cfg.model), state, data)[0], None

        return jax.lax.scan(step, state, jnp.arange(steps))[0]

    return run(make_state(cfg, mesh)).ema, cfg


def map_error(params, cfg, exact):
    """Root mean square distance of the one-step map from the exact one, x_1 -> x_0."""
    keys = jax.vmap(lambda i: jax.random.fold_in(random_key(9), i))(jnp.arange(512))
    noise, sampler, model = draw_noise(keys, 0, (1, 1, 2)), SAMPLERS[cfg.sample.sampler], bind(cfg.model)
    denoise = denoiser(Flow(), lambda x, t, *target: model.apply(params, x, t, {}, *target))
    found = jax.jit(lambda x: sampler(Flow(), denoise, x, Flow().times(1), keys))(noise)
    return float(jnp.sqrt(jnp.square(found - exact(noise)).sum(axis=-1).mean()))


def gaussian(key):
    return MEAN + STD * jax.random.normal(key, (256, 1, 1, 2))


def gaussian_exact(x):
    return exact_map(x, jnp.ones(len(x)), jnp.zeros(len(x)))


CENTRES, SPREAD = np.array([[-0.8, 0.4], [0.8, 0.4], [0.0, -0.8]]), 0.2


def mixture(key):
    which, noise = jax.random.split(key)
    centre = jnp.asarray(CENTRES, jnp.float32)[jax.random.randint(which, (256,), 0, 3)]
    return (centre + SPREAD * jax.random.normal(noise, (256, 2)))[:, None, None]


def mixture_exact(x, steps=400):
    """The flow of three Gaussians, whose velocity has a closed form, by RK4 in float64."""

    def slope(x, t):
        alpha, variance = 1 - t, ((1 - t) * SPREAD) ** 2 + t**2
        away = x[:, None] - alpha * CENTRES[None]
        logits = -(away**2).sum(-1, keepdims=True) / (2 * variance)
        share = np.exp(logits - logits.max(axis=1, keepdims=True))
        share = share / share.sum(axis=1, keepdims=True)
        eps = t * away / variance
        x0 = CENTRES[None] + alpha * SPREAD**2 * away / variance
        return (share * (eps - x0)).sum(axis=1)

    at, h = np.asarray(x, np.float64)[:, 0, 0], -1 / steps
    for t in 1 + h * np.arange(steps):
        a = slope(at, t)
        b = slope(at + h / 2 * a, t + h / 2)
        c = slope(at + h / 2 * b, t + h / 2)
        at = at + h / 6 * (a + 2 * b + 2 * c + slope(at + h * c, t + h))
    return at[:, None, None]


@pytest.mark.parametrize(
    "kind, steps, most",
    [
        *(pytest.param(k, 600, 0.12, marks=pytest.mark.slow) for k in ("consistency", "mean_flow", "mean_flow_all")),
        ("mean_flow", 300, 0.2),
    ],
)
def test_it_approaches_the_exact_map_of_a_gaussian(kind, steps, most):
    """From 0.9 of a network that gives zero."""
    assert map_error(*trained(kind, gaussian, steps), gaussian_exact) < most


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["consistency", "mean_flow"])
def test_the_error_falls_with_width_and_steps_on_a_mixture(kind, capsys):
    table = {
        (width, steps): map_error(*trained(kind, mixture, steps, width), mixture_exact)
        for width in (4, 16, 64)
        for steps in (300, 1000, 3000)
    }
    with capsys.disabled():
        print(f"\n{kind}: distance from the exact map, by width and steps")
        for (width, steps), error in table.items():
            print(f"  width {width:3}  {steps:5} steps  {error:.4f}")
    for width in (16, 64):
        assert table[width, 3000] < table[width, 1000] < table[width, 300]
        assert table[width, 3000] < min(0.25, 0.7 * table[4, 3000])


def linear(count):
    """A model without weights but a factor for each of `count` times k / count: its velocity is factor x."""

    def apply(params, x, t, cond):
        return params[jnp.round(t / 1000 * count).astype(int) - 1][:, None, None, None] * x

    return types.SimpleNamespace(apply=apply, drop=lambda key, cond, rate: cond)


def test_progressive_distillation_finds_two_steps_of_a_linear_teacher():
    """x <- (1 + (s - t) f(t)) x twice; the student's factor does both at once, its loss is zero there and its gradient elsewhere exact."""
    cfg = student("progressive")
    cfg = with_(cfg, objective={"steps": 4, "rounds": 1})
    objective, model = make_objective(cfg), linear(8)
    teacher = jnp.linspace(0.3, 1.7, 8)
    extras = objective.init_extras(teacher)
    assert extras["steps"] == 4
    points = objective.draw(model, random_key(0), {"image": jnp.asarray(batch(cfg)["image"]), "cond": {}})
    pairs = np.asarray(teacher).reshape(4, 2)
    two = (1 - pairs[:, 1] / 8) * (1 - pairs[:, 0] / 8)
    best = jnp.repeat(jnp.asarray((1 - two) * 4, jnp.float32), 2)  # the student's times are every second one

    def loss(params):
        return objective.losses(model, params, extras, points)[0].mean()

    assert loss(best) < 1e-12 < 1e-3 < loss(teacher)
    found = teacher
    follow = jax.jit(lambda params: params - 2.0 * jax.grad(loss)(params))
    for _ in range(300):
        found = follow(found)
    np.testing.assert_allclose(found[1::2], best[1::2], atol=1e-3)
    np.testing.assert_array_equal(found[::2], teacher[::2])


def test_the_teacher_is_replaced_at_each_halving():
    cfg = student("progressive")
    groups = {"objective": {"rounds": 3, "steps": 2}, "train": {"steps": 8}}
    objective = make_objective(with_(cfg, **groups))
    extras, seen = objective.init_extras({"w": jnp.float32(-1)}), []
    for step in range(8):
        extras = objective.update_extras(extras, {"w": jnp.float32(step)}, step)
        seen.append((int(extras["steps"]), float(extras["teacher"]["w"])))
    assert seen == [(8, -1), (4, 1), (4, 1), (2, 3), (2, 3), (2, 3), (2, 3), (2, 3)]


def test_a_guided_teacher_is_matched_where_guidance_is_distilled():
    """Loss zero if the student has the teacher's guided velocity: here both ignore the condition."""
    cfg = student("guidance")
    objective, model = make_objective(cfg), bind(cfg.model)
    params = weights_of(cfg.model)
    table = params["label_embedding"]["table"]["embedding"]
    data = jax.tree.map(jnp.asarray, batch(cfg, label=10))
    points = jax.jit(lambda: objective.draw(model, random_key(0), data))()
    losses = jax.jit(lambda params: objective.losses(model, params, objective.init_extras(params), points)[0])
    assert losses(params).mean() > 1e-4
    params["label_embedding"]["table"]["embedding"] = jnp.zeros_like(table)
    np.testing.assert_allclose(losses(params), 0, atol=1e-9)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_flops_match_the_compiler(kind):
    """On an unrolled model, as in test_flops; there XLA computes the values that the tangents share with the forward pass once."""
    cfg = student(kind, depth=2, width=256, heads=4, input_size=16, channels=4, unroll=2)
    model, objective = bind(cfg.model), make_objective(cfg)
    params = jax.eval_shape(lambda: model.init(random_key(0)))
    extras = jax.eval_shape(objective.init_extras, params)
    data = {"image": jnp.zeros((1, 16, 16, 4)), "cond": {"label": jnp.zeros(1, jnp.int32)}}
    points = jax.eval_shape(lambda: objective.draw(model, random_key(0), data))
    program = jax.jit(lambda *a: gradients(objective, model, *a)).lower(params, extras, points).compile()
    assert 1.0 < program.cost_analysis()["flops"] / objective.flops() < 1.03


def test_flops_of_sampling_and_of_a_record(tmp_path):
    few = student("mean_flow")
    forward = flops.forward_flops(few.model)
    assert forward == flops.forward_flops(SMALL.model) + 2 * (256 * 16 + 16 * 16)
    assert open_sampling(few, make_mesh(few.mesh)).flops == 2 * forward
    (tmp_path / "init.json").write_text(
        '{"source": "s", "run": "r", "step": 4, "flops_train": 77, "weights_sha256": "", "rows": []}'
    )
    cfg = student("consistency")
    record = make_record(cfg, str(tmp_path), 3, "", {}, {"samples": {}}, {}, {})
    assert record["flops_train"] == 3 * 16 * 7 * flops.forward_flops(cfg.model) and record["init"]["flops_train"] == 77
    assert image_flops(cfg) == 2 * record["flops_image"]


def begun(cfg, mesh):
    """A state from weights without zeros, so that a teacher guides."""
    return make_state(cfg, mesh, lambda fresh, weights: weights, weights_of(cfg.model))


@pytest.mark.slow
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_meshes_train_as_one_device_does(kind):
    cfg = student(kind, width=32, heads=4)
    state = trained_on_meshes(cfg, batch(cfg, label=10))
    if kind == "progressive":
        assert int(state.extras["steps"]) == 1
        leaves = [tree["blocks"]["mlp"]["fc1"]["kernel"] for tree in (state.extras["teacher"], state.params)]
        assert leaves[0].sharding == leaves[1].sharding


@pytest.mark.slow
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_eight_devices_repeat_their_bits_and_draw_those_of_one(kind):
    """As for any training: the same bits on the same mesh, the losses of one device to 1e-5, and images that depend on no mesh."""
    cfg, found = student(kind), {}
    data = batch(cfg, label=10)
    for name, count in (("one", 1), ("eight", 8), ("again", 8)):
        mesh = make_mesh(cfg.mesh, jax.devices()[:count])
        state, step, losses = begun(cfg, mesh), make_train_step(cfg, mesh), []
        for _ in range(3):
            state, scalars = step(state, data)
            losses.append(float(scalars["loss"]))
        found[name] = losses, jax.device_get(state.items())
    jax.tree.map(np.testing.assert_array_equal, found["again"], found["eight"])
    np.testing.assert_allclose(found["eight"][0], found["one"][0], rtol=1e-5)
    images = [
        np.concatenate([images for images, _ in open_sampling(cfg, mesh).images(found["one"][1]["ema"], 3, 40)])
        for mesh in (make_mesh(cfg.mesh, jax.devices()[:count]) for count in (1, 8))
    ]
    assert images[0].std() > 1
    np.testing.assert_array_equal(*images)


@pytest.mark.parametrize(
    "kind", ["consistency", *(pytest.param(k, marks=pytest.mark.slow) for k in OBJECTIVES if k != "consistency")]
)
def test_what_a_student_keeps_is_restored_and_goes_on_with_the_same_bits(kind, tmp_path):
    cfg = student(kind)
    mesh = make_mesh(cfg.mesh, jax.devices()[:1])
    step, data = make_train_step(cfg, mesh), batch(cfg, label=10)
    state = begun(cfg, mesh)
    with contextlib.closing(checkpoint.Saver(str(tmp_path), 3)) as saver:
        for i in range(3):
            state, scalars = step(state, data)
            if i == 1:
                saver.save(2, state.items(), {}, {"model": {**dataclasses.asdict(cfg.model)}})
        saver.wait()
    like = begun(cfg, mesh)
    items, _ = checkpoint.restore(str(tmp_path), 2, like.items(), cfg.model)
    again, same = step(loop.restored_state(2, items, like), data)
    assert same["loss"] == scalars["loss"]
    jax.tree.map(np.testing.assert_array_equal, state.items(), again.items())
    assert ("extras" in items) == cfg.objective.taught


def refused(message, function, *arguments):
    with pytest.raises(UsageError, match=message):
        function(*arguments)


def test_samplers_of_other_models_are_refused():
    for kind, sampler in (
        ("consistency", "euler"),
        ("mean_flow", "consistency"),
        ("progressive", "heun"),
        ("guidance", "flow_map"),
    ):
        found = f"sample.sampler: found '{sampler}', expected one of .*: .* objective.name = '{student(kind).objective.name}'"
        refused(found, make_task, with_(student(kind), sample={"sampler": sampler}))
    refused(
        r"sample.sampler: found 'flow_map', expected one of .*loss of its process",
        make_task,
        with_(SMALL, sample={"sampler": "flow_map"}),
    )
    for kind in ("consistency", "mean_flow", "guidance"):
        inside = r"sample.guidance: found 1.5, expected 1: guidance is inside this model \(objective.guidance = 2\)"
        refused(inside, make_task, with_(student(kind), sample={"guidance": 1.5}))
    for name in ("likelihood", "vlb"):
        refused(
            f"eval.{name}: found True, .* no velocity", check_config, with_(student("consistency"), eval={name: True})
        )
    outside = with_(student("mean_flow"), objective={"guidance": 1.0}, sample={"guidance": 1.5})
    assert open_sampling(outside, make_mesh(outside.mesh)).flops == 4 * flops.forward_flops(outside.model)


def test_configs_that_cannot_be_are_refused():
    for message, groups in (
        (
            "diffusion.process: found 'ddpm', expected 'flow' with objective.name = 'consistency'",
            {"diffusion": {"process": "ddpm"}},
        ),
        ("objective.steps: found 0, expected at least 1", {"objective": {"steps": 0}}),
        (
            "objective.name: found 'meanflow', expected one of .*did you mean 'mean_flow'",
            {"objective": {"name": "meanflow"}},
        ),
        (
            "model.target: found '', expected 'later' or 'all' with objective.name = 'mean_flow'",
            {"objective": {"name": "mean_flow"}},
        ),
        (
            "objective.guidance: found 2.0, expected 1 with objective.rounds above 0",
            {"objective": {"name": "progressive"}},
        ),
        (
            "objective.guidance: found 1.0, expected .* with objective.rounds = 0",
            {"objective": {"name": "progressive", "rounds": 0, "guidance": 1.0}},
        ),
        (
            "train.steps: found 4, expected at least 3000, objective.rounds x",
            {"objective": {"name": "progressive", "guidance": 1.0}},
        ),
        (
            "objective.guidance: found 2, expected 1 without a trained null condition",
            {"objective": {"name": "mean_flow"}, "model": {"target": "all"}, "train": {"cond_dropout": 0.0}},
        ),
        ("model.target: found 'later', expected one of ", {"model": {"conditioning": "in_context", "target": "later"}}),
    ):
        refused(message, lambda groups=groups: with_(student("consistency"), **groups))


def test_teachers_of_another_kind_are_refused():
    cfg = student("consistency")
    for message, groups in (
        (
            "model.qk_norm: found False, expected True, as W has.* --config.model.qk_norm=True",
            {"model": {"qk_norm": True}},
        ),
        (
            "model.conditioning: found 'adaln_zero', expected 'in_context', as W",
            {"model": {"conditioning": "in_context"}},
        ),
        ("model.classes: found 10, expected 4, as W", {"model": {"classes": 4}}),
        (
            "^--init: W: diffusion.process: found 'ddpm', expected 'flow': .* begin with a run of diffusion.process = 'flow'",
            {"diffusion": {"process": "ddpm"}, "model": {"learn_sigma": True}},
        ),
        (r"autoencoder.scale: found \(0.18215,\), expected \(0.5,\), as W has", {"autoencoder": {"scale": (0.5,)}}),
        (r"autoencoder.shift: found .* --config.autoencoder.shift=\(1.0,\)", {"autoencoder": {"shift": (1.0,)}}),
        ("input.space: found 'pixels', expected 'latents', as W has.* give data.im", {"data": {"image_size": 64}}),
        ("diffusion.prediction: found 'velocity', expected 'x', as W", {"diffusion": {"prediction": "x"}}),
        ("objective.guidance: found 2, expected 1: W has no trained null class", {"train": {"cond_dropout": 0.0}}),
    ):
        refused(message, check_teacher, cfg, with_(SMALL, **groups), "W")
    refused(
        "--init: W: found objective.name = 'consistency', expected a run whose velocity",
        check_teacher,
        student("guidance"),
        cfg,
        "W",
    )
    refused(
        "objective.guidance: found 2, expected 1: guidance is inside W already",
        check_teacher,
        cfg,
        student("guidance"),
        "W",
    )
    check_teacher(student("progressive"), student("guidance"), "W")
    check_teacher(student("mean_flow"), SMALL, "W")
    check_teacher(student("mean_flow"), with_(SMALL, autoencoder={"scale": (0.5,)}), "W", typed=True)
    encoded = {"classes": 0, "conditioning": "adaln_cross", "text": "bert", "text_width": 64, "text_sha256": "a b"}
    command = with_(student("mean_flow"), model={**encoded, "text_width": 0, "text_sha256": ""})
    check_teacher(command, with_(SMALL, model=encoded), "W")  # which only a run that begins knows
    refused(
        "--init: found none, expected the run whose weights teach, --init=WORKDIR", check_taught, student("progressive")
    )
    check_taught(student("mean_flow"))
