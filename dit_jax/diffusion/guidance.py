"""Classifier-free guidance as a map of denoisers (Ho & Salimans 2022, eq. 6, as u + scale (c - u))."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dit_jax.diffusion.process import Denoiser


def paired(model: Callable, cond, null) -> Callable:
    """Turns `model(x, t, cond)` into a function of (x, t) with the conditional and the unconditional output of one model call; a flow
    map's target time goes with t.

    `cond` and the null condition `null` are pytrees of arrays (b, ...). The two halves are interleaved image by image, so a sharded
    batch needs no resharding.
    """
    both = jax.tree.map(lambda c, n: jnp.stack([c, n], axis=1).reshape(-1, *c.shape[1:]), cond, null)

    def pair(x, t, *target):
        x, t, *target = (jnp.repeat(array, 2, axis=0) for array in (x, t, *target))
        out = model(x, t, both, *target)
        out = out.reshape(out.shape[0] // 2, 2, *out.shape[1:])
        return out[:, 0], out[:, 1]

    return pair


def classifier_free(pair: Callable, scale: float, channels: int) -> Denoiser:
    """Denoiser guided by `scale` on the first `channels` output channels; the rest (a learned variance) is conditional.

    With scale 1 it is plainly conditional.
    """

    def denoise(x, *times):
        conditional, unconditional = pair(x, *times)
        c, u = conditional[..., :channels], unconditional[..., :channels]
        return jnp.concatenate([u + scale * (c - u), conditional[..., channels:]], axis=-1)

    return denoise


def within(guided: Denoiser, plain: Denoiser, low: float, high: float) -> Denoiser:
    """Denoiser that is `guided` at times in [low, high] and `plain` elsewhere, at half the cost (Kynkäänniemi et al. 2024).

    All images of a call must share one time, as in a sampler, because the branch is chosen once per call.
    """

    def denoise(x, t, *target):
        return jax.lax.cond((t[0] >= low) & (t[0] <= high), guided, plain, x, t, *target)

    return denoise
