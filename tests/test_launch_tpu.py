"""launch/tpu_vm.sh: its exact commands, who the workers are, and how it goes on with a request."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from launched import CLOUD, GKE, JOB, PODS, TPU, TYPED, call, dry, fakes_in, unchecked_in

# ---- TPU VMs

VM = "gcloud compute tpus tpu-vm"
QUEUE = "gcloud compute tpus queued-resources"
HERE = "xl2 --project=lab --zone=us-central2-b"
LOOK = f"{QUEUE} describe {HERE} '--format=value(state.state)'"
CREATE = [
    f"{QUEUE} create {HERE} --node-id=xl2 --accelerator-type=v4-64 --runtime-version=tpu-ubuntu2204-base",
    f"# every 30 s until ACTIVE: {LOOK}",
]


@pytest.fixture(scope="module")
def unchecked(tmp_path_factory):
    return unchecked_in(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def fakes(tmp_path):
    return fakes_in(tmp_path)


def on(workers, command):
    quoted = command.replace("'", "'\\''")
    return f"{VM} ssh xl2 --worker={workers} --ssh-flag=-oServerAliveInterval=30 '--command={quoted}' --project=lab --zone=us-central2-b"


SETUP = [
    "git -C ROOT archive --format=tar.gz --prefix=dit_jax/ --output=ROOT/dit_jax.tar.gz HEAD",
    f"{VM} scp ROOT/dit_jax.tar.gz xl2:dit_jax.tar.gz --worker=all --scp-flag=-oServerAliveInterval=30 --project=lab --zone=us-central2-b",
    "rm ROOT/dit_jax.tar.gz",
    on("all", "sudo apt-get update -qq && sudo apt-get install -y -qq python3.11 python3.11-venv make nfs-common"),
    on(
        "all",
        "sudo mkdir -p /mnt/share && (mountpoint -q /mnt/share || sudo mount -t nfs -o hard '10.0.0.2:/share' /mnt/share) "
        "&& sudo chmod a+rwx /mnt/share",
    ),
    on("all", "tar xzf dit_jax.tar.gz && cd dit_jax && make gcs PYTHON=python3.11"),
    on(
        "all",
        "cd dit_jax && .venv/bin/pip install --quiet --require-hashes --no-deps -r requirements-tpu.lock && touch run.ready",
    ),
]
PROBE = on(
    "all",
    "cd dit_jax 2>/dev/null; job= code=- n=0; if [ -e run.pid ] && grep -qs dit_jax /proc/$(cat run.pid)/cmdline; then job=running; fi; "
    "[ ! -s run.exit ] || read -r code n <run.exit; if [ $job ]; then :; elif [ ! -e run.ready ]; then job=bare; "
    "elif [ ! -e run.pid ]; then job=idle; elif [ -e run.stop ]; then job=stopped; elif [ $code = - ]; then job=killed; "
    'else job=ended; fi; echo "worker $(hostname) $job $code $n $(tail -n 1 run.log 2>/dev/null | cut -c -200)"',
)


def started(typed=TYPED, busy="echo 'error: a job is running here; stop it first' >&2; exit 1"):
    return on(
        "all",
        f"cd dit_jax || exit; if [ -e run.pid ] && grep -qs dit_jax /proc/$(cat run.pid)/cmdline; then {busy}; fi; "
        f"rm -f run.stop run.exit; (trap '' HUP; for n in $(seq 101); do .venv/bin/python -m dit_jax.train {typed}; code=$?; "
        "echo $code $n >run.exit; [ $code -ge 128 ] || break; sleep 10; [ ! -e run.stop ] || break; done) "
        ">>run.log 2>&1 </dev/null & echo $! >run.pid",
    )


DELETE = [f"{QUEUE} delete {HERE} --force --quiet"]
RESUME = [
    f"# SUSPENDED, SUSPENDING, FAILED, PREEMPTED: all; no request: no delete; ACTIVE or another: no delete, no create: {LOOK}",
    *DELETE,
    *CREATE,
    f"# set up only if a worker is bare: {PROBE}",
    *SETUP,
    started(busy="echo 'a job is running here already' >&2; exit 0"),
]


@pytest.mark.parametrize(
    "arguments,expected",
    [
        (["create"], CREATE),
        (["setup"], SETUP),
        (["run", *JOB], [started()]),
        (["status"], [LOOK, PROBE]),
        (["logs"], [on("0", "tail -n 100 -F dit_jax/run.log")]),
        (["stop"], [on("all", "cd dit_jax && touch run.stop && pkill -TERM -P $(cat run.pid)")]),
        (["delete"], DELETE),
        (["resume", *JOB], RESUME),
        (
            ["resume", "--watch", *JOB],
            ["# every 30 s until the job has ended with 0, 1 or 2; again at most 100 times, as it is needed:", *RESUME],
        ),
    ],
    ids=lambda value: value[0] if len(value[0]) < 10 else "",
)  # fmt: skip
def test_tpu_vm(arguments, expected):
    assert dry("tpu_vm.sh", *arguments, **TPU) == expected


@pytest.mark.parametrize(
    "accelerator,image",
    [
        ("v3-256", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_image_of_a_tpu_and_spot(accelerator, image):
    line = dry("tpu_vm.sh", "create", **TPU | {"ACCELERATOR": accelerator, "SPOT": "1"})[0]
    assert line.endswith(f"--accelerator-type={accelerator} --runtime-version={image} --spot")


def test_who_the_workers_are_for_a_bucket():
    who = {"SERVICE_ACCOUNT": "dit@lab.iam.gserviceaccount.com"}
    assert " --service-account=dit@lab.iam.gserviceaccount.com" in dry("tpu_vm.sh", "create", **TPU, **who)[0]
    assert dry("gke.sh", "create", **GKE, **who)[0].endswith(
        f" --spot --custom-nodepool-arguments=--service-account=dit@lab.iam.gserviceaccount.com {PODS}"
    )


BUCKET = [*JOB[:-1], "--workdir=gs://lab-runs/xl2"]


def test_a_bucket_needs_no_share():
    no_share = CLOUD | {"ACCELERATOR": "v4-64"}
    lines = dry("tpu_vm.sh", "resume", *BUCKET, **no_share)
    assert lines[-1] == RESUME[-1].replace(TYPED, " ".join(BUCKET[1:]))
    assert not any("nfs" in line or "/mnt/share" in line for line in lines)
    assert lines[5:-1] == [line.replace(" nfs-common", "") for line in SETUP if "/mnt/share" not in line]
    assert dry("tpu_vm.sh", "run", *BUCKET, **CLOUD) == [started(" ".join(BUCKET[1:]))]


@pytest.mark.parametrize(
    "codes,runs,kept",
    [("0", 1, "0 1"), ("75", 1, "75 1"), ("1", 1, "1 1"), ("200 134 137 0", 4, "0 4"), ("200 1", 2, "1 2"),
     ("200 200 200 200", 3, "200 3"), ("200 stop", 2, "200 2")],
)  # fmt: skip
def test_a_worker_starts_again_after_a_lost_peer_until_told_to_stop(tmp_path, unchecked, codes, runs, kept):
    """The very command that goes to the workers, with another python: it ends with the codes in turn."""
    asked = TPU | {"RESTARTS": "2" if runs == 3 else "9"}
    words = shlex.split(call("tpu_vm.sh", "--dry-run", "run", *JOB, root=unchecked, **asked)[1][0])
    (line,) = [word.removeprefix("--command=") for word in words if word.startswith("--command=")]
    (tmp_path / "dit_jax" / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    for path, text in (
        ("bin/sleep", "exit 0"),
        (
            "dit_jax/.venv/bin/python",
            "read -r code <codes; sed -i 1d codes; echo ran; [ $code = stop ] && touch run.stop && exit 200; exit $code",
        ),
    ):
        (tmp_path / path).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / path).chmod(0o755)
    (tmp_path / "dit_jax" / "codes").write_text(codes.replace(" ", "\n") + "\n")
    env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", f"{line}; wait"], cwd=tmp_path, env=env, check=True)
    assert (tmp_path / "dit_jax" / "run.log").read_text().splitlines() == ["ran"] * runs
    assert (tmp_path / "dit_jax" / "run.exit").read_text() == f"{kept}\n"


# ---- after a preemption


def resumed(fakes, root, *states, workers="bare"):
    """(exit code, the verbs of the queued resource, whether the slice was set up, whether the job began) of a resume."""
    path, calls = fakes
    folder = Path(path.split(":")[0])
    (folder / "states").write_text("".join(f"{state}\n" for state in states))
    (folder / "workers").write_text(f"worker w-0 {workers} - 0 \n")
    code, _, _ = call("tpu_vm.sh", "resume", *JOB, root=root, PATH=path, POLL="0", **TPU)
    verbs = [line.split()[4] for line in calls() if line.startswith(QUEUE)]
    return code, verbs, any("make gcs" in line for line in calls()), any("dit_jax.train" in line for line in calls())


def test_resume_keeps_the_place_of_a_request_that_waits(fakes, unchecked):
    states = ("WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "broken", "ACTIVE")
    assert resumed(fakes, unchecked, *states) == (0, ["describe"] * 5, True, True)


@pytest.mark.parametrize("state", ["ACCEPTED", "CREATING", "PROVISIONING"])
def test_resume_waits_for_a_request_on_its_way(fakes, unchecked, state):
    assert resumed(fakes, unchecked, state, "ACTIVE") == (0, ["describe", "describe"], True, True)


@pytest.mark.parametrize("state", ["SUSPENDED", "SUSPENDING", "FAILED"])
def test_resume_asks_anew_where_a_request_is_over(fakes, unchecked, state):
    verbs = ["describe", "delete", "create", "describe"]
    assert resumed(fakes, unchecked, state, "ACTIVE") == (0, verbs, True, True)


def test_resume_of_a_slice_that_is_there_only_runs(fakes, unchecked):
    assert resumed(fakes, unchecked, "ACTIVE", workers="idle") == (0, ["describe"], False, True)
    assert resumed(fakes, unchecked, "ACTIVE", workers="bare")[2:] == (True, True)  # the last setup was cut short


def test_resume_asks_for_a_slice_that_was_never_asked_for(fakes, unchecked):
    assert resumed(fakes, unchecked, "none", "ACTIVE") == (0, ["describe", "create", "describe"], True, True)


def test_resume_asks_for_nothing_where_gcloud_fails(fakes, unchecked):
    assert resumed(fakes, unchecked, "broken", "ACTIVE") == (1, ["describe"], False, False)


@pytest.mark.parametrize("states", [("DELETING",) * 2, ("WAITING_FOR_RESOURCES", "FAILED"), ("CREATING", "none")])
def test_resume_ends_where_a_request_ends_while_it_waits(fakes, unchecked, states):
    assert resumed(fakes, unchecked, *states) == (1, ["describe", "describe"], False, False)
