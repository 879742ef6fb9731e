"""`madgen fetch` against a local hub server, and errors without a network."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/tiny"


def etag(content):
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


@pytest.fixture
def hub(tiny):
    """Serve the Hugging Face hub's download API with one model; count the files that were sent."""
    files = {path.relative_to(tiny).as_posix(): path.read_bytes() for path in tiny.rglob("*") if path.is_file()}
    served = []

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = self.path.partition("?")[0]
            if path.startswith(f"/api/models/{NAME}/tree/"):
                entries = [
                    {"type": "file", "path": name, "size": len(content), "oid": etag(content)}
                    for name, content in files.items()
                ]
                return self.answer(json.dumps(entries).encode())
            if path.startswith(f"/api/models/{NAME}"):
                listed = [{"rfilename": name} for name in files]
                return self.answer(json.dumps({"id": NAME, "sha": COMMIT, "siblings": listed}).encode())
            name = path.partition(f"/{NAME}/resolve/")[2].partition("/")[2]
            if name not in files:
                return self.answer(b"", 404, {"X-Error-Code": "EntryNotFound" if NAME in path else "RepoNotFound"})
            if self.command == "GET":
                served.append(name)
            return self.answer(files[name])

        def answer(self, content, status=200, headers=None):
            self.send_response(status)
            sent = {
                "Content-Length": len(content),
                "ETag": f'"{etag(content)}"',
                "X-Repo-Commit": COMMIT,
                **(headers or {}),
            }
            for header, value in sent.items():
                self.send_header(header, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}, served
    server.shutdown()


@pytest.mark.slow
def test_fetch_then_generate_offline(hub, madgen, job_file, tmp_path):
    online, served = hub
    online = {**online, "HF_HUB_OFFLINE": None, "HF_HUB_DISABLE_XET": "1"}
    cache = {"HF_HOME": str(tmp_path / "hub")}
    job = [job_file, f"backbone.pretrained={NAME}"]

    missing = madgen("generate", *job, **cache)
    assert missing.code == 2
    assert "madgen fetch JOB.yaml" in missing.err
    assert missing.err.count("\n") == 1

    fetched = madgen("fetch", *job, **online, **cache)
    assert fetched.code == 0, fetched.err
    assert f"backbone.pretrained={NAME}: " in fetched.out
    assert " MB in " in fetched.out
    assert served

    count = len(served)
    again = madgen("fetch", *job, **online, **cache)
    assert (again.code, len(served)) == (0, count), "nothing is downloaded twice"

    made = madgen("generate", *job, "prompts.limit=1", **cache)
    assert made.code == 0, made.err


def test_local_files_are_not_downloaded(madgen_here, job_file):
    for pretrained in ([], ["backbone.pretrained=demo"]):
        result = madgen_here("fetch", job_file, *pretrained)
        assert (result.code, "nothing to download" in result.out) == (0, True), result.err


def test_missing_model_is_a_one_line_error(madgen_here, job_file):
    result = madgen_here("fetch", job_file, "backbone.pretrained=nobody/nothing")
    assert result.code == 2
    assert result.err.startswith("madgen: backbone.pretrained='nobody/nothing' is neither")
    assert result.err.count("\n") == 1
