"""Weights that no host has whole: two processes train, score in the run, draw and evaluate, to the bits of one process with all of them."""

import shutil

import pytest
from test_hosts import train_on
from test_hosts_draw import ended, scores, start

from dit_jax import flops
from dit_jax.devices import rows
from dit_jax.workdir.folder import read_config

EVALUATE = ["--config.eval.samples=150", "--config.eval.fixed_times=8", "--config.eval.bootstrap=0"]
SAMPLE = ["--num=150", "--steps=4", "--guidance=2", "--seed=3"]


def on(count, job, *arguments, cache_dir, memory):
    """A job of `count` processes with a device each of `memory` bytes."""
    jobs = start(count, job, *arguments, cache_dir=cache_dir, environment={"DEVICE_MEMORY": str(memory)})
    codes, ends = ended(jobs)
    assert codes == [0] * count and not any(ends), ends


@pytest.mark.timeout(600)
def test_weights_split_over_two_hosts_are_scored_and_drawn_as_whole_ones(data_dir, cache_dir, tmp_path):
    run = tmp_path / "run"
    train_on(
        2, run, cache_dir, "--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.train.evaluate_every=20", *EVALUATE
    )
    found, size = scores(run), 4 * flops.parameters(read_config(str(run)).model)
    assert sorted(step for step, _ in found) == [20] * 3 + [30] * 3
    drawn = []
    for hosts, memory in ((1, 1 << 40), (2, size)):
        devices = [type("Device", (), {"process_index": host}) for host in range(hosts)]
        assert rows._split(size, rows.SHARE * memory, devices) == hosts  # as the jobs do
        folder = tmp_path / str(hosts)
        shutil.copytree(run, folder, ignore=shutil.ignore_patterns("eval"))
        how = {"cache_dir": cache_dir, "memory": memory}
        on(hosts, "evaluate", f"--workdir={folder}", "--at=30", *EVALUATE, **how)
        assert scores(folder) == {key: value for key, value in found.items() if key[0] == 30}
        on(hosts, "sample", f"--workdir={folder}", *SAMPLE, f"--out={tmp_path / f'{hosts}.npz'}", **how)
        drawn.append((tmp_path / f"{hosts}.npz").read_bytes())
    assert drawn[0] == drawn[1]
