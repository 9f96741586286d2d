"""An isoFLOP ladder on the digits: 5 budgets over a factor of 32, sizes of width / depth = 4.

python -m dit_jax.sweep --config=configs/digits_isoflop.py --workdir=runs/demo
"""

from dit_jax.config import template

SIZES = tuple((4 * k, k, k) for k in range(1, 11))  # (width, depth, heads): width / depth = 4
BUDGETS = (1e10, 2.4e10, 5.6e10, 1.33e11, 3.2e11)  # training FLOPs


def get_config():
    c = template()
    c.model.update(patch=2, input_size=8, channels=1, classes=10, learn_sigma=False)
    c.diffusion.process = "flow"
    c.optim.update(learning_rate=6e-3, warmup_steps=50, clip=1.0, ema="power", ema_width=0.1)
    c.train.update(batch_size=32)
    c.sample.update(sampler="heun", steps=16, guidance=2.0, labels="balanced", batch_size=100)
    c.eval.update(samples=1000)
    c.sweep.update(
        budgets=BUDGETS,
        sizes=SIZES,
        windows=((1, 6), (1, 6), (1, 6), (1, 6), (2, 7)),
        base_width=64,
        width_power=0.5,
        extrapolate=4.0,
        processes=2,
    )
    return c
