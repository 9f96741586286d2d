"""Tokenizers: captions are started, ended, padded and cut as each encoder had them; what does not fit is refused."""

import json
import sys

import numpy as np
import pytest
from encoders import KINDS, VOCABULARY
from foreign import tokenizer_files

from dit_jax.error import UsageError
from dit_jax.networks import tokenizer


def make(kind, files=None, rows=VOCABULARY):
    return tokenizer.make_tokenizer(kind, files or tokenizer_files(kind), rows, "F")


@pytest.mark.parametrize("kind", KINDS)
def test_captions_are_started_ended_padded_and_cut(kind):
    made = make(kind)
    starts = list(made.start)
    ids, mask, cut = made.encode(["a red cat", "", "cat " * 40], 16)
    assert cut == 1 and ids.dtype == np.int32 and mask.dtype == bool
    assert mask[1].sum() == len(starts) + 1 and ids[1].tolist() == [*starts, made.end] + [made.padding] * (
        15 - len(starts)
    )
    assert mask[2].all() and ids[2, -1] == made.end and ids[2, : len(starts)].tolist() == starts
    longer, _, _ = made.encode(["cat " * 40], 17)
    assert longer[0, :15].tolist() == ids[2, :15].tolist()
    none = made.encode([], 16)
    assert none.ids.shape == none.mask.shape == (0, 16) and none.cut == 0
    with pytest.raises(
        UsageError, match=f"length: found {len(starts) + 1}, expected at least {len(starts) + 2} tokens"
    ):
        made.encode(["cat"], len(starts) + 1)
    for bad in ("\ud800", 3):
        with pytest.raises(UsageError, match=r"caption 1: found .*, expected text in Unicode"):
            made.encode(["cat", bad], 8)


def test_byte_pairs_and_word_pieces_by_hand():
    clip_ids = json.loads(tokenizer_files("clip")["vocab.json"])
    ids = (
        make("clip").encode(["A  Cat's"], 6).ids[0].tolist()
    )  # lower case, spaces merged, 's a word of its own but no token
    assert (
        ids[:3] == [clip_ids["<|startoftext|>"], clip_ids["a</w>"], clip_ids["cat</w>"]]
        and ids[-1] == clip_ids["<|endoftext|>"]
    )
    words = tokenizer_files("bert")["vocab.txt"].decode().split()
    ids = make("bert").encode(["Réd cat!"], 6).ids[0]
    assert [words[i] for i in ids] == ["[CLS]", "red", "cat", "[UNK]", "[SEP]", "[PAD]"]
    options = {"tokenizer_config.json": json.dumps({"do_lower_case": False}).encode()}
    ids = make("bert", tokenizer_files("bert") | options).encode(["Red cat"], 6).ids[0]
    assert [words[i] for i in ids] == ["[CLS]", "[UNK]", "cat", "[SEP]", "[PAD]", "[PAD]"]


def test_the_options_choose_the_padding():
    """OpenCLIP pads with "!", id 0; as a text or as an object."""
    for stated in ("a", {"content": "a", "lstrip": False}):
        options = {"tokenizer_config.json": json.dumps({"pad_token": stated}).encode()}
        ids = make("clip", tokenizer_files("clip") | options).encode(["cat"], 5).ids[0]
        assert ids.tolist() == [38, 37, 39, 0, 0]


def test_padding_and_truncation_of_a_file_change_nothing():
    """MiniLM's tokenizer.json truncates at 128 tokens and pads to as many."""
    import tokenizers

    made = tokenizer._word_pieces(tokenizers, tokenizer_files("bert"), {})
    made.enable_padding(length=4)
    made.enable_truncation(3)
    found = make("bert", {"tokenizer.json": made.to_str().encode()}).encode(["a red cat"], 7)
    expected = make("bert").encode(["a red cat"], 7)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.mask, expected.mask)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_that_does_not_fit_is_refused(kind):
    entries = "found a tokenizer of .* entries, .* expected .* its vocabulary is missing, or another encoder's"
    with pytest.raises(UsageError, match=entries):
        make(kind, rows=30)
    with pytest.raises(UsageError, match=entries):
        make(kind, rows=60)
    name = next(iter(tokenizer_files(kind)))
    with pytest.raises(UsageError, match=f"F: .*{name}.*: not readable as a tokenizer|{entries}"):
        make(kind, tokenizer_files(kind) | {name: b"\xff\xfe{"})


def test_a_tokenizer_without_the_ends_is_refused():
    files = {"vocab.txt": tokenizer_files("bert")["vocab.txt"].replace(b"[SEP]", b"[END]")}
    with pytest.raises(UsageError, match=r"F: found no token '\[SEP\]' in the tokenizer, expected one of bert's"):
        make("bert", files)


@pytest.mark.parametrize("kind,library", [("clip", "tokenizers"), ("bert", "tokenizers"), ("t5", "sentencepiece")])
def test_a_library_that_is_not_installed_is_asked_for(monkeypatch, kind, library):
    files = tokenizer_files(kind)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        UsageError, match=rf"{library}: not installed, .*; run `make text`, or pip install -e '.\[text\]'"
    ):
        make(kind, files)
