"""The launch scripts: the exact commands that they would run, what they refuse, and how cells are handed to them."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from job import ROOT, run

from dit_jax import hardware
from dit_jax.__main__ import JOBS
from dit_jax.config import Config, EvalConfig, SampleConfig, model_config, resolve
from dit_jax.error import UsageError
from dit_jax.evaluation import protocol
from dit_jax.job.launch import load_config
from dit_jax.job.launcher import find_cell, own_arguments, spans
from dit_jax.sweep import ladder

SCRIPTS = sorted((ROOT / "launch").iterdir())
JOB = ["train", "--config=configs/imagenet256.py:DiT-XL/2", "--workdir=/mnt/share/xl2"]
TYPED = " ".join(JOB[1:])
CLOUD = {"PROJECT": "lab", "ZONE": "us-central2-b", "NAME": "xl2"}
TPU = CLOUD | {"ACCELERATOR": "v4-64", "NFS": "10.0.0.2:/share"}
GKE = CLOUD | {"CLUSTER": "pods", "TPU_TYPE": "v4-64", "CAPACITY": "spot"}


def call(script, *arguments, root=ROOT, **variables):
    """(exit code, lines on standard output with the checkout as ROOT, standard error); no variable but these is set."""
    env = {"PATH": os.environ["PATH"], **variables}
    command = ["bash", f"launch/{script}", *arguments]
    found = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    return found.returncode, found.stdout.replace(str(root), "ROOT").splitlines(), found.stderr


@pytest.fixture(scope="module")
def unchecked(tmp_path_factory):
    """A checkout whose python does not look at the job: for facts about what a script does once the job is checked (test_check.py)."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("launch", "dit_jax"):
        (root / name).symlink_to(ROOT / name)
    (root / ".venv" / "bin").mkdir(parents=True)
    python = root / ".venv" / "bin" / "python"
    python.write_text("#!/bin/bash\nexit 0\n")
    python.chmod(0o755)
    return root


@pytest.fixture
def fakes(tmp_path):
    """(PATH whose first folder holds what the scripts call, a function that returns the calls so far)."""
    folder, log = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    for name in ("gcloud", "xpk", "kubectl", "sbatch", "git", "rm", "mkdir", "tar"):
        (folder / name).write_text(f'#!/bin/bash\necho "{name} $*" >>{log}\n{STATES if name == "gcloud" else ""}')
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}", lambda: log.read_text().splitlines() if log.exists() else []


# The fake gcloud tells the next of the states that a file lists, and fails at "none" as it does where there is no such request,
# and at "broken" in another way. To a look at the workers it prints another file.
STATES = """
cd "$(dirname "$0")"
if [[ $* == *queued-resources\\ describe* ]]; then
  read -r state <states || exit 1
  sed -i 1d states
  [[ $state != none ]] || { echo "ERROR: (gcloud) NOT_FOUND: Resource 'xl2' was not found" >&2; exit 1; }
  [[ $state != broken ]] || { echo "ERROR: (gcloud) UNAVAILABLE" >&2; exit 1; }
  echo "$state"
elif [[ $* == *tpu-vm\\ describe* ]]; then
  cat node 2>/dev/null
elif [[ $* == *worker\\ \\$* ]]; then
  cat workers 2>/dev/null
fi
"""


def dry(script, *arguments, **variables):
    """What a script would run, and that it checked the job, if it starts one."""
    code, lines, err = call(script, "--dry-run", *arguments, **variables)
    assert code == 0 and all(line.startswith(("checked: ", "not checked")) for line in err.splitlines()), err
    return lines


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / "tests" / "slurm.sh"], ids=lambda path: path.name)
def test_scripts_parse_and_pass_shellcheck(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK)
    found = subprocess.run([Path(sys.executable).parent / "shellcheck", path], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


# ---- SLURM

PYTHON = {"PYTHON": "/venv/bin/python"}


def test_slurm_training_on_four_nodes():
    assert dry("slurm.sbatch", *JOB, **PYTHON, NODES="4", GPUS="8", CPUS="64", TIME="24:00:00", PARTITION="a100") == [
        "mkdir -p logs",
        "env PYTHON=/venv/bin/python sbatch --parsable --nodes=4 --ntasks-per-node=1 --cpus-per-task=64 --time=24:00:00 "
        f"--output=logs/%x-%j.out --gpus-per-node=8 --partition=a100 launch/slurm.sbatch train {TYPED}",
        f"# in the job: srun --kill-on-bad-exit=0 --cpus-per-task=64 /venv/bin/python -m dit_jax.train {TYPED}",
    ]


def test_slurm_array_after_another_job():
    job = ["evaluate", "--workdir=w", "--config.eval.guidance=(1.0,2.0)"]
    found = dry("slurm.sbatch", *job, **PYTHON, ARRAY="0-24", LIMIT="8", AFTER="12", CPUS="8", TIME="60", LOGS="/l")
    assert found == [
        "mkdir -p /l",
        "env PYTHON=/venv/bin/python sbatch --parsable --array=0-24%8 --nodes=1 --ntasks-per-node=1 --cpus-per-task=8 --time=60 "
        "--output=/l/%x-%A_%a.out --dependency=afterok:12 --kill-on-invalid-dep=yes launch/slurm.sbatch evaluate --workdir=w "
        "'--config.eval.guidance=(1.0,2.0)'",
        "# in the job: srun --kill-on-bad-exit=0 --cpus-per-task=8 /venv/bin/python -m dit_jax.evaluate --workdir=w "
        "'--config.eval.guidance=(1.0,2.0)' --cell=$SLURM_ARRAY_TASK_ID",
    ]


SRUN = """#!/bin/bash
worst=0
for code in $CODES; do CODE=$code "${@:3}"; found=$?; ((found <= worst)) || worst=$found; done
exit $worst
"""


@pytest.mark.parametrize(
    "codes,code,again",
    [
        ("0 0", 0, False), ("75 75", 75, True), ("75", 75, True), ("200 200", 200, True), ("137 200", 200, True), ("134 137", 137, True),
        ("1 200", 1, False), ("200 2", 2, False), ("1 137", 1, False), ("137", 137, False), ("1", 1, False), ("2 2", 2, False),
    ],
)  # fmt: skip
def test_slurm_starts_again_what_lost_a_task_and_not_what_failed(tmp_path, codes, code, again):
    """srun gives the largest code of its tasks; an error of one of them counts, whatever the others say of their lost peer."""
    fakes = {
        "srun": SRUN,
        "scontrol": f'#!/bin/bash\necho "$*" >>{tmp_path}/calls\n',
        "python": "#!/bin/bash\nexit $CODE\n",
    }
    for name, text in fakes.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    shutil.copy(ROOT / "launch" / "slurm.sbatch", tmp_path / "slurm_script")
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": str(len(codes.split())),
        "CODES": codes,
    }
    for restarts in ("3", "100"):
        found = subprocess.run(["bash", tmp_path / "slurm_script", *JOB], env=env | {"SLURM_RESTART_COUNT": restarts})
        assert found.returncode == code
    calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    assert calls == ["requeue 7"] * again  # and not after 100 restarts


def test_a_task_of_slurm_that_is_told_to_stop_keeps_its_own_code():
    """SIGTERM goes to the shell of a task as well as to the program, which saves and exits with 75."""
    wrapper = re.search(r"bash -c '(.*)' task", (ROOT / "launch" / "slurm.sbatch").read_text())[1]
    program = "import signal, sys, time\nsignal.signal(15, lambda *_: (time.sleep(0.3), sys.exit(75)))\n"
    program += "print(1, flush=True)\ntime.sleep(60)"
    command = ["bash", "-c", wrapper, "task", sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as task:
        task.stdout.readline()
        os.killpg(task.pid, signal.SIGTERM)
        assert task.wait(20) == 75


def test_slurm_runs_a_copy_of_the_script_alone(tmp_path):
    """As it lies on the node: `slurm_script` in a folder without the functions, which only its submission needs."""
    script, srun = tmp_path / "slurm_script", tmp_path / "srun"
    shutil.copy(ROOT / "launch" / "slurm.sbatch", script)
    srun.write_text('#!/bin/bash\necho "$*"\n')
    srun.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    for nodes, job, code, out, err in (
        (
            "1",
            "evaluate",
            0,
            "--kill-on-bad-exit=0 --cpus-per-task=1 python -m dit_jax.evaluate --workdir=w --cell=3\n",
            "",
        ),
        ("2", "sweep", 2, "", "error: NODES, TASKS: found 2, 1; expected 1: sweep is one process\n"),
    ):
        command = ["bash", script, job, "--workdir=w"]
        found = subprocess.run(command, env=env | {"SLURM_JOB_NUM_NODES": nodes}, capture_output=True, text=True)
        assert (found.returncode, found.stdout, found.stderr) == (code, out, err)


# ---- TPU VMs

VM = "gcloud compute tpus tpu-vm"
QUEUE = "gcloud compute tpus queued-resources"
HERE = "xl2 --project=lab --zone=us-central2-b"
LOOK = f"{QUEUE} describe {HERE} '--format=value(state.state)'"
CREATE = [
    f"{QUEUE} create {HERE} --node-id=xl2 --accelerator-type=v4-64 --runtime-version=tpu-ubuntu2204-base",
    f"# every 30 s until ACTIVE: {LOOK}",
]


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
    "workdir", [["--workdir=/data/xl2"], ["--workdir", "runs/xl2"], ["-workdir=gs://b-1/x", "-workdir=x"]]
)
@pytest.mark.parametrize("verb", [["run"], ["resume"], ["resume", "--watch"]])
def test_a_folder_of_one_worker_is_refused(fakes, workdir, verb):
    path, calls = fakes
    code, out, err = call("tpu_vm.sh", *verb, "scaling", *workdir, PATH=path, **CLOUD, ACCELERATOR="v4-8")
    folder = workdir[-1].rpartition("=")[2]
    assert (code, out, err) == (2, [], f"error: --workdir: found {folder}{NO_SHARE}\n")
    assert calls() == []


@pytest.mark.parametrize("script,verb", [("tpu_vm.sh", ["run"]), ("gke.sh", ["run"]), ("slurm.sbatch", [])])
@pytest.mark.parametrize("workdir", ["s3://lab/xl2", "gs://", "gs://Lab/xl2", "gs:/lab/xl2", "https://lab/xl2"])
def test_what_is_neither_a_disk_nor_a_bucket_is_refused(fakes, script, verb, workdir):
    path, calls = fakes
    found = call(script, *verb, "scaling", f"--workdir={workdir}", PATH=path, **ONE_NODE, **TPU | GKE | ONE_HOST)
    message = (
        f"error: --workdir: found {workdir}, expected a folder on a disk or in a bucket, such as gs://BUCKET/FOLDER; "
    )
    assert found == (2, [], f"{message}other stores are not supported\n") and calls() == []


# ---- GKE

PODS = "--cluster=pods --project=lab --zone=us-central2-b"


@pytest.mark.parametrize(
    "arguments,expected",
    [
        (["create"], [f"xpk cluster create --tpu-type=v4-64 --num-slices=1 --spot {PODS}"]),
        (
            ["share"],
            [
                "xpk storage create pods-share --type=gcpfilestore --vol=share --size=1024 --tier=BASIC_HDD "
                f"--mount-point=/mnt/share --readonly=false --auto-mount=true {PODS}"
            ],
        ),
        (
            ["run", *JOB],
            [
                "rm -rf ROOT/build/gke ROOT/build/gke.tar",
                "mkdir -p ROOT/build/gke",
                "git -C ROOT archive --output=ROOT/build/gke.tar HEAD",
                "tar -xf ROOT/build/gke.tar -C ROOT/build/gke",
                "xpk workload create --workload=xl2 --tpu-type=v4-64 --num-slices=1 --base-docker-image=python:3.11 "
                "--script-dir=ROOT/build/gke --max-restarts=100 --restart-on-exit-codes=75,200 "
                "--termination-grace-period-seconds=120 '--command=make gcs PYTHON=python3 && .venv/bin/pip install --quiet "
                "--require-hashes --no-deps -r requirements-tpu.lock && exec .venv/bin/python -m "
                f"dit_jax.train {TYPED}' {PODS}",
            ],
        ),
        (
            ["logs"],
            [
                "gcloud container clusters get-credentials pods --project=lab --region=us-central2",
                "kubectl logs --follow --tail=100 "
                "--selector=jobset.sigs.k8s.io/jobset-name=xl2,batch.kubernetes.io/job-completion-index=0",
            ],
        ),
        (
            ["status"],
            [
                f"xpk workload list {PODS}",
                "gcloud container clusters get-credentials pods --project=lab --region=us-central2",
                "kubectl get pods --selector=jobset.sigs.k8s.io/jobset-name=xl2 "
                "'--output=custom-columns=HOST:.metadata.name,JOB:.status.phase,EXIT:.status.containerStatuses[0].state.terminated.exitCode'",
                "kubectl logs --tail=1 --prefix --selector=jobset.sigs.k8s.io/jobset-name=xl2",
            ],
        ),
        (["stop"], [f"xpk workload delete --workload=xl2 --force {PODS}"]),
        (["delete"], [f"xpk cluster delete --force {PODS}"]),
    ],
    ids=lambda value: value[0] if len(value[0]) < 10 else "",
)
def test_gke(arguments, expected):
    assert dry("gke.sh", *arguments, **GKE) == expected
    if arguments == ["status"]:
        assert dry("gke.sh", *arguments, **GKE | {"NAME": ""}) == expected[:1]


# ---- what is refused


@pytest.mark.parametrize(
    "script,arguments,variables,message",
    [
        ("slurm.sbatch", JOB, {"NODES": "2"}, "TIME CPUS: not set; the head of launch/slurm.sbatch says what they are"),
        ("slurm.sbatch", [], {}, "found no job, expected a job such as train, and its flags"),
        ("slurm.sbatch", JOB, {"ARRAY": "0-3", "TASKS": "2"}, "NODES, TASKS: found 1, 2; expected 1: a cell is one process"),
        ("tpu_vm.sh", ["resume", *JOB], CLOUD, "ACCELERATOR: not set; the head of launch/tpu_vm.sh says what they are"),
        ("tpu_vm.sh", ["resume", "--watch"], TPU, "found no job, expected a job such as train, and its flags"),
        ("tpu_vm.sh", ["run"], CLOUD, "found no job, expected a job such as train, and its flags"),
        ("tpu_vm.sh", ["destroy"], CLOUD, "found destroy, expected create, setup, run, status, logs, stop, resume or delete"),
        ("gke.sh", ["run", *JOB], CLOUD, "CLUSTER TPU_TYPE: not set; the head of launch/gke.sh says what they are"),
        ("gke.sh", ["create"], GKE | {"CAPACITY": "free"}, "CAPACITY: found free, expected on-demand, spot or reservation=ID"),
        ("gke.sh", [], GKE, "found no verb, expected create, share, run, status, logs, stop or delete"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("flag", [[], ["--dry-run"]])
def test_refusals(fakes, script, arguments, variables, message, flag):
    path, calls = fakes
    assert call(script, *flag, *arguments, PATH=path, **variables) == (2, [], f"error: {message}\n")
    assert calls() == []


@pytest.mark.parametrize(
    "script,arguments,variables",
    [("tpu_vm.sh", [verb], TPU) for verb in ("create", "setup", "status", "logs", "stop", "delete")]
    + [("tpu_vm.sh", ["run", *JOB], TPU), pytest.param("tpu_vm.sh", ["resume", *JOB], TPU, marks=pytest.mark.slow)]
    + [("gke.sh", [verb], GKE) for verb in ("create", "share", "status", "logs", "stop", "delete")]
    + [("gke.sh", ["run", *JOB], GKE), ("slurm.sbatch", JOB, {"NODES": "1", "GPUS": "8", "CPUS": "1", "TIME": "1"})],
)  # fmt: skip
def test_a_dry_run_runs_nothing_wherever_it_is_asked_for(fakes, unchecked, script, arguments, variables):
    path, calls = fakes
    expected = call(script, "--dry-run", *arguments, root=unchecked, **variables)
    assert expected[0] == 0 and expected[1]
    for place in {1, len(arguments)}:
        asked = [*arguments[:place], "--dry-run", *arguments[place:]]
        assert call(script, *asked, root=unchecked, PATH=path, **variables) == expected
    assert calls() == []
    if arguments in (["stop"], ["delete"]):  # the fakes do stand where the real ones would
        assert call(script, *arguments, PATH=path, **variables)[0] == 0 and len(calls()) == 1


@pytest.mark.parametrize(
    "script,verb",
    [("tpu_vm.sh", verb) for verb in ("create", "setup", "status", "logs", "stop", "delete")]
    + [("gke.sh", verb) for verb in ("create", "share", "status", "logs", "stop", "delete")],
)
def test_words_after_a_verb_that_takes_none_are_refused(fakes, script, verb):
    path, calls = fakes
    for words in (["everything", "extra"], ["--dryrun"]):
        found = call(script, verb, *words, PATH=path, **TPU | GKE)
        assert found == (2, [], f"error: {verb}: found {' '.join(words)} after it, expected nothing\n")
    assert calls() == []


NO_SHARE = ", but no NFS; give gs://BUCKET/..., or set NFS to HOST:/EXPORT of a share and give a path in /mnt/share"
ONE_NODE = {"CPUS": "8", "TIME": "60", "NODES": "1"}
ONE_HOST = {"ACCELERATOR": "v4-8", "TPU_TYPE": "v4-8"}
CALLS = [
    ("slurm.sbatch", [], ONE_NODE),
    ("tpu_vm.sh", ["run"], TPU),
    ("tpu_vm.sh", ["resume"], TPU),
    ("gke.sh", ["run"], GKE),
]


@pytest.mark.parametrize("script,verb,variables", CALLS)
def test_a_job_that_is_not_there_is_refused(fakes, script, verb, variables):
    path, calls = fakes
    found = call(script, *verb, "evalute", "--workdir=w", PATH=path, **variables)
    assert found == (2, [], f"error: found job evalute, expected {', '.join(sorted(JOBS))}\n")
    assert call(script, *verb, "mesh", PATH=path, **variables)[0] == 2  # a module, not a job
    assert calls() == []


@pytest.mark.parametrize(
    "job,words", [("sample", ["--out=gs://lab/a.npz"]), ("evaluate", []), ("encode", ["--out=gs://lab/latents"])]
)
def test_these_run_on_many_hosts_and_again_after_a_kill(job, words):
    words = (
        ["--workdir=gs://lab/run"] * (job != "encode")
        + ["--config=configs/imagenet256.py", "--autoencoder=gs://lab/ae"] * (job == "encode")
        + words
    )
    assert f"dit_jax.{job} {words[0]}" in dry("slurm.sbatch", job, *words, **ONE_NODE | {"NODES": "4"})[-1]
    assert (
        f"in $(seq 101); do .venv/bin/python -m dit_jax.{job} {words[0]}"
        in dry("tpu_vm.sh", "run", job, *words, **TPU)[-1]
    )
    assert f"dit_jax.{job} {words[0]}" in dry("gke.sh", "run", job, *words, **GKE)[-1]


def test_images_of_many_hosts_go_to_a_place_that_all_see(fakes):
    message = f"error: --out: found a.npz{NO_SHARE}"
    code, out, err = call(
        "tpu_vm.sh",
        "run",
        "sample",
        "--workdir=gs://lab/run",
        "--out=a.npz",
        PATH=fakes[0],
        **CLOUD,
        ACCELERATOR="v4-64",
    )
    assert (code, out, err.splitlines()[-1]) == (2, [], message)


@pytest.mark.parametrize("job", ["convert", "sweep", "scaling"])
def test_other_jobs_run_on_one_host(fakes, job):
    path, calls = fakes
    for nodes, tasks in (("4", "1"), ("1", "8")):
        many = ONE_NODE | {"NODES": nodes, "TASKS": tasks, "PATH": path}
        message = f"error: NODES, TASKS: found {nodes}, {tasks}; expected 1: {job} is one process\n"
        assert call("slurm.sbatch", job, "--workdir=w", **many) == (2, [], message)
    for verb in ("run", "resume"):
        message = f"error: ACCELERATOR: found v4-64, expected one host, such as v4-8: {job} runs on one\n"
        assert call("tpu_vm.sh", verb, job, PATH=path, **TPU) == (2, [], message)
    message = f"error: TPU_TYPE: found v4-64, expected one host, such as v4-8 or v6e-4: {job} runs on one\n"
    assert call("gke.sh", "run", job, PATH=path, **GKE) == (2, [], message)
    assert calls() == []
    words = {
        "sweep": ["--workdir=gs://lab/w", "--config=configs/digits_isoflop.py"],
        "convert": ["--source=dit", "--out=gs://lab/w", "--weights=w.pt"],
        "scaling": ["fit", "gs://lab/w"],
    }[job]
    for script, verb, variables in (
        ("slurm.sbatch", [], ONE_NODE),
        ("tpu_vm.sh", ["run"], TPU),
        ("gke.sh", ["run"], GKE),
    ):
        assert f"dit_jax.{job} {words[0]}" in dry(script, *verb, job, *words, **variables | ONE_HOST)[-1]


def test_types_of_tpu_that_xpk_does_not_know_are_refused_before_anything_runs(fakes):
    """Those of the table that xpk 1.16.0 knows are taken; `make xpk` asks xpk itself."""
    path, calls = fakes
    for name in [name for name in hardware.names() if name.startswith("v")]:
        code, _, err = call("gke.sh", "--dry-run", "create", **GKE | {"TPU_TYPE": name})
        known = name.startswith(("v4-", "v5p-", "v6e-", "v5litepod-")) and name not in ("v5litepod-1", "v5litepod-4")
        assert code == (0 if known else 2), name
        assert known or err.startswith(f"error: TPU_TYPE: found {name}, expected a name of xpk, such as v4-64"), err
    assert call("gke.sh", "run", *JOB, PATH=path, **GKE | {"TPU_TYPE": "v5e-8"})[0] == 2 and calls() == []


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


def test_the_host_of_a_job_of_one_must_be_known(fakes):
    message = "error: ACCELERATOR: not set; the head of launch/tpu_vm.sh says what they are\n"
    assert call("tpu_vm.sh", "run", "sweep", PATH=fakes[0], **CLOUD) == (2, [], message)


def one_host(script, names):
    """Those of the names that the script takes a job of one host to, by its own function."""
    function = re.search(r"^fits_slice\(\).*?^}$", (ROOT / "launch" / script).read_text(), re.MULTILINE | re.DOTALL)[0]
    tried = 'for TPU_TYPE; do ACCELERATOR=$TPU_TYPE; if (fits_slice sweep); then echo "$TPU_TYPE"; fi; done'
    command = f"fail() {{ exit 2; }}; need() {{ :; }}; many_hosts() {{ return 1; }}; {function}; {tried}"
    found = subprocess.run(["bash", "-c", command, "bash", *names], capture_output=True, text=True, check=True)
    return found.stdout.split()


def test_slices_of_one_host_are_those_of_the_table():
    """Of a host of up to 8 chips on Cloud TPU; of hosts of 4 chips on GKE, where xpk makes two of v6e-8."""
    slices = [hardware.topology(name) for name in hardware.names() if re.match(r"v\d\D", name)]
    one = {script: one_host(script, [found.name for found in slices]) for script in ("tpu_vm.sh", "gke.sh")}
    assert one["tpu_vm.sh"] == [found.name for found in slices if found.hosts == 1]
    assert one["gke.sh"] == [
        found.name for found in slices if found.chips <= 4 and found.generation not in ("v2", "v3")
    ]


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


# ---- cells


def test_a_cell_is_named_or_numbered():
    assert [find_cell(("a", "b"), asked) for asked in ("b", "0", "1")] == [1, 0, 1]
    with pytest.raises(UsageError, match="--cell: found 2, expected 0 to 1, or a name"):
        find_cell(("a", "b"), "2")
    with pytest.raises(UsageError, match=r"--cell: found 'guidance-1'.*did you mean 'guidance-1.5'"):
        find_cell(("guidance-1.5", "loss"), "guidance-1")


def test_a_cells_command_is_the_jobs_own():
    kept = ["--config=x.py", "--workdir", "w"]
    assert own_arguments([*kept[:1], "--launcher=print", *kept[1:], "--cell", "3", "-launcher", "slurm"]) == kept
    command = ["--at", "all", *kept, "--at=2"]
    assert own_arguments(command, ["at"]) == kept and own_arguments(command) == command
    assert (spans([0, 1, 2, 5, 7, 8]), spans([4])) == ("0-2,5,7-8", "4")


def test_parts_of_an_evaluation_are_the_whole():
    grid = EvalConfig(samples=10, guidance=(1, 1.5), weights=("ema", "params"))
    cfg = Config(model=model_config("DiT-S/8"), sample=SampleConfig(sampler="ddim", steps=5), eval=grid)
    parts = protocol.cells(cfg)
    names = [f"{weights}-ddim-5-guidance-{scale}" for weights in ("ema", "params") for scale in (1.0, 1.5)]
    assert list(parts) == ["loss", *names]
    assert [protocol.samplings(parts[name])[0] for name in names] == protocol.samplings(cfg)
    assert all(len(protocol.samplings(parts[name])) == 1 and not parts[name].eval.loss for name in names)
    assert parts["loss"].eval.samples == 0 and parts["loss"].eval.weights == ("ema", "params")


@pytest.mark.slow
def test_a_sweep_prints_its_cells_and_one_of_them_runs_alone(data_dir, cache_dir, tmp_path):
    config, workdir = tmp_path / "ladder.py", tmp_path / "demo"
    config.write_text(
        f"import sys\nsys.path.append({str(ROOT / 'tests')!r})\nfrom test_sweep import small\n\nget_config = small\n"
    )
    flags = [f"--config={config}", f"--workdir={workdir}", "--config.eval.samples=0"]
    code, out, err = run("sweep", *flags, "--launcher=print", cache_dir=cache_dir, devices=1)
    assert code == 0 and err.startswith("after them: ") and " ".join(flags) in err
    lines = out.splitlines()
    assert len(lines) == 10 and all(re.search(r"-m dit_jax\.sweep .* --cell=C\S+-w\d+-d\d+$", line) for line in lines)
    name = lines[-1].split("--cell=")[1]
    code, _, err = run("sweep", *flags, "--cell=9", cache_dir=cache_dir, devices=1)
    assert code == 0 and re.search(rf"^{name}  loss \d\.\d+ \+- 0\.\d+$", err, re.MULTILINE)
    assert os.listdir(workdir / "cells") == [name]
    left = run("sweep", *flags, "--launcher=print", cache_dir=cache_dir, devices=1)[1].splitlines()
    assert left == lines[:-1]


def test_a_sweep_that_slurm_would_not_take_writes_nothing(monkeypatch, tmp_path):
    """Neither without the script's variables, nor where there is no SLURM."""
    for name in ("TIME", "CPUS"):
        monkeypatch.delenv(name, raising=False)
    cfg = load_config(str(ROOT / "configs" / "digits_isoflop.py"))
    workdir = tmp_path / "demo"
    with pytest.raises(UsageError, match="--launcher=slurm: TIME CPUS: not set"):
        ladder.run_apart(resolve(cfg), str(workdir), "slurm", None)
    for name, value in {"TIME": "60", "CPUS": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="sbatch: not found"):
        ladder.run_apart(resolve(cfg), str(workdir), "slurm", None)
    assert not workdir.exists()


def test_slurm_needs_its_variables(uninterrupted, cache_dir):
    grid = [f"--workdir={uninterrupted}", "--config.eval.guidance=(1.0,2.0)", "--launcher=slurm"]
    code, out, err = run("evaluate", *grid, cache_dir=cache_dir, devices=1, environment={"TIME": "", "CPUS": ""})
    message = "error: --launcher=slurm: TIME CPUS: not set; the head of launch/slurm.sbatch says what they are\n"
    assert (code, out, err) == (2, "", message)
