"""What the bits of a computation depend on besides its program and device: the random generator, and settings of JAX and XLA.

Importing this file fixes the generator whatever the environment says: Threefry-2x32 (Salmon et al. 2011), partitionable, so that
a number does not depend on how many devices draw, and without an offset of the seeds. Settings that would break a run are
refused, others are stated by protocols and records.
"""

import os
import re

import jax

from dit_jax.error import UsageError

GENERATOR = "threefry2x32"
# Settings that change roundings, with their defaults; jax 0.12 has lost the last.
SETTINGS = {"default_matmul_precision": None, "disable_jit": False, "optimization_level": "UNKNOWN"}
SETTINGS |= {"exec_time_optimization_effort": 0.0}

jax.config.update("jax_threefry_partitionable", True)
jax.config.update("jax_random_seed_offset", 0)


def random_key(seed) -> jax.Array:
    """Random key of a seed, of the one generator that is used here."""
    return jax.random.key(seed, impl=GENERATOR)


def check_numerics() -> None:
    """Raises UsageError for settings under which checkpoints or safeguards do not hold."""
    if jax.config.jax_enable_x64:
        raise UsageError("JAX_ENABLE_X64: found it set, expected it unset: weights and checkpoints are of 32 bits")
    if re.search(r"--xla_cpu_enable_fast_math(?!=(false|0))", os.environ.get("XLA_FLAGS", "")):
        why = "it takes every number for finite, and the safeguards of a step look for those that are not"
        raise UsageError(f"XLA_FLAGS: found --xla_cpu_enable_fast_math, expected it unset: {why}")


def ambient() -> dict:
    """The settings that differ from JAX's defaults, for protocols: {"matmul_precision": "highest"}; mostly {}."""
    values = {name: getattr(jax.config, f"jax_{name}", default) for name, default in SETTINGS.items()}
    found = {name: value for name, value in values.items() if value != SETTINGS[name]}
    try:
        precision = jax.lax.Precision(found.pop("default_matmul_precision", None)).name.lower()
    except ValueError:  # the name of an algorithm
        precision = values["default_matmul_precision"]
    return found | ({} if precision == "default" else {"matmul_precision": precision})


def xla_flags() -> str:
    """XLA's flags, without the number of virtual devices."""
    found = os.environ.get("XLA_FLAGS", "").split()
    return " ".join(flag for flag in found if "host_platform_device_count" not in flag)
