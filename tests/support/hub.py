"""A local server in place of the Hugging Face hub, with one model."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "12" * 20
"""Commit of `main`. YAML would read it as a number."""


@contextmanager
def hub_with(repo: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve the files of a folder as the model `repo`; yield the address, and the requested paths."""
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    requested: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *words: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            requested.append(self.path)
            path = self.path.partition("?")[0]
            name = path.rpartition("/")[2]
            if path in (f"/api/models/{repo}", *(f"/api/models/{repo}/revision/{r}" for r in ("main", COMMIT))):
                siblings = [{"rfilename": each} for each in sorted(files)]
                self.answer(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
            elif path.startswith(f"/api/models/{repo}/tree/"):
                tree = [
                    {"type": "file", "path": each, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for each, data in sorted(files.items())
                ]
                self.answer(200, json.dumps(tree).encode())
            elif path == f"/{repo}/resolve/{COMMIT}/{name}" and name in files:
                self.answer(200, files[name], ETag=f'"{hashlib.sha1(files[name]).hexdigest()}"')
            else:
                self.answer(404, b"{}", **{"X-Error-Code": "RepoNotFound"})

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": len(body), "X-Repo-Commit": COMMIT, **headers}.items():
                self.send_header(key, str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requested
    finally:
        server.shutdown()
        server.server_close()
