"""Photos in tars and Parquet files: what does not fit is named, before it fills the memory."""

import dataclasses
import re

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from photos import batches, config, refused, small, tar, twins, written

from dit_jax.data import parquet, webdataset
from dit_jax.data.source import open_source


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


SPOILED = {
    "two pictures": (lambda m: [*m, ("003.jpg", small())], "found two files of the key '003', the second 003.jpg"),
    "the same twice": (lambda m: [*m, m[0]], "found two files of the key '000', the second 000.png"),
    "no label": (lambda m: m[:-1], "found no .cls beside 019.png, expected one for each picture"),
    "no picture": (lambda m: m[1:], "found a .cls but no picture of the key '000'"),
    "words": (lambda m: [*m[:-1], ("019.cls", b"cat")], "019.cls: found b'cat', expected the number of a class"),
    "a class without pictures": (lambda m: [*m[:-1], ("019.cls", b"5")], "class 2: found no pictures in '"),
    "a label of billions": (lambda m: [*m[:-1], ("019.cls", b"999999999")], "class 2: found no pictures in '"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_tars_that_do_not_fit_are_named(tmp_path, case):
    change, expected = SPOILED[case]
    tar(tmp_path / "a.tar", change(twins()))
    message = refused(open_source, config(tmp_path), "train")
    assert expected in message and (message.startswith(f"{tmp_path}/a.tar: ") or "class 2" in message)


@pytest.mark.parametrize("size", [0, 300, 512, 700, 1024, 1536, 2000, 5000, 10_000])
def test_a_tar_cut_short_is_named(tmp_path, size):
    tar(tmp_path / "a.tar", twins())
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:size])
    assert refused(open_source, config(tmp_path), "train").startswith(f"{tmp_path}/a.tar: ")
    for bad in (whole + whole, whole[:1024] + b"x" * 512 + whole[1536:], b"x" * 2000):
        (tmp_path / "a.tar").write_bytes(bad)
        assert refused(open_source, config(tmp_path), "train").startswith(f"{tmp_path}/a.tar: ")


def test_a_tar_is_indexed_once_and_anew_if_it_changes(tmp_path, monkeypatch):
    data = dataclasses.replace(config(tmp_path / "tars"), cache=False)
    tar(tmp_path / "tars/a.tar", twins())
    first, state = batches(data, 2)
    with monkeypatch.context() as patched:
        patched.setattr(webdataset, "_scan", lambda path: pytest.fail("indexed again"))
        jax.tree.map(np.testing.assert_array_equal, batches(data, 2)[0], first)
    for kept in (tmp_path / "cache/dit_jax").iterdir():
        kept.write_text(kept.read_text()[:-9])  # damaged
    jax.tree.map(np.testing.assert_array_equal, batches(data, 2)[0], first)
    tar(tmp_path / "tars/a.tar", twins(label=lambda i: (i + 1) % 2))
    assert re.match(
        r"data\.folder: a\.tar/: found '\d+ pictures, .*', expected", refused(batches, data, 1, start=state)
    )


def test_shards_of_several_kinds_or_splits_are_refused(tmp_path):
    tar(tmp_path / "train-0.tar", twins())
    data = config(tmp_path)
    assert "data.held_out_split: found 'train' but no 'test' in" in refused(open_source, data, "train")
    tar(tmp_path / "test-0.tar", [m for m in twins(start=40) if m[0].endswith("png")])
    assert "found other labels or names of classes in train-0.tar than in test-0.tar" in refused(
        open_source, data, "train"
    )
    tar(tmp_path / "test-0.tar", twins(start=40))
    assert [len(open_source(data, split)) for split in ("train", "test")] == [20, 20]
    assert len(open_source(dataclasses.replace(data, split="nowhere", held_out_split="drawn"), "drawn")) < 12
    tar(tmp_path / "train/test.tar", twins())
    assert "/train/test.tar: found the names of both splits in the path" in refused(open_source, data, "train")
    written(tmp_path, {"a.png": small()})
    assert "found both test-0.tar and a.png in" in refused(open_source, data, "train")


SCHEMAS = {
    "no pictures": ({"label": [0, 1]}, r"found the columns label \(int64\); expected one of encoded pictures"),
    "two columns": (
        {"a": [b"x", b"y"], "b": [b"x", b"y"]},
        r"a \(binary\), b \(binary\); expected one of encoded pictures",
    ),
    "words": (
        {"image": [b"x", b"y"], "label": ["cat", "dog"]},
        "column 'label': found string, expected the number",
    ),
    "empty labels": ({"image": [b"x", b"y"], "label": [0, None]}, "column 'label': found int64 with 1 empty rows"),
    "a label below 0": (
        {"image": [small()] * 40, "label": [0] * 20 + [-1] * 20},
        r"a.parquet/\d+: found label -1, expected 0 to 0",
    ),
    "no bytes": ({"image": [{"bytes": None, "path": "x.png"}] * 2}, r"a.parquet/\d: cannot decode"),
    "paths": ({"image": ["x.png", "y.png"]}, r"found the columns image \(string\)"),
    "text": ({"image": [b"x", b"y"]}, r"a.parquet/\d: cannot decode .*: cannot identify image file"),
}


@pytest.mark.parametrize("case", SCHEMAS)
def test_parquet_files_of_another_schema_are_named(tmp_path, case):
    columns, expected = SCHEMAS[case]
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    message = refused(batches, config(tmp_path), 1)
    assert message.startswith(f"{tmp_path}/a.parquet") and re.search(expected, message), message


def test_damaged_parquet_files_are_named(tmp_path):
    pq.write_table(
        pa.table({"image": [small(colour=(i, 0, 0)) for i in range(60)]}), tmp_path / "a.parquet", row_group_size=20
    )
    whole, data = (tmp_path / "a.parquet").read_bytes(), config(tmp_path)
    for bad in (b"", whole[:-9], whole[:500], b"x" * 900):
        (tmp_path / "a.parquet").write_bytes(bad)
        assert refused(open_source, data, "train").startswith(f"{tmp_path}/a.parquet: ")
    (tmp_path / "a.parquet").write_bytes(whole)
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(200) + whole[204:])
    assert re.search(r"a\.parquet/\d+: cannot read it, it may be cut short", refused(batches, data, 1))


def test_parquet_files_that_would_fill_the_memory_are_refused_before_they_are_read(tmp_path, monkeypatch):
    rows = pa.table({"image": [b"x"] * 100_000, "label": [0] * 100_000})
    pq.write_table(rows, tmp_path / "a.parquet")
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *_, **how: pytest.fail("read"))
    assert "a.parquet: found notes of 100,000 rows that its columns do not" in refused(
        open_source, config(tmp_path), "train"
    )
    monkeypatch.setattr(parquet, "_LARGEST", 200)
    pq.write_table(pa.table({"image": [small(), small((9, 9))], "label": [0, 0]}), tmp_path / "a.parquet")
    assert re.search(r"a row group of \d+ bytes, expected 200; write", refused(open_source, config(tmp_path), "train"))


def test_of_several_records_the_one_that_cannot_be_read_is_named(tmp_path):
    pq.write_table(
        pa.table({"image": [small(colour=(i, 0, 0)) for i in range(60)]}), tmp_path / "a.parquet", row_group_size=20
    )
    start = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(2).column(0)
    whole = bytearray((tmp_path / "a.parquet").read_bytes())
    offset = start.dictionary_page_offset or start.data_page_offset
    whole[offset : offset + 30] = bytes(30)
    (tmp_path / "a.parquet").write_bytes(whole)
    fetch = open_source(config(tmp_path), "train").source.listing.fetch
    assert len(fetch([0, 25])) == 2
    assert f"{tmp_path}/a.parquet/45: cannot read it" in refused(fetch, [0, 25, 45])
