"""The wing with runs, tables and reports in a bucket: the same as on the disk, by the strict server (tests/bucket.py)."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import bucket as server_module
import jax
import pytest
from job import ROOT, Job
from planted import ladder as planted_ladder
from planted import sheet
from test_scaling_frontier import SAMPLING
from test_scaling_runs import PROTOCOL, record
from test_sweep import BUDGETS, file, ladder_config, small

from dit_jax.config import Config, to_dict
from dit_jax.error import StorageError, UsageError
from dit_jax.files import names, read
from dit_jax.job import compiled
from dit_jax.scaling import commands, place
from dit_jax.scaling.__main__ import main
from dit_jax.scaling.plans.settings import configs_of
from dit_jax.scaling.report import folder, save
from dit_jax.scaling.runs import load_runs
from dit_jax.sweep import ladder
from dit_jax.workdir.records import append_record, read_records

FAST = ("--resamples=5", "--method=isoflop")
# Google's client leaves connections to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def only_server():
    with server_module.leading_here(page=50) as server:
        yield server


@pytest.fixture
def server(only_server, study):
    """The server with the study alone."""
    only_server.empty()
    only_server.load(study / "objects")
    return only_server


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The same records in every form: lines/runs and objects/runs, of which 2 cells have both, and a table of their runs."""
    root = tmp_path_factory.mktemp("study")
    planted = planted_ladder(noise=0.002, budgets=3, sizes=4)
    for i, model in enumerate(planted):
        numbers = {"params_active": model.params, "tokens_seen": model.tokens, "flops_train": model.flops}
        late = record(run=model.name, loss=model.loss, **numbers)
        early = late | {"step": 5, "metrics": {"loss": 2 * model.loss}}
        drawn = late | {
            "protocol": PROTOCOL | {"samples": SAMPLING},
            "protocol_id": "cd",
            "flops_sample": 9.0 * model.params,
        }
        drawn["metrics"] = {"fid": 10 * model.loss, "fid_low": 9.9 * model.loss, "fid_high": 10.1 * model.loss}
        every, at = [json.dumps(one) + "\n" for one in (early, late, drawn)], f"runs/cells/{model.name}"
        put(root / "lines" / at / "eval" / "records.jsonl", "".join(every))
        if i < 2:
            put(root / "objects" / at / "eval" / "records.jsonl", "".join(every[:2]))
        for name, line in zip(("0000000005-ab", "0000000010-ab", "0000000010-cd"), every, strict=True):
            put(root / "objects" / at / "eval" / "records" / f"{name}.json", line)
        put(root / "objects" / at / "checkpoints" / "5" / "params" / "0", "not read")
    for kind in ("lines", "objects"):
        beyond = json.dumps(record(run="never fitted", loss=1.0, flops_train=9e99)) + "\n"
        put(root / kind / "runs" / "extrapolation" / "w9" / "eval" / "records" / "0000000010-ab.json", beyond)
    sheet(root / "objects" / "table.csv", planted)
    return root


def bare(paths):
    return [dataclasses.replace(run, source="") for run in load_runs(paths)]


def test_every_form_of_records_gives_the_same_runs(server, study):
    lines = bare([str(study / "lines" / "runs")])
    assert len(lines) == 12 and lines == bare("gs://test/runs/") == bare(str(study / "objects" / "runs"))
    half = [str(study / "lines" / "runs" / "cells" / run.name) for run in lines[:6]]
    rest = [f"gs://test/runs/cells/{run.name}" for run in lines[6:]]
    assert bare([*half, *rest]) == lines
    one = lines[6].name
    for path in (
        f"{rest[0]}/eval/records.jsonl",
        f"{rest[0]}/eval/records",
        f"{rest[0]}/eval/records/0000000010-ab.json",
    ):
        assert [run.name for run in load_runs([path, path])] == [one]
    assert [run.name for run in load_runs("gs://test/runs/extrapolation")] == ["never fitted"]


def test_evaluation_writes_what_is_read(server):
    append_record("gs://test/new/a", record(run="mine"))
    (run,) = load_runs("gs://test/new")
    assert (run.name, run.source) == ("mine", "gs://test/new/a/eval/records/0000000010-ab.json:1")


def test_each_object_is_read_once_and_listed_in_pages(server):
    load_runs("gs://test/runs")
    reads = [path for request in server.requests if "/eval/records" in (path := unquote(request.path))]
    assert len(reads) == len({*reads}) == 38  # 12 runs of 3 objects, and 2 files
    assert len(server.requests) - len(reads) <= 4  # is it an object? and 2 pages of a listing


def test_messages_name_the_object(server):
    place = "gs://test/bad/eval/records"
    server.damage("add", "bad/eval/records/0000000010-ab.json", data=json.dumps(record()))
    with pytest.raises(UsageError, match=f"^{place}: no record has metrics.fid; found fd_digits, loss"):
        load_runs("gs://test/bad", metric="fid")
    server.damage("add", "bad/eval/records/0000000020-ab.json", data=b"{oops\n")
    with pytest.raises(UsageError, match=f"^{place}/0000000020-ab.json:1: not a JSON line"):
        load_runs("gs://test/bad")
    for path in ("gs://test/absent", "gs://test/absent.csv"):
        with pytest.raises(UsageError, match=f"^{path}: no such file or folder"):
            load_runs(path)
    with pytest.raises(UsageError, match=r"^gs://test/runs/cells/[^/]*/checkpoints: found no eval/records.jsonl in it"):
        load_runs(f"gs://test/runs/cells/{bare('gs://test/runs')[0].name}/checkpoints")
    server.fault("status", path=".*0000000010-ab.json.*", status=403, times=9)
    with pytest.raises(StorageError, match=r"gs://test/.*0000000010-ab.json: no permission"):
        load_runs("gs://test/runs")


def test_the_fit_and_the_prediction_are_those_of_the_disk(server, study, tmp_path):
    for command, where in (("fit", "runs"), ("predict", "table.csv")):
        found, more = [], ["--flops=1e22"] * (command == "predict")
        for root, out in (
            (study / "lines" if where == "runs" else study / "objects", tmp_path / "new"),
            ("gs://test", "gs://test/out"),
        ):
            assert main([command, f"{root}/{where}", *FAST, *more, f"--json={out}/{command}.json"]) == 0
            found.append(json.loads(read(f"{out}/{command}.json")))
        assert found[0] == found[1] and found[0]["generator"] == "dit_jax"


def test_a_report_in_a_bucket_is_the_report_on_the_disk(server, tmp_path, monkeypatch):
    def both(path, report):
        return save(str(tmp_path / "report.html"), report) and save(path, report)

    def few(report, draw=folder.draw):
        return dict([*draw(report).items()][:2])

    monkeypatch.setattr(commands, "save", both)
    monkeypatch.setattr(folder, "draw", few)
    server.damage("add", "grid.png", data=(ROOT / "docs" / "isoflop.png").read_bytes())
    command = ["report", "gs://test/runs", *FAST, "--grid=gs://test/grid.png", "--out=gs://test/out/report.html"]
    assert main(command) == 0
    made = sorted(os.listdir(tmp_path))
    assert made == ["N_opt.png", "isoflop.png", "report.html", "report.json"] == names("gs://test/out")
    assert all(read(f"gs://test/out/{name}", 2**24) == (tmp_path / name).read_bytes() for name in made)
    assert len((tmp_path / "report.html").read_bytes()) > (ROOT / "docs" / "isoflop.png").stat().st_size


def test_files_of_a_report_replace_its_own_only_and_the_page_comes_last(server):
    page = "gs://test/out/report.html"
    head = b'<meta name="generator" content="' + place.mark(page).encode() + b'">'
    files = {f"gs://test/out/{name}.png": b"Software\0" + place.mark(page).encode() for name in "ab"} | {page: head}
    place.write(page, files)
    server.damage("add", "out/old.png", data=files["gs://test/out/a.png"])
    server.damage("add", "out/mine.png", data=b"mine")
    server.fault("status", method="POST", status=403, after=2, times=1)
    with pytest.raises(StorageError, match=f"^{page}: no permission"):
        place.write(page, files | {page: head + b"new"})
    assert read(page) == head and "old.png" in names("gs://test/out")
    place.write(page, files | {page: head + b"new"})
    assert read(page) == head + b"new" and names("gs://test/out") == ["a.png", "b.png", "mine.png", "report.html"]
    with pytest.raises(UsageError, match=r"--out: gs://test/out/mine.png was not written by a report"):
        place.write(page, files | {"gs://test/out/mine.png": b"ours"})
    with pytest.raises(
        UsageError, match=r"--out: gs://test/out/report.html belongs to another report, \[report.html\]"
    ):
        place.check("gs://test/out/other.html", [page])
    with pytest.raises(UsageError, match=r"--out: found the folder 'gs://test/out', expected a file"):
        place.check("gs://test/out")
    assert read("gs://test/out/mine.png") == b"mine"


def test_the_table_and_the_frontier(server, study, tmp_path, capsys):
    for command in (["table", "--csv"], ["frontier", "--resamples=20", "--out={}.svg"]):
        said = []
        for root, out in ((f"{study}/lines", tmp_path / "f"), ("gs://test", "gs://test/f")):
            assert main([command[0], f"{root}/runs", *(option.format(out) for option in command[1:])]) == 0
            said.append(capsys.readouterr().out.replace(str(out), ""))
        assert said[0] == said[1] and said[0].count("\n") > 10
    assert read("gs://test/f.svg", 2**24) == Path(f"{tmp_path}/f.svg").read_bytes()


def test_a_plan_knows_the_configs_of_a_bucket(server):
    runs = load_runs("gs://test/runs")[:3]
    for one in runs[1:]:
        server.damage("add", f"runs/cells/{one.name}/config.json", data=json.dumps({"config": to_dict(Config())}))
    assert configs_of(runs) == [(one, Config()) for one in runs[1:]]


def test_a_bucket_that_refuses_is_one_line_before_anything_is_read(server, study, capsys):
    for paths, code, said in (
        (["gs://absent/runs"], 1, "gs://absent: there is no bucket 'absent'"),
        ([f"{study}/lines/runs", "--json=gs://absent/fit.json"], 1, "gs://absent: there is no bucket 'absent'"),
        (["gs://A/runs"], 2, "found no name of a bucket"),
        (["s3://b/runs"], 2, "other stores are not supported"),
        (["gs://test/none"], 2, "gs://test/none: no such file or folder"),
    ):
        server.requests.clear()
        assert main(["fit", *paths, *FAST]) == code
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
        assert len(server.requests) <= 4
    assert main(["fit", "gs://absent/runs", "--window=0"]) == 2  # wrong as typed: no bucket is asked
    server.damage("add", "fit.json", data=b"{}")
    assert main(["fit", "gs://test/runs", *FAST, "--json=gs://test/fit.json"]) == 2
    assert read("gs://test/fit.json") == b"{}"


def test_runs_on_the_disk_need_no_client(study):
    code = "import sys\nfrom dit_jax.scaling.__main__ import main\nassert main(sys.argv[1:]) == 0\n"
    code += "assert not [name for name in sys.modules if name.split('.')[0] in ('google', 'gcsfs', 'fsspec')]"
    command = [sys.executable, "-c", code, "table", str(study / "objects" / "runs")]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_progress_asks_a_bucket_every_few_seconds_only(server, tmp_path):
    cells = ladder.make_cells(ladder_config(), "gs://test/sweep")[:2]
    steps = cells[0].cfg.train.steps
    server.damage("add", f"sweep/cells/{cells[0].name}/metrics/0000000001.jsonl", data=f'{{"step": {steps // 2}}}\n')
    logged = ladder.watch()
    found = logged(cells)
    assert found == cells[0].weight * (steps // 2) / steps > 0
    server.requests.clear()
    assert [logged(cells) for _ in range(5)] == [found] * 5 and logged(cells[1:]) == 0.0 and not server.requests
    server.fault("status", status=403, times=99)
    assert ladder.watch()(cells) == 0.0  # a display that fails ends no sweep


def test_in_a_bucket_xla_keeps_no_files_of_its_own(monkeypatch):
    said = {}
    monkeypatch.setattr(jax.config, "update", said.__setitem__)
    compiled.use_cache("compiled")
    assert said["jax_compilation_cache_dir"] == os.path.abspath("compiled") and len(said) == 3
    compiled.use_cache("gs://test/sweep/compiled/")
    assert said["jax_compilation_cache_dir"] == "gs://test/sweep/compiled"
    assert said["jax_persistent_cache_enable_xla_caches"] == "none"


def test_a_storage_error_comes_home_from_a_worker():
    error = pickle.loads(pickle.dumps(StorageError("gs://test/x: no permission")))
    assert isinstance(error, StorageError) and str(error) == error.strerror == "gs://test/x: no permission"


@pytest.mark.slow
def test_a_sweep_in_a_bucket_is_the_sweep_on_the_disk(server, tmp_path, data_dir, cache_dir):
    """Records, laws and report of a ladder that two workers train, and of a model beyond it."""
    changes = {"budgets": BUDGETS, "windows": ((0, 3), (0, 3)), "curves": True, "extrapolate": 1.5, "grid": 1}
    flags = [f"--config.sweep.{name}={value}" for name, value in changes.items()]
    for workdir in (str(tmp_path / "sweep"), "gs://test/sweep"):
        environment = server_module.environment(server.address)
        job = Job("sweep", file(tmp_path, small), f"--workdir={workdir}", *flags, cache_dir=cache_dir, devices=1,
                  environment=environment)  # fmt: skip
        _, said = job.communicate(timeout=900)
        assert job.returncode == 0, said
    assert {"cells", "compiled", "extrapolation", "report.html", "report.json", "sweep.json"} <= {*names(workdir)}
    assert read(f"{workdir}/report.json", 2**24) == (tmp_path / "sweep" / "report.json").read_bytes()
    assert any(name.endswith("-cache") for name in names(f"{workdir}/compiled"))
    (model,) = names(f"{workdir}/extrapolation")
    assert read(f"{workdir}/extrapolation/{model}/samples/grid-euler4-guidance2-1.png").startswith(b"\x89PNG")
    for place_ in [f"cells/{name}" for name in names(f"{workdir}/cells")] + [f"extrapolation/{model}"]:
        one, other = read_records(str(tmp_path / "sweep" / place_)), read_records(f"{workdir}/{place_}")
        assert one.keys() == other.keys() and one
        for at, record_ in one.items():
            for field in ("metrics", "weights_sha256", "flops_train", "images_seen", "protocol"):
                assert record_[field] == other[at][field], (place_, at, field)
    assert load_runs(f"{workdir}/cells", curves=True)
