"""Jobs on hosts that are apart (tests/apart.py): a slow network that loses packets; a host cut off, frozen or told to stop.

Run by `make apart`, as root.
"""

import functools
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from apart import apart
from job import Job, steps_logged
from runs import assert_same_run, train
from test_encode import MODEL, save_vae
from test_encode_hosts import contents
from test_hosts import free_address

from dit_jax.workdir.records import read_records

pytestmark = [pytest.mark.apart, pytest.mark.timeout(600)]

HEARTBEAT, GRACE = 3, 5  # seconds; with the shortest, 1, busy cores make hosts look lost
SLOW = {"delay": 0.02, "loss": 0.01}  # a step of the small model waits for a hundred answers
STEPS = 12


LONG = ["--config.sample.sampler=ddpm", "--config.sample.steps=100"]  # images that take a while


class Case(NamedTuple):
    """A job that works in a folder."""

    flags: Callable[[Path], list]  # what it takes beside those that name the other processes
    under_way: Callable[[Path], object]  # whether it has done something there; much is left then
    assert_same: Callable[[Path, Path], None]  # two folders hold the same results, bit for bit
    prepare: Callable[[Path, Path], object] = (
        shutil.copytree
    )  # (the small run's folder of tests/runs.py, folder): what it holds at first


def parts(folder):
    return list(folder.rglob("*.part"))


def assert_same_images(one, other):
    assert (one / "samples.npz").read_bytes() == (other / "samples.npz").read_bytes()


def assert_same_records(one, other):
    a, b = ({key: record["metrics"] for key, record in read_records(str(folder)).items()} for folder in (one, other))
    assert a == b and len(a) == 2  # the held-out loss, and a score of images


def assert_same_latents(one, other):
    assert contents(one / "latents") == contents(other / "latents") != {}


RECORD = 2 * 4 * 4 * 4 * 2 + 16  # bytes of a latent: parts, float16, and CRC, number and label
CASES = {
    "train": Case(
        lambda folder: train(folder, "--config.train.checkpoint_every=4", steps=STEPS),
        lambda folder: steps_logged(folder) >= 6,
        functools.partial(assert_same_run, steps=STEPS),
        prepare=lambda trained, folder: None,
    ),
    "sample": Case(
        lambda folder: [
            f"--workdir={folder}",
            f"--out={folder / 'samples.npz'}",
            "--num=512",
            "--batch_size=64",
            *LONG,
        ],
        parts,
        assert_same_images,
    ),
    "evaluate": Case(
        lambda folder: [f"--workdir={folder}", "--at=60", "--config.eval.samples=512", *LONG],
        parts,
        assert_same_records,
    ),
    "encode": Case(
        lambda folder: [
            "--config=configs/digits.py",
            *MODEL,
            f"--autoencoder={folder / 'vae'}",
            f"--out={folder / 'latents'}",
            f"--shard_bytes={12 * RECORD}",
        ],
        lambda folder: list(folder.rglob("*.whole")),
        assert_same_latents,
        prepare=lambda trained, folder: save_vae(folder / "vae", 0),
    ),
}


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    with apart(2, tmp_path_factory.mktemp("network")) as found:
        yield found


@pytest.fixture(autouse=True)
def healed(network):
    """Every test finds the network quick and whole."""
    network.delay = network.loss = 0.0
    for index in range(len(network.hosts)):
        network.heal(index)


@pytest.fixture(scope="module", params=CASES)
def job(request, uninterrupted, tmp_path_factory, cache_dir):
    """(name, case, folder where two processes have done it on loopback)."""
    name, case, folder = request.param, CASES[request.param], tmp_path_factory.mktemp("loopback") / "run"
    case.prepare(uninterrupted, folder)
    jobs = start(name, case, folder, cache_dir, [free_address()] * 2, [()] * 2)
    assert finish(jobs)[0] == [0, 0]
    return name, case, folder


@pytest.fixture
def folder(job, uninterrupted, tmp_path):
    """A folder to do the job in."""
    job[1].prepare(uninterrupted, tmp_path / "run")
    return tmp_path / "run"


def start(name, case, folder, cache_dir, coordinators, insides):
    jobs = []
    for index, (coordinator, inside) in enumerate(zip(coordinators, insides, strict=True)):
        where = [f"--coordinator={coordinator}", f"--num_processes={len(insides)}", f"--process_id={index}"]
        flags = [*case.flags(folder), *where, f"--config.mesh.heartbeat={HEARTBEAT}"]
        jobs.append(Job(name, *flags, cache_dir=cache_dir, devices=1, inside=inside))
    return jobs


def on(network, job, folder, cache_dir):
    """The job's processes, one on each host."""
    name, case, _ = job
    first = network.hosts[0].coordinator
    return start(name, case, folder, cache_dir, [first] * len(network.hosts), [host.inside for host in network.hosts])


def wait_until_under_way(jobs, case, folder):
    end = time.monotonic() + 200
    while not case.under_way(folder):
        assert all(job.poll() is None for job in jobs), "".join(job.err.read_text()[-2000:] for job in jobs)
        assert time.monotonic() < end
        time.sleep(0.01)


def finish(jobs, timeout=300):
    """Exit codes and what the processes said."""
    said = [job.communicate(timeout)[1] for job in jobs]
    return [job.returncode for job in jobs], said


def assert_one_line(index, said):
    """A process said one line of its end, the last, and neither a stack trace nor lines of the runtime."""
    lines = said.splitlines()
    mark = f"[process {index}] " if index else ""
    assert [line for line in lines if "error" in line] == lines[-1:], said
    assert lines[-1].startswith(f"{mark}error: process {1 - index} gave no sign of life for {HEARTBEAT} s"), said
    assert not [line for line in lines if re.match(r"[IWEF]\d{4} |\*\*\*|Traceback|terminate", line)], said
    assert len(lines) == 1 or not index, said  # process 0 speaks for all


def assert_goes_on(network, job, folder, cache_dir):
    """The same command ends with 0 and the bits of the undisturbed job."""
    codes, said = finish(on(network, job, folder, cache_dir))
    assert codes == [0, 0], said
    job[1].assert_same(job[2], folder)


ECHO = """
import socket
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("", 7))
print(flush=True)
while True:
    server.sendto(*server.recvfrom(9))
"""
ASK = """
import socket, sys, time
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
client.connect((sys.argv[1], 7))
client.settimeout(0.3)
for i in range(int(sys.argv[2])):
    began = time.monotonic()
    client.send(bytes([i]))
    try:
        while client.recv(9) != bytes([i]):
            pass
        print(time.monotonic() - began)
    except TimeoutError:
        pass
"""


def test_packets_come_late_get_lost_or_end_at_a_cut(network):
    """The network itself: how long datagrams and their answers take, if they come."""

    def python(host, *arguments):
        command = [*network.hosts[host].inside, sys.executable, "-c", *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def times(count):
        return [float(line) for line in python(1, ASK, network.hosts[0].address, count).communicate()[0].split()]

    with python(0, ECHO) as server:
        server.stdout.readline()
        found = times(20)
        assert len(found) == 20 and min(found) < 0.02
        network.delay = 0.03
        found = times(20)
        assert len(found) == 20 and 0.06 <= min(found) < 0.1
        network.delay, network.loss = 0.0, 0.3
        assert 4 <= len(times(30)) <= 26  # 0.7^2 of them
        network.loss = 0.0
        network.cut(1)
        assert times(3) == []
        network.heal(1)
        assert len(times(3)) == 3
        server.kill()


def test_a_slow_network_that_loses_packets_changes_no_bit(network, job, folder, cache_dir):
    network.delay, network.loss, before = *SLOW.values(), network.lost
    assert_goes_on(network, job, folder, cache_dir)
    assert network.lost > before


@pytest.mark.parametrize("victim,how", [(1, "cut"), (0, "freeze"), (1, "freeze")])
def test_a_host_that_is_cut_off_or_frozen_ends_all_in_a_line(victim, how, network, job, folder, cache_dir):
    """Whoever still runs ends within the heartbeat and a little, with PEER_LOST, and the rerun gives the same bits."""
    network.delay = SLOW["delay"] / 4
    jobs = on(network, job, folder, cache_dir)
    wait_until_under_way(jobs, job[1], folder)
    began = time.monotonic()
    if how == "cut":
        network.cut(victim)
    else:
        jobs[victim].send_signal(signal.SIGSTOP)
    ends = [index for index in (0, 1) if how == "cut" or index != victim]
    codes, said = finish([jobs[index] for index in ends], 60)
    assert time.monotonic() - began <= HEARTBEAT + GRACE
    assert codes == [200] * len(ends), said
    for index, text in zip(ends, said, strict=True):
        assert_one_line(index, text)
    if how == "freeze":
        jobs[victim].send_signal(signal.SIGKILL)
        jobs[victim].communicate()
    network.delay = 0.0
    network.heal(victim)
    assert_goes_on(network, job, folder, cache_dir)


def test_sigterm_on_one_host_of_a_slow_network_stops_all(network, job, folder, cache_dir):
    network.delay, network.loss = SLOW.values()
    jobs = on(network, job, folder, cache_dir)
    wait_until_under_way(jobs, job[1], folder)
    jobs[1].send_signal(signal.SIGTERM)
    codes, said = finish(jobs, 120)
    assert codes == [75, 75], said
    network.delay = network.loss = 0.0
    assert_goes_on(network, job, folder, cache_dir)
