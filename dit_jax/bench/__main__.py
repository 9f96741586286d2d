"""Measure how fast this machine trains and samples: on a CPU a small model in a minute or two, elsewhere DiT-XL/2.

    python -m dit_jax.bench [--config=FILE] [--parts=sample,train] [--peer=tests/peers/torch_dit.py] [--repeats=5] [--json=OUT]

    train   the whole training step: rates, share of the peak, memory, compilation
    sample  the same for sampling one batch as the job `sample` does

A peer is another implementation, timed in turn with ours: a file with the functions that `dit_jax/bench/peer.py` lists.
"""

import gc
import os

from absl import flags

from dit_jax.config import Config, resolve
from dit_jax.error import UsageError, typed
from dit_jax.files.out import check_json
from dit_jax.job.launch import launch
from dit_jax.log import say

PARTS = ("sample", "train")  # in this order because a device's peak memory is counted from the start of the process


def chosen(parts: list[str]) -> list[str]:
    """The parts asked for, in the order in which they run. Raises UsageError for others or none."""
    other = [part for part in parts if part not in PARTS]
    if other or not parts:
        raise UsageError(f"--parts: found {', '.join(other) or 'none'}, expected some of {', '.join(PARTS)}")
    return [part for part in PARTS if part in parts]


def check_peer(module, cfg: Config) -> None:
    """Raises UsageError unless there is one device and the peer supports the config."""
    import jax

    if jax.device_count() != 1:
        raise UsageError(
            f"--peer: found {jax.device_count()} devices, expected one, as the peer takes one (CUDA_VISIBLE_DEVICES=0)"
        )
    if cfg.data.encode == "in_step":
        raise UsageError("data.encode: found 'in_step' with --peer, expected 'precomputed': a peer trains on latents")
    module.check(cfg, jax.default_backend())


def main() -> None:
    import jax

    from dit_jax.bench import peer, speed, table
    from dit_jax.bench.measure import machine, publish
    from dit_jax.devices.mesh import check_batch, make_mesh

    values = flags.FLAGS
    parts = chosen(values.parts)
    check_json(values.json)
    typed(values.seconds, float, "--seconds")
    module = peer.load(values.peer) if values.peer else None
    if module:
        # Otherwise JAX takes three quarters of a GPU's memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    default, platform = values.config is None, jax.default_backend()
    cfg = speed.default_config(platform) if default else resolve(values.config)
    if "train" in parts:
        check_batch(make_mesh(cfg.mesh), cfg.train.batch_size, cfg.optim.accumulate)
    if module:
        check_peer(module, cfg)
    found: dict = {"machine": machine()}
    for part in parts:
        say(f"{part} ...")
        gc.collect()  # frees what the previous part held on the device
        found[part] = speed.measure(cfg, part, values.repeats, values.seconds, module)
    if default and "train" in found:
        found["train"]["target"] = speed.TARGETS.get(platform, speed.OTHER_TARGET)
    publish(found, table.show, values.json, ("jax", "jaxlib", "flax", "numpy"))


if __name__ == "__main__":
    flags.DEFINE_list("parts", ["sample", "train"], "some of " + ", ".join(PARTS))
    flags.DEFINE_string("peer", "", "file with another implementation to time, such as tests/peers/torch_dit.py")
    flags.DEFINE_integer("repeats", 5, "repeats; medians and ranges are over them", lower_bound=1)
    flags.DEFINE_float("seconds", 2.0, "rough time of a repeat of the slowest side; at least one call", lower_bound=0.0)
    flags.DEFINE_string("json", "", "write all figures here")
    launch(main, config="optional")
