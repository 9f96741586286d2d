"""Feature network of FID: Inception-v3 as in the TensorFlow graph of 2015-12-05, for inference.

Szegedy et al. 2015, arXiv 1512.00567, with the deviations of that graph: average pooling excludes padding from its counts, the last
block max-pools, images are resized as in TensorFlow 1, and there are 1008 classes. Blocks have the names of the published PyTorch
conversions, which `dit_jax.networks.inception` reads.

Only the order of summation differs: batch normalisation is folded into the kernels, all 1 x 1 convolutions of one tensor are one
matrix product, and average pooling, which commutes with a 1 x 1 convolution, acts on the narrower side.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SIZE = 299  # pixels a side, after resizing
WIDTH = 2048  # numbers in a pooled feature
SPATIAL = 17 * 17 * 7  # numbers in a spatial feature
CLASSES = 1008
EPSILON = 1e-3  # of batch normalisation
FULL = jax.lax.Precision.HIGHEST  # no reduced-precision products: scores are compared across machines


class Features(NamedTuple):
    """Network outputs for b images, float32.

    pool (b, 2048): `pool_3:0` of the graph, for FID, KID, precision and recall. spatial (b, 2023): the first 7 channels of
    `mixed_6/conv:0`, the rectified 1 x 1 branch of Mixed_6d, row by row, for sFID (Nash et al. 2021, arXiv 2103.03841, as in ADM's
    evaluator). logits (b, 1008), also without the last layer's bias, as torch-fidelity and ADM use them for the Inception Score.
    """

    pool: jax.Array
    spatial: jax.Array
    logits: jax.Array
    logits_unbiased: jax.Array


class _Weights(nn.Module):
    """Convolution with its batch normalisation folded in: kernel (h, w, in, out) and bias (out,)."""

    width: int
    window: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, width_in: int):
        kernel = self.param("kernel", nn.initializers.zeros, (*self.window, width_in, self.width))
        scale, bias, mean, var = (
            self.param(name, nn.initializers.zeros, (self.width,)) for name in ("scale", "bias", "mean", "var")
        )
        scale = scale / jnp.sqrt(var + EPSILON)
        return kernel * scale.reshape(1, 1, 1, -1), bias - mean * scale


def _rectify(x, bias):
    return jax.nn.relu(x + bias.reshape(1, 1, 1, -1))


def _conv(name: str, x, width: int, window: tuple[int, int], stride: int = 1, padding: str = "SAME"):
    """Convolution, batch normalisation, rectifier, with the weights `name` of the calling module."""
    kernel, bias = _Weights(width, window, name=name)(x.shape[-1])
    crop = stride == 1 and padding == "VALID"  # on a CPU, XLA is 2 to 3 times as fast with padding as without
    layout, padding = ("NHWC", "HWIO", "NHWC"), "SAME" if crop else padding
    y = jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=layout, precision=FULL)
    return _rectify(y[:, 1:-1, 1:-1] if crop else y, bias)


def _points(x, **widths: int) -> list:
    """All 1 x 1 convolutions of x, by name and width, as one product: (output before the bias, bias) for each."""
    kernels, biases = zip(*(_Weights(width, name=name)(x.shape[-1]) for name, width in widths.items()), strict=True)
    y = jnp.matmul(x.reshape(-1, x.shape[-1]), jnp.concatenate(kernels, -1)[0, 0], precision=FULL)
    parts = jnp.split(y.reshape(*x.shape[:3], -1), np.cumsum(list(widths.values()))[:-1], axis=-1)
    return list(zip(parts, biases, strict=True))


def _pool(x, combine, stride: int):
    """Pools windows of 3 x 3 by `combine`, one axis at a time; on a CPU slices are faster than `reduce_window`."""
    for axis in (1, 2):
        end = x.shape[axis] - 2
        parts = [jax.lax.slice_in_dim(x, i, i + end, stride, axis) for i in range(3)]
        x = combine(combine(parts[0], parts[1]), parts[2])
    return x


def _average(x):
    """Average over 3 x 3 windows with padding excluded from the counts."""
    h, w = (np.minimum(np.minimum(np.arange(n), n - 1 - np.arange(n)) + 2, 3) for n in x.shape[1:3])
    counts = np.outer(h, w).astype(np.float32).reshape(1, len(h), len(w), 1)
    return _pool(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), jnp.add, 1) / counts


def _maximum(x):
    return _pool(x, jnp.maximum, 2)


class _Block35(nn.Module):
    """Mixed_5b to 5d: (b, 35, 35, c) -> (b, 35, 35, 224 + pooled)."""

    pooled: int

    @nn.compact
    def __call__(self, x):
        one, five, three, pool = _points(x, branch1x1=64, branch5x5_1=48, branch3x3dbl_1=64, branch_pool=self.pooled)
        five = _conv("branch5x5_2", _rectify(*five), 64, (5, 5))
        three = _conv("branch3x3dbl_2", _rectify(*three), 96, (3, 3))
        three = _conv("branch3x3dbl_3", three, 96, (3, 3))
        return jnp.concatenate([_rectify(*one), five, three, _rectify(_average(pool[0]), pool[1])], -1)


class _Reduce35(nn.Module):
    """Mixed_6a: (b, 35, 35, 288) -> (b, 17, 17, 768)."""

    @nn.compact
    def __call__(self, x):
        three = _conv("branch3x3", x, 384, (3, 3), 2, "VALID")
        ((point, bias),) = _points(x, branch3x3dbl_1=64)
        double = _conv("branch3x3dbl_2", _rectify(point, bias), 96, (3, 3))
        double = _conv("branch3x3dbl_3", double, 96, (3, 3), 2, "VALID")
        return jnp.concatenate([three, double, _maximum(x)], -1)


class _Block17(nn.Module):
    """Mixed_6b to 6e: (b, 17, 17, 768) -> the same; `width` channels inside the 7 x 1 and 1 x 7 branches."""

    width: int

    @nn.compact
    def __call__(self, x):
        c, wide, high = self.width, (1, 7), (7, 1)
        one, seven, double, pool = _points(x, branch1x1=192, branch7x7_1=c, branch7x7dbl_1=c, branch_pool=192)
        seven = _conv("branch7x7_2", _rectify(*seven), c, wide)
        seven = _conv("branch7x7_3", seven, 192, high)
        double = _conv("branch7x7dbl_2", _rectify(*double), c, high)
        double = _conv("branch7x7dbl_3", double, c, wide)
        double = _conv("branch7x7dbl_4", double, c, high)
        double = _conv("branch7x7dbl_5", double, 192, wide)
        return jnp.concatenate([_rectify(*one), seven, double, _rectify(_average(pool[0]), pool[1])], -1)


class _Reduce17(nn.Module):
    """Mixed_7a: (b, 17, 17, 768) -> (b, 8, 8, 1280)."""

    @nn.compact
    def __call__(self, x):
        three, seven = _points(x, branch3x3_1=192, branch7x7x3_1=192)
        three = _conv("branch3x3_2", _rectify(*three), 320, (3, 3), 2, "VALID")
        seven = _conv("branch7x7x3_2", _rectify(*seven), 192, (1, 7))
        seven = _conv("branch7x7x3_3", seven, 192, (7, 1))
        seven = _conv("branch7x7x3_4", seven, 192, (3, 3), 2, "VALID")
        return jnp.concatenate([three, seven, _maximum(x)], -1)


class _Block8(nn.Module):
    """Mixed_7b and 7c: (b, 8, 8, c) -> (b, 8, 8, 2048); the last one max-pools."""

    last: bool

    @nn.compact
    def __call__(self, x):
        widths = dict(branch1x1=320, branch3x3_1=384, branch3x3dbl_1=448)
        if self.last:
            one, three, double = _points(x, **widths)
            around = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))  # zeros do: x is rectified
            ((pool, bias),) = _points(_pool(around, jnp.maximum, 1), branch_pool=192)
        else:
            one, three, double, (pool, bias) = _points(x, **widths, branch_pool=192)
            pool = _average(pool)
        three = _rectify(*three)
        double = _conv("branch3x3dbl_2", _rectify(*double), 384, (3, 3))
        parts = [
            _rectify(*one),
            _conv("branch3x3_2a", three, 384, (1, 3)),
            _conv("branch3x3_2b", three, 384, (3, 1)),
            _conv("branch3x3dbl_3a", double, 384, (1, 3)),
            _conv("branch3x3dbl_3b", double, 384, (3, 1)),
            _rectify(pool, bias),
        ]
        return jnp.concatenate(parts, -1)


class _Network(nn.Module):
    """Images (b, 299, 299, 3) in [-1, 1] -> Features."""

    @nn.compact
    def __call__(self, x):
        x = _conv("Conv2d_1a_3x3", x, 32, (3, 3), 2, "VALID")
        x = _conv("Conv2d_2a_3x3", x, 32, (3, 3), 1, "VALID")
        x = _conv("Conv2d_2b_3x3", x, 64, (3, 3))
        ((x, bias),) = _points(_maximum(x), Conv2d_3b_1x1=80)
        x = _conv("Conv2d_4a_3x3", _rectify(x, bias), 192, (3, 3), 1, "VALID")
        x = _maximum(x)
        x = _Block35(32, name="Mixed_5b")(x)
        x = _Block35(64, name="Mixed_5c")(x)
        x = _Block35(64, name="Mixed_5d")(x)
        x = _Reduce35(name="Mixed_6a")(x)
        x = _Block17(128, name="Mixed_6b")(x)
        x = _Block17(160, name="Mixed_6c")(x)
        x = _Block17(160, name="Mixed_6d")(x)
        spatial = x[..., :7].reshape(x.shape[0], -1)  # the 1 x 1 branch comes first
        x = _Block17(192, name="Mixed_6e")(x)
        x = _Reduce17(name="Mixed_7a")(x)
        x = _Block8(False, name="Mixed_7b")(x)
        x = _Block8(True, name="Mixed_7c")(x)
        pool = x.mean((1, 2))
        unbiased, bias = _Classifier(name="fc")(pool)
        return Features(pool, spatial, unbiased + bias.reshape(1, -1), unbiased)


class _Classifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.zeros, (WIDTH, CLASSES))
        return jnp.matmul(x, kernel, precision=FULL), self.param("bias", nn.initializers.zeros, (CLASSES,))


def _lerp(x, axis: int, size: int):
    """Resizes one axis linearly to `size` pixels; pixel i reads position i * old / new, the last pixel repeated."""
    old = x.shape[axis]
    place = np.arange(size, dtype=np.float32) * np.float32(old / size)
    low = np.minimum(place.astype(np.int32), old - 1)
    high, weight = np.minimum(low + 1, old - 1), place - low.astype(np.float32)
    weight = weight.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    start = jnp.take(x, low, axis)
    return start + (jnp.take(x, high, axis) - start) * weight


def resize(images: jax.Array, size: int = SIZE) -> jax.Array:
    """Resizes float32 (b, h, w, c) -> (b, size, size, c) as TensorFlow 1's `resize_bilinear(align_corners=False)`.

    It uses no half-pixel centres (pixel i reads position i * old / new) and no antialiasing.
    """
    if images.shape[1:3] == (size, size):
        return images
    return _lerp(_lerp(images, 2, size), 1, size)


def shapes() -> dict:
    """Shapes of the parameters, under the published names.

    A convolution has kernel (h, w, in, out) and its batch normalisation's scale, bias, mean and var; `fc` has kernel (2048, 1008) and bias.
    """
    return jax.eval_shape(_Network().init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))["params"]


def apply(params: dict, images: jax.Array) -> Features:
    """Features of images (b, h, w, 3): RGB, uint8 or floats in 0..255, any size. The caller compiles it.

    Raises ValueError on another shape.
    """
    if images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images: found shape {images.shape}, expected (b, h, w, 3)")
    x = resize(images.astype(jnp.float32))
    return _Network().apply({"params": params}, (x - 128.0) / 128.0)
