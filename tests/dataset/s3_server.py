"""A real S3 server over HTTP (moto's), with an unreliable network before it."""

import io
import os
import random
import socket
import threading
import urllib.request
from contextlib import contextmanager

from moto.server import DomainDispatcherApplication, create_backend_app
from s3fs import S3FileSystem
from werkzeug.serving import WSGIRequestHandler, make_server

KEYS = {"AWS_ACCESS_KEY_ID": "AKIAFORTESTSONLY", "AWS_SECRET_ACCESS_KEY": "nobody-may-see-this/secret+key"}
FAULTS = ("error", "cut", "stored cut", "lost answer", "cut answer")


class Unreliable:
    """WSGI: fails a seeded share of the requests in different ways, and can hold uploads in the middle."""

    def __init__(self, app, share=0.0, seed=0):
        self.app, self.share, self.random, self.faults = app, share, random.Random(seed), FAULTS
        self.lock = threading.Lock()
        self.stored: list[str] = []
        """Keys of the objects that have arrived, whole or not, each time."""
        self.failed: list[str] = []
        self.hold_at: str | None = None
        """An upload whose key ends so is held when half of it has come."""
        self.held, self.go_on = threading.Event(), threading.Event()

    def __call__(self, environ, start_response):
        with self.lock:
            fault = self.random.choice(self.faults) if self.random.random() < self.share else None
        size, is_put = int(environ.get("CONTENT_LENGTH") or 0), environ["REQUEST_METHOD"] == "PUT"
        key = environ["PATH_INFO"]
        if is_put and self.hold_at and key.endswith(self.hold_at):
            environ["wsgi.input"].read(size // 2)
            self.held.set()
            self.go_on.wait(600)
            return self._cut(environ)
        body = environ["wsgi.input"].read(size)
        if fault:
            self.failed.append(fault)
        if fault == "cut":
            return self._cut(environ)
        if fault == "error":
            return self._error(start_response)
        if fault == "stored cut" and is_put:
            body = body[: size // 2]
        environ |= {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
        if is_put:
            self.stored.append(key)
        if fault == "lost answer":
            b"".join(self.app(environ, lambda *_: None))
            return self._error(start_response)
        answer = self.app(environ, start_response)
        if fault == "cut answer" and environ["REQUEST_METHOD"] == "GET":
            whole = b"".join(answer)
            return [whole[: len(whole) // 2]]
        return answer

    def _error(self, start_response):
        start_response("500 Internal Server Error", [("Content-Type", "application/xml")])
        return [b"<Error><Code>InternalError</Code><Message>We are sorry</Message></Error>"]

    def _cut(self, environ):
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return []


class Quiet(WSGIRequestHandler):
    def log(self, *_args):
        pass


@contextmanager
def s3_server(monkeypatch):
    """The server, with a bucket `bucket`; the environment leads to it."""
    unreliable = Unreliable(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, unreliable, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    reached = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}", "AWS_DEFAULT_REGION": "us-east-1"}
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    # One try a request: what is tried again is what madgen tries again.
    for name, value in {**KEYS, **reached, "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()  # one of another server's
    urllib.request.urlopen(urllib.request.Request(f"{reached['AWS_ENDPOINT_URL']}/moto-api/reset", method="POST"))
    client().create_bucket(Bucket="bucket")
    unreliable.stored.clear()
    yield unreliable
    unreliable.go_on.set()
    server.shutdown()
    thread.join()


def client():
    """Another client than the one that madgen uses."""
    import boto3

    return boto3.client("s3")


def objects(bucket="bucket"):
    """What is there: content by key."""
    s3 = client()
    listed = s3.list_objects_v2(Bucket=bucket).get("Contents", [])
    return {entry["Key"]: s3.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read() for entry in listed}
