"""The conditionings, blocks and positions against a second implementation: plain NumPy in float64, an image and a head at a time."""

import dataclasses

import jax
import numpy as np
import pytest
from runs import trained_on_meshes
from scipy.special import softmax
from test_model import SMALL, apply, initial_params, inputs, random_params

from dit_jax import flops
from dit_jax.config import Config, TrainConfig
from dit_jax.devices.mesh import spec
from dit_jax.models import dit
from dit_jax.training.diagnose import find_layer

NAMES = ("in_context", "cross_attention", "adaln", "adaln_zero")
MODERN = {"positions": "rope", "block": "llama"}


def linear(p, x):
    """x (..., d) times a kernel of any shape, flattened."""
    kernel = p["kernel"].reshape(x.shape[-1], -1)
    return x @ kernel + p["bias"].reshape(-1)


def norm(cfg, x, p=None):
    if cfg.block == "llama":
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return x if p is None else x * p["scale"]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x if p is None else x * p["scale"] + p["bias"]


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def heads(cfg, q, k, v):
    """q (n, d), k and v (m, d) -> (n, d)."""
    size, out = cfg.width // cfg.heads, np.empty_like(q)
    for i in range(cfg.heads):
        part = slice(i * size, (i + 1) * size)
        out[:, part] = softmax(q[:, part] @ k[:, part].T / np.sqrt(size), axis=-1) @ v[:, part]
    return out


def turned(cfg, x):
    """Queries or keys (n, d): feature pairs as complex numbers, of patch (row, column) times e^(i angle); condition tokens stay."""
    side, size = cfg.input_size // cfg.patch, cfg.width // cfg.heads
    frequencies = 10_000.0 ** -(np.arange(size // 4) / (size // 4))
    out = x.reshape(len(x), cfg.heads, 2, size // 2).copy()
    for token in range(side**2):
        row, column = divmod(token, side)
        turn = np.exp(1j * np.concatenate([column * frequencies, row * frequencies]))
        pairs = (out[token, :, 0] + 1j * out[token, :, 1]) * turn
        out[token, :, 0], out[token, :, 1] = pairs.real, pairs.imag
    return out.reshape(x.shape)


def attention(cfg, p, x):
    q, k, v = np.split(linear(p["qkv"], x), 3, axis=-1)
    if cfg.positions == "rope":
        q, k = turned(cfg, q), turned(cfg, k)
    return project(p, heads(cfg, q, k, v))


def cross_attention(cfg, p, x, c):
    k, v = np.split(linear(p["kv"], c), 2, axis=-1)
    return project(p, heads(cfg, linear(p["q"], x), k, v))


def project(p, h):
    return h @ p["proj"]["kernel"].reshape(h.shape[-1], -1) + p["proj"]["bias"]


def mlp(cfg, p, x):
    h = linear(p["fc1"], x)
    if cfg.block == "llama":
        gate, up = np.split(h, 2, axis=-1)
        return linear(p["fc2"], silu(gate) * up)
    return linear(p["fc2"], gelu(h))


def block(cfg, p, x, c):
    if cfg.conditioning == "adaln_zero":
        s1, a1, g1, s2, a2, g2 = np.split(linear(p["modulation"]["linear"], silu(c)), 6)
        x = x + g1 * attention(cfg, p["attention"], norm(cfg, x) * (1 + a1) + s1)
        return x + g2 * mlp(cfg, p["mlp"], norm(cfg, x) * (1 + a2) + s2)
    if cfg.conditioning == "adaln":
        s1, a1, s2, a2 = np.split(linear(p["modulation"]["linear"], silu(c)), 4)
        x = x + attention(cfg, p["attention"], norm(cfg, x) * (1 + a1) + s1)
        return x + mlp(cfg, p["mlp"], norm(cfg, x) * (1 + a2) + s2)
    x = x + attention(cfg, p["attention"], norm(cfg, x, p["norm1"]))
    if cfg.conditioning == "cross_attention":
        x = x + cross_attention(cfg, p["cross_attention"], norm(cfg, x, p["cross_norm"]), c)
    return x + mlp(cfg, p["mlp"], norm(cfg, x, p["norm2"]))


def sines(index, count):
    angles = index / 10_000 ** (np.arange(count) / count)
    return np.concatenate([np.sin(angles), np.cos(angles)])


def reference(cfg, params, image, t, label):
    """One image (h, w, c) -> (h, w, c_out)."""
    p, side, size = cfg.patch, cfg.input_size // cfg.patch, cfg.width
    tokens = []
    for row in range(side):
        for column in range(side):
            patch = image[row * p : (row + 1) * p, column * p : (column + 1) * p].reshape(-1)
            position = np.concatenate([sines(column, size // 4), sines(row, size // 4)])
            tokens.append(linear(params["patch_embedding"], patch) + position * (cfg.positions == "sincos"))
    x = np.stack(tokens)
    angles = t * np.exp(-np.log(10_000) * np.arange(128) / 128)
    wave = np.concatenate([np.cos(angles), np.sin(angles)])
    time = linear(params["time_embedding"]["fc2"], silu(linear(params["time_embedding"]["fc1"], wave)))
    embedded = params["label_embedding"]["table"]["embedding"][label]
    c = time + embedded if "adaln" in cfg.conditioning else np.stack([time, embedded])
    if cfg.conditioning == "in_context":
        x = np.concatenate([x, c])
    for layer in range(cfg.depth):
        x = block(cfg, jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"]), x, c)
    x, out = x[: side**2], params["output"]
    if "adaln" in cfg.conditioning:
        shift, scale = np.split(linear(out["modulation"]["linear"], silu(c)), 2)
        x = norm(cfg, x) * (1 + scale) + shift
    else:
        x = norm(cfg, x, out["norm"])
    patches = linear(out["linear"], x).reshape(side, side, p, p, -1)
    return patches.swapaxes(1, 2).reshape(cfg.input_size, cfg.input_size, -1)


@pytest.mark.parametrize("changes", [{}, MODERN], ids=["dit", "modern"])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_equal_a_second_implementation(name, changes):
    cfg = dataclasses.replace(SMALL, conditioning=name, **changes)
    params, (x, t, labels) = random_params(cfg), inputs(cfg)
    out = apply(cfg, params, x, t, labels)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    for i in range(len(x)):
        wanted = reference(cfg, exact, np.asarray(x[i], np.float64), float(t[i]), int(labels[i]))
        assert np.abs(out[i] - wanted).max() <= 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("name", NAMES)
def test_time_and_label_matter_and_only_zero_gates_start_as_the_identity(name):
    cfg = dataclasses.replace(SMALL, conditioning=name)
    params, (x, t, labels) = initial_params(cfg), inputs(cfg)
    assert not np.any(apply(cfg, params, x, t, labels))  # the last Linear starts at zero everywhere
    params["output"]["linear"]["kernel"] = jax.random.normal(
        jax.random.key(1), params["output"]["linear"]["kernel"].shape
    )
    here = apply(cfg, params, x, t, labels)
    for other in (apply(cfg, params, x, t + 300, labels), apply(cfg, params, x, t, (labels + 1) % 6)):
        assert np.any(here != other) == (name != "adaln_zero")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, changes",
    [("in_context", {}), ("cross_attention", {}), ("in_context", MODERN), ("adaln_zero", MODERN)],
)  # adaLN-Zero is in tests/test_mesh.py
def test_shards_train_and_name_their_layers(name, changes):
    """On 2 x 2 x 2 devices the loss is that of one device, and a broken weight is found in every kind of block."""
    cfg = Config(dataclasses.replace(SMALL, conditioning=name, **changes), train=TrainConfig(batch_size=8))
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.normal(size=(8, 8, 8, 3)).astype(np.float32),
        "cond": {"label": rng.integers(5, size=8, dtype=np.int32)},
    }
    state = trained_on_meshes(cfg, batch)
    params = jax.device_get(state.params)
    params["blocks"]["mlp"]["fc1"]["bias"] = np.array(params["blocks"]["mlp"]["fc1"]["bias"])
    params["blocks"]["mlp"]["fc1"]["bias"][1, ..., 0] = np.nan
    state = dataclasses.replace(state, params=params)
    assert find_layer(cfg, state, batch) == "the first output that is not finite is that of blocks[1]/mlp/fc1"


def test_cross_attention_splits_by_heads():
    sizes = {"data": 1, "fsdp": 1, "tensor": 4}

    cfg = dataclasses.replace(SMALL, conditioning="cross_attention")
    shapes = jax.eval_shape(lambda: dit.init(cfg, jax.random.key(0)))["blocks"]["cross_attention"]
    for name, leaf, axis in (("q", "kernel", 2), ("kv", "kernel", 3), ("kv", "bias", 2), ("proj", "kernel", 1)):
        shape = shapes[name][leaf].shape
        placed = spec(("blocks", "cross_attention", name, leaf), shape, sizes)
        assert tuple(placed)[axis] == "tensor" and shape[axis] == cfg.heads, (name, leaf, placed)
    assert flops.active_parameters(cfg) > flops.active_parameters(SMALL)
