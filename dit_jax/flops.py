"""Parameters, multiply-accumulates and FLOPs of a DiT in closed form: arithmetic only, exact for the models in `models/`.

One MAC is one multiply and one add, so FLOPs = 2 x MACs, always. The DiT paper's "Gflops" are the MACs of one unguided
forward pass of one image (Peebles & Xie 2023, Table 4). Norms, activations, softmax and biases are not counted.

    MACs = T p^2 C d + (256 d + d^2) + L ((4 + 2r) T d^2 + 2 T^2 d + 6 d^2) + 2 d^2 + T d p^2 C_out

with T tokens, patch p, C channels in and C_out out, width d, depth L and MLP ratio r.
"""

from dit_jax.config import ModelConfig

TIME_FREQUENCIES = 256  # width of the sinusoid that embeds a timestep


def component_macs(cfg: ModelConfig) -> dict[str, int]:
    """MACs of one forward pass of one image, by component."""
    n, d, patch = cfg.tokens, cfg.width, cfg.patch**2
    return {
        "patch_embedding": n * patch * cfg.channels * d,
        "time_embedding": TIME_FREQUENCIES * d + d * d,
        "attention_projections": cfg.depth * 4 * n * d * d,
        "attention_scores": cfg.depth * 2 * n * n * d,
        "mlp": cfg.depth * 2 * cfg.mlp_ratio * n * d * d,
        "modulation": cfg.depth * 6 * d * d + 2 * d * d,
        "output": n * d * patch * cfg.out_channels,
    }


def forward_macs(cfg: ModelConfig) -> int:
    """MACs of one unguided forward pass of one image: the DiT paper's "Gflops" x 1e9."""
    return sum(component_macs(cfg).values())


def forward_flops(cfg: ModelConfig) -> int:
    """FLOPs of one unguided forward pass of one image."""
    return 2 * forward_macs(cfg)


def train_flops(cfg: ModelConfig, images: int = 1) -> int:
    """Training FLOPs: three forward passes per image (forward, and two products backward); rematerialisation is not counted."""
    return 3 * forward_flops(cfg) * images


def sample_flops(cfg: ModelConfig, evaluations: int, guided: int) -> int:
    """FLOPs of one sampled image: `evaluations` calls of the denoiser, `guided` of which run the model twice."""
    return forward_flops(cfg) * (evaluations + guided)


def component_parameters(cfg: ModelConfig) -> dict[str, int]:
    """Trainable parameters by component. The fixed position table is not trainable and not counted."""
    d, patch, hidden = cfg.width, cfg.patch**2, cfg.mlp_ratio * cfg.width
    attention = 4 * d * d + 4 * d + (2 * (d // cfg.heads) if cfg.qk_norm else 0)
    mlp = 2 * d * hidden + hidden + d
    return {
        "patch_embedding": patch * cfg.channels * d + d,
        "time_embedding": TIME_FREQUENCIES * d + d + d * d + d,
        "label_table": (cfg.classes + 1) * d,
        "attention": cfg.depth * attention,
        "mlp": cfg.depth * mlp,
        "modulation": cfg.depth * (6 * d * d + 6 * d) + 2 * d * d + 2 * d,
        "output": d * patch * cfg.out_channels + patch * cfg.out_channels,
    }


def parameters(cfg: ModelConfig) -> int:
    """Trainable parameters."""
    return sum(component_parameters(cfg).values())


def active_parameters(cfg: ModelConfig) -> int:
    """Weights that multiply every token: the N of scaling fits. Modulation, time and label weights act once an image."""
    d = cfg.width
    per_block = (4 + 2 * cfg.mlp_ratio) * d * d
    return cfg.depth * per_block + cfg.patch**2 * d * (cfg.channels + cfg.out_channels)
