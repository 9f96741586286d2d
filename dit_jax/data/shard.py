"""Opens an ArrayRecord file such that damage is reported at once."""

import os

from array_record.python.array_record_module import ArrayRecordReader


def open_shard(path: str) -> ArrayRecordReader:
    """Open a random-access reader, which threads may share. Raises RuntimeError if the file is missing or damaged."""
    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait forever
        raise RuntimeError("found no regular file")
    reader = ArrayRecordReader(path, options="readahead_buffer_size:0", file_reader_buffer_size=32768)
    if not reader.ok():
        reader.read([0])  # raises the reason
        raise RuntimeError("the reader gives no reason")
    return reader
