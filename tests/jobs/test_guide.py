"""Facts about a weaker run as guide, and about how guidance acts as axes of `evaluate`: protocols, costs, bad input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax import checkpoint, flops
from dit_jax.config import Config, DiffusionConfig, MeshConfig, ModelConfig, ObjectiveConfig, SampleConfig
from dit_jax.devices.mesh import make_mesh
from dit_jax.error import UsageError
from dit_jax.evaluation import protocol
from dit_jax.evaluation import run as evaluation
from dit_jax.models import dit
from dit_jax.sampling import draw, guide
from dit_jax.scaling.frontier.points import load_points
from dit_jax.workdir.folder import make_folder

pytestmark = pytest.mark.usefixtures("one_device")
SMALL = dict(width=16, heads=2, input_size=8, channels=1, classes=10, learn_sigma=False)
APPLY = jax.jit(dit.apply, static_argnums=0)


def made(folder, depth, key, steps=(5,), **diffusion):
    """A run folder with random weights. Returns its config."""
    cfg = Config(model=ModelConfig(**SMALL, depth=depth), diffusion=DiffusionConfig(process="flow", **diffusion))
    sample = SampleConfig(sampler="euler", steps=4, labels="balanced", batch_size=16, guidance=2.0)
    cfg = dataclasses.replace(cfg, sample=sample, data=dataclasses.replace(cfg.data, image_size=8))
    make_folder(str(folder), "config.json", cfg)
    (folder / "checkpoints").mkdir()
    fresh = jax.jit(lambda: dit.init(cfg.model, jax.random.key(0)))()
    for step in steps:
        draws = np.random.default_rng(key + step)
        noise = functools.partial(lambda draws, w: draws.normal(0, 0.1, w.shape).astype(w.dtype), draws)
        params = jax.tree.map(lambda w, noise=noise: w + noise(w), fresh)
        checkpoint.write_weights(str(folder), step, cfg.model, params, {})
    return cfg


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder, config) of a run of depth 3, and the folder of a weaker one of depth 1 with two checkpoints."""
    root = tmp_path_factory.mktemp("guide")
    cfg = made(root / "strong", 3, 1)
    made(root / "weak", 1, 2, (3, 5), time_law="logit_normal")
    return root / "strong", cfg, root / "weak"


def sampled(cfg, **sample):
    return dataclasses.replace(cfg, sample=dataclasses.replace(cfg.sample, **sample))


def images(cfg, params):
    sampling = draw.open_sampling(cfg, make_mesh(MeshConfig(), jax.devices()[:1]))
    return np.concatenate([drawn for drawn, _ in sampling.images(params, 3, 16)]), sampling


def test_images_are_those_of_both_models_by_hand(runs):
    """Euler's method on weaker + scale (model - weaker), and the FLOPs of both; at guidance 1 the guide changes nothing."""
    workdir, cfg, weak = runs
    params, other = (checkpoint.load(str(path), 5)[1] for path in (workdir, weak))
    found, sampling = images(sampled(cfg, guide=f"{weak}@5"), params)
    keys = draw.image_keys(3, jnp.arange(16))
    x, labels = draw.draw_noise(keys, 0, (8, 8, 1)), jnp.arange(16) % 10
    small = ModelConfig(**SMALL, depth=1)
    for t in (1.0, 0.75, 0.5, 0.25):
        time = jnp.full(16, 1000 * t)
        c, u = APPLY(cfg.model, params, x, time, labels), APPLY(small, other, x, time, labels)
        x = x - 0.25 * (u + 2 * (c - u))
    assert np.abs(found.astype(int) - draw.to_uint8(np.asarray(x))).max() <= 1
    assert sampling.flops == 4 * (flops.forward_flops(cfg.model) + flops.forward_flops(small))
    plain, unguided = images(sampled(cfg, guide=f"{weak}@5", guidance=1.0), params)
    np.testing.assert_array_equal(plain, images(sampled(cfg, guidance=1.0), params)[0])
    assert unguided.flops == 4 * flops.forward_flops(cfg.model) and not np.array_equal(found, plain)


def test_a_job_names_the_guide_and_its_weights(runs):
    _, cfg, weak = runs
    jobs = []
    for step in ("@3", "@5", ""):
        sampling = draw.open_sampling(sampled(cfg, guide=f"{weak}{step}"), make_mesh(MeshConfig(), jax.devices()[:1]))
        jobs.append(sampling.describe("0", 5, 3))
    assert [job["guide.step"] for job in jobs] == [3, 5, 5] and [job["guide.run"] for job in jobs] == ["weak"] * 3
    assert jobs[0]["guide.weights_sha256"] != jobs[1]["guide.weights_sha256"] == jobs[2]["guide.weights_sha256"]
    assert [job["sample.guide"] for job in jobs] == ["weak@3", "weak@5", "weak"]
    plain = draw.open_sampling(cfg, make_mesh(MeshConfig(), jax.devices()[:1])).describe("0", 5, 3)
    assert not [
        key for key in plain if any(name in key for name in ("guide.", "sample.guide", "rescale", "reuse", "ema"))
    ]


BAD = {
    "folder": ("absent", r"sample.guide: no folder 'absent'"),
    "step": ("{weak}@4", r"no checkpoint of step 4, expected one of \[3, 5\]"),
    "process": (
        "{chain}",
        r"sample.guide: .*chain: diffusion.process: found 'ddpm', expected 'flow', as the model that it guides",
    ),
    "classes": ("{other}", r"model.classes: found 5, expected 10"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_guide_that_does_not_fit(runs, tmp_path, name):
    _, cfg, weak = runs
    text, message = BAD[name]
    for folder, changes in (
        ("chain", {"diffusion": DiffusionConfig()}),
        ("other", {"model": ModelConfig(**SMALL | {"classes": 5})}),
    ):
        make_folder(str(tmp_path / folder), "config.json", dataclasses.replace(cfg, **changes))
    with pytest.raises(UsageError, match=message):
        guide.open_guide(sampled(cfg, guide=text.format(weak=weak, chain=tmp_path / "chain", other=tmp_path / "other")))
    if name == "classes":
        student = {"objective": ObjectiveConfig(name="consistency")}
        make_folder(str(tmp_path / "student"), "config.json", dataclasses.replace(cfg, **student))
        for sampler, path, found in (("heun", tmp_path / "student", "'consistency'"), ("flow_map", weak, "''")):
            with pytest.raises(UsageError, match=f"objective.name: found {found}, expected .*, as sampler '{sampler}'"):
                guide.open_guide(sampled(cfg, guide=str(path), sampler=sampler))
    if name == "folder":
        with pytest.raises(UsageError, match=r"sample.reuse: found 0.5, expected 1 with sample.guide"):
            sampled(cfg, guide="w", reuse=0.5)


def axes(cfg, **values):
    return dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, **values))


def test_axes_are_varied_where_they_change_something(runs):
    """At guidance 1 nothing is guided, and raw weights have no width."""
    _, cfg, weak = runs
    found = protocol.samplings(axes(cfg, guidance=(1.0, 2.0), interval=((0.0, 1.0), (0.2, 0.8)), rescale=(0.0, 0.7)))
    assert len(found) == 1 + 4 and sum(sample.guidance == 1.0 for sample in found) == 1
    widths = protocol.samplings(axes(cfg, weights=("ema", "params"), ema=(0.05, 0.1)))
    assert [(sample.weights, sample.ema) for sample in widths] == [("ema", 0.05), ("ema", 0.1), ("params", 0.0)]
    names = [
        *protocol.cells(axes(cfg, samples=8, interval=((0.0, 1.0), (0.2, 0.8)), guide=("", f"{weak}@3"), loss=False))
    ]
    assert len(names) == 4 and all("/" not in name for name in names)
    with pytest.raises(UsageError, match=r"eval.interval: found 0.2, expected a tuple of tuples"):
        axes(cfg, interval=(0.2, 0.8))


def test_a_bad_value_of_an_axis_is_named_by_the_axis(runs, tmp_path):
    """And without values of the axis by the key of `sample`."""
    _, cfg, weak = runs
    for message, values in (
        (r"^eval.steps: found 0, expected at least 1", {"steps": (0, 4)}),
        (r"^eval.ema: found 0.9, expected a value from", {"ema": (0.9,)}),
        (r"^eval.guidance: found -1", {"guidance": (1.0, -1.0)}),
        (r"^eval.samplers: found 'eular'", {"samplers": ("eular",)}),
        (r"^eval.reuse: found 0.5, expected 1 with eval.guide = 'w'", {"guide": ("w",), "reuse": (0.5,)}),
    ):
        with pytest.raises(UsageError, match=message):
            protocol.check_config(axes(cfg, **values))
    with pytest.raises(UsageError, match=r"^sample.sampler: found 'eular'"):
        protocol.check_config(axes(sampled(cfg, sampler="eular"), steps=(2, 4)))
    make_folder(str(tmp_path / "chain"), "config.json", dataclasses.replace(cfg, diffusion=DiffusionConfig()))
    with pytest.raises(UsageError, match=r"^eval.guide: .*chain: diffusion.process: found 'ddpm'"):
        evaluation.run(axes(cfg, loss=False, samples=80, guide=(str(tmp_path / "chain"),)), str(weak), quiet=True)


def test_records_of_every_way_are_points_of_one_frontier(runs, data_dir):
    """Costs are exact, protocols differ in the sampling only, and the wing tells the points apart."""
    workdir, cfg, weak = runs
    none = dict(loss=False, samples=80, bootstrap=0)
    grids = (
        dict(interval=((0.0, 1.0), (0.3, 0.8)), rescale=(0.7,)),
        dict(guide=(str(weak),)),
        dict(reuse=(0.6,)),
    )
    records = [
        record for grid in grids for record in evaluation.run(axes(cfg, **none, **grid), str(workdir), quiet=True)
    ]
    forward = flops.forward_flops(cfg.model)
    assert [r["flops_sample"] for r in records[:2]] == [8 * forward, 6 * forward]
    assert records[2]["flops_sample"] == 4 * (forward + flops.forward_flops(ModelConfig(**SMALL, depth=1)))
    assert 0.55 * 8 * forward < records[3]["flops_sample"] < 0.65 * 8 * forward
    assert records[2]["protocol"]["guide"]["run"] == "weak" and records[3]["protocol"]["samples"]["reuse"] == 0.6
    assert set(records[3]["reuse"]["computed"]) == {"attention", "mlp"} and "reuse" not in records[0]
    points = load_points(str(workdir), "fd_digits", sampled=True)
    assert len({point.sampling for point in points}) == 4
    assert {point.sampling for point in points} >= {
        "euler, 4 steps, linspace, interval 0.3 to 0.8, rescale 0.7, guidance 2", "euler, 4 steps, linspace, reuse 0.6, guidance 2",
    }  # fmt: skip
