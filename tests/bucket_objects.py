"""The objects of the strict server of Cloud Storage (tests/bucket.py): generations, preconditions, pages, uploads, faults, damage."""

import base64
import collections
import datetime
import hashlib
import json
import pathlib
import re
import threading
import time
import urllib.parse
import uuid
from http.client import responses

import google_crc32c

KEPT = ("contentType", "contentEncoding", "cacheControl", "metadata")  # what a client may say of an object
QUANTUM = 256 * 1024  # bytes: chunks of a resumable upload but the last are multiples of it
Answer = collections.namedtuple("Answer", "status headers body", defaults=({}, b""))
Request = collections.namedtuple("Request", "method operation path status received sent")
REASONS = {400: "invalid", 401: "required", 403: "forbidden", 404: "notFound", 412: "conditionNotMet"}
REASONS |= {429: "rateLimitExceeded", 501: "notImplemented", 503: "backendError"}
OBJECT = r"(?P<bucket>[^/]+)/o/(?P<name>.+?)"
ROUTES = [  # operation, method, path; the first that fits
    ("upload", "POST|PUT|DELETE", r"(?:/resumable)?/upload/storage/v1/b/(?P<bucket>[^/]+)/o"),
    ("compose", "POST", rf"/storage/v1/b/{OBJECT}/compose"),
    ("rewrite", "POST", rf"/storage/v1/b/{OBJECT}/(?P<verb>rewriteTo|copyTo)/b/(?P<bucket2>[^/]+)/o/(?P<name2>.+)"),
    ("list", "GET", r"/storage/v1/b/(?P<bucket>[^/]+)/o/?"),
    ("get", "GET", rf"(?P<download>/download)?/storage/v1/b/{OBJECT}"),
    ("patch", "PATCH", rf"/storage/v1/b/{OBJECT}"),
    ("delete", "DELETE", rf"/storage/v1/b/{OBJECT}"),
    ("bucket", "GET", r"/storage/v1/b/(?P<bucket>[^/]+)"),
    ("get", "GET|HEAD", r"/(?P<download>(?!storage/|upload/|download/))(?P<bucket>[^/]+)/(?P<name>.+)"),
]


class Refused(Exception):
    """An answer that is an error, as the real service words it."""

    def __init__(self, status, message=None):
        message = message or {412: "At least one of the pre-conditions you specified did not hold."}.get(status)
        super().__init__(message or responses.get(status, "error"))
        self.status = status

    def answer(self):
        if self.status == 304:
            return Answer(304)
        reason = REASONS.get(self.status, "error")
        error = {"message": str(self), "domain": "global", "reason": reason}
        return reply({"error": {"code": self.status, "message": str(self), "errors": [error]}}, self.status)


def reply(value, status=200, **headers):
    """An answer whose body is a JSON value."""
    return Answer(status, {"Content-Type": "application/json; charset=UTF-8", **headers}, json.dumps(value).encode())


def crc32c(data):
    return base64.b64encode(google_crc32c.Checksum(data).digest()).decode()


def md5(data):
    return base64.b64encode(hashlib.md5(data).digest()).decode()


def etag(entry):
    return base64.b64encode(f"{entry['generation']}/{entry['metageneration']}".encode()).decode()


def now():
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def check(entry, query, *, source=False, read=False):
    """Raises `Refused` unless the preconditions in `query` hold of `entry` (None: there is no such object)."""
    prefix = "ifSource" if source else "if"
    for key, where in (("generation", "Generation"), ("metageneration", "Metageneration")):
        have = int(entry[key]) if entry else 0
        want = query.get(f"{prefix}{where}Match")
        if want is not None and (int(want) != have or (entry is None and where == "Metageneration")):
            raise Refused(412)
        unwanted = query.get(f"{prefix}{where}NotMatch")
        if unwanted is not None and int(unwanted) == have:
            raise Refused(304 if read else 412)


class Server:
    """The state of a storage service and what its requests do to it; `address` is its URL while it is served.

    `buckets` are names, or a mapping of names to locations; `page` is the largest page of a listing."""

    def __init__(self, buckets=("test",), page=1000):
        locations = buckets if isinstance(buckets, dict) else dict.fromkeys(buckets, "US-CENTRAL1")
        self.locations, self.page, self.address = locations, page, None
        self.lock = threading.RLock()
        self.buckets = {name: {} for name in locations}  # bucket -> name -> (metadata, data)
        self.sessions, self.faults, self.requests = {}, [], []
        self.generation = time.time_ns() // 1000

    # What tests call -----------------------------------------------------------------------------------------------

    def fault(self, kind, method=".*", path=".*", times=1, after=0, status=503, seconds=1.0):
        """Makes `times` requests fail, after `after` matching ones went through: `status`, an error instead of an
        answer; `cut`, the connection closes in the middle of the body, nothing is stored; `lost`, carried out but
        not answered; `slow`, answered after `seconds`. `method` and `path` (with its query) are regular
        expressions."""
        if kind not in ("status", "cut", "lost", "slow"):
            raise ValueError(f"fault of kind {kind!r}: expected status, cut, lost or slow")
        fault = dict(kind=kind, method=method, path=path, times=times, after=after, status=status, seconds=seconds)
        with self.lock:
            self.faults.append(fault)

    def damage(self, how, name, bucket="test", data=b"somebody else's"):
        """Somebody else's write: `flip` a bit of the middle byte, `truncate` to half, `delete`, or `add` `data`."""
        if how not in ("flip", "truncate", "delete", "add"):
            raise ValueError(f"damage {how!r}: expected flip, truncate, delete or add")
        with self.lock:
            new = bytearray(data.encode() if isinstance(data, str) else data)
            if how != "add":
                new = bytearray(self.buckets[bucket].pop(name)[1])
            if how == "flip":
                new[len(new) // 2] ^= 1
            elif how == "truncate":
                del new[len(new) // 2 :]
            if how != "delete":
                self.store(bucket, name, bytes(new), {}, {})

    def stats(self):
        """Counts of requests by "METHOD operation", and bytes of bodies received and sent."""
        requests = list(self.requests)
        counts = collections.Counter(f"{r.method} {r.operation}" for r in requests)
        received, sent = sum(r.received for r in requests), sum(r.sent for r in requests)
        return {"requests": dict(counts), "total": len(requests), "received": received, "sent": sent}

    def reset(self):
        """Forgets the requests counted so far and the faults still to come."""
        self.requests.clear()
        self.faults.clear()

    def empty(self):
        """Forgets these and all objects."""
        self.reset()
        for objects in self.buckets.values():
            objects.clear()

    def dump(self, folder, bucket="test"):
        """Writes every object of `bucket` to a file under `folder`."""
        with self.lock:
            objects = {name: data for name, (_, data) in self.buckets[bucket].items()}
        for name, data in objects.items():
            path = pathlib.Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(exist_ok=True) if name.endswith("/") else path.write_bytes(data)

    def load(self, folder, bucket="test"):
        """Stores every file under `folder` as an object of `bucket`."""
        for path in sorted(pathlib.Path(folder).rglob("*")):
            if path.is_file():
                self.store(bucket, path.relative_to(folder).as_posix(), path.read_bytes(), {}, {})

    # What requests do ----------------------------------------------------------------------------------------------

    def find(self, bucket, name, query, **kind):
        """(metadata, data) of an object whose preconditions hold."""
        entry = self.bucket(bucket).get(name)
        generation = query.get("sourceGeneration" if kind.get("source") else "generation")
        if entry is None or generation not in (None, entry[0]["generation"]):
            raise Refused(404, f"No such object: {bucket}/{name}")
        check(entry[0], query, **kind)
        return entry

    def bucket(self, name):
        if name not in self.buckets:
            raise Refused(404, "The specified bucket does not exist.")
        return self.buckets[name]

    def store(self, bucket, name, data, given, query, **extra):
        """Checks and writes in one step; the new object's metadata. Raises Refused (400, 404, 412)."""
        if not name or len(name.encode()) > 1024 or re.search("[\r\n]", name):
            raise Refused(400, f"Invalid object name: {name!r}")
        sums = {"crc32c": crc32c(data)} | ({} if "componentCount" in extra else {"md5Hash": md5(data)})
        for key in sums.keys() & given.keys():
            if given[key] != sums[key]:
                raise Refused(400, f"Provided {key} {given[key]!r} doesn't match calculated {sums[key]!r}.")
        kept = {key: given[key] for key in KEPT if key in given}
        with self.lock:
            old = self.bucket(bucket).get(name)
            check(old and old[0], query)
            self.generation += 1
            entry = {"kind": "storage#object", "id": f"{bucket}/{name}/{self.generation}", "bucket": bucket}
            entry |= {"name": name, "generation": str(self.generation), "metageneration": "1", "size": str(len(data))}
            entry |= {"timeCreated": now(), "updated": now(), "storageClass": "STANDARD"} | sums | kept | extra
            entry["etag"] = etag(entry)
            entry["mediaLink"] = f"{self.address}/download/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, '')}"
            self.buckets[bucket][name] = (entry, data)
            return entry

    def do_bucket(self, method, query, headers, body, bucket):
        self.bucket(bucket)
        where = self.locations[bucket]
        kind = "multi-region" if where in ("US", "EU", "ASIA") else "region"
        value = {"kind": "storage#bucket", "id": bucket, "name": bucket, "location": where, "locationType": kind}
        return reply(value | {"storageClass": "STANDARD", "metageneration": "1", "projectNumber": "1"})

    def do_list(self, method, query, headers, body, bucket):
        for key in ("matchGlob", "softDeleted", "versions", "filter"):
            if query.get(key, "false") != "false":
                raise Refused(501, f"this server has no listing by {key}")
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        start, end = query.get("startOffset", ""), query.get("endOffset")
        after = base64.urlsafe_b64decode(query["pageToken"]).decode() if "pageToken" in query else ""
        limit = min(int(query.get("maxResults") or self.page), self.page)
        found, rows = {}, self.bucket(bucket)
        for name in sorted(n for n in rows if n.startswith(prefix) and n >= start and not (end and n >= end)):
            cut = name.find(delimiter, len(prefix)) if delimiter else -1
            key = name if cut < 0 else name[: cut + len(delimiter)]
            if key > after:
                found.setdefault(key, rows[name][0] if cut < 0 else None)
            if cut >= 0 and key == name and query.get("includeTrailingDelimiter") == "true" and key > after:
                found[key] = rows[name][0]
        page = list(found.items())[:limit]
        value = {"kind": "storage#objects"}
        if items := [entry for _, entry in page if entry]:
            value["items"] = items
        if delimiter and (prefixes := [k for k, _ in page if k.endswith(delimiter) and k != prefix]):
            value["prefixes"] = prefixes
        if len(found) > limit:
            value["nextPageToken"] = base64.urlsafe_b64encode(page[-1][0].encode()).decode()
        return reply(value)

    def do_get(self, method, query, headers, body, bucket, name, download):
        entry, data = self.find(bucket, name, query, read=True)
        if download is None and query.get("alt") != "media":
            return reply(entry)
        sums = [f"crc32c={entry['crc32c']}"] + ([f"md5={entry['md5Hash']}"] if "md5Hash" in entry else [])
        out = {"Content-Type": entry.get("contentType", "application/octet-stream"), "ETag": entry["etag"]}
        out |= {"X-Goog-Hash": ",".join(sums), "X-Goog-Generation": entry["generation"], "Accept-Ranges": "bytes"}
        out |= {"X-Goog-Metageneration": entry["metageneration"], "X-Goog-Stored-Content-Length": entry["size"]}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("Range") or "")
        if wanted is None or not any(wanted.groups()):
            return Answer(200, out, data)
        first, last = wanted.groups()
        begin = int(first) if first else max(len(data) - int(last), 0)
        end = min(int(last) + 1, len(data)) if first and last else len(data)
        if begin >= len(data) or begin >= end:
            return Answer(416, {"Content-Range": f"bytes */{len(data)}"}, b"The requested range cannot be satisfied.")
        out["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        return Answer(206, out, memoryview(data)[begin:end])

    def do_patch(self, method, query, headers, body, bucket, name):
        entry, data = self.find(bucket, name, query)
        given = json.loads(body or b"{}")
        new = entry | {key: given[key] for key in KEPT if key in given}
        new["metadata"] = {**entry.get("metadata", {}), **(new.get("metadata") or {})}
        new["metadata"] = {key: value for key, value in new["metadata"].items() if value is not None}
        new |= {"metageneration": str(int(entry["metageneration"]) + 1), "updated": now()}
        new["etag"] = etag(new)
        self.buckets[bucket][name] = (new, data)
        return reply(new)

    def do_delete(self, method, query, headers, body, bucket, name):
        self.find(bucket, name, query)
        del self.buckets[bucket][name]
        return Answer(204)

    def do_compose(self, method, query, headers, body, bucket, name):
        given, parts, count = json.loads(body), [], 0
        if not 1 <= len(given.get("sourceObjects", [])) <= 32:
            raise Refused(400, "The number of source components provided has to be between 1 and 32.")
        for source in given["sourceObjects"]:
            wanted = {key: source[key] for key in ("generation",) if key in source}
            entry, data = self.find(bucket, source["name"], wanted | source.get("objectPreconditions", {}))
            parts.append(data)
            count += entry.get("componentCount", 1)
        extra = {"componentCount": count}
        return reply(self.store(bucket, name, b"".join(parts), given.get("destination", {}), query, **extra))

    def do_rewrite(self, method, query, headers, body, bucket, name, verb, bucket2, name2):
        old, data = self.find(bucket, name, query, source=True)
        extra = {"componentCount": old["componentCount"]} if "componentCount" in old else {}
        new = self.store(bucket2, name2, data, old | json.loads(body or b"{}"), query, **extra)
        if verb == "copyTo":
            return reply(new)
        size = {"objectSize": new["size"], "totalBytesRewritten": new["size"]}
        return reply({"kind": "storage#rewriteResponse", "done": True, "resource": new} | size)

    def do_upload(self, method, query, headers, body, bucket):
        rows, kind = self.bucket(bucket), query.get("uploadType")
        if "upload_id" in query:
            return self.chunk(method, query["upload_id"], headers, body)
        given = {"contentType": headers.get("Content-Type") or "application/octet-stream"}
        if kind == "multipart":
            given, data = multipart(given["contentType"], body)
        elif kind == "resumable":
            kind_of = headers.get("X-Upload-Content-Type")
            given = ({"contentType": kind_of} if kind_of else {}) | json.loads(body or b"{}")
        elif kind == "media":
            data = body
        else:
            raise Refused(400, f"uploadType {kind!r}: expected media, multipart or resumable")
        name = query.get("name") or given.get("name", "")
        if kind != "resumable":
            return reply(self.store(bucket, name, data, given | sums_of(headers), query))
        check(rows[name][0] if name in rows else None, query)
        key = uuid.uuid4().hex
        self.sessions[key] = dict(bucket=bucket, name=name, given=given, query=query, data=bytearray(), done=None)
        host = f"http://{headers['Host']}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={key}"
        return Answer(200, {"Location": host, "X-GUploader-UploadID": key})

    def chunk(self, method, key, headers, body):
        """One request of a resumable upload: a chunk, the last of them, a question how much arrived, or its end."""
        session = self.sessions.get(key)
        if session is None:
            raise Refused(404, "Upload session not found.")
        if method == "DELETE":
            del self.sessions[key]
            return Answer(499)
        if session["done"]:
            return session["done"]
        data, total = session["data"], str(len(body))
        if match := re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", headers.get("Content-Range") or ""):
            first, last, total = match.groups()
            if first is not None:
                if int(last) - int(first) + 1 != len(body):
                    raise Refused(400, f"Content-Range says {match[0]}, the body has {len(body)} bytes.")
                if int(first) > len(data):
                    raise Refused(503, f"The upload offset is {first}, which exceeds the {len(data)} bytes uploaded.")
                if total == "*" and len(body) % QUANTUM:
                    raise Refused(400, f"The number of bytes of a chunk has to be a multiple of {QUANTUM}.")
                data += body[len(data) - int(first) :]
        else:
            data[:] = body
        if total == "*" or len(data) < int(total):
            return Answer(308, {"Range": f"bytes=0-{len(data) - 1}"} if data else {})
        if len(data) > int(total):
            raise Refused(400, f"{len(data)} bytes were uploaded, more than the {total} of Content-Range.")
        try:
            given = session["given"] | sums_of(headers)
            done = reply(self.store(session["bucket"], session["name"], bytes(data), given, session["query"]))
        except Refused as refused:
            done = refused.answer()
        session.update(done=done, data=None)
        return done

    def half(self, url, headers, body):
        """What arrived of a chunk that was cut stays, in whole quanta, as in the real service."""
        session = self.sessions.get(dict(urllib.parse.parse_qsl(url.partition("?")[2])).get("upload_id"))
        first = re.match(r"bytes (\d+)-", headers.get("Content-Range") or "")
        if session and not session["done"] and first and int(first[1]) == len(session["data"]):
            session["data"] += body[: len(body) // QUANTUM * QUANTUM]

    def answer(self, method, url, headers, body):
        """(operation, answer) of one request of the API; a listing, a write or a read is one atomic step."""
        path, _, query = url.partition("?")
        query, operation = dict(urllib.parse.parse_qsl(query, keep_blank_values=True)), "unknown"
        try:
            fits = (
                (name, re.fullmatch(route, path)) for name, methods, route in ROUTES if method in methods.split("|")
            )
            operation, match = next((fit for fit in fits if fit[1]), ("unknown", None))
            if match is None:
                raise Refused(501 if path.startswith("/storage/") else 404, f"this server has no {method} {path}")
            names = {key: value and urllib.parse.unquote(value) for key, value in match.groupdict().items()}
            with self.lock:
                answer = getattr(self, f"do_{operation}")(method, query, headers, body, **names)
        except Refused as refused:
            answer = refused.answer()
        except (ValueError, KeyError, TypeError) as error:
            answer = Refused(400, f"Invalid request: {error!r}").answer()
        if operation == "get" and (names["download"] is not None or query.get("alt") == "media"):
            operation = "download"
        elif operation == "upload" and query.get("uploadType") == "resumable":
            asked = (headers.get("Content-Range") or "").startswith("bytes */")
            operation = "start" if "upload_id" not in query else "question" if asked else "chunk"
        return operation, answer

    def strike(self, method, url):
        """The fault that this request runs into, or None."""
        with self.lock:
            for fault in self.faults:
                if re.fullmatch(fault["method"], method) and re.search(fault["path"], url):
                    fault["after"] -= 1
                    if fault["after"] < 0 < fault["times"]:
                        fault["times"] -= 1
                        return fault
        return None


def sums_of(headers):
    """The checksums that a client sent along in X-Goog-Hash."""
    pairs = [item.strip().partition("=") for item in (headers.get("X-Goog-Hash") or "").split(",") if item]
    return {{"md5": "md5Hash"}.get(key, key): value for key, _, value in pairs}


def multipart(kind, body):
    """(metadata, data) of a body of multipart/related."""
    match = re.search(r"""boundary=(?:"([^"]+)"|'([^']+)'|([^;]+))""", kind)
    if not match:
        raise Refused(400, "Missing boundary in Content-Type.")
    line = b"--" + next(filter(None, match.groups())).encode()
    end = b"\r\n" if body[body.find(line) + len(line) :].startswith(b"\r\n") else b"\n"
    middle, last = body.find(end + line, len(line)), body.rfind(end + line + b"--")
    if not 0 < middle < last:
        raise Refused(400, "Multipart body without two parts and an end.")
    given = json.loads(body[body.find(end * 2) : middle])
    top = body.find(end * 2, middle + len(end + line))
    kind = re.search(rb"(?i)content-type: *([^\r\n]+)", body[middle:top])
    return ({"contentType": kind[1].decode()} if kind else {}) | given, body[top + 2 * len(end) : last]
