"""Each metric of samples against its closed form or a slow loop, streams against one go, and what is refused."""

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_jax.config import DataConfig, EvalConfig
from dit_jax.data.scenes import asked
from dit_jax.data.source import open_source
from dit_jax.data.words import prompts
from dit_jax.error import UsageError
from dit_jax.metrics import extrapolate, features, frechet, inception_score, kernel
from dit_jax.metrics.precision_recall import precision, recall
from dit_jax.metrics.psnr import Originals
from dit_jax.metrics.table import METRICS
from dit_jax.networks.reference import read_reference


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def score(logits, splits=1):
    place = inception_score.assign(len(logits), splits)
    empty = inception_score.empty(logits.shape[1])
    return inception_score.score([inception_score.update(empty, logits[place == s]) for s in range(splits)])


# ---- Inception Score


@pytest.mark.parametrize("classes", [2, 10, 1008])
def test_score_of_sure_and_balanced_is_the_number_of_classes(classes):
    sure = np.where(np.tile(np.eye(classes), (3, 1)) > 0, 0.0, -1e4)  # p = exp(-1e4) is 0
    np.testing.assert_allclose(score(sure), (classes, 0), rtol=1e-12)


def test_score_of_uniform_and_of_equal_samples_is_one():
    np.testing.assert_allclose(score(np.full((20, 7), 3.0), splits=4), (1, 0), atol=1e-12)
    np.testing.assert_allclose(score(np.tile(normal(0, 1, 7), (20, 1)), splits=4), (1, 0), atol=1e-12)


def test_score_equals_a_loop_over_its_definition():
    logits, scores = normal(1, 47, 6) * 3, []
    for s in range(5):
        part = logits[s * 47 // 5 : (s + 1) * 47 // 5]
        p = [np.exp(row) / sum(np.exp(row)) for row in part]
        q = sum(p) / len(p)
        scores.append(np.exp(sum(sum(a * np.log(a / b) for a, b in zip(row, q, strict=True)) for row in p) / len(p)))
    np.testing.assert_allclose(score(logits, splits=5), (np.mean(scores), np.std(scores)), rtol=1e-12)


def test_score_ignores_a_shift_of_all_logits():
    logits = normal(2, 30, 5)
    np.testing.assert_allclose(score(logits + normal(3, 30, 1) * 1e3), score(logits), rtol=1e-9)


def test_splits_share_all_samples_in_their_order():
    place = inception_score.assign(103, 10)
    assert np.array_equal(place, np.sort(place)) and set(np.bincount(place)) == {10, 11}


# ---- kernel distance


def test_mmd2_equals_a_loop_over_its_definition():
    x, y = normal(4, 7, 3), normal(5, 5, 3) + 0.5

    def k(a, b):
        return (np.dot(a, b) / 3 + 1) ** 3

    within = [np.mean([k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]) for z in (x, y)]
    across = np.mean([k(a, b) for a in x for b in y])
    np.testing.assert_allclose(kernel.mmd2(x, y), sum(within) - 2 * across, rtol=1e-12)


def test_kernel_distance_of_one_distribution_is_zero_within_its_error():
    z = normal(6, 4000, 16)
    same = kernel.distance(z[:2000], z[2000:], subsets=30, size=200)
    apart = kernel.distance(z[:2000], z[2000:] + 0.3, subsets=30, size=200)
    assert abs(same.mean) < 2 * same.std  # subsets share samples: more than std / sqrt(30)
    assert apart.mean > 10 * same.std
    assert same == kernel.distance(z[:2000], z[2000:], subsets=30, size=200)
    assert same != kernel.distance(z[:2000], z[2000:], subsets=30, size=200, seed=1)


def test_kernel_distance_is_that_of_its_subsets_whichever_way_it_is_computed():
    x, y = normal(10, 90, 5), normal(11, 70, 5) + 0.2
    for subsets, size in ((40, 60), (2, 30)):  # each pair of samples once; subset by subset
        rng = np.random.RandomState(3)
        drawn = [
            (x[rng.choice(90, size, replace=False)], y[rng.choice(70, size, replace=False)]) for _ in range(subsets)
        ]
        values = [kernel.mmd2(mine, theirs) for mine, theirs in drawn]
        found = kernel.distance(x, y, subsets, size, seed=3)
        np.testing.assert_allclose((found.mean, found.std), (np.mean(values), np.std(values)), rtol=1e-11)


# ---- precision and recall


def loop_precision(x, y, k):
    """The fraction of x within a ball of y, by loops."""
    radii = [sorted(np.linalg.norm(a - b) for j, b in enumerate(y) if j != i)[k - 1] for i, a in enumerate(y)]
    return np.mean([any(np.linalg.norm(a - b) <= r for b, r in zip(y, radii, strict=True)) for a in x])


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_precision_and_recall_equal_loops_in_blocks_of_any_size(block):
    x, y = normal(7, 40, 4) * 0.7, normal(8, 30, 4) + 1.0
    found = [fraction(x, y, k=3, block=block) for fraction in (precision, recall)]
    np.testing.assert_allclose(found, (loop_precision(x, y, 3), loop_precision(y, x, 3)), rtol=1e-12)
    assert 0 < found[0] < 1 and 0 < found[1] < 1


def test_precision_and_recall_of_clusters():
    one, two, three = (normal(i, 50, 8) * 0.01 + place for i, place in enumerate((0.0, 10.0, 20.0)))
    both = np.concatenate([one, two])

    def found(generated, real):
        return precision(generated, real), recall(generated, real)

    assert found(both, both) == (1, 1)
    assert found(one, both)[0] > 0.9  # all that is made is real,
    assert found(one[:25], np.concatenate([one[:25], two])) == (1, 25 / 75)  # half is missed
    assert found(np.concatenate([one, three]), one) == (0.5, 1)
    assert found(three, both) == (0, 0)


# ---- Fréchet distance over N


def test_distance_of_gaussian_samples_is_that_of_their_gaussians():
    x = normal(9, 200_000, 4) * [1, 2, 3, 4] + 1
    stats = frechet.update(frechet.empty(4), x)
    found = frechet.frechet_distance(*frechet.mean_cov(stats), np.zeros(4), np.eye(4))
    np.testing.assert_allclose(found, 4 + 0 + 1 + 4 + 9, rtol=0.01)


def test_a_planted_line_is_recovered():
    counts = np.linspace(5000, 50_000, 15)
    line = extrapolate.fit_line(counts, 12.5 + 3e4 / counts)
    np.testing.assert_allclose((line.limit, line.slope), (12.5, 3e4), rtol=1e-10)
    assert line.limit_se < 1e-10
    z = [extrapolate.fit_line(counts, 12.5 + 3e4 / counts + 0.1 * normal(i, 15)) for i in range(400)]
    z = [(line.limit - 12.5) / line.limit_se for line in z]
    assert abs(np.mean(z)) < 0.2 and 0.9 < np.std(z) < 1.3  # Student's t with 13 degrees: 1.09


def test_the_limit_is_closer_to_the_truth_than_any_n():
    x, width = normal(10, 8000, 32) + 0.1, 32
    line = extrapolate.infinite(x, np.zeros(width), np.eye(width), counts=[250, 500, 1000, 2000, 4000, 8000])
    truth = width * 0.01
    assert line.slope > 0 and (line.values > truth).all()
    assert abs(line.limit - truth) < 0.3 * abs(line.values[2] - truth)


def test_the_bootstrap_holds_the_distance_expected_at_its_n():
    gaussian = np.zeros(8), np.eye(8)
    draws = [normal(seed, 300, 8) + 0.5 for seed in range(300)]
    values = [extrapolate.bootstrap(x, *gaussian, resamples=2).value for x in draws]
    found = [extrapolate.bootstrap(x, *gaussian, resamples=60, seed=i) for i, x in enumerate(draws[:60])]
    assert [f.value for f in found] == values[:60]
    assert np.mean([f.low < np.mean(values) < f.high for f in found]) > 0.85  # 0.95 but for 60 resamples and 60 draws
    widths = [f.high - f.low for f in found]
    np.testing.assert_allclose(np.mean(widths), 2 * 1.96 * np.std(values), rtol=0.2)


# ---- the rows of the table

SCENES = open_source(DataConfig(dataset="scenes", image_size=16, cache=False), "test")
SET = {
    "pool": normal(20, 60, 6),
    "spatial": normal(21, 60, 5),
    "logits": normal(22, 60, 7),
    "cells": normal(24, 60, 40),
}
SET["images"] = SCENES.read(np.arange(60))[0]
REFERENCE = {
    "gaussian": (np.zeros(6), np.eye(6)),
    "spatial_gaussian": (np.zeros(5), np.eye(5)),
    "features": normal(23, 80, 6),
    "prompts": asked(prompts(SCENES, 60)),
    "captions": normal(25, 60, 6),
    "originals": Originals(40, lambda numbers: SET["images"][numbers][:, ::-1], lambda numbers: {}),
}


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 59), max_size=4, unique=True))
def test_batches_of_any_size_give_the_metrics_of_one_go(cuts):
    bounds = [0, *sorted(cuts), 60]
    for metric in METRICS.values():
        found = []
        for places in ([(0, 60)], itertools.pairwise(bounds)):
            state = None
            for a, b in places:
                state = metric.update(state, {name: part[a:b] for name, part in SET.items()}, 60)
            found.append(metric.finish(state, REFERENCE, EvalConfig(bootstrap=2)))
        assert list(found[0]) == list(found[1]) and "" in found[0], metric.name
        np.testing.assert_allclose(list(found[0].values()), list(found[1].values()), rtol=1e-9, atol=1e-12)


# ---- what is refused

BAD = np.array([[0.0, 1.0], [np.nan, 0.0], [2.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
PAIRS = {
    "kernel": lambda a, b: kernel.distance(a, b, subsets=2, size=5),
    "precision": lambda a, b: precision(a, b, k=4),
    "recall": lambda a, b: recall(a, b, k=4),
}


@pytest.mark.parametrize("metric", PAIRS)
def test_unusable_features_are_refused(metric):
    good, run = normal(13, 5, 2), PAIRS[metric]
    run(good, good)
    for pair in ((good, BAD), (BAD, good)):
        with pytest.raises(ValueError, match=r"^features: sample 1 is not finite, one of 1$"):
            run(*pair)
    with pytest.raises(ValueError, match=r"^features: found widths 2 and 3, expected the same$"):
        run(good, normal(14, 5, 3))
    with pytest.raises(ValueError, match=r"^features: found 4 samples, expected at least 5$"):
        run(good, good[:4])
    with pytest.raises(ValueError, match=r"^features: found shape \(5,\), expected \(n, d\)$"):
        run(good[:, 0], good)


def test_unusable_logits_and_counts_are_refused():
    empty = inception_score.empty(2)
    with pytest.raises(ValueError, match=r"^logits: found 1 values that are not finite$"):
        inception_score.update(empty, BAD)
    with pytest.raises(ValueError, match=r"^logits: found shape \(5, 2\), expected \(b, 3\)$"):
        inception_score.update(inception_score.empty(3), np.zeros((5, 2)))
    with pytest.raises(ValueError, match=r"found 10 splits of 9 samples, expected 1 to 9$"):
        inception_score.assign(9)
    with pytest.raises(ValueError, match=r"found splits of \[0\] samples"):
        inception_score.score([empty])
    x, gaussian = normal(15, 50, 2), (np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match=r"found counts \[10, 20, 51\], expected each of 2 to the 50 samples$"):
        extrapolate.infinite(x, *gaussian, counts=[10, 20, 51])
    with pytest.raises(ValueError, match=r"expected at least 3, not all the same$"):
        extrapolate.infinite(x, *gaussian, counts=[20, 20, 20])
    with pytest.raises(ValueError, match=r"^features: sample 1 is not finite"):
        extrapolate.bootstrap(BAD, *gaussian)
    with pytest.raises(
        ValueError, match=r"^Fréchet distance: found shapes \(2,\) and \(2, 2\), expected \(3,\) and \(3, 3\)"
    ):
        extrapolate.bootstrap(x, np.zeros(3), np.eye(3))


def test_room_is_checked_before_features_are_kept():
    features.check_room(131_072, 2048)
    with pytest.raises(ValueError, match="131,073 samples"):
        features.check_room(131_073, 2048)


# ---- references


@pytest.fixture(scope="module")
def gaussians():
    factor = normal(16, 2048, 40)
    cov = factor @ factor.T  # singular, as of fewer samples than features
    return {"mu": normal(17, 2048), "sigma": cov, "mu_s": normal(18, 2023), "sigma_s": np.eye(2023)}


def saved(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_references_of_all_kinds_are_read(tmp_path, gaussians):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    path = saved(tmp_path / "adm.npz", **gaussians, arr_0=images)
    found = read_reference(path)
    assert (found.kind, found.sha256) == ("adm", hashlib.sha256(path.read_bytes()).hexdigest())
    assert np.array_equal(found.mean, gaussians["mu"]) and np.array_equal(found.cov, gaussians["sigma"])
    assert np.array_equal(found.mean_spatial, gaussians["mu_s"]) and found.cov_spatial.shape == (2023, 2023)
    assert np.array_equal(found.images, images)
    single = {f"ref_{name}": gaussians[name].astype(np.float32) for name in ("mu", "sigma")}
    found = read_reference(saved(tmp_path / "jax.npz", **single))  # float32: eigenvalues just below 0
    assert found.kind == "jax-fid" and found.cov.dtype == np.float64 and found.mean_spatial is None
    plain = dict(mu=gaussians["mu"], sigma=np.eye(2048, dtype=np.float16))
    assert read_reference(saved(tmp_path / "plain.npz", **plain)).kind == "pytorch-fid"
    found = read_reference(saved(tmp_path / "images.npz", arr_0=images))
    assert found.kind == "images" and found.mean is None and np.array_equal(found.images, images)


def changed(matrix, change):
    matrix = matrix.copy()
    change(matrix)
    return matrix


def test_unusable_references_are_refused(tmp_path, gaussians):
    mu, sigma, eye = gaussians["mu"], gaussians["sigma"].astype(np.float32), np.eye(2048, dtype=np.float16)
    negative = sigma - 0.01 * np.linalg.norm(sigma) * eye.astype(np.float32)
    cases = {
        r"mu: found shape \(768,\), expected \(2048,\); these are statistics of another": dict(
            mu=np.zeros(768), sigma=eye[:768, :768]
        ),
        r"sigma: found shape \(2048,\), expected \(2048, 2048\)": dict(mu=mu, sigma=mu),
        "mu: found float64 with values that are no finite": dict(
            mu=changed(mu, lambda m: m.put(3, np.nan)), sigma=sigma
        ),
        "mu: found int64 with values": dict(mu=np.zeros(2048, np.int64), sigma=eye),
        "sigma: found entries that differ by": dict(mu=mu, sigma=changed(eye, lambda s: s.__setitem__((0, 1), 0.5))),
        "sigma: found the eigenvalue -.*expected none below 0": dict(mu=mu, sigma=negative),
        r"mu_s: found shape \(2048,\), expected \(2023,\)": dict(mu=mu, sigma=eye, mu_s=mu, sigma_s=eye),
        r"arr_0: found float64 \(2, 8, 8, 3\), expected uint8 images": dict(arr_0=np.zeros((2, 8, 8, 3))),
        "found the arrays x, expected one of: mu, sigma, mu_s": dict(x=mu),
    }
    for i, (message, arrays) in enumerate(cases.items()):
        path = saved(tmp_path / f"{i}.npz", **arrays)
        with pytest.raises(UsageError, match=f"^{path}: {message}"):
            read_reference(path)
    path = tmp_path / "objects.npz"
    np.savez(path, mu=np.array([{}], object))
    with pytest.raises(UsageError, match="never unpickled"):
        read_reference(path)
