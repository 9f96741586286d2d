"""SIGTERM: a loop looks at it, a program under way is given up after a while, and a second signal ends at once."""

import os
import signal
import subprocess
import sys
import time

import pytest
from job import ROOT

from dit_jax.job.launch import stop_flag

# A call that runs none of Python's handlers, as a program on a device: minutes of hashing with the lock of Python released.
BLOCKED = """
import hashlib, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from dit_jax.job.launch import stop_flag
with stop_flag({patience}) as stop:
    print("there", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


@pytest.mark.parametrize(
    "patience, signals",
    [
        (0.3, [signal.SIGTERM]),
        (0.3, [signal.SIGINT]),
        (None, [signal.SIGTERM] * 2),
        (60, [signal.SIGTERM, signal.SIGINT]),
    ],
)
def test_a_program_under_way_does_not_outlast_patience_or_a_second_signal(patience, signals):
    command = [sys.executable, "-c", BLOCKED.format(patience=patience)]
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert job.stdout.readline() == "there\n"
        time.sleep(0.3)  # into the call
        for number in signals:
            job.send_signal(number)
            time.sleep(0.1)
        _, err = job.communicate(timeout=20)
    finally:
        job.kill()
    assert (job.returncode, err.count("\n")) == (75, 1)
    assert err.startswith("interrupted: what was under way is given up; the same command goes on from what is saved")


def test_a_loop_that_looks_in_time_ends_by_itself():
    before = signal.getsignal(signal.SIGTERM)
    with stop_flag(0.2) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        while not stop:
            time.sleep(0.001)
    time.sleep(0.4)  # nobody is left to end this process
    assert stop == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is before
    with stop_flag(0.2) as stop:
        time.sleep(0.4)
    assert not stop
