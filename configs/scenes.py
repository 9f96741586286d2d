"""Text to image from nothing but scikit-learn's digits: coloured digits in the quarters of 16 x 16 pixels, drawn from words.

python -m dit_jax.train --config=configs/scenes.py --workdir=runs/scenes
python -m dit_jax.sample --workdir=runs/scenes --prompt='red three left of blue seven' --num=16 --grid=grid.png
python -m dit_jax.evaluate --workdir=runs/scenes
python -m dit_jax.evaluate --workdir=runs/scenes --config.data.held_out_split=unseen

Captions are read as words, which needs no weights of others; as bytes: --config.model.text=bytes --config.model.text_length=64. Each block
attends to them; `configs/scenes.py:in_context` puts them among the image's tokens instead, `:dual_stream` gives them weights of their
own. Pairs of colour and digit, and of relation and digits, are held out: the split `unseen`. `make words` does all of this.
"""

from dit_jax.config import template


def get_config(conditioning="adaln_cross"):
    """`conditioning`: adaln_cross | in_context | dual_stream."""
    c = template()
    c.model.update(depth=4, width=128, heads=4, patch=8, input_size=16, channels=3, classes=0, learn_sigma=False)
    c.model.update(text="words", text_length=17, text_depth=1, conditioning=conditioning, positions="learned")
    c.model.update(qk_norm=True, unroll=4)  # unrolled layers: a fifth less time on a CPU
    # What a caption says of places and colours is decided in much noise, where the law of t therefore puts most times.
    c.diffusion.update(process="flow", prediction="x", time_law="logit_normal", logit_std=1.2, shift=4.0)
    c.data.update(dataset="scenes", image_size=16, cache=False)
    c.optim.update(learning_rate=1.5e-3, schedule="cosine", warmup_steps=100, clip=1.0, ema="power", ema_width=0.1)
    c.train.update(steps=6900, batch_size=64, log_every=100, checkpoint_every=500)
    c.sample.update(sampler="heun", steps=10, guidance=3.0, batch_size=128)
    c.eval.update(samples=1000, features="scenes", max_images=1024)
    return c
