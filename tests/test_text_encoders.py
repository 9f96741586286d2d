"""Encoders of text and images: padding, pooling, positions, precision, FLOPs; folders are taken whole or refused by name."""

import dataclasses
import functools
import hashlib
import json
import math
import shutil
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from foreign import encoder_tensors, tokenizer_files, write_encoder
from job import run
from safetensors.numpy import load_file, save_file

from dit_jax import flops
from dit_jax.error import UsageError
from dit_jax.models import bert, clip, t5
from dit_jax.models.encoder import Sizes
from dit_jax.networks import locate, text, tokenizer
from dit_jax.networks.tensors import Tensors
from dit_jax.networks.transfer import import_encoder

SMALL = {"depth": 2, "width": 16, "heads": 2, "hidden": 24}
VOCABULARY = 40
TEXT = clip.TextConfig(**SMALL, vocabulary=VOCABULARY, positions=12, projection=10, end=VOCABULARY - 1)
VISION = clip.VisionConfig(**SMALL, size=8, patch=4, projection=10)
T5 = t5.T5Config(**SMALL, head_width=4, vocabulary=VOCABULARY)  # heads that do not fill the width
BERT = bert.BertConfig(**SMALL, vocabulary=VOCABULARY, positions=12)
MODULES = {clip.TextConfig: clip, clip.VisionConfig: clip, t5.T5Config: t5, bert.BertConfig: bert}


def drawn(cfg, seed=0):
    """Parameters of which no two are alike; norms' scales are near 1."""
    draw = np.random.default_rng(seed)

    def leaf(path, shape):
        return float(path[-1].key == "scale") + 0.3 * draw.standard_normal(shape.shape, np.float32)

    return jax.tree_util.tree_map_with_path(leaf, MODULES[type(cfg)].shapes(cfg))


@functools.cache
def compiled(cfg):
    """Our encoder of text as a function (params, ids, mask) -> states."""
    if isinstance(cfg, clip.TextConfig):
        return jax.jit(lambda params, ids, mask: clip.apply_text(cfg, params, ids).states)
    return jax.jit(functools.partial(MODULES[type(cfg)].apply, cfg))


@functools.cache
def whole(cfg):
    """CLIP's encoder as a function (params, ids or images) -> (states, pooled)."""
    return jax.jit(functools.partial(clip.apply_text if isinstance(cfg, clip.TextConfig) else clip.apply_vision, cfg))


mean_pool = jax.jit(bert.mean_pool)


def captions(b=3, n=9, seed=0):
    """(ids, mask) with 9, 7 and 5 tokens; the last valid one is the end."""
    ids = np.random.default_rng(seed).integers(3, VOCABULARY - 1, (b, n)).astype(np.int32)
    lengths = n - 2 * np.arange(b)
    mask = np.arange(n) < lengths[:, None]
    ids[np.arange(b), lengths - 1] = VOCABULARY - 1
    return ids, mask


@pytest.mark.parametrize("cfg", [TEXT, T5, BERT], ids=lambda cfg: type(cfg).__name__)
def test_padding_changes_no_valid_state(cfg):
    """Neither what the padding holds nor how much of it there is; and it is no accident that all are equal: a token does matter."""
    ids, mask = captions()
    states = compiled(cfg)(params := drawn(cfg), ids, mask)
    assert states.shape == (3, 9, 16) and states.dtype == jnp.float32
    other = compiled(cfg)(params, np.where(mask, ids, 1), mask)
    np.testing.assert_allclose(other[mask], states[mask], rtol=1e-5, atol=1e-5)
    alone = compiled(cfg)(params, ids[2:, :5], mask[2:, :5])
    np.testing.assert_allclose(alone[0], states[2, :5], rtol=1e-4, atol=1e-4)
    changed = compiled(cfg)(params, np.where(np.arange(9) == 1, 2, ids), mask)
    assert np.abs(changed - states)[0, 4].max() > 1e-2


def test_text_of_clip_sees_no_later_token_and_others_do():
    ids, mask = captions()
    later = np.where(np.arange(9) == 6, 2, ids)
    for cfg, causal in ((TEXT, True), (T5, False), (BERT, False)):
        states, other = (compiled(cfg)(drawn(cfg), some, mask) for some in (ids, later))
        assert (np.abs(other - states)[0, :6].max() < 1e-6) == causal


def test_the_pooled_state_is_at_the_first_end_or_at_the_largest_id():
    """OpenAI's published configs state the end 2, which no caption has: they mean the largest id (the end, also where it pads)."""
    ids, mask = captions()
    ids = np.where(mask, ids, VOCABULARY - 1)
    params = drawn(TEXT)
    states, pooled = whole(TEXT)(params, ids)
    legacy = whole(dataclasses.replace(TEXT, end=clip.LEGACY_END))(params, ids)
    at_end = states[np.arange(3), [8, 6, 4]] @ params["projection"]["kernel"]
    np.testing.assert_allclose(pooled, at_end, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(legacy.pooled, pooled)
    other = whole(dataclasses.replace(TEXT, end=5))(params, np.where(np.arange(9) == 1, 5, ids))
    np.testing.assert_allclose(other.pooled, other.states[:, 1] @ params["projection"]["kernel"], rtol=1e-5, atol=1e-5)


def test_without_a_projection_pooled_is_as_wide_as_a_state():
    cfg = dataclasses.replace(TEXT, projection=0)
    states, pooled = whole(cfg)(drawn(cfg), captions()[0])
    np.testing.assert_array_equal(pooled, states[np.arange(3), [8, 6, 4]])


def test_images_of_bytes_are_normalised_and_pooled_at_the_token():
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    params = drawn(VISION)
    states, pooled = whole(VISION)(params, images)
    assert states.shape == (2, 5, 16) and pooled.shape == (2, 10) and pooled.dtype == jnp.float32
    again = whole(VISION)(params, images.astype(np.float32))
    np.testing.assert_allclose(again.pooled, pooled, rtol=1e-6)
    with pytest.raises(UsageError, match=r"images: found shape \(2, 8, 8\), expected \(b, 8, 8, 3\)"):
        whole(VISION)(params, images[..., 0])


def test_buckets_of_relative_positions_are_the_papers():
    """By hand for 8 buckets up to distance 16: 4 for each direction, 2 of them exact; 2 + floor(2 log(r / 2) / log(8)) from r = 2."""
    past = [0, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    found = t5.buckets(10, 8, 16)
    assert found[9].tolist() == past[::-1]
    assert found[0].tolist() == [0] + [4 + bucket for bucket in past[1:]]
    # T5's own: 8 exact distances, then log-spaced up to 128; the edges, in integers: 8 (16)^(i / 8)
    found = t5.buckets(200, 32, 128)[199][::-1]
    edges = [8, 12, 16, 23, 32, 46, 64, 91]
    expected = [r if r < 8 else 7 + sum(r >= edge for edge in edges) for r in range(200)]
    assert found.tolist() == expected
    np.testing.assert_array_equal(t5.buckets(200, 32, 128)[0, 1:], np.array(expected[1:]) + 16)


def test_an_id_that_is_not_in_the_table_is_loud():
    ids, mask = captions()
    assert np.isnan(compiled(BERT)(drawn(BERT), np.where(np.arange(9) == 1, VOCABULARY, ids), mask)).any()


def test_a_caption_of_padding_alone_gives_finite_states():
    ids, mask = captions()
    for cfg in (T5, BERT):
        states = compiled(cfg)(drawn(cfg), ids, np.zeros_like(mask))
        assert np.isfinite(states).all()
    assert not np.asarray(mean_pool(states, np.zeros_like(mask))).any()


def test_mean_pooling_takes_the_valid_tokens():
    states = np.random.default_rng(0).standard_normal((3, 9, 4)).astype(np.float32)
    mask = captions()[1]
    expected = [states[i, : 9 - 2 * i].mean(axis=0) for i in range(3)]
    np.testing.assert_allclose(mean_pool(states, mask), expected, rtol=1e-5, atol=1e-6)


LOWER = dataclasses.replace(T5, dtype="bfloat16")


def test_bfloat16_does_not_overflow():
    """Activations of T5's MLP leave float16 (65,504) in the large models."""
    params, (ids, mask) = drawn(T5), captions()
    for name in ("fc1", "gate"):
        params["blocks"]["mlp"][name]["kernel"] *= 1000
    layer = jax.tree.map(lambda x: x[0], params["blocks"]["mlp"])
    assert np.abs(layer["fc1"]["kernel"] * layer["gate"]["kernel"]).max() > 65_504
    states, full = (compiled(cfg)(params, ids, mask) for cfg in (LOWER, T5))
    assert states.dtype == jnp.float32 and np.isfinite(states).all()
    assert np.abs(states - full)[mask].max() < 0.1 * np.abs(full).max()


def test_bfloat16_keeps_small_updates_of_a_large_stream():
    """Beside a stream of thousands, where bfloat16 steps by 16, updates below 1 arrive as in float32."""
    params, (ids, mask) = drawn(T5), captions()
    params["tokens"]["embedding"] *= 1e4
    params["blocks"]["attention"]["out"]["kernel"] *= 0
    updates = []
    for cfg in (T5, LOWER):
        states = []
        for scale in (0, 0.01):
            fc2 = {"kernel": params["blocks"]["mlp"]["fc2"]["kernel"] * scale}
            mlp = params["blocks"]["mlp"] | {"fc2": fc2}
            states.append(compiled(cfg)(params | {"blocks": params["blocks"] | {"mlp": mlp}}, ids, mask)[mask])
        updates.append(np.asarray(states[1] - states[0]))
    assert np.abs(updates[0]).max() > 1e-6
    assert np.abs(updates[1] - updates[0]).max() < 0.1 * np.abs(updates[0]).max()


@pytest.mark.parametrize("cfg", [TEXT, T5, BERT], ids=lambda cfg: type(cfg).__name__)
def test_parameters_of_half_precision_are_taken(cfg):
    ids, mask = captions()
    halved = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), drawn(cfg))
    back = jax.tree.map(lambda x: x.astype(np.float32), halved)
    found, expected = (compiled(cfg)(some, ids, mask) for some in (halved, back))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def wide(cfg):
    """One block, so that XLA's loop is gone, and wide, so that norms and activations are few."""
    sizes = {"depth": 1, "width": 256, "heads": 4, "hidden": 640}
    return dataclasses.replace(cfg, **sizes, **({"head_width": 48} if isinstance(cfg, t5.T5Config) else {}))


@pytest.mark.parametrize("cfg", [TEXT, VISION, T5, BERT], ids=lambda cfg: type(cfg).__name__)
def test_flops_match_the_compiler(cfg):
    """XLA counts norms, activations and softmax too, so it must come out above, and near for a wide model."""
    cfg = dataclasses.replace(wide(cfg), **({"size": 32} if cfg is VISION else {}))
    params = MODULES[type(cfg)].shapes(cfg)
    ids = jax.ShapeDtypeStruct((1, 12), jnp.int32)
    if isinstance(cfg, clip.VisionConfig):
        tokens, lowered = (
            cfg.tokens,
            jax.jit(functools.partial(clip.apply_vision, cfg)).lower(
                params, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
            ),
        )
    elif isinstance(cfg, clip.TextConfig):
        tokens, lowered = 12, jax.jit(functools.partial(clip.apply_text, cfg)).lower(params, ids)
    else:
        tokens, lowered = 12, compiled(cfg).lower(params, ids, jax.ShapeDtypeStruct((1, 12), bool))
    found = lowered.compile().cost_analysis()["flops"]
    assert 1.0 < found / flops.encoder_flops(cfg, tokens) < 1.05
    deeper = dataclasses.replace(cfg, depth=3)
    ends = sum(flops.encoder_macs(cfg, tokens)[name] for name in ("patch_embedding", "projection"))
    blocks = flops.encoder_flops(cfg, tokens) - 2 * ends
    assert flops.encoder_flops(deeper, tokens) == 3 * blocks + 2 * ends


def test_sizes_of_the_published_encoders():
    """Parameters as the published files have them."""
    big = clip.TextConfig(depth=32, width=1280, heads=20, hidden=5120, projection=1280, activation="gelu")
    for cfg, expected in (
        (clip.TextConfig(), 123_060_480),
        (clip.VisionConfig(), 303_966_208),
        (big, 694_659_840),
        (t5.T5Config(), 4_762_310_656),
        (bert.BertConfig(), 22_565_376),
    ):
        assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(MODULES[type(cfg)].shapes(cfg))) == expected


@pytest.mark.parametrize(
    "cls,fields,match",
    [
        (bert.BertConfig, {"heads": 7}, "BertConfig.heads: found 7, expected a divisor of 384"),
        (clip.TextConfig, {"depth": 0}, "TextConfig.depth: found 0, expected an integer of at least 1"),
        (
            clip.TextConfig,
            {"activation": "relu"},
            "TextConfig.activation: found 'relu', expected one of quick_gelu, gelu",
        ),
        (clip.VisionConfig, {"patch": 13}, "VisionConfig.patch: found 13, expected a divisor of the side 224"),
        (t5.T5Config, {"dtype": "float16"}, "T5Config.dtype: found 'float16', expected one of float32, bfloat16"),
        (Sizes, {"epsilon": 0.0}, "Sizes.epsilon: found 0.0, expected a small number"),
    ],
)
def test_sizes_that_cannot_be_are_refused(cls, fields, match):
    with pytest.raises(UsageError, match=match):
        cls(**fields)


def test_too_many_tokens_are_refused():
    ids = jnp.ones((1, 13), jnp.int32)
    for call in (lambda: clip.apply_text(TEXT, {}, ids), lambda: bert.apply(BERT, {}, ids, ids > 0)):
        with pytest.raises(UsageError, match="ids: found 13 tokens, expected at most 12"):
            call()
    with pytest.raises(UsageError, match=r"found shape \(1, 13\) and a mask \(1, 12\)"):
        t5.apply(T5, {}, ids, ids[:, :12] > 0)


# Folders of transformers


KINDS = {"clip": {"text": TEXT, "vision": VISION}, "t5": {"text": T5}, "bert": {"text": BERT}}


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


# Tokenizers


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


@pytest.mark.parametrize("kind,library", [("clip", "tokenizers"), ("bert", "tokenizers"), ("t5", "sentencepiece")])
def test_a_library_that_is_not_installed_is_asked_for(monkeypatch, kind, library):
    files = tokenizer_files(kind)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        UsageError, match=rf"{library}: not installed, .*; run `make text`, or pip install -e '.\[text\]'"
    ):
        make(kind, files)
