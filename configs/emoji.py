"""Emoji in three styles from their names, 32 x 32 pixels: "dog face, noto style". It needs an accelerator: 8 million image visits.

python -m dit_jax.train --config=configs/emoji.py --workdir=runs/emoji
python -m dit_jax.sample --workdir=runs/emoji --prompt='dog face, noto style' --prompt='red heart, twemoji style' --num=16 --grid=grid.png
python -m dit_jax.evaluate --workdir=runs/emoji
python -m dit_jax.evaluate --workdir=runs/emoji --config.data.held_out_split=unseen

Pairs of concept and style (`test`), and of person and skin tone (`unseen`), are held out (docs/text.md#emoji). The score is the held-out
loss; sample metrics need a network: --config.eval.features=clip, see docs/evaluate.md. Not trained here. To be expected: a smaller model
gave colours and no shapes after 86,000 visits, and at 27 images/s, seen with this width and depth on 2 cores, the whole takes 84 hours.
"""

from dit_jax.config import template
from dit_jax.devices.layout import lay_out


def get_config(slice=""):
    """`slice`: name of the slice whose mesh is used, such as h100x8."""
    c = template()
    c.model.update(depth=8, width=192, heads=6, patch=4, input_size=32, channels=3, classes=0, learn_sigma=False)
    c.model.update(text="words", text_length=24, conditioning="adaln_cross")
    c.diffusion.process = "flow"
    c.data.update(dataset="emoji", image_size=32)
    c.optim.update(learning_rate=1e-3, schedule="cosine", warmup_steps=500, clip=1.0, ema="power", ema_width=0.1)
    c.train.update(steps=64_000, batch_size=128, log_every=100, checkpoint_every=2000)
    c.sample.update(sampler="heun", steps=20, guidance=3.0, batch_size=128)
    c.eval.update(samples=0)
    lay_out(c, slice)
    return c
