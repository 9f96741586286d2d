"""Memory of the host: what is freed goes back to the system."""

import contextlib
import ctypes
import gc
from collections.abc import Iterator

TRIM, MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's mallopt


@contextlib.contextmanager
def freed_at_once() -> Iterator[None]:
    """Inside, glibc returns freed blocks from 1 MiB to the system. Else it keeps blocks up to 32 MiB for later, in each thread.

    Other C libraries have no such setting. At the end what only cycles of references still hold is freed.
    """
    tune = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    tune(MMAP, 1 << 20)
    try:
        yield
    finally:
        gc.collect()
        tune(MMAP, 32 << 20)  # where glibc's own rule ends in a process that frees large blocks
        tune(TRIM, 64 << 20)
