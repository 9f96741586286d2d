"""Our DiT beside diffusers' DiTTransformer2DModel with the same random weights, every one of them away from its initial value.

Two constants of diffusers' model are not the published ones (see dit_jax/networks/diffusers_dit.py); here both are set to
what the paper's code has: the eps of the norm before the MLP by its config, the timestep frequencies by hand.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import write_diffusers_dit
from job import run, start
from safetensors.numpy import load_file, save_file

from dit_jax.config import SIZES, ModelConfig, model_config
from dit_jax.models import conditioning, dit
from dit_jax.networks import dit as published
from dit_jax.networks.tensors import Tensors

TOLERANCE = 1e-4
NAMES = [f"DiT-{size}/{patch}" for size in SIZES for patch in (2, 4, 8)]
SMALL = ModelConfig(depth=3, width=48, heads=3, patch=2, input_size=8, channels=4, classes=10)


def shallow(name, pixels=256, depth=2):
    """A published model with few of its blocks: its own width, heads, patch and classes."""
    return dataclasses.replace(model_config(name, pixels), depth=depth)


def random_params(cfg, seed=0):
    """As after initialisation, plus noise on every value: nothing is left at zero."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: dit.init(cfg, jax.random.key(0)))

    def draw(leaf):
        fan_in = leaf.shape[-2] if leaf.ndim > 1 else 1
        return rng.standard_normal(leaf.shape, np.float32) * np.float32(0.5 / np.sqrt(fan_in))

    return jax.tree.map(draw, shapes)


def inputs(cfg, seed=1):
    """Two images, the second without a class, at two timesteps."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, cfg.input_size, cfg.input_size, cfg.channels), np.float32)
    return x, np.array([3, 871]), np.array([7, cfg.classes])


def peer(torch, diffusers, cfg, params, published_frequencies=True):
    """diffusers' model with our parameters: its state dict is loaded strictly."""
    arrays, config = write_diffusers_dit(cfg, params)
    model = diffusers.DiTTransformer2DModel.from_config(config)
    model.load_state_dict({name: torch.from_numpy(np.array(a)) for name, a in arrays.items()}, strict=True)
    if published_frequencies:
        for block in model.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model.eval()


def call(torch, model, x, t, labels):
    images = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    return model(images, torch.from_numpy(t), torch.from_numpy(labels)).sample.permute(0, 2, 3, 1)


def ours(cfg):
    return jax.jit(lambda params, x, t, y: dit.apply(cfg, params, x, t, y))


def convert(*arguments, cache_dir, reads_torch=False):
    """The job, which must succeed; where it needs PyTorch, in a process that finds the peers as this one does."""
    if reads_torch:
        process = start("convert", *arguments, cache_dir=cache_dir)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return
    code, _, err = run("convert", *arguments, cache_dir=cache_dir)
    assert code == 0, err


def relative(found, expected):
    """The largest error relative to the largest value."""
    return float(np.abs(np.asarray(found) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max())


# Every patch and every width, at both numbers of tokens: the other pairs, and the gradients of more sizes, are slow.
QUICK = {256: ("DiT-S/4", "DiT-B/8", "DiT-L/4", "DiT-XL/2"), 512: ("DiT-S/2", "DiT-S/4", "DiT-S/8")}


def slow_but(names, name, *more):
    return pytest.param(name, *more, marks=() if name in names else pytest.mark.slow)


@pytest.mark.parametrize("name,pixels", [slow_but(QUICK[pixels], name, pixels) for pixels in QUICK for name in NAMES])
def test_outputs_of_every_size(torch, diffusers, name, pixels):
    cfg = shallow(name, pixels)
    params = random_params(cfg)
    x, t, labels = inputs(cfg)
    with torch.no_grad():
        expected = call(torch, peer(torch, diffusers, cfg, params), x, t, labels).numpy()
    found = np.asarray(ours(cfg)(params, x, t.astype(np.float32), labels))
    assert found.shape == expected.shape == (2, pixels // 8, pixels // 8, 8)
    error = relative(found, expected)
    print(f"{name} {pixels}: {error:.2e}")
    assert error <= TOLERANCE


@pytest.mark.parametrize("name", ["small", *(slow_but(("DiT-B/8", "DiT-XL/4"), name) for name in NAMES)])
def test_gradients_of_every_parameter(torch, diffusers, name):
    """Of one loss, the mean of the output times fixed noise. Embedders are one here and one per block there: theirs add up."""
    cfg = SMALL if name == "small" else shallow(name, depth=1)
    params = random_params(cfg)
    x, t, labels = inputs(cfg)
    weight = np.random.default_rng(2).standard_normal((2, cfg.input_size, cfg.input_size, cfg.out_channels), np.float32)
    model = peer(torch, diffusers, cfg, params)
    (call(torch, model, x, t, labels) * torch.from_numpy(weight)).mean().backward()
    theirs = {name: p.grad.numpy() for name, p in model.named_parameters()}

    def loss(params):
        out = dit.apply(cfg, params, jnp.asarray(x), jnp.asarray(t, jnp.float32), jnp.asarray(labels))
        return jnp.mean(out * weight)

    mine, _ = write_diffusers_dit(cfg, jax.jit(jax.grad(loss))(params))
    assert mine.keys() == theirs.keys()
    errors = {}
    for name in mine:
        expected = theirs[name]
        if ".emb." in name:
            inside = name.split(".", 2)[2]
            expected = sum(theirs[f"transformer_blocks.{i}.{inside}"] for i in range(cfg.depth))
        assert np.abs(expected).max() > 0 or name.endswith("attn1.to_k.bias"), name
        # adding to all keys changes no softmax: the gradient of their bias is 0 but for rounding, so that of the queries scales it
        scale = np.abs(theirs[name.replace("to_k", "to_q")] if name.endswith("to_k.bias") else expected).max()
        errors[name] = np.abs(mine[name] - expected).max() / scale
    worst = max(errors, key=errors.get)
    print(f"gradients of {len(errors)} tensors: {errors[worst]:.2e} ({worst})")
    assert errors[worst] <= TOLERANCE


def test_the_timestep_frequencies_of_diffusers(torch, diffusers, monkeypatch):
    """Left as they are, 10000^(-i/127) for the paper's 10000^(-i/128), they give another output; ours with them gives that."""
    params = random_params(SMALL)
    x, t, labels = inputs(SMALL)
    with torch.no_grad():
        published = call(torch, peer(torch, diffusers, SMALL, params), x, t, labels).numpy()
        other = call(torch, peer(torch, diffusers, SMALL, params, published_frequencies=False), x, t, labels).numpy()
    print(f"diffusers' own timestep frequencies: {relative(other, published):.2e}")
    assert relative(other, published) > 1e-3

    def frequencies_of_diffusers(t, size):
        angles = t[:, None] * jnp.exp(-np.log(10_000) * jnp.arange(128) / 127)[None]
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)

    monkeypatch.setattr(conditioning, "timestep_features", frequencies_of_diffusers)
    assert relative(ours(SMALL)(params, x, t.astype(np.float32), labels), other) <= TOLERANCE


def test_positions_are_those_of_diffusers(torch, diffusers):
    for name, pixels in (("DiT-S/2", 256), ("DiT-XL/4", 512)):
        cfg = model_config(name, pixels)
        side = cfg.input_size // cfg.patch
        embedding = diffusers.models.embeddings.PatchEmbed(side, side, 1, 4, cfg.width)
        assert np.abs(embedding.pos_embed.numpy() - conditioning.positions(side, cfg.width)).max() <= 1e-6


def test_import_export_import_is_bitwise(torch, tmp_path, cache_dir):
    """A .pt file of torch.save -> run folder -> safetensors -> run folder, by the job: the same bits in every tensor."""
    arrays = published.write(SMALL, random_params(SMALL))
    torch.save({name: torch.from_numpy(a.copy()) for name, a in arrays.items()}, tmp_path / "published.pt")
    first, second, exported = tmp_path / "first", tmp_path / "second", tmp_path / "exported.safetensors"
    again = tmp_path / "again.safetensors"
    first_import = [f"--weights={tmp_path / 'published.pt'}", f"--out={first}", "--heads=3", "--classes=10", "--step=7"]
    convert("--source=dit", *first_import, cache_dir=cache_dir, reads_torch=True)
    convert("--source=workdir", f"--weights={first}", f"--out={exported}", cache_dir=cache_dir)
    convert("--source=dit", f"--weights={exported}", f"--out={second}", "--heads=3", cache_dir=cache_dir)
    convert("--source=workdir", f"--weights={second}", f"--out={again}", "--item=params", cache_dir=cache_dir)
    assert exported.read_bytes() == again.read_bytes()
    found = load_file(exported)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_folder_that_diffusers_saved(torch, diffusers, tmp_path, cache_dir, safe):
    """save_pretrained -> run folder -> parameters, and back to diffusers' names: the same bits."""
    params = random_params(SMALL)
    folder = tmp_path / "transformer"
    model = peer(torch, diffusers, SMALL, params)
    if safe:
        model.save_pretrained(folder)
    else:  # newer versions write safetensors only
        folder.mkdir()
        (folder / "config.json").write_text(model.to_json_string())
        torch.save(model.state_dict(), folder / "diffusion_pytorch_model.bin")
    arguments = ["--source=diffusers", f"--weights={folder}", f"--out={tmp_path / 'w'}"]
    convert(*arguments, cache_dir=cache_dir, reads_torch=not safe)
    exported = tmp_path / "dit.safetensors"
    convert("--source=workdir", f"--weights={tmp_path / 'w'}", f"--out={exported}", cache_dir=cache_dir)
    cfg, again = published.read(Tensors(load_file(exported), "exported"), heads=3)
    assert cfg == SMALL
    jax.tree.map(np.testing.assert_array_equal, again, params)
    arrays, _ = write_diffusers_dit(cfg, again)
    theirs = model.state_dict()
    assert arrays.keys() == theirs.keys()
    for name in arrays:
        np.testing.assert_array_equal(arrays[name], theirs[name].numpy(), err_msg=name)


def test_diffusers_loads_what_we_write(torch, diffusers, tmp_path):
    arrays, config = write_diffusers_dit(SMALL, random_params(SMALL))
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(arrays, tmp_path / "diffusion_pytorch_model.safetensors")
    model = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path)
    for name, values in model.state_dict().items():
        np.testing.assert_array_equal(values.numpy(), arrays[name], err_msg=name)
