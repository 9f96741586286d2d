"""The progress line and the scalars' file."""

import json
import subprocess
import sys
import threading
import time

import pytest
from job import ROOT

from dit_jax import error, hardware, log
from dit_jax.error import UsageError
from dit_jax.workdir import scalars


def test_progress_reports_rates_and_eta(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
    report = log.progress(400, images_per_step=32, flops_until=lambda step: 1e9 * step, peak=1e11)
    now[0] += 25.0
    assert report(1, {"loss": 2.0}) == {}
    assert "25.0 s with compilation" in capsys.readouterr().err
    now[0] += 9.9
    rates = report(100, {"loss": 0.5})
    assert rates == {"images_per_second": pytest.approx(320.0), "mfu": pytest.approx(0.1)}
    line = capsys.readouterr().err
    for part in ("100/400", "loss 0.5000", "320 images/s", "MFU 10.0%", "ETA 0:30"):
        assert part in line


def test_a_long_wait_says_so_until_it_ends(capsys):
    before = {*threading.enumerate()}
    with log.waiting("compiling", every=0.01):
        time.sleep(0.1)
    said = capsys.readouterr().err
    assert said.startswith("  compiling: 0:00 so far\n") and {*threading.enumerate()} <= before
    time.sleep(0.03)
    assert capsys.readouterr().err == ""


def test_lines_have_a_level_and_a_process(capsys):
    def err():
        return capsys.readouterr().err

    log.say("one")
    log.notice("two")
    log.warn("three")
    log.complain("four [/x] 100%d")
    assert err() == "one\nnotice: two\nwarning: three\nerror: four [/x] 100%d\n"
    try:
        log.name_process(3)
        log.LOGGER.setLevel("WARNING")
        log.say("five")
        assert error.report(UsageError("six")) == error.USAGE
        assert err() == "[process 3] error: six\n"
    finally:
        log.name_process(0)
        log.LOGGER.setLevel("INFO")
    log.say("seven")
    assert err() == "seven\n"


NOTEBOOK = """
import logging
logging.basicConfig()
import absl.logging, importlib, dit_jax.log
importlib.reload(dit_jax.log)
dit_jax.log.say("once")
"""


def test_other_loggers_do_not_double_lines():
    done = subprocess.run([sys.executable, "-c", NOTEBOOK], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "once\n")


def test_a_table_is_aligned_text_and_takes_any_word(capsys):
    log.table(("name", "value"), [("a", "1"), ("[b] longer", "23,000")], title="A table")
    assert capsys.readouterr().out == "A table\n  name         value\n  a                1\n  [b] longer  23,000\n\n"


def test_a_bar_gives_the_eta_of_what_is_done(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
    with log.bar("ladder", 40.0) as move:
        assert move(0.0) == "ETA ?"
        now[0] += 30.0
        assert move(10.0) == "ETA 1:30"


def test_clock():
    assert [log.clock(s) for s in (0, 59.6, 61, 3661)] == ["0:00", "1:00", "1:01", "1:01:01"]


def test_lines_beyond_a_step_are_forgotten_and_a_cut_one_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in (1, 2, 3)) + '{"step": 4, "lo')
    assert [line["step"] for line in scalars.read_lines(str(path))] == [1, 2, 3]
    scalars.drop_after(str(path), 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    with pytest.raises(UsageError, match=r"records.jsonl:2: found 'rubbish', expected a JSON object"):
        scalars.read_lines(str(path))


def test_devices_are_found_by_their_longest_name():
    assert hardware.find("TPU v5 lite").kind == "tpu-v5e"
    assert hardware.find("TPU v5").kind == "tpu-v5p"
    assert hardware.find("NVIDIA H200").peak_flops == 989e12
    assert hardware.find("NVIDIA H100 PCIe").kind == "h100-pcie"
    assert hardware.find("cpu") is None
