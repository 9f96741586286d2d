"""Published names of weights: strict reading, there and back in the same bits, every tensor that is wrong is named."""

import dataclasses

import jax
import numpy as np
import pytest
from converted import TINY, random_params, read_diffusers, read_dit, same
from foreign import write_diffusers_dit
from job import run
from safetensors.numpy import load_file, save_file

from dit_jax.config import SIZES, model_config
from dit_jax.error import UsageError
from dit_jax.models import dit
from dit_jax.networks import dit as published
from dit_jax.networks.tensors import Tensors

# names and shapes


@pytest.mark.parametrize("name", [f"DiT-{size}/{patch}" for size in SIZES for patch in (2, 4, 8)])
def test_names_and_shapes_of_the_published_sizes(name):
    """Of each of the 12: its tensors by formula, and its sizes read back from their shapes; nothing is allocated."""
    cfg = model_config(name)
    size, patch = name.removeprefix("DiT-").split("/")
    (depth, width, _), p = SIZES[size], int(patch)
    shapes = published.shapes(cfg)
    assert len(shapes) == 4 + 4 + 10 * depth + 4
    assert shapes["x_embedder.proj.weight"] == (width, 4, p, p)
    assert shapes["pos_embed"] == (1, (32 // p) ** 2, width)
    assert shapes["t_embedder.mlp.0.weight"] == (width, 256)
    assert shapes["y_embedder.embedding_table.weight"] == (1001, width)
    assert shapes[f"blocks.{depth - 1}.attn.qkv.weight"] == (3 * width, width)
    assert shapes[f"blocks.{depth - 1}.mlp.fc2.weight"] == (width, 4 * width)
    assert shapes["blocks.0.adaLN_modulation.1.weight"] == (6 * width, width)
    assert shapes["final_layer.linear.weight"] == (8 * p * p, width)
    empty = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    assert published._infer(Tensors(empty, "F"), 0) == cfg
    ours = jax.eval_shape(lambda: dit.init(cfg, jax.random.key(0)))
    learned = sum(np.prod(shape, dtype=int) for name, shape in shapes.items() if name != "pos_embed")
    assert sum(leaf.size for leaf in jax.tree.leaves(ours)) == learned


def test_names_of_xl_2():
    """As the published checkpoint DiT-XL-2-256x256.pt has them."""
    shapes = published.shapes(model_config("DiT-XL/2"))
    assert shapes["blocks.0.attn.qkv.weight"] == (3456, 1152) and shapes["blocks.27.mlp.fc1.bias"] == (4608,)
    assert shapes["pos_embed"] == (1, 256, 1152) and shapes["final_layer.linear.weight"] == (32, 1152)
    assert shapes["final_layer.adaLN_modulation.1.weight"] == (2304, 1152) and len(shapes) == 292


@pytest.mark.parametrize("cfg", [TINY, dataclasses.replace(TINY, learn_sigma=False, patch=4, heads=4)])
def test_there_and_back_is_bitwise(cfg):
    params = random_params(cfg)
    arrays = published.write(cfg, params)
    assert {name: a.shape for name, a in arrays.items()} == published.shapes(cfg)
    found, again = read_dit(arrays, cfg.heads)
    assert found == cfg
    same(again, params)
    found, again = read_diffusers(*write_diffusers_dit(cfg, params))
    assert found == cfg
    same(again, params)


def test_a_table_without_a_null_row_is_said_sampled_at_guidance_1_and_written_back(tmp_path, cache_dir):
    """As the published code makes it with class_dropout_prob = 0: K rows. `--classes` tells them from K - 1 and a null row."""
    arrays = published.write(TINY, random_params())
    arrays[published.LABELS] = arrays[published.LABELS][:-1]
    save_file(arrays, tmp_path / "dit.safetensors")
    convert = ["--source=dit", f"--weights={tmp_path / 'dit.safetensors'}", "--heads=2"]
    code, _, err = run("convert", *convert, f"--out={tmp_path / 'w'}", "--classes=5", cache_dir=cache_dir)
    assert code == 0 and "5 classes, no null class: it is sampled at guidance 1" in err, err
    for flags in (["--guidance=2"], ["--config.sample.guidance=2.0"]):
        code, _, err = run("sample", f"--workdir={tmp_path / 'w'}", "--num=1", *flags, cache_dir=cache_dir)
        assert code == 2 and "sample.guidance: found 2.0, expected 1: this model has no null class" in err, err
    back = ["--source=workdir", f"--weights={tmp_path / 'w'}", f"--out={tmp_path / 'back.safetensors'}"]
    assert run("convert", *back, cache_dir=cache_dir)[0] == 0
    again = load_file(tmp_path / "back.safetensors")
    assert set(again) == set(arrays)
    for name, values in arrays.items():
        np.testing.assert_array_equal(again[name], values)
    exported = ["--source=dit", f"--weights={tmp_path / 'back.safetensors'}", f"--out={tmp_path / 'v'}"]
    code, _, err = run("convert", *exported, cache_dir=cache_dir)  # heads and classes are noted in the file
    assert code == 0 and "5 classes, no null class: it is sampled at guidance 1 (by its notes)" in err, err
    for flags, found in (([], "nothing"), (["--classes=9"], "9")):
        code, _, err = run("convert", *convert, *flags, f"--out={tmp_path / 'u'}", cache_dir=cache_dir)
        expected = f"--classes: found {found}, expected 5 if each row is a class, or 4 if the last is the null class"
        assert code == 2 and expected in err and not (tmp_path / "u").exists(), err


@pytest.mark.parametrize(
    "rows,args,expected",
    [
        (1001, {}, (1000, "its 1001 rows")), (1000, {}, (1000, "its 1000 rows")), (1, {}, (1, "its 1 rows")),
        (6, {}, (0, "--classes")), (6, {"num_classes": 5}, (5, "args.num_classes")), (6, {"num_classes": 6}, (6, "args.num_classes")),
        (6, {"num_classes": "5"}, (0, "--classes")), (6, "num_classes=5", (0, "--classes")),
        (1001, {"num_classes": 1001}, (1001, "args.num_classes")),
    ],
)  # fmt: skip
def test_the_number_of_classes_is_read_or_asked_for_never_guessed(rows, args, expected):
    table = Tensors({published.LABELS: np.ones((rows, 16), np.float32)}, "F")
    count, said = published.known_classes(table, {"args": args} if args else {})
    assert (count, said) == expected
    if count:
        assert published.add_null_row(table, count, said) == (count == rows - 1)
        assert table.shape(published.LABELS) == (count + 1, 16)
    else:
        with pytest.raises(UsageError, match="--classes: found nothing, expected 6"):
            published.add_null_row(table, count, said)
    with pytest.raises(UsageError, match=r"args.num_classes: found 3, expected \d+ if each row is a class"):
        published.add_null_row(table, 3, "args.num_classes")


def test_the_patch_embedding_is_a_convolution():
    """One pixel of one channel lit: the embedding is that column of the convolution's weight."""
    cfg, params = TINY, random_params()
    weight = published.write(cfg, params)["x_embedder.proj.weight"]
    for row, column, channel in ((0, 1, 2), (1, 0, 1)):
        place = np.zeros((2, 2, 3), np.float32)
        place[row, column, channel] = 1
        ours = place.reshape(-1) @ params["patch_embedding"]["kernel"]
        np.testing.assert_array_equal(ours, weight[:, channel, row, column])


def test_queries_keys_and_values_are_thirds():
    params = random_params()
    qkv = published.write(TINY, params)["blocks.1.attn.qkv.weight"]
    kernel = params["blocks"]["attention"]["qkv"]["kernel"][1]  # (d, 3, heads, 8)
    np.testing.assert_array_equal(qkv[16 + 8 + 3], kernel[:, 1, 1, 3])


@pytest.mark.parametrize("changes", [{"conditioning": "adaln"}, {"conditioning": "in_context"}, {"qk_norm": True}])
def test_other_models_have_no_published_names(changes):
    with pytest.raises(
        UsageError, match=r"only 'adaln_zero' with the other defaults of qk_norm, positions, block, .* has"
    ):
        published.write(dataclasses.replace(TINY, **changes), {})


# strictness


def broken(arrays, name, how):
    changed = dict(arrays)
    if how == "missing":
        del changed[name]
    elif how == "misshapen":
        changed[name] = np.concatenate([changed[name], changed[name]], axis=-1)
    elif how == "not finite":
        changed[name] = changed[name].copy()
        changed[name].flat[0] = np.nan
    elif how == "integers":
        changed[name] = changed[name].astype(np.int32)
    return changed


@pytest.mark.parametrize("how", ["missing", "misshapen", "not finite", "integers"])
def test_every_tensor_that_is_wrong_is_named(how):
    """Of the first block and both ends: the error names the tensor, or one whose shape no longer goes with it."""
    arrays = published.write(TINY, random_params())
    for name in arrays:
        with pytest.raises(UsageError) as found:
            read_dit(broken(arrays, name, how))
        text = str(found.value)
        assert text.startswith("F: ")
        # a width or a depth read off one tensor makes another one the wrong one
        inferred = how == "misshapen" and name in (
            "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight", "pos_embed",
            "blocks.0.mlp.fc1.weight",
        )  # fmt: skip
        assert name in text or inferred, text


@pytest.mark.parametrize("how", ["missing", "misshapen", "not finite", "integers"])
def test_every_tensor_of_diffusers_that_is_wrong_is_named(how):
    arrays, config = write_diffusers_dit(TINY, random_params())
    for name in arrays:
        with pytest.raises(UsageError) as found:
            read_diffusers(broken(arrays, name, how), config)
        assert f"F: {name}:" in str(found.value)


def test_tensors_too_many_are_named():
    arrays = published.write(TINY, random_params())
    for extra in ("blocks.1.attn.q_norm.weight", "ema.x_embedder.proj.weight", "head.bias"):
        with pytest.raises(UsageError, match=f"F: found 1 tensors that the network does not have: {extra}"):
            read_dit({**arrays, extra: np.zeros(3, np.float32)})
    with pytest.raises(UsageError, match=r"F: blocks.2.adaLN_modulation.1.weight: missing"):
        read_dit({**arrays, "blocks.3.x": np.zeros(3, np.float32)})
    with pytest.raises(UsageError, match=r"blocks.999999999.x: found block 999999999 among 33 tensors"):
        read_dit({**arrays, "blocks.999999999.x": np.zeros(3, np.float32)})
    theirs, config = write_diffusers_dit(TINY, random_params())
    with pytest.raises(UsageError, match=r"tensors that the network does not have: transformer_blocks.0.norm3.weight"):
        read_diffusers({**theirs, "transformer_blocks.0.norm3.weight": np.ones(16, np.float32)}, config)


def test_another_table_of_positions_is_refused():
    arrays = published.write(TINY, random_params())
    other = (
        arrays["pos_embed"].reshape(1, 4, 4, 16).transpose(0, 2, 1, 3).reshape(1, 16, 16)
    )  # rows and columns exchanged
    with pytest.raises(
        UsageError, match=r"F: pos_embed: differs by up to .* from the sin-cos table of a grid of 4 x 4"
    ):
        read_dit({**arrays, "pos_embed": other})
    read_dit({**arrays, "pos_embed": arrays["pos_embed"] + np.float32(5e-6)})
    with pytest.raises(UsageError, match="pos_embed: found 15, expected a square number"):
        read_dit({**arrays, "pos_embed": arrays["pos_embed"][:, :15]})
    theirs, config = write_diffusers_dit(TINY, random_params())
    read_diffusers({**theirs, "pos_embed.pos_embed": arrays["pos_embed"]}, config)
    with pytest.raises(UsageError, match=r"pos_embed.pos_embed: differs by up to"):
        read_diffusers({**theirs, "pos_embed.pos_embed": other}, config)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_table_of_positions_is_compared_as_it_is_stored(dtype):
    """Half precision rounds it by up to 0.002; one that is wrong by 0.01 is refused in any dtype."""
    stored = {name: values.astype(dtype) for name, values in published.write(TINY, random_params()).items()}
    cfg, params = read_dit(stored)
    assert cfg == TINY
    same(params, jax.tree.map(lambda leaf: leaf.astype(dtype).astype(np.float32), random_params()))
    theirs, config = diffusers_dit_of(TINY, dtype)
    read_diffusers({**theirs, "pos_embed.pos_embed": stored["pos_embed"]}, config)
    for wrong in (0.01, -0.01):
        table = (stored["pos_embed"].astype(np.float32) + np.float32(wrong)).astype(dtype)
        with pytest.raises(UsageError, match=rf"pos_embed: differs by up to 0.01.*before rounding to {dtype}"):
            read_dit({**stored, "pos_embed": table})
        with pytest.raises(UsageError, match=r"pos_embed.pos_embed: differs by up to"):
            read_diffusers({**theirs, "pos_embed.pos_embed": table}, config)


def diffusers_dit_of(cfg, dtype):
    arrays, config = write_diffusers_dit(cfg, random_params(cfg))
    return {name: values.astype(dtype) for name, values in arrays.items()}, config


def test_embedders_must_be_the_same_in_all_blocks():
    arrays, config = write_diffusers_dit(TINY, random_params())
    for name in [name for name in arrays if name.startswith("transformer_blocks.1.norm1.emb")]:
        changed = arrays[name].copy()
        changed.flat[-1] += 1e-3
        with pytest.raises(UsageError, match=f"F: {name}: differs from transformer_blocks.0.norm1.emb"):
            read_diffusers({**arrays, name: changed}, config)


def test_heads_are_asked_for_where_no_size_has_them():
    arrays = published.write(TINY, random_params())
    with pytest.raises(
        UsageError, match=r"found 2 blocks of width 16, which is no published size .* say it with --heads"
    ):
        read_dit(arrays, heads=0)
    with pytest.raises(UsageError, match=r"F: model.heads: found 3, expected a divisor of model.width = 16"):
        read_dit(arrays, heads=3)
    assert read_dit(arrays, heads=4)[0].heads == 4


@pytest.mark.parametrize(
    "key,value,expected",
    [
        ("_class_name", "UNet2DModel", "'DiTTransformer2DModel'"), ("norm_type", "ada_norm_single", "'ada_norm_zero'"),
        ("activation_fn", "gelu", "'gelu-approximate'"), ("attention_bias", False, "True"), ("norm_eps", 1e-3, "1e-05 or 1e-06"),
        ("norm_elementwise_affine", True, "False"), ("out_channels", 5, "3 or, with a variance, 6"), ("num_layers", 3, "num_layers = 3"),
        ("num_attention_heads", "two", "a number of at least 1"), ("sample_size", 0, "a number of at least 1"),
        ("sample_size", 9, "a divisor of model.input_size = 9"), ("attention_head_dim", 2**70, "a number of at least 1"),
        ("cross_attention_dim", 768, "None"),
    ],
)  # fmt: skip
def test_a_config_of_diffusers_that_is_another_network_is_refused(key, value, expected):
    arrays, config = write_diffusers_dit(TINY, random_params())
    with pytest.raises(UsageError, match="F: ") as found:
        read_diffusers(arrays, {**config, key: value})
    assert expected in str(found.value)
