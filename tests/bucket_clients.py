"""Google's client and gcsfs as tests call them: the same verbs on the strict server of tests/bucket.py."""

import io
import json

from bucket_objects import QUANTUM
from fsspec.asyn import sync
from gcsfs.core import GCSFileSystem
from google.api_core import exceptions
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from google.cloud.storage.retry import DEFAULT_RETRY

SOON = DEFAULT_RETRY.with_delay(initial=0.01, maximum=0.05)  # Google's client waits seconds before a second try


class Conflict(Exception):
    """A precondition did not hold, whatever a client calls it."""


class Google:
    """google-cloud-storage."""

    def __init__(self, server):
        self.client = storage.Client(project="test", credentials=AnonymousCredentials())
        self.bucket = self.client.bucket("test")

    def close(self):
        self.client.close()

    def _do(self, name, verb, *args, **kwargs):
        try:
            return getattr(self.bucket.blob(name), verb)(*args, retry=SOON, **kwargs)
        except exceptions.PreconditionFailed as error:
            raise Conflict(name) from error

    def create(self, name, data):
        self.multipart(name, data, 0)

    def multipart(self, name, data, generation=None):
        self._do(name, "upload_from_string", data, if_generation_match=generation)

    def resumable(self, name, data, generation=None):
        """Not by `blob.open`: what was refused there is written when the file object is collected as garbage."""
        blob = self.bucket.blob(name, chunk_size=3 * QUANTUM)
        try:
            blob.upload_from_file(io.BytesIO(data), if_generation_match=generation, retry=SOON)
        except exceptions.PreconditionFailed as error:
            raise Conflict(name) from error

    def read(self, name, start=None, end=None):
        return self._do(name, "download_as_bytes", start=start, end=None if end is None else end - 1)

    def list(self, prefix):
        return [blob.name for blob in self.client.list_blobs("test", prefix=prefix)]

    def folder(self, prefix):
        found = self.client.list_blobs("test", prefix=prefix, delimiter="/")
        return sorted([blob.name for blob in found] + [name.rstrip("/") for name in found.prefixes])

    def delete(self, name, generation=None):
        self._do(name, "delete", if_generation_match=generation)

    def compose(self, name, sources, generation=None):
        self._do(name, "compose", [self.bucket.blob(x) for x in sources], if_generation_match=generation)

    def rewrite(self, name, source, generation=None, source_generation=None):
        where = {"if_generation_match": generation, "if_source_generation_match": source_generation}
        self._do(name, "rewrite", self.bucket.blob(source), **where)

    def patch(self, name, generation=None):
        try:
            blob = self.bucket.blob(name)
            blob.metadata = {"by": "hand"}
            blob.patch(if_generation_match=generation)
        except exceptions.PreconditionFailed as error:
            raise Conflict(name) from error


class Gcsfs:
    """gcsfs; what its own verbs cannot say goes through its `call`, which sends, checks and retries.

    The class of gcsfs.core, since gcsfs reads its environment when it is imported, which may have been earlier."""

    def __init__(self, server):
        self.fs = GCSFileSystem(token="anon", use_listings_cache=False, skip_instance_cache=True)

    def close(self):
        if self.fs._session is not None:
            sync(self.fs.loop, self.fs._session.close)

    def _call(self, method, path, *args, **kwargs):
        try:
            return self.fs.call(method, path, *args, **kwargs)
        except FileExistsError as error:
            raise Conflict(path) from error

    def create(self, name, data):
        try:
            self.fs.pipe_file(f"test/{name}", data, mode="create")
        except FileExistsError as error:
            raise Conflict(name) from error

    def multipart(self, name, data, generation=None):
        if generation is None:
            return self.fs.pipe_file(f"test/{name}", data)
        given = json.dumps({"name": name}).encode()
        body = b"--x\nContent-Type: application/json\n\n" + given + b"\n--x\n\n" + data + b"\n--x--"
        headers = {"Content-Type": "multipart/related; boundary=x"}
        path = f"{self.fs._location}/upload/storage/v1/b/test/o"
        self._call("POST", path, data=body, headers=headers, uploadType="multipart", ifGenerationMatch=generation)

    def resumable(self, name, data, generation=None):
        if generation is None:
            with self.fs.open(f"test/{name}", "wb", block_size=QUANTUM) as file:
                for start in range(0, max(len(data), 1), 3 * QUANTUM):  # it sends what one call gives in one request
                    file.write(data[start : start + 3 * QUANTUM])
            return
        path = f"{self.fs._location}/upload/storage/v1/b/test/o"
        wanted = {"name": name, "uploadType": "resumable", "ifGenerationMatch": generation}
        headers, _ = self._call("POST", path, **wanted)
        self._call("PUT", headers["Location"], data=data)

    def read(self, name, start=None, end=None):
        return self.fs.cat_file(f"test/{name}", start, end)

    def list(self, prefix):
        return [path.removeprefix("test/") for path in self.fs.find("test", prefix=prefix)]

    def folder(self, prefix):
        return sorted(path.removeprefix("test/") for path in self.fs.ls(f"test/{prefix}", detail=False))

    def delete(self, name, generation=None):
        wanted = {} if generation is None else {"ifGenerationMatch": generation}
        self._call("DELETE", "b/{}/o/{}", "test", name, **wanted)

    def compose(self, name, sources, generation):
        given = {"sourceObjects": [{"name": source} for source in sources]}
        self._call("POST", "b/{}/o/{}/compose", "test", name, json=given, ifGenerationMatch=generation)

    def rewrite(self, name, source, generation=None, source_generation=None):
        wanted = {"ifGenerationMatch": generation, "ifSourceGenerationMatch": source_generation}
        wanted = {key: value for key, value in wanted.items() if value is not None}
        self._call("POST", "b/{}/o/{}/rewriteTo/b/{}/o/{}", "test", source, "test", name, **wanted)

    def patch(self, name, generation=None):
        wanted = {} if generation is None else {"ifGenerationMatch": generation}
        self._call("PATCH", "b/{}/o/{}", "test", name, json={"metadata": {"by": "hand"}}, **wanted)
