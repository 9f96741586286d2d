"""Guidance as a map of denoisers: u + scale (c - u) for a denoiser c and a weaker one u.

The weaker one has the null condition (classifier-free guidance, Ho & Salimans 2022, eq. 6), or is another model with the same condition
(autoguidance, Karras et al. 2024, arXiv 2406.02507, eq. 3).
"""

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


def beside(denoise: Denoiser, weaker: Denoiser) -> Callable:
    """Function of (x, t) with the outputs of both; a flow map's target time goes with t."""
    return lambda x, *times: (denoise(x, *times), weaker(x, *times))


def guided(pair: Callable, scale: float, channels: int, rescale: float = 0.0) -> Denoiser:
    """Denoiser guided by `scale` on the first `channels` output channels; the rest (a learned variance) is the better one's.

    `pair(x, t)`: outputs of the better and of the weaker denoiser. With scale 1 it is the better one. `rescale`: see `rescaled`.
    """

    def denoise(x, *times):
        better, weaker = pair(x, *times)
        c, u = better[..., :channels], weaker[..., :channels]
        out = u + scale * (c - u)
        out = rescaled(out, c, rescale) if rescale else out
        return jnp.concatenate([out, better[..., channels:]], axis=-1)

    return denoise


def rescaled(out: jax.Array, conditional: jax.Array, share: float) -> jax.Array:
    """`share` of the guided output (b, h, w, c) with the standard deviation of the conditional one, image by image, and the rest as it is.

    Against the saturation of large scales (Lin et al. 2023, arXiv 2305.08891, eq. 15 and 16).
    """
    wanted, found = (images.std(axis=(1, 2, 3), keepdims=True) for images in (conditional, out))
    return share * out * jnp.where(found > 0, wanted / found, 1.0) + (1 - share) * out


def within(guided: Denoiser, plain: Denoiser, low: float, high: float) -> Denoiser:
    """Denoiser that is `guided` at times in [low, high] and `plain` elsewhere, at half the cost (Kynkäänniemi et al. 2024).

    All images of a call must share one time, as in a sampler, because the branch is chosen once per call.
    """

    def denoise(x, t, *target):
        return jax.lax.cond((t[0] >= low) & (t[0] <= high), guided, plain, x, t, *target)

    return denoise
