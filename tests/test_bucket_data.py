"""Images, latents and networks in a bucket, on the strict server (tests/bucket.py): the same bits and errors as on disk."""

import dataclasses
import inspect
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from bucket import leading_here
from job import ROOT
from safetensors.numpy import save_file

from dit_jax import checkpoint, files
from dit_jax.config import AutoencoderConfig, Config, DataConfig, ModelConfig
from dit_jax.data import pipeline, tfds
from dit_jax.data.latent_notes import LatentInfo
from dit_jax.data.latent_writer import write_latents
from dit_jax.data.latents import open_latents
from dit_jax.error import Interrupted, JobError, StorageError, UsageError
from dit_jax.files import lease, out
from dit_jax.models import dit, vae
from dit_jax.networks import dit as published
from dit_jax.networks import encoding, transfer
from dit_jax.networks.folder import load_network, save_network
from dit_jax.networks.reference import read_reference

# Google's client, closed as it is here, still leaves a few connections to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
TRAIN = "digits/1.0.0/digits-train.array_record-00000-of-00001"
INFO = LatentInfo(
    shape=(4, 4, 2), dtype="float16", moments=True, mirrored=True, autoencoder="tiny", autoencoder_sha256="a" * 64,
    scale=0.5, shift=0.25, classes=7, dataset="digits", split="train", source_sha256="b" * 64, image_size=32,
)  # fmt: skip
SHARD = 25 * INFO.layout.itemsize
L, SIZE = "gs://test/latents/train", 60


@pytest.fixture(scope="module")
def only_server():
    with leading_here(page=7) as server:
        yield server


def there(server, prefix=""):
    """Name -> bytes of the objects under a prefix."""
    return {name[len(prefix) :]: data for name, (_, data) in server.buckets["test"].items() if name.startswith(prefix)}


def on_disk(folder):
    return {name: files.read(os.path.join(folder, name), 1 << 30) for name in files.below(str(folder))}


def sent(server, folder, name):
    """Copy a folder of the disk into the bucket."""
    for path, data in on_disk(folder).items():
        server.damage("add", f"{name}/{path}", data=data)


def refused(error, function, *args, match, **how):
    with pytest.raises(error, match=match) as found:
        function(*args, **how)
    assert type(found.value) is error and "\n" not in str(found.value)


# Images ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def images(server, data_dir):
    """The digits in the bucket, and on the disk."""
    here = DataConfig(data_dir=data_dir, cache=False)
    tfds.open_split(here, "train")
    sent(server, f"{data_dir}/digits", "data/digits")
    return dataclasses.replace(here, data_dir="gs://test/data"), here


@pytest.mark.parametrize("workers, cache", [(0, False), (2, False), (0, True)])
def test_batches_from_a_bucket_are_those_from_the_disk(images, workers, cache):
    found = []
    for data in (dataclasses.replace(one, workers=workers, cache=cache) for one in images):
        batches = pipeline.make_batches(data, batch_size=48, seed=3)
        found.append([next(batches) for _ in range(3)] + [batches.get_state()])
        batches.close()
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_the_digits_are_built_in_a_bucket_and_are_those_of_the_disk(server, data_dir):
    here, away = (DataConfig(data_dir=place) for place in (data_dir, "gs://test/new"))
    found, expected = tfds.open_split(away, "test"), tfds.open_split(here, "test")
    assert (found.identity, found.describe()) == (expected.identity, expected.describe())
    assert found.where == "gs://test/new/digits/1.0.0" and found.overlaps(found)
    first = {name: entry["generation"] for name, (entry, _) in server.buckets["test"].items()}
    assert len(first) == 4 and tfds.class_names(away) == tfds.class_names(here) != ()
    server.damage("delete", "new/digits/1.0.0/dataset_info.json")  # as a killed builder leaves it
    assert tfds.open_split(away, "test").identity == found.identity
    last = {name: entry["generation"] for name, (entry, _) in server.buckets["test"].items()}
    assert [name for name in first if first[name] != last[name]] == ["new/digits/1.0.0/dataset_info.json"]


@pytest.mark.parametrize(
    "data_dir, dataset, error, match",
    [
        ("gs://test/data", "imagenet2012", UsageError, "dataset 'imagenet2012': found nothing in gs://test/data/imagenet"),
        ("gs://test/data", "nonesuch", UsageError, "neither known to TFDS nor prepared in gs://test/data"),
        ("gs://test/photos", "digits", UsageError, "found 'gs://test/photos', which holds other files and no data of"),
        ("gs://none/data", "digits", StorageError, "there is no bucket 'none'"),
        ("gs://B/data", "digits", UsageError, "found no name of a bucket"),
        ("s3://test/data", "digits", UsageError, "data.data_dir: found 's3://test/data', expected a path on a disk or gs"),
    ],
)  # fmt: skip
def test_data_that_are_not_there(server, data_dir, dataset, error, match):
    server.damage("add", "photos/cats/1.png")
    refused(error, tfds.open_split, DataConfig(data_dir=data_dir, dataset=dataset), "train", match=match)
    assert list(there(server)) == ["photos/cats/1.png"]


def test_a_refusal_is_no_damage_and_damage_is_named(server, images):
    away = dataclasses.replace(images[0], skip_bad=5)
    found, rows = tfds.open_split(away, "train"), np.arange(5)
    server.fault("status", path="digits-train", status=403, times=1000)
    refused(StorageError, found.read, rows, match="cannot be read now .Forbidden.")
    refused(StorageError, tfds.open_split, away, "train", match="cannot be read now .Forbidden.")
    refused(StorageError, next, pipeline.make_batches(away, batch_size=4, seed=0, source=found), match="Forbidden")
    server.faults.clear()
    assert found.skips.found == {}
    found = tfds.open_split(away, "train")
    assert len(found.read(rows)[0]) == 5
    server.fault("status", path="dataset_info", status=403, times=1000)
    refused(StorageError, tfds.open_split, away, "train", match="gs://test/data")
    server.faults.clear()
    server.damage("truncate", f"data/{TRAIN}")
    refused(UsageError, tfds.open_split, away, "train", match=rf"cannot read gs://test/data/{TRAIN}: Corrupted")
    refused(UsageError, found.read, np.array([1400]), match=r"record 1400: cannot read gs://test/data/")
    server.damage("delete", f"data/{TRAIN}")
    refused(UsageError, tfds.open_split, away, "train", match=rf"cannot read gs://test/data/{TRAIN}: .*No such object")


# Latents --------------------------------------------------------------------------------------------------------------


def examples(first=0, last=SIZE):
    rng = np.random.default_rng(0)
    found = [(i % 7, rng.standard_normal(INFO.record_shape, dtype=np.float32)) for i in range(SIZE)]
    return found[first:last]


def examples_of(numbers):
    return [examples()[i] for i in numbers]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder of three shards on the disk."""
    folder = str(tmp_path_factory.mktemp("latents") / "train")
    write_latents(folder, INFO, SIZE, examples_of, shard_bytes=SHARD)
    return folder


def test_latents_in_a_bucket_are_those_on_the_disk(server, plain):
    found = write_latents(L, INFO, SIZE, examples_of, shard_bytes=SHARD)
    assert there(server, "latents/train/") == on_disk(plain)
    expected = open_latents(plain, verify=True)
    assert (found.identity, found.describe()) == (expected.identity, expected.describe())
    assert found.overlaps(expected) and found.overlaps(open_latents(L + "/", verify=True))
    batches = []
    for folder in (plain, L):
        data = DataConfig(latents=os.path.dirname(folder), image_size=32, cache=False, workers=2)
        iterator = pipeline.make_batches(data, batch_size=16, seed=3)
        batches.append([next(iterator) for _ in range(5)])
        iterator.close()
    jax.tree.map(np.testing.assert_array_equal, *batches)


WRITER = f"""
import os, signal, sys
import numpy as np
from dit_jax.data.latent_writer import LatentInfo, write_latents
INFO, SIZE, SHARD = LatentInfo(**{dataclasses.asdict(INFO)}), {SIZE}, {SHARD}
{inspect.getsource(examples)}
def some(numbers):
    yield from examples(numbers[0], 55)
    os.kill(os.getpid(), signal.SIGKILL)
write_latents("{L}", INFO, SIZE, some, shard_bytes=SHARD)
"""


def test_a_kill_costs_one_shard_and_its_lease_nothing(server, plain):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", WRITER], env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = ["latents-00000.whole", "latents-00001.whole", "latents.job", "latents.lock"]
    assert sorted(there(server, "latents/train/")) == left
    asked = []
    write_latents(L, INFO, SIZE, lambda numbers: asked.append(numbers[0]) or examples_of(numbers), shard_bytes=SHARD)
    assert asked == [50] and there(server, "latents/train/") == on_disk(plain)


def failing(numbers, at=55):
    yield from examples(numbers[0], at)
    raise ZeroDivisionError


def test_a_writer_that_fails_resumes_from_whole_and_sound_shards(server, plain):
    write = lambda some: write_latents(L, INFO, SIZE, some, shard_bytes=SHARD)  # noqa: E731
    with pytest.raises(ZeroDivisionError):
        write(lambda numbers: failing(numbers, 20))
    assert there(server) == {}
    with pytest.raises(ZeroDivisionError):
        write(failing)
    assert sorted(there(server, "latents/train/")) == ["latents-00000.whole", "latents-00001.whole", "latents.job"]
    refused(
        UsageError, write_latents, L, dataclasses.replace(INFO, dtype="float32"), SIZE, examples_of,
        match="unfinished latents of another job: dtype: found 'float16', this command has 'float32'",
    )  # fmt: skip
    whole = there(server, "latents/train/")
    server.fault("status", method="GET", path="latents-00001", status=403, times=1000)
    with pytest.raises(JobError, match="no permission"):
        write(examples_of)
    server.faults.clear()
    assert there(server, "latents/train/") == whole  # what cannot be read now is not damaged
    server.damage("flip", "latents/train/latents-00001.whole")
    files.rename(f"{L}/latents-00000.whole", f"{L}/latents-00000-of-00003.array_record")  # killed while it named them
    asked = []
    write(lambda numbers: asked.append(numbers[0]) or examples_of(numbers))
    assert asked == [25] and there(server, "latents/train/") == on_disk(plain)
    refused(UsageError, write, examples_of, match="found complete latents, expected none")


def test_a_write_that_the_bucket_refuses_keeps_the_whole_shards(server, plain):
    server.fault(
        "status", method="POST|PUT", path="upload", status=403, times=1000, after=3
    )  # the lease, the job, a shard
    with pytest.raises(JobError, match=f"latents {L}: cannot write them: .*no permission .*encode again"):
        write_latents(L, INFO, SIZE, examples_of, shard_bytes=SHARD)
    server.faults.clear()
    assert sorted(there(server, "latents/train/")) == ["latents-00000.whole", "latents.job"]
    server.fault("cut", method="POST|PUT", path="upload", times=2, after=1)
    server.fault("lost", method="POST|PUT", path="upload", times=2, after=4)
    server.fault("status", path="latents", times=3, after=9)
    write_latents(L, INFO, SIZE, examples_of, shard_bytes=SHARD)
    assert there(server, "latents/train/") == on_disk(plain)


def test_two_writers_and_other_files_are_refused(server, monkeypatch):
    def another(numbers):
        refused(UsageError, write_latents, L, INFO, SIZE, examples_of, match="found another process writing there")
        yield from failing(numbers)

    with pytest.raises(ZeroDivisionError):
        write_latents(L, INFO, SIZE, another, shard_bytes=SHARD)
    monkeypatch.setattr(lease, "RENEWAL", 0.02)
    server.reset()

    def overtaken(numbers):
        server.damage("add", "latents/train/latents.lock", data=b"another process's")
        while all(request.status != 412 for request in server.requests):
            time.sleep(0.01)
        time.sleep(0.3)  # until the answer is understood
        yield from examples_of(numbers)

    before = set(there(server, "latents/train/")) | {"latents.lock"}
    with pytest.raises(JobError, match="another process has taken this lease"):
        write_latents(L, INFO, SIZE, overtaken, shard_bytes=SHARD)
    assert set(there(server, "latents/train/")) == before  # they are that process's now
    server.buckets["test"].clear()
    server.damage("add", "latents/train/notes.txt")
    refused(UsageError, write_latents, L, INFO, SIZE, examples_of, match="found 'notes.txt', expected an empty folder")
    assert list(there(server)) == ["latents/train/notes.txt"]


@pytest.mark.parametrize(
    "how, name, match",
    [
        ("truncate", "latents-00001-of-00003.array_record", r"found \d+ bytes, expected \d+"),
        ("delete", "latents-00001-of-00003.array_record", "latents-00001-of-00003.array_record: cannot read it: .*no such"),
        ("flip", "latents-00001-of-00003.array_record", "latents-00001-of-00003.array_record: found SHA-256"),
        ("truncate", "latents.json", "found what is no JSON"),
        ("delete", "latents.json", "found no such file, so the latents are not complete"),
        ("flip", "latents.json", "latents.json: "),
    ],
)  # fmt: skip
def test_damaged_latents_are_named(server, plain, how, name, match):
    sent(server, plain, "latents/train")
    found = open_latents(L)
    server.damage(how, f"latents/train/{name}")
    refused(UsageError, open_latents, L, verify=True, match=f"latents {L}/.*{match}")
    server.fault("status", status=403, times=1000)
    refused(StorageError, open_latents, L, match="no permission")
    refused(StorageError, found.read, np.arange(3), match="cannot be read now .Forbidden.")
    server.faults.clear()


def test_a_flipped_bit_of_a_record_is_named(server, plain):
    sent(server, plain, "latents/train")
    name, data = "latents-00001-of-00003.array_record", bytearray(on_disk(plain)["latents-00001-of-00003.array_record"])
    data[data.index(open_latents(plain).shards.readers[1].read([5])[0]) + 100] ^= 1
    server.damage("add", f"latents/train/{name}", data=bytes(data))
    found = open_latents(L)
    refused(UsageError, found.read, np.arange(25, 35), match=rf"{L}/{name}, record 30: cannot read it: Corrupted")
    assert len(open_latents(L).read(np.arange(25, 30))[0]) == 5


# Networks -------------------------------------------------------------------------------------------------------------

VAE = vae.VAEConfig(channels=1, widths=(8,), groups=4, blocks=1)
SOURCE = {"file": "tiny.safetensors", "sha256": "0" * 64, "format": "sd-vae"}
N = "gs://test/networks/tiny"


def random_params(shapes):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32) / 8, shapes)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A tiny autoencoder: its folder on the disk, its parameters."""
    folder = str(tmp_path_factory.mktemp("networks") / "tiny")
    params = random_params(vae.shapes(VAE))
    save_network(folder, "sd-vae", dataclasses.asdict(VAE), params, SOURCE)
    return folder, params


def saved(network):
    return save_network(N, "sd-vae", dataclasses.asdict(VAE), network[1], SOURCE)


def test_a_network_in_a_bucket_is_that_on_the_disk(server, network):
    saved(network)
    assert there(server, "networks/tiny/") == on_disk(network[0])
    jax.tree.map(np.testing.assert_array_equal, load_network(N, "sd-vae")[1], network[1])
    refused(JobError, saved, network, match="found something there")
    refused(
        UsageError, load_network, N, "inception", match=f"{N}: found a network of kind 'sd-vae', expected 'inception'"
    )
    server.damage("flip", "networks/tiny/weights.safetensors")
    refused(
        UsageError, load_network, N, "sd-vae", match=rf"^{N}/weights.safetensors: found sha256 .*convert the network"
    )
    server.damage("delete", "networks/tiny/weights.safetensors")
    refused(UsageError, load_network, N, "sd-vae", match=f"{N}/weights.safetensors: missing")
    refused(
        UsageError, load_network, "gs://test/x", "sd-vae", match="gs://test/x/meta.json: cannot be read .no such object"
    )
    refused(StorageError, load_network, "gs://none/x", "sd-vae", match="there is no bucket")


def test_a_folder_is_uploaded_whole_or_not_at_all(server, network):
    server.fault("status", method="POST|PUT", path="upload", status=403, times=1000, after=2)  # what says it is whole
    refused(StorageError, saved, network, match="no permission")
    server.faults.clear()
    assert there(server) == {}
    server.damage("add", "networks/tiny/weights.safetensors", data=b"half of them")
    assert out.holds(N)
    refused(JobError, saved, network, match="found something there")
    server.damage("add", "networks/tiny.unfinished", data=b"")  # a killed upload's
    assert not out.holds(N)
    saved(network)
    assert there(server, "networks/tiny") == {f"/{name}": data for name, data in on_disk(network[0]).items()}


@pytest.mark.bucket
def test_a_dit_goes_into_a_bucket_and_comes_out(server, tmp_path, capfd):
    cfg = ModelConfig(depth=1, width=16, heads=2, patch=2, input_size=8, channels=3, classes=5)
    params = random_params(jax.eval_shape(lambda: dit.init(cfg, jax.random.key(0))))
    save_file(published.write(cfg, params), tmp_path / "dit.safetensors")
    files.upload(str(tmp_path / "dit.safetensors"), "gs://test/dit.safetensors")
    run = "gs://test/runs/converted"
    transfer.import_dit("dit", "gs://test/dit.safetensors", run, heads=2, classes=5, step=70)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load(run)[1], params)
    transfer.import_dit("dit", "gs://test/dit.safetensors", run, heads=2, classes=5)
    assert "done before, from the same gs://test/dit.safetensors" in capfd.readouterr().err
    before = there(server)
    refused(
        UsageError, transfer.import_dit, "dit", "gs://test/dit.safetensors", run, heads=2, classes=4,
        match="was made with 5 classes, not 4",
    )  # fmt: skip
    refused(UsageError, transfer.import_dit, "dit", "gs://test/x.pt", run, match="no file or folder 'gs://test/x.pt'")
    assert there(server) == before
    for name in ("back.safetensors", "folder"):
        transfer.export_dit(run, f"gs://test/{name}")
        transfer.export_dit(run, f"gs://test/{name}")
        assert "done before" in capfd.readouterr().err
        transfer.export_dit(run, str(tmp_path / name))
    assert there(server, "back.safetensors") == {"": (tmp_path / "back.safetensors").read_bytes()}
    assert there(server, "folder/") == on_disk(tmp_path / "folder")
    refused(UsageError, transfer.export_dit, run, "gs://test/dit.safetensors", match="exists and holds something else")
    transfer.import_dit("diffusers", "gs://test/folder", "gs://test/runs/again")
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load("gs://test/runs/again")[1], params)
    server.damage("truncate", "dit.safetensors")
    refused(
        UsageError, transfer.import_dit, "dit", "gs://test/dit.safetensors", "gs://test/runs/new",
        match="^gs://test/dit.safetensors: damaged or no safetensors",
    )  # fmt: skip


def test_reference_statistics_are_read_from_a_bucket(server, tmp_path):
    np.savez(tmp_path / "ref.npz", mu=np.zeros(4), sigma=np.eye(4))
    files.upload(str(tmp_path / "ref.npz"), "gs://test/ref.npz")
    found, expected = (read_reference(f"{place}/ref.npz", pool=4, spatial=0) for place in ("gs://test", tmp_path))
    assert (found.sha256, found.path) == (expected.sha256, "gs://test/ref.npz")
    np.testing.assert_array_equal(found.cov, expected.cov)
    refused(UsageError, read_reference, "gs://test/ref.npz", match="^gs://test/ref.npz: mu: found shape")
    refused(UsageError, read_reference, "gs://test/no.npz", match="gs://test/no.npz: no such file")


# The job --------------------------------------------------------------------------------------------------------------


def encode(autoencoder, data_dir, folder, stop):
    data = DataConfig(data_dir=data_dir, split="train[:100]", held_out_split="test[:20]", flip=True)
    model = ModelConfig(input_size=8, channels=4, patch=1, width=16, heads=2, classes=10, learn_sigma=False)
    cfg = Config(model=model, data=data, autoencoder=AutoencoderConfig(folder=autoencoder))
    job = encoding.open_job(cfg, "float32", whiten=True)
    encoding.encode_splits(job, folder, ["train[:100]", "test[:20]"], 50_000, stop)


class StopsAt(list):
    """A job's list of signals, which fills when it is looked at for the `n`th time."""

    def __init__(self, n):
        self.left = n

    def __bool__(self):
        self.left -= 1
        return self.left < 0


def test_encode_into_a_bucket_resumes_and_is_what_it_is_on_the_disk(server, images, network, tmp_path, data_dir, capfd):
    encode(network[0], data_dir, str(tmp_path / "plain"), [])
    sent(server, network[0], "networks/tiny")
    with pytest.raises(Interrupted):
        encode(N, "gs://test/data", "gs://test/latents", StopsAt(3))
    encode(N, "gs://test/data", "gs://test/latents", [])
    assert "images to encode, 24 were before" in capfd.readouterr().err
    assert there(server, "latents/") == on_disk(tmp_path / "plain")
    encode(N, "gs://test/data", "gs://test/latents", [])
    assert capfd.readouterr().err.count("done before") == 2
