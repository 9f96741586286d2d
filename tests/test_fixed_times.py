"""The held-out loss at equidistant t: against float64 NumPy, and its protocol, which leaves out the law of t."""

from unittest import mock

import jax
import numpy as np
import pytest

from dit_jax.config import Config, DiffusionConfig, EvalConfig, MeshConfig, ModelConfig
from dit_jax.data.source import open_source
from dit_jax.devices.mesh import make_mesh, replicated
from dit_jax.diffusion.process import DDPM
from dit_jax.error import NotFiniteError, UsageError
from dit_jax.evaluation import loss
from dit_jax.evaluation.protocol import loss_protocol
from dit_jax.workdir.records import protocol_id

SEED, A = 7, np.float32(0.3)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (21, 4, 4, 2)).astype(np.float32)
COND = {"label": np.arange(21, dtype=np.int32) % 3}


def config(times=8, **diffusion):
    model = ModelConfig(depth=1, width=16, heads=2, input_size=4, channels=2, classes=3, learn_sigma=False)
    return Config(model=model, diffusion=DiffusionConfig(**diffusion), eval=EvalConfig(fixed_times=times, seed=SEED))


class Linear:
    """Stands for a model: a x + t, with t in 0 to 1000 divided by 1000; its loss is a line of NumPy."""

    def apply(self, params, x, t, cond):
        return params["a"] * x + t[:, None, None, None] / 1000


@pytest.fixture(autouse=True)
def linear():
    with mock.patch.object(loss, "bind_to_draw", lambda model, mesh: (Linear(), replicated(mesh))):
        yield
    loss.make_losses.cache_clear()


def score(cfg, devices=1, a=A):
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    return loss.fixed_time_loss(cfg, {"a": np.float32(a)}, IMAGES, COND, mesh)


def by_hand(cfg):
    """Losses (images, times) from the definitions: x_t and the target of each process at k / 8 of its time."""
    eps = np.asarray(loss.fixed_noise(SEED, np.arange(21), 8, IMAGES.shape[1:]), np.float64)
    x, k = IMAGES[:, None].astype(np.float64), np.arange(8).reshape(1, 8, 1, 1, 1)
    if cfg.diffusion.process == "flow":
        x_t, target, t = (1 - k / 8) * x + k / 8 * eps, eps - x, k / 8
    else:
        bars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[125 * k]
        x_t, target, t = np.sqrt(bars) * x + np.sqrt(1 - bars) * eps, eps, 125 * k / 1000
    return ((float(A) * x_t + t - target) ** 2).mean(axis=(2, 3, 4))


@pytest.mark.parametrize("process", ["flow", "ddpm"])
def test_it_is_the_mean_at_eight_times_whatever_the_law_of_t(process):
    cfg = config(process=process, time_law="logit_normal", logit_mean=1.5)
    found, table = score(cfg), by_hand(cfg)
    assert list(found) == ["loss_fixed", "loss_fixed_se", *(f"loss_fixed_t{k}" for k in range(8))]
    assert found["loss_fixed"] == pytest.approx(table.mean(), rel=1e-6)
    assert found["loss_fixed_se"] == pytest.approx(table.mean(axis=1).std(ddof=1) / np.sqrt(21), rel=1e-5)
    assert [found[f"loss_fixed_t{k}"] for k in range(8)] == pytest.approx(table.mean(axis=0).tolist(), rel=1e-6)
    assert found == score(cfg, devices=8) == score(config(process=process))
    with pytest.raises(NotFiniteError, match="held-out loss: found values that are not finite"):
        score(cfg, a=np.nan)


def test_a_chain_takes_whole_steps():
    """Also where count does not divide the chain; in float32, 0.7 of 10 steps would be step 6."""
    assert (DDPM("linear", 10).equidistant(10) * 10).tolist() == list(range(1, 11))
    assert np.rint(DDPM("linear", 1000).equidistant(8) * 1000).tolist() == [1, 126, 251, 376, 501, 626, 751, 876]
    assert np.rint(DDPM("linear", 7).equidistant(3) * 7).tolist() == [1, 3, 5]


def test_it_has_a_protocol_of_its_own_without_the_law_of_t(data_dir):
    """So the stratified loss keeps the identity of all records so far, and runs with other laws go into one fit."""
    held_out = open_source(Config().data, "test")

    def identity(fixed, times=8, **diffusion):
        return protocol_id(loss_protocol(config(times, **diffusion), held_out, "fixed" if fixed else "loss"))

    laws = [
        dict(process="flow", time_law=law, logit_mean=mean) for law, mean in (("uniform", 0.0), ("logit_normal", 1.0))
    ]
    assert identity(True, **laws[0]) == identity(True, **laws[1]) != identity(True, 16, **laws[0])
    assert identity(False, **laws[0]) != identity(False, **laws[1])
    assert identity(False, 0, **laws[0]) == identity(False, 8, **laws[0]) != identity(True, **laws[0])
    chains = [dict(process="ddpm", schedule=schedule) for schedule in ("linear", "cosine")]
    assert identity(True, **chains[0]) != identity(True, **chains[1])
    stratified, fixed = (loss_protocol(config(), held_out, target)["held_out"] for target in ("loss", "fixed"))
    assert set(stratified) == {"images", "times_per_image", "buckets", "seed", "labels"}
    assert set(fixed) == {"images", "times", "seed", "labels"} and fixed["times"] == "8 equidistant"
    with pytest.raises(UsageError, match=r"eval\.fixed_times: found -1"):
        config(-1)
