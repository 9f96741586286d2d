"""The door to paths: whole or not at all, one of several processes wins, and no lock outlives its process."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from dit_jax import files
from dit_jax.error import JobError, UsageError
from dit_jax.files import out
from dit_jax.workdir import records, scalars

ROOT = Path(__file__).parent.parent


def left(folder):
    return [name for name in os.listdir(folder) if ".tmp" in name]


def create(path, content, barrier, won):
    barrier.wait()
    if files.replace(path, content, None):
        won.put(content)


def test_of_several_processes_one_creates(tmp_path):
    context, path = multiprocessing.get_context("spawn"), str(tmp_path / "a")
    barrier, won = context.Barrier(3), context.Queue()
    contents = [bytes([65 + i]) * 100_000 for i in range(3)]
    makers = [context.Process(target=create, args=(path, content, barrier, won)) for content in contents]
    for maker in makers:
        maker.start()
    winner = won.get(timeout=60)
    for maker in makers:
        maker.join(60)
        assert maker.exitcode == 0
    assert won.empty() and Path(path).read_bytes() == winner and not left(tmp_path)


def test_a_changed_file_is_not_replaced(tmp_path):
    path = tmp_path / "a"
    assert files.replace(str(path), "one", None)
    assert not files.replace(str(path), "two", None) and not files.replace(str(path), "two", b"other")
    assert path.read_text() == "one"
    assert files.replace(str(path), "two", b"one") and path.read_text() == "two"
    path.unlink()
    assert not files.replace(str(path), "three", b"two") and not path.exists()


def test_no_update_is_lost(tmp_path):
    path = str(tmp_path / "a")

    def count():
        for _ in range(20):
            files.update(path, lambda old: str(int(old or b"0") + 1))

    threads = [threading.Thread(target=count) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Path(path).read_text() == "60"
    files.update(path, lambda old: None)
    assert Path(path).read_text() == "60"


def test_what_fails_leaves_nothing(tmp_path):
    path = tmp_path / "a"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), files.whole(str(path)) as unfinished:
        Path(unfinished).write_text("half")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), out.new_folder(str(tmp_path / "b")) as unfinished:
        (Path(unfinished) / "half").touch()
        raise ZeroDivisionError
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["a"]


HOLDER = """
import sys
from dit_jax import files
with files.lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_ends_with_its_process(tmp_path):
    path, busy = str(tmp_path / "new" / "lock"), JobError("another process works here")
    command = [sys.executable, "-c", HOLDER, path]
    holder = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(JobError, match="another process works here"), files.lock(path, busy):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with files.lock(path, busy), pytest.raises(JobError), files.lock(path, busy):
        pass


def test_a_lock_is_waited_for_and_may_go_with_its_folder(tmp_path):
    path, order, held = str(tmp_path / "new" / "lock"), [], threading.Event()

    def second():
        held.wait()
        with files.lock(path):
            order.append("second")

    waiting = threading.Thread(target=second)
    waiting.start()
    with files.lock(path, keep=False):
        held.set()
        waiting.join(0.2)
        order.append("first")
    waiting.join()
    assert order == ["first", "second"] and os.listdir(tmp_path / "new") == ["lock"]
    with files.lock(path, keep=False):
        pass
    assert os.listdir(tmp_path / "new") == []


def test_a_file_system_without_locks_gives_a_notice(tmp_path, monkeypatch, capsys):
    import fcntl

    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    with files.lock(str(tmp_path / "lock"), JobError("busy")):
        pass
    assert capsys.readouterr().err == (
        f"notice: {tmp_path}/lock: no locks on this file system; run one job at a time on its folder\n"
    )


def test_names_and_deletes(tmp_path):
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    assert files.names(str(tmp_path)) == ["file", "folder", "link"] and files.names(str(tmp_path / "none")) == []
    files.delete(str(tmp_path / "link"))
    files.delete_empty(str(tmp_path / "folder"))
    assert (tmp_path / "folder" / "inside").exists()
    for name in ("inside", "none"):
        files.delete_empty(str(tmp_path / "folder" / name))
    assert os.listdir(tmp_path / "folder") == []
    for name in ("folder", "file", "none"):
        files.delete(str(tmp_path / name))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "text, what",
    [
        ("{", "not readable as JSON"),
        ("[1]", "found a list, expected an object"),
        ('{"a": 1, "a": 2}', "is there twice"),
    ],
)
def test_json_that_is_no_object_is_named(tmp_path, text, what):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=f"{path}: .*{what}"):
        files.read_json(str(path))
    path.write_text('{"a": "' + "x" * files.LONGEST + '"}')
    with pytest.raises(UsageError, match="more than 1,048,576 bytes"):
        files.read_json(str(path))


def test_nothing_that_is_written_holds_nan(tmp_path):
    """JSON has no NaN: null stands for it, in nested values too, and other values keep their bytes."""

    def strict(text):
        return json.loads(text, parse_constant=lambda word: pytest.fail(f"found {word}"))

    value = {"a": [1.5, float("nan"), (2, float("-inf"))], "b": {"c": np.float64("inf"), "d": None, "e": 1e-300}}
    assert strict(files.json_text(value)) == {"a": [1.5, None, [2, None]], "b": {"c": None, "d": None, "e": 1e-300}}
    assert files.json_text({"b": 1, "a": (2.0,)}, indent=1, sort_keys=True) == '{\n "a": [\n  2.0\n ],\n "b": 1\n}'
    record = {"step": 1, "protocol_id": "x", "protocol": {}, "metrics": {"loss_se": math.nan}}
    records.append_record(str(tmp_path), record)
    write, _, close = scalars.open_scalars(str(tmp_path), 0, tensorboard=False)
    write(1, {"loss": math.inf})
    close()
    for name, key in (("eval/records.jsonl", "metrics"), ("metrics.jsonl", "loss")):
        found = strict((tmp_path / name).read_text())
        assert found[key] in (None, {"loss_se": None})


def test_only_one_function_writes_json_files():
    """Elsewhere `json.dumps` makes text for a hash, a message or another process."""
    others = {"dit_jax/networks", "dit_jax/data", "dit_jax/workdir/manifest.py", "dit_jax/files.py"}
    for path in (ROOT / "dit_jax").rglob("*.py"):
        if not any(path.is_relative_to(ROOT / other) for other in others):
            for line in path.read_text().splitlines():
                assert "json.dump" not in line or not any(word in line for word in ("write", '"\\n"', "indent")), path


@pytest.mark.parametrize("found", [{"a": 1}, [{"a": 1}, {"a": 2}]])
def test_a_report_replaces_a_report_and_nothing_else(tmp_path, found):
    path = str(tmp_path / "found.json")
    for _ in range(2):
        out.check_json(path)
        out.write_report(path, found)
    one = json.loads(Path(path).read_text())
    assert (one[0] if isinstance(one, list) else one) == {"generator": "dit_jax", "a": 1}
    for name, content in (("package.json", '{"name": "mine"}'), ("empty.json", "")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UsageError, match=f"^--json: {tmp_path / name} exists and was not written by this command"):
            out.check_json(str(tmp_path / name))
        assert (tmp_path / name).read_text() == content
    for name in ("found.csv", "found"):
        with pytest.raises(
            UsageError, match=rf"^--json: found '{tmp_path / name}', expected a name that ends in \.json"
        ):
            out.check_json(str(tmp_path / name))
    out.check_json(""), out.check_json(str(tmp_path / "new" / "found.json"), makes_folders=True)
