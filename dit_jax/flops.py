"""Parameters, multiply-accumulates (MACs) and FLOPs of a DiT in closed form, exact for the models in `models/`; FLOPs of frozen encoders.

One MAC is one multiply and one add, so FLOPs = 2 x MACs. The DiT paper's "Gflops" are the MACs of one unguided forward pass of one
image (Peebles & Xie 2023, Table 4). Norms, activations, softmax and biases are not counted.

    MACs = T p^2 C d + (256 d + d^2) + L ((4 + 2r) S d^2 + 2 S^2 d + m d^2 + x) + o d^2 + T d p^2 C_out

with T image tokens, patch p, C channels in and C_out out, width d, depth L and MLP ratio r, and by conditioning:

                        in_context   cross_attention           adaln   adaln_zero
    S, tokens           T + 2        T                         T       T
    m, o, modulation    0, 0         0, 0                      4, 2    6, 2
    x                   0            (2T + 4) d^2 + 4 T d      0       0
"""

from dit_jax.config import ModelConfig

TIME_FREQUENCIES = 256  # sinusoids that embed a timestep
# Fields of `cond`, as in models.conditioning.FIELDS: whether a model has one, and the trainable parameters of its embedding.
FIELDS = {"label": (lambda cfg: cfg.classes > 0, lambda cfg: (cfg.classes + 1) * cfg.width)}
MODULATIONS = {"adaln": 4, "adaln_zero": 6}  # vectors per block; the output has 2


def fields(cfg: ModelConfig) -> list[str]:
    """Names of the fields in the model's `cond`."""
    return [name for name, (present, _) in FIELDS.items() if present(cfg)]


def component_macs(cfg: ModelConfig) -> dict[str, int]:
    """MACs of one forward pass of one image, by component."""
    n, d, patch = cfg.tokens, cfg.width, cfg.patch**2
    extra = 1 + len(fields(cfg))  # condition tokens: time, and each field
    s = n + extra if cfg.conditioning == "in_context" else n
    cross = 2 * n * d * d + 2 * extra * d * d + 2 * n * extra * d if cfg.conditioning == "cross_attention" else 0
    return {
        "patch_embedding": n * patch * cfg.channels * d,
        "time_embedding": TIME_FREQUENCIES * d + d * d,
        "attention_projections": cfg.depth * 4 * s * d * d,
        "attention_scores": cfg.depth * 2 * s * s * d,
        "cross_attention": cfg.depth * cross,
        "mlp": cfg.depth * 2 * cfg.mlp_ratio * s * d * d,
        "modulation": (cfg.depth * MODULATIONS[cfg.conditioning] + 2) * d * d if cfg.adaptive else 0,
        "output": n * d * patch * cfg.out_channels,
    }


def forward_macs(cfg: ModelConfig) -> int:
    """MACs of one unguided forward pass of one image, the DiT paper's "Gflops" x 1e9."""
    return sum(component_macs(cfg).values())


def forward_flops(cfg: ModelConfig) -> int:
    """FLOPs of one unguided forward pass of one image."""
    return 2 * forward_macs(cfg)


def train_flops(cfg: ModelConfig, images: int = 1) -> int:
    """Training FLOPs, three forward passes per image (the backward pass counts as two), without rematerialisation."""
    return 3 * forward_flops(cfg) * images


def component_parameters(cfg: ModelConfig) -> dict[str, int]:
    """Trainable parameters by component, so without the fixed position table."""
    d, patch, hidden = cfg.width, cfg.patch**2, cfg.mlp_ratio * cfg.width
    attention = 4 * d * d + 4 * d + (2 * (d // cfg.heads) if cfg.qk_norm else 0)
    mlp = 2 * d * hidden + hidden + d
    crossed = cfg.conditioning == "cross_attention"
    return {
        "patch_embedding": patch * cfg.channels * d + d,
        "time_embedding": TIME_FREQUENCIES * d + d + d * d + d,
        **{f"{name}_table": FIELDS[name][1](cfg) for name in fields(cfg)},
        "attention": cfg.depth * attention,
        "cross_attention": cfg.depth * attention if crossed else 0,
        "mlp": cfg.depth * mlp,
        "modulation": (cfg.depth * MODULATIONS[cfg.conditioning] + 2) * (d * d + d) if cfg.adaptive else 0,
        "norms": 0 if cfg.adaptive else (cfg.depth * (3 if crossed else 2) + 1) * 2 * d,
        "output": d * patch * cfg.out_channels + patch * cfg.out_channels,
    }


def parameters(cfg: ModelConfig) -> int:
    """Number of trainable parameters."""
    return sum(component_parameters(cfg).values())


def active_parameters(cfg: ModelConfig) -> int:
    """Weights that multiply every image token, the N of scaling fits.

    Excluded are weights that act once per image: modulation, time, labels, and the keys and values of cross-attention.
    """
    d, crossed = cfg.width, 2 if cfg.conditioning == "cross_attention" else 0
    per_block = (4 + crossed + 2 * cfg.mlp_ratio) * d * d
    return cfg.depth * per_block + cfg.patch**2 * d * (cfg.channels + cfg.out_channels)


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
