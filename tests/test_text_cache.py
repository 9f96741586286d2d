"""States of captions on the disk: found by what they are of, the same as those of the step, and damage is named."""

import dataclasses
import shutil

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from encoders import BERT
from job import run
from photos import small, written
from test_text import config
from test_text_states import encoded, folder_of  # noqa: F401

from dit_jax import flops
from dit_jax.config import Config, DataConfig
from dit_jax.data import text_cache
from dit_jax.data.pipeline import make_batches
from dit_jax.data.source import open_source
from dit_jax.data.words import prompts
from dit_jax.error import Interrupted, UsageError
from dit_jax.networks.caption import open_text, tell_cut, text_flops
from dit_jax.networks.caption_states import about, all_captions, cached, encode_captions
from dit_jax.training import loop

WORDS = ["a red cat", "red", "a cat", "cat red", "red red cat", "a a a a a a a a a a a a"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 8 pictures for training and 4 others, with captions, the first with two."""
    root = tmp_path_factory.mktemp("pictures")
    for split, numbers in (("train", range(8)), ("test", range(8, 12))):
        for i in numbers:
            said = WORDS[i % 6] + ("\ncat" if i == 0 else "")
            written(
                root,
                {f"{split}/{i:02}.png": small((16, 16), colour=(20 * i, 0, 9)), f"{split}/{i:02}.txt": said.encode()},
            )
    return str(root)


def of_pictures(pictures, encoder, **data):
    cfg = config()
    small_model = encoded(encoder, text_length=8, depth=1, width=16, heads=2, patch=4, input_size=16, unroll=1)
    return dataclasses.replace(
        cfg, model=small_model, data=DataConfig(**{"folder": pictures, "image_size": 16, **data}),
        train=dataclasses.replace(cfg.train, batch_size=8),
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(pictures, folder_of, tmp_path_factory):  # noqa: F811
    """(config, folder of a cache in several shards, made in two goes)."""
    cfg, out = of_pictures(pictures, folder_of("bert")), str(tmp_path_factory.mktemp("cache") / "states")
    with pytest.raises(Interrupted, match="not complete; the same command goes on"):
        encode_captions(cfg, out, ["train", "test"], 3 * 8 * 16 * 4, [1])
    with pytest.raises(UsageError, match="is not complete; the command that began it goes on"):
        text_cache.open_cache(out, about(open_text(cfg.model).cfg))
    with pytest.raises(UsageError, match=r"captions_a_shard: found 2, expected 3, as it was begun with; give the same"):
        encode_captions(cfg, out, ["train", "test"], 2 * 8 * 16 * 4, [])
    with pytest.raises(UsageError, match=r"captions_sha256: found '.*', expected '.*', as it was begun with"):
        encode_captions(cfg, out, ["test", "train"], 3 * 8 * 16 * 4, [])
    encode_captions(cfg, out, ["train", "test"], 3 * 8 * 16 * 4, [])
    return cfg, out


def test_a_cache_has_the_states_of_the_encoder_without_padding(made, capsys):
    cfg, out = made
    text = open_text(cfg.model)
    captions = all_captions({split: open_source(cfg.data, split) for split in ("train", "test")})
    assert captions[0] == "" and {*captions} == {"", "cat", *WORDS}
    found, expected = cached(text, out)(captions), text.encode(text.tokens(captions))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    cache = text_cache.open_cache(out, about(text.cfg))
    assert set(cache.shard) == {0, 1, 2} and cache.states("").shape == (2, 16)
    encode_captions(cfg, out, ["train"], 1 << 20, [])
    assert "done before" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_on_a_cache_is_the_run_of_its_encoder(made, tmp_path):
    cfg, out = made
    losses, text = [], open_text(cfg.model)
    for name, folder in (("step", ""), ("cache", out)):
        own = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, captions=folder))
        assert loop.run(own, str(tmp_path / name), quiet=True) == 4
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([float(line.split('"loss": ')[1].split(",")[0]) for line in lines])
        assert text_flops(dataclasses.replace(own, model=text.cfg)) == (0 if folder else flops.encoder_flops(BERT, 8))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_what_a_cache_lacks_or_is_not_of_is_named(made, folder_of, tmp_path):  # noqa: F811
    cfg, out = made
    text = open_text(cfg.model)
    with pytest.raises(
        UsageError, match=r"data.captions: found no states of the caption 'a green cat' in .*encode the captions again"
    ):
        cached(text, out)(["cat", "a green cat"])
    other = open_text(dataclasses.replace(cfg.model, text_encoder=folder_of("bert", 1)))
    with pytest.raises(UsageError, match=r"by another encoder or of another length: encoder_sha256: found"):
        cached(other, out)
    with pytest.raises(UsageError, match=r"length: found 8, expected 9"):
        cached(open_text(dataclasses.replace(cfg.model, text_length=9)), out)
    with pytest.raises(UsageError, match=r"found no cache.json in .*, expected a folder that"):
        cached(text, str(tmp_path))
    with pytest.raises(UsageError, match=r"data.captions: found 'x', expected '' with model.text = ''"):
        Config(data=DataConfig(captions="x"))
    with pytest.raises(UsageError, match=r"model.text: found 'bytes', expected clip, t5 or bert"):
        encode_captions(config(), str(tmp_path / "new"), ["train"], 1, [])
    endless = dataclasses.replace(cfg, data=config().data)
    with pytest.raises(UsageError, match=r"found images without end in 'train'"):
        encode_captions(endless, str(tmp_path / "new"), ["train"], 1, [])
    assert not (tmp_path / "new").exists()


def test_damage_is_named(made, tmp_path):
    cfg, out = made
    text = open_text(cfg.model)
    for name, said in (
        ("00000.states", "are damaged; encode"),
        ("00001.index", "found another sha256 than in cache.json"),
    ):
        copy = tmp_path / name
        shutil.copytree(out, copy)
        content = bytearray((copy / name).read_bytes())
        content[5] ^= 1
        (copy / name).write_bytes(content)
        with pytest.raises(UsageError, match=said):
            cached(text, str(copy))(["cat", *WORDS])


@pytest.mark.slow
def test_captions_are_encoded_by_a_command(made, tmp_path, cache_dir):
    cfg, _ = made
    model = [
        f"--config.model.{k}={getattr(cfg.model, k)}"
        for k in ("text", "text_encoder", "text_length", "conditioning", "classes")
    ]
    flags = ["--config=configs/scenes.py", f"--config.data.folder={cfg.data.folder}", "--captions", *model]
    code, _, err = run("encode", *flags, f"--out={tmp_path / 'new'}", cache_dir=cache_dir)
    assert code == 0 and "8 captions, 1 of them cut after 8 tokens" in err, err
    code, _, err = run("encode", *flags, "--whiten", f"--out={tmp_path / 'other'}", cache_dir=cache_dir)
    assert code == 2 and "--whiten: found it with --captions, expected one of them" in err
    code, _, err = run(
        "encode", *flags[:2], "--captions", "--check", f"--out={tmp_path / 'other'}", cache_dir=cache_dir
    )
    assert code == 2 and "model.text: found 'bytes', expected clip, t5 or bert" in err


def test_labels_become_words_by_a_template(tmp_path, capsys):
    """A folder of class folders: captions are made of the names, for a model that has no classes."""
    for i in range(12):
        name = ("ripe_apple", "pear")[i % 2]
        written(tmp_path, {f"{split}/{name}/{i}.png": small((16, 16), colour=9 * i) for split in ("train", "test")})
    cfg = config()
    data = DataConfig(folder=str(tmp_path), image_size=16, template="a photo of a {}")
    cfg = dataclasses.replace(cfg, data=data, train=dataclasses.replace(cfg.train, batch_size=8))
    source, held_out = loop.open_data(cfg)
    assert {*source.captions(np.arange(12))} == {("a photo of a ripe apple",), ("a photo of a pear",)}
    batch = next(make_batches(data, batch_size=8, seed=0, source=source, tokens=open_text(cfg.model).tokens))
    labels = batch["cond"]["label"].tolist()
    said = [bytes((row[row > 0] - 1).astype(np.uint8)).decode() for row in batch["cond"]["text"]]
    assert said == [f"a photo of a {['pear', 'ripe apple'][label]}" for label in labels]
    assert source.identity["template"] == held_out.describe()["template"] == "a photo of a {}"
    assert prompts(held_out, 2) == [source.captions(np.arange(2))[0][0]] * 2
    tell_cut(dataclasses.replace(cfg.model, text_length=20), source, 12)
    assert (
        "data: 6 of 12 captions of the first 12 images are cut after model.text_length = 20 bytes"
        in capsys.readouterr().err
    )
    with pytest.raises(UsageError, match=r"model.text: found 'bytes' and no captions"):
        loop.open_data(dataclasses.replace(cfg, data=dataclasses.replace(data, template="")))
    with pytest.raises(UsageError, match=r"data.template: found 'a photo', expected text with \{\} once"):
        DataConfig(template="a photo")


def test_a_picture_without_a_caption_is_named_or_skipped_by_opt_in(pictures, tmp_path):
    shutil.copytree(pictures, folder := tmp_path / "pictures")
    (folder / "train" / "05.txt").unlink()
    data = DataConfig(folder=str(folder), image_size=16)
    with pytest.raises(
        UsageError, match=r"train/05.png: found no caption, which other pictures have; expected .*05.txt"
    ):
        open_source(data, "train")
    assert len(open_source(data, "test")) == 4
    source = open_source(dataclasses.replace(data, skip_bad=1), "train")
    next(make_batches(data, batch_size=16, seed=0, source=source, tokens=open_text(config().model).tokens))
    assert [*source.skips.found] == [5]


def test_a_caption_that_is_none_is_named_or_skipped_by_opt_in(tmp_path):
    table = [{"image": small((16, 16), colour=i), "caption": "" if i == 2 else "red"} for i in range(8)]
    for split in ("train", "test"):
        pq.write_table(pa.Table.from_pylist(table[: 8 if split == "train" else 2]), tmp_path / f"{split}.parquet")
    data = DataConfig(folder=str(tmp_path), image_size=16, skip_bad=1)
    source = open_source(data, "train")
    batch = next(make_batches(data, batch_size=16, seed=0, source=source, tokens=open_text(config().model).tokens))
    assert (batch["cond"]["text"][:, :3] == [ord(c) + 1 for c in "red"]).all()
    assert [*source.skips.found] == [2] and "found an empty caption" in source.skips.found[2]
    with pytest.raises(UsageError, match=r"train.parquet.*found an empty caption"):
        next(
            make_batches(
                dataclasses.replace(data, skip_bad=0), batch_size=16, seed=0, tokens=open_text(config().model).tokens
            )
        )
