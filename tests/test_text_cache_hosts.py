"""A cache of captions made and read by several hosts, as processes on loopback, and in a bucket: the files and losses of one host."""

import numpy as np
import pytest
from bucket import leading_here
from job import Job
from runs import scalars
from test_bucket_data import StopsAt
from test_encode_hosts import contents, ended, started
from test_hosts import free_address
from test_text_cache import of_pictures, pictures  # noqa: F401
from test_text_states import folder_of  # noqa: F401

from dit_jax.data import text_cache
from dit_jax.data.source import open_source
from dit_jax.error import Interrupted
from dit_jax.networks.caption import open_text
from dit_jax.networks.caption_states import about, all_captions, cached, encode_captions

SHARD = 3 * 8 * 16 * 4  # bytes of three captions
KEYS = {
    "model": ("text", "text_encoder", "text_length", "conditioning", "depth", "width", "heads", "patch", "unroll"),
    "data": ("folder", "image_size"),
    "train": ("batch_size", "steps", "log_every", "checkpoint_every"),
}


def flags(cfg):
    keys = [(group, key) for group, names in KEYS.items() for key in names]
    given = [f"--config.{group}.{key}={getattr(getattr(cfg, group), key)}" for group, key in keys]
    return ["--config=configs/scenes.py", "--config.model.text_depth=0", "--config.mesh.heartbeat=5", *given]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_hosts_make_the_cache_of_one_and_train_on_it_as_one(pictures, folder_of, tmp_path, cache_dir):  # noqa: F811
    cfg = of_pictures(pictures, folder_of("bert"))
    command = [*flags(cfg), "--captions", f"--shard_bytes={SHARD}"]
    for count in (1, 2):
        codes, said = ended(started(count, command, tmp_path / f"cache{count}", cache_dir))
        assert codes == [0] * count and not any(map(any, said[1:])), said
        assert "8 captions, 1 of them cut" in said[0][1]
    assert contents(tmp_path / "cache1") == contents(tmp_path / "cache2")
    assert len(contents(tmp_path / "cache2")) == 1 + 2 * 3
    losses = []
    for count in (1, 2):
        address, jobs = free_address(), []
        for index in range(count):
            hosts = [f"--coordinator={address}", f"--num_processes={count}", f"--process_id={index}"]
            own = [
                f"--workdir={tmp_path}/run{count}",
                f"--config.data.captions={tmp_path}/cache2",
                *(hosts if count > 1 else []),
            ]
            jobs.append(Job("train", *flags(cfg), *own, cache_dir=cache_dir, devices=1))
        said = [job.communicate(200)[1] for job in jobs]
        assert [job.returncode for job in jobs] == [0] * count, said
        losses.append([line["loss"] for line in scalars(tmp_path / f"run{count}")])
    assert len(losses[0]) == 4 and np.std(losses[0]) > 1e-3
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_a_cache_in_a_bucket_resumes_and_is_the_one_on_the_disk(pictures, folder_of, tmp_path):  # noqa: F811
    cfg = of_pictures(pictures, folder_of("bert"))
    with leading_here() as server:
        server.empty()
        with pytest.raises(Interrupted):
            encode_captions(cfg, "gs://test/cache", ["train", "test"], SHARD, StopsAt(2))
        begun = {name for name in server.buckets["test"] if name.endswith(".index")}
        assert 0 < len(begun) < 3
        encode_captions(cfg, "gs://test/cache", ["train", "test"], SHARD, [])
        encode_captions(cfg, str(tmp_path / "cache"), ["train", "test"], SHARD, [])
        there = {name.removeprefix("cache/"): data for name, (_, data) in server.buckets["test"].items()}
        assert there == contents(tmp_path / "cache")
        text = open_text(cfg.model)
        captions = all_captions({"train": open_source(cfg.data, "train")})
        found, expected = (cached(text, place)(captions) for place in ("gs://test/cache", str(tmp_path / "cache")))
        for name, states in expected.items():
            np.testing.assert_array_equal(found[name], states)
        assert text_cache.open_cache("gs://test/cache", about(text.cfg)).states("").shape == (2, 16)
