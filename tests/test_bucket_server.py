"""The strict test server of object storage (tests/bucket.py) against real clients: what it stores, refuses and counts."""

import contextlib
import http.client
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import bucket as server_module
import numpy as np
import pytest
from bucket import leading_here
from bucket_clients import Conflict, Gcsfs, Google
from bucket_objects import QUANTUM
from google.api_core import exceptions

# Google's client, closed as it is here, still leaves a few connections to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
DATA = np.random.default_rng(0).bytes(4 * 2**20 + 77)
PART = DATA[:900_000]  # gcsfs warns of a single body above 1 MiB


@pytest.fixture(scope="module")
def only_server():
    with leading_here(buckets={"test": "US-CENTRAL1", "other": "EU"}, page=3) as server:
        yield server


def raw(server, method, path, body=None, **headers):
    """(status, headers, body) of one request of its own."""
    connection = http.client.HTTPConnection(server.address.removeprefix("http://"), timeout=20)
    headers = {key.replace("_", "-"): value for key, value in headers.items()}
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


@pytest.fixture(params=[Google, Gcsfs], ids=["google", "gcsfs"])
def client(request, server):
    with contextlib.closing(request.param(server)) as client:
        yield client


def data_of(server, name):
    return server.buckets["test"][name][1]


def generation_of(server, name):
    return int(server.buckets["test"][name][0]["generation"])


def test_objects_come_back_whole_and_in_parts(server, client):
    for write, data in ((client.multipart, PART), (client.resumable, DATA)):
        write("a/b c+ü%.bin", data)
        assert client.read("a/b c+ü%.bin") == data
        assert client.read("a/b c+ü%.bin", 1000, 70000) == data[1000:70000]
        assert data_of(server, "a/b c+ü%.bin") == data
    chunks = [r for r in server.requests if r.operation == "chunk"]
    assert len(chunks) >= 4
    assert sum(r.received for r in chunks) == len(DATA)
    client.multipart("empty", b"")
    assert client.read("empty") == b""
    client.multipart("ends", b"\r\n--x\r\n\r\n")
    assert client.read("ends") == b"\r\n--x\r\n\r\n"


def test_listings_have_pages_and_folders_and_no_memory(server, client):
    names = [f"run/{i}/x" for i in range(4)] + [f"run/{i}" for i in range(4, 8)] + ["run2/y"]
    for name in names:
        server.damage("add", name)
    server.reset()
    assert sorted(client.list("run/")) == names[:8]
    assert server.stats()["requests"]["GET list"] == 3  # of three names at most
    assert client.folder("run/") == [f"run/{i}" for i in range(8)]
    client.delete("run/0/x")
    assert client.folder("run/") == [f"run/{i}" for i in range(1, 8)]
    with pytest.raises((exceptions.NotFound, FileNotFoundError)):
        client.read("run/0/x")
    with pytest.raises((exceptions.NotFound, FileNotFoundError)):
        client.delete("run/0/x")


def test_listings_begin_and_end_where_they_are_told_and_copies_are_whole(server):
    for name in "abcd":
        server.damage("add", name, data=name)
    page = json.loads(raw(server, "GET", "/storage/v1/b/test/o?startOffset=b&endOffset=d&maxResults=1")[2])
    assert [item["name"] for item in page["items"]] == ["b"] and page["nextPageToken"]
    status, _, body = raw(server, "POST", "/storage/v1/b/test/o/b/copyTo/b/other/o/x%2Fy?ifGenerationMatch=0")
    assert (status, json.loads(body)["name"], server.buckets["other"]["x/y"][1]) == (200, "x/y", b"b")
    assert raw(server, "POST", "/storage/v1/b/test/o/b/copyTo/b/other/o/x%2Fy?ifGenerationMatch=0")[0] == 412


def test_only_the_first_creates(server, client):
    client.create("lock", b"mine")
    with pytest.raises(Conflict):
        client.create("lock", b"theirs")
    assert data_of(server, "lock") == b"mine"
    client.delete("lock")
    client.create("lock", b"theirs")
    assert data_of(server, "lock") == b"theirs"


@pytest.mark.parametrize("way", ["multipart", "resumable", "delete", "compose", "rewrite", "patch"])
def test_a_stale_generation_is_refused_and_the_present_one_is_not(server, client, way):
    server.damage("add", "x", data=b"old")
    stale = generation_of(server, "x")
    server.damage("add", "x", data=b"new")
    server.damage("add", "y", data=b"source")
    args = {"multipart": [b"mine"], "resumable": [b"mine"], "compose": [["y", "y"]], "rewrite": ["y"]}.get(way, [])
    with pytest.raises(Conflict):
        getattr(client, way)("x", *args, stale)
    assert data_of(server, "x") == b"new" and "metadata" not in server.buckets["test"]["x"][0]
    getattr(client, way)("x", *args, generation_of(server, "x"))
    wanted = {"compose": b"sourcesource", "rewrite": b"source", "patch": b"new", "delete": None}.get(way, b"mine")
    assert (data_of(server, "x") if wanted else server.buckets["test"].get("x")) == wanted
    if way == "patch":
        assert server.buckets["test"]["x"][0]["metadata"] == {"by": "hand"}


def test_a_stale_source_is_not_rewritten(server, client):
    server.damage("add", "y", data=b"1")
    stale = generation_of(server, "y")
    server.damage("add", "y", data=b"2")
    with pytest.raises(Conflict):
        client.rewrite("x", "y", source_generation=stale)
    client.rewrite("x", "y", source_generation=generation_of(server, "y"))
    assert data_of(server, "x") == b"2"


def test_stale_media_uploads_reads_and_parts_are_refused(server):
    server.damage("add", "x", data=b"old")
    stale = generation_of(server, "x")
    upload = "/upload/storage/v1/b/test/o?uploadType=media&name=x"
    status, _, body = raw(server, "POST", f"{upload}&ifGenerationMatch={stale}", b"new")
    entry = json.loads(body)
    assert (status, entry["size"], entry["generation"]) == (200, "3", str(generation_of(server, "x")))
    status, _, body = raw(server, "POST", f"{upload}&ifGenerationMatch={stale}", b"newer")
    assert (status, json.loads(body)["error"]["errors"][0]["reason"]) == (412, "conditionNotMet")
    here, now = "/storage/v1/b/test/o/x", generation_of(server, "x")
    for query, wanted in {
        f"ifGenerationMatch={stale}": 412,
        f"ifGenerationNotMatch={now}": 304,
        f"ifGenerationNotMatch={stale}": 200,
        "ifMetagenerationMatch=2": 412,
        "ifMetagenerationNotMatch=1": 304,
        f"generation={stale}": 404,
    }.items():
        assert raw(server, "GET", f"{here}?{query}")[0] == raw(server, "GET", f"{here}?alt=media&{query}")[0] == wanted
    for query in (f"ifGenerationNotMatch={now}", "ifMetagenerationMatch=7", "ifGenerationMatch=0"):
        assert raw(server, "POST", f"{upload}&{query}", b"newer")[0] == 412
        assert raw(server, "DELETE", f"{here}?{query}")[0] == 412
    part = {"sourceObjects": [{"name": "x", "objectPreconditions": {"ifGenerationMatch": stale}}]}
    assert raw(server, "POST", "/storage/v1/b/test/o/z/compose", json.dumps(part))[0] == 412
    assert data_of(server, "x") == b"new" and "z" not in server.buckets["test"]
    assert raw(server, "PATCH", f"{here}?ifMetagenerationMatch=1", b"{}")[0] == 200
    assert raw(server, "PATCH", f"{here}?ifMetagenerationMatch=1", b"{}")[0] == 412


@pytest.mark.parametrize("way", ["multipart", "resumable"])
def test_of_eight_who_replace_one_generation_one_wins(server, client, way):
    server.damage("add", "x")
    generation, clients = generation_of(server, "x"), [type(client)(server) for _ in range(8)]
    barrier = threading.Barrier(8)

    def replace(i):
        barrier.wait()
        try:
            getattr(clients[i], way)("x", b"%d" % i, generation)
        except Conflict:
            return None
        return b"%d" % i

    with ThreadPoolExecutor(8) as pool:
        winners = [data for data in pool.map(replace, range(8)) if data]
    for each in clients:
        each.close()
    assert winners == [data_of(server, "x")]


def test_of_eight_uploads_begun_at_one_generation_one_is_finished(server):
    start = "/upload/storage/v1/b/test/o?uploadType=resumable&name=x&ifGenerationMatch=0"
    places = [raw(server, "POST", start)[1]["Location"].removeprefix(server.address) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda place: raw(server, "PUT", place, place.encode())[0], places))
    assert sorted(answers) == [200] + [412] * 7
    assert data_of(server, "x") == places[answers.index(200)].encode()
    assert raw(server, "POST", start)[0] == 412
    assert raw(server, "PUT", places[answers.index(200)], Content_Range="bytes */*")[0] == 200  # asked again


def test_a_resumable_upload_is_counted_as_the_service_counts(server):
    headers = raw(server, "POST", "/upload/storage/v1/b/test/o?uploadType=resumable", b'{"name": "x"}')[1]
    place = headers["Location"].removeprefix(server.address)

    def put(first, data, total):
        span = f"bytes {first}-{first + len(data) - 1}/{total}" if data else f"bytes */{total}"
        status, headers, _ = raw(server, "PUT", place, data, Content_Range=span)
        return status, headers["Range"]

    one, two = DATA[:QUANTUM], DATA[QUANTUM : QUANTUM + 5]
    assert put(0, b"", "*") == (308, None)
    assert put(0, one[:-1], "*")[0] == 400
    assert put(QUANTUM, one, "*")[0] == 503  # a gap
    assert put(0, one, "*") == put(0, b"", "*") == (308, f"bytes=0-{QUANTUM - 1}")
    assert "x" not in server.buckets["test"]
    assert put(QUANTUM - 3, one[-3:] + two, QUANTUM + 5)[0] == 200  # what had arrived is not taken twice
    assert data_of(server, "x") == one + two
    assert put(0, b"", QUANTUM + 5)[0] == 200
    assert raw(server, "PUT", place.replace("upload_id=", "upload_id=0"), b"")[0] == 404


def test_an_upload_cut_in_the_middle_goes_on(server, client):
    server.fault("cut", "PUT|POST", "upload_id", after=1)
    client.resumable("x", DATA)
    assert data_of(server, "x") == DATA
    assert sum(r.status == 0 for r in server.requests) == 1


def test_a_small_upload_that_is_cut_stores_nothing(server):
    server.fault("cut", "POST", "upload")
    with pytest.raises(OSError):
        raw(server, "POST", "/upload/storage/v1/b/test/o?uploadType=media&name=x", DATA)
    assert "x" not in server.buckets["test"]


def test_a_busy_service_is_asked_again_and_a_closed_one_is_not(server, client):
    server.damage("add", "x", data=b"1")
    times = 3 if isinstance(client, Google) else 1  # gcsfs waits long, longer each time
    server.fault("status", "GET", "/o/x", times=times, status=503)
    assert client.read("x") == b"1"
    assert server.stats()["requests"] == {"GET refused": times, "GET download": 1}
    server.fault("status", path="upload", status=403)
    with pytest.raises((exceptions.Forbidden, OSError), match=r"403|Forbidden"):
        client.multipart("y", b"")
    assert "y" not in server.buckets["test"]
    client.multipart("y", b"")


def test_a_lost_answer_reads_as_a_conflict_with_oneself(server, client):
    server.fault("lost", "POST", "upload")
    with pytest.raises(Conflict):
        client.create("x", b"mine")
    assert data_of(server, "x") == b"mine"
    assert [r.status for r in server.requests] == [0, 412]


def test_a_slow_answer_comes_late_and_holds_up_nobody(server):
    server.damage("add", "x")
    server.fault("slow", path="/o/x", seconds=1.0)
    begin = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(raw, server, "GET", "/storage/v1/b/test/o/x")
        while server.faults[0]["times"]:
            time.sleep(0.01)
        assert raw(server, "GET", "/storage/v1/b/test/o/x")[0] == 200
        assert time.monotonic() - begin < 0.9 and not slow.done()
        assert slow.result()[0] == 200 and time.monotonic() - begin >= 1.0


def test_damage_is_somebody_elses_write(server):
    for how, wanted in (("flip", b"ab" + b"b" + b"d"), ("truncate", b"ab"), ("delete", None)):
        server.damage("add", "x", data=b"abcd")
        before = generation_of(server, "x")
        server.damage(how, "x")
        assert server.buckets["test"].get("x", (0, None))[1] == wanted
        assert wanted is None or generation_of(server, "x") > before
    with pytest.raises(ValueError, match="expected flip"):
        server.damage("scratch", "x")


def test_what_is_wrong_is_refused_in_the_services_words(server):
    for path in ("/storage/v1/b/none", "/storage/v1/b/none/o", "/storage/v1/b/test/o/none"):
        status, _, body = raw(server, "GET", path)
        assert (status, json.loads(body)["error"]["code"]) == (404, 404)
    upload = "/upload/storage/v1/b/{}/o?uploadType={}&name={}"
    assert raw(server, "POST", upload.format("none", "media", "x"), b"")[0] == 404
    assert raw(server, "POST", upload.format("test", "telex", "x"), b"")[0] == 400
    assert raw(server, "POST", upload.format("test", "media", ""), b"")[0] == 400
    assert raw(server, "POST", upload.format("test", "media", "x&ifGenerationMatch=soon"), b"")[0] == 400
    assert raw(server, "POST", upload.format("test", "media", "x"), b"1", X_Goog_Hash="crc32c=AAAAAA==")[0] == 400
    assert raw(server, "GET", "/storage/v1/b/test/o?matchGlob=*")[0] == 501
    assert raw(server, "GET", "/storage/v1/b/test/acl")[0] == 501
    assert not server.buckets["test"]


def test_a_bucket_says_where_it_lies(server):
    with contextlib.closing(Google(server)) as google:
        buckets = [google.client.get_bucket(name) for name in ("test", "other")]
    assert [bucket.location for bucket in buckets] == ["US-CENTRAL1", "EU"]
    assert [bucket.location_type for bucket in buckets] == ["region", "multi-region"]


def test_plain_reads_and_ranges(server):
    server.damage("add", "a/x", data=DATA[:100])
    for path in ("/test/a/x", "/test/a%2Fx", "/download/storage/v1/b/test/o/a%2Fx?alt=media"):
        status, headers, body = raw(server, "GET", path, Range="bytes=90-")
        assert (status, headers["Content-Range"], body) == (206, "bytes 90-99/100", DATA[90:100])
        assert headers["X-Goog-Hash"].startswith("crc32c=") and int(headers["X-Goog-Generation"])
        assert raw(server, "GET", path, Range="bytes=-4")[2] == DATA[96:100]
        assert raw(server, "GET", path, Range="bytes=100-")[0] == 416
    status, headers, body = raw(server, "HEAD", "/test/a/x")
    assert (status, headers["Content-Length"], body) == (200, "100", b"")


def test_a_process_of_its_own_is_told_over_http(tmp_path):
    command = [sys.executable, server_module.__file__, "--port=0", "--buckets", "test", "eu=EU", "--page=2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            server = type("Far", (), {"address": process.stdout.readline().strip()})
            (tmp_path / "in" / "deep").mkdir(parents=True)
            (tmp_path / "in" / "deep" / "x").write_bytes(DATA)
            tell = lambda where, **given: raw(server, "POST", where, json.dumps(given))[0]  # noqa: E731
            assert tell("/load", folder=str(tmp_path / "in"), bucket="eu") == 200
            assert raw(server, "GET", "/eu/deep/x")[2] == DATA
            assert tell("/damage", how="truncate", name="deep/x", bucket="eu") == 200
            assert tell("/dump", folder=str(tmp_path / "out"), bucket="eu") == 200
            assert (tmp_path / "out" / "deep" / "x").read_bytes() == DATA[: len(DATA) // 2]
            assert tell("/faults", kind="status", status=429, path="deep", times=2) == 200
            assert raw(server, "GET", "/eu/deep/x")[0] == 429
            assert raw(server, "DELETE", "/faults")[0] == 200
            assert raw(server, "GET", "/eu/deep/x")[0] == 200
            stats = json.loads(raw(server, "GET", "/stats")[2])
            assert stats["requests"] == {"GET download": 2, "GET refused": 1} and stats["sent"] > len(DATA)
            assert tell("/faults", kind="flood") == 400
        finally:
            process.terminate()


def test_tensorstore_reads_writes_and_is_refused(server):
    import tensorstore as ts

    context = ts.Context({"gcs_request_retries": {"initial_delay": "10ms", "max_delay": "50ms"}})
    where = {"driver": "gcs", "bucket": "test", "path": "array/"}
    spec = {"driver": "zarr3", "kvstore": where, "metadata": {"shape": [64, 8], "data_type": "float32"}}
    array = np.random.default_rng(0).standard_normal((64, 8), np.float32)
    server.fault("status", "POST", "upload", times=2)
    ts.open(spec, create=True, context=context).result()[:] = array
    assert np.array_equal(ts.open(spec, context=ts.Context()).result()[:].read().result(), array)
    assert server.stats()["requests"]["POST refused"] == 2
    store = ts.KvStore.open(where, context=context).result()
    absent = store.read("x").result().stamp.generation
    first = store.write("x", b"1", if_equal=absent).result().generation
    second = store.write("x", b"2", if_equal=first).result().generation
    assert second and not store.write("x", b"3", if_equal=first).result().generation
    assert store.read("x", if_not_equal=second).result().state == "unspecified"
    assert store.read("x").result().value == b"2"
    assert not store.write("x", b"4", if_equal=absent).result().generation
    assert sorted(store.list().result()) == sorted(
        name.removeprefix("array/").encode() for name in server.buckets["test"]
    )


def test_array_records_are_read_from_a_bucket(server, tmp_path):
    from array_record.python import array_record_module
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "x.array_record"), "group_size:1")
    for i in range(20):
        writer.write(b"%d" % i)
    writer.close()
    server.load(tmp_path)
    with ArrayRecordDataSource("gs://test/x.array_record") as source:
        assert source.__getitems__([3, 19, 0]) == [b"3", b"19", b"0"] and len(source) == 20
    assert server.stats()["requests"]["GET download"] > 0


def test_orbax_saves_and_restores_bit_for_bit(server):
    import orbax.checkpoint as ocp

    state = {"w": np.random.default_rng(0).standard_normal((16, 4), np.float32), "step": np.int64(3)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save("gs://test/run/3", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore("gs://test/run/3")
    assert restored["step"] == 3 and restored["w"].tobytes() == state["w"].tobytes()
    server.damage("add", "run/4/commit_success.txt")
    assert {name.split("/")[1] for name in server.buckets["test"]} == {"3", "4"}
