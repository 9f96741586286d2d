"""Every test runs with 8 virtual devices, shapes checked by jaxtyping + beartype, silent broadcasting and warnings as errors."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

CHECKED = ("config", "flops", "models", "diffusion", "metrics", "data", "mesh", "optim", "state", "step", "scaling")
install_import_hook([f"dit_jax.{room}" for room in CHECKED], "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """One folder for the digits, built once; child processes find it through the environment."""
    path = tmp_path_factory.getbasetemp().parent / "tfds"
    path.mkdir(exist_ok=True)
    os.environ["TFDS_DATA_DIR"] = str(path)
    return str(path)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """Compiled programs shared by the jobs that the tests start."""
    path = tmp_path_factory.getbasetemp().parent / "compiled"
    path.mkdir(exist_ok=True)
    return str(path)
