"""Text to image with 1.0 billion parameters: T5-XL states and image in one sequence (as Liang et al. 2024), latents of 256 x 256 pixels.

python -m dit_jax.train --config=configs/text.py --config.data.latents=latents/captioned --workdir=runs/text
python -m dit_jax.preflight --config=configs/text.py:v4-256
python -m dit_jax.preflight --config=configs/text.py:h100x8

First the encoder, latents of pictures with captions, as in configs/imagenet256.py, and the captions' states (docs/text.md#encoders):

    python -m dit_jax.convert --source=t5 --weights=t5-v1_1-xl --out=nets/t5-xl
    python -m dit_jax.encode --config=configs/text.py --config.data.latents=latents/captioned --captions --out=captions/t5-xl

Expected: compiled for slices that were not there (docs/preflight.md), never run.
"""

from dit_jax.config import template
from dit_jax.devices.layout import lay_out


def get_config(slice=""):
    """`slice`: name of the slice whose mesh is used, such as v4-256."""
    c = template()
    c.model.update(depth=36, width=1536, heads=24, patch=2, input_size=32, channels=4, classes=0, learn_sigma=False)
    c.model.update(text="t5", text_encoder="nets/t5-xl", text_width=2048, text_length=128, conditioning="in_context")
    c.model.update(qk_norm=True, dtype="bfloat16", remat="dots")
    c.diffusion.update(process="flow", time_law="logit_normal")
    c.data.update(captions="captions/t5-xl", image_size=256, cache=False, workers=16)
    c.optim.update(learning_rate=1e-4, schedule="constant", warmup_steps=1000, clip=1.0, ema="power", ema_width=0.1)
    c.train.update(steps=500_000, batch_size=1024, checkpoint_every=10_000)
    c.mesh.fsdp = 4
    c.sample.update(sampler="heun", steps=25, guidance=4.0)
    lay_out(c, slice)
    return c
