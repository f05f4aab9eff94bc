"""As much of the API of the Hugging Face Hub as an upload of small files and a download use, over HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_right"


class FakeHub(ThreadingHTTPServer):
    """Repositories in memory, each the last commit alone; `requests` are those that came."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def sha(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def commit_of(files: dict[str, bytes]) -> str:
    return sha(json.dumps({name: sha(content) for name, content in sorted(files.items())}).encode())


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self._path()
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "Invalid credentials"}, 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name in self.server.repositories:
                return self._json({"error": "exists", "url": f"{self.server.address}/{name}"}, 409)
            self.server.repositories[name] = {}
            return self._json({"url": f"{self.server.address}/{name}"})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        if found is None or found[1] not in self.server.repositories:
            return self._missing()
        if found[2] == "preupload":
            files = json.loads(body)["files"]
            return self._json({"files": [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in files]})
        repository = self.server.repositories[found[1]]
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                repository[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "deletedFile":
                del repository[entry["value"]["path"]]
        commit = commit_of(repository)
        return self._json({"commitUrl": f"{self.server.address}/{found[1]}/commit/{commit}", "commitOid": commit})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self._path()
        found = re.fullmatch(r"/(api/models/)?([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)(?:/(.+))?)?", path)
        if found is None or found[2] not in self.server.repositories:
            return self._missing()
        files = self.server.repositories[found[2]]
        commit = commit_of(files)
        if found[4] not in (None, "main", commit):
            return self._json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        if found[3] == "tree":
            return self._json([self._file(name, content) for name, content in files.items()])
        if found[3] != "resolve":
            siblings = [{"rfilename": name} for name in files]
            return self._json({"id": found[2], "modelId": found[2], "sha": commit, "siblings": siblings, "tags": []})
        content = files[found[5]]
        return self._answer(content, 200, {"ETag": f'"{sha(content)}"', "X-Repo-Commit": commit})

    @staticmethod
    def _file(name: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(content), "oid": sha(content)}

    def _path(self) -> str:
        self.server.requests.append(f"{self.command} {self.path}")
        return self.path.partition("?")[0]

    def _missing(self) -> None:
        self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._answer(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _answer(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def serving() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        thread = Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
