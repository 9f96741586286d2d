"""Opens and reads ArrayRecord files such that damage is told at once from a bucket that refuses or does not answer."""

import contextlib
import os
from collections.abc import Iterator

from array_record.python.array_record_module import ArrayRecordReader

from dit_jax.error import StorageError
from dit_jax.files import remote, slow

_REFUSED = "a last message of "  # in errors of the library's own client of buckets
_OF_THE_FILE = ("No such object", "range ")  # after it: the file is missing, or shorter than its own index says


def open_shard(path: str) -> ArrayRecordReader:
    """Open a random-access reader, which threads may share. Raises RuntimeError if the file is missing or damaged; see `reading`."""
    if not remote(path) and os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait forever
        raise RuntimeError("found no regular file")
    with reading(path):
        reader = ArrayRecordReader(path, options="readahead_buffer_size:0", file_reader_buffer_size=32768)
        if not reader.ok():
            reader.read([0])  # raises the reason
            raise RuntimeError("the reader gives no reason")
    return reader


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Raise StorageError for what a bucket refused, which is no damage of a record; say it if the bucket does not answer for long."""
    if not remote(path):
        yield
        return
    try:
        with slow(path, "reading"):
            yield
    except RuntimeError as error:
        said = str(error).partition(_REFUSED)[2]
        if not said or any(why in said for why in _OF_THE_FILE):
            raise
        raise StorageError(f"{path}: cannot be read now ({said.partition('; reading ')[0]})") from error
