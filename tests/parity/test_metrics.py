"""Metrics of two sets of photographs' crops beside torch-fidelity's functions, from the same network's features.

The definitions agree but for these, each of which is tested both ways:
- Inception Score: torch-fidelity shuffles before it splits (seed 2020), papers and we do not.
- kernel distance: torch-fidelity works in the features' own precision, we in float64; subsets are the same ones.
- precision and recall: likewise; on a ball's very border a sample may fall on either side in float32.
- Fréchet distance: both take the unbiased covariance. Eigenvalues of S1 S2 (theirs) lose half the digits where it is singular,
  singular values of the roots' product (ours) do not: so they are compared where samples outnumber features and where not.
"""

import jax
import numpy as np
import pytest

from dit_jax.config import Config, EvalConfig, MeshConfig
from dit_jax.devices.mesh import make_mesh
from dit_jax.error import UsageError
from dit_jax.evaluation import scores
from dit_jax.metrics import frechet, inception_score, kernel
from dit_jax.metrics.precision_recall import precision, recall
from dit_jax.models import inception
from dit_jax.networks import transfer
from parity.inception_pair import crops, ours, photographs, save, theirs

COUNT, CHUNK = 80, 20


@pytest.fixture(scope="module")
def weights(torch, tmp_path_factory):
    return save(torch, tmp_path_factory.mktemp("inception") / "weights.pth")


@pytest.fixture(scope="module")
def images():
    """Two sets uint8 (80, 64, 64, 3): mostly of one photograph, and of both alike."""
    pairs = [[crops(photo, COUNT, 64, 64, seed) for photo in photographs()] for seed in (1, 2)]
    return [np.concatenate([a[:share], b[share:]]) for (a, b), share in zip(pairs, (65, 40), strict=True)]


@pytest.fixture(scope="module")
def sets(weights, images):
    """(pool (80, 2048), logits (80, 1008)) of each."""
    params, apply, found = ours(weights), jax.jit(inception.apply), []
    for x in images:
        parts = [apply(params, x[i : i + CHUNK]) for i in range(0, COUNT, CHUNK)]
        found.append(tuple(np.concatenate([getattr(p, name) for p in parts]) for name in ("pool", "logits_unbiased")))
    return found


def test_features_of_bytes_are_theirs(torch, torch_fidelity, weights, images, sets):
    x = torch.from_numpy(images[0][:4].transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        expected = [y.numpy() for y in theirs(torch_fidelity, weights)(x)]
    for found, other in zip(sets[0], expected, strict=False):
        np.testing.assert_allclose(found[:4], other, rtol=0, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("width", [48, 256])
def test_frechet_distance_agrees(torch, torch_fidelity, sets, width):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    pools = [pool[:, :width] for pool, _ in sets]
    expected = fid_statistics_to_metric(
        *(fid_features_to_statistics(torch.from_numpy(p)) for p in pools), verbose=False
    )
    stats = [frechet.update(frechet.empty(width), p) for p in pools]
    found = frechet.frechet_distance(*frechet.mean_cov(stats[0]), *frechet.mean_cov(stats[1]))
    print("FID", width, found, expected)
    np.testing.assert_allclose(found, expected["frechet_inception_distance"], rtol=1e-3)
    assert (stats[0].count > width) == (width == 48) and found > 1e-3


@pytest.mark.parametrize("seed", [2020, None])
@pytest.mark.parametrize("decided", [False, True])
def test_inception_score_agrees(torch, torch_fidelity, sets, seed, decided):
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = sets[1][1]  # of random weights: much alike for all images, and the score is little above 1
    if decided:
        logits = 5 * (logits - logits.mean(axis=0)) / logits.std(axis=0)
    expected = isc_features_to_metric(torch.from_numpy(logits), splits=10, shuffle=seed is not None)
    if seed is not None:
        logits = logits[np.random.RandomState(seed).permutation(COUNT)]
    place, empty = inception_score.assign(COUNT, 10), inception_score.empty(1008)
    mean, std = inception_score.score([inception_score.update(empty, logits[place == s]) for s in range(10)])
    print("IS", decided, seed, mean, std, expected)
    np.testing.assert_allclose(mean - 1, expected["inception_score_mean"] - 1, rtol=1e-3)
    np.testing.assert_allclose(std, expected["inception_score_std"], rtol=1e-3)
    assert not decided or mean > 2


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_kernel_distance_agrees(torch, torch_fidelity, sets, dtype):
    from torch_fidelity.metric_kid import kid_features_to_metric

    pools = [torch.from_numpy(pool.astype(dtype)) for pool, _ in sets]
    expected = kid_features_to_metric(*pools, kid_subsets=20, kid_subset_size=50, verbose=False)
    found = kernel.distance(sets[0][0], sets[1][0], subsets=20, size=50)
    print("KID", dtype, found, expected)
    rtol = 1e-3 if dtype == "float32" else 1e-9
    np.testing.assert_allclose(found.mean, expected["kernel_inception_distance_mean"], rtol=rtol)
    np.testing.assert_allclose(found.std, expected["kernel_inception_distance_std"], rtol=rtol)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_agree(torch, torch_fidelity, sets, dtype, k):
    from torch_fidelity.metric_prc import prc_features_to_metric

    pools = [torch.from_numpy(pool.astype(dtype)) for pool, _ in sets]
    options = dict(prc_neighborhood=k, prc_batch_size=1000, save_cpu_ram=False, verbose=False)
    expected = prc_features_to_metric(*pools, **options)
    found = [fraction(sets[0][0], sets[1][0], k, block=50) for fraction in (precision, recall)]
    print("precision, recall", dtype, k, found, expected)
    np.testing.assert_allclose(found, (expected["precision"], expected["recall"]), rtol=1e-3)
    assert all(0 < f < 1 for f in found)


def test_a_converted_network_gives_the_evaluation_job_these_features(torch, weights, images, sets, tmp_path):
    """From the published file's names through `convert` to the rows that `evaluate` streams; gray images as three alike."""
    folder = str(tmp_path / "inception")
    transfer.import_network("inception", str(weights), folder)
    cfg = Config(eval=EvalConfig(features="inception", inception=folder, samples=3000))
    network = scores.open_network(cfg, make_mesh(MeshConfig(), jax.devices()[:1]))
    parts = network.split(network.rows(images[0][:18]))
    for name, expected in zip(("pool", "logits"), sets[0], strict=True):
        np.testing.assert_allclose(parts[name], expected[:18], rtol=0, atol=1e-5 * np.abs(expected).max())
    assert parts["spatial"].shape == (18, 2023) and np.ptp(parts["spatial"], axis=0).max() > 0
    gray = images[0][:2, :, :, :1]
    np.testing.assert_array_equal(network.rows(gray), network.rows(np.repeat(gray, 3, axis=3)))
    with pytest.raises(UsageError, match="found 2048, expected more than the 2048 features"):
        scores.check_number(Config(eval=EvalConfig(samples=2048, features="inception")), "eval.samples")
