"""Processes on loopback, as on several hosts: the same run on 1, 2 and 4, checkpoints for any number of devices, nobody there."""

import dataclasses
import json
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from job import ROOT, Job, run, start
from runs import TIMINGS, other_digits, saved, scalars, train

from dit_jax import checkpoint
from dit_jax.config import Config, MeshConfig, ModelConfig, to_dict
from dit_jax.devices import processes
from dit_jax.devices.mesh import make_mesh
from dit_jax.error import UsageError
from dit_jax.training.state import abstract_state
from dit_jax.workdir.folder import flatten, provenance
from dit_jax.workdir.records import read_records

STEPS = 30


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def two(cache_dir, *arguments, devices=(1, 1)):
    """Two processes of one training; `arguments`: those of process 0 and of process 1. Exit codes and what they said."""
    address, jobs = free_address(), []
    for index, (own, count) in enumerate(zip(arguments, devices, strict=True)):
        where = [f"--coordinator={address}", "--num_processes=2", f"--process_id={index}"]
        jobs.append(Job("train", *own, *where, cache_dir=cache_dir, devices=count))
    said = [job.communicate(60)[1] for job in jobs]
    return [job.returncode for job in jobs], said


def train_on(count, workdir, cache_dir, *more):
    """A training of `count` processes with one device each, told of each other by flags. Returns what process 0 said."""
    address, jobs = free_address(), []
    for index in range(count):
        where = [f"--coordinator={address}", f"--num_processes={count}", f"--process_id={index}"] if count > 1 else []
        jobs.append(Job("train", *train(workdir, *more, steps=STEPS), *where, cache_dir=cache_dir, devices=1))
    said = [job.communicate()[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0] * count, said
    assert not any(said[1:])  # process 0 speaks for all
    return said[0]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_one_two_and_four_processes_train_alike(data_dir, cache_dir, tmp_path):
    """The same data order and losses to 1e-5, one set of scalars, one record each, and of the same protocol."""
    found = {}
    for count in (1, 2, 4):
        workdir = tmp_path / str(count)
        train_on(count, workdir, cache_dir, "--config.train.profile=(12,14)", f"--config.train.grid_every={STEPS}")
        traces = sorted(p.name for p in (workdir / "profile/plugins/profile/steps_12_14").iterdir())
        assert traces == [f"process_{k}.xplane.pb" for k in range(count)]  # on one machine, whose name they share
        assert [p.name for p in (workdir / "samples").iterdir()] == [f"step_{STEPS:08}.png"]
        lines = scalars(workdir)
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        assert len((workdir / "goodput.jsonl").read_text().splitlines()) == 1
        assert saved(workdir, STEPS)["data"]["next_index"] == STEPS
        code, _, err = run("evaluate", f"--workdir={workdir}", cache_dir=cache_dir, devices=1)
        assert code == 0, err
        records = {k: v for k, v in read_records(str(workdir)).items() if k[0] == STEPS}
        ((identity, record),) = records.items()
        found[count] = (lines, identity, record["metrics"]["loss"])
    for count in (2, 4):
        for one, other in zip(found[1][0], found[count][0], strict=True):
            assert set(one) == set(other) and not set(one) & set(TIMINGS)
            for name in ("loss", "grad_norm", "param_norm"):
                assert other[name] == pytest.approx(one[name], rel=1e-5), (count, one["step"], name)
        assert found[count][1] == found[1][1]
        assert found[count][2] == pytest.approx(found[1][2], rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_keep_snapshots_and_draw_from_them(data_dir, cache_dir, tmp_path):
    """An EMA made of their snapshots, and a plan of reuse, give one process and two the same images."""
    tracks = ["--config.optim.ema_tracks=(0.05,0.1)", "--config.optim.snapshot_every=4"]
    train_on(2, tmp_path / "run", cache_dir, *tracks)
    assert checkpoint.steps(str(tmp_path / "run"), "snapshots") == [*range(4, STEPS + 1, 4)]
    drawn = []
    for count in (1, 2):
        address, jobs, out = free_address(), [], tmp_path / f"{count}.npz"
        flags = [f"--workdir={tmp_path / 'run'}", "--num=40", "--ema=0.06", "--config.sample.reuse=0.6", f"--out={out}"]
        for index in range(count):
            where = (
                [f"--coordinator={address}", f"--num_processes={count}", f"--process_id={index}"] if count > 1 else []
            )
            jobs.append(Job("sample", *flags, "--steps=6", "--guidance=2", *where, cache_dir=cache_dir, devices=1))
        said = [job.communicate()[1] for job in jobs]
        assert [job.returncode for job in jobs] == [0] * count, said
        drawn.append(out.read_bytes())
    assert drawn[0] == drawn[1] and len(list((tmp_path / "run" / "reuse").iterdir())) == 1


def filled(state):
    """The same state, every array of it filled with random bits that make finite numbers."""
    draw = np.random.default_rng(0)

    def fill(leaf):
        values = draw.standard_normal(leaf.shape) if leaf.dtype == np.float32 else draw.integers(0, 9, leaf.shape)
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(fill, state)


def keep(items, workdir, model):
    saver = checkpoint.Saver(str(workdir), 1)
    saver.save(3, items, {"next_index": 3}, {"model": to_dict(model)})
    saver.wait()
    saver.close()


def assert_equal_bits(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


SLOW = [pytest.param(axes, (1, 2, 4), marks=pytest.mark.slow) for axes in ((1, 8, 1), (8, 1, 1), (2, 2, 2))]


@pytest.mark.parametrize(("axes", "counts"), [((1, 8, 1), (1, 4)), *SLOW])
def test_a_checkpoint_of_8_devices_restores_on_fewer_and_back_bit_for_bit(axes, counts, tmp_path):
    model = ModelConfig(depth=1, width=16, heads=2, input_size=8, channels=1, classes=10)
    cfg, eight = Config(model=model), make_mesh(MeshConfig(*axes))
    state = dataclasses.replace(filled(abstract_state(cfg, eight)), step=jax.numpy.int32(3))
    keep(state.items(), tmp_path / "8", model)
    for count in counts:
        few = make_mesh(MeshConfig(data=1, fsdp=-1), jax.devices()[:count])
        there, position = checkpoint.restore(str(tmp_path / "8"), 3, abstract_state(cfg, few).items(), model)
        assert position == {"next_index": 3}
        assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(there["params"])} == {count}
        assert_equal_bits(state.items(), there)
        keep(there, tmp_path / str(count), model)
        back, _ = checkpoint.restore(str(tmp_path / str(count)), 3, abstract_state(cfg, eight).items(), model)
        assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(back["params"])} == {8}
        assert_equal_bits(state.items(), back)


def test_nobody_at_the_coordinators_address_is_one_line(tmp_path, data_dir, cache_dir):
    address, jobs = free_address(), []
    for index, where in ((1, address), (0, free_address())):  # one finds no coordinator, the other nobody else
        flags = [
            f"--coordinator={where}",
            "--num_processes=2",
            f"--process_id={index}",
            "--config.mesh.initialization=2",
        ]
        jobs.append(Job("train", *train(tmp_path / "run"), *flags, cache_dir=cache_dir, devices=1))
    said = [job.communicate()[1] for job in jobs]
    assert [job.returncode for job in jobs] == [200, 200]  # PEER_LOST: launchers start them again
    hint = "within 2 s; start the same command on every host, or raise mesh.initialization\n"
    assert said[0] == f"error: no coordinator at {address} that all processes reached {hint}"
    assert said[1].startswith("error: of 2 processes not all came to the coordinator, ") and said[1].endswith(hint)
    assert said[1].count("\n") == 1 and not (tmp_path / "run").exists()


def test_half_an_address_on_the_command_line_is_a_usage_error(tmp_path, cache_dir):
    code, _, err = run("train", *train(tmp_path / "run"), "--process_id=1", cache_dir=cache_dir, devices=1)
    assert (code, err) == (
        2, "error: --coordinator (or JAX_COORDINATOR_ADDRESS): not given, expected HOST:PORT of process 0\n"
    )  # fmt: skip
    assert json.dumps(sorted(tmp_path.iterdir())) == "[]"


def of_both(message):
    """What each of two processes says of an error that both find."""
    return [f"error: {message}\n", f"[process 1] error: {message}\n"]


def test_hosts_with_another_config_or_folder_are_refused_by_all(tmp_path, data_dir, cache_dir):
    """Usage errors, on each of them, with nothing written; what may differ by host does."""
    here, there = tmp_path / "d0", tmp_path / "d1"
    codes, said = two(cache_dir, train(here), train(here, "--config.optim.learning_rate=0.5"))
    assert codes == [2, 2], said
    assert said == of_both(
        "optim.learning_rate: found 0.5 on process 1, expected 0.003 as on process 0; start the same command on every host"
    )
    codes, said = two(cache_dir, train(here), train(there, "--config.data.workers=1"))
    assert codes == [2, 2], said
    assert said == of_both(
        f"--workdir: '{there}' on process 1 is not the folder that process 0 sees, '{here}'; it must be on a disk that all "
        "hosts share, or in a bucket"
    )
    assert not list(tmp_path.iterdir())


def checkout(folder, commit=False, change=""):
    """A copy of the package, as another host may have it: with a commit of its own, or without git, and with a line more."""
    for name in ("dit_jax", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    with open(folder / "dit_jax" / "flops.py", "a") as file:
        file.write(change)
    git = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", folder.name]) if commit else ():
        subprocess.run([*git, *words], check=True)
    return folder


@pytest.mark.parametrize("kind", ["commit", pytest.param("code", marks=pytest.mark.slow)])
def test_hosts_with_other_code_are_refused_by_all(kind, tmp_path, data_dir, cache_dir):
    """Two checkouts of other commits; two without git, of which none is known, by their files. Nothing is computed or written."""
    commits = kind == "commit"
    folders = [checkout(tmp_path / "a", commits), checkout(tmp_path / "b", commits, "" if commits else "# a change\n")]
    address, jobs = free_address(), []
    for index, folder in enumerate(folders):
        where = [f"--coordinator={address}", "--num_processes=2", f"--process_id={index}"]
        jobs.append(start("train", *train(tmp_path / "run"), *where, cache_dir=cache_dir, devices=1, folder=folder))
    said = [job.communicate(timeout=120)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [2, 2], said
    found, expected = (value_in(folder, kind) for folder in folders[::-1])
    assert found != expected and said == of_both(
        f"{kind}: found {found!r} on process 1, expected {expected!r} as on process 0; "
        "install the same commit and libraries on all"
    )
    assert not (tmp_path / "run").exists()


def value_in(folder, kind):
    """What a checkout says of itself."""
    code = "from dit_jax.workdir.folder import *; print(provenance()['commit'], code_sha256())"
    words = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True).stdout
    commit, files = words.split()
    assert (commit == "unknown") == (kind == "code")
    return commit if kind == "commit" else files


def test_hosts_with_other_records_are_refused_by_all(tmp_path, data_dir, cache_dir):
    """Also where they have the same name, in folders that each host has for itself."""
    other = f"--config.data.data_dir={other_digits(tmp_path / 'tfds')}"
    run_folder = tmp_path / "run"
    codes, said = two(cache_dir, train(run_folder), train(run_folder, other))
    assert codes == [2, 2], said
    expected = "found 721 on process 1, expected 1442 as on process 0; give every host the same data"
    assert said == of_both(f"data.dataset: records: {expected}")
    assert not run_folder.exists()


@pytest.mark.slow
def test_hosts_with_more_devices_than_others_are_refused_by_all(tmp_path, data_dir, cache_dir):
    codes, said = two(cache_dir, *[train(tmp_path / "run")] * 2, devices=(1, 2))
    assert codes == [2, 2], said
    assert said[0].startswith("error: found 1 devices on process 0 and 2 on process 1, expected as")
    assert said[1] == f"[process 1] {said[0]}"
    assert not list(tmp_path.iterdir())


def test_the_first_key_that_differs_is_named():
    processes.compare([{"a": 1, "b": [1.0, 2.0]}] * 3)
    with pytest.raises(UsageError, match="b: found 3 on process 2, expected 2 as on process 0"):
        processes.compare([{"a": 1, "b": 2}, {"a": 1, "b": 2}, {"a": 1, "b": 3}])
    with pytest.raises(UsageError, match="c: found 5 on process 1, expected no such key as on process 0"):
        processes.compare([{"a": None}, {"a": None, "c": 5}])
    flat = flatten(to_dict(Config()))
    assert set(processes.OWN) <= set(flat) and {"commit", "versions.jax"} <= set(flatten(provenance()))
    processes.check_devices([4, 4, 4])
    with pytest.raises(UsageError, match="found 4 devices on process 0 and 2 on process 2"):
        processes.check_devices([4, 4, 2])


def test_sigterm_while_processes_gather_ends_at_once(tmp_path, data_dir, cache_dir):
    address = free_address()
    where = [f"--coordinator={address}", "--num_processes=2", "--process_id=0", "--config.mesh.initialization=60"]
    job = Job("train", *train(tmp_path / "run"), *where, cache_dir=cache_dir, devices=1)
    wait_for_listener(address, job)
    job.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, said = job.communicate(20)
    assert (job.returncode, said.count("\n")) == (75, 1) and said.startswith("interrupted: "), said
    assert time.monotonic() - began < 10 and not (tmp_path / "run").exists()


def wait_for_listener(address, job):
    """Returns when somebody answers at the address."""
    host, port = address.split(":")
    while job.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))) == 0:
                return
        time.sleep(0.05)


def test_an_error_of_the_runtime_is_told_from_ours():
    """jax 0.10.2 raises a ValueError where a program that has run before loses its peer (findings/lost_peer_raises_value_error.sh)."""
    lost = "UNKNOWN: Gloo AllGather failed: Read error [127.0.0.1]:35754: Connection reset by peer"
    assert processes._of_the_runtime(ValueError(lost)) and processes._of_the_runtime(jax.errors.JaxRuntimeError(lost))
    full = "RESOURCE_EXHAUSTED: Out of memory"
    for error in (ValueError(full), jax.errors.JaxRuntimeError(full), UsageError("A: found B"), ValueError("found 3")):
        assert not processes._of_the_runtime(error)
