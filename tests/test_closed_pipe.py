"""`| head`: a reader that has gone is no error of the command, in every job and in the wing."""

import os
import subprocess
import sys

import pytest
from job import ROOT

RUNS = "tests/data/digits_isoflop.csv"
COMMANDS = [
    ["dit_jax"],
    ["dit_jax.train", "--help"],
    ["dit_jax.scaling", "--help"],
    ["dit_jax.scaling", "fit", RUNS, "--method=isoflop", "--resamples=2"],
    pytest.param(["dit_jax.preflight", "--config=configs/digits.py", "--topology=t4x1"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:2]))
def test_a_closed_pipe_ends_with_0_and_says_nothing(command):
    # standard output; and standard error too, as in 2>&1 | head, for one command of each front end: that of jobs and that of the wing
    for streams in (1, 2) if "--help" in command else (1,):
        reader, writer = os.pipe()
        os.close(reader)
        err = writer if streams == 2 else subprocess.PIPE
        found = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, stdout=writer, stderr=err)
        os.close(writer)
        said = [
            line for line in (found.stderr or b"").splitlines() if b", hosts: " not in line
        ]  # what preflight works on
        assert found.returncode == 0 and not said, found.stderr


def test_a_wrong_command_is_still_2():
    reader, writer = os.pipe()
    os.close(reader)
    found = subprocess.run([sys.executable, "-m", "dit_jax.train"], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert found.returncode == 2 and found.stderr.startswith(b"error: --config: not given")
