"""Parameters, multiply-accumulates (MACs) and FLOPs of a DiT in closed form, exact for the models in `models/`; FLOPs of frozen encoders.

One MAC is one multiply and one add, so FLOPs = 2 x MACs. The DiT paper's "Gflops" are the MACs of one unguided forward pass of one
image (Peebles & Xie 2023, Table 4). Norms, activations, softmax, rotations and biases are not counted.

    MACs = T p^2 C d + (256 d + d^2) + L (4 S d^2 + g S d h + 2 S^2 d + m d^2 + x) + o d^2 + T d p^2 C_out

with T image tokens, patch p, C channels in and C_out out, width d, depth L, g matrices of an MLP with h hidden features (2 and r d for
the MLP ratio r; of SwiGLU 3 and `cfg.hidden`), and by conditioning:

                        in_context   cross_attention           adaln   adaln_zero   adaln_cross                 dual_stream
    S, tokens           T + 2 + M    T                         T       T            T                           T + M
    m, o, modulation    0, 0         0, 0                      4, 2    6, 2         6, 2                        12, 2
    x                   0            (2T + 4) d^2 + 4 T d      0       0            (2T + 2M) d^2 + 2 T M d     0

M is the number of tokens of a caption, `text_length` whatever the caption, because padding is computed too. With a caption in place of
the label, T + 2 and (2T + 4) have one token less. The states of a frozen encoder, of width w, add their projection, M w d; the encoder
itself is counted apart (`encoder_macs`). Each of `text_depth` blocks adds 4 M d^2 + g M d h + 2 M^2 d. A flow map's target time is
embedded as t is, 256 d + d^2 more. Patches of an enlarged low-resolution image are embedded as those of the image are, T p^2 C d more. In
`dual_stream` caption tokens have weights of their own, also in the last block, where XLA leaves those out that nothing reads if the layer
scan is fully unrolled.
"""

from collections.abc import Callable
from typing import NamedTuple

from dit_jax.config import ModelConfig

Shape = tuple[int, int] | None  # (h, w) of images in pixels of the model's input; None: input_size x input_size
TIME_FREQUENCIES = 256  # sinusoids that embed a timestep
TABLES = {"bytes": 257, "words": 4096}  # rows of the embedding of text: padding and each byte, or each number of a word


class Field(NamedTuple):
    """A row as in models.conditioning.FIELDS: whether a model has the field, the trainable parameters of its embedding, its tokens, and
    the MACs of its embedding for an image of n tokens."""

    present: Callable
    parameters: Callable
    tokens: Callable = lambda cfg: 1
    macs: Callable = lambda cfg, n: 0


def text_parameters(cfg: ModelConfig) -> int:
    """Trainable parameters of the embedding of captions, and of the learned null condition."""
    rows, d = cfg.state_width + 1 if cfg.encoded else TABLES[cfg.text], cfg.width
    attention, mlp, norm = _block_parameters(cfg)
    blocks = cfg.text_depth * (attention + mlp + 2 * norm) + (norm if cfg.text_depth else 0)
    return (rows + cfg.text_length * (cfg.null == "learned")) * d + blocks


def text_macs(cfg: ModelConfig) -> int:
    """MACs of the embedding of a caption: an encoder's states to the model's width, and `text_depth` blocks."""
    m, d = cfg.caption_tokens, cfg.width
    block = m * (4 * d * d + 2 * m * d + _matrices(cfg) * d * cfg.hidden)
    return (m * cfg.state_width * d if cfg.encoded else 0) + cfg.text_depth * block


FIELDS = {
    "label": Field(lambda cfg: cfg.classes > 0, lambda cfg: (cfg.classes + 1) * cfg.width),
    "text": Field(
        lambda cfg: bool(cfg.text),
        text_parameters,
        lambda cfg: cfg.caption_tokens,
        lambda cfg, n: text_macs(cfg),
    ),
    "low": Field(  # its patches, enlarged, add to those of the image
        lambda cfg: cfg.superres > 0,
        lambda cfg: cfg.patch**2 * cfg.channels * cfg.width,
        lambda cfg: 0,
        lambda cfg, n: n * cfg.patch**2 * cfg.channels * cfg.width,
    ),
}
MODULATIONS = {"adaln": 4, "adaln_zero": 6, "adaln_cross": 6, "dual_stream": 12}  # vectors per block; the output has 2


def fields(cfg: ModelConfig) -> list[str]:
    """Names of the fields in the model's `cond`."""
    return [name for name, field in FIELDS.items() if field.present(cfg)]


def crossed_tokens(cfg: ModelConfig) -> int:
    """Tokens that cross-attention reads; 0 without it."""
    known = {name: FIELDS[name].tokens(cfg) for name in fields(cfg)}
    return {"cross_attention": 1 + sum(known.values()), "adaln_cross": known.get("text", 0)}.get(cfg.conditioning, 0)


def _matrices(cfg: ModelConfig) -> int:
    """Matrices of an MLP: SwiGLU has a gate besides."""
    return 3 if cfg.block == "llama" else 2


def tokens(cfg: ModelConfig, shape: Shape = None) -> int:
    """Tokens of an image of `shape` (h, w)."""
    return cfg.tokens if shape is None else (shape[0] // cfg.patch) * (shape[1] // cfg.patch)


def part_macs(cfg: ModelConfig, shape: Shape = None) -> dict[str, int]:
    """MACs of one image in each part of one block whose output can be kept: attention, cross-attention if there is one, MLP."""
    found = component_macs(cfg, shape)
    attention = found["attention_projections"] + found["attention_scores"]
    parts = {"attention": attention, "cross_attention": found["cross_attention"], "mlp": found["mlp"]}
    return {name: macs // cfg.depth for name, macs in parts.items() if macs}


def component_macs(cfg: ModelConfig, shape: Shape = None) -> dict[str, int]:
    """MACs of one forward pass of one image of `shape` (h, w), by component."""
    n, d, patch = tokens(cfg, shape), cfg.width, cfg.patch**2
    extra = 1 + sum(FIELDS[name].tokens(cfg) for name in fields(cfg))  # condition tokens: time, and those of each field
    s = n + {"in_context": extra, "dual_stream": cfg.caption_tokens}.get(cfg.conditioning, 0)
    m = crossed_tokens(cfg)
    cross = 2 * n * d * d + 2 * m * d * d + 2 * n * m * d if m else 0
    embeddings = {f"{name}_embedding": FIELDS[name].macs(cfg, n) for name in fields(cfg)}
    return {
        "patch_embedding": n * patch * cfg.channels * d,
        "time_embedding": (2 if cfg.target else 1) * (TIME_FREQUENCIES * d + d * d),
        **{name: macs for name, macs in embeddings.items() if macs},
        "attention_projections": cfg.depth * 4 * s * d * d,
        "attention_scores": cfg.depth * 2 * s * s * d,
        "cross_attention": cfg.depth * cross,
        "mlp": cfg.depth * _matrices(cfg) * s * d * cfg.hidden,
        "modulation": (cfg.depth * MODULATIONS[cfg.conditioning] + 2) * d * d if cfg.adaptive else 0,
        "output": n * d * patch * cfg.out_channels,
    }


def forward_macs(cfg: ModelConfig, shape: Shape = None) -> int:
    """MACs of one unguided forward pass of one image, the DiT paper's "Gflops" x 1e9."""
    return sum(component_macs(cfg, shape).values())


def forward_flops(cfg: ModelConfig, shape: Shape = None) -> int:
    """FLOPs of one unguided forward pass of one image."""
    return 2 * forward_macs(cfg, shape)


def train_flops(cfg: ModelConfig, images: int = 1, shape: Shape = None) -> int:
    """Training FLOPs, three forward passes per image (the backward pass counts as two), without rematerialisation."""
    return 3 * forward_flops(cfg, shape) * images


def tangent_flops(cfg: ModelConfig, shape: Shape = None) -> int:
    """FLOPs of the forward-mode derivative of a pass along (x, t), beside the pass itself, for one image.

    A product with weights is one product of its tangent; one of two activations is two. What depends on neither x nor t has no tangent:
    embeddings of `cond`, of the target time, and keys and values from a caption.
    """
    found = component_macs(cfg, shape)
    once = {name: macs for name, macs in found.items() if not name.endswith("_embedding")}
    once |= {"patch_embedding": found["patch_embedding"], "time_embedding": TIME_FREQUENCIES * cfg.width + cfg.width**2}
    once["attention_scores"] *= 2
    once["cross_attention"] -= cfg.depth * 2 * crossed_tokens(cfg) * cfg.width**2
    if cfg.target == "later":  # the output is modulated by the target time
        once["modulation"] -= 2 * cfg.width**2
    return 2 * sum(once.values())


def _block_parameters(cfg: ModelConfig) -> tuple[int, int, int]:
    """Trainable parameters of one attention, one MLP and one norm of a block."""
    d, hidden = cfg.width, cfg.hidden
    attention = 4 * d * d + 4 * d + (2 * (d // cfg.heads) if cfg.qk_norm else 0)
    mlp = _matrices(cfg) * d * hidden + (_matrices(cfg) - 1) * hidden + d
    return attention, mlp, d if cfg.block == "llama" else 2 * d  # RMSNorm has no bias


def component_parameters(cfg: ModelConfig) -> dict[str, int]:
    """Trainable parameters by component, so without the fixed position table."""
    d, patch = cfg.width, cfg.patch**2
    attention, mlp, norm = _block_parameters(cfg)
    crossed, streams = crossed_tokens(cfg) > 0, 2 if cfg.conditioning == "dual_stream" else 1
    return {
        "patch_embedding": patch * cfg.channels * d + d,
        "positions": cfg.tokens * d if cfg.positions == "learned" else 0,
        "time_embedding": (2 if cfg.target == "all" else 1) * (TIME_FREQUENCIES * d + d + d * d + d),
        **{f"{name}_table": FIELDS[name].parameters(cfg) for name in fields(cfg)},
        "attention": cfg.depth * streams * attention,
        "cross_attention": cfg.depth * attention if crossed else 0,
        "mlp": cfg.depth * streams * mlp,
        "modulation": (cfg.depth * MODULATIONS[cfg.conditioning] + 2) * (d * d + d) if cfg.adaptive else 0,
        "norms": 0 if cfg.adaptive else (cfg.depth * (3 if crossed else 2) + 1) * norm,
        "output": d * patch * cfg.out_channels + patch * cfg.out_channels,
    }


def parameters(cfg: ModelConfig) -> int:
    """Number of trainable parameters."""
    return sum(component_parameters(cfg).values())


def active_parameters(cfg: ModelConfig) -> int:
    """Weights that multiply every image token, the N of scaling fits.

    Excluded are weights that act once per image (modulation, time, labels) or on the caption's tokens only.
    """
    d, crossed = cfg.width, 2 if crossed_tokens(cfg) else 0
    per_block = (4 + crossed) * d * d + _matrices(cfg) * d * cfg.hidden
    ends = cfg.channels * (2 if cfg.superres else 1) + cfg.out_channels
    return cfg.depth * per_block + cfg.patch**2 * d * ends


def encoder_macs(cfg, tokens: int) -> dict[str, int]:
    """MACs of one pass of a frozen encoder over `tokens` tokens, padding included, by component; `cfg`: of models.clip, t5 or bert.

    An image has `cfg.tokens` tokens. Training does not pass backward through an encoder.
    """
    inner, matrices = cfg.heads * cfg.head_width, 3 if cfg.gated else 2
    return {
        "patch_embedding": (tokens - 1) * 3 * cfg.patch**2 * cfg.width if cfg.patch else 0,
        "attention_projections": cfg.depth * 4 * tokens * cfg.width * inner,
        "attention_scores": cfg.depth * 2 * tokens**2 * inner,
        "mlp": cfg.depth * matrices * tokens * cfg.width * cfg.hidden,
        "projection": cfg.width * cfg.projection,
    }


def encoder_flops(cfg, tokens: int) -> int:
    """FLOPs of one pass of a frozen encoder over the tokens of one caption, padding included, or of one image."""
    return 2 * sum(encoder_macs(cfg, tokens).values())
