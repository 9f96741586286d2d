"""`sample` and `evaluate` on several hosts, here processes on loopback: the same bits for any number; kills, stops, hosts that differ."""

import itertools
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from job import Job, run
from runs import other_digits
from test_hosts import free_address

from dit_jax import checkpoint
from dit_jax.config import MeshConfig
from dit_jax.data.pipeline import load_arrays
from dit_jax.devices import rows
from dit_jax.devices.mesh import make_mesh
from dit_jax.evaluation.loss import held_out_loss
from dit_jax.sampling.draw import open_sampling
from dit_jax.sampling.weights import weights_hash
from dit_jax.workdir.folder import read_config
from dit_jax.workdir.records import read_records

SAMPLE = ["--sampler=ddpm", "--steps=20", "--guidance=2", "--seed=3"]
EVALUATE = [
    "--config.eval.samples=300", "--config.eval.max_images=40", "--config.eval.times_per_image=8", "--config.sample.steps=4",
    "--config.eval.bootstrap=0",
]  # fmt: skip


def start(count, job, *arguments, cache_dir, last=(), **how):
    """Processes of a job with a device each; `last`: further arguments of the last one."""
    address, found = free_address(), []
    for index in range(count):
        where = [f"--coordinator={address}", f"--num_processes={count}", f"--process_id={index}"] if count > 1 else []
        own = last if index == count - 1 else ()
        found.append(Job(job, *arguments, *where, *own, cache_dir=cache_dir, devices=1, **how))
    return found


def ended(jobs, timeout=250):
    """Exit codes, and the lines of each that say how it ended; the runtime's own lines are left out."""
    said = [job.communicate(timeout)[1] for job in jobs]
    ends = [[line for line in text.splitlines() if "error: " in line or "interrupted: " in line] for text in said]
    return [job.returncode for job in jobs], ends


def together(count, job, *arguments, cache_dir):
    codes, ends = ended(start(count, job, *arguments, cache_dir=cache_dir))
    assert codes == [0] * count and not any(ends), ends


@pytest.fixture(scope="module")
def alone(uninterrupted, tmp_path_factory, cache_dir):
    """A run folder with its records, and an npz, made by one process."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copytree(uninterrupted, folder / "run")
    code, _, err = run("evaluate", f"--workdir={folder / 'run'}", "--at=60", *EVALUATE, cache_dir=cache_dir, devices=1)
    assert code == 0, err
    flags = [f"--workdir={uninterrupted}", "--num=300", *SAMPLE, f"--out={folder / 'a.npz'}"]
    code, _, err = run("sample", *flags, cache_dir=cache_dir, devices=1)
    assert code == 0, err
    return folder


def scores(workdir):
    return {key: record["metrics"] for key, record in read_records(str(workdir)).items()}


def test_two_processes_draw_and_score_as_one(alone, uninterrupted, tmp_path, cache_dir):
    shutil.copytree(uninterrupted, tmp_path / "run")
    together(2, "evaluate", f"--workdir={tmp_path / 'run'}", "--at=60", *EVALUATE, cache_dir=cache_dir)
    assert len(scores(alone / "run")) == 2 and scores(tmp_path / "run") == scores(alone / "run")
    flags = [
        f"--workdir={uninterrupted}",
        "--num=300",
        *SAMPLE,
        f"--out={tmp_path / 'a.npz'}",
        f"--grid={tmp_path / 'g.png'}",
    ]
    together(2, "sample", *flags, cache_dir=cache_dir)
    assert (tmp_path / "a.npz").read_bytes() == (alone / "a.npz").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "g.png", "run"]


def test_hosts_that_differ_and_another_jobs_file_are_refused_by_all(alone, uninterrupted, tmp_path, cache_dir):
    flags = [f"--workdir={uninterrupted}", f"--out={tmp_path / 'a.npz'}", *SAMPLE]
    codes, ends = ended(start(2, "sample", *flags, cache_dir=cache_dir, last=["--seed=4"]))
    message = "error: --seed: found 4 on process 1, expected 3 as on process 0; start the same command on every host"
    assert codes == [2, 2] and ends == [[message], [f"[process 1] {message}"]]
    shutil.copy(alone / "a.npz", tmp_path / "a.npz")
    codes, ends = ended(start(2, "sample", *flags, "--num=400", "--steps=19", cache_dir=cache_dir))
    assert codes == [2, 2] and [len(lines) for lines in ends] == [1, 1], ends
    assert all("holds images of another job: sample.steps: found 20, this command has 19" in end for (end,) in ends)
    assert (tmp_path / "a.npz").read_bytes() == (alone / "a.npz").read_bytes() and os.listdir(tmp_path) == ["a.npz"]


@pytest.mark.slow
def test_hosts_with_other_data_are_refused_by_all(uninterrupted, tmp_path, data_dir, cache_dir):
    shutil.copytree(uninterrupted, tmp_path / "run")
    flags = [f"--workdir={tmp_path / 'run'}", "--at=60", "--config.eval.max_images=40"]
    other = [f"--config.data.data_dir={other_digits(tmp_path / 'tfds')}"]
    codes, ends = ended(start(2, "evaluate", *flags, cache_dir=cache_dir, last=other))
    assert codes == [2, 2] and [len(lines) for lines in ends] == [1, 1], ends
    assert all("data: found {'dataset': 'digits'" in end and "on process 1" in end for (end,) in ends)
    assert not (tmp_path / "run" / "eval").exists()


@pytest.mark.parametrize("fsdp,tensor", [pytest.param(4, 1, marks=pytest.mark.slow), (2, 2)])
def test_weights_that_are_split_draw_and_score_the_same(uninterrupted, fsdp, tensor):
    cfg = read_config(str(uninterrupted))
    images, cond = jax.tree.map(lambda x: x[:40], load_arrays(cfg.data, "test"))
    found = []
    for mesh in (make_mesh(MeshConfig()), make_mesh(MeshConfig(data=-1, fsdp=fsdp, tensor=tensor))):
        _, params = checkpoint.load(str(uninterrupted), 60, place=lambda shapes, mesh=mesh: rows.on_mesh(mesh, shapes))
        (batch,) = open_sampling(cfg, mesh).images(params, 3, 60)
        found.append([*batch, held_out_loss(cfg, params, images, cond, mesh), weights_hash(params)])
    assert len({leaf.sharding.shard_shape(leaf.shape) == leaf.shape for leaf in jax.tree.leaves(params)}) == 2
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_weights_are_split_only_where_they_do_not_fit():
    """Over the fewest devices of a host that hold them; if they take more than all of it, over hosts."""

    class Device:
        def __init__(self, host):
            self.process_index = host

    slice_ = [Device(i // 4) for i in range(16)]
    assert [rows._split(size, 10, slice_) for size in (1, 10, 11, 20, 21, 40, 41, 80, 81, 1000)] == [
        1, 1, 2, 2, 4, 4, 8, 8, 16, 16,
    ]  # fmt: skip
    assert rows.drawing_mesh(1 << 60).shape == {"data": 8, "fsdp": 1, "tensor": 1}  # a CPU's memory is not in the table


@pytest.mark.parametrize("hosts", [1, 2, 3, 7])
def test_shares_are_blocks_cut_at_multiples_of_128(hosts):
    ranges = [(5, 300), (300, 310), (1000, 1700)]
    found = rows.shares(ranges, hosts)
    assert len(found) == hosts and np.concatenate(found).tolist() == [i for a, b in ranges for i in range(a, b)]
    for share, after in itertools.pairwise(found):
        assert not len(share) or not len(after) or share[-1] + 1 != after[0] or after[0] % 128 == 0 or after[0] == 300
    assert max(map(len, found)) < 1005 / hosts + 128


JOBS = {
    "sample": lambda run, out: [f"--workdir={run}", "--num=1500", "--steps=50", *SAMPLE[:1], f"--out={out / 'a.npz'}"],
    "evaluate": lambda run, out: [f"--workdir={run}", "--at=60", "--config.eval.samples=1500", "--config.sample.steps=50",
                                  "--config.sample.sampler=ddpm", "--config.eval.bootstrap=0"],
}  # fmt: skip


def begun(job, run, out):
    """Whether images of the job are on the disk already."""
    folders = [out / "a.npz.parts"] if job == "sample" else list(run.glob("eval/partial/*"))
    return any(list(folder.glob("*.part")) for folder in folders if folder.exists())


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("job", JOBS)
def test_one_two_and_four_processes_and_what_happens_to_one_of_them(job, uninterrupted, tmp_path, cache_dir):
    """SIGTERM: all exit with 75. SIGKILL, SIGSTOP: the others end. Each time other numbers of processes go on to the same bits."""
    results = []
    for case in ("one", "four", signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP):
        folder = tmp_path / str(case)
        shutil.copytree(uninterrupted, folder / "run")
        flags = [*JOBS[job](folder / "run", folder), "--config.mesh.heartbeat=5"]
        if isinstance(case, signal.Signals):
            jobs = start(2, job, *flags, cache_dir=cache_dir)
            while not begun(job, folder / "run", folder):
                assert all(process.poll() is None for process in jobs), ended(jobs)
                time.sleep(0.05)
            jobs[1].send_signal(case)
            since = time.monotonic()
            if case == signal.SIGTERM:
                codes, ends = ended(jobs)
                assert codes == [75, 75] and [len(lines) for lines in ends] == [1, 1], (codes, ends)
            else:
                codes, ends = ended(jobs[:1])
                assert codes == [200] and [len(lines) for lines in ends] == [1], (codes, ends)
                jobs[1].send_signal(signal.SIGKILL)
                ended(jobs[1:])
            assert time.monotonic() - since < 45
            assert begun(job, folder / "run", folder)
        together(
            {"one": 1, "four": 4, signal.SIGTERM: 1, signal.SIGKILL: 2, signal.SIGSTOP: 4}[case],
            job,
            *flags,
            cache_dir=cache_dir,
        )
        results.append((folder / "a.npz").read_bytes() if job == "sample" else scores(folder / "run"))
    assert all(result == results[0] for result in results[1:])
