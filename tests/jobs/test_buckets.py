"""Aspect buckets: every picture in the nearest shape, batches of one shape, an exact order, and what such a run records."""

import collections
import dataclasses
import itertools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from job import run, start, wait_for_step
from PIL import Image
from runs import assert_same_run

from dit_jax import checkpoint, flops, log
from dit_jax.bench.measure import compilations
from dit_jax.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    TrainConfig,
    resolve,
)
from dit_jax.data import aspect, pipeline, pixels
from dit_jax.data.aspect import Buckets, Schedule, nearest
from dit_jax.data.source import open_source
from dit_jax.devices.mesh import make_mesh
from dit_jax.error import UsageError
from dit_jax.evaluation.loss import alone, make_losses
from dit_jax.evaluation.run import run as evaluate
from dit_jax.models import dit
from dit_jax.models.conditioning import positions
from dit_jax.program import program
from dit_jax.sampling.draw import open_sampling
from dit_jax.training import loop
from dit_jax.training.state import make_state
from dit_jax.training.step import make_train_step
from dit_jax.workdir.records import read_records

pytestmark = pytest.mark.usefixtures("one_device")
SHAPES = ((8, 8), (8, 12), (12, 4))
SIZES = ((20, 20), (18, 30), (40, 14), (24, 16))  # (h, w) of pictures; the last is nearest to the square
TRAINED, STEPS, BATCH = SHAPES[:2], 6, 8  # in runs, as each shape takes seconds to compile


def gradient(height, width, seed):
    """A picture whose first two channels tell row and column of each pixel."""
    rows, columns = np.mgrid[:height, :width]
    return np.dstack([rows, columns, np.full((height, width), seed)]).astype(np.uint8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(56):
        Image.fromarray(gradient(*SIZES[i % 4], i)).save(folder / f"{i:02}.png")
    return str(folder)


@pytest.fixture(scope="module")
def cfg(photos):
    return Config(
        model=ModelConfig(depth=1, width=16, heads=2, patch=2, input_size=8, channels=3, classes=0, learn_sigma=False),
        diffusion=DiffusionConfig(process="flow"),
        data=DataConfig(folder=photos, image_size=8, buckets=SHAPES, crop="random", flip=True),
        train=TrainConfig(steps=STEPS, batch_size=BATCH, log_every=1, checkpoint_every=3),
        eval=EvalConfig(times_per_image=8),
    )


def batches(data, count, seed=3, skip=0, **how):
    iterator = pipeline.make_batches(data, batch_size=BATCH, seed=seed, **how)
    if skip:
        iterator.set_state(iterator.get_state() | {"next_index": skip})
    found = [next(iterator)["image"] for _ in range(count)]
    iterator.close()
    return found


def error_of(function, *arguments, **how):
    with pytest.raises(UsageError) as caught:
        function(*arguments, **how)
    return str(caught.value)


# ---- which bucket, in which order


def test_the_nearest_bucket_by_log_ratio_and_the_first_of_several():
    shapes = ((64, 64), (64, 128), (128, 64), (32, 32))
    sizes = np.array([(10, 10), (100, 142), (100, 141), (142, 100), (1, 1000), (1000, 1)])
    assert nearest(sizes, shapes).tolist() == [0, 1, 0, 2, 1, 2]
    assert nearest(np.array([(64, 128)]), ((64, 64), (64, 256))).tolist() == [0]  # as far from both


def test_sizes_are_of_the_pictures_as_they_stand(photos, tmp_path):
    for i, orientation in enumerate(range(1, 9)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for form in ("png", "jpg", "webp", "tiff"):
            path = tmp_path / f"{i}.{form}"
            Image.fromarray(gradient(6, 10, i)).save(path, exif=exif)
            assert pixels.size_of(path.read_bytes()) == pixels.decode(path.read_bytes(), 3).shape[:2]
    source = open_source(DataConfig(folder=photos), "train")
    assert {tuple(size) for size in source.sizes(np.arange(len(source))).tolist()} == {*SIZES}


@pytest.mark.parametrize("counts, batch", [((3, 50, 0, 7), 8), ((40,), 16), ((5, 2), 8), ((16, 8, 24), 8)])
def test_every_batch_comes_once_and_its_index_tells_it(counts, batch):
    schedule, steps = Schedule(counts, batch, seed=5), 150
    found = [schedule.at(k) for k in range(steps)]
    made = collections.Counter(bucket for bucket, _ in found)
    assert len(set(found)) == steps
    ends = {bucket: max(m for j, m in found if j == bucket) + 1 for bucket in made}
    assert sum(ends.values()) <= steps + sum(counts) // batch + len(counts)  # no gap but in the last epoch
    for k in (0, 1, 37, steps):
        now = collections.Counter(bucket for bucket, _ in found[:k])
        assert schedule.seen(k) == [now[j] * batch for j in range(len(counts))]
    far = 10**9
    assert sum(schedule.seen(far)) == far * batch
    for count, images in zip(counts, schedule.seen(far), strict=True):
        assert abs(images / (far * batch) - count / sum(counts)) < 1e-6
    if len(counts) > 2:
        assert found != [Schedule(counts, batch, seed=6).at(k) for k in range(steps)]


def test_each_record_is_drawn_equally_often():
    of = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [3, 40, 21]))
    buckets, visits = Buckets(((8, 8), (8, 16), (16, 8)), of), np.zeros(64, int)
    epochs = 20
    steps = sum(Schedule(buckets.counts, BATCH, 1).before(epochs))
    assert steps == 7 + 100 + 52
    for k in range(steps):
        records, shape = buckets.batch(k, BATCH, seed=1)
        assert {buckets.shapes[j] for j in of[records]} == {shape} and len(records) == BATCH
        np.add.at(visits, records, 1)
    for members in buckets.members:
        left = epochs * len(members) % BATCH  # drawn in the next epoch's first batch
        assert visits[members].sum() == epochs * len(members) - left
        assert epochs - math.ceil(left / len(members)) <= visits[members].min() <= visits[members].max() <= epochs
    first = [buckets.batch(k, BATCH, 1)[0].tolist() for k in range(sum(Schedule(buckets.counts, BATCH, 1).before(1)))]
    assert len({*itertools.chain(*first)}) == 40 + 16  # none twice in an epoch


@pytest.mark.parametrize("processes", [2, 4])
def test_the_order_does_not_depend_on_the_processes(cfg, processes):
    alone = batches(cfg.data, 12)
    assert {image.shape[1:3] for image in alone} == {*SHAPES}
    parts = [batches(cfg.data, 12, process_index=i, process_count=processes) for i in range(processes)]
    for one, rows in zip(alone, zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(one, np.concatenate(rows))


@pytest.mark.parametrize("buckets", [SHAPES, ()], ids=["buckets", "square"])
def test_neither_cache_nor_threads_nor_resuming_change_a_batch(cfg, buckets):
    data = dataclasses.replace(cfg.data, buckets=buckets)
    expected = batches(data, 9)
    for cache, workers in ((True, 0), (False, 0), (False, 3)):
        for skip in (0, 5):
            changed = dataclasses.replace(data, cache=cache, workers=workers)
            found = batches(changed, 9 - skip, skip=skip)
            for one, other in zip(expected[skip:], found, strict=True):
                np.testing.assert_array_equal(one, other)


def test_the_position_keeps_the_number_of_pictures_in_each_bucket(cfg):
    iterator = pipeline.make_batches(cfg.data, batch_size=BATCH, seed=0)
    state = json.loads(json.dumps(iterator.get_state()))
    buckets = state["source"]["buckets"]
    assert [(h, w) for h, w, _ in buckets] == [*SHAPES]
    assert sum(count for *_, count in buckets) == state["source"]["records"]
    iterator.set_state(state)
    expected = aspect.seen(state["source"], cfg.train, 5)
    assert expected == dict(zip(SHAPES, Schedule(iterator.buckets.counts, BATCH, cfg.train.seed).seen(5), strict=True))
    state["source"]["buckets"] = [[8, 8, 1]]
    message = error_of(iterator.set_state, state)
    assert message.startswith(f"data.folder: buckets: found {buckets}, expected [[8, 8, 1]], as in the data")


# ---- scaling and cropping


def adm(image, size):
    """`center_crop_arr` of ADM's `image_datasets`, as it is used on RGB images."""
    picture = Image.fromarray(image)
    while min(*picture.size) >= 2 * size:
        picture = picture.resize(tuple(x // 2 for x in picture.size), resample=Image.BOX)
    scale = size / min(*picture.size)
    picture = picture.resize(tuple(round(x * scale) for x in picture.size), resample=Image.BICUBIC)
    array = np.array(picture)
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y : y + size, x : x + size]


def test_squares_are_those_of_adm():
    rng = np.random.default_rng(0)
    for height, width in [(8, 8), (17, 9), (64, 8), (33, 70), (100, 31), (9, 16), *rng.integers(5, 90, (20, 2))]:
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        np.testing.assert_array_equal(pixels.resize(image, 8), adm(image, 8))


def test_pictures_cover_their_bucket_without_distortion():
    rng = np.random.default_rng(0)
    for height, width, h, w in rng.integers(4, 120, (60, 4)):
        found = pixels.cover(np.zeros((height, width, 3), np.uint8), (int(h), int(w)))
        scale = max(h / height, w / width)
        assert found.shape[0] >= h and found.shape[1] >= w and h * w in (found.shape[0] * w, h * found.shape[1])
        assert abs(found.shape[0] - height * scale) <= max(2, scale) and abs(found.shape[1] - width * scale) <= max(
            2, scale
        )
    level = pixels.cover(np.full((64, 96, 1), 77, np.uint8), (16, 24))
    assert level.shape == (16, 24, 1) and (level == 77).all()


def offsets(image):
    """(top, left, mirrored) of a crop of `gradient`, from pixels in [-1, 1]."""
    rows, columns = np.rint((image[..., 0] + 1) * 127.5), np.rint((image[..., 1] + 1) * 127.5)
    return int(rows[0, 0]), int(columns[0].min()), bool(columns[0, 0] > columns[0, -1])


@pytest.mark.parametrize("buckets", [((8, 8),), ()], ids=["bucket", "square"])
def test_crops_and_flips_are_drawn_by_seed_and_visit(tmp_path, buckets):
    for i in range(8):
        Image.fromarray(gradient(8, 13, i)).save(tmp_path / f"{i}.png")  # one side is right, so nothing is scaled
        Image.fromarray(gradient(12, 8, i)).save(tmp_path / f"{i}-high.png")
    data = DataConfig(folder=str(tmp_path), image_size=8, buckets=buckets, crop="random", flip=True)
    images = np.concatenate(batches(data, 60))
    found = [offsets(image) for image in images]
    assert {left for _, left, _ in found} == {*range(6)} and {top for top, _, _ in found} == {*range(5)}
    assert {mirrored for *_, mirrored in found} == {False, True}
    assert found == [offsets(image) for image in np.concatenate(batches(data, 60))]
    assert found != [offsets(image) for image in np.concatenate(batches(data, 60, seed=4))]
    visits = collections.defaultdict(set)
    for image, where in zip(images, found, strict=True):
        visits[int(np.rint((image[0, 0, 2] + 1) * 127.5))].add(where)
    assert min(map(len, visits.values())) > 5  # one picture, another crop at each visit
    centre = np.concatenate(batches(dataclasses.replace(data, crop="center"), 20))
    assert {offsets(image)[:2] for image in centre} == {(0, 2), (2, 0)}


def test_scores_see_the_centre_of_each_held_out_picture(cfg):
    source = open_source(cfg.data, "test")
    images, cond = pipeline.load_arrays(cfg.data, "test", source, buckets=SHAPES)
    shapes, whole = (
        aspect.open_buckets(source, SHAPES).shapes_of(np.arange(len(source))),
        source.sizes(np.arange(len(source))),
    )
    assert [image.shape[:2] for image in images] == shapes and cond == {}
    for i, (image, shape) in enumerate(zip(images, shapes, strict=True)):
        seed = int(source.name_of(i)[-6:-4])
        expected = pixels.crop(pixels.cover(gradient(*whole[i], seed), shape), shape)
        np.testing.assert_array_equal(image, pixels.to_float(expected))


# ---- the model


def test_positions_of_the_square_are_unchanged_and_other_grids_share_its_centre():
    def plain(side, width):
        frequencies = 10_000.0 ** -(np.arange(width // 4, dtype=np.float64) / (width // 4))
        row, column = np.divmod(np.arange(side * side), side)
        parts = [f(index[:, None] * frequencies[None]) for index in (column, row) for f in (np.sin, np.cos)]
        return np.concatenate(parts, axis=1).astype(np.float32)

    for side, width in ((4, 16), (16, 64), (5, 8)):
        np.testing.assert_array_equal(positions(side, width), plain(side, width))
        np.testing.assert_array_equal(positions(side, width, (side, side)), plain(side, width))
    square = positions(4, 16).reshape(4, 4, 16)
    np.testing.assert_array_equal(positions(4, 16, (2, 4)).reshape(2, 4, 16), square[1:3])
    np.testing.assert_array_equal(positions(4, 16, (6, 2)).reshape(6, 2, 16)[1:5], square[:, 1:3])
    odd = positions(4, 16, (3, 4)).reshape(3, 4, 16)
    np.testing.assert_allclose(odd[:, 0, 8], np.sin([0.5, 1.5, 2.5]), rtol=1e-6)  # rows, at the first frequency


@pytest.mark.parametrize(
    "conditioning",
    ["adaln_zero", *(pytest.param(k, marks=pytest.mark.slow) for k in ("in_context", "cross_attention"))],
)
def test_flops_of_every_shape(conditioning):
    small = ModelConfig(depth=2, width=256, heads=4, input_size=16, classes=10, unroll=2, conditioning=conditioning)
    params = dit.init(small, jax.random.key(0))
    x = jnp.zeros((1, 8, 24, 4))
    cost = jax.jit(lambda p: dit.apply(small, p, x, jnp.zeros(1), jnp.zeros(1, int))).lower(params).compile()
    assert 1.0 < cost.cost_analysis()["flops"] / flops.forward_flops(small, (8, 24)) < 1.05
    assert flops.tokens(small, (8, 24)) == 48 and flops.tokens(small) == flops.tokens(small, (16, 16)) == 64
    assert flops.forward_flops(small, (8, 32)) == flops.forward_flops(small)  # as many tokens
    assert flops.train_flops(small, 5, (8, 24)) == 15 * flops.forward_flops(small, (8, 24))


@pytest.mark.slow
def test_a_bucket_has_the_same_loss_on_any_mesh(cfg):
    image, found = np.random.default_rng(0).normal(size=(BATCH, 12, 4, 3)).astype(np.float32), []
    for axes, devices in ((MeshConfig(data=1), 1), (MeshConfig(data=2, fsdp=2, tensor=2), 8)):
        mesh = make_mesh(axes, jax.devices()[:devices])
        step, state = make_train_step(cfg, mesh), make_state(cfg, mesh)
        for _ in range(2):
            state, scalars = step(state, {"image": image, "cond": {}})
            found.append(float(scalars["loss"]))
    np.testing.assert_allclose(found[:2], found[2:], rtol=1e-5)


# ---- a run


@pytest.fixture(scope="module")
def few(cfg):
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, buckets=TRAINED))


@pytest.fixture(scope="module")
def whole(few, tmp_path_factory):
    """(workdir, compiled programs) of a run in one go. Not to be changed: copy it."""
    workdir = str(tmp_path_factory.mktemp("run") / "whole")
    with compilations() as names:
        loop.run(few, workdir, quiet=True)
    return workdir, names


@pytest.fixture(scope="module")
def trained(few, whole, tmp_path_factory):
    """(workdir, records) of a run that was stopped at half its steps and resumed."""
    workdir = str(shutil.copytree(whole[0], tmp_path_factory.mktemp("run") / "run"))
    shutil.rmtree(checkpoint.path_of(workdir, STEPS))
    assert loop.run(few, workdir, quiet=True) == STEPS // 2
    return workdir, evaluate(few, workdir, quiet=True)


def test_a_resumed_run_has_the_weights_of_one_in_one_go(few, whole, trained):
    workdir, names = whole
    shapes = {image.shape for image in batches(few.data, STEPS, seed=few.train.seed)}
    assert names.count("jit(step)") == len(shapes) > 1  # one for each bucket that was met
    one, other = (checkpoint.load(folder, STEPS, "params")[1] for folder in (trained[0], workdir))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_records_count_what_was_trained(few, trained):
    assert {step for step, _ in read_records(trained[0])} == {STEPS // 2, STEPS}
    for record in trained[1]:
        shapes = [image.shape[1:3] for image in batches(few.data, record["step"], seed=few.train.seed)]
        assert record["images_seen"] == BATCH * record["step"] and len({*shapes}) > 1
        assert record["tokens_seen"] == BATCH * sum(h * w // 4 for h, w in shapes)
        assert record["flops_train"] == sum(flops.train_flops(few.model, BATCH, shape) for shape in shapes)
        assert record["protocol"]["data"]["buckets"] == [list(shape) for shape in TRAINED]


def test_the_held_out_loss_is_of_each_picture_in_its_own_shape(few, trained):
    (workdir, (*_, record)), mesh = trained, make_mesh(few.mesh, jax.devices()[:1])
    params = checkpoint.load(workdir, STEPS, "ema")[1]
    images, _ = pipeline.load_arrays(few.data, "test", buckets=TRAINED)
    losses = make_losses(alone(few, 0), mesh)
    assert len({image.shape for image in images}) > 1
    each = [losses(params, image[None], {}, np.array([i], np.int32)) for i, image in enumerate(images)]
    assert record["metrics"]["loss"] == pytest.approx(float(np.mean(each)), rel=1e-5)
    assert record["metrics"]["loss_se"] == pytest.approx(
        np.mean(each, axis=(1, 2)).std(ddof=1) / math.sqrt(len(each)), rel=1e-4
    )


def test_samples_of_a_bucket_are_drawn_in_its_shape(few, trained, capsys):
    sample = dataclasses.replace(few.sample, sampler="euler", steps=2, batch_size=4)
    cfg, mesh = dataclasses.replace(few, sample=sample), make_mesh(MeshConfig(data=1), jax.devices()[:1])
    params = checkpoint.load(trained[0], STEPS, "ema")[1]
    drawing = open_sampling(cfg, mesh, size=(8, 12))
    assert capsys.readouterr().err == "" and drawing.shape == (8, 12, 3)
    images, _ = next(drawing.images(params, seed=0, num=4))
    assert images.shape == (4, 8, 12, 3)
    assert drawing.flops == 2 * flops.forward_flops(cfg.model, (8, 12))
    assert drawing.describe("", 0, 0)["size"] == [8, 12]
    square = open_sampling(cfg, mesh, size=(8, 8))
    assert square.describe("", 0, 0) == open_sampling(cfg, mesh).describe("", 0, 0) and square.size is None
    open_sampling(cfg, mesh, size=(4, 12))
    assert capsys.readouterr().err.startswith(
        "warning: images of 4x12 pixels are drawn from a model trained on 8x8, 8x12"
    )
    assert (
        error_of(open_sampling, cfg, mesh, size=(7, 12))
        == "--size: found 7x12, expected multiples of 2 pixels, as a token has"
    )


def test_preflight_takes_the_largest_bucket(cfg):
    found = program(cfg, "train", make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    assert found.arguments[1]["image"].shape == (BATCH, 8, 12, 3)
    assert found.flops == flops.train_flops(cfg.model, BATCH, (8, 12))


def test_the_rate_of_flops_is_of_the_shapes_between_two_reports(monkeypatch):
    now, cost = [0.0], [1e9, 3e9]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
    report = log.progress(100, 8, lambda step: sum(itertools.islice(itertools.cycle(cost), step)), peak=1e10)
    report(1, {"loss": 1.0})
    now[0] += 2.0
    assert report(3, {"loss": 1.0})["mfu"] == pytest.approx(4e9 / 2.0 / 1e10)
    now[0] += 1.0
    assert report(4, {"loss": 1.0})["mfu"] == pytest.approx(3e9 / 1e10)


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(photos, tmp_path, cache_dir):
    def command(workdir):
        more = ("depth=1", "width=16", "heads=2", "patch=2", "input_size=8")
        return (
            "--config=configs/photos.py", f"--workdir={tmp_path / workdir}", *(f"--config.model.{key}" for key in more),
            f"--config.data.folder={photos}", "--config.data.image_size=8", f"--config.data.buckets={SHAPES}",
            "--config.data.crop=random", "--config.train.steps=60", "--config.train.batch_size=8",
            "--config.train.checkpoint_every=10", "--config.train.log_every=1",
        )  # fmt: skip

    assert run("train", *command("whole"), cache_dir=cache_dir)[0] == 0
    process = start("train", *command("killed"), cache_dir=cache_dir)
    wait_for_step(process, tmp_path / "killed", 25)
    process.kill()
    process.communicate()
    code, _, err = run("train", *command("killed"), cache_dir=cache_dir)
    assert code == 0, err
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


# ---- bad input


@pytest.mark.parametrize(
    "buckets, message",
    [
        ((64,), "data.buckets: found 64, expected pairs (h, w) of pixels, such as (64, 96)"),
        (((64, 64, 3),), "data.buckets: found (64, 64, 3), expected pairs"),
        (((64, 0),), "data.buckets: found (64, 0), expected pairs"),
        (((8.0, 8),), "data.buckets: found (8.0, 8), expected pairs"),
        (((8, 8), (8, 8)), "data.buckets: found ((8, 8), (8, 8)), expected each pair once"),
        (((8, 9),), "data.buckets: found (8, 9), expected sides that are multiples of model.patch = 2"),
    ],
)
def test_wrong_buckets_are_named(buckets, message):
    assert error_of(resolve, {"data": {"buckets": buckets}}).startswith(message)


def test_latents_and_ladders_have_no_buckets():
    for key, value in (("buckets", ((8, 8),)), ("crop", "random")):
        found = error_of(DataConfig, latents="latents", **{key: value})
        assert found.startswith(f"data.{key}: found {value!r}, expected ") and "beside data.latents" in found
    assert error_of(DataConfig, crop="middle").startswith("data.crop: found 'middle', expected one of center, random")
    ladder = {"budgets": (1e9,), "sizes": ((4, 1, 1),), "windows": ((0, 1),)}
    assert "expected () with sweep.budgets" in error_of(resolve, {"data": {"buckets": ((8, 8),)}, "sweep": ladder})


def test_images_of_one_size_have_no_buckets(data_dir):
    data = DataConfig(buckets=((8, 8), (8, 16)))
    message = error_of(pipeline.make_batches, data, batch_size=8, seed=0)
    assert (
        message == "data.buckets: found ((8, 8), (8, 16)) for data.dataset with images of one size, 8 x 8, expected ()"
    )


def test_small_and_empty_buckets_are_named(cfg, photos, capsys):
    shapes = (*SHAPES, (4, 64))
    found = aspect.open_buckets(open_source(cfg.data, "train"), shapes)
    found.introduce(24)
    said = capsys.readouterr().err
    counts = found.counts
    assert said.startswith(f"data.buckets: 8 x 8: {counts[0]}, 8 x 12: {counts[1]}, 12 x 4: {counts[2]}, 4 x 64: 0\n")
    assert "warning: data.buckets: (4, 64): found 0 pictures for batches of 24; it is never trained on" in said
    assert f"(8, 12): found {counts[1]} pictures for batches of 24; each batch of it has a picture" in said


def test_a_picture_without_a_size_is_named_or_replaced(tmp_path):
    for i in range(12):
        Image.fromarray(gradient(8, 8 if i % 2 else 16, i)).save(tmp_path / f"{i:02}.png")
    data = DataConfig(folder=str(tmp_path), image_size=8, buckets=((8, 8), (8, 16)))
    names = [open_source(data, "train").name_of(i) for i in range(len(open_source(data, "train")))]
    with open(names[2], "r+b") as file:
        file.write(b"no picture")
    message = error_of(pipeline.make_batches, data, batch_size=BATCH, seed=0)
    assert message.startswith(f"{names[2]}: cannot read the image's size: cannot identify image file")
    lenient = dataclasses.replace(data, skip_bad=1)
    for cache in (True, False):
        images = np.concatenate([x.reshape(-1, 3) for x in batches(dataclasses.replace(lenient, cache=cache), 6)])
        seen = {int(v) for v in np.rint((images[:, 2] + 1) * 127.5)}
        assert seen == {int(name[-6:-4]) for name in names} - {int(names[2][-6:-4])}
