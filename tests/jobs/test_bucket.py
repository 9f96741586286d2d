"""Runs whose folder is in a bucket, on the strict server (tests/bucket.py): the same bits as on disk, and the same promises."""

import contextlib
import os
import random
import shutil
import signal
import socket
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from bucket import environment
from in_bucket import W, begun, elsewhere, ended, on_disk, there
from job import Job, run
from runs import assert_same_run, saved, scalars, train

from dit_jax import checkpoint, files
from dit_jax.error import JobError, StorageError
from dit_jax.files import bucket, lease
from dit_jax.workdir import manifest, records

# Google's client, closed as it is here, still leaves a few connections to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


# A training -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(only_server, cache_dir, data_dir, tmp_path_factory):
    """A run of 60 steps in a bucket while the storage fails in every way, as a folder on disk to be loaded."""
    only_server.reset(), only_server.buckets["test"].clear()
    rng = random.Random(0)
    for kind in ("status", "status", "lost", "cut", "slow"):
        for after in rng.sample(range(10, 300), 2):
            only_server.fault(kind, after=after, seconds=0.2)
    code, _, err = ended(only_server, "train", *train(W), cache_dir=cache_dir)
    assert code == 0, err
    assert not [fault for fault in only_server.faults if fault["times"] > 0], "a fault did not come"
    folder = tmp_path_factory.mktemp("bucket")
    only_server.dump(folder)
    return folder


def test_a_training_in_a_bucket_that_fails_now_and_then_is_that_on_disk(trained, uninterrupted):
    assert_same_run(uninterrupted, trained / "runs" / "a")
    assert set(os.listdir(trained / "runs" / "a" / "checkpoints")) == {"40", "50", "60"}
    assert (
        manifest.problems(str(trained / "runs" / "a" / "checkpoints" / "60")) == []
    )  # also once it is copied to a disk


@pytest.fixture
def held(server, trained):
    """That run in the bucket again."""
    server.load(trained)
    return server


def test_sixty_damaged_objects_are_found(held):
    seed = random.SystemRandom().randrange(10**6)
    rng, found, at = random.Random(seed), 0, f"{W}/checkpoints/60"
    names = there(held, "runs/a/checkpoints/60/")
    before = dict(held.buckets["test"])
    assert manifest.problems(at) == []
    while found < 60:
        name, how = rng.choice(names), rng.choice(["flip", "flip", "truncate", "delete", "add"])
        if not before[name][1] and how in ("flip", "truncate"):
            continue
        held.damage(how, name if how != "add" else f"{name}.new")
        wrong = manifest.problems(at)
        assert wrong and (Path(name).name in wrong[0] or name.endswith(manifest.NAME)), (seed, name, how, wrong)
        held.buckets["test"].clear(), held.buckets["test"].update(before)
        found += 1
    assert manifest.problems(at) == []


@pytest.mark.bucket
def test_the_newest_sound_step_wins_and_the_damaged_is_set_aside(held, uninterrupted, cache_dir, tmp_path, capsys):
    largest = max(there(held, "runs/a/checkpoints/60/ema"), key=lambda name: len(held.buckets["test"][name][1]))
    held.damage("flip", largest)
    _, weights = checkpoint.load(W)
    _, older = checkpoint.load(str(uninterrupted), 50)
    jax.tree.map(lambda a, b: bool((a == b).all()) or pytest.fail("other weights"), weights, older)
    assert "60 is damaged (ema/" in capsys.readouterr().err
    code, _, err = ended(held, "train", *train(W), cache_dir=cache_dir)
    assert code == 0 and "its bytes changed (CRC-32C)" in err and "set aside as 60.damaged" in err, err
    assert_same_run(uninterrupted, on_disk(held, tmp_path))
    assert files.names(f"{W}/checkpoints") == ["40", "50", "60", "60.damaged"]


def test_the_last_that_verifies_is_never_pruned_and_a_second_training_is_refused(held, cache_dir, server):
    held.damage("truncate", there(held, "runs/a/checkpoints/60/opt")[-1])
    checkpoint.prune(W, 1)
    assert checkpoint.steps(W) == [40, 50, 60]
    with files.lock(f"{W}/checkpoints/lock"):
        code, _, err = ended(held, "train", *train(W), cache_dir=cache_dir)
    assert (code, err.splitlines()[-1].startswith(f"error: {W}: another process trains this run")) == (1, True), err


@pytest.mark.bucket
def test_a_permission_that_goes_away_ends_the_run_in_one_line_and_loses_nothing(
    held, cache_dir, uninterrupted, tmp_path
):
    files.delete(f"{W}/checkpoints/60", first=manifest.NAME)
    held.fault("status", method="POST|PUT", path="checkpoints%2F60%2F.*ocdbt", status=403, times=10**6)
    held.fault("status", method="POST|PUT", path="ocdbt", status=403, times=10**6)
    code, _, err = ended(held, "train", *train(W), cache_dir=cache_dir)
    assert code == 1 and "checkpoints/60: the checkpoint could not be written (" in err.splitlines()[-1], err
    assert "the checkpoints of steps [40, 50] are intact" in err
    held.reset()
    code, _, err = ended(held, "train", *train(W), cache_dir=cache_dir)
    assert code == 0, err
    assert_same_run(uninterrupted, on_disk(held, tmp_path))


@pytest.fixture
def tiny(server):
    """A saver in the bucket, and what it saves."""
    items = {"params": {"a": np.arange(4, dtype=np.float32)}}
    with contextlib.ExitStack() as stack:
        saver = stack.enter_context(contextlib.closing(checkpoint.Saver("gs://test/w", 1)))
        yield saver, items
        stack.pop_all()
        with contextlib.suppress(JobError):
            saver.close()


def test_a_snapshot_in_a_bucket(tiny, server):
    """Its manifest, written last, makes it one; without it it is removed when the next training starts. No checkpoint prunes it."""
    saver, items = tiny
    saver.snapshot(1, items["params"], {"updates": 1})
    saver.save(2, items, {}, {})
    saver.save(4, items, {}, {})
    saver.close()
    files.write_file("gs://test/w/snapshots/3/tracks/x", "under way")
    checkpoint.Saver("gs://test/w", 1).close()
    assert checkpoint.steps("gs://test/w", "snapshots") == [1] and not files.below("gs://test/w/snapshots/3")
    assert checkpoint.steps("gs://test/w") == [4]
    at = checkpoint.path_of("gs://test/w", 1, "snapshots")
    assert checkpoint.meta_of(at)["updates"] == 1 and manifest.problems(at) == []


def test_who_has_lost_the_lease_neither_commits_nor_cleans_up(tiny, server, monkeypatch):
    saver, items = tiny
    saver.save(1, items, {}, {})
    saver.wait()
    files.write_file("gs://test/w/checkpoints/lock", elsewhere())  # another process has taken over and saves step 2
    files.write_file("gs://test/w/checkpoints/2/params/x", "under way")
    monkeypatch.setattr(lease, "LIFE", -1.0)
    with pytest.raises(StorageError, match="another process has taken this lease"):
        saver.save(3, items, {}, {})
    saver.close()
    assert files.below("gs://test/w/checkpoints/2") == ["params/x"] and checkpoint.steps("gs://test/w") == [1]
    assert files.read("gs://test/w/checkpoints/lock") == elsewhere().encode()


def test_a_checkpoint_of_which_something_is_gone_is_not_committed(tiny, server, monkeypatch):
    saver, items = tiny
    saver.save(1, items, {}, {})
    saver.wait()
    finished = saver._orbax.wait_until_finished

    def gone():
        finished()
        files.delete("gs://test/w/checkpoints/2/params")

    monkeypatch.setattr(saver._orbax, "wait_until_finished", gone)
    with pytest.raises(
        JobError, match=r"checkpoints/2: the checkpoint could not be written \(what was written of params is gone"
    ):
        saver.save(2, items, {}, {})
        saver.wait()
    assert checkpoint.steps("gs://test/w") == [1]


@pytest.mark.parametrize("fault", [{"status": 403}, pytest.param({"status": 503}, marks=pytest.mark.bucket)])
def test_a_restore_that_is_refused_is_a_line(fault, held, monkeypatch, capfd):
    monkeypatch.setattr(bucket, "PATIENCE", 1.0)
    for path in ("metadata", "ocdbt", "_METADATA"):
        held.reset()
        held.fault("status", method="GET", path=path, times=10**6, **fault)
        if path != "ocdbt" or fault["status"] == 403:  # tensorstore tries again for long, which `slow` says
            with pytest.raises(StorageError, match=r"no permission|did not answer as it should"):
                checkpoint.load(W, 60)
    held.reset()
    assert "Traceback" not in capfd.readouterr().err


# Kills ----------------------------------------------------------------------------------------------------------------


def unfinished(server):
    """Steps whose checkpoint has objects and no manifest."""
    names = there(server, "runs/a/checkpoints/")
    steps = {name.split("/")[3] for name in names if name.split("/")[3].isdecimal()}
    return {step for step in steps if f"runs/a/checkpoints/{step}/manifest.json" not in names}


KINDS = ("any time", "after a request", "in a save")


def wait_to_kill(process, server, rng, kinds=KINDS):
    """Wait for a random moment of one of these kinds; returns its name, or None if the run ended before."""
    kind, done = rng.choice(kinds), len(server.requests) + rng.randrange(1, 400)
    delay = rng.uniform(0, 4.0) if kind == "any time" else rng.uniform(0, 0.1)
    goal = {"any time": lambda: True, "after a request": lambda: len(server.requests) >= done}
    goal["in a save"] = lambda: unfinished(server)
    end = time.monotonic() + 120
    while not goal[kind]():
        if process.poll() is not None:
            return None
        assert time.monotonic() < end, process.err.read_text()
        time.sleep(0.002)
    time.sleep(delay)
    return None if process.poll() is not None else kind


def torture(kills, server, uninterrupted, tmp_path, cache_dir):
    """Kill runs in the bucket at least `kills` times, one of them in a save; returns what was counted."""
    seed = random.SystemRandom().randrange(10**6)
    rng, counts, left, runs = random.Random(seed), {}, 0, 1
    while sum(counts.values()) < kills or not left:
        process = begun(server, "train", *train(W), cache_dir=cache_dir)
        kind = wait_to_kill(process, server, rng, KINDS if sum(counts.values()) < kills else KINDS[2:])
        if kind:
            process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
        if kind and process.returncode == -signal.SIGKILL:
            counts[kind] = counts.get(kind, 0) + 1
            left += bool(unfinished(server))
            for step in checkpoint.steps(W):
                assert manifest.problems(checkpoint.path_of(W, step)) == [], (seed, kind)
            continue
        assert process.returncode == 0, (seed, err)
        assert_same_run(uninterrupted, on_disk(server, tmp_path))
        server.buckets["test"].clear()
        runs += 1
    code, _, err = ended(server, "train", *train(W), cache_dir=cache_dir)
    assert code == 0, (seed, err)
    assert_same_run(uninterrupted, on_disk(server, tmp_path))
    return {"seed": seed, "kills": counts, "saves left unfinished": left, "runs": runs}


@pytest.mark.bucket
def test_a_kill_at_a_random_time_and_one_in_a_save(server, uninterrupted, tmp_path, cache_dir):
    torture(1, server, uninterrupted, tmp_path, cache_dir)


@pytest.mark.bucket
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_two_hundred_kills(server, uninterrupted, tmp_path, cache_dir, capsys):
    found = torture(200, server, uninterrupted, tmp_path, cache_dir)
    with capsys.disabled():
        print(f"\n{found}")
    assert min(found["kills"].values()) >= 20


# Evaluation and samples -----------------------------------------------------------------------------------------------

GRID = ["--config.eval.samples=80", "--config.eval.guidance=(1.0,2.0)", "--config.eval.loss=True"]


def scored(found):
    """What a record says but for the times that it took."""
    return {key: {k: v for k, v in one.items() if k not in ("seconds_sample", "goodput")} for key, one in found.items()}


@pytest.mark.bucket
def test_a_grid_with_a_kill_gives_the_records_of_the_disk(held, uninterrupted, tmp_path, cache_dir):
    local = shutil.copytree(uninterrupted, tmp_path / "a")
    code, _, err = run("evaluate", f"--workdir={local}", *GRID, "--at=60", cache_dir=cache_dir)
    assert code == 0, err
    process = begun(held, "evaluate", f"--workdir={W}", *GRID, "--at=60", cache_dir=cache_dir)
    end = time.monotonic() + 120
    while not there(held, "runs/a/eval/partial") and not there(held, "runs/a/eval/records"):
        assert process.poll() is None and time.monotonic() < end, process.err.read_text()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    code, out, err = ended(held, "evaluate", f"--workdir={W}", *GRID, "--at=60", cache_dir=cache_dir)
    assert (code, out) == (0, f"{W}/eval/records\n"), err
    assert scored(records.read_records(W)) == scored(records.read_records(str(local)))
    assert len(there(held, "runs/a/eval/records/")) == 3 and not there(held, "runs/a/eval/partial")
    out = ["--num=20", "--seed=3", "--steps=4", "--sampler=euler"]
    for folder, workdir in (("gs://test/out", W), (str(tmp_path), str(local))):
        to = [f"--out={folder}/a.npz", f"--grid={folder}/a.png", f"--images={folder}/images"]
        code, _, err = ended(held, "sample", f"--workdir={workdir}", *out, *to, cache_dir=cache_dir)
        assert code == 0, err
    for name in ("a.npz", "a.png", "images/000019.png"):
        assert held.buckets["test"][f"out/{name}"][1] == (tmp_path / name).read_bytes(), name
    assert scalars(on_disk(held, tmp_path)) == scalars(local)


# Several hosts --------------------------------------------------------------------------------------------------------


def hosts(server, workdir, cache_dir):
    """Two running processes of one training."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    where = [f"--coordinator={address}", "--num_processes=2"]
    how = {"cache_dir": cache_dir, "environment": environment(server.address), "devices": 1}
    return [Job("train", *train(workdir, steps=30), *where, f"--process_id={i}", **how) for i in (0, 1)]


@pytest.mark.bucket
@pytest.mark.parametrize("victim", [0, 1])
def test_two_hosts_train_in_a_bucket_and_go_on_after_one_is_lost(victim, server, tmp_path, data_dir, cache_dir):
    jobs = hosts(server, tmp_path / "disk", cache_dir)
    said = [job.communicate()[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    jobs, end = hosts(server, W, cache_dir), time.monotonic() + 120
    while "runs/a/checkpoints/10/manifest.json" not in server.buckets["test"]:
        assert [job.poll() for job in jobs] == [None, None] and time.monotonic() < end
        time.sleep(0.005)
    jobs[victim].send_signal(signal.SIGKILL)
    said = [job.communicate()[1] for job in jobs]
    assert jobs[1 - victim].returncode in (200, -signal.SIGABRT), said
    jobs = hosts(server, W, cache_dir)
    said = [job.communicate()[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    one, other = (saved(folder, 30) for folder in (tmp_path / "disk", on_disk(server, tmp_path)))
    assert one["data"] == other["data"]
    for name in ("params", "ema", "opt"):
        jax.tree.map(np.testing.assert_array_equal, one[name], other[name])
    assert scalars(tmp_path / "disk") == scalars(tmp_path / "copy" / "runs" / "a")
