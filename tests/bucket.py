"""A strict server of Google Cloud Storage's JSON API on loopback, for tests.

It keeps objects in memory, enforces every precondition on generations in one atomic step, hands out real pages,
counts requests and bytes, and fails on request. Clients find it by `environment(url)`:

    with serve(buckets=("test",)) as server:
        server.fault("status", method="PUT", path="upload", status=503, times=3)

or as a process of its own, `python tests/bucket.py --port=0`, which prints its URL and takes the same over HTTP:
POST /faults, /damage, /dump and /load with the arguments as JSON; GET /stats; DELETE /faults and /stats.
"""

import argparse
import contextlib
import gc
import json
import os
import socket
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from bucket_objects import Refused, Request, Server, reply


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16

    def log_message(self, *args):
        pass

    def receive(self, share=1.0):
        """The body, or the first `share` of it."""
        return self.rfile.read(int(int(self.headers.get("Content-Length") or 0) * share))

    def control(self, state):
        """The answer to a request about the server itself."""
        given, name = json.loads(self.receive() or b"{}"), self.path[1:]
        calls = {"faults": state.fault, "damage": state.damage, "dump": state.dump, "load": state.load}
        if self.command == "DELETE":
            {"faults": state.faults, "stats": state.requests}[name].clear()
        elif self.command == "POST":
            try:
                calls[name](**given)
            except (TypeError, ValueError, LookupError, OSError) as error:
                return Refused(400, repr(error)).answer()
        return reply(state.stats())

    def serve(self):
        state = self.server.state
        if self.path in ("/faults", "/stats", "/damage", "/dump", "/load"):
            return self.respond(self.control(state))
        fault = state.strike(self.command, self.path) or {"kind": None}
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.wfile.flush()
        body = self.receive(0.5 if fault["kind"] == "cut" else 1.0)
        if fault["kind"] == "cut":
            state.half(self.path, self.headers, body)
            return self.hang_up(state, "cut", body)
        if fault["kind"] == "slow":
            time.sleep(fault["seconds"])
        if fault["kind"] == "status":
            operation, answer = "refused", Refused(fault["status"]).answer()
        else:
            operation, answer = state.answer(self.command, self.path, self.headers, body)
        if fault["kind"] == "lost":
            return self.hang_up(state, operation, body)
        sent = 0 if self.command == "HEAD" else len(answer.body)
        state.requests.append(Request(self.command, operation, self.path, answer.status, len(body), sent))
        return self.respond(answer)

    def hang_up(self, state, operation, body):
        state.requests.append(Request(self.command, operation, self.path, 0, len(body), 0))
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def respond(self, answer):
        self.send_response_only(answer.status, "Client Closed Request" if answer.status == 499 else None)
        for key, value in answer.headers.items():
            self.send_header(key, value)
        if answer.status not in (204, 304):
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = serve


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        pass  # a client that hangs up is no news

    def process_request(self, request, client_address):
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.connections.discard(request)
        super().shutdown_request(request)


def listen(state, port=0):
    """A listener on loopback for `state`, whose `address` is set."""
    listener = Listener(("127.0.0.1", port), Handler)
    listener.state, listener.connections = state, set()
    state.address = f"http://127.0.0.1:{listener.server_address[1]}"
    return listener


PORT: dict[str, int] = {}


@contextlib.contextmanager
def serve(buckets=("test",), page=1000):
    """A `Server` in a thread; at the end every connection is closed.

    The servers of a process have one port after another, as clients in C++ keep the first address that they meet."""
    try:
        listener = listen(Server(buckets, page), PORT.get("first", 0))
    except OSError:  # two at once
        listener = listen(Server(buckets, page))
    PORT.setdefault("first", listener.server_address[1])
    thread = threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield listener.state
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()
        for connection in list(listener.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def environment(url):
    """The variables that lead every client to the server at `url`, without credentials."""
    return {
        "STORAGE_EMULATOR_HOST": url,  # google-cloud-storage, gcsfs, epath
        "TENSORSTORE_GCS_HTTP_URL": url,
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,  # array_record
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else gcsfs may ask gRPC for a minute
        "FSSPEC_GCS_TOKEN": "anon",
        "NO_GCE_CHECK": "true",  # google-auth looks for no machine of Google's
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # tensorstore looks for no credentials
        "GOOGLE_CLOUD_PROJECT": "test",
        "DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA": "true",  # else a thread asks for the bucket, at some time
    }


@contextlib.contextmanager
def leading_here(**how):
    """A `Server` in a thread, as `serve(**how)`, to which this process's clients are led; nothing of them is left at the end."""
    from dit_jax.files.bucket import _client

    with serve(**how) as server:
        before = {key: os.environ.get(key) for key in environment(server.address)}
        os.environ.update(environment(server.address))
        _client.cache_clear()
        try:
            yield server
        finally:
            _client.cache_clear()
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        gc.collect()  # Google's client, though closed, leaves a few connections to the garbage collector


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--buckets", nargs="+", default=["test"], metavar="NAME[=LOCATION]")
    parser.add_argument("--page", type=int, default=1000)
    args = parser.parse_args()
    pairs = [name.partition("=") for name in args.buckets]
    listener = listen(Server({name: where or "US-CENTRAL1" for name, _, where in pairs}, args.page), args.port)
    print(listener.state.address, flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        listener.serve_forever()


if __name__ == "__main__":
    main()
