"""`encode` on several hosts, as processes on loopback: the same files, bit for bit, whatever their number and whoever is lost."""

import io
import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import bucket
import numpy as np
import pytest
import tensorflow_datasets as tfds
from job import Job
from PIL import Image
from test_encode import MODEL, save_vae

BAD, SIZE = 83, 200


class Scans(tfds.core.GeneratorBasedBuilder):
    """Grey images of noise; number BAD for training is none."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        image = tfds.features.Image(shape=(None, None, 1))
        features = {"image": image, "label": tfds.features.ClassLabel(num_classes=10)}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(SIZE, BAD), "test": self._generate_examples(21, -1)}

    def _generate_examples(self, count, bad):
        for i in range(count):
            file, pixels = io.BytesIO(), np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)
            Image.fromarray(pixels).save(file, "PNG")
            yield i, {"image": io.BytesIO(b"no image" if i == bad else file.getvalue()), "label": i % 10}


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The command without --out, for shards of 16 images; those of `test` are fewer than the hosts."""
    folder = tmp_path_factory.mktemp("images")
    Scans(data_dir=folder, file_format="array_record").download_and_prepare()
    save_vae(folder / "vae", 0)
    data = {"dataset": "scans", "data_dir": folder, "split": "train", "held_out_split": "test", "skip_bad": 1}
    keys = [f"--config.data.{key}={value}" for key, value in data.items()]
    record = 2 * 2 * 4 * 4 * 4 * 2 + 16  # bytes; copies, parts, float16, and CRC, number and label
    shards = [f"--shard_bytes={16 * record}", "--whiten", "--config.data.flip=True", "--config.mesh.heartbeat=5"]
    return ["--config=configs/digits.py", f"--autoencoder={folder / 'vae'}", *MODEL, *keys, *shards]


def started(count, command, out, cache_dir, *more, last=(), environment=None, **last_how):
    """The processes; `last`, `last_how`: what the last one has besides, flags and arguments of Job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    jobs = []
    for index in range(count):
        where = [f"--coordinator={address}", f"--num_processes={count}", f"--process_id={index}"] if count > 1 else []
        own, how = (last, last_how) if index == count - 1 else ((), {})
        how = {**how, "cache_dir": cache_dir, "devices": 1, "environment": environment}
        jobs.append(Job("encode", *command, f"--out={out}", *where, *more, *own, **how))
    return jobs


def ended(jobs):
    """Exit codes, and what the processes said on standard output, where Gloo talks too, and on standard error."""
    said = [(re.sub(r"\[Gloo\].*\n", "", out), err) for out, err in (job.communicate(60) for job in jobs)]
    return [job.returncode for job in jobs], said


def encode(count, command, out, cache_dir):
    codes, said = ended(started(count, command, out, cache_dir))
    assert codes == [0] * count, said
    assert said[0][0].splitlines() == [f"{out}/train", f"{out}/test"] and not any(map(any, said[1:]))
    return said[0][1]


def contents(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(Path(out).rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def one(command, tmp_path_factory, cache_dir):
    """The files that one process writes."""
    out = tmp_path_factory.mktemp("one") / "latents"
    said = encode(1, command, out, cache_dir)
    assert f"warning: record {BAD} is left out" in said and "199 latents" in said, said
    found = contents(out)
    assert len(found) == 13 + 2 + 2 and json.loads(found["train/latents.json"])["left_out"] == [BAD]
    return found


@pytest.mark.timeout(120)
def test_two_hosts_write_the_files_of_one(one, command, tmp_path, cache_dir):
    said = encode(2, command, tmp_path / "out", cache_dir)
    assert f"warning: record {BAD} is left out" in said
    assert contents(tmp_path / "out") == one
    assert encode(2, command, tmp_path / "out", cache_dir).count("done before") == 2


def in_the_middle(count, victim, number, command, folder, cache_dir, shards=2):
    """Send a signal to one process once so many shards are whole: the folder, seconds until all ended, codes and what they said."""
    for attempt in range(10):  # a fast machine may be done before the signal comes
        out = folder / str(attempt)
        jobs, end = started(count, command, out, cache_dir), time.monotonic() + 60
        while len(list(out.glob("train/*.whole"))) < shards and all(job.poll() is None for job in jobs):
            assert time.monotonic() < end, [job.err.read_text() for job in jobs]
            time.sleep(0.001)
        jobs[victim].send_signal(number)
        asked, (codes, said) = time.monotonic(), ended(jobs)
        if not (out / "train" / "latents.json").exists():
            return out, time.monotonic() - asked, codes, said
    raise AssertionError(f"done before the signal came: {said}")


@pytest.mark.timeout(120)
def test_a_signal_to_one_stops_all_and_other_hosts_go_on(one, command, tmp_path, cache_dir):
    out, seconds, codes, said = in_the_middle(2, 1, signal.SIGTERM, command, tmp_path, cache_dir)
    assert codes == [75, 75] and seconds < 20
    for _, err in said:
        assert err.splitlines()[-1].endswith("not complete; the same command goes on from the shards that are"), err
    left = os.listdir(out / "train")
    assert all(name.endswith((".whole", ".job")) for name in left)
    assert f"{16 * (len(left) - 1)} were before" in encode(1, command, out, cache_dir)
    assert contents(out) == one


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("count, then", [(2, 4), (4, 2), (2, 1)])
def test_a_lost_host_ends_all_and_another_number_goes_on(one, command, tmp_path, cache_dir, count, then, victim):
    out, seconds, codes, said = in_the_middle(count, victim, signal.SIGKILL, command, tmp_path, cache_dir)
    assert codes.pop(victim) == -signal.SIGKILL
    assert set(codes) <= {200, -signal.SIGABRT} and seconds < 30, said
    assert " were before" in encode(then, command, out, cache_dir)
    assert contents(out) == one


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_hosts_copy_images_into_the_files_of_one(command, tmp_path, cache_dir):
    plain = [flag for flag in command if not flag.startswith(("--autoencoder", "--whiten", "--shard"))]
    plain.append("--shard_bytes=2000")
    for count in (1, 2):
        assert f"warning: record {BAD} is left out" in encode(count, plain, tmp_path / str(count), cache_dir)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") and len(contents(tmp_path / "1")) > 6
    out, _, codes, _ = in_the_middle(2, 1, signal.SIGTERM, plain, tmp_path / "cut", cache_dir)
    assert codes == [75, 75]
    encode(1, plain, out, cache_dir)
    assert contents(out) == contents(tmp_path / "1")


@pytest.mark.slow
def test_four_hosts_write_the_files_of_one(one, command, tmp_path, cache_dir):
    encode(4, command, tmp_path / "out", cache_dir)
    assert contents(tmp_path / "out") == one


@pytest.mark.timeout(120)
@pytest.mark.parametrize("trouble", ["a malformed image", "a full disk", "another autoencoder"])
def test_trouble_of_one_host_is_a_line_and_ends_all(trouble, command, tmp_path, cache_dir):
    save_vae(tmp_path / "vae", 1)
    more, how, code, message = {
        "a malformed image": (["--config.data.skip_bad=0"], {}, 2, "cannot decode the image"),
        "a full disk": ([], {"file_size": 5000}, 1, "cannot write them: "),
        "another autoencoder": ([], {"last": [f"--autoencoder={tmp_path}/vae"]}, 2, "autoencoder: sha256: found '"),
    }[trouble]
    codes, said = ended(started(2, command, tmp_path / "out", cache_dir, *more, **how))
    assert codes == [code, code], said
    for _, err in said:
        assert message in err.splitlines()[-1] and err.count("error: ") == 1, err
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("latents.json"))


def test_a_slice_of_several_hosts_is_taken(command, tmp_path, cache_dir):
    job = Job("encode", "--check", *command, f"--out={tmp_path}/x", "--slice=2x8", cache_dir=cache_dir)
    _, err = job.communicate()
    assert job.returncode == 0 and "slice 2x8 (16 devices, 2 hosts)" in err, err
    job = Job("encode", "--check", "--config=configs/digits.py", f"--out={tmp_path}/x", "--whiten", cache_dir=cache_dir)
    _, err = job.communicate()
    assert job.returncode == 2 and err.startswith("error: --whiten: found no --autoencoder"), err


@pytest.mark.bucket
@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_two_hosts_write_the_same_into_a_bucket(one, command, cache_dir):
    with bucket.leading_here() as server:
        where = bucket.environment(server.address)
        codes, said = ended(started(2, command, "gs://test/latents", cache_dir, environment=where))
        assert codes == [0, 0], said
        found = {name.removeprefix("latents/"): content for name, (_, content) in server.buckets["test"].items()}
        assert found == one
