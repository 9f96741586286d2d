"""Damage of latents is named, never read: of files, of notes, and of records, which may be replaced."""

import dataclasses
import math
import os
import re
import shutil
import zlib

import numpy as np
import pytest
from latents import (
    INFO,
    SIZE,
    assert_same,
    batches,
    change_notes,
    config,
    cut,
    error_of,
    examples,
    records_of,
    rewrite,
    seal_shard,
    shard_name,
    write_store,
)
from runs import write_latents

from dit_jax.data import counter, latents, posterior, source
from dit_jax.data.latents import open_latents
from dit_jax.data.order import order as permuted
from dit_jax.error import UsageError

pytestmark = pytest.mark.timeout(60)  # nothing hangs, whatever is broken


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("latents"))


@pytest.fixture
def broken(store, tmp_path):
    """A copy of the folder of the split train, to damage."""
    shutil.copytree(f"{store}/train", tmp_path / "train")
    return tmp_path / "train"


def cut_unnoticed(folder, path):
    cut(folder, path)
    seal_shard(folder, 1)
    return f"latents {path}: cannot read it: ArrayRecord file should be"


def extra(folder, path):
    path.write_bytes(path.read_bytes() + b"x")
    return f"latents {path}: found {path.stat().st_size} bytes, expected {path.stat().st_size - 1}; delete"


def empty(folder, path):
    path.write_bytes(b"")
    return f"latents {path}: found 0 bytes, expected "


def missing(folder, path):
    path.unlink()
    return f"latents {path}: cannot read it: [Errno 2] No such file or directory"


def directory(folder, path):
    path.unlink()
    path.mkdir()
    return f"latents {path}: found "


def pipe(folder, path):
    path.unlink()
    os.mkfifo(path)
    return f"latents {path}: found 0 bytes, expected "


def foreign_link(folder, path):
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")
    return f"latents {path}: found a link to {folder.parent}/elsewhere, expected a file of this folder"


def other_shard(folder, path):
    shutil.copy(folder / shard_name(2, 3), path)
    seal_shard(folder, 1)
    return f"latents {path}: found 10 records, expected 25; delete"


def no_notes(folder, path):
    (folder / "latents.json").unlink()
    return f"latents {folder}/latents.json: found no such file, so the latents are not complete; run encode"


def notes_pipe(folder, path):
    (folder / "latents.json").unlink()
    os.mkfifo(folder / "latents.json")
    return f"latents {folder}/latents.json: found no regular file"


def huge_notes(folder, path):
    os.truncate(folder / "latents.json", 1 << 33)
    return f"latents {folder}/latents.json: found no regular file of up to 4194304 bytes"


WHOLE = [cut, cut_unnoticed, extra, empty, missing, directory, pipe, foreign_link, other_shard]
WHOLE += [no_notes, notes_pipe, huge_notes]


@pytest.mark.parametrize("damage", WHOLE, ids=lambda f: f.__name__)
def test_damaged_files_are_named(broken, damage):
    expected = damage(broken, broken / shard_name(1, 3))
    assert error_of(open_latents, str(broken)).startswith(expected)


def test_verify_hashes_whole_shards(broken):
    open_latents(str(broken), verify=True)
    path = broken / shard_name(1, 3)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1  # padding that no record needs
    path.write_bytes(content)
    open_latents(str(broken))
    assert error_of(open_latents, str(broken), verify=True).startswith(f"latents {path}: found SHA-256 ")


NOTES = {
    "version": (lambda n: n.update(version=2), "version: found 2, expected 1"),
    "missing key": (lambda n: n.pop("scale"), "notes: found ["),
    "unknown key": (lambda n: n.update(more=1), "notes: found ["),
    "float as text": (lambda n: n.update(scale="0.5"), "notes.scale: found '0.5' (str), expected float"),
    "bool as int": (lambda n: n.update(records=True), "notes.records: found True (bool), expected int"),
    "not finite": (lambda n: n.update(shift=math.nan), "scale, shift: found 0.5, nan, expected finite"),
    "other channels": (
        lambda n: n.update(scale=[0.5] * 3),
        "scale: found 3 numbers, expected one, or one for each of the 2",
    ),
    "text among numbers": (
        lambda n: n.update(shift=["1", 0.0]),
        "scale, shift: found 0.5, ('1', 0.0), expected finite",
    ),
    "lists in lists": (
        lambda n: n.update(shift=[[1.0], 0.0]),
        "scale, shift: found 0.5, ([1.0], 0.0), expected finite",
    ),
    "a channel of scale 0": (lambda n: n.update(scale=[1.0, 0.0]), "scale, shift: found (1.0, 0.0), 0.25, expected"),
    "dtype": (lambda n: n.update(dtype="int8"), "dtype: found 'int8', expected one of float16"),
    "absurd shape": (lambda n: n.update(shape=[4096, 4096, 4096]), "shape: found "),
    "negative shape": (lambda n: n.update(shape=[-1, 4, 2]), "shape: found (-1, 4, 2), expected (h, w, c)"),
    "digest": (lambda n: n.update(autoencoder_sha256="xyz"), "autoencoder_sha256: found 'xyz', expected the 64"),
    "no shards": (lambda n: n.update(shards=[], records=0), "shards: found 0, expected 1 to"),
    "zero records": (lambda n: n["shards"][0].update(records=0), "shards[0].records: found 0, expected at least 1"),
    "other sum": (lambda n: n.update(records=59), "records: found 59, expected 60, the sum over the shards"),
    "path": (lambda n: n["shards"][0].update(file="../x"), "shards[0].file: found '../x', expected 'latents-00000-of"),
    "absolute": (lambda n: n["shards"][2].update(file="/etc/passwd"), "shards[2].file: found '/etc/passwd', expected"),
    "shard twice": (lambda n: n["shards"].__setitem__(1, n["shards"][0]), "shards[1].file: found 'latents-00000-of"),
    "shard keys": (lambda n: n["shards"][1].pop("sha256"), "shards[1]: found ['bytes', 'file', 'records'], expected"),
    "shard text": (lambda n: n["shards"].__setitem__(1, "x"), "shards[1]: found str, expected the keys"),
    "control characters": (lambda n: n.update(dataset="a\x1b[31m"), "dataset: found 'a\\x1b[31m', expected a name"),
}


@pytest.mark.parametrize("name", NOTES)
def test_wrong_notes_are_named(broken, name):
    change, expected = NOTES[name]
    change_notes(broken, change)
    assert error_of(open_latents, str(broken)).startswith(f"latents {broken}/latents.json: {expected}")


def test_edited_notes_are_refused(broken):
    change_notes(broken, lambda notes: notes.update(scale=0.6), seal=False)
    message = error_of(open_latents, str(broken))
    assert message.startswith(f"latents {broken}/latents.json: checksum: found ") and "(damaged or edited)" in message


def test_no_damage_of_the_notes_passes(broken):
    path, rng = broken / "latents.json", np.random.default_rng(0)
    good, info = path.read_bytes(), open_latents(str(broken)).info
    wholes = [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"1" * 5000,
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"version": "1"}',
        b'{"version": {}}',
    ]
    for trial in range(150):
        content = bytearray(good)
        place = int(rng.integers(len(good)))
        if trial < len(wholes):
            content = wholes[trial]
        elif trial % 3 == 0:
            content = content[:place]
        elif trial % 3 == 1:
            content[place] ^= 1 << int(rng.integers(8))
        else:
            del content[place : place + int(rng.integers(1, 60))]
        path.write_bytes(content)
        try:
            assert open_latents(str(broken)).info == info  # white space
        except UsageError as error:
            assert str(broken) in str(error)


def sealed(record, **fields):
    """A record with changed fields and the right CRC."""
    table = np.frombuffer(record, INFO.layout).copy()
    for name, value in fields.items():
        table[name] = value
    content = table.tobytes()[4:]
    return zlib.crc32(content).to_bytes(4, "little") + content


def with_value(record, value):
    values = np.frombuffer(record, INFO.layout)["values"].copy()
    values[0, 1, 1, 2, 3, 1] = value
    return sealed(record, values=values)


def replaced(records, i, new):
    return [*records[:i], new, *records[i + 1 :]]


# name -> (records of shard 1 -> damaged ones, number of the first bad record in the split, message)
BAD = 25 + 4
RECORDS = {
    "truncated record": (lambda r: replaced(r, 4, r[4][:-1]), BAD, "found 271 bytes, expected 272"),
    "empty record": (lambda r: replaced(r, 4, b""), BAD, "found 0 bytes, expected 272"),
    "another dtype": (lambda r: replaced(r, 4, r[4] + r[4][16:]), BAD, "found 528 bytes, expected 272"),
    "another shape": (lambda r: replaced(r, 4, r[4][:144]), BAD, "found 144 bytes, expected 272"),
    "changed value": (lambda r: replaced(r, 4, r[4][:99] + b"?" + r[4][100:]), BAD, "found CRC-32 "),
    "zeros": (lambda r: replaced(r, 4, bytes(272)), BAD, "found CRC-32 "),
    "NaN": (lambda r: replaced(r, 4, with_value(r[4], np.nan)), BAD, "found NaN or infinity, expected finite values"),
    "infinity": (lambda r: replaced(r, 4, with_value(r[4], -np.inf)), BAD, "found NaN or infinity, expected finite"),
    "label too large": (lambda r: replaced(r, 4, sealed(r[4], label=7)), BAD, "found label 7, expected 0 to 6"),
    "negative label": (lambda r: replaced(r, 4, sealed(r[4], label=-1)), BAD, "found label -1, expected 0 to 6"),
    "duplicate": (lambda r: replaced(r, 4, r[3]), BAD, f"found record number {BAD - 1}, expected number {BAD} (a dupl"),
    "swapped": (lambda r: [*r[:4], r[5], r[4], *r[6:]], BAD, f"found record number {BAD + 1}, expected number {BAD}"),
    "reversed": (lambda r: r[::-1], 25, "found record number 49, expected number 25"),
    "huge number": (lambda r: replaced(r, 4, sealed(r[4], index=2**64 - 1)), BAD, f"found record number {2**64 - 1}"),
}


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", RECORDS)
def test_malformed_records_are_named(broken, name, cache):
    change, number, expected = RECORDS[name]
    path = broken / shard_name(1, 3)
    rewrite(broken, 1, change(records_of(path)))
    message = error_of(lambda: [open_latents(str(broken)).read(np.array([i])) for i in range(SIZE)])
    assert message.startswith(f"latents {path}, record {number}: {expected}") and "encode again" in message
    data = config(broken.parent, cache=cache, workers=2, prefetch=2)
    message = error_of(batches, data, 4)  # from any thread; one epoch has 3.75 batches
    assert f"latents {path}, record " in message


def test_swapped_shards_are_named(broken):
    first, second = (records_of(broken / shard_name(i, 3)) for i in (0, 1))
    rewrite(broken, 0, second)
    rewrite(broken, 1, first)
    message = error_of(lambda: [open_latents(str(broken)).read(np.array([i])) for i in range(SIZE)])
    expected = "record 0: found record number 25, expected number 0 (a duplicate, or another order)"
    assert message.startswith(f"latents {broken}/{shard_name(0, 3)}, {expected}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_values_that_are_not_finite_are_found_in_every_dtype(tmp_path, dtype):
    info = dataclasses.replace(INFO, dtype=dtype)
    found = write_latents(str(tmp_path / "train"), info, examples(info, 5))
    table = np.zeros(4, info.layout)
    values = table["values"]
    values[1, 0, 0, 0, 0, 0], values[2, 1, 1, 3, 3, 1] = np.inf, np.nan
    assert latents._finite(values, dtype).tolist() == [True, False, False, True]
    assert latents._finite(found.read(np.arange(5))[0], dtype).all()


def test_flipped_bits_are_found_or_harmless(broken):
    path, rng = broken / shard_name(1, 3), np.random.default_rng(0)
    good, split = path.read_bytes(), open_latents(str(broken))
    expected, detected = split.read(np.arange(SIZE)), 0
    for trial in range(60):
        content = bytearray(good)
        place = int(rng.integers(12_000)) if trial % 2 else int(rng.integers(len(good)))
        content[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        try:
            values, cond = open_latents(str(broken)).read(np.arange(SIZE))
            np.testing.assert_array_equal(values, expected[0])
            np.testing.assert_array_equal(cond["label"], expected[1]["label"])
        except UsageError as error:
            assert str(path) in str(error)
            detected += 1
    assert detected >= 20


# ---- malformed records left out


@pytest.fixture
def spoiled(broken):
    """Records 29, 30 and 59, the last one, are malformed. The rule: 31, 31 and 0 stand in their places."""
    path = broken / shard_name(1, 3)
    records = records_of(path)
    rewrite(broken, 1, replaced(replaced(records, 4, records[4][:-1]), 5, with_value(records[5], np.nan)))
    records = records_of(broken / shard_name(2, 3))
    rewrite(broken, 2, replaced(records, 9, sealed(records[9], label=99)))
    return broken.parent


STANDS = np.array([{29: 31, 30: 31, 59: 0}.get(i, i) for i in range(SIZE)])


@pytest.mark.parametrize("cache", [True, False])
def test_malformed_records_are_replaced_and_counted(store, spoiled, cache):
    data = config(spoiled, skip_bad=3, cache=cache, flip=True)
    opened = source.open_source(data, "train")
    found = batches(data, 12, source=opened)
    bad = source.bad_records(opened)
    assert list(bad) == [29, 30, 59]
    for number, what in ((29, "found 271 bytes"), (30, "found NaN"), (59, "found label 99")):
        assert f"record {number}: {what}" in bad[number]
    good = open_latents(f"{store}/train")
    positions = np.arange(192)
    order = STANDS[np.concatenate([permuted(3, epoch, SIZE) for epoch in range(4)])[:192]]
    values, cond = good.read(order)
    mirror = counter.mirrored(3, positions)
    np.testing.assert_array_equal(found["image"], posterior.sample_posterior(INFO, values, positions, 3, mirror))
    np.testing.assert_array_equal(found["label"], cond["label"])


def test_replacing_is_independent_of_processes_threads_and_resuming(spoiled):
    data = config(spoiled, skip_bad=3)
    expected = batches(data, 12)
    threads = dataclasses.replace(data, workers=4, prefetch=8)
    parts = [batches(threads, 12, process_index=i, process_count=2)["label"].reshape(12, 8) for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts, 1).ravel(), expected["label"])
    assert_same(expected, batches(threads, 4, batch_size=48))
    assert_same({k: v[-48:] for k, v in expected.items()}, batches(threads, 3, start=9))


@pytest.mark.parametrize("cap", [1, 2])
@pytest.mark.parametrize("workers", [0, 4])
def test_too_many_malformed_records_are_an_error(spoiled, cap, workers):
    data = config(spoiled, skip_bad=cap, workers=workers, prefetch=2 * workers)
    message = error_of(batches, data, 4)
    expected = (
        f"data.skip_bad: found {cap + 1} malformed records, expected at most {cap}; the first: latents {spoiled}/train"
    )
    assert message.startswith(expected) and len(re.findall(r"record \d+: found", message)) == cap + 1


def test_nothing_but_malformed_records_is_an_error(broken):
    for shard in range(3):
        rewrite(broken, shard, [b"x"] * len(records_of(broken / shard_name(shard, 3))))
    message = error_of(batches, config(broken.parent, skip_bad=1000), 4)
    assert message.startswith(f"data.skip_bad: found all {SIZE} records malformed; the first: latents {broken}")


def test_a_missing_shard_is_not_skipped(broken):
    (broken / shard_name(1, 3)).unlink()
    assert "cannot read it: [Errno 2]" in error_of(batches, config(broken.parent, skip_bad=1000), 1)
