"""Training objectives. OBJECTIVES has a row for the loss of each process and for each `objective.name`."""

from dit_jax.config import Config
from dit_jax.diffusion.objective.consistency import consistency
from dit_jax.diffusion.objective.denoising import denoising, noise_prediction, velocity
from dit_jax.diffusion.objective.mean_flow import mean_flow
from dit_jax.diffusion.objective.progressive import progressive
from dit_jax.diffusion.objective.row import Objective

OBJECTIVES = {
    "ddpm": lambda cfg: denoising(cfg, noise_prediction),
    "flow": lambda cfg: denoising(cfg, velocity),
    "consistency": consistency,
    "mean_flow": mean_flow,
    "progressive": progressive,
}


def make_objective(cfg: Config) -> Objective:
    """Objective of a config: the one that it names, else the loss of its process."""
    return OBJECTIVES[cfg.objective.name or cfg.diffusion.process](cfg)
