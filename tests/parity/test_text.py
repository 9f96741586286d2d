"""Encoders of text and images beside transformers', with the same random weights; tokens beside its tokenizers' in ten languages."""

import functools
import gzip
import importlib.util
import itertools
import json
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

from dit_jax.evaluation.scores import clip_rows
from dit_jax.metrics import clipscore, frechet
from dit_jax.models import bert, clip, t5
from dit_jax.networks import locate, text, tokenizer

TOLERANCE = 1e-4  # of the largest number
SMALL = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
VOCABULARY = 99


@pytest.fixture(scope="module")
def transformers(torch):
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        import transformers

        transformers.logging.set_verbosity_error()
        yield transformers


def random(torch, model, scale=0.3):
    """Every parameter drawn, biases and norms too, lest one that is lost or exchanged go unseen."""
    torch.manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(scale * torch.randn_like(value))
    return model.eval()


def saved(kind, model, folder, dtype="float32"):
    """A model written by transformers and read here: ({half: config}, {half: parameters})."""
    model.save_pretrained(folder)
    found = locate.find(str(folder), "text_encoder", locate.TRANSFORMERS)
    cfgs = text.configs(kind, json.loads((Path(folder) / "config.json").read_text()), found.config)
    tensors, _, _ = locate.read(found, "", unused=lambda name: bool(text.UNUSED[kind].fullmatch(name)))
    return text.read(kind, tensors, cfgs)


def assert_close(name, found, expected, tolerance=TOLERANCE):
    found, expected = np.asarray(found), expected.detach().numpy()
    assert found.shape == expected.shape
    error = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"{name}: relative error {error:.1e}")
    assert error <= tolerance, f"{name}: {error}"


def captions(n=20, end=VOCABULARY - 1):
    """(ids, mask) of 4 captions of 20, 15, 10 and 5 tokens, each with its end, padded by another id."""
    ids = np.random.default_rng(0).integers(3, end, (4, n)).astype(np.int32)
    lengths = np.array([20, 15, 10, 5])
    mask = np.arange(n) < lengths[:, None]
    ids[np.arange(4), lengths - 1] = end
    return np.where(mask, ids, 0), mask


def tensor(torch, array):
    return torch.from_numpy(np.asarray(array)).long()


@pytest.mark.parametrize("end", [2, VOCABULARY - 1])
@pytest.mark.parametrize("activation,projection", [("quick_gelu", False), ("gelu", True)], ids=["clip", "openclip"])
def test_clip_text(torch, transformers, tmp_path, activation, projection, end):
    config = transformers.CLIPTextConfig(
        **SMALL, vocab_size=VOCABULARY, hidden_act=activation, projection_dim=24, max_position_embeddings=20,
        bos_token_id=1, eos_token_id=end,
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    cfgs, params = saved("clip", model := random(torch, kind(config)), tmp_path)
    assert (cfgs["text"].projection, cfgs["text"].activation) == (24 if projection else 0, activation)
    ids, mask = captions()
    theirs = model(tensor(torch, ids), output_hidden_states=True)
    ours = jax.jit(functools.partial(clip.apply_text, cfgs["text"]))(params["text"], ids)
    assert_close("states", ours.states, theirs.last_hidden_state)
    assert_close("pooled", ours.pooled, theirs.text_embeds if projection else theirs.pooler_output)
    masked = model(tensor(torch, ids), attention_mask=tensor(torch, mask)).last_hidden_state
    assert_close("masked", np.asarray(ours.states)[mask], masked[torch.from_numpy(mask)])


def test_clip_whole(torch, transformers, tmp_path):
    texts = {
        **SMALL,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 20,
        "bos_token_id": 1,
        "eos_token_id": VOCABULARY - 1,
    }
    images = {**SMALL, "hidden_size": 40, "image_size": 24, "patch_size": 8, "hidden_act": "gelu"}
    config = transformers.CLIPConfig(text_config=texts, vision_config=images, projection_dim=24)
    cfgs, params = saved("clip", model := random(torch, transformers.CLIPModel(config)), tmp_path)
    ids, _ = captions()
    draw = np.random.default_rng(1).integers(0, 256, (4, 24, 24, 3)).astype(np.uint8)
    processor = transformers.CLIPImageProcessorFast if hasattr(transformers, "CLIPImageProcessorFast") else None
    mean, std = np.float32(clip.MEAN), np.float32(clip.STD)
    if processor:
        np.testing.assert_allclose(processor().image_mean, mean, rtol=1e-6)
        np.testing.assert_allclose(processor().image_std, std, rtol=1e-6)
    pixels = torch.from_numpy(((draw.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2).copy())
    theirs = model(tensor(torch, ids), pixels)
    ours = jax.jit(functools.partial(clip.apply_vision, cfgs["vision"]))(params["vision"], draw)
    assert_close("states of images", ours.states, theirs.vision_model_output.last_hidden_state)
    pooled = {"images": (ours.pooled, theirs.image_embeds)}
    captioned = jax.jit(functools.partial(clip.apply_text, cfgs["text"]))(params["text"], ids).pooled
    pooled["captions"] = (captioned, theirs.text_embeds)
    for name, (found, expected) in pooled.items():
        assert_close(name, found / np.linalg.norm(found, axis=1, keepdims=True), expected)


@pytest.mark.parametrize("prefix", [True, False])
def test_clip_vision_alone(torch, transformers, tmp_path, prefix):
    config = transformers.CLIPVisionConfig(**SMALL, image_size=24, patch_size=8, projection_dim=24)
    kind = transformers.CLIPVisionModelWithProjection if prefix else transformers.CLIPVisionModel
    cfgs, params = saved("clip", model := random(torch, kind(config)), tmp_path)
    pixels = np.random.default_rng(1).uniform(0, 255, (2, 24, 24, 3)).astype(np.float32)
    normal = ((pixels / 255 - np.float32(clip.MEAN)) / np.float32(clip.STD)).transpose(0, 3, 1, 2)
    theirs = model(torch.from_numpy(np.ascontiguousarray(normal)))
    ours = jax.jit(functools.partial(clip.apply_vision, cfgs["vision"]))(params["vision"], pixels)
    assert_close("states", ours.states, theirs.last_hidden_state)
    assert_close("pooled", ours.pooled, theirs.image_embeds if prefix else theirs.pooler_output)


def t5_model(torch, transformers, **how):
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 3, "num_heads": 4}
    return random(
        torch, transformers.T5EncoderModel(transformers.T5Config(**sizes, feed_forward_proj="gated-gelu")), **how
    )


def test_t5(torch, transformers, tmp_path):
    cfgs, params = saved("t5", model := t5_model(torch, transformers), tmp_path)
    ids, mask = captions()
    theirs = model(tensor(torch, ids), attention_mask=tensor(torch, mask)).last_hidden_state
    encode = jax.jit(functools.partial(t5.apply, cfgs["text"]))
    assert_close("states", encode(params["text"], ids, mask), theirs)
    with torch.no_grad():
        half = model.bfloat16()(tensor(torch, ids), attention_mask=tensor(torch, mask)).last_hidden_state.float()
    lower = jax.jit(functools.partial(t5.apply, text.dataclasses.replace(cfgs["text"], dtype="bfloat16")))
    ours = np.asarray(lower(params["text"], ids, mask))[mask]
    valid = torch.from_numpy(mask)
    expected = theirs[valid].detach().numpy()
    errors = [np.square(x - expected).mean() ** 0.5 for x in (ours, half[valid].numpy())]
    print(f"bfloat16: root mean square error {errors[0]:.1e}, theirs {errors[1]:.1e}")
    assert errors[0] < errors[1] < 0.1 * np.square(expected).mean() ** 0.5  # theirs rounds the residual stream


def test_buckets_of_t5_up_to_1000_tokens(torch, transformers):
    attention = transformers.models.t5.modeling_t5.T5Attention
    apart = torch.arange(1000)[None, :] - torch.arange(1000)[:, None]
    for count, distance in ((32, 128), (16, 128), (32, 256)):
        theirs = attention._relative_position_bucket(apart, True, count, distance)
        np.testing.assert_array_equal(t5.buckets(1000, count, distance), theirs)


@pytest.mark.parametrize("head", [False, True])
def test_bert(torch, transformers, tmp_path, head):
    config = transformers.BertConfig(**SMALL, vocab_size=VOCABULARY, max_position_embeddings=20)
    model = random(torch, (transformers.BertForMaskedLM if head else transformers.BertModel)(config))
    cfgs, params = saved("bert", model, tmp_path)
    ids, mask = captions()
    encoder = model.bert if head else model
    theirs = encoder(tensor(torch, ids), attention_mask=tensor(torch, mask)).last_hidden_state
    ours = jax.jit(functools.partial(bert.apply, cfgs["text"]))(params["text"], ids, mask)
    assert_close("states", ours, theirs)
    kept = torch.from_numpy(mask)[..., None].float()  # as sentence-transformers' Pooling(mode="mean")
    expected = (theirs * kept).sum(1) / torch.clamp(kept.sum(1), min=1e-9)
    assert_close("sentences", jax.jit(bert.mean_pool)(ours, mask), expected)


# Tokens

# {language: [beginnings, ends of captions]}
LANGUAGES = json.loads((Path(__file__).parent.parent / "data" / "captions.json").read_text())
EXTRAS = [
    "{} {}",
    "{},  {}!",
    "{}\t{} 🙂",
    "{}-{} №5",
    '({}) "{}"',
    "{}\n{}\u00a0x",
    "{} e\u0301 {}",
]  # spaces, marks, emoji, accents
CAPTIONS = [
    extra.format(first, second)
    for firsts, seconds in LANGUAGES.values()
    for first, second in itertools.product(firsts, seconds)
    for extra in EXTRAS
]


def compare(theirs, kind, folder, rows, length=48, ties=0):
    """Tokens of all captions; some are too long for `length`. `ties`: captions that may have the same pieces in another order."""
    files = tokenizer.find_files(kind, str(folder))
    made = tokenizer.make_tokenizer(kind, files, rows, str(folder))
    ids, mask, cut = made.encode(CAPTIONS, length)
    expected = theirs(CAPTIONS, padding="max_length", truncation=True, max_length=length)
    pairs = [(i, row, ids[i].tolist()) for i, row in enumerate(expected["input_ids"])]
    other = [pair for pair in pairs if pair[1] != pair[2]]
    wrong = [(CAPTIONS[i], a, b) for i, a, b in other if sorted(a) != sorted(b)]
    assert not wrong and len(other) <= ties, f"{len(other)} of {len(CAPTIONS)}: {wrong[:3]}"
    np.testing.assert_array_equal(mask, np.array(expected["attention_mask"], bool))
    assert cut == sum(len(row) > length for row in theirs(CAPTIONS)["input_ids"])
    return made, cut


def test_there_are_a_thousand_captions():
    assert len(set(CAPTIONS)) == len(CAPTIONS) >= 1000 and len(LANGUAGES) == 10


def test_tokens_of_bert(transformers, tmp_path):
    import tokenizers

    trained = tokenizers.BertWordPieceTokenizer()
    trained.train_from_iterator(CAPTIONS, vocab_size=400, show_progress=False)
    trained.save_model(str(tmp_path))
    for options in ({}, {"do_lower_case": False}, {"strip_accents": False}, {"tokenize_chinese_chars": False}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
        compare(transformers.BertTokenizer.from_pretrained(str(tmp_path), **options), "bert", tmp_path, 400)
    theirs = transformers.BertTokenizer.from_pretrained(str(tmp_path))
    theirs.save_pretrained(tmp_path / "json")
    assert not (tmp_path / "json" / "vocab.txt").exists()
    compare(theirs, "bert", tmp_path / "json", 400)


def test_tokens_of_t5(transformers, tmp_path):
    """The published vocabularies are sentencepiece models with these ids; 100 sentinels follow in theirs.

    Of 999 as 9 99 or 99 9, pieces of the same sum, sentencepiece, which T5 was trained with, takes the one, theirs the other.
    """
    import sentencepiece

    with open(tmp_path / "spiece.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CAPTIONS), model_writer=file, vocab_size=340, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
            character_coverage=0.99, minloglevel=2,
        )  # fmt: skip
    theirs = transformers.T5Tokenizer.from_pretrained(str(tmp_path))
    compare(theirs, "t5", tmp_path, 360, length=24, ties=5)
    theirs.save_pretrained(tmp_path / "json")
    (tmp_path / "json" / "spiece.model").unlink(missing_ok=True)
    compare(theirs, "t5", tmp_path / "json", 450, length=24)


def clip_folder(folder):
    """CLIP's real byte pairs, from the table in the wheel of open_clip, in the two files of transformers."""
    package = Path(importlib.util.find_spec("open_clip").submodule_search_locations[0])
    with gzip.open(package / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = [chr(byte) for byte in visible] + [chr(256 + i) for i in range(len(hidden))]
    words = [*letters, *(f"{c}</w>" for c in letters), *("".join(pair.split()) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


def test_tokens_of_clip(transformers, tmp_path):
    clip_folder(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(str(tmp_path))
    made, cut = compare(theirs, "clip", tmp_path, 49408, length=20)
    assert made.size == 49408 and cut > 50
    assert made.encode(["a photo of a cat"], 8).ids[0].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    theirs.save_pretrained(tmp_path / "json")
    assert not (tmp_path / "json" / "vocab.json").exists()
    compare(theirs, "clip", tmp_path / "json", 49408)
    theirs.pad_token = "!"  # OpenCLIP's
    theirs.save_pretrained(tmp_path / "padded")
    padded, _ = compare(theirs, "clip", tmp_path / "padded", 49408)
    assert padded.padding == 0


@pytest.mark.parametrize("shape", [(16, 16), (64, 64), (20, 32)])
def test_clipscore_and_the_features_of_clip(torch, transformers, torch_fidelity, tmp_path, shape):
    """From images and ids to both metrics: theirs resized by torch (antialiased bicubic), by transformers' cosine, by torch-fidelity."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    texts = {
        **SMALL,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 20,
        "bos_token_id": 1,
        "eos_token_id": VOCABULARY - 1,
    }
    images = {**SMALL, "image_size": 48, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=texts, vision_config=images, projection_dim=24)
    cfgs, params = saved("clip", model := random(torch, transformers.CLIPModel(config)), tmp_path)
    ids, _ = captions()
    draw = np.random.default_rng(1).integers(0, 256, (80, *shape, 3)).astype(np.uint8)
    pixels = torch.from_numpy(draw.transpose(0, 3, 1, 2).astype(np.float32))
    pixels = (
        torch.nn.functional.interpolate(pixels, (48, 48), mode="bicubic", antialias=True).clamp(0, 255).round() / 255
    )
    mean, std = (torch.tensor(value)[:, None, None] for value in (clip.MEAN, clip.STD))
    with torch.no_grad():
        theirs = model(tensor(torch, ids), (pixels - mean) / std)
        cosines = (theirs.logits_per_image / model.logit_scale.exp()).double().numpy()
    rows = np.asarray(jax.jit(functools.partial(clip_rows, cfgs["vision"]))(params["vision"], draw))
    embedded = np.asarray(jax.jit(functools.partial(clip.apply_text, cfgs["text"]))(params["text"], ids).pooled)
    own = cosines[np.arange(80), np.arange(80) % 4]
    error = np.abs(clipscore.scores(rows, embedded) - 2.5 * np.maximum(own, 0))
    print("clipscore", shape, "errors: median", np.median(error), "largest", error.max())
    assert np.median(error) < 1e-3 and error.max() < 0.02  # a pixel between two levels may be rounded to either
    assert (own > 0).any() and (own < 0).any()

    halves = theirs.image_embeds[:40], theirs.image_embeds[40:]  # the same features on both sides
    expected = fid_statistics_to_metric(*map(fid_features_to_statistics, halves), verbose=False)
    stats = [frechet.mean_cov(frechet.update(frechet.empty(24), part.numpy())) for part in halves]
    assert frechet.frechet_distance(*stats[0], *stats[1]) == pytest.approx(
        expected["frechet_inception_distance"], rel=1e-3
    )
