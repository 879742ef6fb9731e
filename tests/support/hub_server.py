"""A server with the download API of the Hugging Face Hub, for one repository."""

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def etag(content):
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


@contextlib.contextmanager
def serving(kind, repository, files):
    """Serve the files of a repository (`kind`: `models` or `datasets`); yield its URL and the names that were sent."""
    served = []

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = self.path.partition("?")[0]
            if path.startswith(f"/api/{kind}/{repository}/tree/"):
                entries = [
                    {"type": "file", "path": name, "size": len(content), "oid": etag(content)}
                    for name, content in files.items()
                ]
                return self.answer(json.dumps(entries).encode())
            if path.startswith(f"/api/{kind}/{repository}"):
                listed = [{"rfilename": name} for name in files]
                return self.answer(json.dumps({"id": repository, "sha": COMMIT, "siblings": listed}).encode())
            name = path.partition(f"/{repository}/resolve/")[2].partition("/")[2]
            if name not in files:
                return self.answer(
                    b"", 404, {"X-Error-Code": "EntryNotFound" if repository in path else "RepoNotFound"}
                )
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
    yield f"http://127.0.0.1:{server.server_port}", served
    server.shutdown()
