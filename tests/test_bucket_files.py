"""Files, leases, scalars and records in a bucket, on the strict server (tests/bucket.py): the same promises as on disk."""

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from in_bucket import W, elsewhere, there
from job import ROOT

from dit_jax import files
from dit_jax.config import Config
from dit_jax.error import JobError, StorageError, UsageError
from dit_jax.evaluation.run import _alone_in
from dit_jax.files import bucket, lease, out
from dit_jax.files.out import new_folder
from dit_jax.workdir import records
from dit_jax.workdir.folder import make_folder
from dit_jax.workdir.scalars import open_scalars, read_lines

# Google's client, closed as it is here, still leaves a few connections to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


@pytest.fixture
def impatient(monkeypatch):
    """Leases of half a second, so that a test sees them expire."""
    monkeypatch.setattr(lease, "RENEWAL", 0.1)
    monkeypatch.setattr(lease, "LIFE", 0.5)
    monkeypatch.setattr(bucket, "PATIENCE", 0.2)


# The verbs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["disk", "gs://test/place", "gs://my-bucket/bucket/place"])
def place(request, server, tmp_path):
    """A folder of each kind: whatever holds of one holds of the other."""
    return str(tmp_path / "place") if request.param == "disk" else request.param


def test_the_verbs_are_the_same_on_a_disk_and_in_a_bucket(place):
    at = lambda name: os.path.join(place, name)  # noqa: E731
    files.make_folder(at("b/c"))
    assert files.names(at("nowhere")) == [] and not files.exists(at("nowhere")) and not files.is_folder(at("nowhere"))
    for missing in (lambda: files.read(at("x")), lambda: files.opened(at("x"))):
        with pytest.raises(FileNotFoundError):
            missing()
    files.write_file(at("a"), "one")
    assert files.create(at("b/c/d"), b"") and not files.create(at("b/c/d"), "two")
    assert files.read(at("b/c/d")) == b"" and files.read(at("a"), 1) == b"on"
    assert (
        files.is_file(at("a")) and not files.is_folder(at("a")) and files.is_folder(at("b")) and files.exists(at("b"))
    )
    assert files.names(place) == ["a", "b"] and files.below(place) == ["a", "b/c/d"]
    assert {name: one["bytes"] for name, one in files.sizes(place).items()} == {"a": 3, "b/c/d": 0}
    assert not files.replace(at("a"), "two", b"other") and files.replace(at("a"), "two", b"one")
    assert not files.replace(at("a"), "three", None) and files.replace(at("new"), "three", None)
    with files.opened(at("a")) as f:
        f.seek(1)
        assert f.read() == b"wo"
    with out.new_folder(at("folder")) as made:
        (Path(made) / "deep").mkdir()
        (Path(made) / "deep" / "x").write_text("1")
        (Path(made) / "info.json").write_text("2")
    with pytest.raises(ZeroDivisionError), files.whole(at("half")) as made:
        Path(made).write_text("half")
        raise ZeroDivisionError
    assert not files.exists(at("half"))
    with files.local(at("folder")) as found:
        assert sorted(os.listdir(found)) == ["deep", "info.json"] and (Path(found) / "deep" / "x").read_text() == "1"
    assert files.file_crc32c(at("a")) == "Utizow==" and files.file_sha256(at("a"))[:6] == "3fc4cc"
    files.rename(at("folder"), at("moved"))
    found = [name for name in files.below(place) if not name.endswith(".lock")]  # a disk's locks stay
    assert found == ["a", "b/c/d", "moved/deep/x", "moved/info.json", "new"]
    files.delete(at("moved")), files.delete(at("a")), files.delete(at("a"))
    assert [name for name in files.below(place) if not name.endswith(".lock")] == ["b/c/d", "new"]


def test_one_of_many_writers_succeeds(place):
    files.make_folder(place)
    path, won = os.path.join(place, "x"), []

    def write(i):
        won.append(files.replace(path, f"by {i}", None))
        files.update(os.path.join(place, "sum"), lambda old: str(int(old or 0) + i))

    threads = [threading.Thread(target=write, args=(i,)) for i in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 7 + [True] and files.read(os.path.join(place, "sum")) == b"36"


def test_an_answer_that_was_lost_is_no_conflict(server):
    server.fault("lost", method="POST", path="upload")
    assert files.create("gs://test/x", "mine") and files.read("gs://test/x") == b"mine"
    server.fault("lost", method="POST", path="upload")
    assert files.replace("gs://test/x", "more", b"mine") and files.read("gs://test/x") == b"more"
    assert not files.create("gs://test/x", "more")  # the same bytes by another writer are a conflict
    server.fault("lost", method="DELETE")
    files.delete("gs://test/x")
    assert there(server) == []


@pytest.mark.parametrize("kind", ["status", "cut"])
def test_what_fails_for_a_while_is_tried_again(kind, server, tmp_path):
    server.fault(kind, times=2)
    files.write_file("gs://test/x", "whole")
    server.fault(kind, method="GET", times=2)
    assert files.read("gs://test/x") == b"whole"
    (tmp_path / "large").write_bytes(large := random.Random(0).randbytes(9 << 20))
    server.fault(kind, method="PUT", times=2)
    files.upload(str(tmp_path / "large"), "gs://test/large")
    assert server.buckets["test"]["large"][1] == large


def test_waiting_is_said_and_has_an_end(server, monkeypatch, capsys):
    monkeypatch.setattr(bucket, "NOTICE", 0.5)
    monkeypatch.setattr(bucket, "PATIENCE", 2.0)
    server.fault("status", times=1000)
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"^gs://test/x: the storage did not answer as it should \("):
        files.write_file("gs://test/x", "1")
    assert time.monotonic() - began < 8 and "trying again" in capsys.readouterr().err
    server.reset()
    assert there(server) == []


def test_refusals_are_a_line_that_says_what_to_do(server, monkeypatch):
    with pytest.raises(StorageError, match=r"there is no bucket 'nowhere'.*gcloud storage buckets create gs://nowhere"):
        files.names("gs://nowhere/x")
    for call in (lambda: files.write_file("gs://test/x", "1"), lambda: files.names("gs://test/x")):
        server.fault("status", status=403)
        with pytest.raises(StorageError, match=r"^gs://test/x: no permission \(.*grant the account roles/storage"):
            call()
    server.fault("status", status=401)
    with pytest.raises(StorageError, match="found no credentials for Google Cloud; run `gcloud auth"):
        files.names("gs://test/x")
    for wrong in ("gs://", "gs:///x", "gs://UPPER/x", "gs://a b/x"):
        with pytest.raises(UsageError, match="found no name of a bucket, expected gs://BUCKET/FOLDER"):
            files.names(wrong)
    monkeypatch.setitem(sys.modules, "google.cloud", None)
    with pytest.raises(UsageError, match="are not installed; run `make gcs`"):
        bucket.import_client()


def test_a_machine_without_credentials_says_so_at_once(monkeypatch, tmp_path):
    for key in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    bucket._client.cache_clear()
    began = time.monotonic()
    with pytest.raises(
        StorageError, match="found no credentials for Google Cloud; run `gcloud auth application-default"
    ):
        files.names("gs://test/x")
    assert time.monotonic() - began < 10
    bucket._client.cache_clear()


def test_a_whole_bucket_is_no_file(server):
    for call in (
        files.read,
        lambda path: files.write_file(path, "1"),
        lambda path: new_folder(path).__enter__(),
    ):
        with pytest.raises(
            UsageError, match=r"^gs://test/?: found a bucket, expected a path in it, such as gs://test/NAME"
        ):
            call("gs://test/")
    assert not files.is_file("gs://test") and files.names("gs://test") == []
    for i in range(20):
        files.write_file(f"gs://test/{i}", "1")
    server.requests.clear()
    files.introduce("gs://test")
    assert len(server.requests) == 1  # not all pages of a listing


def test_an_open_object_stays_the_same_and_its_errors_are_lines(server, monkeypatch):
    monkeypatch.setattr(bucket, "BLOCK", 4)
    monkeypatch.setattr(bucket, "PATIENCE", 0.5)
    files.write_file("gs://test/x", "0123456789")
    with files.opened("gs://test/x") as f:
        assert f.read(2) == b"01" and f.seek(-3, os.SEEK_END) == 7 and f.read() == b"789"
        f.seek(0)
        server.fault("status", method="GET", status=403)
        with pytest.raises(StorageError, match="no permission"):
            f.read()
        server.fault("status", method="GET", times=100)
        with pytest.raises(StorageError, match="did not answer as it should"):
            f.read()
        server.reset()
        files.write_file("gs://test/x", "other")
        with pytest.raises(StorageError, match="another process has changed it while it was read"):
            f.read()


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "a//x"])
def test_an_object_whose_name_leads_elsewhere_is_not_fetched(name, server, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    server.store("test", f"net/{name}", b"1", {}, {})
    with pytest.raises(UsageError, match="whose name leads elsewhere"), files.local("gs://test/net"):
        pass
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_another_region_is_a_warning(server, monkeypatch, capsys):
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Metadata(BaseHTTPRequestHandler):
        zone = "us-central1-b"

        def do_GET(self):
            self.send_response(200 if self.headers["Metadata-Flavor"] == "Google" else 403)
            self.end_headers()
            self.wfile.write(f"projects/1/zones/{self.zone}".encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Metadata) as machine:
        threading.Thread(target=machine.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{machine.server_port}")
        files.introduce("gs://test")
        assert capsys.readouterr().err == ""
        Metadata.zone = "europe-west4-a"
        files.introduce("gs://test")
        assert "gs://test is in us-central1, this machine in europe-west4: reading it" in capsys.readouterr().err
        server.locations["test"] = "EU"
        files.introduce("gs://test")
        assert capsys.readouterr().err == ""
        server.locations["test"] = "US-CENTRAL1"
        machine.shutdown()


# Leases ---------------------------------------------------------------------------------------------------------------


def test_a_lease_is_held_by_one_and_given_back(server):
    with files.lock("gs://test/lock") as check:
        check()
        with pytest.raises(JobError, match="busy"), files.lock("gs://test/lock", JobError("busy")):
            pass
    assert there(server) == []


HOLDER = """
import sys, time
from dit_jax import files
with files.lock("gs://test/lock"):
    print("held", flush=True)
    time.sleep(100)
"""


def test_the_lease_of_a_killed_process_of_this_machine_is_free_at_once(server):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, cwd=ROOT)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(JobError, match="busy"), files.lock("gs://test/lock", JobError("busy")):
        pass
    holder.kill(), holder.wait(), holder.stdout.close()
    began = time.monotonic()
    with files.lock("gs://test/lock", JobError("busy")):
        assert time.monotonic() - began < 5


def test_a_lease_of_another_machine_expires_unless_it_is_renewed(server, impatient, capsys):
    files.write_file("gs://test/lock", elsewhere())
    began = time.monotonic()
    with files.lock("gs://test/lock", JobError("busy")):
        assert time.monotonic() - began >= lease.LIFE
    assert "held by process 7 of 'other'; waiting" in capsys.readouterr().err
    files.write_file("gs://test/lock", elsewhere())
    end = threading.Event()

    def renew():
        while not end.wait(0.1):
            files.write_file("gs://test/lock", elsewhere(str(time.monotonic())))

    thread = threading.Thread(target=renew)
    thread.start()
    with pytest.raises(JobError, match="busy"), files.lock("gs://test/lock", JobError("busy")):
        pass
    end.set(), thread.join()


def test_who_has_lost_a_lease_learns_of_it_and_leaves_the_new_one(server, impatient):
    with files.lock("gs://test/lock") as check:
        files.write_file("gs://test/lock", elsewhere())
        time.sleep(0.4)
        with pytest.raises(StorageError, match="another process has taken this lease"):
            check()
    assert files.read("gs://test/lock") == elsewhere().encode()
    files.delete("gs://test/lock")
    with files.lock("gs://test/lock") as check:
        server.fault("status", method="POST", times=100)
        time.sleep(0.7)
        with pytest.raises(StorageError, match="or may take it"):  # it could not renew it
            check()
        server.reset()
        check()  # it could, so nobody has had it meanwhile


def test_an_empty_lock_as_a_copy_from_a_disk_leaves_it_is_free(server):
    files.write_file("gs://test/lock", b"")
    assert bucket.read("gs://test/lock", end=9) == (b"", bucket.stat("gs://test/lock").generation)
    began = time.monotonic()
    with files.lock("gs://test/lock", JobError("busy")):
        assert time.monotonic() - began < 5


# Scalars and records --------------------------------------------------------------------------------------------------


def test_scalars_are_segments_that_a_resumed_run_cuts(server):
    write, flush, close = open_scalars(W, 0)
    for step in (1, 2, 3):
        write(step, {"loss": step / 2})
    assert not there(server, "runs/a/metrics")
    flush()
    write(4, {"loss": 2.0})
    close()
    path = f"{W}/metrics.jsonl"
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3, 4]
    write, flush, close = open_scalars(W, 2)
    assert [line["step"] for line in read_lines(path)] == [1, 2]
    write(3, {"loss": 7.0})
    close()
    assert read_lines(path)[2:] == [{"step": 3, "loss": 7.0}]
    assert there(server, "runs/a/metrics") == [f"runs/a/metrics/{step:010d}.jsonl" for step in (1, 3)]
    events = there(server, "runs/a/events")
    assert len(events) == 2 and all(server.buckets["test"][name][1] for name in events)


def test_two_writers_of_scalars_notice(server):
    write, flush, close = open_scalars(W, 0, tensorboard=False)
    write(1, {"loss": 1.0})
    flush()
    files.write_file(f"{W}/metrics/0000000001.jsonl", '{"step": 1, "loss": 9.0}\n')
    write(2, {"loss": 1.0})
    with pytest.raises(JobError, match=r"0000000001\.jsonl: another process has written it meanwhile"):
        flush()
    with pytest.raises(JobError):
        close()


def test_scalars_whose_answers_were_all_lost_are_no_conflict(server, monkeypatch):
    monkeypatch.setattr(bucket, "PATIENCE", 0.5)
    write, flush, close = open_scalars(W, 0, tensorboard=False)
    for step in (1, 2):
        write(step, {"loss": 1.0})
        server.fault("lost", method="POST", path="upload")
        server.fault("status", method="POST", times=100)
        with pytest.raises(StorageError):
            flush()
        server.reset()
        assert len(there(server, "runs/a/metrics")) == 1
        write(step + 10, {"loss": 1.0})
        flush()
    close()
    assert sorted(line["step"] for line in read_lines(f"{W}/metrics.jsonl")) == [1, 2, 11, 12]


def test_who_may_not_write_is_told_so_and_waits_for_nobody(server):
    server.fault("status", method="POST", path="upload", status=403, times=100)
    with pytest.raises(StorageError, match="no permission"):
        make_folder(W, "config.json", Config())
    with pytest.raises(StorageError, match="no permission"), _alone_in(f"{W}/eval/partial/x", []):
        pass


def test_a_record_is_written_once(server):
    record = {"step": 3, "protocol_id": "0" * 16, "metrics": {"loss": 1.0}, "protocol": {}}
    for loss in (1.0, 2.0):
        records.append_record(W, {**record, "metrics": {"loss": loss}})
    records.append_record(W, {**record, "step": 4})
    assert records.read_records(W) == {(3, "0" * 16): record, (4, "0" * 16): {**record, "step": 4}}
