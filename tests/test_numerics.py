"""One random generator whatever the environment says; settings that change bits are refused or stated."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from job import QUICK_XLA, ROOT, environment
from runs import train

from dit_jax import checkpoint
from dit_jax.config import Config, MeshConfig
from dit_jax.devices import numerics
from dit_jax.devices.mesh import describe_device, make_mesh
from dit_jax.devices.numerics import ambient, check_numerics
from dit_jax.error import UsageError
from dit_jax.evaluation.loss import fixed_noise
from dit_jax.sampling.draw import image_keys
from dit_jax.training.step import step_key

DRAWS = """
import json, jax, numpy as np
from dit_jax.config import Config
from dit_jax.evaluation.loss import fixed_noise, stratified
from dit_jax.sampling.draw import image_keys
from dit_jax.training.step import step_key
i = np.arange(2)
draws = [step_key(Config(), np.int32(3)), image_keys(5, i)], [fixed_noise(5, i, 2, (2,)), stratified(5, i, 2)]
print(json.dumps([np.asarray(jax.random.key_data(k)).tolist() for k in draws[0]] + [np.asarray(d).tolist() for d in draws[1]]))
"""


def drawn(**environment):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK_XLA, **environment}
    found = subprocess.run([sys.executable, "-c", DRAWS], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return json.loads(found.stdout)


def test_no_setting_of_the_environment_changes_a_draw():
    others = {"JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_THREEFRY_PARTITIONABLE": "0", "JAX_RANDOM_SEED_OFFSET": "7"}
    keys = jax.random.key_data(image_keys(5, np.arange(2))).tolist()
    noise = np.asarray(fixed_noise(5, np.arange(2), 2, (2,))).tolist()
    found = drawn(**others)
    assert found[0] == jax.random.key_data(step_key(Config(), jax.numpy.int32(3))).tolist()
    assert (found[1], found[2]) == (keys, noise)


def test_every_key_is_of_the_named_generator():
    """A key made elsewhere would be of the environment's generator; those of models are for shapes only."""
    users = {
        p.relative_to(ROOT / "dit_jax").as_posix()
        for p in (ROOT / "dit_jax").rglob("*.py")
        if "random.key(" in p.read_text()
    }
    shapes = {f"models/{name}.py" for name in ("bert", "clip", "inception", "t5", "vae")}
    assert users == {"devices/numerics.py"} | shapes
    assert not [p for p in (ROOT / "dit_jax").rglob("*.py") if "PRNGKey(" in p.read_text()]


def test_64_bits_are_refused_before_a_checkpoint_is_read(tmp_path):
    with jax.enable_x64(True):
        for action in (lambda: checkpoint.load(str(tmp_path)), lambda: make_mesh(MeshConfig())):
            with pytest.raises(UsageError, match=r"^JAX_ENABLE_X64: found it set, expected it unset: "):
                action()


@pytest.mark.slow
def test_a_job_in_64_bits_exits_2_and_writes_nothing(tmp_path, data_dir, cache_dir):
    command = [sys.executable, "-m", "dit_jax.train", *train(tmp_path / "w")]
    env = environment(cache_dir) | {"JAX_ENABLE_X64": "1"}
    found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.splitlines()[-1].startswith("error: JAX_ENABLE_X64: found it set")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("value, refused", [("=true", True), ("", True), ("=1", True), ("=false", False)])
def test_fast_math_is_refused(monkeypatch, value, refused):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 --xla_cpu_enable_fast_math{value}")
    if refused:
        with pytest.raises(UsageError, match=r"^XLA_FLAGS: found --xla_cpu_enable_fast_math, expected it unset: "):
            check_numerics()
    else:
        check_numerics()


@pytest.mark.parametrize(
    "value, stated",
    [
        (None, {}),
        ("default", {}),
        ("bfloat16", {}),
        ("highest", {"matmul_precision": "highest"}),
        ("float32", {"matmul_precision": "highest"}),
    ],
)
def test_the_precision_of_matrix_products_is_stated_where_it_differs(value, stated):
    with jax.default_matmul_precision(value):
        assert ambient() == stated


def test_other_settings_are_stated(monkeypatch):
    with jax.disable_jit():
        assert ambient() == {"disable_jit": True}
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_gpu_deterministic_ops=true")
    assert describe_device()["xla_flags"] == "--xla_gpu_deterministic_ops=true"


def test_a_setting_that_another_jax_lacks_is_no_setting(monkeypatch):
    monkeypatch.setitem(numerics.SETTINGS, "of_another_version", 0.0)
    assert ambient() == {}
