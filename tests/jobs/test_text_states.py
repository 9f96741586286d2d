"""Models of the states of a frozen encoder: the same states on every road, exact FLOPs, null conditions, and what is refused."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoders import BERT, T5, TEXT, drawn
from foreign import write_encoder
from runs import saved
from test_text import config, model

from dit_jax import checkpoint, flops, program
from dit_jax.bench import speed
from dit_jax.devices.mesh import make_mesh
from dit_jax.error import UsageError
from dit_jax.evaluation.run import run as evaluate
from dit_jax.models import bert, conditioning, dit
from dit_jax.networks.caption import chained, follow_text, open_text, step_encoder
from dit_jax.networks.transfer import import_encoder
from dit_jax.sampling.draw import open_sampling
from dit_jax.sampling.prompt import Asked, Prompts
from dit_jax.training import loop
from dit_jax.workdir.folder import check_same_run, read_config

pytestmark = pytest.mark.usefixtures("one_device")
CFGS = {"bert": BERT, "clip": TEXT, "t5": T5}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A function: kind, seed -> folder of a tiny converted encoder."""
    root = tmp_path_factory.mktemp("encoders")

    def make(kind, seed=0):
        out = root / f"{kind}-{seed}"
        if not out.exists():
            cfg = dataclasses.replace(CFGS[kind], projection=0) if kind == "clip" else CFGS[kind]
            write_encoder(root / f"theirs-{kind}-{seed}", kind, {"text": cfg}, {"text": drawn(cfg, seed)})
            import_encoder(kind, str(root / f"theirs-{kind}-{seed}"), str(out))
        return str(out)

    return make


def encoded(folder, kind="bert", conditioning="in_context", **changes):
    return dataclasses.replace(model(conditioning), text=kind, text_encoder=folder, **{"text_length": 9, **changes})


def noisy(params):
    """Weights without zeros."""
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + 0.1 * draw.standard_normal(leaf.shape, np.float32), params)


CAPTIONS = ["a red cat", "red", "", "a red cat a red cat a red cat"]


@pytest.mark.parametrize("kind", ["bert", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("clip", "t5"))])
def test_the_step_makes_the_states_that_samples_and_scores_have(folder_of, kind):
    text = open_text(encoded(folder_of(kind), kind))
    tokens = text.tokens(CAPTIONS * 2)
    found = text.encode(tokens)
    mesh = make_mesh(config().mesh)
    encoder = chained(step_encoder(dataclasses.replace(config(), model=text.cfg), mesh))
    batch = jax.jit(encoder.apply)({"image": np.zeros((8, 1)), "cond": {"text": tokens}}, *encoder.weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), batch["cond"]["text"], found)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), found) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), conditioning.example(text.cfg, 8)["text"]
    )
    assert (found["states"][~found["mask"]] == 0).all() and found["mask"][3].all()
    assert text.cut(CAPTIONS[1:]).tolist() == [False, False, True]  # T5 here has letters for words
    null = conditioning.null(text.cfg, {"text": jax.tree.map(jnp.asarray, found)})["text"]
    for name in ("states", "mask"):
        np.testing.assert_allclose(null[name][0], found[name][2], atol=1e-6)
    assert text.cfg.text_width == 16 and len(text.cfg.text_sha256.split()) == 2


@pytest.mark.parametrize("kind", ["in_context", "adaln_cross"])
@pytest.mark.parametrize("null", ["empty", "learned"])
def test_parameters_and_flops_of_states_are_exact(kind, null):
    cfg = encoded("", "t5", kind, text_width=24, null=null, unroll=2)
    params = dit.init(cfg, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == flops.parameters(cfg)
    bytes_ = dataclasses.replace(cfg, text="bytes", text_width=0)
    assert (
        flops.forward_macs(cfg) - flops.forward_macs(bytes_)
        == 9 * 24 * 32
        == flops.component_macs(cfg)["text_embedding"]
    )
    assert "text_embedding" not in flops.component_macs(bytes_)


def test_padding_states_are_not_seen_and_a_learned_null_replaces_all():
    cfg = encoded("", "t5", text_width=24, null="learned")
    params = noisy(dit.init(cfg, jax.random.key(0)))
    draw = np.random.default_rng(0)
    states, mask = draw.standard_normal((3, 9, 24), np.float32), np.arange(9) < np.array([[4], [9], [2]])
    x, t = jnp.asarray(draw.standard_normal((3, 8, 8, 3), np.float32)), jnp.array([1.0, 500.0, 900.0])
    run = jax.jit(lambda states, mask: dit.apply(cfg, params, x, t, {"text": {"states": states, "mask": mask}}))
    out = run(states, mask)
    np.testing.assert_allclose(run(np.where(mask[..., None], states, 7.0), mask), out, atol=1e-6)
    null = conditioning.null(cfg, {"text": {"states": jnp.asarray(states), "mask": jnp.asarray(mask)}})["text"]
    np.testing.assert_array_equal(run(null["states"], null["mask"]), run(null["states"] + 1.0, null["mask"]))
    assert np.abs(run(null["states"], null["mask"]) - out).max() > 1e-4


def states_config(folder, **changes):
    cfg = config()
    small = dataclasses.replace(cfg.model, text="bert", text_encoder=folder, text_length=12, **changes)
    return dataclasses.replace(cfg, model=small, eval=dataclasses.replace(cfg.eval, samples=0))


@pytest.fixture(scope="module")
def trained(folder_of, tmp_path_factory):
    """(config, folder of a run)."""
    cfg, workdir = states_config(folder_of("bert")), str(tmp_path_factory.mktemp("states") / "run")
    assert loop.run(cfg, workdir, quiet=True) == 4
    return cfg, workdir


@pytest.mark.slow
def test_a_resumed_run_ends_in_the_same_bits(trained, tmp_path):
    cfg, workdir = trained
    copy = str(shutil.copytree(workdir, tmp_path / "copy"))
    shutil.rmtree(checkpoint.path_of(copy, 4))
    assert loop.run(cfg, copy, quiet=True) == 2
    one, other = saved(workdir, 4), saved(copy, 4)
    jax.tree.map(np.testing.assert_array_equal, *({k: v for k, v in s.items() if k != "meta"} for s in (one, other)))


def test_a_run_keeps_its_encoder_and_is_scored(trained, folder_of):
    cfg, workdir = trained
    found = read_config(workdir)
    assert found.model == follow_text(cfg.model) and found.model.text_width == 16
    (loss,) = evaluate(found, workdir, [4], quiet=True)
    said = loss["protocol"]["held_out"]["text"]
    assert (
        f"{said['encoder_sha256']} {said['tokenizer_sha256']}" == found.model.text_sha256 and said["encoder"] == "bert"
    )
    assert loss["flops_text_encoder"] == 4 * 16 * flops.encoder_flops(BERT, 12) and np.isfinite(loss["metrics"]["loss"])
    check_same_run(cfg, workdir)  # a command leaves to the run what it sets
    other = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, text_encoder=folder_of("bert", 1)))
    with pytest.raises(UsageError, match=r"holds a run of another config: model.text_sha256: the folder has"):
        loop.run(other, workdir, quiet=True)
    moved = dataclasses.replace(found.model, text_encoder=folder_of("bert", 1))
    with pytest.raises(
        UsageError, match=r"bert-1' has sha256 .*expected .*give it the encoder that it was trained with"
    ):
        open_text(moved)
    with pytest.raises(UsageError, match=r"another model than the config: model.text_sha256: found"):
        checkpoint.load(workdir, 4, "ema", follow_text(other.model))


@pytest.mark.slow
def test_an_image_depends_on_its_seed_number_prompt_and_negative_prompt_only(trained):
    cfg, workdir = read_config(trained[1]), trained[1]
    _, params = checkpoint.load(workdir, 4, "params", cfg.model)
    params = noisy(params)

    def images(prompts, seed=3, num=4):
        sampling = open_sampling(cfg, make_mesh(cfg.mesh), prompts=prompts)
        ((found, numbers),) = sampling.images(params, seed, num)
        assert numbers.tolist() == [i % len(prompts) for i in range(num)]
        return found

    plain = images(Prompts(("a red cat", "red")))
    one = images(Prompts(("a red cat",)))
    np.testing.assert_array_equal(plain[[0, 2]], one[[0, 2]])
    assert (plain[1] != one[1]).any()
    seeds = images(Prompts(("a red cat", "red"), seeds=(None, 5)))
    np.testing.assert_array_equal(seeds[[0, 2]], plain[[0, 2]])
    np.testing.assert_array_equal(seeds[[1, 3]], images(Prompts(("red",)), seed=5)[[1, 3]])
    negative = images(Prompts(("a red cat", "red"), negatives=("", "cat")))
    np.testing.assert_array_equal(negative[[0, 2]], plain[[0, 2]])
    assert (negative[1] != plain[1]).any()


def test_rows_of_prompts_say_what_images_depend_on(trained):
    cfg = read_config(trained[1]).model
    plain, other = Asked(cfg, Prompts(("red",))), Asked(cfg, Prompts(("red",), negatives=("cat",), seeds=(4,)))
    assert set(plain.describe()) == {"prompts"} and set(other.describe()) == {"prompts", "negative_prompts", "seeds"}
    rows = other.rows(np.arange(3), 0)
    assert (
        rows["has_negative"].all() and rows["seed"].tolist() == [4] * 3 and rows["text"]["states"].shape == (3, 12, 16)
    )


def test_encoders_that_do_not_fit_are_named(folder_of):
    with pytest.raises(
        UsageError, match=r"model.text_encoder: found none with model.text = 't5', expected a folder that"
    ):
        open_text(encoded("", "t5"))
    with pytest.raises(UsageError, match=r"found a network of kind 'bert', expected 't5'"):
        open_text(encoded(folder_of("bert"), "t5"))
    with pytest.raises(UsageError, match=r"model.text_length: found 13, expected at most 12, the encoder's positions"):
        open_text(encoded(folder_of("bert"), text_length=13))
    with pytest.raises(UsageError, match=r"length: found 2, expected at least 3 tokens"):
        open_text(encoded(folder_of("bert"), text_length=2))
    with pytest.raises(UsageError, match=r"bert-0' has width 16, expected 24"):
        open_text(encoded(folder_of("bert"), text_width=24))
    with pytest.raises(UsageError, match=r"model.text_width: found 0, expected the features of a state of t5"):
        flops.parameters(encoded("", "t5"))


def test_preflight_takes_a_published_encoder_that_is_not_here(capsys):
    cfg = dataclasses.replace(config(), model=dataclasses.replace(config().model, text="bert", text_length=16))
    sized = program.sized(cfg)
    assert sized.model.text_width == 384 and program.encoder_flops(sized) == flops.encoder_flops(bert.BertConfig(), 16)
    found = program.program(sized, "train", make_mesh(sized.mesh))
    assert found.make().lower(*found.arguments)
    assert "the published bert of width 384 is taken" in capsys.readouterr().err
    with pytest.raises(
        UsageError, match=r"model.text_width: found 5, expected one of 384, 768, or model.text_encoder here"
    ):
        program.sized(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, text_width=5)))


def test_a_benchmark_gives_the_step_its_encoder_and_tokens(folder_of):
    """The arguments that the compiled step takes, with values, for a model whose width the encoder tells."""
    cfg = speed.prepared(states_config(folder_of("bert")), "train")
    mesh = make_mesh(cfg.mesh)
    found = program.program(cfg, "train", mesh)
    _, batch, weights = made = speed.make_arguments(cfg, "train", mesh, found)
    of = lambda leaf: (leaf.shape, leaf.dtype)  # noqa: E731
    assert jax.tree.map(of, made) == jax.tree.map(of, found.arguments) and cfg.model.text_width == 16
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(made))
    assert batch["cond"]["text"]["mask"].all() and jax.tree.leaves(weights)[0].std() > 0
