"""Sampling that is killed, stopped, damaged and resumed, with other batches and devices: the same images, exactly N of them."""

import dataclasses
import functools
import os
import random
import re
import signal
import time
import tracemalloc
import zipfile

import jax
import numpy as np
import pytest
from job import Job, compilations, run
from PIL import Image

from dit_jax import checkpoint
from dit_jax.config import Config, DataConfig, MeshConfig, ModelConfig, SampleConfig
from dit_jax.data.source import class_names
from dit_jax.devices.mesh import make_mesh
from dit_jax.error import Interrupted, JobError, UsageError
from dit_jax.files.out import check_out
from dit_jax.sampling import draw, label, parts, picture
from dit_jax.sampling.weights import weights_hash
from dit_jax.workdir.folder import read_config

NUM = 400
SETTINGS = ["--seed=3", "--sampler=ddpm", "--steps=50", "--guidance=2"]  # seconds of work on two cores


@pytest.fixture(scope="module")
def workdir(uninterrupted):
    return uninterrupted


@pytest.fixture(scope="module")
def whole(workdir, tmp_path_factory, cache_dir):
    folder = tmp_path_factory.mktemp("whole")
    out, noted = folder / "samples.npz", folder / "compilations"
    flags = [f"--workdir={workdir}", f"--out={out}", f"--num={NUM}", *SETTINGS, "--batch_size=64"]
    code, _, err = run("sample", *flags, cache_dir=cache_dir, devices=2, environment={"COMPILATIONS": str(noted)})
    assert code == 0, err
    check_compilations(noted)
    return out.read_bytes()


def check_compilations(path):
    """That a job compiled the sampler once, and nothing else."""
    assert [name for _, name in compilations(path)] == ["jit(sample)"]


def part_files(out):
    folder = out.parent / (out.name + ".parts")
    return sorted(folder.glob("*.part")) if folder.exists() else []


def wait_for_part(process, out, timeout=120):
    """Returns when there is one part more than before."""
    before, end = len(part_files(out)), time.monotonic() + timeout
    while len(part_files(out)) <= before:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, f"no part within {timeout} s"
        time.sleep(0.01)


def flip_a_bit(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def test_killed_at_any_time_and_resumed_elsewhere_the_bytes_are_the_same(
    workdir, tmp_path, tmp_path_factory, cache_dir, whole
):
    out, seed = tmp_path / "samples.npz", random.randrange(10**6)
    print("seed", seed)
    flags = [f"--workdir={workdir}", f"--out={out}", f"--num={NUM}", *SETTINGS]
    chance = random.Random(seed)
    process = Job("sample", *flags, "--batch_size=40", cache_dir=cache_dir, devices=4)
    wait_for_part(process, out)
    process.send_signal(signal.SIGSTOP)  # lest it ends meanwhile
    code, _, err = run("sample", *flags, cache_dir=cache_dir)
    process.send_signal(signal.SIGCONT)
    assert code == 1 and "another process draws into it; wait for its end, or use another --out" in err
    wait_for_part(process, out)
    time.sleep(chance.uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not out.exists()
    code, _, err = run("sample", *flags, "--seed=4", cache_dir=cache_dir)
    assert code == 2 and "holds images of another job: seed: found 3, this command has 4" in err
    kept = part_files(out)
    assert len(kept) >= 2
    flip_a_bit(kept[1], 100)
    noted = tmp_path_factory.mktemp("resumed") / "compilations"
    how = dict(cache_dir=cache_dir, devices=2, environment={"COMPILATIONS": str(noted)})
    code, said, err = run("sample", *flags, "--batch_size=48", **how)
    assert code == 0, err
    check_compilations(noted)  # the parts that were missing, of many lengths
    assert f"{kept[1]}: damaged (its checksum does not match)" in err and "were drawn before" in err
    assert said.split() == [str(out)] and out.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["samples.npz"]


def test_sigterm_keeps_the_parts_exits_75_and_the_same_command_goes_on(workdir, tmp_path, cache_dir, whole):
    out = tmp_path / "samples.npz"
    flags = [f"--workdir={workdir}", f"--out={out}", f"--num={NUM}", *SETTINGS, "--batch_size=64"]
    process = Job("sample", *flags, cache_dir=cache_dir, devices=2)
    wait_for_part(process, out)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    kept = sum(int(p.name[11:21]) - int(p.name[:10]) for p in part_files(out))
    assert 0 < kept < NUM and f"interrupted: {kept} of {NUM} images are kept in {out}.parts; the same command" in err
    code, _, err = run("sample", *flags, cache_dir=cache_dir, devices=2)
    assert code == 0 and f"{kept}/{NUM} were drawn before" in err
    assert out.read_bytes() == whole
    written = os.stat(out)
    code, said, err = run("sample", *flags, cache_dir=cache_dir, devices=2)
    assert code == 0 and f"{out}: all {NUM} images are there; nothing to do" in err and said.split() == [str(out)]
    assert os.stat(out).st_mtime_ns == written.st_mtime_ns and os.stat(out).st_ino == written.st_ino
    with np.load(out, allow_pickle=False) as archive:
        assert archive["arr_0"].shape == (NUM, 8, 8, 1) and archive["arr_0"].dtype == np.uint8
        assert archive["arr_1"].shape == (NUM,) and set(archive["arr_1"].tolist()) == set(range(10))
    assert [p.name for p in tmp_path.iterdir()] == ["samples.npz"]


# The rest draws in this process: real images, and the same functions that the job calls.


def images_of(workdir, num=70, devices=1, batch_size=16, first=0, seed=3, dtype="float32", stop=()):
    return drawn_of(workdir, np.arange(first, num), devices, batch_size, seed, dtype, stop)


@functools.cache
def weights(workdir):
    return checkpoint.load(str(workdir))[1]


def drawn_of(workdir, indices, devices=1, batch_size=16, seed=3, dtype="float32", stop=()):
    cfg = read_config(str(workdir))
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, dtype=dtype))
    settings = SampleConfig(sampler="euler", steps=4, batch_size=batch_size)
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    sampling = draw.open_sampling(dataclasses.replace(cfg, sample=settings), mesh)
    return sampling.draw(weights(workdir), seed, indices, len(indices), stop)


def job_of(workdir, batch_size=64, **changes):
    settings = SampleConfig(sampler="euler", steps=4, batch_size=batch_size)
    cfg = dataclasses.replace(read_config(str(workdir)), sample=settings)
    sampling = draw.open_sampling(cfg, make_mesh(MeshConfig()))
    return sampling.describe(weights_hash(weights(workdir)), 10, 3) | changes


def complete(workdir, out, num, stop=(), job=None, **drawing):
    def draw(indices, most):
        for count, batch in enumerate(drawn_of(workdir, indices, stop=flag, **drawing)):
            if stop and count == stop[0]:
                flag.append(signal.SIGTERM)
            drawn.append(len(batch[1]))
            yield batch

    flag, drawn = [], []
    try:
        parts.complete(str(out), job or job_of(workdir), (8, 8, 1), num, draw, flag)
    finally:
        drawn_in_all = sum(drawn)
    return drawn_in_all


def stored(out):
    with np.load(out, allow_pickle=False) as archive:
        return archive["arr_0"], archive["arr_1"]


def expected(workdir, num):
    return [np.concatenate(x) for x in zip(*images_of(workdir, num, devices=8), strict=True)]


def assert_holds(out, workdir, num):
    for found, wanted in zip(stored(out), expected(workdir, num), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert len(list(out.parent.iterdir())) == 1


def test_an_end_between_the_last_image_and_the_npz_draws_nothing_again(workdir, tmp_path, monkeypatch):
    out = tmp_path / "samples.npz"

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(parts, "write_npz", full)
        complete(workdir, out, 40)
    assert complete(workdir, out, 40) == 0
    other = tmp_path / "other.npz"
    assert complete(workdir, other, 40) == 40 and out.read_bytes() == other.read_bytes()


def test_a_larger_num_keeps_what_was_drawn_before(workdir, tmp_path):
    out = tmp_path / "s.npz"
    with pytest.raises(Interrupted, match="32 of 50 images are kept"):
        complete(workdir, out, 50, stop=(1,))
    assert complete(workdir, out, 60) == 28  # after an interrupted run
    assert_holds(out, workdir, 60)
    assert complete(workdir, out, 75, batch_size=64) == 15  # and after a finished one
    assert_holds(out, workdir, 75)
    with pytest.raises(
        UsageError, match="holds 75 images of this job, more than --num=60; remove it or use another --out"
    ):
        complete(workdir, out, 60)
    assert_holds(out, workdir, 75)


def test_an_output_of_another_job_or_of_nobody_is_never_overwritten(workdir, tmp_path):
    out = tmp_path / "s.npz"
    complete(workdir, out, 10)
    before = out.read_bytes()
    changed = {"weights_sha256": "0" * 64, "sample.guidance": 2.0}
    with pytest.raises(
        UsageError, match=r"weights_sha256: found .*; sample.guidance: found 1.0, this command has 2.0; remove"
    ):
        complete(workdir, out, 10, job=job_of(workdir, **changed))
    assert out.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    np.savez(out, arr_0=np.zeros((10, 8, 8, 1), np.uint8))
    with pytest.raises(UsageError, match="exists and does not say which job drew it; remove it or use another --out"):
        complete(workdir, out, 10)
    out.write_bytes(before[:-50])
    with pytest.raises(UsageError, match="exists and does not say which job drew it"):
        complete(workdir, out, 10)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def one_part(monkeypatch):
    """However slow the machine, what is drawn before a stop is one part."""
    monkeypatch.setattr(parts, "PART_SECONDS", 3600.0)


@pytest.mark.usefixtures("one_part")
def test_every_flipped_byte_of_an_output_or_a_part_is_noticed(workdir, tmp_path, capsys):
    out, chance = tmp_path / "s.npz", random.Random(0)
    complete(workdir, out, 40)
    whole = out.read_bytes()
    inside = whole.index(b"\n", whole.index(b"NUMPY")) + 1
    flip_a_bit(out, chance.randrange(inside, inside + 40 * 64))
    assert complete(workdir, out, 40) == 40 and out.read_bytes() == whole
    assert "arr_0.npy is damaged; its images are drawn again" in capsys.readouterr().err
    out.unlink()
    for at in (0, 31, 32, 700, -1):
        with pytest.raises(Interrupted):
            complete(workdir, out, 40, stop=(1,))
        (part,) = part_files(out)
        assert part.name == "0000000000-0000000032.part"
        flip_a_bit(part, at)
        (part.parent / "0000000032-0000000040.part.tmp").write_bytes(b"cut short")
        assert complete(workdir, out, 40) == 40 and out.read_bytes() == whole
        said = capsys.readouterr().err
        assert "images 0 to 31 are drawn again" in said and "0000000040.part.tmp: unfinished, removed" in said
        assert len(list(tmp_path.iterdir())) == 1
        out.unlink()


@pytest.mark.usefixtures("one_part")
def test_a_part_of_another_job_or_range_is_not_mixed_in(workdir, tmp_path, capsys):
    """Also when somebody copies it into the folder, or renames it."""
    out, other = tmp_path / "s.npz", tmp_path / "other" / "s.npz"
    other.parent.mkdir()
    for path, seed in ((out, 3), (other, 4)):
        with pytest.raises(Interrupted):
            complete(workdir, path, 64, stop=(1,), job=job_of(workdir, seed=seed), seed=seed)
    part_files(other)[0].rename(part_files(out)[0])
    part_files(out)[0].with_name("0000000032-0000000064.part").write_bytes(part_files(out)[0].read_bytes())
    assert complete(workdir, out, 64) == 64
    assert capsys.readouterr().err.count("its checksum does not match") == 2
    np.testing.assert_array_equal(stored(out)[0], expected(workdir, 64)[0])


def test_ranges_that_are_missing():
    assert parts.missing([], 10) == [(0, 10)]
    assert parts.missing([(0, 4), (4, 6), (8, 12)], 20) == [(6, 8), (12, 20)]
    assert parts.missing([(2, 4), (8, 30)], 20) == [(0, 2), (4, 8)]
    assert parts.missing([(0, 30)], 20) == []


def test_the_npz_is_written_and_read_part_by_part(tmp_path):
    """64 MB of images in parts of 1 MB: the memory stays below 8 MB, and numpy reads what numpy would have written."""
    out, shape = tmp_path / "s.npz", (32, 32, 1)
    block = (np.arange(1024 * 1024) % 251).astype(np.uint8).reshape(1024, *shape)
    made = ((block, np.full(1024, i, np.int32)) for i in range(64))
    tracemalloc.start()
    parts.write_npz(str(out), str(out) + ".tmp", 65536, shape, made, {"seed": 0})
    for i, (images, labels) in enumerate(parts.read_npz(str(out), 1 << 20)):
        assert images.shape == (1024, *shape) and set(labels.tolist()) == {i}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20, peak
    images, labels = stored(out)
    np.testing.assert_array_equal(images.reshape(64, -1), np.broadcast_to(block.reshape(1, -1), (64, block.size)))
    np.save(tmp_path / "a.npy", images)
    with zipfile.ZipFile(out) as archive:
        assert archive.read("arr_0.npy") == (tmp_path / "a.npy").read_bytes() and archive.testzip() is None


def test_too_few_images_are_never_an_output(workdir, tmp_path):
    out = tmp_path / "s.npz"
    with pytest.raises(JobError, match="found 16 images in the parts, expected 17; nothing is written"):
        parts.write_npz(str(out), str(out) + ".tmp", 17, (8, 8, 1), images_of(workdir, 16), {})
    assert not out.exists()


def test_tiny_batches_make_few_parts(workdir, tmp_path):
    """80 batches within a second or so: a part is written at most four times a second."""
    out, began = tmp_path / "s.npz", time.monotonic()
    with pytest.raises(Interrupted):
        complete(workdir, out, 2000, stop=(80,))
    assert len(part_files(out)) <= 2 + (time.monotonic() - began) / parts.PART_SECONDS


def test_the_job_says_what_images_depend_on_and_nothing_else(workdir):
    job = job_of(workdir)
    _, params = checkpoint.load(str(workdir))
    assert job == job_of(workdir, batch_size=7)
    changed = jax.tree.map(lambda leaf: leaf, params)
    changed["patch_embedding"]["bias"] = changed["patch_embedding"]["bias"].at[0].add(1e-6)
    assert weights_hash(changed) != weights_hash(params) == job["weights_sha256"]
    for name in ("step", "seed", "labels", "sample.sampler", "sample.interval", "model.dtype", "model.width", "uint8"):
        assert name in job


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_images_are_the_same_bits_for_every_batch_size_and_number_of_devices(workdir, dtype, monkeypatch):
    monkeypatch.setattr(draw, "to_uint8", lambda images: images)  # compare the float32 images themselves
    wanted = np.concatenate([x for x, _ in images_of(workdir, 40, batch_size=64, dtype=dtype)])
    assert wanted.dtype == np.float32
    for batch_size, devices in ((1, 1), (5, 8), (24, 8)):
        found = [x for x, _ in images_of(workdir, 40, devices, batch_size, first=9, dtype=dtype)]
        np.testing.assert_array_equal(np.concatenate(found), wanted[9:])


def test_the_grid_is_of_the_first_images_only(tmp_path):
    def many():
        for i in range(10**9):
            assert i <= 40, "read on beyond the grid"
            yield np.zeros((10, 8, 8, 1), np.uint8), np.zeros(10, np.int32)

    picture.save_grid(str(tmp_path / "g.png"), many())
    with Image.open(tmp_path / "g.png") as drawn:
        assert drawn.size == (20 * 50, 20 * 50)


def test_a_grid_has_a_row_a_class_its_name_and_whole_squares():
    images, labels = np.arange(12, dtype=np.uint8).repeat(64).reshape(12, 8, 8, 1) * 20, np.array([1, 0, 3] * 4)
    plain, named = (picture.grid(images, labels, names) for names in ((), ("no", "yes", "", "perhaps")))
    assert plain.size == (4 * 50, 3 * 50) and named.size[0] > 4 * 50 and named.size[1] == 3 * 50
    pixels = np.asarray(named)[:, -4 * 50 :, 0].reshape(3, 50, 4, 50)
    for row, of in enumerate((0, 1, 3)):
        for column, image in enumerate(images[labels == of]):
            assert (pixels[row, 1:-1, column, 1:-1] == image[0, 0]).all()
    captioned = picture.grid(images, labels, (), "digits, depth 2, width 16; step 60; euler 4, guidance 2; seed 0")
    assert captioned.size[1] > 3 * 50 and captioned.crop((0, captioned.size[1] - 150, 200, captioned.size[1])) == plain
    many = picture.grid(np.repeat(images[:1], 90, axis=0), np.arange(90) // 45, ("a", "b"))
    assert many.size[0] <= 2100 and many.size[1] == 4 * 50  # two rows a class
    assert picture.grid(images, np.arange(12), list("abcdefghijkl")).size == (4 * 50, 3 * 50)  # a class an image


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("golden", (1,)), ("Golden-Retriever", (1,)), ("goldfish,2", (0, 2)), ("terrier", "names 2 classes: tibetan terrier (2)"),
        ("dog", (4,)), ("gouldfish", "did you mean 'goldfish'?"), ("5", "'5', expected class numbers from 0 to 4"),
    ],
)  # fmt: skip
def test_classes_are_asked_for_by_number_name_or_a_part_of_it(asked, found, monkeypatch):
    names = ("goldfish", "golden_retriever", "Tibetan terrier", "Norfolk terrier", "dog")
    monkeypatch.setattr(label, "class_names", lambda data: names)
    cfg = Config(model=ModelConfig(classes=5))
    if isinstance(found, tuple):
        assert label.find_classes(asked.split(","), cfg, "nowhere") == found
    else:
        with pytest.raises(UsageError, match=re.escape(found)):
            label.find_classes(asked.split(","), cfg, "nowhere")
    monkeypatch.setattr(label, "class_names", lambda data: names[:2])  # another data set's
    assert label.names_of(cfg, "nowhere") == ("0", "1", "2", "3", "4")


def test_names_of_classes_come_with_the_data_and_nothing_is_built(data_dir, tmp_path):
    ready, absent = DataConfig(data_dir=str(data_dir)), DataConfig(dataset="nowhere", data_dir=str(tmp_path))
    assert class_names(ready) == tuple("0123456789") and class_names(absent) == ()
    assert class_names(DataConfig(data_dir=str(tmp_path / "new"))) and not os.listdir(tmp_path)


def test_images_are_written_one_a_file_and_in_colour_if_asked(workdir, tmp_path, cache_dir):
    folder, out = tmp_path / "images", tmp_path / "rgb.npz"
    flags = [f"--workdir={workdir}", f"--images={folder}", "--steps=2", "--labels=3,7", "--rgb"]
    code, said, err = run("sample", *flags, "--num=5", f"--out={out}", cache_dir=cache_dir)
    assert code == 0 and said.split() == [str(out), str(folder)], err
    with np.load(out, allow_pickle=False) as archive:
        drawn = archive["arr_0"]
    assert drawn.shape == (5, 8, 8, 3) and (drawn == drawn[..., :1]).all()
    assert sorted(os.listdir(folder)) == [f"{i:06d}.png" for i in range(5)] + ["job.json"]
    for i, image in enumerate(drawn):
        with Image.open(folder / f"{i:06d}.png") as png:
            np.testing.assert_array_equal(np.asarray(png), image)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    code, said, err = run("sample", *flags, "--num=5", "--out=", cache_dir=cache_dir)
    assert code == 0 and said.split() == [str(folder)], err
    code, _, err = run("sample", *flags, "--num=6", "--out=", cache_dir=cache_dir)
    assert code == 2 and "images: found 5, this command has 6" in err
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_folder_of_images_is_whole_and_holds_nothing_else(tmp_path):
    job, one = {"step": 1}, (np.zeros((2, 8, 8, 1), np.uint8), np.zeros(2, np.int32))
    with pytest.raises(Interrupted, match="2 of 3 images were drawn"):
        picture.save_images(str(tmp_path / "new"), job, 3, iter([one]))
    assert os.listdir(tmp_path) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").write_bytes(b"photo")
    with pytest.raises(UsageError, match="exists and does not say which job drew it"):
        picture.check_images(str(tmp_path / "mine"), job, (8, 8, 1))
    with pytest.raises(UsageError, match="found images of 4 channels, expected 1 or 3"):
        picture.check_images(str(tmp_path / "new"), job, (8, 8, 4))


def test_a_long_batch_ends_after_the_rows_under_way_once_a_stop_is_asked(workdir):
    """A batch of 70 images is 5 calls of the program: what the calls before the signal drew is yielded, and nothing after."""
    cfg, params = read_config(str(workdir)), checkpoint.load(str(workdir))[1]
    cfg = dataclasses.replace(cfg, sample=dataclasses.replace(cfg.sample, batch_size=70))
    sampling, stop, calls = draw.open_sampling(cfg, make_mesh(MeshConfig(data=1), jax.devices()[:1])), [], []
    decode = sampling.decode

    def counted(x):
        calls.append(len(x))
        if len(calls) == 2:
            stop.append(signal.SIGTERM)
        return decode(x)

    sampling = dataclasses.replace(sampling, decode=counted)
    ((images, labels),) = sampling.images(params, 3, 70, 0, stop)
    assert calls == [16, 16] and len(images) == len(labels) == 32
    whole = np.concatenate([batch for batch, _ in dataclasses.replace(sampling, decode=decode).images(params, 3, 70)])
    assert len(whole) == 70 and np.array_equal(whole[:32], images)


def test_a_grid_replaces_a_grid_and_no_other_picture(tmp_path):
    path, photo = str(tmp_path / "grid.png"), tmp_path / "photo.png"
    for _ in range(2):
        check_out("--grid", path, picture.MARK)
        picture.save_grid(path, iter([(np.zeros((3, 8, 8, 1), np.uint8), np.arange(3))]))
    Image.new("RGB", (8, 8)).save(photo)
    before = photo.read_bytes()
    with pytest.raises(UsageError, match=f"^--grid: {photo} exists and was not written by this command"):
        check_out("--grid", str(photo), picture.MARK)
    assert photo.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["grid.png", "photo.png"]


def test_the_samplers_of_a_grid_are_kept_from_checkpoint_to_checkpoint(workdir):
    cfg, mesh = read_config(str(workdir)), make_mesh(MeshConfig())
    grid = [
        dataclasses.replace(cfg.sample, sampler=s, guidance=g / 2) for s in ("euler", "ddim", "heun") for g in range(5)
    ]
    made = [
        [draw.make_sampler(cfg.model, draw.make_task(dataclasses.replace(cfg, sample=one)), one, mesh) for one in grid]
        for _ in range(2)
    ]
    assert all(a is b for a, b in zip(*made, strict=True)) and len({*made[0]}) == len(grid)
