"""A DiT on a folder of your pictures, in pixels at 64 x 64 (docs/data.md#a-photo-folder); flat folders need no classes.

python -m dit_jax.train --config=configs/photos.py --config.data.folder=photos --config.model.classes=2 --workdir=runs/photos
python -m dit_jax.evaluate --workdir=runs/photos
python -m dit_jax.sample --workdir=runs/photos --labels=cat,dog --num=64 --guidance=2 --grid=photos.png --out=photos.npz

Expected: a held-out loss that depends on your pictures. Not run to the end here.
"""

from dit_jax.config import template
from dit_jax.devices.layout import lay_out


def get_config(slice=""):
    """`slice`: name of the slice whose mesh is used, such as h100x8."""
    c = template()
    c.model.update(depth=12, width=384, heads=6, patch=4, input_size=64, channels=3, classes=0, learn_sigma=False)
    c.diffusion.update(process="flow", time_law="logit_normal")
    c.data.update(folder="photos", image_size=64, flip=True, cache=False)
    c.optim.update(learning_rate=3e-4, warmup_steps=1000, clip=1.0, ema="power", ema_width=0.1)
    c.train.update(steps=100_000, batch_size=64, log_every=100, checkpoint_every=2000)
    c.sample.update(sampler="heun", steps=25, batch_size=64)
    lay_out(c, slice)
    return c
