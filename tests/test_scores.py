"""Sample metrics from features to numbers: networks, references of every kind, and that parts and order of arrival change nothing."""

import dataclasses
import hashlib

import numpy as np
import pytest

from dit_jax.config import Config, DataConfig, EvalConfig, MeshConfig
from dit_jax.data.pipeline import load_arrays
from dit_jax.devices.mesh import make_mesh
from dit_jax.error import UsageError
from dit_jax.evaluation import scores
from dit_jax.metrics import frechet, kernel
from dit_jax.metrics.precision_recall import precision, recall

EVAL = EvalConfig(samples=355, bootstrap=5)


@pytest.fixture(scope="module")
def cfg(data_dir):
    return Config(data=DataConfig(data_dir=data_dir), eval=EVAL)


@pytest.fixture(scope="module")
def network(cfg):
    return scores.open_network(cfg, make_mesh(MeshConfig()))


@pytest.fixture(scope="module")
def rows(cfg, network):
    """Of the held-out digits."""
    return network.rows(scores.as_uint8(load_arrays(cfg.data, "test")[0]))


def measure(rows, *arguments):
    """The metrics of rows, as `evaluate` has them in the bytes of its parts."""
    return scores.measure([part.view(np.uint8) for part in rows], *arguments)[0]


def with_reference(cfg, path):
    return dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, reference=str(path)))


def test_images_come_back_to_the_bytes_they_were():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(scores.as_uint8(levels.astype(np.float32) / np.float32(127.5) - 1), levels)


def test_rows_are_the_same_for_any_batch(network):
    images = np.random.default_rng(0).integers(256, size=(37, 8, 8, 1), dtype=np.uint8)
    whole = network.rows(images)
    assert whole.shape == (37, network.width) and whole.dtype == np.float32
    for cut in (1, 16, 30):
        np.testing.assert_array_equal(whole, np.concatenate([network.rows(images[:cut]), network.rows(images[cut:])]))


def test_the_numbers_are_those_of_plain_formulas(cfg, network, rows):
    reference = scores.open_reference(cfg, network)
    found = measure([rows], network, reference, cfg.eval)
    drawn = rows[:, :64].astype(np.float64)
    real = network.split(network.rows(scores.as_uint8(load_arrays(cfg.data, "train")[0])))["pool"]
    gaussians = [(x.mean(axis=0), np.cov(x.T.astype(np.float64))) for x in (drawn, real.astype(np.float64))]
    assert found["fd_digits"] == pytest.approx(frechet.frechet_distance(*gaussians[0], *gaussians[1]), rel=1e-6)
    assert found["kd_digits"] == kernel.distance(rows[:, :64], real, size=355).mean
    pair = rows[:, :64], real
    assert (found["precision_digits"], found["recall_digits"]) == (precision(*pair), recall(*pair))
    p = np.exp(rows[:, 64:].astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    splits = np.split(p, [355 * i // 10 for i in range(1, 10)])
    per_split = [np.exp((q * np.log(q / q.mean(axis=0))).sum(axis=1).mean()) for q in splits]
    assert found["is_digits"] == pytest.approx(np.mean(per_split)) and found["is_digits_std"] == pytest.approx(
        np.std(per_split)
    )
    assert 5 < found["is_digits"] < 10 and found["recall_digits"] > 0.6  # they are digits
    assert found["fd_digits_low"] < found["fd_digits"] < found["fd_digits_high"]
    sizes = [key for key in found if key.startswith("fd_digits_n")]
    assert (
        sizes[0] == "fd_digits_n160" and sizes[-1] == "fd_digits_n355" and found["fd_digits_inf"] < found["fd_digits"]
    )
    assert found["fd_digits_n355"] == pytest.approx(found["fd_digits"], rel=1e-9)


def test_parts_in_which_the_rows_come_change_no_bit(cfg, network, monkeypatch):
    monkeypatch.setattr(scores, "BLOCK", 128)
    rows = np.random.default_rng(0).normal(size=(300, network.width)).astype(np.float32)
    reference = scores.open_reference(cfg, network)
    settings = dataclasses.replace(cfg.eval, samples=300, bootstrap=0)
    whole = measure([rows], network, reference, settings)
    for cuts in ([1, 127, 129], list(range(30, 300, 30))):
        assert measure(np.split(rows, cuts), network, reference, settings) == whole


def test_a_set_against_itself(cfg, network):
    rows = network.rows(scores.as_uint8(load_arrays(cfg.data, "train")[0]))
    found = measure(
        [rows],
        network,
        scores.open_reference(cfg, network),
        dataclasses.replace(cfg.eval, samples=len(rows), bootstrap=0),
    )
    assert found["fd_digits"] < 1e-6 and found["precision_digits"] == found["recall_digits"] == 1


@pytest.mark.parametrize("names", [("mu", "sigma"), pytest.param(("ref_mu", "ref_sigma"), marks=pytest.mark.slow)])
def test_references_from_files_are_those_of_the_images(names, cfg, network, rows, tmp_path):
    images = scores.as_uint8(load_arrays(cfg.data, "train")[0])
    whole = measure([rows], network, scores.open_reference(cfg, network), cfg.eval)
    stats = frechet.mean_cov(frechet.update(frechet.empty(64), network.rows(images)[:, :64]))
    path = tmp_path / "reference.npz"
    np.savez(path, **dict(zip(names, stats, strict=True)))
    reference = scores.open_reference(with_reference(cfg, path), network)
    found = measure([rows], network, reference, cfg.eval)
    assert found["fd_digits"] == pytest.approx(whole["fd_digits"], rel=1e-9) and "kd_digits" not in found
    assert reference.source == {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    np.savez(path, arr_0=images, **dict(zip(names, stats, strict=True)))
    both = measure([rows], network, scores.open_reference(with_reference(cfg, path), network), cfg.eval)
    np.savez(path, arr_0=images)
    alone = measure([rows], network, scores.open_reference(with_reference(cfg, path), network), cfg.eval)
    assert alone == whole and both["kd_digits"] == whole["kd_digits"]


def damage(arrays, case):
    mu, sigma = arrays["mu"], arrays["sigma"]
    return {
        "another network": {"mu": np.zeros(2048), "sigma": np.eye(2048)},
        "no covariance": {"mu": mu},
        "asymmetric": {"mu": mu, "sigma": sigma + np.triu(np.ones_like(sigma), 1)},
        "negative": {"mu": mu, "sigma": sigma - 2 * np.trace(sigma) * np.eye(64) / 64},
        "not finite": {"mu": mu * np.nan, "sigma": sigma},
        "objects": {"mu": np.array([None] * 64), "sigma": sigma},
        "floats as images": {"arr_0": np.zeros((300, 8, 8, 1))},
        "few images": {"arr_0": np.zeros((64, 8, 8, 1), np.uint8)},
        "other images": {"arr_0": np.zeros((300, 32, 32, 3), np.uint8)},
        "something else": {"weights": mu},
    }[case]


MESSAGES = {
    "another network": r"mu: found shape \(2048,\), expected \(64,\); these are statistics of another feature network",
    "no covariance": "found the arrays mu, expected one of",
    "asymmetric": "entries that differ by",
    "negative": "found the eigenvalue",
    "not finite": "values that are no finite floats",
    "objects": "object",
    "floats as images": r"arr_0: found float64 \(300, 8, 8, 1\), expected uint8 images",
    "other images": r"found images of shape \(32, 32, 3\), expected \(8, 8, 1\)",
    "few images": "found 64 images, expected more than the 64 features",
    "something else": "found the arrays weights, expected one of",
}


@pytest.mark.parametrize("case", MESSAGES)
def test_bad_references(case, cfg, network, tmp_path):
    path = tmp_path / "reference.npz"
    rng = np.random.default_rng(0)
    np.savez(path, **damage({"mu": rng.normal(size=64), "sigma": np.cov(rng.normal(size=(64, 500)))}, case))
    with pytest.raises(UsageError, match=MESSAGES[case]) as error:
        scores.open_reference(with_reference(cfg, path), network)
    assert "reference.npz" in str(error.value)


def test_bad_numbers_are_not_scored(cfg, network, rows):
    reference = scores.open_reference(cfg, network)
    for value in (np.nan, np.inf):
        broken = rows.copy()
        broken[7, 3] = value
        with pytest.raises(UsageError, match=r"samples: .*not finite.*nothing is recorded"):
            measure([broken], network, reference, cfg.eval)
    with pytest.raises(UsageError, match="found features of 300 images, expected 355"):
        measure([rows[:300]], network, reference, cfg.eval)
