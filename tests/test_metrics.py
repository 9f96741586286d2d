"""Streamed statistics, the Fréchet distance and the network that gives `fd_digits` its features."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_jax.config import Config, DataConfig, EvalConfig, MeshConfig
from dit_jax.data import pipeline, source
from dit_jax.devices.mesh import make_mesh
from dit_jax.error import UsageError
from dit_jax.evaluation import scores
from dit_jax.metrics import frechet
from dit_jax.models import classifier
from dit_jax.networks.folder import DIGITS, load_network
from dit_jax.training import classifier as features

RNG = np.random.default_rng(0)


def random_cov(width, rank):
    a = RNG.standard_normal((width, rank))
    return a @ a.T


def statistics(x):
    return frechet.update(frechet.empty(x.shape[1]), x)


def assert_close(a, b):
    assert a.count == b.count
    np.testing.assert_allclose(a.mean, b.mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(a.scatter, b.scatter, rtol=1e-10, atol=1e-9)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return DataConfig(data_dir=str(tmp_path_factory.mktemp("tfds")))


@pytest.fixture(scope="module")
def network():
    _, params, meta = load_network(DIGITS, "classifier")
    return jax.jit(classifier.apply), params, meta


# ---- statistics


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 120), max_size=6), st.randoms(use_true_random=False))
def test_streaming_equals_one_shot(cuts, random):
    x = 50.0 + np.random.default_rng(len(cuts)).standard_normal((120, 5)) @ np.diag([1e-3, 1, 1, 10, 100])
    whole, parts = statistics(x), np.split(x, sorted(cuts))
    streamed = frechet.empty(5)
    for part in parts:
        streamed = frechet.update(streamed, part)
    assert_close(streamed, whole)
    random.shuffle(parts)
    shuffled = frechet.empty(5)
    for part in parts:
        shuffled = frechet.update(shuffled, part)
    assert_close(shuffled, whole)
    mean, cov = frechet.mean_cov(streamed)
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(x.T), rtol=1e-9, atol=1e-12)


def test_float32_features_far_from_zero_keep_their_variance():
    x = (1000 + RNG.standard_normal((4000, 3))).astype(np.float32)
    _, cov = frechet.mean_cov(statistics(x))
    np.testing.assert_allclose(cov, np.cov(x.astype(np.float64).T), rtol=1e-10, atol=1e-12)


def test_unusable_features_are_refused():
    bad = np.zeros((4, 3))
    bad[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"^features: sample 12 is not finite, one of 1 in a batch of 4$"):
        frechet.update(statistics(np.ones((10, 3))), bad)
    with pytest.raises(ValueError, match=r"^features: found shape \(4, 3\), expected \(b, 5\)$"):
        frechet.update(frechet.empty(5), np.zeros((4, 3)))
    with pytest.raises(ValueError, match=r"^statistics: found 1 samples, expected at least 2 for a covariance$"):
        frechet.mean_cov(statistics(np.ones((1, 3))))


# ---- distance


def test_distance_in_one_dimension_is_closed_form():
    found = frechet.frechet_distance(np.array([1.0]), np.array([[4.0]]), np.array([3.0]), np.array([[9.0]]))
    np.testing.assert_allclose(found, (1 - 3) ** 2 + (2 - 3) ** 2)


def test_distance_of_commuting_covariances_is_closed_form():
    rotation = np.linalg.qr(RNG.standard_normal((6, 6)))[0]
    a, b = RNG.uniform(0, 5, (2, 6))
    a[0] = b[1] = 0.0  # singular
    means = RNG.standard_normal((2, 6))
    found = frechet.frechet_distance(means[0], (rotation * a) @ rotation.T, means[1], (rotation * b) @ rotation.T)
    expected = np.sum((means[0] - means[1]) ** 2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_distance_of_covariances_that_share_few_directions_is_exact():
    """Singular covariances of 300 and 400 directions, 100 of them in both: roots of eigenvalues that should be 0 would add up to 1e-7."""
    axes = np.linalg.qr(RNG.standard_normal((600, 600)))[0]
    a, b = np.zeros((2, 600))
    a[:300], b[200:] = RNG.uniform(1, 2, 300), RNG.uniform(1, 2, 400)
    found = frechet.frechet_distance(np.zeros(600), (axes * a) @ axes.T, np.zeros(600), (axes * b) @ axes.T)
    np.testing.assert_allclose(found, np.sum((np.sqrt(a) - np.sqrt(b)) ** 2), rtol=1e-12)


def test_distance_agrees_with_the_matrix_square_root():
    for width in (2, 8, 64):
        means, covs = RNG.standard_normal((2, width)), [random_cov(width, 3 * width) for _ in range(2)]
        root = scipy.linalg.sqrtm(covs[0] @ covs[1]).real
        expected = np.sum((means[0] - means[1]) ** 2) + np.trace(covs[0] + covs[1] - 2 * root)
        found = frechet.frechet_distance(means[0], covs[0], means[1], covs[1])
        np.testing.assert_allclose(found, expected, rtol=1e-9)
        np.testing.assert_allclose(found, frechet.frechet_distance(means[1], covs[1], means[0], covs[0]), rtol=1e-9)


@pytest.mark.parametrize("rank", [64, 10, 1])
def test_distance_of_equals_is_zero(rank):
    mean, cov = RNG.standard_normal(64), random_cov(64, rank)
    assert 0 <= frechet.frechet_distance(mean, cov, mean, cov) < 1e-10
    np.testing.assert_allclose(frechet.frechet_distance(mean, cov, mean + 1, cov), 64, rtol=1e-10)


def test_distance_refuses_shapes_that_do_not_match():
    eye = np.eye(3)
    with pytest.raises(ValueError, match=r"found shapes \(3,\), \(3, 3\), \(4,\), \(4, 4\), expected"):
        frechet.frechet_distance(np.zeros(3), eye, np.zeros(4), np.eye(4))
    with pytest.raises(ValueError, match="not finite"):
        frechet.frechet_distance(np.zeros(3), eye, np.zeros(3), np.full((3, 3), np.inf))


# ---- the feature network


def test_fd_digits_tells_digits_from_noise(data, network):
    apply, params, _ = network
    train, test = (pipeline.load_arrays(data, split)[0] for split in ("train", "test"))
    noise = RNG.uniform(-1, 1, test.shape).astype(np.float32)
    blurred = np.clip(test + RNG.normal(0, 0.3, test.shape).astype(np.float32), -1, 1)
    reference = frechet.mean_cov(statistics(apply(params, train)[0]))

    def distance(images):
        return frechet.frechet_distance(*reference, *frechet.mean_cov(statistics(apply(params, images)[0])))

    assert distance(train) < 1e-9
    assert 0.2 < distance(test) < 0.6 < distance(blurred) < 10 < distance(noise)


def test_recorded_accuracy_is_reproduced(data, network):
    apply, params, meta = network
    images, cond = pipeline.load_arrays(data, "test")
    found, logits = apply(params, images)
    assert found.shape == (len(images), classifier.WIDTH) and found.dtype == np.float32
    assert np.mean(np.argmax(np.asarray(logits), 1) == cond["label"]) == meta["source"]["accuracy"] >= 0.98
    assert features.accuracy(params, images, cond["label"]) == meta["source"]["accuracy"]
    assert source.open_source(data, "test").describe() == meta["source"]["held_out"]


def test_shipped_weights_are_those_that_records_name(network):
    _, params, meta = network
    assert meta["sha256"] == "7c384d19f6068a17dfc347d28702cc9629ffe236999d57e6c656eab3ff97267a"
    fresh = jax.eval_shape(lambda: classifier.init(jax.random.key(0), (8, 8, 1), 10))
    assert jax.tree.map(np.shape, fresh) == jax.tree.map(np.shape, params)


@pytest.mark.parametrize("shape", [(1, 1, 1), (28, 28, 1), (32, 32, 3), (256, 256, 3)])
def test_the_network_of_any_images_ends_in_64_features(shape):
    def both(key):
        return classifier.apply(classifier.init(key, shape, 7), jax.numpy.zeros((2, *shape)))

    assert [found.shape for found in jax.eval_shape(both, jax.random.key(0))] == [(2, 64), (2, 7)]


def test_a_network_of_ones_own_data_is_trained_scored_and_named_in_the_protocol(data, tmp_path):
    out = str(tmp_path / "net")
    meta = features.run(data, out, steps=3, seed=1)
    assert meta["source"].items() >= {"dataset": "digits", "split": "train", "steps": 3, "seed": 1}.items()
    cfg = Config(data=data, eval=EvalConfig(features="classifier", classifier=out, samples=100, bootstrap=0))
    network = scores.open_network(cfg, make_mesh(MeshConfig()))
    scores.check_config(cfg, "eval.samples")
    said = f"accuracy {meta['source']['accuracy']:.4f} on 355 images of digits"
    assert network.sha256 == meta["sha256"] and scores.describe(network)["classifier"] == said
    assert {"fd_classifier", "is_classifier"} <= set(scores.real_scores(cfg, network))
    with pytest.raises(UsageError, match=r"takes images of shape \(8, 8, 1\), found samples of \(32, 32, 3\)"):
        scores.keeping(network, (32, 32, 3))
    with pytest.raises(
        UsageError, match=r"^eval\.classifier: empty, expected the folder .*python -m dit_jax\.features"
    ):
        scores.check_config(Config(eval=EvalConfig(features="classifier", samples=100)), "eval.samples")
    for broken, message in (
        ({"split": "test"}, "shares images with data.split"),
        ({"held_out_split": "train[:9]"}, "shares images with data.split"),
    ):
        with pytest.raises(UsageError, match=message):
            features.run(dataclasses.replace(data, **broken), str(tmp_path / "other"), steps=3, seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


def test_augmentation_only_shifts_and_adds_bounded_noise():
    images = np.full((256, 8, 8, 1), -1.0, np.float32)
    images[:, 3, 4] = 1.0
    seen = np.asarray(features.augment(jax.random.key(0), jax.numpy.asarray(images)))[..., 0]
    places = [np.unravel_index(np.argmax(image), (8, 8)) for image in seen]
    assert {(int(y), int(x)) for y, x in places} == {(y, x) for y in (2, 3, 4) for x in (3, 4, 5)}
    assert 0.05 < np.std(seen[:, 7]) < features.NOISE
