"""TPU and GPU devices (memory, rates, links) and the slices one can rent (devices, chips, hosts).

A device is JAX's: a core of TPU v2 and v3, a chip of later TPUs (v4 and v5p join two cores, "megacore"), a GPU. Cloud TPU names count
cores for v2 to v5p and tpu7x, and chips for v5e and v6e: `v3-256` is 128 chips and 256 devices, `v4-256` 128 chips and 128 devices,
`v5e-256` (or `v5litepod-256`) 256 chips and 256 devices, `tpu7x-256` 128 chips and 256 devices. A host is one JAX process (a TPU VM, a
node of GPUs).

Figures are the makers', dense, nan if not published. TPU v2 and v3: Jouppi et al. 2020, "A Domain-Specific Supercomputer for Training
Deep Neural Networks" (CACM 63:7). TPU v4: Jouppi et al. 2023 (arXiv 2304.01433). v5e, v5p, v6e, tpu7x and the shapes of all slices: the
"System architecture" pages of the Cloud TPU documentation. No clock of these is published. v5e's and v5p's follow from the peak and the
matrix units that these pages state (4 a TensorCore, 128 x 128, two FLOPs a cycle each; 1 and 2 TensorCores a chip). The same quotient
gives the published clocks of v3 and v4, and the compiler's cycles of a large product come to 88 to 97 % of the peak of all four. For v6e
the pages state two units of 256 x 256, which would be 3.5 GHz, but by the compiler's cycles a v6e does 1.7 times what these can; for
tpu7x they state no number. These two therefore have no clock here. GPUs: NVIDIA's datasheets of the V100, A100, H100 and H200 (SXM), T4,
L4 and A10, its A100 whitepaper for the clock, its Ada whitepaper for the RTX 4090 (sums in fp32), its HGX B200 datasheet.
TARGETS and LIMITS: OpenXLA's descriptions of these GPUs (xla/backends/gpu/target_config/specs).
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from dit_jax.error import UsageError, alike, shown


@dataclass(frozen=True)
class Device:
    """Accelerator device, with its peak dense bf16 FLOP/s and its memory in bytes. V100 and T4 have no bf16: theirs is fp16's."""

    kind: str
    peak_flops: float
    memory_bytes: int


GIB = 2**30

# Leading words of jax.Device.device_kind -> device; the longest match wins.
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
    "TPU7x": Device("tpu7x core", 1153.5e12, 96 * GIB),
    "Tesla V100": Device("v100-16gb", 125e12, 16 * 10**9),
    "Tesla V100-SXM2-32GB": Device("v100-32gb", 125e12, 32 * 10**9),
    "Tesla V100-PCIE": Device("v100-pcie-16gb", 112e12, 16 * 10**9),
    "Tesla V100-PCIE-32GB": Device("v100-pcie-32gb", 112e12, 32 * 10**9),
    "Tesla T4": Device("t4", 65e12, 16 * 10**9),
    "NVIDIA L4": Device("l4", 121e12, 24 * 10**9),
    "NVIDIA A10": Device("a10", 125e12, 24 * 10**9),
    "NVIDIA GeForce RTX 4090": Device("rtx4090", 165.2e12, 24 * 10**9),
    "NVIDIA A100-SXM4-40GB": Device("a100-40gb", 312e12, 40 * 10**9),
    "NVIDIA A100": Device("a100-80gb", 312e12, 80 * 10**9),
    "NVIDIA H100 PCIe": Device("h100-pcie", 756e12, 80 * 10**9),
    "NVIDIA H100": Device("h100", 989e12, 80 * 10**9),
    "NVIDIA H200": Device("h200", 989e12, 141 * 10**9),
    "NVIDIA B200": Device("b200", 2250e12, 180 * 10**9),
}


# Peak int8 operations a second (dense) over 16-bit ones, by Device.kind, of the same sources. v2, v3: no int8; v100: without matrix units.
INT8 = {
    "tpu-v4": 1.0, "tpu-v5e": 2.0, "tpu-v5p": 2.0, "tpu-v6e": 2.0, "v100-16gb": 0.5, "v100-32gb": 0.5, "v100-pcie-16gb": 0.5, "t4": 2.0,
    "l4": 2.0, "a10": 2.0, "rtx4090": 4.0, "a100-40gb": 2.0, "a100-80gb": 2.0, "h100-pcie": 2.0, "h100": 2.0, "h200": 2.0, "b200": 2.0,
}  # fmt: skip


def int8_speed(device_kind: str) -> float | None:
    """Rate of int8 products over that of 16-bit ones, at the makers' peaks; None if not published."""
    known = find(device_kind)
    return INT8.get(known.kind) if known else None


def find(device_kind: str) -> Device | None:
    """Device of a `jax.Device.device_kind`, or None if it is not in the table (a CPU, an L40, the RTX 4090 of a laptop)."""
    matches = [name for name in DEVICES if re.match(rf"{re.escape(name)}(?!\w| Laptop| D\b)", device_kind)]
    return DEVICES[max(matches, key=len)] if matches else None


@dataclass(frozen=True)
class Chip:
    """Chip or GPU. Bandwidths in bytes/s, tf32 and fp32 in FLOP/s, clock in Hz; nan = not published."""

    device_kind: str  # prefix of jax.Device.device_kind
    devices: int  # JAX devices per chip
    bandwidth: float  # of its memory
    links: int  # to its neighbours
    link_bandwidth: float  # of one link, in one direction
    clock: float = math.nan
    tf32: float = math.nan
    fp32: float = math.nan  # without matrix units


GPU_HOST = 8  # GPUs per node
CHIPS = {
    "v2": Chip("TPU v2", 2, 700e9, 4, 62e9, 700e6),  # 496 Gbit/s per link
    "v3": Chip("TPU v3", 2, 900e9, 4, 82e9, 940e6),  # 656 Gbit/s per link
    "v4": Chip("TPU v4", 1, 1200e9, 6, 50e9, 1050e6),
    "v5e": Chip("TPU v5 lite", 1, 819e9, 4, 50e9, 1503e6),  # 400 GB/s, four links, both directions
    "v5p": Chip("TPU v5", 1, 2765e9, 6, 100e9, 1751e6),  # 1,200 GB/s, six links, both directions
    "v6e": Chip("TPU v6 lite", 1, 1638e9, 4, 100e9),  # 800 GB/s, four links, both directions
    "tpu7x": Chip("TPU7x", 2, 7380e9, 6, 100e9),  # 1,200 GB/s, six links, both directions
    "v100": Chip("Tesla V100", 1, 900e9, 6, 25e9, fp32=15.7e12),
    "v100-32gb": Chip("Tesla V100-SXM2-32GB", 1, 900e9, 6, 25e9, fp32=15.7e12),
    "t4": Chip("Tesla T4", 1, 320e9, 1, 16e9, fp32=8.1e12),  # PCIe 3.0
    "l4": Chip("NVIDIA L4", 1, 300e9, 1, 32e9, tf32=60e12, fp32=30.3e12),  # PCIe 4.0, and the next two
    "a10": Chip("NVIDIA A10", 1, 600e9, 1, 32e9, tf32=62.5e12, fp32=31.2e12),
    "rtx4090": Chip("NVIDIA GeForce RTX 4090", 1, 1008e9, 1, 32e9, tf32=82.6e12, fp32=82.6e12),
    "a100": Chip("NVIDIA A100", 1, 2039e9, 12, 25e9, 1410e6, 156e12, 19.5e12),
    "a100-40gb": Chip("NVIDIA A100-SXM4-40GB", 1, 1555e9, 12, 25e9, 1410e6, 156e12, 19.5e12),
    "h100": Chip("NVIDIA H100", 1, 3350e9, 18, 25e9, tf32=494.5e12, fp32=67e12),
    "h200": Chip("NVIDIA H200", 1, 4800e9, 18, 25e9, tf32=494.5e12, fp32=67e12),
    "b200": Chip("NVIDIA B200", 1, 8000e9, 18, 50e9, tf32=1100e12, fp32=80e12),
    "cpu": Chip("cpu", 1, math.nan, 0, math.nan),
}

# Leading words of jax.Device.device_kind -> options of the compiler of a training step; docs/preflight.md says what they gain.
WHOLE_PRODUCTS = {
    "xla_tpu_enable_windowed_einsum_for_reduce_scatter": "false"
}  # gradients are scattered after their product
# XLA drops optimization barriers of a CPU program before it fuses operations. Each layer then adds up what all layers before it have added.
FENCED = {"xla_disable_hlo_passes": "cse_barrier_expander"}
OPTIONS = {"cpu": FENCED, "TPU v5 lite": WHOLE_PRODUCTS, "TPU v5e": WHOLE_PRODUCTS, "TPU v6": WHOLE_PRODUCTS}

# Platform -> module of the compiler for absent devices, what it is, the target of make and the extra that install it.
COMPILERS = {
    "tpu": ("libtpu", "libtpu, the compiler of TPU programs, which needs no TPU", "tpu", "tpu"),
    "gpu": ("jax_cuda13_plugin", "XLA compiler of GPU programs, which needs no GPU", "gpu", "gpu-compiler"),
}


class Target(NamedTuple):
    """What XLA's compiler of GPU programs asks about a GPU, besides its memory and bandwidth."""

    capability: int  # compute capability, major; the minor one is 0
    cores: int  # multiprocessors
    units: int  # fp32 units per multiprocessor
    shared: int  # KiB of shared memory per multiprocessor; a block may take 1 KiB less
    cache: int  # bytes of L2
    clock: float  # GHz


TARGETS = {
    "a100": Target(8, 108, 64, 164, 40 * 2**20, 1.41),
    "a100-40gb": Target(8, 108, 64, 164, 40 * 2**20, 1.41),
    "h100": Target(9, 132, 128, 228, 50 * 2**20, 1.98),
    "h200": Target(9, 132, 128, 228, 50 * 2**20, 1.98),
    "b200": Target(10, 148, 128, 228, 132644864, 1.965),
}
# Limits of compute capabilities 8.0, 9.0 and 10.0 alike.
LIMITS = """threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 shared_memory_per_block: 49152
registers_per_core_limit: 65536 registers_per_block_limit: 65536 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
block_dim_limit_z: 65535 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64"""

_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBES = ((4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 12), (8, 8, 16), (8, 16, 16))
_DEEP = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), *_CUBES)
_LARGE = ((8, 12, 16), (12, 16, 16), (16, 16, 16), (16, 16, 24))
# generation -> (units per chip in its slice names, chips along each axis)
SLICES = {
    "v2": (2, ((2, 2), (4, 4), (8, 8), (8, 16), (16, 16))),
    "v3": (2, (*_FLAT[1:2], *_FLAT[3:], (16, 32), (32, 32))),
    "v4": (2, _DEEP),
    "v5e": (1, _FLAT),
    "v5p": (2, (*_DEEP, *_LARGE)),
    "v6e": (1, _FLAT),
    "tpu7x": (2, ((1, 1, 1), *_DEEP, *_LARGE)),
}
FULL = {"v2": 16, "v3": 32, "v5e": 16, "v6e": 16}  # chips along an axis with wraparound links, of 2-D tori


@dataclass(frozen=True)
class Topology:
    """Slice of TPUs, several alike that the data-center network joins, nodes of GPUs, or virtual CPU devices."""

    name: str
    generation: str
    chip: Chip
    shape: tuple  # chips along each interconnect axis of a slice; for GPUs (nodes, GPUs per node)
    chips: int  # of all slices, as `hosts`
    hosts: int
    slices: int = 1

    @property
    def platform(self) -> str:
        """JAX platform: tpu | gpu | cpu."""
        return "tpu" if self.generation in SLICES else "cpu" if self.generation == "cpu" else "gpu"

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def device(self) -> Device | None:
        """Memory and bf16 rate of one device; None for a CPU."""
        return find(self.chip.device_kind)

    @property
    def memory_bytes(self) -> float:
        """Memory per device, bytes; nan for a CPU."""
        return self.device.memory_bytes if self.device else math.nan

    def peak(self, dtype: str = "bfloat16") -> float:
        """Peak FLOP/s of one device in bfloat16, tensorfloat32 or float32; nan if not published. Raises UsageError on another dtype."""
        if dtype == "bfloat16":
            return self.device.peak_flops if self.device else math.nan
        rates = {"tensorfloat32": self.chip.tf32, "float32": self.chip.fp32}
        if dtype not in rates:
            raise UsageError(f"dtype: found {shown(dtype)}, expected bfloat16, {', '.join(rates)}")
        return rates[dtype] / self.chip.devices

    @property
    def bandwidth(self) -> float:
        """Memory bandwidth of one device, bytes/s."""
        return self.chip.bandwidth / self.chip.devices

    def description(self) -> dict:
        """Keyword arguments of `jax.experimental.topologies.get_topology_desc`. Raises UsageError if no compiler knows it.

        The compiler (libtpu, or XLA's for GPUs) must be installed; a device need not be present.
        """
        if self.generation in TARGETS:
            shape = "x".join(map(str, (1, *self.shape)))
            return {"platform": "cuda", "topology": shape, "target_config": self._target_config()}
        if self.platform != "tpu":
            raise UsageError(
                f"topology: found {self.name}, expected a TPU slice or one of {', '.join(TARGETS)} to compile for ahead"
            )
        sides = "x".join(map(str, self.shape))
        hosted = self.shape if self.hosts == self.slices else (2, 2)
        if self.generation in FULL:
            wrap = tuple(side == FULL[self.generation] for side in self.shape)
        else:
            wrap = (all(side % 4 == 0 for side in self.shape),) * 3
        megacore = {"chip_config_name": "megacore"} if self.generation in ("v4", "v5p") else {}
        return {
            "platform": "tpu",
            "topology_name": f"{self.generation}:{sides}",
            "chips_per_host_bounds": (*hosted, 1)[:3],
            "num_slices": self.slices,
            "wrap": (*wrap, False)[:3],
            **megacore,
        }

    def _target_config(self) -> str:
        """Text of the GpuTargetConfigProto of one of its GPUs, an entry in TARGETS."""
        one = TARGETS[self.generation]
        accelerated = " feature_extension: ACCELERATED_FEATURES" if one.capability >= 9 else ""
        return f"""gpu_device_info {{ {LIMITS}
            core_count: {one.cores} fpus_per_core: {one.units} clock_rate_ghz: {one.clock} l2_cache_size: {one.cache}
            shared_memory_per_core: {one.shared * 1024} shared_memory_per_block_optin: {(one.shared - 1) * 1024}
            memory_bandwidth: {int(self.bandwidth)} device_memory_size: {self.memory_bytes}
            cuda_compute_capability {{ major: {one.capability}{accelerated} }} }}
            platform_name: "CUDA" device_description_str: "{self.chip.device_kind}" """


def names() -> list[str]:
    """Names of all TPU slices, and examples for GPUs (any number of whole nodes is valid) and CPU devices."""
    found = [f"{kind}-{cores * math.prod(s)}" for kind, (cores, shapes) in SLICES.items() for s in shapes]
    found += [f"v5litepod-{math.prod(s)}" for s in _FLAT]
    gpus = [kind for kind in CHIPS if kind not in SLICES and kind != "cpu"]
    return [*found, *(f"{kind}x{n}" for kind in gpus for n in (1, 2, 4, 8, 16, 32, 64)), "cpu", "cpux8"]


def topology(name: str) -> Topology:
    """Slice by name: `v2-8` to `v6e-256`, `tpu7x-8`, `2xv4-64` (two slices), `a100x8`, `h100x16` (two nodes), `cpux8`.

    Raises UsageError with the nearest names.
    """
    if several := re.fullmatch(r"([1-9]\d{0,2})x(v\d.*|tpu7x.*)", name, re.ASCII):
        one, count = topology(several[2]), int(several[1])
        return replace(one, name=name, chips=count * one.chips, hosts=count * one.hosts, slices=count)
    tpu = re.fullmatch(r"(v\d\w*|tpu7x)-(\d{1,6})", name, re.ASCII)
    if tpu:
        kind = {"v5litepod": "v5e"}.get(tpu[1], tpu[1])
        cores, shapes = SLICES.get(kind, (1, ()))
        shape = next((s for s in shapes if cores * math.prod(s) == int(tpu[2])), None)
        if shape:
            chips, single = math.prod(shape), 8 if kind in ("v5e", "v6e") else 4  # most chips of a single host
            return Topology(name, kind, CHIPS[kind], shape, chips, 1 if chips <= single else chips // 4)
    other = re.fullmatch(r"([a-z]+[\w-]*?)x(\d{1,6})", "cpux1" if name == "cpu" else name, re.ASCII)
    if other and other[1] in CHIPS and other[1] not in SLICES:
        count = int(other[2])
        if other[1] == "cpu" and count:
            return Topology(name, "cpu", CHIPS["cpu"], (count,), count, 1)
        if other[1] != "cpu" and (count in (1, 2, 4) or (count and count % GPU_HOST == 0)):
            hosts = max(count // GPU_HOST, 1)
            return Topology(name, other[1], CHIPS[other[1]], (hosts, count // hosts), count, hosts)
    such = nearest(name, names(), 3, cutoff=0.3) or ["v3-256", "v4-256", "h100x8"]
    raise UsageError(f"topology: found {shown(name)}, expected a slice such as {', '.join(such)}")


def nearest(name: str, known: Iterable[str], most: int = 1, cutoff: float = 0.6) -> list[str]:
    """Known names of the same kind as `name`, those with the most similar numbers first; else similarly spelt ones, see `error.alike`."""
    known, found = list(known), re.fullmatch(r"(.*?[-x])(\d{1,9})", name[:100], re.ASCII)
    same = [other for other in known if found and other.startswith(found[1]) and other[len(found[1]) :].isdigit()]
    if same:
        ranked = sorted(same, key=lambda other: abs(math.log(int(other[len(found[1]) :]) / max(int(found[2]), 0.5))))
        return ranked[:most]
    return alike(name, known, most, cutoff)
