"""Our FID network beside torch-fidelity's, with the same weights, on real images of several sizes.

For sFID, `mixed_6/conv:0` of the TensorFlow graph is the output, after its rectifier, of Mixed_6d.branch1x1: the graph counts
the blocks mixed, mixed_1, ... from Mixed_5b on, and a block's bare `conv` is its 1 x 1 branch.
"""

import jax
import numpy as np
import pytest
from foreign import write_inception

from dit_jax.error import UsageError
from dit_jax.models import inception
from dit_jax.networks import inception as foreign
from dit_jax.networks.tensors import Tensors
from dit_jax.networks.weights import read_arrays
from parity.inception_pair import crops, digits, ours, photographs, save, theirs

SIZES = [(8, 8), (32, 32), (64, 96), (256, 256), (299, 299), (400, 400)]


@pytest.fixture(scope="module")
def weights(torch, tmp_path_factory):
    return save(torch, tmp_path_factory.mktemp("inception") / "weights.pth")


@pytest.fixture(scope="module")
def networks(torch_fidelity, weights):
    return jax.jit(inception.apply), ours(weights), theirs(torch_fidelity, weights)


def images(size):
    if size == (8, 8):
        return digits(2)
    return np.concatenate([crops(photo, 1, *size) for photo in photographs()])


def nchw(torch, x):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def error(found, expected):
    """The largest difference over the largest value, and over the expected spread between images."""
    worst = np.abs(np.asarray(found) - expected).max()
    return worst / np.abs(expected).max(), worst / expected.std(axis=0).max()


def run_theirs(torch, network, x):
    """Their three outputs and, from a hook, our spatial features."""
    seen = []
    hook = network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, out: seen.append(out.clone()))
    with torch.no_grad():
        pool, unbiased, logits = (y.numpy() for y in network(nchw(torch, x)))
    hook.remove()
    spatial = seen[0].numpy().transpose(0, 2, 3, 1)[..., :7].reshape(len(x), -1)
    return inception.Features(pool, spatial, logits, unbiased)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_features_agree(torch, networks, size):
    apply, params, network = networks
    x = images(size)
    resized = np.asarray(
        jax.jit(inception.resize)(x.astype(np.float32))
    )  # apply's first step: compiled once for all sizes
    found, expected = apply(params, resized), run_theirs(torch, network, x)
    assert found.pool.shape == (2, 2048) and found.spatial.shape == (2, 2023) and found.logits.shape == (2, 1008)
    for name in inception.Features._fields:
        errors = error(getattr(found, name), getattr(expected, name))
        print(f"{size} {name}: largest error over the largest value {errors[0]:.1e}, over the spread {errors[1]:.1e}")
        assert errors[0] <= 1e-5 and errors[1] <= 1e-4
    assert 0.1 < np.abs(expected.pool).mean() < 10


@pytest.mark.parametrize("size", [*SIZES, (1, 1), (2, 500), (300, 7)], ids=str)
def test_resize_agrees(torch, torch_fidelity, size):
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    x = images(size).astype(np.float32) if size[1] < 500 else crops(photographs()[0], 2, *size).astype(np.float32)
    expected = interpolate_bilinear_2d_like_tensorflow1x(nchw(torch, x), (299, 299), align_corners=False)
    found = np.asarray(jax.jit(inception.resize)(x))
    np.testing.assert_allclose(found, expected.numpy().transpose(0, 2, 3, 1), rtol=0, atol=1e-4)  # of 255


def test_weights_make_the_round_trip_and_are_read_strictly(weights):
    state = read_arrays(weights)
    written = write_inception(ours(weights))
    assert {n for n in state if n not in written} == {n for n in state if n.endswith("num_batches_tracked")}
    assert all(np.array_equal(state[name], value) for name, value in written.items())

    def read(**changes):
        state = {name: value for name, value in (written | changes).items() if value is not None}
        return foreign.read(Tensors(state, "weights.pth"))

    with pytest.raises(UsageError, match=r"^weights.pth: fc.bias: missing, among 471 tensors"):
        read(**{"fc.bias": None})
    with pytest.raises(
        UsageError, match=r"^weights.pth: fc.weight: found shape \(1000, 2048\), expected \(1008, 2048\)"
    ):
        read(**{"fc.weight": np.zeros((1000, 2048), np.float32)})
    with pytest.raises(UsageError, match=r"found 1 tensors that the network does not have: AuxLogits.fc.bias$"):
        read(**{"AuxLogits.fc.bias": np.zeros(3, np.float32)})
    name = "Mixed_7c.branch_pool.bn.running_var"
    with pytest.raises(UsageError, match=rf"^weights.pth: {name}: found -1.0, expected variances, none below 0$"):
        read(**{name: np.full(192, -1, np.float32)})
