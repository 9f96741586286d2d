"""Class-conditional DiT on ImageNet at 512 x 512, in SD-VAE latents (Peebles & Xie 2023); any of the 12 published sizes.

    python -m dit_jax.train --config=configs/imagenet512.py:DiT-XL/2 --config.data.latents=latents/512 --workdir=runs/xl2_512

Encode latents first, with the published autoencoder (file or folder), and sample images afterwards:

    python -m dit_jax.convert --source=sd-vae --weights=sd-vae-ft-ema --out=nets/ft-ema
    python -m dit_jax.encode --config=configs/imagenet512.py --autoencoder=nets/ft-ema --out=latents/512
    python -m dit_jax.sample --workdir=runs/xl2_512 --autoencoder=nets/ft-ema --num=64 --out=samples.npz

The latents take 168 GB: mean and log-variance of each image and its mirror image, in float16.

Expected from the paper (XL/2 after 3M steps, 250 DDPM steps, EMA weights, ft-ema decoder); not run here:

    FID-50K     12.03 unguided    4.64 at guidance 1.25    3.04 at guidance 1.5

An XL/2 image is 1,024 tokens and 525 GMACs a forward pass, 4.4 times the 256-pixel model's. `configs/imagenet512.py:DiT-XL/2,v4-256`
sets mesh, remat, accumulation and unroll (docs/meshes.md), `DiT-XL/2,v4-256,1024` with another batch. Without a slice the
state (XL/2: 11 GB of weights, moments and EMA) is shared by 4 devices.
"""

from dataclasses import asdict

from dit_jax.config import model_config, template
from dit_jax.devices.layout import argument, lay_out


def get_config(arg="DiT-XL/2"):
    """`arg`: MODEL[,SLICE[,BATCH]]."""
    model, slice, batch = argument(arg, "DiT-XL/2")
    c = template()
    c.model.update(asdict(model_config(model, image_size=512, dtype="bfloat16", remat="dots")))
    c.diffusion.update(process="ddpm", schedule="linear", timesteps=1000)
    c.data.update(dataset="imagenet2012", held_out_split="validation", image_size=512, flip=True, cache=False)
    c.data.update(workers=16)
    c.optim.update(learning_rate=1e-4, schedule="constant", warmup_steps=0, weight_decay=0.0, b1=0.9, b2=0.999)
    c.optim.update(ema="constant", ema_decay=0.9999)
    c.train.update(steps=3_000_000, batch_size=batch or 256, cond_dropout=0.1, checkpoint_every=50_000)
    c.mesh.fsdp = 4
    c.sample.update(sampler="ddpm", steps=250, guidance=1.5, channels="first3", labels="uniform")
    c.eval.update(max_images=10_000)
    lay_out(c, slice)
    return c
