"""Whatever comes through the doors for configs, records, tables and arrays: a valid result, or a UsageError of one line.

`DIT_JAX_FUZZ` says how many cases each door gets (100). They are drawn anew each time; a failure prints how to repeat it.
"""

import copy
import io
import itertools
import json
import math
import os
import sys
import tarfile
import zipfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from absl import flags
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from ml_collections import config_flags
from PIL import Image
from safetensors.numpy import save
from test_scaling_runs import record

from dit_jax.config import Config, DataConfig, resolve, template, to_dict
from dit_jax.data.source import open_source
from dit_jax.error import UsageError
from dit_jax.job import launch
from dit_jax.networks.weights import read_arrays
from dit_jax.scaling.runs import load_runs
from dit_jax.workdir import scalars

CASES = int(os.environ.get("DIT_JAX_FUZZ", "100"))
FUZZ = settings(
    max_examples=CASES,
    deadline=timedelta(seconds=20),  # a case that hangs, on a busy machine
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
pytestmark = pytest.mark.timeout(3600)

CONFIG = to_dict(Config())
KEYS = [f"{group}.{key}" for group, values in CONFIG.items() for key in values]
TEXT = st.text(st.characters(), max_size=12)  # lone surrogates too
ODD = st.sampled_from(
    [
        math.nan,
        math.inf,
        1e308,
        5e-324,
        -1,
        0,
        2**63,
        10**400,
        "",
        "../x",
        "\x1b[31m",
        "\0",
        "true",
        "digits",
        "__class__",
    ]
) | st.sampled_from(["!!python/object/apply:os.system ['true']", "os:system", [[[[[[]]]]]], {"a": {"b": {}}}])
LEAF = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | ODD
VALUE = st.recursive(
    LEAF,
    lambda v: st.lists(v, max_size=4) | st.dictionaries(TEXT | st.sampled_from(sorted(CONFIG)), v, max_size=4),
    max_leaves=12,
)
TOKENS = [
    b"NaN",
    b"1e400",
    b"-1",
    b"0",
    b"null",
    b'"',
    b"[" * 40,
    b"{",
    b"}",
    b",",
    b":",
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"\x1b[2J",
]
TOKENS += [b"9" * 400, b"9" * 5000, b"../", b"\\ud800", b'"loss": 1, ', b"<script>", b"[" * 2000, b"\xef\xbb\xbf", b" "]
EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 12), st.binary(max_size=8) | st.sampled_from(TOKENS)), max_size=4
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that holds one run, whose files each case writes anew."""
    path = tmp_path_factory.mktemp("fuzz")
    (path / "run" / "eval").mkdir(parents=True)
    return path


def outcome(function, *arguments):
    """What the function gave, or None after a UsageError of one printable line; anything else is a failure."""
    try:
        return function(*arguments)
    except UsageError as error:
        message = str(error)
        assert message and message.isprintable() and len(message) < 4100
        return None


def edited(content: bytes, edits) -> bytes:
    """Bytes with parts of them replaced."""
    for where, drop, new in edits:
        i = int(where * len(content))
        content = content[:i] + new + content[i + drop :]
    return content


def replaced(values: dict, changes) -> dict:
    """Nested values with leaves or groups replaced; a key may be new."""
    values = copy.deepcopy(values)
    for path, value in changes:
        group = values
        for name in path[:-1]:
            group = group[name] if isinstance(group, dict) and isinstance(group.get(name), dict) else group
        group[path[-1]] = value
    return values


def file_of(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def json_of(value) -> bytes:
    return json.dumps(value).encode()


def tree(folder):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*"))


# the config door

PATHS = [key.split(".") for key in KEYS] + [[group] for group in CONFIG] + [["model", "__class__"], ["__init__"]]
CHANGES = st.lists(st.tuples(st.sampled_from(PATHS), VALUE), max_size=3)
CONFIGS = VALUE | st.dictionaries(st.integers() | TEXT | st.sampled_from(sorted(CONFIG)), VALUE, max_size=3)
CONFIGS |= CHANGES.map(lambda changes: replaced(CONFIG, changes))


def door(values):
    """The config that values become; what goes through comes back from JSON the same."""
    cfg = outcome(resolve, values)
    if cfg is not None:
        assert (
            isinstance(cfg, Config) and resolve(json.loads(json.dumps(to_dict(cfg)))) == cfg and hash(cfg) is not None
        )
    return cfg


@FUZZ
@given(CONFIGS)
def test_values_of_a_config(values):
    door(values)


NUMBERS = st.integers().map(str) | st.floats().map(str)
LITERALS = st.sampled_from(
    ["(", "[" * 300, "-" * 5000 + "1", "{'a': 1}", "(1,)", "((1, 2), (3, 4))", "True", "None", "'x'", "1+1j"]
)
OVERRIDES = st.tuples(
    st.sampled_from([*KEYS, *CONFIG, "model.depthh", "", ".", "model.", "model..depth", "sweep.sizes[0]", "__class__"])
    | TEXT,
    st.sampled_from(["=", "", " ", "=="]),
    NUMBERS | LITERALS | TEXT | VALUE.map(str),
).map(lambda p: [f"--config.{p[0]}", p[2]] if p[1] == " " else [f"--config.{''.join(p)}"])


def overridden(arguments):
    """The config of a command line."""
    values = flags.FlagValues()
    before, sys.argv = sys.argv, ["job", *itertools.chain(*arguments)]
    try:
        launch._check_overrides()
        with launch._parsing(values):
            config_flags.DEFINE_config_dict("config", template(), flag_values=values)
            values(sys.argv)
        return resolve(values.config)
    finally:
        sys.argv = before


@FUZZ
@given(st.lists(OVERRIDES, min_size=1, max_size=2))
def test_overrides_on_a_command_line(arguments):
    cfg = outcome(overridden, arguments)
    assert cfg is None or isinstance(cfg, Config)


GOOD = json.dumps({"config": CONFIG}).encode()
CONFIG_FILES = st.binary(max_size=200) | EDITS.map(lambda edits: edited(GOOD, edits))
CONFIG_FILES |= CHANGES.map(lambda changes: json_of({"config": replaced(CONFIG, changes)}))


def config_of(folder, content):
    file_of(folder / "run" / "config.json", content)
    before = tree(folder)
    cfg = outcome(launch.read_config, str(folder / "run"))
    assert tree(folder) == before and (cfg is None or isinstance(cfg, Config))
    return cfg


@FUZZ
@given(CONFIG_FILES)
def test_bytes_of_a_config_file(folder, content):
    config_of(folder, content)


# the reader of records

FIELDS = [[name] for name in record()] + [
    ["metrics", "loss"],
    ["metrics", "loss_se"],
    ["protocol", "weights"],
    ["protocol", "data"],
]
RECORDS = st.lists(
    st.tuples(
        st.sampled_from("abc"), st.integers(0, 9), st.lists(st.tuples(st.sampled_from(FIELDS), VALUE), max_size=2)
    ),
    min_size=1,
    max_size=4,
).map(lambda rows: b"".join(json_of(replaced(record(run, step), changes)) + b"\n" for run, step, changes in rows))
LINES = b"".join(json.dumps(record(run, step)).encode() + b"\n" for run in "ab" for step in (10, 20))
RECORD_FILES = st.binary(max_size=200) | RECORDS | EDITS.map(lambda edits: edited(LINES, edits))


def sound(runs):
    for run in runs:
        numbers = (run.params, run.tokens, run.flops, run.loss)
        assert all(math.isfinite(n) and n > 0 for n in numbers) and math.isfinite(run.loss_se)
        assert run.name.isprintable() and run.group.isprintable()


def records_of(folder, content):
    path = file_of(folder / "run" / "eval" / "records.jsonl", content)
    before = tree(folder)
    runs = outcome(load_runs, str(folder / "run"))
    sound(runs or [])
    lines = outcome(scalars.read_lines, path, scalars.RECORD)
    assert lines is None or all(type(line["step"]) is int for line in lines)
    outcome(scalars.drop_after, path, 5)
    assert tree(folder) == before
    return runs


@FUZZ
@given(RECORD_FILES)
def test_records_of_a_run(folder, content):
    records_of(folder, content)


# the reader of tables

TABLE = b"params,tokens,loss,flops,images,run,group,loss_se\r\n" + b"".join(
    b'%d,%d,%.2f,,%d,"run, %d",small,0.01\r\n' % (10**i, 20 * 10**i, 3 - 0.1 * i, 10**i, i) for i in range(1, 6)
)
CELLS = st.sampled_from(
    [
        "1",
        "2.5",
        "",
        "nan",
        "1e400",
        "-1",
        "x",
        "\0",
        "1,5",
        '"',
        "\x1b[31m",
        "params",
        "tokens",
        "loss",
        "run",
        "lossse",
    ]
)
TABLES = st.lists(st.lists(CELLS | TEXT, max_size=6).map(",".join), max_size=5).map(
    lambda rows: "\n".join(rows).encode(errors="surrogatepass")
)
HEADED = TABLES.map(lambda rows: b"params,tokens,loss,run\n" + rows)
CSV_FILES = st.binary(max_size=200) | TABLES | HEADED | EDITS.map(lambda edits: edited(TABLE, edits))


def table_of(folder, content):
    path = file_of(folder / "runs.csv", content)
    before = tree(folder)
    runs = outcome(load_runs, path)
    sound(runs or [])
    assert tree(folder) == before
    return runs


@FUZZ
@given(CSV_FILES)
def test_tables_of_runs(folder, content):
    table_of(folder, content)


# the reader of arrays


def arrays() -> dict:
    """File name -> its bytes."""
    values = {"a": np.arange(12, dtype=">f4").reshape(3, 4), "b/c": np.asfortranarray(np.ones((2, 3)))}
    files = {name: io.BytesIO() for name in ("x.npy", "x.npz", "y.npz")}
    np.save(files["x.npy"], values["b/c"])
    np.savez(files["x.npz"], **values)
    np.savez_compressed(files["y.npz"], **values)
    files["x.pt"] = io.BytesIO()
    with zipfile.ZipFile(files["x.pt"], "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}q\0.")
    return {name: file.getvalue() for name, file in files.items()} | {
        "x.safetensors": save({"a": np.ones((2, 3))}, {"b": "c"})
    }


ARRAYS = arrays()
ARRAY_FILES = st.sampled_from(sorted(ARRAYS)).flatmap(
    lambda name: st.tuples(
        st.just(name), st.binary(max_size=200) | EDITS.map(lambda edits: edited(ARRAYS[name], edits))
    )
)


def arrays_of(folder, named):
    path = file_of(folder / named[0], named[1])
    before = tree(folder)
    found = outcome(read_arrays, path, 2**20)
    assert found is None or all(
        isinstance(a, np.ndarray) and a.dtype.isnative and a.nbytes <= 2**20 for a in found.values()
    )
    assert tree(folder) == before
    return found


@FUZZ
@given(ARRAY_FILES)
def test_files_of_arrays(folder, named):
    arrays_of(folder, named)


# the doors to pictures in shards


def shards() -> dict:
    """File name -> bytes of shards of 8 pictures."""
    files = {"a.tar": io.BytesIO(), "a.parquet": io.BytesIO()}
    pictures = []
    for i in range(8):
        Image.new("RGB", (2, 2), (i, 0, 0)).save(file := io.BytesIO(), "PNG")
        pictures.append(file.getvalue())
    with tarfile.open(fileobj=files["a.tar"], mode="w") as tar:
        for i, content in enumerate(pictures):
            for name, data in ((f"{i}.png", content), (f"{i}.cls", b"%d" % (i % 2))):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    table = pa.table({"image": [{"bytes": x, "path": ""} for x in pictures], "label": [0, 1] * 4})
    pq.write_table(table, files["a.parquet"], row_group_size=3)
    return {name: file.getvalue() for name, file in files.items()}


SHARDS = shards()
SHARD_FILES = st.tuples(st.sampled_from(sorted(SHARDS)), EDITS)  # not their 20 kB, which hypothesis would print


def pictures_of(folder, case):
    named = case[0], edited(SHARDS[case[0]], case[1])
    path = folder / named[0].partition(".")[2] / named[0]
    path.parent.mkdir(exist_ok=True)
    data = DataConfig(folder=str(path.parent), image_size=2)
    file_of(path, named[1])
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", "/dev/null/none")
        source = outcome(open_source, data, "train")
    return source and outcome(source.read, np.arange(len(source)))


@FUZZ
@given(SHARD_FILES)
def test_shards_of_pictures(folder, case):
    pictures_of(folder, case)


# that the fuzzers see both sides


@pytest.mark.parametrize(
    ("strategy", "read"),
    [
        (CONFIGS, lambda folder, case: case != {} and case != CONFIG and door(case)),
        (st.lists(OVERRIDES, min_size=1, max_size=1), lambda folder, case: outcome(overridden, case)),
        (CONFIG_FILES, lambda folder, case: case != GOOD and config_of(folder, case)),
        (RECORD_FILES, lambda folder, case: case != LINES and records_of(folder, case)),
        (CSV_FILES, lambda folder, case: case != TABLE and table_of(folder, case)),
        (ARRAY_FILES, lambda folder, case: case[1] != ARRAYS[case[0]] and arrays_of(folder, case)),
        (
            SHARD_FILES,
            lambda folder, case: edited(SHARDS[case[0]], case[1]) != SHARDS[case[0]] and pictures_of(folder, case),
        ),
    ],
    ids=["values", "overrides", "config files", "records", "tables", "arrays", "shards"],
)
def test_cases_that_pass_and_cases_that_do_not_are_both_drawn(folder, strategy, read):
    quick = settings(FUZZ, max_examples=3000, phases=[Phase.generate])
    find(strategy, lambda case: bool(read(folder, case)), settings=quick)
    find(strategy, lambda case: read(folder, case) is None, settings=quick)
