"""dit_jax: train, sample and scale diffusion transformers on TPU pods and GPUs."""

from dit_jax import log  # noqa: F401  from here on the project's logger writes to standard error

__version__ = "0.1.0"
