"""Writing latents: what cannot be stored is named, a killed writer goes on, any number of hosts writes the same files."""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from latents import INFO, SIZE, error_of, examples, shard_name, write_store
from runs import write_latents

from dit_jax.data import latent_writer
from dit_jax.data.latents import open_latents
from dit_jax.data.notes import checksum
from dit_jax.data.shard_writer import Hosts, job_of
from dit_jax.error import UsageError

pytestmark = pytest.mark.timeout(60)  # nothing hangs, whatever is broken


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("latents"))


def bad_values(value):
    values = np.zeros(INFO.record_shape)
    values[1, 1, 3, 3, 1] = value
    return values


@pytest.mark.parametrize(
    "example, expected",
    [
        (
            (0, np.zeros((2, 2, 4, 4, 1))),
            "found an array float64 (2, 2, 4, 4, 1), expected floating point (2, 2, 4, 4, 2)",
        ),
        ((0, np.zeros(INFO.record_shape, np.int32)), "found an array int32 (2, 2, 4, 4, 2), expected floating point"),
        ((0, bad_values(np.nan)), "found values up to nan, expected finite ones that float16 can hold"),
        ((0, bad_values(70_000)), "found values up to 70000.0, expected finite ones that float16 can hold"),
        ((7, bad_values(0)), "found label 7, expected a whole number from 0 to 6"),
        ((-1, bad_values(0)), "found label -1, expected a whole number from 0 to 6"),
        ((1.5, bad_values(0)), "found label 1.5, expected a whole number from 0 to 6"),
    ],
)
def test_what_cannot_be_stored_is_named_and_nothing_is_left(tmp_path, example, expected):
    folder = str(tmp_path / "x")
    message = error_of(write_latents, folder, INFO, [*examples(INFO, 4), example])
    assert message.startswith(f"latents {folder}, record 4: {expected}")
    assert os.listdir(folder) == []


def test_a_failing_source_leaves_nothing(tmp_path):
    def failing(_):
        yield from examples(INFO, 4)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        latent_writer.write_latents(str(tmp_path), INFO, SIZE, failing)
    assert os.listdir(tmp_path) == []
    assert error_of(write_latents, str(tmp_path), INFO, []).endswith("found no records to write, expected at least one")
    assert len(write_latents(str(tmp_path), INFO, [(1, bad_values(ml_dtypes.bfloat16(3)))])) == 1


def test_complete_latents_foreign_files_and_other_writers_are_refused(store, tmp_path):
    before = sorted(os.listdir(f"{store}/train"))
    expected = f"latents {store}/train: found complete latents, expected none"
    assert error_of(write_latents, f"{store}/train", INFO, examples(INFO, 1)).startswith(expected)
    assert sorted(os.listdir(f"{store}/train")) == before
    (tmp_path / "thesis.tex").write_text("x")
    expected = f"latents {tmp_path}: found 'thesis.tex', expected an empty folder"
    assert error_of(write_latents, str(tmp_path), INFO, examples(INFO, 1)).startswith(expected)
    expected = f"latents {tmp_path}/thesis.tex: cannot make the folder: File exists"
    assert error_of(write_latents, f"{tmp_path}/thesis.tex", INFO, examples(INFO, 1)).startswith(expected)

    def nested(_):
        yield from examples(INFO, 2)
        message = error_of(write_latents, f"{tmp_path}/two", INFO, examples(INFO, 1))
        assert message == f"latents {tmp_path}/two: found another process writing there, expected none"

    assert len(latent_writer.write_latents(f"{tmp_path}/two", INFO, 2, nested)) == 2


WRITER = """
import json, os, resource, signal, sys
import numpy as np
from dit_jax.data.latent_writer import write_latents
from dit_jax.data.latent_notes import LatentInfo

fields = json.loads(sys.argv[3])
info = LatentInfo(**{**fields, "shape": tuple(fields["shape"]), "class_names": (), "left_out": ()})
def some(numbers):
    for i in numbers:
        if i == 30 and sys.argv[2] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        yield i % 7, np.zeros(info.record_shape, np.float32)
if sys.argv[2] == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    write_latents(sys.argv[1], info, 40, some, shard_bytes=10 * info.layout.itemsize)
except Exception as error:
    print(type(error).__name__, error)
"""


def run_writer(folder, how):
    """A writer in a process of its own, which is killed or finds the disk full."""
    command = [sys.executable, "-c", WRITER, folder, how, json.dumps(dataclasses.asdict(INFO))]
    return subprocess.run(command, capture_output=True, text=True, cwd=os.path.dirname(os.path.dirname(__file__)))


def test_a_killed_writer_leaves_no_latents(tmp_path):
    folder = str(tmp_path / "x")
    assert run_writer(folder, "kill").returncode == -signal.SIGKILL
    left = os.listdir(folder)
    assert left and "latents.json" not in left
    assert "found no such file, so the latents are not complete" in error_of(open_latents, folder)
    again = write_latents(folder, INFO, examples(INFO, 40))
    assert len(again) == 40 and sorted(os.listdir(folder)) == [*(shard_name(i, 4) for i in range(4)), "latents.json"]


TENS = 10 * INFO.layout.itemsize  # shard_bytes


def interrupted(folder, at):
    """A writer of SIZE records in shards of ten that fails at record `at`."""

    def some(numbers):
        yield from examples(INFO, at)[numbers[0] :]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        latent_writer.write_latents(str(folder), INFO, SIZE, some, shard_bytes=TENS)


def go_on(folder, info=INFO, **how):
    """Finish it. Returns the latents, and the shards that were asked for."""
    asked = []

    def rest(numbers):
        asked.extend(numbers.tolist())
        return [examples(INFO, SIZE)[i] for i in numbers]

    found = latent_writer.write_latents(str(folder), info, SIZE, rest, **{"shard_bytes": TENS, **how})
    assert asked == [i for first in asked[::10] for i in range(first, first + 10)]
    return found, [first // 10 for first in asked[::10]]


def spoil(path):
    """Another value in the last record of a shard that is whole otherwise."""
    records = ArrayRecordReader(str(path)).read(list(range(10)))
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for record in [*records[:9], records[9][:30] + bytes([records[9][30] ^ 1]) + records[9][31:]]:
        writer.write(record)
    writer.close()


LEFT = {  # what a kill or a disk makes of the three whole shards -> which of them are made again
    "as they were": (lambda folder: None, []),
    "killed in a shard": (lambda folder: (folder / "latents-00003.part").write_bytes(b"x"), []),
    "killed while naming them": (
        lambda folder: (folder / "latents-00000.whole").rename(folder / "latents-00000-of-00003.array_record"),
        [],
    ),
    "killed in the notes": (lambda folder: (folder / "latents.json.part").write_text("{"), []),
    "one is missing": (lambda folder: (folder / "latents-00001.whole").unlink(), [1]),
    "one is cut": (lambda folder: os.truncate(folder / "latents-00002.whole", 1000), [2]),
    "a shard twice": (
        lambda folder: shutil.copy(folder / "latents-00000.whole", folder / "latents-00001.whole"),
        [1],
    ),
    "a value is another": (lambda folder: spoil(folder / "latents-00001.whole"), [1]),
}


@pytest.mark.parametrize("name", LEFT)
def test_a_writer_goes_on_from_the_shards_that_are_whole(store, tmp_path, name):
    interrupted(tmp_path, 34)
    assert sorted(os.listdir(tmp_path)) == [*(f"latents-0000{i}.whole" for i in range(3)), "latents.job"]
    assert "found no such file, so the latents are not complete" in error_of(open_latents, str(tmp_path))
    damage, again = LEFT[name]
    damage(tmp_path)
    found, asked = go_on(tmp_path)
    assert asked == [*again, 3, 4, 5]
    whole = open_latents(f"{store}/train")
    assert (found.content, len(found), found.info) == (whole.content, SIZE, INFO)
    assert sorted(os.listdir(tmp_path)) == [*(shard_name(i, 6) for i in range(6)), "latents.json"]
    open_latents(str(tmp_path), verify=True)


BAD = (0, 4, 10, 11, 29, 30, 33, 59)


def test_malformed_records_are_left_out_and_the_others_keep_number_and_label(tmp_path, store):
    """Also if the writer is killed on the way: gaps in the shards, at their ends and after the last are noted."""
    kept = [i for i in range(SIZE) if i not in BAD]
    given = [None if i in BAD else example for i, example in enumerate(examples(INFO, SIZE))]

    def cut(numbers):
        yield from given[:45]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        latent_writer.write_latents(str(tmp_path / "cut"), INFO, SIZE, cut, shard_bytes=TENS)
    for folder in ("cut", "whole"):
        found = latent_writer.write_latents(
            str(tmp_path / folder), INFO, SIZE, lambda numbers: given[numbers[0] :], shard_bytes=TENS
        )
        assert found.info == dataclasses.replace(INFO, left_out=BAD) and len(found) == len(kept)
        values, cond = open_latents(str(tmp_path / folder), verify=True).read(np.arange(len(kept)))
        expected, labels = open_latents(f"{store}/train").read(np.array(kept))
        np.testing.assert_array_equal(values, expected)
        np.testing.assert_array_equal(cond["label"], labels["label"])
        np.testing.assert_array_equal(found.numbers, kept)
    notes = tmp_path / "whole" / "latents.json"
    said = json.loads(notes.read_text())
    for wrong in ([4, 0], [0, 0], [-1], [60, 61, 62, 63, 64, 65, 66, 99], ["0"]):
        said["left_out"] = wrong
        notes.write_text(json.dumps({**said, "checksum": checksum(said)}))
        assert "left_out: found" in error_of(open_latents, str(tmp_path / "whole"))
    said["left_out"] = list(range(8))  # others than those that are missing
    notes.write_text(json.dumps({**said, "checksum": checksum(said)}))
    assert "found record number 1, expected number 8" in error_of(open_latents(str(notes.parent)).read, np.arange(3))


def malformed(bad):
    return lambda numbers: [None if i in bad else examples(INFO, SIZE)[i] for i in numbers]


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_a_shard_has_its_range_of_the_split_less_the_malformed(tmp_path):
    """Also if nothing is left of it: then it has no file."""
    bad = [0, 9, *range(20, 30), 59]
    found = latent_writer.write_latents(str(tmp_path), INFO, SIZE, malformed(bad), shard_bytes=TENS)
    assert [file["records"] for file in found.files] == [8, 10, 10, 10, 9]
    assert sorted(os.listdir(tmp_path)) == [*(shard_name(i, 5) for i in range(5)), "latents.json"]
    assert found.info.left_out == tuple(bad)
    (tmp_path / "latents.json").unlink()  # killed while it named them
    (tmp_path / "latents-00004-of-00005.array_record").rename(tmp_path / "latents-00005.whole")
    (tmp_path / "latents.job").write_text(json.dumps({**job_of(INFO), "shard_records": 10}))
    asked = []
    again = latent_writer.write_latents(
        str(tmp_path), INFO, SIZE, lambda numbers: asked.extend(numbers) or malformed(bad)(numbers), shard_bytes=99
    )
    assert asked == list(range(20, 30)) and again.files == found.files and again.info == found.info


def test_shards_of_older_versions_are_kept_only_if_nothing_was_left_out(store, tmp_path):
    """They had equal numbers of good records, whatever the numbers of those in the split, and named no size."""
    for bad in ((), (3,)):
        folder, given = tmp_path / str(bad), [(i, e) for i, e in enumerate(examples(INFO, SIZE)) if i not in bad]
        folder.mkdir()
        for number in range(3):
            writer = ArrayRecordWriter(str(folder / f"latents-0000{number}.whole"), "group_size:1,uncompressed")
            for i, example in given[10 * number : 10 * number + 10]:
                writer.write(INFO.pack("", i, *example))
            writer.close()
        (folder / "latents.job").write_text(json.dumps(job_of(INFO)))
        found, asked = go_on(folder)
        assert asked == ([0, 1, 2] if bad else []) + [3, 4, 5] and len(found) == SIZE
        assert found.content == open_latents(f"{store}/train").content


def test_shards_keep_the_size_that_they_began_with(tmp_path):
    interrupted(tmp_path / "cut", 34)
    found, asked = go_on(tmp_path / "cut", shard_bytes=7 * INFO.layout.itemsize)
    assert asked == [3, 4, 5] and [file["records"] for file in found.files] == [10] * 6
    damaged = json.dumps({**job_of(INFO), "shard_records": "10"})
    interrupted(tmp_path / "again", 34)
    (tmp_path / "again" / "latents.job").write_text(damaged)
    assert go_on(tmp_path / "again")[1] == [3, 4, 5]


class Threads:
    """Processes of one job, as threads of this one: what `devices.processes` does for those of several hosts."""

    def __init__(self, count):
        self.count, self.barrier, self.said = count, threading.Barrier(count), [None] * count

    def hosts(self, index):
        def gather(value):
            self.barrier.wait(30)
            self.said[index] = value
            self.barrier.wait(30)
            return list(self.said)

        def by_leader(work):
            return json.loads(json.dumps(gather(work() if index == 0 else None)[0]))

        @contextlib.contextmanager
        def agreed():
            error = None
            try:
                yield
            except UsageError as found:
                error = found
            for found in filter(None, gather(error)):
                raise UsageError(str(found))

        return Hosts(index, self.count, by_leader, agreed)

    def write(self, folder, examples_of, **how):
        def one(index):
            return latent_writer.write_latents(str(folder), INFO, SIZE, examples_of, hosts=self.hosts(index), **how)

        with concurrent.futures.ThreadPoolExecutor(self.count) as pool:
            return [run.exception() or run.result() for run in [pool.submit(one, i) for i in range(self.count)]]


@pytest.mark.parametrize("count", [2, 3, 8])
def test_any_number_of_hosts_writes_the_same_files(count, tmp_path):
    """Also if they go on after others, with gaps between the whole shards; and after an error of one, which all raise."""
    bad = [3, 10, 11, *range(20, 30), 59]
    latent_writer.write_latents(str(tmp_path / "one"), INFO, SIZE, malformed(bad), shard_bytes=TENS)
    some = Threads(count).write(tmp_path / "some", malformed(bad), shard_bytes=TENS)
    assert {found.content for found in some} == {open_latents(str(tmp_path / "one"), verify=True).content}
    assert contents(tmp_path / "some") == contents(tmp_path / "one")

    def failing(numbers):
        for i in numbers:
            if i == 15:
                raise UsageError("record 15")
            yield from malformed(bad)([i])

    errors = Threads(count).write(tmp_path / "cut", failing, shard_bytes=TENS)
    assert [str(error) for error in errors] == ["record 15"] * count
    left = sorted(os.listdir(tmp_path / "cut"))
    assert "latents-00000.whole" in left and "latents-00001.whole" not in left and "latents.json" not in left
    assert all(name.endswith((".whole", ".job")) for name in left)
    Threads(2).write(tmp_path / "cut", malformed(bad), shard_bytes=1)
    assert contents(tmp_path / "cut") == contents(tmp_path / "one")


def test_a_writer_does_not_go_on_with_another_job(tmp_path):
    interrupted(tmp_path, 34)
    before = sorted(os.listdir(tmp_path))
    message = error_of(go_on, tmp_path, dataclasses.replace(INFO, dtype="float32"))
    found = "dtype: found 'float16', this command has 'float32'"
    assert message.startswith(f"latents {tmp_path}: holds unfinished latents of another job: {found}")
    assert sorted(os.listdir(tmp_path)) == before
    for content in ("[]", "{", '{"dtype": "float16"}'):
        (tmp_path / "latents.job").write_text(content)
        assert "holds unfinished latents of another job: shape: found None" in error_of(go_on, tmp_path)
    interrupted(tmp_path / "other", 34)
    found, asked = go_on(tmp_path / "other", dataclasses.replace(INFO, scale=3.0, shift=1.0))  # notes only
    assert (asked, found.info.scale, len(found)) == ([3, 4, 5], 3.0, SIZE)


def test_scale_and_shift_may_be_settled_by_the_records(store, tmp_path):
    def settle(records):
        values, _ = records.read(np.arange(len(records)))
        return dataclasses.replace(records.info, shift=(float(values[:, 0, 0].max()), 0.0))

    interrupted(tmp_path, 34)
    found, _ = go_on(tmp_path, settle=settle)
    whole = open_latents(f"{store}/train")
    assert found.content == whole.content
    assert found.info.shift == (float(whole.read(np.arange(SIZE))[0][:, 0, 0].max()), 0.0)


def test_a_writer_that_fails_in_the_first_shard_leaves_nothing(tmp_path):
    interrupted(tmp_path, 7)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_a_job_error(tmp_path):
    done = run_writer(str(tmp_path), "full")
    assert done.stdout.startswith(f"JobError latents {tmp_path}: cannot write them: "), done
    assert "they are not complete, encode again" in done.stdout and os.listdir(tmp_path) == []
