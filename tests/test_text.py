"""Models of captions: padding is not seen, dropping empties the caption, FLOPs are exact, and a run is drawn from by prompt."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from job import run

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
from dit_jax.devices.mesh import make_mesh
from dit_jax.error import UsageError
from dit_jax.evaluation.run import run as evaluate
from dit_jax.models import conditioning, dit
from dit_jax.sampling.draw import open_sampling
from dit_jax.sampling.prompt import find_prompts, wanted_prompts
from dit_jax.training import loop

KINDS = ("in_context", "adaln_cross")


def model(kind, **changes):
    return ModelConfig(
        depth=2, width=32, heads=4, patch=2, input_size=8, channels=3, classes=0, learn_sigma=False,
        text="bytes", text_length=12, conditioning=kind, unroll=2, **changes
    )  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def made(request):
    """(config, weights without zeros, inputs)."""
    cfg = model(request.param)
    params = dit.init(cfg, jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), len(leaves := jax.tree.leaves(params)))
    noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    ids = np.zeros((3, 12), np.int32)
    ids[0, :5], ids[1, :2] = (5, 6, 7, 8, 9), (3, 4)
    x, t = jax.random.normal(jax.random.key(2), (3, 8, 8, 3)), jnp.array([1.0, 500.0, 900.0])
    return cfg, jax.tree.unflatten(jax.tree.structure(params), noisy), x, t, ids


def test_parameters_and_flops_are_exact(made):
    cfg, params, x, t, ids = made
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == flops.parameters(cfg)
    program = jax.jit(lambda p: dit.apply(cfg, p, x, t, {"text": ids})).lower(params).compile()
    counted = program.cost_analysis()["flops"] / 3  # the rest: norms, softmax, masks
    assert 1.0 < counted / flops.forward_flops(cfg) < 1.15
    longer = dataclasses.replace(cfg, text_length=13)
    d, n = cfg.width, cfg.tokens
    if cfg.conditioning == "adaln_cross":
        token = cfg.depth * (2 * d * d + 2 * n * d)
    else:
        s = n + 1 + 12  # image, time, caption
        token = cfg.depth * ((4 + 2 * cfg.mlp_ratio) * d * d + 2 * ((s + 1) ** 2 - s**2) * d)
    assert flops.forward_macs(longer) - flops.forward_macs(cfg) == token


def test_padding_is_not_seen_and_places_are(made):
    cfg, params, x, t, ids = made
    out = dit.apply(cfg, params, x, t, {"text": ids})
    longer = np.pad(ids, ((0, 0), (0, 5)))
    np.testing.assert_allclose(
        dit.apply(dataclasses.replace(cfg, text_length=17), params, x, t, {"text": longer}), out, atol=2e-6
    )
    swapped = ids.copy()
    swapped[0, :2] = ids[0, 1::-1]
    moved = np.abs(dit.apply(cfg, params, x, t, {"text": swapped}) - out).max(axis=(1, 2, 3))
    assert moved[0] > 1e-4 and moved[1:].max() == 0


def test_a_dropped_caption_is_the_empty_one(made):
    cfg, *_, ids = made
    np.testing.assert_array_equal(conditioning.null(cfg, {"text": ids})["text"], 0)
    dropped = conditioning.drop(cfg, jax.random.key(0), {"text": jnp.tile(ids[:1], (400, 1))}, 0.25)["text"]
    empty = np.asarray(dropped.sum(axis=1) == 0)
    assert 60 < empty.sum() < 140 and (np.asarray(dropped)[~empty] == ids[0]).all()


def test_attention_with_a_mask_is_that_without_the_masked_keys(made):
    """Outputs and gradients, against a plain softmax."""
    from dit_jax.models.kernels import softmax_attention

    q, k, v = (jax.random.normal(key, (2, 5, 3, 4)) for key in jax.random.split(jax.random.key(3), 3))
    mask = jnp.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]], bool)

    def plain(q, k, v):
        logits = jnp.where(mask[:, None, None], jnp.einsum("bnkh,bmkh->bknm", q, k) / 2, -1e30)
        return jnp.einsum("bknm,bmkh->bnkh", jax.nn.softmax(logits), v)

    ours = lambda q, k, v: softmax_attention(q, k, v, mask)  # noqa: E731
    np.testing.assert_allclose(ours(q, k, v), plain(q, k, v), atol=1e-6)
    weigh = jax.random.normal(jax.random.key(4), q.shape)
    found, expected = (jax.grad(lambda *a, f=f: (f(*a) * weigh).sum(), (0, 1, 2))(q, k, v) for f in (ours, plain))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


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
        ("a.pdf", "x", "expected a file that ends in .txt, .csv or .jsonl"),
    ],
)
def test_files_of_prompts_that_do_not_fit_are_named(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UsageError, match=expected):
        find_prompts([], str(path), model("in_context"))


def test_prompts_come_from_flags_or_a_file(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a red three\n\n  two green fives \n")
    (tmp_path / "a.jsonl").write_text('{"caption": "x"}\n{"caption": "y"}\n')
    cfg = model("in_context")
    assert find_prompts([], str(tmp_path / "a.txt"), cfg) == ("a red three", "two green fives")
    assert find_prompts([], str(tmp_path / "a.jsonl"), cfg) == ("x", "y")
    with pytest.raises(UsageError, match="found both, expected one"):
        find_prompts(["x"], str(tmp_path / "a.txt"), cfg)
    with pytest.raises(UsageError, match="--prompt: found one, expected none: this model has no captions"):
        find_prompts(["x"], "", ModelConfig())
    with pytest.raises(UsageError, match="cannot read it"):
        find_prompts([], str(tmp_path / "b.txt"), cfg)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"text": "bytes"}, "model.conditioning: found 'adaln_zero', expected in_context or adaln_cross"),
        ({"conditioning": "adaln_cross"}, "model.text: found '', expected 'bytes'"),
        ({"text": "words", "conditioning": "in_context"}, "model.text: found 'words', expected"),
    ],
)
def test_models_that_cannot_be_are_named(changes, expected):
    with pytest.raises(UsageError, match=expected):
        ModelConfig(**changes)


def test_runs_and_images_from_before_there_were_captions_go_on(monkeypatch):
    """Their checkpoints and jobs do not name the keys of captions."""
    cfg = ModelConfig(qk_norm=True)
    older = {key: value for key, value in to_dict(cfg).items() if not key.startswith("text")}
    monkeypatch.setattr(checkpoint, "_read_values", lambda at, item: {"step": 3, "model": older})
    checkpoint.check_model("checkpoints/3", cfg)
    captioned = dataclasses.replace(cfg, text="bytes", conditioning="in_context")
    with pytest.raises(UsageError, match=r"model\.text: found '', expected 'bytes'"):
        checkpoint.check_model("checkpoints/3", captioned)
    sampled = dataclasses.replace(config(), model=dataclasses.replace(config().model, text="", classes=10))
    keys = open_sampling(sampled, make_mesh(sampled.mesh)).describe("0", 3, 0)
    assert not [key for key in keys if "text" in key or "prompt" in key]
    keys = open_sampling(config(), make_mesh(sampled.mesh), wanted_prompts(config().model, ["x"])).describe("0", 3, 0)
    assert keys["model.text"] == "bytes" and keys["prompts"].startswith("1, SHA-256")
