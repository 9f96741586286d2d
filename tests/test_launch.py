"""The launch scripts: what all of them refuse and say, the commands of GKE, and how cells are handed to them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from job import ROOT, run
from launched import CLOUD, GKE, JOB, NO_SHARE, ONE_HOST, ONE_NODE, PODS, TPU, TYPED, call, dry, fakes_in, unchecked_in

from dit_jax import hardware
from dit_jax.__main__ import JOBS
from dit_jax.config import Config, EvalConfig, SampleConfig, model_config
from dit_jax.error import UsageError
from dit_jax.evaluation import protocol
from dit_jax.job.launcher import find_cell, own_arguments, spans

SCRIPTS = sorted((ROOT / "launch").iterdir())


@pytest.fixture(scope="module")
def unchecked(tmp_path_factory):
    return unchecked_in(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def fakes(tmp_path):
    return fakes_in(tmp_path)


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / "tests" / "slurm.sh"], ids=lambda path: path.name)
def test_scripts_parse_and_pass_shellcheck(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK)
    found = subprocess.run([Path(sys.executable).parent / "shellcheck", path], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


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
        f"import sys\nsys.path += {[str(ROOT / 'tests'), str(ROOT / 'tests/jobs')]!r}\nfrom test_sweep import small\n\nget_config = small\n"
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
