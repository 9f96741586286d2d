"""A kind of data that this file adds, one class and one row: trained on, evaluated and sampled like those of the package."""

import dataclasses

import numpy as np
import pytest
from job import run

from dit_jax.config import Config, DataConfig, EvalConfig, ModelConfig, TrainConfig
from dit_jax.data import source
from dit_jax.data.skip import Skips
from dit_jax.error import UsageError
from dit_jax.evaluation.run import run as evaluate
from dit_jax.training import loop
from dit_jax.workdir.records import read_records

pytestmark = pytest.mark.usefixtures("one_device")
CLASSES = 3


class Stripes:
    """Striped images drawn from their numbers: an endless source needs no file."""

    key, where = "data.dataset", "their numbers"
    image_shape, captions = (8, 8, 1), None

    def __init__(self, data, split):
        self.first, self.count = {"train": (0, 64), "test": (64, 16)}[split]
        self.classes = CLASSES if data.dataset == "stripes" else 0
        self.identity = {"name": data.dataset, "split": split, "records": self.count, "sha256": f"{self.first:064d}"}
        self.skips = Skips(data.skip_bad)

    def __len__(self):
        return self.count

    def read(self, indices):
        numbers = self.first + indices
        images = np.sin(numbers[:, None, None, None] + np.arange(8)[:, None, None] + np.zeros((8, 8, 1)))
        return images.astype(np.float16), {"label": (numbers % CLASSES).astype(np.int32)} if self.classes else {}

    def training(self, arrays, positions, seed):
        return arrays.astype(np.float32)

    def evaluation(self, arrays):
        return arrays.astype(np.float32)

    def describe(self):
        return {"dataset": self.identity["name"], "records": self.count, "sha256": self.identity["sha256"]}

    def overlaps(self, other):
        return self.first < other.first + other.count and other.first < self.first + self.count


@pytest.fixture
def registered(monkeypatch):
    row = source.Kind(lambda data: data.dataset in ("stripes", "plain_stripes"), Stripes)
    monkeypatch.setitem(source.KINDS, "stripes", row)


def config(dataset, classes, **data):
    return Config(
        model=ModelConfig(depth=1, width=16, heads=2, input_size=8, channels=1, classes=classes, learn_sigma=False),
        data=DataConfig(dataset=dataset, **data),
        train=TrainConfig(steps=4, batch_size=16, log_every=1, checkpoint_every=2),
        eval=EvalConfig(max_images=10, times_per_image=8),
    )


@pytest.mark.parametrize(
    "dataset, classes", [pytest.param("stripes", CLASSES, marks=pytest.mark.slow), ("plain_stripes", 0)]
)
def test_a_kind_from_outside_trains_is_evaluated_and_sampled(registered, tmp_path, cache_dir, dataset, classes):
    cfg, workdir = config(dataset, classes), str(tmp_path / "run")
    half = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=2))
    assert loop.run(half, workdir, quiet=True) == 2
    assert loop.run(cfg, workdir, quiet=True) == 2  # from its position
    record = evaluate(cfg, workdir, [4], quiet=True)[0]
    assert record["protocol"]["data"] == Stripes(cfg.data, "test").describe() | {"image_size": 8}
    assert record["protocol"]["held_out"]["images"] == 10 and np.isfinite(record["metrics"]["loss"])
    assert len(read_records(workdir)) == 1
    flags = [f"--workdir={workdir}", "--num=6", "--steps=2", "--guidance=1", f"--out={tmp_path}/x.npz"]
    code, _, err = run("sample", *flags, cache_dir=cache_dir)
    assert code == 0, err
    with np.load(tmp_path / "x.npz") as found:
        assert found["arr_0"].shape == (6, 8, 8, 1)


@pytest.mark.parametrize(
    "dataset, classes, expected",
    [
        (
            "plain_stripes",
            CLASSES,
            "model.classes: found 3, expected 0 (0: no labels), as the data (plain_stripes) has; set",
        ),
        (
            "stripes",
            0,
            "model.classes: found 0, expected 3 (0: no labels), as the data (stripes) has; set --config.model",
        ),
        ("stripes", 4, "model.classes: found 4, expected 3, as the data (stripes) has; set --config.model.classes=3"),
    ],
)
def test_labels_that_the_model_does_not_expect_are_refused(registered, dataset, classes, expected):
    with pytest.raises(UsageError) as found:
        loop.open_data(config(dataset, classes))
    assert str(found.value).startswith(expected)


def test_held_out_images_of_a_kind_from_outside_are_others(registered):
    with pytest.raises(UsageError, match=r"data\.held_out_split: found 'train', which shares images"):
        loop.open_data(config("stripes", CLASSES, held_out_split="train"))


def test_the_first_lines_say_what_the_data_are(registered, capsys):
    cfg = config("plain_stripes", 0)
    source.introduce(*loop.open_data(cfg))
    assert capsys.readouterr().err == (
        "data: plain_stripes, train: 64 images 8 x 8 x 1, no labels, from their numbers\n"
        "data: plain_stripes, test: 16 images 8 x 8 x 1, no labels, from their numbers\n"
    )
