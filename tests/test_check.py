"""`JOB --check`: refuses what the job would refuse on the named slice, starts nothing, and says what it could not look at."""

import json
import os
import subprocess
import sys

import pytest
from job import ROOT, TINY, run

from dit_jax.config import Config, ModelConfig, to_dict

DIGITS = ["--config=configs/digits.py", "--workdir=/mnt/away/run"]
XL = [
    "--config=configs/imagenet256.py:DiT-XL/2,v4-64",
    "--workdir=/mnt/away/run",
    "--config.data.latents=/mnt/away/latents",
]
AWAY = "not checked, as they are not on this machine: "


def check(job, *arguments, cache_dir):
    code, out, err = run(job, "--check", *arguments, cache_dir=cache_dir)
    assert out == "" and code in (0, 2), err
    return code, err.splitlines()


@pytest.mark.parametrize(
    "job, arguments, said",
    [
        ("train", DIGITS, ["checked: flags, config", f"{AWAY}--workdir=/mnt/away/run"]),
        (
            "train",
            XL,
            [
                "checked: flags, config, slice v4-64 (32 devices, 8 hosts)",
                f"{AWAY}--workdir=/mnt/away/run, data.latents=/mnt/away/latents",
            ],
        ),
        (
            "train",
            [*DIGITS, "--slice=2x4"],
            ["checked: flags, config, slice 2x4 (8 devices, 2 hosts)", f"{AWAY}--workdir=/mnt/away/run"],
        ),
        (
            "train",
            [*DIGITS, "--slice=2xv4-64", "--config.mesh.fsdp=32"],
            ["checked: flags, config, slice 2xv4-64 (64 devices, 16 hosts)", f"{AWAY}--workdir=/mnt/away/run"],
        ),
        (
            "evaluate",
            ["--workdir=/mnt/away/run", "--slice=v4-8"],
            [
                "checked: flags, slice v4-8 (4 devices, 1 host)",
                f"{AWAY}--workdir=/mnt/away/run, and with the run what depends on its model",
            ],
        ),
        (
            "sweep",
            ["--config=configs/digits_isoflop.py", "--workdir=/mnt/away/run"],
            ["checked: flags, config", f"{AWAY}--workdir=/mnt/away/run"],
        ),
        (
            "train",
            ["--config=configs/scenes.py", "--workdir=/mnt/away/run", "--config.sample.guide=/mnt/away/weak@9"]
            + [f"--config.eval.{key}=/mnt/away/{key}" for key in ("clip", "captions")],
            [
                "checked: flags, config",
                f"{AWAY}--workdir=/mnt/away/run, eval.clip=/mnt/away/clip, eval.captions=/mnt/away/captions, "
                "sample.guide=/mnt/away/weak",
            ],
        ),
        ("bench", [], ["checked: flags"]),
    ],
)
def test_what_is_taken(job, arguments, said, cache_dir):
    assert check(job, *arguments, cache_dir=cache_dir) == (0, said)
    assert not os.path.exists("/mnt/away")


@pytest.mark.parametrize(
    "job, arguments, message",
    [
        ("train", [*DIGITS, "--slice=v9-8"], "error: topology: found 'v9-8', expected a slice such as"),
        (
            "train",
            [*DIGITS, "--slice=4x8", "--config.mesh.fsdp=7"],
            "error: mesh: found data=-1, fsdp=7, tensor=1, expected axes",
        ),
        (
            "train",
            [*DIGITS, "--slice=2xv4-64", "--config.mesh.fsdp=64"],
            "error: mesh.data: found 1, expected a multiple of the 2 slices, which only this axis may cross",
        ),
        (
            "train",
            [*DIGITS, "--slice=4x8", "--config.train.batch_size=48"],
            "error: train.batch_size: found 48, expected a multiple of 32",
        ),
        (
            "train",
            [*DIGITS, "--slice=4x1", "--config.mesh.tensor=2"],
            "error: mesh.tensor: found 2, expected a divisor of the 1 devices of one host",
        ),
        (
            "train",
            [*DIGITS, "--config.sample.sampler=huen"],
            "error: sample.sampler: found 'huen'; did you mean 'heun'?",
        ),
        ("train", [*DIGITS, "--stepz=3"], "error: --stepz: unknown flag"),
        (
            "evaluate",
            ["--workdir=/mnt/away/run", "--config.eval.sampels=1"],
            "error: --config.eval.sampels: unknown config key 'sampels'",
        ),
        ("bench", ["--slice=2x8"], "error: --slice: found 2x8 of 2 hosts, expected one host: bench runs on one"),
    ],
)
def test_what_is_refused(job, arguments, message, cache_dir):
    code, (line,) = check(job, *arguments, cache_dir=cache_dir)
    assert code == 2 and line.startswith(message), line


def test_a_run_that_is_here_is_checked_too(uninterrupted, cache_dir):
    own = [f"--workdir={uninterrupted}", "--config=configs/digits.py", *TINY]
    assert check("train", *own, "--config.train.steps=60", cache_dir=cache_dir) == (0, ["checked: flags, config"])
    code, (_, line) = check("train", *own, "--config.optim.learning_rate=1.0", cache_dir=cache_dir)
    assert code == 2 and "optim.learning_rate: the folder has" in line
    for job in ("sample", "evaluate"):
        code, lines = check(job, f"--workdir={uninterrupted}", "--slice=1x8", cache_dir=cache_dir)
        assert (code, lines[0]) == (0, "checked: flags, config, slice 1x8 (8 devices, 1 host)")
    code, (line,) = check("sample", f"--workdir={uninterrupted}", "--out=grid.png", cache_dir=cache_dir)
    assert code == 2 and line.startswith("error: --out: found 'grid.png', expected a name that ends in .npz")


def test_prompts_that_are_elsewhere_are_not_checked(tmp_path, cache_dir):
    """As all paths are; what can be told without the file still is, and the job itself needs it."""
    model = ModelConfig(1, 8, 2, input_size=8, channels=1, classes=0, text="bytes", conditioning="in_context")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"config": to_dict(Config(model=model))}))
    command = [f"--workdir={tmp_path / 'run'}", f"--out={tmp_path}/a.npz", "--slice=4x2"]
    away = "--prompts=/mnt/away/prompts.txt"
    code, lines = check("sample", *command, away, cache_dir=cache_dir)
    expected = f"{AWAY}--out={tmp_path}/a.npz, {away}"
    assert (code, lines) == (0, ["checked: flags, config, slice 4x2 (8 devices, 4 hosts)", expected])
    for flags, message in (
        (["--prompts=/mnt/away/prompts.md"], "found '/mnt/away/prompts.md', expected a file that ends in .txt"),
        ([away, "--prompt=a red three"], "--prompt, --prompts: found both, expected one of them"),
        ([], "--prompt, --prompts: found neither"),
    ):
        code, (line,) = check("sample", *command, *flags, cache_dir=cache_dir)
        assert code == 2 and message in line
    code, _, err = run("sample", *command[:2], away, cache_dir=cache_dir)
    assert code == 2 and "--prompts: /mnt/away/prompts.txt: cannot read it" in err and err.count("\n") == 1


@pytest.mark.parametrize("script", ["slurm.sbatch", "tpu_vm.sh", "gke.sh"])
def test_the_launchers_refuse_what_the_job_refuses(script, tmp_path):
    (tmp_path / "python3").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    (tmp_path / "python3").chmod(0o755)
    places = {"NODES": "4", "GPUS": "a100:8", "CPUS": "1", "TIME": "1", "PYTHON": "python3"}
    places |= {"PROJECT": "p", "ZONE": "z", "NAME": "n", "ACCELERATOR": "v4-64", "TPU_TYPE": "v4-64", "CLUSTER": "c"}
    job = ["train", "--config=configs/imagenet256.py:DiT-S/2", "--workdir=/mnt/away/run", "--config.mesh.fsdp=5"]
    command = ["bash", f"launch/{script}", *(["run"] if script != "slurm.sbatch" else []), *job, "--dry-run"]
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **places}
    found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith(
        "error: mesh: found data=-1, fsdp=5, tensor=1, expected axes that multiply to 32 devices"
    )
