"""A hub of one data set, `owner/rows`, on this machine: as much of its interface as `datasets` asks for."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "a" * 40
FILE = "train.jsonl"


class Hub(BaseHTTPRequestHandler):
    content = b""

    def log_message(self, *args):
        """Nothing on the tests' output."""

    def answer(self, body, code=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path, file = self.path.split("?")[0], {"type": "file", "path": FILE, "size": len(self.content), "oid": "b" * 40}
        if path == f"/api/datasets/owner/rows/tree/{COMMIT}":
            self.answer([file])
        elif path in ("/api/datasets/owner/rows", f"/api/datasets/owner/rows/revision/{COMMIT}"):
            about = {"private": False, "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
            self.answer({"id": "owner/rows", "sha": COMMIT, "siblings": [{"rfilename": FILE}], **about})
        elif path == f"/datasets/owner/rows/resolve/{COMMIT}/{FILE}":
            self.answer(self.content, ETag='"1"', X_Repo_Commit=COMMIT)
        elif path.startswith(("/api/datasets/owner/rows", "/datasets/owner/rows")):
            self.answer({"error": "none"}, 404, X_Error_Code="EntryNotFound")
        else:
            self.answer({"error": "none"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


@contextmanager
def hub_of(content):
    """The address of a hub whose `owner/rows` holds the JSONL file `content`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubOf", (Hub,), {"content": content}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
