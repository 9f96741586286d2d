"""Emoji with words: what is held out is trained on in other pairs, captions say what pictures are, the file is the one that was made."""

import functools
import hashlib
from pathlib import Path

import numpy as np
import pytest

from dit_jax.config import DataConfig
from dit_jax.data import emoji
from dit_jax.data.pipeline import make_batches
from dit_jax.data.source import open_source
from dit_jax.data.words import split_words, word_tokens
from dit_jax.error import UsageError

DATA = DataConfig(dataset="emoji", image_size=32, workers=0)
COUNTS = {"train": 7927, "test": 563, "unseen": 927}


@pytest.fixture(scope="module")
def splits():
    return {name: open_source(DATA, name) for name in COUNTS}


@pytest.fixture(scope="module")
def which(splits):
    """(concept, style, tone) of each picture."""
    return {name: [tuple(row) for row in split.source.which.tolist()] for name, split in splits.items()}


def test_the_file_is_the_one_that_was_made_and_lies_with_its_licences():
    assert hashlib.sha256(emoji.FILE.read_bytes()).hexdigest() == emoji.SHA256
    assert emoji.FILE.stat().st_size < 5e6
    notice = emoji.FILE.with_name("NOTICE").read_text()
    for words in (
        "Noto Emoji",
        "Apache License 2.0",
        "Microsoft",
        "Twemoji",
        "CC BY 4.0",
        "Miles Johnson",
        "were changed",
    ):
        assert words in notice
    concepts, pictures, _ = emoji.read_all()
    assert (len(concepts), sum(bool(row[2]) for row in concepts)) == (1594, 309)
    assert pictures.shape == (sum(COUNTS.values()), 32, 32, 3) and pictures.dtype == np.uint8


def test_a_package_takes_the_file_and_its_notice():
    setup = (Path(__file__).parent.parent / "setup.py").read_text()
    assert '"**/*.xz"' in setup and '"**/NOTICE"' in setup


def test_what_is_held_out_is_trained_on_in_other_pairs(splits, which):
    assert {name: len(split) for name, split in splits.items()} == COUNTS
    trained = {(c, s) for c, s, _ in which["train"]}, {(c, t) for c, _, t in which["train"]}
    assert not trained[0] & {(c, s) for c, s, _ in which["test"]}
    assert not trained[1] & {(c, t) for c, _, t in which["unseen"]}
    for name in ("test", "unseen"):
        for column in range(3):  # each concept, style and tone by itself
            assert {row[column] for row in which[name]} <= {row[column] for row in which["train"]}
    assert all(tone for _, _, tone in which["unseen"])
    assert {style for _, style, _ in which["test"]} == {0, 1, 2} and {t for *_, t in which["unseen"]} == {1, 2, 3, 4, 5}
    every = [row for rows in which.values() for row in rows]
    assert len({*every}) == len(every) == sum(COUNTS.values())
    assert [splits["train"].overlaps(splits[name]) for name in COUNTS] == [True, False, False]


def test_captions_name_concept_style_and_tone(splits, which):
    for name, split in splits.items():
        for (_, style, tone), (named, tagged) in zip(which[name], split.captions(np.arange(len(split))), strict=True):
            for caption in (named, tagged):
                assert caption.endswith(f", {emoji.STYLES[style]} style")
                assert len(split_words(caption)) <= 24  # configs/emoji.py
                if tone:
                    assert f"{emoji.TONES[tone]} skin tone" in caption
                else:
                    assert "skin tone" not in caption
    first = splits["train"].captions(np.array([0]))[0]
    assert first[0] == "grinning face, fluent style" and first[1].startswith("cheerful, ")
    names = [named for split in splits.values() for named, _ in split.captions(np.arange(len(split)))]
    assert len({*names}) == len(names)


def test_pictures_are_on_white_and_differ_between_styles_and_tones():
    _, pictures, which = emoji.read_all()
    at = {tuple(row): i for i, row in enumerate(which.tolist())}
    for concept in range(0, 1594, 7):
        noto, fluent, twemoji = (pictures[at[concept, style, 0]].astype(int) for style in range(3))
        assert (noto != fluent).any() and (noto != twemoji).any() and (fluent != twemoji).any()
    toned = [(c, s) for c, s, t in at if t == 5]
    light, dark = (np.stack([pictures[at[c, s, t]] for c, s in toned]).mean((1, 2, 3)) for t in (1, 5))
    assert (light > dark).mean() > 0.99
    edges = np.concatenate([pictures[:, 0], pictures[:, -1]], 1)
    assert (edges == 255).all(-1).mean() > 0.5
    concepts = [row[0] for row in emoji.read_all()[0]]
    for style in range(3):
        red = pictures[at[concepts.index("red heart"), style, 0]][16, 16].astype(int)
        assert red[0] > 180 > 100 > max(red[1:])


def test_batches_are_pictures_with_tokens_and_each_visit_draws_a_caption(splits):
    tokens = functools.partial(word_tokens, length=24, rows=4096)
    first = next(make_batches(DATA, batch_size=16, seed=0, tokens=tokens))
    again = next(make_batches(DATA, batch_size=16, seed=0, tokens=tokens, source=splits["train"]))
    assert first["image"].shape == (16, 32, 32, 3) and np.abs(first["image"]).max() <= 1
    assert {*first["cond"]} == {"text"} and first["cond"]["text"].shape == (16, 24)
    np.testing.assert_array_equal(first["image"], again["image"])
    np.testing.assert_array_equal(first["cond"]["text"], again["cond"]["text"])
    assert splits["test"].identity == {"name": "emoji", "split": "test", "records": 563, "sha256": emoji.SHA256}
    assert splits["test"].describe()["sha256"] == emoji.SHA256


@pytest.mark.parametrize(
    "data, split, words",
    [
        (DATA, "validation", "found 'validation', expected train, test, unseen"),
        (
            DataConfig(dataset="emoji", image_size=32, flip=True),
            "train",
            "data.flip: found True, expected False for emoji",
        ),
    ],
)
def test_what_emoji_cannot_do_is_refused(data, split, words):
    with pytest.raises(UsageError, match=words):
        open_source(data, split)


def test_a_damaged_file_is_named(tmp_path, monkeypatch):
    content = bytearray(emoji.FILE.read_bytes())
    content[-100] ^= 1
    (path := tmp_path / "emoji.xz").write_bytes(content)
    monkeypatch.setattr(emoji, "FILE", path)
    with pytest.raises(UsageError, match=r"emoji\.xz: found SHA-256 .* install dit_jax again"):
        emoji.read_all.__wrapped__()
