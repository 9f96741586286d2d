#!/usr/bin/env bash
# google-cloud-storage 3.17.1: a write refused at close is carried out when the file object is collected.
#
# `close` of `blob.open("wb")` raises when the bucket answers 403 to the start of the upload, but leaves the file open with
# its buffer. Python closes an open file again when it collects it. If the bucket allows writes by then, the object appears,
# although the program was told that the write failed. The error is an InvalidResponse, where upload_from_string raises
# Forbidden for the same answer. (A 412 comes when the upload ends, and is not tried again.)
# Output seen:
#   google-cloud-storage 3.17.1
#   close: InvalidResponse 403; closed False; objects {}
#   after collection: objects {'f': b'mine'}
#   upload_from_string: Forbidden
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q google-cloud-storage==3.17.1 google-resumable-media==2.11.0 google-auth==2.63.0 requests==2.34.2
cd "$folder"
DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA=true venv/bin/python - <<'END'
import gc
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

objects, names, allowed = {}, [], [False]


class Bucket(BaseHTTPRequestHandler):
    """Resumable uploads: a POST starts one or is refused, a PUT carries the bytes."""

    def answer(self, status, body, **headers):
        self.send_response(status)
        body = json.dumps(body).encode()
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not allowed[0]:
            return self.answer(403, {"error": {"code": 403, "message": "no permission to create objects"}})
        names.append(json.loads(body)["name"])
        self.answer(200, {}, Location=f"{os.environ['STORAGE_EMULATOR_HOST']}/upload/{len(names) - 1}")

    def do_PUT(self):
        name = names[int(self.path.rpartition("/")[2])]
        objects[name] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200, {"bucket": "test", "name": name, "generation": "1", "size": str(len(objects[name]))})

    def log_message(self, *args):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["STORAGE_EMULATOR_HOST"] = f"http://127.0.0.1:{server.server_address[1]}"

from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

print("google-cloud-storage", storage.__version__)
blob = storage.Client(project="test", credentials=AnonymousCredentials()).bucket("test").blob("f")
error = None
file = blob.open("wb", if_generation_match=0)
file.write(b"mine")
try:
    file.close()
except Exception as raised:
    error = (type(raised).__name__, raised.response.status_code)
print("close:", *error, end="; ")
print(f"closed {file.closed}; objects {objects}")
before = dict(objects)

allowed[0] = True  # the role was granted meanwhile
del file
gc.collect()
print("after collection: objects", objects)

allowed[0] = False
try:
    blob.upload_from_string(b"mine", if_generation_match=0)
except Exception as raised:
    other = type(raised).__name__
print("upload_from_string:", other)
assert (error, before, objects, other) == (("InvalidResponse", 403), {}, {"f": b"mine"}, "Forbidden"), "this has changed"
END
