"""Files and values of someone who means harm: nothing in them runs, nothing is written, memory stays small, one line says why."""

import json
import os
import pickle
import re
import subprocess
import sys
import tracemalloc

import pytest
from job import ROOT, run
from test_scaling_runs import record, workdir

from dit_jax.config import Config, DataConfig, resolve, to_dict
from dit_jax.error import UsageError
from dit_jax.files import LARGEST, LONGEST
from dit_jax.scaling.runs import load_runs
from dit_jax.workdir import scalars
from dit_jax.workdir.folder import read_config

MARK = "PWNED"


class Bomb:
    """Unpickling one leaves a mark in the working folder."""

    def __reduce__(self):
        return os.mkdir, (MARK,)


@pytest.fixture(autouse=True)
def unharmed(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, in which no payload has left its mark at the end."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield
    assert not (folder / MARK).exists() and not (ROOT / MARK).exists()


def refused(function, *arguments, match=None, peak=2**25):
    """The message of the UsageError, one printable line, that came before `peak` bytes were allocated."""
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=match) as error:
            function(*arguments)
        assert tracemalloc.get_traced_memory()[1] < peak
    finally:
        tracemalloc.stop()
    message = str(error.value)
    assert message.isprintable() and len(message) < 4100
    return message


def put(path, content):
    """A file of text or bytes, in folders made for it; its path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


# values that name code


CODE = [
    f"!!python/object/apply:os.mkdir [{MARK}]",
    f"!!python/object/new:os.mkdir [{MARK}]",
    "!!python/name:os.system",
    f"__import__('os').mkdir('{MARK}')",
    "pkg.module:Class",
    "os.path:join",
]
DATASETS = [
    *CODE,
    "",
    "huggingface:x",
    "huggingface:mnist/plain",
    "../x",
    "digits/../../x",
    "digits/..",
    "/etc/passwd",
    "gs://bucket/x",
    "https://example.org/x",
    "file:///etc/passwd",
    "digits/config=x",
    "digits:1.0.0/data_dir=x",
    "digits:../1.0.0",
    "digits\n",
    "digits\0",
    "dígits",
    "1digits",
    "digits/a/b",
    "digits/.hidden",
    "~/digits",
    "$HOME",
    "digits;ls",
    "d" * 10_000 + "/",
]


@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_that_names_code_or_a_place_is_refused(name):
    refused(lambda: DataConfig(dataset=name), match="^data.dataset: found .*, expected a TFDS name")


@pytest.mark.parametrize(
    "name", ["digits", "imagenet2012", "cifar10:3.0.2", "imagenet_v2/matched-frequency:1.*.*", "wikipedia/20230601.en"]
)
def test_names_of_tfds_are_taken(name):
    assert DataConfig(dataset=name).dataset == name


def nested(depth):
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value", [10**5000, -(10**5000), nested(100_000), {"a": nested(100_000)}, "x" * 10**6], ids=range(5)
)
def test_values_that_cannot_be_shown_are_named_by_their_key(value):
    for key in ("model.width", "optim.clip", "data.dataset", "sweep.budgets", "sweep.sizes", "sample.interval"):
        group, name = key.split(".")
        refused(lambda: resolve({group: {name: value}}), match=f"^{key}: found ")  # noqa: B023
        refused(lambda: resolve({group: {name: [value]}}), match=f"^{key}: found ")  # noqa: B023
        refused(lambda: resolve({group: value}), match=f"^{group}[.:]")  # noqa: B023
    for key in (10**5000, (1, 2), None):
        refused(lambda: resolve({key: value}), match="unknown config key")  # noqa: B023


OVERRIDES = [
    *(f"--config.data.dataset={name}" for name in [*CODE, "huggingface:x", "../x", "gs://x/y"]),
    *(
        f"--config.{key}={CODE[0]}"
        for key in ("data", "train.steps", "optim.clip", "sweep.budgets", "data.flip", "model.dtype")
    ),
    *(
        f"--config.{key}={CODE[3]}"
        for key in ("data", "train.steps", "optim.clip", "sweep.budgets", "data.flip", "model.dtype")
    ),
    "--config.data.__class__=x",
    "--config.__class__.__init__=x",
    "--config.data={'__class__': 'os.system'}",
    "--config.data={1: 2}",
    "--config.sweep.sizes[0]=3",
    f"--config.sweep.budgets={'-' * 50_000}1",
    f"--config.sweep.budgets={'[' * 50_000}",
    f"--config.sweep.budgets={'1+' * 50_000}1",
    f"--config.train.steps={'9' * 100_000}",
    "--config.train.steps=99999999999999999999",
    "--config.optim.clip=1e400",
    "--config.optim.clip=nan",
    "--config.model.dtype=\x1b[31mfloat32",
    "--config.trai\x1b[31mn.steps=3",
]


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda o: o[:60].encode("unicode_escape").decode())
def test_a_hostile_override_is_one_line_and_exit_2(override, tmp_path, cache_dir):
    config = f"--config={ROOT}/configs/digits.py"
    code, out, err = run("train", config, f"--workdir={tmp_path}/new", override, cache_dir=cache_dir)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ") and err[:-1].isprintable() and len(err) < 4100
    assert not (tmp_path / "new").exists()


# JSON of others


GOOD = json.dumps({"config": to_dict(Config())})
JSON = {
    "nested lists": "[" * 100_000,
    "nested lists, closed": "[" * 500 + "]" * 500,
    "nested objects": '{"config":' * 500 + "1" + "}" * 500,
    "wide nested lists": json.dumps({"config": {"sweep": {"budgets": [[[[[1]]]]] * 1000}}}),
    "an integer of a million digits": '{"config": {"train": {"steps": %s}}}' % ("9" * 10**6),
    "an integer of a thousand digits": '{"config": {"train": {"steps": %s}}}' % ("9" * 1000),
    "an infinity": '{"config": {"optim": {"clip": 1e400}}}',
    "no number": '{"config": {"optim": {"clip": NaN}}}',
    "a class": '{"config": {"__class__": "os.system", "__reduce__": []}}',
    "a YAML tag": '{"config": {"data": {"dataset": "!!python/object/apply:os.mkdir [PWNED]"}}}',
    "a tag where a group is": '{"config": "!!python/object/apply:os.mkdir [PWNED]"}',
    "a key twice": '{"config": {"train": {"steps": 3, "steps": 4}}}',
    "many keys": json.dumps({"config": {f"k{i}": 0 for i in range(50_000)}}),
    "a long key": json.dumps({"config": {"k" * 10**6: 0}}),
    "a long text": json.dumps({"config": {"model": {"dtype": "x" * 10**6}}}),
    "an escape code": json.dumps({"config": {"\x1b[31m\n": 0}}),
    "no UTF-8": b'{"config": {"\xff\xfe": 1}}',
    "UTF-16": GOOD.encode("utf-16"),
    "a lone surrogate": '{"config": {"\\ud800": 1}}',
    "NUL bytes": bytes(1000),
    "too long": GOOD + " " * LONGEST,
    "nothing": "",
    "no object": "[]",
    "another object": "{}",
    "two objects": GOOD + GOOD,
    "a pickle": pickle.dumps(Bomb()),
}


@pytest.mark.parametrize("name", JSON)
def test_a_hostile_config_json_is_one_line(name, tmp_path):
    path = put(tmp_path / "w" / "config.json", JSON[name])
    refused(read_config, os.path.dirname(path), peak=2**26)
    assert os.listdir(tmp_path / "w") == ["config.json"]


def test_a_sparse_config_json_of_terabytes_is_not_read(tmp_path):
    path = put(tmp_path / "w" / "config.json", "")
    os.truncate(path, 2**40)
    refused(read_config, os.path.dirname(path), match=r"not readable as JSON \(more than 1,048,576 bytes\)")


def test_overrides_of_a_run_that_hide_each_other_are_one_line(tmp_path, cache_dir):
    put(tmp_path / "w" / "config.json", GOOD)
    overrides = ["--config.model.depth=1", "--config.model={}"]
    code, out, err = run("evaluate", f"--workdir={tmp_path}/w", *overrides, cache_dir=cache_dir)
    assert (code, out, err.count("\n")) == (2, "", 1), err


def test_jobs_refuse_a_hostile_config_json_alike(tmp_path, cache_dir):
    for name in ("nested lists", "an integer of a million digits", "no UTF-8", "a YAML tag"):
        path = put(tmp_path / "w" / "config.json", JSON[name])
        for job in ("sample", "evaluate"):
            code, out, err = run(job, f"--workdir={os.path.dirname(path)}", cache_dir=cache_dir)
            assert (code, out, err.count("\n")) == (2, "", 1), err
    assert os.listdir(tmp_path / "w") == ["config.json"]


def lines(name):
    """The hostile value as the second line of a file of lines."""
    content = JSON[name].encode() if isinstance(JSON[name], str) else JSON[name]
    return json.dumps(record()).encode() + b"\n" + content.replace(b"\n", b" ") + b"\n"


@pytest.mark.parametrize("name", [n for n in JSON if n != "nothing"])
def test_a_hostile_line_of_records_or_scalars_is_named(name, tmp_path):
    path = put(tmp_path / "w" / "eval" / "records.jsonl", lines(name))
    refused(load_runs, str(tmp_path / "w"), match=r"records\.jsonl:2: ", peak=2**26)
    for read in (scalars.read_lines, lambda p: scalars.drop_after(p, 3)):
        refused(read, path, match=r"records\.jsonl:2: ", peak=2**26)
    assert os.listdir(os.path.dirname(path)) == ["records.jsonl"]


def test_lines_without_their_fields_are_named(tmp_path):
    for line, match in (
        ("3", "expected a JSON object"),
        ("{}", "no 'step', expected int"),
        ('{"step": "3"}', "'step' is '3'"),
    ):
        refused(scalars.read_lines, put(tmp_path / "m.jsonl", line + "\n"), match=match)
    path = put(tmp_path / "r.jsonl", '{"step": 3, "protocol_id": []}\n')
    refused(lambda: scalars.read_lines(path, scalars.RECORD), match=r"'protocol_id' is \[\], expected str")


def test_a_file_of_too_many_bytes_is_refused_without_being_kept(tmp_path):
    for name, head, row in (("runs.jsonl", b"", b""), ("runs.csv", b"params,tokens,loss,run\n", b"1,2,3,")):
        path, line = tmp_path / name, row + b" " * (LONGEST - len(row) - 1) + b"\n"
        with open(path, "wb") as file:
            file.writelines([head, *[line] * (LARGEST // LONGEST + 1)])
        refused(load_runs, str(path), match=rf"{name}: found more than 134,217,728 bytes", peak=2**25)
        path.unlink()


def test_one_line_without_an_end_is_not_read_whole(tmp_path):
    for name, start in (("r.jsonl", b'{"run": "'), ("r.csv", b"params,tokens,loss,run\n1,2,3,")):
        path = put(tmp_path / name, start)
        os.truncate(path, 10**9)
        refused(load_runs, path, match="found more than 1,048,576 bytes in a line", peak=2**24)
        refused(scalars.read_lines, path, match="found more than|expected a JSON object", peak=2**24)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"run": "a\x1b[31mb"}, r"run is 'a\\x1b\[31mb', expected"),
        ({"run": "a\0b"}, r"run is 'a\\x00b', expected"),
        ({"run": "a\nb"}, r"run is 'a\\nb', expected"),
        ({"run": "\u202egnp.exe"}, "expected at most 200 characters, all of them printable"),
        ({"run": "\ud800"}, "all of them printable"),
        ({"run": "x" * 201}, "at most 200 characters"),
        ({"run": ["x"]}, "a list"),
        ({"step": 1e400}, "step is inf"),
        ({"params_active": 10**400}, "params_active is 1000"),
        ({"params_active": True}, "params_active is True"),
        ({"tokens_seen": 1e300}, "expected a number from 1e-100 to 1e"),
        ({"metrics": {"loss": "0.5"}}, "metrics.loss is '0.5', expected a number"),
        ({"metrics": {"loss": [1]}}, r"metrics.loss is \[1\]"),
        ({"metrics": {"loss": True}}, "metrics.loss is True"),
        ({"metrics": {"loss": 0.5, "loss_se": "x"}}, "metrics.loss_se is 'x'"),
        ({"metrics": {"\x1b[31m": 0.5}}, r"found \\x1b\[31m"),
        ({"protocol_id": {"a": 1}}, "protocol_id is {'a': 1}"),
        ({"protocol": []}, "protocol is"),
    ],
)
def test_a_hostile_field_of_a_record_is_named(changes, match, tmp_path):
    refused(load_runs, workdir(tmp_path / "w", record(**changes)), match=match)


def test_protocols_that_differ_in_their_nesting_alone_are_refused(tmp_path):
    a, b = record(protocol={"a": {"b": 1}}), record(run="b", protocol={"a.b": 1})
    refused(load_runs, workdir(tmp_path / "w", a, b), match=r"protocol is \{'a\.b': 1, 'task': 'labels'\}, but")


def test_folders_nested_without_end_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    os.chdir(tmp_path)
    try:
        refused(load_runs, ".", match="folders more than 32 deep")
    finally:  # shutil.rmtree, with which pytest tidies up, goes too deep here
        subprocess.run(["rm", "-rf", "d"], check=True)


# CSVs


HEAD = "params,tokens,loss,run\n"
CSV = {
    "a long field": (HEAD + "1,2,3," + "x" * 200_000, "field larger than field limit"),
    "a quoted field over many lines": (HEAD + '1,2,3,"' + "x\n" * 100_000, "field larger than field limit"),
    "a million columns": ("params,tokens,loss" + ",x" * 500_000, "found 500,003 columns, expected at most 1,000"),
    "a million empty columns": ("," * 1_000_000, "found 1,000,001 columns"),
    "columns over many lines": ("params,tokens,loss" + ',"\n"' * 500_000, "found 500,003 columns"),
    "a column twice": ("params,tokens,loss,loss\n1,2,3,4\n", "the column 'loss' twice"),
    "a row too long": ("params,tokens,loss\n1,2,3,5\n", "runs.csv:2: found 4 fields, expected 3"),
    "a row too short": (HEAD + "1,2\n", "runs.csv:2: loss is blank, nan or a word"),
    "a quote without end": (HEAD + '1,2,3,"x\n', "unexpected end of data"),
    "an infinity": (HEAD + "inf,2,3,x\n", "params is inf, expected a finite number above 0"),
    "an overflow": (HEAD + "1,1e400,3,x\n", "tokens is 1e400, expected a finite number above 0"),
    "an overflowing product": (HEAD + "1e99,1e99,3,x\n", "flops is .*e\\+198, expected a number from 1e-100"),
    "no number": (HEAD + "1,2,nan,x\n", "loss is blank, nan or a word"),
    "a negative": (HEAD + "1,2,-3,x\n", "loss is -3"),
    "a zero": (HEAD + "0,2,3,x\n", "params is 0"),
    "an empty cell": (HEAD + "1,,3,x\n", "tokens is ''"),
    "many digits": (HEAD + "9" * 100_000 + ",2,3,x\n", "params is 999.*, expected a finite number"),
    "an expression": (HEAD + "1,2,=cmd|' /C calc'!A0,x\n", 'loss is "=cmd'),
    "a NUL in a number": (HEAD + "1,2,3\0,x\n", r"loss is '3\\x00', expected a number"),
    "a NUL in a name": (HEAD + "1,2,3,x\0y\n", r"run is 'x\\x00y', expected"),
    "an escape code": (HEAD + "1,2,3,\x1b[2Jx\n", r"run is '\\x1b\[2Jx', expected"),
    "an escape code in a group": ("params,tokens,loss,group\n1,2,3,\x1b[2Jx\n", r"group is '\\x1b\[2Jx'"),
    "a line break in a name": (HEAD + '1,2,3,"x\ny"\n', r"runs.csv:3: run is 'x\\ny'"),
    "an escape code in the header": ("params,tokens,loss,\x1b[2Jrum\n1,2,3,x\n", None),
    "UTF-16": ((HEAD + "1,2,3,x\n").encode("utf-16"), "found UTF-16, expected UTF-8"),
    "a pickle": (pickle.dumps(Bomb()), "no column 'params'"),
    "an archive": (b"PK\3\4" + bytes(range(256)) * 8, None),
}


@pytest.mark.parametrize("name", CSV)
def test_a_hostile_csv_is_one_line(name, tmp_path):
    content, match = CSV[name]
    path = put(tmp_path / "runs.csv", content)
    if name == "an escape code in the header":  # of a column that nobody reads
        assert load_runs(path)[0].name == "row1"
        return
    refused(load_runs, path, match=match, peak=2**27)


def test_csvs_of_other_programs_are_read(tmp_path):
    text = '\ufeffparams, tokens ,loss,run,note,,\r\n1,2,3,x,"a\r\nb, c",,\r\n\r\n4,5,6,"y, z"\r\n'
    one, two = load_runs(put(tmp_path / "runs.csv", text))
    assert (one.name, one.params, two.name, two.loss) == ("x", 1, "y, z", 6)


# what is shown


TAG = "<script>alert(1)</script>"
NAME = f"../../{TAG}&\"'"
LADDER = [
    (n, c / n, 2 + 100 / n**0.5 + 400 / (c / n) ** 0.5)
    for c in (1e9, 4e9, 16e9)
    for n in (c**0.5 / 8, c**0.5 / 4, c**0.5 / 2)
]


def ladder(folder, name=NAME, protocol=None):
    """Records of three budgets, all with hostile names and protocol."""
    made = [
        record(run=f"{name}{i}", loss=loss, params_active=n, tokens_seen=d, images_seen=d, flops_train=6 * n * d)
        | {"protocol": protocol or {TAG: TAG, "\x1b[31m": "\x1b[31m"}}
        for i, (n, d, loss) in enumerate(LADDER)
    ]
    return workdir(folder, *made)


def scaling(command, *arguments, cwd):
    words = [sys.executable, "-m", "dit_jax.scaling", command, *map(str, arguments), "--resamples=20"]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return done.returncode, done.stdout, done.stderr


TAGS = {  # of a report
    "body", "caption", "circle", "dd", "details", "div", "dl", "dt", "fieldset", "figcaption", "figure", "g",
    "h1", "h2", "h3", "h4", "head", "html", "img", "input", "label", "li", "main", "meta",
    "nav", "p", "path", "rect", "script", "section", "style", "sub", "summary", "sup", "svg", "table",
    "tbody", "td", "text", "th", "thead", "title", "tr", "ul",
}  # fmt: skip


def test_a_report_shows_hostile_names_as_text_and_writes_its_files_only(tmp_path):
    runs, out = ladder(tmp_path / "w"), tmp_path / "report"
    out.mkdir()
    code, said, err = scaling("report", runs, f"--out={out}/report.html", f"--title={TAG}", cwd=out)
    assert code == 0, err
    page = (out / "report.html").read_text()
    assert (
        page.count("<script") == 1
        and page.count("sha256-") == 2
        and page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 11
    )
    assert set(re.findall(r"<(\w+)", page)) <= TAGS
    known = ("isoflop", "N_opt", "D_opt", "L_opt", "residuals")
    names = {name.partition(".")[0].partition("-")[0] for name in os.listdir(out) if name.endswith(".png")}
    assert {"isoflop", "N_opt", "L_opt", "residuals"} <= names <= set(known)
    assert sorted(n for n in os.listdir(out) if not n.endswith(".png")) == ["report.html", "report.json"]
    assert sorted(os.listdir(tmp_path)) == ["here", "report", "w"]
    assert all(line.isprintable() for line in (said + err).split("\n"))


@pytest.mark.slow
def test_a_plan_of_hostile_names_is_printable_and_writes_nothing(tmp_path):
    code, said, err = scaling("plan", ladder(tmp_path / "w"), "--flops=1e10", cwd=tmp_path / "here")
    assert code == 0, err
    assert all(line.isprintable() for line in (said + err).split("\n"))
    code, said, err = scaling("plan", ladder(tmp_path / "v", "\x1b[2J"), "--flops=1e10", cwd=tmp_path / "here")
    assert (code, said) == (2, "") and "\x1b" not in err and err.count("\n") == 1
    assert os.listdir(tmp_path / "here") == []


def test_reading_hostile_files_keeps_a_process_small(tmp_path):
    """The resident memory of a process that reads them all, against one that reads nothing."""
    for name in ("r.jsonl", "r.csv"):
        os.truncate(put(tmp_path / name, "params,tokens,loss,run\n1,2,3,"), 4 * 10**9)
    os.truncate(put(tmp_path / "w" / "config.json", "{"), 4 * 10**9)
    code = f"""
import resource
from dit_jax.workdir.folder import read_config
from dit_jax.error import UsageError
from dit_jax.scaling.runs import load_runs
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for read, path in ((load_runs, "r.jsonl"), (load_runs, "r.csv"), (read_config, "w")):
    try:
        read({str(tmp_path)!r} + "/" + path)
    except UsageError:
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert len(found.split()) == 3 and max(map(int, found.split())) < 64, found  # MiB
