"""Facts about the reuse of outputs of blocks between calls: the plan, what is computed, its cost, and the calibration of a checkpoint."""

import dataclasses
import itertools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from noised import weights

from dit_jax import flops
from dit_jax.config import Config, DiffusionConfig, MeshConfig, ModelConfig, ObjectiveConfig, SampleConfig, TrainConfig
from dit_jax.devices.mesh import make_mesh
from dit_jax.diffusion.reuse import computed, plan
from dit_jax.diffusion.task import make_task
from dit_jax.error import UsageError
from dit_jax.models import conditioning, dit
from dit_jax.preflight import hlo
from dit_jax.sampling import draw, reuse

TINY = dict(depth=3, width=16, heads=2, input_size=8, channels=1, classes=10, learn_sigma=False)
WORDS = dict(text="bytes", text_length=8)
KINDS = {"adaln_zero": {}, "in_context": {}, "adaln_cross": WORDS, "dual_stream": WORDS}
SLOW = [pytest.param(kind, {}, marks=pytest.mark.slow) for kind in ("adaln", "cross_attention")]


def settings(**sample):
    cfg = Config(model=ModelConfig(**TINY), diffusion=DiffusionConfig(process="flow"), train=TrainConfig(batch_size=16))
    sample = SampleConfig(**{"sampler": "euler", "steps": 5, "labels": "balanced"} | sample)
    return dataclasses.replace(cfg, sample=sample, data=dataclasses.replace(cfg.data, image_size=8))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def images(sampling, params, num=16):
    return np.concatenate([images for images, _ in sampling.images(params, 3, num)])


@pytest.mark.parametrize(("kind", "more"), [*KINDS.items(), *SLOW])
def test_what_is_not_fresh_is_not_computed(kind, more):
    """All fresh: the plain output. Nothing fresh: the kept outputs, whatever the weights of attention and MLP; the rest is of this call."""
    model = ModelConfig(**TINY, conditioning=kind, **more)
    params, t = weights(model), jnp.full(2, 300.0)
    x, cond = (
        jax.random.normal(jax.random.key(2), (2, 8, 8, 1)),
        jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), conditioning.example(model, 2)),
    )
    on = {part: jnp.ones(3, bool) for part in flops.part_macs(model)}
    off = {part: jnp.zeros(3, bool) for part in on}
    run = jax.jit(lambda *arguments: dit.apply_reusing(model, *arguments))
    plain = jax.jit(dit.apply, static_argnums=0)(model, params, x, t, cond)
    out, kept = run(params, x, t, cond, dit.kept_outputs(model, 2, 16), on)
    np.testing.assert_allclose(out, plain, atol=1e-5)
    again, still = run(params, x, t, cond, kept, off)
    np.testing.assert_allclose(again, plain, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, still, kept)
    wrong = jax.tree_util.tree_map_with_path(
        lambda path, w: jnp.nan * w if {"attention", "mlp", "cross_attention"} & {k.key for k in path} else w, params
    )
    np.testing.assert_allclose(run(wrong, x, t, cond, kept, off)[0], plain, atol=1e-5)
    assert not np.allclose(run(params, x + 1, t, cond, kept, off)[0], plain, atol=1e-3)


def test_an_output_is_reused_until_its_changes_sum_to_the_threshold():
    changes = np.array([[1.0], [0.2], [0.2], [0.2], [0.5], [0.1]])[:, :, None]
    found = computed(changes, np.array([True, False, False, False, False, False]), 0.45)[:, 0, 0]
    np.testing.assert_array_equal(found, [True, False, False, True, True, False])


@pytest.mark.parametrize("share", [0.9, 0.6, 0.3])
def test_a_plan_costs_its_share_and_reuses_what_changes_least(share):
    rng = np.random.default_rng(0)
    changes = rng.uniform(0.5, 1.5, (40, 6, 2)) * np.array([0.01, 0.02, 0.05, 0.1, 0.2, 0.4])[None, :, None]
    forced, cost = np.arange(40) % 20 == 0, np.outer(np.where(np.arange(40) < 20, 2, 1), [3, 8])
    fresh = plan(changes, forced, cost, share)
    spent = (fresh * cost[:, None]).sum() / (6 * cost.sum())
    assert fresh[forced].all() and share - 0.05 < spent <= share
    by_layer = fresh.mean(axis=(0, 2))
    assert (np.diff(by_layer) >= 0).all() and by_layer[0] < by_layer[-1]
    assert plan(changes, forced, cost, 1.0).all() and plan(changes, forced, cost, 0.0).sum() == 2 * 6 * 2


def test_a_plan_that_reuses_nothing_gives_the_same_bits(mesh):
    cfg = settings(guidance=2.0, reuse=0.999999)
    params, one = weights(cfg.model), draw.open_sampling(cfg, mesh)
    nothing = reuse.Plan({part: np.ones((5, 3), bool) for part in ("attention", "mlp")})
    full = draw.open_sampling(dataclasses.replace(cfg, sample=dataclasses.replace(cfg.sample, reuse=1.0)), mesh)
    np.testing.assert_array_equal(images(dataclasses.replace(one, plan=nothing), params), images(full, params))
    assert dataclasses.replace(one, plan=nothing).flops == full.flops


@pytest.mark.parametrize(
    "sampler",
    ["heun", "dpmpp_2m", "ddpm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddim", "euler", "euler_maruyama"))],
)  # fmt: skip
def test_every_sampler_keeps_what_the_calls_put_out(mesh, sampler):
    """The program with a plan, but all computed: the images of the plain one, to rounding; and the plan is read call by call."""
    cfg = settings(sampler=sampler, steps=4, guidance=2.0, interval=(0.3, 0.8))
    params, sampling = weights(cfg.model), draw.open_sampling(cfg, mesh)
    calls = len(sampling.task.evaluations)
    program = sampling._program("plan")
    indices = np.arange(16, dtype=np.int32)

    def drawn(fresh):
        return np.asarray(program(params, 3, indices, {}, dict.fromkeys(("attention", "mlp"), fresh))[0])

    everything, first = np.ones((calls, 3), bool), np.ones((calls, 3), bool)
    first[1:] = False
    plain = np.asarray(sampling._program()(params, 3, indices, {})[0])
    np.testing.assert_allclose(drawn(everything), plain, atol=2e-4)
    assert np.abs(drawn(first) - plain).max() > 1e-3


def test_a_flow_map_reuses_outputs_too(mesh):
    """Its later blocks are given the target time, which goes with the time of the call."""
    cfg = settings(sampler="flow_map", steps=3, guidance=1.5)
    cfg = dataclasses.replace(cfg, model=ModelConfig(**TINY, target="later"), objective=ObjectiveConfig("mean_flow"))
    params, sampling = weights(cfg.model), draw.open_sampling(cfg, mesh)
    program, indices, everything = sampling._program("plan"), np.arange(16, dtype=np.int32), np.ones((3, 3), bool)
    plain = np.asarray(sampling._program()(params, 3, indices, {})[0])
    drawn = program(params, 3, indices, {}, dict.fromkeys(("attention", "mlp"), everything))[0]
    np.testing.assert_allclose(drawn, plain, atol=2e-4)


def test_the_changes_are_those_of_the_modules_outputs(mesh):
    """Against Euler's method by hand and the modules' outputs, unguided; 32 images in two batches as in one."""
    cfg = settings()
    params, sampling = weights(cfg.model), draw.open_sampling(cfg, mesh)
    found = sampling.changes(params, 32, 3)
    keys = draw.image_keys(3, jnp.arange(32))
    x, cond = draw.draw_noise(keys, 0, (8, 8, 1)), {"label": jnp.arange(32) % 10}
    apply, seen_by = jax.jit(dit.apply, static_argnums=0), jax.jit(lambda *a: dict(dit.activations(cfg.model, *a)))
    before, times = None, np.linspace(1, 0, 6)
    for call, (t, s) in enumerate(itertools.pairwise(times)):
        seen = seen_by(params, x, jnp.full(32, 1000 * t), cond)
        outputs = {
            "attention": [seen[f"blocks[{i}]/attention/proj"] for i in range(3)],
            "mlp": [seen[f"blocks[{i}]/mlp/fc2"] for i in range(3)],
        }
        for part, layers in outputs.items() if before else ():
            for layer, output in enumerate(layers):
                change = np.linalg.norm(output - before[part][layer]) / np.linalg.norm(output)
                assert found[part][call, layer] == pytest.approx(float(change), rel=1e-3)
        before = outputs
        x = x + (s - t) * apply(cfg.model, params, x, jnp.full(32, 1000 * t), cond)


def test_images_with_a_plan_are_the_same_bits_on_two_devices(mesh):
    """Guided in an interval, so that both kinds of outputs are kept; and changes measured on two devices are those of one."""
    cfg = settings(guidance=2.0, interval=(0.3, 0.9), reuse=0.5)
    params, one = weights(cfg.model), draw.open_sampling(cfg, mesh)
    two = draw.open_sampling(cfg, make_mesh(MeshConfig(), jax.devices()[:2]))
    changes = one.changes(params, 32, 0)
    for part, rows in two.changes(params, 32, 0).items():
        np.testing.assert_allclose(rows, changes[part], rtol=1e-4)
    made = reuse.make_plan(cfg, one.task, changes, None)
    assert not made.everything
    found = [images(dataclasses.replace(sampling, plan=made), params, 40) for sampling in (one, two)]
    np.testing.assert_array_equal(*found)


def test_flops_count_what_is_computed(mesh):
    """Guided calls in [0.3, 0.8] twice; the first call and a change of guidance compute everything."""
    cfg = settings(guidance=2.0, interval=(0.3, 0.8), steps=10, reuse=0.5)
    sampling = draw.open_sampling(cfg, mesh)
    changes = {part: np.full((10, 3), 0.1) for part in ("attention", "mlp")}
    for rows in changes.values():
        rows[[2, 8]] = 0.0  # only because the guidance changes
    made = reuse.make_plan(cfg, sampling.task, changes, None)
    each = reuse.passes(cfg, sampling.task)
    np.testing.assert_array_equal(each, [1, 1, 2, 2, 2, 2, 2, 2, 1, 1])
    assert all(rows[[0, 2, 8]].all() and not rows.all() for rows in made.fresh.values())
    macs = flops.component_macs(cfg.model)
    blocks = sum(macs[name] for name in ("attention_projections", "attention_scores", "mlp"))
    rest, layer = sum(macs.values()) - blocks, flops.part_macs(cfg.model)
    assert 3 * sum(layer.values()) == blocks
    spent = sum(
        n * layer[p] * rows.sum() for p, fresh in made.fresh.items() for n, rows in zip(each, fresh, strict=True)
    )
    assert dataclasses.replace(sampling, plan=made).flops == 2 * (rest * each.sum() + spent)
    assert spent <= 0.5 * blocks * each.sum()


@pytest.mark.parametrize("share", [0.8, 0.5, 0.3])
@pytest.mark.parametrize("how", [{"sampler": "heun"}, {"guidance": 2.0, "interval": (0.3, 0.8)}])
def test_a_plan_without_a_calibration_costs_the_share(share, how):
    """As preflight and bench take it: no call and no layer is left out, and at most the share of the blocks' FLOPs is computed."""
    cfg = settings(reuse=share, steps=40, **how)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, depth=28))
    made = reuse.even_plan(cfg, make_task(cfg))
    full, each = draw.image_flops(cfg), reuse.passes(cfg, make_task(cfg))
    blocks = 2 * 28 * sum(flops.part_macs(cfg.model).values()) * int(each.sum())
    assert share - 0.03 < 1 - (full - draw.image_flops(cfg, plan=made)) / blocks <= share
    assert made.share == pytest.approx(share, abs=0.08) and all(rows.any(0).all() for rows in made.fresh.values())
    assert reuse.even_plan(settings(reuse=share, steps=1), make_task(settings(steps=1))).everything


def test_preflight_knows_what_is_reused(mesh):
    """In the program that is compiled, the conditionals of both parts have the name that their cycles are counted by."""
    program = draw.open_sampling(settings(reuse=0.5), mesh)._program("plan")
    indices, fresh = np.arange(16, dtype=np.int32), dict.fromkeys(("attention", "mlp"), np.ones((5, 3), bool))
    text = program.lower(weights(settings().model), 3, indices, {}, fresh).compile().as_text()
    found = [one for one, times, _ in hlo.executed(hlo.parse(text)) if one.opcode == "conditional" and times == 5 * 3]
    assert len(found) == 2 and all(hlo.REUSED in one.attributes for one in found)


def test_a_calibration_is_saved_and_used_for_every_share(mesh, tmp_path):
    cfg = settings(guidance=1.5, reuse=0.7)
    params, workdir = weights(cfg.model), str(tmp_path)
    one = reuse.with_reuse(draw.open_sampling(cfg, mesh), params, "sha", workdir, 7)
    (name,) = os.listdir(tmp_path / "reuse")
    assert name.startswith("7-") and not one.plan.everything
    path = tmp_path / "reuse" / name
    first = path.read_bytes()
    less = draw.open_sampling(dataclasses.replace(cfg, sample=dataclasses.replace(cfg.sample, reuse=0.4)), mesh)
    less = reuse.with_reuse(less, None, "sha", workdir, 7)  # without weights: nothing is measured again
    assert less.flops < one.flops < draw.image_flops(cfg) and path.read_bytes() == first
    assert less.describe("sha", 7, 0)["reuse.sha256"] != one.describe("sha", 7, 0)["reuse.sha256"]
    drawn = images(one, params)
    assert drawn.shape == (16, 8, 8, 1) and not np.array_equal(drawn, images(less, params))
    path.write_text(json.dumps({"changes": {"attention": [[0.1]]}}))
    with pytest.raises(UsageError, match=r"damaged, expected changes of 5 calls and 3 layers; remove it"):
        reuse.with_reuse(less, params, "sha", workdir, 7)
