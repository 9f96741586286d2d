"""Models of captions: padding is not seen, dropping empties the caption, FLOPs are exact, and a run is drawn from by prompt."""

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from job import run
from runs import trained_on_meshes

from dit_jax import checkpoint, flops
from dit_jax.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
    TrainConfig,
    to_dict,
)
from dit_jax.data.words import byte_tokens
from dit_jax.devices.mesh import make_mesh, spec
from dit_jax.error import UsageError
from dit_jax.evaluation.run import run as evaluate
from dit_jax.models import conditioning, dit
from dit_jax.models.warm_start import NEW, WarmStart
from dit_jax.sampling import picture
from dit_jax.sampling.draw import open_sampling
from dit_jax.sampling.prompt import Prompts, find_prompts
from dit_jax.training import loop

KINDS = ("in_context", "adaln_cross", "dual_stream")


def model(kind, **changes):
    return ModelConfig(
        depth=2, width=32, heads=4, patch=2, input_size=8, channels=3, classes=0, learn_sigma=False,
        text="bytes", text_length=12, conditioning=kind, unroll=2, **changes
    )  # fmt: skip


APPLY = jax.jit(dit.apply, static_argnums=0)  # one program, where op by op would be a hundred


@pytest.fixture(scope="module", params=[*KINDS, "text_depth"])
def made(request):
    """(config, weights without zeros, inputs)."""
    deep = {"text_depth": 2, "qk_norm": True}
    cfg = model("adaln_cross", **deep) if request.param == "text_depth" else model(request.param)

    def draw():
        params = dit.init(cfg, jax.random.key(0))
        keys = jax.random.split(jax.random.key(1), len(leaves := jax.tree.leaves(params)))
        noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(params), noisy)

    ids = np.zeros((3, 12), np.int32)
    ids[0, :5], ids[1, :2] = (5, 6, 7, 8, 9), (3, 4)
    x, t = jax.random.normal(jax.random.key(2), (3, 8, 8, 3)), jnp.array([1.0, 500.0, 900.0])
    return cfg, jax.jit(draw)(), x, t, ids


def test_parameters_and_flops_are_exact(made):
    cfg, params, x, t, ids = made
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == flops.parameters(cfg)
    program = jax.jit(lambda p: dit.apply(cfg, p, x, t, {"text": ids})).lower(params).compile()
    counted = program.cost_analysis()["flops"] / 3  # the rest: norms, softmax, masks
    unread = (
        2 * 12 * 9 * cfg.width**2 if cfg.conditioning == "dual_stream" else 0
    )  # of the caption, in the unrolled last block
    assert 1.0 < counted / (flops.forward_flops(cfg) - unread) < 1.15
    longer = dataclasses.replace(cfg, text_length=13)
    d, n = cfg.width, cfg.tokens
    if cfg.conditioning == "adaln_cross":
        within = (4 + 2 * cfg.mlp_ratio) * d * d + 2 * (13**2 - 12**2) * d
        token = cfg.depth * (2 * d * d + 2 * n * d) + cfg.text_depth * within
    else:
        s = n + 12 + (cfg.conditioning == "in_context")  # image, caption, time
        token = cfg.depth * ((4 + 2 * cfg.mlp_ratio) * d * d + 2 * ((s + 1) ** 2 - s**2) * d)
    assert flops.forward_macs(longer) - flops.forward_macs(cfg) == token


def test_padding_is_not_seen_and_places_are(made):
    cfg, params, x, t, ids = made
    out = APPLY(cfg, params, x, t, {"text": ids})
    longer = np.pad(ids, ((0, 0), (0, 5)))
    np.testing.assert_allclose(
        APPLY(dataclasses.replace(cfg, text_length=17), params, x, t, {"text": longer}), out, atol=2e-6
    )
    swapped = ids.copy()
    swapped[0, :2] = ids[0, 1::-1]
    moved = np.abs(APPLY(cfg, params, x, t, {"text": swapped}) - out).max(axis=(1, 2, 3))
    assert moved[0] > 1e-4 and moved[1:].max() == 0


MODERN = model("dual_stream", block="llama", positions="rope", qk_norm=True)
X, T = jnp.asarray(np.random.default_rng(2).standard_normal((2, 8, 8, 3), np.float32)), jnp.array([1.0, 900.0])
IDS = jnp.zeros((2, 12), jnp.int32).at[:, :3].set(7)


def test_a_dual_stream_starts_as_the_class_conditional_model():
    """The image's stream has the names of adaLN-Zero, so `train --init` takes it."""
    cfg = MODERN
    labels = dataclasses.replace(cfg, conditioning="adaln_zero", text="", classes=5)
    shapes = [jax.eval_shape(lambda c=c: dit.init(c, jax.random.key(0))) for c in (labels, cfg)]
    kinds = WarmStart(labels, cfg).kinds(shapes[1], shapes[0])
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes[1])) == flops.parameters(cfg)
    new = {name for name, kind in kinds.items() if kind == NEW}
    assert new == {name for name in kinds if name.startswith("blocks/text/")} | {"text_embedding/table/embedding"}
    assert flops.active_parameters(cfg) == flops.active_parameters(labels)
    found = []  # names alone, without computing
    jax.eval_shape(
        lambda p: [v for name, v in dit.activations(cfg, p, X, T, {"text": IDS}) if not found.append(name)], shapes[1]
    )
    expected = [f"blocks[1]/{name}" for name in ("attention/qkv", "text/attention/qkv", "text/mlp/fc2")]
    assert [name for name in found if name in expected] == expected and found[:3][-1] == "text_embedding"
    sizes = {"data": 1, "fsdp": 1, "tensor": 4}
    kernel = shapes[1]["blocks"]["text"]["attention"]["qkv"]["kernel"]
    assert tuple(spec(("blocks", "text", "attention", "qkv", "kernel"), kernel.shape, sizes))[3] == "tensor"


@pytest.mark.slow
def test_layers_of_a_dual_stream_that_nothing_reads_have_no_gradient():
    """With and without rematerialisation and unrolled layers."""
    cfg = MODERN
    shapes = jax.eval_shape(lambda: dit.init(cfg, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves := jax.tree.leaves(shapes)))
    params = [0.2 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(jax.tree.structure(shapes), params)
    loss = lambda p, c: jnp.square(dit.apply(c, p, X, T, {"text": IDS})).mean()  # noqa: E731
    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    (value, grads), (again, others) = run(params, cfg), run(params, dataclasses.replace(cfg, remat="dots", unroll=1))
    assert float(value) == pytest.approx(float(again), rel=1e-5)
    for name, leaf in flatten_dict(grads, sep="/").items():
        np.testing.assert_allclose(leaf, flatten_dict(others, sep="/")[name], rtol=2e-3, atol=1e-5)
        unread = "/text/mlp" in name or "/text/attention/proj" in name
        assert np.any(leaf if "blocks" not in name else leaf[0]) and (not unread or not np.any(leaf[-1])), name


@pytest.mark.slow
@pytest.mark.parametrize("kind, deep", [("adaln_cross", 1), ("dual_stream", 0)])
def test_shards_train_models_of_captions(kind, deep):
    """On 2 x 2 x 2 devices the losses are those of one device, with modern blocks and a text encoder of its own too."""
    cfg = model(kind, block="llama", positions="rope", qk_norm=True, text_depth=deep)
    cfg = Config(cfg, DiffusionConfig(process="flow", prediction="x", shift=2.0), train=TrainConfig(batch_size=8))
    rng = np.random.default_rng(0)
    ids = np.where(np.arange(12) < rng.integers(1, 12, (8, 1)), rng.integers(1, 257, (8, 12)), 0).astype(np.int32)
    batch = {"image": rng.normal(size=(8, 8, 8, 3)).astype(np.float32), "cond": {"text": ids}}
    trained_on_meshes(cfg, batch)


@pytest.mark.parametrize(
    "made",
    ["adaln_cross", *(pytest.param(k, marks=pytest.mark.slow) for k in ("in_context", "dual_stream", "text_depth"))],
    indirect=True,
)
def test_a_derivative_by_the_image_alone_is_that_by_all(made):
    """The likelihood takes it: captions do not move there, where jax 0.10.2's linear_call would assert (findings/)."""
    cfg, params, x, t, ids = made
    total = lambda x, params: jnp.square(dit.apply(cfg, params, x, t, {"text": ids})).sum()  # noqa: E731
    alone, beside = jax.jit(jax.grad(total))(x, params), jax.jit(jax.grad(total, (0, 1)))(x, params)[0]
    np.testing.assert_allclose(alone, beside, rtol=1e-4, atol=1e-5)


def test_a_dropped_caption_is_the_empty_one(made):
    cfg, *_, ids = made
    np.testing.assert_array_equal(conditioning.null(cfg, {"text": ids})["text"], 0)
    dropped = conditioning.drop(cfg, jax.random.key(0), {"text": jnp.tile(ids[:1], (400, 1))}, 0.25)["text"]
    empty = np.asarray(dropped.sum(axis=1) == 0)
    assert 60 < empty.sum() < 140 and (np.asarray(dropped)[~empty] == ids[0]).all()


def test_attention_with_a_mask_is_that_without_the_masked_keys():
    """Outputs and gradients, against a plain softmax; by some of the inputs alone too, as where only the image is moved."""
    from dit_jax.models.kernels import softmax_attention

    q, k, v = (jax.random.normal(key, (2, 5, 3, 4)) for key in jax.random.split(jax.random.key(3), 3))
    mask = jnp.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]], bool)

    def plain(q, k, v):
        logits = jnp.where(mask[:, None, None], jnp.einsum("bnkh,bmkh->bknm", q, k) / 2, -1e30)
        return jnp.einsum("bknm,bmkh->bnkh", jax.nn.softmax(logits), v)

    ours = lambda q, k, v: softmax_attention(q, k, v, mask)  # noqa: E731
    np.testing.assert_allclose(ours(q, k, v), plain(q, k, v), atol=1e-6)
    weigh = jax.random.normal(jax.random.key(4), q.shape)
    for by in ((0, 1, 2), (0,), (1,), (2,), (0, 2)):
        found, expected = (jax.grad(lambda *a, f=f: (f(*a) * weigh).sum(), by)(q, k, v) for f in (ours, plain))
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_learned_null_is_a_table_in_place_of_all_tokens():
    for kind in KINDS:
        cfg = model(kind, null="learned")
        shapes = jax.eval_shape(lambda cfg=cfg: dit.init(cfg, jax.random.key(0)))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == flops.parameters(cfg)
        assert flops.parameters(cfg) - flops.parameters(model(kind)) == 12 * 32
    params = jax.jit(lambda: dit.init(cfg, jax.random.key(0)))()
    ids = np.zeros((3, 12), np.int32)
    ids[0, :5] = 5, 6, 7, 8, 9
    null = conditioning.null(cfg, {"text": ids[:1]})
    dropped = conditioning.drop(cfg, jax.random.key(0), {"text": jnp.asarray(ids)}, 1.0)
    values = {"text": jnp.concatenate([ids, null["text"], dropped["text"]])}
    module = conditioning.TextEmbedding(cfg)
    found = module.apply({"params": params["text_embedding"]}, values["text"])
    mask = conditioning.text_mask(cfg, values["text"])
    for row in (3, 4, 5, 6):
        np.testing.assert_array_equal(found[row], params["text_embedding"]["null"])
        assert mask[row].all()
    assert mask[0].sum() == 5 and not mask[1].any()
    plain = conditioning.TextEmbedding(model(kind)).apply({"params": params["text_embedding"]}, ids)
    np.testing.assert_array_equal(found[:3], plain)


def config(kind="in_context", **changes):
    small = ModelConfig(
        depth=1, width=16, heads=2, patch=4, input_size=16, channels=3, classes=0, learn_sigma=False,
        text="bytes", text_length=40, conditioning=kind,
    )  # fmt: skip
    return Config(
        model=small,
        diffusion=DiffusionConfig(process="flow"),
        data=DataConfig(dataset="scenes", image_size=16, cache=False),
        optim=OptimConfig(learning_rate=1e-3),
        train=TrainConfig(steps=4, batch_size=16, log_every=1, checkpoint_every=2),
        sample=SampleConfig(sampler="euler", steps=2, guidance=2.0),
        eval=EvalConfig(max_images=16, times_per_image=8, samples=300, features="scenes", bootstrap=0),
        **changes,
    )


@pytest.mark.slow  # runs of states, caches and CLIP's scores in other files take the same road
def test_a_run_on_captions_resumes_is_scored_and_drawn_from_by_prompt(tmp_path, cache_dir):
    cfg, workdir = config(), str(tmp_path / "run")
    half = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=2))
    assert loop.run(half, workdir, quiet=True) == 2
    assert loop.run(cfg, workdir, quiet=True) == 2
    loss, scores = evaluate(cfg, workdir, [4], quiet=True)
    assert np.isfinite(loss["metrics"]["loss"]) and loss["protocol"]["held_out"]["captions"]
    assert 0 <= scores["metrics"]["composition_scenes"] <= 1 and scores["metric_signs"]["composition_scenes"] == 1
    assert scores["protocol"]["prompts"]["number"] == 300 and "unique_images" not in scores
    more = dataclasses.replace(
        cfg.eval, loss=False, samples=0, vlb=True, vlb_times=4, likelihood=True, likelihood_images=3, likelihood_steps=2
    )
    bound, likelihood = evaluate(dataclasses.replace(cfg, eval=more), workdir, [4], quiet=True)
    assert bound["metrics"]["vlb_bits_per_dim"] > 0 and np.isfinite(likelihood["metrics"]["likelihood_bits_per_dim"])
    assert bound["protocol"]["held_out"]["images"] == 16 and likelihood["protocol"]["held_out"]["images"] == 3
    assert len({r["protocol_id"] for r in (loss, bound, likelihood)}) == 3 and bound["task"] == "text"
    assert bound["metric_signs"]["vlb_bits_per_dim"] == -1 and "vlb_bits_per_dim_se" not in bound["metric_signs"]
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,other\na red three,1\ntwo green fives,2\n")
    drawn = {}
    for name, flags in {
        "flags": ["--prompt=a red three", "--prompt=two green fives"],
        "file": [f"--prompts={file}"],
        "other": ["--prompt=a blue one"],
    }.items():
        code, _, err = run(
            "sample", f"--workdir={workdir}", "--num=6", f"--out={tmp_path / name}.npz", f"--grid={tmp_path}/{name}.png", *flags,
            cache_dir=cache_dir,
        )  # fmt: skip
        assert code == 0, err
        with np.load(tmp_path / f"{name}.npz") as found:
            drawn[name] = found["arr_0"], found["arr_1"].tolist()
    np.testing.assert_array_equal(drawn["flags"][0], drawn["file"][0])
    assert drawn["file"][1] == [0, 1, 0, 1, 0, 1] and drawn["other"][1] == [0] * 6
    code, _, err = run("sample", f"--workdir={workdir}", f"--out={tmp_path}/x.npz", cache_dir=cache_dir)
    assert code == 2 and "--prompt, --prompts: found neither, expected one of them" in err


def test_data_without_captions_are_refused_for_a_model_of_captions(tmp_path):
    cfg = config()
    plain = DataConfig(dataset="digits", image_size=8)
    small = dataclasses.replace(cfg.model, input_size=8, channels=1, classes=10)
    with pytest.raises(UsageError, match=r"model.text: found 'bytes' and no captions in .*digits"):
        loop.open_data(dataclasses.replace(cfg, data=plain, model=small))


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.txt", "", "found no prompt"),
        ("a.csv", "words\nx\n", "found the columns words, expected one of prompt, caption, text"),
        ("a.csv", "prompt\nx\n \n", "found an empty prompt in row 2"),
        ("a.jsonl", "[1]\n", "found a line that is no JSON object"),
        ("a.jsonl", "{\n", "cannot read it"),
        ("a.csv", "prompt,seed\nx,1\ny,-2\n", "found the seed '-2' in row 2, expected a whole number"),
        ("a.csv", "prompt\nblue four, red nine\n", "line 2: found 2 fields, expected 1; put a prompt that has a comma"),
        ("a.csv", "prompt,seed\nx\n", "line 2: found 1 fields, expected 2"),
        ("a.jsonl", '{"prompt": ["x"]}\n', "prompt: found ..x.. in row 1, expected text"),
        ("a.pdf", "x", "expected a file that ends in .txt, .csv or .jsonl"),
    ],
)
def test_files_of_prompts_that_do_not_fit_are_named(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UsageError, match=expected):
        find_prompts([], str(path), model("in_context"))


def test_a_file_says_negative_prompts_and_seeds(tmp_path):
    cfg = model("in_context")
    (tmp_path / "a.csv").write_text("prompt,negative_prompt,seed\nx,,7\ny,blurred,\n")
    assert find_prompts([], str(tmp_path / "a.csv"), cfg) == Prompts(("x", "y"), ("", "blurred"), (7, None))
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n{"prompt": "y", "negative_prompt": "z", "seed": 3}\n')
    assert find_prompts([], str(tmp_path / "a.jsonl"), cfg) == Prompts(("x", "y"), ("", "z"), (None, 3))


def test_prompts_stand_under_their_pictures():
    """In a row of theirs, or side by side with one picture each; long ones in several lines, and nothing is cut."""
    images = np.full((8, 16, 16, 3), 200, np.uint8)
    rows = picture.prompt_grid(images, np.arange(8) % 2, ["one", "two"])
    assert rows.size == (4 * 50, 2 * (50 + picture.LINE + picture.MARGIN))
    beside = picture.prompt_grid(images[:4], np.arange(4), ["one", "two", "three", "four"], "a caption")
    assert (
        beside.size[0] == 300
        and beside.size[1] == 2 * (50 + picture.LINE + picture.MARGIN) + picture.LINE + picture.MARGIN
    )
    under = np.asarray(rows)[52 : 50 + picture.LINE, :60]
    assert (under < 100).any() and (np.asarray(rows)[1:40, 1:40] == 200).all()
    long = picture.prompt_grid(images[:1], np.zeros(1, int), ["word " * 20 + "x" * 50])
    assert long.size[0] == picture.NARROW and long.size[1] > 50 + 5 * picture.LINE


def test_prompts_come_from_flags_or_a_file(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a red three\n\n  two green fives \n")
    (tmp_path / "a.jsonl").write_text('{"caption": "x"}\n{"caption": "y"}\n')
    cfg = model("in_context")
    assert find_prompts([], str(tmp_path / "a.txt"), cfg).texts == ("a red three", "two green fives")
    assert find_prompts([], str(tmp_path / "a.jsonl"), cfg).texts == ("x", "y")
    with pytest.raises(UsageError, match="found both, expected one"):
        find_prompts(["x"], str(tmp_path / "a.txt"), cfg)
    with pytest.raises(UsageError, match="--prompt: found one, expected none: this model has no captions"):
        find_prompts(["x"], "", ModelConfig())
    with pytest.raises(UsageError, match="cannot read it"):
        find_prompts([], str(tmp_path / "b.txt"), cfg)
    with pytest.raises(UsageError, match="--prompt: found an empty one, expected words"):
        find_prompts(["x", ""], "", cfg)


def test_negative_prompts_beside_a_guide_are_refused():
    cfg = config()
    cfg = dataclasses.replace(cfg, sample=dataclasses.replace(cfg.sample, guide="weak", guidance=2.0))
    with pytest.raises(UsageError, match=r"negative_prompt: found some, expected none: sample.guide = 'weak' takes"):
        open_sampling(cfg, make_mesh(cfg.mesh), prompts=Prompts(("x",), ("y",)))


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"text": "bytes"}, "model.conditioning: found 'adaln_zero', expected in_context, adaln_cross or dual_stream"),
        ({"conditioning": "adaln_cross"}, "model.text: found '', expected 'bytes'"),
        ({"conditioning": "dual_stream"}, "model.text: found '', expected 'bytes', .* for .* 'dual_stream'"),
        ({"text": "letters", "conditioning": "in_context"}, "model.text: found 'letters', expected"),
        ({"null": "learned"}, "model.null: found 'learned', expected one of empty"),
        ({"text_encoder": "nets/t5"}, "model.text_encoder: found 'nets/t5', expected none with model.text = ''"),
    ],
)
def test_models_that_cannot_be_are_named(changes, expected):
    with pytest.raises(UsageError, match=expected):
        ModelConfig(**changes)


def test_runs_and_images_from_before_there_were_captions_go_on(monkeypatch):
    """Their checkpoints and jobs do not name the keys of captions."""
    cfg = ModelConfig(qk_norm=True)
    older = {key: value for key, value in to_dict(cfg).items() if not key.startswith(("text", "null"))}
    monkeypatch.setattr(checkpoint, "_read_values", lambda at, item: {"step": 3, "model": older})
    checkpoint.check_model("checkpoints/3", cfg)
    captioned = dataclasses.replace(cfg, text="bytes", conditioning="in_context")
    with pytest.raises(UsageError, match=r"model\.text: found '', expected 'bytes'"):
        checkpoint.check_model("checkpoints/3", captioned)
    sampled = dataclasses.replace(config(), model=dataclasses.replace(config().model, text="", classes=10))
    keys = open_sampling(sampled, make_mesh(sampled.mesh)).describe("0", 3, 0)
    assert not [key for key in keys if "text" in key or "prompt" in key or "null" in key]
    keys = open_sampling(config(), make_mesh(sampled.mesh), prompts=Prompts(("x",))).describe("0", 3, 0)
    assert keys["model.text"] == "bytes" and keys["prompts"].startswith("1, SHA-256")
    assert not {"model.null", "model.text_sha256", "model.text_encoder", "model.text_width"} & {*keys}
    tokens = json.dumps([byte_tokens(["x"], 40)[0].tolist()])
    assert keys["prompts"].endswith(hashlib.sha256(tokens.encode()).hexdigest())
