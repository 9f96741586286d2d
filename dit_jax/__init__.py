"""dit_jax: train, sample and scale diffusion transformers on TPU pods and GPUs."""

__version__ = "0.1.0"
