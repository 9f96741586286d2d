"""Scenes of coloured digits with words: what is drawn is what is said, held-out pairs are held out, and compositions are scored exactly."""

import functools

import numpy as np
import pytest

from dit_jax.config import Config, DataConfig, EvalConfig, ModelConfig
from dit_jax.data import scenes
from dit_jax.data.pipeline import load_arrays, make_batches
from dit_jax.data.source import open_source
from dit_jax.data.words import as_tokens, byte_tokens, draw, prompts, split_words, word_tokens
from dit_jax.devices.mesh import local_mesh
from dit_jax.error import UsageError
from dit_jax.evaluation import scores
from dit_jax.metrics import composition

TOKENS = functools.partial(byte_tokens, length=64)
DATA = DataConfig(dataset="scenes", image_size=16, cache=False, workers=0)
SOME = 600


@pytest.fixture(scope="module")
def splits():
    return {name: open_source(DATA, name) for name in ("train", "test", "unseen")}


def logits_of(scene):
    """Of a perfect classifier of the quarters."""
    found = np.zeros((4, 10))
    for thing in scene.things:
        found[thing.place, thing.digit] = 1
    return found.reshape(-1)


@pytest.mark.parametrize("which", [0, 1, -1])
def test_a_picture_is_right_for_its_captions_and_wrong_for_others(splits, which):
    found = splits["train"].scenes(np.arange(SOME))
    images = splits["train"].read(np.arange(SOME))[0]
    asked = scenes.asked([scene.captions[min(which, len(scene.captions) - 1)] for scene in found])
    seen = composition.detect(np.stack(list(map(logits_of, found))), images, asked.palette)
    rows = np.arange(SOME)
    assert composition.right(*seen, asked, rows).all()
    assert composition.right(*seen, asked, (rows + 1) % SOME).mean() < 0.01


def test_a_mirror_image_is_wrong_where_a_place_or_a_relation_across_is_stated(splits):
    found = splits["train"].scenes(np.arange(SOME))
    asked = scenes.asked([scene.captions[-1] for scene in found])
    digits, colours = composition.detect(
        np.stack(list(map(logits_of, found))), splits["train"].read(np.arange(SOME))[0], asked.palette
    )
    flipped = composition.right(digits[:, [1, 0, 3, 2]], colours[:, [1, 0, 3, 2]], asked, np.arange(SOME))
    across = np.isin(asked.relation, (0, 1))
    placed = (asked.places >= 0).any(axis=1)  # twins: as "red three left of red three", or in places that are mirrored
    left = np.array([{(*t[:2], t.place) for t in s.things} == {(*t[:2], t.place ^ 1) for t in s.things} for s in found])
    twins = np.array([len({thing[:2] for thing in scene.things}) == 1 for scene in found])
    assert not flipped[(placed & ~left) | (across & ~twins)].any() and flipped[~(placed | across)].all()
    assert placed.mean() > 0.4


@pytest.mark.parametrize(
    "quarters, right",
    [
        ([(3, 0), None, None, (7, 2)], False),  # no relation between opposite corners
        ([(3, 0), (7, 2), None, None], True),
        ([None, None, (3, 0), (7, 2)], True),
        ([(7, 2), (3, 0), None, None], False),
        ([(3, 0), (7, 2), (1, 1), None], False),  # one too many
        ([(3, 0), None, None, None], False),
        ([(3, 2), (7, 0), None, None], False),  # each has the other's colour
    ],
)
def test_a_relation_needs_its_digits_colours_and_places(quarters, right):
    asked = scenes.asked(["red three left of blue seven"])
    digits, colours = (np.array([[-1 if q is None else q[k] for q in quarters]]) for k in (0, 1))
    assert composition.right(digits, colours, asked, np.array([0])).tolist() == [right]


def test_held_out_pairs_are_in_no_training_scene_and_in_each_unseen_one(splits):
    def held(scene):
        pair = any(scenes.held_out_pair(thing.colour, thing.digit) for thing in scene.things)
        related = (wish.things for wish in map(scenes.parse, scene.captions) if wish.kind == "relation")
        return pair or any(scenes.held_out_relation(*(thing.digit for thing in things)) for things in related)

    for name, expected in (("train", False), ("test", False), ("unseen", True)):
        assert {held(scene) for scene in splits[name].scenes(np.arange(SOME))} == {expected}
    assert sum(scenes.held_out_pair(c, d) for c in range(6) for d in range(10)) == 12
    kinds = {scene.kind for scene in splits["train"].scenes(np.arange(SOME))}
    assert kinds == set(scenes.KINDS)


def test_plain_digits_are_single_white_ones_of_seen_pairs_and_held_out_writings(splits):
    plain = open_source(DATA, "plain")
    found = plain.scenes(np.arange(SOME))
    assert {(scene.kind, len(scene.things), scene.things[0].colour) for scene in found} == {("single", 1, scenes.WHITE)}
    digits = {scene.things[0].digit for scene in found}
    assert (
        digits == {digit for digit in range(10) if not scenes.held_out_pair(scenes.WHITE, digit)} and len(digits) == 8
    )
    assert {scene.things[0].place for scene in found} == {0, 1, 2, 3} and plain.held_out
    cell = next(c for c in np.split(plain.read(np.array([0]))[0][0], 2) if c.any())
    grey = next(c for c in np.split(cell, 2, axis=1) if c.any())
    assert any(np.array_equal(grey[..., 0], one) for one in scenes.writings(True)[found[0].things[0].digit])
    assert plain.identity["sha256"] != splits["test"].identity["sha256"] and len(plain) == scenes.SIZE


def test_scenes_are_functions_of_their_numbers_and_training_has_no_end(splits):
    one, two = splits["train"].scenes(np.array([5, 7])), splits["train"].scenes(np.array([7]))
    assert one[1] == two[0] != one[0]
    first, other = (next(make_batches(DATA, batch_size=8, seed=seed, tokens=TOKENS)) for seed in (0, 1))
    assert not np.array_equal(first["image"], other["image"])
    halves = [
        next(make_batches(DATA, batch_size=8, seed=0, process_index=i, process_count=2, tokens=TOKENS)) for i in (0, 1)
    ]
    np.testing.assert_array_equal(np.concatenate([half["cond"]["text"] for half in halves]), first["cond"]["text"])
    np.testing.assert_array_equal(np.concatenate([half["image"] for half in halves]), first["image"])


def test_a_caption_of_each_image_is_drawn_by_seed_and_visit():
    captions = [("one", "two", "three")] * 300
    found = [draw(captions, np.arange(300), seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    counts = [found[0].count(word) for word in captions[0]]
    assert min(counts) > 70
    cond = np.empty(300, object)
    cond[:] = captions
    tokens = as_tokens(
        {"captions": cond, "label": np.zeros(300)}, np.arange(300), 0, functools.partial(byte_tokens, length=4)
    )
    np.testing.assert_array_equal(tokens["text"], byte_tokens(found[0], 4))
    assert set(tokens) == {"text", "label"}


def test_bytes_are_tokens_from_one_and_long_texts_are_cut():
    assert byte_tokens(["ab", "", "é"], 3).tolist() == [[98, 99, 0], [0, 0, 0], [0xC3 + 1, 0xA9 + 1, 0]]
    assert byte_tokens(["abcdef"], 3).tolist() == [[98, 99, 100]]


def test_words_are_numbers_of_their_own_without_a_vocabulary(splits):
    tokens = word_tokens(["A red three, left of", "a  Red three.", "", "a b c d e f"], 5, 4096)
    np.testing.assert_array_equal(tokens[0, :3], tokens[1, :3])
    assert [int((row > 0).sum()) for row in tokens] == [5, 3, 0, 5]
    texts = {word for text in prompts(splits["test"], 4096) for word in split_words(text)}
    known = word_tokens(sorted(texts), 1, 4096)[:, 0].tolist()
    assert len(texts) == len(set(known)) == 34 and 0 < min(known) < max(known) < 4096


def test_the_held_out_captions_are_the_prompts(splits):
    texts = prompts(splits["test"], 40)
    cond = load_arrays(DATA, "test", tokens=TOKENS)[1]
    np.testing.assert_array_equal(cond["text"][:40], byte_tokens(texts, 64))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "red tree",
        "a red three",
        "five green fives",
        "red three left of",
        "red one and",
        "red one top left and red two",
    ],
)
def test_other_text_is_no_caption_of_scenes(text):
    with pytest.raises(UsageError, match="caption: found"):
        scenes.parse(text)


@pytest.mark.parametrize("change", [{"image_size": 8}, {"flip": True}, {"cache": True}])
def test_settings_that_scenes_cannot_have_are_named(change):
    data = DataConfig(**{"dataset": "scenes", "image_size": 16, "cache": False} | change)
    with pytest.raises(UsageError, match=f"data.{next(iter(change))}: found"):
        open_source(data, "train")
    with pytest.raises(UsageError, match="expected train, test, unseen, plain of scenes"):
        open_source(DATA, "validation")


def test_an_interval_of_a_share_covers():
    rng, held = np.random.default_rng(0), 0
    for _ in range(2000):
        low, high = composition.interval(rng.binomial(60, 0.9) / 60, 60)
        held += low <= 0.9 <= high
    assert 0.93 < held / 2000 < 0.98


def test_real_scenes_reach_the_ceiling_of_the_classifier(splits):
    """What the shipped classifier reads of held-out writings; and pictures of other prompts score nothing."""
    cfg = Config(
        data=DATA,
        model=ModelConfig(text="bytes", conditioning="in_context"),
        eval=EvalConfig(samples=400, features="scenes"),
    )
    network = scores.keeping(scores.open_network(cfg, local_mesh()), (16, 16, 3))
    images = splits["test"].read(np.arange(400))[0]
    reference = {"prompts": scenes.asked(prompts(splits["test"], 400))}
    row, parts = composition.COMPOSITION, network.decode(network.encode(images))
    found = row.finish(row.update(None, parts, 400), reference, cfg.eval)
    assert found[""] > 0.93 and found["_low"] < found[""] < found["_high"] and found["_single"] > 0.95
    rolled = {name: np.roll(part, 1, axis=0) for name, part in parts.items()}
    assert row.finish(row.update(None, rolled, 400), reference, cfg.eval)[""] < 0.02


def test_the_captions_of_a_scene_are_read_as_what_it_shows(splits):
    counts = {kind: set() for kind in scenes.KINDS}
    for scene in splits["train"].scenes(np.arange(SOME)):
        counts[scene.kind].add(len(scene.captions))
        wishes = [scenes.parse(caption) for caption in scene.captions]
        assert {wish.kind for wish in wishes} - {"place"} == {scene.kind}
        things = {tuple(sorted(thing[:2] for thing in wish.things)) for wish in wishes}
        assert things == {tuple(sorted(thing[:2] for thing in scene.things))}
    few, lists = (
        {"single": 2, "relation": 2, "counting": 1},
        ("two", "three", "four"),
    )  # two of a kind have fewer orders
    assert all(counts[kind] == {count} for kind, count in few.items()) and all(max(counts[kind]) == 4 for kind in lists)
    wish = scenes.parse("red three top left, blue seven bottom right and white one top right")
    assert wish == ("three", [(3, 0, 0), (7, 2, 3), (1, 5, 1)], -1)
    asked = scenes.asked(["red three top left and blue seven bottom right"])
    for places, right in (((0, 3), True), ((3, 0), False), ((0, 2), False)):
        digits = np.full((1, 4), -1)
        colours = digits.copy()
        digits[0, places], colours[0, places] = (3, 7), (0, 2)
        assert composition.right(digits, colours, asked, np.array([0])).tolist() == [right]
