"""Leases in a bucket: locks whose holder writes again every RENEWAL seconds, and that another process may take after LIFE without.

Nobody's clock is compared with another's: whoever wants a lease watches its generation for LIFE seconds. If the holder was a process
of this machine, and is gone, it is taken at once.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator

from dit_jax.error import StorageError
from dit_jax.files import bucket
from dit_jax.log import notice

RENEWAL, LIFE = 10.0, 40.0  # seconds


@contextlib.contextmanager
def held(path: str, busy: Exception | None = None) -> Iterator[Callable[[], None]]:
    """Hold the lease at `path` until the block ends; yields `check()`, which raises StorageError if it is lost.

    If another process holds it, waits, or raises `busy` if given and the holder is alive.
    """
    mine = json.dumps({**_here(), "token": secrets.token_hex(8)}).encode()
    generation, end, last, lost = _acquire(path, mine, busy), threading.Event(), _now(), False
    alone = threading.Lock()

    def renew() -> None:
        """Write it again; it is lost if another process has written it since."""
        nonlocal generation, last, lost
        with alone, contextlib.suppress(StorageError):  # it lives a while without
            began, found = _now(), None if lost else bucket.write(path, mine, generation)
            generation, last, lost = found or generation, began, found is None

    def go_on_renewing() -> None:
        while not lost and not end.wait(RENEWAL):
            renew()

    def check() -> None:
        if not lost and _now() - last > LIFE:
            renew()
        if lost or _now() - last > LIFE:
            raise StorageError(
                f"{path}: another process has taken this lease, or may take it, after {LIFE:.0f} s without a sign "
                "of this one; nothing more is written"
            )

    thread = threading.Thread(target=go_on_renewing, name="lease", daemon=True)
    thread.start()
    try:
        yield check
    finally:
        end.set()
        thread.join()
        if not lost:
            with contextlib.suppress(StorageError):
                bucket.delete(path, generation)


def _now() -> float:
    """Seconds of a clock that goes on while the machine is suspended."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _acquire(path: str, mine: bytes, busy: Exception | None) -> int:
    """Return the generation of the lease, once it is this process's."""
    seen, since, said = 0, _now(), False
    while True:
        if generation := bucket.write(path, mine, 0):
            return generation
        try:
            owner, found = bucket.read(path)
        except FileNotFoundError:
            continue
        known = _alive(owner)
        if busy and (known or seen not in (0, found)):
            raise busy
        if found != seen:
            seen, since = found, _now()
        if known is False or _now() - since > LIFE:
            if generation := bucket.write(path, mine, found):
                return generation
            continue
        if not said and (said := True):
            notice(f"{path}: held by {_name(owner)}; waiting for its end, or {LIFE:.0f} s without a sign of it")
        time.sleep(min(1.0, LIFE / 10))


def _here() -> dict:
    """Return what tells this process from others: host, boot of the machine, namespace of processes, number, start."""
    return {"host": socket.gethostname(), "boot": _boot(), "process": os.getpid(), "started": _started(os.getpid())}


def _boot() -> str:
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as f:
        return f"{f.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _started(process: int) -> str:
    """Return when a process of this machine began, in ticks since the boot; "" if there is none."""
    with contextlib.suppress(OSError, IndexError), open(f"/proc/{process}/stat") as f:
        fields = f.read().rsplit(")", 1)[1].split()
        return "" if fields[0] == "Z" else fields[19]
    return ""


def _alive(owner: bytes) -> bool | None:
    """Whether the owner is a process that runs on this machine; None if it is another machine's, or of another boot.

    An empty lock, as a copy from a disk leaves it, has no owner.
    """
    if not owner:
        return False
    try:
        found = json.loads(owner)
        here = found["boot"] and (found["host"], found["boot"]) == (socket.gethostname(), _boot())
        return _started(int(found["process"])) == found["started"] if here else None
    except (ValueError, KeyError, TypeError):
        return None


def _name(owner: bytes) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        found = json.loads(owner)
        return f"process {int(found['process'])} of {str(found['host'])[:100]!r}"
    return "another process"
