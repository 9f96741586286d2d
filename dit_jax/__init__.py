"""dit_jax: train, sample and scale diffusion transformers on TPU pods and GPUs."""

from dit_jax import log  # noqa: F401  sets up the project's logger on standard error

__version__ = "0.1.0"
