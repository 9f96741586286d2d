"""Two ladders of training curves on scenes, 5 sizes at 6 budgets over a factor of 10: captions in context, or by cross-attention.

python -m dit_jax.sweep --config=configs/scenes_isoflop.py:in_context --workdir=runs/scenes/in_context/seed0
python -m dit_jax.sweep --config=configs/scenes_isoflop.py:cross_attention --workdir=runs/scenes/cross_attention/seed1 --config.train.seed=1
python -m dit_jax.scaling compare runs/scenes/in_context runs/scenes/cross_attention --curves

Liang et al. 2024 (arXiv 2410.08184) compare the two by laws of the loss, the bound and the likelihood; so do these, and by composition. A
budget uses the sizes that it trains for 400 steps or more.
"""

import importlib.util
from pathlib import Path

from dit_jax.error import choice

SPEC = importlib.util.spec_from_file_location("scenes", Path(__file__).with_name("scenes.py"))
scenes = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(scenes)

SIZES = ((32, 1, 1), (48, 2, 2), (64, 2, 2), (80, 3, 4), (96, 3, 4))  # (width, depth, heads)
BUDGETS = (2e11, 3.17e11, 5.02e11, 7.96e11, 1.26e12, 2e12)  # training FLOPs
KINDS = {"in_context": "in_context", "cross_attention": "adaln_cross"}


def get_config(kind="cross_attention"):
    """`kind`: in_context | cross_attention."""
    choice("kind", kind, KINDS)
    c = scenes.get_config(KINDS[kind])
    c.model.unroll = 1  # sizes have other depths
    c.optim.update(schedule="constant", learning_rate=1.5e-3)
    c.train.update(batch_size=32)
    c.eval.update(max_images=1024, vlb=True, likelihood=True, likelihood_images=64, likelihood_steps=24)
    c.sweep.update(
        budgets=BUDGETS,
        sizes=SIZES,
        windows=((0, 3), (0, 3), (0, 4), (0, 4), (0, 5), (0, 5)),
        curves=True,
        samples=500,
        base_width=128,
        width_power=0.5,
    )
    return c
