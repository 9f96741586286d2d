"""An isoFLOP ladder on the digits: 5 budgets over a factor of 30, all sizes with width / depth = 4.

python -m dit_jax.sweep --config=configs/digits_isoflop.py --workdir=runs/demo

Expected (4 to 7 minutes on 2 cores): N_opt grows as C^0.55 (95 % interval 0.39 to 0.68), the best loss of the largest budget is
0.406, and the model trained at 9.6e11 FLOPs reaches 0.386 +- 0.005 and fd_digits 1.8 (1,000 samples, guidance 2).
"""

from dit_jax.config import template

SIZES = tuple((4 * k, k, 1) for k in range(2, 12))  # (width, depth, heads): width / depth = 4
BUDGETS = (1e10, 2.34e10, 5.48e10, 1.28e11, 3e11)  # training FLOPs


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
        windows=((0, 5), (0, 5), (0, 5), (0, 5), (1, 6)),
        base_width=64,
        width_power=0.5,
        extrapolate=3.2,
        processes=2,
    )
    return c
