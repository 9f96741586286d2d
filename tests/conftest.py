"""Every test runs with 8 virtual devices, shapes checked by jaxtyping + beartype, silent broadcasting and warnings as errors."""

import fcntl
import gc
import os
import types
from pathlib import Path

import threadpoolctl
from job import QUICK_XLA, SELDOM

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {QUICK_XLA}"
os.environ.setdefault("NPROC", "32")  # XLA's threads: as many as cores would deadlock where 8 devices meet on 2 cores
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # for jobs: test processes share the cores, and threads would wait
threadpoolctl.threadpool_limits(1, "blas")  # and here: pytest's plugin of jaxtyping has loaded NumPy before this file

from beartype.claw import beartype_package  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

CHECKED = ("config", "flops", "bind", "models", "diffusion", "metrics", "data", "devices.mesh")
CHECKED += ("training.optim", "training.state", "training.step")
install_import_hook([f"dit_jax.{room}" for room in CHECKED], "beartype.beartype")
beartype_package(
    "dit_jax.scaling"
)  # it names no shapes, and jaxtyping's care for them would take half of its tests' time

import jax  # noqa: E402
import pytest  # noqa: E402

from dit_jax.devices import memory  # noqa: E402

memory.gc = types.SimpleNamespace(collect=lambda: 0)  # it takes seconds here; tests/test_restore.py measures elsewhere
jax.config.update("jax_numpy_rank_promotion", "raise")
gc.set_threshold(*SELDOM)


def _shared(tmp_path_factory, name):
    """A folder that all processes of this test run share."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    path.mkdir(exist_ok=True)
    return str(path)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """One folder for the digits, built once; jobs find it through the environment."""
    os.environ["TFDS_DATA_DIR"] = _shared(tmp_path_factory, "tfds")
    return os.environ["TFDS_DATA_DIR"]


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """Compiled programs, shared by the tests and the jobs that they start."""
    return _shared(tmp_path_factory, "compiled")


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(cache_dir):
    jax.config.update("jax_compilation_cache_dir", cache_dir)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, data_dir, cache_dir):
    """The folder of the small run (tests/runs.py), trained in one go, once for all test processes. Not to be changed: copy it."""
    from job import run
    from runs import train

    folder = Path(_shared(tmp_path_factory, "uninterrupted"))
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            noted = {"COMPILATIONS": str(folder / "compilations")}  # for tests/jobs/test_train.py
            code, _, err = run("train", *train(folder / "run"), cache_dir=cache_dir, environment=noted)
            assert code == 0, err
            (folder / "done").touch()
    return folder / "run"


@pytest.fixture(scope="module")
def only_server():
    """The server of object storage of a file's tests (tests/bucket.py)."""
    from bucket import leading_here

    with leading_here(buckets={"test": "US-CENTRAL1", "my-bucket": "EU"}, page=7) as server:
        yield server


@pytest.fixture
def server(only_server):
    """One server for the file, empty for each test: clients in C++ keep the first address that they meet."""
    only_server.empty()
    return only_server


@pytest.fixture(scope="module")
def one_device():
    """What this process trains, evaluates and samples in the file runs on one device: its programs compile sooner than for eight."""
    from dit_jax.config import MeshConfig
    from dit_jax.devices.mesh import make_mesh
    from dit_jax.evaluation import run as evaluation
    from dit_jax.sampling import run as sampling
    from dit_jax.training import loop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
        for job in (evaluation, sampling):
            patch.setattr(job, "drawing_mesh", lambda weights: make_mesh(MeshConfig(), jax.devices()[:1]))
        yield


@pytest.fixture(scope="module", autouse=True)
def few_objects():
    """What a file leaves is freed once, at its end; Python's own collections need not look through what tests keep and have imported."""
    gc.collect()
    gc.freeze()


LONGEST_FIRST = (
    "test_sweep",
    "test_evaluate",
    "test_average",
    "test_init",
    "test_study",
    "test_in_step",
    "test_kills",
    "test_few_steps",
    "test_reuse",
    "test_text",
    "test_mesh",
    "test_quantize",
    "test_diffusion",
    "test_launch",
    "test_checkpoint",
)


def pytest_collection_modifyitems(items):
    """The files that take longest begin, so that no process is left with one of them while the others are done."""
    place = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
