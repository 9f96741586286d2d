"""Modern blocks: rotary positions, RMSNorm with SwiGLU, prediction of the clean image, shifted times; and runs from before them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_diffusion import gaussian_denoiser, keys
from test_model import SMALL, initial_params

from dit_jax import checkpoint, flops
from dit_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, SampleConfig, model_config, to_dict
from dit_jax.devices.mesh import make_mesh, spec
from dit_jax.diffusion import process as processes
from dit_jax.diffusion.objective import velocity
from dit_jax.diffusion.process import Flow, denoiser
from dit_jax.diffusion.samplers import SAMPLERS, draw_noise
from dit_jax.diffusion.task import make_task
from dit_jax.error import UsageError
from dit_jax.models import dit
from dit_jax.models.conditioning import positions, rotations
from dit_jax.models.layers import rotate
from dit_jax.networks import dit as published
from dit_jax.sampling.draw import open_sampling

LEARNED = dataclasses.replace(SMALL, positions="learned")


def test_learned_positions_are_added_to_the_patches():
    """A model with the sinusoids as its table is the model of sinusoids."""
    params = initial_params(SMALL)
    table = jnp.asarray(positions(SMALL.input_size // SMALL.patch, SMALL.width))
    x, t, labels = (
        jax.random.normal(jax.random.key(3), (2, 8, 8, SMALL.channels)),
        jnp.array([3.0, 700.0]),
        jnp.array([1, 2]),
    )
    found = dit.apply(LEARNED, params | {"positions": table}, x, t, labels)
    np.testing.assert_array_equal(found, dit.apply(SMALL, params, x, t, labels))
    made = jax.eval_shape(lambda: dit.init(LEARNED, jax.random.key(0)))
    assert made.keys() - params.keys() == {"positions"} and made["positions"].shape == table.shape


def test_logits_depend_on_the_distance_of_two_patches_only():
    """Also in another grid of the same model; and tokens of the condition are not rotated."""
    side, width = 4, 8
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, width))

    def logits(grid):
        angles = rotations(side, width, grid, 0)
        n = len(angles)
        a, b = (rotate(jnp.broadcast_to(x, (1, n, 1, width)), jnp.asarray(angles)) for x in (q, k))
        return np.einsum("bnkh,bmkh->nm", a, b).reshape(*grid, *grid)

    square, wide = logits((4, 4)), logits((2, 6))
    np.testing.assert_allclose(square[0, 0, 1, 2], square[2, 1, 3, 3], rtol=1e-5)
    np.testing.assert_allclose(wide[0, 3, 1, 5], square[2, 1, 3, 3], rtol=1e-5)
    assert abs(square[0, 0, 1, 2] - square[0, 0, 2, 1]) > 1e-3
    angles = rotations(side, width, (4, 4), 3)
    assert angles.shape == (19, 4) and not angles[16:].any() and angles[1:16].any(axis=1).all()


def test_swiglu_has_about_as_many_parameters_and_its_halves_are_split_alike():
    for name in ("DiT-S/2", "DiT-B/2", "DiT-L/2", "DiT-XL/2"):
        sizes = [flops.parameters(model_config(name, block=block)) for block in ("dit", "llama")]
        assert sizes[1] / sizes[0] == pytest.approx(1, abs=0.002)
    assert model_config("DiT-XL/2", block="llama").hidden == 3072  # 8/3 of 1152
    shapes = jax.eval_shape(lambda: dit.init(dataclasses.replace(SMALL, block="llama"), jax.random.key(0)))["blocks"]
    sizes = {"data": 1, "fsdp": 4, "tensor": 2}
    for path, expected in {
        ("fc1", "kernel"): (None, "fsdp", None, "tensor"),
        ("fc1", "bias"): (None, None, "tensor"),
        ("fc2", "kernel"): (None, "tensor", "fsdp"),
    }.items():
        leaf = shapes["mlp"][path[0]][path[1]]
        assert tuple(spec(("blocks", "mlp", *path), leaf.shape, sizes)) == expected


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "euler_maruyama"])
def test_samplers_do_not_see_what_the_network_predicts(sampler):
    """The best network for a Gaussian, as a velocity and as the clean image: the same images."""
    best, times, k = gaussian_denoiser(Flow()), np.linspace(1.0, 0.0, 11), keys(4)
    x = draw_noise(k, 0, (2, 2, 1))
    networks = {
        "velocity": lambda x, t: best(x, t / 1000),
        "x": lambda x, t: x - t[:, None, None, None] / 1000 * best(x, t / 1000),
    }
    drawn = [
        SAMPLERS[sampler](Flow(prediction=kind), denoiser(Flow(prediction=kind), network), x, times, k)
        for kind, network in networks.items()
    ]
    np.testing.assert_allclose(*drawn, atol=2e-5)


def test_the_loss_of_the_clean_image_is_that_of_its_velocity():
    """From t = 0.05 on; below, errors of the image are divided by 0.05."""
    process, t = Flow(prediction="x"), jnp.array([0.01, 0.05, 0.3, 1.0])
    x, eps, error = jax.random.normal(jax.random.key(0), (3, 4, 2, 2, 1))
    found, _ = velocity(process, denoiser(process, lambda x_t, t: x + error), x, t, eps)
    expected = jnp.square(error).mean(axis=(1, 2, 3)) / jnp.maximum(t, 0.05) ** 2
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    plain = denoiser(Flow(), lambda x_t, t: eps - x - error / t[:, None, None, None] * 1000)
    np.testing.assert_allclose(found[1:], velocity(Flow(), plain, x, t, eps)[0][1:], rtol=2e-5)


def test_shift_multiplies_the_odds_of_noise_in_training_and_sampling():
    process, u = Flow(shift=3.0), jnp.array([0.0, 0.25, 0.5, 1.0])
    np.testing.assert_allclose(process.time(u), [0, 0.5, 0.75, 1], rtol=1e-6)
    np.testing.assert_allclose(process.times(4), [1, 0.9, 0.75, 0.5, 0], rtol=1e-12)
    law = Flow("logit_normal", 0.0, 1.0, shift=3.0)  # the same as a mean of log 3
    np.testing.assert_allclose(law.time(u[1:3]), Flow("logit_normal", np.log(3.0)).time(u[1:3]), rtol=1e-6)
    assert process.equidistant(4).tolist() == [0, 0.25, 0.5, 0.75]  # the loss at fixed t is not moved
    small = dataclasses.replace(SMALL, learn_sigma=False)
    task = make_task(Config(small, DiffusionConfig(process="flow", shift=3.0), sample=SampleConfig("euler", steps=4)))
    assert task.times == tuple(process.times(4))


def test_runs_and_images_from_before_go_on(monkeypatch):
    """Their checkpoints, jobs and protocols do not name the new keys, and new ones with the defaults do not either."""
    later = ("positions", "block")
    older = {key: value for key, value in to_dict(ModelConfig()).items() if key not in later}
    monkeypatch.setattr(checkpoint, "_read_values", lambda at, item: {"step": 3, "model": older})
    checkpoint.check_model("checkpoints/3", ModelConfig())
    with pytest.raises(UsageError, match=r"model\.positions: found 'sincos', expected 'rope'"):
        checkpoint.check_model("checkpoints/3", ModelConfig(positions="rope"))
    model = dataclasses.replace(SMALL, learn_sigma=False)
    plain = Config(model, DiffusionConfig(process="flow"), sample=SampleConfig("euler", steps=2))
    changed = dataclasses.replace(
        plain, model=dataclasses.replace(model, block="llama"), diffusion=DiffusionConfig(process="flow", shift=2.0)
    )
    before, after = (open_sampling(cfg, make_mesh(cfg.mesh)).describe("0", 3, 0) for cfg in (plain, changed))
    assert {key: after[key] for key in after if key not in before} == {"model.block": "llama", "diffusion.shift": 2.0}
    assert set(processes.describe(Flow())) == {"process", "time_law", "logit_mean", "logit_std"}
    assert processes.describe(Flow(prediction="x", shift=2.0), law=False) == {"process": "flow", "prediction": "x"}


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda: DiffusionConfig(prediction="x"), r"diffusion\.prediction: found 'x', expected 'velocity' unless"),
        (lambda: DiffusionConfig(shift=3.0), r"diffusion\.shift: found 3\.0, expected 1\.0 unless"),
        (lambda: DiffusionConfig(process="flow", shift=0.0), r"diffusion\.shift: found 0\.0, expected a value"),
        (lambda: ModelConfig(width=36, heads=6, positions="rope"), r"model\.heads: found 6, so 6 features a head"),
        (lambda: published.write(LEARNED, initial_params(LEARNED)), r"model\.positions"),
        (
            lambda: dit.apply(
                LEARNED,
                initial_params(LEARNED),
                jnp.zeros((1, 8, 12, LEARNED.channels)),
                jnp.ones(1),
                jnp.zeros(1, int),
            ),
            r"model\.positions: found learned for 4 x 6 patches, expected 4 x 4",
        ),
        (
            lambda: Config(LEARNED, data=DataConfig(image_size=8, buckets=((8, 8), (8, 12)))),
            r"model\.positions: found 'learned', expected sincos or rope with data\.buckets",
        ),
        (lambda: ModelConfig(block="lama"), r"model\.block: found 'lama', .* did you mean 'llama'"),
        (lambda: published.write(dataclasses.replace(SMALL, block="llama"), initial_params(SMALL)), r"model\.block"),
    ],
)
def test_what_cannot_be_is_named(make, expected):
    with pytest.raises(UsageError, match=expected):
        make()
