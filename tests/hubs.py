"""A hub on this machine: as much of the Hugging Face hub's HTTP interface as a model needs to go there and back."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


def commit_of(name: str) -> str:
    """A model's commit, of its own: the hub's library remembers what a commit has."""
    return hashlib.sha1(name.encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """Models by name, each with the files that were committed to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.models: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commands: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        sent = self._read()
        if path == "/api/repos/create":
            asked = json.loads(sent)
            name = "/".join(filter(None, (asked.get("organization") or "me", asked["name"])))
            self.server.models.setdefault(name, {})
            self.server.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
            self._answer({"url": f"{self.server.url}/{name}"})
            return
        if path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
            return
        name = "/".join(path.split("/")[3:5])
        files = self.server.models[name]
        if "/preupload/" in path:
            found = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(sent)["files"]
            ]
            self._answer({"files": found})
        elif "/commit/" in path:
            for line in sent.splitlines():
                change = json.loads(line)
                if change["key"] == "file":
                    files[change["value"]["path"]] = base64.b64decode(change["value"]["content"])
            address = f"{self.server.url}/{name}/commit/{commit_of(name)}"
            self._answer({"commitUrl": address, "commitOid": commit_of(name)})
        else:
            self._answer({}, 200)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in self.server.models:
            files = self.server.models["/".join(parts[2:4])]
            if "tree" in parts:
                self._answer([_entry(name, content) for name, content in sorted(files.items())])
            else:
                siblings = [{"rfilename": name} for name in sorted(files)]
                name = "/".join(parts[2:4])
                self._answer({"id": name, "sha": commit_of(name), "siblings": siblings})
        elif parts[2:3] == ["resolve"] and "/".join(parts[4:]) in self.server.models.get("/".join(parts[:2]), {}):
            content = self.server.models["/".join(parts[:2])]["/".join(parts[4:])]
            self._send(content, "application/octet-stream")
        else:
            self._answer({"error": "Repository not found"}, 404)

    do_HEAD = do_GET

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _answer(self, content: Any, status: int = 200) -> None:
        self._send(json.dumps(content).encode(), "application/json", status)

    def _send(self, content: bytes, kind: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        parts = urlsplit(self.path).path.strip("/").split("/")
        self.send_header("X-Repo-Commit", commit_of("/".join(parts[2:4] if parts[0] == "api" else parts[:2])))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing is printed."""


def _entry(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@contextmanager
def open_hub() -> Iterator[Hub]:
    """A hub as long as the context lasts."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
