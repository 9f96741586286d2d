"""All access to paths, on a disk or in a bucket (gs://): read, write whole, create, replace if unchanged, list, delete, lock.

Nothing half-written stays behind. Nothing is appended to, because a bucket cannot append. In a bucket a folder is what the names of
objects begin with, and a lock is a lease (`lease.py`).
"""

import contextlib
import errno
import glob
import hashlib
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import IO

from dit_jax.error import StorageError, UsageError
from dit_jax.files import bucket, lease
from dit_jax.files.text import DEEPEST as DEEPEST
from dit_jax.files.text import LARGEST, LONGEST, parse_json
from dit_jax.files.text import json_text as json_text
from dit_jax.files.text import numbered as numbered
from dit_jax.log import waiting

SILENCE = 30.0  # seconds that a client may try again without a word
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # raised by file systems without locks


def remote(path: str) -> bool:
    """Whether a path is in a bucket."""
    return path.startswith(bucket.SCHEME)


def bucket_of(path: str) -> str:
    """Return the root of the bucket that a path is in. Raises UsageError if the name is that of no bucket."""
    return bucket.SCHEME + bucket.split(path)[0]


def introduce(place: str) -> None:
    """Ask for a bucket, so that a job fails at once and in one line if it may not; warns if it is in another region."""
    bucket.introduce(place)


def be_quick() -> None:
    """Let a bucket that does not answer be given up after seconds, for commands that only look."""
    bucket.PATIENCE = 5.0


def absolute(path: str) -> str:
    """Return the absolute path; of a bucket's, without slashes that are too many."""
    return "/".join((bucket.SCHEME[:-1], *bucket.split(path))).rstrip("/") if remote(path) else os.path.abspath(path)


def base(path: str) -> str:
    """Return the last name of a path, such as a run's name of its folder."""
    return os.path.basename(absolute(path))


def is_file(path: str) -> bool:
    return bucket.stat(path) is not None if remote(path) else os.path.isfile(path)


def is_folder(path: str) -> bool:
    return bool(bucket.listing(path, most=1)) if remote(path) else os.path.isdir(path)


def exists(path: str) -> bool:
    """Whether there is a file or folder, or on a disk a link that leads nowhere."""
    return is_file(path) or is_folder(path) if remote(path) else os.path.lexists(path)


def make_folder(path: str) -> None:
    """Make a folder and those above it; in a bucket they need no making."""
    if not remote(path):
        os.makedirs(path, exist_ok=True)


def read(path: str, most: int = LONGEST) -> bytes:
    """Read a file, but at most `most` + 1 bytes: the parser then refuses it as too long."""
    if remote(path):
        return bucket.read(path, end=most + 1)[0]
    with open(path, "rb") as f:
        return f.read(most + 1)


def opened(path: str) -> IO[bytes]:
    """Open a file for reading, seekable; it reads from a bucket what is asked for."""
    return bucket.opened(path) if remote(path) else open(path, "rb")


def read_all(folder: str, most: int = LONGEST) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the files of a folder in order of their names, several of them read at once."""
    found = names(folder)
    with futures.ThreadPoolExecutor(8) as pool:
        yield from zip(found, pool.map(lambda name: read(os.path.join(folder, name), most), found), strict=True)


@contextlib.contextmanager
def slow(path: str, what: str) -> Iterator[None]:
    """Around a library that opens `path` itself: say every SILENCE seconds that `what` is still under way, as they try again in silence.

    What they say of a bucket that refuses becomes a StorageError.
    """
    with waiting(f"{path}: {what}", SILENCE):
        try:
            yield
        except Exception as error:
            if not (remote(path) and bucket.refused_others(error)):
                raise
            raise StorageError(f"{path}: {what} failed, as the storage did not answer as it should ({error})") from None


@contextlib.contextmanager
def local(path: str) -> Iterator[str]:
    """Yield the name of a file or folder on this machine's disk with what is at `path`, for libraries that open it themselves.

    That is `path` itself, or a copy that is deleted at the end. If nothing is at `path`, nothing is at that name.
    """
    if not remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="dit_jax-") as folder:
        copied = os.path.join(folder, base(path))
        if is_file(path):
            bucket.download(path, copied)
        else:
            _each(lambda name: _fetch(path, name, copied), bucket.listing(path))
        yield copied


def _fetch(folder: str, name: str, to: str) -> None:
    path, file = os.path.join(folder, name), os.path.join(to, name)
    if not {"", ".", ".."}.isdisjoint(name.split("/")):
        raise UsageError(
            f"{folder}: found the object {name!r}, whose name leads elsewhere on a disk, expected plain names"
        )
    os.makedirs(os.path.dirname(file), exist_ok=True)
    bucket.download(path, file)


def _each(action: Callable[[str], object], found) -> None:
    """Call `action` for each name, several at once; the first error is raised once all have ended."""
    with futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(action, list(found)))


def read_json(path: str) -> dict:
    """Read the object in a JSON file. Raises UsageError if it holds anything else, OSError if it cannot be read."""
    try:
        value = parse_json(read(path))
    except ValueError as error:
        raise UsageError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: found a {type(value).__name__}, expected an object")
    return value


@contextlib.contextmanager
def whole(path: str, unfinished: str = "") -> Iterator[str]:
    """Yield a name for a file or folder to write: renamed to `path` on success, deleted on failure.

    `unfinished`: that name; by default a unique one beside `path`. For a path in a bucket a name on the disk is yielded, and what is
    there is uploaded on success, see `upload`.
    """
    if remote(path):
        with tempfile.TemporaryDirectory(prefix="dit_jax-") as folder:
            yield (made := os.path.join(folder, base(path)))
            upload(made, path)
        return
    unfinished = unfinished or f"{path}.tmp{os.urandom(4).hex()}"
    try:
        yield unfinished
        sync(unfinished)
        rename(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            delete(unfinished)
        raise


def upload(made: str, path: str) -> None:
    """Copy a file or folder on the disk into a bucket: `*.json` of its first level last, as they say what the others are."""
    if os.path.isfile(made):
        bucket.write(path, pathlib.Path(made))
        return
    found = [os.path.relpath(os.path.join(root, name), made) for root, _, files in os.walk(made) for name in files]
    last = [name for name in found if os.sep not in name and name.endswith(".json")]
    for some in ({*found} - {*last}, last):
        _each(lambda name: bucket.write(os.path.join(path, name), pathlib.Path(os.path.join(made, name))), some)


def _encoded(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


def write_file(path: str, content: str | bytes) -> None:
    """Write a file whole or not at all."""
    if remote(path):
        bucket.write(path, _encoded(content))
        return
    with whole(path) as unfinished, open(unfinished, "wb") as f:
        f.write(_encoded(content))


def create(path: str, content: str | bytes) -> bool:
    """Write a file whole if there is none; returns whether it did."""
    if remote(path):
        return bucket.write(path, _encoded(content), 0) is not None
    unfinished = f"{path}.tmp{os.urandom(4).hex()}"
    try:
        with open(unfinished, "xb") as f:
            f.write(_encoded(content))
        sync(unfinished)
        os.link(unfinished, path)
        sync(os.path.dirname(os.path.abspath(path)))
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        with lock(path + ".lock", keep=False):
            if os.path.lexists(path):
                return False
            rename(unfinished, path)
    finally:
        delete(unfinished)
    return True


def replace(path: str, content: str | bytes, old: bytes | None) -> bool:
    """Write a file whole if it still holds `old` (None: no file); returns whether it did.

    Of several processes that replace the same content, one succeeds. Leftovers of a killed one are deleted.
    """
    if remote(path):
        generation = 0
        if old is not None:
            found, generation = bucket.read(path) if is_file(path) else (None, 0)
            if found != old:
                return False
        return bucket.write(path, _encoded(content), generation) is not None
    with lock(path + ".lock"):
        for unfinished in glob.glob(glob.escape(path) + ".tmp*"):
            delete(unfinished)
        if _content(path) != old:
            return False
        write_file(path, content)
        return True


def update(path: str, change: Callable[[bytes | None], str | bytes | None]) -> None:
    """Replace a file's content (None: no file) by `change(content)`, retrying if another process was faster.

    If `change` returns None the file stays as it is.
    """
    while True:
        old = _content(path)
        new = change(old)
        if new is None or replace(path, new, old):
            return


def _content(path: str) -> bytes | None:
    try:
        return read(path, LARGEST)
    except FileNotFoundError:
        return None


def names(folder: str) -> list[str]:
    """List a folder, sorted; [] if it does not exist."""
    if remote(folder):
        return bucket.names(folder)
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def below(folder: str) -> list[str]:
    """List all files below a folder, sorted, relative to it with forward slashes. Links to folders are not followed."""
    if remote(folder):
        return sorted(bucket.listing(folder))
    found = [os.path.join(root, name) for root, _, files in os.walk(folder) for name in files]
    return sorted(os.path.relpath(path, folder).replace(os.sep, "/") for path in found)


def sizes(folder: str, wanted: Callable[[str], bool] = bool) -> dict[str, dict]:
    """Map the files below a folder (see `below`) to their "bytes", and in a bucket to their "crc32c"; to {} on a disk if not `wanted`."""
    if remote(folder):
        return {name: {"bytes": one.bytes, "crc32c": one.crc32c} for name, one in bucket.listing(folder).items()}
    found = below(folder)
    return {name: {"bytes": os.path.getsize(os.path.join(folder, name))} if wanted(name) else {} for name in found}


def delete(path: str, first: str = "") -> None:
    """Delete a file, or a folder with its contents; it need not exist. `first`: the file of it that goes before all others."""
    if remote(path):
        if first:
            bucket.delete(os.path.join(path, first))
        _each(lambda name: bucket.delete(os.path.join(path, name)), bucket.listing(path))
        bucket.delete(path)
    elif os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def delete_empty(folder: str) -> None:
    """Delete a folder if it is there and empty, as those of a bucket never are."""
    if not remote(folder):
        with contextlib.suppress(OSError):
            os.rmdir(folder)


def rename(unfinished: str, path: str) -> None:
    """Rename a finished file or folder, durably: the new name survives a power cut.

    In a bucket, which renames nothing, it is copied and then deleted, so a kill may leave both.
    """
    if remote(path):
        _each(
            lambda name: bucket.copy(os.path.join(unfinished, name), os.path.join(path, name)),
            below(unfinished) or [""],
        )
        delete(unfinished)
        return
    os.replace(unfinished, path)
    sync(os.path.dirname(os.path.abspath(path)))


def file_sha256(path: str) -> str:
    with opened(path) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def file_crc32c(path: str) -> str:
    """Return a file's CRC-32C in base64, as listings of buckets give it."""
    bucket.import_client()
    import base64

    import google_crc32c

    found = google_crc32c.Checksum()
    with opened(path) as f:
        while block := f.read(1 << 20):
            found.update(block)
    return base64.b64encode(found.digest()).decode()


def sync(path: str) -> None:
    """Flush a file, or the names in a folder, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def lock(path: str, busy: Exception | None = None, keep: bool = True) -> Iterator[Callable[[], None]]:
    """Hold the lock file `path`, made with its folder, until the block ends or this process dies; yields `check()`.

    If another process holds it, waits, or raises `busy` if given. Without `keep` the file is deleted at the end. On a file
    system without locks a notice is logged and nothing is locked. In a bucket it is a lease, which another process may take from one
    that has not answered for long: `check()` then raises StorageError.
    """
    if remote(path):
        with lease.held(path, busy) as check:
            yield check
        return
    import filelock  # here because few commands lock anything

    held = filelock.FileLock(path, fallback_to_soft=False, thread_local=False, poll_interval=0.01)
    while not held.is_locked:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        try:
            held.acquire(blocking=busy is None)
        except FileNotFoundError:  # another process has just deleted the folder
            continue
        except filelock.Timeout:
            raise busy from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            why = "no locks on this file system; run one job at a time on its folder"
            logging.getLogger("dit_jax").warning(f"notice: {path}: {why}")
            break
    try:
        yield lambda: None
    finally:
        if not keep:
            delete(path)  # while it is held
        held.release()
