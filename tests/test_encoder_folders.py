"""Folders of text encoders: taken whole, bit by bit, with their tokenizer, or refused by name."""

import dataclasses
import hashlib
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from encoders import BERT, KINDS, T5, TEXT, drawn
from foreign import encoder_tensors, write_encoder
from job import run
from safetensors.numpy import load_file, save_file

from dit_jax.error import UsageError
from dit_jax.models import clip
from dit_jax.networks import locate, text, tokenizer
from dit_jax.networks.tensors import Tensors
from dit_jax.networks.transfer import import_encoder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: folder} as transformers writes them, tokenizers included; not to be changed."""
    base = tmp_path_factory.mktemp("transformers")
    for kind, cfgs in KINDS.items():
        write_encoder(base / kind, kind, cfgs, {half: drawn(cfg) for half, cfg in cfgs.items()})
    return base


def read_folder(kind, folder):
    found = locate.find(str(folder), "text_encoder", locate.TRANSFORMERS)
    cfgs = text.configs(kind, json.loads((folder / "config.json").read_text()), found.config)
    return text.read(kind, locate.read(found, "", unused=lambda n: bool(text.UNUSED[kind].fullmatch(n)))[0], cfgs)


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_converted_and_loaded_bit_by_bit(folders, tmp_path, cache_dir, kind):
    out = tmp_path / "net"
    command = ["convert", f"--source={kind}", f"--weights={folders / kind}", f"--out={out}"]
    code, _, err = run(*command, cache_dir=cache_dir)
    assert code == 0, err
    found = text.load_encoder(str(out), kind, "bfloat16")
    for half, cfg in KINDS[kind].items():
        assert found.cfgs[half] == dataclasses.replace(cfg, dtype="bfloat16")
        same(found.params[half], drawn(cfg))
    names = sorted(p.name for p in out.iterdir() if p.name not in ("weights.safetensors", "meta.json"))
    assert found.about["tokenizer"] == {n: hashlib.sha256((folders / kind / n).read_bytes()).hexdigest() for n in names}
    assert names and found.about["sha256"] == hashlib.sha256((out / "weights.safetensors").read_bytes()).hexdigest()
    tokens = tokenizer.open_tokenizer(str(out))
    ids, mask, cut = tokens.encode(["a red cat", "cat"], 16)
    assert ids.dtype == np.int32 and ids.shape == mask.shape == (2, 16) and mask.dtype == bool and cut == 0
    code, _, err = run(*command, cache_dir=cache_dir)
    assert code == 0 and "done before" in err, err
    (out / names[0]).write_bytes(b"?" + (out / names[0]).read_bytes())
    with pytest.raises(UsageError, match="damaged: convert the encoder again"):
        tokenizer.open_tokenizer(str(out))
    code, _, err = run(*command[:-1], f"--out={folders / 'taken'}", "--heads=3", cache_dir=cache_dir)
    assert code == 2 and "--heads: is for --source=dit" in err and not (folders / "taken").exists()


def edited(folders, tmp_path, kind, change=None, tensors=None):
    """A copy of a folder with its config.json or its tensors changed by a function."""
    folder = tmp_path / "edited"
    shutil.copytree(folders / kind, folder)
    if change:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))
    if tensors:
        arrays = load_file(folder / "model.safetensors")
        tensors(arrays)
        save_file(arrays, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "kind,change,match",
    [
        ("t5", {"model_type": "bert"}, "model_type: found 'bert', expected t5 or mt5 for --source=t5"),
        ("clip", {"model_type": "siglip"}, "model_type: found 'siglip', expected clip or clip_text_model or clip_vision_model"),
        ("t5", {"feed_forward_proj": "relu"}, "feed_forward_proj: found 'relu', expected 'gated-gelu'"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type: found 'relative_key', expected 'absolute'"),
        ("bert", {"num_attention_heads": "2"}, "num_attention_heads: found '2', expected int"),
        ("bert", {"num_attention_heads": 3}, "by its sizes an encoder that cannot be: BertConfig.heads: found 3, expected a divisor"),
        ("bert", {"num_hidden_layers": 1}, "found 16 tensors that the network does not have: encoder.layer.1"),
        ("bert", {"num_hidden_layers": 3}, "encoder.layer.2.*missing, among"),
        ("bert", {"vocab_size": 41}, r"word_embeddings.weight: found shape \(40, 16\), expected \(41, 16\)"),
        ("clip", {"text_config_dict": {"hidden_act": "gelu"}}, "hidden_act: found 'quick_gelu' in text_config, 'gelu' in text_config_dict"),
    ],
)  # fmt: skip
def test_a_config_of_another_network_is_refused(folders, tmp_path, kind, change, match):
    with pytest.raises(UsageError, match=match):
        read_folder(kind, edited(folders, tmp_path, kind, lambda config: config.update(change)))


def test_an_end_that_no_token_has_is_refused(folders, tmp_path):
    def forget(config):
        del config["text_config"]["eos_token_id"]

    with pytest.raises(UsageError, match="eos_token_id: missing, and found the usual 49407, expected an id below 40"):
        read_folder("clip", edited(folders, tmp_path, "clip", forget))
    text.check_end(TEXT, 39, 40, "config.json")
    text.check_end(dataclasses.replace(TEXT, end=clip.LEGACY_END), 39, 40, "config.json")
    with pytest.raises(UsageError, match=r"eos_token_id: found 39, expected 38, the id of the tokenizer's end"):
        text.check_end(TEXT, 38, 40, "config.json")


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_or_missing_tensor_is_named(folders, tmp_path, kind):
    def both(arrays):
        arrays["encoder.extra.weight"] = np.zeros(2, np.float32)

    with pytest.raises(UsageError, match=r"found 1 tensors that the network does not have: encoder\.extra\.weight"):
        read_folder(kind, edited(folders, tmp_path, kind, tensors=both))
    arrays = load_file(folders / kind / "model.safetensors")
    cfgs = text.configs(kind, json.loads((folders / kind / "config.json").read_text()), "config.json")
    for name in arrays:
        if name != "text_projection.weight":
            rest = {other: value for other, value in arrays.items() if other != name}
            with pytest.raises(UsageError, match=f"F: {name}: missing"):
                text.read(kind, Tensors(rest, "F"), cfgs)


def test_a_whole_clip_without_a_projection_is_refused(folders, tmp_path):
    def forget(arrays):
        del arrays["text_projection.weight"]

    with pytest.raises(UsageError, match=r"text_projection\.weight: missing"):
        read_folder("clip", edited(folders, tmp_path, "clip", tensors=forget))


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("half", ["text", "vision"])
def test_half_a_clip_with_and_without_the_prefix_and_the_projection(tmp_path, half, prefix):
    for projection in (10, 0):
        cfg = dataclasses.replace(KINDS["clip"][half], projection=projection)
        params = drawn(cfg)
        folder = tmp_path / str(projection)
        write_encoder(folder, "clip", {half: cfg}, {half: params})
        save_file(encoder_tensors("clip", {half: cfg}, {half: params}, prefix), folder / "model.safetensors")
        cfgs, found = read_folder("clip", folder)
        assert cfgs == {half: cfg}
        same(found[half], params)


def test_shards_and_what_is_not_of_the_encoder(folders, tmp_path):
    """As a whole T5 in shards has it: the decoder and its head are not even read; a table may be there twice."""
    arrays = load_file(folders / "t5" / "model.safetensors")
    more = {"decoder.block.0.x": np.full(1, np.nan, np.float32), "lm_head.weight": np.zeros(1, np.float32)}
    more["encoder.embed_tokens.weight"] = arrays["shared.weight"]
    folder = edited(folders, tmp_path, "t5")
    (folder / "model.safetensors").unlink()
    names = sorted(arrays | more)
    index = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(index.values()):
        save_file({n: (arrays | more)[n] for n in names if index[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    same(read_folder("t5", folder)[1]["text"], drawn(T5))
    index["encoder.block.0.layer.1.layer_norm.weight"] = "model-00002-of-00002.safetensors"
    index["encoder.final_layer_norm.bias"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(UsageError, match=r"encoder.final_layer_norm.bias: missing from|which .* does not place there"):
        read_folder("t5", folder)


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)], ids=str)
def test_values_keep_the_precision_of_the_file(folders, tmp_path, dtype):
    def halve(arrays):
        arrays |= {name: value.astype(dtype) for name, value in arrays.items()}

    folder, out = edited(folders, tmp_path, "bert", tensors=halve), str(tmp_path / "net")
    import_encoder("bert", str(folder), out)
    found = text.load_encoder(out, "bert").params["text"]
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {dtype}
    same(found, jax.tree.map(lambda x: x.astype(dtype), drawn(BERT)))


def test_blocks_of_two_precisions_are_refused(folders, tmp_path):
    def halve(arrays):
        arrays["encoder.layer.1.output.dense.bias"] = arrays["encoder.layer.1.output.dense.bias"].astype(np.float16)

    with pytest.raises(UsageError, match=r"layer.1.output.dense.bias: found float16, expected float32 as in block 0"):
        read_folder("bert", edited(folders, tmp_path, "bert", tensors=halve))


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.int32)], ids=str)
def test_a_tensor_that_is_not_finite_or_no_floats_is_named(folders, tmp_path, dtype):
    def spoil(arrays):
        value = arrays["encoder.layer.1.output.dense.bias"].astype(dtype)
        value[3] = 7 if dtype.kind == "i" else np.inf
        arrays["encoder.layer.1.output.dense.bias"] = value

    with pytest.raises(UsageError, match=r"layer.1.output.dense.bias: (holds numbers that are not finite|found int32)"):
        read_folder("bert", edited(folders, tmp_path, "bert", tensors=spoil))


def test_a_folder_without_its_vocabulary_is_refused(folders, tmp_path, cache_dir):
    folder = edited(folders, tmp_path, "clip")
    (folder / "merges.txt").unlink()
    (folder / "tokenizer_config.json").write_text("{}")
    code, _, err = run(
        "convert", "--source=clip", f"--weights={folder}", f"--out={tmp_path / 'net'}", cache_dir=cache_dir
    )
    assert (
        code == 2
        and "found no vocabulary of the tokenizer, expected tokenizer.json, or vocab.json and merges.txt" in err
    )
    assert not (tmp_path / "net").exists()


def test_a_pipeline_has_its_tokenizer_beside(folders, tmp_path):
    root = tmp_path / "pipeline"
    shutil.copytree(folders / "bert", root / "text_encoder_2")
    (root / "tokenizer_2").mkdir()
    (root / "text_encoder_2" / "vocab.txt").rename(root / "tokenizer_2" / "vocab.txt")
    assert list(tokenizer.find_files("bert", str(root / "text_encoder_2"))) == ["vocab.txt"]


def test_a_network_without_a_tokenizer_says_so(tmp_path, folders):
    from dit_jax.networks.folder import save_network

    save_network(str(tmp_path / "vae"), "sd-vae", {}, {"a": np.zeros(1)}, {})
    with pytest.raises(
        UsageError, match="found a network of kind 'sd-vae' without a tokenizer, expected a text encoder"
    ):
        tokenizer.open_tokenizer(str(tmp_path / "vae"))
