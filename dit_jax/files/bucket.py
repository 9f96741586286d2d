"""Objects of Google Cloud Storage: what `files` does with a path that begins with gs://. The only module that names its client.

Every call has a time limit, TIMEOUT, and is tried again for PATIENCE seconds, with notices from the first failure after NOTICE on. A
conditional write whose first answer was lost reads as a conflict when it is tried again, so each write carries a mark by which it knows
itself.
"""

import contextlib
import functools
import io
import logging
import os
import re
import secrets
import time
import urllib.request
from collections.abc import Iterator
from typing import IO, NamedTuple

from dit_jax.error import StorageError, UsageError, shown
from dit_jax.log import notice, warn

SCHEME = "gs://"
PATIENCE, NOTICE = 90.0, 10.0  # seconds of trying again, and between notices of it
TIMEOUT = (10.0, 20.0)  # seconds to connect, and between bytes
UPLOAD = (10.0, 60.0)  # the same for a file, whose answer comes once it is stored
TRANSIENT = (408, 429, 500, 502, 503, 504)  # status codes
BLOCK = 1 << 20  # bytes that an open object reads at least at once
STATUS = re.compile(
    "PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED: .*gs:|ABORTED"
)  # of tensorstore
BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
MARK = "dit-jax-write"  # key of an object's metadata: which write made it


class Object(NamedTuple):
    """What a listing says of an object: its size in bytes, CRC-32C in base64, and generation, which every write changes."""

    bytes: int
    crc32c: str
    generation: int


def split(path: str) -> tuple[str, str]:
    """Return the bucket and the object of a path. Raises UsageError if the name is that of no bucket."""
    bucket, _, name = path.removeprefix(SCHEME).partition("/")
    if not BUCKET.fullmatch(bucket):
        raise UsageError(f"{shown(path)}: found no name of a bucket, expected gs://BUCKET/FOLDER in small letters")
    return bucket, "/".join(part for part in name.split("/") if part)


def place(path: str) -> tuple[str, str]:
    """Return the bucket and the object of a path. Raises UsageError as `split`, and if it names a whole bucket."""
    bucket, name = split(path)
    if not name:
        raise UsageError(f"{path}: found a bucket, expected a path in it, such as gs://{bucket}/NAME")
    return bucket, name


def import_client():
    """Import google.cloud.storage. Raises UsageError if the extra is missing."""
    os.environ.setdefault(
        "DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true"
    )  # a thread would ask for each bucket
    try:
        from google.cloud import storage
    except ImportError:
        raise UsageError(
            "gs://: the clients of Google Cloud Storage are not installed; run `make gcs`, or pip install -e '.[gcs]'"
        ) from None
    return storage


@functools.cache
def _client(process: int):
    storage = import_client()
    import fsspec.config

    # Through epath Orbax, TFDS and JAX's cache of programs use gcsfs, which would not see what other processes write meanwhile.
    for name in ("gs", "gcs"):
        fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs tracebacks of what it raises
    with _refused(SCHEME):
        return storage.Client()


def _blob(path: str):
    bucket, name = place(path)
    return _client(os.getpid()).bucket(bucket).blob(name)


def _retry(path: str):
    """Return the policy of retries for one call: transient errors, for PATIENCE seconds."""
    from google.api_core import retry

    began = said = time.monotonic()

    def report(error: Exception) -> None:
        nonlocal said
        waited = time.monotonic() - began
        if time.monotonic() - said > NOTICE:
            said = time.monotonic()
            why = str(error).splitlines()[0][:200]
            notice(f"{path}: no answer yet after {waited:.0f} s of at most {PATIENCE:.0f} ({why}); trying again")

    return retry.Retry(_transient, initial=0.2, maximum=8.0, multiplier=2.0, timeout=PATIENCE, on_error=report)


def _transient(error: Exception) -> bool:
    """Whether what failed may succeed if it is tried again."""
    import requests
    from google.auth import exceptions as auth

    broken = requests.exceptions
    if isinstance(error, (ConnectionError, broken.ConnectionError, broken.Timeout, broken.ChunkedEncodingError)):
        return True
    if isinstance(error, auth.GoogleAuthError) and (error.retryable or isinstance(error, auth.TransportError)):
        return True
    return getattr(getattr(error, "response", None), "status_code", None) in TRANSIENT


@contextlib.contextmanager
def _refused(path: str) -> Iterator[None]:
    """Turn what the service or the network refused into one line: FileNotFoundError for an object, else StorageError."""
    import requests
    from google.api_core import exceptions
    from google.auth import exceptions as auth
    from google.cloud.storage.exceptions import DataCorruption

    try:
        yield
    except exceptions.NotFound as error:
        if "specified bucket does not exist" in error.message:
            raise StorageError(
                f"{path}: there is no bucket {split(path)[0]!r}, or not for this account; make it with `gcloud storage "
                f"buckets create gs://{split(path)[0]} --location=REGION`, in the region of the slice"
            ) from None
        raise FileNotFoundError(2, "no such object", path) from None
    except auth.RefreshError as error:
        raise StorageError(f"{path}: the credentials were refused ({_line(error)}); {LOGIN}") from None
    except (auth.DefaultCredentialsError, exceptions.Unauthorized):
        raise StorageError(f"{path}: found no credentials for Google Cloud; {LOGIN}") from None
    except exceptions.Forbidden as error:
        raise StorageError(
            f"{path}: no permission ({_line(error)}); grant the account roles/storage.objectUser on the bucket, and on a TPU VM "
            "the scope cloud-platform"
        ) from None
    except exceptions.PreconditionFailed:
        raise StorageError(
            f"{path}: another process has changed it while it was read; run the same command again"
        ) from None
    except DataCorruption:
        raise StorageError(f"{path}: its bytes changed on the way (checksum); run the same command again") from None
    except (exceptions.GoogleAPIError, requests.exceptions.RequestException, auth.GoogleAuthError) as error:
        raise StorageError(f"{path}: the storage did not answer as it should ({_line(error)})") from None


def refused_others(error: Exception) -> bool:
    """Whether an error of gcsfs, aiohttp, tensorstore or the system says that a bucket refused, or did not answer."""
    if isinstance(error, (StorageError, FileNotFoundError, FileExistsError)):
        return False
    own = type(error).__module__.startswith(("gcsfs", "aiohttp"))
    return own or isinstance(error, OSError) or bool(STATUS.search(str(error)))


LOGIN = "run `gcloud auth application-default login`, or give the machine a service account"


def _line(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    with contextlib.suppress(AttributeError, KeyError, ValueError):
        return cause.response.json()["error"]["message"][:200]
    return (str(getattr(cause, "message", "") or cause).strip().splitlines() or [type(cause).__name__])[0][:200]


def stat(path: str) -> Object | None:
    """Return the object at a path, None if there is none."""
    if not split(path)[1]:
        return None
    found = _find(path)
    return found and Object(found.size, found.crc32c, found.generation)


def _find(path: str):
    """Return the object's client with what the service knows of it; None if there is none."""
    from google.api_core import exceptions

    blob = _blob(path)
    with _refused(path):
        try:
            blob.reload(retry=_retry(path), timeout=TIMEOUT)
        except exceptions.NotFound as error:
            if "specified bucket" in error.message:
                raise
            return None
    return blob


def listing(folder: str, most: int | None = None) -> dict[str, Object]:
    """List all objects below a folder, by their names relative to it, at most `most`."""
    prefix = _prefix(folder)
    with _refused(folder):
        found = _client(os.getpid()).list_blobs(
            split(folder)[0], prefix=prefix, max_results=most, retry=_retry(folder), timeout=TIMEOUT,
            fields="items(name,size,crc32c,generation),nextPageToken",
        )  # fmt: skip
        return {b.name[len(prefix) :]: Object(b.size, b.crc32c, b.generation) for b in found if b.name != prefix}


def names(folder: str) -> list[str]:
    """List the objects and folders in a folder, sorted."""
    prefix = _prefix(folder)
    with _refused(folder):
        found = _client(os.getpid()).list_blobs(
            split(folder)[0], prefix=prefix, delimiter="/", retry=_retry(folder), timeout=TIMEOUT,
            fields="items(name),prefixes,nextPageToken",
        )  # fmt: skip
        objects = [blob.name[len(prefix) :] for blob in found]
    return sorted({name for name in objects if name} | {one[len(prefix) : -1] for one in found.prefixes})


def _prefix(folder: str) -> str:
    name = split(folder)[1]
    return f"{name}/" if name else ""


def read(path: str, start: int = 0, end: int | None = None, generation: int | None = None) -> tuple[bytes, int]:
    """Read (bytes from `start` to `end` or the object's, generation).

    Raises FileNotFoundError, and StorageError if the object is not of `generation`.
    """
    from google.api_core import exceptions

    blob, last = _blob(path), None if end is None else end - 1
    how = {"if_generation_match": generation, "retry": _retry(path), "timeout": TIMEOUT}
    with _refused(path):
        try:
            return blob.download_as_bytes(start=start or None, end=last, **how), blob.generation
        except exceptions.RequestRangeNotSatisfiable:  # it is empty, or ends before
            blob.reload(retry=_retry(path), timeout=TIMEOUT)
            return b"", blob.generation


class _Reader(io.RawIOBase):
    """An object's bytes, of one generation."""

    def __init__(self, path: str, found: Object):
        self._path, self._found, self._at = path, found, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._found.bytes}[whence], 0)
        return self._at

    def readinto(self, buffer) -> int:
        end = min(self._at + len(buffer), self._found.bytes)
        if end <= self._at:
            return 0
        data, _ = read(self._path, self._at, end, self._found.generation)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def opened(path: str) -> IO[bytes]:
    """Open an object for reading, seekable, a block at a time. Raises FileNotFoundError."""
    if (found := stat(path)) is None:
        raise FileNotFoundError(2, "no such object", path)
    return io.BufferedReader(_Reader(path, found), BLOCK)


def download(path: str, file: str) -> None:
    """Copy an object into a local file; its checksum is compared. Raises FileNotFoundError."""
    with _refused(path):
        _blob(path).download_to_filename(file, retry=_retry(path), timeout=TIMEOUT)


def write(path: str, content: bytes | os.PathLike, generation: int | None = None) -> int | None:
    """Write an object whole, from bytes or a local file; returns its generation.

    `generation`: that which it must still have (0: it must not exist); if another process was faster, None is returned and
    nothing is written. The service compares the checksum.
    """
    from google.api_core import exceptions

    blob, mark = _blob(path), secrets.token_hex(8)
    blob.metadata = {MARK: mark}
    how = {"if_generation_match": generation, "retry": _retry(path), "checksum": "crc32c"}
    with _refused(path):
        try:
            if isinstance(content, bytes):
                blob.upload_from_string(content, timeout=TIMEOUT, **how)
            else:
                blob.upload_from_filename(os.fspath(content), timeout=UPLOAD, **how)
        except exceptions.PreconditionFailed:
            blob = _find(path)
            if blob is None or (blob.metadata or {}).get(MARK) != mark:
                return None
        return blob.generation


def delete(path: str, generation: int | None = None) -> bool:
    """Delete an object, if it still has `generation` (None: whatever it has); returns whether it is gone."""
    from google.api_core import exceptions

    try:
        with _refused(path):
            try:
                _blob(path).delete(if_generation_match=generation, retry=_retry(path), timeout=TIMEOUT)
            except exceptions.PreconditionFailed:
                return stat(path) is None
    except FileNotFoundError:
        pass
    return True


def copy(path: str, to: str) -> None:
    """Copy an object within the service."""
    source, target = _blob(path), _blob(to)
    with _refused(path):
        token = None
        while True:
            token, _, _ = target.rewrite(source, token=token, retry=_retry(path), timeout=TIMEOUT)
            if token is None:
                return


def introduce(path: str) -> None:
    """Ask for the bucket of a path, so that a job fails at once and in one line if it may not; warns if it is far away."""
    listing(path, most=1)
    here = _region()
    if not here:
        return
    with contextlib.suppress(StorageError, FileNotFoundError), _refused(path):
        bucket = _client(os.getpid()).get_bucket(split(path)[0], retry=_retry(path), timeout=TIMEOUT)
        there = (bucket.location or "").lower()
        near = here == there or here.split("-")[0] == {"eu": "europe"}.get(there, there)
        if not near and bucket.location_type in ("region", "multi-region"):
            warn(f"{SCHEME}{bucket.name} is in {there}, this machine in {here}: reading it is slow and costs money")


def _region() -> str:
    """Return the region of this machine in Google Cloud, "" elsewhere."""
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/zone", headers={"Metadata-Flavor": "Google"}
    )
    try:
        with urllib.request.urlopen(request, timeout=1) as answer:
            return answer.read().decode().rsplit("/", 1)[-1].rsplit("-", 1)[0]
    except (OSError, ValueError):
        return ""
