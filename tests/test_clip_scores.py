"""CLIPScore and the Fréchet distance of CLIP's features, with small encoders of random weights; and files of captions to draw from."""

import dataclasses
import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import write_encoder

from dit_jax.config import Config, DataConfig, EvalConfig, MeshConfig, ModelConfig
from dit_jax.devices.mesh import make_mesh
from dit_jax.error import UsageError
from dit_jax.evaluation import scores
from dit_jax.evaluation.captions import read_captions
from dit_jax.evaluation.protocol import Shared, check_config, describe_prompts
from dit_jax.metrics import clipscore, frechet
from dit_jax.models import bert, clip
from dit_jax.networks.text import load_encoder
from dit_jax.networks.transfer import import_encoder

SMALL = {"depth": 1, "width": 16, "heads": 2, "hidden": 24}
TEXT = clip.TextConfig(**SMALL, vocabulary=40, positions=12, projection=10, end=39)
VISION = clip.VisionConfig(**SMALL, size=8, patch=4, projection=10)
NUM = 60


def write(folder, out, kind, cfgs):
    shapes = {half: (bert if kind == "bert" else clip).shapes(cfg) for half, cfg in cfgs.items()}
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.3 * draw.standard_normal(leaf.shape, np.float32), shapes)
    write_encoder(folder, kind, cfgs, params)
    import_encoder(kind, str(folder), str(out))
    return str(out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("clip")
    return write(base / "theirs", base / "ours", "clip", {"text": TEXT, "vision": VISION})


@pytest.fixture(scope="module")
def cfg(folder):
    model = ModelConfig(
        depth=1, width=16, heads=2, input_size=16, channels=3, classes=0, text="bytes", conditioning="in_context"
    )
    data = DataConfig(dataset="scenes", image_size=16, cache=False)
    return Config(model=model, data=data, eval=EvalConfig(samples=NUM, features="clip", clip=folder, bootstrap=2))


def test_the_score_is_of_each_sample_and_its_own_caption():
    """2.5 max(cos, 0): lengths do not count, opposite is 0, sample i has caption i modulo their number."""
    captions = np.array([[1.0, 0.0], [0.0, 2.0]])
    images = np.array([[3.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 1.0]])
    np.testing.assert_allclose(clipscore.scores(images, captions), [2.5, 0, 0, 2.5 / np.sqrt(2)])
    with pytest.raises(ValueError, match="found embeddings that are 0"):
        clipscore.scores(np.zeros((1, 2)), captions)


def test_samples_of_captions_have_both_numbers(cfg):
    shared = Shared(cfg, make_mesh(MeshConfig()))
    images = np.random.default_rng(1).integers(256, size=(NUM, 16, 16, 3), dtype=np.uint8)
    network = scores.keeping(shared.network, (16, 16, 3))
    found, signs = scores.measure([network.encode(images)], network, shared.reference, cfg.eval)
    assert signs["clipscore"] == 1 and signs["fd_clip"] == -1 and "clipscore_se" not in signs

    encoder, features = load_encoder(cfg.eval.clip, "clip"), network.rows(images)
    square = np.stack([jax.image.resize(image.astype(np.float32), (8, 8, 3), "cubic") for image in images])
    pooled = clip.apply_vision(
        VISION, encoder.params["vision"], jnp.round(jnp.clip(jnp.asarray(square), 0, 255))
    ).pooled
    np.testing.assert_allclose(features, pooled, rtol=1e-3, atol=1e-4)
    texts = network.texts(list(shared.prompts))
    cosines = (features * texts).sum(1) / np.linalg.norm(features, axis=1) / np.linalg.norm(texts, axis=1)
    assert found["clipscore"] == pytest.approx(2.5 * np.maximum(cosines, 0).mean(), rel=1e-5) and found["clipscore"] > 0
    mean, cov = features.mean(axis=0), np.cov(features, rowvar=False)
    expected = frechet.frechet_distance(mean, cov, *shared.reference.parts["gaussian"])
    assert found["fd_clip"] == pytest.approx(expected, rel=1e-4)
    said = scores.describe(network)
    assert said["clipscore"].startswith("2.5 max(cos, 0)") and "bicubic" in said["resize"] and said["tokenizer"]


def test_grey_images_and_models_of_labels_have_the_distance_alone(cfg):
    network = scores.keeping(scores.open_network(cfg, make_mesh(MeshConfig())), (8, 8, 1))
    images = np.random.default_rng(1).integers(256, size=(NUM, 8, 8, 1), dtype=np.uint8)
    np.testing.assert_array_equal(network.rows(images), network.rows(np.repeat(images, 3, axis=3)))
    reference = scores.Reference({}, {"gaussian": (np.zeros(10), np.eye(10))})
    found, _ = scores.measure([network.encode(images)], network, reference, cfg.eval)
    assert "fd_clip" in found and "clipscore" not in found


def test_what_does_not_fit_is_named(cfg, tmp_path):
    def refused(match, **changes):
        with pytest.raises(UsageError, match=match):
            other = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, **changes))
            scores.check_config(other, "eval.samples")
            scores.open_network(other, make_mesh(MeshConfig()))

    refused("eval.clip: empty, expected the folder of CLIP's encoders", clip="")
    away = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, clip="nets/absent"))
    scores.check_config(away, "eval.samples")  # --check, on a machine that has no CLIP
    refused("eval.clip: found no 'nets/absent', expected the folder", clip="nets/absent")
    refused("eval.features: found 'digits' for .*, expected 'inception', or 'clip' for captions", features="digits")
    refused(r"eval.samples: found 10, expected more than the 10 features of the network 'clip'", samples=10)
    words = bert.BertConfig(**SMALL, vocabulary=40, positions=12)
    refused(
        "found a network of kind 'bert', expected 'clip'",
        clip=write(tmp_path / "a", tmp_path / "b", "bert", {"text": words}),
    )
    half = write(tmp_path / "c", tmp_path / "d", "clip", {"vision": VISION})
    refused(r"found projections of text and images to \[0, 10\] features", clip=half)


def coco(folder, images, annotations):
    rows = [{"id": number, "image_id": image, "caption": caption} for number, image, caption in annotations]
    path = folder / "captions_val.json"
    path.write_text(
        json.dumps({"info": {}, "images": [{"id": i, "file_name": f"{i}.jpg"} for i in images], "annotations": rows})
    )
    return str(path)


def test_captions_of_coco_are_the_first_of_each_image_and_drawn_by_seed(cfg, tmp_path):
    path = coco(tmp_path, range(9, -1, -1), [(100 - k, k // 2, f"{k % 2} of {k // 2}") for k in range(20)])
    every = read_captions(path, 10, 7)
    assert every.texts == tuple(f"1 of {i}" for i in range(10)) and set(every.about) == {"file_sha256", "rule"}
    some, again, other = (read_captions(path, 4, seed) for seed in (7, 7, 8))
    assert some == again != other and len(some.texts) == 4 and list(some.texts) == sorted(some.texts)
    assert some.about["drawn"] == "4 of 10 images by PCG64 from seed 7"
    asked = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, captions=path))
    shared = Shared(asked, None)
    said = describe_prompts(asked, shared)["prompts"]
    assert shared.prompts == every.texts and said["number"] == 10 and said["captions_of"] == "file"
    assert said["file_sha256"] == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    lines = tmp_path / "some.txt"
    lines.write_text("a cat\n\na dog \na bird\n")
    assert read_captions(str(lines), 2, 0).texts == ("a cat", "a dog")


@pytest.mark.parametrize(
    "images,annotations,match",
    [
        ((1, 2), [(5, 1, "a cat")], r"image 2 2\.jpg: found no caption, one of 1"),
        ((1,), [(5, 1, "a cat"), (6, 3, "a dog")], r"annotation 6: found image_id 3, no image of the file"),
        ((1,), [(5, 1, " ")], r"annotation 5: found an empty caption"),
        ((1, 1), [(5, 1, "a cat")], r"images: found an id twice"),
        (("1",), [(5, 1, "a cat")], r"images: id: found '1', expected a whole number"),
        ((), [], r"images: found none"),
    ],
)
def test_a_file_of_captions_that_does_not_fit_is_refused(tmp_path, images, annotations, match):
    with pytest.raises(UsageError, match=f"eval.captions: .*captions_val.json: {match}"):
        read_captions(coco(tmp_path, images, annotations), 10, 0)


def test_files_of_captions_of_other_kinds_and_for_models_of_labels_are_refused(cfg, tmp_path):
    (tmp_path / "list.json").write_text("[]")
    for path, match in (
        ("captions.csv", r"expected COCO's \.json of captions, or a \.txt"),
        (str(tmp_path / "none.txt"), "no such file"),
        (str(tmp_path / "list.json"), "images: found None, expected a list of objects"),
    ):
        with pytest.raises(UsageError, match=match):
            read_captions(path, 10, 0)
    labels = Config(eval=EvalConfig(captions="captions.txt", samples=100))
    with pytest.raises(
        UsageError, match=r"eval\.captions: found 'captions\.txt', expected none: this model has no captions"
    ):
        check_config(labels)
