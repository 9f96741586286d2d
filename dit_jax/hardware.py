"""TPU and GPU kinds: memory and peak rate of one device as JAX counts devices (a core on TPU v2 and v3, a chip after).

Figures are the makers' datasheets: dense bfloat16, no sparsity.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One accelerator device. `peak_flops`: dense bf16 FLOP/s; `memory_bytes`: its own memory."""

    kind: str
    peak_flops: float
    memory_bytes: int


GIB = 2**30

# The start of jax.Device.device_kind -> device; the longest match wins.
DEVICES = {
    "TPU v2": Device("tpu-v2 core", 22.5e12, 8 * GIB),
    "TPU v3": Device("tpu-v3 core", 61.5e12, 16 * GIB),
    "TPU v4": Device("tpu-v4", 275e12, 32 * GIB),
    "TPU v5 lite": Device("tpu-v5e", 197e12, 16 * GIB),
    "TPU v5e": Device("tpu-v5e", 197e12, 16 * GIB),
    "TPU v5": Device("tpu-v5p", 459e12, 95 * GIB),
    "TPU v5p": Device("tpu-v5p", 459e12, 95 * GIB),
    "TPU v6 lite": Device("tpu-v6e", 918e12, 32 * GIB),
    "TPU v6e": Device("tpu-v6e", 918e12, 32 * GIB),
    "NVIDIA A100-SXM4-40GB": Device("a100-40gb", 312e12, 40 * 10**9),
    "NVIDIA A100": Device("a100-80gb", 312e12, 80 * 10**9),
    "NVIDIA H100 PCIe": Device("h100-pcie", 756e12, 80 * 10**9),
    "NVIDIA H100": Device("h100", 989e12, 80 * 10**9),
    "NVIDIA H200": Device("h200", 989e12, 141 * 10**9),
}


def find(device_kind: str) -> Device | None:
    """The device of a `jax.Device.device_kind`, or None for one that is not in the table (a CPU, say)."""
    matches = [name for name in DEVICES if device_kind.startswith(name)]
    return DEVICES[max(matches, key=len)] if matches else None
