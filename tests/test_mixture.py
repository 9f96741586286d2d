"""Mixtures: weights hold to the last draw, the order is a closed function of (seed, position), and what does not fit is named."""

import dataclasses
import itertools
import json
import os

import jax
import numpy as np
import pytest
from job import TINY, run
from PIL import Image
from runs import assert_same_run, saved, write_latents

from dit_jax.config import AutoencoderConfig, Config, DataConfig, EvalConfig, resolve, to_dict
from dit_jax.data import mixture, pipeline
from dit_jax.data.latent_notes import LatentInfo
from dit_jax.data.mixture import interleave
from dit_jax.data.order import order
from dit_jax.data.source import bad_records, class_names, introduce, open_source
from dit_jax.error import UsageError
from dit_jax.evaluation.protocol import check_config, make_record
from dit_jax.networks.encoding import open_job
from dit_jax.workdir.folder import check_same_run, make_folder
from dit_jax.workdir.records import read_records

FIRST, SECOND = "split=train[:1000]", "split=train[1000:]"  # of the digits: 1,000 and 442 images
TWO = ((3, FIRST), (1, SECOND))


@pytest.fixture
def digits(data_dir):
    return DataConfig(mixture=TWO, flip=True)


def batches(data, count, start=None, batch=18, **how):
    iterator = pipeline.make_batches(data, batch_size=batch, seed=5, **how)
    if start is not None:
        iterator.set_state(start)
    found = [next(iterator) for _ in range(count)]
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    return found, state


def joined(found):
    return jax.tree.map(lambda *x: np.concatenate(x), *found)


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def error_of(function, *args, **kwargs):
    with pytest.raises(UsageError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


# ---- the order


@pytest.mark.parametrize("weights", [(3, 1), (1, 1, 1), (7,), (1000, 1), (5, 60, 13, 2)])
def test_weights_hold_to_the_last_draw(weights):
    period = sum(weights)
    parts, before = interleave(weights, np.arange(4 * period + period // 2), 11)
    for part, weight in enumerate(weights):
        here = parts == part
        assert here[: 4 * period].reshape(4, period).sum(1).tolist() == [weight] * 4
        assert before[here].tolist() == list(range(here.sum()))  # each example of a part once, in order
    if min(period, len(weights)) > 1 and period > 4:
        assert len(np.unique(parts[: 4 * period].reshape(4, period), axis=0)) > 1  # periods differ


def test_the_order_is_a_function_of_seed_and_position():
    weights, whole = (5, 2, 1), np.arange(4000)
    all_parts, all_before = interleave(weights, whole, 11)
    for start, stop in ((0, 1), (3, 4), (7, 9), (1234, 1300), (3999, 4000)):
        parts, before = interleave(weights, whole[start:stop], 11)
        assert parts.tolist() == all_parts[start:stop].tolist() and before.tolist() == all_before[start:stop].tolist()
    assert interleave(weights, whole, 12)[0].tolist() != all_parts.tolist()
    assert interleave((3, 1), np.arange(16), 0)[0].tolist() == [1, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 1, 0, 0]
    far = 10**15 * 8
    assert interleave(weights, np.arange(far, far + 8), 11)[1].min() >= 10**15


def test_every_part_has_the_order_that_it_has_alone(digits):
    opened = open_source(digits, "train")
    records = opened.make_order(5)(np.arange(4000))
    for part, (start, size, drawn) in enumerate(((0, 1000, 3000), (1000, 442, 1000))):
        mine = records[(records >= start) & (records < start + size)] - start
        epochs = np.concatenate([order(5, epoch, size) for epoch in range(4)])
        assert len(mine) == drawn and mine.tolist() == epochs[:drawn].tolist(), part


def test_batches_are_those_records(digits):
    found = joined(batches(digits, 30)[0])
    alone, opened = [], open_source(digits, "train")
    records = opened.make_order(5)(np.arange(540))
    for row, start in zip(digits.parts, opened.starts, strict=True):
        whole = open_source(row, row.split)
        alone.append(whole.read(np.arange(len(whole))))
        mine = (records >= start) & (records < start + len(whole))
        assert found["cond"]["label"][mine].tolist() == alone[-1][1]["label"][records[mine] - start].tolist()
    images = np.concatenate([images for images, _ in alone])[records]
    np.testing.assert_array_equal(found["image"], opened.training(images, np.arange(540), 5))


@pytest.mark.parametrize("cache", [True, False])
def test_the_order_does_not_depend_on_processes_cache_or_threads(digits, cache):
    whole = joined(batches(digits, 6, batch=20)[0])
    data = dataclasses.replace(digits, cache=cache)
    for count in (1, 2, 4):
        ours = [batches(data, 6, batch=20, process_index=i, process_count=count)[0] for i in range(count)]
        rows = [joined(one) for one in zip(*ours, strict=True)]
        assert_same(joined(rows), whole)
    assert_same(joined(batches(dataclasses.replace(data, workers=0), 6, batch=20)[0]), whole)


def test_a_resume_in_the_middle_of_a_period_is_bitwise(digits):
    whole, _ = batches(digits, 9, batch=9)  # 81 = 20 periods of 4 and 1
    _, state = batches(digits, 3, batch=9)
    assert state["next_index"] * 9 % 4 == 3
    rest, after = batches(digits, 6, state, batch=9)
    assert_same(joined(rest), joined(whole[3:]))
    assert after["drawn"] == batches(digits, 9, batch=9)[1]["drawn"]


def test_the_position_of_each_part_is_shown(digits):
    opened = open_source(digits, "train")
    parts = interleave((3, 1), np.arange(5000), 5)[0]
    for count in (0, 1, 2, 3, 4, 5, 17, 4003):
        found = [np.sum(parts[:count] == i).item() for i in (0, 1)]
        assert opened.drawn(count, 5) == [
            {"images": n, "epochs": n / m} for n, m in zip(found, (1000, 442), strict=True)
        ]
    state = batches(digits, 8, batch=18)[1]
    assert state["drawn"] == [{"images": 108, "epochs": 0.108}, {"images": 36, "epochs": 36 / 442}]
    assert "drawn" not in batches(dataclasses.replace(digits, mixture=()), 1)[1]


def test_a_mixture_of_one_part_is_that_part(digits):
    one = dataclasses.replace(digits, mixture=((4, "dataset=digits"),))
    assert_same(joined(batches(one, 90)[0]), joined(batches(dataclasses.replace(digits, mixture=()), 90)[0]))


# ---- identity, records


def test_other_weights_or_parts_are_refused(digits):
    state = batches(digits, 2)[1]
    assert state["source"]["weights"] == [3, 1] and state["source"]["records"] == 1442
    for rows, expected in (
        (
            ((3, FIRST), (2, SECOND)),
            "weights: found [3, 2], expected [3, 1], as in the data that this run has been trained on",
        ),
        (((3, FIRST), (1, "split=train[1001:]")), "2: split: found 'train[1001:]', expected 'train[1000:]'"),
        (((3, FIRST),), "weights: found [3], expected [3, 1]"),
        ((*TWO, (1, "split=test[:9]")), "weights: found [3, 1, 1], expected [3, 1]"),
        ((), "name: found 'digits/1.0.0', expected 'mixture'"),
    ):
        data = dataclasses.replace(digits, mixture=rows)
        assert expected in error_of(batches, data, 1, state)
    assert batches(digits, 1, state)[1]["next_index"] == 3


def test_the_held_out_split_holds_each_part_once(digits):
    held_out, alone = (open_source(data, "test") for data in (digits, dataclasses.replace(digits, mixture=())))
    assert len(held_out) == 355 and "weights" not in held_out.identity
    assert_same(
        pipeline.load_arrays(digits, "test"), pipeline.load_arrays(dataclasses.replace(digits, mixture=()), "test")
    )
    about = held_out.describe()
    assert about["parts"] == [alone.describe()] and about["classes"] == 10
    data = dataclasses.replace(
        digits, mixture=((3, FIRST, "held_out_split=test[:100]"), (1, SECOND, "held_out_split=test[100:]"))
    )
    two = open_source(data, "test")
    assert len(two) == 355 and not open_source(data, "train").overlaps(two)
    assert_same(pipeline.load_arrays(data, "test"), pipeline.load_arrays(digits, "test"))
    assert [one["records"] for one in two.describe()["parts"]] == [100, 255]
    leaking = dataclasses.replace(digits, mixture=((3, FIRST, "held_out_split=train[1400:]"), (1, SECOND)))
    assert open_source(leaking, "train").overlaps(open_source(leaking, "test"))


def test_records_carry_the_weights(digits, tmp_path):
    cfg = Config(data=digits)
    record = make_record(cfg, str(tmp_path), 3, "0", {"loss": 1.0}, {}, {"records": 1442}, {})
    assert record["mixture"] == ((3, "digits", "train[:1000]", "test"), (1, "digits", "train[1000:]", "test"))
    assert "mixture" not in make_record(Config(), str(tmp_path), 3, "0", {"loss": 1.0}, {}, {"records": 1442}, {})


def test_a_run_keeps_its_weights_while_its_folders_may_move(tmp_path):
    rows = [((3, "folder=a"), (1, "folder=b")), ((3, "folder=c"), (1, "folder=d")), ((3, "folder=a"), (2, "folder=b"))]
    cfg, moved, other = (Config(data=DataConfig(mixture=some)) for some in rows)
    make_folder(str(tmp_path), "config.json", cfg)
    check_same_run(moved, str(tmp_path))
    assert "data.mixture: the folder has ((3, 'folder', 'train', 'test')" in error_of(
        check_same_run, other, str(tmp_path)
    )


def test_a_config_survives_json(digits):
    cfg = Config(data=digits)
    assert resolve(json.loads(json.dumps(to_dict(cfg)))) == cfg and hash(cfg) is not None
    assert (digits.name, digits.title) == ("mixture", "3 digits + 1 digits")
    assert [part.split for part in digits.parts] == ["train[:1000]", "train[1000:]"]
    part = DataConfig(folder="photos", mixture=((1,), (2, "dataset=digits"))).parts
    assert [one.folder for one in part] == ["photos", ""]


# ---- what does not fit


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((3, "folder=photos"), "data.mixture: part 1: found 3, expected (WEIGHT, 'KEY=VALUE', ...)"),
        (
            ((0.7, "folder=a"), (0.3, "folder=b")),
            "found the weight 0.7, expected a whole number from 1 to 1000: 7 and 3 for 0.7",
        ),
        (((1, "folder=a"), (0, "folder=b")), "part 2: found the weight 0, expected a whole number from 1 to 1000"),
        (((1001, "folder=a"),), "found the weight 1001"),
        (((True, "folder=a"),), "found (True, 'folder=a'), expected"),
        (((1, {"folder": "a"}),), "found (1, {'folder': 'a'}), expected (WEIGHT, 'KEY=VALUE', ...)"),
        (((1, "photos"),), "found (1, 'photos'), expected"),
        ((("folder=a",),), "expected (WEIGHT"),
        (((1, "foldr=a"),), "part 1: key: found 'foldr', expected one of dataset, split, held_out_split, folder"),
        (((1, "image_size=8"),), "part 1: key: found 'image_size', expected one of"),
        (((1, "folder=a", "folder=b"),), "part 1: found folder twice"),
        (((1, "dataset=a b"),), "data.mixture: part 1: data.dataset: found 'a b', expected a TFDS name"),
    ],
)
def test_what_is_wrong_with_a_row_is_named(rows, message):
    assert message in error_of(DataConfig, mixture=rows)


def pictures(root, classes, count=3, mode="RGB"):
    for name, number in itertools.product(classes, range(count)):
        pixels = np.random.default_rng(number).integers(0, 256, (9, 9, 3), np.uint8)
        os.makedirs(root / name, exist_ok=True)
        Image.fromarray(pixels).convert(mode).save(root / name / f"{number}.png")
    return f"folder={root}"


def test_parts_that_one_model_cannot_use_are_named(tmp_path, data_dir):
    pets = pictures(tmp_path / "pets", ("cat", "dog"))
    birds = pictures(tmp_path / "birds", ("cat", "wren"))
    flat = pictures(tmp_path / "flat", ("",), 6)
    for rows, message in (
        ((pets, birds), f"part 2 ({birds}): found other classes, only there wren, only in part 1 ({pets}) dog"),
        ((pets, flat), f"part 2 ({flat}) has no labels, part 1 ({pets}) has 2 classes; expected the same of all parts"),
        (
            (pets, "dataset=digits"),
            f"part 2 (dataset=digits) has images 8 x 8 x 1, part 1 ({pets}) has images 8 x 8 x 3",
        ),
        (
            (pets, f"folder={tmp_path / 'none'}"),
            "part 2 (folder=" + str(tmp_path / "none") + "): data.folder: found no folder",
        ),
        ((pets, pets), "share images, expected each image in one part"),
        (("split=train[:9]", "split=train[8:]"), "part 1 (split=train[:9]) and part 2 (split=train[8:]) share images"),
    ):
        data = DataConfig(mixture=tuple((1, row) for row in rows))
        assert message in error_of(open_source, data, "train")
    assert "expected 'train' or 'test'" in error_of(open_source, DataConfig(mixture=TWO), "val")


def latents(root, seed=0, **changes):
    """Latents of 12 digits for training and 4 held out, as a row of a mixture."""
    info = LatentInfo(
        shape=(4, 4, 2), dtype="float32", moments=True, mirrored=False, autoencoder=str(seed), autoencoder_sha256="a" * 64,
        scale=0.5, shift=0.25, classes=3, dataset="digits", split="train", source_sha256="b" * 64, image_size=8,
    )  # fmt: skip
    info, rng = dataclasses.replace(info, **changes), np.random.default_rng(seed)
    for split, count in (("train", 12), ("test", 4)):
        rows = [(i % 3, rng.standard_normal(info.record_shape, dtype=np.float32)) for i in range(count)]
        write_latents(str(root / split), dataclasses.replace(info, split=split), rows)
    return f"latents={root}"


def test_latents_are_mixed_if_one_model_can_use_them(tmp_path):
    one, two = latents(tmp_path / "one", 1), latents(tmp_path / "two", 2)
    data = DataConfig(mixture=((2, one), (1, two)), cache=False)
    opened, held_out = open_source(data, "train"), open_source(data, "test")
    assert (len(opened), opened.image_shape, len(held_out)) == (24, (4, 4, 2), 8) and not opened.overlaps(held_out)
    about = held_out.describe()
    assert about["autoencoder_sha256"] == "a" * 64 and about["scale"] == 0.5 and about["autoencoder"] == "1"
    found = joined(batches(data, 2)[0])
    records = opened.make_order(5)(np.arange(36))
    wanted = [opened.parts[int(i >= 12)].read(np.array([i % 12])) for i in records]
    assert found["cond"]["label"].tolist() == [cond["label"][0] for _, cond in wanted]
    arrays = np.concatenate([array for array, _ in wanted])
    np.testing.assert_array_equal(found["image"], opened.parts[0].training(arrays, np.arange(36), 5))
    for row, message in (
        (latents(tmp_path / "scaled", 3, scale=2.0), "scale: found 2.0, expected 0.5"),
        (latents(tmp_path / "vae", 3, autoencoder_sha256="c" * 64), "autoencoder_sha256: found"),
        (latents(tmp_path / "half", 3, dtype="float16"), "has latents in float16"),
        (one, "share images"),
    ):
        assert message in error_of(open_source, DataConfig(mixture=((2, one), (1, row))), "train")
    small = latents(tmp_path / "small", 4, shape=(8, 8, 1))
    message = error_of(open_source, DataConfig(mixture=((1, "dataset=digits"), (1, small))), "train")
    assert "has latents in float32" in message and "part 1 (dataset=digits) has images" in message


def test_a_folder_inside_another_shares_its_images(tmp_path):
    outer = tmp_path / "all"
    pictures(outer / "a", ("x", "y"), 12)
    pictures(outer / "b", ("x", "y"), 12)
    data = DataConfig(mixture=((1, f"folder={outer}"), (1, f"folder={outer / 'a'}")))
    with pytest.raises(UsageError, match="all hold the folders"):
        open_source(data, "train")
    inner, part = (open_source(DataConfig(folder=str(outer / name)), "train") for name in ("a", "a/x"))
    assert inner.overlaps(part) and part.overlaps(inner)
    assert not inner.overlaps(open_source(DataConfig(folder=str(outer / "b")), "train"))


def test_a_malformed_record_is_replaced_within_its_part(tmp_path):
    one, two = (pictures(tmp_path / name, ("",), 8) for name in "ab")
    data = DataConfig(mixture=((1, one), (1, two)), skip_bad=2, cache=False)
    opened = open_source(data, "train")
    last = opened.starts[1] - 1
    path = opened.parts[0].name_of(last)
    with open(path, "wb") as file:
        file.write(b"none")
    opened = open_source(data, "train")
    found = pipeline._read(opened, None, False, np.arange(len(opened)))[0]
    np.testing.assert_array_equal(found[last], opened.read(np.array([0]))[0][0])
    assert list(bad_records(opened)) == [last] and path in bad_records(opened)[last]
    assert path in error_of(pipeline.load_arrays, dataclasses.replace(data, skip_bad=0), "train")
    skips = mixture._Skips(9, {4: "x", 5: "y"}, starts=(0, 4))
    assert "all 2 records of part 2 malformed" in error_of(skips.instead, 4, 6)


def test_names_of_classes_come_from_a_part(tmp_path, capsys):
    data = DataConfig(mixture=((1, pictures(tmp_path / "a", "xy", 9)), (2, pictures(tmp_path / "b", "xy", 9))))
    assert class_names(data) == ("x", "y") == open_source(data, "train").class_names
    introduce(open_source(data, "train"))
    said = capsys.readouterr()
    assert f"1 of 3 {tmp_path}/a (" in said.out + said.err and "2 classes (x, y)" in said.out + said.err


# ---- jobs


@pytest.mark.slow
def test_train_resume_and_evaluate(tmp_path, cache_dir, data_dir):
    rows = f"--config.data.mixture={TWO}"
    whole, halves = tmp_path / "whole", tmp_path / "halves"

    def train(workdir, steps, *more):
        args = ["--config=configs/digits.py", f"--workdir={workdir}", *TINY, f"--config.train.steps={steps}"]
        return run("train", *args, *more, cache_dir=cache_dir)

    assert train(whole, 8, rows)[0] == 0
    assert train(halves, 5, rows)[0] == 0
    code, _, err = train(halves, 8, rows.replace("(3,", "(2,"))
    assert code == 2 and "data.mixture: the folder has ((3, 'digits', 'train[:1000]', 'test')" in err
    assert train(halves, 8, rows)[0] == 0
    assert_same_run(whole, halves, 8)
    assert [one["images"] for one in saved(whole, 8)["data"]["drawn"]] == [96, 32]
    code, _, err = run("evaluate", f"--workdir={whole}", cache_dir=cache_dir)
    assert code == 0, err
    *_, record = read_records(str(whole)).values()
    assert record["unique_images"] == 1442 and record["mixture"][0] == [3, "digits", "train[:1000]", "test"]


def test_sample_metrics_need_a_reference(digits):
    cfg = Config(data=digits, eval=EvalConfig(features="inception", inception="inception", samples=3000))
    assert "or a mixture, whose splits do not hold the weights" in error_of(check_config, cfg)
    check_config(dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, reference="train.npz")))
    own = dataclasses.replace(cfg, eval=EvalConfig(features="digits", samples=300))
    assert "eval.features: found 'digits' for '3 digits + 1 digits'" in error_of(check_config, own)


def test_encode_refuses_a_mixture(tmp_path):
    cfg = Config(data=DataConfig(mixture=TWO), autoencoder=AutoencoderConfig(folder=str(tmp_path)))
    assert "encode each part, then mix what is encoded" in error_of(open_job, cfg, "float16", False)
    data = DataConfig(mixture=((3, "folder=a", "latents=b"), (1, FIRST)), latents="c")
    assert data.images == DataConfig(mixture=((3, "folder=a"), (1, FIRST)))
