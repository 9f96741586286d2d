"""A ladder of training curves on the digits: 5 sizes with width / depth = 4, evaluated at 6 budgets over a factor of 10.

python -m dit_jax.sweep --config=configs/digits_isoflop.py --workdir=runs/demo

A constant learning rate and a power EMA make a run that passes a budget the very run of that budget, so each size is trained once. A budget
uses the sizes that it trains for 400 steps or more: before that the losses follow the warm-up, not the law. Without the sizes that lie
farther than 3x from a budget's optimum (7 of 24) the law foretells less: half-widths grow from 2.4 to 14 %.
"""

from dit_jax.config import template

SIZES = tuple(
    (4 * k, k, 1) for k in range(3, 10)
)  # (width, depth, heads): width / depth = 4; the last two for the target
BUDGETS = (3e10, 4.75e10, 7.54e10, 1.19e11, 1.89e11, 3e11)  # training FLOPs


def get_config(target="1.7e12"):
    """`target`: the training FLOPs of the model beyond the ladder that tests the law."""
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
        windows=((0, 2), (0, 3), (0, 4), (0, 5), (0, 5), (0, 5)),
        curves=True,
        base_width=64,
        width_power=0.5,
        extrapolate=float(target) / BUDGETS[-1],
        processes=2,
    )
    return c
