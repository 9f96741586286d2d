"""MACs, FLOPs and parameters against the DiT paper's table and against the parameters that `init` makes."""

import math

import jax
import pytest

from dit_jax import flops
from dit_jax.config import ModelConfig, model_config
from dit_jax.models import dit

# name: (paper's Gflops = GMAC, exact trainable parameters); Peebles & Xie 2023, Table 4.
PAPER = {
    "S/8": (0.36, 33_142_016),
    "S/4": (1.41, 32_920_448),
    "S/2": (6.06, 32_865_056),
    "B/8": (1.42, 130_869_248),
    "B/4": (5.56, 130_426_496),
    "B/2": (23.01, 130_315_808),
    "L/8": (5.01, 458_578_432),
    "L/4": (19.70, 457_988_224),
    "L/2": (80.71, 457_840_672),
    "XL/8": (7.39, 675_664_640),
    "XL/4": (29.05, 675_000_704),
    "XL/2": (118.64, 674_834_720),
}


def made_parameters(cfg):
    shapes = jax.eval_shape(lambda: dit.init(cfg, jax.random.key(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", PAPER)
def test_macs_and_parameters_of_the_published_sizes(name):
    cfg = model_config(f"DiT-{name}")
    gmacs, parameters = PAPER[name]
    tolerance = 0.006 if name == "S/8" else 0.002
    assert flops.forward_macs(cfg) / 1e9 == pytest.approx(gmacs, rel=tolerance)
    assert flops.parameters(cfg) == parameters == made_parameters(cfg)


# conditioning: (paper's Gflops = GMAC, parameters in millions) of XL/2; Peebles & Xie 2023, section 5 and Figure 5.
CONDITIONINGS = {
    "in_context": (119.37, 449),
    "cross_attention": (137.62, 598),
    "adaln": (118.56, 600),
    "adaln_zero": (118.64, 675),
}


@pytest.mark.parametrize("name", CONDITIONINGS)
def test_macs_and_parameters_of_the_four_conditionings(name):
    cfg, (gmacs, millions) = model_config("DiT-XL/2", conditioning=name), CONDITIONINGS[name]
    assert flops.forward_macs(cfg) / 1e9 == pytest.approx(gmacs, rel=0.0005)
    assert round(flops.parameters(cfg) / 1e6) == millions
    assert flops.parameters(cfg) == made_parameters(cfg)


def test_macs_at_512_pixels():
    assert flops.forward_macs(model_config("DiT-XL/2", image_size=512)) / 1e9 == pytest.approx(524.54, abs=0.005)


def test_flops_are_twice_macs_and_training_three_times_forward():
    cfg = model_config("DiT-XL/2")
    assert flops.forward_flops(cfg) == 2 * flops.forward_macs(cfg)
    assert flops.train_flops(cfg) == 3 * flops.forward_flops(cfg)
    assert flops.train_flops(cfg, 256) / 1e12 == pytest.approx(182.2, abs=0.05)
    assert 500 * flops.forward_flops(cfg) / 1e12 == pytest.approx(118.6, abs=0.05)


def test_active_parameters_of_xl():
    assert flops.active_parameters(model_config("DiT-XL/2")) / 1e6 == pytest.approx(445.9, abs=0.1)


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": True},
        {"learn_sigma": False},
        {"classes": 7, "mlp_ratio": 2, "channels": 3},
        {"conditioning": "cross_attention", "qk_norm": True},
        {"conditioning": "in_context", "qk_norm": True},
        {"conditioning": "adaln"},
        {"block": "llama"},
        {"positions": "learned"},
        {"block": "llama", "conditioning": "in_context", "positions": "rope"},
        {"block": "llama", "conditioning": "cross_attention"},
    ],
)
def test_parameters_of_free_configs_match_init(changes):
    cfg = ModelConfig(**{"depth": 3, "width": 24, "heads": 2, "input_size": 8, **changes})
    assert flops.parameters(cfg) == made_parameters(cfg)


@pytest.mark.parametrize(
    "changes", [*({"conditioning": name} for name in CONDITIONINGS), {"block": "llama", "positions": "rope"}]
)
def test_macs_match_the_compiler_on_an_unrolled_model(changes):
    """XLA counts norms and activations too, so it must come out above, and near for a wide model."""
    cfg = ModelConfig(depth=2, width=256, heads=4, input_size=16, classes=10, unroll=2, **changes)
    params = dit.init(cfg, jax.random.key(0))
    x, t, y = jax.numpy.zeros((1, 16, 16, 4)), jax.numpy.zeros((1,)), jax.numpy.zeros((1,), int)
    cost = jax.jit(lambda p: dit.apply(cfg, p, x, t, y)).lower(params).compile().cost_analysis()
    assert 1.0 < cost["flops"] / flops.forward_flops(cfg) < 1.05
