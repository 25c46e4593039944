"""A read-only Hub on the loopback device: what the Hub's client asks to download a model, over real HTTP."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LoopbackHub(BaseHTTPRequestHandler):
    """Serves `root/OWNER/NAME` as repositories with one revision, "main"; those called "gated" ask for a login."""

    root: Path
    protocol_version = "HTTP/1.1"

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def answer_json(self, content: dict | list) -> None:
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/").removeprefix("api/models/").split("/")
        repository, (action, revision) = self.root.joinpath(*path[:2]), (*path[2:4], "", "")[:2]
        if repository.name == "gated":
            return self.answer(401, X_Error_Code="GatedRepo")
        if not repository.is_dir():
            return self.answer(404, X_Error_Code="RepoNotFound")
        if action and revision not in ("main", COMMIT):
            return self.answer(404, X_Error_Code="RevisionNotFound")
        file = repository.joinpath(*path[4:])
        if action == "resolve" and file.is_file():
            data = file.read_bytes()
            return self.answer(200, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"')
        names = sorted(file.name for file in repository.iterdir())
        if action in ("", "revision"):
            files = [{"rfilename": name} for name in names]
            return self.answer_json({"id": "/".join(path[:2]), "sha": COMMIT, "siblings": files})
        if action == "tree" and len(path) == 4:
            return self.answer_json([{"type": "file", "path": name, "size": 1, "oid": COMMIT} for name in names])
        return self.answer(404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def log_message(self, *_) -> None:
        pass


@contextmanager
def loopback_hub(root: Path, answers: type[LoopbackHub] = LoopbackHub) -> Iterator[str]:
    """The address of a Hub of the repositories in `root`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (answers,), {"root": root}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
