"""Our blocks of captions beside diffusers' blocks of PixArt and SD3, with the same random weights: outputs and all gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.config import ModelConfig
from dit_jax.models.conditioning import Condition
from dit_jax.models.dit import AdaptiveBlock, DualBlock

TOLERANCE = 1e-4
WIDTH, HEADS, IMAGE, TEXT = 48, 3, 16, 7


def config(conditioning, **changes):
    return ModelConfig(
        depth=1, width=WIDTH, heads=HEADS, input_size=8, classes=0, learn_sigma=False, text="bytes", text_length=TEXT,
        conditioning=conditioning, **changes,
    )  # fmt: skip


def drawn(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def linear(there, here, axes=1):
    """Names and arrays of a Linear: a kernel whose first `axes` axes are features that come in."""
    kernel = np.asarray(here["kernel"])
    rows = int(np.prod(kernel.shape[:axes]))
    return {f"{there}.weight": kernel.reshape(rows, -1).T, f"{there}.bias": np.asarray(here["bias"]).reshape(-1)}


def parts(there, here):
    """Of a kernel (d, parts, ...), a Linear for each name in `there`."""
    split = ({"kernel": here["kernel"][:, i], "bias": here["bias"][i]} for i in range(len(there)))
    return {key: value for name, one in zip(there, split, strict=True) for key, value in linear(name, one).items()}


def pixart(p):
    """State of BasicTransformerBlock; the modulation is outside of it, and what it adds for each block is zero."""
    qkv = [f"attn1.to_{name}" for name in "qkv"]
    return {
        **linear("modulation", p["modulation"]["linear"]),
        "scale_shift_table": np.zeros((6, WIDTH), np.float32),
        **parts(qkv, p["attention"]["qkv"]),
        **linear("attn1.to_out.0", p["attention"]["proj"], 2),
        **linear("attn2.to_q", p["cross_attention"]["q"]),
        **parts(["attn2.to_k", "attn2.to_v"], p["cross_attention"]["kv"]),
        **linear("attn2.to_out.0", p["cross_attention"]["proj"], 2),
        **linear("ff.net.0.proj", p["mlp"]["fc1"]),
        **linear("ff.net.2", p["mlp"]["fc2"]),
    }


def sd3(p):
    """State of JointTransformerBlock."""
    found = {}
    for half, names, out, suffix, added in (
        (p, [f"attn.to_{name}" for name in "qkv"], "attn.to_out.0", "", ""),
        (p["text"], [f"attn.add_{name}_proj" for name in "qkv"], "attn.to_add_out", "_context", "added_"),
    ):
        found |= linear(f"norm1{suffix}.linear", half["modulation"]["linear"])
        found |= parts(names, half["attention"]["qkv"]) | linear(out, half["attention"]["proj"], 2)
        found |= linear(f"ff{suffix}.net.0.proj", half["mlp"]["fc1"]) | linear(f"ff{suffix}.net.2", half["mlp"]["fc2"])
        for name in ("q", "k"):
            if (scale := half["attention"].get(f"{name}_norm")) is not None:
                found[f"attn.norm_{added}{name}.weight"] = np.asarray(scale["scale"])
    return found


def random_params(block, *inputs):
    shapes = jax.eval_shape(block.init, jax.random.key(0), *inputs)["params"]
    leaves, structure = jax.tree.flatten(shapes)
    return structure.unflatten([0.2 * drawn(leaf.shape, i) for i, leaf in enumerate(leaves)])


def compare(found, expected, name, beside=0.0):
    """The largest error over the largest value, of `expected` or of `beside`."""
    error = float(np.abs(np.asarray(found) - expected).max() / max(np.abs(expected).max(), np.abs(beside).max()))
    assert np.shape(found) == expected.shape and error <= TOLERANCE, (name, error)
    return error


def check(torch, block, their_block, names, inputs, run, condition):
    """Outputs, and gradients of every parameter and input, of the outputs times fixed noise."""
    params = random_params(block, inputs[0], condition(*inputs[1:]))
    weigh = [drawn(shape.shape, 90 + i) for i, shape in enumerate(jax.tree.leaves(inputs[0]))]

    def ours(params, inputs):
        out = jax.tree.leaves(block.apply({"params": params}, inputs[0], condition(*inputs[1:]))[0])
        return sum((o * w).sum() for o, w in zip(out, weigh, strict=True)), out

    (_, out), grads = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(params, inputs)
    their_block.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in names(params).items()})
    tensors = jax.tree.map(lambda leaf: torch.from_numpy(np.array(leaf)).requires_grad_(), inputs)
    theirs = run(their_block, *tensors)
    sum((o * torch.from_numpy(w)).sum() for o, w in zip(theirs, weigh, strict=True)).backward()
    errors = [compare(a, b.detach().numpy(), "output") for a, b in zip(out, theirs, strict=True)]
    own, of = names(grads[0]), {name: p.grad.numpy() for name, p in their_block.named_parameters()}
    of.pop("scale_shift_table", None)  # it is added to the modulation, whose bias has its gradient
    for (
        name,
        gradient,
    ) in of.items():  # where all keys are moved by one bias, softmax does not see it: its gradient is 0
        beside = of[name.replace("bias", "weight")] if name.endswith("to_k.bias") else 0.0
        errors.append(compare(own[name], gradient, name, beside))
    for a, b in zip(jax.tree.leaves(grads[1]), jax.tree.leaves(tensors), strict=True):
        errors.append(compare(a, b.grad.numpy(), "input"))
    print(f"largest error {max(errors):.1e} of {len(errors)} arrays")


def test_cross_attention_to_a_caption_is_a_block_of_pixart(torch, diffusers):
    from diffusers.models.attention import BasicTransformerBlock

    class PixArt(BasicTransformerBlock):
        def __init__(self):
            super().__init__(
                WIDTH, HEADS, WIDTH // HEADS, cross_attention_dim=WIDTH, activation_fn="gelu-approximate", attention_bias=True,
                norm_elementwise_affine=False, norm_type="ada_norm_single", norm_eps=1e-6,
            )  # fmt: skip
            self.modulation = torch.nn.Linear(WIDTH, 6 * WIDTH)

    mask = np.arange(TEXT)[None] < np.array([[TEXT], [3]])
    bias = torch.from_numpy(np.where(mask, 0, -1e4).astype(np.float32))[:, None]

    def run(block, x, c, text):
        steps = block.modulation(torch.nn.functional.silu(c))
        return [block(x, encoder_hidden_states=text, encoder_attention_mask=bias, timestep=steps)]

    inputs = drawn((2, IMAGE, WIDTH), 50), drawn((2, WIDTH), 51), drawn((2, TEXT, WIDTH), 52)
    condition = lambda c, text: Condition(c, text, jnp.asarray(mask))  # noqa: E731
    check(torch, AdaptiveBlock(config("adaln_cross")), PixArt(), pixart, inputs, run, condition)


@pytest.mark.parametrize("qk_norm", [False, True], ids=["sd3", "sd3.5"])
def test_a_dual_stream_is_a_block_of_sd3(torch, diffusers, qk_norm):
    from diffusers.models.attention import JointTransformerBlock

    theirs = JointTransformerBlock(WIDTH, HEADS, WIDTH // HEADS, qk_norm="rms_norm" if qk_norm else None)

    def run(block, both, c):
        return block(both[0], both[1], c)[::-1]

    both = drawn((2, IMAGE, WIDTH), 50), drawn((2, TEXT, WIDTH), 52)
    block = DualBlock(config("dual_stream", qk_norm=qk_norm))
    check(torch, block, theirs, sd3, (both, drawn((2, WIDTH), 51)), run, lambda c: Condition(c, None))
